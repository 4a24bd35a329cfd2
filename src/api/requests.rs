//! Requests of a block memory, and the replies to them.

use bytes::Bytes;

use super::error::{MemoryError, Result};
use crate::limits;
use crate::shape::{CollectionSpec, Fingerprint};
use crate::types::{
    BlockId, BlockRange, BlockScore, CollectionId, DType, DocumentId, Engine, Granularity, Normalisation,
};

/// A tensor as raw little-endian values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// f32, f16 or bf16; never int8.
    pub dtype: DType,
    pub shape: Vec<u32>,
    /// Exactly `shape` values of `dtype`.
    pub data: Bytes,
}

/// A collection that exists.
#[derive(Clone, Debug, PartialEq)]
pub struct CollectionInfo {
    pub id: CollectionId,
    pub spec: CollectionSpec,
    pub fingerprint: Fingerprint,
    pub documents: u64,
    /// What answers lookups in it. New collections have [`Engine::Flat`].
    pub engine: Engine,
}

/// A document that exists, as of its last acknowledged append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentInfo {
    pub id: DocumentId,
    pub collection: CollectionId,
    pub name: String,
    /// Sealed documents take no more appends.
    pub sealed: bool,
    /// Full blocks: they can be looked up.
    pub blocks: u32,
    /// Tokens after the last full block, 0 to B - 1. They can be fetched as block index `blocks`, not looked up.
    pub tail_tokens: u32,
    /// `blocks * B + tail_tokens`
    pub tokens: u64,
    /// Bytes of source text that the tokens cover.
    pub text_bytes: u64,
    /// Bytes on disk: payload, keys, text and headers.
    pub stored_bytes: u64,
}

/// The source text of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockText {
    /// Where the block begins in the document's source text, in bytes.
    pub start: u64,
    /// The source text. A block may begin or end inside a UTF-8 sequence.
    pub bytes: Vec<u8>,
    /// Where each token begins in `bytes`: one per token, not decreasing.
    pub offsets: Vec<u32>,
}

/// One block to append, or, with fewer than B tokens and last in its request, the document's new tail.
#[derive(Clone, Debug, PartialEq)]
pub struct NewBlock {
    /// Position in the document, counted in blocks.
    pub index: u32,
    /// One per token.
    pub token_ids: Vec<u32>,
    pub text: BlockText,
    /// `(L, Hkv, tokens, D)`, each key rotated by its offset inside the block only.
    pub k: Tensor,
    /// `(L, Hkv, tokens, D)`
    pub v: Tensor,
}

/// Appends consecutive blocks. Idempotent: blocks that are already durable are skipped if their token ids agree
/// and refused ([`MemoryError::Conflict`]) if not. A tail is replaced by whatever later comes at its index, but for the first
/// tokens of it, which are durable already.
#[derive(Clone, Debug, PartialEq)]
pub struct AppendRequest {
    pub document: DocumentId,
    pub blocks: Vec<NewBlock>,
    /// Tokens that the document has, if the caller is to be its only writer: with another number nothing is appended
    /// ([`MemoryError::UnexpectedLength`]), unless all blocks are durable already. Without it, whatever tail there is is replaced.
    pub expected_tokens: Option<u64>,
}

/// Where the local window begins and what may be retrieved for it. See [`AttendRequest`] for the geometry.
#[derive(Clone, Debug, PartialEq)]
pub struct LookupRequest {
    pub collection: CollectionId,
    pub layer: u32,
    /// `(T, Hq, D)`, before RoPE.
    pub queries: Vec<f32>,
    /// `(T)`: tokens from the start of the local window to each query, 0 for the window's first token.
    pub distances: Vec<u32>,
    /// The eligible blocks, in document order: outside the local window and not the sink. The last entry is the
    /// document that the local window continues; its last blocks lie just before the window. Empty ranges are fine.
    pub scope: Vec<BlockRange>,
    /// k; fewer eligible blocks give fewer hits.
    pub top_k: u32,
    pub block_score: BlockScore,
    pub granularity: Granularity,
}

