//! `repair`: what is left is readable again, what is gone is named, and a crash on the way loses nothing.

use super::*;
use crate::store::fault_disk::{Effect, Files, Table};
use crate::store::handles::Handles;
use crate::store::record::{Content, SEGMENT_HEADER_BYTES};
use crate::store::repair::repair;
use crate::store::scan::Item;

fn id(document: DocumentId, index: u32) -> BlockId {
    BlockId { document, index }
}

fn run(disk: &FaultDisk, options: &RepairOptions) -> Result<RepairReport, StoreError> {
    repair(&Handles::new(Box::new(disk.clone())), disk, SIZES, options)
}

fn repaired(disk: &FaultDisk) -> (RepairReport, Store) {
    let report = run(disk, &RepairOptions::default()).unwrap();
    (report, open(disk).unwrap())
}

/// Damages the newest record that is wanted, in its header or behind it, on the disk itself. False if there is none.
fn damage(disk: &FaultDisk, byte: u64, wanted: impl Fn(&Content) -> bool) -> bool {
    let handles = Handles::new(Box::new(disk.clone()));
    let mut newest = None;
    for id in handles.list().unwrap() {
        let segment = handles.get(id).unwrap();
        for item in segment.scan(segment.salt.first_record(), segment.len_bytes().unwrap()) {
            if let Item::Record(scanned) = item.unwrap()
                && scanned.content().is_some_and(|content| wanted(&content))
            {
                newest = Some((id, scanned.offset));
            }
        }
    }
    let Some((segment, offset)) = newest else { return false };
    disk.flip(segment, offset + byte);
    disk.place(segment, Some(disk.bytes_of(segment)));
    true
}

fn of_manifest(document: DocumentId) -> impl Fn(&Content) -> bool {
    move |content| matches!(content, Content::Document(entry) if entry.manifest.id == document)
}

/// A document of five blocks and a tail that grew one append at a time, one of two blocks, one that was deleted, and
/// something behind them.
fn filled() -> (FaultDisk, [DocumentId; 3]) {
    let disk = FaultDisk::default();
    // In one segment, so that compaction leaves older records where they are.
    let sizes = Sizes { segment_bytes: 1 << 20, ..SIZES };
    let store = Store::open_sized(Box::new(disk.clone()), Arc::new(disk.clone()), sizes).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let create = |name| store.create_document(collection, name).unwrap().id;
    let [grown, other, secret] = ["grown", "other", "secret"].map(create);
    for index in 0..5 {
        store.append(grown, &blocks(index..index + 1, 1)).unwrap();
    }
    store.append(grown, &[block(5, 2, 1)]).unwrap();
    store.append(other, &blocks(0..2, 2)).unwrap();
    store.append(secret, &blocks(0..2, 5)).unwrap();
    // So much that the little which is dead makes no compaction.
    let end = create("end");
    store.append(end, &blocks(0..60, 3)).unwrap();
    store.delete(secret).unwrap();
    store.append(end, &blocks(60..61, 3)).unwrap();
    (disk, [grown, other, secret])
}

/// The parts of the blocks of a document that can be read: the meta, the keys, each piece.
fn readable(disk: &FaultDisk, document: DocumentId, count: u32) -> Vec<(u32, usize)> {
    let store = open(disk).unwrap();
    let mut parts = Vec::new();
    for index in 0..count {
        let (block, mut piece) = (id(document, index), Vec::new());
        let found = [store.read_meta(block).is_ok(), store.read_keys(block).is_ok()];
        let pieces = [0, 1].map(|number| store.read_piece(block, number, &mut piece).is_ok());
        let found = found.into_iter().chain(pieces).enumerate().filter(|(_, is_there)| *is_there);
        parts.extend(found.map(|(part, _)| (index, part)));
    }
    parts
}

