//! Cold reads: files that leave the page cache.

use std::fs::File;
use std::path::Path;

use super::error::BenchError;

/// Drops what the page cache has of a file; what is not on disk yet stays.
pub(super) fn forget_pages(file: &File) -> Result<(), BenchError> {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)
        .map_err(|error| BenchError::Io { what: "emptying the page cache", source: error.into() })
}

/// Writes every file under a folder to disk, and drops it from the page cache.
pub(super) fn forget_files(folder: &Path) -> Result<(), BenchError> {
    let failed = |source| BenchError::Io { what: "emptying the page cache", source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            forget_files(&path)?;
        } else {
            let file = File::open(&path).and_then(|file| file.sync_all().map(|()| file));
            forget_pages(&file.map_err(failed)?)?;
        }
    }
    Ok(())
}
