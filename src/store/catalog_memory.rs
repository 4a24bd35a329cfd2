//! A catalog in memory: what a rebuild fills to be compared with the one on disk, and what stands in where that cannot be
//! opened or written any more.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

use super::catalog::{Batch, Catalog, Pair, discard_folder, key};
use super::error::is_out_of_files;
use crate::lock::IgnorePoison;

#[derive(Default)]
pub(super) struct MemoryCatalog {
    pairs: RwLock<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// What it stands in for.
    outdated: Mutex<Outdated>,
}

/// A catalog on disk that is behind and must not be found by the next opening.
#[derive(Default)]
enum Outdated {
    #[default]
    Nothing,
    Folder(PathBuf),
    Catalog(Arc<dyn Catalog>),
}

impl MemoryCatalog {
    /// In the place of a catalog that cannot be opened.
    pub(super) fn in_place_of_folder(path: PathBuf) -> Self {
        MemoryCatalog { outdated: Mutex::new(Outdated::Folder(path)), ..MemoryCatalog::default() }
    }

    /// In the place of a catalog that fails.
    pub(super) fn in_place_of(catalog: Arc<dyn Catalog>) -> Self {
        MemoryCatalog { outdated: Mutex::new(Outdated::Catalog(catalog)), ..MemoryCatalog::default() }
    }
}

