//! What a document keeps for its model: replaced as a whole, found wherever it lies, and named when it is lost.

use super::*;
use crate::limits;
use crate::store::fault_disk::{Call, Effect, Fault, Files, Reason, Table};
use crate::store::handles::Handles;
use crate::store::place;
use crate::store::repair::repair;

fn with_document(disk: &FaultDisk) -> (Store, DocumentId) {
    let store = open(disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    (store, document)
}

/// Six blocks and a tail of two tokens, whose state of three parts lies in a closed segment; and something behind it.
fn filled() -> (FaultDisk, DocumentId) {
    let disk = FaultDisk::default();
    let (store, document) = with_document(&disk);
    store.append(document, &blocks(0..6, 1)).unwrap();
    store.append(document, &[block(6, 2, 1)]).unwrap();
    store.put_state(document, 26, &parts(&[70, 1, 200], 1)).unwrap();
    let other = store.create_document(CollectionId(1), "other").unwrap().id;
    store.append(other, &blocks(0..8, 2)).unwrap();
    (disk, document)
}

fn place_of(store: &Store, document: DocumentId, part: u32) -> Locator {
    store.catalog_get(&catalog::key::block(place::of_part(document, part))).unwrap().unwrap()
}

fn rebuilt(disk: &FaultDisk) -> Store {
    open(&disk.restart(Files::Synced, Table::Deleted)).unwrap()
}

#[test]
fn a_state_is_kept_with_its_document_until_another_takes_its_place() {
    let disk = FaultDisk::default();
    let (store, document) = with_document(&disk);
    assert_eq!(state(&store, document).unwrap(), None);
    store.append(document, &blocks(0..2, 1)).unwrap();
    let first = (8, parts(&[100, 3, 50], 1));
    let manifest = store.put_state(document, 8, &first.1).unwrap();
    assert_eq!(manifest.state.map(|state| (state.tokens, state.parts)), Some((8, 3)));
    // The document goes on, is sealed, and keeps it.
    store.append(document, &[block(2, 4, 1), block(3, 2, 1)]).unwrap();
    assert_eq!(state(&store, document).unwrap(), Some(first));
    let second = (14, parts(&[1], 2));
    store.put_state(document, 14, &second.1).unwrap();
    store.seal(document).unwrap();
    for store in [&store, &rebuilt(&disk)] {
        assert_eq!(state(store, document).unwrap(), Some(second.clone()));
        for beyond in [1, 1 << 20, u32::MAX] {
            assert_eq!(store.read_state_part(document, beyond).unwrap(), None);
        }
        assert_clean(store, "sealed");
    }
    let sealed = store.put_state(document, 14, &second.1);
    assert!(matches!(sealed, Err(StoreError::Sealed)), "{sealed:?}");
    let before = store.stats().live_bytes;
    let freed = store.delete(document).unwrap().bytes;
    assert!(store.stats().live_bytes + freed < before + 200, "its bytes are counted, and given back");
    assert!(matches!(store.read_state_part(document, 0), Err(StoreError::NotFound { .. })));
    assert_clean(&store, "deleted");
}

#[test]
fn its_bytes_are_those_of_its_document() {
    let (store, document) = with_document(&FaultDisk::default());
    let stored = || store.manifest(document).unwrap().stored_bytes;
    store.append(document, &blocks(0..2, 1)).unwrap();
    let without = stored();
    store.put_state(document, 8, &parts(&[1000, 500], 1)).unwrap();
    let with = stored();
    assert!((1500..1800).contains(&(with - without)), "{with}, {without}");
    store.put_state(document, 8, &parts(&[10, 5], 1)).unwrap();
    assert_eq!(stored(), with - 1485, "the earlier one does not count");
    store.append(document, &[block(2, 1, 1)]).unwrap();
    store.put_state(document, 9, &parts(&[10, 5], 1)).unwrap();
    let tail = store.read_meta(BlockId { document, index: 2 }).unwrap().1;
    store.append(document, &[block(2, 1, 2)]).unwrap();
    assert_eq!(stored(), without + tail, "nor one that is dropped");
}

#[test]
fn what_no_state_can_be_is_refused() {
    let (store, document) = with_document(&FaultDisk::default());
    store.append(document, &[block(0, 4, 1), block(1, 3, 1)]).unwrap();
    store.put_state(document, 7, &parts(&[9], 1)).unwrap();
    let refused = |tokens, parts: &[Bytes], field: &str| {
        let answer = store.put_state(document, tokens, parts);
        assert!(matches!(&answer, Err(StoreError::Invalid { field: found, .. }) if *found == field), "{answer:?}");
    };
    for tokens in [0, 4, 6, 8, u64::MAX] {
        refused(tokens, &parts(&[9], 1), "tokens of the state");
    }
    refused(7, &[], "parts of the state");
    refused(7, &vec![Bytes::from_static(b"x"); limits::STATE_PARTS_MAX + 1], "parts of the state");
    refused(7, &parts(&[3, 0], 1), "bytes of a part of the state");
    let large = Bytes::from(vec![1; limits::STATE_PART_BYTES_MAX + 1]);
    refused(7, std::slice::from_ref(&large), "bytes of a part of the state");
    refused(7, &vec![large; 64], "bytes of the state");
    let nobody = store.put_state(DocumentId(99), 0, &parts(&[1], 1));
    assert!(matches!(nobody, Err(StoreError::NotFound { .. })), "{nobody:?}");
    assert_eq!(state(&store, document).unwrap(), Some((7, parts(&[9], 1))));
}

/// To callers of blocks the places of a state are nothing: whoever asks for any index is told so.
#[test]
fn parts_are_no_blocks() {
    let (disk, document) = filled();
    let store = open(&disk).unwrap();
    let place = place::of_part(document, 1);
    let mut bytes = Vec::new();
    for answer in [store.read_meta(place).map(drop), store.read_keys(place).map(drop), store.held(place).map(drop)] {
        assert!(matches!(answer, Err(StoreError::NotFound { .. })), "{answer:?}");
    }
    assert!(matches!(store.read_piece(place, 0, &mut bytes), Err(StoreError::NotFound { .. })));
}

/// A tail is replaced by what follows; a state that was taken inside of it holds only where its tokens stay.
#[test]
fn a_state_of_tokens_that_are_replaced_goes() {
    let taken = 9;
    for (next, stays) in [
        (vec![block(2, 4, 1)], true),
        (vec![block(2, 1, 1)], true),
        (vec![block(2, 4, 1), block(3, 1, 5)], true),
        (vec![block(2, 4, 5)], false),
        (vec![block(2, 1, 5)], false),
    ] {
        let disk = FaultDisk::default();
        let (store, document) = with_document(&disk);
        store.append(document, &[block(0, 4, 1), block(1, 4, 1), block(2, 1, 1)]).unwrap();
        let kept = (taken, parts(&[40, 40], 1));
        store.put_state(document, taken, &kept.1).unwrap();
        store.append(document, &[]).unwrap();
        store.append(document, &blocks(0..2, 1)).unwrap();
        store.append(document, &next).unwrap();
        let expected = stays.then_some(kept);
        for store in [&store, &rebuilt(&disk)] {
            assert_eq!(state(store, document).unwrap(), expected, "{next:?}");
            assert_clean(store, "replaced");
        }
    }
    // Of a tail that cannot be read it is not known.
    let disk = FaultDisk::default();
    let (store, document) = with_document(&disk);
    store.append(document, &[block(0, 3, 1)]).unwrap();
    store.put_state(document, 3, &parts(&[40], 1)).unwrap();
    let tail: Locator = store.catalog_get(&catalog::key::block(BlockId { document, index: 0 })).unwrap().unwrap();
    disk.flip(tail.segment, tail.offset + 70);
    store.append(document, &[block(0, 4, 1)]).unwrap();
    assert_eq!(state(&store, document).unwrap(), None);
}

#[test]
fn a_flipped_bit_anywhere_in_a_part_names_the_part() {
    let (disk, document) = filled();
    let locator = place_of(&open(&disk).unwrap(), document, 2);
    assert!(locator.segment < *disk.segments().last().unwrap(), "it lies in a closed segment");
    for byte in 0..locator.bytes() {
        for table in [Table::Applied, Table::Deleted] {
            let context = format!("byte {byte}, {table:?}");
            let copy = disk.restart(Files::Written, table);
            copy.flip(locator.segment, locator.offset + byte);
            let store = open(&copy).unwrap();
            let faults = store.verify(Some(document), &mut |_, _| {}).unwrap().faults;
            let named = format!("part 2 of the state of document {document}");
            let [fault] = &faults[..] else { panic!("{context}: {faults:?}") };
            assert_eq!((fault.document, fault.block), (Some(document), None), "{context}");
            assert!(fault.problem.starts_with(&named), "{context}: {fault:?}");
            match store.read_state_part(document, 2) {
                Err(StoreError::Damaged { block: None, detail }) => assert!(detail.starts_with(&named), "{detail}"),
                // What lies in front of the bytes is not read on the way to them.
                Ok(Some((_, bytes))) => assert!(byte < 72 && bytes == part(2, 200, 1), "{context}"),
                other => panic!("{context}: {other:?}"),
            }
            // The document is whole, and another state can take its place.
            assert_eq!(store.read_state_part(document, 0).unwrap().unwrap().1, part(0, 70, 1));
            assert_eq!(read(&store, BlockId { document, index: 6 }).unwrap(), block(6, 2, 1));
            store.put_state(document, 26, &parts(&[5], 2)).expect(&context);
            assert_eq!(state(&store, document).unwrap(), Some((26, parts(&[5], 2))), "{context}");
        }
    }
}

/// The header of a part is not read on the way to its bytes, and yet nothing takes their place.
#[test]
fn a_part_in_the_wrong_place_is_caught() {
    let disk = FaultDisk::default();
    let (store, document) = with_document(&disk);
    store.append(document, &[block(0, 4, 1)]).unwrap();
    store.put_state(document, 4, &parts(&[30, 30], 1)).unwrap();
    let [one, two] = [0, 1].map(|part| place_of(&store, document, part));
    let mut bytes = disk.bytes_of(one.segment);
    bytes.copy_within(one.offset as usize..(one.offset + one.bytes()) as usize, two.offset as usize);
    disk.place(one.segment, Some(bytes));
    drop(store);
    let store = open(&disk).unwrap();
    assert_eq!(store.read_state_part(document, 0).unwrap().unwrap().1, part(0, 30, 1));
    assert!(matches!(store.read_state_part(document, 1), Err(StoreError::Damaged { block: None, .. })));
    assert_eq!(store.verify(Some(document), &mut |_, _| {}).unwrap().faults.len(), 1);
}

fn repaired(disk: &FaultDisk) -> (RepairReport, Store) {
    let handles = Handles::new(Box::new(disk.clone()));
    let report = repair(&handles, disk, SIZES, &RepairOptions::default()).unwrap();
    (report, open(disk).unwrap())
}

#[test]
fn repair_takes_a_lost_state_from_a_document_that_is_whole_without_it() {
    let (disk, document) = filled();
    let before = contents(&open(&disk).unwrap());
    let locator = place_of(&open(&disk).unwrap(), document, 2);
    for byte in [10, 64, 100, locator.bytes() - 1] {
        for table in [Table::Applied, Table::Deleted] {
            let context = format!("byte {byte}, {table:?}");
            let copy = disk.restart(Files::Written, table);
            copy.flip(locator.segment, locator.offset + byte);
            copy.place(locator.segment, Some(copy.bytes_of(locator.segment)));
            let (report, store) = repaired(&copy);
            if byte < 64 && table == Table::Applied {
                // What the catalog knows of the part is enough to write it again.
                assert_eq!(report.lost_states, [], "{context}");
                assert_eq!(contents(&store), before, "{context}");
                continue;
            }
            let [lost] = &report.lost_states[..] else { panic!("{context}: {report:?}") };
            assert_eq!(lost.document, document, "{context}");
            assert!(lost.reason.starts_with("part 2 of the state"), "{context}: {lost:?}");
            assert!(report.is_something_lost(), "{context}");
            assert_eq!(state(&store, document).unwrap(), None, "{context}");
            let found = contents(&store);
            assert_eq!(found[0].2[0].1, before[0].2[0].1, "{context}");
            assert_eq!(found[0].2[1], before[0].2[1], "{context}");
            assert_clean(&store, &context);
            store.put_state(document, 26, &parts(&[5], 2)).expect(&context);
            drop(store);
            let (again, store) = repaired(&copy);
            assert!(!again.is_something_lost(), "{context}: {again:?}");
            assert_eq!(state(&store, document).unwrap(), Some((26, parts(&[5], 2))), "{context}");
        }
    }
}

/// Of a document whose newest manifest is damaged an earlier one counts, with the state that it names, as far as that is there;
/// and that a newer one is lost is said.
#[test]
fn repair_of_a_document_in_doubt_keeps_the_state_that_its_manifest_names() {
    for put_is_last in [false, true] {
        let disk = FaultDisk::default();
        let sizes = Sizes { segment_bytes: 1 << 20, ..SIZES };
        let store = Store::open_sized(Box::new(disk.clone()), Arc::new(disk.clone()), sizes).unwrap();
        let collection = store.create_collection(&spec("one")).unwrap();
        // So much that the little which is dead makes no compaction.
        let end = store.create_document(collection, "end").unwrap().id;
        store.append(end, &blocks(0..60, 3)).unwrap();
        let document = store.create_document(collection, "a").unwrap().id;
        store.append(document, &blocks(0..2, 1)).unwrap();
        store.put_state(document, 8, &parts(&[30, 30], 1)).unwrap();
        if put_is_last {
            store.put_state(document, 8, &parts(&[40], 2)).unwrap();
        } else {
            store.append(document, &blocks(2..3, 1)).unwrap();
        }
        let (newest, _): (Locator, record::DocumentEntry) =
            store.catalog_get(&catalog::key::document(document)).unwrap().unwrap();
        store.append(end, &blocks(60..61, 3)).unwrap();
        drop(store);
        let copy = disk.restart(Files::Synced, Table::Deleted);
        copy.flip(newest.segment, newest.offset + 70);
        copy.place(newest.segment, Some(copy.bytes_of(newest.segment)));
        assert!(matches!(open(&copy).unwrap().read_state_part(document, 0), Err(StoreError::Damaged { .. })));
        let (report, store) = repaired(&copy);
        assert_eq!(report.salvaged.len(), 1, "{report:?}");
        assert_eq!(state(&store, document).unwrap(), Some((8, parts(&[30, 30], 1))));
        assert_eq!(report.lost_states.len(), put_is_last as usize, "{report:?}");
        assert_eq!(store.manifest(document).unwrap().blocks, 2 + !put_is_last as u32);
        assert_clean(&store, "repaired");
    }
}

/// The disk is full in the middle of a state: the one that was there stays, and the next goes through once there is room.
#[test]
fn a_full_disk_in_the_middle_of_a_state_changes_nothing() {
    for effect in [Effect::Nothing, Effect::Half] {
        for call in [Call::Write, Call::Sync, Call::Apply, Call::Create] {
            let disk = FaultDisk::default();
            let (store, document) = with_document(&disk);
            store.append(document, &blocks(0..2, 1)).unwrap();
            store.put_state(document, 8, &parts(&[100, 100], 1)).unwrap();
            let reason = if call == Call::Sync { Reason::Broken } else { Reason::Full };
            disk.fail(Fault { at: disk.call_count(), reason, only: Some(call), effect, stays: true });
            // Larger than what is left of the segment.
            let large = parts(&[1900, 300], 2);
            let put = store.put_state(document, 8, &large);
            // A catalog that fails is replaced by one in memory.
            assert!(put.is_err() || call == Call::Apply, "{call:?}");
            let expected = Some((8, if put.is_ok() { large.clone() } else { parts(&[100, 100], 1) }));
            assert_eq!(state(&store, document).unwrap(), expected, "{call:?}, {effect:?}");
            disk.heal();
            assert_eq!(state(&rebuilt(&disk), document).unwrap(), expected, "{call:?}, {effect:?}");
            store.put_state(document, 8, &large).unwrap();
            assert_eq!(state(&store, document).unwrap(), Some((8, large.clone())), "{call:?}, {effect:?}");
            assert_eq!(state(&rebuilt(&disk), document).unwrap(), Some((8, large)));
            assert_clean(&store, "well again");
        }
    }
}

/// Whoever reads while states are replaced and segments removed gets parts of one state, or begins again.
#[test]
fn readers_get_parts_of_one_state_while_it_is_replaced() {
    let disk = FaultDisk::default();
    let (store, document) = with_document(&disk);
    store.append(document, &blocks(0..2, 1)).unwrap();
    let made = |round: u32| parts(&vec![200 + round as usize; 1 + round as usize % 4], round);
    store.put_state(document, 8, &made(0)).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut seen = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let Some((kept, first)) = store.read_state_part(document, 0).unwrap() else { panic!("no state") };
                    let round = first.len() as u32 - 200;
                    assert!(round >= seen, "an older state");
                    seen = round;
                    for (number, expected) in (0..).zip(made(round)) {
                        match store.read_state_part(document, number) {
                            Ok(Some((state, bytes))) if state == kept => assert_eq!(bytes, expected),
                            Ok(Some((state, _))) => assert!(state.sequence > kept.sequence),
                            Ok(None) => {}
                            other => panic!("{other:?}"),
                        }
                    }
                }
            });
        }
        for round in 1..150 {
            store.put_state(document, 8, &made(round)).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let stats = store.stats();
    assert!(stats.segment_bytes * 100 <= stats.live_bytes * limits::SPACE_PERCENT_MAX, "{stats:?}");
    assert!(disk.removals() > 10, "{} segments were compacted", disk.removals());
    assert_clean(&store, "after the rounds");
}

