//! One HTTP/2 connection that all calls share, and the small runtime that drives it.

use std::error::Error;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use landmarkdb::limits;
use landmarkdb::{MemoryError, Result};

/// A reply of megabytes arrives without waiting for window updates; a connection holds a few of them.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// How patient a client is.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// How long a call may take, repetitions included. For calls that move many messages (append, fetch, listings,
    /// verify): how long the next message may take.
    pub deadline: Duration,
    /// How long connecting may take, the first answer included.
    pub connect_timeout: Duration,
    /// How often a silent service is asked whether it is still there while calls wait for it, and how long it may take to
    /// say so. Without an answer they are made again over a new connection.
    pub keepalive: Duration,
    /// How often a call that may be repeated is tried in all while the service is unavailable, at least 1.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles from there, and is shortened at random by up to half.
    pub backoff: Duration,
    /// An append of more payload than this goes in several batches, each durable by itself.
    pub append_bytes: usize,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            deadline: Duration::from_secs(120),
            connect_timeout: Duration::from_secs(5),
            keepalive: Duration::from_secs(20),
            attempts: 5,
            backoff: Duration::from_millis(50),
            append_bytes: 64 << 20,
        }
    }
}

/// A connection. It is made anew by itself when it breaks.
pub(super) struct Connection {
    pub(super) channel: Channel,
    /// Taken only by `drop`.
    runtime: Option<Runtime>,
    pub(super) target: String,
}

impl Connection {
    pub(super) fn open(target: &str, options: &ClientOptions) -> Result<Self> {
        let endpoint = endpoint(target)?
            .connect_timeout(options.connect_timeout)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .tcp_keepalive(Some(options.keepalive))
            .http2_keep_alive_interval(options.keepalive)
            .keep_alive_timeout(options.keepalive);
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("landmark-client")
            .enable_all()
            .build()
            .map_err(|error| MemoryError::Internal { detail: format!("no thread for the client: {error}") })?;
        let unavailable = |detail| MemoryError::Unavailable { target: target.into(), detail };
        let connected =
            runtime.block_on(async { tokio::time::timeout(options.connect_timeout, connect(endpoint)).await });
        let late = |_| unavailable(format!("no answer within {} ms", options.connect_timeout.as_millis()));
        let channel = connected.map_err(late)?.map_err(unavailable)?;
        Ok(Connection { channel, runtime: Some(runtime), target: target.into() })
    }

    /// Waits for `future` on this thread.
    ///
    /// # Panics
    /// On a worker thread of a tokio runtime, which must not wait (`tokio::task::spawn_blocking` gives one that may).
    pub(super) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        match &self.runtime {
            Some(runtime) => runtime.block_on(future),
            None => unreachable!("the runtime goes only with the connection"),
        }
    }
}

/// A connection to a service that answers: being accepted does not prove it.
async fn connect(endpoint: Endpoint) -> std::result::Result<Channel, String> {
    let cause = |error: &dyn Error| error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let channel = endpoint.connect().await.map_err(|error| cause(&error))?;
    match HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await {
        // Any reply is an answer. An error with a source was made on this side.
        Err(status) if status.source().is_some() => Err(cause(&status)),
        _ => Ok(channel),
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Unlike its own drop this may be called from anywhere, workers of other runtimes included.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// `unix:/path`, `http://host:port` or `host:port`.
fn endpoint(target: &str) -> Result<Endpoint> {
    let invalid = || MemoryError::Invalid {
        field: "target".into(),
        expected: "host:port, http://host:port or unix:/path".into(),
        found: target.chars().take(limits::NAME_BYTES_MAX).collect(),
    };
    let address = match target.split_once("://") {
        Some(("http" | "unix", rest)) if !rest.is_empty() => target.to_string(),
        Some(_) => return Err(invalid()),
        None if target.starts_with("unix:") && target.len() > "unix:".len() => target.to_string(),
        None if target.contains(':') && !target.starts_with("unix:") => format!("http://{target}"),
        None => return Err(invalid()),
    };
    Endpoint::from_shared(address).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_taken_in_the_forms_that_people_write() {
        for target in ["127.0.0.1:7601", "[::1]:7601", "localhost:1", "http://host:80", "unix:/run/l.sock", "unix:///a"]
        {
            assert!(endpoint(target).is_ok(), "{target}");
        }
        for target in ["", "host", "https://host:1", "ftp://host:1", "unix:", "unix://", "http://", "host:port:x y"] {
            assert!(matches!(endpoint(target), Err(MemoryError::Invalid { .. })), "{target}");
        }
    }

    #[test]
    fn nobody_there_is_unavailable_and_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let target = format!("unix:{}", folder.path().join("none").display());
        let refused = Connection::open(&target, &ClientOptions::default()).map(|_| ()).unwrap_err();
        assert!(matches!(&refused, MemoryError::Unavailable { target: named, .. } if *named == target), "{refused:?}");
    }
}
