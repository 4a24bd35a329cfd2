//! `landmarkdb bench lookup`: one lookup of one layer, in process and over loopback.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use crate::api::{AppendRequest, BlockMemory, BlockText, DocumentInfo, LookupRequest, NewBlock, Tensor};
use crate::cli::Context;
use crate::cli::bench::percentile;
use crate::cli::error::CliError;
use crate::cli::output::{Report, count, size, table, write_table};
use crate::cli::settings::word;
use crate::client::{ClientOptions, RemoteMemory};
use crate::memory::LocalMemory;
use crate::numeric::{self, simd};
use crate::server::{self, ListenOptions, Listeners, ServeOptions};
use crate::shape::{CollectionSpec, ModelShape, Rope, Sha256Digest};
use crate::types::{BlockRange, BlockScore, CollectionId, DType, Granularity, KeyRule};

/// Blocks appended in one request while the memory is filled.
const APPEND_BLOCKS: u32 = 256;

/// Bytes that the read bandwidth is measured on: far more than any cache.
const BANDWIDTH_BYTES: usize = 1 << 30;

/// Measure a lookup: percentiles of its latency, and key bytes scanned per second.
///
/// Fills a memory in a temporary directory with random blocks, then looks random queries up, in process and through a
/// service on the loopback interface. With m = 1 the layers are rotated, so that keys come from memory and not from a
/// cache. Scanned bytes per second are set against the read bandwidth measured in the same run.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench lookup
  landmarkdb bench lookup --blocks 16384 --head-dim 128 --kv-heads 8 --json
  landmarkdb bench lookup --blocks 512 --head-dim 64 --kv-heads 3 --query-heads 9 --keys-per-block 64
")]
pub(in crate::cli) struct Args {
    #[arg(long, default_value_t = 16_384)]
    blocks: u32,

    #[arg(long, default_value_t = 128)]
    head_dim: u32,

    #[arg(long, default_value_t = 8)]
    kv_heads: u32,

    /// Query heads [default: 4 per KV head].
    #[arg(long)]
    query_heads: Option<u32>,

    /// m: 1 (one key per block) or more (the token keys of blocks of that many tokens).
    #[arg(long, value_delimiter = ',', default_value = "1,64")]
    keys_per_block: Vec<u32>,

    /// f16 or int8.
    #[arg(long, default_value = "int8", value_parser = word::<DType>)]
    keys: DType,

    /// T, query tokens per lookup.
    #[arg(long, default_value_t = 1)]
    query_tokens: u32,

    #[arg(long, default_value_t = 4)]
    top_k: u32,

    /// Lookups that are timed.
    #[arg(long, default_value_t = 200)]
    lookups: usize,

    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct LookupReport {
    shape: String,
    seed: u64,
    threads: usize,
    instructions: String,
    /// Best of five passes of all threads over a buffer larger than any cache.
    read_bandwidth_bytes_per_s: f64,
    results: Vec<LookupResult>,
}

#[derive(Debug, Serialize)]
struct LookupResult {
    /// `in process` or `loopback`.
    path: &'static str,
    keys_per_block: u32,
    key_dtype: String,
    query_tokens: u32,
    /// Key bytes that one lookup scans.
    scanned_bytes: u64,
    p50_us: f64,
    p99_us: f64,
    /// At the median.
    scanned_bytes_per_s: f64,
    /// Of the read bandwidth.
    bandwidth_share: f64,
}

pub(in crate::cli) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let read_bandwidth = read_bandwidth();
    let mut results = Vec::new();
    for &keys_per_block in &args.keys_per_block {
        context.output.say(&format!("filling {} blocks with {keys_per_block} keys each", count(args.blocks)));
        results.extend(measure(args, keys_per_block, read_bandwidth)?);
    }
    context.output.print(&LookupReport {
        shape: format!(
            "{} blocks, {} KV heads, {} query heads, head dim {}, k = {}",
            args.blocks,
            args.kv_heads,
            args.query_heads(),
            args.head_dim,
            args.top_k
        ),
        seed: args.seed,
        threads: rayon::current_num_threads(),
        instructions: format!("{:?}", numeric::level()),
        read_bandwidth_bytes_per_s: read_bandwidth,
        results,
    })
}