/// While the catalog is kept, repair leaves nothing less readable than it was: a block whose header is damaged used to be lost,
/// all of it if anything else of it was damaged too, and a last group with a damaged end passed for a torn write.
#[test]
fn what_could_be_read_before_a_repair_can_be_read_after_it() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    (0..4).for_each(|index| drop(store.append(document, &blocks(index..index + 1, 1)).unwrap()));
    store.append(document, &[block(4, 2, 1)]).unwrap();
    drop(store);
    let last = *disk.segments().last().unwrap();
    let whole = readable(&disk, document, 5).len();
    let check = |segment, context: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let copy = disk.restart(Files::Synced, Table::Applied);
        let mut bytes = copy.bytes_of(segment);
        change(&mut bytes);
        copy.place(segment, Some(bytes));
        let before = readable(&copy, document, 5);
        run(&copy, &RepairOptions::default()).unwrap();
        assert_eq!(readable(&copy, document, 5), before, "{context} of segment {segment}");
        let rebuilt = copy.restart(Files::Synced, Table::Deleted);
        assert_eq!(readable(&rebuilt, document, 5), before, "{context} of segment {segment}, rebuilt");
        before.len()
    };
    for segment in disk.segments() {
        let len = disk.bytes_of(segment).len();
        for at in (0..len).step_by(if segment == last { 3 } else { 11 }) {
            let parts = check(segment, &format!("byte {at}"), &|bytes| bytes[at] ^= 1);
            assert!(parts >= whole - 1, "byte {at} of segment {segment}: {parts} parts");
        }
        for at in (0..len).step_by(29) {
            check(segment, &format!("128 bytes at {at}"), &|bytes| {
                bytes.iter_mut().skip(at).take(128).for_each(|byte| *byte = 0);
            });
        }
        for end in (SEGMENT_HEADER_BYTES..len).step_by(13) {
            check(segment, &format!("the end at {end}"), &|bytes| bytes.truncate(end));
        }
    }
}

#[test]
fn a_whole_directory_stays_as_it_is() {
    let (disk, _) = filled();
    let before = contents(&open(&disk).unwrap());
    for table in [Table::Applied, Table::Deleted] {
        let copy = disk.restart(Files::Synced, table);
        let segments = copy.segments();
        let (report, store) = repaired(&copy);
        assert_eq!(report, RepairReport::default());
        assert_eq!(copy.segments(), segments);
        assert_eq!(contents(&store), before);
        assert_clean(&store, "repaired");
    }
}

/// A document whose newest manifest was damaged was in doubt for ever: not one of its blocks could be read.
#[test]
fn a_document_in_doubt_is_readable_again() {
    let (disk, [grown, ..]) = filled();
    let before = contents(&open(&disk).unwrap());
    for byte in [10, 70] {
        let copy = disk.restart(Files::Synced, Table::Deleted);
        assert!(damage(&copy, byte, of_manifest(grown)));
        assert!(matches!(read(&open(&copy).unwrap(), id(grown, 0)), Err(StoreError::Damaged { .. })));
        let (report, store) = repaired(&copy);
        assert_eq!(report.salvaged.len(), 1, "{report:?}");
        assert_eq!((report.salvaged[0].blocks, report.salvaged[0].tail_tokens), (5, 2));
        for ((_, found, _), (_, expected, _)) in contents(&store)[0].2.iter().zip(&before[0].2) {
            assert_eq!(found, expected);
        }
        assert_eq!(store.manifest(grown).unwrap().name, "grown");
        assert_clean(&store, "repaired");
        // Its segment is out of the log, and kept.
        assert_eq!(report.moved.len(), 1);
        assert!(report.kept.iter().any(|kept| kept.whole && kept.segment == report.moved[0].segment));
        drop(store);
        let (again, store) = repaired(&copy);
        assert_eq!((again.salvaged.len(), again.moved.len()), (0, 0), "nothing is left to do");
        assert_clean(&store, "repaired twice");
        store.append(grown, &[block(5, 4, 1)]).unwrap();
    }
}

#[test]
fn blocks_without_any_manifest_become_a_document() {
    let (disk, [grown, ..]) = filled();
    let copy = disk.restart(Files::Synced, Table::Deleted);
    // Each of its manifests, from the newest on.
    while damage(&copy, 70, of_manifest(grown)) {}
    let (report, store) = repaired(&copy);
    let salvaged = report.salvaged.iter().find(|salvaged| salvaged.document == grown).expect("the document");
    assert_eq!((salvaged.name.as_str(), salvaged.blocks, salvaged.tail_tokens), ("recovered-1", 5, 2));
    assert_eq!(store.find_document(CollectionId(1), "recovered-1").unwrap(), Some(grown));
    for index in 0..5 {
        assert_eq!(read(&store, id(grown, index)).unwrap(), block(index, 4, 1));
    }
    assert_eq!(read(&store, id(grown, 5)).unwrap(), block(5, 2, 1));
    assert_clean(&store, "repaired");
}

