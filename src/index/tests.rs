//! The fast search against the plain one, on random shapes and at the edges of every size.

use std::sync::Arc;

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::types::DType;
use crate::until::Until;
use linalg::ChannelQuantizer;

/// Both searches read the same stored values. Against f16 keys only the order of f32 sums differs: the error of a score
/// grows with its size (here up to about 20). Against int8 keys queries may be integers of 15 bits.
const TOLERANCE_F16: f64 = 1e-4;
const TOLERANCE_INT8: f64 = 1e-3;
/// The softmax that a score is a share of is taken over compressed keys, the score itself over f16 ones.
const TOLERANCE_SQ8: f64 = 0.03;
const TOLERANCE_SQ4: f64 = 0.5;

const GRANULARITIES: [Granularity; 5] =
    [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];

fn gaussian(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.7).collect()
}

fn chunk(rng: &mut ChaCha8Rng, layout: KeyLayout, quantizers: &Arc<[ChannelQuantizer]>, blocks: usize) -> Chunk {
    let mut chunk = Chunk::with_quantizers(layout, quantizers.clone(), blocks);
    let count = layout.keys_per_block * layout.head_dim;
    // The factors of most channels are near the largest that there is.
    let steps = if quantizers.is_empty() { 1.0 } else { 64.0 };
    for block in 0..blocks {
        for piece in 0..layout.pieces() {
            if layout.dtype == DType::Int8 {
                let count = layout.keys_per_block * chunk.width();
                let values: Vec<i8> = (0..count).map(|_| rng.random_range(-127i8..=127)).collect();
                let scale = |_| rng.random_range(0.002..0.02) / steps;
                let scales: Vec<f32> = (0..layout.keys_per_block).map(scale).collect();
                chunk.put(block, piece, Keys::Int8 { values: &values, scales: &scales });
            } else {
                let values: Vec<f16> = gaussian(rng, count).into_iter().map(f16::from_f32).collect();
                chunk.put(block, piece, Keys::F16(&values));
            }
        }
    }
    chunk
}

fn quantizer(rng: &mut ChaCha8Rng, dim: usize) -> ChannelQuantizer {
    ChannelQuantizer::fit(&gaussian(rng, 8 * dim), dim)
}

/// One random lookup: documents of these many blocks each, built from chunks of random size.
struct Case {
    layout: KeyLayout,
    /// Whether int8 keys have channel quantizers, others in every document.
    by_channel: bool,
    query_heads: usize,
    tokens: usize,
    documents: Vec<usize>,
    /// Whether the last block of each document is a tail, of a random number of keys.
    tails: bool,
    recent: usize,
    top_k: usize,
}

impl Case {
    fn check(&self, seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let layout = self.layout;
        let scope: Vec<Scoped> = self
            .documents
            .iter()
            .map(|&blocks| {
                // Blocks before and after the range make sure that only the range counts.
                let tail_keys = (blocks > 0 && self.tails).then(|| rng.random_range(1..=layout.keys_per_block));
                let before = rng.random_range(0..40);
                let after = if tail_keys.is_some() { 0 } else { rng.random_range(0..3) };
                let full = before + blocks + after - tail_keys.is_some() as usize;
                let quantizers: Arc<[ChannelQuantizer]> = match self.by_channel {
                    true => (0..layout.pieces()).map(|_| quantizer(&mut rng, layout.head_dim)).collect(),
                    false => Arc::default(),
                };
                let mut keys = DocumentKeys::empty(layout);
                while (keys.blocks() as usize) < full {
                    let room = full - keys.blocks() as usize;
                    let size = rng.random_range(1..=room);
                    keys = keys.extended([chunk(&mut rng, layout, &quantizers, size)]);
                }
                if let Some(tail_keys) = tail_keys {
                    keys = keys.with_tail(chunk(&mut rng, layout.of_tail(tail_keys), &quantizers, 1));
                }
                Scoped { keys: Arc::new(keys), blocks: before as u32..(before + blocks) as u32, indexes: None }
            })
            .collect();
        let set_len = self.tokens * self.query_heads * layout.head_dim;
        let queries = gaussian(&mut rng, set_len);
        let recent_queries = gaussian(&mut rng, self.recent * set_len);
        for granularity in GRANULARITIES {
            for block_score in [BlockScore::Max, BlockScore::LogSumExp] {
                compare(&Query {
                    layout,
                    layer: layout.layers - 1,
                    tokens: self.tokens,
                    query_heads: self.query_heads,
                    queries: &queries,
                    recent_queries: &recent_queries,
                    scope: &scope,
                    top_k: self.top_k,
                    block_score,
                    granularity,
                    softmax_scale: (layout.head_dim as f32).powf(-0.5),
                    until: &Until::FOREVER,
                });
            }
        }
    }
}

fn compare(query: &Query<'_>) {
    let tolerance = match query.layout {
        KeyLayout { compressed: Some(Compression::Int8), .. } => TOLERANCE_SQ8,
        KeyLayout { compressed: Some(Compression::Int4), .. } => TOLERANCE_SQ4,
        KeyLayout { dtype: DType::Int8, .. } => TOLERANCE_INT8,
        _ => TOLERANCE_F16,
    };
    // Blocks of one head differ by their scores, whatever these are shares of.
    let alone = query.granularity == Granularity::TokenHead && query.layout.compressed.is_some();
    let tie = if alone { TOLERANCE_F16 } else { tolerance };
    let (want, got) = (exact::search(query), fast::search(query));
    assert_eq!((got.rows, got.k), (want.rows, want.k));
    assert_eq!((got.positions.len(), got.scores.len()), (got.rows * got.k, got.rows * got.k));
    let eligible = query.eligible();
    if eligible == 0 {
        return;
    }
    let all = exact::aggregated(query);
    for (row, all) in all.chunks_exact(eligible).enumerate() {
        let (got_row, want_row) = (got.row(row), want.row(row));
        assert!(got_row.is_sorted_by(|a, b| a < b), "document order, no block twice: {got_row:?}");
        let worst = want_row.iter().map(|&p| all[p as usize]).fold(f64::INFINITY, f64::min);
        for (i, &position) in got_row.iter().enumerate() {
            let exact = all[position as usize];
            let score = got.scores[row * got.k + i] as f64;
            assert!((score - exact).abs() < tolerance, "row {row} block {position}: {score} for {exact}");
            let near_tie = exact >= worst - tie;
            assert!(want_row.contains(&position) || near_tie, "row {row}: {got_row:?} for {want_row:?}");
        }
    }
}

