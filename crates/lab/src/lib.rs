//! Training of landmark models and adapters, evaluation of memories, and benchmarks.
//!
//! [`train::train`] makes a landmark model from texts, or landmark keys for a model that has none, on a CPU; what comes
//! out is a folder that `landmarkdb_llm::LoadedModel` opens. [`eval`] judges a model and its memory as the Landmark
//! Attention paper does: pass keys by length, perplexity, and recorded outputs of other implementations. [`mod@bench`]
//! measures lookups, decoding and reads beside other programs.
//!
//! `examples/train.rs` trains a small model in seconds and lets it read a text.

#![warn(missing_docs, unreachable_pub)]

mod passkey;

pub mod bench;
pub mod eval;
pub mod train;
