//! A memory that records, obeys, and answers at random but always the same.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use landmarkdb::limits;
use landmarkdb::{CollectionSpec, Until, *};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::requests;

/// The document that every double lacks.
pub(crate) const UNKNOWN: DocumentId = DocumentId(404);

/// Full blocks of every document, before its tail.
pub(crate) const FULL_BLOCKS: u32 = 2500;

#[derive(Default)]
pub(crate) struct Double {
    /// Method and request of every call that was begun.
    pub(crate) calls: Mutex<Vec<String>>,
    /// What the next calls fail with, the last first; `None` lets one pass.
    pub(crate) failures: Mutex<Vec<Option<MemoryError>>>,
    /// How long every call takes.
    pub(crate) delay: Mutex<Duration>,
    pub(crate) finished: AtomicU32,
    /// Held by who writes.
    pub(crate) writer: Mutex<()>,
    /// Whether a verification goes on as long as somebody waits for it.
    pub(crate) verifies_on: AtomicBool,
    pub(crate) health: Mutex<Health>,
}

impl Double {
    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    pub(crate) fn fail_with(&self, failures: impl IntoIterator<Item = Option<MemoryError>>) {
        let mut failures: Vec<_> = failures.into_iter().collect();
        failures.reverse();
        *self.failures.lock().unwrap() = failures;
    }

    /// Works as long as somebody waits, as what is heavy does.
    fn work_on(&self, method: &str, until: &Until) -> Result<()> {
        self.calls.lock().unwrap().push(format!("heavy {method}"));
        while !until.is_over() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.finished.fetch_add(1, Ordering::SeqCst);
        until.check()
    }

    /// Values that depend on every bit of the request.
    fn enter(&self, method: &str, request: impl std::fmt::Debug) -> Result<ChaCha8Rng> {
        let call = format!("{method} {request:?}");
        let mut hasher = DefaultHasher::new();
        call.hash(&mut hasher);
        self.calls.lock().unwrap().push(call);
        let delay = *self.delay.lock().unwrap();
        std::thread::sleep(delay);
        self.finished.fetch_add(1, Ordering::SeqCst);
        if let Some(Some(error)) = self.failures.lock().unwrap().pop() {
            return Err(error);
        }
        Ok(ChaCha8Rng::seed_from_u64(hasher.finish()))
    }
}

fn values(rng: &mut impl Rng, count: usize) -> Vec<f32> {
    // Any bits, NaN and infinities included, but for the one form of NaN that hardware may make of another.
    (0..count).map(|_| f32::from_bits(rng.random())).map(|x| if x.is_nan() { f32::NEG_INFINITY } else { x }).collect()
}

fn text(rng: &mut impl Rng, tokens: usize) -> BlockText {
    let bytes: Vec<u8> = (0..3 * tokens).map(|_| rng.random()).collect();
    BlockText { start: rng.random(), bytes, offsets: (0..tokens as u32).map(|token| 3 * token).collect() }
}

fn document(rng: &mut impl Rng, id: DocumentId) -> DocumentInfo {
    DocumentInfo {
        id,
        collection: CollectionId(rng.random()),
        name: format!("näme {}", rng.random::<u32>()),
        sealed: rng.random(),
        blocks: FULL_BLOCKS,
        tail_tokens: rng.random(),
        tokens: rng.random(),
        text_bytes: rng.random(),
        stored_bytes: rng.random(),
        state_tokens: rng.random::<bool>().then(|| rng.random()),
    }
}

fn collection(rng: &mut impl Rng) -> CollectionInfo {
    let spec = requests::spec();
    let engine = if rng.random() { Engine::Flat } else { Engine::Sq8 };
    let id = CollectionId(rng.random());
    CollectionInfo { id, fingerprint: spec.fingerprint(), spec, documents: rng.random(), engine }
}

fn known(document: DocumentId) -> Result<()> {
    if document == UNKNOWN {
        return Err(MemoryError::NotFound { entity: Entity::Document, id: document.to_string() });
    }
    Ok(())
}

