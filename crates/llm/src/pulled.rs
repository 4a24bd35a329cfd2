//! Which models were fetched to this machine.

use std::path::{Path, PathBuf};

use super::error::FindError;
use super::packaged::PACKAGED;
use super::resolve::{hub_folder, models_folder, resolve};

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledModel {
    /// What [`resolve`] takes.
    pub name: String,
    /// A `.gguf` file or a safetensors folder.
    pub path: PathBuf,
    /// Of the file, or of all files in the folder.
    pub size_bytes: u64,
}

impl PulledModel {
    /// Measures the model called `name` at `path`.
    pub fn at(name: &str, path: PathBuf) -> Result<Self, FindError> {
        let size_bytes = size_of(&path)?;
        Ok(PulledModel { name: name.into(), path, size_bytes })
    }
}

/// All models that `pull` fetched, by name.
pub fn pulled() -> Result<Vec<PulledModel>, FindError> {
    let mut names: Vec<String> = PACKAGED.iter().map(|packaged| packaged.name.to_string()).collect();
    let hub = hub_folder(&models_folder()?);
    for folder in entries(&hub)? {
        if let Some((organisation, name)) = repository(&folder) {
            let repository = format!("hf:{organisation}/{name}");
            for snapshot in entries(&folder.join("snapshots"))? {
                let files =
                    entries(&snapshot)?.into_iter().filter(|file| file.extension().is_some_and(|e| e == "gguf"));
                names.extend(files.filter_map(|file| Some(format!("{repository}/{}", file.file_name()?.to_str()?))));
            }
            names.push(repository);
        }
    }
    names.sort();
    names.dedup();
    // What cannot be resolved was never fetched whole.
    let whole = names.iter().filter_map(|name| resolve(name).ok().map(|path| PulledModel::at(name, path)));
    whole.collect()
}

/// `(ORG, REPO)` of a folder `models--ORG--REPO`, as the hub's cache names them.
fn repository(folder: &Path) -> Option<(&str, &str)> {
    folder.file_name()?.to_str()?.strip_prefix("models--")?.split_once("--")
}

/// What a folder holds; nothing where it does not exist.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, FindError> {
    let failed = |source| FindError::Io { path: folder.into(), source };
    match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
        Ok(found) => found.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect(),
    }
}

fn size_of(path: &Path) -> Result<u64, FindError> {
    let failed = |source| FindError::Io { path: path.into(), source };
    let metadata = path.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return entries(path)?.iter().map(|entry| size_of(entry)).sum();
    }
    Ok(metadata.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_add_up_and_repositories_are_told_by_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(entries(&folder.path().join("absent")).unwrap(), Vec::<PathBuf>::new());
        std::fs::write(folder.path().join("model.safetensors"), [0; 10]).unwrap();
        std::fs::create_dir(folder.path().join("more")).unwrap();
        std::fs::write(folder.path().join("more").join("config.json"), [0; 5]).unwrap();
        assert_eq!(PulledModel::at("m", folder.path().into()).unwrap().size_bytes, 15);
        assert_eq!(repository(Path::new("hub/models--org--a--b")), Some(("org", "a--b")));
        assert_eq!(repository(Path::new("hub/version.txt")), None);
    }
}
