//! The search that runs: every eligible key is scored, in tiles that rayon's pool shares out, without allocation per key.
//!
//! Two steps: scores of all blocks for every query token and head, with the log-sum-exp of each row taken while its tile is in
//! the first-level cache; then for every row of choices the aggregate and its top-k. Scores lie as
//! `(Hkv, tile, T * G, blocks of the tile)`, so that each tile of each KV head is one contiguous part that one task writes.
//!
//! Most blocks need no aggregate: their largest share, or for a sum over heads that times the number of heads, does not reach
//! the k-th best so far.

use std::ops::Range;

use rayon::prelude::*;

use super::select::{self, Best};
use super::snapshot::{CHUNK_KEYS_MAX, Chunk, PANEL};
use super::{Found, Query, kernel};
use crate::numeric::{self, exp, fma, simd};
use crate::types::{BlockScore, Granularity};

/// Multiplications below which waking other threads costs more than it saves: about 20 us of one core.
const PARALLEL_WORK_MIN: usize = 1 << 18;

/// Query rows whose scores against a tile are kept at once: 64 x 2048 numbers stay in a core's own cache. A multiple of
/// the rows that the kernel packs together.
const STRIP_ROWS: usize = 16 * kernel::ROWS;

/// Consecutive eligible blocks of one chunk that are scored with the same queries.
struct Tile<'a> {
    chunk: &'a Chunk,
    /// In the chunk.
    blocks: Range<usize>,
    /// Position of the first block among the eligible ones.
    start: usize,
    /// Which queries: 0 for older blocks, `1 + j` for the j-th recent one.
    set: usize,
}

/// Everything that the steps share.
struct Search<'a> {
    query: &'a Query<'a>,
    tiles: Vec<Tile<'a>>,
    /// N
    eligible: usize,
    /// T * G, query rows of one KV head; row `t * G + g`.
    head_rows: usize,
    parallel: bool,
}

/// Scores of all eligible blocks for all query rows, with the log-sum-exp of each row.
struct Scores {
    /// `(Hkv, tile, T * G, blocks of the tile)`
    numbers: Vec<f32>,
    /// `(Hkv, T * G)`
    totals: Vec<f32>,
}

/// One tile of one KV head, and where its scores go.
struct Part<'a> {
    head: usize,
    tile: &'a Tile<'a>,
    /// `(T * G, blocks of the tile)`
    scores: &'a mut [f32],
    /// `(T * G)`: log-sum-exp over the tile.
    totals: &'a mut [f32],
}

/// Chooses the blocks of every row.
pub fn search(query: &Query<'_>) -> Found {
    let eligible = query.eligible();
    let k = query.top_k.min(eligible);
    let rows = query.rows();
    if k == 0 || rows == 0 {
        return Found { rows, ..Found::default() };
    }
    let keys = eligible * query.layout.keys_per_block;
    let search = Search {
        query,
        tiles: tiles(query),
        eligible,
        head_rows: query.tokens * query.query_heads / query.layout.kv_heads,
        parallel: query.queries.len() * keys >= PARALLEL_WORK_MIN,
    };
    let scores = search.score();
    let choose = |rough: &mut Vec<f32>, row| search.choose(&scores, row, k, rough);
    let chosen: Vec<Vec<select::Candidate>> = if search.parallel {
        (0..rows).into_par_iter().map_init(Vec::new, choose).collect()
    } else {
        let mut rough = Vec::new();
        (0..rows).map(|row| choose(&mut rough, row)).collect()
    };
    Found {
        rows,
        k,
        positions: chosen.iter().flatten().map(|candidate| candidate.position).collect(),
        scores: chosen.iter().flatten().map(|candidate| candidate.score).collect(),
    }
}

/// Cuts the eligible blocks where the chunk, the queries or the size bound says so.
fn tiles<'a>(query: &'a Query<'a>) -> Vec<Tile<'a>> {
    let (eligible, recent) = (query.eligible(), query.recent());
    let older = eligible - recent;
    let tile_blocks = query.layout.chunk_blocks();
    let mut tiles = Vec::new();
    let mut start = 0usize;
    for scoped in query.scope {
        for (chunk, part) in scoped.keys.parts(scoped.blocks.clone()) {
            let mut from = part.start;
            while from < part.end {
                let (set, room) = match start.checked_sub(older) {
                    None => (0, tile_blocks.min(older - start)),
                    Some(recent) => (1 + recent, 1),
                };
                let blocks = from..part.end.min(from + room);
                from = blocks.end;
                tiles.push(Tile { chunk, start, set, blocks: blocks.clone() });
                start += blocks.len();
            }
        }
    }
    debug_assert_eq!(start, eligible);
    tiles
}

