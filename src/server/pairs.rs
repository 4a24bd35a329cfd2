//! Streams of paired requests and replies: many lookups, or many attends, over one call.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::work::{Deadline, Line, Work, stopping};
use crate::api::{AttendRequest, BlockMemory, LookupRequest, MemoryError, Result};
use crate::wire::{to_status, v1};

/// Requests of one stream that are worked on or answered but unread; the next is not taken off the network until
/// one of them is gone.
const IN_FLIGHT_MAX: usize = 64;

/// One request of a stream and how it is answered.
pub(super) trait Paired: Sized + Send + 'static {
    type Request: Send + 'static;
    type Reply: Send + 'static;

    /// The id, until when, and the request if it can be read.
    fn open(self) -> (u64, Deadline, Result<Self::Request>);

    fn ask(memory: &dyn BlockMemory, request: &Self::Request) -> Result<Self::Reply>;

    type Message: Send + 'static;

    fn close(id: u64, outcome: Result<Self::Reply>) -> Self::Message;
}

/// Works on `requests` as they come and answers as they finish, until the caller or the service stops.
pub(super) fn answer_all<P: Paired>(
    work: Work,
    mut requests: Streaming<P>,
) -> ReceiverStream<std::result::Result<P::Message, Status>> {
    let (replies, receiver) = mpsc::channel(IN_FLIGHT_MAX);
    tokio::spawn(async move {
        loop {
            let next = tokio::select! {
                biased;
                () = work.stopped() => Err(to_status(&stopping())),
                next = requests.message() => next,
            };
            // A place in the channel is taken before the work begins, which is what bounds the work in flight.
            let Ok(place) = replies.clone().reserve_owned().await else { return };
            match next {
                Ok(None) => return,
                Ok(Some(request)) => {
                    // Opened here and not in its task, so that time counts from when it came.
                    let (id, deadline, request) = request.open();
                    let work = work.clone();
                    let answer = move |outcome| drop(place.send(Ok(P::close(id, outcome))));
                    tokio::spawn(async move {
                        match request {
                            Err(error) => answer(Err(error)),
                            Ok(request) => {
                                let ask = move |memory: &dyn BlockMemory| P::ask(memory, &request);
                                work.hand_over(Line::Serving, deadline, ask, answer).await;
                            }
                        }
                    });
                }
                Err(status) => {
                    // Behind this error the stream is over, so the answers in flight go first.
                    let _ = replies.reserve_many(IN_FLIGHT_MAX - 1).await;
                    place.send(Err(status));
                    return;
                }
            }
        }
    });
    receiver.into()
}

impl Paired for v1::LookupStreamRequest {
    type Request = LookupRequest;
    type Reply = v1::LookupReply;
    type Message = v1::LookupStreamReply;

    fn open(self) -> (u64, Deadline, Result<LookupRequest>) {
        (
            self.id,
            Deadline::of_ms(self.timeout_ms),
            self.request.ok_or_else(no_request).and_then(LookupRequest::try_from),
        )
    }

    fn ask(memory: &dyn BlockMemory, request: &LookupRequest) -> Result<v1::LookupReply> {
        memory.lookup(request).map(v1::LookupReply::from)
    }

    fn close(id: u64, outcome: Result<v1::LookupReply>) -> v1::LookupStreamReply {
        use v1::lookup_stream_reply::Outcome;
        let outcome = outcome.map_or_else(|error| Outcome::Error((&error).into()), Outcome::Reply);
        v1::LookupStreamReply { id, outcome: Some(outcome) }
    }
}

impl Paired for v1::AttendStreamRequest {
    type Request = AttendRequest;
    type Reply = v1::AttendReply;
    type Message = v1::AttendStreamReply;

    fn open(self) -> (u64, Deadline, Result<AttendRequest>) {
        (
            self.id,
            Deadline::of_ms(self.timeout_ms),
            self.request.ok_or_else(no_request).and_then(AttendRequest::try_from),
        )
    }

    fn ask(memory: &dyn BlockMemory, request: &AttendRequest) -> Result<v1::AttendReply> {
        memory.attend(request).map(v1::AttendReply::from)
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