/// The same block whatever request it is part of.
fn stored(document: DocumentId, index: u32, dtype: DType) -> StoredBlock {
    let mut rng = ChaCha8Rng::seed_from_u64(document.0 ^ (index as u64) << 32);
    let tokens = if index < FULL_BLOCKS { 4 } else { 3 };
    let mut tensor = || Tensor {
        dtype,
        shape: vec![2, 2, tokens, 8],
        data: (0..2 * 2 * tokens as usize * 8 * dtype.size_bytes()).map(|_| rng.random::<u8>()).collect(),
    };
    let (k, v) = (tensor(), tensor());
    let token_ids = (0..tokens).map(|_| rng.random()).collect();
    StoredBlock { id: BlockId { document, index }, token_ids, text: text(&mut rng, tokens as usize), k, v }
}

fn hits(rng: &mut impl Rng, request: &LookupRequest) -> Hits {
    let rows = request.granularity.rows(request.distances.len(), 4, 2) as u32;
    let count = (rows * request.top_k) as usize;
    let blocks = (0..count).map(|_| BlockId { document: DocumentId(rng.random()), index: rng.random() }).collect();
    Hits { rows, k: request.top_k, blocks, scores: values(rng, count) }
}

impl BlockMemory for Double {
    fn open_collection(&self, spec: &CollectionSpec) -> Result<CollectionInfo> {
        self.enter("open_collection", spec).map(|mut rng| collection(&mut rng))
    }

    fn collections(&self) -> Result<Vec<CollectionInfo>> {
        self.enter("collections", ()).map(|mut rng| (0..3).map(|_| collection(&mut rng)).collect())
    }

    fn set_engine(&self, id: CollectionId, engine: Engine) -> Result<CollectionInfo> {
        self.enter("set_engine", (id, engine)).map(|mut rng| collection(&mut rng))
    }

    fn tune(&self, request: &TuneRequest, progress: &mut dyn FnMut(TuneStep), _until: &Until) -> Result<TuneReport> {
        let mut rng = self.enter("tune", request)?;
        let index = FaissIndex { factory: "IVF8".into(), effort: rng.random() };
        progress(TuneStep::Measuring { engine: Engine::Faiss(index.clone()), blocks: rng.random() });
        progress(TuneStep::LeftOut { engine: Engine::Cuda, reason: "none here".into() });
        let measured = |engine| Measured {
            engine,
            recall: rng.random(),
            p50_us: rng.random(),
            p99_us: rng.random(),
            index_bytes: rng.random(),
        };
        let measured = [Engine::Sq4, Engine::Faiss(index.clone())].map(measured).to_vec();
        Ok(TuneReport { document: document(&mut rng, DocumentId(9)), engine: Engine::Faiss(index), measured })
    }

    fn open_document(&self, collection: CollectionId, name: &str) -> Result<DocumentInfo> {
        self.enter("open_document", (collection, name)).map(|mut rng| document(&mut rng, DocumentId(9)))
    }

    fn documents(&self, collection: CollectionId) -> Result<Vec<DocumentInfo>> {
        let rng = self.enter("documents", collection);
        rng.map(|mut rng| (0..100).map(|id| document(&mut rng, DocumentId(id))).collect())
    }

    fn document(&self, id: DocumentId) -> Result<DocumentInfo> {
        let mut rng = self.enter("document", id)?;
        known(id)?;
        Ok(document(&mut rng, id))
    }

    fn append(&self, request: AppendRequest) -> Result<DocumentInfo> {
        let _writing = self.writer.lock().unwrap();
        let mut rng = self.enter("append", &request)?;
        known(request.document)?;
        Ok(document(&mut rng, request.document))
    }

    fn put_state(&self, id: DocumentId, state: SequenceState) -> Result<DocumentInfo> {
        let mut rng = self.enter("put_state", (id, &state))?;
        known(id)?;
        Ok(document(&mut rng, id))
    }

    fn state_part(&self, id: DocumentId, part: u32) -> Result<Option<StatePart>> {
        let mut rng = self.enter("state_part", (id, part))?;
        known(id)?;
        let bytes: Vec<u8> = (0..100).map(|_| rng.random()).collect();
        Ok((part < 3).then(|| StatePart { version: u64::MAX - 1, tokens: 12, parts: 3, bytes: bytes.into() }))
    }

    fn seal(&self, id: DocumentId) -> Result<DocumentInfo> {
        self.enter("seal", id).map(|mut rng| document(&mut rng, id))
    }

    fn lookup(&self, request: &LookupRequest) -> Result<Hits> {
        self.enter("lookup", request).map(|mut rng| hits(&mut rng, request))
    }

