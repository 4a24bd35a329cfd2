//! When is a connection at its end? It has to say something, to go on with what it began, and to read what it asked for;
//! and where there are too many, the ones that do nothing make room.

use std::collections::HashMap;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, watch};
use tonic::service::Routes;
use tower_service::Service;

use super::arriving::Arriving;
use super::call::Call;
use super::leaving::{self, Leaving};
use super::serve::{Phase, ServeOptions};
use crate::wire::bounds;
use landmarkdb::budget::Budget;

/// What a stream and a connection may send before they are read: a message of any size is read as it comes, so this bounds
/// only what nobody asks for. At 20 ms of distance it lets 50 MB pass in a second.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;

/// A block of megabytes in frames of the default 16 KiB is hundreds of headers.
const FRAME_BYTES: u32 = 1 << 20;

/// Headers of a request: a path, a timeout, and what tracing tools add.
const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;

/// The client's greeting and the header of its first frame.
const GREETING_BYTES: u64 = 24 + 9;

/// How long a connection without calls may take to read that the service stops.
const FAREWELL: Duration = Duration::from_millis(500);

/// What all connections share.
pub(super) struct Shared {
    pub(super) routes: Routes,
    pub(super) messages: Arc<Budget>,
    pub(super) options: ServeOptions,
    pub(super) phase: watch::Receiver<Phase>,
    peers: Mutex<HashMap<u64, Arc<Peer>>>,
    next_peer: AtomicU64,
}

/// Who is at the other end, and what it does.
#[derive(Debug)]
pub(super) struct Peer {
    since: Instant,
    has_greeted: AtomicBool,
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
    has_to_go: Notify,
}

/// A stream that counts as open.
pub(super) struct OpenStream {
    number: u64,
    peer: Arc<Peer>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No change is left half done by a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peer {
    fn new() -> Arc<Peer> {
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

    fn open(self: &Arc<Self>) -> OpenStream {
        self.open_streams.fetch_add(1, Ordering::Relaxed);
        OpenStream { number: self.calls.fetch_add(1, Ordering::Relaxed), peer: self.clone() }
    }

    /// A stream was handed something to read.
    pub(super) fn should_read(&self, stream: &OpenStream) {
        lock(&self.unread).insert(stream.number, Instant::now());
    }

    /// And has read it.
    pub(super) fn has_read(&self, stream: &OpenStream) {
        lock(&self.unread).remove(&stream.number);
    }

    /// An open stream has nothing to do.
    pub(super) fn rest(self: &Arc<Self>) -> Resting {
        self.moved();
        self.resting_streams.fetch_add(1, Ordering::Relaxed);
        Resting(self.clone())
    }

    /// Something happened.
    pub(super) fn moved(&self) {
        *lock(&self.idle_since) = Instant::now();
    }

    /// In which order connections make room, and since when: who never asked anything, who has no stream open, whose streams
    /// have all had nothing to do for `patience`. `None` for one that works.
    fn idleness(&self, patience: Duration) -> Option<(u8, Instant)> {
        let since = *lock(&self.idle_since);
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

    fn idle_for(&self) -> Option<Duration> {
        self.is_idle().then(|| lock(&self.idle_since).elapsed())
    }

    /// Why the connection should end, if it should.
    fn fault(&self, options: &ServeOptions) -> Option<&'static str> {
        let waits = |since: Option<Instant>| since.is_some_and(|since| since.elapsed() > options.stall);
        if !self.has_greeted.load(Ordering::Relaxed) && self.since.elapsed() > options.handshake {
            return Some("it said nothing");
        }
        if self.idle_for().is_some_and(|idle| idle > options.idle) {
            return Some("it asked nothing");
        }
        if waits(*lock(&self.stuck_since)) || waits(lock(&self.unread).values().min().copied()) {
            return Some("it does not read its replies");
        }
        None
    }

    fn wrote(&self, is_stuck: bool) {
        let mut stuck_since = lock(&self.stuck_since);
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
        lock(&self.peer.unread).remove(&self.number);
        self.peer.moved();
        self.peer.open_streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    pub(super) fn new(
        routes: Routes,
        messages: Arc<Budget>,
        options: ServeOptions,
        phase: watch::Receiver<Phase>,
    ) -> Arc<Shared> {
        Arc::new(Shared { routes, messages, options, phase, peers: Mutex::default(), next_peer: AtomicU64::new(0) })
    }

    /// Serves a connection until either side ends it, in a task of its own that holds `alive`.
    pub(super) fn admit<S>(self: &Arc<Self>, socket: S, alive: tokio::sync::mpsc::Sender<()>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Some((number, peer)) = self.enter() else { return };
        let shared = self.clone();
        tokio::spawn(async move {
            shared.run(socket, &peer).await;
            lock(&shared.peers).remove(&number);
            drop(alive);
        });
    }

    /// A place for one more. Where all are taken, who never asked anything goes first, then who has asked nothing for the
    /// longest time, then whose streams have; where all are busy there is none.
    fn enter(&self) -> Option<(u64, Arc<Peer>)> {
        let mut peers = lock(&self.peers);
        if peers.len() >= self.options.connections {
            let idle = peers.iter().filter_map(|(&number, peer)| Some((peer.idleness(self.options.stall)?, number)));
            let Some((_, leaving)) = idle.min() else {
                tracing::warn!(connections = peers.len(), "all connections are busy: one more was refused");
                return None;
            };
            if let Some(peer) = peers.remove(&leaving) {
                tracing::debug!("an idle connection made room");
                peer.has_to_go.notify_one();
            }
        }
        let (number, peer) = (self.next_peer.fetch_add(1, Ordering::Relaxed), Peer::new());
        peers.insert(number, peer.clone());
        Some((number, peer))
    }

    async fn run<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self: &Arc<Self>, socket: S, peer: &Arc<Peer>) {
        let mut phase = self.phase.clone();
        let calls = Calls { shared: self.clone(), peer: peer.clone() };
        let socket = TokioIo::new(Watched { socket, peer: peer.clone(), read_bytes: 0 });
        let mut connection = pin!(self.protocol().serve_connection(socket, calls));
        let mut look = tokio::time::interval(self.options.look());
        let mut farewell = None;
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection failed");
                    }
                    return;
                }
                () = peer.has_to_go.notified() => return,
                // An error means that the service itself is gone.
                changed = phase.changed(), if farewell.is_none() || *phase.borrow() != Phase::Over => {
                    if changed.is_err() || *phase.borrow() == Phase::Over {
                        return;
                    }
                    farewell.get_or_insert_with(Instant::now);
                    connection.as_mut().graceful_shutdown();
                }
                _ = look.tick() => {
                    if let Some(why) = peer.fault(&self.options) {
                        tracing::debug!(why, "a connection was ended");
                        return;
                    }
                }
            }
            let said = farewell.map(|farewell| farewell.elapsed());
            if said.zip(peer.idle_for()).is_some_and(|(said, idle)| said.min(idle) > FAREWELL) {
                return;
            }
        }
    }

    fn protocol(&self) -> http2::Builder<TokioExecutor> {
        let mut protocol = http2::Builder::new(TokioExecutor::new());
        protocol
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_header_list_size(HEADER_LIST_BYTES_MAX)
            .max_send_buf_size(leaving::PART_BYTES)
            .max_concurrent_streams(self.options.streams)
            .keep_alive_interval(self.options.keepalive)
            .keep_alive_timeout(self.options.keepalive);
        protocol
    }
}

