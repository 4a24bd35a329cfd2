//! A rebuild over damage: never an older answer, never another directory's, and nothing is destroyed that may be needed.

use super::*;
use crate::store::fault_disk::{Effect, Files, Table};
use crate::store::handles::Handles;
use crate::store::record::{Content, Kind, Part, Parts, RecordHeader, Salt, pack};
use crate::store::scan::Item;

fn id(document: DocumentId, index: u32) -> BlockId {
    BlockId { document, index }
}

/// Every record of a disk, in order.
fn records(disk: &FaultDisk) -> Vec<(SegmentId, u64, u64, Content)> {
    let handles = Handles::new(Box::new(disk.clone()));
    let mut records = Vec::new();
    for segment in handles.list().unwrap() {
        let segment = handles.get(segment).unwrap();
        for item in segment.scan(segment.salt.first_record(), segment.len_bytes().unwrap()) {
            let Item::Record(scanned) = item.unwrap() else { panic!("a gap in a whole segment") };
            records.push((segment.id, scanned.offset, scanned.end(), scanned.content().unwrap()));
        }
    }
    records
}

/// Without the catalog, with one byte of the record damaged.
fn rebuilt_over(
    disk: &FaultDisk,
    (segment, offset, ..): &(SegmentId, u64, u64, Content),
    byte: u64,
) -> (FaultDisk, Store) {
    let copy = disk.restart(Files::Synced, Table::Deleted);
    copy.flip(*segment, offset + byte);
    let store = open(&copy).unwrap();
    (copy, store)
}

fn is_damaged<T: std::fmt::Debug>(result: Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::Damaged { .. }))
}

/// Two documents with history, one that was deleted, one that came after it.
fn with_history() -> (FaultDisk, [DocumentId; 4]) {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let create = |name| store.create_document(collection, name).unwrap().id;
    let [full, tail, secret] = ["full", "tail", "secret"].map(create);
    store.append(full, &[block(0, 4, 1), block(1, 3, 7)]).unwrap();
    store.append(full, &[block(1, 4, 8), block(2, 4, 8)]).unwrap();
    store.append(tail, &[block(0, 4, 1), block(1, 3, 7)]).unwrap();
    store.append(tail, &[block(1, 3, 8)]).unwrap();
    store.put_state(tail, 7, &parts(&[20, 30], 1)).unwrap();
    store.append(tail, &[block(1, 2, 9)]).unwrap();
    store.put_state(full, 12, &parts(&[20, 30, 40], 2)).unwrap();
    store.put_state(full, 12, &parts(&[30, 20], 3)).unwrap();
    store.append(secret, &blocks(0..2, 5)).unwrap();
    store.delete(secret).unwrap();
    let last = create("last");
    store.append(last, &blocks(0..2, 6)).unwrap();
    (disk, [full, tail, secret, last])
}

/// After a rebuild over a damaged newest record, older records used to answer: an old tail, a deleted document.
#[test]
fn an_older_record_never_answers_for_a_damaged_newer_one() {
    let (disk, [full, tail, secret, _]) = with_history();
    let records = records(&disk);
    let newest = |wanted: &dyn Fn(&Content) -> bool| records.iter().rfind(|(.., content)| wanted(content)).unwrap();
    let block_record = |block| newest(&|content| *content == Content::Block(block));

    let (_, store) = rebuilt_over(&disk, block_record(id(full, 1)), 10);
    assert!(is_damaged(read(&store, id(full, 1))), "not the tail that it replaced");
    assert_eq!(read(&store, id(full, 2)).unwrap(), block(2, 4, 8));

    let (_, store) = rebuilt_over(&disk, block_record(id(tail, 1)), 10);
    assert!(is_damaged(read(&store, id(tail, 1))), "no older tail");
    assert_eq!(read(&store, id(tail, 0)).unwrap(), block(0, 4, 1));

    for byte in [10, 70] {
        let deletion = newest(&|content| matches!(content, Content::Tombstone(_)));
        let (_, store) = rebuilt_over(&disk, deletion, byte);
        assert!(store.manifest(secret).is_err() || is_damaged(read(&store, id(secret, 0))), "it was deleted");
        assert_eq!(read(&store, id(full, 1)).unwrap(), block(1, 4, 8), "of others nothing is in doubt");

        let manifest = newest(&|content| matches!(content, Content::Document(entry) if entry.manifest.id == tail));
        let (_, store) = rebuilt_over(&disk, manifest, byte);
        assert!(is_damaged(read(&store, id(tail, 0))));
        assert!(is_damaged(store.append(tail, &[block(1, 4, 2)])), "nor is it written on");
        assert!(!store.verify(None, &mut |_, _| {}).unwrap().faults.is_empty());
        if store.manifests(CollectionId(1)).unwrap().iter().any(|manifest| manifest.id == tail) {
            store.delete(tail).unwrap();
        }
    }
}

