//! `landmarkdb bench decode`: what the memory costs a model, per token generated and per token encoded.

use std::io::{self, Write};
use std::time::Instant;

use serde::Serialize;

use crate::attention::{BlockAttention, CHUNK_TOKENS, SequenceAttention};
use crate::cli::Context;
use crate::cli::bench::percentile;
use crate::cli::encode::token_bar;
use crate::cli::error::CliError;
use crate::cli::output::{Report, count, table, write_table};
use crate::cli::settings::SetupArgs;
use crate::eval::BOOK;
use crate::model::{self, Encoding, LoadedModel, Logits, RememberError};

/// Measure a decode step with a memory of many tokens against one with the window only, and encoding against prefill
/// that keeps nothing.
///
/// Works in a temporary directory unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench decode
  landmarkdb bench decode --tokens 32768 --top-k 4 --payload int8 --json
")]
pub(in crate::cli) struct Args {
    /// Tokens in the memory.
    #[arg(long, default_value_t = 32_768)]
    tokens: usize,

    /// Decode steps that are timed, of each kind in turn.
    #[arg(long, default_value_t = 32)]
    steps: usize,

    /// Tokens of plain prefill that are timed.
    #[arg(long, default_value_t = 4096)]
    prefill_tokens: usize,

    #[arg(long, value_name = "K", default_value_t = 4)]
    top_k: u32,

    #[command(flatten)]
    setup: SetupArgs,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct DecodeReport {
    model: String,
    memory_tokens: u64,
    top_k: u32,
    /// Medians of the decode step.
    window_step_ms: f64,
    memory_step_ms: f64,
    /// Memory over window.
    decode_ratio: f64,
    /// Encoding into the memory, durable.
    encode_tokens_per_s: f64,
    /// The same window, nothing kept.
    window_prefill_tokens_per_s: f64,
    /// Full attention.
    full_prefill_tokens_per_s: f64,
    prefill_tokens: usize,
    /// Encoding time per token over window-only prefill time per token.
    encode_ratio: f64,
}

pub(in crate::cli) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let model = args.setup.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collection = &scratch.collections(&args.setup.storage, &[], &model)?[0];
    let window = args.setup.window.window(model.config());
    let book = BOOK.repeat((args.tokens * 6).div_ceil(BOOK.len()));
    let encoded = model.tokenizer.encode(&book).map_err(RememberError::from)?;
    let tokens = args.tokens.min(encoded.ids.len() - 1);
    let text = &book[..book.floor_char_boundary(encoded.offsets[tokens])];
    let prefill = &encoded.ids[..args.prefill_tokens.min(tokens)];
    let shape = &collection.spec.shape;
    let window_prefill = prefill_speed(&model, BlockAttention::window_only(shape, window), prefill)?;
    let full_prefill = prefill_speed(&model, BlockAttention::full(shape, window.normalisation), prefill)?;

    let bar = token_bar(context, "encoding");
    let begin = Instant::now();
    let encoding = Encoding { name: "bench", text, window, retrieval: args.setup.encode_retrieval(model.config())? };
    let document = model::encode(&model, &scratch.memory, collection, &encoding, &mut |step| bar.show(step))?;
    bar.finish();
    let encode = document.tokens as f64 / begin.elapsed().as_secs_f64();

    let retrieval = args.setup.retrieval.retrieval(model.config(), args.top_k)?;
    let documents = [document.clone()];
    let mut with_memory = BlockAttention::read(scratch.memory.clone(), collection, &documents, window, retrieval)
        .map_err(RememberError::from)?;
    let mut window_only = BlockAttention::window_only(shape, window);
    let recent = &encoded.ids[tokens.saturating_sub(window.tokens)..tokens];
    model::prefill(&model.llama, &mut window_only, recent, CHUNK_TOKENS, Logits::None).map_err(RememberError::from)?;
    let (mut memory_ms, mut window_ms) = (Vec::new(), Vec::new());
    // The first step of each loads what later steps find at hand; it is not counted.
    for step in 0..=args.steps {
        let id = encoded.ids[(tokens + step) % encoded.ids.len()];
        window_ms.push(step_ms(&model, &mut window_only, id)?);
        memory_ms.push(step_ms(&model, &mut with_memory, id)?);
    }
    scratch.memory.delete(document.id)?;
    let median = |times: &mut Vec<f64>| {
        times.remove(0);
        times.sort_by(f64::total_cmp);
        percentile(times, 0.5)
    };
    let (memory_step_ms, window_step_ms) = (median(&mut memory_ms), median(&mut window_ms));
    context.output.print(&DecodeReport {
        model: model.name.clone(),
        memory_tokens: document.tokens,
        top_k: args.top_k,
        window_step_ms,
        memory_step_ms,
        decode_ratio: memory_step_ms / window_step_ms,
        encode_tokens_per_s: encode,
        window_prefill_tokens_per_s: window_prefill,
        full_prefill_tokens_per_s: full_prefill,
        prefill_tokens: prefill.len(),
        encode_ratio: window_prefill / encode,
    })
}

fn prefill_speed(model: &LoadedModel, mut session: BlockAttention, ids: &[u32]) -> Result<f64, CliError> {
    let begin = Instant::now();
    model::prefill(&model.llama, &mut session, ids, CHUNK_TOKENS, Logits::None).map_err(RememberError::from)?;
    Ok(ids.len() as f64 / begin.elapsed().as_secs_f64())
}

fn step_ms(model: &LoadedModel, session: &mut dyn SequenceAttention, id: u32) -> Result<f64, CliError> {
    let begin = Instant::now();
    model.llama.forward(&[id], session, Logits::Last).map_err(RememberError::from)?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

impl Report for DecodeReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}, {} tokens in the memory, k = {}\n", self.model, count(self.memory_tokens), self.top_k)?;
        let mut rows = table(["WHAT", "TIME>", "RATIO>"]);
        rows.add_row(["decode step, window only".into(), format!("{:.1} ms", self.window_step_ms), String::new()]);
        let ratio = format!("{:.2}", self.decode_ratio);
        rows.add_row(["decode step, with memory".into(), format!("{:.1} ms", self.memory_step_ms), ratio]);
        let speed = |speed: f64| format!("{speed:.0} tokens/s");
        rows.add_row(["prefill, full attention".into(), speed(self.full_prefill_tokens_per_s), String::new()]);
        rows.add_row(["prefill, window only".into(), speed(self.window_prefill_tokens_per_s), String::new()]);
        let ratio = format!("{:.2}", self.encode_ratio);
        rows.add_row(["encode into the memory".into(), speed(self.encode_tokens_per_s), ratio]);
        write_table(to, &rows)
    }
}
