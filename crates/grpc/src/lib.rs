//! landmarkdb over gRPC: the service, and a client that is the memory of another process.

#![warn(unreachable_pub)]

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod server;
pub mod wire;
