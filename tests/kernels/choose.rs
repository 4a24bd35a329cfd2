//! Choices against `index::exact`, which is given the same stored values.

use std::sync::Arc;

use half::f16;
use landmarkdb::cuda::{Choice, Chosen, HostKeys, Keys, PANEL, Runner, Span, choose};
use landmarkdb::index::{Chunk, DocumentKeys, Found, KeyLayout, Keys as ExactKeys, Query, Scoped, exact};
use landmarkdb::{BlockScore, DType, Granularity, Until};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Both read the same stored values, so only the order of f32 sums differs, for scores of up to about 20.
const TOLERANCE_F16: f64 = 1e-4;
const TOLERANCE_INT8: f64 = 1e-4;

const GRANULARITIES: [Granularity; 5] =
    [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];

const BLOCK_SCORES: [BlockScore; 2] = [BlockScore::Max, BlockScore::LogSumExp];

/// One random lookup in documents of these many blocks each, at the last of two layers.
#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    head_dim: usize,
    keys_per_block: usize,
    kv_heads: usize,
    /// G
    group: usize,
    tokens: usize,
    documents: Vec<usize>,
    recent: usize,
    top_k: usize,
}

/// Keys of all documents, for the kernels and for the definition.
struct Stored<M> {
    keys: Vec<StoredKeys<M>>,
    scope: Vec<Scoped>,
}

/// Keys of one document.
struct StoredKeys<M> {
    of_full: Keys<M>,
    /// With their number.
    of_tail: Option<(Keys<M>, u32)>,
}

