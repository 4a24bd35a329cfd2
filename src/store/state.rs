//! An open store: what it consists of, and what its calls share.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use serde::de::DeserializeOwned;

use super::catalog::{self, Catalog, key};
use super::catalog_memory::CatalogSlot;
use super::error::{Entity, StoreError};
use super::handles::{Handles, Segment};
use super::ledger::Ledger;
use super::locator_cache::LocatorCache;
use super::record::{DocumentEntry, Locator};
use super::segment::SegmentId;
use crate::limits;
use crate::lock::IgnorePoison;
use crate::types::DocumentId;

/// An open data directory. One process holds it at a time; its threads share it.
pub struct Store {
    pub(super) handles: Handles,
    pub(super) catalog: CatalogSlot,
    pub(super) locators: LocatorCache,
    pub(super) writer: Mutex<Writer>,
    /// As of the last write; readers of it do not wait for one under way.
    pub(super) stats: Mutex<StoreStats>,
    pub(super) health: Mutex<Health>,
    pub(super) compactor: Signal,
    /// Nothing may be changed.
    pub(super) reads_only: bool,
    /// Released last.
    pub(super) _lock: Option<File>,
}

/// What only the one who writes may touch.
pub(super) struct Writer {
    pub(super) active: Arc<Segment>,
    /// Where the next group goes in the active segment.
    pub(super) end: u64,
    pub(super) ledger: Ledger,
    /// Damaged segments, which compaction leaves alone.
    pub(super) unmovable: BTreeSet<SegmentId>,
    pub(super) sizes: Sizes,
    /// The segment that compaction is emptying.
    pub(super) victim: Option<Victim>,
    /// Whether it is worth looking for another: a document was deleted, or a segment closed.
    pub(super) may_have_much_dead: bool,
    /// Whether nothing lies behind `end` that a failed call may have left.
    pub(super) end_is_known: bool,
    /// The catalog could not be replaced a moment ago.
    pub(super) readers_wait_until: Option<Instant>,
}

/// Whether a store takes writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    #[default]
    Serving,
    /// Reads and deletes only, for as long as the disk is full; or reads only, for good.
    ReadOnly { reason: String },
    /// A write failed and could not be undone. Reads go on, and every write begins by trying again.
    Failed { reason: String },
}

/// The segment that is being emptied.
pub(super) struct Victim {
    pub(super) segment: Arc<Segment>,
    /// Where the next record to look at lies.
    pub(super) at: u64,
    /// Tombstones of documents that have no record left anywhere else.
    pub(super) dropped: Vec<DocumentId>,
    pub(super) dropped_bytes: u64,
}

/// How writers call the compactor.
#[derive(Default)]
pub(super) struct Signal {
    pub(super) runs: AtomicBool,
    pub(super) asked: Mutex<bool>,
    pub(super) wake: Condvar,
}

/// How much goes into one file, and into one group of a compaction.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) segment_bytes: u64,
    pub(super) group_bytes: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes { segment_bytes: limits::SEGMENT_BYTES, group_bytes: limits::COMPACTION_BYTES }
    }
}

/// Totals of one data directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    pub documents: u64,
    /// Full blocks.
    pub blocks: u64,
    pub tokens: u64,
    /// Bytes that anything refers to.
    pub live_bytes: u64,
    /// Bytes of all segment files.
    pub segment_bytes: u64,
    pub segments: u64,
    /// Bytes of the catalog on disk; 0 if they cannot be counted.
    pub catalog_bytes: u64,
    /// Bytes that were set aside; 0 if they cannot be counted.
    pub set_aside_bytes: u64,
}

impl Store {
    pub fn stats(&self) -> StoreStats {
        let stats = *self.stats.lock().ignore_poison();
        let catalog_bytes = self.catalog.size_bytes().unwrap_or_else(|error| {
            tracing::warn!(%error, "the size of the catalog is not known");
            0
        });
        let set_aside = self.torn().unwrap_or_else(|error| {
            tracing::warn!(%error, "what was set aside is not known");
            Vec::new()
        });
        StoreStats { catalog_bytes, set_aside_bytes: set_aside.iter().map(|torn| torn.bytes).sum(), ..stats }
    }

    pub(super) fn entry(&self, document: DocumentId) -> Result<DocumentEntry, StoreError> {
        match self.catalog_get::<(Locator, DocumentEntry)>(&key::document(document))? {
            Some((_, entry)) => Ok(entry),
            None => {
                self.check_undoubted(document).and(Err(StoreError::NotFound { entity: Entity::Document(document) }))
            }
        }
    }

    pub(super) fn catalog_get<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StoreError> {
        catalog::get(self.readable(), key)
    }

    /// The catalog for readers. One that failed midway is not read from; unless a writer is about to, they replace it.
    pub(super) fn readable(&self) -> &CatalogSlot {
        if self.catalog.is_broken()
            && self.catalog.is_torn()
            && let Ok(mut writer) = self.writer.try_lock()
            && writer.readers_wait_until.is_none_or(|end| end <= Instant::now())
        {
            // What stands in the way of it, readers are told by the catalog.
            let _ = self.find_end(&mut writer);
        }
        &self.catalog
    }
}

impl Writer {
    pub(super) fn stats(&self) -> StoreStats {
        let totals = &self.ledger.totals;
        StoreStats {
            documents: totals.documents,
            blocks: totals.blocks,
            tokens: totals.tokens,
            live_bytes: self.ledger.live_bytes(),
            segment_bytes: self.ledger.bytes(),
            segments: self.ledger.segments.len() as u64,
            catalog_bytes: 0,
            set_aside_bytes: 0,
        }
    }
}
