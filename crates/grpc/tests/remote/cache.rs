//! The block cache in front of a memory.

use std::sync::Arc;

use landmarkdb::{BlockMemory, DType, DocumentId, FetchRequest, MemoryError};
use landmarkdb_grpc::client::CachedBlocks;

use crate::double::{Double, FULL_BLOCKS, UNKNOWN};

/// Bytes of a full f16 block of the double: K and V of (2, 2, 4, 8), 12 of text, 4 ids, 4 offsets.
const BLOCK_BYTES: u64 = 2 * 128 * 2 + 12 + 32;

fn request(blocks: &[u32]) -> FetchRequest {
    FetchRequest { document: DocumentId(1), blocks: blocks.to_vec(), dtype: DType::F16 }
}

fn fetches(memory: &Double) -> Vec<String> {
    memory.calls().into_iter().filter(|call| call.starts_with("fetch")).collect()
}

#[test]
fn answers_are_those_of_the_memory_and_blocks_are_fetched_once() {
    let memory = Arc::new(Double::default());
    let cache = CachedBlocks::new(memory.clone(), 1 << 20);
    for blocks in [&[3, 1, 3][..], &[1, 2], &[], &[2, 3, 1]] {
        assert_eq!(cache.fetch(&request(blocks)), Double::default().fetch(&request(blocks)), "{blocks:?}");
    }
    let expected: Vec<String> =
        [&[3, 1, 3][..], &[2], &[]].iter().map(|blocks| format!("fetch {:?}", request(blocks))).collect();
    assert_eq!(fetches(&memory), expected);
    let counts = cache.counts();
    assert_eq!((counts.hits, counts.misses, counts.blocks, counts.bytes), (4, 4, 3, 3 * BLOCK_BYTES));
    let other = FetchRequest { dtype: DType::F32, ..request(&[1]) };
    assert_eq!(cache.fetch(&other), Double::default().fetch(&other), "another dtype is another block");
}

#[test]
fn the_block_used_longest_ago_goes_first_and_the_bound_holds() {
    let memory = Arc::new(Double::default());
    let cache = CachedBlocks::new(memory.clone(), 2 * BLOCK_BYTES);
    for blocks in [[0], [1], [0], [2], [0], [1]] {
        cache.fetch(&request(&blocks)).unwrap();
        assert!(cache.counts().bytes <= 2 * BLOCK_BYTES);
    }
    // Block 0 was used again before 2 came, so 1 went.
    assert_eq!((cache.counts().hits, cache.counts().misses), (2, 4));
    let tiny = CachedBlocks::new(memory, BLOCK_BYTES - 1);
    assert_eq!(tiny.fetch(&request(&[0, 1])).unwrap().len(), 2);
    assert_eq!(tiny.counts().blocks, 0, "what does not fit is not kept");
}

#[test]
fn tails_are_not_kept_and_forgotten_documents_are_gone() {
    let memory = Arc::new(Double::default());
    let cache = CachedBlocks::new(memory.clone(), 1 << 20);
    for _ in 0..2 {
        cache.fetch(&request(&[FULL_BLOCKS, FULL_BLOCKS - 1])).unwrap();
    }
    assert_eq!((cache.counts().hits, cache.counts().misses, cache.counts().blocks), (1, 3, 1));
    cache.forget(DocumentId(2));
    assert_eq!(cache.counts().blocks, 1);
    cache.forget(DocumentId(1));
    assert_eq!((cache.counts().blocks, cache.counts().bytes), (0, 0));
    let unknown = FetchRequest { document: UNKNOWN, ..request(&[0]) };
    assert!(matches!(cache.fetch(&unknown), Err(MemoryError::NotFound { .. })));
}
