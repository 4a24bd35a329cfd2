//! `landmarkdb index`: what answers lookups in a collection.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::ProgressStyle;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use landmarkdb::api::{BlockMemory, CollectionInfo, DocumentInfo, Entity, LookupRequest, MemoryError};
use landmarkdb::limits;
use landmarkdb::shape::ModelShape;
use landmarkdb::types::{BlockId, BlockRange, BlockScore, DType, Engine, FaissIndex, Granularity};
use landmarkdb_lab::eval::Capture;

use super::Context;
use super::bench::percentile;
use super::error::CliError;
use super::output::{Report, count, size, table, write_table};
use super::settings::{faiss_index, top_k, word};

/// Choose what answers lookups in a collection.
///
/// Engines differ in time and memory. flat and sq8 choose the same blocks but for near ties, indexes of FAISS find most of them.
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
    /// flat: keys are scanned as they are stored. sq8, sq4: f16 keys are scanned as int8 or int4, and blocks that could
    /// be among the best are compared as f16; half or a quarter as much memory again. cuda: an NVIDIA GPU scans keys as they are
    /// stored, and attends. faiss:FACTORY or faiss:FACTORY@EFFORT: indexes of the FAISS library, in the language of its
    /// index_factory, find most of the blocks.
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
    /// k, the blocks of every choice, 1 to 1024.
    #[arg(long, value_name = "K", default_value_t = 4, value_parser = top_k())]
    top_k: u32,

    /// An index of FAISS to measure, as FACTORY or FACTORY@EFFORT; may be repeated. Needs a build with --features faiss.
    #[arg(long, value_name = "FACTORY", value_parser = tunable_index)]
    faiss: Vec<Tunable>,

    /// The share of flat's blocks that an engine has to find.
    #[arg(long, default_value_t = 0.99)]
    recall: f64,

    /// Queries of the collection's model, which `landmarkdb capture` recorded, in place of random ones.
    #[arg(long, value_name = "FILE")]
    captured: Option<PathBuf>,

    /// Lookups that are timed, with each engine.
    #[arg(long, default_value_t = 300)]
    lookups: usize,

    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// How much faster an engine has to be than one that takes less memory.
const WORTH_ITS_MEMORY: f64 = 0.9;

/// Lookups that recall is taken over.
const JUDGED: usize = 64;

/// The least effort that is tried.
const EFFORT_MIN: u32 = 8;

/// What answers now.
#[derive(Debug, Serialize)]
struct EngineReport {
    collection: String,
    engine: String,
}

/// What was measured, and what answers now.
#[derive(Debug, Serialize)]
struct TuneReport {
    collection: String,
    /// The document that was looked up in, and its blocks.
    document: String,
    blocks: u32,
    engine: String,
    measured: Vec<Measured>,
}

#[derive(Debug, Serialize)]
struct Measured {
    engine: String,
    /// The share of flat's blocks that were found.
    recall: f64,
    p50_us: f64,
    p99_us: f64,
    /// Of all documents in memory.
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
            context.output.print(&EngineReport { collection: name.clone(), engine: collection.engine.to_string() })
        }
        Command::Tune(args) => {
            let report = tune(args, memory.as_ref(), &collection, context);
            if report.is_err() {
                memory.set_engine(collection.id, collection.engine)?;
            }
            context.output.print(&report?)
        }
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
            memory.lookup(&request(collection, document, layer, queries, vec![0], 1))?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// An engine with less and then more effort, of which the first that finds enough is wanted.
#[derive(Clone, Debug)]
struct Tunable(Vec<Engine>);

/// For `value_parser`: FACTORY or FACTORY@EFFORT.
fn tunable_index(typed: &str) -> Result<Tunable, String> {
    let engine = faiss_index(typed)?;
    let Engine::Faiss(FaissIndex { factory, .. }) = &engine else { return Ok(Tunable(vec![engine])) };
    if typed.contains('@') {
        return Ok(Tunable(vec![engine]));
    }
    let doubled = |effort: &u32| effort.checked_mul(2).filter(|&effort| effort <= limits::FAISS_EFFORT_MAX);
    let efforts = std::iter::successors(Some(EFFORT_MIN), doubled);
    let with = |effort| Engine::Faiss(FaissIndex { factory: factory.clone(), effort });
    Ok(Tunable(efforts.map(with).collect()))
}

