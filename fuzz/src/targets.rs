//! What do bytes from outside do to the code that reads them? One function for each target of `fuzz/`: each takes any bytes and
//! says whether they were what they posed as. What must never happen is a panic.
//!
//! What looks inside of a layer lies beside it (`store::fuzz`, `wire::fuzz`, `llm::fuzz`), behind the feature `fuzzing`.

use std::sync::LazyLock;

use bytes::Bytes;

use landmarkdb::store::{Store, fuzz as store};
use landmarkdb::{
    AppendRequest, BlockMemory, BlockRange, BlockScore, BlockText, CollectionId, CollectionSpec, DType, DocumentId,
    FetchRequest, Granularity, KeyRule, LocalMemory, LookupRequest, MemoryError, ModelShape, NewBlock, Result, Rope,
    Sha256Digest, Tensor,
};
use landmarkdb_grpc::wire::fuzz as wire;
use landmarkdb_grpc::wire::fuzz::Request;

/// Requests of one input that are asked one after the other.
pub const REQUESTS_MAX: usize = 8;

/// Blocks that are asked for of one document.
const BLOCKS_MAX: u32 = 16;

/// Bytes of landmark keys in memory: so few that some documents are read in passing.
const KEYS_BYTES: u64 = 1 << 12;

/// A segment file, alone in a data directory.
pub fn segment(bytes: &[u8]) -> bool {
    store::segment(bytes, ask_everything)
}

/// A packed record, or a header.
pub fn record(bytes: &[u8]) -> bool {
    store::record(bytes)
}

/// Requests, each behind its method and its length, to a memory with a few documents.
pub fn request(bytes: &[u8]) -> bool {
    let Some(memory) = ORIGINAL.copy().map(over) else { return false };
    let mut answered = false;
    for (method, message) in messages(bytes).take(REQUESTS_MAX) {
        let asked = wire::request(method, &Bytes::copy_from_slice(message)).and_then(|request| ask(&memory, request));
        match asked {
            Ok(()) => answered = true,
            Err(error) => assert!(is_refusal(&error), "{error:?}"),
        }
    }
    let report = memory.verify_rebuild(&mut |_, _| {}, &landmarkdb::Until::FOREVER);
    assert_eq!(report.map(|report| report.faults), Ok(Vec::new()), "requests damage nothing");
    answered
}

/// An answer of a service, as a client reads it.
pub fn reply(bytes: &[u8]) -> bool {
    wire::reply(bytes)
}

/// A GGUF file.
pub fn gguf(bytes: &[u8]) -> bool {
    landmarkdb_llm::fuzz::gguf(bytes)
}

/// A folder with a configuration and weights.
pub fn safetensors(bytes: &[u8]) -> bool {
    landmarkdb_llm::fuzz::safetensors(bytes)
}

/// A folder with an adapter.
pub fn adapter(bytes: &[u8]) -> bool {
    landmarkdb_llm::fuzz::adapter(bytes)
}

/// A `tokenizer.json`.
pub fn tokenizer(bytes: &[u8]) -> bool {
    landmarkdb_llm::fuzz::tokenizer(bytes)
}

/// An archive that a model comes in.
pub fn archive(bytes: &[u8]) -> bool {
    landmarkdb_llm::fuzz::archive(bytes)
}

fn over(store: Store) -> LocalMemory {
    LocalMemory::over(store).with_keys(KEYS_BYTES)
}

/// What lies behind one method and length after the other, up to the end.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (&[method, low, high], rest) = bytes.split_first_chunk()?;
        let (message, rest) = rest.split_at(rest.len().min(u16::from_le_bytes([low, high]) as usize));
        bytes = rest;
        Some((method, message))
    })
}

fn ask(memory: &LocalMemory, request: Request) -> Result<()> {
    match request {
        Request::Append(request) => memory.append(request).map(drop),
        Request::Lookup(request) => memory.lookup(&request).map(drop),
        Request::Attend(request) => memory.attend(&request).map(drop),
        Request::AttendAll(requests) => memory.attend_all(&requests).into_iter().try_for_each(|one| one.map(drop)),
        Request::Fetch(request) => memory.fetch(&request).map(drop),
        Request::OpenCollection(spec) => memory.open_collection(&spec).map(drop),
        Request::ListCollections => memory.collections().map(drop),
        Request::SetEngine(collection, engine) => memory.set_engine(collection, engine).map(drop),
        Request::OpenDocument(collection, name) => memory.open_document(collection, &name).map(drop),
        Request::ListDocuments(collection) => memory.documents(collection).map(drop),
        Request::GetDocument(document) => memory.document(document).map(drop),
        Request::SealDocument(document) => memory.seal(document).map(drop),
        Request::ListBlocks(range) => memory.blocks(&range).map(drop),
        Request::ReplaceDocument(document, by) => memory.replace(document, by).map(drop),
        Request::DeleteDocument(document) => memory.delete(document).map(drop),
        Request::GetStats => memory.stats().map(drop),
        Request::PutState(document, state) => memory.put_state(document, state).map(drop),
        Request::GetStatePart(document, part) => memory.state_part(document, part).map(drop),
        Request::Verify(document) => memory.verify(document, &mut |_, _| {}).map(drop),
    }
}

