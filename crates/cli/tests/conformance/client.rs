//! What does the service answer? The generated client, called from plain threads, with errors as the proto states them.

use std::sync::OnceLock;
use std::time::Duration;

use landmarkdb_grpc::wire::v1;
use prost::Message;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use v1::admin_client::AdminClient;
use v1::block_memory_client::BlockMemoryClient;
use v1::error::Kind;

/// A call that takes longer hangs: the suite fails and does not.
const CALL_TIME: Duration = Duration::from_secs(60);

/// A refusal, with the detail that every failed call has to carry.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    pub(crate) kind: Option<Kind>,
    pub(crate) message: String,
}

pub(crate) type Answer<T> = Result<T, Refusal>;

#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) memory: BlockMemoryClient<Channel>,
    pub(crate) admin: AdminClient<Channel>,
}

/// google.rpc.Status, in which details travel.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// google.protobuf.Any.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let envelope = RpcStatus::decode(status.details()).unwrap_or_default();
        let ours = envelope.details.iter().find(|detail| detail.type_url.ends_with("/landmark.v1.Error"));
        let kind = ours.and_then(|detail| v1::Error::decode(&*detail.value).ok()?.kind);
        Refusal { code: status.code(), kind, message: status.message().into() }
    }
}

/// Where calls wait for the network.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads")
    })
}

/// All messages of a stream, and what ended it early.
pub(crate) async fn read_all<T>(mut stream: Streaming<T>) -> (Vec<T>, Option<Refusal>) {
    let mut messages = Vec::new();
    loop {
        match stream.message().await {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => return (messages, None),
            Err(status) => return (messages, Some(status.into())),
        }
    }
}

fn whole<T>((messages, refusal): (Vec<T>, Option<Refusal>)) -> Answer<Vec<T>> {
    refusal.map_or(Ok(messages), Err)
}

/// Methods with one request and one reply.
macro_rules! unary {
    ($($name:ident in $service:ident: $request:ty => $reply:ty;)+) => {
        $(pub(crate) fn $name(&self, request: $request) -> Answer<$reply> {
            let mut service = self.$service.clone();
            Ok(runtime().block_on(service.$name(request))?.into_inner())
        })+
    };
}

impl Client {
    pub(crate) fn try_connect(endpoint: &str) -> Option<Client> {
        let endpoint = Endpoint::from_shared(endpoint.to_string()).ok()?.timeout(CALL_TIME);
        let channel = runtime().block_on(endpoint.connect()).ok()?;
        let memory = BlockMemoryClient::new(channel.clone());
        let memory = memory.max_decoding_message_size(usize::MAX).max_encoding_message_size(usize::MAX);
        Some(Client { memory, admin: AdminClient::new(channel).max_decoding_message_size(usize::MAX) })
    }

    /// A connection of its own.
    #[track_caller]
    pub(crate) fn connect(endpoint: &str) -> Client {
        Client::try_connect(endpoint).unwrap_or_else(|| panic!("nobody answers at {endpoint}"))
    }

    unary! {
        lookup in memory: v1::LookupRequest => v1::LookupReply;
        attend in memory: v1::AttendRequest => v1::AttendReply;
        attend_all in memory: v1::AttendAllRequest => v1::AttendAllReply;
        open_collection in admin: v1::OpenCollectionRequest => v1::CollectionInfo;
        open_document in admin: v1::OpenDocumentRequest => v1::DocumentInfo;
        set_engine in admin: v1::SetEngineRequest => v1::CollectionInfo;
        get_document in admin: v1::GetDocumentRequest => v1::DocumentInfo;
        seal_document in admin: v1::SealDocumentRequest => v1::DocumentInfo;
        replace_document in admin: v1::ReplaceDocumentRequest => v1::DocumentInfo;
        delete_document in admin: v1::DeleteDocumentRequest => v1::DeleteDocumentReply;
        get_stats in admin: v1::GetStatsRequest => v1::Stats;
    }

    pub(crate) fn collection(&self, spec: &v1::CollectionSpec) -> Answer<v1::CollectionInfo> {
        self.open_collection(v1::OpenCollectionRequest { spec: Some(spec.clone()) })
    }

    pub(crate) fn document(&self, collection: u32, name: &str) -> Answer<v1::DocumentInfo> {
        self.open_document(v1::OpenDocumentRequest { collection, name: name.into() })
    }

