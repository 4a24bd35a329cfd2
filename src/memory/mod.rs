//! The block memory of one data directory: owns the store (ground state) and the index (derived from it).
//!
//! The only module that knows both. What is acknowledged lies in the store; deleting all that is kept in memory here
//! changes no answer.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use crate::api::{
    AppendRequest, AttendRequest, Attended, BlockInfo, BlockMemory, CollectionInfo, Deleted, DocumentInfo, Entity,
    Fault, FetchRequest, Health, Hits, LookupRequest, MemoryError, Result, Stats, StoredBlock, VerifyReport,
};
use crate::budget::Budget;
use crate::cuda::Runner;
use crate::index::{self, KeyLayout, SearchEngine};
use crate::limits;
use crate::lock::IgnorePoison;
use crate::shape::{CollectionSpec, check_name};
use crate::store::{self, CollectionEntry, Compactor, Manifest, Store, StoreError};
use crate::types::{BlockRange, CollectionId, DocumentId, Engine, FaissIndex};
use crate::until::Until;

mod attend;
mod error;
mod geometry;
mod gpu;
mod ingest;
mod keys;
mod lookup;
mod read;
#[cfg(test)]
mod tests;
mod work;
mod writers;

pub use gpu::GPU_CACHE_BYTES;
pub use keys::keys_bytes;
pub use work::WORK_BYTES;

use work::{Need, Then};

/// A block memory over a data directory that no other process uses.
///
/// Its calls share their work out over rayon's pool and wait for it, and for each other: do not call it from inside that pool.
pub struct LocalMemory {
    store: Arc<Store>,
    /// Gives space back beside the calls; otherwise the calls do.
    _compactor: Option<Compactor>,
    /// Decoded once: collections are never deleted, and one whose engine is changed is taken out.
    collections: RwLock<HashMap<CollectionId, Arc<Collection>>>,
    keys: Arc<keys::KeyCache>,
    codes: keys::Codes,
    writers: writers::Writers,
    indexes: keys::IndexFolder,
    gpu: gpu::Gpu,
    counters: Counters,
    /// For lookups and attends.
    work: Arc<Budget>,
}

/// A collection's spec with what follows from it.
struct Collection {
    spec: CollectionSpec,
    /// What answers lookups here: `flat` where this program does not have the engine that was set.
    search: Arc<dyn SearchEngine>,
    layout: KeyLayout,
    turns: geometry::LastTurns,
}

/// Since the memory was opened.
#[derive(Default)]
struct Counters {
    lookups: Counter,
    attends: Counter,
    appended_blocks: Counter,
    fetched_blocks: Counter,
}

