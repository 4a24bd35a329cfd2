//! A test double: the attention that a model was trained with, at true positions, in plain loops. It defines what is right for
//! every kind of layer.

use super::architecture::LayerKind;
use super::config::ModelConfig;
use landmarkdb::{AttentionError, Rope, SequenceAttention};

pub(super) struct PlainAttention {
    query_heads: usize,
    kv_heads: usize,
    dim: usize,
    softmax_scale: f32,
    /// How far back each layer looks, and how it rotates.
    kinds: Vec<(usize, Rope)>,
    layers: Vec<Past>,
}

#[derive(Clone, Default)]
struct Past {
    /// `(tokens, Hkv, D)`, rotated by the token's position.
    k: Vec<f32>,
    /// `(tokens, Hkv, D)`
    v: Vec<f32>,
}

impl PlainAttention {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let longest = config.architecture.window_tokens_max.map_or(usize::MAX, |tokens| tokens as usize);
        let still = Rope { frequencies: Vec::new() };
        let kind = |layer: usize| match config.architecture.kind(layer) {
            LayerKind::Global => (longest, config.rope.clone()),
            LayerKind::Unrotated => (longest, still.clone()),
            LayerKind::Sliding { window_tokens, rope, .. } => (*window_tokens, rope.clone()),
        };
        PlainAttention {
            query_heads: config.query_heads as usize,
            kv_heads: config.kv_heads as usize,
            dim: config.head_dim as usize,
            softmax_scale: config.softmax_scale(),
            kinds: (0..config.layers as usize).map(kind).collect(),
            layers: vec![Past::default(); config.layers as usize],
        }
    }
}

impl SequenceAttention for PlainAttention {
    fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Result<Vec<f32>, AttentionError> {
        let (query_heads, kv_heads, dim) = (self.query_heads, self.kv_heads, self.dim);
        let (window_tokens, rope) = &self.kinds[layer];
        let past = &mut self.layers[layer];
        let before = past.k.len() / (kv_heads * dim);
        past.v.extend_from_slice(v);
        for (t, heads) in k.chunks(kv_heads * dim).enumerate() {
            for head in heads.chunks(dim) {
                let mut head = head.to_vec();
                rope.rotate(&mut head, (before + t) as i64);
                past.k.extend(head);
            }
        }
        let mut out = vec![0.0; q.len()];
        for (row, (q, out)) in q.chunks(dim).zip(out.chunks_mut(dim)).enumerate() {
            let (t, head) = (row / query_heads, row % query_heads);
            let kv_head = head / (query_heads / kv_heads);
            let at = |s: usize| (s * kv_heads + kv_head) * dim..(s * kv_heads + kv_head + 1) * dim;
            let mut q = q.to_vec();
            rope.rotate(&mut q, (before + t) as i64);
            let first = (before + t + 1).saturating_sub(*window_tokens);
            let scores = (first..=before + t).map(|s| {
                let product: f32 = q.iter().zip(&past.k[at(s)]).map(|(q, k)| q * k).sum();
                product * self.softmax_scale
            });
            let scores: Vec<f32> = scores.collect();
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = scores.iter().map(|score| (score - top).exp()).sum();
            for (s, score) in (first..).zip(&scores) {
                let weight = (score - top).exp() / sum;
                out.iter_mut().zip(&past.v[at(s)]).for_each(|(out, v)| *out += weight * v);
            }
        }
        assert_eq!(tokens * query_heads * dim, out.len());
        Ok(out)
    }

    fn position(&self) -> usize {
        let last = &self.layers[self.layers.len() - 1];
        last.k.len() / (self.kv_heads * self.dim)
    }
}
