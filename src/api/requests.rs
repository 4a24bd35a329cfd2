//! Requests of a block memory, and the replies to them.

use bytes::Bytes;

use super::error::{MemoryError, Result};
use crate::limits;
use crate::shape::{CollectionSpec, Fingerprint};
use crate::types::{
    BlockId, BlockRange, BlockScore, CollectionId, DType, DocumentId, Engine, Granularity, KeyRule, Normalisation,
    Placement,
};

/// A tensor as raw little-endian values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// f32, f16 or bf16; never int8.
    pub dtype: DType,
    /// Length of each axis, the slowest first. No axis means a single value.
    pub shape: Vec<u32>,
    /// Exactly `product(shape)` values of `dtype`.
    pub data: Bytes,
}

/// A collection that exists.
#[derive(Clone, Debug, PartialEq)]
pub struct CollectionInfo {
    /// Names the collection in requests.
    pub id: CollectionId,
    /// As the collection was created with.
    pub spec: CollectionSpec,
    /// [`CollectionSpec::fingerprint`] of `spec`.
    pub fingerprint: Fingerprint,
    /// Documents in the collection, sealed and open.
    pub documents: u64,
    /// Answers lookups in the collection. New collections have [`Engine::Flat`].
    pub engine: Engine,
}

/// A document that exists, as of its last acknowledged append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentInfo {
    /// Names the document in requests.
    pub id: DocumentId,
    /// The collection that the document was opened in; it never moves to another.
    pub collection: CollectionId,
    /// 1 to 255 bytes without control characters, unique within the collection.
    pub name: String,
    /// Sealed documents take no more appends.
    pub sealed: bool,
    /// Full blocks: they can be looked up.
    pub blocks: u32,
    /// Tokens after the last full block, 0 to B - 1: the tail. It can be fetched as block index `blocks` and, of a sealed
    /// document, looked up as that ([`eligible_blocks`](Self::eligible_blocks)).
    pub tail_tokens: u32,
    /// `blocks * B + tail_tokens`
    pub tokens: u64,
    /// Bytes of source text that the tokens cover.
    pub text_bytes: u64,
    /// Bytes on disk: payload, keys, text, state and headers.
    pub stored_bytes: u64,
    /// [`SequenceState::tokens`] of the state that the document keeps. `None`: it keeps none.
    pub state_tokens: Option<u64>,
}

impl DocumentInfo {
    /// Blocks that a lookup may name: the full ones and, once the document is sealed, its tail, a block of fewer tokens. Not in a
    /// collection of landmark keys: a tail has no landmark. `rule` is the collection's.
    pub fn eligible_blocks(&self, rule: KeyRule) -> u32 {
        self.blocks + (self.sealed && self.tail_tokens > 0 && rule.covers_tails()) as u32
    }
}

/// What a model needs besides the blocks of a document to continue it, such as K and V of layers that see no more than a
/// window: bytes that mean nothing to a memory.
///
/// A document keeps one, which is replaced as a whole. It may be older than the document: whoever continues an open one goes
/// back to these tokens, and blocks that are appended again are skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceState {
    /// Tokens of the document, from its first on, that the state was taken after.
    pub tokens: u64,
    /// 1 to [`limits::STATE_PARTS_MAX`] parts of 1 to [`limits::STATE_PART_BYTES_MAX`] bytes each, at most
    /// [`limits::STATE_BYTES_MAX`] in all.
    pub parts: Vec<Bytes>,
}

/// One part of a document's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePart {
    /// Of the state: one that takes its place has another.
    pub version: u64,
    /// [`SequenceState::tokens`] of the state.
    pub tokens: u64,
    /// Parts of the state.
    pub parts: u32,
    /// The part.
    pub bytes: Bytes,
}

/// The source text of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockText {
    /// Where the block begins in the document's source text, in bytes.
    pub start: u64,
    /// The source text, at most [`limits::BLOCK_TEXT_BYTES_MAX`] bytes. A block may begin or end inside a UTF-8 sequence.
    pub bytes: Vec<u8>,
    /// `(tokens)`: where each token begins in `bytes`, not decreasing.
    pub offsets: Vec<u32>,
}

