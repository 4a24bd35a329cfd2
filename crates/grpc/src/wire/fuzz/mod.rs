//! What do arbitrary bytes of a message become? A request or an answer that goes out again as it came in, in
//! as much memory as its bounds have said, or an error.

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status};

use super::convert::required;
use super::{ArrivingState, Chunks, bounds, from_status, to_status, v1};
use landmarkdb::{
    AppendRequest, AttendRequest, Attended, BlockInfo, BlockRange, CollectionId, CollectionInfo, CollectionSpec,
    DocumentId, DocumentInfo, Engine, FetchRequest, Hits, LookupRequest, MemoryError, Result, SequenceState, StatePart,
    StoredBlock,
};

pub mod seeds;

/// What any message takes: a list of one number has room for four.
const MESSAGE_BYTES: u64 = 1024;

/// A request, as a memory is asked it.
#[derive(Clone)]
pub enum Request {
    /// Blocks for a document.
    Append(AppendRequest),
    /// A lookup by itself, or one of a stream.
    Lookup(LookupRequest),
    /// An attend by itself, or one of a stream.
    Attend(AttendRequest),
    /// Attends that are answered together.
    AttendAll(Vec<AttendRequest>),
    /// Blocks of a document with K, V and text.
    Fetch(FetchRequest),
    /// The collection of a specification, made if it is not there.
    OpenCollection(CollectionSpec),
    /// All collections.
    ListCollections,
    /// The engine for all further lookups in a collection.
    SetEngine(CollectionId, Engine),
    /// The document of a name in a collection, made if it is not there.
    OpenDocument(CollectionId, String),
    /// All documents of a collection.
    ListDocuments(CollectionId),
    /// A document as it is now.
    GetDocument(DocumentId),
    /// No more appends to a document.
    SealDocument(DocumentId),
    /// Blocks of a document without K and V.
    ListBlocks(BlockRange),
    /// A document and its blocks are to go.
    DeleteDocument(DocumentId),
    /// Totals of the data directory.
    GetStats,
    /// A check of what a document holds on disk. `None`: of all documents.
    Verify(Option<DocumentId>),
    /// A state of one part for a document.
    PutState(DocumentId, SequenceState),
    /// A part of a document's state.
    GetStatePart(DocumentId, u32),
    /// A document is to give way to another.
    ReplaceDocument(DocumentId, DocumentId),
}

/// What a service makes of a message to the method of this number.
pub fn request(method: u8, message: &Bytes) -> Result<Request> {
    match method % 21 {
        0 => arrive("Append", message, |append: &v1::AppendRequest| append.blocks.iter().map(block_bytes).sum())
            .and_then(same::<_, AppendRequest>)
            .map(Request::Append),
        1 => arrive("Lookup", message, lookup_bytes).and_then(lookup).map(Request::Lookup),
        2 => arrive("Attend", message, attend_bytes).and_then(attend).map(Request::Attend),
        3 => {
            let all = |all: &v1::AttendAllRequest| all.requests.iter().map(attend_bytes).sum();
            let requests = arrive("AttendAll", message, all)?.requests;
            requests.into_iter().map(attend).collect::<Result<_>>().map(Request::AttendAll)
        }
        4 => {
            arrive("LookupStream", message, |one: &v1::LookupStreamRequest| one.request.iter().map(lookup_bytes).sum())
                .and_then(|one| lookup(required("request", one.request)?))
                .map(Request::Lookup)
        }
        5 => {
            arrive("AttendStream", message, |one: &v1::AttendStreamRequest| one.request.iter().map(attend_bytes).sum())
                .and_then(|one| attend(required("request", one.request)?))
                .map(Request::Attend)
        }
        6 => arrive("Fetch", message, |fetch: &v1::FetchRequest| 4 * fetch.blocks.capacity())
            .and_then(same::<_, FetchRequest>)
            .map(Request::Fetch),
        method => admin(method, message),
    }
}

