//! Opens the memory that a command works on, and finds the documents that it names there.

use std::collections::HashMap;
use std::collections::hash_map::Entry::{Occupied, Vacant};
use std::path::Path;
use std::sync::Arc;

use landmarkdb::{BlockMemory, CollectionId, CollectionInfo, DocumentInfo, Entity, LocalMemory, MemoryError};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};

use super::Context;
use super::config::Config;
use super::error::CliError;
use super::target::Target;

/// What every data directory has (docs/architecture.md).
const SEGMENTS: &str = "segments";

impl Context {
    /// The memory that exists where the command works. A data directory that does not exist, and a folder that is none, are
    /// refused and nothing is written there: a mistyped path would otherwise look like an empty memory.
    pub(super) fn memory(&self) -> Result<Arc<dyn BlockMemory>, CliError> {
        if let Target::Data(path) = self.config.target()? {
            check_data(path)?;
        }
        self.open()
    }

    /// The same for commands that write: a data directory that does not exist is created.
    pub(super) fn memory_or_new(&self) -> Result<Arc<dyn BlockMemory>, CliError> {
        if self.config.read_only {
            return Err(CliError::ReadOnly);
        }
        self.open()
    }

    fn open(&self) -> Result<Arc<dyn BlockMemory>, CliError> {
        match self.config.target()? {
            Target::Data(path) => {
                let memory = self.config.open_data(path)?.with_keys(self.config.keys_bytes);
                Ok(Arc::new(memory.with_gpu_cache(self.config.gpu_cache_bytes)))
            }
            Target::Connect(target) => {
                let mut options = ClientOptions::default();
                if let Some(deadline) = self.config.deadline {
                    options.deadline = deadline;
                }
                Ok(Arc::new(RemoteMemory::connect(target, options)?))
            }
        }
    }
}

/// That a folder is a data directory; changes nothing.
fn check_data(path: &Path) -> Result<(), CliError> {
    if !path.is_dir() {
        return Err(CliError::NoDataDirectory { path: path.into() });
    }
    if !path.join(SEGMENTS).is_dir() {
        return Err(CliError::NoStore { path: path.into() });
    }
    Ok(())
}

impl Config {
    /// A data directory, for writing unless nothing may be written: then it has to exist.
    pub(super) fn open_data(&self, path: &Path) -> Result<LocalMemory, CliError> {
        if !self.read_only {
            return Ok(LocalMemory::open(path)?);
        }
        check_data(path)?;
        Ok(LocalMemory::open_read_only(path)?)
    }
}

/// A document as it was typed: `NAME` in the collection of the configuration, or `COLLECTION/NAME`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DocumentName {
    pub(super) collection: String,
    pub(super) name: String,
}

impl DocumentName {
    /// With `--collection` typed all of `doc` is the document's name, so that names may contain a slash.
    pub(super) fn new(doc: &str, config: &Config) -> Self {
        match doc.split_once('/') {
            Some((collection, name)) if !config.collection_typed => {
                DocumentName { collection: collection.into(), name: name.into() }
            }
            _ => DocumentName { collection: config.collection.clone(), name: doc.into() },
        }
    }

    /// The document and its collection.
    pub(super) fn find(&self, memory: &dyn BlockMemory) -> Result<(CollectionInfo, DocumentInfo), CliError> {
        Listings::of(memory)?.find(self)
    }

    /// The same of many, in their order: each collection is listed once.
    pub(super) fn find_all(
        names: &[DocumentName],
        memory: &dyn BlockMemory,
    ) -> Result<Vec<(CollectionInfo, DocumentInfo)>, CliError> {
        let mut listings = Listings::of(memory)?;
        names.iter().map(|name| listings.find(name)).collect()
    }
}

/// What a memory has, listed as far as it was asked.
struct Listings<'a> {
    memory: &'a dyn BlockMemory,
    collections: Vec<CollectionInfo>,
    /// By collection and name.
    documents: HashMap<CollectionId, HashMap<String, DocumentInfo>>,
}

impl<'a> Listings<'a> {
    fn of(memory: &'a dyn BlockMemory) -> Result<Self, CliError> {
        Ok(Listings { memory, collections: memory.collections()?, documents: HashMap::new() })
    }

    fn find(&mut self, name: &DocumentName) -> Result<(CollectionInfo, DocumentInfo), CliError> {
        let missing = |entity, id: String| CliError::Memory(MemoryError::NotFound { entity, id });
        let collection = self.collections.iter().find(|collection| collection.spec.name == name.collection);
        let collection = collection.ok_or_else(|| missing(Entity::Collection, name.collection.clone()))?;
        let documents = match self.documents.entry(collection.id) {
            Occupied(listed) => listed.into_mut(),
            Vacant(place) => {
                let listed = self.memory.documents(collection.id)?;
                place.insert(listed.into_iter().map(|document| (document.name.clone(), document)).collect())
            }
        };
        let document = documents.get(&name.name).ok_or_else(|| missing(Entity::Document, name.to_string()))?;
        Ok((collection.clone(), document.clone()))
    }
}

impl std::fmt::Display for DocumentName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.collection, self.name)
    }
}
