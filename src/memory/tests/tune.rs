//! Which engine is kept, and what is left when none can be measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn request(world: &mut World, queries: usize) -> TuneRequest {
    let query = |values| TuneQuery { layer: 1, distance: 3, values };
    let queries = (0..queries).map(|_| query(world.values(4 * 8))).collect();
    TuneRequest { collection: world.collection, queries, top_k: 3, recall: 0.99, lookups: 4, indexes: Vec::new() }
}

fn tune(world: &World, request: &TuneRequest) -> (Result<TuneReport>, Vec<TuneStep>) {
    let mut steps = Vec::new();
    let report = world.memory.tune(request, &mut |step| steps.push(step), &Until::FOREVER);
    (report, steps)
}

#[test]
fn every_engine_is_measured_on_the_longest_document_and_one_that_finds_enough_is_kept() {
    let mut world = World::new(CollectionSpec { key_rule: KeyRule::Mean, ..spec("c") });
    world.document("short", 2);
    let longest = world.document("long", 40);
    let request = request(&mut world, 5);
    let (report, steps) = tune(&world, &request);
    let TuneReport { document, engine, measured } = report.unwrap();
    assert_eq!((document.id, document.blocks), (longest, 40));
    assert_eq!(world.memory.collections().unwrap()[0].engine, engine);
    let engines = [Engine::Flat, Engine::Sq4, Engine::Sq8];
    assert!(measured.iter().map(|of| &of.engine).take(3).eq(&engines), "{measured:?}");
    assert_eq!(measured[0].recall, 1.0);
    assert!(measured.iter().all(|of| 0.0 < of.p50_us && of.p50_us <= of.p99_us && of.index_bytes > 0), "{measured:?}");
    let kept = measured.iter().find(|of| of.engine == engine).unwrap();
    assert!(kept.recall >= request.recall);
    for engine in engines {
        assert!(steps.contains(&TuneStep::Measuring { engine, blocks: 40 }), "{steps:?}");
    }
}

/// What others had looked up was counted too, so that a service named five times the memory.
#[test]
fn the_memory_of_an_engine_is_that_of_the_collection_whatever_else_is_held() {
    let mut world = World::new(spec("c"));
    world.document("short", 10);
    world.document("long", 40);
    let request = request(&mut world, 2);
    let alone = tune(&world, &request).0.unwrap().measured;
    let (first, other) = (world.collection, world.memory.open_collection(&spec("other")).unwrap().id);
    world.collection = other;
    world.document("held", 60);
    tune(&world, &TuneRequest { collection: other, ..request.clone() }).0.unwrap();
    world.collection = first;
    let beside = tune(&world, &request).0.unwrap().measured;
    assert_eq!((beside[0].index_bytes, beside[1].index_bytes), (alone[0].index_bytes, alone[1].index_bytes));
}

#[test]
fn a_measurement_that_fails_leaves_the_engine_as_it_was() {
    let mut world = World::new(spec("c"));
    world.memory.set_engine(world.collection, Engine::Sq8).unwrap();
    let good = request(&mut world, 2);
    let empty = tune(&world, &good).0.unwrap_err();
    assert!(matches!(empty, MemoryError::NotFound { entity: Entity::Document, .. }), "{empty}");
    world.document("a", 3);
    let refused = |change: &dyn Fn(&mut TuneRequest)| {
        let mut request = good.clone();
        change(&mut request);
        let error = tune(&world, &request).0.unwrap_err();
        assert_eq!(world.memory.collections().unwrap()[0].engine, Engine::Sq8, "{error}");
        error.to_string()
    };
    assert!(refused(&|request| request.collection = CollectionId(9)).contains("no collection 9"));
    assert!(refused(&|request| request.queries.clear()).contains("without queries"));
    assert!(refused(&|request| request.queries[1].values.truncate(7)).contains("queries: expected"));
    assert!(refused(&|request| request.top_k = 0).contains("top_k"));
    let one = good.queries[0].clone();
    let many = vec![one; limits::TUNE_QUERIES_MAX + 1];
    assert!(refused(&|request| request.queries = many.clone()).contains("at most 512"));
}

/// A caller that leaves, and a second one, found a candidate in the place of the engine that was set.
#[test]
fn a_caller_that_leaves_gives_the_engine_back_and_a_second_one_has_to_wait() {
    let mut world = World::new(spec("c"));
    world.document("a", 3);
    world.memory.set_engine(world.collection, Engine::Sq4).unwrap();
    let request = request(&mut world, 2);
    let (gone, memory) = (Arc::new(AtomicBool::new(false)), &world.memory);
    let until = Until::FOREVER.or_given_up(gone.clone());
    let mut second = None;
    let left = memory.tune(
        &request,
        &mut |_| {
            second.get_or_insert_with(|| memory.tune(&request, &mut |_| {}, &Until::FOREVER).unwrap_err());
            gone.store(true, Ordering::Relaxed);
        },
        &until,
    );
    assert!(matches!(second, Some(MemoryError::Busy { .. })), "{second:?}");
    assert!(left.is_err(), "{left:?}");
    assert_eq!(memory.collections().unwrap()[0].engine, Engine::Sq4);
    assert!(memory.tune(&request, &mut |_| {}, &Until::FOREVER).is_ok(), "the next one may");
}

/// Wrong settings were found after minutes of measuring.
#[test]
fn what_cannot_be_measured_is_refused_before_an_engine_is_set() {
    let mut world = World::new(spec("c"));
    world.document("a", 3);
    let good = request(&mut world, 1);
    let refused = |change: &dyn Fn(&mut TuneRequest)| {
        let mut request = good.clone();
        change(&mut request);
        let (report, steps) = tune(&world, &request);
        assert!(steps.is_empty(), "{steps:?}");
        report.unwrap_err().to_string()
    };
    let index = |factory: &str, effort| TuneIndex { factory: factory.into(), effort };
    assert!(refused(&|request| request.recall = f64::NAN).contains("recall"));
    assert!(refused(&|request| request.recall = 1.5).contains("recall"));
    assert!(refused(&|request| request.queries[0].layer = 99).contains("layer"));
    assert!(refused(&|request| request.indexes = vec![index(&"x".repeat(1 << 20), None)]).contains("factory"));
    assert!(refused(&|request| request.indexes = vec![index("Flat", Some(0))]).contains("effort"));
}