#[test]
fn a_document_that_may_have_been_deleted_is_kept_and_said_so() {
    let (disk, [.., secret]) = filled();
    let copy = disk.restart(Files::Synced, Table::Deleted);
    assert!(damage(&copy, 70, |content| matches!(content, Content::Tombstone(_))));
    let (report, store) = repaired(&copy);
    let salvaged = report.salvaged.iter().find(|salvaged| salvaged.document == secret).expect("the document");
    assert!(salvaged.perhaps_deleted, "{salvaged:?}");
    // The repair that a doubt advises is done.
    assert!(salvaged.reason.ends_with("may be outdated"), "{salvaged:?}");
    assert_eq!(read(&store, id(secret, 0)).unwrap(), block(0, 4, 5));
    assert_clean(&store, "kept");
    store.delete(secret).unwrap();
    drop(store);
    let (report, store) = repaired(&copy);
    assert_eq!(report.salvaged, []);
    assert!(store.manifest(secret).is_err());
}

#[test]
fn what_only_the_catalog_knows_comes_back_into_the_log() {
    let (disk, [grown, _, secret]) = filled();
    let before = contents(&open(&disk).unwrap());
    let copy = disk.restart(Files::Synced, Table::Applied);
    assert!(damage(&copy, 70, of_manifest(grown)));
    assert!(damage(&copy, 70, |content| matches!(content, Content::Collection(..))));
    let (report, store) = repaired(&copy);
    assert!(report.rewritten >= 2, "{report:?}");
    assert_eq!(contents(&store), before);
    assert!(store.manifest(secret).is_err());
    assert_clean(&store, "repaired");
}

#[test]
fn a_hole_ends_a_document_without_a_manifest_and_a_damaged_block_stays_named() {
    let (disk, [grown, ..]) = filled();
    let copy = disk.restart(Files::Synced, Table::Deleted);
    while damage(&copy, 70, of_manifest(grown)) {}
    assert!(damage(&copy, 10, |content| *content == Content::Block(id(grown, 3))));
    assert!(damage(&copy, 100, |content| *content == Content::Block(id(grown, 1))));
    let (report, store) = repaired(&copy);
    let salvaged = report.salvaged.iter().find(|salvaged| salvaged.document == grown).expect("the document");
    assert_eq!((salvaged.blocks, salvaged.tail_tokens), (3, 0));
    assert!(report.leftovers.iter().any(|left| left.document == grown && left.blocks > 0), "{report:?}");
    assert!(report.is_something_lost());
    let damaged = read(&store, id(grown, 1));
    assert!(matches!(damaged, Err(StoreError::Damaged { block: Some(block), .. }) if block == id(grown, 1)));
    assert_eq!(read(&store, id(grown, 2)).unwrap(), block(2, 4, 1));
    // Appended again, all of it is there.
    store.append(grown, &blocks(0..5, 1)).unwrap();
    for index in 0..5 {
        assert_eq!(read(&store, id(grown, index)).unwrap(), block(index, 4, 1));
    }
}

#[test]
fn a_lost_collection_is_put_back_from_what_the_operator_knows() {
    let (disk, [grown, ..]) = filled();
    let before = contents(&open(&disk).unwrap());
    let copy = disk.restart(Files::Synced, Table::Deleted);
    assert!(damage(&copy, 70, |content| matches!(content, Content::Collection(..))));
    let (report, store) = repaired(&copy);
    let missing = &report.missing_collections[0];
    assert_eq!((missing.id, missing.block_tokens, missing.pieces), (CollectionId(1), 4, 2));
    assert!(report.is_something_lost());
    assert_eq!(store.collections().unwrap(), []);
    drop(store);

    let with = |spec: CollectionSpec| RepairOptions {
        discard_torn: false,
        collections: vec![LostCollection {
            id: CollectionId(1),
            entry: CollectionEntry { spec, engine: Engine::default() },
        }],
    };
    for wrong in [
        |spec: &mut CollectionSpec| spec.shape.block_tokens = 8,
        |spec: &mut CollectionSpec| spec.shape.layers = 2,
        |spec: &mut CollectionSpec| spec.payload_dtype = crate::types::DType::F32,
        |spec: &mut CollectionSpec| spec.key_rule = crate::types::KeyRule::Tokens,
    ] {
        let mut spec = spec("one");
        wrong(&mut spec);
        let refused = run(&copy, &with(spec));
        assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{refused:?}");
    }
    let report = run(&copy, &with(spec("one"))).unwrap();
    assert_eq!(
        (report.collections.as_slice(), report.missing_collections.as_slice()),
        (&[CollectionId(1)][..], &[][..])
    );
    let store = open(&copy).unwrap();
    assert_eq!(contents(&store), before);
    assert_eq!(read(&store, id(grown, 0)).unwrap(), block(0, 4, 1));
    assert_clean(&store, "put back");
}

