//! What landmarks make of their blocks, differentiable: the layers of the model again, for one token per block.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, Result, Tensor, Var};

use super::Choices;
use super::teacher::{BlockText, Lesson};
use crate::train::ops::{Rotations, linear, rms_norm, rotate, swiglu};
use crate::train::slices::values;
use crate::train::weights::Parameter;
use landmarkdb::Rope;
use landmarkdb_llm::{Adapter, LANDMARK_EMBEDDING, ModelConfig, update_names};

/// Frozen weights, and the adapter's parameters among them.
pub(super) struct Student {
    /// `(hidden)`
    embedding: Var,
    layers: Vec<Layer>,
    rope: Rope,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_tokens: u32,
    norm_epsilon: f32,
}

/// Shapes are those of `model::weights`.
struct Layer {
    attention_norm: Tensor,
    query: Projection,
    key: Projection,
    attention_output: Projection,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// `y = W x + scale B A x`
struct Projection {
    /// `W (out, in)`
    weight: Tensor,
    update: Option<Update>,
}

struct Update {
    /// `A (r, in)`
    down: Var,
    /// `B (out, r)`
    up: Var,
    scale: f64,
}

impl Projection {
    /// `x (.., in)` -> `(.., out)`
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = linear(x, &self.weight)?;
        match &self.update {
            None => Ok(y),
            Some(Update { down, up, scale }) => y + (linear(&linear(x, down)?, up)? * *scale)?,
        }
    }
}

impl Student {
    pub(super) fn new(
        config: &ModelConfig,
        tensors: HashMap<String, Tensor>,
        parameters: &[Parameter],
        adapter: &Adapter,
    ) -> Self {
        let find = |name: &str| parameters.iter().find(|p| p.name == name).map(|p| p.var.clone());
        let layer = |layer: u32| {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let tensor = |part: &str| tensors[&name(part)].clone();
            let projection = |part: &str| {
                let [down, up] = update_names(&name(part)).map(|name| find(&name));
                let update = down.zip(up).map(|(down, up)| Update { down, up, scale: adapter.scale() });
                Projection { weight: tensor(part), update }
            };
            Layer {
                attention_norm: tensor("input_layernorm"),
                query: projection("self_attn.q_proj"),
                key: projection("self_attn.k_proj"),
                attention_output: projection("self_attn.o_proj"),
                ffn_norm: tensor("post_attention_layernorm"),
                gate: tensor("mlp.gate_proj"),
                up: tensor("mlp.up_proj"),
                down: tensor("mlp.down_proj"),
            }
        };
        Student {
            embedding: find(LANDMARK_EMBEDDING).expect("an adapter has the tensors of `adapter_shapes`"),
            layers: (0..config.layers).map(layer).collect(),
            rope: config.rope.clone(),
            query_heads: config.query_heads as usize,
            kv_heads: config.kv_heads as usize,
            head_dim: config.head_dim as usize,
            block_tokens: adapter.block_tokens,
            norm_epsilon: config.norm_epsilon,
        }
    }

