//! `landmarkdb eval report`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::source_text;
use crate::Context;
use crate::error::CliError;
use crate::numbers::{from_one, top_k};
use crate::output::Report as Answer;
use crate::settings::{ModelArgs, SetupArgs};
use landmarkdb::{BlockMemory, CollectionInfo};
use landmarkdb_lab::eval::{self, Report, ReportSettings, Subject};
use landmarkdb_llm::LoadedModel;

/// Evaluate a model as the Landmark Attention paper does, and write a report with tables and plots.
///
/// Perplexity by evaluation length and k, against the last k blocks without retrieval, a plain twin and a recurrent
/// baseline (the paper's Table 1); by who chooses together (Table 2); of a passage that is read again; and passkeys by
/// length (Figure 3). Each beside the paper's own numbers. Works in a temporary directory unless --data or --connect is
/// given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb eval report reports/smollm2 --lengths 2048,4096 --samples 10
  landmarkdb eval report reports/austen --model models/austen --plain models/austen-plain --samples 50
")]
pub(crate) struct Args {
    /// The folder for report.md, report.json and the plots; created if it does not exist.
    folder: PathBuf,

    /// A twin without landmarks: a baseline.
    #[arg(long, value_name = "MODEL")]
    plain: Option<String>,

    /// A model trained with a cache of what came before: a baseline.
    #[arg(long, value_name = "MODEL")]
    recurrent: Option<String>,

    /// A UTF-8 text that no model was trained on [default: the novel that comes with landmarkdb].
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Tokens of the text that perplexity is measured on.
    #[arg(long, value_name = "TOKENS", default_value_t = 32_768)]
    text_tokens: usize,

    /// Evaluation lengths.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "512,2048,4096")]
    lengths: Vec<usize>,

    /// Blocks retrieved while perplexity is measured.
    #[arg(long = "blocks", value_name = "K", value_delimiter = ',', default_value = "2,4", value_parser = top_k())]
    top_k: Vec<u32>,

    /// Lengths of the texts with a pass key.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "1024,4096,16384,32768")]
    passkey_lengths: Vec<usize>,

    /// Blocks retrieved when a pass key is asked for.
    #[arg(long = "passkey-blocks", value_name = "K", value_delimiter = ',', default_value = "1,2,4", value_parser = top_k())]
    passkey_top_k: Vec<u32>,

    /// Texts per length and haystack.
    #[arg(long, default_value_t = 50, value_parser = from_one::<usize>())]
    samples: usize,

    /// Longest text for full attention, whose cost grows with the square of the length.
    #[arg(long, value_name = "TOKENS", default_value_t = 8192)]
    full_tokens_max: usize,

    /// Seed of the random inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    #[command(flatten)]
    setup: SetupArgs,
}

/// A report that was written.
#[derive(Debug, Serialize)]
struct Written {
    folder: PathBuf,
    report: Report,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let model = args.setup.model.load(context)?;
    let load =
        |name: &Option<String>| name.as_ref().map(|name| ModelArgs { model: name.clone() }.load(context)).transpose();
    let (plain, recurrent) = (load(&args.plain)?, load(&args.recurrent)?);
    let settings = ReportSettings {
        text: source_text(args.text.as_ref())?,
        text_tokens: args.text_tokens,
        lengths: args.lengths.clone(),
        top_k: args.top_k.clone(),
        passkey_lengths: args.passkey_lengths.clone(),
        passkey_top_k: args.passkey_top_k.clone(),
        samples: args.samples,
        full_tokens_max: args.full_tokens_max,
        seed: args.seed,
    };
    let scratch = context.scratch_memory()?;
    let collection = |name: &str, model: &LoadedModel| args.collection(name, model, &scratch.memory);
    let (of_model, of_plain, of_recurrent) = (
        collection("report", &model)?,
        plain.as_ref().map(|model| collection("report-plain", model)).transpose()?,
        recurrent.as_ref().map(|model| collection("report-recurrent", model)).transpose()?,
    );
    let subject = args.subject(&model, &of_model)?;
    let plain = plain.as_ref().zip(of_plain.as_ref()).map(|(model, collection)| baseline(model, collection));
    let recurrent =
        recurrent.as_ref().zip(of_recurrent.as_ref()).map(|(model, collection)| baseline(model, collection));

    let bar = context.output.share_bar();
    let report =
        eval::report(&subject, &scratch.memory, plain.as_ref(), recurrent.as_ref(), &settings, &mut |what, share| {
            bar.set_message(what.to_string());
            bar.set_position((share * 100.0) as u64);
        })?;
    bar.finish_and_clear();
    let command: Vec<String> = std::env::args().skip(1).collect();
    eval::write_report(&report, &format!("landmarkdb {}", command.join(" ")), &args.folder)
        .map_err(|source| CliError::WriteReport { path: args.folder.clone(), source })?;
    context.output.print(&Written { folder: args.folder.clone(), report })
}

impl Args {
    /// A collection for one of the models.
    fn collection(
        &self,
        name: &str,
        model: &LoadedModel,
        memory: &Arc<dyn BlockMemory>,
    ) -> Result<CollectionInfo, CliError> {
        Ok(memory.open_collection(&self.setup.storage.spec(name, model, None, None)?)?)
    }

    fn subject<'a>(&self, model: &'a LoadedModel, collection: &'a CollectionInfo) -> Result<Subject<'a>, CliError> {
        let config = model.config();
        Ok(Subject {
            model,
            collection,
            window: self.setup.window.window(config)?,
            retrieval: self.setup.retrieval.retrieval(config, 1)?,
            encode_retrieval: self.setup.encode_retrieval(config)?,
        })
    }
}

/// A baseline sees as much as it was trained with, sliding, and nothing before.
fn baseline<'a>(model: &'a LoadedModel, collection: &'a CollectionInfo) -> Subject<'a> {
    let config = model.config();
    let best = config.window();
    let window = landmarkdb::Window { tokens: config.context_tokens as usize, sink: false, ..best };
    Subject { model, collection, window, retrieval: config.retrieval(), encode_retrieval: None }
}

impl Answer for Written {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}", self.folder.join("report.md").display())
    }
}
