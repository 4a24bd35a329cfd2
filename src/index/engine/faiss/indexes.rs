//! Indexes of one document's keys, built when they are first asked and kept on disk between runs.
//!
//! A document's folder has one folder for every number of first blocks that indexes cover: one, or two while larger ones are built.
//! A file is what FAISS writes, then a trailer (little-endian): magic, version, what the index was built from, and a CRC-32 of
//! all before it. A file that is absent, damaged or about something else is built anew: the folder is a cache.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::library::Nearest;
use crate::index::{DocumentKeys, KeyLayout};
use crate::types::FaissIndex;

const MAGIC: [u8; 8] = *b"lmkfaiss";
const VERSION: u32 = 1;
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + 8;
const FACTORY_AT: usize = VERSION_AT + 4;
const KEYS_AT: usize = FACTORY_AT + 4;
const DIM_AT: usize = KEYS_AT + 8;
const CRC_AT: usize = DIM_AT + 4;
const TRAILER_BYTES: usize = CRC_AT + 4;

/// Of the first blocks of one document, an index per layer and KV head.
pub struct DocumentIndexes {
    setting: FaissIndex,
    layout: KeyLayout,
    blocks: u32,
    /// Where those of the document are kept, if anywhere.
    folder: Option<PathBuf>,
    /// Of the document's pieces, that of the first one here.
    first_piece: usize,
    /// `(L * Hkv)`
    pieces: Vec<Piece>,
    /// Of all that are here, as they are written.
    bytes: AtomicU64,
}

/// The index of one layer and KV head.
#[derive(Default)]
struct Piece {
    /// Nothing where FAISS refused to build one.
    made: OnceLock<Option<Nearest>>,
    is_being_made: AtomicBool,
}

/// Marks that no index is being made.
struct Making<'a>(&'a AtomicBool);

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl std::fmt::Debug for DocumentIndexes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DocumentIndexes").field("setting", &self.setting).field("blocks", &self.blocks).finish()
    }
}

impl DocumentIndexes {
    /// Indexes of a document with such keys: those that are kept in a folder, if they still cover it well enough, and else such
    /// as cover all of `keys`. Builds none yet.
    pub fn of(setting: FaissIndex, keys: &DocumentKeys, folder: Option<PathBuf>) -> Self {
        let kept = folder.iter().flat_map(fs::read_dir).flatten().flatten();
        let covered = kept.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let covered = covered.filter(|&blocks| blocks <= keys.blocks() && covers(blocks, keys)).max();
        Self::over(covered.unwrap_or(keys.blocks()), setting, keys, folder)
    }

    /// Indexes that cover all of `keys`.
    pub fn of_all(setting: FaissIndex, keys: &DocumentKeys, folder: Option<PathBuf>) -> Self {
        Self::over(keys.blocks(), setting, keys, folder)
    }

    fn over(blocks: u32, setting: FaissIndex, keys: &DocumentKeys, folder: Option<PathBuf>) -> Self {
        let layout = keys.layout();
        let pieces = std::iter::repeat_with(Piece::default).take(layout.pieces()).collect();
        DocumentIndexes { setting, layout, blocks, folder, first_piece: 0, pieces, bytes: AtomicU64::new(0) }
    }

    /// The same for keys of one layer alone: `keys` of `of` were its first layer's.
    pub fn of_layer(self, layer: usize) -> Self {
        DocumentIndexes { first_piece: layer * self.layout.kv_heads, ..self }
    }

    /// Whether so much of a document with such keys is covered that scanning the rest costs little.
    pub fn cover(&self, keys: &DocumentKeys) -> bool {
        covers(self.blocks, keys)
    }

    pub fn setting(&self) -> &FaissIndex {
        &self.setting
    }

    /// Blocks that are covered: the document's first ones.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of the indexes that are here; 0 for those that are kept in no folder.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Builds, or reads, all that are not here yet, and removes from the folder those that cover something else.
    pub fn complete(&self, keys: &DocumentKeys) {
        self.make(0..self.pieces.len(), keys);
        let kept = self.folder.iter().flat_map(fs::read_dir).flatten().flatten();
        for other in kept.filter(|entry| entry.file_name().to_str() != Some(&self.blocks.to_string())) {
            if let Err(error) = fs::remove_dir_all(other.path()) {
                tracing::warn!("indexes that are not needed any more stay in {}: {error}", other.path().display());
            }
        }
    }