/// One block to append, or, with fewer than B tokens and last in its request, the document's new tail.
///
/// Values of K and V must be finite: at most 65,504 in size where the collection stores them in f16 (K also where its
/// keys are f16), at most [`limits::NUMBER_MAX`] elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct NewBlock {
    /// Position in the document, counted in blocks.
    pub index: u32,
    /// `(tokens)`: B of them, 1 to B in the last block of a request.
    pub token_ids: Vec<u32>,
    /// The text that the tokens cover; empty `bytes` where there is none.
    pub text: BlockText,
    /// `(L, Hkv, tokens, D)`, each key rotated by its offset inside the block only.
    pub k: Tensor,
    /// `(L, Hkv, tokens, D)`
    pub v: Tensor,
}

/// Appends consecutive blocks. Idempotent: the memory skips durable blocks with the same token ids and refuses those with
/// others ([`MemoryError::Conflict`]). Blocks at the index of a tail replace it, except for a repetition of its first tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct AppendRequest {
    /// An open document.
    pub document: DocumentId,
    /// 1 to [`limits::APPEND_BLOCKS_MAX`], by ascending index. All of them become durable, or none.
    pub blocks: Vec<NewBlock>,
    /// Tokens that the document has, if the caller is to be its only writer: at another length nothing is appended
    /// ([`MemoryError::UnexpectedLength`]), unless all blocks are durable already. `None` replaces any tail.
    pub expected_tokens: Option<u64>,
}

/// Where the local window begins and what may be retrieved for it. See [`AttendRequest`] for the geometry.
#[derive(Clone, Debug, PartialEq)]
pub struct LookupRequest {
    /// The collection of all documents in `scope`.
    pub collection: CollectionId,
    /// 0 to L - 1.
    pub layer: u32,
    /// `(T, Hq, D)`, before RoPE. Finite, at most [`limits::NUMBER_MAX`] in size, after the softmax scale too.
    pub queries: Vec<f32>,
    /// `(T)`, T from 1 to [`limits::QUERY_TOKENS_MAX`]: tokens from the start of the local window to each query, 0 for the
    /// window's first token.
    pub distances: Vec<u32>,
    /// The eligible blocks, in document order: outside the local window and not the sink. The last entry is the
    /// document that the local window continues; its last blocks lie just before the window. Ranges may be empty, and end at
    /// [`DocumentInfo::eligible_blocks`] at most: the tail of a sealed document is a block of fewer tokens, and of fewer keys. At most
    /// [`limits::SCOPE_DOCUMENTS_MAX`] entries.
    pub scope: Vec<BlockRange>,
    /// k, 1 to [`limits::TOP_K_MAX`]; fewer eligible blocks give fewer hits.
    pub top_k: u32,
    /// How the m scores of a block become one.
    pub block_score: BlockScore,
    /// Which query tokens and heads choose blocks together.
    pub granularity: Granularity,
}

/// A lookup, and attention over the blocks that it finds.
///
/// Geometry (the paper's stingy position mapping). Let `n` be the number of eligible blocks, `k = min(top_k, n)`, and
/// "recent" the last `min(k, blocks of the last scope entry)` eligible blocks. Just before the window lie
/// `slots = n` slots of B positions if every eligible block is recent, else `slots = k + 1`. Slot `s` begins
/// `(slots - s) * B` tokens before the window. With older blocks present they are scored in slot 0; the recent
/// block that is `j`-th from the end (j = 1 is the last) is scored in slot `slots - j`, where it really is. The
/// blocks retrieved for one row, in document order, fill the slots: rank `i` takes slot `i`, or `i + 1` when the
/// block is recent and older blocks exist. So with all blocks retrieved everything is at its true position. A tail fills the
/// first positions of its slot; the others stay empty.
///
/// That is [`Placement::Slots`]. With [`Placement::Original`] blocks are scored and chosen in the same way, and attended to at
/// their own distances. Each document of the scope ends where the window begins, so a block begins `blocks * B` tokens before the
/// window, where `blocks` counts from its index to the largest end among the ranges of its document. Where that is too far, it stands as far
/// as it may, behind those of its document that are older: of a row's blocks of one document, rank `i` (0 is the oldest) stands
/// at most `max(slots, F - 1) - i` blocks before the window. `F` full blocks fit between the window and
/// `within_tokens - 1` tokens before the query; the farthest is left for the sink. Consecutive ranges of one document are ranked
/// together. With all blocks of one document retrieved that is again what slots give.
#[derive(Clone, Debug, PartialEq)]
pub struct AttendRequest {
    /// Chooses the blocks to attend to.
    pub lookup: LookupRequest,
    /// How scores inside the chosen blocks become weights.
    pub normalisation: Normalisation,
    /// Where the chosen blocks stand.
    pub placement: Placement,
    /// Leaves out the first token of every document, unless it is the only one: for models that rest their attention on the first
    /// token (attention sinks, Xiao et al. 2023) where the caller has a sink of its own. Each further one would take as much of the attention
    /// as the first, and all else would be read too faintly. With [`Normalisation::Plain`] only.
    pub without_first_tokens: bool,
}

