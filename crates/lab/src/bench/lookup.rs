//! One lookup of one layer, in process and over a network, beside other libraries.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::bandwidth::{BANDWIDTH_BYTES, Bandwidth};
use super::case::{Asking, Case, Keys, Truth};
use super::error::BenchError;
use super::peers::{self, PeerResult, PeerSettings};
use super::percentile::percentile;
use super::readable::count;
use super::serving::over_network;
use landmarkdb::cuda::{CudaError, Device, Session};
use landmarkdb::{
    AttendRequest, BlockMemory, BlockScore, DType, DocumentInfo, Engine, Granularity, LocalMemory, Normalisation,
    Placement, words,
};
use linalg::ChannelQuantizer;

/// Lookups between two measurements of the bandwidth, which differs from second to second on a shared machine.
const BANDWIDTH_EVERY: usize = 50;

/// What is looked up, where, and how often.
#[derive(Clone, Debug)]
pub struct LookupSettings {
    /// What is searched.
    pub keys: Keys,
    /// T, of each lookup.
    pub query_tokens: usize,
    /// k
    pub top_k: u32,
    /// For whom one choice is made.
    pub granularity: Granularity,
    /// How the scores of a block's keys become one.
    pub block_score: BlockScore,
    /// How keys are stored, one after the other.
    pub key_dtypes: Vec<DType>,
    /// What answers. Where keys are int8, `sq8` and `sq4` are flat and left out; `cuda` is skipped where there is no GPU.
    pub engines: Vec<Engine>,
    /// Ways to the memory; in process is always measured.
    pub ways: Vec<Way>,
    /// Measure attention over the chosen blocks too.
    pub attend: bool,
    /// Layers whose attention is asked for in one call; none: that is not measured.
    pub together: Option<u16>,
    /// Lookups that are timed.
    pub lookups: usize,
    /// Of random keys and queries.
    pub seed: u64,
    /// What searches the same keys with the same queries in the same minute.
    pub others: PeerSettings,
    /// Most bytes of blocks in a GPU's memory.
    pub gpu_cache_bytes: u64,
}

/// How a request reaches the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A call in this process.
    InProcess,
    /// A service on the loopback interface.
    Tcp,
    /// A service on a Unix socket.
    Unix,
}

words!(Way, "in-process" => InProcess, "tcp" => Tcp, "unix" => Unix);

/// What [`lookup`] measured.
#[derive(Debug, Serialize)]
pub struct LookupReport {
    /// Name and sizes of the case.
    pub shape: String,
    /// Of random keys and queries.
    pub seed: u64,
    /// Of rayon's pool.
    pub threads: usize,
    /// The instruction set that dot products are compiled for.
    pub instructions: String,
    /// T
    pub query_tokens: usize,
    /// For whom one choice was made.
    pub granularity: String,
    /// How the scores of a block's keys became one.
    pub block_score: String,
    /// Its name, where the engine cuda was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// Of queries with keys, in one lookup: T x Hq x N x m x D.
    pub multiply_adds: u64,
    /// By key dtype, engine, way and call.
    pub results: Vec<LookupResult>,
    /// Engines that could not be measured.
    pub skipped: Vec<Skipped>,
    /// By peer and setting.
    pub peers: Vec<PeerResult>,
}

/// An engine without figures.
#[derive(Debug, Serialize)]
pub struct Skipped {
    /// The name of an [`Engine`].
    pub engine: String,
    /// In words.
    pub why: String,
}

/// One engine, on keys of one dtype, reached by one way.
#[derive(Debug, Serialize)]
pub struct LookupResult {
    /// `lookup`, `attend`, or `attend_all` of `requests` layers.
    pub what: &'static str,
    /// Answered by one call.
    pub requests: usize,
    /// The name of an [`Engine`].
    pub engine: String,
    /// How keys are stored.
    pub key_dtype: String,
    /// The name of a [`Way`].
    pub way: String,
    /// m
    pub keys_per_block: usize,
    /// Key bytes that one call scans; none where an index says what is compared.
    pub scanned_bytes: Option<u64>,
    /// Of one call.
    pub p50_us: f64,
    /// Of one call.
    pub p99_us: f64,
    /// At the median.
    pub scanned_bytes_per_s: Option<f64>,
    /// Of all threads, or of the GPU, measured between the lookups.
    pub read_bandwidth_bytes_per_s: f64,
    /// Of the read bandwidth.
    pub bandwidth_share: Option<f64>,
    /// Of the blocks that f32 keys choose for each query head, by their best key.
    pub recall: f64,
}

