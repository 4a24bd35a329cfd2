//! What a lookup benchmark asks, and of which keys: a model's shape with random values, or what a model really asked.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::error::BenchError;
use crate::eval::Capture;
use landmarkdb::{
    AppendRequest, BlockMemory, BlockRange, BlockScore, BlockText, CollectionId, CollectionSpec, DType, DocumentInfo,
    Granularity, KeyRule, LookupRequest, MemoryError, ModelShape, NewBlock, Rope, Sha256Digest, Tensor, words,
};

/// Layers that take turns, so that keys come from memory and not from a cache.
const LAYERS: usize = 8;

/// Bytes of one layer's keys in f32 above which one layer is enough for that.
const LARGE_LAYER_BYTES: usize = 256 << 20;

/// Lookups that are different from each other.
const ASKED: usize = 64;

/// Blocks appended in one request while a memory is filled.
const APPEND_BLOCKS: usize = 256;

/// A model's layer and a text's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// SmolLM2-135M, 32,768 tokens.
    Smollm2Short,
    /// SmolLM2-135M, a million tokens.
    Smollm2Million,
    /// Llama 3 8B, 131,072 tokens.
    Llama3Short,
    /// Llama 3 8B, a million tokens.
    Llama3Million,
}

words!(
    Shape,
    "smollm2-32k" => Smollm2Short,
    "smollm2-1m" => Smollm2Million,
    "llama3-8b-128k" => Llama3Short,
    "llama3-8b-1m" => Llama3Million,
);

/// Sizes of a random case.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// N
    pub blocks: usize,
    /// Hkv
    pub kv_heads: usize,
    /// Hq
    pub query_heads: usize,
    /// D
    pub head_dim: usize,
    /// m: 1 (one key per block) or more (the token keys of blocks of that many tokens).
    pub keys_per_block: usize,
}

/// What is searched, and with which queries.
#[derive(Clone, Debug)]
pub enum Keys {
    /// Random keys and queries, named by a shape that the sizes may differ from.
    Random {
        /// Names the case.
        shape: Shape,
        /// Sizes of the keys and queries; those of `shape` itself are [`Shape::sizes`].
        sizes: Sizes,
    },
    /// A file that holds a [`Capture`].
    Captured(PathBuf),
}

impl Shape {
    /// Blocks are of 64 tokens. SmolLM2 is retrieved from by its token keys, Llama as if it had landmarks.
    pub fn sizes(self) -> Sizes {
        let smollm2 = Sizes { blocks: 512, kv_heads: 3, query_heads: 9, head_dim: 64, keys_per_block: 64 };
        let llama3 = Sizes { blocks: 2048, kv_heads: 8, query_heads: 32, head_dim: 128, keys_per_block: 1 };
        match self {
            Shape::Smollm2Short => smollm2,
            Shape::Smollm2Million => Sizes { blocks: 16_384, ..smollm2 },
            Shape::Llama3Short => llama3,
            Shape::Llama3Million => Sizes { blocks: 16_384, ..llama3 },
        }
    }
}

/// Keys, and lookups in them.
pub(super) struct Case {
    pub(super) name: String,
    /// Its layers are those of the case.
    pub(super) shape: ModelShape,
    pub(super) key_rule: KeyRule,
    pub(super) blocks: usize,
    /// By layer, `(Hkv, N * m, D)`.
    pub(super) keys: Vec<Vec<f32>>,
    pub(super) asked: Vec<Asked>,
}

/// What is right for one query head: its k best blocks, and those that single precision cannot tell from the last of them.
pub(super) struct Truth {
    pub(super) as_good: Vec<u32>,
}

/// Part of a score that is rounding: sums of some dozens of products in single precision.
const TIE: f64 = 1e-6;

/// One lookup.
pub(super) struct Asked {
    pub(super) layer: usize,
    /// `(T, Hq, D)`, before RoPE.
    pub(super) queries: Vec<f32>,
    /// `(T)`
    pub(super) distances: Vec<u32>,
}

impl Case {
    /// The keys, and lookups of `query_tokens` (T) each; random ones by a seed.
    pub(super) fn new(keys: &Keys, query_tokens: usize, seed: u64) -> Result<Self, BenchError> {
        match keys {
            Keys::Random { shape, sizes } => Ok(Case::random(format!("{shape}, random"), *sizes, query_tokens, seed)),
            Keys::Captured(path) => Case::captured(path, query_tokens),
        }
    }

