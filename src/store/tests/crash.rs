//! The machine dies at every single operation of a script, in every way, and comes up again.

use super::*;
use crate::limits::SPACE_PERCENT_MAX;
use crate::store::fault_disk::{Call, Effect, Fault, Files, Reason, Table};

pub(super) type Step = fn(&Store) -> Result<(), StoreError>;

fn id(store: &Store, name: &str) -> Result<DocumentId, StoreError> {
    let found = store.find_document(CollectionId(1), name)?;
    found.ok_or(StoreError::NotFound { entity: Entity::Document(DocumentId(0)) })
}

/// What the document that replaces `b` is called until it does.
fn replacement(store: &Store) -> Result<String, StoreError> {
    Ok(id(store, "b")?.replacement_name())
}

fn append(store: &Store, name: &str, blocks: &[BlockRecord]) -> Result<(), StoreError> {
    store.append(id(store, name)?, blocks).map(drop)
}

fn put(store: &Store, name: &str, lens: &[usize], seed: u32) -> Result<(), StoreError> {
    let document = id(store, name)?;
    let Manifest { blocks, tail_tokens, .. } = store.manifest(document)?;
    store.put_state(document, (blocks * 4 + tail_tokens) as u64, &parts(lens, seed)).map(drop)
}

fn with_tail(mut blocks: Vec<BlockRecord>, tokens: u32, seed: u32) -> Vec<BlockRecord> {
    let index = blocks.last().map_or(0, |last| last.index + 1);
    blocks.push(block(index, tokens, seed));
    blocks
}

/// Every kind of write; rolls segments, replaces tails and states, compacts with and without tombstones left to keep.
pub(super) const SCRIPT: &[Step] = &[
    |store| store.create_collection(&spec("one")).map(drop),
    |store| store.create_document(CollectionId(1), "a").map(drop),
    |store| append(store, "a", &with_tail(blocks(0..2, 1), 3, 1)),
    |store| put(store, "a", &[100, 30], 1),
    |store| store.create_document(CollectionId(1), "b").map(drop),
    |store| append(store, "b", &blocks(0..4, 2)),
    // Larger than a segment.
    |store| put(store, "b", &[1500, 700, 1], 2),
    |store| put(store, "b", &[600], 3),
    |store| append(store, "a", &with_tail(blocks(2..3, 1), 1, 1)),
    |store| store.seal(id(store, "a")?).map(drop),
    |store| store.delete(id(store, "b")?).map(drop),
    |store| store.create_collection(&spec("two")).map(drop),
    |store| store.set_engine(CollectionId(1), Engine::Sq8),
    |store| store.create_document(CollectionId(1), "c").map(drop),
    |store| append(store, "c", &blocks(0..5, 3)),
    |store| put(store, "c", &[80, 80], 4),
    |store| append(store, "c", &with_tail(Vec::new(), 2, 3)[..0]),
    |store| append(store, "c", &with_tail(blocks(5..6, 3), 2, 3)),
    |store| put(store, "c", &[90, 10, 20], 5),
    // Other tokens in the place of the tail: the state goes.
    |store| append(store, "c", &[block(6, 3, 9)]),
    |store| store.delete(id(store, "a")?).map(drop),
    |store| store.create_document(CollectionId(1), "b").map(drop),
    |store| append(store, "b", &blocks(0..3, 4)),
    |store| store.delete(id(store, "c")?).map(drop),
    |store| store.create_document(CollectionId(1), &replacement(store)?).map(drop),
    |store| append(store, &replacement(store)?, &with_tail(blocks(0..3, 6), 2, 6)),
    |store| store.replace(id(store, "b")?, id(store, &replacement(store)?)?).map(drop),
    |store| append(store, "b", &blocks(3..8, 6)),
];

/// Runs the script from step `from`; stops at the first error. Returns the step that failed.
pub(super) fn run(store: &Store, from: usize) -> Option<usize> {
    (from..SCRIPT.len()).find(|&step| SCRIPT[step](store).is_err())
}

/// What the store holds before each step, and after the last.
pub(super) fn expected() -> Vec<Contents> {
    let store = open(&FaultDisk::default()).unwrap();
    let mut expected = vec![contents(&store)];
    for step in SCRIPT {
        step(&store).unwrap();
        expected.push(contents(&store));
    }
    let stats = store.stats();
    assert!(stats.segment_bytes * 100 <= stats.live_bytes * SPACE_PERCENT_MAX, "{stats:?}");
    expected
}

fn operations() -> usize {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    assert_eq!(run(&store, 0), None);
    drop(store);
    disk.operations()
}

/// Runs the script on a machine that dies; returns its disk and the step under way, if any had begun.
fn die(operation: usize, effect: Effect) -> (FaultDisk, usize) {
    let disk = FaultDisk::default();
    disk.die_at(operation, effect);
    let step = match open(&disk) {
        Ok(store) => run(&store, 0).unwrap_or(SCRIPT.len()),
        Err(_) => 0,
    };
    (disk, step)
}