fn gaussian(rng: &mut ChaCha8Rng) -> f32 {
    (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.7
}

impl Case {
    fn layout(&self) -> KeyLayout {
        let Case { dtype, head_dim, keys_per_block, kv_heads, .. } = *self;
        KeyLayout { layers: 2, kv_heads, head_dim, keys_per_block, dtype, compressed: None }
    }

    fn store<R: Runner<Error: std::fmt::Debug>>(&self, runner: &R, rng: &mut ChaCha8Rng) -> Stored<R::Memory> {
        let layout = self.layout();
        let mut stored = Stored { keys: vec![], scope: vec![] };
        for &wanted in &self.documents {
            // Blocks before and after the range make sure that only the range counts. The last may be a tail, of fewer keys.
            let (before, tail) = (rng.random_range(0..40), wanted > 0 && rng.random_bool(0.5));
            let after = if tail { 0 } else { rng.random_range(0..3) };
            let (chunk, of_full) = self.keys(runner, rng, layout, before + wanted + after - tail as usize);
            let mut keys = DocumentKeys::empty(layout).extended((chunk.blocks() > 0).then_some(chunk));
            let mut of_tail = None;
            if tail {
                let layout = layout.of_tail(rng.random_range(1..=self.keys_per_block));
                let (chunk, on_gpu) = self.keys(runner, rng, layout, 1);
                keys = keys.with_tail(chunk);
                of_tail = Some((on_gpu, layout.keys_per_block as u32));
            }
            stored.keys.push(StoredKeys { of_full, of_tail });
            let blocks = before as u32..(before + wanted) as u32;
            stored.scope.push(Scoped { keys: Arc::new(keys), blocks, indexes: None });
        }
        stored
    }

    /// Random keys of some blocks.
    fn keys<R: Runner<Error: std::fmt::Debug>>(
        &self,
        runner: &R,
        rng: &mut ChaCha8Rng,
        layout: KeyLayout,
        blocks: usize,
    ) -> (Chunk, Keys<R::Memory>) {
        let (dim, m) = (self.head_dim, layout.keys_per_block);
        let piece_panels = (blocks * m).div_ceil(PANEL);
        let panels = layout.pieces() * piece_panels;
        let mut halves = vec![f16::NAN; panels * dim * PANEL];
        let (mut bytes, mut all_scales) = (vec![i8::MAX; panels * dim * PANEL], vec![f32::NAN; panels * PANEL]);
        let mut chunk = Chunk::zeroed(layout, blocks);
        for piece in 0..layout.pieces() {
            for block in 0..blocks {
                let place = |key: usize| {
                    let key = block * m + key;
                    let panel = piece * piece_panels + key / PANEL;
                    (panel * dim * PANEL + key % PANEL, panel * PANEL + key % PANEL)
                };
                if self.dtype == DType::Int8 {
                    let values: Vec<i8> = (0..m * dim).map(|_| rng.random_range(-127i8..=127)).collect();
                    let scales: Vec<f32> = (0..m).map(|_| rng.random_range(0.002..0.02)).collect();
                    for key in 0..m {
                        let (at, scale_at) = place(key);
                        (0..dim).for_each(|d| bytes[at + d * PANEL] = values[key * dim + d]);
                        all_scales[scale_at] = scales[key];
                    }
                    chunk.put(block, piece, ExactKeys::Int8 { values: &values, scales: &scales });
                } else {
                    let values: Vec<f16> = (0..m * dim).map(|_| f16::from_f32(gaussian(rng))).collect();
                    for key in 0..m {
                        let (at, _) = place(key);
                        (0..dim).for_each(|d| halves[at + d * PANEL] = values[key * dim + d]);
                    }
                    chunk.put(block, piece, ExactKeys::F16(&values));
                }
            }
        }
        let panels = match self.dtype {
            DType::Int8 => HostKeys::Int8 { values: &bytes, scales: &all_scales },
            _ => HostKeys::F16(&halves),
        };
        (chunk, Keys::upload(runner, panels, dim, layout.pieces()).unwrap())
    }

    /// Recent blocks are spans of one block, each with queries of its own; so is a tail, with keys of its own.
    fn spans<'a, M>(&self, stored: &'a Stored<M>) -> Vec<Span<'a, M>> {
        let older = self.documents.iter().sum::<usize>() - self.recent;
        let mut spans = Vec::new();
        let mut position = 0;
        for (scoped, StoredKeys { of_full, of_tail }) in stored.scope.iter().zip(&stored.keys) {
            let keys_per_block = self.keys_per_block as u32;
            let full_end = scoped.blocks.end - of_tail.is_some() as u32;
            let first_recent = full_end.min(scoped.blocks.start + older.saturating_sub(position) as u32);
            spans.push(Span { keys: of_full, keys_per_block, blocks: scoped.blocks.start..first_recent, set: 0 });
            position += first_recent as usize - scoped.blocks.start as usize;
            let set_at = |position: usize| if position < older { 0 } else { (1 + position - older) as u32 };
            for block in first_recent..full_end {
                spans.push(Span { keys: of_full, keys_per_block, blocks: block..block + 1, set: set_at(position) });
                position += 1;
            }
            if let Some((keys, keys_per_block)) = of_tail {
                spans.push(Span { keys, keys_per_block: *keys_per_block, blocks: 0..1, set: set_at(position) });
                position += 1;
            }
        }
        spans
    }

    fn check<R: Runner<Error: std::fmt::Debug>>(&self, runner: &R, granularities: &[Granularity]) {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let stored = self.store(runner, &mut rng);
        let query_heads = self.kv_heads * self.group;
        let set_len = self.tokens * query_heads * self.head_dim;
        let queries: Vec<f32> = (0..(1 + self.recent) * set_len).map(|_| gaussian(&mut rng)).collect();
        let spans = self.spans(&stored);
        for &granularity in granularities {
            for block_score in BLOCK_SCORES {
                let softmax_scale = (self.head_dim as f32).powf(-0.5);
                let choice = Choice {
                    layer: 1,
                    tokens: self.tokens as u32,
                    query_heads: query_heads as u32,
                    kv_heads: self.kv_heads as u32,
                    head_dim: self.head_dim,
                    dtype: self.dtype,
                    queries: &queries,
                    spans: &spans,
                    top_k: self.top_k as u32,
                    block_score,
                    granularity,
                    softmax_scale,
                };
                // Asked for all blocks, the definition says the score of each.
                let query = Query {
                    layout: self.layout(),
                    layer: 1,
                    tokens: self.tokens,
                    query_heads,
                    queries: &queries[..set_len],
                    recent_queries: &queries[set_len..],
                    scope: &stored.scope,
                    top_k: usize::MAX,
                    block_score,
                    granularity,
                    softmax_scale,
                    until: &Until::FOREVER,
                };
                self.compare(&exact::search(&query), &choose(runner, &choice).unwrap());
            }
        }
    }

    fn compare(&self, all: &Found, got: &Chosen) {
        let tolerance = if self.dtype == DType::Int8 { TOLERANCE_INT8 } else { TOLERANCE_F16 };
        let k = self.top_k.min(all.k);
        assert_eq!((got.rows, got.k), (all.rows, k), "{self:?}");
        assert_eq!((got.positions.len(), got.scores.len()), (all.rows * k, all.rows * k), "{self:?}");
        if k == 0 {
            return;
        }
        let rows = got.positions.chunks_exact(k).zip(got.scores.chunks_exact(k));
        for ((positions, scores), all) in rows.zip(all.scores.chunks_exact(all.k)) {
            assert!(positions.is_sorted_by(|a, b| a < b), "document order, no block twice: {positions:?}, {self:?}");
            let mut best = all.to_vec();
            best.sort_by(|a, b| b.total_cmp(a));
            let worst = best[k - 1] as f64;
            for (&position, &score) in positions.iter().zip(scores) {
                let exact = all[position as usize] as f64;
                assert!((score as f64 - exact).abs() < tolerance, "{position}: {score} for {exact}, {self:?}");
                assert!(exact >= worst - tolerance, "{position} of {positions:?} is not among the best, {self:?}");
            }
        }
    }
}

