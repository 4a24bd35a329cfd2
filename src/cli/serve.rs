//! `landmarkdb serve`: a data directory behind gRPC.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::memory::LocalMemory;
use crate::server::{self, ListenOptions, Listeners, ServeOptions};

use super::Context;
use super::config::Config;
use super::error::CliError;
use super::output::Report;
use super::signals::Signals;
use super::target::Target;

/// Serve a data directory over gRPC until interrupted.
///
/// Listens on 127.0.0.1:7601 unless --listen or --unix say otherwise. Prints one line when ready. SIGINT or SIGTERM
/// finishes what was begun and stops; a second one stops at once.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb serve --data ./books
  landmarkdb serve --data ./books --listen 127.0.0.1:0 --json
  landmarkdb serve --data ./books --unix ./books.sock
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
}

/// Printed once, when connections are accepted.
#[derive(Debug, Serialize)]
struct Ready {
    /// What `--connect` takes, one per listener.
    listening: Vec<String>,
    /// The data directory.
    data: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let data = match context.config.target()? {
        Target::Data(data) => data,
        Target::Connect(connect) => return Err(CliError::ServeNeedsData { connect: connect.clone() }),
    };
    let memory = Arc::new(
        LocalMemory::open(data)?.with_gpu_cache(context.config.gpu_cache_bytes).with_keys(context.config.keys_bytes),
    );
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|source| CliError::Io { what: "starting the service's threads", source })?;
    runtime.block_on(async {
        // Before the ready line, so that a signal sent because of it is not missed.
        let signals = Signals::listen()?;
        let options = listen_options(args, &context.config);
        let listeners = Listeners::bind(&options).await?;
        let tcp = listeners.tcp_address().map(|address| format!("http://{address}"));
        let unix = options.unix.map(|path| format!("unix:{}", std::path::absolute(&path).unwrap_or(path).display()));
        let listening = tcp.into_iter().chain(unix).collect();
        context.output.print(&Ready { listening, data: data.display().to_string() })?;
        server::serve(memory, listeners, ServeOptions::default(), signals.shutdown()).await?;
        tracing::info!("stopped");
        Ok(())
    })
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
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "serving {} on {}", self.data, self.listening.join(" and "))
    }
}
