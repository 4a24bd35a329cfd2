//! What do the retrieved blocks say? Attention over them, next to the data.
//!
//! Every piece (one layer and KV head of one block) is read once per request and scored by all query rows that chose its
//! block. The softmax runs along: each row keeps its largest score, its sum and its weighted values so far.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::error::{not_finite, query_place};
use super::local::LocalMemory;
use super::lookup::Prepared;
use super::plan::{AttendPlan, Need, Plan, Then, check_attend};
use super::work;
use crate::api::{AttendRequest, Attended, LookupRequest, Result, check_together};
use crate::cuda::PartialAttention;
use crate::index::Found;
use crate::store::Store;
use crate::store::piece::{PieceData, PieceLayout, PieceView};
use crate::types::{BlockId, Normalisation};
use crate::until::Until;
use linalg::{Element, GEMV_ROWS_MAX, Matrix, Write};

/// (row, block) pairs that a task should have at least; below, one task per KV head.
const SHARD_USES_MIN: usize = 512;

/// Tasks per KV head at most: each keeps sums for all rows of the head.
const SHARDS_MAX: usize = 4;

/// Pieces that the disk is asked for at once: tens of megabytes, which wait in memory until they are used.
const EXPECTED_PIECES_MAX: usize = 1024;

/// Bytes of scores up to which requests are worked on side by side, one per thread: a decode step over a million tokens in
/// blocks of 64 needs 2 MiB. A larger one fills all threads by itself, and many at once would fill memory.
const SIDE_BY_SIDE_BYTES_MAX: u64 = 4 << 20;

/// One query row's use of one block. Rows of a KV head are `t * G + g`.
#[derive(Clone, Copy)]
struct Use {
    position: u32,
    row: u32,
    /// Tokens from the block's first token to the query.
    reach: i64,
}

/// Attention of all rows of one KV head over some blocks, not yet divided by its sum.
struct ShardSums {
    /// `(T * G, D)`
    out: Vec<f32>,
    /// `(T * G)`
    tops: Vec<f32>,
    /// `(T * G)`: sum of `e^(score - top)`.
    sums: Vec<f32>,
}

/// One piece that was read: a few rows read it as stored (gemv), for more it is widened first.
struct Stored<'a> {
    layout: PieceLayout,
    bytes: &'a [u8],
    view: PieceView<'a>,
}

/// What the tasks of one request share.
struct CpuAttention<'a> {
    store: &'a Store,
    plan: &'a AttendPlan<'a>,
    /// Set once a piece had to come from the disk: the others were asked for then.
    is_cold: AtomicBool,
}

impl LocalMemory {
    /// The plan of a request's lookup, if all of it is as it should be.
    fn attend_plan<'a>(&self, request: &'a AttendRequest, until: &'a Until) -> Result<Plan<'a>> {
        let plan = self.plan(&request.lookup, until)?;
        check_attend(request).map(|()| plan)
    }

    pub(super) fn attend_blocks(&self, request: &AttendRequest, until: &Until) -> Result<Attended> {
        let plan = self.attend_plan(request, until)?;
        let Need { working, answer } = plan.need(Then::Attend(request.placement));
        let _taken = work::take(&self.work, working + answer, until)?;
        let prepared = self.prepare(plan)?;
        work::run(&[&request.lookup], || self.attend_prepared(&prepared, request))
    }

    pub(super) fn attend_many(&self, requests: &[AttendRequest], until: &Until) -> Result<Vec<Result<Attended>>> {
        check_together(requests.len())?;
        let plans: Vec<Result<Plan>> = requests.iter().map(|request| self.attend_plan(request, until)).collect();
        let need = |(plan, request): (&Result<Plan>, &AttendRequest)| {
            plan.as_ref().ok().map(|plan| plan.need(Then::Attend(request.placement)))
        };
        let needs: Vec<Need> = plans.iter().zip(requests).filter_map(need).collect();
        let at_once = rayon::current_num_threads().min(needs.len()) as u64;
        let working = needs.iter().map(|need| need.working).max().unwrap_or(0).saturating_mul(at_once);
        let needed = needs.iter().fold(working, |sum, need| sum.saturating_add(need.answer));
        let _taken = work::take(&self.work, needed, until)?;
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut plans = plans.into_iter().peekable();
        let mut left = None;
        while left.is_some() || plans.peek().is_some() {
            let (wave, not_held) = self.wave(left.take(), &mut plans);
            left = not_held;
            let requests = &requests[outcomes.len()..][..wave.len()];
            let lookups: Vec<&LookupRequest> = requests.iter().map(|request| &request.lookup).collect();
            outcomes.extend(work::run(&lookups, || self.attend_wave(requests, &wave)));
        }
        Ok(outcomes)
    }

