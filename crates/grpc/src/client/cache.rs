//! Blocks that were fetched before, bounded in bytes. For callers that attend over fetched K and V themselves and come
//! back to the same blocks step after step.

use std::sync::{Arc, Mutex, MutexGuard};

use landmarkdb::lock::IgnorePoison;
use landmarkdb::lru::LruCache;
use landmarkdb::{BlockId, BlockMemory, DType, DocumentId, FetchRequest, Result, StoredBlock};

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

struct Kept {
    blocks: LruCache<Key, StoredBlock>,
    hits: u64,
    misses: u64,
}

impl CachedBlocks {
    /// Keeps at most `bytes_max` bytes of blocks of `memory`.
    pub fn new(memory: Arc<dyn BlockMemory>, bytes_max: u64) -> Self {
        CachedBlocks { memory, kept: Mutex::new(Kept { blocks: LruCache::new(bytes_max), hits: 0, misses: 0 }) }
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
                kept.blocks.put((block.id, request.dtype), block.clone(), block_bytes(&block));
            }
            *place = Some(block);
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Drops what is kept of a document.
    pub fn forget(&self, document: DocumentId) {
        self.kept().blocks.retain(|(id, _)| id.document != document);
    }

    /// Hits and misses since the cache was made, and the blocks that it holds now.
    pub fn counts(&self) -> CacheCounts {
        let Kept { blocks, hits, misses } = &*self.kept();
        CacheCounts { hits: *hits, misses: *misses, blocks: blocks.count() as u64, bytes: blocks.bytes() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().ignore_poison()
    }
}

impl Kept {
    fn get(&mut self, key: Key) -> Option<StoredBlock> {
        let found = self.blocks.get(key);
        *if found.is_some() { &mut self.hits } else { &mut self.misses } += 1;
        found
    }
}

fn block_bytes(block: &StoredBlock) -> u64 {
    let ids = 4 * (block.token_ids.len() + block.text.offsets.len());
    (block.k.data.len() + block.v.data.len() + block.text.bytes.len() + ids) as u64
}
