//! What a cache keeps: values in the order of their last use, bounded in bytes.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Values by key. The one that was used longest ago goes first.
pub struct LruCache<K, V> {
    bytes_max: u64,
    bytes: u64,
    kept: HashMap<K, Kept<V>>,
    /// Use number to key: the first entry was used longest ago.
    uses: BTreeMap<u64, K>,
    last_use: u64,
}

struct Kept<V> {
    value: V,
    bytes: u64,
    last_use: u64,
}

impl<K: Copy + Eq + Hash, V: Clone> LruCache<K, V> {
    /// Keeps at most so many bytes.
    pub fn new(bytes_max: u64) -> Self {
        LruCache { bytes_max, bytes: 0, kept: HashMap::new(), uses: BTreeMap::new(), last_use: 0 }
    }

    /// The value, which is now the one that was used last.
    pub fn get(&mut self, key: K) -> Option<V> {
        let kept = self.kept.get_mut(&key)?;
        self.uses.remove(&kept.last_use);
        self.last_use += 1;
        kept.last_use = self.last_use;
        self.uses.insert(self.last_use, key);
        Some(kept.value.clone())
    }

    /// Keeps a value of so many bytes, in place of an older one of its key; one that alone is too large is not kept.
    pub fn put(&mut self, key: K, value: V, bytes: u64) {
        self.remove(key);
        if bytes > self.bytes_max {
            return;
        }
        while self.bytes + bytes > self.bytes_max {
            let Some((_, &oldest)) = self.uses.first_key_value() else { break };
            self.remove(oldest);
        }
        self.last_use += 1;
        self.bytes += bytes;
        self.uses.insert(self.last_use, key);
        self.kept.insert(key, Kept { value, bytes, last_use: self.last_use });
    }

    /// Drops every value whose key is not wanted.
    pub fn retain(&mut self, wanted: impl Fn(&K) -> bool) {
        let gone: Vec<K> = self.kept.keys().filter(|key| !wanted(key)).copied().collect();
        gone.into_iter().for_each(|key| self.remove(key));
    }

    /// Values held now.
    pub fn count(&self) -> usize {
        self.kept.len()
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn remove(&mut self, key: K) {
        if let Some(kept) = self.kept.remove(&key) {
            self.uses.remove(&kept.last_use);
            self.bytes -= kept.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_used_longest_ago_goes_first() {
        let mut recent = LruCache::new(10);
        (0..3).for_each(|key| recent.put(key, key, 3));
        assert_eq!(recent.get(0), Some(0));
        recent.put(3, 3, 4);
        assert_eq!([0, 1, 2, 3].map(|key| recent.get(key)), [Some(0), None, Some(2), Some(3)]);
        assert_eq!((recent.count(), recent.bytes()), (3, 10));
        recent.put(0, 9, 1);
        assert_eq!((recent.get(0), recent.bytes()), (Some(9), 8));
        recent.put(2, 2, 11);
        assert_eq!((recent.get(2), recent.bytes()), (None, 5), "what is too large takes nobody's place");
        recent.retain(|&key| key == 3);
        assert_eq!((recent.count(), recent.bytes()), (1, 4));
    }
}
