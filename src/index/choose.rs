//! Which blocks does a row choose, once everything is scored? Step 2 of [`super::fast`].
//!
//! Most blocks need no aggregate: that of the largest scores of their stride does not reach the k-th best so far. The strides
//! that promise most come first. Where scores come from compressed keys, a block that could be among the best is scored
//! again with the keys that it has: how far its score may be off ([`super::compress`]) is added to its bound.

use std::ops::Range;

use rayon::prelude::*;

use super::Query;
use super::compress::Compressed;
use super::reduce::{add_logs, reduce};
use super::scan::{STRIDE, Scan, Scores, Tile};
use super::select::{Best, Candidate};
use crate::types::Granularity;
use linalg::{exp, fma, larger, simd};

/// Members of a row above which its tiles are shared out: one row that gathers from many would keep all threads waiting.
const MEMBERS_MAX: usize = 64;

/// A query row whose scores a row of choices aggregates.
#[derive(Clone, Copy)]
pub(super) struct Member {
    /// KV head.
    pub(super) head: usize,
    /// `t * G + g`
    pub(super) row: usize,
}

/// What choosing writes down on the way.
#[derive(Default)]
pub(super) struct Rough {
    /// Above the aggregate of every block of a stride, for all strides.
    bounds: Vec<f32>,
    /// Above the aggregates of the blocks of one stride.
    shares: Vec<f32>,
    /// How far scores of one stride may be off.
    errors: Vec<f32>,
    /// Blocks that may be scored again: what their aggregates are at most, their stride, and their place in it.
    waiting: Vec<(f32, usize, usize)>,
    /// Scores of one block's keys.
    keys: Vec<f32>,
}

/// One stride of a tile.
struct Stride<'a> {
    tile: &'a Tile<'a>,
    /// In the tile.
    first: usize,
}

/// One row of choices.
struct Choice<'a> {
    scan: &'a Scan<'a>,
    scores: &'a Scores,
    members: Vec<Member>,
    /// Whether shares add up, or the largest counts.
    sums: bool,
}

impl Scores {
    /// Chooses for one row.
    pub(super) fn choose(&self, scan: &Scan<'_>, row: usize, k: usize, rough: &mut Rough) -> Best {
        let sums = scan.query.granularity == Granularity::KvGroup;
        let choice = Choice { scan, scores: self, members: scan.query.members(row, scan.tokens.len()), sums };
        if !scan.parallel || choice.members.len() <= MEMBERS_MAX {
            return choice.among(scan.tiles, k, rough);
        }
        let of_tile = |rough: &mut Rough, tile| choice.among(std::slice::from_ref(tile), k, rough).into_positions();
        let tiles: Vec<_> = scan.tiles.par_iter().map_init(Rough::default, of_tile).collect();
        let mut best = Best::new(k);
        tiles.into_iter().flatten().for_each(|candidate| best.offer(candidate));
        best
    }
}

impl Query<'_> {
    /// The query rows that a row of choices among `tokens` query tokens aggregates.
    pub(super) fn members(&self, row: usize, tokens: usize) -> Vec<Member> {
        let group = self.query_heads / self.layout.kv_heads;
        let (tokens, heads) = match self.granularity {
            Granularity::TokenHead => (one(row / self.query_heads), one(row % self.query_heads)),
            Granularity::Head => (0..tokens, one(row)),
            Granularity::Token => (one(row), 0..self.query_heads),
            Granularity::KvGroup => {
                let first = row % self.layout.kv_heads * group;
                (one(row / self.layout.kv_heads), first..first + group)
            }
            Granularity::Shared => (0..tokens, 0..self.query_heads),
        };
        let member = |token: usize, head: usize| Member { head: head / group, row: token * group + head % group };
        tokens.flat_map(|token| heads.clone().map(move |head| member(token, head))).collect()
    }
}

fn one(number: usize) -> Range<usize> {
    number..number + 1
}