fn admin(method: u8, message: &Bytes) -> Result<Request> {
    let nothing = |_: &_| 0;
    Ok(match method {
        7 => {
            let spec = arrive("", message, |_: &v1::OpenCollectionRequest| 0)?.spec;
            Request::OpenCollection(same(required("spec", spec)?)?)
        }
        8 => arrive("", message, |_: &v1::ListCollectionsRequest| 0).map(|_| Request::ListCollections)?,
        9 => {
            let (collection, engine) = same::<v1::SetEngineRequest, _>(arrive("", message, nothing)?)?;
            Request::SetEngine(collection, engine)
        }
        10 => {
            let v1::OpenDocumentRequest { collection, name } = arrive("", message, |_| 0)?;
            Request::OpenDocument(CollectionId(collection), name)
        }
        11 => {
            let v1::ListDocumentsRequest { collection } = arrive("", message, |_| 0)?;
            Request::ListDocuments(CollectionId(collection))
        }
        12 => {
            let v1::GetDocumentRequest { document } = arrive("", message, |_| 0)?;
            Request::GetDocument(DocumentId(document))
        }
        13 => {
            let v1::SealDocumentRequest { document } = arrive("", message, |_| 0)?;
            Request::SealDocument(DocumentId(document))
        }
        14 => {
            let v1::ListBlocksRequest { range } = arrive("", message, |_| 0)?;
            Request::ListBlocks(required("range", range)?.into())
        }
        15 => {
            let v1::DeleteDocumentRequest { document } = arrive("", message, |_| 0)?;
            Request::DeleteDocument(DocumentId(document))
        }
        16 => arrive("", message, |_: &v1::GetStatsRequest| 0).map(|_| Request::GetStats)?,
        18 => {
            let mut arriving = ArrivingState::default();
            arriving.push(arrive("PutState", message, |_: &v1::PutStateRequest| 0)?)?;
            let (document, state) = arriving.into_state()?;
            Request::PutState(document, state)
        }
        19 => {
            let v1::GetStatePartRequest { document, part } = arrive("GetStatePart", message, |_| 0)?;
            Request::GetStatePart(DocumentId(document), part)
        }
        20 => {
            let v1::ReplaceDocumentRequest { document, by } = arrive("", message, |_| 0)?;
            Request::ReplaceDocument(DocumentId(document), DocumentId(by))
        }
        _ => {
            let v1::VerifyRequest { document, .. } = arrive("", message, |_| 0)?;
            Request::Verify(document.map(DocumentId))
        }
    })
}

fn lookup(wire: v1::LookupRequest) -> Result<LookupRequest> {
    let request = LookupRequest::try_from(wire)?;
    same_again(&request, |request: &LookupRequest| v1::LookupRequest::from(request));
    Ok(request)
}

fn attend(wire: v1::AttendRequest) -> Result<AttendRequest> {
    let request = AttendRequest::try_from(wire)?;
    same_again(&request, |request: &AttendRequest| v1::AttendRequest::from(request));
    Ok(request)
}

/// Decodes a message as a service does: counted first, however it was cut on its way. `lists` are the bytes of the lists in it.
fn arrive<M: Message + Default>(method: &str, message: &Bytes, lists: impl Fn(&M) -> usize) -> Result<M> {
    let bounds = bounds(&format!("/landmark.v1.BlockMemory/{method}"));
    let chunks = |bytes: usize| -> Chunks { message.chunks(bytes).map(Bytes::copy_from_slice).collect() };
    let price = bounds.price(&chunks(message.len().max(1)));
    assert_eq!(bounds.price(&chunks(3)), price, "what a message costs, however it is cut");
    let (price, decoded) = (price?, decode::<M>(message)?);
    let (taken, allowed) = (lists(&decoded) as u64, price + message.len() as u64 + MESSAGE_BYTES);
    assert!(taken <= allowed, "lists of {taken} bytes, of a message that was counted as {allowed}");
    Ok(decoded)
}

fn decode<M: Message + Default>(message: &Bytes) -> Result<M> {
    let invalid = |found: prost::DecodeError| MemoryError::Invalid {
        field: "message".into(),
        expected: "one of proto3".into(),
        found: found.to_string(),
    };
    let decoded = M::decode(message.clone()).map_err(invalid)?;
    let bytes = decoded.encode_to_vec();
    let again = M::decode(&bytes[..]).map(|again| again.encode_to_vec());
    assert_eq!(again.as_ref(), Ok(&bytes), "a message is what is made of it");
    Ok(decoded)
}

