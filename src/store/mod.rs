//! Ground state: what is on disk, and nothing else knows how.
//!
//! Documents are sequences of blocks. Payloads, keys, text and manifests go to an append-only log of segment files,
//! which is the truth; a catalog says where things lie in it and can be deleted at any time (opening rebuilds it).
//! An append is acknowledged once its group of records is durable in the log and entered in the catalog.
//!
//! Not here: what keys mean, how they are searched, and what a payload is used for.
//!
//! In reading order, each file importing only files before it:
//! - what is stored: `place`, `error`, `document`, `segment` (the seam under the log), `entry`, `record` and `piece` (as bytes), `catalog` (the
//!   seam under the view) and `catalog_memory`;
//! - the log: `scan`, `handles`, `ledger` (what records mean), `log` (groups of records), `loss`, `locator_cache`;
//! - the store: `state`, `recovery`, `directory`, `open`, `read_only`, `read`, `verify`, `append`, `kept`, `mend`, `collections`, `compaction`, `aside`,
//!   `rebuild`, `write`;
//! - repair: `repair_work`, `salvage`, `repair`.

mod append;
mod aside;
mod catalog;
mod catalog_memory;
mod collections;
mod compaction;
mod directory;
mod document;
mod entry;
mod error;
mod handles;
mod kept;
mod ledger;
mod locator_cache;
mod log;
mod loss;
mod mend;
mod open;
pub mod piece;
mod place;
mod read;
mod read_only;
mod rebuild;
mod record;
mod recovery;
mod repair;
mod repair_work;
mod salvage;
mod scan;
mod segment;
mod state;
mod verify;
mod write;

#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code))]
mod fault_disk;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod tests;

pub use catalog::{Batch, Catalog, Pair, SledCatalog};
pub use collections::Freed;
pub use compaction::Compactor;
pub use directory::is_data_directory;
pub use document::{BlockExtent, BlockMeta, BlockRecord, KeptState, Manifest, Misfit, check_blocks};
pub use entry::CollectionEntry;
pub use error::{Entity, StoreError};
pub use mend::Held;
pub use repair::{Moved, RepairOptions, RepairReport};
pub use salvage::{Leftover, LostCollection, LostState, MissingCollection, Salvaged};
pub use segment::{DirectoryId, SegmentFile, SegmentFolder, SegmentId, Segments, Torn};
pub use state::{Health, Store, StoreStats};
pub use verify::{Fault, VerifyReport};