/// Partial attention over the retrieved blocks.
///
/// Geometry (the paper's stingy position mapping). Let `n` be the number of eligible blocks, `k = min(top_k, n)`, and
/// "recent" the last `min(k, blocks of the last scope entry)` eligible blocks. Just before the window lie
/// `slots = n` slots of B positions if every eligible block is recent, else `slots = k + 1`. Slot `s` begins
/// `(slots - s) * B` tokens before the window. With older blocks present they are scored in slot 0; the recent
/// block that is `j`-th from the end (j = 1 is the last) is scored in slot `slots - j`, where it really is. The
/// blocks retrieved for one row, in document order, fill the slots: rank `i` takes slot `i`, or `i + 1` when the
/// block is recent and older blocks exist. So with all blocks retrieved everything is at its true position.
#[derive(Clone, Debug, PartialEq)]
pub struct AttendRequest {
    pub lookup: LookupRequest,
    pub normalisation: Normalisation,
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

/// What attention over the retrieved blocks gave.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Attended {
    /// `(T, Hq, D)`: softmax-weighted values; zeros where nothing was eligible.
    pub out: Vec<f32>,
    /// `(T, Hq)`: natural log of the softmax denominator (of scores times `softmax_scale`); -inf where nothing was
    /// eligible. Merges with the local window's part.
    pub lse: Vec<f32>,
    pub hits: Hits,
}

/// Reads stored blocks. Index `blocks` of a document is its tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchRequest {
    pub document: DocumentId,
    /// Block indices, any order, repeats allowed; answered in this order.
    pub blocks: Vec<u32>,
    /// f32, f16 or bf16: what K and V are converted to.
    pub dtype: DType,
}

/// One block read back.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredBlock {
    pub id: BlockId,
    pub token_ids: Vec<u32>,
    pub text: BlockText,
    /// `(L, Hkv, tokens, D)`, rotated by the offset inside the block.
    pub k: Tensor,
    /// `(L, Hkv, tokens, D)`
    pub v: Tensor,
}

/// A block without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    pub id: BlockId,
    pub token_ids: Vec<u32>,
    pub text: BlockText,
    pub stored_bytes: u64,
}

/// Totals of one data directory.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Stats {
    pub collections: u64,
    pub documents: u64,
    pub blocks: u64,
    pub tokens: u64,
    /// Bytes of records that documents refer to.
    pub live_bytes: u64,
    /// Bytes of all segment files.
    pub segment_bytes: u64,
    pub segments: u64,
    /// Bytes of the catalog on disk.
    pub catalog_bytes: u64,
    /// Bytes that torn ends cut off and of damaged segments, kept until the operator lets them go.
    pub set_aside_bytes: u64,
    /// Bytes of landmark keys held in memory now, and their indexes.
    pub index_bytes: u64,
    /// The bytes that they may take.
    pub index_bytes_max: u64,
    /// Times that a document's keys, or more of them, were read from disk to be held.
    pub index_loads: u64,
    /// Documents whose keys made room for others.
    pub index_evictions: u64,
    pub lookups: u64,
    pub attends: u64,
    pub appended_blocks: u64,
    pub fetched_blocks: u64,
    pub health: Health,
}

/// What a memory can do now. The reason is human-readable.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Health {
    /// All that it promises.
    #[default]
    Serving,
    /// It reads, and refuses writes.
    ReadOnly { reason: String },
    /// It answers nothing.
    Failed { reason: String },
}

/// One thing that verification found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub document: Option<DocumentId>,
    pub block: Option<BlockId>,
    /// Human-readable.
    pub problem: String,
}

/// What a verification read, and found.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VerifyReport {
    pub documents: u64,
    pub blocks: u64,
    pub bytes: u64,
    /// Bytes that torn ends cut off and of damaged segments, kept until the operator lets them go: no fault.
    pub set_aside_bytes: u64,
    pub faults: Vec<Fault>,
}

