//! `BlockMemory` over gRPC.

use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::append::append;
use super::connect::{ClientOptions, Connection};
use super::multiplex::Multiplex;
use super::retry::{Patience, Repeat};
use super::state::put_state;
use crate::wire::v1;
use crate::wire::v1::admin_client::AdminClient;
use crate::wire::v1::block_memory_client::BlockMemoryClient;
use landmarkdb::limits;
use landmarkdb::{
    AppendRequest, AttendRequest, Attended, BlockInfo, BlockMemory, BlockRange, CollectionId, CollectionInfo,
    CollectionSpec, Deleted, DocumentId, DocumentInfo, Engine, FetchRequest, Hits, LookupRequest, MemoryError, Result,
    SequenceState, StatePart, Stats, StoredBlock, TuneReport, TuneRequest, TuneStep, Until, VerifyReport,
    check_together,
};

/// Queries up to this size go over the long stream. A decode step of 32 heads of 128 (16 KiB) takes 115 us there and
/// 180 us as a call of its own; a megabyte is no faster there, and would hold up what comes behind it.
const MULTIPLEXED_QUERIES_BYTES_MAX: usize = 64 << 10;

/// Queries of one message that attends to many: what a stream's window takes without waiting for the reader.
const BATCH_QUERIES_BYTES_MAX: usize = 16 << 20;

/// The memory behind a running service. Answers what that memory would answer in process, bit for bit, and adds two
/// errors: `Unavailable` and `DeadlineExceeded`.
///
/// Calls block and may come from any thread but the workers of a tokio runtime, where they panic. All share one
/// connection, which is made anew when it breaks. Everything but `delete` may be repeated without harm and is,
/// while the service is unavailable (see [`ClientOptions`]).
pub struct RemoteMemory {
    connection: Connection,
    data: BlockMemoryClient<Channel>,
    admin: AdminClient<Channel>,
    lookups: Multiplex<v1::LookupRequest>,
    attends: Multiplex<v1::AttendRequest>,
    options: ClientOptions,
}

impl RemoteMemory {
    /// Connects to `host:port`, `http://host:port` or `unix:/path`.
    ///
    /// # Errors
    /// `Invalid` for a target of another form, `Unavailable` if nothing answers there.
    pub fn connect(target: &str, options: ClientOptions) -> Result<Self> {
        let connection = Connection::open(target, &options)?;
        let data = BlockMemoryClient::new(connection.channel.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
        let admin = AdminClient::new(connection.channel.clone()).max_decoding_message_size(limits::MESSAGE_BYTES_MAX);
        let (lookups, attends) = (Multiplex::new(data.clone()), Multiplex::new(data.clone()));
        Ok(RemoteMemory { connection, data, admin, lookups, attends, options })
    }

    /// What it was connected to.
    pub fn target(&self) -> &str {
        &self.connection.target
    }

    fn patience(&self) -> Patience<'_> {
        Patience { target: &self.connection.target, options: &self.options }
    }

    fn attend_batch(&self, requests: &[AttendRequest]) -> Result<Vec<Result<Attended>>> {
        let message = v1::AttendAllRequest { requests: requests.iter().map(v1::AttendRequest::from).collect() };
        let send = async |request| self.data.clone().attend_all(request).await;
        let outcomes = self.connection.wait(self.patience().call(Repeat::Yes, message, send))?.outcomes;
        if outcomes.len() != requests.len() {
            return Err(MemoryError::Invalid {
                field: "outcomes".into(),
                expected: format!("{}, one per request", requests.len()),
                found: outcomes.len().to_string(),
            });
        }
        Ok(outcomes.into_iter().map(Attended::try_from).collect())
    }

    /// All messages of a server stream, each made into what it stands for; from the beginning again if it breaks.
    fn collect<M, T>(
        &self,
        open: impl AsyncFn() -> std::result::Result<Response<Streaming<M>>, Status>,
        convert: impl Fn(M) -> Result<T>,
    ) -> Result<Vec<T>> {
        let patience = self.patience();
        self.connection.wait(patience.stream(async |_progressed| {
            let mut replies = patience.step(open()).await?.into_inner();
            let mut items = Vec::new();
            while let Some(message) = patience.step(replies.message()).await? {
                items.push(convert(message)?);
            }
            Ok(items)
        }))
    }
}

/// How many of the first requests fit one message; at least one.
fn batch_len(requests: &[AttendRequest]) -> usize {
    let mut bytes = 0;
    let fits = |request: &&AttendRequest| {
        bytes += request.lookup.queries.len() * 4;
        bytes <= BATCH_QUERIES_BYTES_MAX
    };
    requests.iter().take(limits::ATTEND_REQUESTS_MAX).take_while(fits).count().max(1)
}

