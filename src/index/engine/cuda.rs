//! The engine `cuda`: the same choice as [`fast`]'s, made by a GPU.
//!
//! A chunk's keys are copied to the GPU when a lookup first scans them, and stay there as long as the chunk: what an
//! append leaves as it was is not copied again.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::SearchEngine;
use crate::cuda::{self, ArgumentError, Choice, Chosen, HEAD_DIM_MAX, Keys, Runner, Span};
use crate::index::layout::{PANEL, QUAD};
use crate::index::snapshot::{Chunk, Copied, KeyPanels};
use crate::index::{Found, Query, fast};
use crate::types::DType;

const _: () = assert!(PANEL == cuda::PANEL, "the kernels read the panels of a chunk as they lie");

/// The engine as the CPU stands in for it: [`search`] asks a GPU.
#[derive(Debug)]
pub(super) struct Cuda;

impl SearchEngine for Cuda {
    fn asks_gpu(&self) -> bool {
        true
    }

    fn search(&self, query: &Query<'_>) -> Found {
        fast::search(query)
    }
}

/// Some blocks of a chunk whose keys are on the GPU.
struct Resident<M> {
    keys: Arc<Keys<M>>,
    keys_per_block: u32,
    /// In the chunk.
    blocks: Range<u32>,
    /// The document's place among those of the scope that have keys.
    document: u32,
}

/// Whether the kernels take the keys of a query: a launch scores keys of one width.
pub fn is_supported(query: &Query<'_>) -> bool {
    let mut widths = chunks(query).map(Chunk::width);
    let width = widths.next().unwrap_or(query.layout.head_dim);
    width <= HEAD_DIM_MAX && widths.all(|other| other == width) && query.layout.compressed.is_none()
}

/// A chunk of every document of the scope that has keys.
fn chunks<'a>(query: &Query<'a>) -> impl Iterator<Item = &'a Chunk> {
    query.scope.iter().filter_map(|scoped| scoped.keys.first())
}

/// Chooses the blocks of every row. f32 sums are taken in another order than the CPU's: scores differ by rounding.
///
/// # Errors
/// The runner's; keys that are not supported are refused.
pub fn search<R: Runner>(runner: &R, query: &Query<'_>) -> Result<Found, R::Error> {
    let mut residents = Vec::new();
    let with_keys = query.scope.iter().filter(|scoped| scoped.keys.first().is_some());
    for (document, scoped) in (0..).zip(with_keys) {
        for (chunk, blocks) in scoped.keys.parts(scoped.blocks.clone()) {
            residents.push(Resident {
                keys: on_gpu(runner, chunk)?,
                keys_per_block: chunk.keys_per_block() as u32,
                blocks: blocks.start as u32..blocks.end as u32,
                document,
            });
        }
    }
    let chosen = cuda::choose(
        runner,
        &Choice {
            layer: query.layer as u32,
            tokens: query.tokens as u32,
            query_heads: query.query_heads as u32,
            kv_heads: query.layout.kv_heads as u32,
            head_dim: chunks(query).next().map_or(query.layout.head_dim, Chunk::width),
            dtype: query.layout.dtype,
            queries: &projected(query),
            spans: &spans(query, &residents),
            top_k: query.top_k.min(query.eligible()) as u32,
            block_score: query.block_score,
            granularity: query.granularity,
            softmax_scale: query.softmax_scale,
        },
    )?;
    let Chosen { rows, k, positions, scores } = chosen;
    Ok(Found { rows, k, positions, scores })
}

/// The queries projected onto keys `(sets, T, Hq, W)`: one set for the older blocks of every document with keys, then one for each
/// recent block, all of which are the last document's.
fn projected(query: &Query<'_>) -> Vec<f32> {
    let recent = query.recent_queries.chunks_exact(query.queries.len().max(1));
    let of_last = chunks(query).last().into_iter().cycle();
    let sets = chunks(query).map(|chunk| (chunk, query.queries)).chain(of_last.zip(recent));
    let mut projected = Vec::new();
    for (chunk, queries) in sets {
        for (row, values) in queries.chunks_exact(query.layout.head_dim).enumerate() {
            let kv_head = row % query.query_heads / (query.query_heads / query.layout.kv_heads);
            projected.extend(chunk.project(query.layer * query.layout.kv_heads + kv_head, values));
        }
    }
    projected
}

/// Older blocks of a chunk are one span; each recent block is one, for it has queries of its own.
fn spans<'a, M>(query: &Query<'_>, residents: &'a [Resident<M>]) -> Vec<Span<'a, M>> {
    let mut older = query.eligible() - query.recent();
    let mut recent_sets = chunks(query).count() as u32..;
    let mut spans = Vec::new();
    for Resident { keys, keys_per_block, blocks, document } in residents {
        let span = |blocks, set| Span { keys: &**keys, keys_per_block: *keys_per_block, blocks, set };
        let end_of_older = blocks.start + blocks.len().min(older) as u32;
        older -= (end_of_older - blocks.start) as usize;
        spans.push(span(blocks.start..end_of_older, *document));
        let recent = (end_of_older..blocks.end).zip(recent_sets.by_ref());
        spans.extend(recent.map(|(block, set)| span(block..block + 1, set)));
    }
    spans
}

/// The chunk's keys on the GPU.
fn on_gpu<R: Runner>(runner: &R, chunk: &Chunk) -> Result<Arc<Keys<R::Memory>>, R::Error> {
    let here = |copy: &Option<Copied>| copy.clone().and_then(|copy| copy.downcast().ok());
    let copied = here(&chunk.copy());
    if let Some(keys) = copied {
        return Ok(keys);
    }
    let (width, pieces) = (chunk.width(), chunk.layout().pieces());
    // Before the lock is taken: a thread that waits for others of the pool may meanwhile begin a request over the same chunk.
    let rearranged = match chunk.all_panels() {
        KeyPanels::Int8 { values, .. } => by_dimension(values, width),
        KeyPanels::F16(_) | KeyPanels::Int4 { .. } => Vec::new(),
    };
    let mut copy = chunk.copy();
    if let Some(keys) = here(&copy) {
        // Another call was faster.
        return Ok(keys);
    }
    let keys = Arc::new(match chunk.all_panels() {
        KeyPanels::F16(values) => Keys::upload(runner, cuda::HostKeys::F16(values), width, pieces)?,
        KeyPanels::Int8 { scales, .. } => {
            Keys::upload(runner, cuda::HostKeys::Int8 { values: &rearranged, scales }, width, pieces)?
        }
        KeyPanels::Int4 { .. } => {
            return Err(ArgumentError::Dtype { expected: chunk.layout().dtype, found: DType::Int8 }.into());
        }
    });
    *copy = Some(keys.clone());
    Ok(keys)
}

/// Panels `(W / 4, PANEL, 4)` as `(W, PANEL)`.
fn by_dimension(quads: &[i8], width: usize) -> Vec<i8> {
    let panel_quads = width.next_multiple_of(QUAD) * PANEL;
    let mut rows = vec![0; quads.len() / panel_quads * width * PANEL];
    let panels = rows.par_chunks_exact_mut(width * PANEL).zip(quads.par_chunks_exact(panel_quads));
    panels.for_each(|(rows, quads)| {
        for (d, row) in rows.chunks_exact_mut(PANEL).enumerate() {
            let of_dimension = quads[d / QUAD * PANEL * QUAD + d % QUAD..].iter().step_by(QUAD);
            row.iter_mut().zip(of_dimension).for_each(|(to, from)| *to = *from);
        }
    });
    rows
}
