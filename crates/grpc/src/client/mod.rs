//! The memory of another process, as if it were in this one.
//!
//! ```text
//! remote    RemoteMemory: BlockMemory over gRPC
//! connect   targets, options, the connection and its small runtime
//! retry     what is tried again, how often, how long apart
//! multiplex small lookups and attends over one long stream
//! append    batches over a stream, resumed where it broke
//! state     a state over a stream of its parts
//! cache     blocks that were fetched before, bounded in bytes
//! ```

mod append;
mod cache;
mod connect;
mod multiplex;
mod remote;
mod retry;
mod state;

pub use cache::{CacheCounts, CachedBlocks};
pub use connect::ClientOptions;
pub use remote::RemoteMemory;