impl BlockMemory for RemoteMemory {
    fn open_collection(&self, spec: &CollectionSpec) -> Result<CollectionInfo> {
        let message = v1::OpenCollectionRequest { spec: Some(spec.clone().into()) };
        let send = async |request| self.admin.clone().open_collection(request).await;
        self.connection.wait(self.patience().call(Repeat::Yes, message, send))?.try_into()
    }

    fn collections(&self) -> Result<Vec<CollectionInfo>> {
        let open = async || self.admin.clone().list_collections(v1::ListCollectionsRequest {}).await;
        self.collect(open, CollectionInfo::try_from)
    }

    fn set_engine(&self, collection: CollectionId, engine: Engine) -> Result<CollectionInfo> {
        let message = v1::SetEngineRequest::from((collection, engine));
        let send = async |request| self.admin.clone().set_engine(request).await;
        self.connection.wait(self.patience().call(Repeat::Yes, message, send))?.try_into()
    }

    /// Measured by the service, without the network; the next step has to come within the deadline. Not repeated, as the service may
    /// still be measuring. Some steps may be left out when they come faster than the network carries them.
    fn tune(&self, request: &TuneRequest, progress: &mut dyn FnMut(TuneStep), until: &Until) -> Result<TuneReport> {
        use v1::tune_reply::State;
        let (patience, message) = (self.patience(), v1::TuneRequest::from(request));
        self.connection.wait(async {
            let mut replies = patience.step(self.admin.clone().tune(message)).await?.into_inner();
            loop {
                until.check()?;
                let reply = patience.step(replies.message()).await?.ok_or_else(|| patience.cut_short())?;
                match reply.state {
                    Some(State::Step(step)) => progress(step.try_into()?),
                    Some(State::Report(report)) => return report.try_into(),
                    None => return Err(MemoryError::Missing { field: "state".into() }),
                }
            }
        })
    }

    fn open_document(&self, collection: CollectionId, name: &str) -> Result<DocumentInfo> {
        let message = v1::OpenDocumentRequest { collection: collection.0, name: name.into() };
        let send = async |request| self.admin.clone().open_document(request).await;
        self.connection.wait(self.patience().call(Repeat::Yes, message, send)).map(DocumentInfo::from)
    }

    fn documents(&self, collection: CollectionId) -> Result<Vec<DocumentInfo>> {
        let message = v1::ListDocumentsRequest { collection: collection.0 };
        let open = async || self.admin.clone().list_documents(message).await;
        self.collect(open, |document| Ok(document.into()))
    }

    fn document(&self, document: DocumentId) -> Result<DocumentInfo> {
        let message = v1::GetDocumentRequest { document: document.0 };
        let send = async |request| self.admin.clone().get_document(request).await;
        self.connection.wait(self.patience().call(Repeat::Yes, message, send)).map(DocumentInfo::from)
    }

    /// In one batch, durable as a whole or not at all, unless its payload passes `ClientOptions::append_bytes`.
    fn append(&self, request: AppendRequest) -> Result<DocumentInfo> {
        self.connection.wait(append(self.data.clone(), &self.patience(), request))
    }

    fn put_state(&self, document: DocumentId, state: SequenceState) -> Result<DocumentInfo> {
        state.check()?;
        self.connection.wait(put_state(self.data.clone(), &self.patience(), document, state))
    }

    fn state_part(&self, document: DocumentId, part: u32) -> Result<Option<StatePart>> {
        let message = v1::GetStatePartRequest { document: document.0, part };
        let send = async |request| self.data.clone().get_state_part(request).await;
        let reply = self.connection.wait(self.patience().call(Repeat::Yes, message, send))?;
        reply.part.map(StatePart::try_from).transpose()
    }

    fn seal(&self, document: DocumentId) -> Result<DocumentInfo> {
        let message = v1::SealDocumentRequest { document: document.0 };
        let send = async |request| self.admin.clone().seal_document(request).await;
        self.connection.wait(self.patience().call(Repeat::Yes, message, send)).map(DocumentInfo::from)
    }

    fn lookup(&self, request: &LookupRequest) -> Result<Hits> {
        let patience = self.patience();
        let message = v1::LookupRequest::from(request);
        let answer = if message.queries.len() <= MULTIPLEXED_QUERIES_BYTES_MAX {
            let ask = async |left| self.lookups.ask(patience, message.clone(), left).await;
            self.connection.wait(patience.within(Repeat::Yes, ask))
        } else {
            let send = async |request| self.data.clone().lookup(request).await;
            self.connection.wait(patience.call(Repeat::Yes, message, send))
        };
        answer?.try_into()
    }

