//! Which landmark keys are in memory? Those of the documents that were looked up last, as many as a budget holds.
//!
//! A snapshot holds the keys of a document's first blocks, however many, and of its tail once that is final. Full blocks never change,
//! so every such prefix is right. It is loaded by the first lookup that wants it, while others that want the same wait for that one; appends make it longer if there
//! is room. What a running request reads stays until it ends; of the rest those used longest ago go. A request that wants more than
//! there is room for reads the keys of its layer alone, in passing, from a quarter of the budget that is kept for that: one that
//! needs more than the quarter does so alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rayon::prelude::*;

use super::load::{Loader, quantizers_bytes};
use super::passing::{LOOK, Passing};
use crate::api::Result;
use crate::index::{DocumentIndexes, DocumentKeys, KeyLayout};
use crate::limits;
use crate::lock::IgnorePoison;
use crate::memory::collection::Extent;
use crate::types::{DocumentId, FaissIndex};
use crate::until::Until;

/// The share of the budget that is kept for requests that read keys in passing.
const PASSING_SHARE: u64 = 4;

/// What is kept of a document beside its keys: bounds how many without any there can be.
const ENTRY_BYTES: u64 = 1 << 10;

/// The keys of documents, shared by all requests.
pub(in crate::memory) struct KeyCache {
    bytes_max: u64,
    state: Mutex<State>,
    /// Told when a document's keys are there, or will not come.
    loaded: Condvar,
    passing: Arc<Passing>,
    loads: AtomicU64,
    evictions: AtomicU64,
}

#[derive(Default)]
struct State {
    documents: HashMap<DocumentId, Entry>,
    /// Use number to document, of those that no request reads: the first was used longest ago.
    idle: BTreeMap<u64, DocumentId>,
    /// Of all documents, and of the idle ones.
    held_bytes: u64,
    idle_bytes: u64,
    last_use: u64,
}

struct Entry {
    keys: Arc<DocumentKeys>,
    indexes: Option<Arc<DocumentIndexes>>,
    /// Whether larger indexes are being built.
    building: bool,
    /// What is counted for it; while keys are loaded, with what they will take at most.
    bytes: u64,
    /// Requests that read it; it is idle when there are none.
    readers: usize,
    /// Whether a request is loading more of its keys.
    loading: bool,
    /// Of its last use; tells it from a later entry of the same document, too.
    number: u64,
    born: u64,
}

/// Keys that a request reads: they stay while it does.
pub(in crate::memory) struct Held {
    cache: Arc<KeyCache>,
    /// Each once, with the birth of its entry.
    documents: Vec<(DocumentId, u64)>,
    /// Those of them that this request loads.
    loading: Vec<DocumentId>,
    /// By document.
    pub(in crate::memory) keys: HashMap<DocumentId, Arc<DocumentKeys>>,
}

/// The totals that statistics tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::memory) struct KeyStats {
    /// Held now, in passing included.
    pub(in crate::memory) bytes: u64,
    pub(in crate::memory) bytes_max: u64,
    /// Times that the keys of a document, or more of them, were read from the store.
    pub(in crate::memory) loads: u64,
    /// Documents whose keys made room for others.
    pub(in crate::memory) evictions: u64,
}

impl KeyCache {
    pub(in crate::memory) fn new(bytes_max: u64) -> Arc<KeyCache> {
        Arc::new(KeyCache {
            bytes_max,
            state: Mutex::default(),
            loaded: Condvar::new(),
            passing: Passing::new(bytes_max / PASSING_SHARE),
            loads: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        })
    }

    pub(in crate::memory) fn stats(&self) -> KeyStats {
        KeyStats {
            bytes: self.state().held_bytes + self.passing.bytes(),
            bytes_max: self.bytes_max,
            loads: self.loads.load(Ordering::Relaxed),
            evictions: self.evictions.load(Ordering::Relaxed),
        }
    }

    /// What a document takes; nothing where it is not held.
    pub(in crate::memory) fn bytes_of(&self, document: DocumentId) -> Option<u64> {
        self.state().documents.get(&document).map(|entry| entry.bytes)
    }

