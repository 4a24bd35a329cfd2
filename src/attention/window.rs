//! The tokens at hand: K and V of the local window and of the sink, for all layers.

use crate::attention::local::HeadKv;
use crate::shape::{ModelShape, Rotation};

/// K and V of recent tokens for each layer and KV head. Keys are rotated to their position in the text, so a query
/// rotated to its own position scores them at their true distances.
pub(crate) struct LocalWindow {
    /// `(L, Hkv)` heads.
    heads: Vec<Head>,
    /// `(L)`: whether its keys rotate.
    rotates: Vec<bool>,
    kv_heads: usize,
    head_dim: usize,
    /// Position in the text of the first row.
    base: usize,
}

#[derive(Clone, Default)]
struct Head {
    /// `(S, D)`
    k: Vec<f32>,
    /// `(S, D)`
    v: Vec<f32>,
}

/// The first block of the text, its keys rotated by their offset in the block only: `(L, Hkv)` heads of `(B, D)`.
pub(crate) struct Sink {
    heads: Vec<Head>,
    /// Whether it was read back, and not filled by the window.
    stored: bool,
}

/// The tails of earlier documents that cannot be looked up, all of them at hand: `(L, Hkv)` heads of `(S, D)`.
#[derive(Default)]
pub(crate) struct Lead {
    heads: Vec<Head>,
}

impl Lead {
    /// Adds a stored tail of all layers, `k~` and `v (L, Hkv, tokens, D)`, whose first token is at the position of `rotation`.
    pub(crate) fn push(&mut self, shape: &ModelShape, k: &[f32], v: &[f32], rotation: &Rotation) {
        self.heads.resize(shape.pieces(), Head::default());
        push_stored(&mut self.heads, &rotates(shape), k, v, (shape.head_dim as usize, rotation));
    }

    /// `(S, D)` of one head.
    pub(crate) fn head(&self, index: usize) -> HeadKv<'_> {
        self.heads.get(index).map_or(HeadKv { k: &[], v: &[] }, |head| HeadKv { k: &head.k, v: &head.v })
    }
}

/// `(L)`: whether a layer's keys rotate.
fn rotates(shape: &ModelShape) -> Vec<bool> {
    (0..shape.layers).map(|layer| !shape.rope_of(layer).frequencies.is_empty()).collect()
}

/// Adds stored tokens to `heads (L, Hkv)`: `k` and `v (L, Hkv, tokens, D)`. Keys that rotate are rotated from their places in
/// their block to those of the text.
fn push_stored(heads: &mut [Head], rotates: &[bool], k: &[f32], v: &[f32], (dim, rotation): (usize, &Rotation)) {
    let (head_len, kv_heads) = (k.len() / heads.len(), heads.len() / rotates.len());
    let stored = k.chunks_exact(head_len).zip(v.chunks_exact(head_len));
    for (index, (head, (k, v))) in heads.iter_mut().zip(stored).enumerate() {
        let from = head.k.len();
        head.k.extend_from_slice(k);
        head.v.extend_from_slice(v);
        if rotates[index / kv_heads] {
            head.k[from..].chunks_exact_mut(dim).for_each(|key| rotation.apply(key));
        }
    }
}

impl LocalWindow {
    pub(crate) fn new(shape: &ModelShape, base: usize) -> Self {
        LocalWindow {
            heads: vec![Head::default(); shape.pieces()],
            rotates: rotates(shape),
            kv_heads: shape.kv_heads as usize,
            head_dim: shape.head_dim as usize,
            base,
        }
    }

    /// Position of the first token at hand.
    pub(crate) fn base(&self) -> usize {
        self.base
    }

    /// Adds tokens of one layer, `k (T, Hkv, D)` before RoPE and `v (T, Hkv, D)`; `rotations (T)` are their positions.
    pub(crate) fn push(&mut self, layer: usize, k: &[f32], v: &[f32], rotations: &[Rotation]) {
        let d = self.head_dim;
        let row = self.kv_heads * d;
        for ((k, v), rotation) in k.chunks_exact(row).zip(v.chunks_exact(row)).zip(rotations) {
            for (head, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
                let head = &mut self.heads[layer * self.kv_heads + head];
                let from = head.k.len();
                head.k.extend_from_slice(k);
                if self.rotates[layer] {
                    rotation.apply(&mut head.k[from..]);
                }
                head.v.extend_from_slice(v);
            }
        }
    }