    /// As many requests, in order, as there is room for the keys of; the first that there is none for beside them comes back. Alone
    /// it reads its keys in passing.
    fn wave<'a>(
        &self,
        first: Option<Plan<'a>>,
        plans: &mut impl Iterator<Item = Result<Plan<'a>>>,
    ) -> (Vec<Result<Prepared<'a>>>, Option<Plan<'a>>) {
        let mut wave: Vec<Result<Prepared<'a>>> = Vec::new();
        for plan in first.map(Ok).into_iter().chain(plans) {
            let prepared = match plan.and_then(|plan| self.prepare_held(plan)) {
                Ok(Ok(prepared)) => Ok(prepared),
                Ok(Err(plan)) if wave.iter().any(Result::is_ok) => return (wave, Some(plan)),
                Ok(Err(plan)) => {
                    wave.push(self.prepare_passing(plan));
                    return (wave, None);
                }
                Err(error) => Err(error),
            };
            wave.push(prepared);
        }
        (wave, None)
    }

    fn attend_wave(&self, requests: &[AttendRequest], prepared: &[Result<Prepared>]) -> Vec<Result<Attended>> {
        let attend = |(prepared, request): (&Result<Prepared>, &AttendRequest)| match prepared {
            Ok(prepared) => self.attend_prepared(prepared, request),
            Err(error) => Err(error.clone()),
        };
        let is_small = |prepared: &Prepared| prepared.plan.score_bytes() <= SIDE_BY_SIDE_BYTES_MAX;
        if prepared.iter().flatten().all(is_small) {
            prepared.par_iter().zip(requests).map(attend).collect()
        } else {
            prepared.iter().zip(requests).map(attend).collect()
        }
    }

    fn attend_prepared(&self, prepared: &Prepared, request: &AttendRequest) -> Result<Attended> {
        let gpu = self.gpu_of(&prepared.plan.collection);
        let of_slots = prepared.plan.rotations();
        let found = prepared.search(&of_slots, gpu)?;
        let plan = AttendPlan::new(&prepared.plan, request, of_slots, &found);
        // The kernels read all tokens of a block.
        let attends = gpu.filter(|_| !plan.may_leave_out_first());
        let of_gpu = attends.map(|gpu| gpu.attend(&self.store, &plan, &found)).transpose()?.flatten();
        let attention = CpuAttention { store: &self.store, plan: &plan, is_cold: AtomicBool::new(false) };
        let PartialAttention { out, lse } = of_gpu.map_or_else(|| attention.all(&found), Ok)?;
        if let Some(at) = out.iter().position(|number| !number.is_finite()) {
            let heads = prepared.plan.collection.spec.shape.query_heads as usize;
            return Err(not_finite(out[at], query_place(at / plan.dim, heads)));
        }
        self.counters.attends.add(1);
        Ok(Attended { out, lse, hits: prepared.plan.hits(found) })
    }
}

/// Cuts the uses of one KV head into tasks, never inside a block.
fn shards(uses: &[Use]) -> Vec<&[Use]> {
    let size = uses.len().div_ceil(SHARDS_MAX).max(SHARD_USES_MIN);
    let mut shards = Vec::new();
    let mut rest = uses;
    while !rest.is_empty() {
        let mut end = size.min(rest.len());
        while end < rest.len() && rest[end].position == rest[end - 1].position {
            end += 1;
        }
        let (shard, after) = rest.split_at(end);
        shards.push(shard);
        rest = after;
    }
    shards
}

