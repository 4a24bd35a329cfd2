//! Training of landmark models and adapters, and evaluation of memories.

#![warn(unreachable_pub)]

mod passkey;

pub mod eval;
pub mod train;
