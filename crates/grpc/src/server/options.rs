//! How the service uses its machine, and how patient it is.

use std::time::Duration;

use landmarkdb::limits;

/// How the service uses its machine, and how patient it is. docs/cli.md names the settings.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Light calls that work on the memory at once, at most 128, half as many heavy ones, and as many writers; others wait in
    /// line, within their deadline.
    pub workers: usize,
    /// Bytes of all messages that have arrived and are not answered yet; the largest may have three quarters of it.
    pub message_bytes: u64,
    /// Connections at once. Where there are more, idle ones are closed.
    pub connections: usize,
    /// Calls of one connection at once.
    pub streams: u32,
    /// How long a new connection may say nothing.
    pub handshake: Duration,
    /// How long a connection may have no call.
    pub idle: Duration,
    /// How long the next byte of a message that was begun may take, and reading the next part of a reply.
    pub stall: Duration,
    /// How often a silent peer is asked whether it is still there, and how long it may take to say so.
    pub keepalive: Duration,
    /// How long calls in flight may go on after the shutdown signal.
    pub grace: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        // Lookups are bound by the processor, fetches by the disk: twice the cores keeps both busy.
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        ServeOptions {
            workers: (2 * cores).max(4),
            // The largest block fits into three quarters of it.
            message_bytes: limits::MESSAGE_BYTES_MAX as u64 / 2 * 3,
            connections: 512,
            streams: 128,
            handshake: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            stall: Duration::from_secs(30),
            keepalive: Duration::from_secs(20),
            grace: Duration::from_secs(30),
        }
    }
}

impl ServeOptions {
    /// How often connections are looked at.
    pub(super) fn look(&self) -> Duration {
        let least = self.handshake.min(self.idle).min(self.stall);
        (least / 4).clamp(Duration::from_millis(5), Duration::from_millis(500))
    }
}
