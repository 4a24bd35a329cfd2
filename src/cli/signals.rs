//! Being asked to stop.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::{CliError, Exit};

/// The two ways of asking.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Signals are caught from here on. Inside a runtime.
    pub(super) fn listen() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|source| CliError::Io { what: "listening for signals", source });
        Ok(Signals { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Ready at the first signal. The second ends the process: all that matters is durable anyway.
    pub(super) async fn shutdown(mut self) {
        self.next().await;
        tracing::info!("stopping: finishing what was begun; a second signal stops at once");
        tokio::spawn(async move {
            self.next().await;
            std::process::exit(Exit::Interrupted as i32);
        });
    }
}
