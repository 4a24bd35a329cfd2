//! `landmarkdb bench decode`: what the memory costs a model, per token generated and per token encoded, and how soon it goes on
//! after a text that was encoded before.

use std::io::{self, Write};

use super::peers::PeerArgs;
use crate::Context;
use crate::encode::token_bar;
use crate::error::CliError;
use crate::numbers::{from_one, top_k};
use crate::output::{Report, Rows, count, plain_table, plural, size, write_table};
use crate::scratch::Scratch;
use crate::settings::SetupArgs;
use landmarkdb_lab::bench::{self, DecodeReport, DecodeSettings, FirstToken, Place};
use landmarkdb_lab::eval::Subject;
use landmarkdb_llm as model;

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
  landmarkdb bench decode --tokens 32768 --blocks 4 --payload int8 --json
  landmarkdb bench decode --peers llama.cpp --peer-seconds 900
")]
pub(crate) struct Args {
    /// Tokens in the memory.
    #[arg(long, value_delimiter = ',', default_value = "4096,32768")]
    pub(super) tokens: Vec<usize>,

    /// Context of full attention in tokens; 0 skips it.
    #[arg(long, value_name = "TOKENS", default_value_t = 8192)]
    pub(super) full_tokens: usize,

    /// Decode steps that are timed, of each kind in turn.
    #[arg(long, default_value_t = 32, value_parser = from_one::<usize>())]
    pub(super) steps: usize,

    /// Tokens of plain prefill that are timed.
    #[arg(long, default_value_t = 4096)]
    pub(super) prefill_tokens: usize,

    /// Blocks retrieved per choice (k).
    #[arg(long = "blocks", value_name = "K", default_value_t = 4, value_parser = top_k())]
    pub(super) top_k: u32,

    #[command(flatten)]
    pub(super) others: PeerArgs,

    #[command(flatten)]
    pub(super) setup: SetupArgs,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    context.output.print(&measure(args, context)?)
}

pub(super) fn measure(args: &Args, context: &Context) -> Result<DecodeReport, CliError> {
    let setup = &args.setup;
    let model = setup.model.load(context)?;
    let scratch = context.scratch_memory()?;
    let collection = scratch.collections(&setup.storage, &[], &model)?.remove(0);
    let config = model.config();
    let subject = Subject {
        model: &model,
        collection: &collection,
        window: setup.window.window(config)?,
        retrieval: setup.retrieval.retrieval(config, args.top_k)?,
        encode_retrieval: setup.encode_retrieval(config)?,
    };
    let settings = DecodeSettings {
        tokens: args.tokens.clone(),
        full_tokens: args.full_tokens,
        steps: args.steps,
        prefill_tokens: args.prefill_tokens,
        prompt: format!("\n\nQuestion: {QUESTION}\nAnswer:"),
        others: args.others.settings(),
        model_file: model::resolve(&setup.model.model)?,
    };
    // The temporary folder stays until all is measured.
    let Scratch { memory, folder, temporary } = scratch;
    let place = Place { memory, folder, is_temporary: temporary.is_some() };
    let mut bar = None;
    let report = bench::decode(&subject, place, &settings, &mut |step| {
        bar.get_or_insert_with(|| token_bar(context, "encoding")).show(step);
        if step.done_tokens == step.total_tokens
            && let Some(bar) = bar.take()
        {
            bar.finish();
        }
    });
    Ok(report?)
}

impl Report for DecodeReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
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

/// Table rows, ours and those of peers.
fn first_token_table<'a>(rows: impl Iterator<Item = (String, &'a FirstToken)>) -> Rows {
    let headings =
        ["FIRST TOKEN", "TOKENS>", "PAGES", "ON DISK>", "READ>", "SAVE>", "REOPEN>", "TO FIRST TOKEN>", "TIMES LESS>"];
    let mut table = plain_table(headings);
    for (who, row) in rows {
        table.add_row([
            who,
            count(row.tokens),
            row.pages.clone(),
            size(row.stored_bytes),
            format!("{:.1} s", row.prefill_s),
            row.save_s.map(|save_s| format!("{save_s:.2} s")).unwrap_or_default(),
            format!("{:.0} ms", row.reopen_ms),
            format!("{:.0} ms", row.first_token_ms),
            format!("{:.0}", row.gain()),
        ]);
    }
    table
}
