//! A disk that is full: what is there is read, listed, verified and deleted, in the process that filled it and in one that
//! opens it full; space that comes back is used without a restart.

use std::io::Write;
use std::path::Path;

use landmarkdb::store::{BlockRecord, Store, StoreError};
use landmarkdb::{BlockId, CollectionId, DocumentId};

use super::script::{made, read, spec};

/// What the folder may grow by: some hundred blocks beside sled's own files.
pub const SPACE: u64 = 12 << 20;
/// Blocks that are there before it is full.
const KEPT: u32 = 20;

fn big(name: &str, index: u32) -> BlockRecord {
    let mut block = made(name, 1, index, 4);
    block.meta.text = block.meta.text.repeat(150);
    block.meta.text_start = index as u64 * block.meta.text.len() as u64;
    block
}

fn find(store: &Store, name: &str) -> DocumentId {
    store.find_document(CollectionId(1), name).unwrap().unwrap_or_else(|| panic!("no document {name}"))
}

fn is_full(error: &StoreError) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(|source| source.kind() == std::io::ErrorKind::StorageFull) || error.to_string().contains("space")
}

/// Appends to the document `filler` until nothing more fits. Returns how many blocks did.
fn fill(store: &Store) -> u32 {
    let filler = find(store, "filler");
    for index in store.manifest(filler).unwrap().blocks.. {
        if let Err(error) = store.append(filler, &[big("filler", index)]) {
            assert!(is_full(&error), "a full disk is reported as: {error}");
            return index;
        }
    }
    unreachable!("the disk is never full")
}

/// Everything that takes no space works.
fn is_readable(store: &Store) {
    for (name, at_least) in [("kept", KEPT), ("filler", 1)] {
        let manifest = store.manifest(find(store, name)).unwrap();
        assert!(manifest.blocks >= at_least, "{manifest:?}");
        for index in 0..manifest.blocks {
            let found = read(store, BlockId { document: manifest.id, index }).unwrap();
            assert!(found == big(name, index), "block {index} of {name} is not what was appended");
        }
    }
    assert_eq!(store.manifests(CollectionId(1)).unwrap().len(), 2);
    assert_eq!(store.verify(None, &mut |_, _| {}).unwrap().faults, []);
}

/// Deletes the filler on the full disk, and uses the space that comes back.
fn make_room(store: &Store) {
    store.delete(find(store, "filler")).expect("a delete on a full disk");
    let kept = find(store, "kept");
    let begun = std::time::Instant::now();
    for index in store.manifest(kept).unwrap().blocks..KEPT + 40 {
        // Compaction may be under way.
        while let Err(error) = store.append(kept, &[big("kept", index)]) {
            assert!(is_full(&error) && begun.elapsed().as_secs() < 5, "an append once space has come back: {error}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn begin(folder: &Path) -> Store {
    let store = Store::open(folder).unwrap();
    let collection = store.create_collection(&spec()).unwrap();
    for name in ["kept", "filler"] {
        store.create_document(collection, name).unwrap();
    }
    store.append(find(&store, "kept"), &(0..KEPT).map(|index| big("kept", index)).collect::<Vec<_>>()).unwrap();
    store
}

/// What a child process does.
pub fn work(folder: &Path, part: &str) {
    let filled = match part {
        "fill and free" => {
            let store = begin(folder);
            let filled = fill(&store);
            is_readable(&store);
            fill(&store);
            is_readable(&store);
            make_room(&store);
            filled
        }
        "fill" => {
            let store = begin(folder);
            fill(&store)
        }
        "open full and free" => {
            let store = Store::open(folder).expect("a full disk is opened");
            is_readable(&store);
            let filled = store.manifest(find(&store, "filler")).unwrap().blocks;
            make_room(&store);
            filled
        }
        other => panic!("no part {other}"),
    };
    println!("part done {filled}");
    std::io::stdout().flush().unwrap();
}

/// What the parent finds at the end.
pub fn check(store: &Store) {
    let kept = store.manifest(find(store, "kept")).unwrap();
    assert_eq!(kept.blocks, KEPT + 40);
    for index in 0..kept.blocks {
        assert!(read(store, BlockId { document: kept.id, index }).unwrap() == big("kept", index), "block {index}");
    }
    assert_eq!(store.find_document(CollectionId(1), "filler").unwrap(), None);
    assert_eq!(store.verify(None, &mut |_, _| {}).unwrap().faults, []);
}
