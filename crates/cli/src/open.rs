//! Opens the memory that a command works on, and finds the documents that it names there.

use std::sync::Arc;

use landmarkdb::{BlockMemory, CollectionInfo, DocumentInfo, Entity, LocalMemory, MemoryError};
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
        match self.config.target()? {
            Target::Data(path) if !path.is_dir() => Err(CliError::NoDataDirectory { path: path.clone() }),
            Target::Data(path) if !path.join(SEGMENTS).is_dir() => Err(CliError::NoStore { path: path.clone() }),
            _ => self.memory_or_new(),
        }
    }

    /// The same for commands that write: a data directory that does not exist is created.
    pub(super) fn memory_or_new(&self) -> Result<Arc<dyn BlockMemory>, CliError> {
        match self.config.target()? {
            Target::Data(path) => {
                let memory = LocalMemory::open(path)?.with_keys(self.config.keys_bytes);
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
        let missing = |entity, id: String| CliError::Memory(MemoryError::NotFound { entity, id });
        let collection = memory
            .collections()?
            .into_iter()
            .find(|collection| collection.spec.name == self.collection)
            .ok_or_else(|| missing(Entity::Collection, self.collection.clone()))?;
        let document = memory
            .documents(collection.id)?
            .into_iter()
            .find(|document| document.name == self.name)
            .ok_or_else(|| missing(Entity::Document, self.to_string()))?;
        Ok((collection, document))
    }
}

impl std::fmt::Display for DocumentName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.collection, self.name)
    }
}
