//! A catalog in memory: what a rebuild fills to be compared with the one on disk.

use std::collections::BTreeMap;
use std::io;
use std::sync::{PoisonError, RwLock};

use super::catalog::{Batch, Catalog, Pair};

#[derive(Default)]
pub(super) struct MemoryCatalog {
    pairs: RwLock<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl Catalog for MemoryCatalog {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.pairs.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned())
    }

    /// The pairs as they are now.
    fn scan<'a>(&'a self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>> + 'a> {
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

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
}
