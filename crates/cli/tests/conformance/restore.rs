//! Does a session that was interrupted and restored say what one says that was not? After every cut, at no cost.

use landmarkdb_grpc::wire::v1;

use crate::answers::range;
use crate::client::Client;
use crate::data::{Model, Text, World, values_of};
use crate::definition::{Block, Blocks};
use crate::harness::{Named, cases};
use crate::judge::{SUMS, close};
use crate::suite::Suite;

cases! {
    restoring_after_any_cut_gives_the_answers_of_one_append;
    a_restored_tail_goes_on_after_a_kill needs [Kill];
    a_restored_document_costs_no_encoding needs [Restart];
}

/// What a session does that finds a document with some first tokens of its text: it takes those of the tail from the store,
/// and goes on with the others.
fn go_on(client: &Client, world: &World, document: u64, text: &Text) {
    let info = client.info(document).expect("the document");
    let (size, durable) = (world.model.block_tokens, info.tokens as usize);
    let begin = durable / size * size;
    let mut text = text.clone();
    for reply in client.fetch(document, (begin < durable).then_some(info.blocks)).expect("the tail") {
        assert_eq!(reply.token_ids, text.ids[begin..durable], "the tail's tokens");
        let values = |tensor: &Option<v1::Tensor>| values_of(&tensor.as_ref().expect("always present").data);
        let (k, v) = (values(&reply.k), values(&reply.v));
        for token in begin..durable {
            // (L, Hkv, tokens, D)
            let dim = world.model.head_dim;
            let of_token = |values: &[f32]| -> Vec<f32> {
                values
                    .chunks((durable - begin) * dim)
                    .flat_map(|head| &head[(token - begin) * dim..][..dim])
                    .copied()
                    .collect()
            };
            text.with_token(token, &of_token(&k), &of_token(&v));
        }
    }
    client.append(document, text.cut(begin..text.tokens())).expect("the rest");
}

/// Lookups, attends and fetches of two documents agree, and with the definition.
#[track_caller]
fn same_answers(world: &World, whole: u64, cut: u64, sent: &Blocks, blocks: u32) {
    let infos = [whole, cut].map(|document| world.client.info(document).expect("the document"));
    let [a, b] = infos.map(|info| (info.blocks, info.tail_tokens, info.tokens, info.text_bytes));
    assert_eq!(a, b, "blocks, tail, tokens and bytes of text");
    for seed in 0..3 {
        let [a, b] = [whole, cut].map(|document| {
            let mut request = world.attend_question(seed, vec![range(document, 0, blocks)]);
            request.lookup.as_mut().expect("a lookup").top_k = 2;
            let reply = world.client.attend(request.clone()).expect("an attend");
            if document == whole {
                world.judge_attended(&request, &reply, sent);
            }
            let hits = world.client.lookup(request.lookup.expect("a lookup")).expect("a lookup");
            assert_eq!(reply.hits.as_ref(), Some(&hits));
            reply
        });
        let hits = |reply: &v1::AttendReply| reply.hits.clone().expect("always present");
        assert_eq!(hits(&a).indices, hits(&b).indices);
        let wide = |bytes: &[u8]| -> Vec<f64> { values_of(bytes).into_iter().map(f64::from).collect() };
        close("scores", &values_of(&hits(&b).scores), &wide(&hits(&a).scores), SUMS);
        close("out", &values_of(&b.out), &wide(&a.out), SUMS);
        close("lse", &values_of(&b.lse), &wide(&a.lse), SUMS);
    }
}

/// restore(B) + feed(N - B) equals feed(N) for every B.
fn restoring_after_any_cut_gives_the_answers_of_one_append(suite: &Suite) {
    let shared = suite.shared();
    for (name, model) in Model::all() {
        let _named = Named(name);
        let world = World::new(suite, &shared.client(), &model);
        let size = model.block_tokens;
        let text = Text::random(&model, 4 * size + size / 2, 11);
        let whole = world.store("whole", &text);
        let sent = Block::sent(whole, &text.all(), size);
        for cut in 1..text.tokens() {
            let _named = Named(format!("a cut after {cut} tokens"));
            // A tail in int8 is rounded, and rounded again as part of a block: that is another text.
            if !model.is_exact() && cut % size != 0 {
                continue;
            }
            let document = world.open(&format!("cut after {cut}"));
            world.client.append(document, text.cut(0..cut)).expect("the first tokens");
            go_on(&shared.client(), &world, document, &text);
            world.judge_document(document, &text.all());
            same_answers(&world, whole, document, &sent, 4);
        }
    }
}

fn a_restored_tail_goes_on_after_a_kill(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let text = Text::random(&world.model, 19, 12);
    let whole = world.store("whole", &text);
    let sent = Block::sent(whole, &text.all(), 4);
    let document = world.open("killed twice");
    world.client.append(document, text.cut(0..6)).expect("the first tokens");
    for tokens in [13, 19] {
        service.kill();
        service.start();
        world.client = service.client();
        go_on(&world.client, &world, document, &Text::random(&world.model, tokens, 12));
    }
    world.judge_document(document, &text.all());
    same_answers(&world, whole, document, &sent, 4);
}

/// Counted by the service itself: what is restored is not appended again.
fn a_restored_document_costs_no_encoding(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let text = Text::random(&world.model, 23, 13);
    let before = world.client.stats().expect("totals");
    let document = world.store("text", &text);
    let after = world.client.stats().expect("totals");
    assert_eq!(after.appended_blocks - before.appended_blocks, 5, "full blocks that were appended are counted");
    assert_eq!(after.tokens - before.tokens, 23);
    service.stop();
    service.start();
    world.client = service.client();
    let opened = world.client.stats().expect("totals").appended_blocks;
    let restored = world.client.document(world.collection, "text").expect("the document");
    assert_eq!((restored.id, restored.tokens), (document, 23));
    world.judge_attend(&world.attend_question(1, vec![range(document, 0, 5)]), &Block::sent(document, &text.all(), 4));
    world.client.append(document, text.all()).expect("a caller that did not know");
    assert_eq!(world.client.stats().expect("totals").appended_blocks, opened, "nothing was encoded again");
}
