//! landmarkdb over gRPC: the service, and a client that is the memory of another process.
//!
//! [`client::RemoteMemory`] implements [`BlockMemory`](landmarkdb::BlockMemory): a model runs on it as on a memory
//! in process, with the same answers bit for bit. [`server::serve`] answers for any such memory on TCP and Unix sockets,
//! within bounds on messages, work and connections. The wire manual is `proto/landmark/v1`; [`wire`] has the types
//! generated from it.
//!
//! ```no_run
//! use landmarkdb::BlockMemory;
//! use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
//!
//! # fn main() -> landmarkdb::Result<()> {
//! let memory = RemoteMemory::connect("unix:/run/landmarkdb.sock", ClientOptions::default())?;
//! for collection in memory.collections()? {
//!     println!("{}: {} documents", collection.spec.name, collection.documents);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/remote.rs` starts a service and uses it.

#![warn(missing_docs, unreachable_pub)]

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod server;
pub mod wire;
