//! `landmarkdb eval`: does the memory work?

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use crate::eval::{self, Haystack, PasskeyCase, PasskeySettings, Perplexity, PerplexityMode, PerplexitySettings};
use crate::types::DType;

use super::Context;
use super::encode::token_bar;
use super::error::CliError;
use super::output::{Report, count, table, write_table};
use super::settings::{ModelArgs, RetrievalArgs, StorageArgs, WindowArgs, word};

/// Evaluate a model with its memory.
#[derive(clap::Subcommand, Debug)]
pub(super) enum Command {
    Passkey(PasskeyArgs),
    Perplexity(PerplexityArgs),
}

/// Hide five digits in long texts and ask for them.
///
/// Each text is encoded into the memory, the question is answered from there, and the document is deleted. Works in a
/// temporary directory unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb eval passkey
  landmarkdb eval passkey --haystack prose --tokens 4096,16384,32768 --samples 10 --top-k 4 --json
  landmarkdb eval passkey --haystack garbage --tokens 32768 --top-k 2,4 --payload-dtypes f16,int8
")]
pub(super) struct PasskeyArgs {
    /// What the key is hidden in: prose (windows of a novel) or garbage (the paper's five sentences).
    #[arg(long, default_value = "prose", value_parser = word::<Haystack>)]
    haystack: Haystack,

    /// Lengths of the texts, in tokens.
    #[arg(long, value_delimiter = ',', default_value = "4096")]
    tokens: Vec<usize>,

    /// Texts per length.
    #[arg(long, default_value_t = 10)]
    samples: usize,

    /// Blocks that each KV head reads per token; several are asked about the same encoded text.
    #[arg(long, value_name = "K", value_delimiter = ',', default_value = "4")]
    top_k: Vec<u32>,

    /// Payload dtypes to compare on the same encoded text [default: --payload].
    #[arg(long, value_name = "DTYPES", value_delimiter = ',', value_parser = word::<DType>)]
    payload_dtypes: Vec<DType>,

    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Another prose haystack: a UTF-8 text file.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    window: WindowArgs,

    #[command(flatten)]
    retrieval: RetrievalArgs,

    #[command(flatten)]
    storage: StorageArgs,
}

/// Measure perplexity on prose: full attention, window only, and with the memory.
///
/// With the memory, every token retrieves blocks of the text before its window, which were appended as the text went
/// by. Works in a temporary directory unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb eval perplexity
  landmarkdb eval perplexity --tokens 4096 --top-k 4,8 --samples 2 --payload-dtypes f16,int8 --json
")]
pub(super) struct PerplexityArgs {
    /// Length of each text, in tokens.
    #[arg(long, default_value_t = 4096)]
    tokens: usize,

    /// Tokens at the beginning that are not counted.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    skip: usize,

    /// Texts, evenly spaced in the source.
    #[arg(long, default_value_t = 1)]
    samples: usize,

    /// Blocks that each KV head reads per token.
    #[arg(long, value_name = "K", value_delimiter = ',', default_value = "4,8")]
    top_k: Vec<u32>,

    /// Payload dtypes to compare [default: --payload].
    #[arg(long, value_name = "DTYPES", value_delimiter = ',', value_parser = word::<DType>)]
    payload_dtypes: Vec<DType>,

    /// The source: a UTF-8 text file [default: the novel that comes with landmarkdb].
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    window: WindowArgs,

    #[command(flatten)]
    retrieval: RetrievalArgs,

    #[command(flatten)]
    storage: StorageArgs,
}

/// How a passkey test went.
#[derive(Debug, Serialize)]
struct PasskeyReport {
    model: String,
    haystack: String,
    seed: u64,
    results: Vec<PasskeyResult>,
    /// Every case, failures first.
    cases: Vec<Case>,
}

/// All samples of one length, k and payload dtype.
#[derive(Debug, Serialize)]
struct PasskeyResult {
    tokens: usize,
    top_k: u32,
    payload_dtype: String,
    correct: usize,
    samples: usize,
    /// On disk: payload, keys, text and headers.
    bytes_per_token: f64,
    encode_tokens_per_s: f64,
    first_token_s: f64,
}

