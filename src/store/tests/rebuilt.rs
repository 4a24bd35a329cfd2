//! `verify --rebuild`: what the catalog and the segments do not say alike is a fault, and looking changes nothing.
//!
//! A catalog that knew less than the segments, or more, used to pass `verify`: it compared the catalog with the log, and
//! never the log with the catalog.

use super::*;
use crate::store::catalog::key;
use crate::store::fault_disk::{Files, Table};
use crate::until::Until;

fn filled() -> (FaultDisk, Store, DocumentId) {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let create = |name| store.create_document(collection, name).unwrap().id;
    let [document, junk] = ["a", "junk"].map(create);
    for index in 0..6 {
        store.append(document, &blocks(index..index + 1, 1)).unwrap();
        store.append(junk, &blocks(index..index + 1, 2)).unwrap();
    }
    store.append(document, &[block(6, 3, 1)]).unwrap();
    store.delete(junk).unwrap();
    (disk, store, document)
}

fn faults(store: &Store) -> Vec<Fault> {
    store.verify_rebuild(&mut |_, _| {}, &Until::FOREVER).unwrap().faults
}

#[test]
fn what_one_of_the_two_does_not_say_is_a_fault() {
    let (disk, store, document) = filled();
    assert_eq!(faults(&store), []);
    let id = BlockId { document, index: 2 };
    let put = |key: Vec<u8>, value| store.catalog.apply(vec![(key, value)]).unwrap();
    for (key, names) in [
        (key::block(id), "does not know block"),
        (key::document(document), "does not know the manifest"),
        (key::document_name(CollectionId(1), "a"), "does not know the name \"a\""),
        (key::collection(CollectionId(1)), "does not know collection 1"),
    ] {
        let before = store.catalog.get(&key).unwrap();
        assert!(before.is_some(), "{names}");
        put(key.clone(), None);
        let found = faults(&store);
        assert!(found.iter().any(|fault| fault.problem.contains(names)), "{names}: {found:?}");
        put(key, before);
        assert_eq!(faults(&store), [], "{names}");
    }
    let other = store.catalog.get(&key::block(BlockId { document, index: 3 })).unwrap();
    let own = store.catalog.get(&key::block(id)).unwrap();
    put(key::block(id), other.clone());
    assert!(faults(&store).iter().any(|fault| fault.block == Some(id)), "another record");
    put(key::block(id), own);
    put(key::block(BlockId { document, index: 9 }), other);
    assert!(faults(&store).iter().any(|fault| fault.problem.contains("only the catalog knows block")));
    assert!(disk.segments().len() > 1);
}

#[test]
fn it_changes_nothing_on_the_disk() {
    let (disk, store, _) = filled();
    let operations = disk.operations();
    let before: Vec<Vec<u8>> = disk.segments().into_iter().map(|id| disk.bytes_of(id)).collect();
    faults(&store);
    assert_eq!(disk.operations(), operations, "nothing is written, synced, cut, removed or set aside");
    let after: Vec<Vec<u8>> = disk.segments().into_iter().map(|id| disk.bytes_of(id)).collect();
    assert_eq!(before, after);
}

#[test]
fn damage_that_came_after_the_opening_is_found() {
    let (disk, store, document) = filled();
    let locator: Locator = store.catalog_get(&key::block(BlockId { document, index: 2 })).unwrap().unwrap();
    disk.flip(locator.segment, locator.offset + 10);
    assert!(faults(&store).iter().any(|fault| fault.problem.contains("only the catalog knows block")));
}

#[test]
fn writers_go_on_while_it_compares() {
    let (disk, store, document) = filled();
    drop(store);
    let store = open(&disk.restart(Files::Synced, Table::Deleted)).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for index in 0..40 {
                store.append(document, &blocks(6 + index..7 + index, 3)).unwrap();
                let next = store.create_document(CollectionId(1), &index.to_string()).unwrap().id;
                store.append(next, &blocks(0..3, 4)).unwrap();
                store.delete(next).unwrap();
            }
        });
        while !writer.is_finished() {
            let compared = store.verify_rebuild(&mut |_, _| {}, &Until::FOREVER);
            // Where segments of two kilobytes come and go faster than they are read, it says so.
            if let Ok(report) = compared {
                let found = report.faults.iter().find(|fault| fault.problem.contains("catalog"));
                assert_eq!(found, None);
            }
        }
    });
    assert_eq!(faults(&store), []);
}
