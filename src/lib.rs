//! landmarkdb: a database for the block memory of language models.
//!
//! A model cuts its past into blocks. Each block has landmark keys per layer and KV head; every query scores them,
//! takes the top-k blocks, and attends to the tokens inside those together with its local window. landmarkdb keeps
//! the landmark keys in an index and the blocks' K and V on disk, and answers those lookups in process; landmarkdb-grpc
//! does so over a network.
//!
//! Invariants
//! - Nothing is acknowledged before it is durable. An append that failed is cut off before the next one is written.
//! - Every payload and record carries a checksum; a mismatch is an error that names the block, never a wrong answer.
//! - A collection is bound to a model fingerprint; another model is refused with both fingerprints in the message.
//! - Readers hold a snapshot; a writer publishes the next one. No lock is held across I/O on the lookup path.
//! - Every size that arrives from outside is checked against `limits` before memory is allocated for it.
//!
//! In reading order:

#![warn(unreachable_pub)]

// Values that every layer speaks.
pub mod budget;
pub mod limits;
#[doc(hidden)]
pub mod lock;
#[doc(hidden)]
pub mod lru;
pub mod shape;
pub mod types;
pub mod until;

// The product without a network.
pub mod api;

// Ground state, derived state, and the memory that owns both.
#[cfg(feature = "local")]
pub mod index;
#[cfg(feature = "local")]
pub mod memory;
#[cfg(feature = "local")]
pub mod store;

// What makes it faster where there is a GPU.
#[cfg(feature = "local")]
pub mod cuda;

// Models that remember.
pub mod attention;
