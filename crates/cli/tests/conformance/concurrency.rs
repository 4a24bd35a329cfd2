//! Do many callers at once get what each would get alone?

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tonic::Code;

use crate::answers::{any_question, range};
use crate::data::{Model, World};
use crate::definition::Block;
use crate::harness::cases;
use crate::judge::same_reply;
use crate::suite::Suite;

cases! {
    writers_of_one_document_store_it_once;
    readers_see_what_was_acknowledged_while_others_write;
    a_deletion_under_readers_is_an_answer_or_not_found;
}

fn writers_of_one_document_store_it_once(suite: &Suite) {
    let shared = suite.shared();
    let world = World::new(suite, &shared.client(), &Model::small());
    let text = world.text(60, 1);
    let document = world.open("text");
    let before = world.client.info(document).expect("the document").stored_bytes;
    std::thread::scope(|scope| {
        for writer in 1..=4 {
            let (client, text) = (shared.client(), &text);
            scope.spawn(move || {
                for batch in text.all().chunks(writer) {
                    // Another writer may be far ahead, and none may be behind.
                    client.append(document, batch.to_vec()).expect("blocks that are there or come next");
                }
            });
        }
    });
    world.judge_document(document, &text.all());
    let grown = world.client.info(document).expect("the document").stored_bytes - before;
    let once = world.store("once", &text);
    let alone = world.client.info(once).expect("the document").stored_bytes;
    assert!(grown <= alone + alone / 10, "{grown} bytes for what takes {alone}");
}

fn readers_see_what_was_acknowledged_while_others_write(suite: &Suite) {
    let shared = suite.shared();
    let world = World::new(suite, &shared.client(), &Model::small());
    let text = world.text(120, 2);
    let document = world.open("text");
    let sent = Block::sent(document, &text.all(), 4);
    let acknowledged = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for reader in 0..2u64 {
            let (world, text, sent, acknowledged) = (&world, &text, &sent, &acknowledged);
            let world = World { client: shared.client(), ..world.clone() };
            scope.spawn(move || {
                let mut seen = 0;
                while seen < 120 {
                    let least = acknowledged.load(Ordering::SeqCst);
                    let info = world.client.info(document).expect("the document");
                    assert!(info.blocks >= least.max(seen), "{} after {least} and {seen}", info.blocks);
                    seen = info.blocks;
                    if seen == 0 {
                        continue;
                    }
                    let begin = seen.saturating_sub(9);
                    world.judge_lookup(&world.question(reader, &[0], vec![range(document, begin, seen)]), sent);
                    let last = world.client.fetch(document, [seen - 1]).expect("an acknowledged block");
                    world.judge_block(document, &text.all()[seen as usize - 1], &last[0]);
                }
            });
        }
        for batch in text.all().chunks(3) {
            let info = world.client.append(document, batch.to_vec()).expect("an append");
            acknowledged.store(info.blocks, Ordering::SeqCst);
        }
    });
}

fn a_deletion_under_readers_is_an_answer_or_not_found(suite: &Suite) {
    let shared = suite.shared();
    let world = World::new(suite, &shared.client(), &Model::small());
    for round in 0..4 {
        let text = world.text(30, round);
        let (kept, gone) = (world.store(&format!("kept {round}"), &text), world.store("gone", &text));
        let questions = [kept, gone].map(|document| any_question(&world, document, 30));
        let right = questions.clone().map(|question| world.client.attend(question).expect("an attend"));
        let deleted = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let (client, questions, right, deleted) = (shared.client(), &questions, &right, &deleted);
                scope.spawn(move || {
                    let mut after = 0;
                    while after < 5 {
                        let was_deleted = deleted.load(Ordering::SeqCst);
                        let stays = client.attend(questions[0].clone()).expect("a document that stays");
                        assert_eq!(same_reply(&stays, &right[0]), Ok(()));
                        match client.attend(questions[1].clone()) {
                            Ok(reply) => {
                                assert!(!was_deleted, "an answer from a deleted document");
                                assert_eq!(same_reply(&reply, &right[1]), Ok(()));
                            }
                            Err(refusal) => assert_eq!(refusal.code, Code::NotFound, "{refusal:?}"),
                        }
                        after += was_deleted as u32;
                    }
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
            world.client.delete(gone).expect("a deletion");
            deleted.store(true, Ordering::SeqCst);
        });
    }
}
