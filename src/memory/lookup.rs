//! Which blocks does a request want? Checks it, finds the snapshots it reads, turns its queries and asks the index.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::error::{at_most, invalid};
use super::geometry::{Geometry, Turns};
use super::gpu::Gpu;
use super::keys::{self, Held, Loader, Pass};
use super::work::{PART_BYTES, PART_SHARE};
use super::{Collection, LocalMemory};
use crate::api::{Hits, LookupRequest, MemoryError, Result};
use crate::index::{DocumentIndexes, DocumentKeys, Found, KeyLayout, Query, Scoped};
use crate::limits;
use crate::types::{BlockId, BlockRange, DocumentId, FaissIndex, Granularity};
use crate::until::Until;

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
    pub(super) part_bytes: u64,
}

/// A checked request with everything it reads.
pub(super) struct Prepared<'a> {
    pub(super) request: &'a LookupRequest,
    pub(super) until: &'a Until,
    pub(super) collection: Arc<Collection>,
    pub(super) geometry: Geometry,
    /// Query tokens that are scored at once.
    tokens_at_once: usize,
    /// Of the keys in `scope`: all layers, or the one that is asked.
    layout: KeyLayout,
    /// Among those.
    layer: usize,
    scope: Vec<Scoped>,
    _read: Read,
    /// Position after the last block of each scope entry.
    ends: Vec<usize>,
}

/// Keys that a request reads, which stay as long as this does.
enum Read {
    /// From memory.
    Held { _held: Held },
    /// In passing.
    Passed { _pass: Pass },
}

impl LocalMemory {
    pub(super) fn plan<'a>(&self, request: &'a LookupRequest, until: &'a Until) -> Result<Plan<'a>> {
        until.check()?;
        let collection = self.collection_of(request.collection)?;
        check_queries(&collection, request)?;
        at_most("scope", limits::SCOPE_DOCUMENTS_MAX as u64, request.scope.len() as u64)?;
        // All ranges are checked before the keys of any document are read.
        let of_range = |(i, range)| self.check_range(request, i, range);
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
        let part_bytes = PART_BYTES.min(self.work.total() / PART_SHARE);
        Ok(Plan { request, until, collection, geometry, durable, ends, part_bytes })
    }

