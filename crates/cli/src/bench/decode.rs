//! `landmarkdb bench decode`: what the memory costs a model, per token generated and per token encoded, and how soon it goes on
//! after a text that was encoded before.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::first_token::{FirstToken, Reopened, first_token_table};
use super::peers::{self, DecodeCase, DecodePeer, PeerArgs};
use crate::Context;
use crate::ask::frame;
use crate::encode::token_bar;
use crate::error::CliError;
use crate::output::{Report, count, plain_table, plural, write_table};
use crate::scratch::Scratch;
use crate::settings::SetupArgs;
use landmarkdb::api::{BlockMemory, CollectionInfo, DocumentInfo};
use landmarkdb::attention::{BlockAttention, CHUNK_TOKENS, SequenceAttention, Window};
use landmarkdb::memory::LocalMemory;
use landmarkdb_lab::bench::percentile;
use landmarkdb_lab::eval::BOOK;
use landmarkdb_llm::{self as model, Encoding, LoadedModel, Logits, RememberError};

/// What is asked of a reopened document. What the answer is makes no difference to the time.
const QUESTION: &str = "Who is Anne Elliot?";

/// Measure a decode step with memories of several lengths against one with the window only and one with full attention;
/// encoding against prefill that keeps nothing; and the first token after opening a text that was encoded before.
///
/// Each length is the beginning of one text, encoded into a document of its own. Works in a temporary directory unless
/// --data or --connect is given; behind a service reopening is not measured. With --peers llama.cpp reads the same tokens with
/// the same model file in the same minute.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench decode
  landmarkdb bench decode --tokens 4096,32768,262144 --key-rule mean
  landmarkdb bench decode --tokens 32768 --top-k 4 --payload int8 --json
  landmarkdb bench decode --peers llama.cpp --peer-seconds 900
")]
pub(crate) struct Args {
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
    others: PeerArgs,

    #[command(flatten)]
    setup: SetupArgs,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct DecodeReport {
    model: String,
    top_k: u32,
    threads: usize,
    /// Medians of a decode step. `tokens` is what lies in the memory; none with the window only.
    pub(super) steps: Vec<StepTime>,
    /// Encoding the longest text into the memory, durable.
    encode_tokens_per_s: f64,
    /// The same window, nothing kept.
    window_prefill_tokens_per_s: f64,
    /// Full attention.
    pub(super) full_prefill_tokens_per_s: f64,
    prefill_tokens: usize,
    /// Encoding time per token over window-only prefill time per token.
    pub(super) encode_ratio: f64,
    pub(super) first_tokens: Vec<FirstToken>,
    pub(super) peers: Vec<DecodePeer>,
}

#[derive(Debug, Serialize)]
pub(super) struct StepTime {
    /// `window only`, `memory` or `full attention`.
    pub(super) attention: &'static str,
    pub(super) tokens: u64,
    pub(super) step_ms: f64,
    /// Over the window only.
    ratio: f64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    context.output.print(&measure(args, context)?)
}

pub(super) fn measure(args: &Args, context: &Context) -> Result<DecodeReport, CliError> {
    let model = args.setup.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collection = scratch.collections(&args.setup.storage, &[], &model)?.remove(0);
    let window = args.setup.window.window(model.config());
    let longest = args.tokens.iter().copied().max().unwrap_or(0);
    let book = BOOK.repeat((longest.max(args.full_tokens) * 6).div_ceil(BOOK.len()));
    let encoded = model.tokenizer.encode(&book).map_err(RememberError::from)?;
    let prefill = &encoded.ids[..args.prefill_tokens.min(longest)];
    let shape = &collection.spec.shape;
    let window_prefill = prefill_speed(&model, BlockAttention::window_only(shape, window), prefill)?;
    let full_prefill = prefill_speed(&model, BlockAttention::full(shape, window.normalisation), prefill)?;

    let bench = Bench { args, model: &model, collection: &collection, window, ids: &encoded.ids };
    let mut documents = Vec::new();
    for &tokens in &args.tokens {
        let end = encoded.offsets.get(tokens).copied().unwrap_or(book.len());
        documents.push(bench.encode(&scratch, &book[..book.floor_char_boundary(end)], tokens, context)?);
    }
    let steps = bench.steps(&scratch.memory, &documents, longest)?;
    let encode = documents.iter().max_by_key(|(document, _)| document.tokens);
    let encode = encode.map_or(f64::NAN, |(document, encode_s)| document.tokens as f64 / encode_s);
    let first_tokens = bench.first_tokens(scratch, documents)?;
    Ok(DecodeReport {
        model: model.name.clone(),
        top_k: args.top_k,
        threads: rayon::current_num_threads(),
        steps,
        encode_tokens_per_s: encode,
        window_prefill_tokens_per_s: window_prefill,
        full_prefill_tokens_per_s: full_prefill,
        prefill_tokens: prefill.len(),
        encode_ratio: window_prefill / encode,
        first_tokens,
        peers: bench.peers()?,
    })
}

/// One run of the benchmark.
struct Bench<'a> {
    args: &'a Args,
    model: &'a LoadedModel,
    collection: &'a CollectionInfo,
    window: Window,
    /// Of the text.
    ids: &'a [u32],
}