/// Fills a memory in a temporary directory and looks queries up, in process and through a service, beside peers. Layers take
/// turns, so that keys come from memory and not from a cache. `say` is told what goes on.
///
/// # Errors
/// Those of reading captured keys, of the memory, of the service and of the peers.
pub fn lookup(settings: &LookupSettings, say: &mut dyn FnMut(&str)) -> Result<LookupReport, BenchError> {
    let case = Case::new(&settings.keys, settings.query_tokens, settings.seed)?;
    let &LookupSettings { top_k, block_score, granularity, .. } = settings;
    let asking = Asking { top_k, block_score, granularity };
    say("finding the right answers in double precision");
    let truth: Vec<Vec<Truth>> = (0..case.asked.len()).map(|index| case.truth(index, top_k)).collect();
    let (gpu, skipped) = match settings.engines.contains(&Engine::Cuda).then(Gpu::open) {
        Some(Err(error)) => (None, vec![Skipped { engine: Engine::Cuda.to_string(), why: error.to_string() }]),
        gpu => (gpu.and_then(Result::ok), Vec::new()),
    };
    let mut bench =
        Bench { settings, case: &case, truth: &truth, asking, bandwidth: Bandwidth::new(), gpu, results: Vec::new() };
    for &dtype in &settings.key_dtypes {
        say(&format!("filling {} blocks with {dtype} keys", count(case.blocks as u64)));
        bench.measure(dtype)?;
    }
    let (results, gpu) = (bench.results, bench.gpu.map(|gpu| gpu.name));
    let peers = match settings.others.peers.is_empty() {
        true => Vec::new(),
        false => peers::lookup(&case, &truth, (top_k, settings.lookups), &settings.others)?,
    };
    let shape = &case.shape;
    let keys = (case.blocks * case.keys_per_block()) as u64;
    Ok(LookupReport {
        shape: format!(
            "{}: {} blocks x {} KV heads x {}, {} query heads, m = {}, k = {}",
            case.name,
            count(case.blocks as u64),
            shape.kv_heads,
            shape.head_dim,
            shape.query_heads,
            case.keys_per_block(),
            top_k
        ),
        seed: settings.seed,
        threads: rayon::current_num_threads(),
        instructions: format!("{:?}", linalg::level()),
        query_tokens: settings.query_tokens,
        granularity: granularity.to_string(),
        block_score: block_score.to_string(),
        gpu,
        multiply_adds: settings.query_tokens as u64 * (shape.query_heads * shape.head_dim) as u64 * keys,
        results,
        skipped,
        peers,
    })
}

/// Asks the memory for the n-th time.
type Ask<'a> = &'a dyn Fn(usize) -> Result<(), BenchError>;

/// One run of the benchmark.
struct Bench<'a> {
    settings: &'a LookupSettings,
    case: &'a Case,
    truth: &'a [Vec<Truth>],
    asking: Asking,
    bandwidth: Bandwidth,
    /// Where the engine cuda is measured.
    gpu: Option<Gpu>,
    results: Vec<LookupResult>,
}

/// The GPU whose memory the engine cuda scans.
struct Gpu {
    name: String,
    session: Session,
}

impl Gpu {
    fn open() -> Result<Gpu, CudaError> {
        let device = Device::open(0)?;
        Ok(Gpu { name: device.name()?, session: device.session()? })
    }
}

