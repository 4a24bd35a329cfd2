//! `landmarkdb eval`: does the memory work?

use std::path::PathBuf;

use landmarkdb_lab::eval;

use super::Context;
use super::error::CliError;

mod golden;
mod passkey;
mod perplexity;
mod questions;
mod report;

/// Evaluate a model with its memory.
#[derive(clap::Subcommand, Debug)]
pub(super) enum Command {
    Passkey(passkey::Args),
    Perplexity(perplexity::Args),
    Questions(questions::Args),
    Golden(golden::Args),
    Report(report::Args),
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Passkey(args) => passkey::run(args, context),
        Command::Perplexity(args) => perplexity::run(args, context),
        Command::Questions(args) => questions::run(args, context),
        Command::Golden(args) => golden::run(args, context),
        Command::Report(args) => report::run(args, context),
    }
}

fn source_text(file: Option<&PathBuf>) -> Result<String, CliError> {
    match file {
        None => Ok(eval::BOOK.to_string()),
        Some(path) => std::fs::read_to_string(path).map_err(|source| CliError::ReadText { path: path.clone(), source }),
    }
}
