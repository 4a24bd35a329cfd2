//! Attention of one layer over whole sequences, forward and backward, as one operation.
//!
//! ```text
//! S = scale q k^T       W = softmax(S)  (plain causal, or grouped)       out = W v
//! dW = dout v^T         dS from W and dW row by row                      dv = W^T dout,  dq = scale dS k,  dk = scale dS^T q
//! ```
//!
//! `q (N, T, Hq, D)`, `k` and `v (N, P + T, Hkv, D)`, all turned to their positions; the first `P` keys are a past that every
//! query sees. A task is one sequence and one KV head with its `G` query heads, whose rows `(T, G)` it goes through in
//! tiles: a tile of `R` rows needs the keys up to its last token only, so half of the square of scores is never computed, and
//! what is computed stays in the second-level cache. Nothing is kept for the backward pass but `q`, `k` and `v`: it computes
//! the scores again.
//!
//! Cost of a layer, for `A = N Hq T (P + T / 2)` scores: forward `4 D A` flops and `A` exponentials, backward `10 D A` and
//! `A`. Memory traffic is that of `q`, `k`, `v`, `out` and their gradients; scratch per thread is `R (P + T)` numbers forward,
//! twice that backward, and copies of one task's rows.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::grouped::{self, GroupDropout};
use super::numbers::{argument, gradient, numbers, with_width};
use crate::numeric::{self, Matrix, Threads, Write};

/// R at most, unless one token alone has more query heads. Measured with 2 heads of 32 dimensions and 510 tokens.
const TILE_ROWS_MAX: usize = 64;

/// Attention of one layer.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    /// Hq
    pub(super) query_heads: usize,
    /// Hkv
    pub(super) kv_heads: usize,
    /// D
    pub(super) head_dim: usize,
    pub(super) softmax: Softmax,
}

/// How the scores of a row become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Softmax {
    /// One softmax over all keys up to the query's.
    Plain,
    /// That of landmark attention; there is no past.
    Grouped { block_tokens: usize, dropout: GroupDropout },
}

impl Attention {
    /// Attends: `q (N, T, Hq * D)`, `k, v (N, P + T, Hkv * D)` -> `(N, T, Hq * D)`. Heads lie side by side in a token's
    /// row, as the projections leave them.
    pub(super) fn apply(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3(k, v, self)
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(q_layout.shape(), k_layout.shape(), v_layout.shape())?;
        let (q, k, v) = (argument(q, q_layout)?, argument(k, k_layout)?, argument(v, v_layout)?);
        let outs = sizes.for_each_task(|sequence, kv_head| sizes.task(self, q, k, v, sequence, kv_head).forward());
        let out = sizes.join(outs, sizes.tokens);
        Ok((CpuStorage::F32(out), with_width(q_layout, self.query_heads * self.head_dim)))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        out_gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let sizes = self.sizes(q.shape(), k.shape(), v.shape())?;
        let (q_numbers, k_numbers, v_numbers) = (numbers(q)?, numbers(k)?, numbers(v)?);
        let out_gradient = numbers(out_gradient)?;
        let gradients = {
            let (q, k, v, g) = (&*q_numbers, &*k_numbers, &*v_numbers, &*out_gradient);
            sizes.for_each_task(|sequence, kv_head| {
                let g = sizes.take(g, sequence, kv_head, sizes.tokens, sizes.group);
                sizes.task(self, q, k, v, sequence, kv_head).backward(&g)
            })
        };
        let (mut of_q, mut of_k, mut of_v) = (Vec::new(), Vec::new(), Vec::new());
        for task in gradients {
            of_q.push(task.q);
            of_k.push(task.k);
            of_v.push(task.v);
        }
        let keys = sizes.past + sizes.tokens;
        Ok((
            Some(gradient(sizes.join(of_q, sizes.tokens), q)?),
            Some(gradient(sizes.join(of_k, keys), k)?),
            Some(gradient(sizes.join(of_v, keys), v)?),
        ))
    }
}

