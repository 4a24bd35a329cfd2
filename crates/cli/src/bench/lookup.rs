//! `landmarkdb bench lookup`: one lookup of one layer, in process and over a network, beside other libraries.

use std::io::{self, Write};
use std::path::PathBuf;

use super::peers::PeerArgs;
use crate::Context;
use crate::error::CliError;
use crate::numbers::{from_one, integer, top_k};
use crate::output::{Report, plain_table, size, write_table};
use crate::settings::{BLOCK_SCORE, GRANULARITY, explained, faiss_index, one_of, word};
use landmarkdb::{BlockScore, DType, Engine, Granularity, limits};
use landmarkdb_lab::bench::{self, Keys, LookupReport, LookupSettings, Shape, Sizes, Skipped, Way};

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
    #[arg(long, value_name = "SHAPE", value_parser = one_of::<Shape>(Shape::WORDS), default_value = "llama3-8b-1m")]
    pub(super) shape: Shape,

    /// A file of `landmarkdb capture`, in place of random keys and queries.
    #[arg(long, value_name = "FILE", conflicts_with = "shape")]
    pub(super) captured: Option<PathBuf>,

    /// Blocks [default: the shape's, as are the following four].
    #[arg(long, value_parser = from_one::<usize>())]
    pub(super) blocks: Option<usize>,

    /// Dimensions of a head.
    #[arg(long, value_parser = from_one::<usize>())]
    pub(super) head_dim: Option<usize>,

    /// KV heads.
    #[arg(long, value_parser = from_one::<usize>())]
    pub(super) kv_heads: Option<usize>,

    /// Query heads.
    #[arg(long, value_parser = from_one::<usize>())]
    pub(super) query_heads: Option<usize>,

    /// m: 1 (one key per block) or more (the token keys of blocks of that many tokens).
    #[arg(long, value_parser = from_one::<usize>())]
    pub(super) keys_per_block: Option<usize>,

    /// Data types of keys: f16, int8 or both.
    #[arg(long, value_delimiter = ',', default_value = "f16,int8", value_parser = one_of::<DType>(&["f16", "int8"]))]
    pub(super) keys: Vec<DType>,

    /// Engines to measure: flat, sq8, sq4, cuda. Where keys are int8, sq8 and sq4 are flat; cuda is skipped where there is no GPU.
    #[arg(long, value_delimiter = ',', default_value = "flat,sq8", value_parser = word::<Engine>)]
    pub(super) engines: Vec<Engine>,

    /// A FAISS index to measure, as FACTORY or FACTORY@EFFORT; may be repeated. Needs a build with --features faiss.
    #[arg(long, value_name = "FACTORY", value_parser = faiss_index)]
    pub(super) faiss: Vec<Engine>,

    /// Transports to measure; in-process is always measured.
    #[arg(long, value_delimiter = ',', value_parser = one_of::<Way>(Way::WORDS), default_value = "tcp")]
    pub(super) ways: Vec<Way>,

    /// Measure attention over the chosen blocks too.
    #[arg(long)]
    pub(super) attend: bool,

    /// Measure attention of this many layers in one call.
    #[arg(long, value_name = "LAYERS", value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) together: Option<u16>,

    /// T, query tokens per lookup.
    #[arg(long, default_value_t = 1, value_parser = integer::<usize>(1..=limits::QUERY_TOKENS_MAX))]
    pub(super) query_tokens: usize,

    /// Blocks retrieved per choice (k).
    #[arg(long, default_value_t = 4, value_parser = top_k())]
    pub(super) top_k: u32,

    /// Who shares a choice of blocks [default: kv-group; beside peers token-head, as they choose].
    #[arg(long, value_parser = explained::<Granularity>(GRANULARITY))]
    pub(super) granularity: Option<Granularity>,

    /// Score of a block, over its keys [default: log-sum-exp; beside peers max, as they score].
    #[arg(long, value_parser = explained::<BlockScore>(BLOCK_SCORE))]
    pub(super) block_score: Option<BlockScore>,

    /// Lookups that are timed.
    #[arg(long, default_value_t = 200, value_parser = from_one::<usize>())]
    pub(super) lookups: usize,

    #[command(flatten)]
    pub(super) others: PeerArgs,

    /// Seed of the random keys and queries.
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    context.output.print(&measure(args, context)?)
}

pub(super) fn measure(args: &Args, context: &Context) -> Result<LookupReport, CliError> {
    let alone = args.others.peers.is_empty();
    let settings = LookupSettings {
        keys: args.keys_searched(),
        query_tokens: args.query_tokens,
        top_k: args.top_k,
        granularity: args.granularity.unwrap_or(if alone { Granularity::KvGroup } else { Granularity::TokenHead }),
        block_score: args.block_score.unwrap_or(if alone { BlockScore::LogSumExp } else { BlockScore::Max }),
        key_dtypes: args.keys.clone(),
        engines: args.engines.iter().chain(&args.faiss).cloned().collect(),
        ways: args.ways.clone(),
        attend: args.attend,
        together: args.together,
        lookups: args.lookups,
        seed: args.seed,
        others: args.others.settings(),
        gpu_cache_bytes: context.config.gpu_cache_bytes,
    };
    Ok(bench::lookup(&settings, &mut |line| context.output.say(line))?)
}

impl Args {
    fn keys_searched(&self) -> Keys {
        if let Some(path) = &self.captured {
            return Keys::Captured(path.clone());
        }
        let of_shape = self.shape.sizes();
        let sizes = Sizes {
            blocks: self.blocks.unwrap_or(of_shape.blocks),
            kv_heads: self.kv_heads.unwrap_or(of_shape.kv_heads),
            query_heads: self.query_heads.unwrap_or(of_shape.query_heads),
            head_dim: self.head_dim.unwrap_or(of_shape.head_dim),
            keys_per_block: self.keys_per_block.unwrap_or(of_shape.keys_per_block),
        };
        Keys::Random { shape: self.shape, sizes }
    }
}

impl Report for LookupReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
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
