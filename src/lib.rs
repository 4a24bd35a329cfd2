//! landmarkdb: a database for the block memory of language models.
//!
//! A model cuts its past into blocks. Each block has landmark keys per layer and KV head; every query scores them,
//! takes the top-k blocks, and attends to the tokens inside those together with its local window. landmarkdb keeps
//! the landmark keys in an index and the blocks' K and V on disk, and answers those lookups in process.
//!
//! ```
//! use landmarkdb::{AppendRequest, BlockMemory, BlockRange, BlockScore, BlockText, CollectionSpec, DType, Granularity, KeyRule, LocalMemory, LookupRequest, ModelShape, NewBlock, Rope, Sha256Digest, Tensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let memory = LocalMemory::open(folder.path())?;
//!
//! // A model of one layer, one head of dimension 2 without RoPE, and blocks of 2 tokens.
//! let (rope, digest) = (Rope { frequencies: vec![] }, Sha256Digest([0; 32]));
//! let shape = ModelShape {
//!     layers: 1, query_heads: 1, kv_heads: 1, head_dim: 2, block_tokens: 2, rope, unrotated_layers: vec![],
//!     softmax_scale: 1.0,
//! };
//! let collection = memory.open_collection(&CollectionSpec {
//!     name: "example".into(), shape, key_rule: KeyRule::Tokens, payload_dtype: DType::F16, key_dtype: DType::F16,
//!     model_digest: digest, tokenizer_digest: digest, model_name: "none".into(),
//! })?;
//!
//! // Two blocks of a document, whose keys point along different axes. They are durable when the append returns.
//! let document = memory.open_document(collection.id, "notes")?.id;
//! let block = |index: u32, key: [f32; 2]| NewBlock {
//!     index,
//!     token_ids: vec![0, 1],
//!     text: BlockText { start: 2 * index as u64, bytes: b"ab".to_vec(), offsets: vec![0, 1] },
//!     k: Tensor::from_f32(vec![1, 1, 2, 2], &[key, key].concat()),
//!     v: Tensor::from_f32(vec![1, 1, 2, 2], &[0.0; 4]),
//! };
//! let blocks = vec![block(0, [1.0, 0.0]), block(1, [0.0, 1.0])];
//! memory.append(AppendRequest { document, blocks, expected_tokens: Some(0) })?;
//!
//! // The block that a query along the second axis attends to.
//! let hits = memory.lookup(&LookupRequest {
//!     collection: collection.id, layer: 0, queries: vec![0.0, 1.0], distances: vec![0],
//!     scope: vec![BlockRange { document, blocks: 0..2 }], top_k: 1, block_score: BlockScore::Max,
//!     granularity: Granularity::Shared,
//! })?;
//! assert_eq!(hits.blocks[0].index, 1);
//! # Ok(())
//! # }
//! ```
//!
//! Where to go on
//! - [`BlockMemory`]: everything a memory does; requests, replies and errors beside it.
//! - [`LocalMemory`]: the memory of a data directory. [`BlockAttention`] reads and writes one for the
//!   layers of any model.
//! - `examples/embedded.rs`: the example above with RoPE, attention and reading blocks back.
//! - landmarkdb-grpc: a memory as a service. landmarkdb-llm: models that use one. landmarkdb-cli: the program.
//! - `docs/architecture.md`: positions, scores, the format on disk.
//!
//! Invariants
//! - Nothing is acknowledged before it is durable. An append that failed is cut off before the next one is written.
//! - Every payload and record carries a checksum; a mismatch is an error that names the block, never a wrong answer.
//! - A collection is bound to a model fingerprint; another model is refused with both fingerprints in the message.
//! - Readers hold a snapshot; a writer publishes the next one. No lock is held across I/O on the lookup path.
//! - Every size that arrives from outside is checked against `limits` before memory is allocated for it.

#![warn(missing_docs, unreachable_pub)]

// Values that every layer speaks.
mod shape;
mod types;
mod until;

pub mod limits;

// What a memory promises.
mod api;

// The memory of a data directory: ground state, derived state, and what owns both.
#[cfg(feature = "local")]
mod memory;

// Models that remember.
mod attention;

pub use api::{
    AppendRequest, AttendRequest, Attended, BlockInfo, BlockMemory, BlockText, CollectionInfo, Deleted, DocumentInfo,
    Entity, Fault, FetchRequest, Health, Hits, LookupRequest, Measured, MemoryError, NewBlock, Result, SequenceState,
    StatePart, Stats, StoredBlock, Tensor, TuneIndex, TuneQuery, TuneReport, TuneRequest, TuneStep, VerifyReport,
    check_together,
};
pub use attention::{
    AtHandReads, AttentionError, BlockAttention, BlockReads, CHUNK_TOKENS, CountedFrom, HeadReads, Layers, NewTokens,
    Place, Reads, Retrieval, SequenceAttention, Window,
};
#[cfg(feature = "local")]
pub use memory::{GPU_CACHE_BYTES, LocalMemory, WORK_BYTES, keys_bytes};
pub use shape::{CollectionSpec, Fingerprint, InvalidShape, ModelShape, Rope, Rotation, Sha256Digest, check_name};
pub use types::{
    BlockId, BlockRange, BlockScore, CollectionId, DType, DocumentId, Engine, FaissIndex, Granularity, KeyRule,
    LayerHead, Normalisation, Placement,
};
pub use until::Until;

// For the other packages of this workspace, their tests and benchmarks: may change in any version.
#[doc(hidden)]
pub mod budget;
#[cfg(feature = "local")]
#[doc(hidden)]
pub mod cuda;
#[cfg(feature = "local")]
#[doc(hidden)]
pub mod index;
#[doc(hidden)]
pub mod lock;
#[doc(hidden)]
pub mod lru;
#[cfg(feature = "local")]
#[doc(hidden)]
pub mod store;
