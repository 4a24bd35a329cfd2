//! Small lookups and attends over one long stream: a decode step asks once per layer, and a call of its own would spend
//! more on headers than on the question.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::retry::Patience;
use crate::wire::v1::block_memory_client::BlockMemoryClient;
use crate::wire::{from_status, v1};
use landmarkdb::lock::IgnorePoison;
use landmarkdb::{MemoryError, Result};

/// Questions that wait to be written; more callers than this wait before it.
const QUESTIONS_READY: usize = 16;

/// How long a caller waited at least whose leaving says something about the stream.
const PATIENCE_MIN: Duration = Duration::from_secs(1);

/// A question that has a stream of its own.
pub(super) trait Question: Sized + Send + 'static {
    type Answer: Send + 'static;
    type Request: Send + 'static;
    type Reply: Send + 'static;

    fn pack(self, id: u64, timeout_ms: u64) -> Self::Request;

    /// The id, and what was answered.
    fn unpack(reply: Self::Reply) -> (u64, Result<Self::Answer>);

    fn open(
        client: BlockMemoryClient<Channel>,
        requests: ReceiverStream<Self::Request>,
    ) -> impl Future<Output = std::result::Result<Response<Streaming<Self::Reply>>, Status>> + Send;
}

/// Asks questions of one kind from any number of threads, over a stream that is opened when needed.
pub(super) struct Multiplex<Q: Question> {
    client: BlockMemoryClient<Channel>,
    open: AsyncMutex<Option<OpenStream<Q>>>,
}

struct OpenStream<Q: Question> {
    requests: mpsc::Sender<Q::Request>,
    waiting: Arc<Mutex<Waiting<Q::Answer>>>,
}

/// A caller among those who wait for answers.
struct Place<A> {
    id: u64,
    since: Instant,
    answer: oneshot::Receiver<Result<A>>,
    waiting: Arc<Mutex<Waiting<A>>>,
}

/// Who waits for which answer.
struct Waiting<A> {
    next_id: u64,
    /// When the last answer came, or the stream was opened.
    heard: Instant,
    /// What hands the answers out.
    hearing: Option<AbortHandle>,
    /// None: the stream is over, and no call will be answered.
    callers: Option<HashMap<u64, oneshot::Sender<Result<A>>>>,
}

impl<Q: Question> Multiplex<Q> {
    pub(super) fn new(client: BlockMemoryClient<Channel>) -> Self {
        Multiplex { client, open: AsyncMutex::new(None) }
    }

    /// The answer to `question`, which the service drops if its turn does not come within `left`. A broken stream is
    /// `Unavailable`; the next question opens another.
    pub(super) async fn ask(&self, patience: Patience<'_>, question: Q, left: Duration) -> Result<Q::Answer> {
        let (requests, mut place) = self.enter(patience).await?;
        // 0 would mean forever.
        let timeout_ms = (left.as_millis() as u64).max(1);
        requests.send(question.pack(place.id, timeout_ms)).await.map_err(|_| patience.cut_short())?;
        (&mut place.answer).await.map_err(|_| patience.cut_short())?
    }

    /// A place among the waiting on a stream that works.
    async fn enter(&self, patience: Patience<'_>) -> Result<(mpsc::Sender<Q::Request>, Place<Q::Answer>)> {
        let mut open = self.open.lock().await;
        loop {
            if let Some(stream) = &*open
                && let Some(place) = Place::enter(&stream.waiting)
            {
                return Ok((stream.requests.clone(), place));
            }
            let (requests, receiver) = mpsc::channel(QUESTIONS_READY);
            let opened = Q::open(self.client.clone(), receiver.into()).await;
            let replies = opened.map_err(|status| patience.error(&status))?.into_inner();
            let callers = Some(HashMap::new());
            let waiting = Arc::new(Mutex::new(Waiting { next_id: 0, heard: Instant::now(), hearing: None, callers }));
            let hearing = tokio::spawn(hand_out::<Q>(replies, waiting.clone(), patience.target.to_string()));
            waiting.lock().ignore_poison().hearing = Some(hearing.abort_handle());
            *open = Some(OpenStream { requests, waiting });
        }
    }
}

