//! Attention with memory, for any model that hands over `q`, `k` and `v` before RoPE.
//!
//! A [`BlockAttention`] is the attention of all layers of one sequence. It keeps a local window of recent tokens (and
//! the sink, the first block of the text), asks a [`BlockMemory`](crate::api::BlockMemory) for the blocks that each
//! query attends to, and merges both by log-sum-exp. Blocks of the sequence go to the memory as they fill.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use landmarkdb::{AttentionError, BlockAttention, BlockMemory, CollectionInfo, Retrieval, SequenceAttention, Window};
//!
//! /// `q (T, Hq, D)`, `k` and `v (T, Hkv, D)` of each layer, before RoPE.
//! fn read(
//!     memory: Arc<dyn BlockMemory>,
//!     collection: &CollectionInfo,
//!     layers: &[[Vec<f32>; 3]],
//!     tokens: usize,
//! ) -> Result<(), AttentionError> {
//!     let document = memory.open_document(collection.id, "session-17")?;
//!     let (window, retrieval) = (Window::default(), Retrieval::default());
//!     let mut attention = BlockAttention::write(memory, collection, &document, window, Some(retrieval))?;
//!     for (layer, [q, k, v]) in layers.iter().enumerate() {
//!         let out = attention.attend(layer, tokens, q, k, v)?;
//!         println!("layer {layer}: {} of (T, Hq, D)", out.len());
//!     }
//!     Ok(())
//! }
//! ```
//!
//! The memory may be in process or remote: this folder knows only the interface.

mod at_hand;
mod cut;
mod lead;
mod local;
mod resume;
mod session;
mod settings;
mod trace;
mod window;
mod writer;

pub use session::BlockAttention;
pub use settings::{CHUNK_TOKENS, CountedFrom, Layers, Retrieval, Window};
pub use trace::{AtHandReads, BlockReads, HeadReads, Place, Reads};
pub use writer::NewTokens;

use crate::api::MemoryError;

/// Why attention could not be computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// An argument of the wrong size, or a call out of order.
    #[error("{field}: expected {expected}, found {found}")]
    Invalid {
        /// The argument, or the call that was due.
        field: &'static str,
        /// What the sequence can take next.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// The memory failed or refused a request.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Attention of all layers of one sequence, which keeps the K and V that later tokens need.
pub trait SequenceAttention {
    /// One layer's attention for the next `tokens` tokens of the sequence, all slices row-major:
    /// `q (T, Hq, D)`, `k (T, Hkv, D)`, `v (T, Hkv, D)`, before RoPE. Returns `(T, Hq, D)`.
    ///
    /// Call it for layers 0, 1, .. L - 1 with one group of tokens before the next group of tokens.
    ///
    /// # Errors
    /// [`AttentionError::Invalid`] for slices of the wrong length or calls out of order, [`AttentionError::Memory`] from the
    /// memory.
    fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Result<Vec<f32>, AttentionError>;

    /// Position of the next token: the tokens that all layers have seen, after those of the text that the sequence
    /// continues.
    fn position(&self) -> usize;
}
