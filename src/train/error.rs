//! Why training cannot go on.

use crate::model::{LoadError, SaveError};
use crate::shape::InvalidShape;

/// Why a model cannot be trained, or not be trained further.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    Shape(#[from] InvalidShape),
    #[error("{field}: expected {expected}, found {found}")]
    Invalid { field: &'static str, expected: String, found: String },
    #[error(
        "sequence {sequence}, token {token}: expected {}, found token {found}; \
         close every block of {block_tokens} tokens with the landmark {landmark}, and no other place",
        if *token as u32 % block_tokens == block_tokens - 1 { "the landmark" } else { "no landmark" }
    )]
    LandmarkPlace { sequence: usize, token: usize, found: u32, landmark: u32, block_tokens: u32 },
    #[error("a tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}