impl Search<'_> {
    /// Runs a task for every item, on all threads if there is enough to do.
    fn for_each<T: Send>(&self, items: Vec<T>, task: impl Fn(T) + Sync + Send) {
        if self.parallel {
            items.into_par_iter().for_each(task);
        } else {
            items.into_iter().for_each(task);
        }
    }

    /// Step 1.
    fn score(&self) -> Scores {
        let sets: Vec<Vec<f32>> = (0..=self.query.recent()).map(|set| self.head_major(set)).collect();
        let (kv_heads, rows) = (self.query.layout.kv_heads, self.head_rows);
        let head_numbers = rows * self.query.layout.head_dim;
        let mut numbers = vec![0.0; kv_heads * rows * self.eligible];
        let mut tile_totals = vec![0.0; kv_heads * self.tiles.len() * rows];
        let mut parts = Vec::with_capacity(kv_heads * self.tiles.len());
        let (mut scores_left, mut totals_left) = (numbers.as_mut_slice(), tile_totals.as_mut_slice());
        for head in 0..kv_heads {
            for tile in &self.tiles {
                let scores = scores_left.split_off_mut(..rows * tile.blocks.len()).unwrap_or_default();
                let totals = totals_left.split_off_mut(..rows).unwrap_or_default();
                parts.push(Part { head, tile, scores, totals });
            }
        }
        self.for_each(parts, |part| {
            let queries = &sets[part.tile.set][part.head * head_numbers..][..head_numbers];
            self.score_part(part, queries);
        });
        let mut totals = vec![f32::NEG_INFINITY; kv_heads * rows];
        for (totals, tiles) in totals.chunks_exact_mut(rows).zip(tile_totals.chunks_exact(rows * self.tiles.len())) {
            for tile in tiles.chunks_exact(rows) {
                totals.iter_mut().zip(tile).for_each(|(total, tile)| *total = add_logs(*total, *tile));
            }
        }
        Scores { numbers, totals }
    }

    /// One set of queries times the softmax scale, `(Hkv, T * G, D)`, packed for the kernel in strips.
    fn head_major(&self, set: usize) -> Vec<f32> {
        let query = self.query;
        let dim = query.layout.head_dim;
        let group = query.query_heads / query.layout.kv_heads;
        let mut packed = Vec::with_capacity(query.queries.len());
        let mut numbers = Vec::with_capacity(self.head_rows * dim);
        for head in 0..query.layout.kv_heads {
            numbers.clear();
            for token in query.query_set(set).chunks_exact(query.query_heads * dim) {
                let rows = &token[head * group * dim..][..group * dim];
                numbers.extend(rows.iter().map(|number| number * query.softmax_scale));
            }
            packed.extend(kernel::pack(&numbers, dim));
        }
        packed
    }

    /// Fills a part with the scores of packed `queries (T * G, D)`.
    fn score_part(&self, Part { head, tile, scores, totals }: Part<'_>, queries: &[f32]) {
        let layout = self.query.layout;
        let (dim, per_block) = (layout.head_dim, layout.keys_per_block);
        let keys = tile.blocks.start * per_block..tile.blocks.end * per_block;
        let piece = self.query.layer * layout.kv_heads + head;
        let first = keys.start / PANEL;
        let panels = tile.chunk.panels(piece, first..keys.end.div_ceil(PANEL));
        let width = (keys.end.div_ceil(PANEL) - first) * PANEL;
        let wanted = keys.start - first * PANEL..keys.end - first * PANEL;

        debug_assert!(width <= CHUNK_KEYS_MAX.max(per_block) + 2 * PANEL);
        let mut wide = Vec::new();
        let mut strip = vec![0.0; STRIP_ROWS.min(self.head_rows) * width];
        let blocks = tile.blocks.len();
        let rows = scores.chunks_mut(STRIP_ROWS * blocks).zip(totals.chunks_mut(STRIP_ROWS));
        for (queries, (scores, totals)) in queries.chunks(STRIP_ROWS * dim).zip(rows) {
            let strip = &mut strip[..queries.len() / dim * width];
            kernel::score(panels, dim, queries, &mut wide, strip);
            let rows = strip.chunks_exact(width).zip(scores.chunks_exact_mut(blocks));
            for ((row, scores), total) in rows.zip(totals) {
                reduce(self.query.block_score, &row[wanted.clone()], per_block, scores);
                *total = numeric::log_sum_exp(scores);
            }
        }
    }

    /// Scores of one query row against one tile.
    fn tile_row<'s>(&self, numbers: &'s [f32], tile: &Tile<'_>, head: usize, row: usize) -> &'s [f32] {
        let start = (head * self.eligible + tile.start) * self.head_rows + row * tile.blocks.len();
        &numbers[start..][..tile.blocks.len()]
    }

    /// Step 2 for one row of choices. `rough` is scratch space.
    fn choose(&self, scores: &Scores, row: usize, k: usize, rough: &mut Vec<f32>) -> Vec<select::Candidate> {
        let members = self.members(row);
        // One row that gathers from many would keep all other threads waiting.
        if self.parallel && members.len() > STRIP_ROWS {
            let of_tile = |rough: &mut Vec<f32>, tile| {
                let mut best = Best::new(k);
                self.offer_tile(scores, tile, &members, rough, &mut best);
                best.into_positions()
            };
            let tiles: Vec<_> = self.tiles.par_iter().map_init(Vec::new, of_tile).collect();
            let mut best = Best::new(k);
            tiles.into_iter().flatten().for_each(|candidate| best.offer(candidate));
            return best.into_positions();
        }
        let mut best = Best::new(k);
        for tile in &self.tiles {
            self.offer_tile(scores, tile, &members, rough, &mut best);
        }
        best.into_positions()
    }

    /// Offers the blocks of one tile to a row of choices that aggregates the scores of `members`.
    fn offer_tile(
        &self,
        scores: &Scores,
        tile: &Tile<'_>,
        members: &[(usize, usize)],
        rough: &mut Vec<f32>,
        best: &mut Best,
    ) {
        let shares = |&(head, row): &(usize, usize)| {
            (self.tile_row(&scores.numbers, tile, head, row), scores.totals[head * self.head_rows + row])
        };
        let sums = self.query.granularity == Granularity::KvGroup;
        let (room, slack) = match sums {
            true => ((members.len() as f32).ln() + ROUNDING, ADD_SHARES_ERROR * members.len() as f32),
            false => (0.0, 0.0),
        };
        for first in (0..tile.blocks.len()).step_by(STRIDE) {
            let stride = first..tile.blocks.len().min(first + STRIDE);
            let largest = |(scores, total): (&[f32], f32)| numeric::max(&scores[stride.clone()]) - total;
            let bound = members.iter().map(|member| largest(shares(member))).fold(f32::NEG_INFINITY, f32::max);
            if !best.may_take(bound + room) {
                continue;
            }
            rough.clear();
            rough.resize(stride.len(), f32::NEG_INFINITY);
            for (scores, total) in members.iter().map(shares) {
                match sums {
                    true => add_shares(rough, &scores[stride.clone()], total),
                    false => raise(rough, &scores[stride.clone()], total),
                }
            }
            best.offer_all(tile.start + first, rough, slack, |i| match sums {
                true => members
                    .iter()
                    .map(shares)
                    .fold(f32::NEG_INFINITY, |sum, (scores, total)| add_logs(sum, scores[first + i] - total)),
                false => rough[i],
            });
        }
    }

    /// The (KV head, query row) pairs whose scores a row of choices aggregates.
    fn members(&self, row: usize) -> Vec<(usize, usize)> {
        let query = self.query;
        let group = query.query_heads / query.layout.kv_heads;
        let member = |token: usize, head: usize| (head / group, token * group + head % group);
        let (tokens, heads) = match query.granularity {
            Granularity::TokenHead => (one(row / query.query_heads), one(row % query.query_heads)),
            Granularity::Head => (0..query.tokens, one(row)),
            Granularity::Token => (one(row), 0..query.query_heads),
            Granularity::KvGroup => {
                let first = row % query.layout.kv_heads * group;
                (one(row / query.layout.kv_heads), first..first + group)
            }
            Granularity::Shared => (0..query.tokens, 0..query.query_heads),
        };
        tokens.flat_map(|token| heads.clone().map(move |head| member(token, head))).collect()
    }
}

