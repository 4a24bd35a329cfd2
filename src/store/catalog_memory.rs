//! A catalog in memory: what a rebuild fills to be compared with the one on disk, and what stands in where that cannot be
//! opened or written any more.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::catalog::{Batch, Catalog, Pair, discard_folder, key};

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
        Ok(self.pairs.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned())
    }

    /// The pairs as they are now.
    fn scan(&self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>>> {
        let pairs = self.pairs.read().unwrap_or_else(PoisonError::into_inner);
        let from = pairs.range(prefix.to_vec()..).take_while(|(key, _)| key.starts_with(prefix));
        let found: Vec<_> = from.map(|(key, value)| Ok((key.clone(), value.clone()))).collect();
        Box::new(found.into_iter())
    }

    fn apply(&self, batch: Batch) -> io::Result<()> {
        let mut pairs = self.pairs.write().unwrap_or_else(PoisonError::into_inner);
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
        let mut outdated = self.outdated.lock().unwrap_or_else(PoisonError::into_inner);
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
    current: RwLock<Arc<dyn Catalog>>,
    broken: Arc<AtomicBool>,
    /// A batch failed: some of it may be there, which nothing but a rebuild undoes.
    is_torn: AtomicBool,
}

impl CatalogSlot {
    pub(super) fn new(catalog: Arc<dyn Catalog>) -> Self {
        CatalogSlot { current: RwLock::new(catalog), broken: Arc::default(), is_torn: AtomicBool::new(false) }
    }

    pub(super) fn current(&self) -> Arc<dyn Catalog> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace(&self, catalog: Arc<dyn Catalog>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = catalog;
        self.broken.store(false, Ordering::Release);
        self.is_torn.store(false, Ordering::Release);
    }

    /// Whether a call on it has failed since it was last seen to work.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Whether it may hold a part of a batch.
    pub(super) fn is_torn(&self) -> bool {
        self.is_torn.load(Ordering::Acquire)
    }

    /// Whether it works now.
    pub(super) fn works(&self) -> bool {
        let works = !self.is_torn() && self.get(key::TOTALS).is_ok() && self.flush().is_ok();
        if works {
            self.broken.store(false, Ordering::Release);
        }
        works
    }

    fn watch<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|_| self.broken.store(true, Ordering::Release))
    }
}

impl Catalog for CatalogSlot {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.watch(self.current().get(key))
    }

    fn scan(&self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>>> {
        let broken = self.broken.clone();
        Box::new(self.current().scan(prefix).inspect(move |pair| {
            if pair.is_err() {
                broken.store(true, Ordering::Release);
            }
        }))
    }

    fn apply(&self, batch: Batch) -> io::Result<()> {
        self.watch(self.current().apply(batch)).inspect_err(|_| self.is_torn.store(true, Ordering::Release))
    }

    fn flush(&self) -> io::Result<()> {
        self.watch(self.current().flush())
    }

    fn size_bytes(&self) -> io::Result<u64> {
        self.current().size_bytes()
    }

    fn discard(&self) -> io::Result<()> {
        self.current().discard()
    }
}
