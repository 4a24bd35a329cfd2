//! The Admin service: what exists, and what an operator does with it.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::replies::{Replies, replies};
use super::work::{Line, Ticket, Work};
use crate::wire::v1::admin_server::Admin;
use crate::wire::{to_status, v1};
use landmarkdb::{
    BlockMemory, BlockRange, CollectionId, CollectionSpec, DocumentId, Engine, MemoryError, TuneRequest, Until,
};

/// Blocks that one read of a listing takes, with their texts: a few hundred bytes each, a megabyte at most.
const LISTED_BLOCKS: u32 = 64;

/// Messages that a stream holds ready.
const REPLIES_READY: usize = 16;

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct AdminService {
    work: Work,
}

impl AdminService {
    pub(super) fn new(work: Work) -> Self {
        AdminService { work }
    }
}

/// A list that is in memory as a stream of messages.
fn stream<T: Into<M> + Send + 'static, M: 'static>(items: Vec<T>) -> Response<Messages<M>> {
    Response::new(Box::pin(tokio_stream::iter(items).map(|item| Ok(item.into()))))
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn open_collection(
        &self,
        request: Request<v1::OpenCollectionRequest>,
    ) -> Result<Response<v1::CollectionInfo>, Status> {
        let ticket = Ticket::of(Line::Writing, &request);
        let spec = request.into_inner().spec.ok_or_else(|| MemoryError::Missing { field: "spec".into() });
        let spec = spec.and_then(CollectionSpec::try_from).map_err(|error| to_status(&error))?;
        self.work.reply(ticket, move |memory, _| memory.open_collection(&spec)).await
    }

    type ListCollectionsStream = Messages<v1::CollectionInfo>;

    async fn list_collections(
        &self,
        request: Request<v1::ListCollectionsRequest>,
    ) -> Result<Response<Self::ListCollectionsStream>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let collections = self.work.run(ticket, |memory, _| memory.collections()).await;
        collections.map(stream).map_err(|error| to_status(&error))
    }

    async fn set_engine(&self, request: Request<v1::SetEngineRequest>) -> Result<Response<v1::CollectionInfo>, Status> {
        let ticket = Ticket::of(Line::Writing, &request);
        let wanted = <(CollectionId, Engine)>::try_from(request.into_inner());
        let (collection, engine) = wanted.map_err(|error| to_status(&error))?;
        self.work.reply(ticket, move |memory, _| memory.set_engine(collection, engine)).await
    }

    type TuneStream = Messages<v1::TuneReply>;

    async fn tune(&self, request: Request<v1::TuneRequest>) -> Result<Response<Self::TuneStream>, Status> {
        let ticket = Ticket::of(Line::Verifying, &request);
        let request = TuneRequest::try_from(request.into_inner()).map_err(|error| to_status(&error))?;
        let (replies, stream) = replies(REPLIES_READY);
        tokio::spawn(tune_all(self.work.clone(), ticket, request, replies));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn open_document(
        &self,
        request: Request<v1::OpenDocumentRequest>,
    ) -> Result<Response<v1::DocumentInfo>, Status> {
        let ticket = Ticket::of(Line::Writing, &request);
        let v1::OpenDocumentRequest { collection, name } = request.into_inner();
        self.work.reply(ticket, move |memory, _| memory.open_document(CollectionId(collection), &name)).await
    }

    type ListDocumentsStream = Messages<v1::DocumentInfo>;

    async fn list_documents(
        &self,
        request: Request<v1::ListDocumentsRequest>,
    ) -> Result<Response<Self::ListDocumentsStream>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let collection = CollectionId(request.into_inner().collection);
        let documents = self.work.run(ticket, move |memory, _| memory.documents(collection)).await;
        documents.map(stream).map_err(|error| to_status(&error))
    }

    async fn get_document(
        &self,
        request: Request<v1::GetDocumentRequest>,
    ) -> Result<Response<v1::DocumentInfo>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let document = DocumentId(request.into_inner().document);
        self.work.reply(ticket, move |memory, _| memory.document(document)).await
    }

    async fn seal_document(
        &self,
        request: Request<v1::SealDocumentRequest>,
    ) -> Result<Response<v1::DocumentInfo>, Status> {
        let ticket = Ticket::of(Line::Writing, &request);
        let document = DocumentId(request.into_inner().document);
        self.work.reply(ticket, move |memory, _| memory.seal(document)).await
    }

    type ListBlocksStream = Messages<v1::BlockInfo>;

    async fn list_blocks(
        &self,
        request: Request<v1::ListBlocksRequest>,
    ) -> Result<Response<Self::ListBlocksStream>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        let range =
            request.into_inner().range.ok_or_else(|| to_status(&MemoryError::Missing { field: "range".into() }))?;
        let (replies, stream) = replies(REPLIES_READY);
        tokio::spawn(list_all(self.work.clone(), ticket.until, range.into(), replies));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn replace_document(
        &self,
        request: Request<v1::ReplaceDocumentRequest>,
    ) -> Result<Response<v1::DocumentInfo>, Status> {
        let ticket = Ticket::of(Line::Writing, &request);
        let v1::ReplaceDocumentRequest { document, by } = request.into_inner();
        self.work.reply(ticket, move |memory, _| memory.replace(DocumentId(document), DocumentId(by))).await
    }

    async fn delete_document(
        &self,
        request: Request<v1::DeleteDocumentRequest>,
    ) -> Result<Response<v1::DeleteDocumentReply>, Status> {
        let ticket = Ticket::of(Line::Writing, &request);
        let document = DocumentId(request.into_inner().document);
        self.work.reply(ticket, move |memory, _| memory.delete(document)).await
    }

    async fn get_stats(&self, request: Request<v1::GetStatsRequest>) -> Result<Response<v1::Stats>, Status> {
        let ticket = Ticket::of(Line::Light, &request);
        self.work.reply(ticket, |memory, _| memory.stats()).await
    }

    type VerifyStream = Messages<v1::VerifyReply>;

    async fn verify(&self, request: Request<v1::VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let ticket = Ticket::of(Line::Verifying, &request);
        let v1::VerifyRequest { document, rebuild } = request.into_inner();
        let document = document.map(DocumentId);
        if rebuild && document.is_some() {
            let (field, expected) = ("rebuild".into(), "no document with it".into());
            return Err(to_status(&MemoryError::Invalid { field, expected, found: "one document".into() }));
        }
        let (replies, stream) = replies(REPLIES_READY);
        tokio::spawn(verify_all(self.work.clone(), ticket, document, rebuild, replies));
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Lists a range piece by piece; a piece that comes short was the last.
async fn list_all(work: Work, until: Until, range: BlockRange, replies: Replies<v1::BlockInfo>) {
    let mut begin = range.blocks.start;
    loop {
        let end = range.blocks.end.min(begin.saturating_add(LISTED_BLOCKS));
        let piece = BlockRange { document: range.document, blocks: begin..end };
        let ticket = Ticket { line: Line::Light, until: until.clone(), message: None };
        let blocks = match work.run(ticket, move |memory, _| memory.blocks(&piece)).await {
            Ok(blocks) => blocks,
            Err(error) => return replies.fail(&error),
        };
        let short = blocks.len() < end.saturating_sub(begin) as usize;
        for block in blocks {
            if !replies.send(block.into(), &until).await {
                return;
            }
        }
        begin = end;
        if short || begin >= range.blocks.end {
            return;
        }
    }
}

async fn tune_all(work: Work, ticket: Ticket, request: TuneRequest, replies: Replies<v1::TuneReply>) {
    use v1::tune_reply::State;
    let message = |state| v1::TuneReply { state: Some(state) };
    let (steps, until) = (replies.clone(), ticket.until.clone());
    let tune = move |memory: &dyn BlockMemory, until: &Until| {
        let mut offer = |step| match v1::TuneStep::of(&step) {
            Some(step) => steps.offer(message(State::Step(step))),
            None => tracing::warn!(?step, "a step of a tuning has no message and is skipped"),
        };
        memory.tune(&request, &mut offer, until)
    };
    match work.run(ticket, tune).await {
        // The receiver may be gone; that is fine.
        Ok(report) => drop(replies.send(message(State::Report(report.into())), &until).await),
        Err(error) => replies.fail(&error),
    }
}

async fn verify_all(
    work: Work,
    ticket: Ticket,
    document: Option<DocumentId>,
    rebuild: bool,
    replies: Replies<v1::VerifyReply>,
) {
    use v1::verify_reply::{Progress, State};
    let message = |state| v1::VerifyReply { state: Some(state) };
    let (progress, until) = (replies.clone(), ticket.until.clone());
    let verify = move |memory: &dyn BlockMemory, until: &Until| {
        let mut told = |done_bytes, total_bytes| {
            progress.offer(message(State::Progress(Progress { done_bytes, total_bytes })));
        };
        if rebuild { memory.verify_rebuild(&mut told, until) } else { memory.verify_until(document, &mut told, until) }
    };
    match work.run(ticket, verify).await {
        // The receiver may be gone; that is fine.
        Ok(report) => drop(replies.send(message(State::Report(report.into())), &until).await),
        Err(error) => replies.fail(&error),
    }
}