    fn lookup_until(&self, request: &LookupRequest, until: &Until) -> Result<Hits> {
        if request.weight() > limits::LIGHT_WEIGHT_MAX {
            self.work_on("lookup", until)?;
        }
        self.lookup(request)
    }

    fn attend_until(&self, request: &AttendRequest, until: &Until) -> Result<Attended> {
        if request.lookup.weight() > limits::LIGHT_WEIGHT_MAX {
            self.work_on("attend", until)?;
        }
        self.attend(request)
    }

    fn attend_all_until(&self, requests: &[AttendRequest], until: &Until) -> Result<Vec<Result<Attended>>> {
        if requests.iter().map(|request| request.lookup.weight()).sum::<u64>() > limits::LIGHT_WEIGHT_MAX {
            self.work_on("attend_all", until)?;
        }
        Ok(self.attend_all(requests))
    }

    fn attend(&self, request: &AttendRequest) -> Result<Attended> {
        let mut rng = self.enter("attend", request)?;
        request.lookup.scope.iter().try_for_each(|range| known(range.document))?;
        let hits = hits(&mut rng, &request.lookup);
        let queries = request.lookup.queries.len();
        Ok(Attended { out: values(&mut rng, queries), lse: values(&mut rng, queries / 8), hits })
    }

    fn fetch(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>> {
        self.enter("fetch", request)?;
        known(request.document)?;
        Ok(request.blocks.iter().map(|&index| stored(request.document, index, request.dtype)).collect())
    }

    fn blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>> {
        self.enter("blocks", range)?;
        known(range.document)?;
        // The tail is the block after the full ones.
        let indices = range.blocks.start..range.blocks.end.min(FULL_BLOCKS + 1);
        let info = |index| {
            let StoredBlock { id, token_ids, text, .. } = stored(range.document, index, DType::F16);
            BlockInfo { id, token_ids, text, stored_bytes: index as u64 * 7 }
        };
        Ok(indices.map(info).collect())
    }

    fn replace(&self, id: DocumentId, by: DocumentId) -> Result<DocumentInfo> {
        self.enter("replace", (id, by)).map(|mut rng| document(&mut rng, by))
    }

    fn delete(&self, document: DocumentId) -> Result<Deleted> {
        let mut rng = self.enter("delete", document)?;
        Ok(Deleted { blocks: rng.random(), freed_bytes: rng.random() })
    }

    fn stats(&self) -> Result<Stats> {
        let mut rng = self.enter("stats", ())?;
        let mut count = || rng.random::<u64>();
        Ok(Stats {
            collections: count(),
            documents: count(),
            blocks: count(),
            tokens: count(),
            live_bytes: count(),
            segment_bytes: count(),
            segments: count(),
            catalog_bytes: count(),
            set_aside_bytes: count(),
            index_bytes: count(),
            index_bytes_max: count(),
            index_loads: count(),
            index_evictions: count(),
            lookups: count(),
            attends: count(),
            appended_blocks: count(),
            fetched_blocks: count(),
            health: Health::ReadOnly { reason: format!("räson {}", count()) },
        })
    }

    fn health(&self) -> Health {
        self.health.lock().unwrap().clone()
    }

    fn verify_until(
        &self,
        document: Option<DocumentId>,
        progress: &mut dyn FnMut(u64, u64),
        until: &Until,
    ) -> Result<VerifyReport> {
        if self.verifies_on.load(Ordering::SeqCst) {
            self.work_on("verify", until)?;
        }
        self.verify(document, progress)
    }

    fn verify(&self, document: Option<DocumentId>, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        let mut rng = self.enter("verify", document)?;
        (1..=5).for_each(|done| progress(done, 5));
        let block = BlockId { document: DocumentId(1), index: 2 };
        let faults = vec![
            Fault { document: None, block: None, problem: "of nobody".into() },
            Fault { document: Some(block.document), block: Some(block), problem: "of one block".into() },
        ];
        let [documents, blocks, bytes, set_aside_bytes] = rng.random();
        Ok(VerifyReport { documents, blocks, bytes, set_aside_bytes, faults })
    }

    fn verify_rebuild(&self, progress: &mut dyn FnMut(u64, u64), _: &Until) -> Result<VerifyReport> {
        let mut rng = self.enter("verify_rebuild", ())?;
        progress(1, 1);
        Ok(VerifyReport { documents: rng.random(), ..VerifyReport::default() })
    }
}