/// The same for every byte of the log that is not in the last group: right, or damaged by name.
#[test]
fn no_damaged_byte_makes_a_wrong_answer_of_a_rebuild() {
    let (disk, documents) = with_history();
    let store = open(&disk).unwrap();
    // The last group may be taken for a torn end.
    store.create_document(CollectionId(1), "end").unwrap();
    let before = contents(&store);
    drop(store);
    let records = records(&disk);
    let ends = |record: &&(SegmentId, u64, u64, Content)| matches!(record.3, Content::Group(_));
    let last_group = records.iter().rev().filter(ends).nth(1).unwrap();
    let in_log = records.iter().filter(|record| (record.0, record.1) <= (last_group.0, last_group.1));
    for record in in_log {
        for byte in (0..record.2 - record.1).step_by(5) {
            let (_, store) = rebuilt_over(&disk, record, byte);
            let context = format!("byte {byte} of {record:?}");
            for (manifest, expected, kept) in &before[0].2 {
                let found = store.manifest(manifest.id).map(|found| Manifest { state: manifest.state, ..found });
                match state(&store, manifest.id) {
                    Ok(found) => assert_eq!(found, *kept, "{context}"),
                    Err(StoreError::Damaged { .. } | StoreError::NotFound { .. }) => {}
                    Err(error) => panic!("{context}: {error}"),
                }
                for block in expected.iter().filter(|_| found.is_ok()) {
                    match read(&store, id(manifest.id, block.index)) {
                        Ok(found) => assert_eq!(found, *block, "{context}"),
                        // Blocks of a manifest that only `verify` can see is an older one are not asked for.
                        Err(error) => assert!(matches!(error, StoreError::Damaged { .. }), "{context}: {error}"),
                    }
                }
                let lost = found.is_err() || found.is_ok_and(|found| found != *manifest);
                if lost {
                    assert!(!store.verify(None, &mut |_, _| {}).unwrap().faults.is_empty(), "{context}: in silence");
                }
            }
            if store.manifest(documents[2]).is_ok() {
                assert!(is_damaged(read(&store, id(documents[2], 0))), "{context}: it was deleted");
            }
        }
    }
}

/// A damaged manifest, a rebuild and a compaction used to destroy intact blocks.
#[test]
fn compaction_destroys_nothing_that_a_lost_manifest_may_have_covered() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let [document, other] = ["a", "other"].map(|name| store.create_document(collection, name).unwrap().id);
    (0..20).for_each(|index| drop(store.append(document, &blocks(index..index + 1, 1)).unwrap()));
    store.append(other, &blocks(0..10, 1)).unwrap();
    drop(store);
    let of_document = |content: &Content| matches!(content, Content::Block(id) if id.document == document);
    let manifest = |content: &Content| matches!(content, Content::Document(entry) if entry.manifest.id == document);
    let records_before = records(&disk);
    let newest = records_before.iter().rfind(|(.., content)| manifest(content)).unwrap();
    let (copy, store) = rebuilt_over(&disk, newest, 70);
    store.delete(other).unwrap();
    let count = |content: &Content| matches!(content, Content::Block(block) if block.document == document);
    let handles = Handles::new(Box::new(copy));
    let mut kept = std::collections::BTreeSet::new();
    for segment in handles.list().unwrap() {
        let segment = handles.get(segment).unwrap();
        for item in segment.scan(segment.salt.first_record(), segment.len_bytes().unwrap()) {
            if let Item::Record(scanned) = item.unwrap()
                && scanned.content().is_some_and(|content| count(&content))
            {
                kept.insert(scanned.header.block.index);
            }
        }
    }
    assert_eq!(kept.len(), records_before.iter().filter(|(.., content)| of_document(content)).count());
}