/// What is done with the requests of a connection.
struct Calls {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
}

impl hyper::service::Service<http::Request<Incoming>> for Calls {
    type Response = http::Response<Leaving>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn call(&self, request: http::Request<Incoming>) -> Self::Future {
        let (stream, call) = (self.peer.open(), Call::from(self.peer.clone()));
        let open = call.open();
        let (mut parts, body) = request.into_parts();
        // Health and reflection owe nobody an answer that takes time.
        let resting = (!parts.uri.path().starts_with("/landmark.")).then(|| self.peer.rest());
        parts.extensions.insert(call.clone());
        let (messages, peer) = (self.shared.messages.clone(), self.peer.clone());
        let body = Arriving::new(body, bounds(parts.uri.path()), call, messages.clone(), self.shared.options.stall);
        let reply = self.shared.routes.clone().call(http::Request::from_parts(parts, body));
        Box::pin(async move {
            let reply = reply.await?;
            Ok(reply.map(|body| Leaving::new(body, messages, peer, stream, (open, resting))))
        })
    }
}

/// A socket that tells whether its peer says and reads something.
struct Watched<S> {
    socket: S,
    peer: Arc<Peer>,
    /// Counted up to the greeting.
    read_bytes: u64,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, into);
        if self.read_bytes < GREETING_BYTES {
            self.read_bytes += (into.filled().len() - before) as u64;
            self.peer.has_greeted.store(self.read_bytes >= GREETING_BYTES, Ordering::Relaxed);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.peer.wrote(wrote.is_pending());
        wrote
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.socket).poll_write_vectored(cx, bytes);
        self.peer.wrote(wrote.is_pending());
        wrote
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(connections: usize) -> Arc<Shared> {
        let (_, phase) = watch::channel(Phase::Serving);
        let options = ServeOptions { connections, ..ServeOptions::default() };
        Shared::new(Routes::default(), Budget::new(1), options, phase)
    }

    #[test]
    fn who_does_nothing_makes_room_and_who_works_does_not() {
        let shared = shared(3);
        let [(_, silent), (_, asked), (_, busy)] = [(); 3].map(|()| shared.enter().unwrap());
        drop(asked.open());
        let _open = busy.open();
        let here = |peer: &Arc<Peer>| lock(&shared.peers).values().any(|other| Arc::ptr_eq(peer, other));
        let (_, fourth) = shared.enter().unwrap();
        assert!(!here(&silent) && here(&asked) && here(&busy) && here(&fourth), "who never asked goes first");
        let _open = fourth.open();
        let (_, fifth) = shared.enter().unwrap();
        assert!(!here(&asked) && here(&busy) && here(&fourth));
        let _open = fifth.open();
        assert!(shared.enter().is_none(), "all are busy");
    }

    /// 512 streams that had been answered once and asked nothing more shut everybody else out (found by an attack).
    #[test]
    fn a_stream_that_rests_makes_room_last() {
        let (_, phase) = watch::channel(Phase::Serving);
        let options = ServeOptions { connections: 2, stall: Duration::from_millis(20), ..ServeOptions::default() };
        let shared = Shared::new(Routes::default(), Budget::new(1), options, phase);
        let [(_, resting), (_, working)] = [(); 2].map(|()| shared.enter().unwrap());
        let (_open, _too) = (resting.open(), working.open());
        let _rest = resting.rest();
        assert!(shared.enter().is_none(), "it may ask again in a moment");
        std::thread::sleep(Duration::from_millis(30));
        resting.moved();
        assert!(shared.enter().is_none(), "a message is on its way");
        std::thread::sleep(Duration::from_millis(30));
        assert!(shared.enter().is_some());
        let here = |peer: &Arc<Peer>| lock(&shared.peers).values().any(|other| Arc::ptr_eq(peer, other));
        assert!(!here(&resting) && here(&working));
    }

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