impl CpuAttention<'_> {
    /// Attention of all rows over the blocks that were found for them.
    fn all(&self, found: &Found) -> Result<PartialAttention> {
        let kv_heads = self.plan.lookup.collection.layout.kv_heads;
        let heads: Vec<Vec<Use>> = (0..kv_heads).map(|head| self.uses(head, found)).collect();
        let shards: Vec<(usize, &[Use])> = heads
            .iter()
            .enumerate()
            .flat_map(|(head, uses)| shards(uses).into_iter().map(move |shard| (head, shard)))
            .collect();
        let partials = shards
            .par_iter()
            .map(|&(head, uses)| Ok((head, self.shard(head, uses, &heads)?)))
            .collect::<Result<Vec<(usize, ShardSums)>>>()?;
        let (out, lse) = self.gather(partials);
        Ok(PartialAttention { out, lse })
    }

    fn rows(&self) -> usize {
        self.plan.lookup.request.distances.len() * self.plan.group
    }

    /// Which rows of one KV head read which blocks, by block.
    fn uses(&self, head: usize, found: &Found) -> Vec<Use> {
        let request = self.plan.lookup.request;
        let kv_heads = self.plan.lookup.collection.layout.kv_heads;
        let mut uses = Vec::with_capacity(self.rows() * found.k);
        for row in 0..self.rows() {
            let (token, query_head) = (row / self.plan.group, head * self.plan.group + row % self.plan.group);
            let chosen = found.row(request.granularity.row(token, query_head, kv_heads * self.plan.group, kv_heads));
            let reaches = self.plan.reaches(request.distances[token], chosen);
            let of_row = chosen.iter().zip(reaches);
            uses.extend(of_row.map(|(&position, reach)| Use { position, row: row as u32, reach }));
        }
        uses.sort_by_key(|block_use| block_use.position);
        uses
    }

    /// Reads one piece of a KV head. The first that is not in the page cache makes the disk read those of all `heads`, side
    /// by side; as long as all are, nothing is lost by it.
    fn read(&self, head: usize, block: BlockId, heads: &[Vec<Use>], into: &mut Vec<u8>) -> Result<()> {
        let store = self.store;
        if !self.is_cold.load(Ordering::Relaxed) {
            if store.read_piece_at_hand(block, self.piece(head), into)? {
                return Ok(());
            }
            if !self.is_cold.swap(true, Ordering::Relaxed) {
                let pieces = heads.iter().enumerate().flat_map(|(head, uses)| {
                    let positions = uses.chunk_by(|a, b| a.position == b.position).map(|uses| uses[0].position);
                    positions.map(move |position| (position, self.piece(head)))
                });
                for (position, piece) in pieces.take(EXPECTED_PIECES_MAX) {
                    store.expect_piece(self.plan.lookup.block(position as usize), piece);
                }
            }
        }
        Ok(store.read_piece(block, self.piece(head), into)?)
    }

    /// The piece of a KV head in its block.
    fn piece(&self, head: usize) -> usize {
        self.plan.lookup.request.layer as usize * self.plan.lookup.collection.layout.kv_heads + head
    }

    /// Attention of one KV head's rows over some blocks; `heads` are the uses of all.
    fn shard(&self, head: usize, uses: &[Use], heads: &[Vec<Use>]) -> Result<ShardSums> {
        let spec = &self.plan.lookup.collection.spec;
        let dim = self.plan.dim;
        let mut partial = ShardSums::nothing(self.rows(), dim);
        let (mut bytes, mut wide) = (Vec::new(), Vec::new());
        let (mut queries, mut scores, mut mixed) = (Vec::new(), Vec::new(), Vec::new());
        for uses in uses.chunk_by(|a, b| a.position == b.position) {
            self.plan.lookup.until.check()?;
            let (block, tokens) = self.plan.lookup.block_and_tokens(uses[0].position as usize);
            self.read(head, block, heads, &mut bytes)?;
            let layout = PieceLayout { dtype: spec.payload_dtype, tokens, head_dim: dim };
            layout.check(block, &bytes)?;
            let normalisation = self.plan.normalisation_of(tokens);
            let stored = Stored { layout, bytes: &bytes, view: layout.view(&bytes) };

            queries.clear();
            uses.iter().for_each(|block_use| self.push_query(head, block_use, &mut queries));
            scores.resize(uses.len() * tokens, 0.0);
            stored.score(&mut queries, &mut scores, &mut wide);
            if self.plan.leaves_out_first(block, tokens) {
                scores.chunks_exact_mut(tokens).for_each(|scores| scores[0] = f32::NEG_INFINITY);
            }
            for (block_use, scores) in uses.iter().zip(scores.chunks_exact_mut(tokens)) {
                partial.weigh(block_use.row as usize, normalisation, scores);
            }
            mixed.resize(uses.len() * dim, 0.0);
            stored.mix(&mut scores, &mut mixed, &mut wide);
            for (block_use, mixed) in uses.iter().zip(mixed.chunks_exact(dim)) {
                linalg::add_scaled(partial.row(block_use.row as usize, dim), 1.0, mixed);
            }
        }
        Ok(partial)
    }

    /// Appends one row's query, rotated for its block's place and times the softmax scale.
    fn push_query(&self, head: usize, block_use: &Use, queries: &mut Vec<f32>) {
        let (request, shape) = (self.plan.lookup.request, &self.plan.lookup.collection.spec.shape);
        let row = block_use.row as usize;
        let (token, query_head) = (row / self.plan.group, head * self.plan.group + row % self.plan.group);
        let from = (token * shape.query_heads as usize + query_head) * self.plan.dim;
        let start = queries.len();
        queries.extend(request.queries[from..][..self.plan.dim].iter().map(|number| number * shape.softmax_scale));
        self.plan.rotations.apply(block_use.reach, &mut queries[start..], self.plan.dim);
    }

    /// `(out (T, Hq, D), lse (T, Hq))` from the parts of all KV heads.
    fn gather(&self, partials: Vec<(usize, ShardSums)>) -> (Vec<f32>, Vec<f32>) {
        let kv_heads = self.plan.lookup.collection.layout.kv_heads;
        let mut heads: Vec<Option<ShardSums>> = (0..kv_heads).map(|_| None).collect();
        for (head, partial) in partials {
            match &mut heads[head] {
                Some(sum) => sum.add(&partial, self.plan.dim),
                empty => *empty = Some(partial),
            }
        }
        let query_rows = self.rows() * kv_heads;
        let (mut out, mut lse) = (vec![0.0; query_rows * self.plan.dim], vec![f32::NEG_INFINITY; query_rows]);
        for (head, partial) in heads.into_iter().enumerate() {
            let Some(partial) = partial else { continue };
            for (row, values) in partial.out.chunks_exact(self.plan.dim).enumerate() {
                let (token, g) = (row / self.plan.group, row % self.plan.group);
                let to = (token * kv_heads + head) * self.plan.group + g;
                let share = 1.0 / partial.sums[row];
                linalg::add_scaled(&mut out[to * self.plan.dim..][..self.plan.dim], share, values);
                lse[to] = partial.tops[row] + partial.sums[row].ln();
            }
        }
        (out, lse)
    }
}