/// After a compaction there is one copy of a manifest. With that damaged, its name was given to a new, empty document.
#[test]
fn a_name_whose_record_is_lost_is_not_given_out_again() {
    let (disk, [full, ..]) = with_history();
    let records = records(&disk);
    let manifest = |content: &Content| matches!(content, Content::Document(entry) if entry.manifest.id == full);
    let collection = |content: &Content| matches!(content, Content::Collection(..));
    for byte in [10, 70] {
        let copy = disk.restart(Files::Synced, Table::Deleted);
        for (segment, offset, ..) in records.iter().filter(|(.., content)| manifest(content)) {
            copy.flip(*segment, offset + byte);
        }
        let store = open(&copy).unwrap();
        assert!(is_damaged(store.manifest(full)), "by its id");
        for name in ["full", "never seen"] {
            assert!(is_damaged(store.find_document(CollectionId(1), name)), "{name}");
            assert!(is_damaged(store.create_document(CollectionId(1), name)), "{name}");
        }
        assert!(is_damaged(store.create_collection(&spec("two"))));
        assert!(store.find_document(CollectionId(1), "tail").unwrap().is_some(), "names that are found are");
        assert!(!store.verify(None, &mut |_, _| {}).unwrap().faults.is_empty());
        drop(store);
        let handles = Handles::new(Box::new(copy.clone()));
        crate::store::repair::repair(&handles, &copy, Default::default(), &Default::default()).unwrap();
        let store = open(&copy).unwrap();
        let recovered = store.find_document(CollectionId(1), &format!("recovered-{full}")).unwrap();
        assert_eq!(recovered, Some(full));
        assert_eq!(read(&store, id(full, 2)).unwrap(), block(2, 4, 8));
        store.create_document(CollectionId(1), "full").expect("what is gone was told");

        let copy = disk.restart(Files::Synced, Table::Deleted);
        for (segment, offset, ..) in records.iter().filter(|(.., content)| collection(content)) {
            copy.flip(*segment, offset + byte);
        }
        let store = open(&copy).unwrap();
        assert!(is_damaged(store.create_collection(&spec("one"))));
    }
}

/// A file cut at the border of a group has no broken byte: only the numbers say that groups are gone. Repair did not know which
/// segment to take out, and names stayed in doubt for ever.
#[test]
fn a_loss_that_only_numbers_show_is_settled_by_repair() {
    let (disk, [full, ..]) = with_history();
    let records = records(&disk);
    let last = *disk.segments().last().unwrap();
    let ends: Vec<u64> = records
        .iter()
        .filter(|(segment, .., content)| *segment == last && matches!(content, Content::Group(_)))
        .map(|(_, _, end, _)| *end)
        .collect();
    for &end in &ends[..ends.len() - 1] {
        let copy = disk.restart(Files::Synced, Table::Applied);
        let mut bytes = copy.bytes_of(last);
        bytes.truncate(end as usize);
        copy.place(last, Some(bytes));
        // Opened once, so that a segment lies behind the cut, and then without the catalog.
        drop(open(&copy).unwrap());
        let copy = copy.restart(Files::Written, Table::Deleted);
        assert!(is_damaged(open(&copy).unwrap().create_document(CollectionId(1), "new")));
        let handles = Handles::new(Box::new(copy.clone()));
        crate::store::repair::repair(&handles, &copy, Default::default(), &Default::default()).unwrap();
        let store = open(&copy).unwrap();
        store.create_document(CollectionId(1), "new").expect("what is gone was told");
        match read(&store, id(full, 0)) {
            Ok(found) => assert_eq!(found, block(0, 4, 1)),
            lost => assert!(is_damaged(lost)),
        }
        drop(store);
        let store = open(&copy.restart(Files::Synced, Table::Deleted)).unwrap();
        store.create_document(CollectionId(1), "newer").expect("nor is it in doubt after a rebuild");
    }
}

