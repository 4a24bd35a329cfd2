//! A memory to measure in: the one that was asked for, or a temporary directory that goes away.

use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use landmarkdb::{BlockMemory, CollectionInfo, DType, LocalMemory};
use landmarkdb_llm::LoadedModel;

use super::Context;
use super::error::CliError;
use super::settings::StorageArgs;
use super::target::Target;

pub(super) struct Scratch {
    pub(super) memory: Arc<dyn BlockMemory>,
    /// The data directory; none where a service has it.
    pub(super) folder: Option<PathBuf>,
    /// Dropped last, when nothing uses it any more.
    pub(super) temporary: Option<TempDir>,
}

impl Context {
    /// The memory that `--data` or `--connect` name, else one in a temporary directory.
    pub(super) fn scratch_memory(&self) -> Result<Scratch, CliError> {
        if self.config.target_typed {
            let folder = match self.config.target()? {
                Target::Data(path) => Some(path.clone()),
                Target::Connect(_) => None,
            };
            return Ok(Scratch { memory: self.memory_or_new()?, folder, temporary: None });
        }
        let directory = tempfile::Builder::new().prefix("landmarkdb-").tempdir();
        let directory = directory.map_err(|source| CliError::Io { what: "a temporary directory", source })?;
        let memory = Arc::new(LocalMemory::open(directory.path())?);
        Ok(Scratch { memory, folder: Some(directory.path().into()), temporary: Some(directory) })
    }
}

impl Scratch {
    /// One collection per payload dtype, or the one that `storage` describes.
    pub(super) fn collections(
        &self,
        storage: &StorageArgs,
        payload_dtypes: &[DType],
        model: &LoadedModel,
    ) -> Result<Vec<CollectionInfo>, CliError> {
        let asked: Vec<Option<DType>> = match payload_dtypes {
            [] => vec![None],
            dtypes => dtypes.iter().copied().map(Some).collect(),
        };
        let open = |payload: Option<DType>| {
            let name = payload.map_or("eval".into(), |payload| format!("eval-{payload}"));
            Ok(self.memory.open_collection(&storage.spec(&name, model, None, payload)?)?)
        };
        asked.into_iter().map(open).collect()
    }
}
