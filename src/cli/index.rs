//! `landmarkdb index`: what answers lookups in a collection.

use std::io::{self, Write};
use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::api::{BlockMemory, CollectionInfo, DocumentInfo, Entity, LookupRequest, MemoryError};
use crate::types::{BlockRange, BlockScore, DType, Engine, Granularity};

use super::Context;
use super::bench::percentile;
use super::error::CliError;
use super::output::{Report, count, size, table, write_table};
use super::settings::word;

/// Choose what answers lookups in a collection.
///
/// Engines differ in time and memory; they choose the same blocks but for near ties. The choice is kept with the collection.
#[derive(clap::Subcommand, Debug)]
pub(super) enum Command {
    Set(SetArgs),
    Tune(TuneArgs),
}

/// Set the engine of the collection that --collection names.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb index set sq8 --collection books
  landmarkdb index set flat
")]
pub(super) struct SetArgs {
    /// flat: keys are scanned as they are stored. sq8: f16 keys are scanned as int8, and blocks that could be among the best
    /// are compared as f16; half as much memory again.
    #[arg(value_parser = word::<Engine>)]
    engine: Engine,
}

/// Measure every engine on the longest document of a collection, and keep the fastest.
///
/// Looks random queries up in all layers in turn. An engine that takes more memory is kept only if it is at least a
/// tenth faster. int8 keys have one engine only: sq8 is flat for them.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb index tune --collection books
  landmarkdb index tune --json | jq -r .engine
")]
pub(super) struct TuneArgs {
    /// k, the blocks of every choice.
    #[arg(long, value_name = "K", default_value_t = 4)]
    top_k: u32,

    /// Lookups that are timed, with each engine.
    #[arg(long, default_value_t = 300)]
    lookups: usize,

    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// How much faster an engine has to be than one that takes less memory.
const WORTH_ITS_MEMORY: f64 = 0.9;

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
            let collection = memory.set_engine(collection.id, args.engine)?;
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
    let mut measured = Vec::new();
    let mut fastest = (Engine::Flat, f64::INFINITY);
    // int8 keys are scanned as they are by either.
    let engines =
        if collection.spec.key_dtype == DType::Int8 { &[Engine::Flat][..] } else { &[Engine::Flat, Engine::Sq8] };
    for &engine in engines {
        context.output.say(&format!("measuring {engine} on {} blocks", count(document.blocks)));
        memory.set_engine(collection.id, engine)?;
        let times = times(args, memory, collection, &document)?;
        let p50_us = percentile(&times, 0.5);
        if p50_us < fastest.1 * WORTH_ITS_MEMORY {
            fastest = (engine, p50_us);
        }
        let (p99_us, index_bytes) = (percentile(&times, 0.99), memory.stats()?.index_bytes);
        measured.push(Measured { engine: engine.to_string(), p50_us, p99_us, index_bytes });
    }
    let engine = memory.set_engine(collection.id, fastest.0)?.engine.to_string();
    let collection = collection.spec.name.clone();
    Ok(TuneReport { collection, document: document.name, blocks: document.blocks, engine, measured })
}

/// Sorted, in microseconds.
fn times(
    args: &TuneArgs,
    memory: &dyn BlockMemory,
    collection: &CollectionInfo,
    document: &DocumentInfo,
) -> Result<Vec<f64>, CliError> {
    let shape = &collection.spec.shape;
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut times = Vec::with_capacity(args.lookups);
    let warm_up = shape.layers as usize * 2;
    for index in 0..warm_up + args.lookups.max(1) {
        let numbers = (shape.query_heads * shape.head_dim) as usize;
        let request = LookupRequest {
            collection: collection.id,
            layer: index as u32 % shape.layers,
            queries: (0..numbers).map(|_| rng.random_range(-4.0..4.0)).collect(),
            distances: vec![0],
            scope: vec![BlockRange { document: document.id, blocks: 0..document.blocks }],
            top_k: args.top_k,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::KvGroup,
        };
        let begin = Instant::now();
        memory.lookup(&request)?;
        if index >= warm_up {
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
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
        let mut rows = table(["ENGINE", "P50>", "P99>", "MEMORY>"]);
        for measured in &self.measured {
            rows.add_row([
                measured.engine.clone(),
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
