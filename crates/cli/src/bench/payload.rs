//! `landmarkdb bench payload`: pieces of stored K and V, read beside plain reads of the same file and Redis.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use super::peers::{self, PeerArgs, PeerResult};
use crate::Context;
use crate::bench::forget_pages;
use crate::error::CliError;
use crate::output::{Report, count, plain_table, size, write_table};
use landmarkdb::api::MemoryError;
use landmarkdb::shape::{CollectionSpec, ModelShape, Rope, Sha256Digest};
use landmarkdb::store::piece::{KeysLayout, PieceLayout};
use landmarkdb::store::{BlockMeta, BlockRecord, Store, StoreError};
use landmarkdb::types::{BlockId, DType, DocumentId, KeyRule};
use landmarkdb_lab::bench::percentile;

/// Pieces of one block: one layer of a model with 8 KV heads.
const PIECES: usize = 8;

/// Blocks appended at once.
const APPEND_BLOCKS: usize = 64;

/// Measure how fast pieces (K and V of one block, layer and KV head) come from the store, checked.
///
/// Beside it stand positioned reads of the same bytes from the same files, unchecked, and with --peers Redis. Warm reads come
/// from the page cache; before cold ones it is emptied of the files.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb bench payload
  landmarkdb bench payload --blocks 2048 --head-dim 64 --peers redis --json
")]
pub(crate) struct Args {
    #[arg(long, default_value_t = 512)]
    blocks: usize,

    #[arg(long, default_value_t = 64)]
    block_tokens: usize,

    #[arg(long, default_value_t = 128)]
    head_dim: usize,

    /// Pieces read in one batch: k blocks for each of some heads.
    #[arg(long, default_value_t = 32)]
    batch: usize,

    /// Batches that are timed.
    #[arg(long, default_value_t = 200)]
    batches: usize,

    #[command(flatten)]
    others: PeerArgs,

    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct PayloadReport {
    piece_bytes: usize,
    pieces: usize,
    pub(super) batch: usize,
    seed: u64,
    pub(super) results: Vec<PayloadResult>,
    pub(super) peers: Vec<PeerResult>,
}

#[derive(Debug, Serialize)]
pub(super) struct PayloadResult {
    /// `store`, `store-ahead` (once a piece is not in memory, the disk is asked for the whole batch, as attention does) or
    /// `pread`.
    pub(super) what: &'static str,
    /// `warm` or `cold`.
    pub(super) pages: &'static str,
    pub(super) threads: usize,
    /// Of a batch.
    pub(super) p50_us: f64,
    p99_us: f64,
    bytes_per_s: f64,
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

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    context.output.print(&measure(args, context)?)
}

pub(super) fn measure(args: &Args, context: &Context) -> Result<PayloadReport, CliError> {
    let directory = tempfile::Builder::new().prefix("landmarkdb-bench-").tempdir();
    let directory = directory.map_err(|source| CliError::Io { what: "a temporary directory", source })?;
    let layout = PieceLayout { dtype: DType::F16, tokens: args.block_tokens, head_dim: args.head_dim };
    context.output.say(&format!(
        "storing {} pieces of {}",
        count((args.blocks * PIECES) as u64),
        size(layout.bytes() as u64)
    ));
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let bytes: Vec<u8> = (0..args.blocks * PIECES * layout.bytes()).map(|_| rng.random()).collect();
    let stored = Stored::new(directory.path(), layout, &bytes).map_err(MemoryError::from)?;
    let order: Vec<i32> =
        (0..args.batches * args.batch).map(|_| rng.random_range(0..stored.pieces.len()) as i32).collect();

    let all = rayon::current_num_threads();
    let mut results = Vec::new();
    for pages in ["warm", "cold"] {
        for (what, threads) in [("store", 1), ("store-ahead", 1), ("pread", 1), ("store", all), ("pread", all)] {
            let mut times_us = Vec::with_capacity(args.batches);
            for batch in order.chunks_exact(args.batch) {
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
            let batch_bytes = args.batch * stored.piece_bytes;
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
    let peers = match args.others.peers.as_slice() {
        [] => Vec::new(),
        names => peers::payload(
            &peers::PayloadCase {
                piece_bytes: stored.piece_bytes,
                pieces: stored.pieces.len(),
                batch: args.batch,
                batches: args.batches,
                seconds: args.others.peer_seconds,
                peers: names,
            },
            &bytes,
            &order,
            &args.others.python,
        )?,
    };
    Ok(PayloadReport {
        piece_bytes: stored.piece_bytes,
        pieces: stored.pieces.len(),
        batch: args.batch,
        seed: args.seed,
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

    fn read(&self, index: usize, into: &mut Vec<u8>) -> Result<(), CliError> {
        let piece = &self.pieces[index];
        Ok(self.store.read_piece(piece.block, piece.piece, into).map_err(MemoryError::from)?)
    }

    fn read_ahead(&self, batch: &[i32], into: &mut Vec<u8>) -> Result<(), CliError> {
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

    fn pread(&self, index: usize, into: &mut Vec<u8>) -> Result<(), CliError> {
        let piece = &self.pieces[index];
        into.resize(self.piece_bytes, 0);
        let read = self.files[piece.file].read_exact_at(into, piece.offset);
        read.map_err(|source| CliError::Io { what: "a plain read", source })
    }

    fn forget_pages(&self) -> Result<(), CliError> {
        self.files.iter().try_for_each(forget_pages)
    }
}

impl Report for PayloadReport {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        let pieces = count(self.pieces as u64);
        writeln!(
            to,
            "batches of {} of {pieces} pieces of {}; seed {}\n",
            self.batch,
            size(self.piece_bytes as u64),
            self.seed
        )?;
        let mut rows = plain_table(["", "PAGES", "THREADS>", "P50>", "P99>", "READ/S>"]);
        for result in &self.results {
            rows.add_row([
                result.what.to_string(),
                result.pages.to_string(),
                result.threads.to_string(),
                format!("{:.0} us", result.p50_us),
                format!("{:.0} us", result.p99_us),
                format!("{}/s", size(result.bytes_per_s as u64)),
            ]);
        }
        for peer in &self.peers {
            match &peer.skipped {
                Some(why) => rows.add_row([format!("{}: {why}", peer.peer)]),
                None => rows.add_row([
                    format!("{} {}", peer.peer, peer.version),
                    peer.setting.clone(),
                    peer.threads.to_string(),
                    format!("{:.0} us", peer.figures.p50_us),
                    format!("{:.0} us", peer.figures.p99_us),
                    format!(
                        "{}/s",
                        size((self.batch * self.piece_bytes) as u64 * 1_000_000 / peer.figures.p50_us as u64)
                    ),
                ]),
            };
        }
        write_table(to, &rows)
    }
}
