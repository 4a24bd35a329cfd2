//! Do streams keep what belongs together together, and in order?

use std::collections::HashMap;

use landmarkdb_grpc::wire::v1;
use v1::error::Kind;

use crate::answers::{any_question, range, stored};
use crate::appends::world;
use crate::client::{Client, read_all, runtime};
use crate::data::Model;
use crate::harness::cases;
use crate::judge::same_reply;
use crate::suite::Suite;

cases! {
    replies_of_streams_belong_to_their_requests;
    a_refused_request_leaves_its_stream_open;
    outcomes_come_in_the_order_of_the_requests;
    blocks_fetched_before_an_error_are_good;
}

fn attend_stream(client: &Client, requests: Vec<v1::AttendStreamRequest>) -> Vec<v1::AttendStreamReply> {
    let mut memory = client.memory.clone();
    let (replies, refusal) = runtime().block_on(async {
        let stream = memory.attend_stream(tokio_stream::iter(requests)).await.expect("a stream");
        read_all(stream.into_inner()).await
    });
    assert!(refusal.is_none(), "{refusal:?}");
    replies
}

fn replies_of_streams_belong_to_their_requests(suite: &Suite) {
    let (world, document, _) = stored(suite, &suite.shared().client(), &Model::small(), 20);
    let request = |id: u64| world.attend_question(id % 7, vec![range(document, id as u32 % 5, 20)]);
    // Ids are the caller's: any, in any order.
    let ids: Vec<u64> = (0..300).map(|id| u64::MAX - id * 13).collect();
    let requests = ids.iter().map(|&id| v1::AttendStreamRequest { id, request: Some(request(id)), timeout_ms: 0 });
    let mut expected = HashMap::new();
    for &id in &ids {
        let key = (id % 7, id % 5);
        expected.entry(key).or_insert_with(|| world.client.attend(request(id)).expect("an attend"));
    }
    let replies = attend_stream(&world.client, requests.collect());
    let mut answered: Vec<u64> = replies.iter().map(|reply| reply.id).collect();
    answered.sort_unstable_by(|a, b| b.cmp(a));
    assert_eq!(answered, ids, "every request is answered once");
    for reply in replies {
        let right = &expected[&(reply.id % 7, reply.id % 5)];
        let Some(v1::attend_stream_reply::Outcome::Reply(found)) = &reply.outcome else { panic!("{reply:?}") };
        assert_eq!(same_reply(found, right), Ok(()), "reply {}", reply.id);
    }

    let requests: Vec<_> =
        ids.iter().map(|&id| v1::LookupStreamRequest { id, request: request(id).lookup, timeout_ms: 60_000 }).collect();
    let mut memory = world.client.memory.clone();
    let (replies, refusal) = runtime().block_on(async {
        read_all(memory.lookup_stream(tokio_stream::iter(requests)).await.expect("a stream").into_inner()).await
    });
    assert!(refusal.is_none() && replies.len() == ids.len(), "{} replies, {refusal:?}", replies.len());
    for reply in replies {
        let right = expected[&(reply.id % 7, reply.id % 5)].hits.as_ref().expect("always present");
        let Some(v1::lookup_stream_reply::Outcome::Reply(found)) = &reply.outcome else { panic!("{reply:?}") };
        assert_eq!((&found.documents, &found.indices), (&right.documents, &right.indices), "reply {}", reply.id);
    }
}

fn a_refused_request_leaves_its_stream_open(suite: &Suite) {
    let (world, document, _) = world(suite, 12);
    let good = any_question(&world, document, 3);
    let mut unknown = good.clone();
    unknown.lookup.as_mut().expect("a lookup").collection = u32::MAX;
    let mut absent = good.clone();
    absent.lookup = None;
    let requests = [Some(good.clone()), Some(unknown), None, Some(absent), Some(good)];
    let requests = requests.into_iter().enumerate();
    let requests =
        requests.map(|(id, request)| v1::AttendStreamRequest { id: id as u64, request, timeout_ms: 0 }).collect();
    let mut replies = attend_stream(&world.client, requests);
    replies.sort_by_key(|reply| reply.id);
    let kind = |id: usize| match replies[id].outcome.as_ref().expect("always one of both") {
        v1::attend_stream_reply::Outcome::Reply(_) => None,
        v1::attend_stream_reply::Outcome::Error(error) => error.kind.clone(),
    };
    assert_eq!(replies.len(), 5);
    assert!(kind(0).is_none() && kind(4).is_none(), "the good ones are answered");
    assert!(matches!(kind(1), Some(Kind::NotFound(_))), "{:?}", kind(1));
    assert!(matches!(kind(2), Some(Kind::Missing(_))), "{:?}", kind(2));
    assert!(matches!(kind(3), Some(Kind::Missing(_))), "{:?}", kind(3));
}

fn outcomes_come_in_the_order_of_the_requests(suite: &Suite) {
    let (world, document, _) = stored(suite, &suite.shared().client(), &Model::small(), 20);
    let request = |seed: u64| {
        let mut request = world.attend_question(seed, vec![range(document, 0, 1 + seed as u32 % 20)]);
        if seed % 5 == 3 {
            request.lookup.as_mut().expect("a lookup").top_k = 0;
        }
        request
    };
    let requests: Vec<_> = (0..50).map(request).collect();
    let all = v1::AttendAllRequest { requests: requests.clone() };
    let outcomes = world.client.attend_all(all).expect("outcomes").outcomes;
    assert_eq!(outcomes.len(), 50);
    for (seed, (request, outcome)) in requests.into_iter().zip(outcomes).enumerate() {
        match outcome.outcome.expect("always one of both") {
            v1::attend_outcome::Outcome::Reply(reply) => {
                let alone = world.client.attend(request).expect("an attend");
                assert_eq!(same_reply(&reply, &alone), Ok(()), "outcome {seed}");
            }
            v1::attend_outcome::Outcome::Error(error) => {
                assert!(seed % 5 == 3 && matches!(error.kind, Some(Kind::Invalid(_))), "outcome {seed}: {error:?}");
            }
        }
    }
    let nothing = world.client.attend_all(v1::AttendAllRequest::default()).expect("no request is no outcome");
    assert!(nothing.outcomes.is_empty());
}

fn blocks_fetched_before_an_error_are_good(suite: &Suite) {
    let (world, document, text) = world(suite, 40);
    let blocks = vec![7, 0, 3, 3, 99, 1];
    let (found, refusal) =
        world.client.fetch_until(v1::FetchRequest { document, blocks, dtype: v1::Dtype::F32.into() });
    assert_eq!(refusal.expect("block 99").code, tonic::Code::NotFound);
    assert!(found.len() <= 4, "nothing behind the error");
    let sent = text.all();
    found.iter().zip([7, 0, 3, 3]).for_each(|(found, index)| world.judge_block(document, &sent[index], found));
    let nothing = world.client.fetch(document, []).expect("no blocks");
    assert!(nothing.is_empty());
    assert!(world.client.fetch(u64::MAX, []).is_err(), "no blocks of no document");
}
