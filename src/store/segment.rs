//! The seam under the log: numbered files that are written at the end and read anywhere. The only place that
//! touches payload files; object storage or a test double fits behind it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;
use serde::{Deserialize, Serialize};

/// One segment of the log. Numbers grow with age and are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SegmentId(pub u32);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The set of segments.
pub trait Segments: Send + Sync {
    /// All that exist, in any order.
    fn list(&self) -> io::Result<Vec<SegmentId>>;

    /// An existing one; `ErrorKind::NotFound` otherwise.
    fn open(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>>;

    /// A new empty one, whose existence is durable when this returns.
    fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>>;

    /// Removes one, durably. Handles that are open stay readable.
    fn remove(&self, id: SegmentId) -> io::Result<()>;
}

/// One segment. All methods take `&self`: positions are arguments, so readers and the writer share a handle.
pub trait SegmentFile: Send + Sync {
    fn len_bytes(&self) -> io::Result<u64>;

    /// Fills `into`; `ErrorKind::UnexpectedEof` past the end.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// As [`read_at`](Self::read_at), but only what needs no disk: false, and `into` in any state, if it would.
    fn read_at_hand(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, into).map(|()| true)
    }

    /// A hint that these bytes will be read soon: those of many calls come from the disk side by side.
    fn expect(&self, _offset: u64, _bytes: u64) {}

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Everything written is durable when this returns.
    fn sync(&self) -> io::Result<()>;

    /// Cuts the end off.
    fn truncate(&self, len_bytes: u64) -> io::Result<()>;
}

/// Segments as files `0000000001.seg` in one folder.
pub struct SegmentFolder {
    path: PathBuf,
}

impl SegmentFolder {
    /// Creates the folder if absent.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(SegmentFolder { path: path.to_owned() })
    }

    fn file(&self, id: SegmentId) -> PathBuf {
        self.path.join(file_name(id))
    }

    /// A name in a folder is durable only once the folder is.
    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

pub(super) fn file_name(id: SegmentId) -> String {
    format!("{:010}.seg", id.0)
}

impl Segments for SegmentFolder {
    fn list(&self) -> io::Result<Vec<SegmentId>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            let number =
                name.to_str().and_then(|name| name.strip_suffix(".seg")).and_then(|digits| digits.parse().ok());
            ids.extend(number.map(SegmentId));
        }
        Ok(ids)
    }

    fn open(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).open(self.file(id))?))
    }

    fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(self.file(id))?;
        self.sync()?;
        Ok(Arc::new(file))
    }

    fn remove(&self, id: SegmentId) -> io::Result<()> {
        fs::remove_file(self.file(id))?;
        self.sync()
    }
}

impl SegmentFile for File {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn read_at_hand(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        let bytes = into.len();
        let read = rustix::io::preadv2(self, &mut [IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT);
        // Part of it, or an error: of a file system that cannot tell, or one that the read which waits meets too.
        Ok(read == Ok(bytes))
    }

    fn expect(&self, offset: u64, bytes: u64) {
        // Without the hint the bytes are read all the same, only later.
        let _ = rustix::fs::fadvise(self, offset, NonZeroU64::new(bytes), Advice::WillNeed);
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn truncate(&self, len_bytes: u64) -> io::Result<()> {
        self.set_len(len_bytes)
    }
}

/// Open handles kept for readers: well under the usual 1024 file descriptors of a process.
const OPEN_MAX: usize = 256;

/// Shared handles, opened on first use.
pub(super) struct Handles {
    segments: Box<dyn Segments>,
    open: RwLock<BTreeMap<SegmentId, Arc<dyn SegmentFile>>>,
}

impl Handles {
    pub(super) fn new(segments: Box<dyn Segments>) -> Self {
        Handles { segments, open: RwLock::default() }
    }

    pub(super) fn list(&self) -> io::Result<Vec<SegmentId>> {
        let mut ids = self.segments.list()?;
        ids.sort();
        Ok(ids)
    }

    pub(super) fn get(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        if let Some(file) = self.open.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
            return Ok(file.clone());
        }
        let file = self.segments.open(id)?;
        self.keep(id, &file);
        Ok(file)
    }

    pub(super) fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let file = self.segments.create(id)?;
        self.keep(id, &file);
        Ok(file)
    }

    pub(super) fn remove(&self, id: SegmentId) -> io::Result<()> {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        self.segments.remove(id)
    }

    fn keep(&self, id: SegmentId, file: &Arc<dyn SegmentFile>) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= OPEN_MAX {
            // The oldest data is the least likely to be read next; whoever holds the handle keeps it.
            open.pop_first();
        }
        open.insert(id, file.clone());
    }
}
