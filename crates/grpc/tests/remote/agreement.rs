//! Remote and in process are one.

use std::sync::Arc;

use landmarkdb::{Fingerprint, Until, *};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::ServeOptions;

use crate::double::{Double, FULL_BLOCKS, UNKNOWN};
use crate::requests;
use crate::service::{Service, hasty};

/// Every method with requests that have every field in them; answers and errors as text, which tells -0 from 0.
fn ask_everything(memory: &dyn BlockMemory) -> Vec<String> {
    let document = DocumentId(u64::MAX - 1);
    let all = BlockRange { document, blocks: 0..u32::MAX };
    let granularities =
        [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];
    let mut steps = Vec::new();
    let tuned = memory.tune(&requests::tune(), &mut |step| steps.push(step), &Until::FOREVER);
    let mut answers = vec![
        format!("{tuned:?} {steps:?}"),
        format!("{:?}", memory.open_collection(&requests::spec())),
        format!("{:?}", memory.collections()),
        format!("{:?}", memory.set_engine(CollectionId(7), Engine::Sq8)),
        format!("{:?}", memory.open_document(CollectionId(u32::MAX), "ein \"Name\"")),
        format!("{:?}", memory.documents(CollectionId(0))),
        format!("{:?}", memory.document(document)),
        format!("{:?}", memory.document(UNKNOWN)),
        format!("{:?}", memory.append(requests::append(document, 0..3))),
        format!("{:?}", memory.append(requests::append(document, 0..0))),
        format!("{:?}", memory.append(requests::append(UNKNOWN, 0..1))),
        format!("{:?}", memory.put_state(document, requests::state(3))),
        format!("{:?}", memory.put_state(UNKNOWN, requests::state(1))),
        format!("{:?}", memory.state_part(document, 2)),
        format!("{:?}", memory.state_part(document, 3)),
        format!("{:?}", memory.state(document)),
        format!("{:?}", memory.state(UNKNOWN)),
        format!("{:?}", memory.seal(document)),
        format!("{:?}", memory.attend(&requests::attend(5))),
        format!("{:?}", memory.attend(&requests::attend(5000))),
        format!("{:?}", memory.attend_all(&[])),
        format!("{:?}", memory.attend_all(&[1, 5000, 2].map(requests::attend))),
        format!("{:?}", memory.lookup(&requests::lookup(5000, Granularity::Token))),
        format!("{:?}", memory.blocks(&all)),
        format!("{:?}", memory.blocks(&BlockRange { blocks: 1..1025, ..all.clone() })),
        format!("{:?}", memory.blocks(&BlockRange { blocks: std::ops::Range { start: 7, end: 3 }, ..all.clone() })),
        format!("{:?}", memory.blocks(&BlockRange { document: UNKNOWN, blocks: 0..0 })),
        format!("{:?}", memory.replace(DocumentId(3), document)),
        format!("{:?}", memory.delete(document)),
        format!("{:?}", memory.stats()),
        format!("{:?}", memory.verify(None, &mut |_, _| {})),
        format!("{:?}", memory.verify_rebuild(&mut |_, _| {}, &Until::FOREVER)),
        format!("{:?}", memory.verify(Some(DocumentId(0)), &mut |_, _| {})),
    ];
    for granularity in granularities {
        answers.push(format!("{:?}", memory.lookup(&requests::lookup(3, granularity))));
    }
    for (dtype, blocks) in
        [(DType::F32, vec![]), (DType::F16, vec![5, 0, 5, FULL_BLOCKS]), (DType::BF16, (0..300).collect())]
    {
        answers.push(format!("{:?}", memory.fetch(&FetchRequest { document, blocks, dtype })));
    }
    answers.push(format!("{:?}", memory.fetch(&FetchRequest { document: UNKNOWN, blocks: vec![], dtype: DType::F32 })));
    answers
}

#[test]
fn every_method_answers_the_same_over_tcp_and_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let memory = Arc::new(Double::default());
    let service = Service::start_with(&memory, Some(&socket), ServeOptions::default());
    let expected = ask_everything(&*memory);
    for target in [service.target.clone(), format!("unix:{}", socket.display())] {
        let remote = RemoteMemory::connect(&target, ClientOptions::default()).unwrap();
        for (answer, expected) in ask_everything(&remote).iter().zip(&expected) {
            assert_eq!(answer, expected, "over {target}");
        }
    }
}

#[test]
fn what_the_memory_is_asked_is_what_the_caller_asked() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let remote = service.connect();
    let mut request = requests::attend(2);
    // The memory itself refuses these; the wire has no opinion.
    request.lookup.queries[..4].copy_from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]);
    request.lookup.queries.pop();
    remote.attend(&request).unwrap();
    assert_eq!(memory.calls(), [format!("attend {request:?}")]);
}

