//! A test double: full causal attention at true positions, in plain loops.

use landmarkdb::{AttentionError, ModelShape, SequenceAttention};

pub(super) struct PlainAttention {
    shape: ModelShape,
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
    pub(super) fn new(shape: ModelShape) -> Self {
        let layers = vec![Past::default(); shape.layers as usize];
        PlainAttention { shape, layers }
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
        let shape = &self.shape;
        let (query_heads, kv_heads, dim) =
            (shape.query_heads as usize, shape.kv_heads as usize, shape.head_dim as usize);
        let past = &mut self.layers[layer];
        let before = past.k.len() / (kv_heads * dim);
        past.v.extend_from_slice(v);
        for (t, heads) in k.chunks(kv_heads * dim).enumerate() {
            for head in heads.chunks(dim) {
                let mut head = head.to_vec();
                shape.rope.rotate(&mut head, (before + t) as i64);
                past.k.extend(head);
            }
        }
        let mut out = vec![0.0; q.len()];
        for (row, (q, out)) in q.chunks(dim).zip(out.chunks_mut(dim)).enumerate() {
            let (t, head) = (row / query_heads, row % query_heads);
            let kv_head = head / shape.group();
            let at = |s: usize| (s * kv_heads + kv_head) * dim..(s * kv_heads + kv_head + 1) * dim;
            let mut q = q.to_vec();
            shape.rope.rotate(&mut q, (before + t) as i64);
            let scores = (0..=before + t).map(|s| {
                let product: f32 = q.iter().zip(&past.k[at(s)]).map(|(q, k)| q * k).sum();
                product * shape.softmax_scale
            });
            let scores: Vec<f32> = scores.collect();
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = scores.iter().map(|score| (score - top).exp()).sum();
            for (s, score) in scores.iter().enumerate() {
                let weight = (score - top).exp() / sum;
                out.iter_mut().zip(&past.v[at(s)]).for_each(|(out, v)| *out += weight * v);
            }
        }
        assert_eq!(tokens * query_heads * dim, out.len());
        Ok(out)
    }

    fn position(&self) -> usize {
        let last = &self.layers[self.layers.len() - 1];
        last.k.len() / (self.shape.kv_heads * self.shape.head_dim) as usize
    }
}