impl Bench<'_> {
    /// Everything about keys that are stored in one dtype.
    fn measure(&mut self, dtype: DType) -> Result<(), BenchError> {
        let directory = tempfile::Builder::new().prefix("landmarkdb-bench-").tempdir();
        let directory = directory.map_err(|source| BenchError::Io { what: "a temporary directory", source })?;
        let memory = Arc::new(LocalMemory::open(directory.path())?.with_gpu_cache(self.settings.gpu_cache_bytes));
        let collection = memory.open_collection(&self.case.spec("bench", dtype))?.id;
        let document = self.case.fill(memory.as_ref(), collection, dtype)?;
        let (settings, with_gpu) = (self.settings, self.gpu.is_some());
        let measured = |engine: &&Engine| match engine {
            Engine::Sq8 | Engine::Sq4 => dtype != DType::Int8,
            Engine::Cuda => with_gpu,
            _ => true,
        };
        for engine in settings.engines.iter().filter(measured) {
            memory.set_engine(collection, engine.clone())?;
            let recall = self.recall(memory.as_ref(), &document)?;
            self.time(memory.as_ref(), &document, (dtype, engine, Way::InProcess), recall)?;
            for &way in settings.ways.iter().filter(|&&way| way != Way::InProcess) {
                let socket = (way == Way::Unix).then(|| directory.path().join("socket"));
                over_network(memory.clone(), socket, |remote| {
                    self.time(remote, &document, (dtype, engine, way), recall)
                })?;
            }
        }
        Ok(())
    }

    /// The share of the right blocks that are found for each query head.
    fn recall(&self, memory: &dyn BlockMemory, document: &DocumentInfo) -> Result<f64, BenchError> {
        let as_peers = Asking { block_score: BlockScore::Max, granularity: Granularity::TokenHead, ..self.asking };
        let (mut found, mut wanted) = (0, 0);
        for (index, truth) in self.truth.iter().enumerate() {
            let hits = memory.lookup(&self.case.request(document, index, as_peers))?;
            let k = hits.k as usize;
            for (hits, truth) in hits.blocks.chunks_exact(k).zip(truth) {
                found += hits.iter().filter(|hit| truth.as_good.contains(&hit.index)).count();
                wanted += k;
            }
        }
        Ok(found as f64 / wanted.max(1) as f64)
    }

    fn time(
        &mut self,
        memory: &dyn BlockMemory,
        document: &DocumentInfo,
        (dtype, engine, way): (DType, &Engine, Way),
        recall: f64,
    ) -> Result<(), BenchError> {
        let shape = &self.case.shape;
        let (dim, scale) = (shape.head_dim as u64, size_of::<f32>() as u64);
        let key_bytes = match (engine, dtype) {
            (Engine::Sq8, _) => dim + scale,
            (Engine::Sq4, _) => dim / 2 + scale,
            (_, DType::Int8) if self.case.keys_per_block() > 1 => ChannelQuantizer::width(dim as usize) as u64 + scale,
            (_, DType::Int8) => dim + scale,
            _ => 2 * dim,
        };
        let keys = (self.case.blocks * self.case.keys_per_block()) as u64 * shape.kv_heads as u64;
        let scanned_bytes = (!matches!(engine, Engine::Faiss(_))).then_some(keys * key_bytes);
        let lookup = |index| Ok(memory.lookup(&self.case.request(document, index, self.asking)).map(drop)?);
        let attended = |index| AttendRequest {
            lookup: self.case.request(document, index, self.asking),
            normalisation: Normalisation::Plain,
            placement: Placement::Slots,
            without_first_tokens: false,
        };
        let attend = |index| Ok(memory.attend(&attended(index)).map(drop)?);
        let layers = self.settings.together.unwrap_or(0) as usize;
        let attend_all = |index| {
            let requests: Vec<AttendRequest> = (index * layers..(index + 1) * layers).map(attended).collect();
            memory.attend_all(&requests).into_iter().try_for_each(|outcome| Ok(outcome.map(drop)?))
        };
        let kinds: [(&str, usize, bool, Ask<'_>); 3] = [
            ("lookup", 1, true, &lookup),
            ("attend", 1, self.settings.attend, &attend),
            ("attend_all", layers, layers > 0, &attend_all),
        ];
        for (what, requests, _, ask) in kinds.into_iter().filter(|(_, _, wanted, _)| *wanted) {
            let scanned_bytes = scanned_bytes.map(|bytes| bytes * requests as u64);
            let (times_us, read_bandwidth) = self.timed(ask, engine)?;
            let p50_us = percentile(&times_us, 0.5);
            let scanned_bytes_per_s = scanned_bytes.map(|bytes| bytes as f64 / p50_us * 1e6);
            self.results.push(LookupResult {
                what,
                requests,
                engine: engine.to_string(),
                key_dtype: dtype.to_string(),
                way: way.to_string(),
                keys_per_block: self.case.keys_per_block(),
                scanned_bytes,
                p50_us,
                p99_us: percentile(&times_us, 0.99),
                scanned_bytes_per_s,
                read_bandwidth_bytes_per_s: read_bandwidth,
                bandwidth_share: scanned_bytes_per_s.map(|scanned| scanned / read_bandwidth),
                recall,
            });
        }
        Ok(())
    }

    /// Sorted times, and the median of the bandwidths in between.
    fn timed(&self, ask: Ask<'_>, engine: &Engine) -> Result<(Vec<f64>, f64), BenchError> {
        let warm_up = self.case.keys.len() * 2;
        let (mut times_us, mut bandwidths) = (Vec::with_capacity(self.settings.lookups), Vec::new());
        for index in 0..warm_up + self.settings.lookups.max(1) {
            if index % BANDWIDTH_EVERY == 0 {
                bandwidths.push(self.bandwidth_of(engine)?);
            }
            let begin = Instant::now();
            ask(index)?;
            if index >= warm_up {
                times_us.push(begin.elapsed().as_secs_f64() * 1e6);
            }
        }
        bandwidths.push(self.bandwidth_of(engine)?);
        times_us.sort_by(f64::total_cmp);
        bandwidths.sort_by(f64::total_cmp);
        Ok((times_us, percentile(&bandwidths, 0.5)))
    }

    /// Of the memory that an engine scans, now.
    fn bandwidth_of(&self, engine: &Engine) -> Result<f64, BenchError> {
        match &self.gpu {
            Some(gpu) if *engine == Engine::Cuda => Ok(gpu.session.bandwidth(BANDWIDTH_BYTES)?),
            _ => Ok(self.bandwidth.pass()),
        }
    }
}
