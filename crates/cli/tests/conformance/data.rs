//! What is stored? Small models, and texts with random K and V for them.
//!
//! Values are sixty-fourths below 2: f32, f16 and bf16 hold each of them exactly, so that whatever comes back rounded was
//! changed by the service.

use std::ops::Range;

use landmarkdb_grpc::wire::v1;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use v1::{Dtype, KeyRule};

use crate::client::Client;
use crate::suite::Suite;

/// The largest number of a text.
pub(crate) const LARGEST: f64 = 127.0 / 64.0;

/// A model as the service sees it.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// L
    pub(crate) layers: usize,
    /// Hq
    pub(crate) query_heads: usize,
    /// Hkv
    pub(crate) kv_heads: usize,
    /// D
    pub(crate) head_dim: usize,
    /// B
    pub(crate) block_tokens: usize,
    /// Radians per token of each rotated pair.
    pub(crate) frequencies: Vec<f32>,
    pub(crate) scale: f32,
    pub(crate) rule: KeyRule,
    pub(crate) payload: Dtype,
    pub(crate) keys: Dtype,
    /// What the weights' digest is made of.
    pub(crate) weights: Vec<u8>,
}

/// Random K, V, token ids and text.
#[derive(Clone)]
pub(crate) struct Text {
    model: Model,
    pub(crate) ids: Vec<u32>,
    /// (tokens, L, Hkv, D), keys rotated by their offset in the block.
    k: Vec<f32>,
    v: Vec<f32>,
}

/// A collection of a model, and who asks.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) client: Client,
    pub(crate) model: Model,
    pub(crate) collection: u32,
}

pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|number| number.to_le_bytes()).collect()
}

