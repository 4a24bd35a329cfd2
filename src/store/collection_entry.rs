//! A collection as it is kept.

use serde::{Deserialize, Serialize};

use super::packed::{pack, unpack};
use crate::shape::{CollectionSpec, ModelShape, Rope, Sha256Digest};
use crate::types::{DType, Engine, KeyRule};

/// What a collection is, and what answers its lookups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Kept", into = "Kept")]
pub struct CollectionEntry {
    pub spec: CollectionSpec,
    pub engine: Engine,
}

/// A specification as every format keeps it: one of format 1 ends here.
#[derive(Serialize, Deserialize)]
pub(super) struct KeptSpec {
    name: String,
    layers: u32,
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_tokens: u32,
    rope: Rope,
    softmax_scale: f32,
    key_rule: KeyRule,
    payload_dtype: DType,
    key_dtype: DType,
    model_digest: Sha256Digest,
    tokenizer_digest: Sha256Digest,
    model_name: String,
}

/// Formats 2 to 4 end behind the engine; so does format 5 where every layer rotates.
#[derive(Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) spec: KeptSpec,
    engine: Engine,
    unrotated_layers: Vec<u32>,
}

impl CollectionEntry {
    /// The meta of its record. What comes to be said of few collections goes behind the rest.
    pub(super) fn encode(&self) -> Vec<u8> {
        let kept = Kept::from(self.clone());
        if kept.unrotated_layers.is_empty() { pack(&(kept.spec, kept.engine)) } else { pack(&kept) }
    }

    /// From the meta of a record of any format.
    pub(super) fn decode(meta: &[u8]) -> Option<Self> {
        // Each is the beginning of the next, so at most one takes all bytes.
        let with = |spec, engine| Kept { spec, engine, unrotated_layers: Vec::new() };
        let kept = unpack::<Kept>(meta)
            .or_else(|| unpack(meta).map(|(spec, engine)| with(spec, engine)))
            .or_else(|| unpack(meta).map(|spec| with(spec, Engine::default())))?;
        let entry = Self::from(kept);
        let spec = &entry.spec;
        (spec.shape.check().is_ok() && matches!(spec.key_dtype, DType::F16 | DType::Int8)).then_some(entry)
    }
}

impl From<CollectionEntry> for Kept {
    fn from(CollectionEntry { spec, engine }: CollectionEntry) -> Self {
        let CollectionSpec {
            name,
            shape,
            key_rule,
            payload_dtype,
            key_dtype,
            model_digest,
            tokenizer_digest,
            model_name,
        } = spec;
        let ModelShape { layers, query_heads, kv_heads, head_dim, block_tokens, rope, unrotated_layers, softmax_scale } =
            shape;
        let spec = KeptSpec {
            name,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            block_tokens,
            rope,
            softmax_scale,
            key_rule,
            payload_dtype,
            key_dtype,
            model_digest,
            tokenizer_digest,
            model_name,
        };
        Kept { spec, engine, unrotated_layers }
    }
}

impl From<Kept> for CollectionEntry {
    fn from(Kept { spec: kept, engine, unrotated_layers }: Kept) -> Self {
        let shape = ModelShape {
            layers: kept.layers,
            query_heads: kept.query_heads,
            kv_heads: kept.kv_heads,
            head_dim: kept.head_dim,
            block_tokens: kept.block_tokens,
            rope: kept.rope,
            unrotated_layers,
            softmax_scale: kept.softmax_scale,
        };
        let spec = CollectionSpec {
            name: kept.name,
            shape,
            key_rule: kept.key_rule,
            payload_dtype: kept.payload_dtype,
            key_dtype: kept.key_dtype,
            model_digest: kept.model_digest,
            tokenizer_digest: kept.tokenizer_digest,
            model_name: kept.model_name,
        };
        CollectionEntry { spec, engine }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::spec;

    fn unrotated(layers: &[u32]) -> CollectionSpec {
        let spec = spec("some");
        CollectionSpec { shape: ModelShape { unrotated_layers: layers.to_vec(), ..spec.shape }, ..spec }
    }

    #[test]
    fn a_collection_reads_back_and_a_cut_one_does_not() {
        for spec in [spec("all"), unrotated(&[0])] {
            let entry = CollectionEntry { spec, engine: Engine::Sq8 };
            let bytes = entry.encode();
            assert_eq!(CollectionEntry::decode(&bytes), Some(entry.clone()));
            assert_eq!(unpack(&pack(&entry)), Some(entry), "in the catalog");
            assert_eq!(CollectionEntry::decode(&bytes[1..]), None);
            assert_eq!(CollectionEntry::decode(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn collections_of_format_1_have_the_engine_that_there_was() {
        let entry = CollectionEntry { spec: spec("old"), engine: Engine::Flat };
        let kept = Kept::from(entry.clone());
        assert_eq!(CollectionEntry::decode(&pack(&kept.spec)), Some(entry));
    }

    #[test]
    fn a_shape_that_none_can_have_is_not_read() {
        let entry = CollectionEntry { spec: unrotated(&[9]), engine: Engine::Flat };
        assert_eq!(CollectionEntry::decode(&entry.encode()), None);
    }
}
