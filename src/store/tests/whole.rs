//! The store as its callers use it, on real files and sled unless the test is about neither.

use super::*;
use crate::limits;

fn id(document: DocumentId, index: u32) -> BlockId {
    BlockId { document, index }
}

#[test]
fn everything_comes_back_after_reopening_and_without_the_catalog() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let one = store.create_collection(&spec("one")).unwrap();
    let two = store.create_collection(&spec("two")).unwrap();
    let a = store.create_document(one, "a").unwrap().id;
    let b = store.create_document(two, "b").unwrap().id;
    let empty = store.create_document(one, "an empty one").unwrap().id;
    let mut first = blocks(0..3, 1);
    first.push(block(3, 2, 1));
    let manifest = store.append(a, &first).unwrap();
    assert_eq!((manifest.blocks, manifest.tail_tokens, manifest.text_bytes), (3, 2, 28));
    assert_eq!(store.append(b, &blocks(0..2, 2)).unwrap().blocks, 2);
    let manifest = store.append(a, &blocks(3..4, 9)).unwrap();
    assert_eq!((manifest.blocks, manifest.tail_tokens, manifest.text_bytes), (4, 0, 32));
    assert!(store.seal(b).unwrap().sealed);

    assert_eq!(store.find_document(one, "a").unwrap(), Some(a));
    assert_eq!(store.find_document(two, "a").unwrap(), None);
    let names: Vec<String> = store.manifests(one).unwrap().into_iter().map(|manifest| manifest.name).collect();
    assert_eq!(names, ["a", "an empty one"]);
    assert_eq!(store.manifest(empty).unwrap().blocks, 0);
    assert_eq!(read(&store, id(a, 3)).unwrap(), block(3, 4, 9), "the block replaced the tail");
    let stats = store.stats();
    assert_eq!((stats.documents, stats.blocks, stats.tokens, stats.segments), (3, 6, 24, 1));
    let on_disk = |id| store.read_meta(id).unwrap().1;
    let stored: u64 = (0..4).map(|index| on_disk(id(a, index))).sum();
    assert!(manifest.stored_bytes > stored && manifest.stored_bytes < stored + 300, "{manifest:?}, {stored}");

    let before = contents(&store);
    assert_clean(&store, "as written");
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(contents(&store), before);
    assert_eq!(StoreStats { catalog_bytes: 0, ..store.stats() }, StoreStats { catalog_bytes: 0, ..stats });
    drop(store);

    std::fs::remove_dir_all(dir.path().join(CATALOG_FOLDER)).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(contents(&store), before);
    assert_eq!(StoreStats { catalog_bytes: 0, ..store.stats() }, StoreStats { catalog_bytes: 0, ..stats });
    assert_clean(&store, "rebuilt");
}

