//! Bytes from a caller that is wrong, or worse: refused by field, before the memory sees them.

use std::sync::Arc;

use landmarkdb::limits;
use landmarkdb::{AppendRequest, Attended, BlockMemory, DocumentId, Granularity, MemoryError, Result};
use landmarkdb_grpc::server::ServeOptions;
use landmarkdb_grpc::wire::{from_status, v1};
use tonic::{Code, Status};

use crate::double::Double;
use crate::requests;
use crate::service::Service;

fn field_of(status: &Status) -> String {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    match from_status(status, "", 0) {
        MemoryError::Missing { field } => format!("no {field}"),
        MemoryError::Invalid { field, .. } => field,
        other => panic!("{other:?}"),
    }
}

fn lookup() -> v1::LookupRequest {
    (&requests::lookup(1, Granularity::Head)).into()
}

fn attend() -> v1::AttendRequest {
    (&requests::attend(1)).into()
}

fn append() -> v1::AppendRequest {
    requests::append(DocumentId(1), 0..1).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn lookups_and_attends_that_cannot_be_read() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let mut raw = service.raw().await;
    for (request, field) in [
        (v1::LookupRequest { queries: vec![0; 127].into(), ..lookup() }, "queries"),
        (v1::LookupRequest { block_score: 0, ..lookup() }, "no block_score"),
        (v1::LookupRequest { block_score: 3, ..lookup() }, "block_score"),
        (v1::LookupRequest { granularity: i32::MIN, ..lookup() }, "granularity"),
        (v1::LookupRequest::default(), "no block_score"),
    ] {
        assert_eq!(field_of(&raw.lookup(request).await.unwrap_err()), field);
    }
    for (request, field) in [
        (v1::AttendRequest { lookup: None, ..attend() }, "no lookup"),
        (v1::AttendRequest { normalisation: 0, ..attend() }, "no normalisation"),
        (v1::AttendRequest { normalisation: 77, ..attend() }, "normalisation"),
    ] {
        assert_eq!(field_of(&raw.attend(request).await.unwrap_err()), field);
    }
    let too_many = v1::AttendAllRequest { requests: vec![attend(); limits::ATTEND_REQUESTS_MAX + 1] };
    let refused = raw.attend_all(too_many).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    let fetch = v1::FetchRequest { document: 1, blocks: vec![0], dtype: 9 };
    assert_eq!(field_of(&raw.fetch(fetch).await.unwrap_err()), "dtype");
    assert_eq!(memory.calls(), [""; 0], "the memory was never asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_of_many_that_cannot_be_read() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let request = v1::AttendAllRequest { requests: vec![attend(), v1::AttendRequest::default(), attend()] };
    let outcomes = service.raw().await.attend_all(request).await.unwrap().into_inner().outcomes;
    let outcomes: Vec<Result<Attended>> = outcomes.into_iter().map(Attended::try_from).collect();
    let answer = memory.attend(&attend().try_into().unwrap());
    assert_eq!(outcomes, [answer.clone(), Err(MemoryError::Missing { field: "lookup".into() }), answer]);
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_cannot_be_read() {
    type Spoil = fn(&mut v1::NewBlock);
    fn k(block: &mut v1::NewBlock) -> &mut v1::Tensor {
        block.k.as_mut().unwrap()
    }
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let mut raw = service.raw().await;
    let cases: [(Spoil, &str); 9] = [
        (|block| block.k = None, "no k"),
        (|block| block.v = None, "no v"),
        (|block| block.text = None, "no text"),
        (|block| k(block).data = k(block).data.slice(1..), "k"),
        (|block| k(block).shape = vec![u32::MAX; 4], "k"),
        (|block| k(block).shape = vec![u32::MAX; 100_000], "k"),
        (|block| k(block).dtype = 0, "no k.dtype"),
        (|block| k(block).dtype = v1::Dtype::Int8 as i32, "k.dtype"),
        (|block| k(block).dtype = -1, "k.dtype"),
    ];
    for (spoil, field) in cases {
        let mut request = append();
        spoil(&mut request.blocks[0]);
        let mut replies = raw.append(tokio_stream::iter([request])).await.unwrap().into_inner();
        assert_eq!(field_of(&replies.message().await.unwrap_err()), field);
    }
    assert_eq!(memory.calls(), [""; 0], "the memory was never asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_beyond_the_limit_are_refused_and_the_service_goes_on() {
    let memory = Arc::new(Double::default());
    let options = ServeOptions { message_bytes: 1 << 20, ..ServeOptions::default() };
    let service = Service::start_with(&memory, None, options);
    let mut raw = service.raw().await;
    let large = v1::LookupRequest { queries: vec![0; 2 << 20].into(), ..lookup() };
    let refused = raw.lookup(large.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert_eq!(memory.calls(), [""; 0]);
    raw.lookup(lookup()).await.unwrap();
}

#[test]
fn our_client_says_in_the_memorys_words_that_a_message_is_too_large() {
    let memory = Arc::new(Double::default());
    let options = ServeOptions { message_bytes: 1 << 20, ..ServeOptions::default() };
    let service = Service::start_with(&memory, None, options);
    // 20 MB: more than a stream's window takes before the service has answered.
    let refused = service.connect().lookup(&requests::lookup(160_000, Granularity::Shared));
    assert!(matches!(&refused, Err(MemoryError::LimitExceeded { limit: 786_432, .. })), "{refused:?}");
    assert_eq!(memory.calls(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_batches_hold_when_the_caller_vanishes() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let batch = |indices| requests::append(DocumentId(1), indices);
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let mut replies =
        service.raw().await.append(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.unwrap().into_inner();
    for indices in [0..2, 2..3] {
        sender.send(v1::AppendRequest::from(batch(indices.clone()))).await.unwrap();
        // The reply comes although the stream stays open: no batch waits for the next.
        let reply = replies.message().await.unwrap().unwrap();
        let expected = Double::default().append(batch(indices)).unwrap();
        assert_eq!(reply.document.unwrap(), expected.into());
    }
    drop((sender, replies));
    let asked = |request: &AppendRequest| format!("append {request:?}");
    assert_eq!(memory.calls(), [asked(&batch(0..2)), asked(&batch(2..3))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_batch_ends_its_stream_and_no_later_one_is_tried() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let mut spoiled = append();
    spoiled.blocks[0].k = None;
    let batches = [append(), spoiled, append()];
    let mut replies = service.raw().await.append(tokio_stream::iter(batches)).await.unwrap().into_inner();
    assert!(replies.message().await.unwrap().is_some());
    assert_eq!(field_of(&replies.message().await.unwrap_err()), "no k");
    assert_eq!(memory.calls().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_attends_answers_each_by_its_id_and_outlives_a_refusal() {
    use v1::attend_stream_reply::Outcome;
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let good =
        |id: u64| v1::AttendStreamRequest { id, request: Some((&requests::attend(id as u32)).into()), timeout_ms: 0 };
    let requests: Vec<_> = (1..200)
        .map(|id| match id % 10 {
            0 => v1::AttendStreamRequest { id, request: None, timeout_ms: 9 },
            5 => v1::AttendStreamRequest {
                id,
                request: Some(v1::AttendRequest { lookup: None, ..attend() }),
                timeout_ms: 0,
            },
            _ => good(id),
        })
        .collect();
    let mut replies = service.raw().await.attend_stream(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut ids = Vec::new();
    while let Some(reply) = replies.message().await.unwrap() {
        ids.push(reply.id);
        match (reply.id % 10, reply.outcome.unwrap()) {
            (0 | 5, Outcome::Error(error)) => {
                let field = if reply.id % 10 == 0 { "request" } else { "lookup" };
                assert_eq!(MemoryError::try_from(error), Ok(MemoryError::Missing { field: field.into() }));
            }
            (_, Outcome::Reply(answer)) => {
                let expected = Double::default().attend(&requests::attend(reply.id as u32)).unwrap();
                assert_eq!(answer, expected.into());
            }
            (_, outcome) => panic!("{}: {outcome:?}", reply.id),
        }
    }
    ids.sort();
    assert!(ids.into_iter().eq(1..200));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_lookups_answers_too() {
    use v1::lookup_stream_reply::Outcome;
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let requests = [v1::LookupStreamRequest { id: 7, request: Some(lookup()), timeout_ms: u64::MAX }];
    let mut replies = service.raw().await.lookup_stream(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let expected = memory.lookup(&requests::lookup(1, Granularity::Head)).unwrap();
    let reply = replies.message().await.unwrap().unwrap();
    assert_eq!(reply, v1::LookupStreamReply { id: 7, outcome: Some(Outcome::Reply(expected.into())) });
    assert_eq!(replies.message().await.unwrap(), None);
}
