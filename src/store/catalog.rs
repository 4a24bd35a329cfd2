//! The seam over small, ordered state: a key-value map with atomic batches. The only place that names sled.
//!
//! The catalog is a view of the log that can be rebuilt from it, so it may lag behind after a crash; it must never
//! run ahead, and what it says must come from one point in the log (batches apply whole and in order).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::StoreError;
use super::record::{pack, unpack};
use super::segment::SegmentId;
use crate::types::{BlockId, CollectionId, DocumentId};

/// Key and value, as bytes.
pub type Pair = (Vec<u8>, Vec<u8>);

/// Changes that apply together or not at all: a key with its new value, or with `None` to remove it.
pub type Batch = Vec<(Vec<u8>, Option<Vec<u8>>)>;

pub trait Catalog: Send + Sync {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>>;

    /// All pairs whose key begins with `prefix`, in key order.
    fn scan(&self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>>>;

    /// Visible to every reader when it returns; durable only after [`Catalog::flush`].
    fn apply(&self, batch: Batch) -> io::Result<()>;

    fn flush(&self) -> io::Result<()>;

    /// Bytes on disk.
    fn size_bytes(&self) -> io::Result<u64>;

    /// Sees to it, durably, that the next opening finds an empty catalog. It is not used again.
    fn discard(&self) -> io::Result<()>;
}

/// Keys begin with a letter per kind. Numbers in them are big-endian because the catalog sorts keys as bytes, and
/// a document's blocks (or a collection's documents) must lie together, in order.
pub(super) mod key {
    use super::*;

    fn key(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
        let mut key = vec![kind];
        parts.iter().for_each(|part| key.extend_from_slice(part));
        key
    }

    pub(in crate::store) const COLLECTIONS: &[u8] = b"C";
    pub(in crate::store) const DOCUMENTS: &[u8] = b"D";
    pub(in crate::store) const BLOCKS: &[u8] = b"B";
    pub(in crate::store) const TOMBSTONES: &[u8] = b"T";
    pub(in crate::store) const SEGMENTS: &[u8] = b"S";
    pub(in crate::store) const DAMAGES: &[u8] = b"X";
    pub(in crate::store) const DOUBTS: &[u8] = b"U";
    /// Deleted documents whose blocks are still in the catalog.
    pub(in crate::store) const GARBAGE: &[u8] = b"G";
    pub(in crate::store) const TOTALS: &[u8] = b"Z";
    pub(super) const FORMAT: &[u8] = b"_";

    pub(in crate::store) fn collection(id: CollectionId) -> Vec<u8> {
        key(b'C', &[&id.0.to_be_bytes()])
    }

    /// The id in a key made by [`collection`].
    pub(in crate::store) fn collection_of(key: &[u8]) -> Result<CollectionId, StoreError> {
        let digits = key.get(1..).and_then(|digits| digits.try_into().ok());
        Ok(CollectionId(u32::from_be_bytes(digits.ok_or_else(malformed)?)))
    }

    pub(in crate::store) fn collection_name(name: &str) -> Vec<u8> {
        key(b'c', &[name.as_bytes()])
    }

    pub(in crate::store) fn document(id: DocumentId) -> Vec<u8> {
        key(b'D', &[&id.0.to_be_bytes()])
    }

    /// With an empty name: the prefix of all documents of the collection.
    pub(in crate::store) fn document_name(collection: CollectionId, name: &str) -> Vec<u8> {
        key(b'd', &[&collection.0.to_be_bytes(), name.as_bytes()])
    }

    pub(in crate::store) fn blocks(document: DocumentId) -> Vec<u8> {
        key(b'B', &[&document.0.to_be_bytes()])
    }

    /// Also of a part of a state, which is a place behind them.
    pub(in crate::store) fn block(id: BlockId) -> Vec<u8> {
        key(b'B', &[&id.document.0.to_be_bytes(), &id.index.to_be_bytes()])
    }

    /// What a key made by [`block`] names.
    pub(in crate::store) fn block_of(key: &[u8]) -> Result<BlockId, StoreError> {
        let digits = key.get(1..9).and_then(|digits| digits.try_into().ok());
        let document = DocumentId(u64::from_be_bytes(digits.ok_or_else(malformed)?));
        Ok(BlockId { document, index: index_of(key)? })
    }