/// The chosen blocks.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Hits {
    /// Rows of choices, as [`Granularity::rows`] says.
    pub rows: u32,
    /// Blocks per row: `min(top_k, eligible)`.
    pub k: u32,
    /// `(rows, k)`, each row in document order (the order of the scope).
    pub blocks: Vec<BlockId>,
    /// `(rows, k)`: natural log of the block's share in the softmax over the eligible blocks, after aggregation.
    /// Sums over heads may exceed 0.
    pub scores: Vec<f32>,
}

/// Partial attention over the retrieved blocks.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Attended {
    /// `(T, Hq, D)`: softmax-weighted values; zeros where nothing was eligible.
    pub out: Vec<f32>,
    /// `(T, Hq)`: natural log of the softmax denominator (of scores times `softmax_scale`); -inf where nothing was
    /// eligible. Merges with the local window's part.
    pub lse: Vec<f32>,
    /// The blocks attended to: provenance is part of the answer.
    pub hits: Hits,
}

/// Reads stored blocks. Index `blocks` of a document is its tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchRequest {
    /// The document of all `blocks`.
    pub document: DocumentId,
    /// At most [`limits::FETCH_BLOCKS_MAX`] block indices, any order, repeats allowed; answered in this order.
    pub blocks: Vec<u32>,
    /// f32, f16 or bf16: what K and V are converted to.
    pub dtype: DType,
}

/// One block read back.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredBlock {
    /// The document and index that the request named.
    pub id: BlockId,
    /// `(tokens)`: B of them, fewer in a tail.
    pub token_ids: Vec<u32>,
    /// As it was appended.
    pub text: BlockText,
    /// `(L, Hkv, tokens, D)`, rotated by the offset inside the block.
    pub k: Tensor,
    /// `(L, Hkv, tokens, D)`
    pub v: Tensor,
}

/// A block without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// The document and the position in it.
    pub id: BlockId,
    /// `(tokens)`: B of them, fewer in a tail.
    pub token_ids: Vec<u32>,
    /// As it was appended.
    pub text: BlockText,
    /// Bytes of the block's record on disk, payload included.
    pub stored_bytes: u64,
}

/// Totals of one data directory. Counts of calls and blocks begin when the memory is opened.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Stats {
    /// Collections, empty ones included.
    pub collections: u64,
    /// Documents of all collections.
    pub documents: u64,
    /// Full blocks of all documents.
    pub blocks: u64,
    /// Tokens of all documents, tails included.
    pub tokens: u64,
    /// Bytes of records that documents refer to.
    pub live_bytes: u64,
    /// Bytes of all segment files.
    pub segment_bytes: u64,
    /// Segment files.
    pub segments: u64,
    /// Bytes of the catalog on disk.
    pub catalog_bytes: u64,
    /// Bytes set aside: torn ends and damaged segments, kept until the operator discards them.
    pub set_aside_bytes: u64,
    /// Bytes of landmark keys in memory now, and of their indexes.
    pub index_bytes: u64,
    /// Budget of `index_bytes`.
    pub index_bytes_max: u64,
    /// Reads of a document's keys, or of more of them, from disk into memory.
    pub index_loads: u64,
    /// Documents whose keys were evicted to make room for others.
    pub index_evictions: u64,
    /// Lookups answered, without those of attends.
    pub lookups: u64,
    /// Attends answered, each request of an `attend_all` counted.
    pub attends: u64,
    /// Full blocks made durable.
    pub appended_blocks: u64,
    /// Blocks read by fetches, repeats counted.
    pub fetched_blocks: u64,
    /// Which calls the memory can serve now.
    pub health: Health,
}

/// Which calls a memory can serve now.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Health {
    /// All calls.
    #[default]
    Serving,
    /// Reads and deletes, because the disk is full. Other writes fail.
    ReadOnly {
        /// Human-readable.
        reason: String,
    },
    /// None for certain: a write failed and could not be undone. Reads may work, and each write first tries to recover. A
    /// service reports itself as not serving.
    Failed {
        /// Human-readable.
        reason: String,
    },
}