/// One measurement of a collection.
struct Tuning<'a> {
    memory: &'a dyn BlockMemory,
    collection: &'a CollectionInfo,
    requests: Vec<LookupRequest>,
    /// What flat finds for the first ones.
    right: Vec<Vec<BlockId>>,
    lookups: usize,
}

fn tune(
    args: &TuneArgs,
    memory: &dyn BlockMemory,
    collection: &CollectionInfo,
    context: &Context,
) -> Result<TuneReport, CliError> {
    let longest = memory.documents(collection.id)?.into_iter().max_by_key(|document| document.blocks);
    let document = longest.filter(|document| document.blocks > 0).ok_or_else(|| {
        missing(Entity::Document, format!("with a full block in collection {}", collection.spec.name))
    })?;
    let requests = match &args.captured {
        Some(path) => captured_requests(path, collection, &document, args.top_k)?,
        None => random_requests(args.seed, collection, &document, args.top_k),
    };
    let mut tuning = Tuning { memory, collection, requests, right: Vec::new(), lookups: args.lookups.max(1) };
    memory.set_engine(collection.id, Engine::Flat)?;
    tuning.right = tuning.found()?;

    let mut measured = Vec::new();
    let mut fastest = (Engine::Flat, f64::INFINITY);
    // From the least memory to the most.
    let mut engines = vec![Engine::Flat];
    if collection.spec.key_dtype != DType::Int8 {
        engines.extend([Engine::Sq4, Engine::Sq8]);
    }
    match memory.set_engine(collection.id, Engine::Cuda) {
        Ok(_) => engines.push(Engine::Cuda),
        Err(error @ MemoryError::Invalid { .. }) => context.output.say(&format!("not measuring cuda: {error}")),
        Err(error) => return Err(error.into()),
    }
    let fixed = engines.into_iter().map(|engine| Tunable(vec![engine]));
    for tunable in fixed.chain(args.faiss.iter().cloned()) {
        let (engine, of_engine) = tuning.measure(tunable, args.recall, &mut |engine| {
            context.output.say(&format!("measuring {engine} on {} blocks", count(document.blocks)));
        })?;
        if of_engine.recall >= args.recall && of_engine.p50_us < fastest.1 * WORTH_ITS_MEMORY {
            fastest = (engine, of_engine.p50_us);
        }
        measured.push(of_engine);
    }
    let engine = memory.set_engine(collection.id, fastest.0)?.engine.to_string();
    let collection = collection.spec.name.clone();
    Ok(TuneReport { collection, document: document.name, blocks: document.blocks, engine, measured })
}