    pub(crate) fn info(&self, document: u64) -> Answer<v1::DocumentInfo> {
        self.get_document(v1::GetDocumentRequest { document })
    }

    pub(crate) fn seal(&self, document: u64) -> Answer<v1::DocumentInfo> {
        self.seal_document(v1::SealDocumentRequest { document })
    }

    pub(crate) fn replace(&self, document: u64, by: u64) -> Answer<v1::DocumentInfo> {
        self.replace_document(v1::ReplaceDocumentRequest { document, by })
    }

    pub(crate) fn delete(&self, document: u64) -> Answer<v1::DeleteDocumentReply> {
        self.delete_document(v1::DeleteDocumentRequest { document })
    }

    pub(crate) fn stats(&self) -> Answer<v1::Stats> {
        self.get_stats(v1::GetStatsRequest {})
    }

    /// One stream with these batches: the replies, and what ended it early.
    pub(crate) fn append_batches(
        &self,
        document: u64,
        batches: Vec<Vec<v1::NewBlock>>,
    ) -> (Vec<v1::AppendReply>, Option<Refusal>) {
        let requests =
            batches.into_iter().map(move |blocks| v1::AppendRequest { document, blocks, expected_tokens: None });
        let mut memory = self.memory.clone();
        runtime().block_on(async {
            match memory.append(tokio_stream::iter(requests.collect::<Vec<_>>())).await {
                Ok(replies) => read_all(replies.into_inner()).await,
                Err(status) => (Vec::new(), Some(status.into())),
            }
        })
    }

    /// One batch: the document with it.
    pub(crate) fn append(&self, document: u64, blocks: Vec<v1::NewBlock>) -> Answer<v1::DocumentInfo> {
        let mut replies = whole(self.append_batches(document, vec![blocks]))?;
        assert_eq!(replies.len(), 1, "one reply for one batch");
        Ok(replies.remove(0).document.expect("AppendReply.document is always present"))
    }

    /// Blocks as they came, and what ended the stream early.
    pub(crate) fn fetch_until(&self, request: v1::FetchRequest) -> (Vec<v1::FetchReply>, Option<Refusal>) {
        let mut memory = self.memory.clone();
        runtime().block_on(async {
            match memory.fetch(request).await {
                Ok(replies) => read_all(replies.into_inner()).await,
                Err(status) => (Vec::new(), Some(status.into())),
            }
        })
    }

    /// Blocks as f32.
    pub(crate) fn fetch(&self, document: u64, blocks: impl IntoIterator<Item = u32>) -> Answer<Vec<v1::FetchReply>> {
        let blocks = blocks.into_iter().collect();
        whole(self.fetch_until(v1::FetchRequest { document, blocks, dtype: v1::Dtype::F32.into() }))
    }

    pub(crate) fn blocks(&self, document: u64, begin: u32, end: u32) -> Answer<Vec<v1::BlockInfo>> {
        let range = Some(v1::BlockRange { document, begin, end });
        let mut admin = self.admin.clone();
        runtime().block_on(async {
            whole(read_all(admin.list_blocks(v1::ListBlocksRequest { range }).await?.into_inner()).await)
        })
    }

    pub(crate) fn documents(&self, collection: u32) -> Answer<Vec<v1::DocumentInfo>> {
        let mut admin = self.admin.clone();
        runtime().block_on(async {
            whole(read_all(admin.list_documents(v1::ListDocumentsRequest { collection }).await?.into_inner()).await)
        })
    }

    pub(crate) fn collections(&self) -> Answer<Vec<v1::CollectionInfo>> {
        let mut admin = self.admin.clone();
        runtime().block_on(async {
            whole(read_all(admin.list_collections(v1::ListCollectionsRequest {}).await?.into_inner()).await)
        })
    }

    pub(crate) fn verify(&self, document: Option<u64>) -> Answer<v1::VerifyReport> {
        let mut admin = self.admin.clone();
        let replies = runtime().block_on(async {
            whole(read_all(admin.verify(v1::VerifyRequest { document, rebuild: false }).await?.into_inner()).await)
        })?;
        match replies.into_iter().last().and_then(|reply| reply.state) {
            Some(v1::verify_reply::State::Report(report)) => Ok(report),
            other => panic!("the last message of Verify is its report, found {other:?}"),
        }
    }
}
