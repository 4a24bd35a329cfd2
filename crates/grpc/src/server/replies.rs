//! Replies of a stream: a few are ready, and the last word is never lost.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;

use super::call;
use crate::wire::to_status;
use landmarkdb::lock::IgnorePoison;
use landmarkdb::{MemoryError, Until};

/// Why a stream ends, if not for having said all.
type Last = Arc<Mutex<Option<Status>>>;

/// Where replies are put.
pub(super) struct Replies<T> {
    sender: mpsc::Sender<T>,
    last: Last,
}

/// Where they come out. A stream whose work failed ends with the error, however slow its reader is: it is never taken for
/// one that is whole.
pub(super) struct ReplyStream<T> {
    receiver: mpsc::Receiver<T>,
    last: Last,
}

/// Holds at most so many replies ready.
pub(super) fn replies<T>(ready_max: usize) -> (Replies<T>, ReplyStream<T>) {
    let (sender, receiver) = mpsc::channel(ready_max);
    let last = Last::default();
    (Replies { sender, last: last.clone() }, ReplyStream { receiver, last })
}

impl<T> Replies<T> {
    /// Whether the reply found room before the reader left or its time was over, which ends the stream.
    pub(super) async fn send(&self, reply: T, until: &Until) -> bool {
        match call::within(until, self.sender.send(reply)).await {
            Ok(sent) => sent.is_ok(),
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Room for one reply; none where the reader has left.
    pub(super) async fn reserve(&self) -> Option<mpsc::OwnedPermit<T>> {
        self.sender.clone().reserve_owned().await.ok()
    }

    /// A reply that may be left out.
    pub(super) fn offer(&self, reply: T) {
        // A full channel is a slow reader: it will see a later one.
        let _ = self.sender.try_send(reply);
    }

    /// Ends the stream with this behind the replies that are ready.
    pub(super) fn fail(&self, error: &MemoryError) {
        self.end(to_status(error));
    }

    pub(super) fn end(&self, status: Status) {
        self.last.lock().ignore_poison().get_or_insert(status);
    }
}

impl<T> Clone for Replies<T> {
    fn clone(&self) -> Self {
        Replies { sender: self.sender.clone(), last: self.last.clone() }
    }
}

impl<T> Stream for ReplyStream<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(match ready!(self.receiver.poll_recv(cx)) {
            Some(reply) => Some(Ok(reply)),
            None => self.last.lock().ignore_poison().take().map(Err),
        })
    }
}
