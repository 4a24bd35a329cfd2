//! What the token keys of a model say about a sequence: the model's own pass over it, and the choice of each query.

use std::ops::Range;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::FIRST_BLOCK;
use crate::train::error::TrainError;
use crate::train::slices::values;
use landmarkdb::{AttentionError, BlockAttention, ModelShape, Retrieval, SequenceAttention, Window};
use landmarkdb_llm::{Llama, Logits, ModelConfig};
use linalg::{Matrix, Write};

/// Of a query and a block that it cannot choose.
const NEVER: f32 = -1e9;

/// The model as it answers, with the window that it reads a text with.
pub(super) struct Teacher {
    llama: Llama,
    shape: ModelShape,
    window: Window,
}

/// What is learned from one sequence.
pub(super) struct Lesson {
    /// n
    pub(super) blocks: usize,
    /// `(M)`: blocks that each query may choose, from [`FIRST_BLOCK`] to the one before its own.
    pub(super) eligible: Vec<Range<usize>>,
    /// `(M * G, n)`: 0 for a block that the query may choose, else far below anything. Rows of a query token are those of
    /// the heads of a group.
    pub(super) mask: Tensor,
    /// Of all layers.
    pub(super) text: Vec<BlockText>,
    /// Of all layers but the first.
    pub(super) layers: Vec<LayerLesson>,
}

/// What landmarks read in one layer: `(n, Hkv, B - 1, D)` each.
pub(super) struct BlockText {
    /// Rotated to their places in the block.
    pub(super) k: Tensor,
    pub(super) v: Tensor,
}

/// What they should be chosen by in one layer.
pub(super) struct LayerLesson {
    /// `(Hkv, M * G, D)`: queries, rotated to the distance at which they look blocks up, multiplied with the softmax scale.
    pub(super) q: Tensor,
    /// `(Hkv, M * G, n)`: how likely token keys choose each block, times the share that the query has in the loss.
    pub(super) p: Tensor,
    /// Mean of `sum p log p` by the same shares.
    pub(super) negative_entropy: f64,
}

/// Remembers what attention was called with.
pub(super) struct Recorder {
    attention: BlockAttention,
    /// q, k and v of each layer, before RoPE.
    pub(super) layers: Vec<[Vec<f32>; 3]>,
}

impl Recorder {
    pub(super) fn new(shape: &ModelShape, window: Window) -> Self {
        let attention = BlockAttention::window_only(shape, window);
        Recorder { attention, layers: vec![Default::default(); shape.layers as usize] }
    }
}

impl SequenceAttention for Recorder {
    fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Result<Vec<f32>, AttentionError> {
        for (record, values) in self.layers[layer].iter_mut().zip([q, k, v]) {
            record.extend_from_slice(values);
        }
        self.attention.attend(layer, tokens, q, k, v)
    }

    fn position(&self) -> usize {
        self.attention.position()
    }
}

impl Teacher {
    /// `config` is the model's with the landmark that it is to get.
    pub(super) fn new(llama: Llama, config: &ModelConfig, block_tokens: u32) -> Result<Self, TrainError> {
        Ok(Teacher { llama, shape: config.shape(block_tokens)?, window: config.window() })
    }

    /// For the tokens `ids (T)`, each block closed by a landmark, and some of their queries, which count by `weights (T)`.
    pub(super) fn lesson(&self, ids: &[u32], queries: &[usize], weights: &[f32]) -> Result<Lesson, TrainError> {
        let block_tokens = self.shape.block_tokens as usize;
        // No token attends to a landmark, and the model does not know the token.
        let is_landmark = |place: usize| (place + 1).is_multiple_of(block_tokens);
        let known = |(place, &id): (usize, &u32)| if is_landmark(place) { 0 } else { id };
        let ids: Vec<u32> = ids.iter().enumerate().map(known).collect();
        let mut recorder = Recorder::new(&self.shape, self.window);
        for chunk in ids.chunks(self.window.chunk_tokens) {
            self.llama.forward(chunk, &mut recorder, Logits::None)?;
        }

        let blocks = ids.len() / block_tokens;
        let group = self.shape.group();
        let total: f32 = queries.iter().map(|&token| weights[token]).sum();
        // The mean over queries, heads and layers.
        let heads = (self.shape.query_heads * (self.shape.layers - 1)) as f32;
        let rows = Rows {
            queries,
            eligible: queries.iter().map(|&token| FIRST_BLOCK..token / block_tokens).collect(),
            shares: queries.iter().map(|&token| weights[token] / (total * heads)).collect(),
        };
        let text = recorder.layers.par_iter().map(|[_, k, v]| self.text(blocks, k, v));
        let text = text.collect::<candle_core::Result<Vec<_>>>()?;
        let layers = recorder.layers.par_iter().zip(&text).skip(1).map(|([q, ..], text)| self.layer(q, text, &rows));
        let layers = layers.collect::<candle_core::Result<_>>()?;
        let mask = rows.eligible.iter().flat_map(|eligible| {
            let row = (0..blocks).map(move |block| if eligible.contains(&block) { 0.0 } else { NEVER });
            std::iter::repeat_n(row, group).flatten()
        });
        let mask = Tensor::from_iter(mask, &Device::Cpu)?.reshape((queries.len() * group, blocks))?;
        Ok(Lesson { blocks, eligible: rows.eligible, mask, text, layers })
    }