#[derive(Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
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
        let indexes = keys::IndexFolder::open(dir, &store);
        Ok(LocalMemory { indexes, ..LocalMemory::over(store) })
    }

    /// A memory over a store that is already open. Indexes are built anew in every run.
    pub fn over(store: Store) -> LocalMemory {
        LocalMemory {
            store: Arc::new(store),
            _compactor: None,
            collections: RwLock::default(),
            keys: keys::KeyCache::new(keys::keys_bytes()),
            codes: keys::Codes::default(),
            writers: writers::Writers::default(),
            indexes: keys::IndexFolder::default(),
            gpu: gpu::Gpu::of_machine(GPU_CACHE_BYTES),
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
        LocalMemory { keys: keys::KeyCache::new(bytes), ..self }
    }

    /// With so many bytes for all lookups and attends under way.
    pub fn with_work_budget(self, bytes: u64) -> LocalMemory {
        LocalMemory { work: Budget::new(bytes), ..self }
    }

    /// With room for so many bytes of blocks' K and V in the GPU's memory, for collections of the engine `cuda`. Blocks
    /// that were used longest ago go first.
    pub fn with_gpu_cache(self, bytes: u64) -> LocalMemory {
        LocalMemory { gpu: gpu::Gpu::of_machine(bytes), ..self }
    }

    /// The same, with what `open` gives in place of the machine's GPU: a runner for each call at a time.
    pub fn with_runners<R: Runner + Send + 'static>(
        self,
        open: impl Fn() -> std::result::Result<R, R::Error> + Send + Sync + 'static,
        cache_bytes: u64,
    ) -> LocalMemory {
        LocalMemory { gpu: gpu::Gpu::over(open, cache_bytes), ..self }
    }

    /// The GPU that answers for a collection, where one should.
    fn gpu_of(&self, collection: &Collection) -> Option<&gpu::Gpu> {
        collection.search.asks_gpu().then_some(&self.gpu)
    }

    fn collection_of(&self, id: CollectionId) -> Result<Arc<Collection>> {
        if let Some(collection) = self.collections.read().ignore_poison().get(&id) {
            return Ok(collection.clone());
        }
        // Locked before it is read, so that nothing that was read before a change is kept after it.
        let mut collections = self.collections.write().ignore_poison();
        let Some(CollectionEntry { spec, engine }) = self.store.collection(id)? else {
            return Err(MemoryError::NotFound { entity: Entity::Collection, id: id.to_string() });
        };
        let mut search = index::engine(&engine);
        if let Err(problem) = search.check(spec.shape.head_dim as usize) {
            tracing::warn!("keys of collection {} are scanned: {problem}", spec.name);
            search = index::engine(&Engine::Flat);
        }
        let layout = KeyLayout {
            layers: spec.shape.layers as usize,
            kv_heads: spec.shape.kv_heads as usize,
            head_dim: spec.shape.head_dim as usize,
            keys_per_block: spec.shape.keys_per_block(spec.key_rule),
            dtype: spec.key_dtype,
            compressed: search.compression(spec.key_dtype),
        };
        let collection = Arc::new(Collection { spec, search, layout, turns: geometry::LastTurns::default() });
        collections.insert(id, collection.clone());
        Ok(collection)
    }

    /// That an engine can answer for a collection, here and now.
    fn check_engine(&self, collection: &Collection, engine: &Engine) -> Result<()> {
        if let Some(FaissIndex { factory, effort }) = engine.setting() {
            error::at_most("bytes of faiss.factory", limits::FAISS_FACTORY_BYTES_MAX as u64, factory.len() as u64)?;
            if *effort == 0 || *effort > limits::FAISS_EFFORT_MAX {
                return Err(error::invalid("faiss.effort", format!("1 to {}", limits::FAISS_EFFORT_MAX), effort));
            }
        }
        let search = index::engine(engine);
        search
            .check(collection.layout.head_dim)
            .map_err(|problem| error::invalid("engine", format!("one that this program has ({problem})"), engine))?;
        if search.asks_gpu() {
            let found = |why| error::invalid("engine", "one that works here, such as flat", format!("{engine}: {why}"));
            self.gpu.check().map_err(found)?;
        }
        Ok(())
    }

    fn find_collection(&self, spec: &CollectionSpec) -> Result<Option<CollectionInfo>> {
        let Some(id) = self.store.find_collection(&spec.name)? else { return Ok(None) };
        let Some(stored) = self.store.collection(id)? else { return Ok(None) };
        let (stored_print, offered) = (stored.spec.fingerprint(), spec.fingerprint());
        if stored_print != offered {
            let collection = stored.spec.name;
            return Err(MemoryError::FingerprintMismatch { collection, stored: stored_print, offered });
        }
        self.collection_info(id, stored).map(Some)
    }

    fn collection_info(&self, id: CollectionId, entry: CollectionEntry) -> Result<CollectionInfo> {
        let documents = self.store.document_count(id)?;
        let CollectionEntry { spec, engine } = entry;
        Ok(CollectionInfo { id, fingerprint: spec.fingerprint(), spec, documents, engine })
    }

    fn info(&self, collection: &Collection, manifest: Manifest) -> DocumentInfo {
        DocumentInfo {
            id: manifest.id,
            collection: manifest.collection,
            tokens: ingest::tokens(collection, &manifest),
            name: manifest.name,
            sealed: manifest.sealed,
            blocks: manifest.blocks,
            tail_tokens: manifest.tail_tokens,
            text_bytes: manifest.text_bytes,
            stored_bytes: manifest.stored_bytes,
        }
    }

    /// Lets go what is derived from a document's blocks.
    fn forget_document(&self, document: DocumentId) {
        self.keys.forget(document);
        self.codes.forget(document);
        self.indexes.forget(document);
        self.gpu.forget(&HashSet::from([document]));
    }

    fn document_info(&self, manifest: Manifest) -> Result<DocumentInfo> {
        let collection = self.collection_of(manifest.collection)?;
        Ok(self.info(&collection, manifest))
    }
}