#[derive(Debug, Serialize)]
struct Case {
    tokens: usize,
    sample: usize,
    top_k: u32,
    payload_dtype: String,
    correct: bool,
    key: String,
    answer: String,
    depth: f64,
}

/// How a perplexity measurement went.
#[derive(Debug, Serialize)]
struct PerplexityReport {
    model: String,
    tokens: usize,
    skipped_tokens: usize,
    samples: usize,
    results: Vec<PerplexityResult>,
}

#[derive(Debug, Serialize)]
struct PerplexityResult {
    /// full, window or memory.
    mode: &'static str,
    top_k: Option<u32>,
    payload_dtype: Option<String>,
    perplexity: f64,
    /// How much of the gap between window only and full attention the memory closes, 1 for all.
    gap_closed: Option<f64>,
    counted_tokens: usize,
    tokens_per_s: f64,
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Passkey(args) => passkey(args, context),
        Command::Perplexity(args) => perplexity(args, context),
    }
}

fn passkey(args: &PasskeyArgs, context: &Context) -> Result<(), CliError> {
    let prose = source_text(args.text.as_ref())?;
    let model = args.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collections = scratch.collections(&args.storage, &args.payload_dtypes, &model)?;
    let settings = PasskeySettings {
        haystack: args.haystack,
        prose,
        tokens: args.tokens.clone(),
        samples: args.samples,
        top_k: args.top_k.clone(),
        window: args.window.window(),
        retrieval: args.retrieval.retrieval(1),
        seed: args.seed,
    };
    let bar = token_bar(context, "");
    let cases = eval::passkey(&model, &scratch.memory, &collections, &settings, &mut |tokens, sample, step| {
        bar.label(&format!("{} tokens, text {} of {}", count(tokens as u64), sample + 1, settings.samples));
        bar.show(step);
    })?;
    bar.finish();
    context.output.print(&PasskeyReport::new(&model.name, args, &cases))
}

fn perplexity(args: &PerplexityArgs, context: &Context) -> Result<(), CliError> {
    let text = source_text(args.text.as_ref())?;
    let model = args.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collections = scratch.collections(&args.storage, &args.payload_dtypes, &model)?;
    let source = model.tokenizer.encode(&text).map_err(crate::model::RememberError::from)?.ids;
    let settings = PerplexitySettings {
        tokens: args.tokens,
        skip_tokens: args.skip,
        samples: args.samples,
        window: args.window.window(),
        retrieval: args.retrieval.retrieval(1),
    };
    let bar = token_bar(context, "");
    let mut results: Vec<PerplexityResult> = Vec::new();
    let baselines = [PerplexityMode::Full, PerplexityMode::Window].map(|mode| (mode, &collections[0]));
    let memory = collections
        .iter()
        .flat_map(|collection| args.top_k.iter().map(move |&top_k| (PerplexityMode::Memory { top_k }, collection)));
    for (mode, collection) in baselines.into_iter().chain(memory) {
        bar.label(&format!("{mode:?}"));
        let measured =
            eval::perplexity(&model, &scratch.memory, collection, &source, mode, &settings, &mut |done, total| {
                bar.show(crate::model::EncodeProgress {
                    resumed_tokens: 0,
                    done_tokens: done as u64,
                    total_tokens: total as u64,
                });
            })?;
        let result = PerplexityResult::new(&measured, collection.spec.payload_dtype, &results);
        results.push(result);
    }
    bar.finish();
    context.output.print(&PerplexityReport {
        model: model.name.clone(),
        tokens: args.tokens,
        skipped_tokens: args.skip,
        samples: args.samples,
        results,
    })
}

fn source_text(file: Option<&PathBuf>) -> Result<String, CliError> {
    match file {
        None => Ok(eval::BOOK.to_string()),
        Some(path) => std::fs::read_to_string(path).map_err(|source| CliError::ReadText { path: path.clone(), source }),
    }
}