/// The store holds all that was acknowledged, what was under way wholly or not at all, and works on.
fn check(disk: &FaultDisk, step: usize, expected: &[Contents], context: &str) {
    let store = open(disk).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_clean(&store, context);
    let found = contents(&store);
    let after = (step + 1).min(SCRIPT.len());
    let resume = if found == expected[after] {
        after
    } else {
        assert_eq!(found, expected[step], "{context}");
        step
    };
    assert_eq!(run(&store, resume), None, "{context}");
    assert_eq!(contents(&store), expected[SCRIPT.len()], "{context}: after finishing the script");
    assert_clean(&store, context);
    drop(store);

    let rebuilt = open(&disk.restart(Files::Written, Table::Deleted)).unwrap();
    assert_eq!(contents(&rebuilt), expected[SCRIPT.len()], "{context}: after finishing, without the catalog");
    assert_clean(&rebuilt, context);
}

const EFFECTS: [Effect; 3] = [Effect::Nothing, Effect::Half, Effect::Everything];
const FILES: [Files; 3] = [Files::Written, Files::Synced, Files::Torn];
const TABLES: [Table; 3] = [Table::Applied, Table::Flushed, Table::Deleted];

#[test]
fn dying_at_any_operation_loses_nothing_acknowledged() {
    let expected = expected();
    let operations = operations();
    assert!(operations > 80, "the script does {operations} operations");
    for operation in 0..operations {
        for effect in EFFECTS {
            let (disk, step) = die(operation, effect);
            for files in FILES {
                for table in TABLES {
                    let context = format!("operation {operation}, {effect:?} done, {files:?}, {table:?}, step {step}");
                    check(&disk.restart(files, table), step, &expected, &context);
                }
            }
        }
    }
}

#[test]
fn dying_again_while_recovering_loses_nothing_either() {
    let expected = expected();
    for operation in 0..operations() {
        let (disk, step) = die(operation, Effect::Half);
        for table in [Table::Flushed, Table::Deleted] {
            for files in [Files::Written, Files::Torn] {
                for again in 0.. {
                    let second = disk.restart(files, table);
                    second.die_at(again, Effect::Half);
                    let recovered = open(&second).is_ok();
                    for files in FILES {
                        let context = format!(
                            "operation {operation}, then {again} of recovery, {files:?}, {table:?}, step {step}"
                        );
                        check(&second.restart(files, Table::Flushed), step, &expected, &context);
                    }
                    if recovered {
                        break;
                    }
                }
            }
        }
    }
}

/// A write or a flush that failed used to end all writing until a restart, also for a moment's lack of descriptors.
#[test]
fn after_a_failed_write_or_flush_the_next_call_works() {
    for call in [Call::Write, Call::Sync] {
        let disk = FaultDisk::default();
        let store = open(&disk).unwrap();
        let collection = store.create_collection(&spec("one")).unwrap();
        let document = store.create_document(collection, "a").unwrap().id;
        store.append(document, &blocks(0..2, 1)).unwrap();
        let before = contents(&store);
        let fault = |stays| {
            let (at, only, effect) = (disk.call_count(), Some(call), Effect::Half);
            disk.fail(Fault { at, reason: Reason::Broken, only, effect, stays });
        };
        fault(false);
        let failed = store.append(document, &blocks(2..3, 1));
        assert!(matches!(failed, Err(StoreError::Io { .. })), "{failed:?}");
        assert_eq!(contents(&store), before, "a failed append is invisible");
        disk.heal();

        fault(true);
        assert!(store.append(document, &blocks(2..4, 1)).is_err());
        assert!(matches!(store.health(), Health::Failed { .. }), "{:?}", store.health());
        assert!(store.seal(document).is_err());
        assert_eq!(contents(&store), before, "reads go on");
        disk.heal();
        store.append(document, &blocks(2..4, 1)).unwrap();
        assert_eq!(store.health(), Health::Serving);
        assert_clean(&store, "well again");
        let now = contents(&store);
        drop(store);
        assert_eq!(contents(&open(&disk.restart(Files::Synced, Table::Deleted)).unwrap()), now);
    }
}

#[test]
fn ids_of_deleted_documents_are_never_given_out_again() {
    let mut disk = FaultDisk::default();
    let mut seen = std::collections::BTreeSet::new();
    open(&disk).unwrap().create_collection(&spec("one")).unwrap();
    for round in 0..30 {
        let store = open(&disk).unwrap();
        let document = store.create_document(CollectionId(1), "again").unwrap().id;
        assert!(seen.insert(document), "{document} in round {round}");
        // Sometimes one segment holds all there is of a document, its tombstone included.
        store.append(document, &blocks(0..1 + round % 3 * 3, round)).unwrap();
        store.delete(document).unwrap();
        assert_eq!(store.manifests(CollectionId(1)).unwrap(), []);
        drop(store);
        disk = disk.restart(Files::Synced, if round % 2 == 0 { Table::Deleted } else { Table::Flushed });
    }
    assert!(open(&disk).unwrap().stats().live_bytes < 2 * SEGMENT_BYTES, "tombstones do not pile up");
}
