//! Which engine answers a collection's lookups fastest? Each is measured on the longest document, and the fastest that finds
//! enough is kept.

use std::time::Instant;

use super::error::{at_most, not_found};
use crate::api::{
    BlockMemory, CollectionInfo, DocumentInfo, Entity, LookupRequest, Measured, MemoryError, Result, TuneIndex,
    TuneQuery, TuneReport, TuneRequest, TuneStep,
};
use crate::limits;
use crate::types::{BlockId, BlockRange, BlockScore, DType, Engine, FaissIndex, Granularity};
use crate::until::Until;

/// How much faster an engine has to be than one that takes less memory.
const WORTH_ITS_MEMORY: f64 = 0.9;

/// Lookups that recall is taken over.
const JUDGED: usize = 64;

/// The least effort that is tried.
const EFFORT_MIN: u32 = 8;

/// As [`BlockMemory::tune`], through lookups of `memory`.
pub(super) fn tune(
    memory: &dyn BlockMemory,
    request: &TuneRequest,
    progress: &mut dyn FnMut(TuneStep),
    until: &Until,
) -> Result<TuneReport> {
    let collections = memory.collections()?;
    let collection = collections.into_iter().find(|collection| collection.id == request.collection);
    let collection = collection.ok_or_else(|| not_found(Entity::Collection, request.collection))?;
    if request.queries.is_empty() {
        return Err(MemoryError::Missing { field: "queries".into() });
    }
    at_most("queries", limits::TUNE_QUERIES_MAX as u64, request.queries.len() as u64)?;
    at_most("indexes", limits::TUNE_INDEXES_MAX as u64, request.indexes.len() as u64)?;
    at_most("lookups", limits::TUNE_LOOKUPS_MAX as u64, request.lookups as u64)?;
    let longest = memory.documents(collection.id)?.into_iter().max_by_key(|document| document.blocks);
    let document = longest.filter(|document| document.blocks > 0).ok_or_else(|| {
        not_found(Entity::Document, format!("with a full block in collection {}", collection.spec.name))
    })?;
    let lookup = |query: &TuneQuery| lookup(request, &document, query);
    let lookups = request.queries.iter().map(lookup).collect();
    let tuning = Tuning { memory, request, until, collection: &collection, document: &document, lookups };
    let found = tuning.run(progress);
    if found.is_err() {
        memory.set_engine(collection.id, collection.engine.clone())?;
    }
    let (engine, measured) = found?;
    Ok(TuneReport { document, engine, measured })
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
    memory: &'a dyn BlockMemory,
    request: &'a TuneRequest,
    until: &'a Until,
    collection: &'a CollectionInfo,
    document: &'a DocumentInfo,
    lookups: Vec<LookupRequest>,
}

impl Tuning<'_> {
    /// Measures every engine, sets the best, and gives it with all measurements.
    fn run(&self, progress: &mut dyn FnMut(TuneStep)) -> Result<(Engine, Vec<Measured>)> {
        let id = self.collection.id;
        self.memory.set_engine(id, Engine::Flat)?;
        let right = self.found()?;
        let mut measured = Vec::new();
        let mut fastest = (Engine::Flat, f64::INFINITY);
        for efforts in self.candidates(progress)? {
            let of_engine = self.measure(efforts, &right, progress)?;
            if of_engine.recall >= self.request.recall && of_engine.p50_us < fastest.1 * WORTH_ITS_MEMORY {
                fastest = (of_engine.engine.clone(), of_engine.p50_us);
            }
            measured.push(of_engine);
        }
        let engine = self.memory.set_engine(id, fastest.0)?.engine;
        Ok((engine, measured))
    }

    /// The engines to measure, from the least memory to the most, each by rising effort.
    fn candidates(&self, progress: &mut dyn FnMut(TuneStep)) -> Result<Vec<Vec<Engine>>> {
        let mut engines = vec![vec![Engine::Flat]];
        if self.collection.spec.key_dtype != DType::Int8 {
            engines.extend([vec![Engine::Sq4], vec![Engine::Sq8]]);
        }
        match self.memory.set_engine(self.collection.id, Engine::Cuda) {
            Ok(_) => engines.push(vec![Engine::Cuda]),
            Err(error @ MemoryError::Invalid { .. }) => {
                progress(TuneStep::LeftOut { engine: Engine::Cuda, reason: error.to_string() });
            }
            Err(error) => return Err(error),
        }
        engines.extend(self.request.indexes.iter().map(by_effort));
        Ok(engines)
    }

    /// Measures the first engine that reaches the recall, or the last.
    fn measure(
        &self,
        efforts: Vec<Engine>,
        right: &[Vec<BlockId>],
        progress: &mut dyn FnMut(TuneStep),
    ) -> Result<Measured> {
        let (mut engine, mut recall) = (Engine::Flat, 0.0);
        for more in efforts {
            progress(TuneStep::Measuring { engine: more.clone(), blocks: self.document.blocks });
            engine = self.memory.set_engine(self.collection.id, more)?.engine;
            recall = self.recall(right)?;
            if recall >= self.request.recall {
                break;
            }
        }
        let times = self.times()?;
        let (p50_us, p99_us) = (percentile(&times, 0.5), percentile(&times, 0.99));
        Ok(Measured { engine, recall, p50_us, p99_us, index_bytes: self.memory.stats()?.index_bytes })
    }

    /// The blocks of the first lookups' choices.
    fn found(&self) -> Result<Vec<Vec<BlockId>>> {
        let judged = self.lookups.iter().take(JUDGED);
        judged.map(|lookup| Ok(self.memory.lookup_until(lookup, self.until)?.blocks)).collect()
    }

    fn recall(&self, right: &[Vec<BlockId>]) -> Result<f64> {
        let (mut same, mut all) = (0, 0);
        let shape = &self.collection.spec.shape;
        let rows = Granularity::KvGroup.rows(1, shape.query_heads as usize, shape.kv_heads as usize);
        for (right, found) in right.iter().zip(self.found()?) {
            let k = right.len() / rows;
            for (right, found) in right.chunks_exact(k).zip(found.chunks_exact(k)) {
                same += found.iter().filter(|block| right.contains(block)).count();
                all += k;
            }
        }
        Ok(same as f64 / all.max(1) as f64)
    }

    /// Sorted, in microseconds.
    fn times(&self) -> Result<Vec<f64>> {
        let warm_up = self.collection.spec.shape.layers as usize * 2;
        let timed = self.request.lookups.max(1) as usize;
        let mut times = Vec::with_capacity(timed);
        for (index, lookup) in self.lookups.iter().cycle().take(warm_up + timed).enumerate() {
            let begin = Instant::now();
            self.memory.lookup_until(lookup, self.until)?;
            if index >= warm_up {
                times.push(begin.elapsed().as_secs_f64() * 1e6);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}

/// An index with its effort, or with less and then more.
fn by_effort(TuneIndex { factory, effort }: &TuneIndex) -> Vec<Engine> {
    let with = |effort| Engine::Faiss(FaissIndex { factory: factory.clone(), effort });
    let doubled = |effort: &u32| effort.checked_mul(2).filter(|&effort| effort <= limits::FAISS_EFFORT_MAX);
    match effort {
        Some(effort) => vec![with(*effort)],
        None => std::iter::successors(Some(EFFORT_MIN), doubled).map(with).collect(),
    }
}

/// The value below which a share of the sorted times lies.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}