impl Bench<'_> {
    /// A document of that many tokens, and the seconds that it took.
    fn encode(
        &self,
        scratch: &Scratch,
        text: &str,
        tokens: usize,
        context: &Context,
    ) -> Result<(DocumentInfo, f64), CliError> {
        let name = format!("bench-{tokens}");
        let retrieval = self.args.setup.encode_retrieval(self.model.config())?;
        let encoding = Encoding { name: &name, text, window: self.window, retrieval };
        let bar = token_bar(context, "encoding");
        let begin = Instant::now();
        let document =
            model::encode(self.model, &scratch.memory, self.collection, &encoding, &mut |step| bar.show(step))?;
        bar.finish();
        Ok((document, begin.elapsed().as_secs_f64()))
    }

    /// Decode steps of every kind, in turn, after the text's first `tokens`.
    fn steps(
        &self,
        memory: &Arc<dyn BlockMemory>,
        documents: &[(DocumentInfo, f64)],
        tokens: usize,
    ) -> Result<Vec<StepTime>, CliError> {
        let (shape, window) = (&self.collection.spec.shape, self.window);
        let tokens = tokens.min(self.ids.len());
        let recent = &self.ids[tokens.saturating_sub(window.tokens)..tokens];
        let mut window_only = BlockAttention::window_only(shape, window);
        model::prefill(&self.model.llama, &mut window_only, recent, CHUNK_TOKENS, Logits::None)
            .map_err(RememberError::from)?;
        let mut sessions = vec![("window only", 0, window_only)];
        for (document, _) in documents {
            let retrieval = self.args.setup.retrieval.retrieval(self.model.config(), self.args.top_k)?;
            let documents = [document.clone()];
            let session = BlockAttention::read(memory.clone(), self.collection, &documents, window, retrieval)
                .map_err(RememberError::from)?;
            sessions.push(("memory", document.tokens, session));
        }
        let full_tokens = self.args.full_tokens.min(self.ids.len());
        if full_tokens > 0 {
            let mut full = BlockAttention::full(shape, window.normalisation);
            let ids = &self.ids[..full_tokens];
            model::prefill(&self.model.llama, &mut full, ids, CHUNK_TOKENS, Logits::None)
                .map_err(RememberError::from)?;
            sessions.push(("full attention", full_tokens as u64, full));
        }
        let mut times_ms = vec![Vec::new(); sessions.len()];
        // The first step of each loads what later steps find at hand; it is not counted.
        for step in 0..=self.args.steps {
            let id = self.ids[(tokens + step) % self.ids.len()];
            for ((_, _, session), times_ms) in sessions.iter_mut().zip(&mut times_ms) {
                let time_ms = step_ms(self.model, session, id)?;
                if step > 0 {
                    times_ms.push(time_ms);
                }
            }
        }
        times_ms.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
        let medians: Vec<f64> = times_ms.iter().map(|times| percentile(times, 0.5)).collect();
        let steps = sessions.iter().zip(&medians).map(|(&(attention, tokens, _), &step_ms)| StepTime {
            attention,
            tokens,
            step_ms,
            ratio: step_ms / medians[0],
        });
        Ok(steps.collect())
    }

    /// What a document that is opened anew takes to its first token; then the documents are deleted.
    fn first_tokens(&self, scratch: Scratch, documents: Vec<(DocumentInfo, f64)>) -> Result<Vec<FirstToken>, CliError> {
        let Scratch { mut memory, folder, temporary } = scratch;
        let ids: Vec<_> = documents.iter().map(|(document, _)| document.id).collect();
        let mut measured = Vec::new();
        if let Some(folder) = &folder {
            // A data directory has one owner at a time.
            drop(memory);
            for (document, encode_s) in documents {
                let reopened = Reopened {
                    model: self.model,
                    collection: self.collection,
                    document,
                    encode_s,
                    prompt: &frame(QUESTION),
                    window: self.window,
                    retrieval: self.args.setup.retrieval.retrieval(self.model.config(), self.args.top_k)?,
                };
                measured.extend(reopened.measure(folder)?);
            }
            if temporary.is_some() {
                return Ok(measured);
            }
            memory = Arc::new(LocalMemory::open(folder)?);
        }
        for id in ids {
            memory.delete(id)?;
        }
        Ok(measured)
    }

    fn peers(&self) -> Result<Vec<DecodePeer>, CliError> {
        let others = &self.args.others;
        if others.peers.is_empty() {
            return Ok(Vec::new());
        }
        let prompt = self.model.tokenizer.encode(&frame(QUESTION)).map_err(RememberError::from)?.ids;
        let case = DecodeCase {
            model: model::resolve(&self.args.setup.model.model)?,
            prefill_tokens: self.args.prefill_tokens,
            context_tokens: self.args.full_tokens,
            steps: self.args.steps,
            reopened_tokens: &self.args.tokens,
            seconds: others.peer_seconds,
            peers: &others.peers,
        };
        peers::decode(&case, self.ids, &prompt, &others.python)
    }
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

