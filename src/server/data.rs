//! The BlockMemory service: one method per call, each a conversion in, the memory, and a conversion out.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::pairs;
use super::work::{Deadline, Line, Work, log, stopping};
use crate::api::{self, AppendRequest, AttendRequest, FetchRequest, LookupRequest, MemoryError, StoredBlock};
use crate::limits;
use crate::wire::v1::block_memory_server::BlockMemory;
use crate::wire::{to_status, v1};

/// Replies that a stream holds ready: one on its way, one behind it.
const REPLIES_READY: usize = 2;

/// What one read of a fetch aims at: large enough to pay for the change of threads, small enough that a slow
/// reader holds little.
const FETCH_READ_BYTES: usize = 8 << 20;

type Replies<T> = ReceiverStream<Result<T, Status>>;

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
    type AppendStream = Replies<v1::AppendReply>;

    async fn append(
        &self,
        request: Request<Streaming<v1::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let (replies, receiver) = mpsc::channel(REPLIES_READY);
        tokio::spawn(append_all(self.work.clone(), request.into_inner(), replies));
        Ok(Response::new(receiver.into()))
    }

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Result<Response<v1::LookupReply>, Status> {
        let deadline = Deadline::of(request.metadata());
        let request = LookupRequest::try_from(request.into_inner()).map_err(|error| to_status(&error))?;
        self.work.reply(Line::Serving, deadline, move |memory| memory.lookup(&request)).await
    }

    async fn attend(&self, request: Request<v1::AttendRequest>) -> Result<Response<v1::AttendReply>, Status> {
        let deadline = Deadline::of(request.metadata());
        let request = AttendRequest::try_from(request.into_inner()).map_err(|error| to_status(&error))?;
        self.work.reply(Line::Serving, deadline, move |memory| memory.attend(&request)).await
    }

    async fn attend_all(&self, request: Request<v1::AttendAllRequest>) -> Result<Response<v1::AttendAllReply>, Status> {
        let deadline = Deadline::of(request.metadata());
        let requests = request.into_inner().requests;
        let (limit, found) = (limits::ATTEND_REQUESTS_MAX as u64, requests.len() as u64);
        if found > limit {
            return Err(to_status(&MemoryError::LimitExceeded { what: "requests".into(), limit, found }));
        }
        self.work.reply(Line::Serving, deadline, move |memory| Ok(answer_all(memory, requests))).await
    }

    type LookupStreamStream = Replies<v1::LookupStreamReply>;

    async fn lookup_stream(
        &self,
        request: Request<Streaming<v1::LookupStreamRequest>>,
    ) -> Result<Response<Self::LookupStreamStream>, Status> {
        Ok(Response::new(pairs::answer_all(self.work.clone(), request.into_inner())))
    }

    type AttendStreamStream = Replies<v1::AttendStreamReply>;

    async fn attend_stream(
        &self,
        request: Request<Streaming<v1::AttendStreamRequest>>,
    ) -> Result<Response<Self::AttendStreamStream>, Status> {
        Ok(Response::new(pairs::answer_all(self.work.clone(), request.into_inner())))
    }

    type FetchStream = Replies<v1::FetchReply>;

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let request = FetchRequest::try_from(request.into_inner()).map_err(|error| to_status(&error))?;
        let (replies, receiver) = mpsc::channel(REPLIES_READY);
        tokio::spawn(fetch_all(self.work.clone(), request, replies));
        Ok(Response::new(receiver.into()))
    }
}

/// Asks the memory what can be read, and puts the outcomes in the order of the requests.
fn answer_all(memory: &dyn api::BlockMemory, requests: Vec<v1::AttendRequest>) -> v1::AttendAllReply {
    let mut readable = Vec::with_capacity(requests.len());
    let mut read = |request| AttendRequest::try_from(request).map(|request| readable.push(request)).err();
    let refusals: Vec<Option<MemoryError>> = requests.into_iter().map(&mut read).collect();
    let mut answers = memory.attend_all(&readable).into_iter();
    let outcome = |refusal: Option<MemoryError>| refusal.map_or_else(|| answers.next(), |error| Some(Err(error)));
    let outcomes = refusals.into_iter().filter_map(outcome).map(|outcome| outcome.inspect_err(log).into()).collect();
    v1::AttendAllReply { outcomes }
}

/// Makes each batch durable, then says so, then takes the next. Ends with the first refusal, with the caller, or
/// with the service, and never between a batch and its reply.
async fn append_all(
    work: Work,
    mut batches: Streaming<v1::AppendRequest>,
    replies: mpsc::Sender<Result<v1::AppendReply, Status>>,
) {
    loop {
        let batch = tokio::select! {
            biased;
            () = work.stopped() => Err(to_status(&stopping())),
            batch = batches.message() => batch,
        };
        let answer = match batch {
            Ok(None) => return,
            Err(status) => Err(status),
            Ok(Some(batch)) => append_one(&work, batch).await.map_err(|error| to_status(&error)),
        };
        let refused = answer.is_err();
        if replies.send(answer).await.is_err() || refused {
            return;
        }
    }
}

async fn append_one(work: &Work, batch: v1::AppendRequest) -> Result<v1::AppendReply, MemoryError> {
    let request = AppendRequest::try_from(batch)?;
    let document = work.run(Line::Serving, Deadline::NONE, move |memory| memory.append(request)).await?;
    Ok(v1::AppendReply { document: Some(document.into()) })
}

/// Reads a few blocks at a time, so that neither a long request nor a slow reader holds memory or a worker.
async fn fetch_all(work: Work, request: FetchRequest, replies: mpsc::Sender<Result<v1::FetchReply, Status>>) {
    let mut rest = request.blocks.as_slice();
    // The first read finds out how large blocks are. It is made even for no blocks, so that a wrong id is an error.
    let mut batch_count = 1;
    loop {
        let (now, later) = rest.split_at(batch_count.min(rest.len()));
        let read = FetchRequest { document: request.document, blocks: now.to_vec(), dtype: request.dtype };
        let blocks = match work.run(Line::Serving, Deadline::NONE, move |memory| memory.fetch(&read)).await {
            Ok(blocks) => blocks,
            Err(error) => {
                // A failed send means that the caller left.
                let _ = replies.send(Err(to_status(&error))).await;
                return;
            }
        };
        batch_count = (FETCH_READ_BYTES / blocks.first().map_or(1, block_bytes).max(1)).clamp(1, 256);
        for block in blocks {
            if replies.send(Ok(block.into())).await.is_err() {
                return;
            }
        }
        rest = later;
        if rest.is_empty() {
            return;
        }
    }
}

fn block_bytes(block: &StoredBlock) -> usize {
    block.k.data.len() + block.v.data.len()
}
