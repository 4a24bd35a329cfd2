//! Multiplexed streams: many lookups, or many attends, over one call.

use std::sync::{Arc, Mutex};

use tonic::Streaming;

use super::call::Call;
use super::peer::Resting;
use super::replies::{ReplyStream, replies};
use super::work::{Line, Ticket, Work, stopping};
use crate::wire::v1;
use landmarkdb::lock::IgnorePoison;
use landmarkdb::{AttendRequest, BlockMemory, LookupRequest, MemoryError, Result, Until};

/// Requests of one stream that are worked on or answered but unread; the next is not taken off the network until
/// one of them is gone.
const IN_FLIGHT_MAX: usize = 64;

/// One request of a stream and how it is answered.
pub(super) trait Multiplexed: Sized + Send + 'static {
    type Request: Send + 'static;
    type Reply: Send + 'static;

    /// The id, how long the caller waits, and the request if it can be read.
    fn open(self) -> (u64, u64, Result<Self::Request>);

    fn lookup(request: &Self::Request) -> &LookupRequest;

    fn ask(memory: &dyn BlockMemory, request: &Self::Request, until: &Until) -> Result<Self::Reply>;

    type Message: Send + 'static;

    fn close(id: u64, outcome: Result<Self::Reply>) -> Self::Message;
}

/// Works on `requests` as they come and answers as they finish, until the caller or the service stops.
pub(super) fn answer_all<P: Multiplexed>(
    work: Work,
    call: Call,
    mut requests: Streaming<P>,
) -> ReplyStream<P::Message> {
    let (replies, stream) = replies(IN_FLIGHT_MAX);
    let presence = Presence::new(&call);
    tokio::spawn(async move {
        loop {
            // A place among the replies is taken before a request is read, which is what bounds the work in flight.
            let next = async {
                let place = replies.reserve().await?;
                Some((place, requests.message().await))
            };
            let next = tokio::select! {
                biased;
                () = work.stopped() => return replies.fail(&stopping()),
                next = next => next,
            };
            let (place, request) = match next {
                Some((place, Ok(Some(request)))) => (place, request),
                Some((_, Err(status))) => return replies.end(status),
                Some((_, Ok(None))) | None => return,
            };
            // Opened here and not in its task, so that time counts from when it came.
            let (id, timeout_ms, request) = request.open();
            let (until, message) = (call.until_ms(timeout_ms), call.take_message());
            let owed = presence.owe();
            let answer = move |outcome| {
                drop(place.send(P::close(id, outcome)));
                drop(owed);
            };
            match request {
                Err(error) => answer(Err(error)),
                Ok(request) => {
                    let ticket = Ticket { line: Line::Light, until, message }.weighed([P::lookup(&request)]);
                    let work = work.clone();
                    tokio::spawn(async move {
                        let ask = move |memory: &dyn BlockMemory, until: &Until| P::ask(memory, &request, until);
                        work.hand_over(ticket, ask, answer).await;
                    });
                }
            }
        }
    });
    stream
}

/// Whether a stream owes an answer; while it owes none, it rests.
struct Presence {
    call: Call,
    owed: Mutex<(usize, Option<Resting>)>,
}

/// An answer that a stream owes.
struct Owed(Arc<Presence>);

impl Presence {
    fn new(call: &Call) -> Arc<Presence> {
        Arc::new(Presence { call: call.clone(), owed: Mutex::new((0, call.rest())) })
    }

    fn owe(self: &Arc<Self>) -> Owed {
        let mut owed = self.owed.lock().ignore_poison();
        *owed = (owed.0 + 1, None);
        Owed(self.clone())
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        let mut owed = self.0.owed.lock().ignore_poison();
        owed.0 -= 1;
        if owed.0 == 0 {
            owed.1 = self.0.call.rest();
        }
    }
}

impl Multiplexed for v1::LookupStreamRequest {
    type Request = LookupRequest;
    type Reply = v1::LookupReply;
    type Message = v1::LookupStreamReply;

    fn open(self) -> (u64, u64, Result<LookupRequest>) {
        (self.id, self.timeout_ms, self.request.ok_or_else(no_request).and_then(LookupRequest::try_from))
    }

    fn lookup(request: &LookupRequest) -> &LookupRequest {
        request
    }

    fn ask(memory: &dyn BlockMemory, request: &LookupRequest, until: &Until) -> Result<v1::LookupReply> {
        memory.lookup_until(request, until).map(v1::LookupReply::from)
    }

    fn close(id: u64, outcome: Result<v1::LookupReply>) -> v1::LookupStreamReply {
        use v1::lookup_stream_reply::Outcome;
        let outcome = outcome.map_or_else(|error| Outcome::Error((&error).into()), Outcome::Reply);
        v1::LookupStreamReply { id, outcome: Some(outcome) }
    }
}

impl Multiplexed for v1::AttendStreamRequest {
    type Request = AttendRequest;
    type Reply = v1::AttendReply;
    type Message = v1::AttendStreamReply;

    fn open(self) -> (u64, u64, Result<AttendRequest>) {
        (self.id, self.timeout_ms, self.request.ok_or_else(no_request).and_then(AttendRequest::try_from))
    }

    fn lookup(request: &AttendRequest) -> &LookupRequest {
        &request.lookup
    }

    fn ask(memory: &dyn BlockMemory, request: &AttendRequest, until: &Until) -> Result<v1::AttendReply> {
        memory.attend_until(request, until).map(v1::AttendReply::from)
    }

    fn close(id: u64, outcome: Result<v1::AttendReply>) -> v1::AttendStreamReply {
        use v1::attend_stream_reply::Outcome;
        let outcome = outcome.map_or_else(|error| Outcome::Error((&error).into()), Outcome::Reply);
        v1::AttendStreamReply { id, outcome: Some(outcome) }
    }
}

fn no_request() -> MemoryError {
    MemoryError::Missing { field: "request".into() }
}
