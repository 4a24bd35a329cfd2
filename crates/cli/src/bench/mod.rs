//! `landmarkdb bench`: how fast is it here?

mod case;
mod decode;
mod first_token;
mod lookup;
mod payload;
mod peers;
mod report;
mod serving;

use std::fs::File;

use crate::Context;
use crate::error::CliError;

/// Measure this machine. Shapes are named, inputs random by seed, and times quoted as percentiles.
#[derive(clap::Subcommand, Debug)]
pub(super) enum Command {
    Lookup(lookup::Args),
    Decode(decode::Args),
    Payload(payload::Args),
    Report(report::Args),
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Lookup(args) => lookup::run(args, context),
        Command::Decode(args) => decode::run(args, context),
        Command::Payload(args) => payload::run(args, context),
        Command::Report(args) => report::run(args, context),
    }
}

/// What people type for a value.
fn word_of(value: impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|word| word.get_name().to_string()).unwrap_or_default()
}

/// Drops what the page cache has of a file; what is not on disk yet stays.
fn forget_pages(file: &File) -> Result<(), CliError> {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)
        .map_err(|error| CliError::Io { what: "emptying the page cache", source: error.into() })
}
