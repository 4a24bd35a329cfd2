//! What several integration tests share.

#![allow(dead_code, reason = "each test binary uses its own part")]

use landmarkdb::{CollectionSpec, DType, KeyRule, ModelShape, Rope, Sha256Digest};

/// 2 layers, the second without rotation, 4 query heads, 2 KV heads, head dim 8, blocks of 8 tokens.
pub fn shape() -> ModelShape {
    ModelShape {
        layers: 2,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 8,
        block_tokens: 8,
        rope: Rope::from_base(10_000.0, 8),
        unrotated_layers: vec![1],
        softmax_scale: 8f32.powf(-0.5),
    }
}

pub fn spec(name: &str, payload_dtype: DType) -> CollectionSpec {
    CollectionSpec {
        name: name.into(),
        shape: shape(),
        key_rule: KeyRule::Tokens,
        payload_dtype,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "random".into(),
    }
}
