//! The same choice as [`super::fast`]'s, made by a GPU.
//!
//! A chunk's keys are copied to the GPU when a lookup first scans them, and stay there as long as the chunk: what an
//! append leaves as it was is not copied again.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use super::snapshot::{Chunk, PANEL, Panels, QUAD};
use super::{Found, KeyLayout, Query};
use crate::cuda::{self, Choice, Chosen, HEAD_DIM_MAX, Keys, Runner, Span};
use crate::types::DType;

/// Whether the kernels take the keys of a query: they meet one kind of keys at once.
pub fn is_supported(query: &Query<'_>) -> bool {
    let coded = query.scope.iter().filter(|scoped| scoped.keys.coded().is_some()).count();
    let one_kind = coded == 0 || coded == query.scope.iter().filter(|scoped| scoped.keys.blocks() > 0).count();
    query.layout.head_dim <= HEAD_DIM_MAX && query.layout.compressed.is_none() && one_kind
}

/// Chooses the blocks of every row. f32 sums are taken in another order than the CPU's: scores differ by rounding.
///
/// # Errors
/// The runner's; keys that are not supported are refused.
pub fn search<R: Runner>(runner: &R, query: &Query<'_>) -> Result<Found, R::Error> {
    let mut parts = Vec::new();
    for scoped in query.scope {
        for (chunk, blocks) in scoped.keys.parts(scoped.blocks.clone()) {
            parts.push((on_gpu(runner, chunk)?, blocks.start as u32..blocks.end as u32));
        }
    }
    let chosen = cuda::choose(
        runner,
        &Choice {
            layer: query.layer as u32,
            tokens: query.tokens as u32,
            query_heads: query.query_heads as u32,
            kv_heads: query.layout.kv_heads as u32,
            keys_per_block: query.layout.keys_per_block as u32,
            head_dim: query.layout.head_dim,
            dtype: if query.scope.iter().any(|scoped| scoped.keys.coded().is_some()) {
                DType::F16
            } else {
                query.layout.dtype
            },
            queries: &[query.queries, query.recent_queries].concat(),
            spans: &spans(query, &parts),
            top_k: query.top_k.min(query.eligible()) as u32,
            block_score: query.block_score,
            granularity: query.granularity,
            softmax_scale: query.softmax_scale,
        },
    )?;
    let Chosen { rows, k, positions, scores } = chosen;
    Ok(Found { rows, k, positions, scores })
}

/// Older blocks of a chunk are one span; each recent block is one, for it has queries of its own.
fn spans<'a, M>(query: &Query<'_>, parts: &'a [(Arc<Keys<M>>, Range<u32>)]) -> Vec<Span<'a, M>> {
    let mut older = query.eligible() - query.recent();
    let mut recent_sets = 1..;
    let mut spans = Vec::new();
    for (keys, blocks) in parts {
        let end_of_older = blocks.start + blocks.len().min(older) as u32;
        older -= (end_of_older - blocks.start) as usize;
        spans.push(Span { keys, blocks: blocks.start..end_of_older, set: 0 });
        let recent = (end_of_older..blocks.end).zip(recent_sets.by_ref());
        spans.extend(recent.map(|(block, set)| Span { keys, blocks: block..block + 1, set }));
    }
    spans
}

/// The chunk's keys on the GPU.
fn on_gpu<R: Runner>(runner: &R, chunk: &Chunk) -> Result<Arc<Keys<R::Memory>>, R::Error> {
    let mut copy = chunk.copy();
    if let Some(keys) = copy.clone().and_then(|copy| copy.downcast().ok()) {
        return Ok(keys);
    }
    let (head_dim, pieces) = (chunk.layout().head_dim, chunk.layout().pieces());
    let keys = Arc::new(match chunk.all_panels() {
        Panels::F16(numbers) => Keys::upload(runner, cuda::Panels::F16(numbers), head_dim, pieces)?,
        Panels::Int8 { numbers, scales } if !chunk.is_coded() => {
            let numbers = &by_dimension(numbers, head_dim);
            Keys::upload(runner, cuda::Panels::Int8 { numbers, scales }, head_dim, pieces)?
        }
        Panels::Int8 { .. } | Panels::Int4 { .. } => {
            Keys::upload(runner, cuda::Panels::F16(&decoded(chunk)), head_dim, pieces)?
        }
    });
    *copy = Some(keys.clone());
    Ok(keys)
}

/// Keys that are int8 by codes as f16 panels `(L * Hkv, panels, D, PANEL)`: the kernels know no codes.
fn decoded(chunk: &Chunk) -> Vec<f16> {
    let KeyLayout { head_dim, keys_per_block, .. } = chunk.layout();
    let keys = chunk.blocks() * keys_per_block;
    let piece_numbers = keys.next_multiple_of(PANEL) * head_dim;
    let mut halves = vec![f16::ZERO; chunk.layout().pieces() * piece_numbers];
    halves.par_chunks_exact_mut(piece_numbers).enumerate().for_each(|(piece, halves)| {
        for key in 0..keys {
            let lane = key / PANEL * PANEL * head_dim + key % PANEL;
            let numbers = chunk.key(piece, key).into_iter().enumerate();
            numbers.for_each(|(d, number)| halves[lane + d * PANEL] = f16::from_f32(number));
        }
    });
    halves
}

/// Panels `(D / 4, PANEL, 4)` as `(D, PANEL)`.
fn by_dimension(quads: &[i8], dim: usize) -> Vec<i8> {
    let panel_quads = dim.next_multiple_of(QUAD) * PANEL;
    let mut rows = vec![0; quads.len() / panel_quads * dim * PANEL];
    let panels = rows.par_chunks_exact_mut(dim * PANEL).zip(quads.par_chunks_exact(panel_quads));
    panels.for_each(|(rows, quads)| {
        for (d, row) in rows.chunks_exact_mut(PANEL).enumerate() {
            let of_dimension = quads[d / QUAD * PANEL * QUAD + d % QUAD..].iter().step_by(QUAD);
            row.iter_mut().zip(of_dimension).for_each(|(to, from)| *to = *from);
        }
    });
    rows
}