impl Choice<'_> {
    /// The best blocks of some consecutive tiles.
    fn among(&self, tiles: &[Tile<'_>], k: usize, rough: &mut Rough) -> Best {
        let mut bounds = std::mem::take(&mut rough.bounds);
        let mut waiting = std::mem::take(&mut rough.waiting);
        bounds.clear();
        for tile in tiles {
            let first = bounds.len();
            bounds.resize(first + tile.strides(), f32::NEG_INFINITY);
            self.aggregate(|member| self.peaks(tile, member), &mut bounds[first..]);
            let error = self.error(tile) + self.slack();
            bounds[first..].iter_mut().for_each(|bound| *bound += error);
        }
        let stride_at = |index: usize| {
            let first = tiles[0].first_stride;
            let tile = &tiles[tiles.partition_point(|tile| tile.first_stride - first <= index) - 1];
            Stride { tile, first: (index - (tile.first_stride - first)) * STRIDE }
        };
        let mut promising = Best::new(k);
        promising.offer_all(0, &bounds, |index| bounds[index]);
        let promising = promising.into_positions();
        let mut promising = promising.iter().map(|candidate| candidate.position as usize);
        // The best of each first: what is no better than all of these needs no exact score.
        let mut best = Best::new(k);
        for index in promising.clone() {
            let stride = stride_at(index);
            self.bound(&stride, rough);
            best.offer(self.candidate(&stride, largest_of(&rough.shares), rough));
        }
        let mut next = promising.next();
        for (index, &bound) in bounds.iter().enumerate() {
            let is_promising = next == Some(index);
            if is_promising {
                next = promising.next();
            }
            if !best.may_take(bound) {
                continue;
            }
            let stride = stride_at(index);
            self.bound(&stride, rough);
            let mut reaching = reaching(&rough.shares, best.least().unwrap_or(f32::NEG_INFINITY));
            if is_promising {
                reaching &= !(1 << largest_of(&rough.shares));
            }
            while reaching != 0 {
                let block = reaching.trailing_zeros() as usize;
                reaching &= reaching - 1;
                let bound = rough.shares[block];
                if let Some(compressed) = stride.tile.chunk.compressed() {
                    self.prefetch(&stride, compressed, block);
                    waiting.push((bound, index, block));
                } else if best.may_take(bound) {
                    best.offer(self.candidate(&stride, block, rough));
                }
            }
        }
        for (bound, index, block) in waiting.drain(..) {
            if best.may_take(bound) {
                best.offer(self.candidate(&stride_at(index), block, rough));
            }
        }
        (rough.bounds, rough.waiting) = (bounds, waiting);
        best
    }

    /// Has memory bring the keys of a block that may be scored again: they lie anywhere, and many can be on their way
    /// at once.
    fn prefetch(&self, stride: &Stride<'_>, compressed: &Compressed, block: usize) {
        // Of one head and one key: with more of them there is other work to wait in, and the hardware reads on.
        let Some(member) = self.members.first() else { return };
        let keys = compressed.halves(self.scan.piece(member.head), stride.tile.blocks.start + stride.first + block);
        linalg::prefetch_slice(&keys[..self.scan.query.layout.head_dim]);
    }

    /// Sets `rough.shares` to what the aggregates of the blocks of a stride are at most.
    fn bound(&self, stride: &Stride<'_>, rough: &mut Rough) {
        let tile = stride.tile;
        let range = stride.first..tile.blocks.len().min(stride.first + STRIDE);
        let Rough { shares, errors, .. } = rough;
        shares.clear();
        shares.resize(range.len(), f32::NEG_INFINITY);
        self.aggregate(|member| &self.values(tile, member)[range.clone()], shares);
        let slack = self.slack();
        if let Some(compressed) = tile.chunk.compressed() {
            errors.clear();
            errors.resize(range.len(), 0.0);
            let blocks = tile.blocks.start + range.start..tile.blocks.start + range.end;
            for &member in &self.members {
                let of_keys = compressed.errors(self.scan.piece(member.head), blocks.clone());
                widen_errors(errors, of_keys, self.norm(tile, member));
            }
            shares.iter_mut().zip(errors.iter()).for_each(|(share, error)| *share += error + slack);
        } else {
            shares.iter_mut().for_each(|share| *share += slack);
        }
    }

    /// A block of a stride with its aggregate.
    fn candidate(&self, stride: &Stride<'_>, block: usize, rough: &mut Rough) -> Candidate {
        let is_exact = stride.tile.chunk.compressed().is_none() && !self.sums;
        let score = match is_exact {
            true => rough.shares[block],
            false => self.exact(stride.tile, stride.first + block, &mut rough.keys),
        };
        Candidate { score, position: (stride.tile.start + stride.first + block) as u32 }
    }

    /// The aggregate of one block.
    fn exact(&self, tile: &Tile<'_>, block: usize, keys: &mut Vec<f32>) -> f32 {
        let share = |&member: &Member, keys: &mut Vec<f32>| {
            let score = match tile.chunk.compressed() {
                Some(compressed) => self.refined(tile, compressed, block, member, keys),
                None => self.values(tile, member)[block],
            };
            score - self.total(member)
        };
        let two = if self.sums { add_logs } else { larger };
        self.members.iter().fold(f32::NEG_INFINITY, |so_far, member| two(so_far, share(member, keys)))
    }

    /// The score of one block for one query row, with its keys as they are.
    fn refined(
        &self,
        tile: &Tile<'_>,
        compressed: &Compressed,
        block: usize,
        member: Member,
        scores: &mut Vec<f32>,
    ) -> f32 {
        let scan = self.scan;
        let query = scan.row(tile.set, member.head, member.row);
        let per_block = tile.chunk.keys_per_block();
        let keys = compressed.halves(scan.piece(member.head), tile.blocks.start + block);
        scores.clear();
        scores.extend(keys.chunks_exact(query.len()).map(|key| linalg::dot_f16(query, key)));
        let mut score = [0.0];
        reduce(scan.query.block_score, scores, per_block, &mut score);
        score[0]
    }

    /// Scores of one query row against one tile.
    fn values(&self, tile: &Tile<'_>, member: Member) -> &[f32] {
        let (scan, blocks) = (self.scan, tile.blocks.len());
        let start = (member.head * scan.eligible + tile.start) * scan.head_rows + member.row * blocks;
        &self.scores.values[start..][..blocks]
    }

    /// The largest of them, by stride.
    fn peaks(&self, tile: &Tile<'_>, member: Member) -> &[f32] {
        let (scan, strides) = (self.scan, tile.strides());
        let start = (member.head * scan.strides + tile.first_stride) * scan.head_rows + member.row * strides;
        &self.scores.peaks[start..][..strides]
    }

    /// The length of a query projected onto a tile's compressed keys.
    fn norm(&self, tile: &Tile<'_>, member: Member) -> f32 {
        let scan = self.scan;
        self.scores.norms[(member.head * scan.tiles.len() + tile.number) * scan.head_rows + member.row]
    }

    fn total(&self, member: Member) -> f32 {
        self.scores.totals[member.head * self.scan.head_rows + member.row]
    }

    /// How far the score of any block of a tile may be off.
    fn error(&self, tile: &Tile<'_>) -> f32 {
        let Some(compressed) = tile.chunk.compressed() else { return 0.0 };
        let largest = |member: Member| compressed.largest_error(self.scan.piece(member.head));
        self.members.iter().map(|&member| largest(member) * self.norm(tile, member)).fold(0.0, larger)
    }

    /// How far the arithmetic of an aggregate may be off.
    fn slack(&self) -> f32 {
        if self.sums { ADD_SHARES_ERROR * self.members.len() as f32 } else { 0.0 }
    }

    /// Adds up, or takes the largest of, what the members have minus their totals. `into` is -inf.
    fn aggregate<'s>(&self, of: impl Fn(Member) -> &'s [f32], into: &mut [f32]) {
        for &member in &self.members {
            match self.sums {
                true => add_shares(into, of(member), self.total(member)),
                false => raise(into, of(member), self.total(member)),
            }
        }
    }
}

/// Where the largest of some values is.
fn largest_of(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |top, i| if values[i] > values[top] { i } else { top })
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

simd! {
    /// `best[i] = max(best[i], scores[i] - total)`.
    fn raise(best: &mut [f32], scores: &[f32], total: f32) {
        for (best, score) in best.iter_mut().zip(scores) {
            *best = larger(*best, *score - total);
        }
    }
}

simd! {
    /// A bit for each of up to 64 values that is not below `least`.
    fn reaching(values: &[f32], least: f32) -> u64 {
        const { assert!(STRIDE == u64::BITS as usize) };
        values.iter().enumerate().fold(0, |bits, (i, number)| bits | (((*number < least) as u64 ^ 1) << i))
    }
}

simd! {
    /// `errors[i] = max(errors[i], of_keys[i] * norm)`.
    fn widen_errors(errors: &mut [f32], of_keys: &[f32], norm: f32) {
        for (error, of_key) in errors.iter_mut().zip(of_keys) {
            *error = larger(*error, *of_key * norm);
        }
    }
}
