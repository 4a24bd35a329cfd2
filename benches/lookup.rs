//! One lookup of one layer in process: the search that runs beside the plain definition it is tested against.
//!
//! `cargo bench --bench lookup`; `cargo test` runs each once. Keys and queries are random by seed. The service's own
//! figures, with the machine's read bandwidth beside them, are `landmarkdb bench lookup`'s.

use std::cell::Cell;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use half::f16;
use landmarkdb::index::{Chunk, Compression, DocumentKeys, KeyLayout, Keys, Query, Scoped, exact, fast};
use landmarkdb::{BlockScore, DType, Granularity, Until};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEED: u64 = 1;

/// Layers that take turns, so that keys come from memory and not from a cache.
const LAYERS: usize = 8;

/// A model's layer and a memory's length.
struct Shape {
    name: &'static str,
    kv_heads: usize,
    query_heads: usize,
    head_dim: usize,
    keys_per_block: usize,
    blocks: usize,
    keys: DType,
    compressed: Option<Compression>,
    /// The plain definition is left out where one lookup of it takes seconds.
    plain_too: bool,
}

const SMOLLM2: Shape = Shape {
    name: "smollm2-4k m=64",
    kv_heads: 3,
    query_heads: 9,
    head_dim: 64,
    keys_per_block: 64,
    blocks: 64,
    keys: DType::F16,
    compressed: None,
    plain_too: true,
};

const LLAMA3: Shape = Shape {
    name: "llama3-8b-1m m=1",
    kv_heads: 8,
    query_heads: 32,
    head_dim: 128,
    keys_per_block: 1,
    blocks: 16_384,
    keys: DType::F16,
    compressed: None,
    plain_too: true,
};

const SHAPES: [Shape; 6] = [
    SMOLLM2,
    Shape { name: "smollm2-32k m=64", blocks: 512, keys: DType::Int8, plain_too: false, ..SMOLLM2 },
    LLAMA3,
    Shape { keys: DType::Int8, plain_too: false, ..LLAMA3 },
    Shape { name: "llama3-8b-1m m=1 sq8", compressed: Some(Compression::Int8), plain_too: false, ..LLAMA3 },
    Shape { name: "llama3-8b-1m m=1 sq4", compressed: Some(Compression::Int4), plain_too: false, ..LLAMA3 },
];

fn keys(shape: &Shape, rng: &mut ChaCha8Rng) -> DocumentKeys {
    let layout = KeyLayout {
        layers: LAYERS,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        keys_per_block: shape.keys_per_block,
        dtype: shape.keys,
        compressed: shape.compressed,
    };
    let chunk_blocks = layout.chunk_blocks();
    let chunks = (0..shape.blocks).step_by(chunk_blocks).map(|from| {
        let blocks = chunk_blocks.min(shape.blocks - from);
        let mut chunk = Chunk::zeroed(layout, blocks);
        for block in 0..blocks {
            for piece in 0..layout.pieces() {
                let count = shape.keys_per_block * shape.head_dim;
                if shape.keys == DType::Int8 {
                    let values: Vec<i8> = (0..count).map(|_| rng.random_range(-127..=127)).collect();
                    let scales = vec![1.0 / 127.0; shape.keys_per_block];
                    chunk.put(block, piece, Keys::Int8 { values: &values, scales: &scales });
                } else {
                    let values: Vec<f16> = (0..count).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect();
                    chunk.put(block, piece, Keys::F16(&values));
                }
            }
        }
        chunk
    });
    DocumentKeys::empty(layout).extended(chunks)
}

fn lookups(criterion: &mut Criterion) {
    for shape in &SHAPES {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let keys = Arc::new(keys(shape, &mut rng));
        let queries: Vec<f32> = (0..shape.query_heads * shape.head_dim).map(|_| rng.random_range(-5.0..5.0)).collect();
        let scope = [Scoped { blocks: 0..keys.blocks(), keys: keys.clone(), indexes: None }];
        let forever = Until::FOREVER;
        let query = |layer| Query {
            layout: keys.layout(),
            layer,
            tokens: 1,
            query_heads: shape.query_heads,
            queries: &queries,
            recent_queries: &[],
            scope: &scope,
            top_k: 4,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::KvGroup,
            softmax_scale: (shape.head_dim as f32).powf(-0.5),
            until: &forever,
        };
        let mut group = criterion.benchmark_group(format!("{} {}, seed {SEED}", shape.name, shape.keys));
        group.sample_size(10);
        let layer = Cell::new(0);
        let next = || query(layer.replace((layer.get() + 1) % LAYERS));
        group.bench_function("fast", |bencher| bencher.iter(|| fast::search(black_box(&next()))));
        if shape.plain_too {
            group.bench_function("exact", |bencher| bencher.iter(|| exact::search(black_box(&next()))));
        }
        group.finish();
    }
}

criterion_group!(benches, lookups);
criterion_main!(benches);