    fn attend(&self, request: &AttendRequest) -> Result<Attended> {
        let patience = self.patience();
        let message = v1::AttendRequest::from(request);
        let answer = if request.lookup.queries.len() * 4 <= MULTIPLEXED_QUERIES_BYTES_MAX {
            let ask = async |left| self.attends.ask(patience, message.clone(), left).await;
            self.connection.wait(patience.within(Repeat::Yes, ask))
        } else {
            let send = async |request| self.data.clone().attend(request).await;
            self.connection.wait(patience.call(Repeat::Yes, message, send))
        };
        answer?.try_into()
    }

    /// One message, unless there are large ones.
    fn attend_all(&self, requests: &[AttendRequest]) -> Vec<Result<Attended>> {
        if let Err(error) = check_together(requests.len()) {
            return requests.iter().map(|_| Err(error.clone())).collect();
        }
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut rest = requests;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(batch_len(rest));
            match self.attend_batch(now) {
                Ok(batch) => outcomes.extend(batch),
                Err(error) => outcomes.extend(now.iter().map(|_| Err(error.clone()))),
            }
            rest = later;
        }
        outcomes
    }

    fn fetch(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>> {
        let message = v1::FetchRequest::from(request.clone());
        let open = async || self.data.clone().fetch(message.clone()).await;
        self.collect(open, StoredBlock::try_from)
    }

    fn blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>> {
        let message = v1::ListBlocksRequest { range: Some(range.clone().into()) };
        let open = async || self.admin.clone().list_blocks(message).await;
        self.collect(open, BlockInfo::try_from)
    }

    /// Not repeated by itself: after a lost reply a second call would answer that there is no such document.
    fn replace(&self, document: DocumentId, by: DocumentId) -> Result<DocumentInfo> {
        let message = v1::ReplaceDocumentRequest { document: document.0, by: by.0 };
        let send = async |request| self.admin.clone().replace_document(request).await;
        self.connection.wait(self.patience().call(Repeat::No, message, send)).map(DocumentInfo::from)
    }

    /// As [`replace`](BlockMemory::replace), not repeated by itself.
    fn delete(&self, document: DocumentId) -> Result<Deleted> {
        let message = v1::DeleteDocumentRequest { document: document.0 };
        let send = async |request| self.admin.clone().delete_document(request).await;
        self.connection.wait(self.patience().call(Repeat::No, message, send)).map(Deleted::from)
    }

    fn stats(&self) -> Result<Stats> {
        let send = async |request| self.admin.clone().get_stats(request).await;
        let message = v1::GetStatsRequest {};
        self.connection.wait(self.patience().call(Repeat::Yes, message, send)).map(Stats::from)
    }

    /// Some steps of progress may be left out when they come faster than the network carries them.
    fn verify(&self, document: Option<DocumentId>, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        self.verified(v1::VerifyRequest { document: document.map(|document| document.0), rebuild: false }, progress)
    }

    fn verify_rebuild(&self, progress: &mut dyn FnMut(u64, u64), until: &Until) -> Result<VerifyReport> {
        until.check()?;
        self.verified(v1::VerifyRequest { document: None, rebuild: true }, progress)
    }
}

impl RemoteMemory {
    fn verified(&self, message: v1::VerifyRequest, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        use v1::verify_reply::State;
        let patience = self.patience();
        self.connection.wait(patience.stream(async |_progressed| {
            let mut replies = patience.step(self.admin.clone().verify(message)).await?.into_inner();
            loop {
                let reply = patience.step(replies.message()).await?.ok_or_else(|| patience.cut_short())?;
                match reply.state {
                    Some(State::Progress(now)) => progress(now.done_bytes, now.total_bytes),
                    Some(State::Report(report)) => return Ok(report.into()),
                    None => return Err(MemoryError::Missing { field: "state".into() }),
                }
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::{BlockScore, Granularity, Normalisation, Placement};

    #[test]
    fn messages_hold_what_fits_and_at_least_one_request() {
        let request = |len: usize| AttendRequest {
            lookup: LookupRequest {
                collection: CollectionId(1),
                layer: 0,
                queries: vec![0.0; len],
                distances: Vec::new(),
                scope: Vec::new(),
                top_k: 1,
                block_score: BlockScore::Max,
                granularity: Granularity::Shared,
            },
            normalisation: Normalisation::Plain,
            placement: Placement::Slots,
            without_first_tokens: false,
        };
        const LEN_MAX: usize = BATCH_QUERIES_BYTES_MAX / 4;
        let requests = |sizes: &[usize]| sizes.iter().map(|&len| request(len)).collect::<Vec<_>>();
        assert_eq!(batch_len(&requests(&[1, 2])), 2);
        assert_eq!(batch_len(&requests(&[LEN_MAX - 1, 1, 0, 1])), 3);
        assert_eq!(batch_len(&requests(&[LEN_MAX + 1, 1])), 1);
        assert_eq!(batch_len(&vec![request(0); limits::ATTEND_REQUESTS_MAX + 1]), limits::ATTEND_REQUESTS_MAX);
    }
}
