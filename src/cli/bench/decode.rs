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

/// Measure a decode step with memories of several lengths against one with the window only and one with full attention, and
/// encoding against prefill that keeps nothing.
///
/// One text of the greatest length is encoded; shorter memories are its newest blocks. Works in a temporary directory
/// unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench decode
  landmarkdb bench decode --tokens 4096,32768,262144 --key-rule mean
  landmarkdb bench decode --tokens 32768 --top-k 4 --payload int8 --json
")]
pub(in crate::cli) struct Args {
    /// Tokens in the memory.
    #[arg(long, value_delimiter = ',', default_value = "4096,32768")]
    tokens: Vec<usize>,

    /// Tokens that full attention sees; 0: it is not measured.
    #[arg(long, value_name = "TOKENS", default_value_t = 8192)]
    full_tokens: usize,

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
    top_k: u32,
    /// Medians of a decode step. `tokens` is what lies in the memory; none with the window only.
    steps: Vec<StepTime>,
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

#[derive(Debug, Serialize)]
struct StepTime {
    /// `window only`, `memory` or `full attention`.
    attention: &'static str,
    tokens: u64,
    step_ms: f64,
    /// Over the window only.
    ratio: f64,
}

pub(in crate::cli) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let model = args.setup.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collection = &scratch.collections(&args.setup.storage, &[], &model)?[0];
    let window = args.setup.window.window(model.config());
    let longest = args.tokens.iter().copied().max().unwrap_or(0);
    let book = BOOK.repeat((longest.max(args.full_tokens) * 6).div_ceil(BOOK.len()));
    let encoded = model.tokenizer.encode(&book).map_err(RememberError::from)?;
    let tokens = longest.min(encoded.ids.len() - 1);
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

    let recent = &encoded.ids[tokens.saturating_sub(window.tokens)..tokens];
    let mut window_only = BlockAttention::window_only(shape, window);
    model::prefill(&model.llama, &mut window_only, recent, CHUNK_TOKENS, Logits::None).map_err(RememberError::from)?;
    let mut sessions = vec![("window only", 0, window_only)];
    for &memory_tokens in &args.tokens {
        let mut retrieval = args.setup.retrieval.retrieval(model.config(), args.top_k)?;
        let blocks = (memory_tokens as u32 / shape.block_tokens).min(document.blocks);
        retrieval.newest_blocks = Some(blocks);
        let documents = [document.clone()];
        let session = BlockAttention::read(scratch.memory.clone(), collection, &documents, window, retrieval)
            .map_err(RememberError::from)?;
        sessions.push(("memory", (blocks * shape.block_tokens) as u64, session));
    }
    let full_tokens = args.full_tokens.min(encoded.ids.len());
    if full_tokens > 0 {
        let mut full = BlockAttention::full(shape, window.normalisation);
        let ids = &encoded.ids[..full_tokens];
        model::prefill(&model.llama, &mut full, ids, CHUNK_TOKENS, Logits::None).map_err(RememberError::from)?;
        sessions.push(("full attention", full_tokens as u64, full));
    }
    let mut times_ms = vec![Vec::new(); sessions.len()];
    // The first step of each loads what later steps find at hand; it is not counted.
    for step in 0..=args.steps {
        let id = encoded.ids[(tokens + step) % encoded.ids.len()];
        for ((_, _, session), times_ms) in sessions.iter_mut().zip(&mut times_ms) {
            let time_ms = step_ms(&model, session, id)?;
            if step > 0 {
                times_ms.push(time_ms);
            }
        }
    }
    scratch.memory.delete(document.id)?;
    times_ms.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    let medians: Vec<f64> = times_ms.iter().map(|times| percentile(times, 0.5)).collect();
    let steps = sessions.iter().zip(&medians).map(|(&(attention, tokens, _), &step_ms)| StepTime {
        attention,
        tokens,
        step_ms,
        ratio: step_ms / medians[0],
    });
    context.output.print(&DecodeReport {
        model: model.name.clone(),
        top_k: args.top_k,
        steps: steps.collect(),
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
        writeln!(to, "{}, k = {}\n", self.model, self.top_k)?;
        let mut rows = table(["WHAT", "TIME>", "RATIO>"]);
        for step in &self.steps {
            let of = if step.tokens > 0 { format!(", {} tokens", count(step.tokens)) } else { String::new() };
            let what = format!("decode step, {}{of}", step.attention);
            rows.add_row([what, format!("{:.1} ms", step.step_ms), format!("{:.2}", step.ratio)]);
        }
        let speed = |speed: f64| format!("{speed:.0} tokens/s");
        rows.add_row(["prefill, full attention".into(), speed(self.full_prefill_tokens_per_s), String::new()]);
        rows.add_row(["prefill, window only".into(), speed(self.window_prefill_tokens_per_s), String::new()]);
        let ratio = format!("{:.2}", self.encode_ratio);
        rows.add_row(["encode into the memory".into(), speed(self.encode_tokens_per_s), ratio]);
        write_table(to, &rows)
    }
}
