//! Opening and closing a data directory.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::catalog::{self, Catalog, SledCatalog, key};
use super::catalog_memory::{CatalogSlot, MemoryCatalog};
use super::directory;
use super::error::{StoreError, is_out_of_files};
use super::handles::Handles;
use super::locator_cache::LocatorCache;
use super::recovery;
use super::segment::{SegmentFolder, Segments, private};
use super::state::{Signal, Sizes, Store};
use crate::lock::IgnorePoison;
use crate::types::DocumentId;

/// What a store is made of, and the lock that keeps others out.
type Parts = (Box<dyn Segments>, Arc<dyn Catalog>, File);

pub(super) const CATALOG_FOLDER: &str = "catalog";

/// How long a directory may stay locked by one who is about to let go of it: a process that was just killed, or a child that
/// another thread has forked and that has not begun its program yet.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

pub(super) fn lock_within(dir: &Path, lock: impl Fn() -> Result<(), TryLockError>) -> Result<(), StoreError> {
    let begun = Instant::now();
    loop {
        match lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_PATIENCE => sleep(Duration::from_millis(10)),
            Err(TryLockError::WouldBlock) => return Err(StoreError::Locked { path: dir.to_owned() }),
            Err(TryLockError::Error(source)) => {
                return Err(StoreError::Io { step: "lock the data directory", source });
            }
        }
    }
}

impl Store {
    /// Opens a data directory, creating it if absent, and recovers it after a crash or damage.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let (segments, catalog, lock) = Store::parts(dir, open_catalog)?;
        let mut store = Store::open_sized(segments, catalog, Sizes::default())?;
        store.handles.folder().keep_reserve();
        store._lock = Some(lock);
        Ok(store)
    }

    pub(super) fn parts(
        dir: &Path,
        open_catalog: impl FnOnce(&Path) -> Result<Arc<dyn Catalog>, StoreError>,
    ) -> Result<Parts, StoreError> {
        let id = directory::open(dir)?;
        let lock = private()
            .create(true)
            .open(dir.join(directory::LOCK_FILE))
            .map_err(StoreError::io("open the lock file"))?;
        lock_within(dir, || lock.try_lock())?;
        let segments = SegmentFolder::open(dir, id).map_err(StoreError::io("open the segment folder"))?;
        let catalog = open_catalog(&dir.join(CATALOG_FOLDER))?;
        Ok((Box::new(segments), catalog, lock))
    }

    /// Opens what lies behind the two seams. The caller makes sure that no other process has it open.
    pub fn open_on(segments: Box<dyn Segments>, catalog: Box<dyn Catalog>) -> Result<Store, StoreError> {
        Store::open_sized(segments, catalog.into(), Sizes::default())
    }

    pub(super) fn open_sized(
        segments: Box<dyn Segments>,
        catalog: Arc<dyn Catalog>,
        sizes: Sizes,
    ) -> Result<Store, StoreError> {
        let handles = Handles::new(segments);
        let writer = recovery::recover(&handles, &*catalog, sizes)?;
        let stats = Mutex::new(writer.stats());
        let garbage = catalog::scan::<DocumentId>(&*catalog, key::GARBAGE);
        let locators = LocatorCache::of_deleted(garbage.map(|pair| pair.map(|pair| pair.1)).collect::<Result<_, _>>()?);
        Ok(Store {
            handles,
            catalog: CatalogSlot::new(catalog),
            locators,
            writer: Mutex::new(writer),
            stats,
            health: Mutex::default(),
            compactor: Signal::default(),
            reads_only: false,
            _lock: None,
        })
    }
}

/// The catalog on disk, or one in memory in its place where the disk does not let it be opened.
fn open_catalog(path: &Path) -> Result<Arc<dyn Catalog>, StoreError> {
    match SledCatalog::open(path) {
        Ok(catalog) => Ok(Arc::new(catalog)),
        // It is there, and works as soon as files can be opened again.
        Err(error) if is_out_of_files(&error) => Err(StoreError::Catalog { step: "open", source: error }),
        Err(error) => {
            tracing::error!(%error, "the catalog cannot be opened: it is rebuilt in memory");
            Ok(Arc::new(MemoryCatalog::in_place_of_folder(path.to_owned())))
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // What a caller was told has failed must not be found by the next opening, in the log or, in part, in the catalog.
        let cut = self.writer.get_mut().ignore_poison().cut_back();
        if let Err(error) = cut {
            tracing::error!(%error, "an append that failed may be there when the store is opened again");
        }
        if self.catalog.is_torn() {
            if let Err(error) = self.catalog.discard() {
                tracing::error!(%error, "a change that failed may be there in part when the store is opened again: repair the directory");
            }
        } else if let Err(error) = self.catalog.flush() {
            tracing::warn!(%error, "the catalog was not flushed; the next opening reads more of the log");
        }
    }
}
