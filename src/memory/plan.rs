//! What does a lookup or an attend need? Decided before anything is read or allocated for it.

use std::collections::HashMap;
use std::sync::Arc;

use super::collection::{Collection, Extent};
use super::error::{at_most, invalid, query_place};
use super::geometry::{Geometry, Rotations};
use crate::api::{AttendRequest, Hits, LookupRequest, MemoryError, Result};
use crate::index::Found;
use crate::limits;
use crate::store::Store;
use crate::types::{BlockId, BlockRange, DocumentId, Granularity, Normalisation, Placement};
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

/// Bytes of one hit while it is searched and attended to: position, score, row and reach.
const USE_BYTES: u64 = 24;

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
    /// Blocks of each scope entry's document that can be looked up.
    extents: Vec<Extent>,
    /// Position after the last block of each scope entry.
    ends: Vec<usize>,
    /// Bytes that scoring should take at once.
    part_bytes: u64,
}

/// A checked request to attend to the blocks that a lookup found.
pub(super) struct AttendPlan<'a> {
    pub(super) lookup: &'a Plan<'a>,
    /// By the reaches of all blocks that were found.
    pub(super) rotations: Arc<Rotations>,
    placement: Placement,
    /// By entry of the scope, where its document ends: the block behind the last one that may be chosen.
    document_ends: Vec<u32>,
    pub(super) normalisation: Normalisation,
    without_first_tokens: bool,
    /// G
    pub(super) group: usize,
    /// D
    pub(super) dim: usize,
}