#[test]
fn a_tail_grows_until_it_is_a_block() {
    let store = open(&FaultDisk::default()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    let mut stored = Vec::new();
    for tokens in 1..=4 {
        let manifest = store.append(document, &[block(0, tokens, tokens)]).unwrap();
        assert_eq!((manifest.blocks, manifest.tail_tokens), if tokens < 4 { (0, tokens) } else { (1, 0) });
        assert_eq!(read(&store, id(document, 0)).unwrap(), block(0, tokens, tokens));
        stored.push(manifest.stored_bytes - store.read_meta(id(document, 0)).unwrap().1);
    }
    assert!(stored.iter().all(|&rest| rest == stored[0]), "only the newest version of a tail counts: {stored:?}");
    assert_eq!(store.stats().tokens, 4);
    assert_clean(&store, "grown");
}

#[test]
fn appends_are_refused_by_kind() {
    let store = open(&FaultDisk::default()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    store.append(document, &blocks(0..2, 1)).unwrap();
    let before = contents(&store);

    let gap = store.append(document, &blocks(3..4, 1));
    assert!(matches!(gap, Err(StoreError::OutOfOrder { expected: 2, found: 3 })), "{gap:?}");
    let jump = store.append(document, &[block(2, 4, 1), block(4, 4, 1)]);
    assert!(matches!(jump, Err(StoreError::OutOfOrder { expected: 3, found: 4 })), "{jump:?}");
    let other = store.append(document, &[block(0, 4, 1), block(1, 4, 7), block(2, 4, 1)]);
    assert!(matches!(other, Err(StoreError::Conflict { index: 1, .. })), "{other:?}");
    let short = store.append(document, &[block(2, 3, 1), block(3, 4, 1)]);
    assert!(matches!(short, Err(StoreError::Invalid { field: "tokens of a block", .. })), "{short:?}");
    let none = store.append(document, &[block(2, 0, 1)]);
    assert!(matches!(none, Err(StoreError::Invalid { field: "tokens of a block", .. })), "{none:?}");
    let cut = store.append(document, &[BlockRecord { pieces: vec![0; 7], ..block(2, 4, 1) }]);
    assert!(matches!(cut, Err(StoreError::Invalid { field: "bytes of pieces of a block", .. })), "{cut:?}");
    let keys = store.append(document, &[BlockRecord { keys: vec![1], ..block(2, 2, 1) }]);
    assert!(matches!(keys, Err(StoreError::Invalid { field: "bytes of keys of a block", .. })), "{keys:?}");
    let nobody = store.append(DocumentId(99), &blocks(0..1, 1));
    assert!(matches!(nobody, Err(StoreError::NotFound { entity: Entity::Document(DocumentId(99)) })), "{nobody:?}");
    assert_eq!(contents(&store), before);

    assert_eq!(store.append(document, &blocks(0..3, 1)).unwrap().blocks, 3, "known blocks are skipped");
    store.seal(document).unwrap();
    let sealed = store.append(document, &blocks(3..4, 1));
    assert!(matches!(sealed, Err(StoreError::Sealed)), "{sealed:?}");
    assert!(store.append(document, &blocks(0..3, 1)).unwrap().sealed, "nothing new, nothing refused");
}

#[test]
fn names_are_unique_and_unknown_things_are_not_found() {
    let store = open(&FaultDisk::default()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    store.create_document(collection, "a").unwrap();
    for taken in [store.create_collection(&spec("one")).map(drop), store.create_document(collection, "a").map(drop)] {
        assert!(matches!(taken, Err(StoreError::AlreadyExists { .. })), "{taken:?}");
    }
    let nowhere = store.create_document(CollectionId(7), "a");
    assert!(matches!(nowhere, Err(StoreError::NotFound { entity: Entity::Collection(_) })), "{nowhere:?}");
    let nothing = store.read_meta(id(DocumentId(1), 0));
    assert!(matches!(nothing, Err(StoreError::NotFound { entity: Entity::Block(_) })), "{nothing:?}");
    assert!(matches!(store.create_document(collection, "a\nb"), Err(StoreError::Invalid { field: "name", .. })));
    assert_eq!(store.collection(CollectionId(7)).unwrap(), None);
}

/// A full disk, or a kill, can end the creation of a directory anywhere. What it left made the directory one of somebody
/// else for the next opening.
#[test]
fn a_directory_whose_creation_was_cut_short_is_opened() {
    for left in [&["LOCK"][..], &["LANDMARKDB.new"], &["LANDMARKDB.new", "LOCK"]] {
        let dir = tempfile::tempdir().unwrap();
        left.iter().for_each(|name| std::fs::write(dir.path().join(name), "").unwrap());
        let store = Store::open(dir.path()).unwrap();
        store.create_collection(&spec("one")).unwrap();
    }
}

#[test]
fn a_held_directory_is_refused_and_free_after_a_drop() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let refused = Store::open(dir.path()).map(drop);
    assert!(matches!(&refused, Err(StoreError::Locked { path }) if path == dir.path()), "{refused:?}");
    drop(store);
    Store::open(dir.path()).unwrap();
}

/// A child that was forked and has not begun its program yet holds what its parent had open.
#[test]
fn a_directory_is_waited_for_a_moment() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| Store::open(dir.path()).map(drop));
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(store);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn deleting_half_gives_the_space_back() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let documents: Vec<DocumentId> =
        (0..20).map(|n| store.create_document(collection, &n.to_string()).unwrap().id).collect();
    // Interleaved, so that every segment is half dead afterwards.
    for index in 0..10 {
        for &document in &documents {
            store.append(document, &blocks(index..index + 1, 1)).unwrap();
        }
    }
    let full = store.stats().segment_bytes;
    let mut freed = 0;
    for &document in documents.iter().step_by(2) {
        let one = store.delete(document).unwrap();
        assert_eq!(one.blocks, 10);
        freed += one.bytes;
    }
    let stats = store.stats();
    let on_disk: u64 = disk.segments().iter().map(|&id| disk.bytes_of(id).len() as u64).sum();
    assert_eq!(stats.segment_bytes, on_disk);
    assert!(on_disk * 100 <= stats.live_bytes * limits::SPACE_PERCENT_MAX, "{stats:?}");
    assert!(freed > full / 4 && on_disk < full * 2 / 3, "{freed} of {full}, {on_disk} left");
    for &document in documents.iter().skip(1).step_by(2) {
        for index in 0..10 {
            assert_eq!(read(&store, id(document, index)).unwrap(), block(index, 4, 1));
        }
    }
    assert_clean(&store, "after deleting half");
}