    /// Finds the keys that a request reads, from the disk if nobody read them before. Not from inside of rayon's pool: it may wait
    /// for another request that reads the same.
    pub(super) fn prepare<'a>(&self, plan: Plan<'a>) -> Result<Prepared<'a>> {
        match self.prepare_held(plan)? {
            Ok(prepared) => Ok(prepared),
            Err(plan) => self.prepare_passing(plan),
        }
    }

    /// With keys that stay in memory; gives the plan back if there is no room for them beside what other requests read.
    pub(super) fn prepare_held<'a>(&self, plan: Plan<'a>) -> Result<std::result::Result<Prepared<'a>, Plan<'a>>> {
        let Some(held) = self.keys.hold(self.loader(&plan.collection), &plan.wanted(), plan.until)? else {
            return Ok(Err(plan));
        };
        let (layout, layer) = (plan.collection.layout, plan.request.layer as usize);
        let scoped = plan.request.scope.iter().filter_map(|range| {
            let keys = held.keys.get(&range.document)?.clone();
            let indexes = plan.faiss().and_then(|setting| {
                let folder = self.indexes.folder(range.document);
                held.indexes(range.document, setting, folder).filter(|indexes| {
                    // Until somebody has made them, keys are scanned.
                    indexes.make(layer * layout.kv_heads..(layer + 1) * layout.kv_heads, &keys)
                })
            });
            Some(Scoped { keys, blocks: range.blocks.clone(), indexes })
        });
        let scope = scoped.collect();
        Ok(Ok(plan.prepared(layout, layer, scope, Read::Held { _held: held })))
    }

    /// With keys of the one layer that is asked, which are gone when the request is answered. Whoever asks must hold no keys.
    pub(super) fn prepare_passing<'a>(&self, plan: Plan<'a>) -> Result<Prepared<'a>> {
        let layer = plan.request.layer as usize;
        let layout = KeyLayout { layers: 1, ..plan.collection.layout };
        let wanted = plan.wanted();
        let mut bytes = wanted.iter().map(|&(_, blocks)| layout.bytes(blocks)).sum();
        if plan.faiss().is_some() {
            // Indexes have keys in a form of their own, in f32 at most.
            let numbers = layout.pieces() * layout.keys_per_block * layout.head_dim;
            bytes += wanted.iter().map(|&(_, blocks)| blocks as u64 * numbers as u64 * 4).sum::<u64>();
        }
        let pass = self.keys.passing().take(bytes, plan.until)?;
        let mut loaded = HashMap::new();
        for (document, blocks) in wanted {
            let none = DocumentKeys::empty(layout);
            let keys = Arc::new(self.loader(&plan.collection).load(&none, layer, document, blocks, plan.until)?);
            let indexes = plan.faiss().filter(|_| keys::are_indexed(&keys)).map(|setting| {
                let folder = self.indexes.folder(document);
                let indexes = DocumentIndexes::of(setting.clone(), &keys, folder).of_layer(layer);
                indexes.make(0..layout.kv_heads, &keys);
                Arc::new(indexes)
            });
            loaded.insert(document, (keys, indexes));
        }
        let scoped = plan.request.scope.iter().filter_map(|range| {
            let (keys, indexes) = loaded.get(&range.document)?.clone();
            Some(Scoped { keys, blocks: range.blocks.clone(), indexes })
        });
        let scope = scoped.collect();
        Ok(plan.prepared(layout, 0, scope, Read::Passed { _pass: pass }))
    }

    pub(super) fn loader<'a>(&'a self, collection: &'a Collection) -> Loader<'a> {
        Loader { store: &self.store, codes: &self.codes, collection }
    }

    /// Returns the blocks that the document has.
    fn check_range(&self, request: &LookupRequest, i: usize, range: &BlockRange) -> Result<u32> {
        let manifest = self.store.manifest(range.document)?;
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
}

impl<'a> Plan<'a> {
    /// Of how many first blocks the keys are read, of each document once.
    fn wanted(&self) -> Vec<(DocumentId, u32)> {
        let mut wanted: Vec<(DocumentId, u32)> = Vec::new();
        for (range, &durable) in self.request.scope.iter().zip(&self.durable) {
            // Indexes cover the document, whatever part of it is asked.
            let blocks = if self.faiss().is_some() { durable } else { range.blocks.end };
            wanted.push((range.document, blocks));
        }
        wanted.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        wanted.dedup_by_key(|(document, _)| *document);
        wanted
    }

    fn faiss(&self) -> Option<&FaissIndex> {
        self.collection.search.indexes()
    }

