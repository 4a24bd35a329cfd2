//! The catalog is deleted after compaction has moved records about: everything acknowledged is found again.
//!
//! A rebuild used to go through the log in one pass. Compaction copies blocks in groups that lie before the group of
//! their manifest, or before the segment of it; such blocks were dropped as if nothing covered them, and the next
//! compaction destroyed their bytes.

use super::*;
use crate::store::fault_disk::{Files, Table};

fn lost(store: &Store, document: DocumentId, blocks: u32) -> Vec<u32> {
    (0..blocks).filter(|&index| read(store, BlockId { document, index }).is_err()).collect()
}

fn rebuilt(disk: &FaultDisk) -> Store {
    open(&disk.restart(Files::Synced, Table::Deleted)).unwrap()
}

fn verified(store: &Store) {
    assert_eq!(store.verify(None, &mut |_, _| {}).unwrap().faults, []);
}

#[test]
fn blocks_that_compaction_moved_in_front_of_their_manifest_are_found() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let documents: Vec<DocumentId> =
        (0..20).map(|n| store.create_document(collection, &n.to_string()).unwrap().id).collect();
    for index in 0..10 {
        for &document in &documents {
            store.append(document, &blocks(index..index + 1, 1)).unwrap();
        }
    }
    for &document in documents.iter().step_by(2) {
        store.delete(document).unwrap();
    }
    verified(&store);
    let before = contents(&store);
    drop(store);
    let store = rebuilt(&disk);
    assert_eq!(contents(&store), before);
    // Nor does a compaction that follows destroy them.
    let next = store.create_document(collection, "next").unwrap().id;
    store.append(next, &blocks(0..30, 1)).unwrap();
    store.delete(next).unwrap();
    verified(&store);
    assert_eq!(contents(&store), before);
}

#[test]
fn blocks_in_an_older_segment_than_their_manifest_are_found() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let kept = store.create_document(collection, "kept").unwrap().id;
    let junk = ["j1", "j2"].map(|name| store.create_document(collection, name).unwrap().id);
    for (index, (&junk, blocks_of_junk)) in junk.iter().zip([5, 7]).enumerate() {
        store.append(junk, &blocks(0..blocks_of_junk, 1)).unwrap();
        let index = index as u32;
        store.append(kept, &blocks(index..index + 1, 1)).unwrap();
    }
    for junk in junk {
        store.delete(junk).unwrap();
    }
    drop(store);
    assert_eq!(lost(&rebuilt(&disk), kept, 2), [0; 0]);
}

/// A tombstone that compaction moved behind a new document of the same name used to take the name away.
#[test]
fn a_name_belongs_to_the_document_that_lives() {
    for (junk_blocks, fill) in (1..14).flat_map(|junk| (1..8).map(move |fill| (junk, fill))) {
        let disk = FaultDisk::default();
        let store = open(&disk).unwrap();
        let collection = store.create_collection(&spec("one")).unwrap();
        let create = |name, blocks_of_it| {
            let document = store.create_document(collection, name).unwrap().id;
            store.append(document, &blocks(0..blocks_of_it, 1)).unwrap();
            document
        };
        create("stays", 6);
        let old = store.create_document(collection, "a").unwrap().id;
        create("fill", fill);
        store.delete(old).unwrap();
        let new = create("a", 1);
        let junk = create("junk", junk_blocks);
        store.append(new, &blocks(1..2, 1)).unwrap();
        store.delete(junk).unwrap();
        let before = contents(&store);
        drop(store);
        let store = rebuilt(&disk);
        assert_eq!(store.find_document(collection, "a").unwrap(), Some(new), "junk {junk_blocks}, fill {fill}");
        assert_eq!(contents(&store), before);
    }
}

#[test]
fn a_document_larger_than_a_group_of_compaction_is_found_on_real_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let [kept, junk] = ["kept", "junk"].map(|name| store.create_document(collection, name).unwrap().id);
    for index in 0..40 {
        for document in [kept, junk] {
            let mut big = block(index, 4, 1);
            big.meta.text = vec![b'x'; 1 << 20];
            store.append(document, &[big]).unwrap();
        }
    }
    store.delete(junk).unwrap();
    drop(store);
    std::fs::remove_dir_all(dir.path().join(CATALOG_FOLDER)).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(lost(&store, kept, 40), [0; 0]);
    verified(&store);
}