#[test]
fn readers_go_on_while_segments_are_removed_under_them() {
    let store = open(&FaultDisk::default()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let kept = store.create_document(collection, "kept").unwrap().id;
    store.append(kept, &blocks(0..4, 1)).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    for index in 0..4 {
                        assert_eq!(read(&store, id(kept, index)).unwrap(), block(index, 4, 1));
                    }
                }
            });
        }
        for round in 0..60 {
            let other = store.create_document(collection, "other").unwrap().id;
            store.append(other, &blocks(0..5, round)).unwrap();
            store.append(kept, &blocks(4 + round..5 + round, 1)).unwrap();
            store.delete(other).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_clean(&store, "after the rounds");
}

#[test]
fn readers_see_what_was_acknowledged_before_they_asked() {
    let store = open(&FaultDisk::default()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let acknowledged = std::sync::atomic::AtomicU32::new(0);
    const LAST: u32 = 400;
    let document = store.create_document(collection, "a").unwrap().id;
    store.append(document, &[block(0, 2, 0)]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let oldest = acknowledged.load(std::sync::atomic::Ordering::Acquire);
                    let (tail, _) = store.read_meta(id(document, 0)).unwrap();
                    assert!(tail.token_ids[0] >= oldest * 1000, "{tail:?} once version {oldest} was durable");
                    if oldest == LAST {
                        break;
                    }
                }
            });
        }
        for seed in 1..=LAST {
            store.append(document, &[block(0, 2, seed)]).unwrap();
            acknowledged.store(seed, std::sync::atomic::Ordering::Release);
        }
    });
    store.delete(document).unwrap();
    let gone = store.read_meta(id(document, 0));
    assert!(matches!(gone, Err(StoreError::NotFound { entity: Entity::Block(_) })), "{gone:?}");
}

#[test]
fn a_hundred_thousand_tiny_blocks_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "long").unwrap().id;
    for first in (0..100_000).step_by(5000) {
        store.append(document, &blocks(first..first + 5000, 1)).unwrap();
    }
    let before = store.manifest(document).unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.manifest(document).unwrap(), before);
    assert_eq!(store.stats().blocks, 100_000);
    for index in [0, 1, 49_999, 99_999] {
        assert_eq!(read(&store, id(document, index)).unwrap(), block(index, 4, 1));
    }
    assert!(matches!(store.read_meta(id(document, 100_000)), Err(StoreError::NotFound { .. })));
}
