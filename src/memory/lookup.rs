//! Which blocks does a request want? Checks it, finds the snapshots it reads, turns its queries and asks the index.

use std::ops::Range;
use std::sync::Arc;

use super::error::{at_most, invalid};
use super::geometry::{Geometry, Turns};
use super::gpu::Gpu;
use super::work::{PART_BYTES, PART_SHARE};
use super::{Collection, LocalMemory};
use crate::api::{Hits, LookupRequest, MemoryError, Result};
use crate::index::{self, Found, Query, Scoped};
use crate::limits;
use crate::types::{BlockId, BlockRange, Engine};
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
    scope: Vec<Scoped>,
    /// Position after the last block of each scope entry.
    ends: Vec<usize>,
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

    /// Finds the keys that a request reads, from the disk if nobody read them before.
    pub(super) fn prepare<'a>(&self, plan: Plan<'a>) -> Result<Prepared<'a>> {
        let tokens_at_once = plan.tokens_at_once();
        let Plan { request, until, collection, geometry, durable, ends, .. } = plan;
        let scope = request
            .scope
            .iter()
            .zip(durable)
            .map(|(range, durable)| {
                until.check()?;
                let state = self.documents.state(range.document, collection.layout);
                let load = |blocks| state.load(&self.store, &collection, range.document, blocks);
                let (keys, indexes) = match &collection.engine {
                    Engine::Flat | Engine::Sq8 | Engine::Sq4 | Engine::Cuda => (load(range.blocks.end)?, None),
                    // Indexes cover the document, whatever part of it is asked.
                    Engine::Faiss(setting) => {
                        let keys = load(durable)?;
                        let indexes = state.indexes(setting, &keys, self.indexes.folder(range.document));
                        (keys, indexes)
                    }
                };
                Ok(Scoped { keys, blocks: range.blocks.clone(), indexes })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Prepared { request, until, collection, geometry, tokens_at_once, scope, ends })
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
    match request.queries.iter().find(|number| !number.is_finite()) {
        None => Ok(()),
        Some(bad) => Err(invalid("queries", "finite numbers", bad)),
    }
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

    /// Asks the index, on a GPU if one is given and can answer, for as many query tokens at once as memory is meant for.
    pub(super) fn search(&self, turns: &Turns, gpu: Option<&Gpu>) -> Result<Found> {
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
            layout: self.collection.layout,
            layer: request.layer as usize,
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
        let found = of_gpu.unwrap_or_else(|| index::search(&query));
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
