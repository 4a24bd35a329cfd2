//! Attention of one sequence and one KV head, tile by tile.

use super::{Attention, Sizes, Softmax};
use crate::train::grouped;
use linalg::{Matrix, Write};

/// R at most, unless one token alone has more query heads: two tiles of it over 1,000 keys fill a second-level cache of
/// 1 MiB. At 510 tokens 64 is as fast, 32 takes 15 % longer, 256 half as long again.
const TILE_ROWS_MAX: usize = 128;

/// One sequence and one KV head with its query heads.
pub(super) struct Task {
    sizes: Sizes,
    softmax: Softmax,
    /// The first query head, counted over all sequences.
    first_head: usize,
    scale: f32,
    /// `(T, G, D)`, multiplied with the scale.
    q: Vec<f32>,
    /// `(P + T, D)`
    k: Vec<f32>,
    /// `(P + T, D)`; landmarks, whose values nobody reads, are zero where the softmax is grouped.
    v: Vec<f32>,
}

/// Gradients of one task, shaped like its `q`, `k` and `v`.
pub(super) struct TaskGradients {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

/// Query rows `start..end` of a task, and the keys that its last row sees.
#[derive(Clone, Copy)]
struct QueryTile {
    start: usize,
    end: usize,
    columns: usize,
}

impl Task {
    /// From the whole operation's `q`, `k` and `v`.
    pub(super) fn new(
        attention: &Attention,
        sizes: Sizes,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        sequence: usize,
        kv_head: usize,
    ) -> Task {
        let keys = sizes.past + sizes.tokens;
        let scale = (sizes.head_dim as f32).sqrt().recip();
        let mut q = sizes.take(q, sequence, kv_head, sizes.tokens, sizes.group);
        q.iter_mut().for_each(|q| *q *= scale);
        let k = sizes.take(k, sequence, kv_head, keys, 1);
        let mut v = sizes.take(v, sequence, kv_head, keys, 1);
        if let Softmax::Grouped { block_tokens, .. } = attention.softmax {
            landmarks(&mut v, sizes.head_dim, block_tokens).for_each(|value| value.fill(0.0));
        }
        let first_head = sequence * attention.query_heads + kv_head * sizes.group;
        Task { sizes, softmax: attention.softmax, first_head, scale, q, k, v }
    }

    fn tiles(&self) -> impl Iterator<Item = QueryTile> + use<> {
        let Sizes { tokens, past, group, .. } = self.sizes;
        let tile_tokens = (TILE_ROWS_MAX / group).max(1);
        (0..tokens).step_by(tile_tokens).map(move |first| {
            let last = (first + tile_tokens).min(tokens);
            QueryTile { start: first * group, end: last * group, columns: past + last }
        })
    }

    /// Elements of the largest tile.
    fn tile_len(&self) -> usize {
        self.tiles().map(QueryTile::len).max().unwrap_or(0)
    }

