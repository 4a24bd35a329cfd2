//! A memory in this process: `cargo run --example embedded`.
//!
//! Plays the part of a model: appends the keys and values of eight blocks, asks which of them a query wants, attends to
//! those, and reads the best one back.

use landmarkdb::{
    AppendRequest, AttendRequest, BlockMemory, BlockRange, BlockScore, BlockText, CollectionSpec, DType, FetchRequest,
    Granularity, KeyRule, LocalMemory, LookupRequest, ModelShape, NewBlock, Normalisation, Placement, Rope,
    Sha256Digest, Tensor,
};

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let memory = LocalMemory::open(folder.path())?;
    tour(&memory)
}

/// What a model does with a memory, in process or remote.
pub fn tour(memory: &dyn BlockMemory) -> Result<()> {
    // A collection belongs to one model: its shape, and digests of its files.
    let shape = ModelShape {
        layers: 2,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 16,
        block_tokens: 8,
        rope: Rope::from_base(10_000.0, 16),
        unrotated_layers: Vec::new(),
        softmax_scale: 0.25,
    };
    let collection = memory.open_collection(&CollectionSpec {
        name: "example".into(),
        shape: shape.clone(),
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([0; 32]),
        tokenizer_digest: Sha256Digest([0; 32]),
        model_name: "none".into(),
    })?;

    // An append is durable when it returns.
    let document = memory.open_document(collection.id, "notes")?.id;
    let blocks = (0..8).map(|index| block(&shape, index)).collect();
    let appended = memory.append(AppendRequest { document, blocks, expected_tokens: Some(0) })?;
    println!("appended   {} blocks, {} bytes on disk", appended.blocks, appended.stored_bytes);

    // One token's query heads, before RoPE, at the first position behind the blocks: all look for block 5.
    let heads = shape.query_heads as usize;
    let lookup = LookupRequest {
        collection: collection.id,
        layer: 1,
        queries: direction(5).map(|x| 40.0 * x).repeat(heads),
        distances: vec![0],
        scope: vec![BlockRange { document, blocks: 0..8 }],
        top_k: 2,
        block_score: BlockScore::Max,
        granularity: Granularity::Shared,
    };
    let hits = memory.lookup(&lookup)?;
    let shares: Vec<f32> = hits.scores.iter().map(|score| score.exp()).collect();
    println!("looked up  blocks {:?}, shares {shares:.3?}", hits.blocks.iter().map(|id| id.index).collect::<Vec<_>>());

    // The same choice, and the attention over it: `out (T, Hq, D)`, and `lse (T, Hq)` to merge it with other attention.
    let attended = memory.attend(&AttendRequest {
        lookup,
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    })?;
    println!("attended   values near {:.2}, log-sum-exp {:.2}", attended.out[0], attended.lse[0]);

    let best = hits.blocks.iter().zip(&shares).max_by(|a, b| a.1.total_cmp(b.1)).ok_or("nothing was found")?.0;
    let stored = memory.fetch(&FetchRequest { document, blocks: vec![best.index], dtype: DType::F32 })?;
    println!("fetched    {:?}, K {:?}", String::from_utf8_lossy(&stored[0].text.bytes), stored[0].k.shape);

    assert_eq!(best.index, 5);
    assert!((attended.out[0] - 5.0).abs() < 0.01);
    Ok(())
}

/// A block of eight tokens, one per byte of its text. All its keys have the direction of the block, all its values are
/// its index.
fn block(shape: &ModelShape, index: u32) -> NewBlock {
    let bytes = format!("block {index}\n").into_bytes();
    let mut keys = Vec::new();
    for _piece in 0..shape.pieces() {
        for token in 0..shape.block_tokens {
            // A stored key is rotated by its offset inside the block, and by nothing else.
            let mut key = direction(index);
            shape.rope.rotate(&mut key, token as i64);
            keys.extend(key);
        }
    }
    let dims = vec![shape.layers, shape.kv_heads, shape.block_tokens, shape.head_dim];
    NewBlock {
        index,
        token_ids: bytes.iter().map(|&byte| byte as u32).collect(),
        k: Tensor::from_f32(dims.clone(), &keys),
        v: Tensor::from_f32(dims, &vec![index as f32; keys.len()]),
        text: BlockText { start: index as u64 * bytes.len() as u64, offsets: (0..bytes.len() as u32).collect(), bytes },
    }
}

/// `(D)`: one of eight axes, among the dimensions that RoPE rotates slowly.
fn direction(block: u32) -> [f32; 16] {
    let mut head = [0.0; 16];
    head[[4, 5, 6, 7, 12, 13, 14, 15][block as usize]] = 1.0;
    head
}

#[test]
fn runs() -> Result<()> {
    main()
}
