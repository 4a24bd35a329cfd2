//! `landmarkdb bench report`: every benchmark, and the page that tells them.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Parser;
use serde::Serialize;

use super::{decode, lookup, payload};
use crate::args::{Cli, Command};
use crate::error::CliError;
use crate::output::{Report, people};
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
    /// The page to write; an old one is replaced when all is measured.
    #[arg(long, value_name = "FILE", default_value = "docs/benchmarks.md")]
    out: PathBuf,

    /// Measure tiny sizes, to see that everything works: the figures mean nothing.
    #[arg(long)]
    quick: bool,

    /// What `landmarkdb capture` kept [default: it is captured now].
    #[arg(long, value_name = "FILE")]
    captured: Option<PathBuf>,

    /// Where the peers are installed.
    #[arg(long, default_value = "python3")]
    python: String,

    #[command(flatten)]
    model: ModelArgs,
}

/// One benchmark. In its commands CAPTURED and MODEL stand for what the arguments name.
struct Planned {
    title: &'static str,
    /// What is asked, true on any machine and for any size.
    about: &'static str,
    command: &'static str,
    quick: &'static str,
}

const SECTIONS: [Planned; 7] = [
    Planned {
        title: "One lookup, one key per block",
        about: "What one layer of a model with landmarks asks at one decode step. Keys (f16, as in a model's cache) and queries are \
                random; layers take turns, so that nothing is served from a cache.",
        command: "bench lookup --shape llama3-8b-1m --engines flat,sq8,sq4 --ways tcp,unix --peers faiss-flat --lookups 400",
        quick: "bench lookup --blocks 64 --kv-heads 2 --query-heads 4 --head-dim 16 --engines flat,sq8,sq4 --ways tcp,unix --peers faiss-flat \
                --peer-seconds 1 --lookups 3",
    },
    Planned {
        title: "One lookup, a model's own keys and queries",
        about: "The keys of a novel and the queries of the tokens after it, as the model asked them. Attention's queries are far from \
                its keys, and neither is random.",
        command: "bench lookup --captured CAPTURED --ways tcp,unix --peers faiss-flat,faiss-ivf,faiss-hnsw,usearch",
        quick: "bench lookup --captured CAPTURED --ways tcp,unix --peers faiss-flat,faiss-ivf,faiss-hnsw,usearch \
                --peer-seconds 1 --lookups 3",
    },
    Planned {
        title: "One lookup of many tokens",
        about: "The first case during prefill, with many query tokens at once.",
        command: "bench lookup --shape llama3-8b-1m --query-tokens 256 --lookups 20 --ways in-process --peers faiss-flat",
        quick: "bench lookup --blocks 64 --kv-heads 2 --query-heads 4 --head-dim 16 --query-tokens 8 --lookups 3 \
                --ways in-process --peers faiss-flat --peer-seconds 1",
    },
    Planned {
        title: "Attention over the chosen blocks, in process and through a service",
        about: "The second case, with the attention over the chosen blocks, which the memory computes where the blocks are.",
        command: "bench lookup --captured CAPTURED --keys int8 --engines flat --attend --ways tcp,unix --lookups 1000",
        quick: "bench lookup --captured CAPTURED --keys int8 --engines flat --attend --ways tcp,unix --lookups 3",
    },
    Planned {
        title: "Reading stored K and V",
        about: "A piece is K and V of one block, layer and KV head. The store checks every byte that it reads; `pread` reads the same \
                bytes from the same files, unchecked.",
        command: "bench payload --peers redis --batches 300",
        quick: "bench payload --peers redis --batches 10 --blocks 4 --block-tokens 4 --head-dim 8 --batch 5 --peer-seconds 1",
    },
    Planned {
        title: "Decoding with one key per block",
        about: "The mean of a block's keys costs what a landmark key costs, and any model has it; it finds less.",
        command: "bench decode --model MODEL --steps 48 --tokens 4096,32768,262144 --key-rule mean --payload int8",
        quick: "bench decode --model MODEL --steps 2 --tokens 128,512 --full-tokens 256 --prefill-tokens 128 --key-rule mean \
                --payload int8",
    },
    Planned {
        title: "Decoding, and the first token after a text that was read before",
        about: "The keys that a model asks for by default. A text is read once, and kept: here as a document, which is opened anew, and \
                by llama.cpp as the state of a context, which is loaded into a new one; then a question is read. llama.cpp attends to all of \
                the text. Beyond the length that a model was trained on its answers are worth nothing: those rows are about cost.",
        command: "bench decode --model MODEL --steps 64 --peers llama.cpp --peer-seconds 900",
        quick: "bench decode --model MODEL --steps 2 --tokens 128,512 --full-tokens 256 --prefill-tokens 128 --peers llama.cpp \
                --peer-seconds 5",
    },
];

