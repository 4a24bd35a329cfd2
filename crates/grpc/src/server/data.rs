//! The BlockMemory service: one method per call, each a conversion in, the memory, and a conversion out.

use tonic::{Request, Response, Status, Streaming};

use super::call::{self, Call};
use super::multiplex;
use super::replies::{Replies, ReplyStream, replies};
use super::work::{Line, Ticket, Work, log, stopping};
use crate::wire::v1::block_memory_server::BlockMemory;
use crate::wire::{ArrivingState, to_status, v1};
use landmarkdb::budget::Taken;
use landmarkdb::limits;
use landmarkdb::{
    self, AppendRequest, AttendRequest, DocumentId, FetchRequest, LookupRequest, MemoryError, SequenceState,
    StoredBlock, Until,
};

/// Replies that a stream holds ready: one on its way, one behind it.
const REPLIES_READY: usize = 2;

/// What one read of a fetch aims at: large enough to pay for the change of threads, small enough that a slow
/// reader holds little.
const FETCH_READ_BYTES: usize = 2 << 20;

pub(super) struct DataService {
    work: Work,
}

impl DataService {
    pub(super) fn new(work: Work) -> Self {
        DataService { work }
    }
}

#[tonic::async_trait]
impl BlockMemory for DataService {
    type AppendStream = ReplyStream<v1::AppendReply>;

    async fn append(
        &self,
        request: Request<Streaming<v1::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let call = Call::of(&request);
        let until = call.until(&request);
        let (replies, stream) = replies(REPLIES_READY);
        tokio::spawn(append_all(self.work.clone(), call, until, request.into_inner(), replies));
        Ok(Response::new(stream))
    }

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Result<Response<v1::LookupReply>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let request = LookupRequest::try_from(request.into_inner()).map_err(|error| to_status(&error))?;
        let ticket = ticket.weighed([&request]);
        self.work.reply(ticket, move |memory, until| memory.lookup_until(&request, until)).await
    }

    async fn attend(&self, request: Request<v1::AttendRequest>) -> Result<Response<v1::AttendReply>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let request = AttendRequest::try_from(request.into_inner()).map_err(|error| to_status(&error))?;
        let ticket = ticket.weighed([&request.lookup]);
        self.work.reply(ticket, move |memory, until| memory.attend_until(&request, until)).await
    }

    async fn attend_all(&self, request: Request<v1::AttendAllRequest>) -> Result<Response<v1::AttendAllReply>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let requests = request.into_inner().requests;
        let (limit, found) = (limits::ATTEND_REQUESTS_MAX as u64, requests.len() as u64);
        if found > limit {
            return Err(to_status(&MemoryError::LimitExceeded { what: "requests".into(), limit, found }));
        }
        let (readable, refusals) = read_all(requests);
        let ticket = ticket.weighed(readable.iter().map(|request| &request.lookup));
        self.work.reply(ticket, move |memory, until| answer_all(memory, &readable, refusals, until)).await
    }

    async fn put_state(
        &self,
        request: Request<Streaming<v1::PutStateRequest>>,
    ) -> Result<Response<v1::PutStateReply>, Status> {
        let call = Call::of(&request);
        let until = call.until(&request);
        let (state, held) = receive_state(&self.work, &call, &until, request.into_inner()).await?;
        let ticket = Ticket { line: Line::Writing, until, message: None };
        self.work
            .reply(ticket, move |memory, _| {
                // The messages that the parts came in, and lie in.
                let _held = held;
                let (document, state) = state;
                let document = memory.put_state(document, state)?;
                Ok(v1::PutStateReply { document: Some(document.into()) })
            })
            .await
    }

    async fn get_state_part(
        &self,
        request: Request<v1::GetStatePartRequest>,
    ) -> Result<Response<v1::GetStatePartReply>, Status> {
        // Of its own message nothing is held while it waits for the most that a part may have.
        let ticket = Ticket { message: None, ..Ticket::of(Line::Light, &request) };
        let v1::GetStatePartRequest { document, part } = request.into_inner();
        let room = call::take(&self.work.messages, limits::STATE_PART_BYTES_MAX as u64, &ticket.until);
        let _taken = room.await.map_err(|error| to_status(&error))?;
        self.work
            .reply(ticket, move |memory, _| {
                let part = memory.state_part(DocumentId(document), part)?.map(v1::StatePart::from);
                Ok(v1::GetStatePartReply { part })
            })
            .await
    }

    type LookupStreamStream = ReplyStream<v1::LookupStreamReply>;

    async fn lookup_stream(
        &self,
        request: Request<Streaming<v1::LookupStreamRequest>>,
    ) -> Result<Response<Self::LookupStreamStream>, Status> {
        Ok(Response::new(multiplex::answer_all(self.work.clone(), Call::of(&request), request.into_inner())))
    }

    type AttendStreamStream = ReplyStream<v1::AttendStreamReply>;

    async fn attend_stream(
        &self,
        request: Request<Streaming<v1::AttendStreamRequest>>,
    ) -> Result<Response<Self::AttendStreamStream>, Status> {
        Ok(Response::new(multiplex::answer_all(self.work.clone(), Call::of(&request), request.into_inner())))
    }

    type FetchStream = ReplyStream<v1::FetchReply>;

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let request = FetchRequest::try_from(request.into_inner()).map_err(|error| to_status(&error))?;
        request.check().map_err(|error| to_status(&error))?;
        let (replies, stream) = replies(REPLIES_READY);
        let work = self.work.clone();
        tokio::spawn(async move {
            if let Err(error) = fetch_all(&work, &ticket.until, &request, &replies).await {
                replies.fail(&error);
            }
        });
        Ok(Response::new(stream))
    }
}

