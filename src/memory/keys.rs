//! Which landmark keys are in memory? One snapshot per document, loaded at its first lookup and extended by appends.
//!
//! A snapshot holds the keys of a document's first blocks, however many. Full blocks never change, so every such
//! prefix is right; publishing only longer ones makes it safe for loaders and writers to race. The same holds for the indexes
//! of a long document: they cover some first blocks, and are built again when it has grown by half.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use rayon::prelude::*;

use super::Collection;
use crate::api::{MemoryError, Result};
use crate::index::{Chunk, DocumentIndexes, DocumentKeys, KeyLayout, Keys};
use crate::limits;
use crate::numeric::ChannelCode;
use crate::store::piece::{KeyNumbers, KeysLayout};
use crate::store::{Store, StoreError};
use crate::types::{BlockId, DocumentId, FaissIndex};

/// What is kept in memory of every document that was used.
#[derive(Default)]
pub(super) struct Documents(RwLock<HashMap<DocumentId, Arc<DocumentState>>>);

/// Where indexes are kept between runs. A cache: what is missing is built anew.
#[derive(Default)]
pub(super) struct IndexFolder(Option<PathBuf>);

impl IndexFolder {
    /// Inside a data directory. Indexes of documents that are gone go too.
    pub(super) fn open(data: &Path, store: &Store) -> IndexFolder {
        let root = data.join("indexes");
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            let document = entry.file_name().to_str().and_then(|name| name.parse().ok()).map(DocumentId);
            if document.is_none_or(|document| store.manifest(document).is_err()) {
                remove(&entry.path());
            }
        }
        IndexFolder(Some(root))
    }

    pub(super) fn folder(&self, document: DocumentId) -> Option<PathBuf> {
        Some(self.0.as_ref()?.join(document.to_string()))
    }

    pub(super) fn forget(&self, document: DocumentId) {
        if let Some(folder) = self.folder(document) {
            remove(&folder);
        }
    }
}

fn remove(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("indexes of a deleted document stay in {}: {error}", folder.display());
        }
        _ => {}
    }
}

/// What is kept in memory of one document.
pub(super) struct DocumentState {
    /// Held while the document is written: what is durable does not change between a check and the write.
    writer: Mutex<()>,
    /// Locked only to copy or swap the pointer.
    keys: RwLock<Arc<DocumentKeys>>,
    /// Likewise.
    indexes: RwLock<Option<Arc<DocumentIndexes>>>,
    /// Whether larger indexes are being built.
    building: AtomicBool,
    /// By which the document's keys are int8 `(L * Hkv)`, or none; set once its first block was read.
    codes: OnceLock<Arc<[ChannelCode]>>,
}

impl Documents {
    pub(super) fn state(&self, document: DocumentId, layout: KeyLayout) -> Arc<DocumentState> {
        if let Some(state) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&document) {
            return state.clone();
        }
        let mut states = self.0.write().unwrap_or_else(PoisonError::into_inner);
        states.entry(document).or_insert_with(|| Arc::new(DocumentState::new(layout))).clone()
    }

    pub(super) fn forget(&self, document: DocumentId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&document);
    }

    /// Gives back what a document's keys and indexes take; its next lookup loads them again.
    pub(super) fn unload(&self, document: DocumentId) {
        if let Some(state) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&document) {
            let mut keys = state.keys.write().unwrap_or_else(PoisonError::into_inner);
            *keys = Arc::new(DocumentKeys::empty(keys.layout()));
            *state.indexes.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// Bytes of keys and their indexes held.
    pub(super) fn bytes(&self) -> u64 {
        let states = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let of_indexes = |state: &DocumentState| {
            state.indexes.read().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |indexes| indexes.bytes())
        };
        states.values().map(|state| state.snapshot().bytes() + of_indexes(state)).sum()
    }
}

impl DocumentState {
    fn new(layout: KeyLayout) -> Self {
        DocumentState {
            writer: Mutex::new(()),
            keys: RwLock::new(Arc::new(DocumentKeys::empty(layout))),
            indexes: RwLock::new(None),
            building: AtomicBool::new(false),
            codes: OnceLock::new(),
        }
    }