fn layout(keys_per_block: usize, head_dim: usize, dtype: DType) -> KeyLayout {
    KeyLayout { layers: 2, kv_heads: 2, head_dim, keys_per_block, dtype, compressed: None }
}

/// f16, the same compressed, int8, and int8 by channel quantizers.
fn layouts(keys_per_block: usize, head_dim: usize) -> [(KeyLayout, bool); 5] {
    let of = |dtype| layout(keys_per_block, head_dim, dtype);
    let compressed = |to| KeyLayout { compressed: Some(to), ..of(DType::F16) };
    [
        (of(DType::F16), false),
        (compressed(Compression::Int8), false),
        (compressed(Compression::Int4), false),
        (of(DType::Int8), false),
        (of(DType::Int8), true),
    ]
}

#[test]
fn fast_equals_exact_at_every_edge_of_eligible_and_k() {
    let k = 4;
    for keys_per_block in [1, 16] {
        for (layout, by_channel) in layouts(keys_per_block, 16) {
            for eligible in [0, 1, k - 1, k, k + 1, 70] {
                for recent in [0, eligible.min(k) / 2, eligible.min(k)] {
                    let documents = vec![eligible];
                    let case = Case {
                        layout,
                        by_channel,
                        query_heads: 4,
                        tokens: 2,
                        documents,
                        tails: false,
                        recent,
                        top_k: k,
                    };
                    case.check(eligible as u64);
                    Case { tails: true, ..case }.check(eligible as u64);
                }
            }
        }
    }
}

#[test]
fn fast_equals_exact_for_many_tokens_odd_dims_and_several_documents() {
    for (tokens, head_dim, keys_per_block, query_heads, documents) in [
        (1, 33, 1, 6, vec![5, 0, 90]),
        (17, 5, 17, 2, vec![9, 11]),
        (64, 24, 1, 4, vec![40, 3, 30]),
        (2, 1, 3, 2, vec![1, 1, 1]),
    ] {
        let recent = documents.last().map_or(0, |&last| last.min(3));
        for (layout, by_channel) in layouts(keys_per_block, head_dim) {
            for tails in [false, true] {
                let documents = documents.clone();
                Case { layout, by_channel, query_heads, tokens, documents, tails, recent, top_k: 3 }.check(7);
            }
        }
    }
}

/// More keys than one chunk or tile holds, and enough work for all threads.
#[test]
fn fast_equals_exact_across_chunks_and_tiles() {
    for (dtype, compressed, by_channel, keys_per_block, blocks) in [
        (DType::F16, None, false, 1, 5000),
        (DType::F16, Some(Compression::Int8), false, 1, 5000),
        (DType::F16, Some(Compression::Int8), false, 64, 150),
        (DType::F16, Some(Compression::Int4), false, 1, 5000),
        (DType::F16, Some(Compression::Int4), false, 64, 150),
        (DType::Int8, None, false, 64, 150),
        (DType::Int8, None, true, 64, 150),
        (DType::Int8, None, false, 1, 2049),
    ] {
        let layout = KeyLayout { layers: 1, compressed, ..layout(keys_per_block, 32, dtype) };
        Case {
            layout,
            by_channel,
            query_heads: 4,
            tokens: 2,
            documents: vec![blocks],
            tails: true,
            recent: 5,
            top_k: 8,
        }
        .check(11);
    }
}

#[test]
fn equal_keys_tie_to_the_first_blocks() {
    let layout =
        KeyLayout { layers: 1, kv_heads: 1, head_dim: 4, keys_per_block: 1, dtype: DType::F16, compressed: None };
    let mut equal = Chunk::zeroed(layout, 100);
    (0..100).for_each(|block| equal.put(block, 0, Keys::F16(&[f16::ONE; 4])));
    let scope =
        [Scoped { keys: Arc::new(DocumentKeys::empty(layout).extended([equal])), blocks: 10..100, indexes: None }];
    let found = fast::search(&Query {
        layout,
        layer: 0,
        tokens: 1,
        query_heads: 1,
        queries: &[1.0; 4],
        recent_queries: &[],
        scope: &scope,
        top_k: 3,
        block_score: BlockScore::Max,
        granularity: Granularity::TokenHead,
        softmax_scale: 0.5,
        until: &Until::FOREVER,
    });
    assert_eq!(found.positions, [0, 1, 2]);
    assert!(found.scores.iter().all(|score| (score - (1.0f32 / 90.0).ln()).abs() < 1e-5));
}

/// Many short documents, each of one block that is shorter than others: the score of one is that of its own keys.
#[test]
fn fast_equals_exact_over_many_documents_that_are_all_tail() {
    for (layout, by_channel) in layouts(64, 16) {
        let documents = vec![1; 150];
        Case { layout, by_channel, query_heads: 4, tokens: 1, documents, tails: true, recent: 1, top_k: 4 }.check(13);
    }
}
