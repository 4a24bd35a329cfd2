//! The memory over a real data directory.

mod attend;
mod finite;
mod ingest;
mod keys;
mod lookup;
mod tails;
mod tune;
mod work;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::LocalMemory;
use crate::api::*;
use crate::limits;
use crate::shape::{CollectionSpec, ModelShape, Rope, Sha256Digest};
use crate::types::*;
use crate::until::Until;

/// A spec with L = 2, Hq = 4, Hkv = 2, D = 8 of which 6 rotate, B = 5.
fn spec(name: &str) -> CollectionSpec {
    CollectionSpec {
        name: name.into(),
        shape: ModelShape {
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            block_tokens: 5,
            rope: Rope::from_base(100.0, 6),
            unrotated_layers: Vec::new(),
            softmax_scale: 8f32.powf(-0.5),
        },
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "none".into(),
    }
}

/// Attention over what a lookup chooses, in its simplest kind.
fn attend(lookup: LookupRequest) -> AttendRequest {
    AttendRequest {
        lookup,
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    }
}

/// A memory with one collection, in a directory that goes away with it.
struct World {
    dir: tempfile::TempDir,
    memory: LocalMemory,
    collection: CollectionId,
    spec: CollectionSpec,
    rng: ChaCha8Rng,
}

impl World {
    fn new(spec: CollectionSpec) -> World {
        let dir = tempfile::tempdir().unwrap();
        let memory = LocalMemory::open(dir.path()).unwrap();
        let collection = memory.open_collection(&spec).unwrap().id;
        World { dir, memory, collection, spec, rng: ChaCha8Rng::seed_from_u64(1) }
    }

    /// Closes the data directory and opens it again: nothing is left in memory.
    fn reopened(self) -> World {
        let World { dir, memory, collection, spec, rng } = self;
        drop(memory);
        let memory = LocalMemory::open(dir.path()).unwrap();
        World { dir, memory, collection, spec, rng }
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (0..4).map(|_| self.rng.random_range(-1.0f32..1.0)).sum()).collect()
    }

    /// A random block whose token ids follow from its index.
    fn block(&mut self, index: u32, tokens: u32) -> NewBlock {
        let shape = [self.spec.shape.layers, self.spec.shape.kv_heads, tokens, self.spec.shape.head_dim];
        let count = shape.iter().product::<u32>() as usize;
        let (k, v) = (self.values(count), self.values(count));
        let text = format!("block {index} ").into_bytes();
        NewBlock {
            index,
            token_ids: (0..tokens).map(|token| index * 100 + token).collect(),
            text: BlockText { start: index as u64 * 20, offsets: vec![0; tokens as usize], bytes: text },
            k: Tensor::from_f32(shape.to_vec(), &k),
            v: Tensor::from_f32(shape.to_vec(), &v),
        }
    }

    /// A new document with this many random full blocks.
    fn document(&mut self, name: &str, blocks: u32) -> DocumentId {
        let document = self.memory.open_document(self.collection, name).unwrap().id;
        let tokens = self.spec.shape.block_tokens;
        let blocks: Vec<NewBlock> = (0..blocks).map(|index| self.block(index, tokens)).collect();
        for blocks in blocks.chunks(limits::APPEND_BLOCKS_MAX) {
            self.memory.append(AppendRequest { document, blocks: blocks.to_vec(), expected_tokens: None }).unwrap();
        }
        document
    }

    /// A lookup with random queries at these distances; per token and head, top 3.
    fn request(&mut self, distances: &[u32], scope: Vec<BlockRange>) -> LookupRequest {
        let shape = &self.spec.shape;
        let count = distances.len() * (shape.query_heads * shape.head_dim) as usize;
        LookupRequest {
            collection: self.collection,
            layer: 1,
            queries: self.values(count),
            distances: distances.to_vec(),
            scope,
            top_k: 3,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::TokenHead,
        }
    }
}

fn range(document: DocumentId, blocks: std::ops::Range<u32>) -> BlockRange {
    BlockRange { document, blocks }
}

/// `head` as it is at an absolute position, in double precision.
fn at_position(rope: &Rope, head: &[f32], position: i64) -> Vec<f64> {
    let mut rotated: Vec<f64> = head.iter().map(|&number| number as f64).collect();
    let half = rope.frequencies.len();
    for (i, &frequency) in rope.frequencies.iter().enumerate() {
        let (sin, cos) = (frequency as f64 * position as f64).sin_cos();
        let (a, b) = (rotated[i], rotated[i + half]);
        (rotated[i], rotated[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
    rotated
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn log_sum_exp(values: &[f64]) -> f64 {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY { top } else { top + values.iter().map(|n| (n - top).exp()).sum::<f64>().ln() }
}

/// K or V of one block as it was stored, for one layer and KV head: `(tokens, D)`.
fn head_rows<'a>(tensor: &'a [f32], shape: &ModelShape, layer: usize, kv_head: usize) -> Vec<&'a [f32]> {
    let dim = shape.head_dim as usize;
    let piece = tensor.len() / shape.pieces();
    tensor[(layer * shape.kv_heads as usize + kv_head) * piece..][..piece].chunks_exact(dim).collect()
}

/// Reads blocks back in f32.
fn fetch(memory: &LocalMemory, document: DocumentId, blocks: Vec<u32>) -> Vec<StoredBlock> {
    memory.fetch(&FetchRequest { document, blocks, dtype: DType::F32 }).unwrap()
}
