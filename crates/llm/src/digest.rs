//! Digests of model files, remembered beside the models: hashing reads gigabytes of a large one.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::LoadError;
use super::resolve::models_folder;
use landmarkdb::Sha256Digest;

/// SHA-256 of a whole file.
pub(super) fn sha256_of(path: &Path) -> std::io::Result<Sha256Digest> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Sha256Digest(hash.finalize().into())),
            bytes => hash.update(&buffer[..bytes]),
        }
    }
}

/// SHA-256 of a whole file.
///
/// # Errors
/// A file that cannot be read.
pub fn file_digest(path: &Path) -> Result<Sha256Digest, LoadError> {
    sha256_of(path).map_err(|source| LoadError::Io { path: path.into(), source })
}

/// SHA-256 of a model's weight files: of the file itself when there is one, else of the digests of all, in order.
pub(super) fn weights_digest<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<Sha256Digest, LoadError> {
    let digests = paths.map(|path| {
        let source = |source| LoadError::Io { path: path.into(), source };
        remembered_digest(path, models_folder().ok().as_deref()).map_err(source)
    });
    Ok(match digests.collect::<Result<Vec<_>, _>>()?.as_slice() {
        [only] => *only,
        several => {
            let mut hash = Sha256::new();
            several.iter().for_each(|digest| hash.update(digest.0));
            Sha256Digest(hash.finalize().into())
        }
    })
}

/// What was found out about a file, and how to tell that it is still the same.
#[derive(PartialEq, Serialize, Deserialize)]
struct Remembered {
    path: PathBuf,
    size_bytes: u64,
    modified_ns: u128,
    sha256: Sha256Digest,
}

/// The digest of a file, from `cache` when the file has not changed since.
fn remembered_digest(path: &Path, cache: Option<&Path>) -> std::io::Result<Sha256Digest> {
    let path = path.canonicalize()?;
    let metadata = path.metadata()?;
    let modified_ns =
        metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default().as_nanos();
    let note = cache.map(|cache| {
        let name = Sha256Digest(Sha256::digest(path.as_os_str().as_encoded_bytes()).into());
        cache.join("digests").join(format!("{name}.json"))
    });
    let known = note
        .as_deref()
        .and_then(read_remembered)
        .filter(|known| known.path == path && known.size_bytes == metadata.len() && known.modified_ns == modified_ns);
    if let Some(known) = known {
        return Ok(known.sha256);
    }
    let sha256 = sha256_of(&path)?;
    let fresh = Remembered { path, size_bytes: metadata.len(), modified_ns, sha256 };
    if let Some(note) = note
        && let Err(error) = write_remembered(&note, &fresh)
    {
        tracing::debug!(path = %note.display(), %error, "a digest is not remembered");
    }
    Ok(sha256)
}

fn read_remembered(path: &Path) -> Option<Remembered> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn write_remembered(path: &Path, remembered: &Remembered) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let temporary = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&temporary, remembered)?;
    temporary.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_remembered_until_the_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("weights");
        let digest = || remembered_digest(&file, Some(folder.path())).unwrap();
        std::fs::write(&file, b"one").unwrap();
        let one = digest();
        assert_eq!(one, sha256_of(&file).unwrap());

        let note = std::fs::read_dir(folder.path().join("digests")).unwrap().next().unwrap().unwrap().path();
        let mut known = read_remembered(&note).unwrap();
        known.sha256 = Sha256Digest([7; 32]);
        write_remembered(&note, &known).unwrap();
        assert_eq!(digest(), Sha256Digest([7; 32]), "the note is what answers");

        std::fs::write(&file, b"three").unwrap();
        assert_eq!(digest(), sha256_of(&file).unwrap());
        assert_ne!(digest(), one);

        std::fs::write(&note, b"{").unwrap();
        assert_eq!(digest(), sha256_of(&file).unwrap(), "a damaged note is no note");
    }
}