/// Each row times `scales`, if there are any.
fn times(rows: &mut [f32], scales: &[f32]) {
    if !scales.is_empty() {
        for row in rows.chunks_exact_mut(scales.len()) {
            row.iter_mut().zip(scales).for_each(|(number, scale)| *number *= scale);
        }
    }
}

/// `out` = rows of `a` times stored data of `shape`, or times their transpose.
fn multiply_stored(a: &[f32], data: &PieceData, shape: (usize, usize), transposed: bool, out: &mut [f32]) {
    fn multiply<N: Element>(a: &[f32], data: &[N], (rows, columns): (usize, usize), transposed: bool, out: &mut [f32]) {
        let b = Matrix::new(data, rows, columns);
        let (b, from, to) = if transposed { (b.transposed(), columns, rows) } else { (b, rows, columns) };
        linalg::gemv(Matrix::new(a, a.len() / from, from), b, out, to, Write::Replace);
    }
    match data {
        PieceData::F32(data) => multiply(a, data, shape, transposed, out),
        PieceData::F16(data) => multiply(a, data, shape, transposed, out),
        PieceData::BF16(data) => multiply(a, data, shape, transposed, out),
        PieceData::Int8(data) => multiply(a, data, shape, transposed, out),
    }
}

impl Stored<'_> {
    /// Scores `(rows, T)` of queries `(rows, D)`, which may be changed.
    fn score(&self, queries: &mut [f32], scores: &mut [f32], wide: &mut Vec<f32>) {
        let PieceLayout { tokens, head_dim, .. } = self.layout;
        let rows = queries.len() / head_dim;
        if rows <= GEMV_ROWS_MAX {
            times(queries, &self.view.k_scales);
            multiply_stored(queries, &self.view.k, (tokens, head_dim), true, scores);
        } else {
            wide.resize(tokens * head_dim, 0.0);
            self.layout.decode_k(self.bytes, wide);
            let keys = Matrix::new(wide, tokens, head_dim).transposed();
            linalg::multiply(Matrix::new(queries, rows, head_dim), keys, scores, tokens, Write::Replace);
        }
    }

    /// Values `(rows, D)` by weights `(rows, T)`, which may be changed.
    fn mix(&self, weights: &mut [f32], mixed: &mut [f32], wide: &mut Vec<f32>) {
        let PieceLayout { tokens, head_dim, .. } = self.layout;
        let rows = weights.len() / tokens;
        if rows <= GEMV_ROWS_MAX {
            times(weights, &self.view.v_scales);
            multiply_stored(weights, &self.view.v, (tokens, head_dim), false, mixed);
        } else {
            wide.resize(tokens * head_dim, 0.0);
            self.layout.decode_v(self.bytes, wide);
            let values = Matrix::new(wide, tokens, head_dim);
            linalg::multiply(Matrix::new(weights, rows, tokens), values, mixed, head_dim, Write::Replace);
        }
    }
}