/// One thing that verification found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The damaged document; `None` where the damage belongs to no single one.
    pub document: Option<DocumentId>,
    /// The damaged block; `None` where the damage belongs to no single one.
    pub block: Option<BlockId>,
    /// Human-readable.
    pub problem: String,
}

/// The extent of a verification, and the faults that it found.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Documents read.
    pub documents: u64,
    /// Full blocks and tails read.
    pub blocks: u64,
    /// Bytes of records read.
    pub bytes: u64,
    /// Bytes set aside: torn ends and damaged segments, kept until the operator discards them. No fault.
    pub set_aside_bytes: u64,
    /// Empty if everything is as it was written.
    pub faults: Vec<Fault>,
}

/// What to measure of the engines that may answer a collection's lookups.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneRequest {
    /// The collection to measure; one of its documents must have a full block.
    pub collection: CollectionId,
    /// 1 to [`limits::TUNE_QUERIES_MAX`], looked up in turn in the collection's longest document; recall is taken over the
    /// first 64. Use captured queries of the collection's model; random ones predict little.
    pub queries: Vec<TuneQuery>,
    /// k, the blocks of every choice, 1 to [`limits::TOP_K_MAX`].
    pub top_k: u32,
    /// The share of flat's blocks that an engine has to find, 0 to 1.
    pub recall: f64,
    /// Timed lookups per engine, 1 to [`limits::TUNE_LOOKUPS_MAX`]; 0 is 1.
    pub lookups: u32,
    /// FAISS indexes to measure beside the engines without settings, at most [`limits::TUNE_INDEXES_MAX`].
    pub indexes: Vec<TuneIndex>,
}

/// The query of one token at one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneQuery {
    /// 0 to L - 1.
    pub layer: u32,
    /// Tokens from the start of the local window.
    pub distance: u32,
    /// `(Hq, D)`, before RoPE.
    pub values: Vec<f32>,
}

/// A FAISS index to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TuneIndex {
    /// In the language of `faiss::index_factory`, at most [`limits::FAISS_FACTORY_BYTES_MAX`] bytes.
    pub factory: String,
    /// 1 to [`limits::FAISS_EFFORT_MAX`]. `None`: the smallest that reaches the recall, found by doubling.
    pub effort: Option<u32>,
}

/// Progress of [`BlockMemory::tune`](super::BlockMemory::tune).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TuneStep {
    /// A measurement begins.
    Measuring {
        /// The engine, with the effort of this measurement.
        engine: Engine,
        /// Full blocks of the document that is looked up in.
        blocks: u32,
    },
    /// An engine is skipped, because this machine has the hardware and not the rest.
    LeftOut {
        /// The skipped engine.
        engine: Engine,
        /// Human-readable.
        reason: String,
    },
}

/// Recall, latency and memory of one engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The engine, with the effort that was measured last.
    pub engine: Engine,
    /// The share of flat's blocks that were found, 0 to 1.
    pub recall: f64,
    /// Median latency of a lookup, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the latency of a lookup, in microseconds.
    pub p99_us: f64,
    /// Bytes of landmark keys and indexes that all documents of the collection take in memory, by what the measured one takes.
    pub index_bytes: u64,
}

/// The measurements of [`BlockMemory::tune`](super::BlockMemory::tune), and the engine that won.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneReport {
    /// The document that was looked up in.
    pub document: DocumentInfo,
    /// Answers lookups from now on: the fastest that reached the recall. An engine that takes more memory than another
    /// wins only if it is at least a tenth faster.
    pub engine: Engine,
    /// From the least memory to the most.
    pub measured: Vec<Measured>,
}

/// What a deletion removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Deleted {
    /// Full blocks that the document had.
    pub blocks: u32,
    /// Bytes of its records. A service gives them back to the disk in the background.
    pub freed_bytes: u64,
}

impl FetchRequest {
    /// Checks the number of blocks.
    ///
    /// # Errors
    /// [`MemoryError::LimitExceeded`] for more than [`limits::FETCH_BLOCKS_MAX`].
    pub fn check(&self) -> Result<()> {
        let (limit, found) = (limits::FETCH_BLOCKS_MAX as u64, self.blocks.len() as u64);
        if found <= limit { Ok(()) } else { Err(MemoryError::LimitExceeded { what: "blocks".into(), limit, found }) }
    }
}

