//! One document takes the name of another, which goes: what is refused, and what damage to the records of it makes.

use super::*;
use crate::store::fault_disk::{Files, Table};
use crate::store::handles::Handles;
use crate::store::record::Content;
use crate::store::scan::Item;

/// A document, what is to replace it, and another beside them.
struct Before {
    disk: FaultDisk,
    store: Store,
    collection: CollectionId,
    old: DocumentId,
    new: DocumentId,
}

fn before() -> Before {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let create = |name: &str| store.create_document(collection, name).unwrap().id;
    let [old, other] = ["book", "other"].map(create);
    store.append(old, &[block(0, 4, 1), block(1, 3, 1)]).unwrap();
    store.append(other, &blocks(0..2, 2)).unwrap();
    let new = create(&old.replacement_name());
    store.append(new, &blocks(0..3, 3)).unwrap();
    store.put_state(new, 12, &parts(&[20, 30], 3)).unwrap();
    store.seal(new).unwrap();
    Before { disk, store, collection, old, new }
}

#[test]
fn a_document_takes_the_name_of_the_one_that_it_replaces() {
    let Before { disk, store, collection, old, new } = before();
    let as_it_was = store.manifest(new).unwrap();
    let replaced = store.replace(old, new).unwrap();
    let bytes = as_it_was.stored_bytes - old.replacement_name().len() as u64 + "book".len() as u64;
    assert_eq!(replaced, Manifest { name: "book".into(), stored_bytes: bytes, ..as_it_was });
    let check = |store: &Store, context: &str| {
        assert_eq!(store.find_document(collection, "book").unwrap(), Some(new), "{context}");
        assert_eq!(store.find_document(collection, &old.replacement_name()).unwrap(), None, "{context}");
        assert!(matches!(store.manifest(old), Err(StoreError::NotFound { .. })), "{context}");
        assert_eq!(store.manifests(collection).unwrap().len(), 2, "{context}");
        assert_eq!(read(store, BlockId { document: new, index: 2 }).unwrap(), block(2, 4, 3), "{context}");
        assert_eq!(state(store, new).unwrap(), Some((12, parts(&[20, 30], 3))), "{context}");
        assert_clean(store, context);
    };
    check(&store, "replaced");
    assert!(matches!(store.replace(old, new), Err(StoreError::NotFound { .. })), "it is gone");
    drop(store);
    check(&open(&disk.restart(Files::Synced, Table::Deleted)).unwrap(), "rebuilt");

    // And so on: the name goes from one to the next.
    let store = open(&disk).unwrap();
    let newer = store.create_document(collection, &new.replacement_name()).unwrap().id;
    store.replace(new, newer).unwrap();
    assert_eq!(store.find_document(collection, "book").unwrap(), Some(newer));
    store.delete(newer).unwrap();
    assert_eq!(store.find_document(collection, "book").unwrap(), None);
    let again = store.create_document(collection, "book").unwrap().id;
    drop(store);
    let rebuilt = open(&disk.restart(Files::Synced, Table::Deleted)).unwrap();
    assert_eq!(rebuilt.find_document(collection, "book").unwrap(), Some(again));
    assert_clean(&rebuilt, "rebuilt after more of them");
}

#[test]
fn only_what_was_made_to_replace_a_document_does() {
    let Before { store, collection, old, new, .. } = before();
    let other = store.find_document(collection, "other").unwrap().unwrap();
    let elsewhere = store.create_collection(&spec("two")).unwrap();
    let elsewhere = store.create_document(elsewhere, &old.replacement_name()).unwrap().id;
    // Made for a document that did not exist yet.
    let early = store.create_document(collection, &DocumentId(new.0 + 3).replacement_name()).unwrap().id;
    let late = store.create_document(collection, "late").unwrap().id;
    assert_eq!(late, DocumentId(new.0 + 3));
    let before = contents(&store);
    for (document, by) in [(old, other), (old, old), (other, new), (old, elsewhere), (late, early)] {
        let refused = store.replace(document, by);
        assert!(matches!(&refused, Err(StoreError::Invalid { field: "by", .. })), "{document} by {by}: {refused:?}");
    }
    for (document, by) in [(DocumentId(99), new), (old, DocumentId(99))] {
        assert!(matches!(store.replace(document, by), Err(StoreError::NotFound { .. })));
    }
    assert_eq!(contents(&store), before);
}

/// Where the records of a replacement lie: the manifest, the tombstone, and the end of their group.
fn records_of_replacement(disk: &FaultDisk, new: DocumentId) -> [(SegmentId, u64); 3] {
    let handles = Handles::new(Box::new(disk.clone()));
    let mut records = Vec::new();
    for segment in handles.list().unwrap() {
        let segment = handles.get(segment).unwrap();
        for item in segment.scan(segment.salt.first_record(), segment.len_bytes().unwrap()) {
            let Item::Record(scanned) = item.unwrap() else { panic!("a gap in a whole segment") };
            records.push((segment.id, scanned.offset, scanned.content().unwrap()));
        }
    }
    let is_it = |content: &Content| matches!(content, Content::Document(found) if found.manifest.id == new && found.manifest.name == "book");
    let at = records.iter().position(|(.., content)| is_it(content)).expect("the manifest with the name");
    assert!(matches!(records[at + 1].2, Content::Tombstone(_)) && matches!(records[at + 2].2, Content::Group(_)));
    [0, 1, 2].map(|step| (records[at + step].0, records[at + step].1))
}

/// A rebuild that has lost one half of a replacement, with or without the end of its group, could bring the old text back, or
/// find nothing under the name, so that the next opening makes an empty document of it.
#[test]
fn damage_to_a_replacement_never_frees_the_name_nor_brings_back_what_was_replaced() {
    let Before { disk, store, collection, old, new } = before();
    // No compaction moves the records of it apart.
    store.compactor.runs.store(true, std::sync::atomic::Ordering::Relaxed);
    store.replace(old, new).unwrap();
    // Behind it, so that its group is not the last.
    store.create_document(collection, "later").unwrap();
    drop(store);
    let records = records_of_replacement(&disk, new);
    for lost in 1..8 {
        let copy = disk.restart(Files::Synced, Table::Deleted);
        let hit = (0..3).filter(|step| lost & 1 << step != 0);
        hit.for_each(|step| copy.flip(records[step].0, records[step].1 + 20));
        let store = open(&copy).unwrap();
        let context = format!("records {lost:03b} are lost");
        match store.find_document(collection, "book") {
            Ok(Some(found)) if found == new => {}
            Ok(Some(found)) => {
                let manifest = store.manifest(found);
                assert!(matches!(manifest, Err(StoreError::Damaged { .. })), "{context}: {manifest:?}");
            }
            found => assert!(matches!(found, Err(StoreError::Damaged { .. })), "{context}: {found:?}"),
        }
        let of_old = store.read_meta(BlockId { document: old, index: 0 });
        assert!(of_old.is_err(), "{context}: what was replaced is read");
        let only_the_end = lost == 4;
        assert_eq!(store.manifest(new).is_ok(), lost & 1 == 0 && (lost & 4 == 0 || only_the_end), "{context}");

        let handles = Handles::new(Box::new(copy.clone()));
        drop(store);
        crate::store::repair::repair(&handles, &copy, Default::default(), &Default::default()).unwrap();
        let store = open(&copy).unwrap();
        let of_new = read(&store, BlockId { document: new, index: 0 });
        assert_eq!(of_new.unwrap(), block(0, 4, 3), "{context}: after a repair");
        assert!(store.find_document(collection, "nothing").unwrap().is_none(), "{context}: names are settled");
        assert_clean(&store, &context);
    }
}
