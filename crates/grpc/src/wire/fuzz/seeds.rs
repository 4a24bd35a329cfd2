//! What are requests and answers? Inputs to begin with, as clients and services write them.

use prost::Message;

use super::super::put_state_messages;
use super::*;
use landmarkdb::{BlockId, BlockText, Fault, Health, Stats, VerifyReport};

/// A message to the method of this number, as [`request`] takes it.
pub fn message(method: u8, request: &Request) -> Vec<u8> {
    use Request::*;
    match request.clone() {
        Append(request) => v1::AppendRequest::from(request).encode_to_vec(),
        Lookup(request) if method == 4 => {
            v1::LookupStreamRequest { id: 1, request: Some((&request).into()), timeout_ms: 5 }.encode_to_vec()
        }
        Lookup(request) => v1::LookupRequest::from(&request).encode_to_vec(),
        Attend(request) if method == 5 => {
            v1::AttendStreamRequest { id: 1, request: Some((&request).into()), timeout_ms: 5 }.encode_to_vec()
        }
        Attend(request) => v1::AttendRequest::from(&request).encode_to_vec(),
        AttendAll(all) => v1::AttendAllRequest { requests: all.iter().map(Into::into).collect() }.encode_to_vec(),
        Fetch(request) => v1::FetchRequest::from(request).encode_to_vec(),
        OpenCollection(spec) => v1::OpenCollectionRequest { spec: Some(spec.into()) }.encode_to_vec(),
        SetEngine(collection, engine) => v1::SetEngineRequest::from((collection, engine)).encode_to_vec(),
        OpenDocument(collection, name) => v1::OpenDocumentRequest { collection: collection.0, name }.encode_to_vec(),
        ListDocuments(collection) => v1::ListDocumentsRequest { collection: collection.0 }.encode_to_vec(),
        GetDocument(document) => v1::GetDocumentRequest { document: document.0 }.encode_to_vec(),
        SealDocument(document) => v1::SealDocumentRequest { document: document.0 }.encode_to_vec(),
        DeleteDocument(document) => v1::DeleteDocumentRequest { document: document.0 }.encode_to_vec(),
        ListBlocks(range) => v1::ListBlocksRequest { range: Some(range.into()) }.encode_to_vec(),
        Verify(document) => {
            v1::VerifyRequest { document: document.map(|document| document.0), rebuild: true }.encode_to_vec()
        }
        PutState(document, state) => put_state_messages(document, state)[0].encode_to_vec(),
        GetStatePart(document, part) => v1::GetStatePartRequest { document: document.0, part }.encode_to_vec(),
        ReplaceDocument(document, by) => v1::ReplaceDocumentRequest { document: document.0, by: by.0 }.encode_to_vec(),
        ListCollections | GetStats => Vec::new(),
    }
}

/// An answer of each kind, behind the byte that says which.
pub fn replies(spec: &CollectionSpec, block: &landmarkdb::NewBlock) -> Vec<Vec<u8>> {
    let id = BlockId { document: DocumentId(3), index: 1 };
    let hits = || Hits { rows: 1, k: 2, blocks: vec![id; 2], scores: vec![-0.5, -1.0] };
    let attended = || Attended { out: vec![0.5; 4], lse: vec![1.0], hits: hits() };
    let refused = || MemoryError::LimitExceeded { what: "scope".into(), limit: 1024, found: 1025 };
    let outcomes = vec![Ok(attended()).into(), Err(refused()).into()];
    let text = || BlockText { start: 4, bytes: b"text".to_vec(), offsets: vec![0, 2] };
    let (k, v) = (block.k.clone(), block.v.clone());
    let stored = StoredBlock { id, token_ids: vec![7, 8], text: text(), k, v };
    let engine = Engine::Faiss(landmarkdb::FaissIndex { factory: "HNSW32".into(), effort: 64 });
    let collection = CollectionInfo {
        id: CollectionId(1),
        spec: spec.clone(),
        fingerprint: spec.fingerprint(),
        documents: 2,
        engine,
    };
    let info = BlockInfo { id, token_ids: vec![7, 8], text: text(), stored_bytes: 300 };
    let stats = Stats { blocks: 5, health: Health::ReadOnly { reason: "full".into() }, ..Stats::default() };
    let fault = Fault { document: Some(id.document), block: Some(id), problem: "its checksum".into() };
    let report = VerifyReport { documents: 1, blocks: 2, faults: vec![fault], ..VerifyReport::default() };
    let bodies = [
        (0, v1::LookupReply::from(hits()).encode_to_vec()),
        (1, v1::AttendReply::from(attended()).encode_to_vec()),
        (2, v1::AttendAllReply { outcomes }.encode_to_vec()),
        (3, v1::FetchReply::from(stored).encode_to_vec()),
        (4, v1::CollectionInfo::from(collection).encode_to_vec()),
        (5, v1::BlockInfo::from(info).encode_to_vec()),
        (7, v1::Stats::from(stats).encode_to_vec()),
        (8, v1::VerifyReport::from(report).encode_to_vec()),
        (9, v1::Error::from(&MemoryError::DataLoss { block: Some(id), detail: "gone".into() }).encode_to_vec()),
        (11, v1::StatePart { version: 1 << 63, tokens: 7, parts: 2, part: vec![1; 9].into() }.encode_to_vec()),
        (10, to_status(&MemoryError::Busy { what: "memory".into(), retry_ms: 250 }).details().to_vec()),
    ];
    bodies.into_iter().map(|(kind, body)| [vec![kind], body].concat()).collect()
}
