//! The seam under the log: numbered files that are written at the end and read anywhere. The only place that
//! touches payload files; object storage or a test double fits behind it.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;
use serde::{Deserialize, Serialize};

use crate::limits;

/// One segment of the log. Numbers grow with age and are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SegmentId(pub u32);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A data directory, for good: drawn when it is created. It is in every segment's header and checksums, so that segments of
/// two directories are never taken for each other's. No client learns it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryId(pub [u8; 16]);

impl DirectoryId {
    pub fn draw() -> Self {
        DirectoryId(rand::random())
    }
}

impl fmt::Display for DirectoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for DirectoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a torn end cut off, or a damaged segment, kept until the operator discards it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Torn {
    pub segment: SegmentId,
    /// Where it lay.
    pub offset: u64,
    pub bytes: u64,
    /// A whole segment file, which repair took out of the log.
    pub whole: bool,
}

/// The set of segments.
pub trait Segments: Send + Sync {
    /// The directory that they belong to.
    fn directory(&self) -> DirectoryId;

    /// All that exist, in any order.
    fn list(&self) -> io::Result<Vec<SegmentId>>;

    /// An existing one; `ErrorKind::NotFound` otherwise.
    fn open(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>>;

    /// A new empty one, whose existence is durable when this returns.
    fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>>;

    /// Removes one, durably. Handles that are open stay readable.
    fn remove(&self, id: SegmentId) -> io::Result<()>;

    /// Keeps bytes that are about to be cut off a segment at `offset`, durably. Keeping them again changes nothing.
    fn set_aside(&self, id: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// What was set aside, in any order.
    fn torn(&self) -> io::Result<Vec<Torn>>;

    /// What was set aside of it.
    fn read_torn(&self, torn: &Torn) -> io::Result<Vec<u8>>;

    /// Torn ends that were left where they lie, because nothing may be written: they do not count.
    fn passed_over(&self) -> Vec<(Torn, Vec<u8>)> {
        Vec::new()
    }

    /// Takes a segment out of the set and keeps its file with what was set aside, durably.
    fn move_aside(&self, id: SegmentId) -> io::Result<()>;

    /// Discards what was set aside.
    fn discard_torn(&self) -> io::Result<()>;

    /// Sets room aside, if there is enough, for deletions on a disk that is full.
    fn keep_reserve(&self) {}

    /// Gives it back to the disk.
    fn release_reserve(&self) -> io::Result<()> {
        Ok(())
    }

    /// Whether the disk has room for more than the next few small writes.
    fn has_room(&self) -> bool {
        true
    }
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

/// Segments as files `0000000001.seg` in one folder, and what was cut off them as `0000000001-OFFSET.torn` beside it.
pub struct SegmentFolder {
    directory: DirectoryId,
    path: PathBuf,
    torn: PathBuf,
    reserve: PathBuf,
}

/// The reserve is such a share of the disk at most.
const RESERVE_SHARE: u64 = 64;

impl SegmentFolder {
    /// In a data directory that exists; creates the folder if absent.
    pub fn open(data: &Path, directory: DirectoryId) -> io::Result<Self> {
        let path = data.join("segments");
        create_private(&path)?;
        File::open(data)?.sync_all()?;
        Ok(SegmentFolder::as_it_is(data, directory))
    }

    /// The same, and nothing is created.
    pub(super) fn as_it_is(data: &Path, directory: DirectoryId) -> Self {
        let [path, torn, reserve] = ["segments", "torn", "reserve"].map(|name| data.join(name));
        SegmentFolder { directory, path, torn, reserve }
    }

    pub(super) fn open_to_read(&self, id: SegmentId) -> io::Result<File> {
        File::open(self.file(id))
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

/// Creates a folder that only its owner can read, if absent.
pub(super) fn create_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// How files of a data directory are opened: new ones are readable by their owner only.
pub(super) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

fn torn_of(entry: &fs::DirEntry) -> Option<Torn> {
    let name = entry.file_name();
    let name = name.to_str()?;
    let bytes = entry.metadata().ok()?.len();
    if let Some(segment) = name.strip_suffix(".seg") {
        return Some(Torn { segment: SegmentId(segment.parse().ok()?), offset: 0, bytes, whole: true });
    }
    let (segment, offset) = name.strip_suffix(".torn")?.split_once('-')?;
    let (segment, offset) = (SegmentId(segment.parse().ok()?), offset.parse().ok()?);
    Some(Torn { segment, offset, bytes, whole: false })
}

fn torn_name(id: SegmentId, offset: u64) -> String {
    format!("{:010}-{offset}.torn", id.0)
}

fn reserve_bytes(disk: &rustix::fs::StatVfs) -> u64 {
    (disk.f_blocks * disk.f_frsize / RESERVE_SHARE).min(limits::RESERVE_BYTES_MAX)
}

impl Segments for SegmentFolder {
    fn directory(&self) -> DirectoryId {
        self.directory
    }

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
        Ok(Arc::new(private().open(self.file(id))?))
    }

    fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let file = private().create_new(true).open(self.file(id))?;
        self.sync()?;
        Ok(Arc::new(file))
    }

    fn remove(&self, id: SegmentId) -> io::Result<()> {
        fs::remove_file(self.file(id))?;
        self.sync()
    }

    fn set_aside(&self, id: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        create_private(&self.torn)?;
        let file = private().create(true).truncate(true).open(self.torn.join(torn_name(id, offset)))?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        File::open(&self.torn)?.sync_all()?;
        File::open(self.path.parent().unwrap_or(&self.path))?.sync_all()?;
        tracing::warn!(segment = id.0, offset, bytes = bytes.len(), "set aside an unfinished append");
        Ok(())
    }

    fn torn(&self) -> io::Result<Vec<Torn>> {
        match fs::read_dir(&self.torn) {
            Ok(entries) => Ok(entries.filter_map(|entry| torn_of(&entry.ok()?)).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn read_torn(&self, torn: &Torn) -> io::Result<Vec<u8>> {
        let name = if torn.whole { file_name(torn.segment) } else { torn_name(torn.segment, torn.offset) };
        fs::read(self.torn.join(name))
    }

    fn move_aside(&self, id: SegmentId) -> io::Result<()> {
        create_private(&self.torn)?;
        File::open(self.path.parent().unwrap_or(&self.path))?.sync_all()?;
        fs::rename(self.file(id), self.torn.join(file_name(id)))?;
        File::open(&self.torn)?.sync_all()?;
        self.sync()
    }

    fn keep_reserve(&self) {
        if self.reserve.exists() {
            return;
        }
        let bytes = rustix::fs::statvfs(&self.path).map_or(0, |disk| reserve_bytes(&disk));
        let reserved = private().create(true).open(&self.reserve).and_then(|file| {
            let flags = rustix::fs::FallocateFlags::empty();
            Ok(rustix::fs::fallocate(file, flags, 0, bytes.max(1))?)
        });
        if reserved.is_err() {
            // Too full already, or a file system that cannot: better no reserve than half of one.
            let _ = fs::remove_file(&self.reserve);
        }
    }

    fn release_reserve(&self) -> io::Result<()> {
        match fs::remove_file(&self.reserve) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// As much as the reserve takes, beside it.
    fn has_room(&self) -> bool {
        rustix::fs::statvfs(&self.path).is_ok_and(|disk| disk.f_bavail * disk.f_frsize >= reserve_bytes(&disk))
    }

    fn discard_torn(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.torn) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
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
