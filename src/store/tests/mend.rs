//! A damaged block that is appended again is written again, and readable.
//!
//! Such an append used to be acknowledged as "already durable" after its token ids were compared, and the block stayed
//! unreadable.

use super::*;
use crate::store::fault_disk::{Effect, Files, Table};

fn id(document: DocumentId, index: u32) -> BlockId {
    BlockId { document, index }
}

fn place(store: &Store, block: BlockId) -> Locator {
    store.catalog_get(&catalog::key::block(block)).unwrap().unwrap()
}

/// Three full blocks and a tail of two tokens, then something else, so that nothing of it lies in the last group.
fn filled() -> (FaultDisk, DocumentId) {
    let disk = FaultDisk::default();
    let store = open(&disk).unwrap();
    let collection = store.create_collection(&spec("one")).unwrap();
    let document = store.create_document(collection, "a").unwrap().id;
    store.append(document, &blocks(0..3, 1)).unwrap();
    store.append(document, &[block(3, 2, 1)]).unwrap();
    let other = store.create_document(collection, "other").unwrap().id;
    store.append(other, &blocks(0..8, 2)).unwrap();
    (disk, document)
}

fn offered(index: u32) -> BlockRecord {
    block(index, if index == 3 { 2 } else { 4 }, 1)
}

#[test]
fn every_byte_of_a_block_can_be_mended_by_appending_it_again() {
    let (disk, document) = filled();
    let before = contents(&open(&disk).unwrap());
    for (index, sealed) in [(0, false), (1, true), (3, false), (3, true)] {
        let store = open(&disk).unwrap();
        let locator = place(&store, id(document, index));
        drop(store);
        for byte in 0..locator.bytes() {
            let context = format!("block {index}, byte {byte}, sealed {sealed}");
            for table in [Table::Applied, Table::Deleted] {
                let copy = disk.restart(Files::Written, table);
                copy.flip(locator.segment, locator.offset + byte);
                let store = open(&copy).unwrap();
                if sealed {
                    store.seal(document).unwrap();
                }
                store.append(document, &[offered(index)]).expect(&context);
                assert_eq!(read(&store, id(document, index)).unwrap(), offered(index), "{context}");
                drop(store);
                let store = open(&copy.restart(Files::Synced, Table::Deleted)).unwrap();
                let manifest = store.manifest(document).unwrap();
                for (found, expected) in contents(&store)[0].2.iter().zip(&before[0].2) {
                    assert_eq!(found.1, expected.1, "{context}, rebuilt");
                }
                // What a tail took of which no record is left is not known any more.
                let stored_bytes = manifest.stored_bytes;
                let expected = Manifest { sealed, stored_bytes, ..before[0].2[0].0.clone() };
                assert_eq!(manifest, expected, "{context}");
                if index < 3 {
                    assert_eq!(stored_bytes, before[0].2[0].0.stored_bytes, "{context}");
                }
            }
        }
    }
}

#[test]
fn what_is_whole_is_not_written_again_and_other_tokens_are_refused() {
    let (disk, document) = filled();
    let store = open(&disk).unwrap();
    let locator = place(&store, id(document, 1));
    store.append(document, &blocks(0..3, 1)).unwrap();
    assert_eq!(place(&store, id(document, 1)), locator);
    // A piece is damaged, the token ids are not: others are refused.
    disk.flip(locator.segment, locator.offset + locator.bytes() - 6);
    let conflict = store.append(document, &[block(1, 4, 9)]);
    assert!(matches!(conflict, Err(StoreError::Conflict { index: 1, .. })), "{conflict:?}");
    // Of several blocks the damaged one alone is written, with what is new behind it.
    store.append(document, &[offered(0), offered(1), offered(2), block(3, 4, 1), block(4, 1, 1)]).unwrap();
    assert_ne!(place(&store, id(document, 1)), locator);
    assert_clean(&store, "mended");
    assert_eq!(read(&store, id(document, 1)).unwrap(), offered(1));
    assert_eq!(read(&store, id(document, 4)).unwrap(), block(4, 1, 1));
}

#[test]
fn a_crash_while_mending_loses_nothing() {
    let (disk, document) = filled();
    let locator = place(&open(&disk).unwrap(), id(document, 1));
    disk.flip(locator.segment, locator.offset + 100);
    for operation in 0..20 {
        for effect in [Effect::Nothing, Effect::Half, Effect::Everything] {
            let copy = disk.restart(Files::Written, Table::Applied);
            let store = open(&copy).unwrap();
            copy.die_at(copy.operations() + operation, effect);
            let answer = store.append(document, &[offered(1)]);
            drop(store);
            let store = open(&copy.restart(Files::Synced, Table::Flushed)).unwrap();
            assert_eq!(read(&store, id(document, 2)).unwrap(), offered(2));
            match read(&store, id(document, 1)) {
                Ok(found) => assert_eq!(found, offered(1)),
                Err(error) => assert!(answer.is_err(), "acknowledged, and then {error}"),
            }
        }
    }
}
