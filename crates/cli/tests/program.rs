//! The program itself: what signals and a lack of descriptors do to a process.

#[path = "../../grpc/tests/remote/raw.rs"]
#[allow(dead_code, reason = "the tests of the service use all of it")]
mod raw;
#[path = "../../grpc/tests/remote/requests.rs"]
#[allow(dead_code, reason = "see above")]
mod requests;
#[allow(dead_code, reason = "shared with tests, which use the rest")]
mod service;

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use landmarkdb::{BlockRange, *};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use rustix::process::{Resource, Rlimit};

use raw::{Raw, header};
use service::{Service, serve};

/// Options under which nothing takes long.
fn hasty() -> ClientOptions {
    ClientOptions { attempts: 3, backoff: Duration::from_millis(5), ..ClientOptions::default() }
}

fn start(data: &Path, stderr: Stdio) -> Service {
    Service::start(serve(Path::new(env!("CARGO_BIN_EXE_landmarkdb")), data).stderr(stderr)).unwrap()
}

fn open_files(service: &Service) -> u64 {
    std::fs::read_dir(format!("/proc/{}/fd", service.child.id())).unwrap().count() as u64
}

/// Lets it open at most so many files from now on; gives what it was.
fn limit_files(service: &Service, count: u64) -> u64 {
    let pid = rustix::process::Pid::from_child(&service.child);
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current: Some(count), maximum };
    rustix::process::prlimit(Some(pid), Resource::Nofile, limit).unwrap().current.unwrap()
}

/// Reads what it logs until that says `word`.
fn says(service: &mut Service, word: &str) {
    let stderr = service.child.stderr.as_mut().unwrap();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains(word) {
        let mut bytes = [0; 1024];
        let count = stderr.read(&mut bytes).unwrap();
        assert!(count > 0, "it ended without {word:?}: {}", String::from_utf8_lossy(&said));
        said.extend(&bytes[..count]);
    }
}

/// The first signal waits for work, here for the rest of a message; the second one does not.
#[test]
fn a_second_signal_ends_it_whatever_it_waits_for() {
    let folder = tempfile::tempdir().unwrap();
    for names in [["TERM", "INT"], ["INT", "TERM"]] {
        let mut service = start(folder.path(), Stdio::piped());
        let mut raw = Raw::greeting(service.target());
        let append = raw.open("/landmark.v1.BlockMemory/Append");
        assert_eq!(raw.send(append, &header(1000)), 5);
        raw.settle();
        service.signal(names[0]);
        says(&mut service, "a second signal stops at once");
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(service.child.try_wait().unwrap(), None, "the first signal waits for work");
        let begun = Instant::now();
        service.signal(names[1]);
        assert_eq!(service.child.wait().unwrap().code(), Some(130));
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

/// Connections that say nothing took the last descriptors, and the next append ended all writing (c05).
#[test]
fn a_service_without_open_files_to_spare_serves_whom_it_has_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let service = start(folder.path(), Stdio::null());
    let remote = RemoteMemory::connect(service.target(), hasty()).unwrap();
    let collection = remote.open_collection(&requests::spec()).unwrap();
    let document = remote.open_document(collection.id, "text").unwrap();
    let append = |remote: &RemoteMemory, at: u32| {
        let block = requests::block(at);
        let block = NewBlock { v: block.k.clone(), ..block };
        remote.append(AppendRequest { document: document.id, blocks: vec![block], expected_tokens: None }).unwrap()
    };
    let attend = |blocks: u32| {
        let request = requests::attend(1);
        let scope = vec![BlockRange { document: document.id, blocks: 0..blocks }];
        let lookup = LookupRequest { collection: collection.id, scope, ..request.lookup };
        remote.attend(&AttendRequest { lookup, ..request })
    };
    append(&remote, 0);
    assert_eq!(attend(1).unwrap().hits.k, 1);

    let before = limit_files(&service, open_files(&service));
    let idle: Vec<Raw> = (0..20).map(|_| Raw::greeting(service.target())).collect();
    std::thread::sleep(Duration::from_millis(300));
    let once = ClientOptions { attempts: 1, connect_timeout: Duration::from_millis(500), ..hasty() };
    assert!(RemoteMemory::connect(service.target(), once).is_err(), "nobody else is let in");
    for at in 1..4 {
        append(&remote, at);
        assert_eq!(attend(at + 1).unwrap().hits.k, 3.min(at + 1));
    }
    drop(idle);
    limit_files(&service, before);

    let later = Instant::now() + Duration::from_secs(20);
    let another = loop {
        match RemoteMemory::connect(service.target(), hasty()) {
            Ok(another) => break another,
            Err(error) => assert!(Instant::now() < later, "{error}"),
        }
    };
    append(&another, 4);
    assert_eq!(another.document(document.id).unwrap().blocks, 5);
    assert_eq!(another.verify(None, &mut |_, _| {}).unwrap().faults, []);
}
