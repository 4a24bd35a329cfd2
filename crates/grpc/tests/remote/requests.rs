//! Requests of the least size that has every field in it.

use landmarkdb::*;

pub(crate) fn spec() -> CollectionSpec {
    CollectionSpec {
        name: "bücher".into(),
        shape: ModelShape {
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            block_tokens: 4,
            rope: Rope::from_base(10_000.0, 6),
            unrotated_layers: Vec::new(),
            softmax_scale: 8f32.powf(-0.5),
        },
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::Int8,
        key_dtype: DType::F16,
        model_digest: Sha256Digest(std::array::from_fn(|i| i as u8)),
        tokenizer_digest: Sha256Digest([255; 32]),
        model_name: "double".into(),
    }
}

pub(crate) fn tune() -> TuneRequest {
    let query = |layer| TuneQuery { layer, distance: 7, values: (0..32).map(|i| (i as f32).cos()).collect() };
    let index = |effort| TuneIndex { factory: "HNSW32".into(), effort };
    TuneRequest {
        collection: CollectionId(3),
        queries: vec![query(0), query(1)],
        top_k: 5,
        recall: 0.875,
        lookups: 11,
        indexes: vec![index(None), index(Some(0))],
    }
}

/// `tokens` query tokens of 4 heads of 8.
pub(crate) fn lookup(tokens: u32, granularity: Granularity) -> LookupRequest {
    LookupRequest {
        collection: CollectionId(3),
        layer: 1,
        queries: (0..tokens * 32).map(|i| (i as f32).sin()).collect(),
        distances: (0..tokens).collect(),
        scope: vec![
            BlockRange { document: DocumentId(1), blocks: 0..4 },
            BlockRange { document: DocumentId(u64::MAX), blocks: 7..7 },
        ],
        top_k: 3,
        block_score: BlockScore::LogSumExp,
        granularity,
    }
}

pub(crate) fn attend(tokens: u32) -> AttendRequest {
    AttendRequest {
        lookup: lookup(tokens, Granularity::TokenHead),
        normalisation: Normalisation::Grouped,
        placement: Placement::Original { within_tokens: 19 },
        without_first_tokens: false,
    }
}

/// A full block at `index`.
pub(crate) fn block(index: u32) -> NewBlock {
    let values: Vec<f32> = (0..2 * 2 * 4 * 8).map(|i| (i as f32 + index as f32).cos()).collect();
    let k = Tensor::from_f32(vec![2, 2, 4, 8], &values);
    let v = Tensor { dtype: DType::BF16, shape: k.shape.clone(), data: k.data.slice(..k.data.len() / 2) };
    let text = BlockText { start: index as u64 * 9, bytes: b"\xff words".to_vec(), offsets: vec![0, 2, 2, 5] };
    NewBlock { index, token_ids: vec![1, 0, u32::MAX, 7], text, k, v }
}

pub(crate) fn append(document: DocumentId, indices: std::ops::Range<u32>) -> AppendRequest {
    AppendRequest { document, blocks: indices.map(block).collect(), expected_tokens: None }
}

/// A state of so many parts, each with bytes of its own.
pub(crate) fn state(parts: u8) -> SequenceState {
    SequenceState { tokens: 12, parts: (0..parts).map(|part| vec![part; 50 + part as usize].into()).collect() }
}