/// The letters of the head of this file.
#[derive(Clone, Copy)]
struct Sizes {
    sequences: usize,
    tokens: usize,
    past: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
}

impl Attention {
    fn sizes(&self, q: &Shape, k: &Shape, v: &Shape) -> Result<Sizes> {
        let ((sequences, tokens, query_width), (k_sequences, keys, kv_width)) = (q.dims3()?, k.dims3()?);
        let fits = query_width == self.query_heads * self.head_dim
            && kv_width == self.kv_heads * self.head_dim
            && k == v
            && k_sequences == sequences
            && keys >= tokens
            && (keys == tokens || self.softmax == Softmax::Plain);
        if !fits {
            bail!("q {q:?}, k {k:?} and v {v:?} do not fit {self:?}");
        }
        Ok(Sizes {
            sequences,
            tokens,
            past: keys - tokens,
            kv_heads: self.kv_heads,
            group: self.query_heads / self.kv_heads,
            head_dim: self.head_dim,
        })
    }
}

impl Sizes {
    /// What `compute` gives for every sequence and KV head, in that order.
    fn for_each_task<R: Send>(&self, compute: impl Fn(usize, usize) -> R + Sync) -> Vec<R> {
        let tasks = 0..self.sequences * self.kv_heads;
        tasks.into_par_iter().map(|task| compute(task / self.kv_heads, task % self.kv_heads)).collect()
    }

    /// The rows `(rows, heads * D)` of one sequence and KV head from `x (N, rows, Hkv * heads * D)`.
    fn take(&self, x: &[f32], sequence: usize, kv_head: usize, rows: usize, heads: usize) -> Vec<f32> {
        let width = heads * self.head_dim;
        let columns = self.kv_heads * width;
        let of_sequence = &x[sequence * rows * columns..][..rows * columns];
        let mut taken = Vec::with_capacity(rows * width);
        for row in of_sequence.chunks_exact(columns.max(1)) {
            taken.extend_from_slice(&row[kv_head * width..][..width]);
        }
        taken
    }

    /// Puts what every task computed, `(rows, width)` each, side by side: `(N, rows, Hkv * width)`.
    fn join(&self, parts: Vec<Vec<f32>>, rows: usize) -> Vec<f32> {
        let width = parts.first().map_or(0, Vec::len) / rows.max(1);
        let columns = self.kv_heads * width;
        let mut joined = vec![0.0; self.sequences * rows * columns];
        let sequences = joined.par_chunks_mut((rows * columns).max(1)).zip(parts.par_chunks(self.kv_heads));
        sequences.for_each(|(joined, parts)| {
            for (row, joined) in joined.chunks_exact_mut(columns).enumerate() {
                for (joined, part) in joined.chunks_exact_mut(width).zip(parts) {
                    joined.copy_from_slice(&part[row * width..][..width]);
                }
            }
        });
        joined
    }

    fn task(&self, attention: &Attention, q: &[f32], k: &[f32], v: &[f32], sequence: usize, kv_head: usize) -> Task {
        let keys = self.past + self.tokens;
        let scale = (self.head_dim as f32).sqrt().recip();
        let mut q = self.take(q, sequence, kv_head, self.tokens, self.group);
        q.iter_mut().for_each(|q| *q *= scale);
        let mut v = self.take(v, sequence, kv_head, keys, 1);
        if let Softmax::Grouped { block_tokens, .. } = attention.softmax {
            landmarks(&mut v, self.head_dim, block_tokens).for_each(|value| value.fill(0.0));
        }
        let k = self.take(k, sequence, kv_head, keys, 1);
        let first_head = sequence * attention.query_heads + kv_head * self.group;
        Task { sizes: *self, softmax: attention.softmax, first_head, scale, q, k, v }
    }
}