    /// The index in a key made by [`block`].
    pub(in crate::store) fn index_of(key: &[u8]) -> Result<u32, StoreError> {
        let digits = key.get(9..).and_then(|digits| digits.try_into().ok());
        Ok(u32::from_be_bytes(digits.ok_or_else(malformed)?))
    }

    pub(in crate::store) fn tombstone(document: DocumentId) -> Vec<u8> {
        key(b'T', &[&document.0.to_be_bytes()])
    }

    pub(in crate::store) fn garbage(document: DocumentId) -> Vec<u8> {
        key(b'G', &[&document.0.to_be_bytes()])
    }

    pub(in crate::store) fn doubt(document: DocumentId) -> Vec<u8> {
        key(b'U', &[&document.0.to_be_bytes()])
    }

    pub(in crate::store) fn segment(id: SegmentId) -> Vec<u8> {
        key(b'S', &[&id.0.to_be_bytes()])
    }

    pub(in crate::store) fn damage(segment: SegmentId, offset: u64) -> Vec<u8> {
        key(b'X', &[&segment.0.to_be_bytes(), &offset.to_be_bytes()])
    }
}

/// Reads a value as what was put there.
pub(super) fn get<T: DeserializeOwned>(catalog: &dyn Catalog, key: &[u8]) -> Result<Option<T>, StoreError> {
    catalog.get(key).map_err(StoreError::catalog("read"))?.map(|value| decode(&value)).transpose()
}

/// Reads all values under a prefix, in key order.
pub(super) fn scan<T: DeserializeOwned>(
    catalog: &dyn Catalog,
    prefix: &[u8],
) -> impl Iterator<Item = Result<(Vec<u8>, T), StoreError>> + use<T> {
    catalog.scan(prefix).map(|pair| {
        let (key, value) = pair.map_err(StoreError::catalog("scan"))?;
        Ok((key, decode(&value)?))
    })
}

/// Takes everything out.
pub(super) fn clear(catalog: &dyn Catalog) -> Result<(), StoreError> {
    let all = catalog.scan(b"").map(|pair| pair.map(|(key, _)| (key, None)));
    let all = all.filter(|pair| pair.as_ref().map_or(true, |(key, _)| key != key::FORMAT));
    let batch = all.collect::<io::Result<Batch>>().map_err(StoreError::catalog("scan"))?;
    catalog.apply(batch).map_err(StoreError::catalog("empty itself"))
}

fn decode<T: DeserializeOwned>(value: &[u8]) -> Result<T, StoreError> {
    unpack(value).ok_or_else(malformed)
}

fn malformed() -> StoreError {
    StoreError::Catalog { step: "decode what it holds", source: io::ErrorKind::InvalidData.into() }
}

/// A change for a [`Batch`].
pub(super) fn put<T: Serialize>(key: Vec<u8>, value: &T) -> (Vec<u8>, Option<Vec<u8>>) {
    (key, Some(pack(value)))
}

/// Raise it whenever keys or values change their meaning; an older catalog is then rebuilt.
const FORMAT: u32 = 6;
/// Pages of the tree kept in memory, by their bytes on disk; in memory they take some times as many. Over 40 million tokens
/// appended (the bench `keys`) a process stayed at 94 MiB with 8 MiB, and grew beyond 157 with 32, no faster.
const CACHE_BYTES: u64 = 8 << 20;
/// A closing process may hold sled's file lock for a moment after it dropped the database.
const REOPEN_PATIENCE: Duration = Duration::from_secs(3);
const REOPEN_PAUSE: Duration = Duration::from_millis(10);
/// For sled to write what it holds: many times what 8 MiB take on a slow disk.
const WRITE_PATIENCE: Duration = Duration::from_secs(60);

/// The catalog in a sled database.
pub struct SledCatalog {
    /// There until it is dropped.
    tree: Option<sled::Db>,
    path: PathBuf,
}

impl SledCatalog {
    /// Opens or creates it. One that is corrupt or of another format is replaced by an empty one, which
    /// recovery fills from the log.
    pub fn open(path: &Path) -> io::Result<Self> {
        match Self::open_existing(path) {
            Ok(catalog) if catalog.is_current()? => return Ok(catalog),
            Ok(_) => tracing::warn!(path = %path.display(), "the catalog has another format; rebuilding it"),
            Err(sled::Error::Corruption { .. }) => {
                tracing::warn!(path = %path.display(), "the catalog is corrupt; rebuilding it");
            }
            Err(error) => return Err(error.into()),
        }
        fs::remove_dir_all(path)?;
        let catalog = Self::open_existing(path)?;
        catalog.is_current()?;
        Ok(catalog)
    }

