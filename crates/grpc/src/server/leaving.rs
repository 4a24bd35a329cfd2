//! How do replies go out? In small parts, so that a reader who does not read holds little, and is noticed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;

use super::call::Open;
use super::peer::{OpenStream, Peer, Resting};
use landmarkdb::budget::{Budget, Taken};

/// Bytes that are handed to the transport at once. It asks for more when these have found room in the reader's window.
pub(super) const PART_BYTES: usize = 64 << 10;

/// The body of a reply.
pub(super) struct Leaving {
    body: tonic::body::Body,
    /// Of the message under way, with what it takes while it is.
    rest: Bytes,
    taken: Option<Taken>,
    budget: Arc<Budget>,
    peer: Arc<Peer>,
    stream: OpenStream,
    _held: (Open, Option<Resting>),
}

impl Leaving {
    pub(super) fn new(
        body: tonic::body::Body,
        budget: Arc<Budget>,
        peer: Arc<Peer>,
        stream: OpenStream,
        held: (Open, Option<Resting>),
    ) -> Self {
        Leaving { body, rest: Bytes::new(), taken: None, budget, peer, stream, _held: held }
    }
}

impl Body for Leaving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        // To be asked means that what went before has found room.
        this.peer.has_read(&this.stream);
        if this.rest.is_empty() {
            this.taken = None;
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(end),
            };
            match frame.into_data() {
                Ok(data) => this.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
            if this.rest.len() > PART_BYTES {
                this.taken = Some(this.budget.owe(this.rest.len() as u64));
            }
        }
        let part = this.rest.split_to(this.rest.len().min(PART_BYTES));
        this.peer.should_read(&this.stream);
        Poll::Ready(Some(Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