impl PasskeyReport {
    fn new(model: &str, args: &PasskeyArgs, cases: &[PasskeyCase]) -> Self {
        let mut results: Vec<PasskeyResult> = Vec::new();
        for case in cases {
            let payload_dtype = case.payload_dtype.to_string();
            let same = |r: &&mut PasskeyResult| {
                r.tokens == case.tokens && r.top_k == case.top_k && r.payload_dtype == payload_dtype
            };
            let tokens = case.text_tokens as f64;
            let per_token = case.stored_bytes as f64 / tokens;
            match results.iter_mut().find(same) {
                Some(result) => {
                    let n = result.samples as f64;
                    let mean = |mean: &mut f64, next: f64| *mean = (*mean * n + next) / (n + 1.0);
                    mean(&mut result.bytes_per_token, per_token);
                    mean(&mut result.encode_tokens_per_s, tokens / case.encode_s);
                    mean(&mut result.first_token_s, case.first_token_s);
                    result.correct += case.correct as usize;
                    result.samples += 1;
                }
                None => results.push(PasskeyResult {
                    tokens: case.tokens,
                    top_k: case.top_k,
                    payload_dtype,
                    correct: case.correct as usize,
                    samples: 1,
                    bytes_per_token: per_token,
                    encode_tokens_per_s: tokens / case.encode_s,
                    first_token_s: case.first_token_s,
                }),
            }
        }
        let mut cases: Vec<Case> = cases.iter().map(Case::new).collect();
        cases.sort_by_key(|case| case.correct);
        PasskeyReport { model: model.into(), haystack: args.haystack.to_string(), seed: args.seed, results, cases }
    }
}

impl Case {
    fn new(case: &PasskeyCase) -> Self {
        Case {
            tokens: case.tokens,
            sample: case.sample,
            top_k: case.top_k,
            payload_dtype: case.payload_dtype.to_string(),
            correct: case.correct,
            key: case.key.clone(),
            answer: case.answer.clone(),
            depth: case.depth,
        }
    }
}

impl PerplexityResult {
    /// `before`: the results so far, full and window first.
    fn new(measured: &Perplexity, payload: DType, before: &[PerplexityResult]) -> Self {
        let (mode, top_k) = match measured.mode {
            PerplexityMode::Full => ("full", None),
            PerplexityMode::Window => ("window", None),
            PerplexityMode::Memory { top_k } => ("memory", Some(top_k)),
        };
        let gap_closed = top_k.and(match before {
            [full, window, ..] => {
                Some((window.perplexity - measured.perplexity) / (window.perplexity - full.perplexity))
            }
            _ => None,
        });
        PerplexityResult {
            mode,
            top_k,
            payload_dtype: top_k.map(|_| payload.to_string()),
            perplexity: measured.perplexity,
            gap_closed,
            counted_tokens: measured.counted_tokens,
            tokens_per_s: measured.tokens_per_s,
        }
    }
}

impl Report for PasskeyReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut rows =
            table(["TOKENS>", "K>", "PAYLOAD", "CORRECT>", "BYTES/TOKEN>", "ENCODE TOKENS/S>", "FIRST TOKEN>"]);
        for result in &self.results {
            rows.add_row([
                count(result.tokens as u64),
                result.top_k.to_string(),
                result.payload_dtype.clone(),
                format!("{} of {}", result.correct, result.samples),
                format!("{:.0}", result.bytes_per_token),
                format!("{:.0}", result.encode_tokens_per_s),
                format!("{:.2} s", result.first_token_s),
            ]);
        }
        write_table(to, &rows)?;
        for case in self.cases.iter().filter(|case| !case.correct) {
            writeln!(
                to,
                "wrong: {} tokens, text {}, k = {}, {}: hidden at {:.0} %, expected {}, answered {:?}",
                count(case.tokens as u64),
                case.sample,
                case.top_k,
                case.payload_dtype,
                100.0 * case.depth,
                case.key,
                case.answer
            )?;
        }
        Ok(())
    }
}

impl Report for PerplexityReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut rows = table(["MODE", "K>", "PAYLOAD", "PERPLEXITY>", "GAP CLOSED>", "TOKENS/S>"]);
        for result in &self.results {
            rows.add_row([
                result.mode.to_string(),
                result.top_k.map(|k| k.to_string()).unwrap_or_default(),
                result.payload_dtype.clone().unwrap_or_default(),
                format!("{:.3}", result.perplexity),
                result.gap_closed.map(|share| format!("{:.1} %", 100.0 * share)).unwrap_or_default(),
                format!("{:.0}", result.tokens_per_s),
            ]);
        }
        write_table(to, &rows)
    }
}