    fn open_existing(path: &Path) -> Result<Self, sled::Error> {
        let begun = Instant::now();
        loop {
            // No background flush: it holds the database open past its drop, and durability is the log's business.
            let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
            match config.open() {
                Ok(tree) => return Ok(SledCatalog { tree: Some(tree), path: path.to_owned() }),
                // sled says no more precisely that its file is locked. We hold the data directory, so the holder is about to leave.
                Err(sled::Error::Io(error))
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Other)
                        && begun.elapsed() < REOPEN_PATIENCE =>
                {
                    std::thread::sleep(REOPEN_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Stamps an empty database with the current format.
    fn is_current(&self) -> io::Result<bool> {
        let tree = self.tree()?;
        match tree.get(key::FORMAT)? {
            Some(format) => Ok(*format == FORMAT.to_be_bytes()),
            None if tree.is_empty() => {
                tree.insert(key::FORMAT, &FORMAT.to_be_bytes())?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    fn tree(&self) -> io::Result<&sled::Db> {
        self.tree.as_ref().ok_or_else(|| io::Error::other("the catalog is closed"))
    }
}

impl Drop for SledCatalog {
    /// sled panics where the disk refuses its last words, which loses nothing: the log has it all.
    fn drop(&mut self) {
        let tree = self.tree.take();
        if !self.path.exists() {
            // It was given up and removed: what it has left to write does not matter.
            let _ = std::thread::Builder::new().name("catalog".into()).spawn(move || drop(tree));
            return;
        }
        if in_time(move || {
            drop(tree);
            Ok(())
        })
        .is_err()
        {
            tracing::warn!(path = %self.path.display(), "the catalog was not closed well; the next opening reads more of the log");
        }
    }
}

/// Runs what makes sled write, on a thread of its own: after a write that failed it may wait for ever to be told of it, and it
/// may panic.
fn in_time(run: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let (ended, result) = mpsc::channel();
    // The receiver may be gone; that is fine.
    std::thread::Builder::new().name("catalog".into()).spawn(move || drop(ended.send(run())))?;
    result.recv_timeout(WRITE_PATIENCE).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(io::ErrorKind::TimedOut.into()),
        RecvTimeoutError::Disconnected => Err(io::Error::other("sled panicked")),
    })
}

/// Removes a catalog's folder, durably.
pub(super) fn discard_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

impl Catalog for SledCatalog {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.tree()?.get(key)?.map(|value| value.to_vec()))
    }

    fn scan(&self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>>> {
        match self.tree() {
            Ok(tree) => Box::new(tree.scan_prefix(prefix).map(|pair| {
                let (key, value) = pair?;
                Ok((key.to_vec(), value.to_vec()))
            })),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    fn apply(&self, batch: Batch) -> io::Result<()> {
        let mut changes = sled::Batch::default();
        for (key, value) in batch {
            match value {
                Some(value) => changes.insert(key, value),
                None => changes.remove(key),
            }
        }
        let tree = self.tree()?.clone();
        in_time(move || Ok(tree.apply_batch(changes)?))
    }

    fn flush(&self) -> io::Result<()> {
        let tree = self.tree()?.clone();
        in_time(move || tree.flush().map(|_| ()).map_err(io::Error::from))?;
        // sled's own flush stops at `sync_file_range`, which neither empties the disk's cache nor covers file sizes.
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                match File::open(entry.path()) {
                    Ok(file) => file.sync_all()?,
                    // sled replaces its snapshot files as it goes.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        File::open(&self.path)?.sync_all()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.tree()?.size_on_disk()?)
    }

    fn discard(&self) -> io::Result<()> {
        discard_folder(&self.path)
    }
}