const CAPTURE: &str = "capture CAPTURED --model MODEL";
const CAPTURE_QUICK: &str = "capture CAPTURED --model MODEL --tokens 1024 --queries 8";

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
    let silent = Context { config: context.config.clone(), output: context.output.silenced() };
    let names = Names { args, captured: args.captured.clone().unwrap_or_else(|| folder.path().join(CAPTURED)) };
    // Before an hour is spent for a page that cannot be written.
    check_folder(&args.out).map_err(failed)?;

    let mut sections: Vec<Section> = Vec::new();
    for (number, section) in SECTIONS.iter().enumerate() {
        let command = if args.quick { section.quick } else { section.command };
        let mut commands = Vec::new();
        if command.contains("CAPTURED") && args.captured.is_none() {
            let capture = if args.quick { CAPTURE_QUICK } else { CAPTURE };
            commands.push(names.shown(capture));
            if !names.captured.exists() {
                context.output.progress(&commands[0]);
                names.capture(capture, &silent)?;
            }
        }
        commands.push(names.shown(command));
        context.output.progress(&format!("{}/{} {}", number + 1, SECTIONS.len(), names.shown(command)));
        let figures = names.measure(command, &silent)?;
        let printed = people(&figures).map_err(failed)?;
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

/// What the words of commands stand for.
struct Names<'a> {
    args: &'a Args,
    captured: PathBuf,
}

impl Names<'_> {
    /// As somebody would type it.
    fn shown(&self, command: &str) -> String {
        let captured = self.captured.file_name().unwrap_or_default().to_string_lossy();
        format!("landmarkdb {}", command.replace("CAPTURED", &captured).replace("MODEL", &self.args.model.model))
    }

    fn parse(&self, command: &str) -> Result<Command, CliError> {
        let word = |word: &str| match word {
            "CAPTURED" => self.captured.clone().into_os_string(),
            "MODEL" => self.args.model.model.clone().into(),
            word => word.into(),
        };
        let mut words: Vec<_> = ["landmarkdb"].into_iter().chain(command.split(' ')).map(word).collect();
        if command.contains("--peers") {
            words.extend(["--python".into(), self.args.python.clone().into()]);
        }
        let cli = Cli::try_parse_from(words);
        Ok(cli
            .map_err(|error| CliError::Io { what: "a command of the report", source: io::Error::other(error) })?
            .command)
    }

    fn capture(&self, command: &str, context: &Context) -> Result<(), CliError> {
        match self.parse(command)? {
            Command::Capture(args) => capture::keep(&args, context).map(drop),
            other => unreachable!("captures with {other:?}"),
        }
    }

    fn measure(&self, command: &str, context: &Context) -> Result<Figures, CliError> {
        use super::Command as Bench;
        Ok(match self.parse(command)? {
            Command::Bench(Bench::Lookup(args)) => Figures::Lookup(lookup::measure(&args, context)?),
            Command::Bench(Bench::Decode(args)) => Figures::Decode(decode::measure(&args, context)?),
            Command::Bench(Bench::Payload(args)) => Figures::Payload(payload::measure(&args, context)?),
            other => unreachable!("measures with {other:?}"),
        })
    }
}

impl Report for Figures {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        match self {
            Figures::Lookup(report) => report.people(to),
            Figures::Payload(report) => report.people(to),
            Figures::Decode(report) => report.people(to),
        }
    }
}

impl Report for BenchReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{}", self.page.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_can_be_typed() {
        let typed =
            ["landmarkdb", "bench", "report", "--captured", "folder/c.safetensors", "--python", "folder/python"];
        let Command::Bench(super::super::Command::Report(args)) = Cli::try_parse_from(typed).unwrap().command else {
            panic!("another command")
        };
        let names = Names { args: &args, captured: args.captured.clone().unwrap() };
        let commands = SECTIONS.iter().flat_map(|section| [section.command, section.quick]);
        for command in commands.chain([CAPTURE, CAPTURE_QUICK]) {
            let parsed = names.parse(command).unwrap();
            assert!(matches!(parsed, Command::Bench(_) | Command::Capture(_)), "{command}");
            let shown = names.shown(command);
            assert!(!shown.contains("folder"), "the page says nothing of this machine's folders: {shown}");
            assert!(!shown.contains("MODEL") && !shown.contains("CAPTURED"), "{shown}");
        }
    }
}