    /// Rows `tile` of `x (T * G, D)`.
    fn rows<'a>(&self, x: &'a [f32], tile: QueryTile) -> Matrix<'a> {
        let width = self.sizes.head_dim;
        Matrix::new(&x[tile.start * width..tile.end * width], tile.end - tile.start, width)
    }

    /// The keys or values `x (P + T, D)` that a tile sees.
    fn seen<'a>(&self, x: &'a [f32], tile: QueryTile) -> Matrix<'a> {
        Matrix::new(&x[..tile.columns * self.sizes.head_dim], tile.columns, self.sizes.head_dim)
    }

    /// Weights `(R, columns)` of a tile.
    fn weigh(&self, tile: QueryTile, weights: &mut [f32]) {
        product(self.rows(&self.q, tile), self.seen(&self.k, tile).transposed(), weights, tile.columns, Write::Replace);
        for (row, weights) in weights.chunks_exact_mut(tile.columns).enumerate() {
            let (token, head) = self.place(tile.start + row);
            match self.softmax {
                Softmax::Plain => weigh_plain(weights, self.sizes.past + token + 1),
                Softmax::Grouped { block_tokens, dropout } => {
                    grouped::weigh(weights, token, block_tokens, dropout.within(head).within(token));
                }
            }
        }
    }

    /// Turns the gradient of a tile's weights into that of its scores.
    fn pull_back(&self, tile: QueryTile, weights: &[f32], gradient: &mut [f32]) {
        let rows = weights.chunks_exact(tile.columns).zip(gradient.chunks_exact_mut(tile.columns));
        for (row, (weights, gradient)) in rows.enumerate() {
            match self.softmax {
                Softmax::Plain => pull_back_plain(weights, gradient),
                Softmax::Grouped { block_tokens, .. } => {
                    grouped::pull_back(weights, gradient, self.place(tile.start + row).0, block_tokens);
                }
            }
        }
    }

    /// Token and query head (counted over all sequences) of a row.
    fn place(&self, row: usize) -> (usize, usize) {
        (row / self.sizes.group, self.first_head + row % self.sizes.group)
    }

    /// `(T, G, D)`
    pub(super) fn forward(&self) -> Vec<f32> {
        let width = self.sizes.head_dim;
        let mut out = vec![0.0; self.q.len()];
        let mut weights = vec![0.0; self.tile_len()];
        for tile in self.tiles() {
            let weights = &mut weights[..tile.len()];
            self.weigh(tile, weights);
            let weights = Matrix::new(weights, tile.end - tile.start, tile.columns);
            product(weights, self.seen(&self.v, tile), &mut out[tile.start * width..], width, Write::Replace);
        }
        out
    }

    /// From the gradient `(T, G, D)` of [`Task::forward`].
    pub(super) fn backward(&self, out_gradient: &[f32]) -> TaskGradients {
        let width = self.sizes.head_dim;
        let mut of =
            TaskGradients { q: vec![0.0; self.q.len()], k: vec![0.0; self.k.len()], v: vec![0.0; self.v.len()] };
        let (mut weights, mut scores) = (vec![0.0; self.tile_len()], vec![0.0; self.tile_len()]);
        for tile in self.tiles() {
            let (weights, scores) = (&mut weights[..tile.len()], &mut scores[..tile.len()]);
            let matrix = |values| Matrix::new(values, tile.end - tile.start, tile.columns);
            let out_gradient = self.rows(out_gradient, tile);
            self.weigh(tile, weights);
            product(matrix(&*weights).transposed(), out_gradient, &mut of.v, width, Write::Add);
            product(out_gradient, self.seen(&self.v, tile).transposed(), scores, tile.columns, Write::Replace);
            self.pull_back(tile, weights, scores);
            let scores = matrix(&*scores);
            product(scores, self.seen(&self.k, tile), &mut of.q[tile.start * width..], width, Write::Replace);
            product(scores.transposed(), self.rows(&self.q, tile), &mut of.k, width, Write::Add);
        }
        of.q.iter_mut().for_each(|gradient| *gradient *= self.scale);
        if let Softmax::Grouped { block_tokens, .. } = self.softmax {
            landmarks(&mut of.v, width, block_tokens).for_each(|gradient| gradient.fill(0.0));
        }
        of
    }
}

impl QueryTile {
    fn len(self) -> usize {
        (self.end - self.start) * self.columns
    }
}

/// The rows of landmarks among `x (rows, D)`.
fn landmarks(x: &mut [f32], head_dim: usize, block_tokens: usize) -> impl Iterator<Item = &mut [f32]> {
    x.chunks_exact_mut(head_dim).skip(block_tokens - 1).step_by(block_tokens)
}

fn product(a: Matrix, b: Matrix, out: &mut [f32], out_stride: usize, write: Write) {
    linalg::multiply(a, b, out, out_stride, write);
}

/// Softmax over the first `visible` scores of a row, in place; the others become 0.
fn weigh_plain(scores: &mut [f32], visible: usize) {
    let (seen, hidden) = scores.split_at_mut(visible);
    hidden.fill(0.0);
    let total = linalg::exp_sum(seen, linalg::max(seen));
    seen.iter_mut().for_each(|weight| *weight /= total);
}

/// The gradient of a row's scores from that of its weights, in place: `w (g - sum(w g))`. What is not seen has weight
/// 0.
fn pull_back_plain(weights: &[f32], gradient: &mut [f32]) {
    let mean = linalg::dot(weights, gradient);
    gradient.iter_mut().zip(weights).for_each(|(gradient, weight)| *gradient = weight * (*gradient - mean));
}
