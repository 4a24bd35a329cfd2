//! A data directory that is open as a memory: what it consists of, and its collections.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::collection::Collection;
use super::error::{at_most, invalid};
use super::gpu::{GPU_CACHE_BYTES, Gpu};
use super::keys::{IndexFolder, KeyCache, Loader, Quantizers, keys_bytes};
use super::work::WORK_BYTES;
use super::writers::Writers;
use crate::api::{CollectionInfo, DocumentInfo, Entity, MemoryError, Result};
use crate::budget::Budget;
use crate::cuda::Runner;
use crate::index;
use crate::limits;
use crate::lock::IgnorePoison;
use crate::shape::CollectionSpec;
use crate::store::{CollectionEntry, Compactor, Manifest, Store};
use crate::types::{CollectionId, DocumentId, Engine, FaissIndex};

/// A block memory over a data directory that no other process uses.
///
/// Its calls share their work out over rayon's pool and wait for it, and for each other: do not call it from inside that pool.
pub struct LocalMemory {
    pub(super) store: Arc<Store>,
    /// Gives space back beside the calls; otherwise the calls do.
    _compactor: Option<Compactor>,
    /// Decoded once: collections are never deleted, and one whose engine is changed is taken out.
    pub(super) collections: RwLock<HashMap<CollectionId, Arc<Collection>>>,
    pub(super) keys: Arc<KeyCache>,
    pub(super) quantizers: Quantizers,
    pub(super) writers: Writers,
    /// Collections whose engines are being measured.
    pub(super) tunings: Mutex<HashSet<CollectionId>>,
    pub(super) indexes: IndexFolder,
    pub(super) gpu: Gpu,
    pub(super) counters: Counters,
    /// For lookups and attends.
    pub(super) work: Arc<Budget>,
}

/// Since the memory was opened.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) lookups: Counter,
    pub(super) attends: Counter,
    pub(super) appended_blocks: Counter,
    pub(super) fetched_blocks: Counter,
}

