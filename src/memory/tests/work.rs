//! Memory and time of lookups and attends: counted before they begin, ended when the caller has gone.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::*;

const GRANULARITIES: [Granularity; 5] =
    [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];

/// Forever, but for a caller that may hang up.
fn remote() -> (Until, Arc<AtomicBool>) {
    let flag = Arc::new(AtomicBool::new(false));
    (Until::FOREVER.or_given_up(flag.clone()), flag)
}

#[test]
fn scoring_in_parts_chooses_what_scoring_at_once_does() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 40);
    let distances: Vec<u32> = (0..70).collect();
    let request = world.request(&distances, vec![range(document, 0..40)]);
    let at_once = |granularity| world.memory.attend(&attend(LookupRequest { granularity, ..request.clone() })).unwrap();
    let whole = GRANULARITIES.map(at_once);
    let memory = world.memory.with_work_budget(700_000);
    for (granularity, whole) in GRANULARITIES.into_iter().zip(whole) {
        let request = attend(LookupRequest { granularity, ..request.clone() });
        let forever = Until::FOREVER;
        let parts = memory.plan(&request.lookup, &forever).unwrap().tokens_at_once();
        assert_eq!(parts < 70, !matches!(granularity, Granularity::Head | Granularity::Shared), "{parts}");
        let attended = memory.attend(&request).unwrap();
        assert_eq!(attended.hits.blocks, whole.hits.blocks, "{granularity:?}");
        assert!(attended.out.iter().zip(&whole.out).all(|(a, b)| (a - b).abs() < 1e-4), "{granularity:?}");
        assert_eq!(memory.lookup(&request.lookup).unwrap().blocks, whole.hits.blocks);
    }
}

/// One client's message of 25 MB asked for 80 GB: every answer was kept, and no sum was taken (finding 6).
#[test]
fn requests_that_need_too_much_together_are_refused_before_any_begins() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 30);
    let request = attend(world.request(&[0; 50], vec![range(document, 0..30)]));
    let memory = world.memory.with_work_budget(1 << 20);
    assert!(memory.attend(&request).is_ok());
    let many = vec![request; 200];
    let refused = memory.attend_all_until(&many, &Until::FOREVER);
    assert!(matches!(refused, Err(MemoryError::LimitExceeded { limit: 786_432, .. })), "{refused:?}");
    assert_eq!(memory.attend_all(&many), vec![Err(refused.unwrap_err()); 200]);
    assert_eq!((memory.stats().unwrap().attends, memory.work.taken()), (1, 0));
    assert!(memory.attend_all(&many[..5]).iter().all(Result::is_ok));
}

#[test]
fn remote_callers_are_told_to_come_back_while_others_have_the_memory() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 30);
    let request = world.request(&[0; 50], vec![range(document, 0..30)]);
    let memory = world.memory.with_work_budget(1 << 20);
    let taken = memory.work.try_take(786_432).unwrap();
    let refused = memory.lookup_until(&request, &remote().0);
    assert!(matches!(refused, Err(MemoryError::Busy { .. })), "{refused:?}");
    // Small ones have a part for themselves, and callers in the process wait.
    let small = LookupRequest { queries: request.queries[..32].to_vec(), distances: vec![0], ..request.clone() };
    assert!(memory.lookup_until(&small, &remote().0).is_ok());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| memory.lookup(&request));
        drop(taken);
        assert!(waiting.join().unwrap().is_ok());
    });
}

/// Four of these held all workers for more than a minute, long after their callers had hung up (c04, c14, c15).
#[test]
fn work_that_nobody_waits_for_ends() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 200);
    let hours = LookupRequest { scope: vec![range(document, 0..200); 300], ..world.request(&[7; 4096], vec![]) };
    for granularity in [Granularity::TokenHead, Granularity::KvGroup] {
        let request = attend(LookupRequest { granularity, ..hours.clone() });
        let begun = Instant::now();
        let until = Until::after(Duration::from_millis(100));
        let late = MemoryError::DeadlineExceeded { ms: 100 };
        assert_eq!(world.memory.lookup_until(&request.lookup, &until), Err(late.clone()));
        assert_eq!(world.memory.attend_until(&request, &Until::after(Duration::from_millis(100))), Err(late));
        let (until, gone) = remote();
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| world.memory.attend_all_until(std::slice::from_ref(&request), &until));
            std::thread::sleep(Duration::from_millis(100));
            gone.store(true, std::sync::atomic::Ordering::Relaxed);
            let ended = ended.join().unwrap().and_then(|outcomes| outcomes.into_iter().collect::<Result<Vec<_>>>());
            assert!(matches!(ended, Err(MemoryError::Unavailable { .. })), "{ended:?}");
        });
        assert!(begun.elapsed() < Duration::from_secs(20), "{granularity:?}");
        assert_eq!(world.memory.work.taken(), 0);
    }
    let few = attend(LookupRequest { granularity: Granularity::Shared, ..world.request(&[7; 64], vec![]) });
    let few =
        AttendRequest { lookup: LookupRequest { scope: vec![range(document, 0..200); 1000], ..few.lookup }, ..few };
    let until = Until::after(Duration::from_millis(20));
    assert_eq!(world.memory.attend_until(&few, &until), Err(MemoryError::DeadlineExceeded { ms: 20 }), "between tiles");
}

#[test]
fn a_verification_ends_with_its_caller() {
    let mut world = World::new(spec("c"));
    world.document("a", 50);
    let (until, gone) = remote();
    let mut steps = 0;
    let progress = &mut |_, _| {
        steps += 1;
        gone.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let ended = world.memory.verify_until(None, progress, &until);
    assert!(matches!(ended, Err(MemoryError::Unavailable { .. })), "{ended:?}");
    assert_eq!(steps, 1);
}