/// At each operation: what could be read before can be read when repair has run again.
#[test]
fn a_crash_at_any_step_of_repair_loses_nothing() {
    let (disk, [grown, other, _]) = filled();
    let damaged = disk.restart(Files::Synced, Table::Deleted);
    assert!(damage(&damaged, 70, of_manifest(grown)));
    assert!(damage(&damaged, 100, |content| *content == Content::Block(id(grown, 1))));
    let whole = damaged.restart(Files::Synced, Table::Deleted);
    run(&whole, &RepairOptions::default()).unwrap();
    let operations = whole.operations();
    assert!(operations > 20, "{operations}");
    for operation in 0..operations {
        for (effect, table) in
            [(Effect::Nothing, Table::Flushed), (Effect::Half, Table::Deleted), (Effect::Everything, Table::Applied)]
        {
            let copy = damaged.restart(Files::Synced, Table::Deleted);
            copy.die_at(operation, effect);
            let died = run(&copy, &RepairOptions::default());
            let context = format!("operation {operation}, {effect:?}, {table:?}: {:?}", died.err());
            let copy = copy.restart(Files::Cut(operation as u64), table);
            let report = run(&copy, &RepairOptions::default()).expect(&context);
            let store = open(&copy).unwrap();
            for index in [0, 2, 3, 4] {
                assert_eq!(read(&store, id(grown, index)).expect(&context), block(index, 4, 1), "{context}");
            }
            assert_eq!(read(&store, id(grown, 5)).expect(&context), block(5, 2, 1), "{context}");
            assert_eq!(read(&store, id(other, 1)).expect(&context), block(1, 4, 2), "{context}");
            assert!(report.kept.iter().any(|kept| kept.whole), "{context}: the damaged segment is kept");
            let faults = faults(&store).unwrap();
            assert!(faults.iter().all(|fault| fault.block == Some(id(grown, 1))), "{context}: {faults:?}");
        }
    }
}

/// A new segment said that groups lie before it which the catalog on disk did not know yet. After a crash that catalog passed
/// for an outdated one, and with it went what only it knew.
#[test]
fn a_crash_at_any_step_of_repair_keeps_what_only_the_catalog_knew() {
    let (disk, [grown, other, _]) = filled();
    let damaged = disk.restart(Files::Synced, Table::Applied);
    for index in [0, 2, 4] {
        assert!(damage(&damaged, 10, |content| *content == Content::Block(id(grown, index))));
    }
    assert!(damage(&damaged, 10, |content| *content == Content::Block(id(other, 1))));
    let before = readable(&damaged, grown, 6);
    let whole = damaged.restart(Files::Synced, Table::Applied);
    let rewritten = run(&whole, &RepairOptions::default()).unwrap().rewritten;
    let (operations, segments) = (whole.operations(), whole.segments().len());
    assert!(rewritten >= 4 && segments > damaged.segments().len() + 1, "{rewritten} rewritten, {segments} segments");
    for operation in 0..operations {
        for (effect, table) in [(Effect::Nothing, Table::Flushed), (Effect::Everything, Table::Applied)] {
            let copy = damaged.restart(Files::Synced, Table::Applied);
            copy.die_at(operation, effect);
            let died = run(&copy, &RepairOptions::default());
            let context = format!("operation {operation}, {effect:?}, {table:?}: {:?}", died.err());
            let copy = copy.restart(Files::Cut(operation as u64), table);
            run(&copy, &RepairOptions::default()).expect(&context);
            assert_eq!(readable(&copy, grown, 6), before, "{context}");
            let store = open(&copy).unwrap();
            assert_eq!(read(&store, id(other, 1)).expect(&context), block(1, 4, 2), "{context}");
            assert_eq!(faults(&store).unwrap(), [], "{context}");
        }
    }
}

/// Of a segment with a damaged header whose first block is larger than what is searched for a record, nothing was found.
#[test]
fn a_segment_without_a_header_is_read_whatever_its_blocks_weigh() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let mut spec = spec("one");
    (spec.shape.layers, spec.shape.head_dim) = (256, 1024);
    spec.shape.rope = crate::shape::Rope::from_base(100.0, 1024);
    let collection = store.create_collection(&spec).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    let piece_bytes = PieceLayout { dtype: DType::F16, tokens: 4, head_dim: 1024 }.bytes();
    let pieces = 512 * piece_bytes;
    let keys = vec![2; KeysLayout::of(&spec).bytes(false)];
    let large = BlockRecord { keys, pieces: vec![3; pieces], ..block(0, 4, 1) };
    store.append(document, std::slice::from_ref(&large)).unwrap();
    drop(store);
    let segment = *disk.segments().last().unwrap();
    assert!(disk.bytes_of(segment).len() > 8 << 20, "{piece_bytes}");
    let copy = disk.restart(Files::Synced, Table::Deleted);
    copy.flip(segment, 10);
    copy.place(segment, Some(copy.bytes_of(segment)));
    let (report, store) = repaired(&copy);
    assert!(!report.is_something_lost(), "{report:?}");
    let mut found = Vec::new();
    store.read_pieces(id(document, 0), &mut found).unwrap();
    assert_eq!((found, store.read_keys(id(document, 0)).unwrap()), (large.pieces, large.keys));
}