    /// The landmarks' keys in each layer but the first, `(Hkv, D, n)`, rotated to their places in the block.
    fn keys(&self, lesson: &Lesson) -> Result<Vec<Tensor>> {
        let rotations = Arc::new(Rotations::new(&self.rope, &vec![self.block_tokens - 1; lesson.blocks]));
        let mut x = self.embedding.as_tensor().broadcast_left((1, lesson.blocks))?.contiguous()?;
        let mut keys = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, self.norm_epsilon)?;
            if index > 0 {
                let k = rotate(&layer.key.apply(&normed)?, &rotations, self.head_dim)?;
                let k = k.reshape((lesson.blocks, self.kv_heads, self.head_dim))?;
                keys.push(k.permute((1, 2, 0))?.contiguous()?);
            }
            if index + 1 == self.layers.len() {
                break;
            }
            let q = rotate(&layer.query.apply(&normed)?, &rotations, self.head_dim)?;
            let attended = self.attend(&q, &lesson.text[index])?;
            x = (x + layer.attention_output.apply(&attended)?)?;
            let normed = rms_norm(&x, &layer.ffn_norm, self.norm_epsilon)?;
            let gated = swiglu(&linear(&normed, &layer.gate)?, &linear(&normed, &layer.up)?)?;
            x = (x + linear(&gated, &layer.down)?)?;
        }
        Ok(keys)
    }

    /// Attention of landmarks `q (1, n, Hq * D)` over the tokens of their blocks.
    fn attend(&self, q: &Tensor, text: &BlockText) -> Result<Tensor> {
        let (_, blocks, width) = q.dims3()?;
        let q = q.reshape((blocks, self.kv_heads, self.query_heads / self.kv_heads, self.head_dim))?;
        let scale = (self.head_dim as f64).sqrt().recip();
        let scores = (q.matmul(&text.k.t()?)? * scale)?;
        log_softmax(&scores)?.exp()?.matmul(&text.v)?.reshape((1, blocks, width))
    }

    /// Divergence of the landmarks' choice from the lesson's, in nats: a scalar.
    pub(super) fn loss(&self, lesson: &Lesson) -> Result<Tensor> {
        let mut total: Option<Tensor> = None;
        let mut negative_entropy = 0.0;
        for (keys, layer) in self.keys(lesson)?.iter().zip(&lesson.layers) {
            let scores = layer.q.matmul(keys)?.broadcast_add(&lesson.mask)?;
            let likelihood = (&layer.p * log_softmax(&scores)?)?.sum_all()?;
            negative_entropy += layer.negative_entropy;
            total = Some(match total {
                None => likelihood,
                Some(total) => (total + likelihood)?,
            });
        }
        let likelihood = total.expect("a base has more than one layer");
        (likelihood.neg()? + negative_entropy)?.reshape(())
    }

    /// What both choose, query by query and KV head by KV head as a lookup does: the likelihoods of a group's heads are
    /// added up.
    pub(super) fn choices(&self, lesson: &Lesson, top_k: usize) -> Result<Choices> {
        let mut choices = Choices::default();
        let group = self.query_heads / self.kv_heads;
        for (keys, layer) in self.keys(lesson)?.iter().zip(&lesson.layers) {
            let likely = log_softmax(&layer.q.matmul(keys)?.broadcast_add(&lesson.mask)?)?.exp()?;
            let (likely, p) = (values(&likely)?, values(&layer.p)?);
            let rows = group * lesson.blocks;
            let queries = likely.chunks_exact(rows).zip(p.chunks_exact(rows)).zip(lesson.eligible.iter().cycle());
            for ((likely, p), eligible) in queries.filter(|(_, eligible)| eligible.len() > top_k) {
                let best = |rows| best(rows, lesson.blocks, eligible.clone(), top_k);
                let (found, wanted) = (best(likely), best(p));
                let shared = wanted.iter().filter(|block| found.contains(block)).count();
                choices += Choices {
                    count: 1,
                    shared: shared as f64 / top_k as f64,
                    by_chance: top_k as f64 / eligible.len() as f64,
                };
            }
        }
        Ok(choices)
    }
}

/// `x (.., n)`, normalised over the last dimension.
fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let top = x.max_keepdim(D::Minus1)?.detach();
    let x = x.broadcast_sub(&top)?;
    let total = x.exp()?.sum_keepdim(D::Minus1)?.log()?;
    x.broadcast_sub(&total)
}

/// Of the eligible blocks those that are likeliest in the sum of the rows `(G, n)`.
fn best(rows: &[f32], blocks: usize, eligible: Range<usize>, top_k: usize) -> Vec<usize> {
    let likely: Vec<f32> = (0..blocks).map(|block| rows.iter().skip(block).step_by(blocks).sum()).collect();
    let mut order: Vec<usize> = eligible.collect();
    order.sort_by(|&a, &b| likely[b].total_cmp(&likely[a]));
    order.truncate(top_k);
    order
}