/// How often others may delete a document while it is opened.
const OPEN_ATTEMPTS: usize = 100;

impl BlockMemory for LocalMemory {
    fn open_collection(&self, spec: &CollectionSpec) -> Result<CollectionInfo> {
        spec.check()?;
        if let Some(info) = self.find_collection(spec)? {
            return Ok(info);
        }
        match self.store.create_collection(spec) {
            Ok(id) => self.collection_info(id, CollectionEntry { spec: spec.clone(), engine: Engine::default() }),
            // Another caller was faster.
            Err(StoreError::AlreadyExists { name }) => {
                let gone = MemoryError::NotFound { entity: Entity::Collection, id: name };
                self.find_collection(spec)?.ok_or(gone)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn collections(&self) -> Result<Vec<CollectionInfo>> {
        self.store.collections()?.into_iter().map(|(id, entry)| self.collection_info(id, entry)).collect()
    }

    fn set_engine(&self, collection: CollectionId, engine: Engine) -> Result<CollectionInfo> {
        let before = self.collection_of(collection)?;
        self.check_engine(&before, &engine)?;
        let only_indexes_differ = before.search.indexes().is_some() && engine.setting().is_some();
        self.store.set_engine(collection, engine)?;
        self.collections.write().ignore_poison().remove(&collection);
        // Each engine has keys in its own form, in its own memory; those with indexes read the same.
        if !only_indexes_differ {
            let documents: HashSet<DocumentId> =
                self.store.manifests(collection)?.iter().map(|manifest| manifest.id).collect();
            documents.iter().for_each(|&document| self.keys.forget(document));
            self.gpu.forget(&documents);
        }
        let entry = self.store.collection(collection)?;
        let gone = || MemoryError::NotFound { entity: Entity::Collection, id: collection.to_string() };
        self.collection_info(collection, entry.ok_or_else(gone)?)
    }

    fn open_document(&self, collection: CollectionId, name: &str) -> Result<DocumentInfo> {
        check_name("name", name)?;
        self.collection_of(collection)?;
        for _ in 0..OPEN_ATTEMPTS {
            if let Some(document) = self.store.find_document(collection, name)? {
                match self.document(document) {
                    // Deleted since it was found.
                    Err(MemoryError::NotFound { entity: Entity::Document, .. }) => {}
                    found => return found,
                }
            }
            match self.store.create_document(collection, name) {
                Ok(manifest) => return self.document_info(manifest),
                // Another caller was faster.
                Err(StoreError::AlreadyExists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(MemoryError::NotFound { entity: Entity::Document, id: name.into() })
    }

    fn documents(&self, collection: CollectionId) -> Result<Vec<DocumentInfo>> {
        let collection_known = self.collection_of(collection)?;
        let manifests = self.store.manifests(collection)?;
        Ok(manifests.into_iter().map(|manifest| self.info(&collection_known, manifest)).collect())
    }

    fn document(&self, document: DocumentId) -> Result<DocumentInfo> {
        self.document_info(self.store.manifest(document)?)
    }

    fn append(&self, request: AppendRequest) -> Result<DocumentInfo> {
        self.append_blocks(request)
    }

    fn seal(&self, document: DocumentId) -> Result<DocumentInfo> {
        self.seal_document(document)
    }

    fn lookup(&self, request: &LookupRequest) -> Result<Hits> {
        self.lookup_until(request, &Until::FOREVER)
    }

    fn lookup_until(&self, request: &LookupRequest, until: &Until) -> Result<Hits> {
        let plan = self.plan(request, until)?;
        let Need { working, answer } = plan.need(Then::Answer);
        let _taken = self.take(working + answer, until)?;
        let prepared = self.prepare(plan)?;
        work::run(&[request], || {
            let found = prepared.search(&prepared.turns(), self.gpu_of(&prepared.collection))?;
            self.counters.lookups.add(1);
            Ok(prepared.hits(found))
        })
    }

    fn attend(&self, request: &AttendRequest) -> Result<Attended> {
        self.attend_until(request, &Until::FOREVER)
    }

    fn attend_until(&self, request: &AttendRequest, until: &Until) -> Result<Attended> {
        self.attend_blocks(request, until)
    }

    /// Small requests side by side, one per thread; others one after the other.
    fn attend_all(&self, requests: &[AttendRequest]) -> Vec<Result<Attended>> {
        let refused = |error: MemoryError| requests.iter().map(|_| Err(error.clone())).collect();
        self.attend_all_until(requests, &Until::FOREVER).unwrap_or_else(refused)
    }

    fn attend_all_until(&self, requests: &[AttendRequest], until: &Until) -> Result<Vec<Result<Attended>>> {
        self.attend_many(requests, until)
    }

    fn fetch(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>> {
        self.fetch_blocks(request)
    }

    fn blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>> {
        self.describe_blocks(range)
    }

    fn delete(&self, document: DocumentId) -> Result<Deleted> {
        let writer = self.writers.of(document);
        let _writing = writer.lock().ignore_poison();
        let freed = self.store.delete(document)?;
        self.forget_document(document);
        Ok(Deleted { blocks: freed.blocks, freed_bytes: freed.bytes })
    }

    fn health(&self) -> Health {
        match self.store.health() {
            store::Health::Serving => Health::Serving,
            store::Health::ReadOnly { reason } => Health::ReadOnly { reason },
            store::Health::Failed { reason } => Health::Failed { reason },
        }
    }

    fn stats(&self) -> Result<Stats> {
        let (store, keys) = (self.store.stats(), self.keys.stats());
        Ok(Stats {
            collections: self.store.collections()?.len() as u64,
            documents: store.documents,
            blocks: store.blocks,
            tokens: store.tokens,
            live_bytes: store.live_bytes,
            segment_bytes: store.segment_bytes,
            segments: store.segments,
            catalog_bytes: store.catalog_bytes,
            set_aside_bytes: store.set_aside_bytes,
            index_bytes: keys.bytes,
            index_bytes_max: keys.bytes_max,
            index_loads: keys.loads,
            index_evictions: keys.evictions,
            lookups: self.counters.lookups.get(),
            attends: self.counters.attends.get(),
            appended_blocks: self.counters.appended_blocks.get(),
            fetched_blocks: self.counters.fetched_blocks.get(),
            health: self.health(),
        })
    }

    fn verify(&self, document: Option<DocumentId>, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        self.verify_until(document, progress, &Until::FOREVER)
    }

    fn verify_until(
        &self,
        document: Option<DocumentId>,
        progress: &mut dyn FnMut(u64, u64),
        until: &Until,
    ) -> Result<VerifyReport> {
        let ended = |error: StoreError| until.check().err().unwrap_or_else(|| error.into());
        self.store.verify_until(document, progress, until).map(report).map_err(ended)
    }

    fn verify_rebuild(&self, progress: &mut dyn FnMut(u64, u64), until: &Until) -> Result<VerifyReport> {
        let ended = |error: StoreError| until.check().err().unwrap_or_else(|| error.into());
        self.store.verify_rebuild(progress, until).map(report).map_err(ended)
    }
}

fn report(report: store::VerifyReport) -> VerifyReport {
    let store::VerifyReport { documents, blocks, bytes, set_aside_bytes, faults } = report;
    let fault = |fault: store::Fault| Fault { document: fault.document, block: fault.block, problem: fault.problem };
    VerifyReport { documents, blocks, bytes, set_aside_bytes, faults: faults.into_iter().map(fault).collect() }
}