/// One flipped bit in sled's file made it come up with older pages: documents that were deleted since, with their
/// tombstones gone, were there again.
#[test]
fn a_catalog_that_falls_back_is_rebuilt() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let [secret, other] = ["secret", "other"].map(|name| store.create_document(collection, name).unwrap().id);
    store.append(secret, &blocks(0..9, 1)).unwrap();
    let older = disk.restart(Files::Synced, Table::Applied);
    store.delete(secret).unwrap();
    (0..9).for_each(|index| drop(store.append(other, &blocks(index..index + 1, 2)).unwrap()));
    let now = contents(&store);
    drop(store);
    let store = open(&disk.with_catalog_of(&older)).unwrap();
    assert_eq!(contents(&store), now);
    assert!(read(&store, id(secret, 0)).is_err());
    assert_clean(&store, "rebuilt");
}

/// A segment file of another directory, put in the place of ours, used to be answered from.
#[test]
fn a_segment_of_another_directory_is_refused_by_name() {
    let (disk, [full, ..]) = with_history();
    let theirs = FaultDisk::of_directory(8);
    let store = open(&theirs).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "full").unwrap().id;
    store.append(document, &blocks(0..3, 77)).unwrap();
    drop(store);
    let at: Locator = open(&disk).unwrap().catalog_get(&catalog::key::block(id(full, 0))).unwrap().unwrap();
    for table in [Table::Applied, Table::Deleted] {
        let mixed = disk.restart(Files::Synced, table);
        let (ours, of_theirs) = (at.segment, theirs.segments()[0]);
        mixed.place(ours, Some(theirs.bytes_of(of_theirs)));
        let store = open(&mixed).unwrap();
        if store.manifest(full).is_ok() {
            let read = read(&store, id(full, 0));
            assert!(is_damaged(read.as_ref().map_err(|_| StoreError::Sealed)) || read.is_err(), "{read:?}");
        }
        let faults = store.verify(None, &mut |_, _| {}).unwrap().faults;
        assert!(faults.iter().any(|fault| fault.problem.contains("written elsewhere")), "{faults:?}");
        assert!(!disk.segments().is_empty());
    }
}

/// A record of group `number`, as a segment with this salt would hold it.
fn forged(kind: Kind, number: u64, document: DocumentId, meta: &[u8], parts: Parts, salt: Salt) -> Vec<u8> {
    let block = id(document, 0);
    let commit = kind == Kind::Group || salt == Salt::NONE;
    let header = RecordHeader { kind, commit, sequence: number, collection: CollectionId(1), block, tokens: 0, parts };
    let mut bytes = header.encode(salt).to_vec();
    bytes.extend_from_slice(meta);
    bytes.extend(header.stamp(salt).crc(Part::Meta, meta).to_le_bytes());
    bytes.extend(header.stamp(salt).crc(Part::Keys, &[]).to_le_bytes());
    bytes
}

/// Judges what is left of a victim when the power fails during an append whose text holds the bytes of `forge (group number,
/// victim, appended document, salt)`. The power cut leaves these bytes whole.
fn after_a_forgery(
    guess: impl Fn(&FaultDisk, SegmentId) -> Salt,
    forge: impl Fn(u64, DocumentId, DocumentId, Salt) -> Vec<u8>,
    judge: impl Fn(&Store, DocumentId),
) {
    let disk = FaultDisk::default();
    // A segment so large that the attack does not begin the next one: its first write would then be a header.
    let sizes = Sizes { segment_bytes: 4 * SEGMENT_BYTES, ..SIZES };
    let store = Store::open_sized(Box::new(disk.clone()), Arc::new(disk.clone()), sizes).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let [victim, mine] = ["victim", "mine"].map(|name| store.create_document(collection, name).unwrap().id);
    store.append(victim, &blocks(0..1, 1)).unwrap();
    let (segment, number) = {
        let writer = store.writer.lock().unwrap();
        (writer.active.id, writer.ledger.totals.next_sequence)
    };
    let forgery = forge(number, victim, mine, guess(&disk, segment));
    let mut attack = block(0, 4, 9);
    // The forgery lies in the later half of the write, which the power cut leaves.
    attack.meta.text = [vec![b' '; 1000], forgery.clone(), vec![b' '; 200]].concat();
    disk.die_at(disk.operations() + 1, Effect::Nothing);
    assert!(store.append(mine, &[attack]).is_err());
    drop(store);
    for table in [Table::Applied, Table::Deleted] {
        let torn = disk.restart(Files::Torn, table);
        let is_there = torn.bytes_of(segment).windows(forgery.len()).any(|window| window == forgery);
        assert!(is_there, "the power cut took the forgery");
        judge(&open(&torn).unwrap(), victim);
    }
}