/// Every edge of the number of blocks and of k, with and without recent blocks.
pub fn edges<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    let k = 4;
    for (dtype, keys_per_block) in [(DType::F16, 1), (DType::F16, 17), (DType::Int8, 1), (DType::Int8, 17)] {
        for blocks in [0, 1, k - 1, k, k + 1, 70] {
            for recent in [0, blocks.min(k) / 2, blocks.min(k)] {
                let case = Case {
                    dtype,
                    head_dim: 16,
                    keys_per_block,
                    kv_heads: 2,
                    group: 2,
                    tokens: 2,
                    documents: vec![blocks],
                    recent,
                    top_k: k,
                };
                case.check(runner, &GRANULARITIES);
            }
        }
    }
}

/// Every head dim, number of keys and size of a group; rows that fill a strip, and that do not; several documents.
pub fn shapes<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    for (i, head_dim) in [1, 64, 80, 128, 256].into_iter().enumerate() {
        for (j, keys_per_block) in [1, 17, 64].into_iter().enumerate() {
            for dtype in [DType::F16, DType::Int8] {
                let group = (3 * i + j + if dtype == DType::F16 { 0 } else { 4 }) % 8 + 1;
                let case = Case {
                    dtype,
                    head_dim,
                    keys_per_block,
                    kv_heads: 1 + j % 2,
                    group,
                    tokens: 1 + i % 3,
                    documents: vec![9, 0, 11],
                    recent: 2,
                    top_k: 3,
                };
                case.check(runner, &[GRANULARITIES[(i + j) % 5]]);
            }
        }
    }
}

/// More blocks than a tile or a slice holds, more chosen than a queue holds before it is cut, and blocks larger than a
/// tile.
pub fn sizes<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    for (dtype, keys_per_block, blocks, top_k) in [
        (DType::F16, 1, 5000, 8),
        (DType::Int8, 1, 2500, 64),
        (DType::F16, 1, 2500, 1024),
        (DType::Int8, 64, 1500, 7),
        (DType::Int8, 600, 3, 2),
    ] {
        let documents = vec![blocks / 3, blocks - blocks / 3];
        let case =
            Case { dtype, head_dim: 8, keys_per_block, kv_heads: 1, group: 2, tokens: 1, documents, recent: 1, top_k };
        case.check(runner, &[Granularity::TokenHead, Granularity::KvGroup]);
    }
}