fn measure(args: &Args, keys_per_block: u32, read_bandwidth: f64) -> Result<Vec<LookupResult>, CliError> {
    let directory = tempfile::Builder::new().prefix("landmarkdb-bench-").tempdir();
    let directory = directory.map_err(|source| CliError::Io { what: "a temporary directory", source })?;
    let memory = Arc::new(LocalMemory::open(directory.path())?);
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let spec = args.spec(keys_per_block);
    let (collection, document) = fill(memory.as_ref(), &spec, args.blocks, &mut rng)?;

    let scales_bytes = if args.keys == DType::Int8 { 4 } else { 0 };
    let key_bytes = args.head_dim as u64 * args.keys.size_bytes() as u64 + scales_bytes;
    let scanned_bytes = args.blocks as u64 * keys_per_block as u64 * args.kv_heads as u64 * key_bytes;
    let mut time = |path, memory: &dyn BlockMemory| -> Result<LookupResult, CliError> {
        let mut times_us = Vec::with_capacity(args.lookups);
        let warm_up = spec.shape.layers as usize * 2;
        for index in 0..warm_up + args.lookups {
            let request = args.request(collection, &document, index as u32 % spec.shape.layers, &mut rng);
            let begin = Instant::now();
            let hits = memory.lookup(&request)?;
            let us = begin.elapsed().as_secs_f64() * 1e6;
            assert_eq!(hits.k, args.top_k.min(args.blocks), "a lookup of {} blocks", args.blocks);
            if index >= warm_up {
                times_us.push(us);
            }
        }
        times_us.sort_by(f64::total_cmp);
        let p50_us = percentile(&times_us, 0.5);
        Ok(LookupResult {
            path,
            keys_per_block,
            key_dtype: args.keys.to_string(),
            query_tokens: args.query_tokens,
            scanned_bytes,
            p50_us,
            p99_us: percentile(&times_us, 0.99),
            scanned_bytes_per_s: scanned_bytes as f64 / p50_us * 1e6,
            bandwidth_share: scanned_bytes as f64 / p50_us * 1e6 / read_bandwidth,
        })
    };
    let in_process = time("in process", memory.as_ref())?;
    let loopback = over_loopback(memory.clone(), |remote| time("loopback", remote))?;
    Ok(vec![in_process, loopback])
}

/// Serves `memory` on a free port while `work` uses it.
fn over_loopback<T>(
    memory: Arc<LocalMemory>,
    work: impl FnOnce(&RemoteMemory) -> Result<T, CliError>,
) -> Result<T, CliError> {
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|source| CliError::Io { what: "starting the service's threads", source })?;
    let any_port = ListenOptions { tcp: Some(([127, 0, 0, 1], 0).into()), ..ListenOptions::default() };
    let listeners = runtime.block_on(Listeners::bind(&any_port))?;
    let address = listeners.tcp_address().map(|address| format!("http://{address}")).unwrap_or_default();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = runtime.spawn(server::serve(memory, listeners, ServeOptions::default(), async {
        let _ = stopped.await;
    }));
    let result = RemoteMemory::connect(&address, ClientOptions::default())
        .map_err(CliError::from)
        .and_then(|remote| work(&remote));
    let _ = stop.send(());
    let _ = runtime.block_on(serving);
    result
}

/// Appends random blocks. K and V are windows of one random buffer: distinct per block, and quick to make.
fn fill(
    memory: &dyn BlockMemory,
    spec: &CollectionSpec,
    blocks: u32,
    rng: &mut ChaCha8Rng,
) -> Result<(CollectionId, DocumentInfo), CliError> {
    let collection = memory.open_collection(spec)?;
    let document = memory.open_document(collection.id, "random")?;
    let shape = &spec.shape;
    let dims = vec![shape.layers, shape.kv_heads, shape.block_tokens, shape.head_dim];
    let numbers = dims.iter().map(|&n| n as usize).product::<usize>();
    let pool: Vec<f32> = (0..numbers * 2 + 65_536).map(|_| rng.random_range(-1.0..1.0)).collect();
    let mut window = |numbers: usize| {
        let from = rng.random_range(0..pool.len() - numbers);
        Tensor::from_f32(dims.clone(), &pool[from..from + numbers])
    };
    let tokens = shape.block_tokens as usize;
    let text = BlockText { start: 0, bytes: Vec::new(), offsets: vec![0; tokens] };
    let mut next = 0;
    let mut info = document;
    while next < blocks {
        let end = blocks.min(next + APPEND_BLOCKS);
        let batch = (next..end).map(|index| NewBlock {
            index,
            token_ids: vec![0; tokens],
            text: text.clone(),
            k: window(numbers),
            v: window(numbers),
        });
        info = memory.append(AppendRequest { document: info.id, blocks: batch.collect() })?;
        next = end;
    }
    Ok((collection.id, info))
}

