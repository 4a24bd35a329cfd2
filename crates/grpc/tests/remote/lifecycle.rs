//! Deadlines, retries, restarts, shutdown, health, reflection.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use landmarkdb::{BlockMemory, DocumentId, MemoryError};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::ServeOptions;
use landmarkdb_grpc::wire::v1;

use crate::double::Double;
use crate::requests;
use crate::service::{Service, hasty};

fn unavailable() -> Option<MemoryError> {
    Some(MemoryError::Unavailable { target: "double".into(), detail: "as the test wants".into() })
}

/// Waits until the double has begun `count` calls.
fn wait_for_calls(memory: &Double, count: usize) {
    let end = Instant::now() + Duration::from_secs(10);
    while memory.calls().len() < count {
        assert!(Instant::now() < end, "only {:?}", memory.calls());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_caller_gets_its_deadline_and_work_past_it_is_not_started() {
    let memory = Arc::new(Double::default());
    *memory.delay.lock().unwrap() = Duration::from_millis(400);
    let service = Service::start_with(&memory, None, ServeOptions { workers: 1, ..ServeOptions::default() });
    let patient = service.connect();
    let impatient = service.connect_with(ClientOptions { deadline: Duration::from_millis(1), ..hasty() });
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| patient.stats());
        wait_for_calls(&memory, 1);
        let begun = Instant::now();
        let late = MemoryError::DeadlineExceeded { ms: 1 };
        assert_eq!(impatient.document(DocumentId(1)), Err(late.clone()));
        assert_eq!(impatient.attend(&requests::attend(1)), Err(late.clone()), "over the long stream");
        assert_eq!(impatient.attend(&requests::attend(5000)), Err(late), "as a call of its own");
        assert!(begun.elapsed() < Duration::from_millis(300), "not after the work but at the deadline");
        assert!(slow.join().unwrap().is_ok());
    });
    // The only worker is free again; had the late call been let in, it would be begun before this one.
    assert!(patient.stats().is_ok());
    assert_eq!(memory.calls(), ["stats ()", "stats ()"]);
}

#[test]
fn streams_have_a_deadline_per_message() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let remote = service.connect_with(ClientOptions { deadline: Duration::from_millis(50), ..hasty() });
    *memory.delay.lock().unwrap() = Duration::from_millis(300);
    let late = Err(MemoryError::DeadlineExceeded { ms: 50 });
    assert_eq!(remote.append(requests::append(DocumentId(1), 0..1)), late);
    assert_eq!(remote.verify(None, &mut |_, _| {}).map(|_| ()), late.map(|_| ()));
}

#[test]
fn calls_that_may_be_repeated_are_and_deletions_are_not() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let remote = service.connect_with(hasty());
    memory.fail_with([unavailable(), unavailable(), None]);
    assert!(remote.document(DocumentId(1)).is_ok());
    assert_eq!(memory.calls().len(), 3);

    memory.fail_with([unavailable(), unavailable(), unavailable(), None]);
    assert_eq!(remote.attend(&requests::attend(1)).err(), unavailable(), "three attempts, no more");
    assert_eq!(memory.calls().len(), 6);

    memory.fail_with([Some(MemoryError::Sealed { document: DocumentId(1) })]);
    assert!(remote.seal(DocumentId(1)).is_err());
    assert_eq!(memory.calls().len(), 7, "a refusal is an answer");

    memory.fail_with([unavailable()]);
    assert_eq!(remote.delete(DocumentId(1)).err(), unavailable());
    assert_eq!(memory.calls().len(), 8);
}

#[test]
fn an_append_goes_on_behind_the_last_acknowledged_batch() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let document = DocumentId(1);
    // Each block is larger than a batch may be, so each travels alone.
    let remote = service.connect_with(ClientOptions { append_bytes: 100, ..hasty() });
    // More failures than one batch would be forgiven: each progress starts the count anew.
    memory.fail_with([None, unavailable(), None, unavailable(), unavailable(), None, unavailable()]);
    let answer = remote.append(requests::append(document, 0..4)).unwrap();
    let sent = |index: u32| format!("append {:?}", requests::append(document, index..index + 1));
    assert_eq!(memory.calls(), [0, 1, 1, 2, 2, 2, 3, 3].map(sent));
    assert_eq!(Ok(answer), memory.append(requests::append(document, 3..4)), "the last batch's answer");
}

#[test]
fn a_client_outlives_a_restart_of_its_service() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let memory = Arc::new(Double::default());
    let first = Service::start_with(&memory, Some(&socket), ServeOptions::default());
    let remote = RemoteMemory::connect(&format!("unix:{}", socket.display()), hasty()).unwrap();
    assert!(remote.stats().is_ok());
    drop(first);
    assert!(matches!(remote.stats(), Err(MemoryError::Unavailable { .. })));
    let _second = Service::start_with(&memory, Some(&socket), ServeOptions::default());
    assert!(remote.stats().is_ok());
}

#[test]
fn shutdown_finishes_what_was_begun_and_takes_nothing_new() {
    let memory = Arc::new(Double::default());
    *memory.delay.lock().unwrap() = Duration::from_millis(300);
    let mut service = Service::start(&memory);
    let (appending, asking) = (service.connect_with(hasty()), service.connect_with(hasty()));
    // Gives up before its work is done, which is done all the same.
    let leaving = service.connect_with(ClientOptions { deadline: Duration::from_millis(100), ..hasty() });
    std::thread::scope(|scope| {
        let append = scope.spawn(|| appending.append(requests::append(DocumentId(1), 0..2)));
        let attend = scope.spawn(|| asking.attend(&requests::attend(2)));
        let left = scope.spawn(|| leaving.seal(DocumentId(2)));
        wait_for_calls(&memory, 3);
        service.ask_to_stop();
        assert!(append.join().unwrap().is_ok(), "an append in flight is acknowledged");
        assert!(attend.join().unwrap().is_ok());
        assert!(left.join().unwrap().is_err());
    });
    service.join();
    assert_eq!(memory.finished.load(Ordering::SeqCst), 3);
    assert!(matches!(asking.stats(), Err(MemoryError::Unavailable { .. })));
    assert_eq!(memory.calls().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_does_not_wait_for_idle_streams() {
    let memory = Arc::new(Double::default());
    let mut service = Service::start(&memory);
    let (_requests, receiver) = tokio::sync::mpsc::channel::<v1::AttendStreamRequest>(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut replies = service.raw().await.attend_stream(requests).await.unwrap().into_inner();
    let begun = Instant::now();
    service.ask_to_stop();
    let ended = replies.message().await.unwrap_err();
    assert_eq!(ended.code(), tonic::Code::Unavailable);
    tokio::task::spawn_blocking(move || service.join()).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_answer() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let service = Service::start(&Arc::new(Double::default()));
    let channel = tonic::transport::Endpoint::from_shared(service.target.clone()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    for name in ["", "landmark.v1.BlockMemory", "landmark.v1.Admin"] {
        let reply = health.check(HealthCheckRequest { service: name.into() }).await.unwrap().into_inner();
        assert_eq!(reply.status(), tonic_health::pb::health_check_response::ServingStatus::Serving, "{name:?}");
    }
    let mut reflection = ServerReflectionClient::new(channel);
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut replies = reflection.server_reflection_info(tokio_stream::iter([list])).await.unwrap().into_inner();
    let reply = replies.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(services) = reply else { panic!("{reply:?}") };
    let names: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
    for name in ["landmark.v1.BlockMemory", "landmark.v1.Admin", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|listed| listed == name), "{name} of {names:?}");
    }
}