/// A message as what it stands for, which stands for the same message.
fn same<M, T>(wire: M) -> Result<T>
where
    M: Message + Default + From<T>,
    T: TryFrom<M, Error = MemoryError> + Clone,
{
    let value = T::try_from(wire)?;
    same_again(&value, |value: &T| M::from(value.clone()));
    Ok(value)
}

fn same_again<M, T>(value: &T, wire: impl Fn(&T) -> M)
where
    M: Message + Default,
    T: TryFrom<M, Error = MemoryError>,
{
    let bytes = wire(value).encode_to_vec();
    let again = M::decode(&bytes[..]).ok().and_then(|again| T::try_from(again).ok());
    assert_eq!(again.map(|again| wire(&again).encode_to_vec()), Some(bytes), "a value is what its message says");
}

/// Bytes of lists in memory, and of the messages in them.
fn block_bytes(block: &v1::NewBlock) -> usize {
    let shape = |tensor: &Option<v1::Tensor>| tensor.as_ref().map_or(0, |tensor| 4 * tensor.shape.capacity());
    let offsets = block.text.as_ref().map_or(0, |text| 4 * text.offsets.capacity());
    size_of::<v1::NewBlock>() + 4 * block.token_ids.capacity() + offsets + shape(&block.k) + shape(&block.v)
}

fn lookup_bytes(lookup: &v1::LookupRequest) -> usize {
    4 * lookup.distances.capacity() + size_of::<v1::BlockRange>() * lookup.scope.len()
}

fn attend_bytes(attend: &v1::AttendRequest) -> usize {
    attend.lookup.as_ref().map_or(0, lookup_bytes)
}

/// What a client makes of an answer of the kind that the first byte says.
pub fn reply(bytes: &[u8]) -> bool {
    let Some((&kind, bytes)) = bytes.split_first() else { return false };
    let message = Bytes::copy_from_slice(bytes);
    let read = match kind % 12 {
        0 => decode(&message).and_then(same::<v1::LookupReply, Hits>).map(drop),
        1 => decode(&message).and_then(same::<v1::AttendReply, Attended>).map(drop),
        2 => decode(&message).and_then(outcomes),
        3 => decode(&message).and_then(same::<v1::FetchReply, StoredBlock>).map(drop),
        4 => decode(&message).and_then(same::<v1::CollectionInfo, CollectionInfo>).map(drop),
        5 => decode(&message).and_then(same::<v1::BlockInfo, BlockInfo>).map(drop),
        6 => decode(&message).map(|wire: v1::DocumentInfo| drop(v1::DocumentInfo::from(DocumentInfo::from(wire)))),
        7 => decode(&message).map(|wire: v1::Stats| drop(v1::Stats::from(landmarkdb::Stats::from(wire)))),
        8 => decode(&message).map(|wire: v1::VerifyReport| drop(landmarkdb::VerifyReport::from(wire))),
        11 => decode(&message).and_then(same::<v1::StatePart, StatePart>).map(drop),
        9 => decode(&message).and_then(|wire: v1::Error| MemoryError::try_from(wire)).map(|error| goes_round(&error)),
        _ => {
            let status = Status::with_details(Code::from(bytes.len() as i32 % 17), "refused", message);
            goes_round(&from_status(&status, "there", 1));
            Ok(())
        }
    };
    read.is_ok()
}

fn outcomes(wire: v1::AttendAllReply) -> Result<()> {
    wire.outcomes.into_iter().try_for_each(|outcome| Attended::try_from(outcome).map(drop))
}

/// An error, once its texts are cut to what a trailer holds, arrives as it was sent.
fn goes_round(error: &MemoryError) {
    let sent = |error: &MemoryError| from_status(&to_status(error), "there", 1);
    let once = sent(error);
    assert_eq!(sent(&once), once);
}