#[test]
fn every_error_survives_calls_and_streams_alike() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let remote = service.connect_with(ClientOptions { attempts: 1, ..hasty() });
    let document = DocumentId(7);
    let text = || "wörds".to_string();
    for error in [
        MemoryError::NotFound { entity: Entity::Block, id: text() },
        MemoryError::Missing { field: text() },
        MemoryError::Invalid { field: text(), expected: text(), found: text() },
        MemoryError::FingerprintMismatch {
            collection: text(),
            stored: Fingerprint([1; 32]),
            offered: Fingerprint([2; 32]),
        },
        MemoryError::Conflict { document, index: 0 },
        MemoryError::Sealed { document },
        MemoryError::OutOfOrder { document, expected: 0, found: 9 },
        MemoryError::UnexpectedLength { document, expected: 0, found: 9 },
        MemoryError::LimitExceeded { what: text(), limit: 1, found: 2 },
        MemoryError::DataLoss { block: Some(BlockId { document, index: 1 }), detail: text() },
        MemoryError::DataLoss { block: None, detail: text() },
        MemoryError::Busy { what: text(), retry_ms: 3 },
        MemoryError::Storage { detail: text() },
        MemoryError::Locked { path: text() },
        MemoryError::Unavailable { target: text(), detail: text() },
        MemoryError::Internal { detail: text() },
    ] {
        let calls: [&dyn Fn() -> Option<MemoryError>; 11] = [
            &|| remote.document(document).err(),
            &|| remote.attend(&requests::attend(1)).err(),
            &|| remote.attend(&requests::attend(600)).err(),
            &|| remote.attend_all(&[requests::attend(1)]).pop()?.err(),
            &|| remote.append(requests::append(document, 0..1)).err(),
            &|| remote.fetch(&FetchRequest { document, blocks: vec![0, 1], dtype: DType::F16 }).err(),
            &|| remote.blocks(&BlockRange { document, blocks: 0..9 }).err(),
            &|| remote.verify(None, &mut |_, _| {}).err(),
            &|| remote.collections().err(),
            &|| remote.put_state(document, requests::state(2)).err(),
            &|| remote.state(document).err(),
        ];
        for call in calls {
            memory.fail_with([Some(error.clone())]);
            assert_eq!(call().as_ref(), Some(&error));
        }
    }
    // The client answers with the time that its own caller set.
    memory.fail_with([Some(MemoryError::DeadlineExceeded { ms: 1 })]);
    assert_eq!(remote.stats(), Err(MemoryError::DeadlineExceeded { ms: 120_000 }));
}

#[test]
fn requests_asked_together_are_answered_in_their_order_and_fail_alone() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let remote = service.connect();
    let of_layer = |layer| {
        let request = requests::attend(700);
        AttendRequest { lookup: LookupRequest { layer, ..request.lookup }, ..request }
    };
    // More than the client puts into one message, and a refusal in the first.
    let mut requests: Vec<AttendRequest> = (0..200).map(of_layer).collect();
    requests[11].lookup.scope[0].document = UNKNOWN;
    let expected: Vec<Result<Attended>> = requests.iter().map(|request| memory.attend(request)).collect();
    assert!(expected.iter().enumerate().all(|(layer, outcome)| outcome.is_err() == (layer == 11)));
    assert_eq!(remote.attend_all(&requests), expected);

    drop(service);
    let gone = remote.attend_all(&requests[..2]);
    assert!(
        matches!(&gone[..], [Err(MemoryError::Unavailable { .. }), Err(MemoryError::Unavailable { .. })]),
        "{gone:?}"
    );
}

#[test]
fn a_panic_in_the_memory_fails_one_call() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let remote = service.connect();
    // The double locks its failures while it looks at them: a poisoned lock makes it panic.
    let poisoner = memory.clone();
    let _ = std::thread::spawn(move || {
        let _held = poisoner.failures.lock();
        panic!("as the test wants")
    })
    .join();
    assert!(matches!(remote.stats(), Err(MemoryError::Internal { .. })));
    memory.failures.clear_poison();
    assert!(remote.stats().is_ok(), "the service goes on");
}

#[test]
fn many_threads_share_one_connection() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let remote = service.connect();
    std::thread::scope(|scope| {
        for tokens in 1..9 {
            let (remote, memory) = (&remote, &memory);
            scope.spawn(move || {
                for _ in 0..20 {
                    let request = requests::attend(tokens);
                    assert_eq!(remote.attend(&request), memory.attend(&request));
                }
            });
        }
    });
}

#[test]
fn progress_of_a_verification_arrives() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let mut seen = Vec::new();
    service.connect().verify(None, &mut |done, total| seen.push((done, total))).unwrap();
    assert!(!seen.is_empty() && seen.iter().all(|(done, total)| done <= total && *total == 5), "{seen:?}");
    assert!(seen.is_sorted());
}
