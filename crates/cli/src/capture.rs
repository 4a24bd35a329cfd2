//! `landmarkdb capture`: keys and queries of a real model, for `landmarkdb bench`.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use landmarkdb::Layers;
use landmarkdb_lab::eval::{self, BOOK, Capturing};
use landmarkdb_llm::{self as model, Encoding, RememberError};

use super::Context;
use super::encode::{read, token_bar};
use super::error::CliError;
use super::output::{Report, plural, size};
use super::settings::{SetupArgs, layers};

/// Layers that are kept if none are named.
const LAYERS: u32 = 8;

/// Record a model's keys and queries for benchmarks.
///
/// Encodes a text, reads on token by token, and writes keys and queries of some layers to a safetensors file that
/// `landmarkdb bench lookup --captured FILE` takes. Works in a temporary directory unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb capture smollm2-32k.safetensors
  landmarkdb capture mine.safetensors --text book.txt --tokens 8192 --layers 3,9,27
")]
pub(super) struct Args {
    /// The file to write.
    pub(super) file: PathBuf,

    /// The text [default: a novel that comes along, repeated where it is too short].
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Tokens in the memory.
    #[arg(long, default_value_t = 32_768)]
    pub(super) tokens: usize,

    /// Tokens after them, whose queries are kept.
    #[arg(long, default_value_t = 256)]
    pub(super) queries: usize,

    /// Layers to keep, as numbers and ranges: 1-2,5 [default: eight, evenly spread].
    #[arg(long, value_name = "LAYERS", value_parser = layers)]
    layers: Option<Layers>,

    #[command(flatten)]
    pub(super) setup: SetupArgs,
}

/// What was kept.
#[derive(Debug, Serialize)]
pub(super) struct Kept {
    file: String,
    model: String,
    blocks: u32,
    layers: Vec<u32>,
    queries: usize,
    bytes: u64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    context.output.print(&keep(args, context)?)
}

pub(super) fn keep(args: &Args, context: &Context) -> Result<Kept, CliError> {
    let model = args.setup.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collection = &scratch.collections(&args.setup.storage, &[], &model)?[0];
    let window = args.setup.window.window(model.config())?;
    let retrieval = args.setup.retrieval.retrieval(model.config(), 4)?;
    let text = args.text.as_deref().map(read).transpose()?;
    // Six bytes are more than a token has on average.
    let book = text.unwrap_or_else(|| BOOK.repeat(((args.tokens + args.queries) * 6).div_ceil(BOOK.len())));
    let encoded = model.tokenizer.encode(&book).map_err(RememberError::from)?;
    let tokens = args.tokens.min(encoded.ids.len().saturating_sub(args.queries));
    let text = &book[..book.floor_char_boundary(encoded.offsets.get(tokens).copied().unwrap_or(book.len()))];
    let next = &encoded.ids[tokens..(tokens + args.queries).min(encoded.ids.len())];

    let bar = token_bar(context, "encoding");
    let encoding = Encoding {
        name: "capture",
        text,
        window,
        retrieval: args.setup.encode_retrieval(model.config())?,
        stays_open: false,
    };
    let document = model::encode(&model, &scratch.memory, collection, &encoding, &mut |step| bar.show(step))?;
    bar.label("reading on");
    let retrieving = |layer: &u32| retrieval.layers.include(*layer as usize);
    let all: Vec<u32> = (0..model.config().memory_layers()).filter(retrieving).collect();
    let layers: Vec<u32> = match &args.layers {
        Some(asked) => all.into_iter().filter(|&layer| asked.include(layer as usize)).collect(),
        None => all.iter().copied().step_by(all.len().div_ceil(LAYERS as usize).max(1)).collect(),
    };
    let capturing = Capturing {
        model: &model,
        memory: scratch.memory.clone(),
        collection,
        document: &document,
        window,
        retrieval: retrieval.clone(),
        next,
        layers: &layers,
    };
    let captured = eval::capture(&capturing, &mut |_| {})?;
    bar.finish();
    captured.save(&args.file)?;
    scratch.memory.delete(document.id)?;
    Ok(Kept {
        file: args.file.display().to_string(),
        model: captured.about.model.clone(),
        blocks: captured.about.blocks,
        layers,
        queries: captured.distances.len(),
        bytes: std::fs::metadata(&args.file).map_or(0, |metadata| metadata.len()),
    })
}

impl Report for Kept {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let layers: Vec<String> = self.layers.iter().map(u32::to_string).collect();
        writeln!(
            to,
            "{}: keys of {} and queries of {} in layers {} of {}, {}",
            self.file,
            plural(self.blocks.into(), "block"),
            plural(self.queries as u64, "token"),
            layers.join(", "),
            self.model,
            size(self.bytes)
        )
    }
}