    /// Random values: `q . k` has a standard deviation of 3, much as in a model, and keys are f16 as in a model's cache.
    fn random(name: String, sizes: Sizes, query_tokens: usize, seed: u64) -> Self {
        let Sizes { blocks, kv_heads, query_heads, head_dim, keys_per_block } = sizes;
        let layer_len = kv_heads * blocks * keys_per_block * head_dim;
        let layers = if layer_len * 4 > LARGE_LAYER_BYTES { 1 } else { LAYERS };
        let keys = (0..layers).into_par_iter().map(|layer| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed + 1 + layer as u64);
            (0..layer_len).map(|_| f16::from_f32(rng.random_range(-1.0..1.0)).to_f32()).collect()
        });
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let asked = |index: usize| Asked {
            layer: index % layers,
            queries: (0..query_tokens * query_heads * head_dim).map(|_| rng.random_range(-9.0..9.0)).collect(),
            distances: (0..query_tokens as u32).collect(),
        };
        Case {
            name,
            shape: ModelShape {
                layers: layers as u32,
                query_heads: query_heads as u32,
                kv_heads: kv_heads as u32,
                head_dim: head_dim as u32,
                // A lookup reads no payload, so blocks with one key have as few tokens as a block may have.
                block_tokens: keys_per_block.max(2) as u32,
                rope: Rope::from_base(500_000.0, head_dim / 2 * 2),
                unrotated_layers: Vec::new(),
                softmax_scale: (head_dim as f32).powf(-0.5),
            },
            key_rule: if keys_per_block == 1 { KeyRule::Landmark } else { KeyRule::Tokens },
            blocks,
            keys: keys.collect(),
            asked: (0..ASKED.div_ceil(query_tokens).max(LAYERS)).map(asked).collect(),
        }
        .stored()
    }

    /// With the keys that a memory keeps: see [`KeyRule::Tokens`] for the document's first.
    fn stored(mut self) -> Self {
        if self.key_rule == KeyRule::Tokens {
            let (dim, per_head) = (self.shape.head_dim as usize, self.blocks * self.keys_per_block());
            let heads = self.keys.iter_mut().flat_map(|keys| keys.chunks_exact_mut(per_head * dim));
            heads.for_each(|keys| keys.copy_within(dim..2 * dim, 0));
        }
        self
    }

    /// What a [`Capture`] holds. Queries of consecutive tokens go together.
    fn captured(path: &Path, query_tokens: usize) -> Result<Self, BenchError> {
        let invalid = |expected: &dyn Display, found: &dyn Display| {
            let (expected, found) = (expected.to_string(), found.to_string());
            BenchError::Memory(MemoryError::Invalid { field: "captured".into(), expected, found })
        };
        let Capture { about, k, queries, distances } = Capture::load(path)?;
        let shape = about.shape;
        let [kv_heads, dim, tokens] = [shape.kv_heads, shape.head_dim, shape.block_tokens].map(|n| n as usize);
        let blocks = about.blocks as usize;
        let of_block = match about.key_rule {
            KeyRule::Tokens => 0..tokens,
            KeyRule::Landmark => tokens - 1..tokens,
            KeyRule::Mean => return Err(invalid(&"keys of tokens or landmarks", &"means")),
        };
        if distances.len() < query_tokens {
            // A model that sees the whole text in its window asks nothing.
            let expected = format!("queries of at least {query_tokens} tokens: capture a text longer than the window");
            return Err(invalid(&expected, &distances.len()));
        }
        let keys = k.iter().map(|k| {
            let piece = |block: usize, head: usize| &k[(block * kv_heads + head) * tokens * dim..][..tokens * dim];
            let rows = (0..kv_heads).flat_map(|head| (0..blocks).map(move |block| (head, block)));
            let wanted = of_block.start * dim..of_block.end * dim;
            rows.flat_map(|(head, block)| piece(block, head)[wanted.clone()].iter().map(|half| half.to_f32())).collect()
        });
        let row = (shape.query_heads * shape.head_dim) as usize;
        let groups = distances.len() / query_tokens;
        let asked = (0..groups * queries.len()).map(|index| {
            let (layer, first) = (index % queries.len(), index / queries.len() * query_tokens);
            Asked {
                layer,
                queries: queries[layer][first * row..][..query_tokens * row].to_vec(),
                distances: distances[first..first + query_tokens].to_vec(),
            }
        });
        Ok(Case {
            name: format!("{}, captured", about.model),
            key_rule: about.key_rule,
            blocks,
            keys: keys.collect(),
            asked: asked.collect(),
            shape,
        }
        .stored())
    }

    /// m
    pub(super) fn keys_per_block(&self) -> usize {
        self.shape.keys_per_block(self.key_rule)
    }

    pub(super) fn spec(&self, name: &str, key_dtype: DType) -> CollectionSpec {
        CollectionSpec {
            name: name.into(),
            shape: self.shape.clone(),
            key_rule: self.key_rule,
            payload_dtype: DType::Int8,
            key_dtype,
            model_digest: Sha256Digest([0; 32]),
            tokenizer_digest: Sha256Digest([0; 32]),
            model_name: self.name.clone(),
        }
    }

    /// Appends the keys as blocks of a new document; tokens without a key have none that counts, and values are random.
    pub(super) fn fill(
        &self,
        memory: &dyn BlockMemory,
        collection: CollectionId,
        key_dtype: DType,
    ) -> Result<DocumentInfo, BenchError> {
        let mut document = memory.open_document(collection, &key_dtype.to_string())?;
        let shape = &self.shape;
        let dims = vec![shape.layers, shape.kv_heads, shape.block_tokens, shape.head_dim];
        let [kv_heads, tokens, dim] = [shape.kv_heads, shape.block_tokens, shape.head_dim].map(|n| n as usize);
        let (piece, m) = (tokens * dim, self.keys_per_block());
        let block_len = self.keys.len() * kv_heads * piece;
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let values: Vec<f32> = (0..block_len + 65_536).map(|_| rng.random_range(-1.0..1.0)).collect();
        let text = BlockText { start: 0, bytes: Vec::new(), offsets: vec![0; tokens] };
        for first in (0..self.blocks).step_by(APPEND_BLOCKS) {
            let blocks = (first..self.blocks.min(first + APPEND_BLOCKS)).map(|block| {
                let mut k = vec![0.0; block_len];
                for (i, piece) in k.chunks_exact_mut(piece).enumerate() {
                    let (layer, head) = (i / kv_heads, i % kv_heads);
                    let keys = &self.keys[layer][(head * self.blocks + block) * m * dim..][..m * dim];
                    piece[(tokens - m) * dim..].copy_from_slice(keys);
                }
                let from = block * 97 % 65_536;
                NewBlock {
                    index: block as u32,
                    token_ids: vec![0; tokens],
                    text: text.clone(),
                    k: Tensor::from_f32(dims.clone(), &k),
                    v: Tensor::from_f32(dims.clone(), &values[from..from + block_len]),
                }
            });
            document = memory.append(AppendRequest {
                document: document.id,
                blocks: blocks.collect(),
                expected_tokens: None,
            })?;
        }
        Ok(document)
    }

    /// A request for the `index`-th lookup. The text goes on elsewhere, so that all blocks are scored in one place.
    pub(super) fn request(&self, document: &DocumentInfo, index: usize, asking: Asking) -> LookupRequest {
        let asked = &self.asked[index % self.asked.len()];
        let blocks = self.blocks as u32;
        LookupRequest {
            collection: document.collection,
            layer: asked.layer as u32,
            queries: asked.queries.clone(),
            distances: asked.distances.clone(),
            scope: [0..blocks, blocks..blocks].map(|blocks| BlockRange { document: document.id, blocks }).to_vec(),
            top_k: asking.top_k,
            block_score: asking.block_score,
            granularity: asking.granularity,
        }
    }

    /// The queries `(T, Hq, D)` of the `index`-th lookup, rotated to the slot in which all blocks are scored.
    pub(super) fn rotated(&self, index: usize, top_k: u32) -> Vec<f32> {
        let asked = &self.asked[index];
        let slots = top_k.min(self.blocks as u32) + 1;
        let mut queries = asked.queries.clone();
        let row = (self.shape.query_heads * self.shape.head_dim) as usize;
        for (token, &distance) in queries.chunks_exact_mut(row).zip(&asked.distances) {
            let rotation = self.shape.rope.rotation((distance + slots * self.shape.block_tokens) as i64);
            token.chunks_exact_mut(self.shape.head_dim as usize).for_each(|head| rotation.apply(head));
        }
        queries
    }

    /// The best blocks of every query head `(T, Hq)` of the `index`-th lookup by their best key: plain loops in double
    /// precision over the keys as they were before they were stored.
    pub(super) fn truth(&self, index: usize, top_k: u32) -> Vec<Truth> {
        let [query_heads, kv_heads, dim] =
            [self.shape.query_heads, self.shape.kv_heads, self.shape.head_dim].map(|n| n as usize);
        let (keys, m) = (&self.keys[self.asked[index].layer], self.keys_per_block());
        let queries = self.rotated(index, top_k);
        let best = queries.par_chunks_exact(dim).enumerate().map(|(row, query)| {
            let head = row % query_heads / (query_heads / kv_heads);
            let of_head = &keys[head * self.blocks * m * dim..][..self.blocks * m * dim];
            let mut scores: Vec<(f64, u32)> = of_head
                .chunks_exact(m * dim)
                .zip(0..)
                .map(|(block, index)| {
                    let product = |key: &[f32]| key.iter().zip(query).map(|(k, q)| *k as f64 * *q as f64).sum();
                    (block.chunks_exact(dim).map(product).fold(f64::NEG_INFINITY, f64::max), index)
                })
                .collect();
            scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let least = scores[..scores.len().min(top_k as usize)].last().map_or(0.0, |(score, _)| *score);
            let tie = least - least.abs() * TIE;
            Truth { as_good: scores.iter().take_while(|(score, _)| *score >= tie).map(|(_, block)| *block).collect() }
        });
        best.collect()
    }
}

/// How blocks are scored and chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asking {
    pub(super) top_k: u32,
    pub(super) block_score: BlockScore,
    pub(super) granularity: Granularity,
}
