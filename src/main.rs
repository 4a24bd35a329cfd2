//! Parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    landmarkdb::cli::main(std::env::args_os())
}