/// One lookup of one head in f16 keys of one layer, D = 4.
fn plain<'a, M>(queries: &'a [f32], spans: &'a [Span<'a, M>], top_k: u32) -> Choice<'a, M> {
    Choice {
        layer: 0,
        tokens: 1,
        query_heads: 1,
        kv_heads: 1,
        head_dim: 4,
        dtype: DType::F16,
        queries,
        spans,
        top_k,
        block_score: BlockScore::Max,
        granularity: Granularity::TokenHead,
        softmax_scale: 0.5,
    }
}

/// Equal keys, in several tiles and slices.
pub fn ties<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    let blocks = 3000usize;
    let values = vec![f16::ONE; blocks.next_multiple_of(PANEL) * 4];
    let keys = Keys::upload(runner, HostKeys::F16(&values), 4, 1).unwrap();
    let spans = [Span { keys: &keys, keys_per_block: 1, blocks: 10..blocks as u32, set: 0 }];
    let chosen = choose(runner, &plain(&[1.0; 4], &spans, 3)).unwrap();
    assert_eq!(chosen.positions, [0, 1, 2]);
    assert!(chosen.scores.iter().all(|score| (score - (1.0f32 / 2990.0).ln()).abs() < 1e-5));
}

/// What would read beyond its memory is refused before anything runs.
pub fn refusals<R: Runner<Error: std::fmt::Debug>>(runner: &R) {
    let halves = vec![f16::ONE; 2 * PANEL * 5];
    let keys = Keys::upload(runner, HostKeys::F16(&halves[..2 * PANEL * 4]), 4, 1).unwrap();
    let wider = Keys::upload(runner, HostKeys::F16(&halves), 5, 1).unwrap();
    let (values, scales) = (&[1; 2 * PANEL * 4], &[1.0; 2 * PANEL]);
    let bytes = Keys::upload(runner, HostKeys::Int8 { values, scales }, 4, 1).unwrap();
    let refused = |keys: &Keys<R::Memory>, blocks, set, query_len: usize, layer: u32, top_k: u32| {
        let (queries, spans) = (vec![1.0; query_len], [Span { keys, keys_per_block: 1, blocks, set }]);
        choose(runner, &Choice { layer, ..plain(&queries, &spans, top_k) }).is_err()
    };
    assert!(!refused(&keys, 0..128, 0, 4, 0, 5));
    assert!(refused(&keys, 0..128, 0, 4, 1, 5), "a layer beyond the last");
    assert!(refused(&keys, 0..128, 0, 6, 0, 5), "a query that is cut off");
    assert!(refused(&keys, 0..128, 0, 4, 0, 1025), "more than can be chosen");
    assert!(refused(&keys, 100..129, 0, 4, 0, 5), "keys beyond the piece");
    assert!(refused(&keys, 0..128, 1, 4, 0, 5), "queries that are not there");
    let of_two = |blocks, keys_per_block| {
        let spans = [Span { keys: &keys, keys_per_block, blocks, set: 0 }];
        choose(runner, &plain(&[1.0; 4], &spans, 5)).is_err()
    };
    assert!(!of_two(0..64, 2) && of_two(0..65, 2), "keys of a block beyond the piece");
    assert!(of_two(0..64, 0) && of_two(0..1, 1025), "a number of keys that no block has");
    assert!(refused(&wider, 0..128, 0, 4, 0, 5), "keys of another head dim");
    assert!(refused(&bytes, 0..128, 0, 4, 0, 5), "keys of another dtype");
    assert!(Keys::upload(runner, HostKeys::F16(&[f16::ONE; 70]), 1, 1).is_err(), "part of a panel");
    assert!(Keys::upload(runner, HostKeys::F16(&halves[..3 * PANEL]), 1, 2).is_err(), "panels that no piece has");
    assert!(Keys::upload(runner, HostKeys::F16(&[]), 257, 1).is_err(), "a head dim that is too large");
}
