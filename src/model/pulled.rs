//! Which models were fetched before.

use std::path::{Path, PathBuf};

use super::cache::models_folder;
use super::error::PullError;
use super::pull::{hub_folder, resolve, SMOLLM2};

/// A model in the cache folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledModel {
    /// What `--model` takes.
    pub name: String,
    /// A GGUF file or a safetensors folder.
    pub path: PathBuf,
    pub size_bytes: u64,
}

impl PulledModel {
    /// The model that is known as `name` and lies at `path`.
    pub fn at(name: &str, path: PathBuf) -> Result<Self, PullError> {
        let size_bytes = size_bytes(&path).map_err(|source| PullError::Io { path: path.clone(), source })?;
        Ok(PulledModel { name: name.into(), path, size_bytes })
    }
}

/// Every model in the cache folder, by name. A repository of the hub is listed once, as the folder of its files.
pub fn pulled() -> Result<Vec<PulledModel>, PullError> {
    let mut names = vec![SMOLLM2.name.to_string()];
    let hub = hub_folder(&models_folder()?);
    // The hub's cache has one folder per repository: models--ORG--REPO.
    for entry in std::fs::read_dir(&hub).into_iter().flatten().flatten() {
        let folder = entry.file_name().to_string_lossy().into_owned();
        if let Some((organisation, repo)) = folder.strip_prefix("models--").and_then(|name| name.split_once("--")) {
            names.push(format!("hf:{organisation}/{repo}"));
        }
    }
    names.sort();
    let here = names.into_iter().filter_map(|name| resolve(&name).ok().map(|path| PulledModel::at(&name, path)));
    here.collect()
}

/// Of a file, or of all files in a folder; links are followed.
fn size_bytes(path: &Path) -> std::io::Result<u64> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    std::fs::read_dir(path)?.map(|entry| Ok(std::fs::metadata(entry?.path())?.len())).sum()
}
