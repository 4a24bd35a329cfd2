//! Which engine answers a collection's lookups fastest? Each is measured on the longest document, and the fastest that finds
//! enough is kept.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::error::{at_most, invalid, not_found};
use super::local::LocalMemory;
use crate::api::{
    BlockMemory, CollectionInfo, DocumentInfo, Entity, Hits, LookupRequest, Measured, MemoryError, Result, TuneIndex,
    TuneQuery, TuneReport, TuneRequest, TuneStep,
};
use crate::limits;
use crate::lock::IgnorePoison;
use crate::types::{BlockId, BlockRange, BlockScore, CollectionId, DType, Engine, FaissIndex, Granularity};
use crate::until::Until;

/// How much faster an engine has to be than one that takes less memory.
const WORTH_ITS_MEMORY: f64 = 0.9;

/// Lookups that recall is taken over.
const JUDGED: usize = 64;

/// How long a step may take before it is said again.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// When to come again for a second tuning of a collection.
const TUNING_RETRY_MS: u64 = 1000;

/// Where Linux describes the driver of NVIDIA GPUs. Without one, nobody misses the engine `cuda`.
const GPU_DRIVER: &str = "/proc/driver/nvidia/version";

/// The least effort that is tried.
const EFFORT_MIN: u32 = 8;

/// As [`BlockMemory::tune`].
pub(super) fn tune(
    memory: &LocalMemory,
    request: &TuneRequest,
    progress: &mut dyn FnMut(TuneStep),
    until: &Until,
) -> Result<TuneReport> {
    let _alone = Alone::of(&memory.tunings, request.collection)?;
    let collections = memory.collections()?;
    let collection = collections.into_iter().find(|collection| collection.id == request.collection);
    let collection = collection.ok_or_else(|| not_found(Entity::Collection, request.collection))?;
    let document = check(memory, request, &collection)?;
    let lookup = |query: &TuneQuery| lookup(request, &document, query);
    let lookups: Vec<LookupRequest> = request.queries.iter().map(lookup).collect();
    // Before anything is changed: wrong queries are refused by what would answer them.
    lookups.iter().try_for_each(|lookup| memory.plan(lookup, until).map(drop))?;
    let mut earlier = Earlier { memory, collection: &collection, is_kept: false };
    let mut tuning = Tuning { memory, request, until, collection: &collection, document: &document, lookups, progress };
    let (engine, measured) = tuning.run()?;
    earlier.is_kept = true;
    drop(earlier);
    Ok(TuneReport { document, engine, measured })
}

/// The document to measure on; refuses what no measurement could use.
fn check(memory: &LocalMemory, request: &TuneRequest, collection: &CollectionInfo) -> Result<DocumentInfo> {
    if request.queries.is_empty() {
        return Err(MemoryError::Missing { field: "queries".into() });
    }
    at_most("queries", limits::TUNE_QUERIES_MAX as u64, request.queries.len() as u64)?;
    at_most("indexes", limits::TUNE_INDEXES_MAX as u64, request.indexes.len() as u64)?;
    at_most("lookups", limits::TUNE_LOOKUPS_MAX as u64, request.lookups as u64)?;
    if !(0.0..=1.0).contains(&request.recall) {
        return Err(invalid("recall", "0 to 1", request.recall));
    }
    let known = memory.collection_of(collection.id)?;
    for index in &request.indexes {
        memory.check_engine(&known, &with_effort(index, index.effort.unwrap_or(EFFORT_MIN)))?;
    }
    let longest = memory.documents(collection.id)?.into_iter().max_by_key(|document| document.blocks);
    longest
        .filter(|document| document.blocks > 0)
        .ok_or_else(|| not_found(Entity::Document, format!("with a full block in collection {}", collection.spec.name)))
}

/// Keeps a second tuning away from a collection while one sets its engines.
struct Alone<'a> {
    tunings: &'a Mutex<HashSet<CollectionId>>,
    collection: CollectionId,
}

