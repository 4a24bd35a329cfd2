//! Tests of the store, and what they share: a tiny collection and blocks whose every byte depends on their place.

use std::sync::Arc;

use bytes::Bytes;

use super::fault_disk::FaultDisk;
use super::open::CATALOG_FOLDER;
use super::piece::{KeysLayout, PieceLayout};
use super::record::Locator;
use super::state::Sizes;
use super::*;
use crate::shape::{CollectionSpec, ModelShape, Rope, Sha256Digest};
use crate::types::{BlockId, CollectionId, DType, DocumentId, Engine, KeyRule};

mod crash;
mod cuts;
mod damage;
mod doubt;
mod faults;
mod formats;
mod kept;
mod life;
mod mend;
mod model;
mod pieces;
mod plan;
mod read_only;
mod rebuild;
mod rebuilt;
mod repair;
mod replace;
mod rot;
mod whole;

/// L = 1, Hkv = 2, D = 4, B = 4.
pub(super) fn spec(name: &str) -> CollectionSpec {
    CollectionSpec {
        name: name.into(),
        shape: ModelShape {
            layers: 1,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 4,
            block_tokens: 4,
            rope: Rope::from_base(10_000.0, 4),
            unrotated_layers: Vec::new(),
            softmax_scale: 0.5,
        },
        key_rule: KeyRule::Landmark,
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "model".into(),
    }
}

/// A block with `tokens` tokens; `seed` tells versions of it apart.
fn block(index: u32, tokens: u32, seed: u32) -> BlockRecord {
    let bytes = |count: usize, salt: u32| -> Vec<u8> {
        (0..count as u32).map(|i| (i * 7 + index * 31 + seed * 101 + salt * 13) as u8).collect()
    };
    let layout = PieceLayout { dtype: DType::F16, tokens: tokens as usize, head_dim: 4 };
    BlockRecord {
        index,
        meta: BlockMeta {
            token_ids: (0..tokens).map(|token| seed * 1000 + index * 10 + token).collect(),
            text_start: index as u64 * 8,
            text: bytes(tokens as usize * 2, 1),
            text_offsets: (0..tokens).map(|token| token * 2).collect(),
        },
        keys: if tokens == 4 { bytes(KeysLayout::of(&spec("")).bytes(false), 2) } else { Vec::new() },
        pieces: bytes(2 * layout.bytes(), 3),
    }
}

fn blocks(indices: std::ops::Range<u32>, seed: u32) -> Vec<BlockRecord> {
    indices.map(|index| block(index, 4, seed)).collect()
}

/// Segments so small that a handful of blocks fills one.
const SEGMENT_BYTES: u64 = 2000;
const SIZES: Sizes = Sizes { segment_bytes: SEGMENT_BYTES, group_bytes: 600 };

fn open(disk: &FaultDisk) -> Result<Store, StoreError> {
    disk.reopen();
    Store::open_sized(Box::new(disk.clone()), Arc::new(disk.clone()), SIZES)
}

/// Reads a block back as what was appended.
fn read(store: &Store, id: BlockId) -> Result<BlockRecord, StoreError> {
    let (meta, _) = store.read_meta(id)?;
    let keys = store.read_keys(id)?;
    let mut pieces = Vec::new();
    store.read_pieces(id, &mut pieces)?;
    let mut one = Vec::new();
    for (number, piece) in pieces.chunks_exact(pieces.len() / 2).enumerate() {
        store.read_piece(id, number, &mut one)?;
        assert_eq!(one, piece, "piece {number} of {id} read alone and with the others");
        store.expect_piece(id, number);
        if store.read_piece_at_hand(id, number, &mut one)? {
            assert_eq!(one, piece, "piece {number} of {id} read from memory");
        }
    }
    Ok(BlockRecord { index: id.index, meta, keys, pieces })
}

/// A part of a state, every byte of which depends on its place; `seed` tells versions of it apart.
fn part(number: u32, len: usize, seed: u32) -> Bytes {
    (0..len as u32).map(|i| (i * 3 + number * 41 + seed * 89 + 7) as u8).collect()
}

fn parts(lens: &[usize], seed: u32) -> Vec<Bytes> {
    (0..).zip(lens).map(|(number, &len)| part(number, len, seed)).collect()
}

/// The state of a document: the tokens that it was taken after, and its parts.
fn state(store: &Store, document: DocumentId) -> Result<Option<(u64, Vec<Bytes>)>, StoreError> {
    let Some((state, first)) = store.read_state_part(document, 0)? else { return Ok(None) };
    let mut parts = vec![Bytes::from(first)];
    for part in 1..state.parts {
        let (again, bytes) = store.read_state_part(document, part)?.expect("a state with all of its parts");
        assert_eq!(again, state, "no writer is at work");
        parts.push(bytes.into());
    }
    Ok(Some((state.tokens, parts)))
}

/// A document with its blocks and its state. Sequences differ between stores that hold the same.
type Whole = (Manifest, Vec<BlockRecord>, Option<(u64, Vec<Bytes>)>);

/// All that can be seen through the store's reading calls.
type Contents = Vec<(CollectionId, CollectionEntry, Vec<Whole>)>;

fn try_contents(store: &Store) -> Result<Contents, StoreError> {
    let mut all = Contents::new();
    for (id, entry) in store.collections()? {
        let mut documents = Vec::new();
        for mut manifest in store.manifests(id)? {
            let count = manifest.blocks + (manifest.tail_tokens > 0) as u32;
            let blocks = (0..count).map(|index| read(store, BlockId { document: manifest.id, index }));
            let blocks = blocks.collect::<Result<_, _>>()?;
            let state = state(store, manifest.id)?;
            manifest.state = manifest.state.map(|state| KeptState { sequence: 0, ..state });
            documents.push((manifest, blocks, state));
        }
        all.push((id, entry, documents));
    }
    Ok(all)
}

fn contents(store: &Store) -> Contents {
    try_contents(store).unwrap()
}

/// How much of something a test does: as a variable says, or `default`.
fn number_from(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
}

/// What is wrong, but for torn ends that may have been acknowledged: a disk that writes out of order makes such ends too.
fn faults(store: &Store) -> Result<Vec<Fault>, StoreError> {
    let report = store.verify_rebuild(&mut |_, _| {}, &crate::until::Until::FOREVER)?;
    let is_torn_end = |fault: &Fault| fault.problem.contains("may have been acknowledged");
    Ok(report.faults.into_iter().filter(|fault| !is_torn_end(fault)).collect())
}

fn assert_clean(store: &Store, context: &str) {
    assert_eq!(faults(store).unwrap(), [], "{context}");
}