/// The requests that can be read, and for every request why it cannot be.
fn read_all(requests: Vec<v1::AttendRequest>) -> (Vec<AttendRequest>, Vec<Option<MemoryError>>) {
    let mut readable = Vec::with_capacity(requests.len());
    let mut read = |request| AttendRequest::try_from(request).map(|request| readable.push(request)).err();
    let refusals = requests.into_iter().map(&mut read).collect();
    (readable, refusals)
}

/// Asks the memory what can be read, and puts the outcomes in the order of the requests.
fn answer_all(
    memory: &dyn landmarkdb::BlockMemory,
    readable: &[AttendRequest],
    refusals: Vec<Option<MemoryError>>,
    until: &Until,
) -> landmarkdb::Result<v1::AttendAllReply> {
    let mut answers = memory.attend_all_until(readable, until)?.into_iter();
    let outcome = |refusal: Option<MemoryError>| refusal.map_or_else(|| answers.next(), |error| Some(Err(error)));
    let outcomes = refusals.into_iter().filter_map(outcome).map(|outcome| outcome.inspect_err(log).into()).collect();
    Ok(v1::AttendAllReply { outcomes })
}

/// All messages of a state, and what was taken for them: no more than a state may have, for a message more is not asked for.
async fn receive_state(
    work: &Work,
    call: &Call,
    until: &Until,
    mut messages: Streaming<v1::PutStateRequest>,
) -> Result<((DocumentId, SequenceState), Vec<Taken>), Status> {
    let (mut arriving, mut held) = (ArrivingState::default(), Vec::new());
    loop {
        let message = tokio::select! {
            biased;
            () = work.stopped() => return Err(to_status(&stopping())),
            message = call::within(until, messages.message()) => message,
        };
        let whole = match message.map_err(|error| to_status(&error))?? {
            Some(message) => arriving.push(message).map_err(|error| to_status(&error))?,
            None => {
                let (expected, found) = ("as many parts as were announced".into(), "fewer".into());
                return Err(to_status(&MemoryError::Invalid { field: "state.parts".into(), expected, found }));
            }
        };
        held.extend(call.take_message());
        if whole {
            return Ok((arriving.into_state().map_err(|error| to_status(&error))?, held));
        }
    }
}

/// Makes each batch durable, then says so, then takes the next. Ends with the first refusal, with the caller or its time,
/// or with the service, and never between a batch and its reply.
async fn append_all(
    work: Work,
    call: Call,
    until: Until,
    mut batches: Streaming<v1::AppendRequest>,
    replies: Replies<v1::AppendReply>,
) {
    loop {
        let resting = call.rest();
        let batch = tokio::select! {
            biased;
            () = work.stopped() => return replies.fail(&stopping()),
            batch = call::within(&until, batches.message()) => batch,
        };
        drop(resting);
        let batch = match batch {
            Ok(Ok(Some(batch))) => batch,
            Ok(Ok(None)) => return,
            Ok(Err(status)) => return replies.end(status),
            Err(error) => return replies.fail(&error),
        };
        let ticket = Ticket { line: Line::Writing, until: until.clone(), message: call.take_message() };
        match append_one(&work, ticket, batch).await {
            Ok(reply) => {
                if !replies.send(reply, &until).await {
                    return;
                }
            }
            Err(error) => return replies.fail(&error),
        }
    }
}

async fn append_one(work: &Work, ticket: Ticket, batch: v1::AppendRequest) -> Result<v1::AppendReply, MemoryError> {
    let request = AppendRequest::try_from(batch)?;
    let document = work.run(ticket, move |memory, _| memory.append(request)).await?;
    Ok(v1::AppendReply { document: Some(document.into()) })
}

/// Reads a few blocks at a time, so that neither a long request nor a slow reader holds memory or a worker.
async fn fetch_all(
    work: &Work,
    until: &Until,
    request: &FetchRequest,
    replies: &Replies<v1::FetchReply>,
) -> Result<(), MemoryError> {
    let mut rest = request.blocks.as_slice();
    // The first read finds out how large blocks are. It is made even for no blocks, so that a wrong id is an error.
    let (mut count, mut bytes) = (1, FETCH_READ_BYTES);
    loop {
        let (now, later) = rest.split_at(count.min(rest.len()));
        let read = FetchRequest { document: request.document, blocks: now.to_vec(), dtype: request.dtype };
        // Held until the last of them has found room among the replies.
        let _taken = call::take(&work.messages, bytes as u64, until).await?;
        let ticket = Ticket { line: Line::Light, until: until.clone(), message: None };
        let blocks = work.run(ticket, move |memory, _| memory.fetch(&read)).await?;
        let block_bytes = blocks.first().map_or(1, block_bytes).max(1);
        count = (FETCH_READ_BYTES / block_bytes).clamp(1, 256);
        bytes = count * block_bytes;
        for block in blocks {
            if !replies.send(block.into(), until).await {
                return Ok(());
            }
        }
        rest = later;
        if rest.is_empty() {
            return Ok(());
        }
    }
}

fn block_bytes(block: &StoredBlock) -> usize {
    block.k.data.len() + block.v.data.len()
}
