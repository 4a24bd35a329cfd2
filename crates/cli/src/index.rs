//! `landmarkdb index`: what answers lookups in a collection.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use indicatif::ProgressStyle;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use landmarkdb::limits;
use landmarkdb::{
    BlockMemory, BlockRange, BlockScore, CollectionInfo, DType, DocumentInfo, Engine, Entity, FaissIndex, Granularity,
    LookupRequest, MemoryError, ModelShape, TuneIndex, TuneQuery, TuneReport, TuneRequest, TuneStep, Until,
};
use landmarkdb_lab::eval::Capture;

use super::Context;
use super::error::CliError;
use super::numbers::{integer, number, top_k};
use super::output::{Report, plural, size, table, write_table};
use super::settings::{faiss_index, word};

/// Choose the engine that answers a collection's lookups.
///
/// Engines differ in time and memory. flat and sq8 choose the same blocks up to near ties; FAISS indexes find most of them.
/// The choice is kept with the collection.
#[derive(clap::Subcommand, Debug)]
pub(super) enum Command {
    Set(SetArgs),
    Tune(TuneArgs),
}

/// Set the engine of the collection that --collection names.
///
/// Indexes of FAISS are built at once, for documents with at least 8,192 keys per layer and KV head; what is appended later is
/// scanned until half as much has come as they cover. Without an effort (nprobe or efSearch, whichever the index has) it is 64:
/// `index tune` finds the one that is needed.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb index set sq8 --collection books
  landmarkdb index set flat
  landmarkdb index set faiss:HNSW32@256
  landmarkdb index set faiss:IVF256,Flat@32
")]
pub(super) struct SetArgs {
    /// flat, sq8, sq4, cuda, or faiss:FACTORY[@EFFORT].
    ///
    /// flat: the CPU scans every key as it is stored.
    ///
    /// sq8, sq4: the CPU scans f16 keys as int8 or int4 and compares the best blocks as f16: faster, for half or a quarter as much
    /// memory again. int8 keys are scanned as with flat.
    ///
    /// cuda: an NVIDIA GPU scans every key as it is stored, and computes attention.
    ///
    /// faiss:FACTORY[@EFFORT]: indexes of the FAISS library find most of the best blocks; FACTORY is what its index_factory takes.
    #[arg(value_parser = word::<Engine>)]
    engine: Engine,
}

/// Measure every engine on the longest document of a collection, and keep the fastest.
///
/// Looks queries up in all layers in turn: random ones, or those that `landmarkdb capture` recorded of the collection's model,
/// which are what indexes should be judged by. Recall is against flat. For each --faiss without an effort the smallest effort that
/// reaches the recall is found. An engine that takes more memory is kept only if it is at least a tenth faster. For int8 keys sq8
/// and sq4 are flat and are not measured, nor is cuda where there is no GPU.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb index tune --collection books
  landmarkdb index tune --faiss IVF256,Flat --faiss HNSW32 --captured smollm2-32k.safetensors --recall 0.99
  landmarkdb index tune --json | jq -r .engine
")]
pub(super) struct TuneArgs {
    /// Blocks retrieved per choice (k), 1 to 1024.
    #[arg(long = "blocks", value_name = "K", default_value_t = 4, value_parser = top_k())]
    top_k: u32,

    /// An index of FAISS to measure, as FACTORY or FACTORY@EFFORT; may be repeated. Needs a build with --features faiss.
    #[arg(long, value_name = "FACTORY", value_parser = tunable_index)]
    faiss: Vec<TuneIndex>,

    /// The share of flat's blocks that an engine has to find.
    #[arg(long, value_name = "SHARE", default_value_t = 0.99, value_parser = number(0.0..=1.0))]
    recall: f64,

    /// Queries of the collection's model, which `landmarkdb capture` recorded, in place of random ones.
    #[arg(long, value_name = "FILE")]
    captured: Option<PathBuf>,

    /// Lookups that are timed, with each engine.
    #[arg(long, value_name = "COUNT", default_value_t = 300, value_parser = integer::<u32>(1..=limits::TUNE_LOOKUPS_MAX))]
    lookups: u32,

