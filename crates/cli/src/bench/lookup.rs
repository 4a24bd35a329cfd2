//! `landmarkdb bench lookup`: one lookup of one layer, in process and over a network, beside other libraries.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

use super::case::{Asking, Case, ShapeName, Sizes, Truth};
use super::peers::{self, PeerArgs, PeerResult};
use super::serving::over_network;
use crate::Context;
use crate::bench::word_of;
use crate::error::CliError;
use crate::output::{Report, count, plain_table, size, write_table};
use crate::settings::{faiss_index, word};
use landmarkdb::api::{AttendRequest, BlockMemory, DocumentInfo};
use landmarkdb::cuda::{CudaError, Device, Session};
use landmarkdb::memory::LocalMemory;
use landmarkdb::types::{BlockScore, DType, Engine, Granularity, Normalisation};
use landmarkdb_lab::bench::percentile;
use linalg::{ChannelCode, simd};

/// Bytes that the read bandwidth is measured on: far more than any cache.
const BANDWIDTH_BYTES: usize = 512 << 20;

/// Lookups between two measurements of the bandwidth, which differs from second to second on a shared machine.
const BANDWIDTH_EVERY: usize = 50;

/// Measure a lookup: percentiles of its latency, and key bytes scanned per second.
///
/// Fills a memory in a temporary directory, then looks queries up, in process and through a service. Layers take turns,
/// so that keys come from memory and not from a cache; scanned bytes per second are set against the read bandwidth
/// measured in between, those of a GPU against what it reads and writes while it copies. With --peers other libraries
/// search the same keys with the same queries in the same minute.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench lookup
  landmarkdb bench lookup --shape llama3-8b-1m --peers faiss-flat,usearch
  landmarkdb bench lookup --captured smollm2-32k.safetensors --keys int8 --peers faiss-flat,faiss-ivf,faiss-hnsw,usearch
  landmarkdb bench lookup --blocks 512 --head-dim 64 --kv-heads 3 --query-heads 9 --keys-per-block 64
")]
pub(crate) struct Args {
    /// A model's layer and a text's length.
    #[arg(long, value_name = "SHAPE", value_enum, default_value = "llama3-8b-1m")]
    shape: ShapeName,

    /// Keys and queries that `landmarkdb capture` kept, in place of random ones.
    #[arg(long, value_name = "FILE", conflicts_with = "shape")]
    captured: Option<PathBuf>,

    /// Blocks [default: the shape's, as are the following four].
    #[arg(long)]
    blocks: Option<usize>,

    #[arg(long)]
    head_dim: Option<usize>,

    #[arg(long)]
    kv_heads: Option<usize>,

    #[arg(long)]
    query_heads: Option<usize>,

    /// m: 1 (one key per block) or more (the token keys of blocks of that many tokens).
    #[arg(long)]
    keys_per_block: Option<usize>,

    /// How keys are stored: f16, int8 or both.
    #[arg(long, value_delimiter = ',', default_value = "f16,int8", value_parser = word::<DType>)]
    keys: Vec<DType>,

    /// What answers: flat, sq8, sq4, cuda. Where keys are int8, sq8 and sq4 are flat; cuda is skipped where there is no GPU.
    #[arg(long, value_delimiter = ',', default_value = "flat,sq8", value_parser = word::<Engine>)]
    engines: Vec<Engine>,

    /// An index of FAISS that answers too, as FACTORY or FACTORY@EFFORT; may be repeated. Needs a build with --features faiss.
    #[arg(long, value_name = "FACTORY", value_parser = faiss_index)]
    faiss: Vec<Engine>,

    /// Ways to the memory; in-process is always measured.
    #[arg(long, value_delimiter = ',', value_enum, default_value = "tcp")]
    ways: Vec<Way>,

    /// Measure attention over the chosen blocks too.
    #[arg(long)]
    attend: bool,

    /// Measure attention asked for of so many layers in one call.
    #[arg(long, value_name = "LAYERS", value_parser = clap::value_parser!(u16).range(1..))]
    together: Option<u16>,

    /// T, query tokens per lookup.
    #[arg(long, default_value_t = 1)]
    query_tokens: usize,

    #[arg(long, default_value_t = 4)]
    top_k: u32,

    /// For whom one choice is made [default: kv-group; beside peers token-head, as they choose].
    #[arg(long, value_parser = word::<Granularity>)]
    granularity: Option<Granularity>,

