//! Attention over chosen blocks' pages: the tables that the kernels read, for as many query tokens at once as the cache
//! has pages for. One token's are read at once however many they are.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::failure::Failure;
use super::pages::{Pages, PieceId};
use crate::cuda::{self, Page, PageLayout, PartialAttention, Runner};
use crate::index::Found;
use crate::memory::plan::AttendPlan;
use crate::store::Store;
use crate::types::Granularity;

/// Which pieces each row reads, and how its query is rotated for them.
struct Tables {
    /// Neighbouring query heads that share an entry.
    sharing: usize,
    /// `(T, Hq / sharing, k)`
    pieces: Vec<PieceId>,
    /// `(T, Hq / sharing, k)`: entries of `rotations`.
    rotation_of: Vec<u32>,
    /// `(rotations, 2, half)`, cosines then sines.
    rotations: Vec<f32>,
}

/// How a GPU holds the pieces of a collection's blocks.
pub(super) fn page_layout(plan: &AttendPlan<'_>) -> PageLayout {
    let spec = &plan.lookup.collection.spec;
    PageLayout { dtype: spec.payload_dtype, block_tokens: spec.shape.block_tokens as usize, head_dim: plan.dim }
}

/// Attention of every query row over the blocks that were found for it.
pub(super) fn attend<R: Runner>(
    runner: &R,
    pages: &Pages<R::Memory>,
    store: &Store,
    plan: &AttendPlan<'_>,
    found: &Found,
) -> Result<PartialAttention, Failure> {
    let (request, shape) = (plan.lookup.request, &plan.lookup.collection.spec.shape);
    let (layout, tables) = (page_layout(plan), Tables::new(plan, found));
    let tokens = request.distances.len();
    let (token_entries, token_len) = (tables.pieces.len() / tokens, request.queries.len() / tokens);
    let mut all = PartialAttention { out: Vec::with_capacity(request.queries.len()), lse: Vec::new() };
    for run in runs(&tables.pieces, tokens, pages.at_once(layout)) {
        let entries = run.start * token_entries..run.end * token_entries;
        let (pieces, page_of) = distinct(&tables.pieces[entries.clone()]);
        let run_pages = pages.get(runner, store, layout, &pieces)?;
        let read = cuda::PagedAttention {
            tokens: run.len() as u32,
            query_heads: shape.query_heads,
            queries: &request.queries[run.start * token_len..run.end * token_len],
            k: found.k as u32,
            sharing: tables.sharing as u32,
            layout,
            pages: &run_pages.iter().map(|page| &**page).collect::<Vec<&Page<_>>>(),
            page_of: &page_of,
            rotation_of: &tables.rotation_of[entries],
            rotations: &tables.rotations,
            half: shape.rope_of(request.layer).frequencies.len() as u32,
            normalisation: plan.normalisation,
            softmax_scale: shape.softmax_scale,
        };
        let part = cuda::attend(runner, &read).map_err(Failure::gpu)?;
        all.out.extend(part.out);
        all.lse.extend(part.lse);
    }
    Ok(all)
}

impl Tables {
    fn new(plan: &AttendPlan<'_>, found: &Found) -> Tables {
        let (request, shape) = (plan.lookup.request, &plan.lookup.collection.spec.shape);
        let (heads, kv_heads) = (shape.query_heads as usize, shape.kv_heads as usize);
        let sharing = match request.granularity {
            Granularity::TokenHead | Granularity::Head => 1,
            Granularity::Token | Granularity::KvGroup | Granularity::Shared => plan.group,
        };
        let first_piece = request.layer as usize * kv_heads;
        let mut tables = Tables { sharing, pieces: Vec::new(), rotation_of: Vec::new(), rotations: Vec::new() };
        let mut rotation_by_reach = HashMap::new();
        for (token, &distance) in request.distances.iter().enumerate() {
            for head in (0..heads).step_by(sharing) {
                let chosen = found.row(request.granularity.row(token, head, heads, kv_heads));
                for (&position, reach) in chosen.iter().zip(plan.reaches(distance, chosen)) {
                    let (block, tokens) = plan.lookup.block_and_tokens(position as usize);
                    tables.pieces.push(PieceId { block, tokens, number: first_piece + head / plan.group });
                    let next = rotation_by_reach.len() as u32;
                    let rotation = *rotation_by_reach.entry(reach).or_insert_with(|| {
                        tables.rotations.extend(plan.rotations.by(reach).values());
                        next
                    });
                    tables.rotation_of.push(rotation);
                }
            }
        }
        tables
    }
}

/// Cuts tokens into runs that read at most so many distinct pieces, or are of one token.
fn runs(pieces: &[PieceId], tokens: usize, pieces_max: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut read) = (0, HashSet::new());
    for token in 0..tokens {
        let of_token = &pieces[token * pieces.len() / tokens..(token + 1) * pieces.len() / tokens];
        read.extend(of_token);
        if read.len() > pieces_max && token > start {
            runs.push(start..token);
            (start, read) = (token, of_token.iter().collect());
        }
    }
    runs.push(start..tokens);
    runs
}

/// The pieces without repetition, and which of them each was.
fn distinct(pieces: &[PieceId]) -> (Vec<PieceId>, Vec<u32>) {
    let (mut distinct, mut places) = (Vec::new(), HashMap::new());
    let place_of = pieces
        .iter()
        .map(|&piece| {
            *places.entry(piece).or_insert_with(|| {
                distinct.push(piece);
                distinct.len() as u32 - 1
            })
        })
        .collect();
    (distinct, place_of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BlockId, DocumentId};

    #[test]
    fn runs_read_a_bounded_number_of_pieces_and_leave_out_no_token() {
        let piece = |index| PieceId { block: BlockId { document: DocumentId(1), index }, tokens: 5, number: 0 };
        let pieces = [0, 1, 1, 2, 0, 1, 5, 6, 5, 6].map(piece);
        assert_eq!(runs(&pieces, 5, 3), [0..3, 3..5]);
        assert_eq!(runs(&pieces, 5, 1), [0..1, 1..2, 2..3, 3..4, 4..5]);
        let whole = |tokens: usize| vec![Range { start: 0, end: tokens }];
        assert_eq!(runs(&pieces, 5, 9), whole(5));
        assert_eq!(runs(&[], 2, 1), whole(2));
        assert_eq!(distinct(&pieces[..4]), (vec![piece(0), piece(1), piece(2)], vec![0, 1, 1, 2]));
    }
}