impl Catalog for MemoryCatalog {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.pairs.read().ignore_poison().get(key).cloned())
    }

    /// The pairs as they are now.
    fn scan(&self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>>> {
        let pairs = self.pairs.read().ignore_poison();
        let from = pairs.range(prefix.to_vec()..).take_while(|(key, _)| key.starts_with(prefix));
        let found: Vec<_> = from.map(|(key, value)| Ok((key.clone(), value.clone()))).collect();
        Box::new(found.into_iter())
    }

    fn apply(&self, batch: Batch) -> io::Result<()> {
        let mut pairs = self.pairs.write().ignore_poison();
        for (key, value) in batch {
            match value {
                Some(value) => pairs.insert(key, value),
                None => pairs.remove(&key),
            };
        }
        Ok(())
    }

    /// What was flushed need not be found again, but nothing older may be: segments are removed after a flush.
    fn flush(&self) -> io::Result<()> {
        let mut outdated = self.outdated.lock().ignore_poison();
        match &*outdated {
            Outdated::Nothing => {}
            Outdated::Folder(path) => discard_folder(path)?,
            Outdated::Catalog(catalog) => catalog.discard()?,
        }
        *outdated = Outdated::Nothing;
        Ok(())
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn discard(&self) -> io::Result<()> {
        self.flush()
    }
}

/// The catalog in use: whether it fails is noted, and another can take its place.
pub(super) struct CatalogSlot {
    inside: Arc<RwLock<Inside>>,
    /// Whether a call on it has failed since it was last seen to work.
    broken: Arc<AtomicBool>,
}

struct Inside {
    catalog: Arc<dyn Catalog>,
    /// A batch failed: some of it may be there, which nothing but a rebuild undoes. Until then nothing is read from it.
    is_torn: bool,
    /// It is in memory and has taken the place of another: only the removal of that one can fail.
    stands_in: bool,
    /// Catalogs that were in use before this one.
    before: usize,
}

impl CatalogSlot {
    pub(super) fn new(catalog: Arc<dyn Catalog>) -> Self {
        let inside = Inside { catalog, is_torn: false, stands_in: false, before: 0 };
        CatalogSlot { inside: Arc::new(RwLock::new(inside)), broken: Arc::default() }
    }

    fn inside(&self) -> RwLockReadGuard<'_, Inside> {
        self.inside.read().ignore_poison()
    }

    pub(super) fn current(&self) -> Arc<dyn Catalog> {
        self.inside().catalog.clone()
    }

    pub(super) fn replace(&self, catalog: Arc<dyn Catalog>) {
        let mut inside = self.inside.write().ignore_poison();
        *inside = Inside { catalog, is_torn: false, stands_in: true, before: inside.before + 1 };
        self.broken.store(false, Ordering::Release);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Whether it may hold a part of a batch, or hangs.
    pub(super) fn is_torn(&self) -> bool {
        self.inside().is_torn
    }

    /// Whether it works, as far as is known; asked again if a call has failed.
    pub(super) fn works(&self) -> bool {
        if !self.is_broken() || self.inside().stands_in {
            return true;
        }
        let works = !self.is_torn() && self.get(key::TOTALS).is_ok() && self.flush().is_ok();
        if works {
            self.broken.store(false, Ordering::Release);
        }
        works
    }

    /// Sees to it that the next opening does not find the catalog in whose place this one is: before anything is acknowledged.
    pub(super) fn settle(&self) -> io::Result<()> {
        if self.inside().stands_in {
            self.flush()?;
            self.broken.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// That there is no descriptor left says nothing about the catalog.
    fn watch<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.as_ref().is_err_and(|error| !is_out_of_files(error)) {
            self.broken.store(true, Ordering::Release);
        }
        result
    }
}

impl Inside {
    fn whole(&self) -> io::Result<&Arc<dyn Catalog>> {
        if self.is_torn { Err(io::Error::other("a change of it failed midway")) } else { Ok(&self.catalog) }
    }

    /// Whether what was read of it meanwhile is whole: a batch that fails is known to have failed before anybody gets here.
    fn is_still(&self, before: usize) -> bool {
        !self.is_torn && self.before == before
    }
}

impl Catalog for CatalogSlot {
    /// No lock is held over the call: sled may wait for ever.
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        loop {
            let current = {
                let inside = self.inside();
                inside.whole().map(|catalog| (catalog.clone(), inside.before))
            };
            let (catalog, before) = self.watch(current)?;
            let found = catalog.get(key);
            if self.inside().is_still(before) {
                return self.watch(found);
            }
        }
    }

    fn scan(&self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>>> {
        let (inside, broken) = (self.inside.clone(), self.broken.clone());
        let (current, before) = {
            let inside = self.inside();
            (inside.whole().cloned(), inside.before)
        };
        let mut pairs = match self.watch(current) {
            Ok(catalog) => catalog.scan(prefix),
            Err(error) => return Box::new(std::iter::once(Err(error))),
        };
        let mut is_over = false;
        Box::new(std::iter::from_fn(move || {
            if is_over {
                return None;
            }
            let pair = pairs.next();
            if let Some(Err(error)) = &pair
                && !is_out_of_files(error)
            {
                broken.store(true, Ordering::Release);
            }
            is_over = !matches!(pair, Some(Ok(_)));
            if !inside.read().ignore_poison().is_still(before) {
                is_over = true;
                return Some(Err(io::Error::other("another has taken its place meanwhile: try again")));
            }
            pair
        }))
    }

    /// Readers wait meanwhile: none sees a part of a batch.
    fn apply(&self, batch: Batch) -> io::Result<()> {
        let mut inside = self.inside.write().ignore_poison();
        inside.whole()?;
        inside.is_torn = true;
        let applied = inside.catalog.apply(batch);
        inside.is_torn = applied.is_err();
        if inside.is_torn {
            self.broken.store(true, Ordering::Release);
        }
        applied
    }

    fn flush(&self) -> io::Result<()> {
        let current = {
            let inside = self.inside();
            inside.whole().map(|catalog| (catalog.clone(), inside.before))
        };
        let (catalog, before) = self.watch(current)?;
        let flushed = self.watch(catalog.flush());
        if flushed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
            // It hangs, and would the next time.
            let mut inside = self.inside.write().ignore_poison();
            inside.is_torn |= inside.before == before;
        }
        flushed
    }

    fn size_bytes(&self) -> io::Result<u64> {
        self.current().size_bytes()
    }

    fn discard(&self) -> io::Result<()> {
        self.current().discard()
    }
}