/// Whether an error blames the request: the disk works, and there is no other caller.
fn is_refusal(error: &MemoryError) -> bool {
    use MemoryError::*;
    matches!(
        error,
        NotFound { .. }
            | Missing { .. }
            | Invalid { .. }
            | FingerprintMismatch { .. }
            | Conflict { .. }
            | Sealed { .. }
            | OutOfOrder { .. }
            | UnexpectedLength { .. }
            | LimitExceeded { .. }
    )
}

/// Asks a memory over a store whose records may say anything: damage is an error of its own.
fn ask_everything(store: Store) {
    let memory = over(store);
    let answered = |result: Result<()>| match result {
        Ok(()) => {}
        Err(error) => assert!(is_refusal(&error) || matches!(error, MemoryError::DataLoss { .. }), "{error:?}"),
    };
    for collection in memory.collections().unwrap_or_default() {
        for document in memory.documents(collection.id).unwrap_or_default() {
            answered(memory.state(document.id).map(drop));
            let blocks = document.blocks.min(BLOCKS_MAX);
            let range = BlockRange { document: document.id, blocks: 0..blocks + 1 };
            answered(memory.blocks(&range).map(drop));
            for index in 0..=blocks {
                let request = FetchRequest { document: document.id, blocks: vec![index], dtype: DType::F32 };
                answered(memory.fetch(&request).map(drop));
            }
            answered(memory.lookup(&lookup(&collection, document.id, 0..blocks)).map(drop));
        }
    }
}

fn lookup(
    collection: &landmarkdb::CollectionInfo,
    document: DocumentId,
    blocks: std::ops::Range<u32>,
) -> LookupRequest {
    let shape = &collection.spec.shape;
    LookupRequest {
        collection: collection.id,
        layer: shape.layers - 1,
        queries: vec![1.0; (shape.query_heads * shape.head_dim) as usize],
        distances: vec![0],
        scope: vec![BlockRange { document, blocks }],
        top_k: 2,
        block_score: BlockScore::LogSumExp,
        granularity: Granularity::TokenHead,
    }
}

/// Two collections, of token keys in int8 and of landmarks in f16. In each a document of three blocks and a tail; in the first
/// also one that is sealed, and an empty one.
static ORIGINAL: LazyLock<store::Original> = LazyLock::new(|| {
    store::Original::new(|store| {
        let memory = over(store);
        for (name, key_rule, dtype) in
            [("tokens", KeyRule::Tokens, DType::Int8), ("landmarks", KeyRule::Landmark, DType::F16)]
        {
            let collection = memory.open_collection(&spec(name, key_rule, dtype)).expect("a collection").id;
            let document = memory.open_document(collection, "long").expect("a document").id;
            memory.append(append(document, 3, 1)).expect("an append");
        }
        let sealed = memory.open_document(CollectionId(1), "sealed").expect("a document").id;
        memory.append(append(sealed, 1, 0)).expect("an append");
        memory.seal(sealed).expect("a seal");
        memory.open_document(CollectionId(1), "empty").expect("a document");
    })
});

/// L = 1, Hq = 2, Hkv = 1, D = 4, B = 2.
pub fn spec(name: &str, key_rule: KeyRule, dtype: DType) -> CollectionSpec {
    CollectionSpec {
        name: name.into(),
        shape: ModelShape {
            layers: 1,
            query_heads: 2,
            kv_heads: 1,
            head_dim: 4,
            block_tokens: 2,
            rope: Rope::from_base(100.0, 4),
            unrotated_layers: Vec::new(),
            softmax_scale: 0.5,
        },
        key_rule,
        payload_dtype: dtype,
        key_dtype: dtype,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "none".into(),
    }
}

/// So many full blocks, and behind them a tail of so many tokens.
pub fn append(document: DocumentId, full: u32, tail: u32) -> AppendRequest {
    let tail = (tail > 0).then_some((full, tail));
    let blocks = (0..full).map(|index| (index, 2)).chain(tail).map(|(index, tokens)| block(index, tokens)).collect();
    AppendRequest { document, blocks, expected_tokens: Some(0) }
}

pub fn block(index: u32, tokens: u32) -> NewBlock {
    let values: Vec<f32> = (0..4 * tokens).map(|i| (i + index) as f32 / 8.0 - 1.0).collect();
    let tensor = || Tensor::from_f32(vec![1, 1, tokens, 4], &values);
    let text = BlockText { start: 6 * index as u64, bytes: b"blocks".to_vec(), offsets: (0..tokens).collect() };
    NewBlock { index, token_ids: (0..tokens).map(|token| 2 * index + token).collect(), text, k: tensor(), v: tensor() }
}
