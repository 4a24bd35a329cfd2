//! The program `landmarkdb`: what a person types, and what is printed back.
//!
//! Two stages: `args` is what was typed, `config` is what it means once the configuration file and the environment
//! had their say. Each command is one file here: its arguments, what it answers (a serde struct that is the manual
//! of its `--json`), and `run`. Adding a command is one such file and one variant of `args::Command`.

mod args;
mod config;
mod conversation;
mod error;
mod faults;
mod global;
mod hints;
mod logging;
mod numbers;
mod open;
mod output;
mod report;
mod sampling;
mod scratch;
mod settings;
mod signals;
mod target;

// The commands.
mod ask;
mod bench;
mod blocks;
mod capture;
mod completions;
mod demo;
mod encode;
mod eval;

mod index;
mod limits;
mod ls;
mod model;
mod repair;
mod rm;
mod serve;
mod show;
mod stats;
mod train;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;

use args::{Cli, Command};
use config::Config;
use error::{CliError, Exit};
use hints::Hints;
use output::Output;
use target::Target;

/// Threads that candle takes for sums and products of its own.
const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";

/// What every command is given.
struct Context {
    config: Config,
    output: Output,
    hints: Hints,
}

fn main() -> ExitCode {
    if std::env::var_os(CANDLE_THREADS).is_none() {
        // What is large runs on rayon's threads. Candle's own wait by spinning: beside rayon's they cost a training
        // step a third of its time on a machine with other work.
        // SAFETY: no other thread has been started that could read the environment now.
        unsafe { std::env::set_var(CANDLE_THREADS, "1") };
    }
    run_line(std::env::args_os())
}

/// Runs one command line, program name first, and says how it went.
fn run_line(typed: impl IntoIterator<Item = OsString>) -> ExitCode {
    let typed: Vec<OsString> = typed.into_iter().collect();
    let cli = match Cli::read(&typed) {
        Ok(cli) => cli,
        Err(error) => return misunderstood(&error, &typed).into(),
    };
    let output = Output::new(&cli.global);
    let hints = Hints::new(&cli.global);
    match run(cli, output, hints.clone()) {
        Ok(()) => Exit::Ok,
        Err(error) if error.is_broken_pipe() => Exit::Ok,
        Err(error) => {
            output.error(&hints.complete(&error.message()), error.exit());
            error.exit()
        }
    }
    .into()
}

fn run(cli: Cli, output: Output, hints: Hints) -> Result<(), CliError> {
    logging::start(cli.global.verbose, matches!(cli.command, Command::Serve(_)))?;
    let config = Config::load(&cli.global)?;
    if let (true, Ok(Target::Data(data))) = (config.target_found_here, config.target()) {
        output
            .progress(&format!("landmarkdb.toml of the working directory decides: data directory {}", data.display()));
    }
    cli.command.run(&Context { config, output, hints })
}

/// Help and version are answers, not errors. Anything else is a usage error, in JSON where JSON was asked for.
fn misunderstood(error: &clap::Error, typed: &[OsString]) -> Exit {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A reader that went away wants no more help.
        let _ = error.print();
        return Exit::Ok;
    }
    if typed.iter().any(|word| word == "--json") {
        let message = error.to_string();
        Output::json().error(message.trim_start_matches("error: ").trim_end(), Exit::Usage);
    } else {
        let _ = error.print();
    }
    Exit::Usage
}
