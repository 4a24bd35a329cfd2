//! Ground state: what is on disk, and nothing else knows how.
//!
//! Documents are sequences of blocks. Payloads, keys, text and manifests go to an append-only log of segment files,
//! which is the truth; a catalog says where things lie in it and can be deleted at any time (opening rebuilds it).
//! An append is acknowledged once its group of records is durable in the log and entered in the catalog.
//!
//! Not here: what keys mean, how they are searched, and what a payload is used for.
//!
//! In reading order: `record` (the format), `segment` and `catalog` (the two seams under everything), `log` (groups of
//! records), `ledger` (what records mean), `append` and `mend`, `locator_cache` and `read`, `directory`, `recovery` and `loss`, `compaction`,
//! `verify` and `rebuild`, `repair` and `salvage`; `piece` stands apart.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::lock::IgnorePoison;
use crate::shape::{CollectionSpec, check_name};
use crate::types::{CollectionId, DocumentId, Engine};

mod append;
mod aside;
mod catalog;
mod catalog_memory;
mod compaction;
mod directory;
mod error;
mod ledger;
mod locator_cache;
mod log;
mod loss;
mod mend;
pub mod piece;
mod read;
mod rebuild;
mod record;
mod recovery;
mod repair;
mod salvage;
mod segment;
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
pub use compaction::Compactor;
pub use directory::is_data_directory;
pub use error::{Entity, StoreError};
pub use mend::Held;
pub use record::CollectionEntry;
pub use repair::{Moved, RepairOptions, RepairReport};
pub use salvage::{Leftover, LostCollection, MissingCollection, Salvaged};
pub use segment::{DirectoryId, SegmentFile, SegmentFolder, SegmentId, Segments, Torn};
pub use verify::{Fault, VerifyReport};
pub use write::Health;

use catalog_memory::{CatalogSlot, MemoryCatalog};
use compaction::Victim;
use ledger::{Ledger, NAMES};
use locator_cache::LocatorCache;
use record::{DocumentEntry, Locator, Tombstone};
use segment::{Handles, Segment, private};

/// A document as of its last acknowledged change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub id: DocumentId,
    pub collection: CollectionId,
    pub name: String,
    /// Takes no more appends.
    pub sealed: bool,
    /// Full blocks.
    pub blocks: u32,
    /// Tokens after the last full block, 0 to B - 1; stored as block index `blocks`.
    pub tail_tokens: u32,
    /// Bytes of source text that the tokens cover.
    pub text_bytes: u64,
    /// Bytes of this document's records, this manifest included.
    pub stored_bytes: u64,
}

/// The tokens of one block and the text they came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockMeta {
    pub token_ids: Vec<u32>,
    /// Where the block begins in the document's source text, in bytes.
    pub text_start: u64,
    pub text: Vec<u8>,
    /// Where each token begins in `text`: one per token.
    pub text_offsets: Vec<u32>,
}

/// One block to store: full, or a tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRecord {
    /// Position in the document, counted in blocks.
    pub index: u32,
    pub meta: BlockMeta,
    /// L * Hkv times what [`piece::KeysLayout::encode`] gives; empty for a tail. If a document's blocks have codes,
    /// they lie before the keys of the first.
    pub keys: Vec<u8>,
    /// L * Hkv times what [`piece::PieceLayout::encode`] gives, for the block's own number of tokens.
    pub pieces: Vec<u8>,
}

/// What a deletion gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Full blocks that the document had.
    pub blocks: u32,
    /// Bytes of its records, which compaction gives back.
    pub bytes: u64,
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

/// An open data directory. One process holds it at a time; its threads share it.
pub struct Store {
    handles: Handles,
    catalog: CatalogSlot,
    locators: LocatorCache,
    writer: Mutex<Writer>,
    /// As of the last write; readers of it do not wait for one under way.
    stats: Mutex<StoreStats>,
    health: Mutex<Health>,
    compactor: Signal,
    /// Released last.
    _lock: Option<File>,
}

