//! Blocks that were fetched before, bounded in bytes. For callers that attend over fetched K and V themselves and come
//! back to the same blocks step after step.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::api::{BlockMemory, FetchRequest, Result, StoredBlock};
use crate::types::{BlockId, DType, DocumentId};

/// A memory's `fetch`, with the blocks that were used last kept at hand.
///
/// Only full blocks are kept: they never change, while a tail does. A deleted document's blocks stay until they are
/// pushed out or [`forget`](Self::forget) is called; ids are never used twice, so they cannot be taken for others.
pub struct CachedBlocks {
    memory: Arc<dyn BlockMemory>,
    kept: Mutex<Kept>,
}

/// How a cache has done since it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CacheCounts {
    /// Blocks answered from the cache.
    pub hits: u64,
    /// Blocks that were fetched.
    pub misses: u64,
    /// Blocks held now.
    pub blocks: u64,
    /// Their bytes: K, V, text and token ids.
    pub bytes: u64,
}

type Key = (BlockId, DType);

/// Blocks in the order of their last use.
#[derive(Default)]
struct Kept {
    bytes_max: u64,
    blocks: HashMap<Key, (u64, StoredBlock)>,
    /// Use number to key: the first entry was used longest ago.
    uses: BTreeMap<u64, Key>,
    last_use: u64,
    counts: CacheCounts,
}

impl CachedBlocks {
    /// Keeps at most `bytes_max` bytes of blocks of `memory`.
    pub fn new(memory: Arc<dyn BlockMemory>, bytes_max: u64) -> Self {
        CachedBlocks { memory, kept: Mutex::new(Kept { bytes_max, ..Kept::default() }) }
    }

    /// As [`BlockMemory::fetch`]; asks the memory only for blocks that are not at hand.
    ///
    /// # Errors
    /// Those of the memory.
    pub fn fetch(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>> {
        let id = |index: u32| BlockId { document: request.document, index };
        let mut found: Vec<Option<StoredBlock>> = {
            let mut kept = self.kept();
            request.blocks.iter().map(|&index| kept.get((id(index), request.dtype))).collect()
        };
        let absent: Vec<u32> =
            request.blocks.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(&index, _)| index).collect();
        if absent.is_empty() && !request.blocks.is_empty() {
            return Ok(found.into_iter().flatten().collect());
        }
        // Asked before the blocks are: what is full now is full in what comes back.
        let full_blocks = self.memory.document(request.document)?.blocks;
        let fetched = self.memory.fetch(&FetchRequest { blocks: absent, ..request.clone() })?;
        let mut kept = self.kept();
        for (place, block) in found.iter_mut().filter(|place| place.is_none()).zip(fetched) {
            if block.id.index < full_blocks {
                kept.put((block.id, request.dtype), block.clone());
            }
            *place = Some(block);
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Drops what is kept of a document.
    pub fn forget(&self, document: DocumentId) {
        let mut kept = self.kept();
        let keys: Vec<Key> = kept.blocks.keys().filter(|(id, _)| id.document == document).copied().collect();
        keys.into_iter().for_each(|key| kept.remove(key));
    }

    pub fn counts(&self) -> CacheCounts {
        self.kept().counts
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Every change leaves the cache whole, so a panic elsewhere spoils nothing.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn get(&mut self, key: Key) -> Option<StoredBlock> {
        let Some((last_use, block)) = self.blocks.get_mut(&key) else {
            self.counts.misses += 1;
            return None;
        };
        self.counts.hits += 1;
        self.uses.remove(last_use);
        self.last_use += 1;
        *last_use = self.last_use;
        self.uses.insert(self.last_use, key);
        Some(block.clone())
    }

    fn put(&mut self, key: Key, block: StoredBlock) {
        let bytes = block_bytes(&block);
        if bytes > self.bytes_max {
            return;
        }
        self.remove(key);
        while self.counts.bytes + bytes > self.bytes_max {
            let Some((_, &oldest)) = self.uses.first_key_value() else { break };
            self.remove(oldest);
        }
        self.last_use += 1;
        self.uses.insert(self.last_use, key);
        self.blocks.insert(key, (self.last_use, block));
        self.counts.bytes += bytes;
        self.counts.blocks += 1;
    }

    fn remove(&mut self, key: Key) {
        if let Some((last_use, block)) = self.blocks.remove(&key) {
            self.uses.remove(&last_use);
            self.counts.bytes -= block_bytes(&block);
            self.counts.blocks -= 1;
        }
    }
}

fn block_bytes(block: &StoredBlock) -> u64 {
    let ids = 4 * (block.token_ids.len() + block.text.offsets.len());
    (block.k.data.len() + block.v.data.len() + block.text.bytes.len() + ids) as u64
}