/// Bytes per second that all threads read from memory.
fn read_bandwidth() -> f64 {
    let words = vec![1u64; BANDWIDTH_BYTES / 8];
    let part = words.len() / rayon::current_num_threads();
    let pass = || {
        let begin = Instant::now();
        let sum: u64 = words.par_chunks(part.max(1)).map(sum).sum();
        assert_eq!(sum, words.len() as u64);
        BANDWIDTH_BYTES as f64 / begin.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

simd! {
    fn sum(words: &[u64]) -> u64 {
        const LINES: usize = 32;
        let (parts, rest) = words.as_chunks::<LINES>();
        let mut sums = [0u64; LINES];
        for part in parts {
            numeric::prefetch::<{ size_of::<[u64; LINES]>() }>(part.as_ptr().cast());
            for (sum, word) in sums.iter_mut().zip(part) {
                *sum += word;
            }
        }
        sums.iter().chain(rest).sum()
    }
}

impl Args {
    fn query_heads(&self) -> u32 {
        self.query_heads.unwrap_or(4 * self.kv_heads)
    }

    /// A lookup reads no payload, so blocks with one key have as few tokens as a block may have.
    fn spec(&self, keys_per_block: u32) -> CollectionSpec {
        CollectionSpec {
            name: "bench".into(),
            shape: ModelShape {
                layers: if keys_per_block == 1 { 8 } else { 1 },
                query_heads: self.query_heads(),
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                block_tokens: keys_per_block.max(2),
                rope: Rope::from_base(500_000.0, self.head_dim as usize / 2 * 2),
                softmax_scale: (self.head_dim as f32).powf(-0.5),
            },
            key_rule: if keys_per_block == 1 { KeyRule::Landmark } else { KeyRule::Tokens },
            payload_dtype: DType::Int8,
            key_dtype: self.keys,
            model_digest: Sha256Digest([0; 32]),
            tokenizer_digest: Sha256Digest([0; 32]),
            model_name: "random".into(),
        }
    }

    fn request(
        &self,
        collection: CollectionId,
        document: &DocumentInfo,
        layer: u32,
        rng: &mut impl Rng,
    ) -> LookupRequest {
        let numbers = self.query_tokens * self.query_heads() * self.head_dim;
        LookupRequest {
            collection,
            layer,
            queries: (0..numbers).map(|_| rng.random_range(-9.0..9.0)).collect(),
            distances: (0..self.query_tokens).collect(),
            scope: vec![BlockRange { document: document.id, blocks: 0..document.blocks }],
            top_k: self.top_k,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::KvGroup,
        }
    }
}

impl Report for LookupReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}; seed {}, {} threads, {}", self.shape, self.seed, self.threads, self.instructions)?;
        writeln!(to, "read bandwidth {}/s\n", size(self.read_bandwidth_bytes_per_s as u64))?;
        let mut rows = table(["PATH", "M>", "KEYS", "T>", "SCANNED>", "P50>", "P99>", "SCANNED/S>", "OF BANDWIDTH>"]);
        for result in &self.results {
            rows.add_row([
                result.path.to_string(),
                result.keys_per_block.to_string(),
                result.key_dtype.clone(),
                result.query_tokens.to_string(),
                size(result.scanned_bytes),
                format!("{:.0} us", result.p50_us),
                format!("{:.0} us", result.p99_us),
                format!("{}/s", size(result.scanned_bytes_per_s as u64)),
                format!("{:.0} %", 100.0 * result.bandwidth_share),
            ]);
        }
        write_table(to, &rows)
    }
}