#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl LocalMemory {
    /// Opens a data directory, creating it if absent. Reads no keys yet: each document's are loaded at its first lookup.
    ///
    /// # Errors
    /// [`MemoryError::Locked`] when another process uses the directory, [`MemoryError::Storage`] when the disk refuses.
    pub fn open(dir: &Path) -> Result<LocalMemory> {
        let store = Store::open(dir)?;
        let indexes = IndexFolder::open(dir, &store);
        Ok(LocalMemory { indexes, ..LocalMemory::over(store) })
    }

    /// Opens a data directory that exists, and writes nothing to it: one on a disk that cannot be written, or a copy that was made
    /// while a service had it open, whose last append may be there in part. Calls that change something are refused. Others may read
    /// it at the same time; nobody can open it for writing meanwhile if it has its lock file. The catalog is copied into memory,
    /// and indexes are built anew.
    ///
    /// # Errors
    /// [`MemoryError::Locked`] when another process has it open for writing, [`MemoryError::Storage`] when it cannot be read.
    pub fn open_read_only(dir: &Path) -> Result<LocalMemory> {
        Ok(LocalMemory::over(Store::open_read_only(dir)?))
    }

    /// A memory over a store that is already open. Indexes are built anew in every run.
    pub fn over(store: Store) -> LocalMemory {
        LocalMemory {
            store: Arc::new(store),
            _compactor: None,
            collections: RwLock::default(),
            keys: KeyCache::new(keys_bytes()),
            quantizers: Quantizers::default(),
            writers: Writers::default(),
            tunings: Mutex::default(),
            indexes: IndexFolder::default(),
            gpu: Gpu::of_machine(GPU_CACHE_BYTES),
            counters: Counters::default(),
            work: Budget::new(WORK_BYTES),
        }
    }

    /// With a thread of its own that gives space back, so that a deletion answers once it is durable and no writer waits for
    /// more than a step. Without, space has come back when a call returns.
    ///
    /// # Errors
    /// [`MemoryError::Storage`] when no thread can be started.
    pub fn with_compactor(self) -> Result<LocalMemory> {
        let compactor = Compactor::start(&self.store);
        let compactor = compactor.map_err(|error| MemoryError::Storage { detail: error.to_string() })?;
        Ok(LocalMemory { _compactor: Some(compactor), ..self })
    }

    /// With room for so many bytes of landmark keys in memory; those of the documents that were looked up longest ago go first.
    pub fn with_keys(self, bytes: u64) -> LocalMemory {
        LocalMemory { keys: KeyCache::new(bytes), ..self }
    }

    /// With so many bytes for all lookups and attends under way.
    pub fn with_work_budget(self, bytes: u64) -> LocalMemory {
        LocalMemory { work: Budget::new(bytes), ..self }
    }

    /// With room for so many bytes of blocks' K and V in the GPU's memory, for collections of the engine `cuda`. Blocks
    /// that were used longest ago go first.
    pub fn with_gpu_cache(self, bytes: u64) -> LocalMemory {
        LocalMemory { gpu: Gpu::of_machine(bytes), ..self }
    }

    /// The same, with what `open` gives in place of the machine's GPU: a runner for each call at a time.
    pub fn with_runners<R: Runner + Send + 'static>(
        self,
        open: impl Fn() -> std::result::Result<R, R::Error> + Send + Sync + 'static,
        cache_bytes: u64,
    ) -> LocalMemory {
        LocalMemory { gpu: Gpu::over(open, cache_bytes), ..self }
    }

    /// The GPU that answers for a collection, where one should.
    pub(super) fn gpu_of(&self, collection: &Collection) -> Option<&Gpu> {
        collection.engine.asks_gpu().then_some(&self.gpu)
    }

    pub(super) fn collection_of(&self, id: CollectionId) -> Result<Arc<Collection>> {
        if let Some(collection) = self.collections.read().ignore_poison().get(&id) {
            return Ok(collection.clone());
        }
        // Locked before it is read, so that nothing that was read before a change is kept after it.
        let mut collections = self.collections.write().ignore_poison();
        let Some(entry) = self.store.collection(id)? else {
            return Err(MemoryError::NotFound { entity: Entity::Collection, id: id.to_string() });
        };
        let collection = Arc::new(Collection::of(entry));
        collections.insert(id, collection.clone());
        Ok(collection)
    }

    /// That an engine can answer for a collection, here and now.
    pub(super) fn check_engine(&self, collection: &Collection, engine: &Engine) -> Result<()> {
        if let Some(FaissIndex { factory, effort }) = engine.setting() {
            at_most("bytes of faiss.factory", limits::FAISS_FACTORY_BYTES_MAX as u64, factory.len() as u64)?;
            if *effort == 0 || *effort > limits::FAISS_EFFORT_MAX {
                return Err(invalid("faiss.effort", format!("1 to {}", limits::FAISS_EFFORT_MAX), effort));
            }
        }
        let search = index::engine(engine);
        let refused = |problem| invalid("engine", format!("one that this program has ({problem})"), engine);
        search.check(collection.layout.head_dim).map_err(refused)?;
        if search.asks_gpu() {
            let found = |why| invalid("engine", "one that works here, such as flat", format!("{engine}: {why}"));
            self.gpu.check().map_err(found)?;
        }
        Ok(())
    }

    pub(super) fn find_collection(&self, spec: &CollectionSpec) -> Result<Option<CollectionInfo>> {
        let Some(id) = self.store.find_collection(&spec.name)? else { return Ok(None) };
        let Some(stored) = self.store.collection(id)? else { return Ok(None) };
        let (stored_print, offered) = (stored.spec.fingerprint(), spec.fingerprint());
        if stored_print != offered {
            let collection = stored.spec.name;
            return Err(MemoryError::FingerprintMismatch { collection, stored: stored_print, offered });
        }
        self.collection_info(id, stored).map(Some)
    }

    pub(super) fn collection_info(&self, id: CollectionId, entry: CollectionEntry) -> Result<CollectionInfo> {
        let documents = self.store.document_count(id)?;
        let CollectionEntry { spec, engine } = entry;
        Ok(CollectionInfo { id, fingerprint: spec.fingerprint(), spec, documents, engine })
    }

    pub(super) fn info(&self, collection: &Collection, manifest: Manifest) -> DocumentInfo {
        DocumentInfo {
            id: manifest.id,
            collection: manifest.collection,
            tokens: collection.tokens(&manifest),
            name: manifest.name,
            sealed: manifest.sealed,
            blocks: manifest.blocks,
            tail_tokens: manifest.tail_tokens,
            text_bytes: manifest.text_bytes,
            stored_bytes: manifest.stored_bytes,
            state_tokens: manifest.state.map(|state| state.tokens),
        }
    }

    pub(super) fn loader<'a>(&'a self, collection: &'a Collection) -> Loader<'a> {
        Loader { store: &self.store, quantizers: &self.quantizers, collection }
    }

    /// Drops what is derived from a document's blocks.
    pub(super) fn forget_document(&self, document: DocumentId) {
        self.keys.forget(document);
        self.quantizers.forget(document);
        self.indexes.forget(document);
        self.gpu.forget(&HashSet::from([document]));
    }

    pub(super) fn document_info(&self, manifest: Manifest) -> Result<DocumentInfo> {
        let collection = self.collection_of(manifest.collection)?;
        Ok(self.info(&collection, manifest))
    }
}