/// Whether the chosen blocks are attended to, and where they stand then.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Then {
    Answer,
    Attend(Placement),
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
        let of_range = |(i, range)| check_range(&collection, store, request, i, range);
        let extents = request.scope.iter().enumerate().map(of_range).collect::<Result<Vec<Extent>>>()?;
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
        Ok(Plan { request, until, collection, geometry, extents, ends, part_bytes })
    }

    /// Of how many first blocks the keys are read, of each document once.
    pub(super) fn wanted(&self) -> Vec<(DocumentId, Extent)> {
        let mut wanted: Vec<(DocumentId, Extent)> = Vec::new();
        for (range, &extent) in self.request.scope.iter().zip(&self.extents) {
            // Indexes cover the whole document, not only the part that is asked.
            let is_indexed = self.collection.engine.indexes().is_some();
            wanted.push((range.document, if is_indexed { extent } else { extent.before(range.blocks.end) }));
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
        if let Then::Attend(placement) = then {
            need.working += tokens * heads * hits * USE_BYTES;
            need.answer += (query_len + query_len / dim) * 4 * OUT_COPIES;
            if placement != Placement::Slots {
                need.working += self.original_rotations_max() * rotation_bytes;
            }
        }
        need
    }

    /// How many different rotations queries need at most for blocks in their original places.
    fn original_rotations_max(&self) -> u64 {
        let (request, shape) = (self.request, &self.collection.spec.shape);
        let choices = match request.granularity {
            Granularity::TokenHead | Granularity::Head => shape.query_heads,
            Granularity::KvGroup => shape.kv_heads,
            Granularity::Token | Granularity::Shared => 1,
        };
        let uses = request.distances.len() as u64 * choices as u64 * self.geometry.k as u64;
        let longest = request.scope.iter().map(|range| range.blocks.end).max().unwrap_or(0);
        uses.min(self.geometry.reaches_max(&request.distances, longest.into()))
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

    /// The rotations for all slots.
    pub(super) fn rotations(&self) -> Arc<Rotations> {
        let rope = self.collection.spec.shape.rope_of(self.request.layer);
        self.collection.rotations.get(rope, &self.geometry, &self.request.distances)
    }

    /// The block at a position among the eligible ones.
    pub(super) fn block(&self, position: usize) -> BlockId {
        self.entry_and_block(position).1
    }

    /// The same, with its entry of the scope.
    fn entry_and_block(&self, position: usize) -> (usize, BlockId) {
        let entry = self.ends.partition_point(|&end| end <= position);
        (entry, self.block_of(entry, position))
    }

    /// The same, and its tokens: B, fewer of a tail.
    pub(super) fn block_and_tokens(&self, position: usize) -> (BlockId, usize) {
        let (entry, block) = self.entry_and_block(position);
        let extent = self.extents[entry];
        let is_tail = block.index == extent.full;
        (block, if is_tail { extent.tail_tokens } else { self.collection.spec.shape.block_tokens } as usize)
    }

    fn block_of(&self, entry: usize, position: usize) -> BlockId {
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
    /// `of_slots` are the lookup's [`Plan::rotations`].
    pub(super) fn new(
        lookup: &'a Plan<'a>,
        request: &AttendRequest,
        of_slots: Arc<Rotations>,
        found: &Found,
    ) -> AttendPlan<'a> {
        let shape = &lookup.collection.spec.shape;
        let mut plan = AttendPlan {
            lookup,
            rotations: of_slots,
            placement: request.placement,
            document_ends: document_ends(&lookup.request.scope),
            normalisation: request.normalisation,
            without_first_tokens: request.without_first_tokens,
            group: shape.group(),
            dim: shape.head_dim as usize,
        };
        if plan.placement != Placement::Slots {
            let rotations = Rotations::of(shape.rope_of(lookup.request.layer), plan.all_reaches(found));
            plan.rotations = Arc::new(rotations);
        }
        plan
    }

    /// For each block that a row chose, tokens from its first token to a query that is `distance` tokens into the window.
    pub(super) fn reaches<'p>(&'p self, distance: u32, chosen: &'p [u32]) -> impl Iterator<Item = i64> + 'p {
        let geometry = &self.lookup.geometry;
        // Of the block before: its document, and its rank among those that were chosen of that one.
        let mut before = None;
        chosen.iter().enumerate().map(move |(rank, &position)| {
            if self.placement == Placement::Slots {
                return geometry.reach(distance, geometry.slot(rank, position as usize));
            }
            let (entry, block) = self.lookup.entry_and_block(position as usize);
            let rank = match before {
                Some((document, rank)) if document == block.document => rank + 1,
                _ => 0,
            };
            before = Some((block.document, rank));
            geometry.original_reach(self.placement, distance, self.document_ends[entry] - block.index, rank)
        })
    }

    /// How the scores inside of a block of so many tokens become weights. A tail has no landmark: its tokens compete
    /// themselves, as those do that a window has behind its last landmark.
    pub(super) fn normalisation_of(&self, tokens: usize) -> Normalisation {
        let is_tail = tokens < self.lookup.collection.spec.shape.block_tokens as usize;
        if is_tail { Normalisation::Plain } else { self.normalisation }
    }

    /// Whether a block of so many tokens is read without its first one.
    pub(super) fn leaves_out_first(&self, block: BlockId, tokens: usize) -> bool {
        self.without_first_tokens && block.index == 0 && tokens > 1
    }

    /// Whether any block that may be chosen is.
    pub(super) fn may_leave_out_first(&self) -> bool {
        let begins = |range: &BlockRange| range.blocks.start == 0 && !range.blocks.is_empty();
        self.without_first_tokens && self.lookup.request.scope.iter().any(begins)
    }

    /// Those of all query tokens and heads; query heads that choose together are taken once.
    fn all_reaches<'p>(&'p self, found: &'p Found) -> impl Iterator<Item = i64> + 'p {
        let (request, shape) = (self.lookup.request, &self.lookup.collection.spec.shape);
        let (heads, kv_heads) = (shape.query_heads as usize, shape.kv_heads as usize);
        request.distances.iter().enumerate().flat_map(move |(token, &distance)| {
            let row = move |head| request.granularity.row(token, head, heads, kv_heads);
            let rows = (0..heads).filter(move |&head| head == 0 || row(head) != row(head - 1)).map(row);
            rows.flat_map(move |row| self.reaches(distance, found.row(row)))
        })
    }
}

/// By entry of a scope, where its document ends: behind its last range.
fn document_ends(scope: &[BlockRange]) -> Vec<u32> {
    let mut ends: HashMap<DocumentId, u32> = HashMap::new();
    for range in scope {
        let end = ends.entry(range.document).or_default();
        *end = range.blocks.end.max(*end);
    }
    scope.iter().map(|range| ends[&range.document]).collect()
}

/// Checks what a request to attend says besides its lookup.
///
/// # Errors
/// `Invalid` for a place that no block can have, and for first tokens left out beside landmarks, which would stand for them.
pub(super) fn check_attend(request: &AttendRequest) -> Result<()> {
    if request.without_first_tokens && request.normalisation != Normalisation::Plain {
        let expected = format!("false with normalisation {}", request.normalisation);
        return Err(invalid("without_first_tokens", expected, true));
    }
    match request.placement {
        Placement::Original { within_tokens: 0 } => Err(invalid("original_within_tokens", "at least 1", 0)),
        Placement::Original { .. } | Placement::Slots => Ok(()),
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

/// Returns the blocks of the document that can be looked up.
fn check_range(
    collection: &Collection,
    store: &Store,
    request: &LookupRequest,
    i: usize,
    range: &BlockRange,
) -> Result<Extent> {
    let manifest = store.manifest(range.document)?;
    if manifest.collection != request.collection {
        let expected = format!("a document of collection {}", request.collection);
        let found = format!("document {} of collection {}", range.document, manifest.collection);
        return Err(invalid(format!("scope[{i}].document"), expected, found));
    }
    let extent = collection.eligible(&manifest);
    if range.blocks.start > range.blocks.end || range.blocks.end > extent.blocks() {
        let expected = format!("a range within 0..{}", extent.blocks());
        return Err(invalid(format!("scope[{i}].blocks"), expected, format!("{:?}", range.blocks)));
    }
    Ok(extent)
}