    pub(super) fn lock_writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self) -> Arc<DocumentKeys> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Snapshots of another layout, from before the collection's engine was changed or after, give way.
    fn publish(&self, longer: Arc<DocumentKeys>) {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if longer.layout() != keys.layout() || longer.blocks() > keys.blocks() {
            *keys = longer;
        }
    }

    /// What is here in a layout: nothing if it is in another.
    fn snapshot_in(&self, layout: KeyLayout) -> Arc<DocumentKeys> {
        let here = self.snapshot();
        if here.layout() == layout { here } else { Arc::new(DocumentKeys::empty(layout)) }
    }

    /// The codes of a document whose first block is durable.
    pub(super) fn codes(
        &self,
        store: &Store,
        collection: &Collection,
        document: DocumentId,
    ) -> Result<Arc<[ChannelCode]>> {
        let layout = KeysLayout::of(&collection.spec);
        if !layout.has_codes() {
            return Ok(Arc::default());
        }
        if let Some(codes) = self.codes.get() {
            return Ok(codes.clone());
        }
        let block = BlockId { document, index: 0 };
        let bytes = store.read_keys(block)?;
        let (codes, _) = layout.split_codes(&bytes).map_err(data_loss(block))?;
        Ok(self.codes.get_or_init(|| codes.into()).clone())
    }

    /// The keys of at least the first `blocks` blocks, which must be durable; reads from the store what is not here yet.
    pub(super) fn load(
        &self,
        store: &Store,
        collection: &Collection,
        document: DocumentId,
        blocks: u32,
    ) -> Result<Arc<DocumentKeys>> {
        let here = self.snapshot_in(collection.layout);
        if here.blocks() >= blocks {
            return Ok(here);
        }
        let codes = self.codes(store, collection, document)?;
        let step = here.layout().chunk_blocks();
        let parts: Vec<Range<u32>> = (here.blocks()..blocks)
            .step_by(step)
            .map(|start| start..blocks.min(start.saturating_add(step as u32)))
            .collect();
        let chunks = parts
            .into_par_iter()
            .map(|part| {
                let mut chunk = Chunk::coded(here.layout(), codes.clone(), part.len());
                for (i, index) in part.enumerate() {
                    let block = BlockId { document, index };
                    put(&mut chunk, i, collection, block, &store.read_keys(block)?)?;
                }
                Ok(chunk)
            })
            .collect::<Result<Vec<Chunk>>>()?;
        let longer = Arc::new(here.extended(chunks));
        self.publish(longer.clone());
        Ok(longer)
    }

    /// Indexes of a document with such keys, if it is long enough. Those that cover it well enough are used as they are; once
    /// half as many blocks have come as they cover, larger ones are built beside the lookups and replace them.
    pub(super) fn indexes(
        self: &Arc<Self>,
        setting: &FaissIndex,
        keys: &Arc<DocumentKeys>,
        folder: Option<PathBuf>,
    ) -> Option<Arc<DocumentIndexes>> {
        if keys.blocks() as usize * keys.layout().keys_per_block < limits::INDEXED_KEYS_MIN {
            return None;
        }
        let here = self.indexes.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(here) = here.filter(|here| here.setting() == setting) else {
            let new = Arc::new(DocumentIndexes::of(setting.clone(), keys, folder));
            *self.indexes.write().unwrap_or_else(PoisonError::into_inner) = Some(new.clone());
            return Some(new);
        };
        if here.blocks() > keys.blocks() {
            // Of blocks that came since these keys were read.
            return None;
        }
        if !here.cover(keys) && !self.building.swap(true, Ordering::AcqRel) {
            let (state, keys) = (self.clone(), keys.clone());
            let larger = Arc::new(DocumentIndexes::of_all(setting.clone(), &keys, folder));
            // Not in rayon's pool, whose threads answer lookups.
            std::thread::spawn(move || {
                larger.complete(&keys);
                let mut indexes = state.indexes.write().unwrap_or_else(PoisonError::into_inner);
                // Unless the setting was changed meanwhile.
                if indexes.as_ref().is_some_and(|indexes| indexes.setting() == larger.setting()) {
                    *indexes = Some(larger);
                }
                state.building.store(false, Ordering::Release);
            });
        }
        Some(here)
    }

    /// Adds the keys of blocks that just became durable, `first` and the following, each as the store keeps them.
    /// If earlier ones are not here, the next lookup loads all of them.
    pub(super) fn extend(
        &self,
        store: &Store,
        collection: &Collection,
        document: DocumentId,
        first: u32,
        encoded: &[&[u8]],
    ) -> Result<()> {
        let here = self.snapshot_in(collection.layout);
        if here.blocks() != first || encoded.is_empty() {
            return Ok(());
        }
        let codes = self.codes(store, collection, document)?;
        let mut chunk = Chunk::coded(here.layout(), codes, encoded.len());
        for (i, bytes) in encoded.iter().enumerate() {
            let block = BlockId { document, index: first + i as u32 };
            put(&mut chunk, i, collection, block, bytes)?;
        }
        self.publish(Arc::new(here.extended([chunk])));
        Ok(())
    }
}

/// Sets all keys of one block from the bytes that the store keeps.
fn put(chunk: &mut Chunk, at: usize, collection: &Collection, block: BlockId, bytes: &[u8]) -> Result<()> {
    let layout = KeysLayout::of(&collection.spec);
    let bytes = if block.index == 0 { layout.split_codes(bytes).map_err(data_loss(block))?.1 } else { bytes };
    let decoded = layout.decode(chunk.is_coded(), bytes).map_err(data_loss(block))?;
    for (piece, numbers) in decoded.enumerate() {
        let keys = match &numbers {
            KeyNumbers::F16(numbers) => Keys::F16(numbers),
            KeyNumbers::Int8 { numbers, scales } => Keys::Int8 { numbers, scales },
        };
        chunk.put(at, piece, keys);
    }
    Ok(())
}

/// For `map_err`: what a block's bytes say makes no sense.
fn data_loss(block: BlockId) -> impl FnOnce(StoreError) -> MemoryError {
    move |error| MemoryError::DataLoss { block: Some(block), detail: error.to_string() }
}
