//! The search that runs: every eligible key is scored, in tiles that rayon's pool shares out, without allocation per key.
//!
//! Two steps: scores of all blocks for every query token and head, with the log-sum-exp of each row taken while its tile is in
//! the first-level cache; then for every row of choices the aggregate and its top-k. Scores lie as
//! `(Hkv, tile, T * G, blocks of the tile)`, so that each tile of each KV head is one contiguous part that one task writes.
//!
//! Most blocks need no aggregate: that of the largest scores of their stride does not reach the k-th best so far.

use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{self, Form, Rows};
use super::scratch::{self, Scratch};
use super::select::Best;
use super::snapshot::{CHUNK_KEYS_MAX, Chunk, PANEL};
use super::{Found, Query};
use crate::numeric::{self, exp, fma, larger, simd};
use crate::types::{BlockScore, Granularity};

/// Multiplications below which waking other threads costs more than it saves: about 20 us of one core.
const PARALLEL_WORK_MIN: usize = 1 << 18;

/// Query rows whose scores against a tile are kept at once: 64 x 2048 numbers stay in a core's own cache. A multiple of
/// the rows that the kernel packs together.
const STRIP_ROWS: usize = 16 * kernel::ROWS;

/// Blocks that are compared with the k-th best at once.
const STRIDE: usize = 64;

/// Consecutive eligible blocks of one chunk that are scored with the same queries.
struct Tile<'a> {
    chunk: &'a Chunk,
    /// In the chunk.
    blocks: Range<usize>,
    /// Position of the first block among the eligible ones.
    start: usize,
    /// Strides of all tiles before.
    first_stride: usize,
    /// Which queries: 0 for older blocks, `1 + j` for the j-th recent one.
    set: usize,
}

/// Everything that the steps share.
struct Search<'a> {
    query: &'a Query<'a>,
    tiles: &'a [Tile<'a>],
    /// Query tokens, those of the query or some of them.
    tokens: Range<usize>,
    /// N
    eligible: usize,
    /// Strides of all tiles.
    strides: usize,
    /// T * G, query rows of one KV head; row `t * G + g`.
    head_rows: usize,
    form: Form,
    parallel: bool,
}

/// Scores of all eligible blocks for all query rows, with what choosing needs to know about many at once.
struct Scores {
    /// `(Hkv, tile, T * G, blocks of the tile)`
    numbers: Scratch,
    /// `(Hkv, tile, T * G, strides of the tile)`: the largest score of each.
    peaks: Scratch,
    /// `(Hkv, T * G)`: log-sum-exp of each row.
    totals: Vec<f32>,
}

/// One tile of one KV head, and where its scores go.
struct Part<'a> {
    head: usize,
    tile: &'a Tile<'a>,
    /// `(T * G, blocks of the tile)`
    scores: &'a mut [f32],
    /// `(T * G, strides of the tile)`
    peaks: &'a mut [f32],
    /// `(T * G)`: log-sum-exp over the tile.
    totals: &'a mut [f32],
}

/// What choosing writes down on the way, of one tile.
#[derive(Default)]
struct Rough {
    /// Above the aggregate of every block of a stride.
    bounds: Vec<f32>,
    /// The aggregates of one stride, nearly.
    shares: Vec<f32>,
}

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
        let search = Search::new(query, &tiles, tokens);
        match search.parallel {
            // Both steps inside the pool: going in and out wakes threads.
            true => rayon::scope(|_| search.run(k, positions, scores)),
            false => search.run(k, positions, scores),
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
            let fit = scratch::KEPT_NUMBERS_MAX / (query.query_heads * query.eligible());
            let group = query.query_heads / query.layout.kv_heads;
            let whole_strips = STRIP_ROWS.div_ceil(group);
            (fit / whole_strips * whole_strips).clamp(whole_strips.min(query.tokens), query.tokens)
        }
    }
}

