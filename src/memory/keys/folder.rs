//! Where are indexes kept between runs? In a folder of the data directory, as a cache: what is missing is built anew.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::store::Store;
use crate::types::DocumentId;

/// Where indexes are kept between runs, if anywhere.
#[derive(Default)]
pub(in crate::memory) struct IndexFolder(Option<PathBuf>);

impl IndexFolder {
    /// Inside a data directory. Indexes of documents that are gone go too.
    pub(in crate::memory) fn open(data: &Path, store: &Store) -> IndexFolder {
        let root = data.join("indexes");
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            let document = entry.file_name().to_str().and_then(|name| name.parse().ok()).map(DocumentId);
            if document.is_none_or(|document| store.manifest(document).is_err()) {
                remove(&entry.path());
            }
        }
        IndexFolder(Some(root))
    }

    pub(in crate::memory) fn folder(&self, document: DocumentId) -> Option<PathBuf> {
        Some(self.0.as_ref()?.join(document.to_string()))
    }

    pub(in crate::memory) fn forget(&self, document: DocumentId) {
        if let Some(folder) = self.folder(document) {
            remove(&folder);
        }
    }
}

fn remove(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("indexes of a deleted document stay in {}: {error}", folder.display());
        }
        _ => {}
    }
}
