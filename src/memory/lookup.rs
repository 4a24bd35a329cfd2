//! Which blocks does a request want? Finds the snapshots it reads, rotates its queries and asks the index.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::error::{not_finite, query_place};
use super::geometry::Rotations;
use super::gpu::Gpu;
use super::keys::{self, Held, Pass};
use super::local::LocalMemory;
use super::plan::{Need, Plan, Then};
use super::work;
use crate::api::{Hits, LookupRequest, Result};
use crate::index::{DocumentIndexes, DocumentKeys, Found, KeyLayout, Query, Scoped};
use crate::types::Granularity;
use crate::until::Until;

/// A planned request with everything it reads.
pub(super) struct Prepared<'a> {
    pub(super) plan: Plan<'a>,
    /// Of the keys in `scope`: all layers, or the one that is asked.
    layout: KeyLayout,
    /// Among those.
    layer: usize,
    scope: Vec<Scoped>,
    _read: Read,
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
        Plan::new(request, until, collection, &self.store, self.work.total())
    }

    pub(super) fn lookup_blocks(&self, request: &LookupRequest, until: &Until) -> Result<Hits> {
        let plan = self.plan(request, until)?;
        let Need { working, answer } = plan.need(Then::Answer);
        let _taken = work::take(&self.work, working + answer, until)?;
        let prepared = self.prepare(plan)?;
        work::run(&[request], || {
            let found = prepared.search(&prepared.plan.rotations(), self.gpu_of(&prepared.plan.collection))?;
            self.counters.lookups.add(1);
            Ok(prepared.plan.hits(found))
        })
    }

    /// Finds the keys that a request reads, on disk if they are not loaded. Not from inside of rayon's pool: it may wait
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
            let indexes = plan.collection.engine.indexes().and_then(|setting| {
                let folder = self.indexes.folder(range.document);
                held.indexes(range.document, setting, folder).filter(|indexes| {
                    // Until they are made, keys are scanned.
                    indexes.make(layer * layout.kv_heads..(layer + 1) * layout.kv_heads, &keys)
                })
            });
            Some(Scoped { keys, blocks: range.blocks.clone(), indexes })
        });
        let scope = scoped.collect();
        Ok(Ok(Prepared { plan, layout, layer, scope, _read: Read::Held { _held: held } }))
    }

    /// With keys of the one layer that is asked, which are gone when the request is answered. The caller must hold no keys.
    pub(super) fn prepare_passing<'a>(&self, plan: Plan<'a>) -> Result<Prepared<'a>> {
        let layer = plan.request.layer as usize;
        let layout = KeyLayout { layers: 1, ..plan.collection.layout };
        let wanted = plan.wanted();
        let mut bytes = wanted.iter().map(|(_, extent)| extent.more_key_bytes(&layout, 0, false)).sum();
        if plan.collection.engine.indexes().is_some() {
            // Indexes have keys in a form of their own, in f32 at most.
            let block_len = layout.pieces() * layout.keys_per_block * layout.head_dim;
            bytes += wanted.iter().map(|(_, extent)| extent.full as u64 * block_len as u64 * 4).sum::<u64>();
        }
        let pass = self.keys.passing().take(bytes, plan.until)?;
        let mut loaded = HashMap::new();
        for (document, extent) in wanted {
            let none = DocumentKeys::empty(layout);
            let keys = Arc::new(self.loader(&plan.collection).load(&none, layer, document, extent, plan.until)?);
            let indexes = plan.collection.engine.indexes().filter(|_| keys::are_indexed(&keys)).map(|setting| {
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
        Ok(Prepared { plan, layout, layer: 0, scope, _read: Read::Passed { _pass: pass } })
    }
}

impl Prepared<'_> {
    /// Asks the index, on a GPU if one is given and can answer.
    pub(super) fn search(&self, rotations: &Rotations, gpu: Option<&Gpu>) -> Result<Found> {
        let found = self.search_parts(rotations, gpu)?;
        let Some(at) = found.scores.iter().position(|score| !score.is_finite()) else { return Ok(found) };
        let (row, shape) = (at / found.k, &self.plan.collection.spec.shape);
        let (heads, kv_heads) = (shape.query_heads as usize, shape.kv_heads as usize);
        let place = match self.plan.request.granularity {
            Granularity::TokenHead => query_place(row, heads),
            Granularity::Token => format!("query token {row}"),
            Granularity::Head => format!("query head {row}"),
            Granularity::KvGroup => format!("query token {}, KV head {}", row / kv_heads, row % kv_heads),
            Granularity::Shared => "all query tokens and heads together".into(),
        };
        Err(not_finite(found.scores[at], place))
    }

    /// For as many query tokens at once as memory is meant for.
    fn search_parts(&self, rotations: &Rotations, gpu: Option<&Gpu>) -> Result<Found> {
        let tokens = self.plan.request.distances.len();
        let at_once = self.plan.tokens_at_once();
        if at_once >= tokens {
            return self.search_some(rotations, 0..tokens, gpu);
        }
        let mut found = Found::default();
        for first in (0..tokens).step_by(at_once) {
            let part = self.search_some(rotations, first..tokens.min(first + at_once), gpu)?;
            found.rows += part.rows;
            found.k = part.k;
            found.positions.extend(part.positions);
            found.scores.extend(part.scores);
        }
        Ok(found)
    }

    fn search_some(&self, rotations: &Rotations, tokens: Range<usize>, gpu: Option<&Gpu>) -> Result<Found> {
        self.plan.until.check()?;
        let Plan { request, geometry, .. } = &self.plan;
        let shape = &self.plan.collection.spec.shape;
        let older = match geometry.recent < geometry.eligible {
            true => self.rotated(rotations, &tokens, 0),
            false => self.queries(&tokens).to_vec(),
        };
        let recent: Vec<f32> =
            (0..geometry.recent).flat_map(|i| self.rotated(rotations, &tokens, geometry.recent_slot(i))).collect();
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
            until: self.plan.until,
        };
        let of_gpu = gpu.map(|gpu| gpu.search(&query)).transpose()?.flatten();
        let found = of_gpu.unwrap_or_else(|| self.plan.collection.engine.search(&query));
        // What was found after the caller had gone is not whole.
        self.plan.until.check()?;
        Ok(found)
    }

    /// The queries `(T, Hq, D)` of some tokens.
    fn queries(&self, tokens: &Range<usize>) -> &[f32] {
        let request = self.plan.request;
        let token_len = request.queries.len() / request.distances.len();
        &request.queries[tokens.start * token_len..tokens.end * token_len]
    }

    /// The same, rotated for one slot.
    fn rotated(&self, rotations: &Rotations, tokens: &Range<usize>, slot: usize) -> Vec<f32> {
        let (request, dim) = (self.plan.request, self.plan.collection.layout.head_dim);
        let mut queries = self.queries(tokens).to_vec();
        let token_len = request.queries.len() / request.distances.len();
        for (heads, &distance) in queries.chunks_exact_mut(token_len).zip(&request.distances[tokens.clone()]) {
            rotations.apply(self.plan.geometry.reach(distance, slot), heads, dim);
        }
        queries
    }
}
