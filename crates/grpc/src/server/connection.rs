//! When is a connection at its end? It has to say something, to go on with what it began, and to read what it asked for;
//! and where there are too many, the ones that do nothing make room.

use std::collections::HashMap;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tonic::service::Routes;
use tower_service::Service;

use super::arriving::Arriving;
use super::call::Call;
use super::leaving::{self, Leaving};
use super::options::ServeOptions;
use super::peer::Peer;
use super::phase::Phase;
use crate::wire::bounds;
use landmarkdb::budget::Budget;
use landmarkdb::lock::IgnorePoison;

/// What a stream and a connection may send before they are read: a message of any size is read as it comes, so this bounds
/// only what is not asked for. At 20 ms of distance it lets 50 MB pass in a second.
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
            shared.peers.lock().ignore_poison().remove(&number);
            drop(alive);
        });
    }

    /// A place for one more connection. When all are taken the one that [`Peer::idleness`] names first is closed; `None` when
    /// all are busy.
    fn enter(&self) -> Option<(u64, Arc<Peer>)> {
        let mut peers = self.peers.lock().ignore_poison();
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
        // Health and reflection never have an answer that takes time.
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
        let here =
            |peer: &Arc<Peer>| shared.peers.lock().ignore_poison().values().any(|other| Arc::ptr_eq(peer, other));
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
        let here =
            |peer: &Arc<Peer>| shared.peers.lock().ignore_poison().values().any(|other| Arc::ptr_eq(peer, other));
        assert!(!here(&resting) && here(&working));
    }
}