impl Alone<'_> {
    fn of(tunings: &Mutex<HashSet<CollectionId>>, collection: CollectionId) -> Result<Alone<'_>> {
        if !tunings.lock().ignore_poison().insert(collection) {
            let what = format!("the engines of collection {collection}, which are being measured");
            return Err(MemoryError::Busy { what, retry_ms: TUNING_RETRY_MS });
        }
        Ok(Alone { tunings, collection })
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.tunings.lock().ignore_poison().remove(&self.collection);
    }
}

/// Gives a collection its engine back however a measurement ends, unless a new one is kept.
struct Earlier<'a> {
    memory: &'a LocalMemory,
    collection: &'a CollectionInfo,
    is_kept: bool,
}

impl Drop for Earlier<'_> {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        if let Err(error) = self.memory.set_engine(self.collection.id, self.collection.engine.clone()) {
            let collection = &self.collection.spec.name;
            tracing::error!(%error, %collection, engine = %self.collection.engine, "the engine could not be given back");
        }
    }
}

fn lookup(request: &TuneRequest, document: &DocumentInfo, query: &TuneQuery) -> LookupRequest {
    LookupRequest {
        collection: request.collection,
        layer: query.layer,
        queries: query.values.clone(),
        distances: vec![query.distance],
        scope: vec![BlockRange { document: document.id, blocks: 0..document.blocks }],
        top_k: request.top_k,
        block_score: BlockScore::LogSumExp,
        granularity: Granularity::KvGroup,
    }
}

/// One measurement of a collection.
struct Tuning<'a> {
    memory: &'a LocalMemory,
    request: &'a TuneRequest,
    until: &'a Until,
    collection: &'a CollectionInfo,
    document: &'a DocumentInfo,
    lookups: Vec<LookupRequest>,
    progress: &'a mut dyn FnMut(TuneStep),
}

