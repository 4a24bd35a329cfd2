//! Random damage to random histories: what is read afterwards is what was written, or an error, and whatever is missing
//! is reported. Never an older answer, never a deleted document, and work that goes on destroys nothing else.
//!
//! `LANDMARKDB_ROT` says how many stores are damaged, `LANDMARKDB_MODEL_SEED` where to begin.

use super::life::{Life, check, live, open_with};
use super::number_from;
use super::plan::{Generator, Model};
use super::*;
use crate::store::fault_disk::{Files, Table};

const STORES: usize = 200;
/// Of each store, damaged in another place.
const COPIES: usize = 6;

/// Damages one to three places of a disk's files: single bits, or what a bad sector takes. Of the last segment only one
/// bit: more could take its last groups without a trace, as if they had never been written. Says where.
fn damage(disk: &FaultDisk, generator: &mut Generator) -> String {
    let segments = disk.segments();
    let (mut places, mut end_is_hit) = (Vec::new(), false);
    for _ in 0..1 + generator.number(3) {
        let at = generator.number(segments.len() as u64) as usize;
        let (id, is_last) = (segments[at], at + 1 == segments.len());
        let mut bytes = disk.bytes_of(id);
        if bytes.is_empty() || is_last && std::mem::replace(&mut end_is_hit, true) {
            continue;
        }
        let at = generator.number(bytes.len() as u64) as usize;
        let len = if is_last { 1 } else { [1, 1, 64, 300][generator.number(4) as usize].min(bytes.len() - at) };
        bytes[at..at + len].iter_mut().for_each(|byte| *byte = if len == 1 { *byte ^ 0x41 } else { 0 });
        disk.place(id, Some(bytes));
        places.push(format!("{len} bytes of segment {id} at {at}"));
    }
    format!("{} of {segments:?}", places.join(", "))
}

/// Blocks that are read, each as it was written: in one of the two models.
fn read_right(store: &Store, models: [&Model; 2]) -> Result<Vec<BlockId>, String> {
    let mut right = Vec::new();
    for model in models {
        for document in &model.documents {
            for block in &document.blocks {
                let id = BlockId { document: document.id, index: block.index };
                match read(store, id) {
                    Ok(found) if models.iter().any(|model| model.block(id) == Some(&found)) => right.push(id),
                    Ok(found) => return Err(format!("block {id} answers with what it is not: {:?}", found.meta)),
                    Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }) => {}
                    Err(error) => return Err(format!("block {id}: {error}")),
                }
            }
        }
    }
    for document in models.iter().flat_map(|model| &model.documents) {
        let is_right = |found: &_| {
            let of = |model: &Model| model.documents.iter().find(|other| other.id == document.id).cloned();
            models.iter().any(|model| of(model).is_some_and(|known| known.state == *found))
        };
        match state(store, document.id) {
            Ok(found) if is_right(&found) => {}
            Ok(_) => return Err(format!("document {} answers with a state that it has not", document.id)),
            Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }) => {}
            Err(error) => return Err(format!("the state of document {}: {error}", document.id)),
        }
    }
    for &(document, blocks) in &models[0].gone {
        for index in 0..blocks {
            let id = BlockId { document, index };
            if models[1].block(id).is_none() && read(store, id).is_ok() {
                return Err(format!("block {id} is read, and was deleted"));
            }
        }
    }
    Ok(right)
}

/// Names that had a document before and after the last change have it, or are errors: nothing is created under them.
fn names_are_right(store: &Store, models: [&Model; 2]) -> Result<(), String> {
    for document in &models[0].documents {
        let known = models[1].documents.iter().find(|known| known.id == document.id);
        let Some(collection) = models[0].collection(document.slot.collection) else { continue };
        if known.is_none_or(|known| known.name != document.name) {
            continue;
        }
        match store.find_document(collection, &document.name) {
            Ok(Some(found)) if found == document.id => {}
            Err(StoreError::Damaged { .. }) => {}
            other => return Err(format!("{:?} is document {}, found {other:?}", document.name, document.id)),
        }
    }
    Ok(())
}

fn judge(disk: &FaultDisk, sizes: plan::Sizes, models: [&Model; 2], generator: &mut Generator) -> Result<(), String> {
    let store = open_with(disk, sizes).map_err(|error| format!("open: {error}"))?;
    let right = read_right(&store, models)?;
    names_are_right(&store, models)?;
    let faults =
        store.verify_rebuild(&mut |_, _| {}, &crate::until::Until::FOREVER).map_err(|error| error.to_string())?.faults;
    if faults.is_empty()
        && let (Err(now), Err(before)) = (check(&store, models[0]), check(&store, models[1]))
    {
        return Err(format!("verify is clean, and yet: {now}; against what was there before: {before}"));
    }
    // Whatever is written now, the rest stays as it is.
    let untouched = go_on(&store, models[0], generator);
    for block in right.iter().filter(|block| untouched(block.document)) {
        read(&store, *block).map_err(|error| format!("block {block} was read, and after more work: {error}"))?;
    }
    Ok(())
}

/// Fills and deletes a document of its own, and deletes some that were there. Returns which were left alone.
fn go_on(store: &Store, model: &Model, generator: &mut Generator) -> impl Fn(DocumentId) -> bool + use<> {
    let deleted: Vec<DocumentId> =
        model.documents.iter().map(|document| document.id).filter(|_| generator.number(3) == 0).collect();
    for &document in &deleted {
        let _ = store.delete(document);
    }
    if let Some(&(collection, ..)) = model.collections.first() {
        for round in 0..3 {
            if let Ok(manifest) = store.create_document(collection, &format!("after {round}")) {
                let _ = store.append(manifest.id, &blocks(0..8, round));
                let _ = store.delete(manifest.id);
            }
        }
    }
    move |document| !deleted.contains(&document)
}

#[test]
fn damage_never_makes_a_wrong_answer() {
    let stores = number_from("LANDMARKDB_ROT", STORES);
    let first = number_from("LANDMARKDB_MODEL_SEED", 1) as u64;
    for seed in first..first + stores as u64 {
        let mut generator = Generator::new(seed);
        let sizes = generator.sizes();
        let mut left = 20 + generator.number(80);
        // The last change may be taken for an append that a crash left half written.
        let (mut before, mut now) = (Model::default(), Model::default());
        let life: Life = live(seed, sizes, false, |life| {
            if life.model != now {
                before = std::mem::replace(&mut now, life.model.clone());
            }
            left = left.checked_sub(1)?;
            Some(generator.next(&life.model))
        });
        for copy in 0..COPIES {
            let table = [Table::Deleted, Table::Deleted, Table::Flushed, Table::Applied][generator.number(4) as usize];
            let disk = life.disk.restart(Files::Written, table);
            let places = damage(&disk, &mut generator);
            judge(&disk, sizes, [&life.model, &before], &mut generator)
                .unwrap_or_else(|problem| panic!("seed {seed}, copy {copy}, {table:?}, {places}: {problem}"));
        }
    }
    println!("{stores} stores, damaged {} times: no wrong answer", stores * COPIES);
}
