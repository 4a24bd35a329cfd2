//! `landmarkdb bench`: how fast is it here?

mod decode;
mod lookup;
mod payload;
mod peers;
mod report;
mod sections;

use crate::Context;
use crate::error::CliError;

/// Benchmark this machine: named shapes, inputs random by seed, times as percentiles.
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
