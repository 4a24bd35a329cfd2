//! How do messages come in? Their bytes are taken from the budget as they arrive, and a message is let through when it is
//! whole: what a header announces is not believed before.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};
use tonic::Status;

use super::call::{Call, no_memory};
use crate::wire::{Bounds, Chunks, to_status};
use landmarkdb::MemoryError;
use landmarkdb::budget::{Budget, Taken};

/// In front of every message: whether it is compressed, and how long it is.
const HEADER_BYTES: usize = 5;

/// What any message takes beside its own bytes.
const MESSAGE_PRICE: u64 = 1024;

/// The body of a request.
pub(super) struct Arriving {
    body: Incoming,
    bounds: &'static Bounds,
    call: Call,
    unfinished: Unfinished,
    /// Of whole messages.
    ready: Chunks,
    /// How long the next byte of a message may take; the first message of a call is due at once, and the end behind the only
    /// one.
    patience: Duration,
    due: Option<Pin<Box<Sleep>>>,
    has_begun: bool,
}

/// A message that is not whole yet, and what has come of the next ones.
struct Unfinished {
    chunks: Chunks,
    bytes: usize,
    budget: Arc<Budget>,
    taken: Option<Taken>,
}

impl Arriving {
    pub(super) fn new(
        body: Incoming,
        bounds: &'static Bounds,
        call: Call,
        budget: Arc<Budget>,
        patience: Duration,
    ) -> Self {
        let unfinished = Unfinished { chunks: Chunks::new(), bytes: 0, budget, taken: None };
        Arriving { body, bounds, call, unfinished, ready: Chunks::new(), patience, due: None, has_begun: false }
    }

    /// Lets the next message through if it is whole.
    fn finish_one(&mut self) -> Result<bool, MemoryError> {
        let Some(length) = self.unfinished.length() else { return Ok(false) };
        let limit = self.bounds.bytes_max;
        if length > limit {
            let what = "bytes of a message".into();
            return Err(MemoryError::LimitExceeded { what, limit: limit as u64, found: length as u64 });
        }
        let Some((message, mut taken)) = self.unfinished.cut(HEADER_BYTES + length) else { return Ok(false) };
        let price = self.bounds.price(&without_header(&message))? + MESSAGE_PRICE;
        taken.grow(price).map_err(|short| no_memory(short, taken.bytes() + price))?;
        self.call.hold(taken);
        self.ready = message;
        self.has_begun = true;
        Ok(true)
    }

    /// What a body fails with that lets its reader wait inside of a message.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        if self.has_begun && self.unfinished.bytes == 0 && self.bounds.is_of_stream {
            self.due = None;
            return Poll::Pending;
        }
        let patience = self.patience;
        let due = self.due.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(due.as_mut().poll(cx));
        Poll::Ready(to_status(&MemoryError::DeadlineExceeded { ms: patience.as_millis() as u64 }))
    }
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(chunk) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            match this.finish_one() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => return Poll::Ready(Some(Err(to_status(&error)))),
            }
            let frame = match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(Status::from_error(error.into())))),
                Poll::Ready(None) if this.unfinished.bytes > 0 => {
                    return Poll::Ready(Some(Err(Status::invalid_argument("the last message is not whole"))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return this.poll_due(cx).map(|late| Some(Err(late))),
            };
            match frame.into_data() {
                Ok(data) => {
                    this.call.moved();
                    if let Err(error) = this.unfinished.push(data) {
                        return Poll::Ready(Some(Err(to_status(&error))));
                    }
                    if let Some(due) = &mut this.due {
                        due.as_mut().reset(Instant::now() + this.patience);
                    }
                }
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && self.unfinished.bytes == 0 && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Unfinished {
    fn push(&mut self, data: Bytes) -> Result<(), MemoryError> {
        let more = data.len() as u64;
        let found = self.bytes as u64 + more;
        match &mut self.taken {
            Some(taken) => taken.grow(more).map_err(|short| no_memory(short, found))?,
            none => *none = Some(self.budget.try_take(more).map_err(|short| no_memory(short, found))?),
        }
        self.bytes += data.len();
        self.chunks.push_back(data);
        Ok(())
    }

    /// What the header says, once it is there.
    fn length(&self) -> Option<usize> {
        let mut header = self.chunks.iter().flatten().copied();
        let _compressed = header.next()?;
        let length = [header.next()?, header.next()?, header.next()?, header.next()?];
        Some(u32::from_be_bytes(length) as usize)
    }

    /// The first so many bytes, with what was taken for them, once they are there.
    fn cut(&mut self, bytes: usize) -> Option<(Chunks, Taken)> {
        let rest = self.bytes.checked_sub(bytes)?;
        let mut taken = self.taken.take()?;
        if rest > 0 {
            self.taken = Some(taken.split(rest as u64));
        }
        let (mut message, mut left) = (Chunks::new(), bytes);
        while left > 0 {
            let chunk = self.chunks.front_mut()?;
            if chunk.len() > left {
                message.push_back(chunk.split_to(left));
                break;
            }
            left -= chunk.len();
            message.extend(self.chunks.pop_front());
        }
        self.bytes = rest;
        Some((message, taken))
    }
}

/// The same bytes behind the header.
fn without_header(message: &Chunks) -> Chunks {
    let (mut message, mut left) = (message.clone(), HEADER_BYTES);
    for chunk in &mut message {
        let here = left.min(chunk.len());
        chunk.advance(here);
        left -= here;
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_out_of_what_arrived_with_what_was_taken_for_them() {
        let budget = Budget::new(6400);
        let mut unfinished = Unfinished { chunks: Chunks::new(), bytes: 0, budget: budget.clone(), taken: None };
        let bytes = [&[0u8, 0, 0, 0, 3, 7, 8, 9][..], &[0, 0, 0, 0, 0], &[0, 0, 0, 1, 0]].concat();
        for cut in [1, 2, 7, 18] {
            for chunk in bytes.chunks(cut) {
                unfinished.push(Bytes::copy_from_slice(chunk)).unwrap();
            }
            for expected in [&[7u8, 8, 9][..], &[]] {
                let length = unfinished.length().unwrap();
                let (message, taken) = unfinished.cut(HEADER_BYTES + length).unwrap();
                assert_eq!(taken.bytes() as usize, HEADER_BYTES + expected.len());
                let inside: Vec<u8> = without_header(&message).into_iter().flatten().collect();
                assert_eq!(inside, expected, "in chunks of {cut}");
            }
            assert_eq!((unfinished.length(), unfinished.bytes, budget.taken()), (Some(256), 5, 5));
            assert!(unfinished.cut(HEADER_BYTES + 256).is_none(), "it is not whole");
            unfinished = Unfinished { chunks: Chunks::new(), bytes: 0, budget: budget.clone(), taken: None };
        }
        assert_eq!(budget.taken(), 0);
    }
}