/// Cuts the eligible blocks where the chunk, the queries or the size bound says so.
fn tiles<'a>(query: &'a Query<'a>) -> Vec<Tile<'a>> {
    let (eligible, recent) = (query.eligible(), query.recent());
    let older = eligible - recent;
    let tile_blocks = query.layout.chunk_blocks();
    let mut tiles = Vec::new();
    let (mut start, mut first_stride) = (0usize, 0);
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
                tiles.push(Tile { chunk, start, first_stride, set, blocks: blocks.clone() });
                start += blocks.len();
                first_stride += blocks.len().div_ceil(STRIDE);
            }
        }
    }
    debug_assert_eq!(start, eligible);
    tiles
}

impl Tile<'_> {
    fn strides(&self) -> usize {
        self.blocks.len().div_ceil(STRIDE)
    }
}

impl<'a> Search<'a> {
    fn new(query: &'a Query<'a>, tiles: &'a [Tile<'a>], tokens: Range<usize>) -> Self {
        let eligible = query.eligible();
        let keys = eligible * query.layout.keys_per_block;
        let numbers = tokens.len() * query.query_heads * query.layout.head_dim;
        let head_rows = tokens.len() * query.query_heads / query.layout.kv_heads;
        Search {
            query,
            tiles,
            eligible,
            strides: tiles.iter().map(Tile::strides).sum(),
            head_rows,
            form: Form::of(query.layout.dtype, head_rows),
            parallel: numbers * keys >= PARALLEL_WORK_MIN,
            tokens,
        }
    }

    /// Chooses `(rows, k)`.
    fn run(&self, k: usize, positions: &mut [u32], shares: &mut [f32]) {
        let scores = self.score();
        let choose = |rough: &mut Rough, (row, (positions, shares)): (usize, (&mut [u32], &mut [f32]))| {
            let best = self.choose(&scores, row, k, rough).into_positions();
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
        let sets: Vec<Vec<Rows>> = (0..=self.query.recent()).map(|set| self.packed(set)).collect();
        let (kv_heads, rows) = (self.query.layout.kv_heads, self.head_rows);
        let strips = rows.div_ceil(STRIP_ROWS);
        let mut numbers = Scratch::take(kv_heads * rows * self.eligible);
        let mut peaks = Scratch::take(kv_heads * rows * self.strides);
        let mut tile_totals = Scratch::take(kv_heads * self.tiles.len() * rows);
        let mut parts = Vec::with_capacity(kv_heads * self.tiles.len());
        let (mut scores_left, mut peaks_left, mut totals_left) = (&mut *numbers, &mut *peaks, &mut *tile_totals);
        for head in 0..kv_heads {
            for tile in self.tiles {
                let scores = scores_left.split_off_mut(..rows * tile.blocks.len()).unwrap_or_default();
                let peaks = peaks_left.split_off_mut(..rows * tile.strides()).unwrap_or_default();
                let totals = totals_left.split_off_mut(..rows).unwrap_or_default();
                parts.push(Part { head, tile, scores, peaks, totals });
            }
        }
        self.for_each(parts, |part| {
            let queries = &sets[part.tile.set][part.head * strips..][..strips];
            self.score_part(part, queries);
        });
        let mut totals = vec![f32::NEG_INFINITY; kv_heads * rows];
        for (totals, tiles) in totals.chunks_exact_mut(rows).zip(tile_totals.chunks_exact(rows * self.tiles.len())) {
            for tile in tiles.chunks_exact(rows) {
                totals.iter_mut().zip(tile).for_each(|(total, tile)| *total = add_logs(*total, *tile));
            }
        }
        Scores { numbers, peaks, totals }
    }

    /// One set of queries times the softmax scale, `(Hkv, strips)`.
    fn packed(&self, set: usize) -> Vec<Rows> {
        let query = self.query;
        let dim = query.layout.head_dim;
        let group = query.query_heads / query.layout.kv_heads;
        let token_numbers = query.query_heads * dim;
        let queries = &query.query_set(set)[self.tokens.start * token_numbers..self.tokens.end * token_numbers];
        let mut packed = Vec::new();
        let mut numbers = Vec::with_capacity(self.head_rows * dim);
        for head in 0..query.layout.kv_heads {
            numbers.clear();
            for token in queries.chunks_exact(token_numbers) {
                let rows = &token[head * group * dim..][..group * dim];
                numbers.extend(rows.iter().map(|number| number * query.softmax_scale));
            }
            packed.extend(numbers.chunks(STRIP_ROWS * dim).map(|strip| Rows::new(self.form, strip, dim)));
        }
        packed
    }

    /// Fills a part with the scores of packed `queries (strips)`.
    fn score_part(&self, Part { head, tile, scores, peaks, totals }: Part<'_>, queries: &[Rows]) {
        let layout = self.query.layout;
        let (dim, per_block) = (layout.head_dim, layout.keys_per_block);
        let keys = tile.blocks.start * per_block..tile.blocks.end * per_block;
        let piece = self.query.layer * layout.kv_heads + head;
        let first = keys.start / PANEL;
        let panels = tile.chunk.panels(piece, first..keys.end.div_ceil(PANEL));
        let width = (keys.end.div_ceil(PANEL) - first) * PANEL;
        let wanted = keys.start - first * PANEL..keys.end - first * PANEL;

        debug_assert!(width <= CHUNK_KEYS_MAX.max(per_block) + 2 * PANEL);
        let mut wide = Scratch::take(if self.form == Form::Wide { width * dim } else { 0 });
        if self.form == Form::Wide {
            panels.widen(dim, &mut wide);
        }
        let (blocks, strides) = (tile.blocks.len(), tile.strides());
        // Nothing to reduce, and nothing to leave out.
        let as_scored = per_block == 1 && width == blocks;
        let mut strip = Scratch::take(if as_scored { 0 } else { STRIP_ROWS.min(self.head_rows) * width });
        let rows = scores.chunks_mut(STRIP_ROWS * blocks).zip(peaks.chunks_mut(STRIP_ROWS * strides));
        for (queries, ((scores, peaks), totals)) in queries.iter().zip(rows.zip(totals.chunks_mut(STRIP_ROWS))) {
            if as_scored {
                queries.score(panels, &wide, scores);
            } else {
                let strip = &mut strip[..totals.len() * width];
                queries.score(panels, &wide, strip);
                for (row, scores) in strip.chunks_exact(width).zip(scores.chunks_exact_mut(blocks)) {
                    reduce(self.query.block_score, &row[wanted.clone()], per_block, scores);
                }
            }
            let rows = scores.chunks_exact(blocks).zip(peaks.chunks_exact_mut(strides));
            for ((scores, peaks), total) in rows.zip(totals) {
                maxima(scores, STRIDE, peaks);
                *total = numeric::log_sum_exp_below(scores, numeric::max(peaks));
            }
        }
    }

    /// Step 2 for one row of choices. `rough` is scratch space.
    fn choose(&self, scores: &Scores, row: usize, k: usize, rough: &mut Rough) -> Best {
        let members = self.members(row);
        let mut best = Best::new(k);
        // One row that gathers from many would keep all other threads waiting.
        if self.parallel && members.len() > STRIP_ROWS {
            let of_tile = |rough: &mut Rough, tile| {
                let mut best = Best::new(k);
                self.offer_tile(scores, tile, &members, rough, &mut best);
                best.into_positions()
            };
            let tiles: Vec<_> = self.tiles.par_iter().map_init(Rough::default, of_tile).collect();
            tiles.into_iter().flatten().for_each(|candidate| best.offer(candidate));
            return best;
        }
        for tile in self.tiles {
            self.offer_tile(scores, tile, &members, rough, &mut best);
        }
        best
    }

    /// Offers the blocks of one tile to a row of choices that aggregates the scores of `members`.
    fn offer_tile(
        &self,
        scores: &Scores,
        tile: &Tile<'_>,
        members: &[(usize, usize)],
        rough: &mut Rough,
        best: &mut Best,
    ) {
        let (blocks, strides) = (tile.blocks.len(), tile.strides());
        let total = |&(head, row): &(usize, usize)| scores.totals[head * self.head_rows + row];
        let shares = |member: &(usize, usize)| {
            let (head, row) = *member;
            let start = (head * self.eligible + tile.start) * self.head_rows + row * blocks;
            (&scores.numbers[start..][..blocks], total(member))
        };
        let peaks = |member: &(usize, usize)| {
            let (head, row) = *member;
            let start = (head * self.strides + tile.first_stride) * self.head_rows + row * strides;
            (&scores.peaks[start..][..strides], total(member))
        };
        let sums = self.query.granularity == Granularity::KvGroup;
        let slack = if sums { ADD_SHARES_ERROR * members.len() as f32 } else { 0.0 };
        let Rough { bounds, shares: rough } = rough;
        aggregate(sums, members.iter().map(peaks), strides, bounds);
        for (stride, bound) in bounds.iter().enumerate() {
            if !best.may_take(bound + slack) {
                continue;
            }
            let first = stride * STRIDE;
            let range = first..blocks.min(first + STRIDE);
            let of_stride = |member| {
                let (scores, total) = shares(member);
                (&scores[range.clone()], total)
            };
            aggregate(sums, members.iter().map(of_stride), range.len(), rough);
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
            Granularity::Head => (0..self.tokens.len(), one(row)),
            Granularity::Token => (one(row), 0..query.query_heads),
            Granularity::KvGroup => {
                let first = row % query.layout.kv_heads * group;
                (one(row / query.layout.kv_heads), first..first + group)
            }
            Granularity::Shared => (0..self.tokens.len(), 0..query.query_heads),
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
    match rule {
        BlockScore::Max => maxima(keys, per_block, scores),
        BlockScore::LogSumExp => log_sum_exps(keys, per_block, scores),
    }
}

/// `log(e^a + e^b)`.
fn add_logs(a: f32, b: f32) -> f32 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == f32::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// Adds up, or takes the largest of, the shares of some rows, each given as scores and their total.
fn aggregate<'a>(sums: bool, rows: impl Iterator<Item = (&'a [f32], f32)>, count: usize, into: &mut Vec<f32>) {
    into.clear();
    into.resize(count, f32::NEG_INFINITY);
    for (scores, total) in rows {
        match sums {
            true => add_shares(into, scores, total),
            false => raise(into, scores, total),
        }
    }
}

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