    /// Seed of the random queries.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Random queries at least: so many that recall is taken over.
const RANDOM_QUERIES: usize = 64;

/// What answers now.
#[derive(Debug, Serialize)]
struct EngineReport {
    collection: String,
    engine: String,
    /// The engine has nothing to compress: the keys are int8 already.
    #[serde(skip)]
    as_flat: bool,
}

/// What was measured, and what answers now.
#[derive(Debug, Serialize)]
struct Tuned {
    collection: String,
    /// The document that was looked up in, and its blocks.
    document: String,
    blocks: u32,
    engine: String,
    measured: Vec<MeasuredEngine>,
}

#[derive(Debug, Serialize)]
struct MeasuredEngine {
    engine: String,
    /// The share of flat's blocks that were found.
    recall: f64,
    p50_us: f64,
    p99_us: f64,
    /// What the keys of the collection take in memory, by what the measured document takes.
    index_bytes: u64,
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    let memory = context.memory()?;
    let name = &context.config.collection;
    let collection = memory.collections()?.into_iter().find(|collection| collection.spec.name == *name);
    let collection = collection.ok_or_else(|| missing(Entity::Collection, name.clone()))?;
    match command {
        Command::Set(args) => {
            let collection = memory.set_engine(collection.id, args.engine.clone())?;
            if let Engine::Faiss(_) = collection.engine {
                build(memory.as_ref(), &collection, context)?;
            }
            let as_flat =
                collection.spec.key_dtype == DType::Int8 && matches!(collection.engine, Engine::Sq8 | Engine::Sq4);
            let engine = collection.engine.to_string();
            context.output.print(&EngineReport { collection: name.clone(), engine, as_flat })
        }
        Command::Tune(args) => context.output.print(&tune(args, memory.as_ref(), &collection, context)?),
    }
}

/// Has the indexes of all long documents built: by a lookup in every layer.
fn build(memory: &dyn BlockMemory, collection: &CollectionInfo, context: &Context) -> Result<(), CliError> {
    let shape = &collection.spec.shape;
    let m = shape.keys_per_block(collection.spec.key_rule);
    let documents: Vec<_> = memory.documents(collection.id)?;
    let long = |document: &&DocumentInfo| document.blocks as usize * m >= limits::INDEXED_KEYS_MIN;
    let documents: Vec<_> = documents.iter().filter(long).collect();
    let style = ProgressStyle::with_template("index {wide_bar} {pos} of {len} layers {eta:>4}");
    let bar = context.output.bar("", style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_length(documents.len() as u64 * shape.layers as u64);
    for document in documents {
        for layer in 0..shape.layers {
            let queries = vec![0.0; (shape.query_heads * shape.head_dim) as usize];
            memory.lookup(&request(collection, document, layer, queries))?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// For `value_parser`: FACTORY or FACTORY@EFFORT.
fn tunable_index(typed: &str) -> Result<TuneIndex, String> {
    let engine = faiss_index(typed)?;
    let Engine::Faiss(FaissIndex { factory, effort }) = engine else {
        return Err(format!("{engine} is no index of FAISS"));
    };
    Ok(TuneIndex { factory, effort: typed.contains('@').then_some(effort) })
}

fn tune(
    args: &TuneArgs,
    memory: &dyn BlockMemory,
    collection: &CollectionInfo,
    context: &Context,
) -> Result<Tuned, CliError> {
    let queries = match &args.captured {
        Some(path) => captured_queries(path, collection)?,
        None => random_queries(args.seed, collection),
    };
    let request = TuneRequest {
        collection: collection.id,
        queries,
        top_k: args.top_k,
        recall: args.recall,
        lookups: args.lookups,
        indexes: args.faiss.clone(),
    };
    let mut last = None;
    let mut say = |step| match step {
        // Said again now and then, as a sign of life.
        TuneStep::Measuring { engine, .. } if last.as_ref() == Some(&engine) => {}
        TuneStep::Measuring { engine, blocks } => {
            context.output.say(&format!("measuring {engine} on {}", plural(blocks.into(), "block")));
            last = Some(engine);
        }
        TuneStep::LeftOut { engine, reason } => context.output.say(&format!("not measuring {engine}: {reason}")),
        other => context.output.say(&format!("{other:?}")),
    };
    let TuneReport { document, engine, measured } = memory.tune(&request, &mut say, &Until::FOREVER)?;
    let measured = measured.into_iter().map(|of| MeasuredEngine {
        engine: of.engine.to_string(),
        recall: of.recall,
        p50_us: of.p50_us,
        p99_us: of.p99_us,
        index_bytes: of.index_bytes,
    });
    Ok(Tuned {
        collection: collection.spec.name.clone(),
        document: document.name,
        blocks: document.blocks,
        engine: engine.to_string(),
        measured: measured.collect(),
    })
}

/// One query token, with k = 1.
fn request(collection: &CollectionInfo, document: &DocumentInfo, layer: u32, queries: Vec<f32>) -> LookupRequest {
    LookupRequest {
        collection: collection.id,
        layer,
        queries,
        distances: vec![0],
        scope: vec![BlockRange { document: document.id, blocks: 0..document.blocks }],
        top_k: 1,
        block_score: BlockScore::LogSumExp,
        granularity: Granularity::KvGroup,
    }
}

fn random_queries(seed: u64, collection: &CollectionInfo) -> Vec<TuneQuery> {
    let shape = &collection.spec.shape;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let row_len = (shape.query_heads * shape.head_dim) as usize;
    let queries = (0..RANDOM_QUERIES.max(shape.layers as usize)).map(|index| {
        let values = (0..row_len).map(|_| rng.random_range(-4.0..4.0)).collect();
        TuneQuery { layer: index as u32 % shape.layers, distance: 0, values }
    });
    queries.collect()
}

/// One query per captured layer and token, all layers of a token together.
fn captured_queries(path: &Path, collection: &CollectionInfo) -> Result<Vec<TuneQuery>, CliError> {
    let Capture { about, queries, distances, .. } = Capture::load(path)?;
    let (shape, of_file) = (&collection.spec.shape, &about.shape);
    let dims = |shape: &ModelShape| [shape.query_heads, shape.kv_heads, shape.head_dim];
    if dims(shape) != dims(of_file) || about.layers.iter().any(|&layer| layer >= shape.layers) {
        let expected =
            format!("queries of the model of collection {}, {}", collection.spec.name, collection.spec.model_name);
        let error = MemoryError::Invalid { field: "captured".into(), expected, found: about.model };
        return Err(error.into());
    }
    let row_len = (shape.query_heads * shape.head_dim) as usize;
    let tokens = distances.iter().enumerate();
    let queries = tokens.flat_map(|(token, &distance)| {
        about.layers.iter().zip(&queries).map(move |(&layer, queries)| {
            let values = queries[token * row_len..][..row_len].to_vec();
            TuneQuery { layer, distance, values }
        })
    });
    Ok(queries.take(limits::TUNE_QUERIES_MAX).collect())
}

fn missing(entity: Entity, id: String) -> CliError {
    CliError::Memory(MemoryError::NotFound { entity, id })
}

impl Report for EngineReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let note = if self.as_flat { ", which is the same as flat: the keys are int8 already" } else { "" };
        writeln!(to, "lookups in {} are answered by {}{note}", self.collection, self.engine)
    }
}

impl Report for Tuned {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut rows = table(["ENGINE", "RECALL>", "P50>", "P99>", "MEMORY>"]);
        for measured in &self.measured {
            rows.add_row([
                measured.engine.clone(),
                format!("{:.4}", measured.recall),
                format!("{:.0} us", measured.p50_us),
                format!("{:.0} us", measured.p99_us),
                size(measured.index_bytes),
            ]);
        }
        let blocks = plural(self.blocks.into(), "block");
        writeln!(to, "one lookup in {}/{}, {blocks}\n", self.collection, self.document)?;
        write_table(to, &rows)?;
        writeln!(to, "\nlookups in {} are answered by {}", self.collection, self.engine)
    }
}