/// Gives each answer to its caller until the stream ends; then tells the rest why.
async fn hand_out<Q: Question>(
    mut replies: Streaming<Q::Reply>,
    waiting: Arc<Mutex<Waiting<Q::Answer>>>,
    target: String,
) {
    let end = loop {
        match replies.message().await {
            Ok(Some(reply)) => {
                let (id, answer) = Q::unpack(reply);
                let caller = waiting.lock().ignore_poison().hear(id);
                if let Some(caller) = caller {
                    // The caller timed out; drop the reply.
                    let _ = caller.send(answer);
                }
            }
            Ok(None) => break MemoryError::Unavailable { target, detail: "the stream ended".into() },
            // The deadline is not the stream's business, so none is named.
            Err(status) => break from_status(&status, &target, 0),
        }
    };
    let callers = waiting.lock().ignore_poison().callers.take();
    for caller in callers.into_iter().flatten().map(|(_, caller)| caller) {
        let _ = caller.send(Err(end.clone()));
    }
}

impl<A> Waiting<A> {
    /// Who waits for the answer that came.
    fn hear(&mut self, id: u64) -> Option<oneshot::Sender<Result<A>>> {
        self.heard = Instant::now();
        self.callers.as_mut()?.remove(&id)
    }
}

impl<A> Place<A> {
    fn enter(waiting: &Arc<Mutex<Waiting<A>>>) -> Option<Place<A>> {
        let (caller, answer) = oneshot::channel();
        let mut now = waiting.lock().ignore_poison();
        let id = now.next_id;
        now.callers.as_mut()?.insert(id, caller);
        now.next_id += 1;
        Some(Place { id, since: Instant::now(), answer, waiting: waiting.clone() })
    }
}

impl<A> Drop for Place<A> {
    /// A stream that answered no call while this one waited in vain is given up: the next question opens another, and
    /// who else waits asks again.
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock().ignore_poison();
        let in_vain = waiting.callers.as_mut().is_some_and(|callers| callers.remove(&self.id).is_some());
        if in_vain && waiting.heard < self.since && self.since.elapsed() >= PATIENCE_MIN {
            waiting.callers = None;
            if let Some(hearing) = waiting.hearing.take() {
                hearing.abort();
            }
        }
    }
}

/// An error as it came beside its answer's id.
fn refused(error: v1::Error) -> MemoryError {
    error.try_into().unwrap_or_else(|unreadable| unreadable)
}

fn no_outcome() -> MemoryError {
    MemoryError::Missing { field: "outcome".into() }
}

impl Question for v1::LookupRequest {
    type Answer = v1::LookupReply;
    type Request = v1::LookupStreamRequest;
    type Reply = v1::LookupStreamReply;

    fn pack(self, id: u64, timeout_ms: u64) -> Self::Request {
        v1::LookupStreamRequest { id, request: Some(self), timeout_ms }
    }

    fn unpack(reply: Self::Reply) -> (u64, Result<Self::Answer>) {
        use v1::lookup_stream_reply::Outcome;
        let answer = match reply.outcome {
            Some(Outcome::Reply(answer)) => Ok(answer),
            Some(Outcome::Error(error)) => Err(refused(error)),
            None => Err(no_outcome()),
        };
        (reply.id, answer)
    }

    async fn open(
        mut client: BlockMemoryClient<Channel>,
        requests: ReceiverStream<Self::Request>,
    ) -> std::result::Result<Response<Streaming<Self::Reply>>, Status> {
        client.lookup_stream(requests).await
    }
}

impl Question for v1::AttendRequest {
    type Answer = v1::AttendReply;
    type Request = v1::AttendStreamRequest;
    type Reply = v1::AttendStreamReply;

    fn pack(self, id: u64, timeout_ms: u64) -> Self::Request {
        v1::AttendStreamRequest { id, request: Some(self), timeout_ms }
    }

    fn unpack(reply: Self::Reply) -> (u64, Result<Self::Answer>) {
        use v1::attend_stream_reply::Outcome;
        let answer = match reply.outcome {
            Some(Outcome::Reply(answer)) => Ok(answer),
            Some(Outcome::Error(error)) => Err(refused(error)),
            None => Err(no_outcome()),
        };
        (reply.id, answer)
    }

    async fn open(
        mut client: BlockMemoryClient<Channel>,
        requests: ReceiverStream<Self::Request>,
    ) -> std::result::Result<Response<Streaming<Self::Reply>>, Status> {
        client.attend_stream(requests).await
    }
}