/// The deletion of the victim, and the end of a group that names it.
fn forged_deletion(number: u64, victim: DocumentId, _: DocumentId, salt: Salt) -> Vec<u8> {
    let segment = SegmentId(1);
    let tombstone = pack(&record::Tombstone { document: victim, first_segment: segment, last_segment: segment });
    let end = pack(&record::GroupEntry { number, named: vec![record::Named::Tombstone(victim, number)] });
    let parts = |meta: &[u8]| Parts { meta_bytes: meta.len() as u32, ..Parts::default() };
    [
        forged(Kind::Tombstone, number, victim, &tombstone, parts(&tombstone), salt),
        forged(Kind::Group, number, DocumentId(0), &end, parts(&end), salt),
    ]
    .concat()
}

/// A block whose size overflows, and the end of a group.
fn forged_size(number: u64, _: DocumentId, mine: DocumentId, salt: Salt) -> Vec<u8> {
    let parts = Parts { meta_bytes: 0, keys_bytes: 0, piece_bytes: u32::MAX, pieces: u32::MAX - 2 };
    let end = pack(&record::GroupEntry { number, named: Vec::new() });
    let end_parts = Parts { meta_bytes: end.len() as u32, ..Parts::default() };
    [
        forged(Kind::Block, number, mine, &[], parts, salt),
        forged(Kind::Group, number, DocumentId(0), &end, end_parts, salt),
    ]
    .concat()
}

/// A text that holds a record, in a group that a power cut tore, used to delete another document; with sizes that
/// overflow, the store could not be opened any more.
#[test]
fn a_text_is_never_taken_for_a_record() {
    let judge = |store: &Store, victim| {
        assert_eq!(read(store, id(victim, 0)).unwrap(), block(0, 4, 1));
        assert_clean(store, "after a torn write");
    };
    // Formats 1 to 3 had no salt; a client may know that of another directory.
    let guesses = [|_: &FaultDisk, _| Salt::NONE, |_: &FaultDisk, segment| Salt::of(DirectoryId([8; 16]), segment)];
    for guess in guesses {
        after_a_forgery(guess, forged_deletion, judge);
        after_a_forgery(guess, forged_size, judge);
    }
}

/// The same with the salt that no client knows: a deletion is believed, so the forgeries above are as good as they can be; a
/// size that overflows keeps no store from opening.
#[test]
fn only_the_salt_tells_a_text_from_a_record() {
    let salt = |disk: &FaultDisk, segment| Salt::of(disk.directory(), segment);
    after_a_forgery(salt, forged_deletion, |store, victim| {
        assert!(matches!(store.manifest(victim), Err(StoreError::NotFound { .. })));
    });
    after_a_forgery(salt, forged_size, |store, victim| {
        assert_eq!(read(store, id(victim, 0)).unwrap(), block(0, 4, 1));
    });
}

/// A flipped bit in the last group cannot be told from a torn write. It used to be cut off without a trace.
#[test]
fn what_a_torn_end_cuts_off_is_kept() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    // What compaction writes behind an append proves that it was whole: here it does not come to it.
    store.compactor.runs.store(true, std::sync::atomic::Ordering::Relaxed);
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    store.append(document, &blocks(0..2, 1)).unwrap();
    drop(store);
    let (segment, offset, ..) =
        *records(&disk).iter().rfind(|(.., content)| matches!(content, Content::Block(_))).unwrap();
    let copy = disk.restart(Files::Synced, Table::Deleted);
    copy.flip(segment, offset + 200);
    let before = copy.bytes_of(segment);
    let store = open(&copy).unwrap();
    let torn = store.torn().unwrap();
    assert_eq!(torn.len(), 1);
    assert_eq!(torn[0].offset + torn[0].bytes, before.len() as u64);
    store.discard_torn().unwrap();
    assert_eq!(store.torn().unwrap(), []);
}
