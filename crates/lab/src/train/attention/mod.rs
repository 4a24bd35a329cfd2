//! Attention of one layer over whole sequences, forward and backward, as one operation.
//!
//! ```text
//! S = scale q k^T    W = softmax(S)  (plain causal, or grouped)    out = W v
//! dW = dout v^T      dS from W and dW row by row                   dv = W^T dout, dq = scale dS k, dk = scale dS^T q
//! ```
//!
//! `q (N, T, Hq, D)`, `k` and `v (N, P + T, Hkv, D)`, `q` and `k` rotated to their positions; the first `P` keys are a
//! past that every query sees. A task is one sequence and one KV head with its `G` query heads, whose rows `(T, G)` it
//! goes through in tiles: a tile of `R` rows needs the keys up to its last token only, so half of the square of scores
//! is never computed, and what is computed stays in the second-level cache. Nothing is kept for the backward pass but
//! `q`, `k` and `v`: it computes the scores again.
//!
//! Cost of a layer, for `A = N Hq T (P + T / 2)` scores: forward `4 D A` flops and `A` exponentials, backward `10 D A`
//! and `A`. Memory traffic is that of `q`, `k`, `v`, `out` and their gradients; scratch per thread is `R (P + T)`
//! values forward, twice that backward, and copies of one task's rows.

mod task;

#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use self::task::Task;
use super::grouped::GroupDropout;
use super::slices::{gradient, input, values, with_width};

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
        let (q, k, v) = (input(q, q_layout)?, input(k, k_layout)?, input(v, v_layout)?);
        let outs =
            sizes.for_each_task(|sequence, kv_head| Task::new(self, sizes, q, k, v, sequence, kv_head).forward());
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
        let (q_values, k_values, v_values) = (values(q)?, values(k)?, values(v)?);
        let out_gradient = values(out_gradient)?;
        let gradients = {
            let (q, k, v, g) = (&*q_values, &*k_values, &*v_values, &*out_gradient);
            sizes.for_each_task(|sequence, kv_head| {
                let g = sizes.take(g, sequence, kv_head, sizes.tokens, sizes.group);
                Task::new(self, sizes, q, k, v, sequence, kv_head).backward(&g)
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
}