/// What to measure of the engines that may answer a collection's lookups.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneRequest {
    pub collection: CollectionId,
    /// Looked up in turn in the collection's longest document, 1 to `limits::TUNE_QUERIES_MAX`; recall is taken over the first
    /// 64. Use captured queries of the collection's model; random ones predict little.
    pub queries: Vec<TuneQuery>,
    /// k, the blocks of every choice, 1 to `limits::TOP_K_MAX`.
    pub top_k: u32,
    /// The share of flat's blocks that an engine has to find, 0 to 1.
    pub recall: f64,
    /// Lookups that are timed with each engine, 1 to `limits::TUNE_LOOKUPS_MAX`; 0 is 1.
    pub lookups: u32,
    /// Indexes of FAISS to measure beside the engines that need no setting, at most `limits::TUNE_INDEXES_MAX`.
    pub indexes: Vec<TuneIndex>,
}

/// What one query token asks of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneQuery {
    pub layer: u32,
    /// Tokens from the start of the local window.
    pub distance: u32,
    /// `(Hq, D)`, before RoPE.
    pub values: Vec<f32>,
}

/// An index of FAISS to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TuneIndex {
    /// As FAISS's `index_factory` takes it.
    pub factory: String,
    /// `None`: the smallest that reaches the recall, found by doubling.
    pub effort: Option<u32>,
}

/// How far a measurement is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TuneStep {
    /// An engine is measured, on a document of so many blocks.
    Measuring { engine: Engine, blocks: u32 },
    /// An engine that this machine does not have. The reason is human-readable.
    LeftOut { engine: Engine, reason: String },
}

/// What an engine took to answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    pub engine: Engine,
    /// The share of flat's blocks that were found, 0 to 1.
    pub recall: f64,
    /// Microseconds of one lookup: half of them, and 99 of 100, took no longer.
    pub p50_us: f64,
    pub p99_us: f64,
    /// Bytes of landmark keys and indexes in memory, of all documents.
    pub index_bytes: u64,
}

/// What was measured, and what answers now.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneReport {
    /// The document that was looked up in.
    pub document: DocumentInfo,
    /// What answers lookups from now on: the fastest that reached the recall. One that takes more memory than another is
    /// a tenth faster at least.
    pub engine: Engine,
    /// From the least memory to the most.
    pub measured: Vec<Measured>,
}

/// What a deletion gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Deleted {
    pub blocks: u32,
    /// Bytes of its records. A service gives them back to the disk in the background.
    pub freed_bytes: u64,
}

impl FetchRequest {
    /// The bound that holds for a request as a whole, however it is read.
    ///
    /// # Errors
    /// `LimitExceeded` for too many blocks.
    pub fn check(&self) -> Result<()> {
        let (limit, found) = (limits::FETCH_BLOCKS_MAX as u64, self.blocks.len() as u64);
        if found <= limit { Ok(()) } else { Err(MemoryError::LimitExceeded { what: "blocks".into(), limit, found }) }
    }
}

/// The bound that holds for requests that are asked together.
///
/// # Errors
/// `LimitExceeded` for too many.
pub fn check_together(requests: usize) -> Result<()> {
    let (limit, found) = (limits::ATTEND_REQUESTS_MAX as u64, requests as u64);
    if found <= limit { Ok(()) } else { Err(MemoryError::LimitExceeded { what: "requests".into(), limit, found }) }
}

impl LookupRequest {
    /// A measure of the work that needs no collection: values of the queries times blocks that they score.
    pub fn weight(&self) -> u64 {
        let eligible: u64 = self.scope.iter().map(|range| range.blocks.len() as u64).sum();
        (self.queries.len() as u64).saturating_mul(eligible.saturating_add(self.top_k as u64))
    }

    /// Slots between the sink and the local window; the geometry is told at [`AttendRequest`].
    pub fn slots(&self) -> u32 {
        let of = |range: &BlockRange| range.blocks.len() as u32;
        let eligible: u32 = self.scope.iter().map(of).sum();
        let k = self.top_k.min(eligible);
        let recent = k.min(self.scope.last().map_or(0, of));
        if recent == eligible { eligible } else { k + 1 }
    }
}

impl Tensor {
    /// Wraps f32 values. `shape` must have `values.len()` elements.
    pub fn from_f32(shape: Vec<u32>, values: &[f32]) -> Self {
        debug_assert_eq!(shape.iter().map(|&n| n as usize).product::<usize>(), values.len());
        let data = values.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
        Tensor { dtype: DType::F32, shape, data: data.into() }
    }

    /// The values widened to f32.
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
