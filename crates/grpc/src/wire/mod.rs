//! What goes over the network, and how it becomes what the crate speaks.
//!
//! The manual is `proto/landmark/v1/*.proto`; [`v1`] is generated from it. Conversions in are `TryFrom` and fail only
//! with `Missing(field)` or `Invalid(field)`; conversions out are `From` and cannot fail. They check what the bytes
//! must be to be read at all (lengths, enum numbers, absent messages) and nothing about their meaning: that is the
//! memory's business, so that a remote caller gets the answer that a caller in process gets.
//!
//! Not here: transport (`server`, `client`).

mod admin;
mod block;
mod bounds;
mod convert;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod lookup;
mod spec;
mod state;
mod status;
mod tune;

pub use bounds::{Bounds, Chunks, bounds};
pub use state::{ArrivingState, put_state_messages};
pub use status::{from_status, to_status};

/// Generated from `proto/landmark/v1/*.proto`.
#[allow(clippy::all, unreachable_pub, missing_docs, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("landmark.v1");

    /// The encoded `FileDescriptorSet` of the package, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/landmark.bin"));
}