pub(crate) fn values_of(bytes: &[u8]) -> Vec<f32> {
    assert_eq!(bytes.len() % 4, 0, "bytes of f32");
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

impl Model {
    /// L = 2, Hq = 4, Hkv = 2, D = 8 of which 6 rotate, B = 4, token keys.
    pub(crate) fn small() -> Model {
        Model {
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            block_tokens: 4,
            frequencies: (0..3).map(|i| 100f32.powf(-(i as f32) / 3.0)).collect(),
            scale: 8f32.powf(-0.5),
            rule: KeyRule::Tokens,
            payload: Dtype::F16,
            keys: Dtype::F16,
            weights: b"weights of the small model".to_vec(),
        }
    }

    /// Shapes, key rules and dtypes that differ in every respect, by name.
    pub(crate) fn all() -> Vec<(&'static str, Model)> {
        let small = Model::small();
        let frequencies = |pairs: usize| (0..pairs).map(|i| 1000f32.powf(-(i as f32) / pairs as f32)).collect();
        vec![
            ("f16 tokens", small.clone()),
            ("f32 landmark", Model { payload: Dtype::F32, rule: KeyRule::Landmark, ..small.clone() }),
            (
                "bf16 mean, no groups",
                Model {
                    layers: 1,
                    kv_heads: 4,
                    head_dim: 16,
                    block_tokens: 8,
                    frequencies: frequencies(8),
                    payload: Dtype::Bf16,
                    rule: KeyRule::Mean,
                    ..small.clone()
                },
            ),
            (
                "int8 tokens, int8 keys",
                Model {
                    query_heads: 6,
                    head_dim: 12,
                    block_tokens: 3,
                    frequencies: frequencies(6),
                    payload: Dtype::Int8,
                    keys: Dtype::Int8,
                    ..small.clone()
                },
            ),
            (
                "f32 landmark, int8 keys, one head, not rotated",
                Model {
                    layers: 3,
                    query_heads: 1,
                    kv_heads: 1,
                    head_dim: 5,
                    block_tokens: 2,
                    frequencies: Vec::new(),
                    scale: 0.7,
                    payload: Dtype::F32,
                    rule: KeyRule::Landmark,
                    keys: Dtype::Int8,
                    ..small
                },
            ),
        ]
    }

    pub(crate) fn spec(&self, name: &str) -> v1::CollectionSpec {
        v1::CollectionSpec {
            name: name.into(),
            shape: Some(v1::ModelShape {
                layers: self.layers as u32,
                query_heads: self.query_heads as u32,
                kv_heads: self.kv_heads as u32,
                head_dim: self.head_dim as u32,
                block_tokens: self.block_tokens as u32,
                rope_frequencies: bytes_of(&self.frequencies).into(),
                softmax_scale: self.scale,
                unrotated_layers: Vec::new(),
            }),
            key_rule: self.rule.into(),
            payload_dtype: self.payload.into(),
            key_dtype: self.keys.into(),
            model_digest: Sha256::digest(&self.weights).to_vec().into(),
            tokenizer_digest: Sha256::digest(b"tokenizer").to_vec().into(),
            model_name: "random numbers".into(),
        }
    }

    /// Values of K, and of V, of one token.
    pub(crate) fn token_len(&self) -> usize {
        self.layers * self.kv_heads * self.head_dim
    }

    /// (T, Hq, D)
    pub(crate) fn queries(&self, rng: &mut ChaCha8Rng, tokens: usize) -> Vec<f32> {
        (0..tokens * self.query_heads * self.head_dim).map(|_| rng.random_range(-2.0..2.0)).collect()
    }

    /// Whether K and V come back as they went.
    pub(crate) fn is_exact(&self) -> bool {
        self.payload != Dtype::Int8
    }
}

pub(crate) fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

impl Text {
    /// A shorter text of the same seed is the beginning of a longer one.
    pub(crate) fn random(model: &Model, tokens: usize, seed: u64) -> Text {
        let mut rng = seeded(seed);
        let mut text = Text { model: model.clone(), ids: Vec::new(), k: Vec::new(), v: Vec::new() };
        for _ in 0..tokens {
            text.ids.push(rng.random_range(0..50_000));
            for values in [&mut text.k, &mut text.v] {
                values.extend((0..model.token_len()).map(|_| rng.random_range(-127..=127) as f32 / 64.0));
            }
        }
        text
    }

    pub(crate) fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// K and V of one token: (L, Hkv, D).
    pub(crate) fn token(&self, token: usize) -> (&[f32], &[f32]) {
        let count = self.model.token_len();
        (&self.k[token * count..][..count], &self.v[token * count..][..count])
    }

    /// The source text of a token: 0 to 2 bytes.
    fn word(&self, token: usize) -> Vec<u8> {
        (0..token % 3).map(|i| b'a' + ((self.ids[token] as usize + i) % 26) as u8).collect()
    }

    pub(crate) fn source(&self, tokens: Range<usize>) -> v1::BlockText {
        let (mut text, mut offsets) = (Vec::new(), Vec::new());
        for token in tokens.clone() {
            offsets.push(text.len() as u32);
            text.extend(self.word(token));
        }
        let start = (0..tokens.start).map(|token| token as u64 % 3).sum();
        v1::BlockText { start, text: text.into(), offsets }
    }

    /// (L, Hkv, tokens, D)
    fn tensor(&self, of: impl Fn(usize) -> (usize, bool), tokens: usize) -> v1::Tensor {
        let model = &self.model;
        let mut values = Vec::with_capacity(tokens * model.token_len());
        for head in 0..model.layers * model.kv_heads {
            for i in 0..tokens {
                let (token, is_k) = of(i);
                let (k, v) = self.token(token);
                values.extend(&(if is_k { k } else { v })[head * model.head_dim..][..model.head_dim]);
            }
        }
        let shape = [model.layers, model.kv_heads, tokens, model.head_dim].map(|axis| axis as u32);
        v1::Tensor { dtype: Dtype::F32.into(), shape: shape.to_vec(), data: bytes_of(&values).into() }
    }

    /// The block, or part of a block, of these tokens.
    pub(crate) fn block(&self, tokens: Range<usize>) -> v1::NewBlock {
        let count = tokens.len();
        v1::NewBlock {
            index: (tokens.start / self.model.block_tokens) as u32,
            token_ids: self.ids[tokens.clone()].to_vec(),
            text: Some(self.source(tokens.clone())),
            k: Some(self.tensor(|i| (tokens.start + i, true), count)),
            v: Some(self.tensor(|i| (tokens.start + i, false), count)),
        }
    }

    /// Blocks of these tokens, which begin with a block; the last may be a tail.
    pub(crate) fn cut(&self, tokens: Range<usize>) -> Vec<v1::NewBlock> {
        let size = self.model.block_tokens;
        assert_eq!(tokens.start % size, 0, "a batch begins with a block");
        let begins = (tokens.start..tokens.end).step_by(size);
        begins.map(|begin| self.block(begin..(begin + size).min(tokens.end))).collect()
    }

    pub(crate) fn all(&self) -> Vec<v1::NewBlock> {
        self.cut(0..self.tokens())
    }

    /// This text with tokens of K and V in place of its own: what a session that fetched them goes on with.
    pub(crate) fn with_token(&mut self, token: usize, k: &[f32], v: &[f32]) {
        let count = self.model.token_len();
        self.k[token * count..][..count].copy_from_slice(k);
        self.v[token * count..][..count].copy_from_slice(v);
    }
}

impl World {
    /// A new collection of a model.
    pub(crate) fn new(suite: &Suite, client: &Client, model: &Model) -> World {
        let spec = model.spec(&suite.name("collection"));
        let collection = client.collection(&spec).expect("a collection").id;
        World { client: client.clone(), model: model.clone(), collection }
    }

    /// A new document.
    pub(crate) fn open(&self, name: &str) -> u64 {
        self.client.document(self.collection, name).expect("a document").id
    }

    /// A new document with a text in it.
    pub(crate) fn store(&self, name: &str, text: &Text) -> u64 {
        let document = self.open(name);
        for blocks in text.all().chunks(256) {
            self.client.append(document, blocks.to_vec()).expect("an append");
        }
        document
    }

    /// A text that fills so many blocks.
    pub(crate) fn text(&self, blocks: usize, seed: u64) -> Text {
        Text::random(&self.model, blocks * self.model.block_tokens, seed)
    }
}