    pub(in crate::memory) fn passing(&self) -> &Arc<Passing> {
        &self.passing
    }

    /// The keys of at least these first blocks, which must be durable, of each of some documents, of which none is named twice;
    /// read from the store where they are not here yet. Nothing if there is no room for them beside what other requests read.
    pub(in crate::memory) fn hold(
        self: &Arc<Self>,
        loader: Loader<'_>,
        wanted: &[(DocumentId, Extent)],
        until: &Until,
    ) -> Result<Option<Held>> {
        let layout = loader.collection.layout;
        let Some(mut held) = self.enter(layout, wanted, until)? else { return Ok(None) };
        let load = |&(document, extent): &(DocumentId, Extent)| {
            let here = held.keys.get(&document).filter(|keys| keys.layout() == layout).cloned();
            let here = here.unwrap_or_else(|| Arc::new(DocumentKeys::empty(layout)));
            let keys = loader.load(&here, 0, document, extent, until)?;
            self.loads.fetch_add(1, Ordering::Relaxed);
            Ok((document, Arc::new(keys)))
        };
        if !held.loading.is_empty() {
            let loading: HashSet<DocumentId> = held.loading.iter().copied().collect();
            // Side by side: of many short documents each has too little to share out.
            let short = wanted.par_iter().filter(|(document, _)| loading.contains(document));
            let loaded = short.map(load).collect::<Result<Vec<_>>>()?;
            held.keys.extend(loaded);
        }
        held.publish();
        Ok(Some(held))
    }

    /// Makes room, and enters what is wanted as read by one request more and, where it is not here, as being loaded. The lock is
    /// not held while anything is read.
    fn enter(
        self: &Arc<Self>,
        layout: KeyLayout,
        wanted: &[(DocumentId, Extent)],
        until: &Until,
    ) -> Result<Option<Held>> {
        let mut state = self.state();
        // What another request loads is waited for, with nothing in hand that it could wait for.
        while wanted.iter().any(|(document, _)| state.documents.get(document).is_some_and(|entry| entry.loading)) {
            let waited = self.loaded.wait_timeout(state, LOOK);
            state = waited.ignore_poison().0;
            until.check()?;
        }
        let mut more = 0;
        let mut read_bytes = state.held_bytes - state.idle_bytes;
        for &(document, extent) in wanted {
            let entry = state.documents.get(&document);
            read_bytes += entry.filter(|entry| entry.readers == 0).map_or(0, |entry| entry.bytes);
            let all = || overhead(&layout) + extent.more_key_bytes(&layout, 0, false);
            more += entry.map_or_else(all, |entry| entry.more(&layout, extent));
        }
        if read_bytes.saturating_add(more) > self.kept_max() {
            return Ok(None);
        }
        let mut held = Held { cache: self.clone(), documents: Vec::new(), loading: Vec::new(), keys: HashMap::new() };
        for &(document, extent) in wanted {
            let (keys, born, is_short) = state.pin(document, &layout, extent);
            held.documents.push((document, born));
            held.keys.insert(document, keys);
            if is_short {
                held.loading.push(document);
            }
        }
        self.make_room(&mut state);
        Ok(Some(held))
    }

    /// Bytes that are kept for documents.
    fn kept_max(&self) -> u64 {
        self.bytes_max - self.bytes_max / PASSING_SHARE
    }

