//! The block memory of one data directory: owns the store (ground state) and the index (derived from it).
//!
//! The only module that knows both. What is acknowledged lies in the store; deleting all that is kept in memory here
//! changes no answer.
//!
//! In reading order: `error` (the one map from the store's), `geometry` (where blocks lie), `collection`, `plan` (what a request
//! needs), `work` (the bytes and threads it gets), `keys` and `gpu` (what is kept in memory), `writers`, `local` (all of it
//! together), `ingest`, `lookup`, `attend`, `read` (one kind of request each), `tune`, `calls` (the trait).

mod attend;
mod calls;
mod collection;
mod error;
mod geometry;
mod gpu;
mod ingest;
mod keys;
mod local;
mod lookup;
mod plan;
mod read;
#[cfg(test)]
mod tests;
mod tune;
mod work;
mod writers;

pub use gpu::GPU_CACHE_BYTES;
pub use keys::keys_bytes;
pub use local::LocalMemory;
pub use work::WORK_BYTES;
