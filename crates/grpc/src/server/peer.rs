//! Who is at the other end of a connection? What it has left undone, and for how long.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::options::ServeOptions;
use landmarkdb::lock::IgnorePoison;

/// Who is at the other end, and what it does.
#[derive(Debug)]
pub(super) struct Peer {
    since: Instant,
    pub(super) has_greeted: AtomicBool,
    calls: AtomicU64,
    open_streams: AtomicUsize,
    /// Of those, how many have nothing to do: their last request is answered, and no other has come.
    resting_streams: AtomicUsize,
    /// When a stream was last closed or came to rest, or a byte of a message came.
    idle_since: Mutex<Instant>,
    /// Streams that were handed something to read which they have not read, since when.
    unread: Mutex<HashMap<u64, Instant>>,
    /// Since when the socket takes nothing.
    stuck_since: Mutex<Option<Instant>>,
    pub(super) has_to_go: Notify,
}

/// A stream that counts as open.
pub(super) struct OpenStream {
    number: u64,
    peer: Arc<Peer>,
}

impl Peer {
    pub(super) fn new() -> Arc<Peer> {
        let now = Instant::now();
        Arc::new(Peer {
            since: now,
            has_greeted: AtomicBool::new(false),
            calls: AtomicU64::new(0),
            open_streams: AtomicUsize::new(0),
            resting_streams: AtomicUsize::new(0),
            idle_since: Mutex::new(now),
            unread: Mutex::default(),
            stuck_since: Mutex::default(),
            has_to_go: Notify::new(),
        })
    }

    pub(super) fn open(self: &Arc<Self>) -> OpenStream {
        self.open_streams.fetch_add(1, Ordering::Relaxed);
        OpenStream { number: self.calls.fetch_add(1, Ordering::Relaxed), peer: self.clone() }
    }

    /// A stream was handed something to read.
    pub(super) fn should_read(&self, stream: &OpenStream) {
        self.unread.lock().ignore_poison().insert(stream.number, Instant::now());
    }

    /// And has read it.
    pub(super) fn has_read(&self, stream: &OpenStream) {
        self.unread.lock().ignore_poison().remove(&stream.number);
    }

    /// An open stream has nothing to do.
    pub(super) fn rest(self: &Arc<Self>) -> Resting {
        self.moved();
        self.resting_streams.fetch_add(1, Ordering::Relaxed);
        Resting(self.clone())
    }

    /// Something happened.
    pub(super) fn moved(&self) {
        *self.idle_since.lock().ignore_poison() = Instant::now();
    }

    /// The order in which connections make room, and since when it is idle: first those that never asked anything, then those
    /// without an open stream, then those whose streams have had nothing to do for `patience`. `None` for one that works.
    pub(super) fn idleness(&self, patience: Duration) -> Option<(u8, Instant)> {
        let since = *self.idle_since.lock().ignore_poison();
        match self.open_streams.load(Ordering::Relaxed) {
            0 => Some(((self.calls.load(Ordering::Relaxed) > 0) as u8, since)),
            open => {
                let rests = self.resting_streams.load(Ordering::Relaxed) >= open && since.elapsed() > patience;
                rests.then_some((2, since))
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.open_streams.load(Ordering::Relaxed) == 0
    }

    pub(super) fn idle_for(&self) -> Option<Duration> {
        self.is_idle().then(|| self.idle_since.lock().ignore_poison().elapsed())
    }

    /// Why the connection should end, if it should.
    pub(super) fn fault(&self, options: &ServeOptions) -> Option<&'static str> {
        let waits = |since: Option<Instant>| since.is_some_and(|since| since.elapsed() > options.stall);
        if !self.has_greeted.load(Ordering::Relaxed) && self.since.elapsed() > options.handshake {
            return Some("it said nothing");
        }
        if self.idle_for().is_some_and(|idle| idle > options.idle) {
            return Some("it asked nothing");
        }
        if waits(*self.stuck_since.lock().ignore_poison())
            || waits(self.unread.lock().ignore_poison().values().min().copied())
        {
            return Some("it does not read its replies");
        }
        None
    }

    pub(super) fn wrote(&self, is_stuck: bool) {
        let mut stuck_since = self.stuck_since.lock().ignore_poison();
        *stuck_since = is_stuck.then(|| stuck_since.unwrap_or_else(Instant::now));
    }
}

/// A stream that rests, as long as it does.
pub(super) struct Resting(Arc<Peer>);

impl Drop for Resting {
    fn drop(&mut self) {
        self.0.resting_streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.peer.unread.lock().ignore_poison().remove(&self.number);
        self.peer.moved();
        self.peer.open_streams.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_to_greet_to_ask_and_to_read() {
        let options = ServeOptions { stall: Duration::ZERO, ..ServeOptions::default() };
        let peer = Peer::new();
        assert_eq!(peer.fault(&options), None);
        let at_once = ServeOptions { handshake: Duration::ZERO, ..options.clone() };
        assert_eq!(peer.fault(&at_once), Some("it said nothing"));
        peer.has_greeted.store(true, Ordering::Relaxed);
        assert_eq!(peer.fault(&at_once), None);
        let hasty = ServeOptions { idle: Duration::ZERO, ..options.clone() };
        assert_eq!(peer.fault(&hasty), Some("it asked nothing"));
        let stream = peer.open();
        assert_eq!(peer.fault(&hasty), None);
        peer.should_read(&stream);
        assert_eq!(peer.fault(&options), Some("it does not read its replies"));
        peer.has_read(&stream);
        assert_eq!(peer.fault(&options), None);
        peer.wrote(true);
        assert_eq!(peer.fault(&options), Some("it does not read its replies"));
        peer.wrote(false);
        assert_eq!(peer.fault(&options), None);
    }
}