#[test]
fn what_was_set_aside_is_let_go_only_when_asked() {
    let (disk, [grown, ..]) = filled();
    let copy = disk.restart(Files::Synced, Table::Deleted);
    assert!(damage(&copy, 70, of_manifest(grown)));
    let (report, store) = repaired(&copy);
    drop(store);
    assert!(!report.kept.is_empty());
    let (again, store) = repaired(&copy);
    assert_eq!(again.kept, report.kept);
    drop(store);
    let options = RepairOptions { discard_torn: true, ..RepairOptions::default() };
    let last = run(&copy, &options).unwrap();
    assert_eq!((last.discarded, last.kept), (report.kept, vec![]));
}

/// A flipped bit in the last group cannot be told from a torn write, but a torn write seldom ends with a whole group.
#[test]
fn a_cut_end_that_may_have_been_acknowledged_is_a_fault_until_it_is_let_go() {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    store.append(document, &blocks(0..2, 1)).unwrap();
    drop(store);
    let copy = disk.restart(Files::Synced, Table::Deleted);
    assert!(damage(&copy, 100, |content| *content == Content::Block(id(document, 0))));
    let report = open(&copy).unwrap().verify(None, &mut |_, _| {}).unwrap();
    assert!(report.faults[0].problem.contains("may have been acknowledged"), "{:?}", report.faults);
    assert_eq!(report.set_aside_bytes, open(&copy).unwrap().stats().set_aside_bytes);
    assert!(report.set_aside_bytes > 0);
    run(&copy, &RepairOptions { discard_torn: true, ..RepairOptions::default() }).unwrap();
    let report = open(&copy).unwrap().verify(None, &mut |_, _| {}).unwrap();
    assert_eq!((report.faults, report.set_aside_bytes), (vec![], 0));

    // The first half of a group is nobody's.
    let copy = disk.restart(Files::Synced, Table::Deleted);
    let last = *copy.segments().last().unwrap();
    copy.cut(last, copy.bytes_of(last).len() - 20);
    let report = open(&copy).unwrap().verify(None, &mut |_, _| {}).unwrap();
    assert_eq!(report.faults, []);
    assert!(report.set_aside_bytes > 0);
}

/// One flipped bit in sled's own settings, and the directory could not be opened any more.
#[test]
fn a_catalog_that_cannot_be_opened_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    store.append(document, &blocks(0..3, 1)).unwrap();
    let before = contents(&store);
    drop(store);
    for garbage in [&b"\xff\xfe"[..], b"", b"segment_size: 7\n"] {
        std::fs::write(dir.path().join(CATALOG_FOLDER).join("conf"), garbage).unwrap();
        let report = Store::repair(dir.path(), &RepairOptions::default()).unwrap();
        assert!(!report.is_something_lost(), "{garbage:?}: {report:?}");
        assert_eq!(contents(&Store::open(dir.path()).unwrap()), before, "{garbage:?}");
    }
}

/// The file of a damaged segment is kept under its own name, and nothing of it is asked any more.
#[test]
fn a_damaged_segment_file_is_moved_and_not_destroyed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    store.append(document, &blocks(0..3, 1)).unwrap();
    store.create_document(collection, "b").unwrap();
    let locator: Locator =
        store.catalog_get(&catalog::key::block(id(document, 1))).unwrap().expect("where the block lies");
    drop(store);
    let path = dir.path().join("segments").join("0000000001.seg");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[locator.offset as usize + 10] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let report = Store::repair(dir.path(), &RepairOptions::default()).unwrap();
    assert_eq!(report.moved.len(), 1);
    assert_eq!(std::fs::read(dir.path().join("torn").join("0000000001.seg")).unwrap(), bytes);
    assert!(report.faults.iter().all(|fault| fault.block == Some(id(document, 1))), "{:?}", report.faults);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(read(&store, id(document, 2)).unwrap(), block(2, 4, 1));
    store.append(document, &blocks(0..3, 1)).unwrap();
    assert_clean(&store, "mended");
    drop(store);
    let options = RepairOptions { discard_torn: true, ..RepairOptions::default() };
    assert!(!Store::repair(dir.path(), &options).unwrap().is_something_lost());
    assert!(!dir.path().join("torn").exists());
}