/// Checks the number of requests of one [`BlockMemory::attend_all`](super::BlockMemory::attend_all).
///
/// # Errors
/// [`MemoryError::LimitExceeded`] for more than [`limits::ATTEND_REQUESTS_MAX`].
pub fn check_together(requests: usize) -> Result<()> {
    let (limit, found) = (limits::ATTEND_REQUESTS_MAX as u64, requests as u64);
    if found <= limit { Ok(()) } else { Err(MemoryError::LimitExceeded { what: "requests".into(), limit, found }) }
}

impl LookupRequest {
    /// Estimates the work without a look at the collection: query values times eligible and retrieved blocks. Compare with
    /// [`limits::LIGHT_WEIGHT_MAX`].
    pub fn weight(&self) -> u64 {
        let eligible: u64 = self.scope.iter().map(|range| range.blocks.len() as u64).sum();
        (self.queries.len() as u64).saturating_mul(eligible.saturating_add(self.top_k as u64))
    }

    /// Slots of B positions just before the local window; [`AttendRequest`] has the geometry.
    pub fn slots(&self) -> u32 {
        let of = |range: &BlockRange| range.blocks.len() as u32;
        let eligible: u32 = self.scope.iter().map(of).sum();
        let k = self.top_k.min(eligible);
        let recent = k.min(self.scope.last().map_or(0, of));
        if recent == eligible { eligible } else { k + 1 }
    }
}

impl SequenceState {
    /// Checks the number and the sizes of its parts.
    ///
    /// # Errors
    /// [`MemoryError::Missing`] for a state without parts or a part without bytes, [`MemoryError::LimitExceeded`] beyond
    /// [`limits`].
    pub fn check(&self) -> Result<()> {
        let at_most = |what: &str, limit, found| match found <= limit {
            true => Ok(()),
            false => Err(MemoryError::LimitExceeded { what: what.into(), limit, found }),
        };
        if self.parts.is_empty() || self.parts.iter().any(Bytes::is_empty) {
            return Err(MemoryError::Missing { field: "state.parts".into() });
        }
        at_most("parts of a state", limits::STATE_PARTS_MAX as u64, self.parts.len() as u64)?;
        let lens = || self.parts.iter().map(|part| part.len() as u64);
        let (largest, total) = (lens().max().unwrap_or(0), lens().sum());
        at_most("bytes of a part of a state", limits::STATE_PART_BYTES_MAX as u64, largest)?;
        at_most("bytes of a state", limits::STATE_BYTES_MAX, total)
    }
}

impl Tensor {
    /// A tensor of dtype f32. The product of `shape` must be `values.len()`.
    pub fn from_f32(shape: Vec<u32>, values: &[f32]) -> Self {
        debug_assert_eq!(shape.iter().map(|&n| n as usize).product::<usize>(), values.len());
        let data = values.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
        Tensor { dtype: DType::F32, shape, data: data.into() }
    }

    /// The values widened to f32: `product(shape)` of them.
    ///
    /// # Errors
    /// [`MemoryError::Invalid`] for dtype int8.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let pairs = || self.data.chunks_exact(2).map(|b| [b[0], b[1]]);
        Ok(match self.dtype {
            DType::F32 => self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            DType::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
            DType::BF16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
            DType::Int8 => {
                return Err(MemoryError::Invalid {
                    field: "dtype".into(),
                    expected: "f32, f16 or bf16".into(),
                    found: "int8".into(),
                });
            }
        })
    }

    /// Checks that dtype, shape and byte count agree with each other and with `shape`.
    ///
    /// # Errors
    /// [`MemoryError::Invalid`] for `field`.
    pub fn check(&self, field: &str, shape: &[u32]) -> Result<()> {
        let invalid = |expected: String, found: String| MemoryError::Invalid { field: field.into(), expected, found };
        if self.dtype == DType::Int8 {
            return Err(invalid("f32, f16 or bf16".into(), "int8".into()));
        }
        if self.shape != shape {
            return Err(invalid(format!("shape {shape:?}"), format!("{:?}", self.shape)));
        }
        let bytes = shape.iter().map(|&n| n as u64).product::<u64>() * self.dtype.size_bytes() as u64;
        if self.data.len() as u64 != bytes {
            return Err(invalid(format!("{bytes} bytes"), format!("{} bytes", self.data.len())));
        }
        Ok(())
    }
}
