//! `landmarkdb bench report`: every benchmark, and the page that tells them.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::sections::{Benchmark, Subjects};
use super::{decode, lookup, payload};
use crate::error::CliError;
use crate::output::{Report, human};
use crate::settings::ModelArgs;
use crate::{Context, capture};
use landmarkdb_lab::bench::{Benchmarks, Figures, Machine, Section, page, peak_flops, today};
use landmarkdb_llm as model;

/// Measure everything that docs/benchmarks.md tells, and write that page.
///
/// Runs the other benchmarks one after the other, beside other programs where they are installed, and writes what they
/// printed, the commands, the machine, and what follows from the figures. Takes the better part of an hour.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench report --python venv/bin/python
  landmarkdb bench report --quick --out page.md --json
")]
pub(crate) struct Args {
    /// The page to write; an old one is replaced at the end.
    #[arg(long, value_name = "FILE", default_value = "docs/benchmarks.md")]
    out: PathBuf,

    /// Tiny sizes, as a smoke test: the figures mean nothing.
    #[arg(long)]
    quick: bool,

    /// A file of `landmarkdb capture` [default: captured now].
    #[arg(long, value_name = "FILE")]
    captured: Option<PathBuf>,

    /// Where the peers are installed.
    #[arg(long, default_value = "python3")]
    python: String,

    #[command(flatten)]
    model: ModelArgs,
}

/// The name that the captured file has on the page where it is made for it.
const CAPTURED: &str = "captured.safetensors";

/// What was measured, and the page that was written.
#[derive(Debug, Serialize)]
struct BenchReport {
    page: PathBuf,
    #[serde(flatten)]
    benchmarks: Benchmarks,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let failed = |source| CliError::WriteReport { path: args.out.clone(), source };
    let folder = tempfile::Builder::new().prefix("landmarkdb-report-").tempdir();
    let folder = folder.map_err(|source| CliError::Io { what: "a temporary directory", source })?;
    let silent =
        Context { config: context.config.clone(), output: context.output.silenced(), hints: context.hints.clone() };
    let captured = args.captured.clone().unwrap_or_else(|| folder.path().join(CAPTURED));
    let subjects = args.subjects(&captured);
    // Before an hour is spent for a page that cannot be written.
    check_folder(&args.out).map_err(failed)?;

    let planned = subjects.sections();
    let mut sections: Vec<Section> = Vec::new();
    for (number, section) in planned.iter().enumerate() {
        let mut commands = Vec::new();
        if section.benchmark.reads_captured() && args.captured.is_none() {
            commands.push(subjects.capture_line());
            if !captured.exists() {
                context.output.progress(&commands[0]);
                capture::keep(&subjects.capture(), &silent)?;
            }
        }
        let command = section.benchmark.line();
        context.output.progress(&format!("{}/{} {command}", number + 1, planned.len()));
        commands.push(command);
        let figures = measure(&section.benchmark, &silent)?;
        let printed = human(&figures).map_err(failed)?;
        let prefill = matches!(&figures, Figures::Lookup(report) if report.query_tokens > 1);
        let peak_flops = prefill.then(peak_flops);
        sections.push(Section { title: section.title, about: section.about, commands, printed, figures, peak_flops });
    }
    let benchmarks = Benchmarks { date: today(), quick: args.quick, machine: Machine::this(&args.python), sections };
    model::replace_file(&args.out, page(&benchmarks).as_bytes()).map_err(failed)?;
    context.output.print(&BenchReport { page: args.out.clone(), benchmarks })
}

/// Whether there is a folder to write the page into.
fn check_folder(page: &Path) -> io::Result<()> {
    let folder = page.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::read_dir(folder).map(drop)
}

fn measure(benchmark: &Benchmark, context: &Context) -> Result<Figures, CliError> {
    Ok(match benchmark {
        Benchmark::Lookup(args) => Figures::Lookup(lookup::measure(args, context)?),
        Benchmark::Payload(args) => Figures::Payload(payload::measure(args, context)?),
        Benchmark::Decode(args) => Figures::Decode(decode::measure(args, context)?),
    })
}

impl Args {
    fn subjects<'a>(&'a self, captured: &'a Path) -> Subjects<'a> {
        Subjects { captured, model: &self.model, python: &self.python, quick: self.quick }
    }

    /// Every command of the page, with what it means.
    #[cfg(test)]
    pub(crate) fn commands(&self) -> Vec<(String, String)> {
        let subjects = self.subjects(self.captured.as_deref().unwrap_or(Path::new(CAPTURED)));
        let capture = (subjects.capture_line(), format!("Capture({:?})", subjects.capture()));
        let sections = subjects.sections();
        let benches = sections.iter().map(|section| &section.benchmark);
        benches.map(|bench| (bench.line(), format!("Bench({bench:?})"))).chain([capture]).collect()
    }
}

impl Report for Figures {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        match self {
            Figures::Lookup(report) => report.human(to),
            Figures::Payload(report) => report.human(to),
            Figures::Decode(report) => report.human(to),
        }
    }
}

impl Report for BenchReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}", self.page.display())
    }
}
