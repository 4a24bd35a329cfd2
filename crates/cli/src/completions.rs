//! `landmarkdb completions`: completion scripts for shells.

use std::io::{self, Write};

use clap_complete::Shell;

use super::error::CliError;

/// Print a completion script for a shell.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb completions bash > ~/.local/share/bash-completion/completions/landmarkdb
  landmarkdb completions zsh > ~/.zfunc/_landmarkdb
  landmarkdb completions fish > ~/.config/fish/completions/landmarkdb.fish
")]
pub(super) struct Args {
    /// The shell that will read the script.
    shell: Shell,
}

/// Prints the script for a command and all below it.
pub(super) fn run(args: &Args, command: &mut clap::Command) -> Result<(), CliError> {
    // Into memory first: the generator panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "landmarkdb", &mut script);
    io::stdout().write_all(&script).map_err(|source| CliError::Io { what: "standard output", source })
}
