//! Is everything that was acknowledged there, after kills, restarts and rebuilds?

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use landmarkdb_grpc::wire::v1;
use rand::RngExt;
use v1::{Dtype, KeyRule};

use crate::answers::{any_question, range};
use crate::data::{Model, Text, World, seeded};
use crate::definition::Block;
use crate::harness::{Named, cases};
use crate::suite::{Alone, Suite, rounds};

cases! {
    acknowledged_blocks_survive_kills_under_load needs [Kill];
    tails_and_seals_survive_kill_and_rebuild needs [Kill, Rebuild];
    nothing_is_lost_when_rebuilt_after_a_compaction needs [Rebuild];
    nothing_is_destroyed_that_a_rebuild_found needs [Rebuild];
    every_document_is_whole_when_rebuilt_after_deletions needs [Rebuild];
}

const WRITERS: u64 = 3;

fn acknowledged_blocks_survive_kills_under_load(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let texts: Vec<Text> = (0..WRITERS).map(|writer| world.text(4000, writer)).collect();
    let documents: Vec<u64> = (0..WRITERS).map(|writer| world.open(&format!("text {writer}"))).collect();
    let acknowledged: Vec<AtomicU32> = (0..WRITERS).map(|_| AtomicU32::new(0)).collect();
    let mut rng = seeded(1);
    for round in 0..rounds() / 5 {
        let _named = Named(format!("kill {round}"));
        std::thread::scope(|scope| {
            for ((text, &document), acknowledged) in texts.iter().zip(&documents).zip(&acknowledged) {
                let client = service.client();
                scope.spawn(move || {
                    let mut next = acknowledged.load(Ordering::SeqCst) as usize;
                    while next < 1000 {
                        // A kill ends the writer, too.
                        let batch = text.cut(next * 4..(next + 1 + next % 3) * 4);
                        let Ok(info) = client.append(document, batch) else { return };
                        next = info.blocks as usize;
                        acknowledged.store(info.blocks, Ordering::SeqCst);
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(rng.random_range(5..120)));
            service.kill();
        });
        service.start();
        world.client = service.client();
        for ((text, &document), acknowledged) in texts.iter().zip(&documents).zip(&acknowledged) {
            let (found, least) = (world.client.info(document).expect("the document").blocks, acknowledged);
            let least = least.load(Ordering::SeqCst);
            assert!(found >= least, "{least} blocks were acknowledged, {found} are there");
            world.judge_document(document, &text.cut(0..found as usize * 4));
            acknowledged.store(found, Ordering::SeqCst);
        }
    }
    let most = acknowledged.iter().map(|blocks| blocks.load(Ordering::SeqCst)).sum::<u32>();
    assert!(most > 0, "the writers wrote something between kills");
}

fn tails_and_seals_survive_kill_and_rebuild(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let text = Text::random(&world.model, 15, 2);
    let (tail, sealed) = (world.store("tail", &text), world.store("sealed", &text));
    world.client.append(tail, text.cut(12..13)).expect("a shorter tail is what came last, or is there already");
    let last = world.client.info(tail).expect("the document").tokens as usize;
    assert!([13, 15].contains(&last), "{last} tokens");
    let info = world.client.seal(sealed).expect("a seal");
    let scope = vec![range(sealed, 1, info.blocks + 1)];
    let (question, blocks) = (world.attend_question(3, scope), Block::sealed(sealed, &text.all()));
    for rebuild in [false, true] {
        service.kill();
        if rebuild {
            service.discard_derived();
        }
        service.start();
        world.client = service.client();
        world.judge_document(tail, &text.cut(0..last));
        world.judge_document(sealed, &text.all());
        assert!(world.client.info(sealed).expect("the document").sealed);
        world.judge_attend(&question, &blocks);
        let longer = Text::random(&world.model, 16, 2);
        world.client.append(sealed, longer.cut(12..16)).expect_err("a sealed document takes nothing");
    }
}

/// Blocks of 32 KiB, of which a few hundred are more than a store may want to move at once.
fn large() -> Model {
    Model {
        layers: 1,
        query_heads: 1,
        kv_heads: 1,
        head_dim: 64,
        block_tokens: 64,
        rule: KeyRule::Landmark,
        payload: Dtype::F32,
        ..Model::small()
    }
}

fn rebuild(service: &mut Alone, world: &mut World) {
    service.stop();
    service.discard_derived();
    service.start();
    world.client = service.client();
}

/// Deleting a document made a store move the blocks of another. When it was rebuilt afterwards it lost 225 of 400
/// acknowledged blocks.
fn after_a_compaction<'a>(suite: &'a Suite) -> (Alone<'a>, World, u64, Text) {
    let service = suite.alone();
    let world = World::new(suite, &service.client(), &large());
    let text = world.text(360, 1);
    let filler = world.store("filler", &world.text(180, 2));
    let kept = world.store("kept", &text);
    world.client.delete(filler).expect("a deletion");
    (service, world, kept, text)
}

fn nothing_is_lost_when_rebuilt_after_a_compaction(suite: &Suite) {
    let (mut service, mut world, kept, text) = after_a_compaction(suite);
    rebuild(&mut service, &mut world);
    world.judge_document(kept, &text.all());
    world.judge_attend(&any_question(&world, kept, 360), &Block::sent(kept, &text.all(), 64));
    assert_eq!(world.client.verify(None).expect("a report").faults, vec![]);
}

/// The next deletion then destroyed the bytes of those blocks for good.
fn nothing_is_destroyed_that_a_rebuild_found(suite: &Suite) {
    let (mut service, mut world, kept, text) = after_a_compaction(suite);
    rebuild(&mut service, &mut world);
    let small = world.store("one block", &world.text(1, 3));
    world.client.delete(small).expect("a deletion");
    rebuild(&mut service, &mut world);
    world.judge_document(kept, &text.all());
}

fn every_document_is_whole_when_rebuilt_after_deletions(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &large());
    let texts: Vec<Text> = (0..12).map(|i| world.text(30, i)).collect();
    let documents: Vec<u64> =
        texts.iter().enumerate().map(|(i, text)| world.store(&format!("text {i}"), text)).collect();
    for &document in documents.iter().step_by(4) {
        world.client.delete(document).expect("a deletion");
    }
    rebuild(&mut service, &mut world);
    for (i, (text, &document)) in texts.iter().zip(&documents).enumerate().filter(|(i, _)| i % 4 != 0) {
        let _named = Named(i);
        world.judge_document(document, &text.all());
    }
    assert_eq!(world.client.documents(world.collection).expect("a list").len(), 9);
}