impl Tuning<'_> {
    /// Measures every engine, sets the best, and gives it with all measurements.
    fn run(&mut self) -> Result<(Engine, Vec<Measured>)> {
        let id = self.collection.id;
        self.memory.set_engine(id, Engine::Flat)?;
        let right = self.found(&Engine::Flat)?;
        let mut measured = Vec::new();
        let mut fastest = (Engine::Flat, f64::INFINITY);
        let engines = self.engines()?;
        let indexes = &self.request.indexes;
        let efforts = engines.into_iter().map(|engine| -> Efforts<'_> { Box::new(std::iter::once(engine)) });
        for efforts in efforts.chain(indexes.iter().map(by_effort)) {
            let of_engine = self.measure(efforts, &right)?;
            if of_engine.recall >= self.request.recall && of_engine.p50_us < fastest.1 * WORTH_ITS_MEMORY {
                fastest = (of_engine.engine.clone(), of_engine.p50_us);
            }
            measured.push(of_engine);
        }
        let engine = self.memory.set_engine(id, fastest.0)?.engine;
        Ok((engine, measured))
    }

    /// The engines without settings, from the least memory to the most.
    fn engines(&mut self) -> Result<Vec<Engine>> {
        let mut engines = vec![Engine::Flat];
        if self.collection.spec.key_dtype != DType::Int8 {
            engines.extend([Engine::Sq4, Engine::Sq8]);
        }
        match self.memory.set_engine(self.collection.id, Engine::Cuda) {
            Ok(_) => engines.push(Engine::Cuda),
            Err(MemoryError::Invalid { .. }) if !Path::new(GPU_DRIVER).exists() => {}
            Err(error @ MemoryError::Invalid { .. }) => {
                (self.progress)(TuneStep::LeftOut { engine: Engine::Cuda, reason: error.to_string() });
            }
            Err(error) => return Err(error),
        }
        Ok(engines)
    }

    /// Measures the first engine that reaches the recall, or the last.
    fn measure(&mut self, efforts: Efforts<'_>, right: &[Vec<BlockId>]) -> Result<Measured> {
        let (mut engine, mut recall) = (Engine::Flat, 0.0);
        for more in efforts {
            self.says(&more);
            engine = self.memory.set_engine(self.collection.id, more)?.engine;
            recall = self.recall(&engine, right)?;
            if recall >= self.request.recall {
                break;
            }
        }
        let times = self.times(&engine)?;
        let (p50_us, p99_us) = (percentile(&times, 0.5), percentile(&times, 0.99));
        Ok(Measured { engine, recall, p50_us, p99_us, index_bytes: self.index_bytes()? })
    }

    /// Of all keys of the collection, from what the measured document takes now.
    fn index_bytes(&self) -> Result<u64> {
        let Some(bytes) = self.memory.keys.bytes_of(self.document.id) else {
            return Ok(self.memory.stats()?.index_bytes);
        };
        let blocks: u64 =
            self.memory.documents(self.collection.id)?.iter().map(|document| document.blocks as u64).sum();
        Ok((bytes as u128 * blocks as u128 / self.document.blocks as u128) as u64)
    }

    fn says(&mut self, engine: &Engine) {
        (self.progress)(TuneStep::Measuring { engine: engine.clone(), blocks: self.document.blocks });
    }

    /// One lookup, and its microseconds. What others hold is waited for, as long as the caller waits, and not counted.
    fn ask(&self, lookup: &LookupRequest) -> Result<(Hits, f64)> {
        loop {
            let begin = Instant::now();
            match self.memory.lookup_until(lookup, self.until) {
                Ok(hits) => return Ok((hits, begin.elapsed().as_secs_f64() * 1e6)),
                Err(MemoryError::Busy { retry_ms, .. }) => std::thread::sleep(Duration::from_millis(retry_ms)),
                Err(error) => return Err(error),
            }
            self.until.check()?;
        }
    }

    /// The first `count` lookups in turn, with a sign of life now and then for remote callers.
    fn ask_all(&mut self, engine: &Engine, count: usize, mut each: impl FnMut(usize, Hits, f64)) -> Result<()> {
        let mut said = Instant::now();
        for index in 0..count {
            let (hits, us) = self.ask(&self.lookups[index % self.lookups.len()])?;
            each(index, hits, us);
            if said.elapsed() >= SIGN_OF_LIFE {
                said = Instant::now();
                self.says(engine);
            }
        }
        Ok(())
    }

    /// The blocks of the first lookups' choices.
    fn found(&mut self, engine: &Engine) -> Result<Vec<Vec<BlockId>>> {
        let mut found = Vec::new();
        self.ask_all(engine, self.lookups.len().min(JUDGED), |_, hits, _| found.push(hits.blocks))?;
        Ok(found)
    }

    fn recall(&mut self, engine: &Engine, right: &[Vec<BlockId>]) -> Result<f64> {
        let (mut same, mut all) = (0, 0);
        let shape = &self.collection.spec.shape;
        let rows = Granularity::KvGroup.rows(1, shape.query_heads as usize, shape.kv_heads as usize);
        for (right, found) in right.iter().zip(self.found(engine)?) {
            let k = right.len() / rows;
            for (right, found) in right.chunks_exact(k).zip(found.chunks_exact(k)) {
                same += found.iter().filter(|block| right.contains(block)).count();
                all += k;
            }
        }
        Ok(same as f64 / all.max(1) as f64)
    }

    /// Sorted, in microseconds.
    fn times(&mut self, engine: &Engine) -> Result<Vec<f64>> {
        let warm_up = self.collection.spec.shape.layers as usize * 2;
        let timed = self.request.lookups.max(1) as usize;
        let mut times = Vec::with_capacity(timed);
        self.ask_all(engine, warm_up + timed, |index, _, us| {
            if index >= warm_up {
                times.push(us);
            }
        })?;
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}

/// An engine with less effort and then more.
type Efforts<'a> = Box<dyn Iterator<Item = Engine> + 'a>;

fn with_effort(index: &TuneIndex, effort: u32) -> Engine {
    Engine::Faiss(FaissIndex { factory: index.factory.clone(), effort })
}

/// An index with its effort, or with efforts that double.
fn by_effort(index: &TuneIndex) -> Efforts<'_> {
    let doubled = |effort: &u32| effort.checked_mul(2).filter(|&effort| effort <= limits::FAISS_EFFORT_MAX);
    match index.effort {
        Some(effort) => Box::new(std::iter::once(with_effort(index, effort))),
        None => Box::new(std::iter::successors(Some(EFFORT_MIN), doubled).map(|effort| with_effort(index, effort))),
    }
}

/// The value below which a share of the sorted times lies.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}
