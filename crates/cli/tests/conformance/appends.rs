//! What does an append promise? All of a batch or none of it, once, in order, until the document is sealed.

use landmarkdb_grpc::wire::v1;
use tonic::Code;
use v1::error::Kind;

use crate::answers::range;
use crate::client::Refusal;
use crate::data::{Model, Text, World};
use crate::definition::Block;
use crate::harness::cases;
use crate::suite::Suite;

cases! {
    an_append_may_be_repeated;
    other_tokens_are_a_conflict;
    a_gap_is_out_of_order;
    a_sealed_document_takes_nothing_more;
    a_tail_is_replaced_by_what_comes_later;
    a_failed_append_is_invisible;
    a_refused_batch_ends_its_stream_and_no_other;
    every_batch_is_answered_in_its_turn;
}

/// A document with a text of so many tokens.
pub(crate) fn world(suite: &Suite, tokens: usize) -> (World, u64, Text) {
    let client = suite.shared().client();
    let world = World::new(suite, &client, &Model::small());
    let text = Text::random(&world.model, tokens, 5);
    let document = world.store("text", &text);
    (world, document, text)
}

#[track_caller]
pub(crate) fn refused(refusal: Refusal, code: Code) -> Kind {
    assert_eq!(refusal.code, code, "{refusal:?}");
    refusal.kind.unwrap_or_else(|| panic!("no landmark.v1.Error with {}: {}", refusal.code, refusal.message))
}

fn an_append_may_be_repeated(suite: &Suite) {
    let (world, document, text) = world(suite, 14);
    let before = world.client.info(document).expect("the document");
    // Whole, in parts, and with blocks behind those that are there.
    for blocks in [text.cut(0..14), text.cut(4..12), text.cut(12..14), text.cut(0..4)] {
        assert_eq!(world.client.append(document, blocks).expect("a repeated append"), before);
    }
    let longer = Text::random(&world.model, 20, 5);
    world.client.append(document, longer.all()).expect("old blocks, a longer tail and new blocks in one batch");
    world.judge_document(document, &longer.all());
}

fn other_tokens_are_a_conflict(suite: &Suite) {
    let (world, document, text) = world(suite, 14);
    for (index, token) in [(0, 0), (2, 3), (1, 2)] {
        let mut blocks = text.cut(0..12);
        blocks[index].token_ids[token] ^= 1;
        let refusal = world.client.append(document, blocks).expect_err("other tokens");
        let kind = refused(refusal, Code::AlreadyExists);
        assert_eq!(kind, Kind::Conflict(v1::error::Conflict { document, index: index as u32 }));
    }
    world.judge_document(document, &text.all());
}

fn a_gap_is_out_of_order(suite: &Suite) {
    let (world, document, text) = world(suite, 8);
    let more = world.text(6, 9);
    for begin in [3, 4] {
        let refusal = world.client.append(document, more.cut(begin * 4..24)).expect_err("a gap");
        let found = begin as u32;
        let kind = refused(refusal, Code::FailedPrecondition);
        assert_eq!(kind, Kind::OutOfOrder(v1::error::OutOfOrder { document, expected: 2, found }));
    }
    // A batch is consecutive.
    let [a, _, c] = &more.cut(8..20)[..] else { unreachable!("three blocks") };
    for blocks in [vec![a.clone(), c.clone()], vec![c.clone(), a.clone()]] {
        world.client.append(document, blocks).expect_err("a batch with a hole");
    }
    // Only its last block may be short.
    let mut blocks = more.cut(8..16);
    blocks[0] = more.block(8..10);
    let refusal = world.client.append(document, blocks).expect_err("a short block in the middle");
    assert!(matches!(refused(refusal, Code::InvalidArgument), Kind::Invalid(_)));
    world.judge_document(document, &text.all());
}

fn a_sealed_document_takes_nothing_more(suite: &Suite) {
    let (world, document, text) = world(suite, 10);
    assert!(world.client.seal(document).expect("a seal").sealed);
    let sealed = world.client.seal(document).expect("sealing again changes nothing");
    for blocks in [world.text(4, 3).cut(12..16), world.text(4, 3).cut(8..12), world.text(4, 3).cut(8..9)] {
        let refusal = world.client.append(document, blocks).expect_err("an append to a sealed document");
        // Offering other tokens for the tail, or a gap, would be refused without the seal too.
        assert!(matches!(refused(refusal, Code::FailedPrecondition), Kind::Sealed(_) | Kind::OutOfOrder(_)));
    }
    let next = Text::random(&world.model, 12, 5);
    let refusal = world.client.append(document, vec![next.block(8..12)]).expect_err("a full block for the tail");
    assert_eq!(refused(refusal, Code::FailedPrecondition), Kind::Sealed(v1::error::Sealed { document }));
    assert_eq!(world.client.info(document).expect("the document"), sealed);
    world.client.append(document, text.all()).expect("a repeat of what is durable is no append");
    world.judge_document(document, &text.all());
}