    /// Drops idle documents, those used longest ago first, until the rest fits.
    fn make_room(&self, state: &mut State) {
        while state.held_bytes > self.kept_max() {
            let Some((_, &document)) = state.idle.first_key_value() else { return };
            state.remove(document);
            self.evictions.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds the keys of blocks that just became durable, `first` and the following, each as the store keeps them: if a lookup has
    /// asked for all before them, and if there is room without dropping others. The next lookup loads what is missing.
    pub(in crate::memory) fn extend(
        &self,
        loader: Loader<'_>,
        document: DocumentId,
        first: u32,
        encoded: &[&[u8]],
    ) -> Result<()> {
        let layout = loader.collection.layout;
        let is_before = |entry: &&Entry| {
            !entry.loading && entry.keys.layout() == layout && entry.keys.blocks() == first && !encoded.is_empty()
        };
        let room = |state: &State| self.kept_max().saturating_sub(state.held_bytes);
        let before = {
            let state = self.state();
            let fits = layout.bytes(encoded.len() as u32) <= room(&state);
            state.documents.get(&document).filter(is_before).filter(|_| fits).map(|entry| entry.keys.clone())
        };
        let Some(before) = before else { return Ok(()) };
        let longer = loader.appended(&before, document, encoded)?;
        let mut state = self.state();
        let more = longer.bytes().saturating_sub(before.bytes());
        let fits = more <= room(&state);
        if let Some(entry) = state.documents.get_mut(&document).filter(|entry| Arc::ptr_eq(&entry.keys, &before))
            && !entry.loading
            && fits
        {
            entry.keys = Arc::new(longer);
            let bytes = entry.bytes + more;
            state.count(document, bytes);
        }
        Ok(())
    }

    /// Drops what is kept of a document; its next lookup loads it again.
    pub(in crate::memory) fn forget(&self, document: DocumentId) {
        self.state().remove(document);
        self.loaded.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().ignore_poison()
    }
}

impl State {
    /// Enters a document as read by one request more. Returns its keys, its birth, and whether they are too few.
    fn pin(&mut self, document: DocumentId, layout: &KeyLayout, extent: Extent) -> (Arc<DocumentKeys>, u64, bool) {
        self.last_use += 1;
        let now = self.last_use;
        let new = || Entry {
            keys: Arc::new(DocumentKeys::empty(*layout)),
            indexes: None,
            building: false,
            bytes: 0,
            readers: 1,
            loading: false,
            number: now,
            born: now,
        };
        let is_new = !self.documents.contains_key(&document);
        let entry = self.documents.entry(document).or_insert_with(new);
        if !is_new {
            if entry.readers == 0 {
                self.idle.remove(&entry.number);
                self.idle_bytes -= entry.bytes;
            }
            entry.readers += 1;
            entry.number = now;
        }
        let more = entry.more(layout, extent) + if is_new { overhead(layout) } else { 0 };
        let is_short = !entry.has(layout, extent);
        entry.loading = is_short;
        let (keys, born, bytes) = (entry.keys.clone(), entry.born, entry.bytes + more);
        self.count(document, bytes);
        (keys, born, is_short)
    }

    /// Counts so many bytes for a document.
    fn count(&mut self, document: DocumentId, bytes: u64) {
        if let Some(entry) = self.documents.get_mut(&document) {
            let change = |sum: u64| sum + bytes - entry.bytes;
            self.held_bytes = change(self.held_bytes);
            if self.idle.contains_key(&entry.number) {
                self.idle_bytes = change(self.idle_bytes);
            }
            entry.bytes = bytes;
        }
    }

    fn remove(&mut self, document: DocumentId) {
        if let Some(entry) = self.documents.remove(&document) {
            self.held_bytes -= entry.bytes;
            if self.idle.remove(&entry.number).is_some() {
                self.idle_bytes -= entry.bytes;
            }
        }
    }
}

impl Entry {
    fn has(&self, layout: &KeyLayout, extent: Extent) -> bool {
        let has_tail = extent.tail_tokens == 0 || self.keys.has_tail();
        self.keys.layout() == *layout && self.keys.blocks() >= extent.full && has_tail
    }

    /// Bytes that come to it when the keys of these blocks are loaded.
    fn more(&self, layout: &KeyLayout, extent: Extent) -> u64 {
        if self.has(layout, extent) {
            return 0;
        }
        // Keys of another layout, from before the collection's engine was changed or after, give way when the others are there.
        let is_same = self.keys.layout() == *layout;
        let full = if is_same { self.keys.blocks() } else { 0 };
        extent.more_key_bytes(layout, full, is_same && self.keys.has_tail())
    }

    fn bytes_now(&self) -> u64 {
        let indexes = self.indexes.as_ref().map_or(0, |indexes| indexes.bytes());
        overhead(&self.keys.layout()) + self.keys.bytes() + indexes
    }
}

/// Whether a document with such keys is long enough for indexes.
pub(in crate::memory) fn are_indexed(keys: &DocumentKeys) -> bool {
    keys.blocks() as usize * keys.layout().keys_per_block >= limits::INDEXED_KEYS_MIN
}

/// What a document takes beside its keys.
fn overhead(layout: &KeyLayout) -> u64 {
    ENTRY_BYTES + quantizers_bytes(layout)
}

impl Held {
    /// Shows the keys that were loaded to others.
    fn publish(&mut self) {
        let mut state = self.cache.state();
        for &(document, born) in &self.documents {
            let entry = state.documents.get_mut(&document).filter(|entry| entry.born == born);
            if let (Some(entry), Some(keys)) =
                (entry, self.keys.get(&document).filter(|_| self.loading.contains(&document)))
            {
                entry.keys = keys.clone();
                entry.loading = false;
                let bytes = entry.bytes_now();
                state.count(document, bytes);
            }
        }
        drop(state);
        self.loading.clear();
        self.cache.loaded.notify_all();
    }

    /// Indexes of a document, if it is long enough. Those that cover it well enough are used as they are; once half as many blocks
    /// have come as they cover, larger ones are built beside the lookups and replace them.
    pub(in crate::memory) fn indexes(
        &self,
        document: DocumentId,
        setting: &FaissIndex,
        folder: Option<PathBuf>,
    ) -> Option<Arc<DocumentIndexes>> {
        let keys = self.keys.get(&document)?;
        if !are_indexed(keys) {
            return None;
        }
        let born = self.documents.iter().find(|(of, _)| *of == document)?.1;
        let mut state = self.cache.state();
        let entry = state.documents.get_mut(&document).filter(|entry| entry.born == born)?;
        let here = entry.indexes.clone().filter(|here| here.setting() == setting);
        let Some(here) = here else {
            let new = Arc::new(DocumentIndexes::of(setting.clone(), keys, folder));
            entry.indexes = Some(new.clone());
            return Some(new);
        };
        if here.blocks() > keys.blocks() {
            // Of blocks that came since these keys were read.
            return None;
        }
        if !here.cover(keys) && !entry.building {
            entry.building = true;
            let larger = Arc::new(DocumentIndexes::of_all(setting.clone(), keys, folder));
            let (keys, cache) = (keys.clone(), self.cache.clone());
            // Not in rayon's pool, whose threads answer lookups.
            std::thread::spawn(move || {
                larger.complete(&keys);
                let mut state = cache.state();
                if let Some(entry) = state.documents.get_mut(&document).filter(|entry| entry.born == born) {
                    entry.building = false;
                    // Unless the setting was changed meanwhile.
                    if entry.indexes.as_ref().is_some_and(|indexes| indexes.setting() == larger.setting()) {
                        entry.indexes = Some(larger);
                    }
                }
            });
        }
        Some(here)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        for (document, born) in std::mem::take(&mut self.documents) {
            let Some(entry) = state.documents.get_mut(&document).filter(|entry| entry.born == born) else { continue };
            entry.readers -= 1;
            // Loading failed: the next request tries again.
            entry.loading &= !self.loading.contains(&document);
            let (bytes, number) = (entry.bytes_now(), entry.number);
            let (is_counted, is_read) = (!entry.loading, entry.readers > 0);
            let is_empty = entry.keys.blocks() == 0 && self.loading.contains(&document);
            if is_counted {
                state.count(document, bytes);
            }
            if is_empty && !is_read {
                state.remove(document);
            } else if !is_read {
                state.idle.insert(number, document);
                state.idle_bytes += bytes;
            }
        }
        self.cache.make_room(&mut state);
        drop(state);
        if !self.loading.is_empty() {
            self.cache.loaded.notify_all();
        }
    }
}
