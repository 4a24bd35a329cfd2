//! `landmarkdb eval perplexity`.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use super::source_text;
use crate::Context;
use crate::encode::token_bar;
use crate::error::CliError;
use crate::numbers::{from_one, top_k};
use crate::output::{Report, table, write_table};
use crate::settings::{SetupArgs, one_of};
use landmarkdb::DType;
use landmarkdb_lab::eval::{self, Perplexity, PerplexityMode, PerplexitySettings};

/// Measure perplexity on prose: full attention, window only, and with the memory.
///
/// With the memory, every token retrieves blocks of the text before its window, which were appended as the text went
/// by. Works in a temporary directory unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb eval perplexity
  landmarkdb eval perplexity --tokens 4096 --blocks 4,8 --samples 2 --payload-dtypes f16,int8 --json
")]
pub(crate) struct Args {
    /// Length of each text, in tokens.
    #[arg(long, default_value_t = 4096, value_parser = from_one::<usize>())]
    tokens: usize,

    /// Tokens at the beginning that are not counted.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    skip: usize,

    /// Texts, evenly spaced in the source.
    #[arg(long, default_value_t = 1, value_parser = from_one::<usize>())]
    samples: usize,

    /// Blocks retrieved per choice (k).
    #[arg(long = "blocks", value_name = "K", value_delimiter = ',', default_value = "4,8", value_parser = top_k())]
    top_k: Vec<u32>,

    /// Measure the last k blocks before the window too, in place of retrieved ones: what retrieval has to beat.
    #[arg(long)]
    control: bool,

    /// Payload dtypes to compare [default: --payload].
    #[arg(long, value_name = "DTYPES", value_delimiter = ',', value_parser = one_of::<DType>(DType::WORDS))]
    payload_dtypes: Vec<DType>,

    /// The source: a UTF-8 text file [default: the novel that comes with landmarkdb].
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    #[command(flatten)]
    setup: SetupArgs,
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
    /// full, window, recent (the control) or memory.
    mode: &'static str,
    top_k: Option<u32>,
    payload_dtype: Option<String>,
    perplexity: f64,
    /// How much of the gap between window only and full attention the memory closes, 1 for all.
    gap_closed: Option<f64>,
    counted_tokens: usize,
    tokens_per_s: f64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let text = source_text(args.text.as_ref())?;
    let model = args.setup.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collections = scratch.collections(&args.setup.storage, &args.payload_dtypes, &model)?;
    let source = model.tokenizer.encode(&text).map_err(landmarkdb_llm::RememberError::from)?.ids;
    let texts = eval::segments(&source, args.tokens, args.samples);
    let settings = PerplexitySettings {
        skip_tokens: args.skip,
        window: args.setup.window.window(model.config())?,
        retrieval: args.setup.retrieval.retrieval(model.config(), 1)?,
    };
    let bar = token_bar(context, "");
    let mut results: Vec<PerplexityResult> = Vec::new();
    let baselines = [PerplexityMode::Full, PerplexityMode::Window].map(|mode| (mode, &collections[0]));
    let newest_blocks = settings.retrieval.newest_blocks;
    let modes = args.top_k.iter().flat_map(|&top_k| {
        let control = args.control.then_some(PerplexityMode::Recent { blocks: top_k });
        control.into_iter().chain([PerplexityMode::Memory { top_k, newest_blocks }])
    });
    let modes: Vec<_> = modes.collect();
    let memory = collections.iter().flat_map(|collection| modes.iter().map(move |&mode| (mode, collection)));
    for (mode, collection) in baselines.into_iter().chain(memory) {
        bar.label(&format!("{mode:?}"));
        let measured =
            eval::perplexity(&model, &scratch.memory, collection, &texts, mode, &settings, &mut |done, total| {
                bar.show(landmarkdb_llm::EncodeProgress {
                    resumed_tokens: 0,
                    done_tokens: done as u64,
                    kept_tokens: 0,
                    total_tokens: total as u64,
                    replaces: false,
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

impl PerplexityResult {
    /// `before`: the results so far, full and window first.
    fn new(measured: &Perplexity, payload: DType, before: &[PerplexityResult]) -> Self {
        let (mode, top_k) = match measured.mode {
            PerplexityMode::Full => ("full", None),
            PerplexityMode::Window => ("window", None),
            PerplexityMode::Recent { blocks } => ("recent", Some(blocks)),
            PerplexityMode::Memory { top_k, .. } => ("memory", Some(top_k)),
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

impl Report for PerplexityReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
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
