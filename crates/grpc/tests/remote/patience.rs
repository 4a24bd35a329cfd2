//! Peers that are there and say nothing, or are gone without a word; and a service that is told to stop.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use landmarkdb::*;
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::ServeOptions;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::double::Double;
use crate::raw::Raw;
use crate::requests;
use crate::service::{Service, hasty};

/// `ls --connect` waited for two minutes: that a connection was accepted was taken for an answer.
#[test]
fn connecting_to_one_who_accepts_and_says_nothing_fails_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let _unix = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let options = ClientOptions { connect_timeout: Duration::from_millis(200), ..hasty() };
    for target in [tcp.local_addr().unwrap().to_string(), format!("unix:{}", socket.display())] {
        let begun = Instant::now();
        let refused = RemoteMemory::connect(&target, options.clone()).err();
        let Some(MemoryError::Unavailable { detail, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(detail, "no answer within 200 ms");
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}

/// Passes bytes on, until it swallows those of the connections that it has.
struct Cable {
    address: String,
    is_cut: Arc<AtomicBool>,
}

impl Cable {
    fn to(target: &str) -> Cable {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (target, is_cut) = (target.trim_start_matches("http://").to_string(), Arc::new(AtomicBool::new(false)));
        let cut = is_cut.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), TcpStream::connect(&target).unwrap());
                let is_new = cut.load(Ordering::SeqCst);
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    let cut = cut.clone();
                    std::thread::spawn(move || {
                        let mut bytes = [0; 16_384];
                        while let Ok(count @ 1..) = from.read(&mut bytes) {
                            if is_new || !cut.load(Ordering::SeqCst) {
                                let _ = to.write_all(&bytes[..count]);
                            }
                        }
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Cable { address, is_cut }
    }

    /// All that is connected now goes silent; who connects from here on is served.
    fn cut(&self) {
        self.is_cut.store(true, Ordering::SeqCst);
    }
}

/// Each question over a dead connection waited its whole deadline, for a quarter of an hour (finding 16).
#[test]
fn a_client_notices_that_its_service_is_gone_without_a_word() {
    let service = Service::start(&Arc::new(Double::default()));
    let cable = Cable::to(&service.target);
    let options = ClientOptions { keepalive: Duration::from_millis(200), deadline: Duration::from_secs(20), ..hasty() };
    let remote = RemoteMemory::connect(&cable.address, options).unwrap();
    assert!(remote.attend(&requests::attend(1)).is_ok());
    cable.cut();
    assert!(remote.attend(&requests::attend(1)).is_ok(), "the long stream");
    assert!(remote.stats().is_ok(), "a call of its own");
}

#[test]
fn a_long_stream_that_answers_nobody_is_given_up() {
    let memory = Arc::new(Double::default());
    let service = Service::start_with(&memory, None, ServeOptions { workers: 1, ..ServeOptions::default() });
    let remote = service.connect_with(ClientOptions { deadline: Duration::from_millis(1100), ..hasty() });
    assert!(remote.attend(&requests::attend(1)).is_ok());
    *memory.delay.lock().unwrap() = Duration::from_millis(2000);
    assert_eq!(remote.attend(&requests::attend(1)), Err(MemoryError::DeadlineExceeded { ms: 1100 }));
    *memory.delay.lock().unwrap() = Duration::ZERO;
    let patient = service.connect();
    assert!(patient.attend(&requests::attend(1)).is_ok());
    assert!(remote.attend(&requests::attend(1)).is_ok(), "over a new one");
}

#[test]
fn a_service_notices_that_its_client_is_gone_without_a_word() {
    let memory = Arc::new(Double::default());
    let options = ServeOptions { keepalive: Duration::from_millis(200), ..ServeOptions::default() };
    let service = Service::start_with(&memory, None, options);
    let mut raw = Raw::greeting(&service.target);
    raw.open("/landmark.v1.BlockMemory/AttendStream");
    // Reads bytes, and answers no ping.
    assert!(raw.is_closed());
}

/// One connection that said nothing held every stop up for the whole grace of 30 s (c09).
#[test]
fn a_stop_waits_for_work_and_not_for_who_says_nothing() {
    let mut service = Service::start(&Arc::new(Double::default()));
    let silent = [Raw::silent(&service.target), Raw::greeting(&service.target)];
    let idle = service.connect();
    assert!(idle.attend(&requests::attend(1)).is_ok());
    let begun = Instant::now();
    service.stop();
    assert!(begun.elapsed() < Duration::from_secs(10));
    drop(silent);
}

/// A running verification kept the process past its grace, and nobody heard the second signal (finding 14).
#[test]
fn a_stop_is_bounded_whatever_runs() {
    let memory = Arc::new(Double::default());
    memory.verifies_on.store(true, Ordering::SeqCst);
    let options = ServeOptions { grace: Duration::from_millis(200), ..ServeOptions::default() };
    let mut service = Service::start_with(&memory, None, options);
    let remote = service.connect_with(hasty());
    std::thread::scope(|scope| {
        let verifying = scope.spawn(|| remote.verify(None, &mut |_, _| {}));
        while memory.calls().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begun = Instant::now();
        service.stop();
        assert!(begun.elapsed() < Duration::from_secs(10));
        let ended = verifying.join().unwrap();
        assert!(matches!(ended, Err(MemoryError::Unavailable { .. })), "{ended:?}");
    });
    assert_eq!(memory.finished.load(Ordering::SeqCst), 1, "it was told to end");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_memory() {
    let memory = Arc::new(Double::default());
    let service = Service::start(&memory);
    let channel = tonic::transport::Endpoint::from_shared(service.target.clone()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    let reason = || "the disk is full".to_string();
    for (state, reads, writes) in [
        (Health::ReadOnly { reason: reason() }, ServingStatus::Serving, ServingStatus::NotServing),
        (Health::Failed { reason: reason() }, ServingStatus::NotServing, ServingStatus::NotServing),
        (Health::Serving, ServingStatus::Serving, ServingStatus::Serving),
    ] {
        *memory.health.lock().unwrap() = state.clone();
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let mut found = Vec::new();
            for name in ["", "landmark.v1.BlockMemory", "landmark.v1.Admin", "landmark.v1.BlockMemory.Append"] {
                let reply = health.check(HealthCheckRequest { service: name.into() }).await.unwrap().into_inner();
                found.push(reply.status());
            }
            if found == [reads, reads, reads, writes] {
                break;
            }
            assert!(Instant::now() < end, "{state:?}: {found:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
