//! Logs for operators, on standard error. What a command has to say to its user goes through `output` instead.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use super::config::ConfigError;
use super::error::CliError;

const FILTER_VARIABLE: &str = "RUST_LOG";

/// Starts logging: RUST_LOG where set, else a service tells more than a command, and `-v` more than nothing.
pub(super) fn start(verbose: u8, is_service: bool) -> Result<(), CliError> {
    let level = match (verbose, is_service) {
        (0, true) => "warn,landmarkdb=info",
        (0, _) => "warn",
        (1, _) => "warn,landmarkdb=debug",
        _ => "debug,landmarkdb=trace",
    };
    let filter = match std::env::var(FILTER_VARIABLE) {
        Ok(filter) if !filter.is_empty() => EnvFilter::try_new(&filter)
            .map_err(|error| ConfigError::LogFilter { found: filter, detail: error.to_string() })?,
        _ => EnvFilter::new(level),
    };
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colour);
    // Fails only if logging was started before, as in a process that runs several command lines.
    let _ = logs.try_init();
    Ok(())
}