impl DecodePeer {
    /// `llama.cpp, Q4_1, flash attention, 2 threads`
    pub(super) fn label(&self) -> String {
        format!("{}, {}, {}", self.peer, self.setting, plural(self.threads.into(), "thread"))
    }
}

impl Report for DecodeReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}, k = {}, {}\n", self.model, self.top_k, plural(self.threads as u64, "thread"))?;
        let mut rows = plain_table(["WHAT", "TIME>", "RATIO>"]);
        for step in &self.steps {
            let of = if step.tokens > 0 { format!(", {} tokens", count(step.tokens)) } else { String::new() };
            let what = format!("decode step, {}{of}", step.attention);
            rows.add_row([what, format!("{:.1} ms", step.step_ms), format!("{:.2}", step.ratio)]);
        }
        let speed = |speed: f64| format!("{speed:.0} tokens/s");
        let prefill = |what: &str| format!("prefill, {what}, {} tokens", count(self.prefill_tokens as u64));
        rows.add_row([prefill("full attention"), speed(self.full_prefill_tokens_per_s), String::new()]);
        rows.add_row([prefill("window only"), speed(self.window_prefill_tokens_per_s), String::new()]);
        let ratio = format!("{:.2}", self.encode_ratio);
        rows.add_row(["encode into the memory".into(), speed(self.encode_tokens_per_s), ratio]);
        write_table(to, &rows)?;

        let window_ms = self.steps.first().map_or(f64::NAN, |step| step.step_ms);
        let mut rows = plain_table(["PEER", "PREFILL>", "OF TOKENS>", "STEP>", "OVER TOKENS>", "RATIO>"]);
        for peer in &self.peers {
            if let Some(why) = &peer.skipped {
                rows.add_row([format!("{}: {why}", peer.peer)]);
            }
            if let Some(of) = peer.figures.speed {
                rows.add_row([
                    peer.label(),
                    speed(of.prefill_tokens_per_s),
                    count(of.prefill_tokens),
                    format!("{:.1} ms", of.step_ms),
                    count(of.step_tokens),
                    format!("{:.2}", of.step_ms / window_ms),
                ]);
            }
        }
        if !self.peers.is_empty() {
            writeln!(to)?;
            write_table(to, &rows)?;
        }

        let ours = self.first_tokens.iter().map(|row| ("landmarkdb".into(), row));
        let theirs = self.peers.iter().filter_map(|peer| Some((peer.label(), peer.figures.first_token.as_ref()?)));
        let mut rows = ours.chain(theirs).peekable();
        if rows.peek().is_some() {
            writeln!(to)?;
            write_table(to, &first_token_table(rows))?;
        }
        Ok(())
    }
}