/// Numbers that are compared or summed side by side: one AVX-512 register.
const LANES: usize = 16;

/// The largest of some numbers; -inf for none.
#[inline(always)]
fn largest(numbers: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; LANES];
    let (parts, rest) = numbers.as_chunks::<LANES>();
    for part in parts {
        for lane in 0..LANES {
            tops[lane] = larger(tops[lane], part[lane]);
        }
    }
    for (top, &number) in tops.iter_mut().zip(rest) {
        *top = larger(*top, number);
    }
    numeric::fold(tops, larger)
}

simd! {
    /// The largest of every `count` numbers, fewer at the end.
    fn maxima(numbers: &[f32], count: usize, into: &mut [f32]) {
        for (top, numbers) in into.iter_mut().zip(numbers.chunks(count)) {
            *top = largest(numbers);
        }
    }
}

simd! {
    /// The log-sum-exp of every `count` numbers.
    fn log_sum_exps(numbers: &[f32], count: usize, into: &mut [f32]) {
        for (result, numbers) in into.iter_mut().zip(numbers.chunks_exact(count)) {
            let top = largest(numbers);
            let mut sums = [0f32; LANES];
            let (parts, rest) = numbers.as_chunks::<LANES>();
            for part in parts {
                for lane in 0..LANES {
                    sums[lane] += exp::<FMA>(part[lane] - top);
                }
            }
            for (sum, &number) in sums.iter_mut().zip(rest) {
                *sum += exp::<FMA>(number - top);
            }
            *result = top + numeric::ln::<FMA>(numeric::fold(sums, |a, b| a + b));
        }
    }
}

simd! {
    /// `best[i] = max(best[i], scores[i] - total)`.
    fn raise(best: &mut [f32], scores: &[f32], total: f32) {
        for (best, score) in best.iter_mut().zip(scores) {
            let share = *score - total;
            *best = larger(*best, share);
        }
    }
}
