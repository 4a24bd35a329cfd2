//! One layer's attention with memory, for any model that hands over `q`, `k` and `v` before RoPE.

use crate::api::MemoryError;

/// Why attention could not be computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AttentionError {
    #[error("{field}: expected {expected}, found {found}")]
    Invalid { field: &'static str, expected: String, found: String },
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Attention of all layers of one sequence; keeps what it must of the past.
pub trait SequenceAttention {
    /// One layer's attention for the next `tokens` tokens of the sequence, all slices row-major:
    /// `q (T, Hq, D)`, `k (T, Hkv, D)`, `v (T, Hkv, D)`, before RoPE. Returns `(T, Hq, D)`.
    ///
    /// Called for layers 0, 1, .. L-1 with one group of tokens before the next group of tokens.
    fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Result<Vec<f32>, AttentionError>;
}
