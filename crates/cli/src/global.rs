//! Flags that every command takes.

use std::path::PathBuf;

use clap::Args;

/// Flags that every command takes.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Global options")]
pub(super) struct Global {
    /// Work on this data directory [default: landmarkdb in the user's data folder].
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) data: Option<PathBuf>,

    /// Work on a running service: http://HOST:PORT or unix:/PATH. Excludes --data.
    #[arg(long, global = true, value_name = "TARGET")]
    pub(super) connect: Option<String>,

    /// Write nothing: a data directory is opened as it is, on a disk that cannot be written too; commands that write refuse.
    #[arg(long, global = true)]
    pub(super) read_only: bool,

    /// The collection that documents are looked for in [default: default].
    #[arg(long, global = true, value_name = "NAME")]
    pub(super) collection: Option<String>,

    /// Read settings from this file [default: landmarkdb.toml here, else in the user's configuration folder].
    #[arg(long, global = true, value_name = "PATH")]
    pub(super) config: Option<PathBuf>,

    /// Memory for landmark keys in MiB [default: a quarter of the machine's].
    #[arg(long, global = true, value_name = "MIB")]
    pub(super) key_memory: Option<u64>,

    /// GPU block cache in MiB (engine cuda) [default: 2048].
    #[arg(long, global = true, value_name = "MIB")]
    pub(super) gpu_cache: Option<u64>,

    /// Answer with JSON on standard output, and report errors as JSON on standard error.
    #[arg(long, global = true)]
    pub(super) json: bool,

    /// No progress bars.
    #[arg(short, long, global = true)]
    pub(super) quiet: bool,

    /// Log more to standard error; twice for everything. RUST_LOG overrides.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(super) verbose: u8,
}
