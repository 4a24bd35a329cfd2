//! Is time that is over the end of an answer, and of nothing else?

use std::time::{Duration, Instant};

use landmarkdb_grpc::wire::v1;
use v1::error::Kind;

use crate::answers::{any_question, range, stored};
use crate::client::{read_all, runtime};
use crate::data::Model;
use crate::harness::cases;
use crate::judge::same_reply;
use crate::suite::Suite;

cases! {
    a_deadline_is_kept_and_work_behind_it_goes_on;
}

/// Requests of a second's work or so with a millisecond each, and small ones behind them without an end.
fn a_deadline_is_kept_and_work_behind_it_goes_on(suite: &Suite) {
    let (world, document, _) = stored(suite, &suite.shared().client(), &Model::small(), 1000);
    let mut large = world.question(1, &vec![0; 4096], vec![range(document, 0, 1000)]);
    large.top_k = 50;
    let normalisation = v1::Normalisation::Plain.into();
    let large = v1::AttendRequest { lookup: Some(large), normalisation, ..Default::default() };
    let small = any_question(&world, document, 3);
    let requests: Vec<_> = (0..12)
        .map(|id| {
            let (request, timeout_ms) = if id < 8 { (large.clone(), 1) } else { (small.clone(), 0) };
            v1::AttendStreamRequest { id, request: Some(request), timeout_ms }
        })
        .collect();
    let mut memory = world.client.memory.clone();
    let begun = Instant::now();
    let (replies, refusal) = runtime().block_on(async {
        read_all(memory.attend_stream(tokio_stream::iter(requests)).await.expect("a stream").into_inner()).await
    });
    assert!(refusal.is_none() && replies.len() == 12, "{} replies, {refusal:?}", replies.len());
    let right = world.client.attend(small).expect("an attend");
    let mut late = 0;
    for reply in replies {
        match reply.outcome.expect("always one of both") {
            v1::attend_stream_reply::Outcome::Reply(found) if reply.id >= 8 => {
                assert_eq!(same_reply(&found, &right), Ok(()));
            }
            // Faster than its deadline, or begun before it and finished.
            v1::attend_stream_reply::Outcome::Reply(_) => {}
            v1::attend_stream_reply::Outcome::Error(error) => {
                assert!(reply.id < 8, "{error:?}");
                let kind = error.kind.expect("a kind");
                let Kind::DeadlineExceeded(exceeded) = &kind else { panic!("{kind:?}") };
                assert_eq!(exceeded.ms, 1);
                late += 1;
            }
        }
    }
    assert!(late > 0, "eight requests of much work were all done within a millisecond");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}
