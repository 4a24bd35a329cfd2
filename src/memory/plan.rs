//! What does a lookup or an attend need? Decided before anything is read or allocated for it.

use std::sync::Arc;

use super::collection::Collection;
use super::error::{at_most, invalid, query_place};
use super::geometry::{Geometry, Rotations};
use crate::api::{Hits, LookupRequest, MemoryError, Result};
use crate::index::Found;
use crate::limits;
use crate::store::Store;
use crate::types::{BlockId, BlockRange, DocumentId, Granularity, Normalisation};
use crate::until::Until;

/// Bytes that the scores of some query tokens should take at once, if tokens choose for themselves. Between such parts work
/// can end, and other work gets its turn.
const PART_BYTES: u64 = 64 << 20;

/// Or, of a small budget, this share.
const PART_SHARE: u64 = 8;

/// Query tokens of a part are a multiple of this, where they are that many: the index packs so many rows together.
const PART_TOKENS: u64 = 16;

/// Bytes of one hit: block and score in the answer, and the same on the wire.
const HIT_BYTES: u64 = 40;

/// Bytes of one hit while it is searched and attended to: position, score, row and slot.
const USE_BYTES: u64 = 20;

/// Copies of a rotated query: rotated, in the order of KV heads, packed.
const ROTATED_COPIES: u64 = 3;

/// Copies of the attention's output: one for each of at most four tasks per KV head, their sum, the answer, its message.
const OUT_COPIES: u64 = 7;

/// A checked request, before anything is read or allocated for it.
pub(super) struct Plan<'a> {
    pub(super) request: &'a LookupRequest,
    pub(super) until: &'a Until,
    pub(super) collection: Arc<Collection>,
    pub(super) geometry: Geometry,
    /// Blocks that each document of the scope has.
    durable: Vec<u32>,
    /// Position after the last block of each scope entry.
    ends: Vec<usize>,
    /// Bytes that scoring should take at once.
    part_bytes: u64,
}

/// A checked request to attend to the blocks that a lookup finds.
pub(super) struct AttendPlan<'a> {
    pub(super) lookup: &'a Plan<'a>,
    pub(super) rotations: Arc<Rotations>,
    pub(super) normalisation: Normalisation,
    /// G
    pub(super) group: usize,
    /// D
    pub(super) dim: usize,
}

/// Whether the chosen blocks are attended to.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Then {
    Answer,
    Attend,
}

/// Bytes that one request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Need {
    /// Until the answer is there.
    pub(super) working: u64,
    /// For the answer.
    pub(super) answer: u64,
}

impl<'a> Plan<'a> {
    /// Checks a request against its collection and the documents of its scope. `work_bytes` is the budget of all requests.
    ///
    /// # Errors
    /// `Missing`, `Invalid` or `LimitExceeded` for what does not fit, `NotFound` for a document that is not there.
    pub(super) fn new(
        request: &'a LookupRequest,
        until: &'a Until,
        collection: Arc<Collection>,
        store: &Store,
        work_bytes: u64,
    ) -> Result<Plan<'a>> {
        check_queries(&collection, request)?;
        at_most("scope", limits::SCOPE_DOCUMENTS_MAX as u64, request.scope.len() as u64)?;
        // All ranges are checked before the keys of any document are read.
        let of_range = |(i, range)| check_range(store, request, i, range);
        let durable = request.scope.iter().enumerate().map(of_range).collect::<Result<Vec<u32>>>()?;
        let mut ends = Vec::with_capacity(request.scope.len());
        for range in &request.scope {
            ends.push(ends.last().copied().unwrap_or(0) + range.blocks.len());
        }
        let shape = &collection.spec.shape;
        let eligible = ends.last().copied().unwrap_or(0);
        let last = request.scope.last().map_or(0, |range| range.blocks.len());
        let geometry = Geometry::new(eligible, last, request.top_k as usize, shape.block_tokens as usize);
        let query_rows = request.distances.len() as u64 * shape.query_heads as u64;
        let what = "scores (query tokens x query heads x eligible blocks)";
        at_most(what, limits::LOOKUP_SCORES_MAX, query_rows * geometry.eligible as u64)?;
        let part_bytes = PART_BYTES.min(work_bytes / PART_SHARE);
        Ok(Plan { request, until, collection, geometry, durable, ends, part_bytes })
    }

    /// Of how many first blocks the keys are read, of each document once.
    pub(super) fn wanted(&self) -> Vec<(DocumentId, u32)> {
        let mut wanted: Vec<(DocumentId, u32)> = Vec::new();
        for (range, &durable) in self.request.scope.iter().zip(&self.durable) {
            // Indexes cover the whole document, not only the part that is asked.
            let blocks = if self.collection.engine.indexes().is_some() { durable } else { range.blocks.end };
            wanted.push((range.document, blocks));
        }
        wanted.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        wanted.dedup_by_key(|(document, _)| *document);
        wanted
    }

    pub(super) fn need(&self, then: Then) -> Need {
        let (request, shape, geometry) = (self.request, &self.collection.spec.shape, &self.geometry);
        let tokens = request.distances.len() as u64;
        let (heads, dim, query_len) = (shape.query_heads as u64, shape.head_dim as u64, request.queries.len() as u64);
        let rows = request.granularity.rows(tokens as usize, heads as usize, shape.kv_heads as usize) as u64;
        let hits = geometry.k as u64;
        let rotation_bytes = 8 * shape.rope.frequencies.len() as u64 + 64;
        let mut need = Need {
            working: self.token_bytes() * self.tokens_at_once() as u64
                + rows * hits * USE_BYTES
                + geometry.rotations_max(&request.distances) * rotation_bytes,
            answer: rows * hits * HIT_BYTES,
        };
        if then == Then::Attend {
            need.working += tokens * heads * hits * USE_BYTES;
            need.answer += (query_len + query_len / dim) * 4 * OUT_COPIES;
        }
        need
    }

    /// Query tokens that are scored at once. All, if they choose together.
    pub(super) fn tokens_at_once(&self) -> usize {
        let tokens = self.request.distances.len();
        match self.request.granularity {
            Granularity::Head | Granularity::Shared => tokens,
            Granularity::TokenHead | Granularity::Token | Granularity::KvGroup => {
                let fit = self.part_bytes / self.token_bytes().max(1);
                let whole = if fit < PART_TOKENS { fit } else { fit / PART_TOKENS * PART_TOKENS };
                (whole as usize).clamp(1, tokens)
            }
        }
    }

    /// Bytes to score one query token with: a score for every eligible block, its queries rotated for every slot.
    fn token_bytes(&self) -> u64 {
        let shape = &self.collection.spec.shape;
        let rotated = (self.geometry.recent as u64 + 1) * shape.head_dim as u64 * ROTATED_COPIES;
        shape.query_heads as u64 * 4 * (self.geometry.eligible as u64 + rotated)
    }

    /// Bytes of the scores of all eligible blocks for all query rows.
    pub(super) fn score_bytes(&self) -> u64 {
        let query_rows = self.request.distances.len() as u64 * self.collection.spec.shape.query_heads as u64;
        query_rows * self.geometry.eligible as u64 * 4
    }

    /// The rotations that scoring and attention need.
    pub(super) fn rotations(&self) -> Arc<Rotations> {
        let rope = self.collection.spec.shape.rope_of(self.request.layer);
        self.collection.rotations.get(rope, &self.geometry, &self.request.distances)
    }

    /// The block at a position among the eligible ones.
    pub(super) fn block(&self, position: usize) -> BlockId {
        let entry = self.ends.partition_point(|&end| end <= position);
        let range = &self.request.scope[entry];
        let before_end = (self.ends[entry] - position) as u32;
        BlockId { document: range.document, index: range.blocks.end - before_end }
    }

    /// The answer in the words of the interface.
    pub(super) fn hits(&self, found: Found) -> Hits {
        Hits {
            rows: found.rows as u32,
            k: found.k as u32,
            blocks: found.positions.iter().map(|&position| self.block(position as usize)).collect(),
            scores: found.scores,
        }
    }
}

