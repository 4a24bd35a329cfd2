//! `landmarkdb eval passkey`.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use super::source_text;
use crate::Context;
use crate::encode::token_bar;
use crate::error::CliError;
use crate::numbers::{from_one, top_k};
use crate::output::{Report, count, table, write_table};
use crate::settings::{Explained, SetupArgs, explained, one_of};
use landmarkdb::DType;
use landmarkdb_lab::eval::{self, Haystack, PasskeyCase, PasskeyScore, PasskeySettings, PasskeyTexts};

const HAYSTACK: Explained =
    &[("prose", "Windows of a novel"), ("garbage", "The paper's five sentences, again and again")];

/// Hide five digits in long texts and ask for them.
///
/// Each text is encoded into the memory, the question is answered from there, and the document is deleted. Works in a
/// temporary directory unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb eval passkey
  landmarkdb eval passkey --haystack prose --tokens 4096,16384,32768 --samples 10 --blocks 4 --json
  landmarkdb eval passkey --haystack garbage --tokens 32768 --blocks 2,4 --payload-dtypes f16,int8
")]
pub(crate) struct Args {
    /// What the key is hidden in.
    #[arg(long, default_value = "prose", value_parser = explained::<Haystack>(HAYSTACK))]
    haystack: Haystack,

    /// Lengths of the texts, in tokens.
    #[arg(long, value_delimiter = ',', default_value = "4096", value_parser = from_one::<usize>())]
    tokens: Vec<usize>,

    /// Texts per length.
    #[arg(long, default_value_t = 10, value_parser = from_one::<usize>())]
    samples: usize,

    /// Blocks retrieved per choice (k); several share one encoded text.
    #[arg(long = "blocks", value_name = "K", value_delimiter = ',', default_value = "4", value_parser = top_k())]
    top_k: Vec<u32>,

    /// Payload dtypes to compare on the same encoded text [default: --payload].
    #[arg(long, value_name = "DTYPES", value_delimiter = ',', value_parser = one_of::<DType>(DType::WORDS))]
    payload_dtypes: Vec<DType>,

    /// The baseline: ask the model alone, with full attention over each text. Its cost grows with the square of the length.
    #[arg(long)]
    full_attention: bool,

    /// Seed of the random inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Another prose haystack: a UTF-8 text file.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    #[command(flatten)]
    setup: SetupArgs,
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
    /// None, here and below: full attention.
    top_k: Option<u32>,
    payload_dtype: Option<String>,
    correct: usize,
    samples: usize,
    /// On disk: payload, keys, text and headers.
    bytes_per_token: Option<f64>,
    encode_tokens_per_s: Option<f64>,
    first_token_s: f64,
}

#[derive(Debug, Serialize)]
struct Case {
    tokens: usize,
    sample: usize,
    top_k: Option<u32>,
    payload_dtype: Option<String>,
    correct: bool,
    key: String,
    answer: String,
    depth: f64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let texts = PasskeyTexts {
        haystack: args.haystack,
        prose: source_text(args.text.as_ref())?,
        tokens: args.tokens.clone(),
        samples: args.samples,
        seed: args.seed,
    };
    let model = args.setup.model.load(context)?;
    let bar = token_bar(context, "");
    let label = |tokens: usize, sample: usize| {
        bar.label(&format!("{} tokens, text {} of {}", count(tokens as u64), sample + 1, args.samples));
    };
    let cases = if args.full_attention {
        eval::passkey_full(&model, &texts, &mut |tokens, sample| label(tokens, sample))?
    } else {
        let scratch = context.scratch_memory()?;
        let collections = scratch.collections(&args.setup.storage, &args.payload_dtypes, &model)?;
        let settings = PasskeySettings {
            top_k: args.top_k.clone(),
            window: args.setup.window.window(model.config())?,
            encode_retrieval: args.setup.encode_retrieval(model.config())?,
            retrieval: args.setup.retrieval.retrieval(model.config(), 1)?,
        };
        eval::passkey(&model, &scratch.memory, &collections, &texts, &settings, &mut |tokens, sample, step| {
            label(tokens, sample);
            bar.show(step);
        })?
    };
    bar.finish();
    context.output.print(&PasskeyReport::new(&model.name, args, &cases))
}

impl PasskeyReport {
    fn new(model: &str, args: &Args, cases: &[PasskeyCase]) -> Self {
        let results = eval::passkey_scores(cases).into_iter().map(PasskeyResult::new).collect();
        let mut cases: Vec<Case> = cases.iter().map(Case::new).collect();
        cases.sort_by_key(|case| case.correct);
        PasskeyReport { model: model.into(), haystack: args.haystack.to_string(), seed: args.seed, results, cases }
    }
}

impl PasskeyResult {
    fn new(score: PasskeyScore) -> Self {
        let remembered = score.remembered;
        PasskeyResult {
            tokens: score.tokens,
            top_k: remembered.map(|of| of.top_k),
            payload_dtype: remembered.map(|of| of.payload_dtype.to_string()),
            correct: score.correct,
            samples: score.samples,
            bytes_per_token: remembered.map(|of| of.bytes_per_token),
            encode_tokens_per_s: remembered.map(|of| of.encode_tokens_per_s),
            first_token_s: score.first_token_s,
        }
    }
}

impl Case {
    fn new(case: &PasskeyCase) -> Self {
        Case {
            tokens: case.tokens,
            sample: case.sample,
            top_k: case.remembered.map(|of| of.top_k),
            payload_dtype: case.remembered.map(|of| of.payload_dtype.to_string()),
            correct: case.correct,
            key: case.key.clone(),
            answer: case.answer.clone(),
            depth: case.depth,
        }
    }
}

impl Report for PasskeyReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut rows =
            table(["TOKENS>", "K>", "PAYLOAD", "CORRECT>", "BYTES/TOKEN>", "ENCODE TOKENS/S>", "FIRST TOKEN>"]);
        for result in &self.results {
            rows.add_row([
                count(result.tokens as u64),
                result.top_k.map_or("all".into(), |k| k.to_string()),
                result.payload_dtype.clone().unwrap_or_default(),
                format!("{} of {}", result.correct, result.samples),
                result.bytes_per_token.map(|bytes| format!("{bytes:.0}")).unwrap_or_default(),
                result.encode_tokens_per_s.map(|speed| format!("{speed:.0}")).unwrap_or_default(),
                format!("{:.2} s", result.first_token_s),
            ]);
        }
        write_table(to, &rows)?;
        for case in self.cases.iter().filter(|case| !case.correct) {
            writeln!(
                to,
                "wrong: {} tokens, text {}, {}: hidden at {:.0} %, expected {}, answered {:?}",
                count(case.tokens as u64),
                case.sample,
                match (case.top_k, &case.payload_dtype) {
                    (Some(k), Some(payload)) => format!("k = {k}, {payload}"),
                    _ => "full attention".into(),
                },
                100.0 * case.depth,
                case.key,
                case.answer
            )?;
        }
        Ok(())
    }
}
