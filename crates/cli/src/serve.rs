//! `landmarkdb serve`: a data directory behind gRPC.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::oneshot;

use landmarkdb_grpc::server::{self, ListenOptions, Listeners};

use super::Context;
use super::config::Config;
use super::error::CliError;
use super::limits::ServiceLimits;
use super::output::Report;
use super::signals::Listening;
use super::target::Target;

/// How long work that the service has given up may keep the process.
const LAST_STEP: Duration = Duration::from_secs(1);

/// Serve a data directory over gRPC until interrupted.
///
/// Listens on 127.0.0.1:7601 unless --listen or --unix say otherwise. Prints one line when ready. SIGINT or SIGTERM
/// finishes what was begun and stops; a second one stops at once. The limits can also be set in the configuration
/// file, under server.limits.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb serve --data ./books
  landmarkdb serve --data ./books --listen 127.0.0.1:0 --json
  landmarkdb serve --data ./books --unix ./books.sock
  landmarkdb serve --data /mnt/snapshot/books --read-only
")]
pub(super) struct Args {
    /// Listen on this address; port 0 takes a free port.
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,

    /// Listen on a Unix socket at this path; on no TCP port unless --listen is given too.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,

    /// Allow an address that other machines can reach: they can read and delete everything, for there is no login.
    #[arg(long)]
    allow_remote: bool,

    #[command(flatten)]
    limits: ServiceLimits,
}

/// Printed once, when connections are accepted.
#[derive(Debug, Serialize)]
struct Ready {
    /// What `--connect` takes, one per listener.
    listening: Vec<String>,
    /// The data directory.
    data: String,
    /// Whether writes are refused.
    read_only: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let data = match context.config.target()? {
        Target::Data(data) => data,
        Target::Connect(connect) => return Err(CliError::ServeNeedsData { connect: connect.clone() }),
    };
    let limits = args.limits.clone().over(context.config.limits.clone());
    if let Some(files) = server::raise_open_files() {
        tracing::debug!(files, "files that may be open");
        if files < server::OPEN_FILES_MIN {
            return Err(CliError::TooFewFiles { files });
        }
    }
    let memory = context.config.open_data(data)?;
    let read_only = context.config.read_only;
    let memory = if read_only { memory } else { memory.with_compactor()? };
    let memory = memory.with_gpu_cache(context.config.gpu_cache_bytes);
    let memory = memory.with_keys(context.config.keys_bytes).with_work_budget(limits.work_bytes());
    let memory = Arc::new(memory);
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|source| CliError::Io { what: "starting the service's threads", source })?;
    // Before the ready line, so that a signal sent because of it is not missed.
    let (stop, stopped) = oneshot::channel::<()>();
    let _listening = Listening::begin(move || drop(stop))?;
    let served = runtime.block_on(async {
        let options = listen_options(args, &context.config);
        let listeners = Listeners::bind(&options).await?;
        let tcp = listeners.tcp_address().map(|address| format!("http://{address}"));
        let unix = options.unix.map(|path| format!("unix:{}", std::path::absolute(&path).unwrap_or(path).display()));
        let listening = tcp.into_iter().chain(unix).collect();
        context.output.print(&Ready { listening, data: data.display().to_string(), read_only })?;
        let stopped = async {
            // That the sender is gone is the signal.
            let _ = stopped.await;
        };
        server::serve(memory, listeners, limits.options(), stopped).await?;
        tracing::info!("stopped");
        Ok(())
    });
    // A read that waits for a disk may never come back; the process does not wait for it.
    runtime.shutdown_timeout(LAST_STEP);
    served
}

/// A Unix socket alone means no TCP port.
fn listen_options(args: &Args, config: &Config) -> ListenOptions {
    let unix = args.unix.clone().or_else(|| config.unix.clone());
    let default = if unix.is_some() { None } else { ListenOptions::default().tcp };
    ListenOptions {
        tcp: args.listen.or(config.listen).or(default),
        unix,
        allow_remote: args.allow_remote || config.allow_remote,
    }
}

impl Report for Ready {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let how = if self.read_only { ", to be read only" } else { "" };
        writeln!(to, "serving {} on {}{how}", self.data, self.listening.join(" and "))
    }
}
