//! Pieces of stored K and V, read beside plain reads of the same file and Redis.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use super::error::BenchError;
use super::page_cache::forget_pages;
use super::peers::{self, PeerResult, PeerSettings};
use super::percentile::percentile;
use super::readable::{count, size};
use landmarkdb::store::piece::{KeysLayout, PieceLayout};
use landmarkdb::store::{BlockMeta, BlockRecord, Store, StoreError};
use landmarkdb::{BlockId, CollectionSpec, DType, DocumentId, KeyRule, MemoryError, ModelShape, Rope, Sha256Digest};

/// Pieces of one block: one layer of a model with 8 KV heads.
const PIECES: usize = 8;

/// Blocks appended at once.
const APPEND_BLOCKS: usize = 64;

/// What is stored, and what is read of it.
#[derive(Clone, Debug)]
pub struct PayloadSettings {
    /// N
    pub blocks: usize,
    /// B
    pub block_tokens: usize,
    /// D
    pub head_dim: usize,
    /// Pieces read in one batch: k blocks for each of some heads.
    pub batch: usize,
    /// Batches that are timed.
    pub batches: usize,
    /// Of the bytes, and of the order in which they are read.
    pub seed: u64,
    /// What reads the same bytes in the same minute.
    pub others: PeerSettings,
}

/// What [`payload`] measured.
#[derive(Debug, Serialize)]
pub struct PayloadReport {
    /// Of one piece.
    pub piece_bytes: usize,
    /// Stored.
    pub pieces: usize,
    /// Pieces of a batch.
    pub batch: usize,
    /// Of the bytes, and of the order in which they were read.
    pub seed: u64,
    /// By page cache, way of reading and threads.
    pub results: Vec<PayloadResult>,
    /// By peer and setting.
    pub peers: Vec<PeerResult>,
}

/// One way of reading.
#[derive(Debug, Serialize)]
pub struct PayloadResult {
    /// `store`, `store-ahead` (once a piece is not in memory, the disk is asked for the whole batch, as attention does) or
    /// `pread`.
    pub what: &'static str,
    /// `warm` or `cold`.
    pub pages: &'static str,
    /// That share the pieces of a batch.
    pub threads: usize,
    /// Of a batch.
    pub p50_us: f64,
    /// Of a batch.
    pub p99_us: f64,
    /// At the median.
    pub bytes_per_s: f64,
}

/// One piece, as the store knows it and as it lies in a file.
#[derive(Clone, Copy)]
struct Piece {
    block: BlockId,
    piece: usize,
    /// Of `Stored::files`.
    file: usize,
    offset: u64,
}

/// A store with pieces in it.
struct Stored {
    store: Store,
    files: Vec<File>,
    pieces: Vec<Piece>,
    piece_bytes: usize,
}

/// Stores random pieces in a temporary directory and reads them at random: through the store, by plain reads of its files, and
/// from peers. `say` is told what goes on.
///
/// # Errors
/// Those of the store, of reading its files, and of the peers.
pub fn payload(settings: &PayloadSettings, say: &mut dyn FnMut(&str)) -> Result<PayloadReport, BenchError> {
    let directory = tempfile::Builder::new().prefix("landmarkdb-bench-").tempdir();
    let directory = directory.map_err(|source| BenchError::Io { what: "a temporary directory", source })?;
    let layout = PieceLayout { dtype: DType::F16, tokens: settings.block_tokens, head_dim: settings.head_dim };
    say(&format!("storing {} pieces of {}", count((settings.blocks * PIECES) as u64), size(layout.bytes() as u64)));
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let bytes: Vec<u8> = (0..settings.blocks * PIECES * layout.bytes()).map(|_| rng.random()).collect();
    let stored = Stored::new(directory.path(), layout, &bytes).map_err(MemoryError::from)?;
    let order: Vec<i32> =
        (0..settings.batches * settings.batch).map(|_| rng.random_range(0..stored.pieces.len()) as i32).collect();

    let all = rayon::current_num_threads();
    let mut results = Vec::new();
    for pages in ["warm", "cold"] {
        for (what, threads) in [("store", 1), ("store-ahead", 1), ("pread", 1), ("store", all), ("pread", all)] {
            let mut times_us = Vec::with_capacity(settings.batches);
            for batch in order.chunks_exact(settings.batch) {
                if pages == "cold" {
                    stored.forget_pages()?;
                }
                let begin = Instant::now();
                let read = |into: &mut Vec<u8>, &index: &i32| match what {
                    "store" => stored.read(index as usize, into),
                    _ => stored.pread(index as usize, into),
                };
                match (what, threads) {
                    ("store-ahead", _) => stored.read_ahead(batch, &mut Vec::new())?,
                    (_, 1) => {
                        let mut into = Vec::new();
                        batch.iter().try_for_each(|index| read(&mut into, index))?;
                    }
                    _ => batch.par_iter().try_for_each_init(Vec::new, read)?,
                }
                times_us.push(begin.elapsed().as_secs_f64() * 1e6);
            }
            times_us.sort_by(f64::total_cmp);
            let p50_us = percentile(&times_us, 0.5);
            let batch_bytes = settings.batch * stored.piece_bytes;
            let bytes_per_s = batch_bytes as f64 / p50_us * 1e6;
            results.push(PayloadResult {
                what,
                pages,
                threads,
                p50_us,
                p99_us: percentile(&times_us, 0.99),
                bytes_per_s,
            });
        }
    }
    let peers = match settings.others.peers.as_slice() {
        [] => Vec::new(),
        names => peers::payload(
            &peers::PayloadCase {
                piece_bytes: stored.piece_bytes,
                pieces: stored.pieces.len(),
                batch: settings.batch,
                batches: settings.batches,
                seconds: settings.others.seconds,
                peers: names,
            },
            &bytes,
            &order,
            &settings.others.python,
        )?,
    };
    Ok(PayloadReport {
        piece_bytes: stored.piece_bytes,
        pieces: stored.pieces.len(),
        batch: settings.batch,
        seed: settings.seed,
        results,
        peers,
    })
}

