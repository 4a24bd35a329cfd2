//! The search that runs, in two steps: scores of all blocks for every query token and head (`scan`); then for every row of
//! choices the aggregate and its top-k (`choose`).

use rayon::prelude::*;

use super::choose::Rough;
use super::scan::{STRIP_ROWS, Scan, tiles};
use super::scratch;
use super::{Found, Query};
use crate::types::Granularity;

/// Chooses the blocks of every row.
pub fn search(query: &Query<'_>) -> Found {
    let eligible = query.eligible();
    let k = query.top_k.min(eligible);
    let rows = query.rows();
    if k == 0 || rows == 0 {
        return Found { rows, ..Found::default() };
    }
    let tiles = tiles(query);
    let mut found = Found { rows, k, positions: vec![0; rows * k], scores: vec![0.0; rows * k] };
    let at_once = tokens_at_once(query);
    let choices = query.granularity.rows(at_once, query.query_heads, query.layout.kv_heads) * k;
    let batches = found.positions.chunks_mut(choices).zip(found.scores.chunks_mut(choices));
    for (first, (positions, scores)) in (0..query.tokens).step_by(at_once).zip(batches) {
        let tokens = first..query.tokens.min(first + at_once);
        let scan = Scan::new(query, &tiles, tokens);
        match scan.parallel {
            // Both steps inside the pool: going in and out wakes threads.
            true => rayon::scope(|_| scan.run(k, positions, scores)),
            false => scan.run(k, positions, scores),
        }
    }
    found
}

/// Query tokens whose scores are kept at once: as many as the memory that is kept for them holds, if tokens choose
/// for themselves.
fn tokens_at_once(query: &Query<'_>) -> usize {
    match query.granularity {
        Granularity::Head | Granularity::Shared => query.tokens,
        Granularity::TokenHead | Granularity::Token | Granularity::KvGroup => {
            let fit = scratch::KEPT_LEN_MAX / (query.query_heads * query.eligible());
            let group = query.query_heads / query.layout.kv_heads;
            let whole_strips = STRIP_ROWS.div_ceil(group);
            (fit / whole_strips * whole_strips).clamp(whole_strips.min(query.tokens), query.tokens)
        }
    }
}

impl Scan<'_> {
    /// Chooses `(rows, k)`.
    fn run(&self, k: usize, positions: &mut [u32], shares: &mut [f32]) {
        let scores = self.score();
        let choose = |rough: &mut Rough, (row, (positions, shares)): (usize, (&mut [u32], &mut [f32]))| {
            if self.query.until.is_over() {
                return;
            }
            let best = scores.choose(self, row, k, rough).into_positions();
            for (candidate, (position, share)) in best.into_iter().zip(positions.iter_mut().zip(shares)) {
                (*position, *share) = (candidate.position, candidate.score);
            }
        };
        if self.parallel {
            let rows = positions.par_chunks_mut(k).zip(shares.par_chunks_mut(k)).enumerate();
            rows.for_each_init(Rough::default, choose);
        } else {
            let mut rough = Rough::default();
            let rows = positions.chunks_mut(k).zip(shares.chunks_mut(k)).enumerate();
            rows.for_each(|row| choose(&mut rough, row));
        }
    }
}