/// The rows of landmarks among `x (rows, D)`.
fn landmarks(x: &mut [f32], head_dim: usize, block_tokens: usize) -> impl Iterator<Item = &mut [f32]> {
    x.chunks_exact_mut(head_dim).skip(block_tokens - 1).step_by(block_tokens)
}

/// One sequence and one KV head with its query heads.
struct Task {
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
struct TaskGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Query rows `start..end` of a task, and the keys that its last row sees.
#[derive(Clone, Copy)]
struct Tile {
    start: usize,
    end: usize,
    columns: usize,
}

impl Task {
    fn tiles(&self) -> impl Iterator<Item = Tile> + use<> {
        let Sizes { tokens, past, group, .. } = self.sizes;
        let tile_tokens = (TILE_ROWS_MAX / group).max(1);
        (0..tokens).step_by(tile_tokens).map(move |first| {
            let last = (first + tile_tokens).min(tokens);
            Tile { start: first * group, end: last * group, columns: past + last }
        })
    }

    /// Numbers of the largest tile.
    fn tile_numbers(&self) -> usize {
        self.tiles().map(Tile::numbers).max().unwrap_or(0)
    }

    /// Rows `tile` of `x (T * G, D)`.
    fn rows<'a>(&self, x: &'a [f32], tile: Tile) -> Matrix<'a> {
        let width = self.sizes.head_dim;
        Matrix::new(&x[tile.start * width..tile.end * width], tile.end - tile.start, width)
    }

    /// The keys or values `x (P + T, D)` that a tile sees.
    fn seen<'a>(&self, x: &'a [f32], tile: Tile) -> Matrix<'a> {
        Matrix::new(&x[..tile.columns * self.sizes.head_dim], tile.columns, self.sizes.head_dim)
    }

    /// Weights `(R, columns)` of a tile.
    fn weigh(&self, tile: Tile, weights: &mut [f32]) {
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
    fn pull_back(&self, tile: Tile, weights: &[f32], gradient: &mut [f32]) {
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
    fn forward(&self) -> Vec<f32> {
        let width = self.sizes.head_dim;
        let mut out = vec![0.0; self.q.len()];
        let mut weights = vec![0.0; self.tile_numbers()];
        for tile in self.tiles() {
            let weights = &mut weights[..tile.numbers()];
            self.weigh(tile, weights);
            let weights = Matrix::new(weights, tile.end - tile.start, tile.columns);
            product(weights, self.seen(&self.v, tile), &mut out[tile.start * width..], width, Write::Replace);
        }
        out
    }

    /// From the gradient `(T, G, D)` of [`Task::forward`].
    fn backward(&self, out_gradient: &[f32]) -> TaskGradients {
        let width = self.sizes.head_dim;
        let mut of =
            TaskGradients { q: vec![0.0; self.q.len()], k: vec![0.0; self.k.len()], v: vec![0.0; self.v.len()] };
        let (mut weights, mut scores) = (vec![0.0; self.tile_numbers()], vec![0.0; self.tile_numbers()]);
        for tile in self.tiles() {
            let (weights, scores) = (&mut weights[..tile.numbers()], &mut scores[..tile.numbers()]);
            let matrix = |numbers| Matrix::new(numbers, tile.end - tile.start, tile.columns);
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

impl Tile {
    fn numbers(self) -> usize {
        (self.end - self.start) * self.columns
    }
}

fn product(a: Matrix, b: Matrix, out: &mut [f32], out_stride: usize, write: Write) {
    numeric::multiply(a, b, out, out_stride, write, Threads::One);
}

/// Softmax over the first `visible` scores of a row, in place; the others become 0.
fn weigh_plain(scores: &mut [f32], visible: usize) {
    let (seen, hidden) = scores.split_at_mut(visible);
    hidden.fill(0.0);
    let total = numeric::exp_sum(seen, numeric::max(seen));
    seen.iter_mut().for_each(|weight| *weight /= total);
}

/// The gradient of a row's scores from that of its weights, in place: `w (g - sum(w g))`. What is not seen has weight 0.
fn pull_back_plain(weights: &[f32], gradient: &mut [f32]) {
    let mean = numeric::dot(weights, gradient);
    gradient.iter_mut().zip(weights).for_each(|(gradient, weight)| *gradient = weight * (*gradient - mean));
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use rand::{RngExt, SeedableRng};

    struct Case {
        sequences: usize,
        tokens: usize,
        past: usize,
        attention: Attention,
    }

    fn random(dims: (usize, usize, usize), seed: u64) -> Var {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let count = dims.0 * dims.1 * dims.2;
        let numbers: Vec<f32> = (0..count).map(|_| rng.random_range(-1.5..1.5)).collect();
        Var::from_vec(numbers, dims, &Device::Cpu).unwrap()
    }

    /// Attention in plain loops and double precision, `sum(out * upstream)`.
    fn plain_value(case: &Case, q: &[f64], k: &[f64], v: &[f64], upstream: &[f32]) -> f64 {
        let Attention { query_heads, kv_heads, head_dim: d, softmax } = case.attention;
        let (tokens, keys) = (case.tokens, case.past + case.tokens);
        let mut value = 0.0;
        for row in 0..case.sequences * tokens * query_heads {
            let (head, token) = (row % query_heads, row / query_heads % tokens);
            let sequence = row / query_heads / tokens;
            let key = |s: usize| ((sequence * keys + s) * kv_heads + head / (query_heads / kv_heads)) * d;
            let score = |s: usize| (0..d).map(|i| q[row * d + i] * k[key(s) + i]).sum::<f64>() / (d as f64).sqrt();
            let scores: Vec<f64> = (0..keys).map(score).collect();
            let weights = match softmax {
                Softmax::Plain => {
                    let total: f64 = scores[..=case.past + token].iter().map(|s| s.exp()).sum();
                    (0..keys).map(|s| if s <= case.past + token { scores[s].exp() / total } else { 0.0 }).collect()
                }
                Softmax::Grouped { block_tokens, dropout } => {
                    let place = dropout.within(sequence * query_heads + head).within(token);
                    grouped_weights(&scores, token, block_tokens, place)
                }
            };
            for (s, weight) in weights.iter().enumerate() {
                value += (0..d).map(|i| weight * v[key(s) + i] * upstream[row * d + i] as f64).sum::<f64>();
            }
        }
        value
    }

    /// Weights of a row of scores in double precision.
    fn grouped_weights(scores: &[f64], token: usize, block_tokens: usize, dropout: GroupDropout) -> Vec<f64> {
        let visible = |s: usize| s <= token && (s % block_tokens != block_tokens - 1);
        let own = token / block_tokens;
        let landmark = |block: usize| scores[(block + 1) * block_tokens - 1].exp();
        let tokens_of = |block: usize| (block * block_tokens..(block + 1) * block_tokens).filter(|&s| visible(s));
        let own_sum: f64 = (own * block_tokens..=token).filter(|&s| visible(s)).map(|s| scores[s].exp()).sum();
        let total = own_sum + (0..own).map(landmark).sum::<f64>();
        let weight = |s: usize| {
            let block = s / block_tokens;
            if !visible(s) {
                0.0
            } else if block == own {
                scores[s].exp() / total
            } else {
                let inner: f64 = tokens_of(block).map(|s| scores[s].exp()).sum();
                dropout.factor(block) as f64 * landmark(block) / total * scores[s].exp() / inner
            }
        };
        (0..scores.len()).map(weight).collect()
    }

    fn check(case: Case) {
        let Attention { query_heads, kv_heads, head_dim, .. } = case.attention;
        let keys = case.past + case.tokens;
        let q = random((case.sequences, case.tokens, query_heads * head_dim), 1);
        let k = random((case.sequences, keys, kv_heads * head_dim), 2);
        let v = random((case.sequences, keys, kv_heads * head_dim), 3);
        let upstream = random((case.sequences, case.tokens, query_heads * head_dim), 4);
        let out = case.attention.clone().apply(q.as_tensor(), k.as_tensor(), v.as_tensor()).unwrap();
        let value = (out * upstream.as_tensor()).unwrap().sum_all().unwrap();
        let grads = value.backward().unwrap();

        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let upstream = flat(upstream.as_tensor());
        let wide = |x: &Var| flat(x.as_tensor()).into_iter().map(f64::from).collect::<Vec<f64>>();
        let inputs = [wide(&q), wide(&k), wide(&v)];
        let plain = |inputs: &[Vec<f64>; 3]| plain_value(&case, &inputs[0], &inputs[1], &inputs[2], &upstream);
        let got = value.to_scalar::<f32>().unwrap() as f64;
        let want = plain(&inputs);
        assert!((got - want).abs() < 1e-4 * want.abs().max(10.0), "{:?}: {got} {want}", case.attention);

        for (which, var) in [&q, &k, &v].into_iter().enumerate() {
            let found = flat(grads.get(var.as_tensor()).unwrap());
            // Some of many, at a step that reaches every dimension, head and token.
            let step = (found.len() / 40) | 1;
            for at in (0..found.len()).step_by(step).chain(found.len().saturating_sub(3)..found.len()) {
                let shifted = |by: f64| {
                    let mut inputs = inputs.clone();
                    inputs[which][at] += by;
                    plain(&inputs)
                };
                let want = (shifted(1e-4) - shifted(-1e-4)) / 2e-4;
                let got = found[at] as f64;
                let name = ["q", "k", "v"][which];
                assert!(
                    (got - want).abs() < 2e-5 * want.abs().max(1.0),
                    "{:?} {name} {at}: {got} {want}",
                    case.attention
                );
            }
        }
    }

    fn attention(query_heads: usize, kv_heads: usize, head_dim: usize, softmax: Softmax) -> Attention {
        Attention { query_heads, kv_heads, head_dim, softmax }
    }

    #[test]
    fn plain_attention_agrees_with_double_precision_at_tile_edges_and_with_a_past() {
        for (tokens, past) in [(1, 0), (5, 3), (31, 0), (32, 0), (33, 0), (2, 40)] {
            check(Case { sequences: 2, tokens, past, attention: attention(4, 2, 4, Softmax::Plain) });
        }
        check(Case { sequences: 1, tokens: 70, past: 0, attention: attention(1, 1, 3, Softmax::Plain) });
        check(Case { sequences: 1, tokens: 3, past: 0, attention: attention(70, 1, 2, Softmax::Plain) });
    }

    #[test]
    fn grouped_attention_agrees_with_double_precision_at_block_and_tile_edges() {
        for dropout in [GroupDropout::NONE, GroupDropout { rate: 0.3, seed: 3 }] {
            for tokens in [1, 6, 7, 8, 14, 31, 32, 33, 66] {
                let softmax = Softmax::Grouped { block_tokens: 7, dropout };
                check(Case { sequences: 2, tokens, past: 0, attention: attention(4, 2, 4, softmax) });
            }
        }
        let softmax = Softmax::Grouped { block_tokens: 17, dropout: GroupDropout::NONE };
        check(Case { sequences: 1, tokens: 51, past: 0, attention: attention(3, 3, 5, softmax) });
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (q, k, long) = (random((1, 4, 8), 1), random((1, 4, 4), 2), random((1, 6, 4), 3));
        let softmax = Softmax::Grouped { block_tokens: 4, dropout: GroupDropout::NONE };
        let apply = |attention: Attention, k: &Var| attention.apply(q.as_tensor(), k.as_tensor(), k.as_tensor());
        assert!(apply(attention(4, 2, 2, Softmax::Plain), &long).is_ok());
        assert!(apply(attention(4, 2, 2, softmax), &long).is_err(), "landmarks know no past");
        assert!(apply(attention(2, 2, 2, softmax), &k).is_err());
    }
}