/// One that is larger than what compaction copies in one go, on real files.
#[test]
fn a_large_state_is_moved_and_found_on_real_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let [kept, junk] = ["kept", "junk"].map(|name| store.create_document(collection, name).unwrap().id);
    let mut big = block(0, 4, 1);
    big.meta.text = vec![b'x'; 1 << 20];
    for index in 0..20 {
        store.append(junk, &[BlockRecord { index, ..big.clone() }]).unwrap();
    }
    let large = parts(&[3 << 20, limits::STATE_PART_BYTES_MAX, 5 << 20, 1], 1);
    store.put_state(kept, 0, &large).unwrap();
    let before: Vec<_> =
        std::fs::read_dir(dir.path().join("segments")).unwrap().map(|file| file.unwrap().path()).collect();
    store.delete(junk).unwrap();
    let moved = store.put_state(junk, 0, &large);
    assert!(matches!(moved, Err(StoreError::NotFound { .. })), "{moved:?}");
    let after = |path: &std::path::PathBuf| !path.exists();
    assert!(before.iter().any(after), "the segment that held it was compacted");
    assert_eq!(state(&store, kept).unwrap(), Some((0, large.clone())));
    assert_clean(&store, "moved");
    drop(store);
    std::fs::remove_dir_all(dir.path().join(CATALOG_FOLDER)).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(state(&store, kept).unwrap(), Some((0, large)));
    assert_clean(&store, "rebuilt");
}