    fn prepared(self, layout: KeyLayout, layer: usize, scope: Vec<Scoped>, read: Read) -> Prepared<'a> {
        let tokens_at_once = self.tokens_at_once();
        let Plan { request, until, collection, geometry, ends, .. } = self;
        Prepared { request, until, collection, geometry, tokens_at_once, layout, layer, scope, _read: read, ends }
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
    let numbers = tokens * shape.query_heads as usize * shape.head_dim as usize;
    if request.queries.len() != numbers {
        let expected = format!("{tokens} x {} x {} = {numbers} numbers", shape.query_heads, shape.head_dim);
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

/// The words for row `t * Hq + h`.
pub(super) fn query_place(row: usize, query_heads: usize) -> String {
    format!("query token {}, query head {}", row / query_heads, row % query_heads)
}

/// What stored numbers are too large for, where an earlier version let them in.
pub(super) fn not_finite(number: f32, place: String) -> MemoryError {
    let expected = "queries that the stored keys and values give finite answers to";
    invalid("queries", expected, format!("{number} for {place}"))
}

impl Prepared<'_> {
    /// Bytes of the scores of all eligible blocks for all query rows.
    pub(super) fn score_bytes(&self) -> u64 {
        let query_rows = self.request.distances.len() as u64 * self.collection.spec.shape.query_heads as u64;
        query_rows * self.geometry.eligible as u64 * 4
    }

    /// The turns that scoring and attention need.
    pub(super) fn turns(&self) -> Arc<Turns> {
        self.collection.turns.get(&self.collection.spec.shape.rope, &self.geometry, &self.request.distances)
    }

    /// Asks the index, on a GPU if one is given and can answer.
    pub(super) fn search(&self, turns: &Turns, gpu: Option<&Gpu>) -> Result<Found> {
        let found = self.search_parts(turns, gpu)?;
        let Some(at) = found.scores.iter().position(|score| !score.is_finite()) else { return Ok(found) };
        let (row, shape) = (at / found.k, &self.collection.spec.shape);
        let (heads, kv_heads) = (shape.query_heads as usize, shape.kv_heads as usize);
        let place = match self.request.granularity {
            Granularity::TokenHead => query_place(row, heads),
            Granularity::Token => format!("query token {row}"),
            Granularity::Head => format!("query head {row}"),
            Granularity::KvGroup => format!("query token {}, KV head {}", row / kv_heads, row % kv_heads),
            Granularity::Shared => "all query tokens and heads together".into(),
        };
        Err(not_finite(found.scores[at], place))
    }

    /// For as many query tokens at once as memory is meant for.
    fn search_parts(&self, turns: &Turns, gpu: Option<&Gpu>) -> Result<Found> {
        let tokens = self.request.distances.len();
        if self.tokens_at_once >= tokens {
            return self.search_some(turns, 0..tokens, gpu);
        }
        let mut found = Found::default();
        for first in (0..tokens).step_by(self.tokens_at_once) {
            let part = self.search_some(turns, first..tokens.min(first + self.tokens_at_once), gpu)?;
            found.rows += part.rows;
            found.k = part.k;
            found.positions.extend(part.positions);
            found.scores.extend(part.scores);
        }
        Ok(found)
    }

    fn search_some(&self, turns: &Turns, tokens: Range<usize>, gpu: Option<&Gpu>) -> Result<Found> {
        self.until.check()?;
        let (request, shape) = (self.request, &self.collection.spec.shape);
        let older = match self.geometry.recent < self.geometry.eligible {
            true => self.turned(turns, &tokens, 0),
            false => self.queries(&tokens).to_vec(),
        };
        let recent: Vec<f32> =
            (0..self.geometry.recent).flat_map(|i| self.turned(turns, &tokens, self.geometry.recent_slot(i))).collect();
        let query = Query {
            layout: self.layout,
            layer: self.layer,
            tokens: tokens.len(),
            query_heads: shape.query_heads as usize,
            queries: &older,
            recent_queries: &recent,
            scope: &self.scope,
            top_k: request.top_k as usize,
            block_score: request.block_score,
            granularity: request.granularity,
            softmax_scale: shape.softmax_scale,
            until: self.until,
        };
        let of_gpu = gpu.map(|gpu| gpu.search(&query)).transpose()?.flatten();
        let found = of_gpu.unwrap_or_else(|| self.collection.search.search(&query));
        // What was found after nobody waited any more is not whole.
        self.until.check()?;
        Ok(found)
    }

    /// The queries `(T, Hq, D)` of some tokens.
    fn queries(&self, tokens: &Range<usize>) -> &[f32] {
        let token_numbers = self.request.queries.len() / self.request.distances.len();
        &self.request.queries[tokens.start * token_numbers..tokens.end * token_numbers]
    }

    /// The same, turned for one slot.
    fn turned(&self, turns: &Turns, tokens: &Range<usize>, slot: usize) -> Vec<f32> {
        let (request, dim) = (self.request, self.collection.layout.head_dim);
        let mut queries = self.queries(tokens).to_vec();
        let token_numbers = request.queries.len() / request.distances.len();
        for (heads, &distance) in queries.chunks_exact_mut(token_numbers).zip(&request.distances[tokens.clone()]) {
            turns.apply(self.geometry.reach(distance, slot), heads, dim);
        }
        queries
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
