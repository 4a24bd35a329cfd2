//! The calls of [`BlockMemory`], each done where its kind of request is.

use std::collections::HashSet;

use super::local::LocalMemory;
use super::tune::tune;
use crate::api::{
    AppendRequest, AttendRequest, Attended, BlockInfo, BlockMemory, CollectionInfo, Deleted, DocumentInfo, Entity,
    Fault, FetchRequest, Health, Hits, LookupRequest, MemoryError, Result, SequenceState, StatePart, Stats,
    StoredBlock, TuneReport, TuneRequest, TuneStep, VerifyReport,
};
use crate::lock::IgnorePoison;
use crate::shape::{CollectionSpec, check_name};
use crate::store::{self, CollectionEntry, KeptState, StoreError};
use crate::types::{BlockRange, CollectionId, DocumentId, Engine};
use crate::until::Until;

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
        self.check_engine(&*self.collection_of(collection)?, &engine)?;
        // Read behind the check, which may take seconds.
        let before = self.collection_of(collection)?;
        let only_indexes_differ = before.engine.indexes().is_some() && engine.setting().is_some();
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

    fn tune(&self, request: &TuneRequest, progress: &mut dyn FnMut(TuneStep), until: &Until) -> Result<TuneReport> {
        tune(self, request, progress, until)
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

    fn put_state(&self, document: DocumentId, state: SequenceState) -> Result<DocumentInfo> {
        self.keep_state(document, &state)
    }

    fn state_part(&self, document: DocumentId, part: u32) -> Result<Option<StatePart>> {
        let found = self.store.read_state_part(document, part)?;
        Ok(found.map(|(KeptState { tokens, parts, sequence, .. }, bytes)| StatePart {
            version: sequence,
            tokens,
            parts,
            bytes: bytes.into(),
        }))
    }

    fn seal(&self, document: DocumentId) -> Result<DocumentInfo> {
        self.seal_document(document)
    }

    fn lookup(&self, request: &LookupRequest) -> Result<Hits> {
        self.lookup_until(request, &Until::FOREVER)
    }

    fn lookup_until(&self, request: &LookupRequest, until: &Until) -> Result<Hits> {
        self.lookup_blocks(request, until)
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

    fn replace(&self, document: DocumentId, by: DocumentId) -> Result<DocumentInfo> {
        // In the order of ids, each once, so that two calls never wait for each other.
        let mut written = vec![document, by];
        written.sort();
        written.dedup();
        let writers: Vec<_> = written.into_iter().map(|document| self.writers.of(document)).collect();
        let _writing: Vec<_> = writers.iter().map(|writer| writer.lock().ignore_poison()).collect();
        let manifest = self.store.replace(document, by)?;
        self.forget_document(document);
        self.document_info(manifest)
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
