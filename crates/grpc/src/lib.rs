//! landmarkdb over gRPC: the service, and a client that is the memory of another process.

#![warn(unreachable_pub)]

pub mod client;
pub mod server;
pub mod wire;
