//! What does a document keep for its model? One state, whole, until another takes its place.

use landmarkdb_grpc::wire::v1;
use tonic::Code;
use v1::error::{Kind, UnexpectedLength};

use crate::appends::{refused, world};
use crate::client::{Answer, Client, runtime};
use crate::data::{Model, Text, World};
use crate::harness::cases;
use crate::suite::Suite;

cases! {
    a_state_comes_back_until_another_takes_its_place;
    a_refused_state_changes_nothing;
    a_state_survives_kill_and_rebuild needs [Kill, Rebuild];
}

type Parts = Vec<Vec<u8>>;

fn parts(lens: &[usize], seed: usize) -> Parts {
    let part = |(number, &len): (usize, &usize)| (0..len).map(|i| (i * 7 + number * 31 + seed * 101) as u8).collect();
    lens.iter().enumerate().map(part).collect()
}

fn send(client: &Client, messages: Vec<v1::PutStateRequest>) -> Answer<v1::DocumentInfo> {
    let mut memory = client.memory.clone();
    let reply = runtime().block_on(memory.put_state(tokio_stream::iter(messages)))?.into_inner();
    Ok(reply.document.expect("the document"))
}

fn messages(document: u64, tokens: u64, all: &Parts) -> Vec<v1::PutStateRequest> {
    let parts = all.len() as u32;
    all.iter().map(|part| v1::PutStateRequest { document, tokens, parts, part: part.clone().into() }).collect()
}

/// The state of a document: the tokens that it was taken after, and its parts.
fn state(client: &Client, document: u64) -> Option<(u64, Parts)> {
    let mut memory = client.memory.clone();
    let mut part = |part| {
        let reply = runtime().block_on(memory.get_state_part(v1::GetStatePartRequest { document, part }));
        reply.expect("a part, or none").into_inner().part
    };
    let first = part(0)?;
    let parts = (0..first.parts).map(|number| part(number).expect("each of the parts"));
    let parts: Vec<v1::StatePart> = parts.collect();
    assert!(parts.iter().all(|part| (part.version, part.tokens) == (first.version, first.tokens)));
    assert_eq!(part(first.parts), None);
    Some((first.tokens, parts.into_iter().map(|part| part.part.to_vec()).collect()))
}

fn a_state_comes_back_until_another_takes_its_place(suite: &Suite) {
    let (world, document, _) = world(suite, 14);
    assert_eq!(state(&world.client, document), None);
    assert_eq!(world.client.info(document).expect("the document").state_tokens, None);
    let first = parts(&[1000, 1, 70_000], 1);
    let info = send(&world.client, messages(document, 14, &first)).expect("a state");
    assert_eq!(info, world.client.info(document).expect("the document"));
    assert_eq!(info.state_tokens, Some(14));
    assert_eq!(state(&world.client, document), Some((14, first.clone())));
    // The document grows, and the state is older than it.
    let longer = Text::random(&world.model, 20, 5);
    world.client.append(document, longer.all()).expect("a longer text");
    assert_eq!(state(&world.client, document), Some((14, first)));
    let second = parts(&[9], 2);
    send(&world.client, messages(document, 20, &second)).expect("another state");
    world.client.seal(document).expect("a seal");
    assert_eq!(state(&world.client, document), Some((20, second)));
    world.judge_document(document, &longer.all());
}

fn a_refused_state_changes_nothing(suite: &Suite) {
    let (world, document, text) = world(suite, 14);
    let kept = parts(&[50, 60], 1);
    send(&world.client, messages(document, 14, &kept)).expect("a state");
    for tokens in [0, 12, 13, 15] {
        let refusal = send(&world.client, messages(document, tokens, &parts(&[5], 2))).expect_err("another length");
        let kind = refused(refusal, Code::FailedPrecondition);
        assert_eq!(kind, Kind::UnexpectedLength(UnexpectedLength { document, expected: tokens, found: 14 }));
    }
    let whole = messages(document, 14, &parts(&[5, 5, 5], 2));
    let mut other = whole.clone();
    other[1].parts = 4;
    let empty = messages(document, 14, &parts(&[5, 0], 2));
    for messages in [whole[..2].to_vec(), other, empty, vec![]] {
        refused(send(&world.client, messages).expect_err("no whole state"), Code::InvalidArgument);
    }
    assert_eq!(state(&world.client, document), Some((14, kept.clone())));
    world.client.seal(document).expect("a seal");
    let refusal = send(&world.client, messages(document, 14, &parts(&[5], 2))).expect_err("a sealed document");
    refused(refusal, Code::FailedPrecondition);
    assert_eq!(state(&world.client, document), Some((14, kept)));
    world.judge_document(document, &text.all());
}

fn a_state_survives_kill_and_rebuild(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let text = Text::random(&world.model, 15, 2);
    let document = world.store("text", &text);
    let kept = parts(&[1 << 20, 3, 5000], 3);
    for seed in [1, 2] {
        send(&world.client, messages(document, 15, &parts(&[2000, 2000, 2000, 2000], seed))).expect("a state");
    }
    send(&world.client, messages(document, 15, &kept)).expect("a state");
    for rebuild in [false, true] {
        service.kill();
        if rebuild {
            service.discard_derived();
        }
        service.start();
        world.client = service.client();
        assert_eq!(state(&world.client, document), Some((15, kept.clone())));
        world.judge_document(document, &text.all());
    }
}
