//! Answers that several commands give, as `--json` spells them.

use serde::Serialize;

use landmarkdb::{CollectionInfo, DocumentInfo};

use super::output::word;

/// One collection.
#[derive(Debug, Serialize)]
pub(super) struct CollectionReport {
    pub(super) id: u32,
    pub(super) name: String,
    /// What the model calls itself.
    pub(super) model: String,
    /// 64 hex digits: model, tokenizer, shape, key rule and dtypes.
    pub(super) fingerprint: String,
    /// landmark, tokens or mean.
    pub(super) key_rule: String,
    /// Of K and V on disk: f32, f16, bf16 or int8.
    pub(super) payload_dtype: String,
    /// Of landmark keys: f16 or int8.
    pub(super) key_dtype: String,
    /// What answers lookups: flat, sq8 or sq4.
    pub(super) engine: String,
    pub(super) layers: u32,
    pub(super) query_heads: u32,
    pub(super) kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) block_tokens: u32,
    /// What attention multiplies `q . k` with.
    pub(super) softmax_scale: f32,
    /// Radians per token, one per rotated pair.
    pub(super) rope_frequencies: Vec<f32>,
    /// Layers whose queries and keys are not rotated.
    pub(super) unrotated_layers: Vec<u32>,
    /// 64 hex digits: SHA-256 of the model's weights.
    pub(super) model_digest: String,
    /// 64 hex digits: SHA-256 of the tokenizer.
    pub(super) tokenizer_digest: String,
    pub(super) documents: u64,
}

/// One document.
#[derive(Debug, Serialize)]
pub(super) struct DocumentReport {
    pub(super) id: u64,
    /// Name of its collection.
    pub(super) collection: String,
    pub(super) name: String,
    /// Sealed documents take no more appends.
    pub(super) sealed: bool,
    /// Full blocks.
    pub(super) blocks: u32,
    /// Tokens after the last full block.
    pub(super) tail_tokens: u32,
    /// All tokens, the tail's included.
    pub(super) tokens: u64,
    /// Bytes of source text.
    pub(super) text_bytes: u64,
    /// Bytes on disk: payload, keys, text and headers.
    pub(super) stored_bytes: u64,
}

impl CollectionReport {
    pub(super) fn new(info: &CollectionInfo) -> Self {
        let (spec, shape) = (&info.spec, &info.spec.shape);
        CollectionReport {
            id: info.id.0,
            name: spec.name.clone(),
            model: spec.model_name.clone(),
            fingerprint: format!("{:#}", info.fingerprint),
            key_rule: word(spec.key_rule),
            payload_dtype: word(spec.payload_dtype),
            key_dtype: word(spec.key_dtype),
            engine: info.engine.to_string(),
            layers: shape.layers,
            query_heads: shape.query_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            block_tokens: shape.block_tokens,
            softmax_scale: shape.softmax_scale,
            rope_frequencies: shape.rope.frequencies.clone(),
            unrotated_layers: shape.unrotated_layers.clone(),
            model_digest: format!("{:#}", spec.model_digest),
            tokenizer_digest: format!("{:#}", spec.tokenizer_digest),
            documents: info.documents,
        }
    }
}

impl DocumentReport {
    pub(super) fn new(collection: &CollectionInfo, info: &DocumentInfo) -> Self {
        DocumentReport {
            id: info.id.0,
            collection: collection.spec.name.clone(),
            name: info.name.clone(),
            sealed: info.sealed,
            blocks: info.blocks,
            tail_tokens: info.tail_tokens,
            tokens: info.tokens,
            text_bytes: info.text_bytes,
            stored_bytes: info.stored_bytes,
        }
    }

    /// What a person reads for [`DocumentReport::sealed`].
    pub(super) fn state(&self) -> &'static str {
        if self.sealed { "sealed" } else { "open" }
    }
}