impl<'a> AttendPlan<'a> {
    pub(super) fn new(lookup: &'a Plan<'a>, normalisation: Normalisation) -> AttendPlan<'a> {
        let shape = &lookup.collection.spec.shape;
        let (group, dim) = (shape.group(), shape.head_dim as usize);
        AttendPlan { lookup, rotations: lookup.rotations(), normalisation, group, dim }
    }
}

fn check_queries(collection: &Collection, request: &LookupRequest) -> Result<()> {
    let shape = &collection.spec.shape;
    if request.layer >= shape.layers {
        return Err(invalid("layer", format!("0 to {}", shape.layers - 1), request.layer));
    }
    if request.top_k == 0 || request.top_k > limits::TOP_K_MAX {
        return Err(invalid("top_k", format!("1 to {}", limits::TOP_K_MAX), request.top_k));
    }
    if request.distances.is_empty() {
        return Err(MemoryError::Missing { field: "distances".into() });
    }
    let tokens = request.distances.len();
    at_most("query tokens", limits::QUERY_TOKENS_MAX as u64, tokens as u64)?;
    let query_len = tokens * shape.query_heads as usize * shape.head_dim as usize;
    if request.queries.len() != query_len {
        let expected = format!("{tokens} x {} x {} = {query_len} numbers", shape.query_heads, shape.head_dim);
        return Err(invalid("queries", expected, request.queries.len()));
    }
    // Scores take the scale into the query.
    let largest = limits::NUMBER_MAX / shape.softmax_scale.max(1.0);
    match request.queries.iter().position(|number| number.is_nan() || number.abs() > largest) {
        None => Ok(()),
        Some(at) => {
            let row = at / shape.head_dim as usize;
            let place = query_place(row, shape.query_heads as usize);
            let found = format!("{} in {place}", request.queries[at]);
            Err(invalid("queries", format!("finite numbers up to {largest:e}"), found))
        }
    }
}

/// Returns the blocks that the document has.
fn check_range(store: &Store, request: &LookupRequest, i: usize, range: &BlockRange) -> Result<u32> {
    let manifest = store.manifest(range.document)?;
    if manifest.collection != request.collection {
        let expected = format!("a document of collection {}", request.collection);
        let found = format!("document {} of collection {}", range.document, manifest.collection);
        return Err(invalid(format!("scope[{i}].document"), expected, found));
    }
    if range.blocks.start > range.blocks.end || range.blocks.end > manifest.blocks {
        let expected = format!("a range within 0..{}", manifest.blocks);
        return Err(invalid(format!("scope[{i}].blocks"), expected, format!("{:?}", range.blocks)));
    }
    Ok(manifest.blocks)
}