impl ShardSums {
    fn nothing(rows: usize, dim: usize) -> Self {
        ShardSums { out: vec![0.0; rows * dim], tops: vec![f32::NEG_INFINITY; rows], sums: vec![0.0; rows] }
    }

    /// `(D)`
    fn row(&mut self, row: usize, dim: usize) -> &mut [f32] {
        &mut self.out[row * dim..][..dim]
    }

    /// Turns one row's scores `(T)` for a block into the weights of the block's values, and counts the block into the
    /// row's sum. What the row gathered so far shrinks if this block scores higher than all before.
    fn weigh(&mut self, row: usize, normalisation: Normalisation, scores: &mut [f32]) {
        match normalisation {
            Normalisation::Plain => {
                self.raise_top(row, linalg::max(scores));
                self.sums[row] += linalg::exp_sum(scores, self.tops[row]);
            }
            Normalisation::Grouped => {
                let Some((landmark, inner)) = scores.split_last_mut() else { return };
                self.raise_top(row, *landmark);
                let weight = (*landmark - self.tops[row]).exp();
                self.sums[row] += weight;
                let factor = weight / linalg::exp_sum(inner, linalg::max(inner));
                inner.iter_mut().for_each(|number| *number *= factor);
                *landmark = 0.0;
            }
            Normalisation::Hidden => {
                let Some((landmark, tokens)) = scores.split_last_mut() else { return };
                *landmark = 0.0;
                self.raise_top(row, linalg::max(tokens));
                self.sums[row] += linalg::exp_sum(tokens, self.tops[row]);
            }
        }
    }

    fn raise_top(&mut self, row: usize, top: f32) {
        let old = self.tops[row];
        if top > old {
            let dim = self.out.len() / self.tops.len();
            let factor = (old - top).exp();
            self.tops[row] = top;
            self.sums[row] *= factor;
            self.row(row, dim).iter_mut().for_each(|number| *number *= factor);
        }
    }

    /// Adds the same rows' attention over other blocks.
    fn add(&mut self, other: &ShardSums, dim: usize) {
        for (row, values) in other.out.chunks_exact(dim).enumerate() {
            if other.tops[row] == f32::NEG_INFINITY {
                continue;
            }
            self.raise_top(row, other.tops[row]);
            let factor = (other.tops[row] - self.tops[row]).exp();
            self.sums[row] += factor * other.sums[row];
            linalg::add_scaled(self.row(row, dim), factor, values);
        }
    }
}