impl Stored {
    fn new(path: &Path, layout: PieceLayout, bytes: &[u8]) -> Result<Self, StoreError> {
        let store = Store::open(path)?;
        let spec = CollectionSpec {
            name: "bench".into(),
            shape: ModelShape {
                layers: 1,
                query_heads: PIECES as u32,
                kv_heads: PIECES as u32,
                head_dim: layout.head_dim as u32,
                block_tokens: layout.tokens as u32,
                rope: Rope::from_base(10_000.0, layout.head_dim / 2 * 2),
                unrotated_layers: Vec::new(),
                softmax_scale: 1.0,
            },
            key_rule: KeyRule::Landmark,
            payload_dtype: layout.dtype,
            key_dtype: DType::F16,
            model_digest: Sha256Digest([0; 32]),
            tokenizer_digest: Sha256Digest([0; 32]),
            model_name: "random".into(),
        };
        let collection = store.create_collection(&spec)?;
        let document = store.create_document(collection, "random")?.id;
        let keys = vec![0; KeysLayout::of(&spec).bytes(false)];
        let blocks: Vec<&[u8]> = bytes.chunks_exact(PIECES * layout.bytes()).collect();
        for (number, blocks) in blocks.chunks(APPEND_BLOCKS).enumerate() {
            let records = blocks.iter().zip(number * APPEND_BLOCKS..).map(|(pieces, index)| BlockRecord {
                index: index as u32,
                meta: BlockMeta {
                    token_ids: vec![0; layout.tokens],
                    text_offsets: vec![0; layout.tokens],
                    ..BlockMeta::default()
                },
                keys: keys.clone(),
                pieces: pieces.to_vec(),
            });
            store.append(document, &records.collect::<Vec<_>>())?;
        }
        Stored::open(path, store, document, layout.bytes(), blocks.len())
    }

    /// Finds every piece in the segment files, for reads that do not go through the store.
    fn open(
        path: &Path,
        store: Store,
        document: DocumentId,
        piece_bytes: usize,
        blocks: usize,
    ) -> Result<Self, StoreError> {
        let mut paths: Vec<PathBuf> = Vec::new();
        let mut pieces = Vec::with_capacity(blocks * PIECES);
        for index in 0..blocks {
            let block = BlockId { document, index: index as u32 };
            for piece in 0..PIECES {
                let (segment, offset) = store.place_of_piece(block, piece)?;
                let file = path.join("segments").join(segment);
                let number = paths.iter().position(|path| *path == file).unwrap_or_else(|| {
                    paths.push(file);
                    paths.len() - 1
                });
                pieces.push(Piece { block, piece, file: number, offset });
            }
        }
        let files = paths.iter().map(File::open).collect::<io::Result<Vec<_>>>();
        let files = files.map_err(|source| StoreError::Io { step: "open a segment", source })?;
        Ok(Stored { store, files, pieces, piece_bytes })
    }

    fn read(&self, index: usize, into: &mut Vec<u8>) -> Result<(), BenchError> {
        let piece = &self.pieces[index];
        Ok(self.store.read_piece(piece.block, piece.piece, into).map_err(MemoryError::from)?)
    }

    fn read_ahead(&self, batch: &[i32], into: &mut Vec<u8>) -> Result<(), BenchError> {
        let mut is_cold = false;
        for &index in batch {
            let piece = &self.pieces[index as usize];
            let at_hand =
                !is_cold && self.store.read_piece_at_hand(piece.block, piece.piece, into).map_err(MemoryError::from)?;
            if !at_hand && !is_cold {
                is_cold = true;
                let pieces = batch.iter().map(|&index| &self.pieces[index as usize]);
                pieces.for_each(|piece| self.store.expect_piece(piece.block, piece.piece));
            }
            if !at_hand {
                self.read(index as usize, into)?;
            }
        }
        Ok(())
    }

    fn pread(&self, index: usize, into: &mut Vec<u8>) -> Result<(), BenchError> {
        let piece = &self.pieces[index];
        into.resize(self.piece_bytes, 0);
        let read = self.files[piece.file].read_exact_at(into, piece.offset);
        read.map_err(|source| BenchError::Io { what: "a plain read", source })
    }

    fn forget_pages(&self) -> Result<(), BenchError> {
        self.files.iter().try_for_each(forget_pages)
    }
}