fn one(number: usize) -> Range<usize> {
    number..number + 1
}

/// `keys (blocks * m)` to `scores (blocks)`.
fn reduce(rule: BlockScore, keys: &[f32], per_block: usize, scores: &mut [f32]) {
    if per_block == 1 {
        scores.copy_from_slice(keys);
        return;
    }
    for (score, keys) in scores.iter_mut().zip(keys.chunks_exact(per_block)) {
        *score = match rule {
            BlockScore::Max => numeric::max(keys),
            BlockScore::LogSumExp => numeric::log_sum_exp(keys),
        };
    }
}

/// `log(e^a + e^b)`.
fn add_logs(a: f32, b: f32) -> f32 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == f32::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// Blocks that are compared with the k-th best at once.
const STRIDE: usize = 64;

/// How far the log of a sum may lie above its bound because both are rounded.
const ROUNDING: f32 = 1e-3;

/// How far one call of [`add_shares`] is off at most: the polynomial and the rounding of logs down to -100.
const ADD_SHARES_ERROR: f32 = 1e-4;

simd! {
    /// `sums[i] = log(e^sums[i] + e^(scores[i] - total))`, within [`ADD_SHARES_ERROR`].
    fn add_shares(sums: &mut [f32], scores: &[f32], total: f32) {
        for (sum, score) in sums.iter_mut().zip(scores) {
            let share = *score - total;
            let (low, high) = if share < *sum { (share, *sum) } else { (*sum, share) };
            // log(1 + y) for y in 0 to 1, within 1e-5 (Abramowitz and Stegun 4.1.43).
            let y = exp::<FMA>(low - high);
            let mut p = 0.032_158_45;
            p = fma::<FMA>(p, y, -0.136_062_75);
            p = fma::<FMA>(p, y, 0.289_474_8);
            p = fma::<FMA>(p, y, -0.491_908_96);
            p = fma::<FMA>(p, y, 0.999_495_56);
            *sum = fma::<FMA>(p, y, high);
        }
    }
}

simd! {
    /// `best[i] = max(best[i], scores[i] - total)`.
    fn raise(best: &mut [f32], scores: &[f32], total: f32) {
        for (best, score) in best.iter_mut().zip(scores) {
            let share = *score - total;
            *best = if share > *best { share } else { *best };
        }
    }
}