    /// Builds, or reads, those of some pieces that are not here yet; `keys` are the document's, of at least the covered blocks.
    /// Training takes seconds to minutes: a caller that finds another at one of them gets false at once, and none may call
    /// this from inside of rayon's pool, whose threads answer other lookups.
    pub fn make(&self, pieces: Range<usize>, keys: &DocumentKeys) -> bool {
        for (i, piece) in pieces.clone().zip(&self.pieces[pieces]) {
            if piece.made.get().is_some() {
                continue;
            }
            if piece.is_being_made.swap(true, Ordering::AcqRel) {
                return false;
            }
            let _making = Making(&piece.is_being_made);
            let made = self.read(i).map_or_else(|| self.build(i, keys), Ok);
            let mut nearest = made.inspect_err(|problem| {
                tracing::warn!(
                    "{} is not used for keys of this document, which are scanned: {problem}",
                    self.setting.factory
                );
            });
            if let Ok(nearest) = &mut nearest {
                nearest.set_effort(self.setting.effort);
            }
            // Set already where another was done just before.
            let _ = piece.made.set(nearest.ok());
        }
        true
    }

    /// The index of one layer and KV head (`layer * Hkv + kv_head`), once it is [made](Self::make).
    pub(super) fn nearest(&self, piece: usize) -> Option<&Nearest> {
        self.pieces[piece].made.get()?.as_ref()
    }

    fn build(&self, piece: usize, keys: &DocumentKeys) -> Result<Nearest, String> {
        let (dim, m) = (self.layout.head_dim, self.layout.keys_per_block);
        let mut values = Vec::with_capacity(self.blocks as usize * m * dim);
        for (chunk, blocks) in keys.parts(0..self.blocks) {
            for key in blocks.start * m..blocks.end * m {
                values.extend(chunk.key(piece, key));
            }
        }
        let nearest = Nearest::build(&self.setting.factory, dim, &values)?;
        if let Some(path) = self.path(piece)
            && let Err(problem) = self.write(&nearest, &path)
        {
            tracing::warn!("an index is not kept for the next run: {problem}");
        }
        Ok(nearest)
    }

    fn path(&self, piece: usize) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(self.blocks.to_string()).join(format!("{}.faiss", self.first_piece + piece)))
    }

    /// Written beside its place and moved there whole.
    fn write(&self, nearest: &Nearest, path: &Path) -> Result<(), String> {
        let io = |error: io::Error| format!("{}: {error}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(path)).map_err(io)?;
        // Two requests that read keys in passing may be at the same one.
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let unfinished = path.with_extension(format!("unfinished-{}", WRITES.fetch_add(1, Ordering::Relaxed)));
        nearest.write(&unfinished)?;
        let written = fs::read(&unfinished).map_err(io)?;
        let mut file = File::options().append(true).open(&unfinished).map_err(io)?;
        file.write_all(&self.trailer(&written)).map_err(io)?;
        fs::rename(&unfinished, path).map_err(io)?;
        self.bytes.fetch_add(written.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self, piece: usize) -> Option<Nearest> {
        let path = self.path(piece)?;
        let bytes = fs::read(&path).ok()?;
        let (written, trailer) = bytes.split_at_checked(bytes.len().checked_sub(TRAILER_BYTES)?)?;
        if trailer != self.trailer(written) {
            return None;
        }
        let nearest = Nearest::read(&path).ok()?;
        self.bytes.fetch_add(written.len() as u64, Ordering::Relaxed);
        Some(nearest)
    }

    fn trailer(&self, written: &[u8]) -> [u8; TRAILER_BYTES] {
        let keys = self.blocks as u64 * self.layout.keys_per_block as u64;
        let mut trailer = [0; TRAILER_BYTES];
        trailer[MAGIC_AT..VERSION_AT].copy_from_slice(&MAGIC);
        trailer[VERSION_AT..FACTORY_AT].copy_from_slice(&VERSION.to_le_bytes());
        trailer[FACTORY_AT..KEYS_AT].copy_from_slice(&crc32fast::hash(self.setting.factory.as_bytes()).to_le_bytes());
        trailer[KEYS_AT..DIM_AT].copy_from_slice(&keys.to_le_bytes());
        trailer[DIM_AT..CRC_AT].copy_from_slice(&(self.layout.head_dim as u32).to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(written);
        crc.update(&trailer[..CRC_AT]);
        trailer[CRC_AT..].copy_from_slice(&crc.finalize().to_le_bytes());
        trailer
    }
}

/// Whether at most half as many blocks have come as are covered.
fn covers(blocks: u32, keys: &DocumentKeys) -> bool {
    keys.blocks().saturating_sub(blocks) <= blocks / 2
}
