//! How is a data directory read without a byte being written to it? Recovery cuts torn ends off and removes what a crash left: here
//! it works on an overlay, which keeps these changes in memory and opens no file for writing. The catalog is read from a copy, for
//! sled writes where it opens; where that fails, recovery fills an empty one from the segments. All further changes are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::catalog::{Batch, Catalog, SledCatalog};
use super::catalog_memory::MemoryCatalog;
use super::directory;
use super::error::StoreError;
use super::open::{CATALOG_FOLDER, lock_within};
use super::segment::{DirectoryId, SegmentFile, SegmentFolder, SegmentId, Segments, Torn, private};
use super::state::{Health, Sizes, Store};
use crate::lock::IgnorePoison;

impl Store {
    /// Opens a data directory that exists and writes nothing to it: not where the disk cannot be written, and not where a copy was
    /// made under a running process, whose last append may be there in part. Every change is refused.
    ///
    /// Others may read it at the same time, and nobody writes to it meanwhile, if it has its lock file.
    pub fn open_read_only(dir: &Path) -> Result<Store, StoreError> {
        let id = directory::identify(dir)?;
        let lock = share_lock(dir)?;
        let open = |catalog: MemoryCatalog| {
            let overlay = Overlay::over(SegmentFolder::as_it_is(dir, id));
            Store::open_sized(Box::new(overlay), Arc::new(catalog), Sizes::default())
        };
        let mut store = match open(read_catalog(&dir.join(CATALOG_FOLDER))) {
            Err(error @ StoreError::Catalog { .. }) => {
                tracing::warn!(%error, "the catalog makes no sense: it is rebuilt in memory");
                open(MemoryCatalog::default())?
            }
            opened => opened?,
        };
        store.refuse_changes(&SegmentFolder::as_it_is(dir, id))?;
        store._lock = lock;
        Ok(store)
    }

    fn refuse_changes(&mut self, folder: &SegmentFolder) -> Result<(), StoreError> {
        let files = folder.list().map_err(StoreError::io("list the segments"))?;
        let writer = self.writer.get_mut().ignore_poison();
        // What recovery began for writes that do not come is no file.
        if !files.contains(&writer.active.id) {
            writer.ledger.segments.remove(&writer.active.id);
        }
        *self.stats.get_mut().ignore_poison() = writer.stats();
        *self.health.get_mut().ignore_poison() = Health::ReadOnly { reason: StoreError::ReadOnly.to_string() };
        self.reads_only = true;
        Ok(())
    }
}

/// Keeps writers away where the directory has the file that they lock. A copy, or a disk that cannot be written, may have none.
fn share_lock(dir: &Path) -> Result<Option<File>, StoreError> {
    let lock = match File::open(dir.join(directory::LOCK_FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        lock => lock.map_err(StoreError::io("open the lock file"))?,
    };
    match lock_within(dir, || lock.try_lock_shared()) {
        // A file system without locks.
        Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::Unsupported => Ok(None),
        locked => locked.map(|()| Some(lock)),
    }
}

/// What the catalog in a folder says: nothing, if it cannot be read.
fn read_catalog(folder: &Path) -> MemoryCatalog {
    let catalog = MemoryCatalog::default();
    let read = if folder.exists() { read_copy(folder) } else { Ok(Batch::new()) };
    if let Err(error) = read.and_then(|pairs| catalog.apply(pairs)) {
        tracing::warn!(%error, "the catalog cannot be read: it is rebuilt in memory");
    }
    catalog
}

fn read_copy(folder: &Path) -> io::Result<Batch> {
    let copy = Copied::of(folder)?;
    let path = copy.0.clone();
    // In a thread of its own: what was copied under its writer may make sled panic.
    let read = std::thread::Builder::new().name("catalog".into()).spawn(move || -> io::Result<Batch> {
        let catalog = SledCatalog::open(&path)?;
        catalog.scan(b"").map(|pair| pair.map(|(key, value)| (key, Some(value)))).collect()
    })?;
    read.join().unwrap_or_else(|_| Err(io::Error::other("sled panicked")))
}

/// A copy of a folder for its owner's eyes, removed when it is dropped.
struct Copied(PathBuf);

impl Copied {
    fn of(folder: &Path) -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("landmarkdb-catalog-{:032x}", rand::random::<u128>()));
        DirBuilder::new().mode(0o700).create(&path)?;
        let copied = Copied(path);
        copy_files(folder, &copied.0)?;
        Ok(copied)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a copy of the catalog stays behind");
        }
    }
}

/// Without permissions: what may not be written here is written there.
fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let copy = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            DirBuilder::new().mode(0o700).create(&copy)?;
            copy_files(&entry.path(), &copy)?;
        } else {
            io::copy(&mut File::open(entry.path())?, &mut private().create_new(true).open(copy)?)?;
        }
    }
    Ok(())
}

