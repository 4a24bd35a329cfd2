//! Which blocks does this query want? Landmark keys in memory, derived from the store and rebuildable from it.
//!
//! [`exact`] is the plain definition of a right answer, [`fast`] is what runs and is tested against it. What collections may have
//! in their place is an [`engine`](mod@engine): keys in fewer bits, a GPU, indexes that name the blocks to compare. Keys lie in immutable
//! snapshots ([`DocumentKeys`]) that readers hold while writers publish longer ones. Nothing here knows slots or documents' names;
//! the only bytes on disk are a cache of indexes.

use std::ops::Range;
use std::sync::Arc;

use crate::types::{BlockScore, Granularity};
use crate::until::Until;

mod choose;
mod compress;
pub mod engine;
pub mod exact;
pub mod fast;
mod kernel;
mod layout;
mod reduce;
mod scan;
mod scratch;
mod select;
mod snapshot;

pub use engine::faiss::DocumentIndexes;
pub use engine::{SearchEngine, cuda, engine};
pub use layout::{Compression, KeyLayout};
pub use snapshot::{Chunk, DocumentKeys, Keys};

/// Consecutive blocks of one document that may be chosen.
#[derive(Clone, Debug)]
pub struct Scoped {
    pub keys: Arc<DocumentKeys>,
    /// Within the blocks of `keys`, of which the tail is the last if it is there.
    pub blocks: Range<u32>,
    /// Of the first blocks of `keys`, if there are any.
    pub indexes: Option<Arc<DocumentIndexes>>,
}

/// One lookup. The eligible blocks are those of `scope`, one entry after the other; a block's *position* is its place
/// in that order, counted from 0.
#[derive(Clone, Debug)]
pub struct Query<'a> {
    /// Of the full blocks of every snapshot in `scope`.
    pub layout: KeyLayout,
    pub layer: usize,
    /// T
    pub tokens: usize,
    /// Hq, a multiple of the layout's Hkv.
    pub query_heads: usize,
    /// `(T, Hq, D)`, rotated for the slot that older blocks are scored in.
    pub queries: &'a [f32],
    /// `(r, T, Hq, D)`: the last r eligible blocks are scored with these instead, in document order.
    pub recent_queries: &'a [f32],
    pub scope: &'a [Scoped],
    /// Blocks to choose per row.
    pub top_k: usize,
    pub block_score: BlockScore,
    pub granularity: Granularity,
    /// What `q . key` is multiplied with.
    pub softmax_scale: f32,
    /// What is found after it is over is not whole.
    pub until: &'a Until,
}

/// The chosen blocks of every row.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Found {
    pub rows: usize,
    /// Blocks per row: `min(top_k, eligible)`.
    pub k: usize,
    /// `(rows, k)`, ascending in each row.
    pub positions: Vec<u32>,
    /// `(rows, k)`: log of the block's share in the softmax over the eligible blocks, after aggregation.
    pub scores: Vec<f32>,
}

impl Query<'_> {
    /// Blocks that may be chosen.
    pub fn eligible(&self) -> usize {
        self.scope.iter().map(|scoped| scoped.blocks.len()).sum()
    }

    /// Rows of choices.
    pub fn rows(&self) -> usize {
        self.granularity.rows(self.tokens, self.query_heads, self.layout.kv_heads)
    }

    /// r, the eligible blocks that have queries of their own.
    fn recent(&self) -> usize {
        self.recent_queries.len().checked_div(self.queries.len()).unwrap_or(0)
    }

    /// The queries `(T, Hq, D)` that set 0 (older blocks) or set `1 + j` (the j-th recent block) is scored with.
    fn query_set(&self, set: usize) -> &[f32] {
        match set.checked_sub(1) {
            None => self.queries,
            Some(recent) => &self.recent_queries[recent * self.queries.len()..][..self.queries.len()],
        }
    }
}

impl Found {
    /// The positions that one row chose, ascending.
    pub fn row(&self, row: usize) -> &[u32] {
        &self.positions[row * self.k..][..self.k]
    }
}

#[cfg(test)]
mod tests;