impl Tuning<'_> {
    /// Measures an engine; one that takes an effort with the least that reaches the recall, or with the most that there is.
    fn measure(
        &self,
        Tunable(engines): Tunable,
        wanted: f64,
        say: &mut dyn FnMut(&Engine),
    ) -> Result<(Engine, Measured), CliError> {
        let (mut engine, mut recall) = (Engine::Flat, 0.0);
        for more in engines {
            say(&more);
            engine = self.memory.set_engine(self.collection.id, more)?.engine;
            recall = self.recall()?;
            if recall >= wanted {
                break;
            }
        }
        let times = self.times()?;
        let (p50_us, p99_us) = (percentile(&times, 0.5), percentile(&times, 0.99));
        let index_bytes = self.memory.stats()?.index_bytes;
        let measured = Measured { engine: engine.to_string(), recall, p50_us, p99_us, index_bytes };
        Ok((engine, measured))
    }

    /// The blocks of the first requests' choices.
    fn found(&self) -> Result<Vec<Vec<BlockId>>, CliError> {
        let judged = self.requests.iter().take(JUDGED);
        judged.map(|request| Ok(self.memory.lookup(request)?.blocks)).collect()
    }

    fn recall(&self) -> Result<f64, CliError> {
        let (mut same, mut all) = (0, 0);
        for ((right, found), request) in self.right.iter().zip(self.found()?).zip(&self.requests) {
            let k = right.len() / request_rows(request, self.collection);
            for (right, found) in right.chunks_exact(k).zip(found.chunks_exact(k)) {
                same += found.iter().filter(|block| right.contains(block)).count();
                all += k;
            }
        }
        Ok(same as f64 / all.max(1) as f64)
    }

    /// Sorted, in microseconds.
    fn times(&self) -> Result<Vec<f64>, CliError> {
        let warm_up = self.collection.spec.shape.layers as usize * 2;
        let mut times = Vec::with_capacity(self.lookups);
        for (index, request) in self.requests.iter().cycle().take(warm_up + self.lookups).enumerate() {
            let begin = Instant::now();
            self.memory.lookup(request)?;
            if index >= warm_up {
                times.push(begin.elapsed().as_secs_f64() * 1e6);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}

fn request(
    collection: &CollectionInfo,
    document: &DocumentInfo,
    layer: u32,
    queries: Vec<f32>,
    distances: Vec<u32>,
    top_k: u32,
) -> LookupRequest {
    LookupRequest {
        collection: collection.id,
        layer,
        queries,
        distances,
        scope: vec![BlockRange { document: document.id, blocks: 0..document.blocks }],
        top_k,
        block_score: BlockScore::LogSumExp,
        granularity: Granularity::KvGroup,
    }
}

fn request_rows(request: &LookupRequest, collection: &CollectionInfo) -> usize {
    let shape = &collection.spec.shape;
    request.granularity.rows(request.distances.len(), shape.query_heads as usize, shape.kv_heads as usize)
}

fn random_requests(seed: u64, collection: &CollectionInfo, document: &DocumentInfo, top_k: u32) -> Vec<LookupRequest> {
    let shape = &collection.spec.shape;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let numbers = (shape.query_heads * shape.head_dim) as usize;
    let requests = (0..JUDGED.max(shape.layers as usize)).map(|index| {
        let queries = (0..numbers).map(|_| rng.random_range(-4.0..4.0)).collect();
        request(collection, document, index as u32 % shape.layers, queries, vec![0], top_k)
    });
    requests.collect()
}

/// One request per captured layer and token, all layers of a token together.
fn captured_requests(
    path: &Path,
    collection: &CollectionInfo,
    document: &DocumentInfo,
    top_k: u32,
) -> Result<Vec<LookupRequest>, CliError> {
    let Capture { about, queries, distances, .. } = Capture::load(path)?;
    let (shape, of_file) = (&collection.spec.shape, &about.shape);
    let dims = |shape: &ModelShape| [shape.query_heads, shape.kv_heads, shape.head_dim];
    if dims(shape) != dims(of_file) || about.layers.iter().any(|&layer| layer >= shape.layers) {
        let expected =
            format!("queries of the model of collection {}, {}", collection.spec.name, collection.spec.model_name);
        let error = MemoryError::Invalid { field: "captured".into(), expected, found: about.model };
        return Err(error.into());
    }
    let numbers = (shape.query_heads * shape.head_dim) as usize;
    let tokens = distances.iter().enumerate();
    let requests = tokens.flat_map(|(token, &distance)| {
        about.layers.iter().zip(&queries).map(move |(&layer, queries)| {
            let queries = queries[token * numbers..][..numbers].to_vec();
            request(collection, document, layer, queries, vec![distance], top_k)
        })
    });
    Ok(requests.collect())
}

fn missing(entity: Entity, id: String) -> CliError {
    CliError::Memory(MemoryError::NotFound { entity, id })
}

impl Report for EngineReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "lookups in {} are answered by {}", self.collection, self.engine)
    }
}

impl Report for TuneReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
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
        writeln!(to, "one lookup in {}/{}, {} blocks\n", self.collection, self.document, count(self.blocks))?;
        write_table(to, &rows)?;
        writeln!(to, "\nlookups in {} are answered by {}", self.collection, self.engine)
    }
}