/// The segments of a folder, and what recovery makes of them in memory.
struct Overlay {
    below: SegmentFolder,
    changes: Arc<Mutex<Changes>>,
}

#[derive(Default)]
struct Changes {
    /// Where segments end that were cut.
    ends: BTreeMap<SegmentId, u64>,
    removed: BTreeSet<SegmentId>,
    begun: BTreeMap<SegmentId, Arc<Begun>>,
    /// What was cut off.
    torn: Vec<(Torn, Vec<u8>)>,
}

/// A segment that lies in the folder.
struct Below {
    id: SegmentId,
    file: File,
    /// Nothing counts that lies behind.
    end: AtomicU64,
    changes: Arc<Mutex<Changes>>,
}

/// A segment that recovery began.
#[derive(Default)]
struct Begun(Mutex<Vec<u8>>);

impl Overlay {
    fn over(below: SegmentFolder) -> Self {
        Overlay { below, changes: Arc::default() }
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().ignore_poison()
    }
}

fn read_only() -> io::Error {
    io::ErrorKind::ReadOnlyFilesystem.into()
}

impl Segments for Overlay {
    fn directory(&self) -> DirectoryId {
        self.below.directory()
    }

    fn list(&self) -> io::Result<Vec<SegmentId>> {
        let mut ids = self.below.list()?;
        let changes = self.changes();
        ids.retain(|id| !changes.removed.contains(id));
        ids.extend(changes.begun.keys());
        Ok(ids)
    }

    fn open(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let changes = self.changes();
        if let Some(begun) = changes.begun.get(&id) {
            return Ok(begun.clone());
        }
        if changes.removed.contains(&id) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let end = AtomicU64::new(changes.ends.get(&id).copied().unwrap_or(u64::MAX));
        Ok(Arc::new(Below { id, file: self.below.open_to_read(id)?, end, changes: self.changes.clone() }))
    }

    fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let begun = Arc::new(Begun::default());
        self.changes().begun.insert(id, begun.clone());
        Ok(begun)
    }

    fn remove(&self, id: SegmentId) -> io::Result<()> {
        let mut changes = self.changes();
        if changes.begun.remove(&id).is_none() {
            changes.removed.insert(id);
        }
        Ok(())
    }

    fn set_aside(&self, id: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        tracing::warn!(segment = id.0, offset, bytes = bytes.len(), "an unfinished append is passed over");
        let torn = Torn { segment: id, offset, bytes: bytes.len() as u64, whole: false };
        self.changes().torn.push((torn, bytes.to_vec()));
        Ok(())
    }

    fn torn(&self) -> io::Result<Vec<Torn>> {
        self.below.torn()
    }

    fn read_torn(&self, torn: &Torn) -> io::Result<Vec<u8>> {
        self.below.read_torn(torn)
    }

    fn passed_over(&self) -> Vec<(Torn, Vec<u8>)> {
        self.changes().torn.clone()
    }

    fn move_aside(&self, _: SegmentId) -> io::Result<()> {
        Err(read_only())
    }

    fn discard_torn(&self) -> io::Result<()> {
        Err(read_only())
    }
}

impl Below {
    /// That bytes do not lie behind the end.
    fn check(&self, offset: u64, bytes: usize) -> io::Result<()> {
        let is_inside = offset.checked_add(bytes as u64).is_some_and(|to| to <= self.end.load(Ordering::Relaxed));
        if is_inside { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

impl SegmentFile for Below {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.file.len_bytes()?.min(self.end.load(Ordering::Relaxed)))
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.check(offset, into.len())?;
        SegmentFile::read_at(&self.file, offset, into)
    }

    fn read_at_hand(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.check(offset, into.len())?;
        self.file.read_at_hand(offset, into)
    }

    fn expect(&self, offset: u64, bytes: u64) {
        self.file.expect(offset, bytes);
    }

    /// Recovery writes again what is there, in case the disk has not got it yet.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut there = vec![0; bytes.len()];
        self.read_at(offset, &mut there)?;
        if there == bytes { Ok(()) } else { Err(read_only()) }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&self, len_bytes: u64) -> io::Result<()> {
        self.changes.lock().ignore_poison().ends.insert(self.id, len_bytes);
        self.end.store(len_bytes, Ordering::Relaxed);
        Ok(())
    }
}

impl SegmentFile for Begun {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().ignore_poison().len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let held = self.0.lock().ignore_poison();
        let from = usize::try_from(offset).ok().and_then(|offset| held.get(offset..)?.get(..into.len()));
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut held = self.0.lock().ignore_poison();
        if offset != held.len() as u64 {
            return Err(read_only());
        }
        held.extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&self, len_bytes: u64) -> io::Result<()> {
        self.0.lock().ignore_poison().truncate(len_bytes as usize);
        Ok(())
    }
}
