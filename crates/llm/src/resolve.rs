//! How models are named, and where on this machine they lie.

use std::path::{Path, PathBuf};

use hf_hub::Cache;

use super::error::FindError;
use super::packaged::Packaged;

/// What a person may write to name a model.
pub(super) enum Spec<'a> {
    /// A name of [`PACKAGED`](super::packaged::PACKAGED).
    Packaged(&'static Packaged),
    /// `hf:ORG/REPO` or `hf:ORG/REPO/FILE`
    Hub { repo: String, file: Option<&'a str> },
}

impl<'a> Spec<'a> {
    pub(super) fn parse(spec: &'a str) -> Option<Self> {
        if let Some(packaged) = Packaged::find(spec) {
            return Some(Spec::Packaged(packaged));
        }
        let mut parts = spec.strip_prefix("hf:")?.splitn(3, '/');
        let (organisation, repo, file) = (parts.next()?, parts.next()?, parts.next());
        let filled = !organisation.is_empty() && !repo.is_empty() && file != Some("");
        filled.then(|| Spec::Hub { repo: format!("{organisation}/{repo}"), file })
    }
}

/// Where models are kept: `$LANDMARKDB_CACHE`, or `landmarkdb/models` in the user's cache folder.
pub fn models_folder() -> Result<PathBuf, FindError> {
    match std::env::var_os("LANDMARKDB_CACHE").filter(|folder| !folder.is_empty()) {
        Some(folder) => Ok(folder.into()),
        None => Ok(dirs::cache_dir().ok_or(FindError::NoCacheFolder)?.join("landmarkdb").join("models")),
    }
}

/// The path of a model: a `.gguf` file, a safetensors folder, or what `pull` fetched under this name.
pub fn resolve(spec: &str) -> Result<PathBuf, FindError> {
    let found = match Spec::parse(spec) {
        Some(Spec::Packaged(packaged)) => Some(models_folder()?.join(packaged.file)).filter(|path| path.exists()),
        Some(Spec::Hub { repo, file }) => {
            let path = Cache::new(hub_folder(&models_folder()?)).model(repo).get(file.unwrap_or("config.json"));
            path.map(|path| folder_if_config(path, file))
        }
        None => {
            let path = PathBuf::from(spec);
            return if path.exists() { Ok(path) } else { Err(FindError::NotFound { spec: spec.into() }) };
        }
    };
    found.ok_or_else(|| FindError::NotPulled { spec: spec.into() })
}

pub(super) fn hub_folder(models: &Path) -> PathBuf {
    models.join("hub")
}

pub(super) fn folder_if_config(path: PathBuf, file: Option<&str>) -> PathBuf {
    match file {
        Some(_) => path,
        None => path.parent().map(Path::to_path_buf).unwrap_or(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_writes_is_told_apart() {
        let hub = |spec: &'static str| match Spec::parse(spec) {
            Some(Spec::Hub { repo, file }) => Some((repo, file)),
            _ => None,
        };
        assert!(matches!(Spec::parse("smollm2"), Some(Spec::Packaged(packaged)) if packaged.name == "smollm2"));
        assert_eq!(hub("hf:a/b"), Some(("a/b".into(), None)));
        assert_eq!(hub("hf:a/b/c/d.gguf"), Some(("a/b".into(), Some("c/d.gguf"))));
        for wrong in ["hf:", "hf:a", "hf:a/", "hf:/b", "hf:a/b/", "a/b", "smollm3"] {
            assert!(Spec::parse(wrong).is_none(), "{wrong}");
        }
        assert!(matches!(resolve("no/such/file.gguf"), Err(FindError::NotFound { .. })));
    }
}
