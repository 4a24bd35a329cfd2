//! Training of landmark models and adapters, evaluation of memories, and benchmarks.

#![warn(unreachable_pub)]

mod passkey;

pub mod bench;
pub mod eval;
pub mod train;
