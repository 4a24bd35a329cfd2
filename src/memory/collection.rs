//! A collection's specification, and what follows from it.

use std::sync::Arc;

use super::geometry::LastRotations;
use crate::index::{self, KeyLayout, SearchEngine};
use crate::shape::CollectionSpec;
use crate::store::{CollectionEntry, Manifest};
use crate::types::{Engine, KeyRule};

/// Some first blocks of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Extent {
    /// Full ones.
    pub(super) full: u32,
    /// Tokens of the tail behind all full blocks of the document; 0 if it is not among them.
    pub(super) tail_tokens: u32,
}

/// A collection's spec with what follows from it.
pub(super) struct Collection {
    pub(super) spec: CollectionSpec,
    /// What answers lookups here: the engine that was set, or `flat` where this program does not have it.
    pub(super) engine: Arc<dyn SearchEngine>,
    pub(super) layout: KeyLayout,
    pub(super) rotations: LastRotations,
}

impl Collection {
    pub(super) fn of(CollectionEntry { spec, engine }: CollectionEntry) -> Collection {
        let mut engine = index::engine(&engine);
        if let Err(problem) = engine.check(spec.shape.head_dim as usize) {
            tracing::warn!("keys of collection {} are scanned: {problem}", spec.name);
            engine = index::engine(&Engine::Flat);
        }
        let layout = KeyLayout {
            layers: spec.shape.layers as usize,
            kv_heads: spec.shape.kv_heads as usize,
            head_dim: spec.shape.head_dim as usize,
            keys_per_block: spec.shape.keys_per_block(spec.key_rule),
            dtype: spec.key_dtype,
            compressed: engine.compression(spec.key_dtype),
        };
        Collection { spec, engine, layout, rotations: LastRotations::default() }
    }

    /// The blocks of a document that can be looked up. A tail is final, and in the index, once its document is sealed.
    pub(super) fn eligible(&self, manifest: &Manifest) -> Extent {
        // A manifest on a disk may say anything.
        let is_short = manifest.tail_tokens < self.spec.shape.block_tokens;
        let has_tail = manifest.sealed && is_short && self.spec.key_rule.covers_tails();
        Extent { full: manifest.blocks, tail_tokens: if has_tail { manifest.tail_tokens } else { 0 } }
    }

    /// What stands for block `index` of one layer and KV head with token keys `k (T, D)`: `(m, D)`, of a tail `(T, D)` at most.
    pub(super) fn landmark_keys(&self, index: u32, k: &[f32]) -> Vec<f32> {
        let dim = self.layout.head_dim;
        match self.spec.key_rule {
            KeyRule::Tokens => {
                let mut keys = k.to_vec();
                if index == 0 && k.len() > dim {
                    keys.copy_within(dim..2 * dim, 0);
                }
                keys
            }
            KeyRule::Landmark => k[k.len() - dim..].to_vec(),
            KeyRule::Mean => {
                let k = if index == 0 && k.len() > dim { &k[dim..] } else { k };
                let mut mean = vec![0.0; dim];
                let share = dim as f32 / k.len() as f32;
                k.chunks_exact(dim).for_each(|key| linalg::add_scaled(&mut mean, share, key));
                mean
            }
        }
    }

    /// Tokens of a document.
    pub(super) fn tokens(&self, manifest: &Manifest) -> u64 {
        manifest.blocks as u64 * self.spec.shape.block_tokens as u64 + manifest.tail_tokens as u64
    }
}

impl Extent {
    pub(super) fn blocks(self) -> u32 {
        self.full + (self.tail_tokens > 0) as u32
    }

    /// Those before block `end`.
    pub(super) fn before(self, end: u32) -> Extent {
        if end > self.full { self } else { Extent { full: end, tail_tokens: 0 } }
    }

    /// Bytes that their keys take at most, loaded at once, beside those that are here already: of `full` blocks, and of the tail
    /// or not.
    pub(super) fn more_key_bytes(self, layout: &KeyLayout, full: u32, tail: bool) -> u64 {
        let tail = if self.tail_tokens > 0 && !tail { layout.of_tail(self.tail_tokens as usize).bytes(1) } else { 0 };
        layout.bytes(self.full.saturating_sub(full)) + tail
    }
}
