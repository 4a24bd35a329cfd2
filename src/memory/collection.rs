//! A collection's specification, and what follows from it.

use std::sync::Arc;

use super::geometry::LastRotations;
use crate::index::{self, KeyLayout, SearchEngine};
use crate::shape::CollectionSpec;
use crate::store::{CollectionEntry, Manifest};
use crate::types::Engine;

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

    /// Tokens of a document.
    pub(super) fn tokens(&self, manifest: &Manifest) -> u64 {
        manifest.blocks as u64 * self.spec.shape.block_tokens as u64 + manifest.tail_tokens as u64
    }
}