    /// How the scores of a block's keys become one [default: log-sum-exp; beside peers max, as they score].
    #[arg(long, value_parser = word::<BlockScore>)]
    block_score: Option<BlockScore>,

    /// Lookups that are timed.
    #[arg(long, default_value_t = 200)]
    lookups: usize,

    #[command(flatten)]
    others: PeerArgs,

    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// How a request reaches the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Way {
    InProcess,
    Tcp,
    Unix,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct LookupReport {
    shape: String,
    seed: u64,
    pub(super) threads: usize,
    instructions: String,
    pub(super) query_tokens: usize,
    granularity: String,
    block_score: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    /// Of queries with keys, in one lookup: T x Hq x N x m x D.
    pub(super) multiply_adds: u64,
    pub(super) results: Vec<LookupResult>,
    skipped: Vec<Skipped>,
    pub(super) peers: Vec<PeerResult>,
}

/// An engine without figures.
#[derive(Debug, Serialize)]
struct Skipped {
    engine: String,
    why: String,
}

#[derive(Debug, Serialize)]
pub(super) struct LookupResult {
    /// `lookup`, `attend`, or `attend_all` of `requests` layers.
    pub(super) what: &'static str,
    /// Answered by one call.
    requests: usize,
    pub(super) engine: String,
    pub(super) key_dtype: String,
    pub(super) way: String,
    keys_per_block: usize,
    /// Key bytes that one call scans; none where an index says what is compared.
    pub(super) scanned_bytes: Option<u64>,
    pub(super) p50_us: f64,
    p99_us: f64,
    /// At the median.
    scanned_bytes_per_s: Option<f64>,
    /// Of all threads, or of the GPU, measured between the lookups.
    pub(super) read_bandwidth_bytes_per_s: f64,
    /// Of the read bandwidth.
    bandwidth_share: Option<f64>,
    /// Of the blocks that f32 keys choose for each query head, by their best key.
    pub(super) recall: f64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    context.output.print(&measure(args, context)?)
}

pub(super) fn measure(args: &Args, context: &Context) -> Result<LookupReport, CliError> {
    let case = args.case()?;
    let alone = args.others.peers.is_empty();
    let asking = Asking {
        top_k: args.top_k,
        block_score: args.block_score.unwrap_or(if alone { BlockScore::LogSumExp } else { BlockScore::Max }),
        granularity: args.granularity.unwrap_or(if alone { Granularity::KvGroup } else { Granularity::TokenHead }),
    };
    context.output.say("finding the right answers in double precision");
    let truth: Vec<Vec<Truth>> = (0..case.asked.len()).map(|index| case.truth(index, args.top_k)).collect();
    let (gpu, skipped) = match args.engines.contains(&Engine::Cuda).then(Gpu::open) {
        Some(Err(error)) => (None, vec![Skipped { engine: Engine::Cuda.to_string(), why: error.to_string() }]),
        gpu => (gpu.and_then(Result::ok), Vec::new()),
    };
    let mut bench =
        Bench { args, case: &case, truth: &truth, asking, bandwidth: Bandwidth::new(), gpu, results: Vec::new() };
    for &dtype in &args.keys {
        context.output.say(&format!("filling {} blocks with {dtype} keys", count(case.blocks as u64)));
        bench.measure(dtype, context)?;
    }
    let (results, gpu) = (bench.results, bench.gpu.map(|gpu| gpu.name));
    let peers = match alone {
        true => Vec::new(),
        false => peers::lookup(&case, &truth, (args.top_k, args.lookups), &args.others)?,
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
            args.top_k
        ),
        seed: args.seed,
        threads: rayon::current_num_threads(),
        instructions: format!("{:?}", linalg::level()),
        query_tokens: args.query_tokens,
        granularity: asking.granularity.to_string(),
        block_score: asking.block_score.to_string(),
        gpu,
        multiply_adds: args.query_tokens as u64 * (shape.query_heads * shape.head_dim) as u64 * keys,
        results,
        skipped,
        peers,
    })
}

/// Asks the memory for the n-th time.
type Ask<'a> = &'a dyn Fn(usize) -> Result<(), CliError>;

