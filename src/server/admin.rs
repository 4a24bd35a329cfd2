//! The Admin service: what exists, and what an operator does with it.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::work::{Deadline, Line, Work};
use crate::api::{BlockMemory, MemoryError};
use crate::shape::CollectionSpec;
use crate::types::{BlockRange, CollectionId, DocumentId, Engine};
use crate::wire::v1::admin_server::Admin;
use crate::wire::{to_status, v1};

/// Blocks that one read of a listing takes, with their texts.
const LISTED_BLOCKS: u32 = 1024;

/// Messages that a stream holds ready.
const REPLIES_READY: usize = 16;

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct AdminService {
    work: Work,
}

impl AdminService {
    pub(super) fn new(work: Work) -> Self {
        AdminService { work }
    }
}

/// A list that is in memory as a stream of messages.
fn stream<T: Into<M> + Send + 'static, M: 'static>(items: Vec<T>) -> Response<Replies<M>> {
    Response::new(Box::pin(tokio_stream::iter(items).map(|item| Ok(item.into()))))
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn open_collection(
        &self,
        request: Request<v1::OpenCollectionRequest>,
    ) -> Result<Response<v1::CollectionInfo>, Status> {
        let deadline = Deadline::of(request.metadata());
        let spec = request.into_inner().spec.ok_or_else(|| MemoryError::Missing { field: "spec".into() });
        let spec = spec.and_then(CollectionSpec::try_from).map_err(|error| to_status(&error))?;
        self.work.reply(Line::Serving, deadline, move |memory| memory.open_collection(&spec)).await
    }

    type ListCollectionsStream = Replies<v1::CollectionInfo>;

    async fn list_collections(
        &self,
        request: Request<v1::ListCollectionsRequest>,
    ) -> Result<Response<Self::ListCollectionsStream>, Status> {
        let deadline = Deadline::of(request.metadata());
        let collections = self.work.run(Line::Serving, deadline, |memory| memory.collections()).await;
        collections.map(stream).map_err(|error| to_status(&error))
    }

    async fn set_engine(&self, request: Request<v1::SetEngineRequest>) -> Result<Response<v1::CollectionInfo>, Status> {
        let deadline = Deadline::of(request.metadata());
        let wanted = <(CollectionId, Engine)>::try_from(request.into_inner());
        let (collection, engine) = wanted.map_err(|error| to_status(&error))?;
        self.work.reply(Line::Serving, deadline, move |memory| memory.set_engine(collection, engine)).await
    }

    async fn open_document(
        &self,
        request: Request<v1::OpenDocumentRequest>,
    ) -> Result<Response<v1::DocumentInfo>, Status> {
        let deadline = Deadline::of(request.metadata());
        let v1::OpenDocumentRequest { collection, name } = request.into_inner();
        let open = move |memory: &dyn BlockMemory| memory.open_document(CollectionId(collection), &name);
        self.work.reply(Line::Serving, deadline, open).await
    }

    type ListDocumentsStream = Replies<v1::DocumentInfo>;

    async fn list_documents(
        &self,
        request: Request<v1::ListDocumentsRequest>,
    ) -> Result<Response<Self::ListDocumentsStream>, Status> {
        let deadline = Deadline::of(request.metadata());
        let collection = CollectionId(request.into_inner().collection);
        let documents = self.work.run(Line::Serving, deadline, move |memory| memory.documents(collection)).await;
        documents.map(stream).map_err(|error| to_status(&error))
    }

    async fn get_document(
        &self,
        request: Request<v1::GetDocumentRequest>,
    ) -> Result<Response<v1::DocumentInfo>, Status> {
        let deadline = Deadline::of(request.metadata());
        let document = DocumentId(request.into_inner().document);
        self.work.reply(Line::Serving, deadline, move |memory| memory.document(document)).await
    }

    async fn seal_document(
        &self,
        request: Request<v1::SealDocumentRequest>,
    ) -> Result<Response<v1::DocumentInfo>, Status> {
        let deadline = Deadline::of(request.metadata());
        let document = DocumentId(request.into_inner().document);
        self.work.reply(Line::Serving, deadline, move |memory| memory.seal(document)).await
    }

    type ListBlocksStream = Replies<v1::BlockInfo>;

    async fn list_blocks(
        &self,
        request: Request<v1::ListBlocksRequest>,
    ) -> Result<Response<Self::ListBlocksStream>, Status> {
        let range =
            request.into_inner().range.ok_or_else(|| to_status(&MemoryError::Missing { field: "range".into() }))?;
        let (replies, receiver) = mpsc::channel(REPLIES_READY);
        tokio::spawn(list_all(self.work.clone(), range.into(), replies));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn delete_document(
        &self,
        request: Request<v1::DeleteDocumentRequest>,
    ) -> Result<Response<v1::DeleteDocumentReply>, Status> {
        let deadline = Deadline::of(request.metadata());
        let document = DocumentId(request.into_inner().document);
        self.work.reply(Line::Maintenance, deadline, move |memory| memory.delete(document)).await
    }

    async fn get_stats(&self, request: Request<v1::GetStatsRequest>) -> Result<Response<v1::Stats>, Status> {
        let deadline = Deadline::of(request.metadata());
        self.work.reply(Line::Serving, deadline, |memory| memory.stats()).await
    }

    type VerifyStream = Replies<v1::VerifyReply>;

    async fn verify(&self, request: Request<v1::VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let document = request.into_inner().document.map(DocumentId);
        let (replies, receiver) = mpsc::channel(REPLIES_READY);
        tokio::spawn(verify_all(self.work.clone(), document, replies));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Lists a range piece by piece; a piece that comes short was the last.
async fn list_all(work: Work, range: BlockRange, replies: mpsc::Sender<Result<v1::BlockInfo, Status>>) {
    let mut begin = range.blocks.start;
    loop {
        let end = range.blocks.end.min(begin.saturating_add(LISTED_BLOCKS));
        let piece = BlockRange { document: range.document, blocks: begin..end };
        let blocks = match work.run(Line::Serving, Deadline::NONE, move |memory| memory.blocks(&piece)).await {
            Ok(blocks) => blocks,
            Err(error) => {
                // A failed send means that the caller left.
                let _ = replies.send(Err(to_status(&error))).await;
                return;
            }
        };
        let short = blocks.len() < end.saturating_sub(begin) as usize;
        for block in blocks {
            if replies.send(Ok(block.into())).await.is_err() {
                return;
            }
        }
        begin = end;
        if short || begin >= range.blocks.end {
            return;
        }
    }
}

async fn verify_all(work: Work, document: Option<DocumentId>, replies: mpsc::Sender<Result<v1::VerifyReply, Status>>) {
    use v1::verify_reply::{Progress, State};
    let message = |state| v1::VerifyReply { state: Some(state) };
    let progress = replies.clone();
    let verify = move |memory: &dyn BlockMemory| {
        memory.verify(document, &mut |done_bytes, total_bytes| {
            // A full channel is a slow reader: it will see a later count.
            let _ = progress.try_send(Ok(message(State::Progress(Progress { done_bytes, total_bytes }))));
        })
    };
    let report = work.run(Line::Maintenance, Deadline::NONE, verify).await;
    let last = report.map(|report| message(State::Report(report.into()))).map_err(|error| to_status(&error));
    // A failed send means that the caller left.
    let _ = replies.send(last).await;
}
