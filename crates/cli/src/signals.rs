//! Signals that ask the program to stop.

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::{CliError, Exit};

/// The two ways of asking.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

/// Listens as long as it lives, on a thread of its own, so that nothing else keeps a signal from being heard.
pub(super) struct Listening {
    _runtime: Runtime,
}

impl Listening {
    /// From here on the first signal calls `stop`, and a second one ends the process: all that matters is durable anyway.
    pub(super) fn begin(stop: impl FnOnce() + Send + 'static) -> Result<Self, CliError> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|source| CliError::Io { what: "starting a thread for signals", source })?;
        let entered = runtime.enter();
        let mut signals = Signals::listen()?;
        drop(entered);
        runtime.spawn(async move {
            signals.next().await;
            tracing::info!("stopping: finishing what was begun; a second signal stops at once");
            stop();
            signals.next().await;
            std::process::exit(Exit::Interrupted as i32);
        });
        Ok(Listening { _runtime: runtime })
    }
}

impl Signals {
    fn listen() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|source| CliError::Io { what: "listening for signals", source });
        Ok(Signals { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