/// One run of the benchmark.
struct Bench<'a> {
    args: &'a Args,
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
    fn measure(&mut self, dtype: DType, context: &Context) -> Result<(), CliError> {
        let directory = tempfile::Builder::new().prefix("landmarkdb-bench-").tempdir();
        let directory = directory.map_err(|source| CliError::Io { what: "a temporary directory", source })?;
        let memory = Arc::new(LocalMemory::open(directory.path())?.with_gpu_cache(context.config.gpu_cache_bytes));
        let collection = memory.open_collection(&self.case.spec("bench", dtype))?.id;
        let document = self.case.fill(memory.as_ref(), collection, dtype)?;
        let (args, with_gpu) = (self.args, self.gpu.is_some());
        let measured = |engine: &&Engine| match engine {
            Engine::Sq8 | Engine::Sq4 => dtype != DType::Int8,
            Engine::Cuda => with_gpu,
            _ => true,
        };
        for engine in args.engines.iter().chain(&args.faiss).filter(measured) {
            memory.set_engine(collection, engine.clone())?;
            let recall = self.recall(memory.as_ref(), &document)?;
            self.time(memory.as_ref(), &document, (dtype, engine, Way::InProcess), recall)?;
            for &way in args.ways.iter().filter(|&&way| way != Way::InProcess) {
                let socket = (way == Way::Unix).then(|| directory.path().join("socket"));
                over_network(memory.clone(), socket, |remote| {
                    self.time(remote, &document, (dtype, engine, way), recall)
                })?;
            }
        }
        Ok(())
    }

    /// The share of the right blocks that are found for each query head.
    fn recall(&self, memory: &dyn BlockMemory, document: &DocumentInfo) -> Result<f64, CliError> {
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
    ) -> Result<(), CliError> {
        let shape = &self.case.shape;
        let (dim, scale) = (shape.head_dim as u64, size_of::<f32>() as u64);
        let key_bytes = match (engine, dtype) {
            (Engine::Sq8, _) => dim + scale,
            (Engine::Sq4, _) => dim / 2 + scale,
            (_, DType::Int8) if self.case.keys_per_block() > 1 => ChannelCode::width(dim as usize) as u64 + scale,
            (_, DType::Int8) => dim + scale,
            _ => 2 * dim,
        };
        let keys = (self.case.blocks * self.case.keys_per_block()) as u64 * shape.kv_heads as u64;
        let scanned_bytes = (!matches!(engine, Engine::Faiss(_))).then_some(keys * key_bytes);
        let lookup = |index| Ok(memory.lookup(&self.case.request(document, index, self.asking)).map(drop)?);
        let attended = |index| AttendRequest {
            lookup: self.case.request(document, index, self.asking),
            normalisation: Normalisation::Plain,
        };
        let attend = |index| Ok(memory.attend(&attended(index)).map(drop)?);
        let layers = self.args.together.unwrap_or(0) as usize;
        let attend_all = |index| {
            let requests: Vec<AttendRequest> = (index * layers..(index + 1) * layers).map(attended).collect();
            memory.attend_all(&requests).into_iter().try_for_each(|outcome| Ok(outcome.map(drop)?))
        };
        let kinds: [(&str, usize, bool, Ask<'_>); 3] = [
            ("lookup", 1, true, &lookup),
            ("attend", 1, self.args.attend, &attend),
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
                way: word_of(way),
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
    fn timed(&self, ask: Ask<'_>, engine: &Engine) -> Result<(Vec<f64>, f64), CliError> {
        let warm_up = self.case.keys.len() * 2;
        let (mut times_us, mut bandwidths) = (Vec::with_capacity(self.args.lookups), Vec::new());
        for index in 0..warm_up + self.args.lookups.max(1) {
            if index % BANDWIDTH_EVERY == 0 {
                bandwidths.push(self.bandwidth_of(engine)?);
            }
            let begin = Instant::now();
            ask(index)?;
            if index >= warm_up {
                times_us.push(micros(begin.elapsed()));
            }
        }
        bandwidths.push(self.bandwidth_of(engine)?);
        times_us.sort_by(f64::total_cmp);
        bandwidths.sort_by(f64::total_cmp);
        Ok((times_us, percentile(&bandwidths, 0.5)))
    }

    /// Of the memory that an engine scans, now.
    fn bandwidth_of(&self, engine: &Engine) -> Result<f64, CliError> {
        match &self.gpu {
            Some(gpu) if *engine == Engine::Cuda => Ok(gpu.session.bandwidth(BANDWIDTH_BYTES)?),
            _ => Ok(self.bandwidth.pass()),
        }
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// What all threads together read from memory.
pub(super) struct Bandwidth(Vec<u64>);

impl Bandwidth {
    pub(super) fn new() -> Self {
        // In large pages, as keys are.
        let mut words = linalg::zeroed(BANDWIDTH_BYTES / 8);
        words.fill(1);
        Bandwidth(words)
    }

    /// Bytes per second, now.
    pub(super) fn pass(&self) -> f64 {
        let part = self.0.len() / rayon::current_num_threads();
        let begin = Instant::now();
        let total: u64 = self.0.par_chunks(part.max(1)).map(sum).sum();
        assert_eq!(total, self.0.len() as u64);
        BANDWIDTH_BYTES as f64 / begin.elapsed().as_secs_f64()
    }
}

simd! {
    fn sum(words: &[u64]) -> u64 {
        const LINES: usize = 32;
        let (parts, rest) = words.as_chunks::<LINES>();
        let mut sums = [0u64; LINES];
        for part in parts {
            linalg::prefetch::<{ size_of::<[u64; LINES]>() }>(part.as_ptr().cast());
            for (sum, word) in sums.iter_mut().zip(part) {
                *sum += word;
            }
        }
        sums.iter().chain(rest).sum()
    }
}

impl Args {
    fn case(&self) -> Result<Case, CliError> {
        if let Some(path) = &self.captured {
            return Case::captured(path, self.query_tokens);
        }
        let of_shape = self.shape.sizes();
        let sizes = Sizes {
            blocks: self.blocks.unwrap_or(of_shape.blocks),
            kv_heads: self.kv_heads.unwrap_or(of_shape.kv_heads),
            query_heads: self.query_heads.unwrap_or(of_shape.query_heads),
            head_dim: self.head_dim.unwrap_or(of_shape.head_dim),
            keys_per_block: self.keys_per_block.unwrap_or(of_shape.keys_per_block),
        };
        Ok(Case::random(format!("{}, random", word_of(self.shape)), sizes, self.query_tokens, self.seed))
    }
}

impl Report for LookupReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}; seed {}, {} threads, {}", self.shape, self.seed, self.threads, self.instructions)?;
        writeln!(to, "T = {}, one choice per {}, {}", self.query_tokens, self.granularity, self.block_score)?;
        self.gpu.iter().try_for_each(|name| writeln!(to, "GPU: {name}"))?;
        self.skipped.iter().try_for_each(|Skipped { engine, why }| writeln!(to, "{engine} was skipped: {why}"))?;
        writeln!(to)?;
        let mut rows = plain_table([
            "",
            "KEYS",
            "ENGINE",
            "WAY",
            "SCANNED>",
            "P50>",
            "P99>",
            "SCANNED/S>",
            "MEMORY>",
            "SHARE>",
            "RECALL>",
        ]);
        let or_dash = |text: Option<String>| text.unwrap_or("-".into());
        for result in &self.results {
            rows.add_row([
                match result.requests {
                    1 => result.what.to_string(),
                    layers => format!("{} x {layers}", result.what),
                },
                result.key_dtype.clone(),
                result.engine.clone(),
                result.way.clone(),
                or_dash(result.scanned_bytes.map(size)),
                format!("{:.0} us", result.p50_us),
                format!("{:.0} us", result.p99_us),
                or_dash(result.scanned_bytes_per_s.map(|scanned| format!("{}/s", size(scanned as u64)))),
                format!("{}/s", size(result.read_bandwidth_bytes_per_s as u64)),
                or_dash(result.bandwidth_share.map(|share| format!("{:.0} %", 100.0 * share))),
                format!("{:.4}", result.recall),
            ]);
        }
        write_table(to, &rows)?;
        if self.peers.is_empty() {
            return Ok(());
        }
        let mut rows = plain_table(["PEER", "SETTING", "THREADS>", "P50>", "P99>", "RECALL>", "TIMES OURS>"]);
        let ours = self.results.iter().filter(|result| result.what == "lookup" && result.way == "in-process");
        let fastest = ours.map(|result| result.p50_us).fold(f64::INFINITY, f64::min);
        for peer in &self.peers {
            match &peer.skipped {
                Some(why) => rows.add_row([peer.peer.clone(), why.clone()]),
                None => rows.add_row([
                    format!("{} {}", peer.peer, peer.version),
                    peer.setting.clone(),
                    peer.threads.to_string(),
                    format!("{:.0} us", peer.figures.p50_us),
                    format!("{:.0} us", peer.figures.p99_us),
                    format!("{:.4}", peer.figures.recall),
                    format!("{:.1}", peer.figures.p50_us / fastest),
                ]),
            };
        }
        writeln!(to)?;
        write_table(to, &rows)
    }
}