    /// Keys and values `(T, Hkv, D)` by block, without the landmarks'.
    fn text(&self, blocks: usize, k: &[f32], v: &[f32]) -> candle_core::Result<BlockText> {
        let (kv_heads, d) = (self.shape.kv_heads as usize, self.shape.head_dim as usize);
        let (block_tokens, row) = (self.shape.block_tokens as usize, kv_heads * d);
        let inner = block_tokens - 1;
        let by_block = |values: &[f32]| {
            let block = |index: usize| {
                let block = &values[index * block_tokens * row..][..inner * row];
                (0..kv_heads)
                    .flat_map(move |head| block.chunks_exact(row).flat_map(move |token| &token[head * d..][..d]))
            };
            (0..blocks).flat_map(block).copied().collect::<Vec<f32>>()
        };
        let mut k = by_block(k);
        let rotations: Vec<_> = (0..inner).map(|place| self.shape.rope.rotation(place as i64)).collect();
        k.chunks_exact_mut(d).enumerate().for_each(|(i, key)| rotations[i % inner].apply(key));
        let tensor = |values| Tensor::from_vec(values, (blocks, kv_heads, inner, d), &Device::Cpu);
        Ok(BlockText { k: tensor(k)?, v: tensor(by_block(v))? })
    }

    /// How the token keys of `text` are chosen by some of the queries `q (T, Hq, D)`.
    fn layer(&self, q: &[f32], text: &BlockText, rows: &Rows) -> candle_core::Result<LayerLesson> {
        let shape = &self.shape;
        let (blocks, kv_heads, inner, d) = text.k.dims4()?;
        let (group, k) = (shape.group(), values(&text.k)?);
        let reach = shape.rope.rotation(self.reach());
        let mut queries = Vec::with_capacity(rows.queries.len() * kv_heads * group * d);
        for head in 0..kv_heads {
            for &token in rows.queries {
                let heads = &q[(token * kv_heads + head) * group * d..][..group * d];
                queries.extend(heads.iter().map(|number| number * shape.softmax_scale));
            }
        }
        queries.chunks_exact_mut(d).for_each(|query| reach.apply(query));

        let count = rows.queries.len() * group;
        let mut p = vec![0.0; kv_heads * count * blocks];
        let mut negative_entropy = 0.0;
        let mut keys = vec![0.0; blocks * inner * d];
        let mut scores = vec![0.0; count * blocks * inner];
        for head in 0..kv_heads {
            for (block, keys) in keys.chunks_exact_mut(inner * d).enumerate() {
                keys.copy_from_slice(&k[(block * kv_heads + head) * inner * d..][..inner * d]);
            }
            let queries = Matrix::new(&queries[head * count * d..][..count * d], count, d);
            let keys = Matrix::new(&keys, blocks * inner, d).transposed();
            linalg::multiply(queries, keys, &mut scores, blocks * inner, Write::Replace);
            let p = p[head * count * blocks..][..count * blocks].chunks_exact_mut(blocks);
            for (row, (p, scores)) in p.zip(scores.chunks_exact(blocks * inner)).enumerate() {
                let (eligible, share) = (rows.eligible[row / group].clone(), rows.shares[row / group]);
                let (p, scores) = (&mut p[eligible.clone()], &scores[eligible.start * inner..]);
                for (p, scores) in p.iter_mut().zip(scores.chunks_exact(inner)) {
                    *p = linalg::log_sum_exp(scores);
                }
                let total = linalg::log_sum_exp(p);
                for p in p.iter_mut() {
                    let log = *p - total;
                    *p = log.exp();
                    negative_entropy += (share * *p * log) as f64;
                    *p *= share;
                }
            }
        }
        let tensor = |values, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu);
        Ok(LayerLesson {
            q: tensor(queries, &[kv_heads, count, d])?,
            p: tensor(p, &[kv_heads, count, blocks])?,
            negative_entropy,
        })
    }

    /// From the first token of a block in the slot of older blocks to a query in the middle of the block after the window:
    /// see the slots of [`AttendRequest`](landmarkdb::AttendRequest).
    fn reach(&self) -> i64 {
        let block_tokens = self.shape.block_tokens as usize;
        let slots = Retrieval::default().top_k as usize + 1;
        (slots * block_tokens + self.window.tokens + block_tokens / 2) as i64
    }
}

/// The queries of a lesson.
struct Rows<'a> {
    /// `(M)`: their tokens.
    queries: &'a [usize],
    /// See [`Lesson::eligible`].
    eligible: Vec<Range<usize>>,
    /// `(M)`: what each of its heads and layers counts in the mean.
    shares: Vec<f32>,
}