/// What only the one who writes may touch.
struct Writer {
    active: Arc<Segment>,
    /// Where the next group goes in the active segment.
    end: u64,
    ledger: Ledger,
    /// Damaged segments, which compaction leaves alone.
    unmovable: BTreeSet<SegmentId>,
    sizes: Sizes,
    /// The segment that compaction is emptying.
    victim: Option<Victim>,
    /// Whether it is worth looking for another: a document was deleted, or a segment closed.
    may_have_much_dead: bool,
    /// Whether nothing lies behind `end` that a failed call may have left.
    end_is_known: bool,
    /// The catalog could not be replaced a moment ago.
    readers_wait_until: Option<Instant>,
}

/// What a store is made of, and the lock that keeps others out.
type Parts = (Box<dyn Segments>, Arc<dyn Catalog>, File);

/// How writers call the compactor.
#[derive(Default)]
struct Signal {
    runs: AtomicBool,
    asked: Mutex<bool>,
    wake: Condvar,
}

/// How much goes into one file, and into one group of a compaction.
#[derive(Clone, Copy)]
struct Sizes {
    segment_bytes: u64,
    group_bytes: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes { segment_bytes: limits::SEGMENT_BYTES, group_bytes: limits::COMPACTION_BYTES }
    }
}

const LOCK_FILE: &str = "LOCK";
const CATALOG_FOLDER: &str = "catalog";

