//! Messages with collections and documents.

use super::convert::{FromNumber, bytes_of_f32, digest, f32_of_bytes, invalid, missing, required};
use super::v1;
use landmarkdb::{
    CollectionId, CollectionInfo, CollectionSpec, DType, DocumentId, DocumentInfo, Engine, FaissIndex, Fingerprint,
    KeyRule, MemoryError, ModelShape, Result, Rope, Sha256Digest,
};

impl From<ModelShape> for v1::ModelShape {
    fn from(shape: ModelShape) -> Self {
        v1::ModelShape {
            layers: shape.layers,
            query_heads: shape.query_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            block_tokens: shape.block_tokens,
            rope_frequencies: bytes_of_f32(&shape.rope.frequencies),
            softmax_scale: shape.softmax_scale,
            unrotated_layers: shape.unrotated_layers,
        }
    }
}

impl TryFrom<v1::ModelShape> for ModelShape {
    type Error = MemoryError;

    fn try_from(wire: v1::ModelShape) -> Result<Self> {
        Ok(ModelShape {
            layers: wire.layers,
            query_heads: wire.query_heads,
            kv_heads: wire.kv_heads,
            head_dim: wire.head_dim,
            block_tokens: wire.block_tokens,
            rope: Rope { frequencies: f32_of_bytes("rope_frequencies", &wire.rope_frequencies)? },
            unrotated_layers: wire.unrotated_layers,
            softmax_scale: wire.softmax_scale,
        })
    }
}

impl From<CollectionSpec> for v1::CollectionSpec {
    fn from(spec: CollectionSpec) -> Self {
        v1::CollectionSpec {
            name: spec.name,
            shape: Some(spec.shape.into()),
            key_rule: v1::KeyRule::from(spec.key_rule).into(),
            payload_dtype: v1::Dtype::from(spec.payload_dtype).into(),
            key_dtype: v1::Dtype::from(spec.key_dtype).into(),
            model_digest: spec.model_digest.0.to_vec().into(),
            tokenizer_digest: spec.tokenizer_digest.0.to_vec().into(),
            model_name: spec.model_name,
        }
    }
}

impl TryFrom<v1::CollectionSpec> for CollectionSpec {
    type Error = MemoryError;

    fn try_from(wire: v1::CollectionSpec) -> Result<Self> {
        Ok(CollectionSpec {
            name: wire.name,
            shape: required("shape", wire.shape)?.try_into()?,
            key_rule: KeyRule::from_number("key_rule", wire.key_rule)?,
            payload_dtype: DType::from_number("payload_dtype", wire.payload_dtype)?,
            key_dtype: DType::from_number("key_dtype", wire.key_dtype)?,
            model_digest: Sha256Digest(digest("model_digest", &wire.model_digest)?),
            tokenizer_digest: Sha256Digest(digest("tokenizer_digest", &wire.tokenizer_digest)?),
            model_name: wire.model_name,
        })
    }
}

impl From<CollectionInfo> for v1::CollectionInfo {
    fn from(info: CollectionInfo) -> Self {
        v1::CollectionInfo {
            id: info.id.0,
            spec: Some(info.spec.into()),
            fingerprint: info.fingerprint.0.to_vec().into(),
            documents: info.documents,
            engine: info.engine.number(),
            faiss: faiss_index(&info.engine),
        }
    }
}

impl TryFrom<v1::CollectionInfo> for CollectionInfo {
    type Error = MemoryError;

    fn try_from(wire: v1::CollectionInfo) -> Result<Self> {
        Ok(CollectionInfo {
            id: CollectionId(wire.id),
            spec: required("spec", wire.spec)?.try_into()?,
            fingerprint: Fingerprint(digest("fingerprint", &wire.fingerprint)?),
            documents: wire.documents,
            engine: engine(wire.engine, wire.faiss)?,
        })
    }
}

pub(super) fn faiss_index(engine: &Engine) -> Option<v1::FaissIndex> {
    engine.setting().map(|FaissIndex { factory, effort }| v1::FaissIndex { factory: factory.clone(), effort: *effort })
}

pub(super) fn engine(number: i32, faiss: Option<v1::FaissIndex>) -> Result<Engine> {
    if number == v1::Engine::Unspecified as i32 {
        return Err(missing("engine"));
    }
    let mut lacks_setting = false;
    let setting = || {
        lacks_setting = faiss.is_none();
        faiss.map(|v1::FaissIndex { factory, effort }| FaissIndex { factory, effort })
    };
    match Engine::from_number(number, setting) {
        Some(engine) => Ok(engine),
        None if lacks_setting => Err(missing("faiss")),
        None => Err(invalid("engine", "a number of Engine", number)),
    }
}

impl From<(CollectionId, Engine)> for v1::SetEngineRequest {
    fn from((collection, engine): (CollectionId, Engine)) -> Self {
        v1::SetEngineRequest { collection: collection.0, engine: engine.number(), faiss: faiss_index(&engine) }
    }
}

/// What a change of engine says.
impl TryFrom<v1::SetEngineRequest> for (CollectionId, Engine) {
    type Error = MemoryError;

    fn try_from(wire: v1::SetEngineRequest) -> Result<Self> {
        Ok((CollectionId(wire.collection), engine(wire.engine, wire.faiss)?))
    }
}

impl From<DocumentInfo> for v1::DocumentInfo {
    fn from(info: DocumentInfo) -> Self {
        v1::DocumentInfo {
            id: info.id.0,
            collection: info.collection.0,
            name: info.name,
            sealed: info.sealed,
            blocks: info.blocks,
            tail_tokens: info.tail_tokens,
            tokens: info.tokens,
            text_bytes: info.text_bytes,
            stored_bytes: info.stored_bytes,
            state_tokens: info.state_tokens,
        }
    }
}

impl From<v1::DocumentInfo> for DocumentInfo {
    fn from(wire: v1::DocumentInfo) -> Self {
        DocumentInfo {
            id: DocumentId(wire.id),
            collection: CollectionId(wire.collection),
            name: wire.name,
            sealed: wire.sealed,
            blocks: wire.blocks,
            tail_tokens: wire.tail_tokens,
            tokens: wire.tokens,
            text_bytes: wire.text_bytes,
            stored_bytes: wire.stored_bytes,
            state_tokens: wire.state_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The manual and the table of engines name the same.
    #[test]
    fn every_engine_of_the_manual_is_one_of_the_program() {
        let setting = FaissIndex { factory: "Flat".into(), effort: 1 };
        for number in 1.. {
            let Ok(wire) = v1::Engine::try_from(number) else {
                assert_eq!(Engine::from_number(number, || Some(setting)), None, "an engine that the manual lacks");
                return;
            };
            let engine = Engine::from_number(number, || Some(setting.clone()));
            let engine = engine.unwrap_or_else(|| panic!("no engine for {}", wire.as_str_name()));
            assert_eq!(format!("ENGINE_{}", engine.word().to_uppercase()), wire.as_str_name());
            assert_eq!(super::engine(number, faiss_index(&engine)).unwrap(), engine);
        }
    }
}
