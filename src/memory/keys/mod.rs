//! Landmark keys in memory, which are never written: what a lookup wants is read from the store.
//!
//! In reading order: `machine` (how many bytes they may take), `folder` (indexes that are kept between runs), `load` (from the
//! store), `passing` (keys of one request), `cache` (keys that stay).

mod cache;
mod folder;
mod load;
mod machine;
mod passing;

pub(super) use cache::{Held, KeyCache, are_indexed};
pub(super) use folder::IndexFolder;
pub(super) use load::{Loader, Quantizers};
pub use machine::keys_bytes;
pub(super) use passing::Pass;