impl Store {
    /// Opens a data directory, creating it if absent, and recovers from whatever happened to it.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let (segments, catalog, lock) = Store::parts(dir, open_catalog)?;
        let mut store = Store::open_sized(segments, catalog, Sizes::default())?;
        store.handles.folder().keep_reserve();
        store._lock = Some(lock);
        Ok(store)
    }

    fn parts(
        dir: &Path,
        open_catalog: impl FnOnce(&Path) -> Result<Arc<dyn Catalog>, StoreError>,
    ) -> Result<Parts, StoreError> {
        let id = directory::open(dir)?;
        let lock = private().create(true).open(dir.join(LOCK_FILE)).map_err(StoreError::io("open the lock file"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Locked { path: dir.to_owned() }),
            Err(TryLockError::Error(source)) => {
                return Err(StoreError::Io { step: "lock the data directory", source });
            }
        }
        let segments = SegmentFolder::open(dir, id).map_err(StoreError::io("open the segment folder"))?;
        let catalog = open_catalog(&dir.join(CATALOG_FOLDER))?;
        Ok((Box::new(segments), catalog, lock))
    }

    /// Opens what lies behind the two seams. The caller sees to it that nobody else has it open.
    pub fn open_on(segments: Box<dyn Segments>, catalog: Box<dyn Catalog>) -> Result<Store, StoreError> {
        Store::open_sized(segments, catalog.into(), Sizes::default())
    }

    fn open_sized(segments: Box<dyn Segments>, catalog: Arc<dyn Catalog>, sizes: Sizes) -> Result<Store, StoreError> {
        let handles = Handles::new(segments);
        let writer = recovery::recover(&handles, &*catalog, sizes)?;
        let stats = Mutex::new(writer.stats());
        let garbage = catalog::scan::<DocumentId>(&*catalog, catalog::key::GARBAGE);
        let locators = LocatorCache::of_deleted(garbage.map(|pair| pair.map(|pair| pair.1)).collect::<Result<_, _>>()?);
        Ok(Store {
            handles,
            catalog: CatalogSlot::new(catalog),
            locators,
            writer: Mutex::new(writer),
            stats,
            health: Mutex::default(),
            compactor: Signal::default(),
            _lock: None,
        })
    }

    /// Creates a collection. Names are unique among collections.
    pub fn create_collection(&self, spec: &CollectionSpec) -> Result<CollectionId, StoreError> {
        spec.check()?;
        self.write(|writer| {
            if self.find_collection(&spec.name)?.is_some() {
                return Err(StoreError::AlreadyExists { name: spec.name.clone() });
            }
            let id = writer.ledger.totals.next_collection;
            if id.0 == u32::MAX {
                return Err(error::used_up("id of a collection"));
            }
            self.make_room(writer, 0)?;
            let entry = CollectionEntry { spec: spec.clone(), engine: Engine::default() };
            self.commit(writer, |group| group.collection(id, &entry))?;
            Ok(id)
        })
    }

    /// `Damaged` if none is found and names may be lost.
    pub fn find_collection(&self, name: &str) -> Result<Option<CollectionId>, StoreError> {
        self.undoubted_name(self.catalog_get(&catalog::key::collection_name(name))?)
    }

    /// Changes what answers lookups in a collection.
    pub fn set_engine(&self, id: CollectionId, engine: Engine) -> Result<(), StoreError> {
        self.write(|writer| {
            let mut entry = self.collection(id)?.ok_or(StoreError::NotFound { entity: Entity::Collection(id) })?;
            if entry.engine != engine {
                entry.engine = engine;
                self.make_room(writer, 0)?;
                self.commit(writer, |group| group.collection(id, &entry))?;
            }
            Ok(())
        })
    }

    /// All collections, by id.
    pub fn collections(&self) -> Result<Vec<(CollectionId, CollectionEntry)>, StoreError> {
        let mut collections = Vec::new();
        for pair in catalog::scan::<(Locator, CollectionEntry)>(self.readable(), catalog::key::COLLECTIONS) {
            let (key, (_, entry)) = pair?;
            collections.push((catalog::key::collection_of(&key)?, entry));
        }
        Ok(collections)
    }

    pub fn collection(&self, id: CollectionId) -> Result<Option<CollectionEntry>, StoreError> {
        let found = self.catalog_get::<(Locator, CollectionEntry)>(&catalog::key::collection(id))?;
        Ok(found.map(|(_, entry)| entry))
    }

    /// Creates an empty open document. Names are unique within a collection.
    pub fn create_document(&self, collection: CollectionId, name: &str) -> Result<Manifest, StoreError> {
        check_name("name", name)?;
        self.write(|writer| {
            let of = self.collection(collection)?;
            let of = of.ok_or(StoreError::NotFound { entity: Entity::Collection(collection) })?;
            if self.find_document(collection, name)?.is_some() {
                return Err(StoreError::AlreadyExists { name: name.into() });
            }
            if writer.ledger.totals.next_document.0 == u64::MAX {
                return Err(error::used_up("id of a document"));
            }
            self.make_room(writer, 0)?;
            let entry = writer.new_document(collection, name, of.spec.shape.block_tokens);
            self.commit(writer, |group| group.document(entry.clone()))?;
            Ok(entry.manifest)
        })
    }

    /// `Damaged` if none is found and names may be lost.
    pub fn find_document(&self, collection: CollectionId, name: &str) -> Result<Option<DocumentId>, StoreError> {
        self.undoubted_name(self.catalog_get(&catalog::key::document_name(collection, name))?)
    }

    fn undoubted_name<T>(&self, found: Option<T>) -> Result<Option<T>, StoreError> {
        if found.is_none() {
            self.check_undoubted(NAMES)?;
        }
        Ok(found)
    }

    /// `Damaged` if a newer one is lost.
    pub fn manifest(&self, document: DocumentId) -> Result<Manifest, StoreError> {
        self.check_undoubted(document)?;
        Ok(self.entry(document)?.manifest)
    }

    /// All documents of a collection, by name.
    pub fn manifests(&self, collection: CollectionId) -> Result<Vec<Manifest>, StoreError> {
        let mut manifests = Vec::new();
        for pair in catalog::scan::<DocumentId>(self.readable(), &catalog::key::document_name(collection, "")) {
            match self.entry(pair?.1) {
                Ok(entry) => manifests.push(entry.manifest),
                // Deleted since the scan began.
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(manifests)
    }

    /// How many documents a collection has; reads none of them.
    pub fn document_count(&self, collection: CollectionId) -> Result<u64, StoreError> {
        let names = catalog::scan::<DocumentId>(self.readable(), &catalog::key::document_name(collection, ""));
        names.map(|name| name.map(|_| 1)).sum()
    }

    /// Takes no more appends from now on. Sealing a sealed document changes nothing.
    pub fn seal(&self, document: DocumentId) -> Result<Manifest, StoreError> {
        self.write(|writer| {
            let mut entry = self.entry(document)?;
            self.check_undoubted(document)?;
            if !entry.manifest.sealed {
                entry.manifest.sealed = true;
                self.make_room(writer, 0)?;
                self.commit(writer, |group| group.document(entry.clone()))?;
            }
            Ok(entry.manifest)
        })
    }

    /// Deletes a document, durably. Its space comes back afterwards (see [`Compactor`] and `limits::SPACE_PERCENT_MAX`).
    /// Blocks being read meanwhile are read to their end.
    pub fn delete(&self, document: DocumentId) -> Result<Freed, StoreError> {
        self.write_to_free(|writer| {
            let entry = self.entry(document)?;
            self.make_room(writer, 0)?;
            let last_segment = writer.active.id;
            let tombstone = Tombstone { document, first_segment: entry.first_segment, last_segment };
            self.commit(writer, |group| group.tombstone(entry.manifest.collection, tombstone))?;
            writer.may_have_much_dead = true;
            Ok(Freed { blocks: entry.manifest.blocks, bytes: entry.manifest.stored_bytes })
        })
    }

    /// What torn ends cut off, in any order.
    pub fn torn(&self) -> Result<Vec<Torn>, StoreError> {
        self.handles.folder().torn().map_err(StoreError::io("list what was set aside"))
    }

    /// Lets go what torn ends cut off.
    pub fn discard_torn(&self) -> Result<(), StoreError> {
        self.handles.folder().discard_torn().map_err(StoreError::io("remove what was set aside"))
    }

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

    fn entry(&self, document: DocumentId) -> Result<DocumentEntry, StoreError> {
        match self.catalog_get::<(Locator, DocumentEntry)>(&catalog::key::document(document))? {
            Some((_, entry)) => Ok(entry),
            None => {
                self.check_undoubted(document).and(Err(StoreError::NotFound { entity: Entity::Document(document) }))
            }
        }
    }

    fn catalog_get<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StoreError> {
        catalog::get(self.readable(), key)
    }

    /// The catalog for readers. One that failed midway is not read from; unless a writer is about to, they replace it.
    fn readable(&self) -> &CatalogSlot {
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

/// The catalog on disk, or one in memory in its place where the disk does not let it be opened.
fn open_catalog(path: &Path) -> Result<Arc<dyn Catalog>, StoreError> {
    match SledCatalog::open(path) {
        Ok(catalog) => Ok(Arc::new(catalog)),
        // It is there, and works as soon as files can be opened again.
        Err(error) if catalog::is_out_of_files(&error) => Err(StoreError::Catalog { step: "open", source: error }),
        Err(error) => {
            tracing::error!(%error, "the catalog cannot be opened: it is rebuilt in memory");
            Ok(Arc::new(MemoryCatalog::in_place_of_folder(path.to_owned())))
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // What a caller was told has failed must not be found by the next opening, in the log or, in part, in the catalog.
        let cut = self.writer.get_mut().ignore_poison().cut_back();
        if let Err(error) = cut {
            tracing::error!(%error, "an append that failed may be there when the store is opened again");
        }
        if self.catalog.is_torn() {
            if let Err(error) = self.catalog.discard() {
                tracing::error!(%error, "a change that failed may be there in part when the store is opened again: run `landmarkdb repair`");
            }
        } else if let Err(error) = self.catalog.flush() {
            tracing::warn!(%error, "the catalog was not flushed; the next opening reads more of the log");
        }
    }
}

impl Writer {
    fn new_document(&self, collection: CollectionId, name: &str, block_tokens: u32) -> DocumentEntry {
        let manifest = Manifest {
            id: self.ledger.totals.next_document,
            collection,
            name: name.into(),
            sealed: false,
            blocks: 0,
            tail_tokens: 0,
            text_bytes: 0,
            stored_bytes: 0,
        };
        let mut entry = DocumentEntry { manifest, first_segment: self.active.id, block_tokens, tail_sequence: 0 };
        entry.manifest.stored_bytes = entry.record_bytes();
        entry
    }

    fn stats(&self) -> StoreStats {
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

impl Manifest {
    /// Whether block `index` is one of its full blocks or its tail.
    fn covers(&self, index: u32) -> bool {
        index < self.blocks || index == self.blocks && self.tail_tokens > 0
    }
}
