//! The engine `faiss`: indexes of the FAISS library name the blocks that are compared.
//!
//! ```text
//! library     the FAISS library behind four calls; a stand-in where the program is built without it
//! indexes     one document's indexes: built when first asked, kept on disk between runs
//! candidates  only the blocks that indexes name are scored and compared
//! ```

mod candidates;
mod indexes;
#[cfg_attr(not(feature = "faiss"), path = "faiss/library_absent.rs")]
mod library;

pub use indexes::DocumentIndexes;

use super::SearchEngine;
use crate::index::{Found, Query, fast};
use crate::types::FaissIndex;

#[derive(Debug)]
pub(super) struct Faiss(pub(super) FaissIndex);

impl SearchEngine for Faiss {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        library::check(&self.0.factory, head_dim)
    }

    fn indexes(&self) -> Option<&FaissIndex> {
        Some(&self.0)
    }

    fn search(&self, query: &Query<'_>) -> Found {
        match query.scope.iter().any(|scoped| scoped.indexes.is_some()) {
            true => candidates::search(query),
            false => fast::search(query),
        }
    }
}