fn a_tail_is_replaced_by_what_comes_later(suite: &Suite) {
    let (world, document, _) = world(suite, 9);
    let longer = Text::random(&world.model, 14, 5);
    for tokens in [9, 10, 11, 12] {
        let info = world.client.append(document, longer.cut(8..tokens)).expect("a longer tail");
        assert_eq!((info.blocks, info.tail_tokens), if tokens == 12 { (3, 0) } else { (2, tokens as u32 - 8) });
        world.judge_document(document, &longer.cut(0..tokens));
    }
    // Until the document is sealed its tail may be replaced, so it is no candidate.
    let info = world.client.append(document, longer.cut(12..14)).expect("a tail");
    let beyond = world.question(1, &[0], vec![range(document, 0, info.blocks + 1)]);
    let refusal = world.client.lookup(beyond).expect_err("the tail of an open document cannot be looked up");
    assert!(matches!(refused(refusal, Code::InvalidArgument), Kind::Invalid(_)));
}

/// The last block of a batch of three is wrong: nothing of the batch is there, by any call.
fn a_failed_append_is_invisible(suite: &Suite) {
    let (world, document, text) = world(suite, 8);
    let client = &world.client;
    let more = world.text(5, 9);
    let spoil: [fn(&mut v1::NewBlock); 6] = [
        |block| block.k = None,
        |block| block.text = None,
        |block| block.token_ids.truncate(0),
        |block| block.v.as_mut().expect("v").shape[3] += 1,
        |block| block.text.as_mut().expect("a text").offsets.reverse(),
        |block| block.k.as_mut().expect("k").data = vec![0xff; 2 * 2 * 4 * 8 * 4].into(),
    ];
    for (i, spoil) in spoil.into_iter().enumerate() {
        let mut blocks = more.cut(8..20);
        spoil(&mut blocks[2]);
        if i == 4 {
            // The words of these tokens differ in length, so that reversed offsets decrease.
            assert!(blocks[2].text.as_ref().is_some_and(|text| !text.offsets.is_sorted()), "a text that is spoilt");
        }
        let refusal = client.append(document, blocks).expect_err("a spoilt batch");
        assert!(matches!(refused(refusal, Code::InvalidArgument), Kind::Missing(_) | Kind::Invalid(_)), "spoilt {i}");
        world.judge_document(document, &text.all());
        assert_eq!(client.blocks(document, 0, 9).expect("a listing").len(), 2);
        let refusal = client.lookup(world.question(1, &[0], vec![range(document, 0, 3)])).expect_err("block 2");
        assert_eq!(refusal.code, Code::InvalidArgument);
        let sent = Block::sent(document, &text.all(), 4);
        world.judge_lookup(&world.question(2, &[0], vec![range(document, 0, 2)]), &sent);
    }
    client.append(document, more.cut(8..20)).expect("the batch as it should be");
}

fn a_refused_batch_ends_its_stream_and_no_other(suite: &Suite) {
    let (world, document, _) = world(suite, 8);
    let more = world.text(6, 9);
    let batches = vec![more.cut(8..12), more.cut(12..16), more.cut(20..24), more.cut(16..20)];
    let (replies, refusal) = world.client.append_batches(document, batches);
    let blocks: Vec<u32> = replies.iter().filter_map(|reply| Some(reply.document.as_ref()?.blocks)).collect();
    assert_eq!(blocks, [3, 4], "the replies before it hold, and nothing behind it was taken");
    assert!(matches!(refused(refusal.expect("a gap"), Code::FailedPrecondition), Kind::OutOfOrder(_)));
    assert_eq!(world.client.info(document).expect("the document").blocks, 4);
    world.client.append(document, more.cut(16..24)).expect("another stream goes on");
}

fn every_batch_is_answered_in_its_turn(suite: &Suite) {
    let client = suite.shared().client();
    let world = World::new(suite, &client, &Model::small());
    let text = world.text(60, 4);
    let document = world.open("text");
    let batches: Vec<_> = text.all().chunks(2).map(<[_]>::to_vec).collect();
    let (replies, refusal) = client.append_batches(document, batches);
    assert!(refusal.is_none(), "{refusal:?}");
    let blocks: Vec<u32> = replies.iter().filter_map(|reply| Some(reply.document.as_ref()?.blocks)).collect();
    assert_eq!(blocks, (1..=30).map(|batch| 2 * batch).collect::<Vec<u32>>());
    world.judge_document(document, &text.all());
}