    /// Adds the tokens of a stored block of all layers, `k~ (L, Hkv, tokens, D)` and `v (L, Hkv, tokens, D)`, whose
    /// first token is at the position of `rotation`.
    pub(crate) fn push_block(&mut self, k: &[f32], v: &[f32], rotation: &Rotation) {
        push_stored(&mut self.heads, &self.rotates, k, v, (self.head_dim, rotation));
    }

    /// Forgets the tokens before `position`.
    pub(crate) fn forget_before(&mut self, position: usize) {
        let rows = position.saturating_sub(self.base);
        if rows > 0 {
            for head in &mut self.heads {
                head.k.drain(..rows * self.head_dim);
                head.v.drain(..rows * self.head_dim);
            }
            self.base += rows;
        }
    }

    /// Rows of one head from `position` on.
    pub(crate) fn rows_from(&self, layer: usize, kv_head: usize, position: usize) -> HeadKv<'_> {
        let head = &self.heads[layer * self.kv_heads + kv_head];
        let from = (position - self.base) * self.head_dim;
        HeadKv { k: &head.k[from..], v: &head.v[from..] }
    }

    /// Tokens `position .. position + tokens` of all layers as they are stored: `k~` and `v`, both
    /// `(L, Hkv, tokens, D)`. `back` rotates by `-position`.
    pub(crate) fn block(&self, position: usize, tokens: usize, back: &Rotation) -> (Vec<f32>, Vec<f32>) {
        let rows = (position - self.base) * self.head_dim..(position - self.base + tokens) * self.head_dim;
        let mut k: Vec<f32> = self.heads.iter().flat_map(|head| &head.k[rows.clone()]).copied().collect();
        let layer_len = tokens * self.kv_heads * self.head_dim;
        for (layer, &rotates) in k.chunks_exact_mut(layer_len).zip(&self.rotates) {
            if rotates {
                layer.chunks_exact_mut(self.head_dim).for_each(|key| back.apply(key));
            }
        }
        (k, self.heads.iter().flat_map(|head| &head.v[rows.clone()]).copied().collect())
    }
}

impl Sink {
    /// A sink whose layers are filled as they come.
    pub(crate) fn empty(shape: &ModelShape) -> Self {
        Sink { heads: vec![Head::default(); shape.pieces()], stored: false }
    }

    /// From a stored block, `k~` and `v (L, Hkv, B, D)`, or a tail that is the whole text.
    pub(crate) fn from_block(shape: &ModelShape, k: &[f32], v: &[f32]) -> Self {
        let head_len = k.len() / shape.pieces();
        let heads = k.chunks_exact(head_len).zip(v.chunks_exact(head_len));
        Sink { heads: heads.map(|(k, v)| Head { k: k.to_vec(), v: v.to_vec() }).collect(), stored: true }
    }

    pub(crate) fn is_stored(&self) -> bool {
        self.stored
    }

    /// Takes the first block of the text from a window that begins with the text, once it is there: at position 0
    /// rotated keys are as they are stored.
    pub(crate) fn fill(&mut self, layer: usize, window: &LocalWindow, block_tokens: usize) {
        let block_len = block_tokens * window.head_dim;
        let heads = layer * window.kv_heads..(layer + 1) * window.kv_heads;
        for (sink, head) in self.heads[heads.clone()].iter_mut().zip(&window.heads[heads]) {
            if sink.k.is_empty() && window.base == 0 && head.k.len() >= block_len {
                sink.k = head.k[..block_len].to_vec();
                sink.v = head.v[..block_len].to_vec();
            }
        }
    }

    /// `(B, D)` of one head, or of a tail's tokens.
    pub(crate) fn head(&self, index: usize) -> HeadKv<'_> {
        HeadKv { k: &self.heads[index].k, v: &self.heads[index].v }
    }
}
