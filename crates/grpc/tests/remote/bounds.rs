//! What callers make a service hold is bounded, and what they keep from each other too. Each test is a way in which one
//! peer stopped a service, or took its memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use landmarkdb::limits;
use landmarkdb::*;
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::ServeOptions;
use landmarkdb_grpc::wire::{from_status, v1};
use tonic::Code;

use crate::double::Double;
use crate::raw::{Frame, Raw, header};
use crate::requests;
use crate::service::{Service, hasty};

const LOOKUP: &str = "/landmark.v1.BlockMemory/Lookup";
const APPEND: &str = "/landmark.v1.BlockMemory/Append";
const FETCH: &str = "/landmark.v1.BlockMemory/Fetch";

fn serve(options: ServeOptions) -> (Arc<Double>, Service) {
    let memory = Arc::new(Double::default());
    let service = Service::start_with(&memory, None, options);
    (memory, service)
}

/// Waits for something that happens by itself.
fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !happened() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A lookup over so much that a memory works on it as long as somebody waits.
fn heavy() -> LookupRequest {
    let request = requests::lookup(64, Granularity::TokenHead);
    let scope = vec![BlockRange { document: DocumentId(1), blocks: 0..limits::DOCUMENT_BLOCKS_MAX }];
    LookupRequest { scope, ..request }
}

fn attend_heavily() -> AttendRequest {
    AttendRequest {
        lookup: heavy(),
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    }
}

/// Bytes of the address space that this process has.
#[cfg(target_os = "linux")]
fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmSize:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Five bytes that announced a gigabyte reserved it, on every stream: 125 bytes ended a process whose memory was
/// limited (c06).
#[test]
#[cfg(target_os = "linux")]
fn memory_grows_with_what_arrived_and_not_with_what_was_announced() {
    let (memory, service) = serve(ServeOptions::default());
    let before = address_space();
    let mut raw = Raw::greeting(&service.target);
    for _ in 0..25 {
        let stream = raw.open(APPEND);
        raw.send(stream, &header(1 << 30));
    }
    let stream = raw.open(LOOKUP);
    raw.send(stream, &header(1 << 30));
    assert!(raw.ends(stream), "a lookup of a gigabyte is refused before it is sent");
    assert!(service.connect().stats().is_ok());
    // 25 GiB; other tests of this process have their share of what grew.
    assert!(address_space() < before + (8 << 30), "from {before} to {} bytes", address_space());
    assert_eq!(memory.calls(), ["stats ()"]);
}

/// A hundred megabytes of empty blocks became ten gigabytes in memory before they were counted (finding 5).
#[test]
fn what_repeats_in_a_message_is_counted_before_it_is_decoded() {
    let (memory, service) = serve(ServeOptions::default());
    let mut raw = Raw::greeting(&service.target);
    let stream = raw.open(APPEND);
    let blocks = [2 << 3 | 2, 0].repeat(2_000_000);
    raw.send(stream, &header(blocks.len() as u32));
    raw.send(stream, &blocks);
    assert!(raw.ends(stream));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let refused = runtime.block_on(async {
        let blocks = vec![v1::NewBlock::default(); limits::APPEND_BLOCKS_MAX + 1];
        let batch = v1::AppendRequest { document: 1, blocks, expected_tokens: None };
        let mut replies = service.raw().await.append(tokio_stream::iter([batch])).await.unwrap().into_inner();
        replies.message().await.unwrap_err()
    });
    let limit = MemoryError::LimitExceeded { what: "blocks".into(), limit: 1024, found: 1025 };
    assert_eq!(from_status(&refused, "", 0), limit, "what the memory itself would say");
    assert_eq!(memory.calls(), [""; 0]);
}

#[test]
fn a_fetch_is_refused_as_a_whole_as_in_process() {
    let (memory, service) = serve(ServeOptions::default());
    let remote = service.connect();
    let fetch = |count: usize| FetchRequest { document: DocumentId(1), blocks: vec![0; count], dtype: DType::F16 };
    let limit = limits::FETCH_BLOCKS_MAX;
    let refused = MemoryError::LimitExceeded { what: "blocks".into(), limit: limit as u64, found: limit as u64 + 1 };
    assert_eq!(remote.fetch(&fetch(limit + 1)), Err(refused));
    assert_eq!(memory.calls(), [""; 0]);
    assert_eq!(remote.fetch(&fetch(limit)).unwrap().len(), limit);
    let too_long = remote.fetch(&FetchRequest { blocks: vec![u32::MAX; 100_000], ..fetch(0) });
    assert!(matches!(too_long, Err(MemoryError::LimitExceeded { limit: 65_536, .. })), "{too_long:?}");
}

#[test]
fn who_finds_the_memory_for_messages_in_use_is_told_when_to_come_again_and_does() {
    let (memory, service) = serve(ServeOptions { message_bytes: 1 << 20, ..ServeOptions::default() });
    let mut raw = Raw::greeting(&service.target);
    let stream = raw.open(APPEND);
    raw.send(stream, &header(760 << 10));
    raw.send(stream, &vec![0; 700 << 10]);
    let once = service.connect_with(ClientOptions { attempts: 1, ..hasty() });
    let large = requests::lookup(1000, Granularity::Shared);
    wait_until("the half message is not held", || {
        matches!(once.lookup(&large), Err(MemoryError::Busy { retry_ms: 100, .. }))
    });
    assert!(once.lookup(&requests::lookup(9, Granularity::Shared)).is_ok(), "small ones have a part for themselves");
    std::thread::scope(|scope| {
        let again = service.connect_with(ClientOptions { attempts: 200, ..hasty() });
        let large = &large;
        let waiting = scope.spawn(move || again.lookup(large));
        std::thread::sleep(Duration::from_millis(150));
        drop(raw);
        assert_eq!(waiting.join().unwrap(), memory.lookup(large));
    });
}

#[test]
fn half_a_message_silence_and_idleness_time_out() {
    let short = Duration::from_millis(150);
    let options = ServeOptions { handshake: short, stall: short, ..ServeOptions::default() };
    let (memory, service) = serve(options.clone());
    assert!(Raw::silent(&service.target).is_closed(), "who does not greet");
    let mut raw = Raw::greeting(&service.target);
    for sent in [&[][..], &header(100)[..3], &header(100), &[&header(100)[..], &[0; 99]].concat()] {
        for path in [LOOKUP, APPEND, FETCH] {
            let stream = raw.open(path);
            raw.send(stream, sent);
            assert!(raw.ends(stream), "{} bytes of {path}", sent.len());
        }
    }
    for path in [LOOKUP, FETCH, "/landmark.v1.Admin/GetStats"] {
        let stream = raw.open(path);
        raw.send(stream, &header(0));
        assert!(raw.ends(stream), "a whole message of {path}, and no end behind it");
    }
    let stream = raw.open(LOOKUP);
    raw.send(stream, &header(100));
    raw.finish(stream);
    assert!(raw.ends(stream), "what ends in the middle is refused at once");
    assert_eq!(memory.calls(), [""; 0]);

    // An idle stream of whole messages is nobody's fault.
    let remote = service.connect();
    assert!(remote.attend(&requests::attend(1)).is_ok());
    std::thread::sleep(4 * short);
    assert!(remote.attend(&requests::attend(1)).is_ok());

    let (_, service) = serve(ServeOptions { idle: short, ..options });
    assert!(Raw::greeting(&service.target).is_closed(), "who asks nothing");
}

/// 750 idle connections took all descriptors, and the store's next segment could not be made: writes were refused until a
/// restart (c05).
#[test]
fn idle_connections_make_room_and_busy_ones_stay() {
    let (_, service) = serve(ServeOptions { connections: 6, ..ServeOptions::default() });
    let busy = service.connect();
    // Opens the long stream, which stays open.
    assert!(busy.attend(&requests::attend(1)).is_ok());
    let mut flood: Vec<Raw> =
        (0..60).map(|i| if i % 2 == 0 { Raw::silent } else { Raw::greeting }(&service.target)).collect();
    assert!(service.connect().stats().is_ok(), "a new caller is let in");
    assert!(flood[..50].iter_mut().all(Raw::is_closed), "the first ones made room");
    let once = ClientOptions { attempts: 1, ..hasty() };
    assert!(service.connect_with(once).stats().is_ok());
    assert!(busy.attend(&requests::attend(1)).is_ok());
}

/// Streams of health and reflection, which any client may open and leave open, shut everybody else out.
#[test]
fn streams_that_owe_nothing_make_room() {
    let stall = Duration::from_millis(100);
    let (_, service) = serve(ServeOptions { connections: 2, stall, ..ServeOptions::default() });
    let watching: Vec<Raw> =
        ["/grpc.health.v1.Health/Watch", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]
            .map(|path| {
                let mut raw = Raw::greeting(&service.target);
                let stream = raw.open(path);
                raw.send(stream, &header(0));
                if path.ends_with("Watch") {
                    raw.finish(stream);
                }
                raw.settle();
                raw
            })
            .into();
    std::thread::sleep(4 * stall);
    assert!(service.connect().stats().is_ok(), "a new caller is let in");
    drop(watching);
}

/// Four legal lookups held all workers for more than a minute, also after their callers had hung up (c04, c14, c15); and
/// appends that waited for the store's writer did (finding 8).
#[test]
fn nothing_heavy_and_no_writer_keeps_others_waiting() {
    let (memory, service) =
        serve(ServeOptions { workers: 2, grace: Duration::from_millis(200), ..ServeOptions::default() });
    let writing = memory.writer.lock().unwrap();
    let heavy_callers: Vec<RemoteMemory> = (0..4).map(|_| service.connect()).collect();
    let gone = ClientOptions { deadline: Duration::from_millis(1500), ..hasty() };
    let giving_up: Vec<RemoteMemory> = (0..4).map(|_| service.connect_with(gone.clone())).collect();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4u64)
            .map(|id| {
                let remote = service.connect();
                scope.spawn(move || remote.append(requests::append(DocumentId(id), 0..1)))
            })
            .collect();
        for remote in &heavy_callers {
            scope.spawn(move || remote.lookup(&heavy()));
            scope.spawn(move || remote.attend_all(&[attend_heavily(), requests::attend(1)]));
        }
        let late: Vec<_> =
            giving_up.iter().map(|remote| scope.spawn(move || remote.attend(&attend_heavily()))).collect();
        wait_until("heavy work has begun", || memory.calls().iter().any(|call| call.starts_with("heavy")));
        let light = service.connect_with(ClientOptions { deadline: Duration::from_secs(10), ..hasty() });
        for _ in 0..20 {
            assert!(light.lookup(&requests::lookup(1, Granularity::Shared)).is_ok());
            assert!(light.stats().is_ok());
            assert!(light.verify(None, &mut |_, _| {}).is_ok());
            let fetch = FetchRequest { document: DocumentId(1), blocks: vec![0], dtype: DType::F16 };
            assert!(light.fetch(&fetch).is_ok());
        }
        for caller in late {
            assert_eq!(caller.join().unwrap(), Err(MemoryError::DeadlineExceeded { ms: 1500 }));
        }
        drop(writing);
        assert!(writers.into_iter().all(|writer| writer.join().unwrap().is_ok()));
        // The others would wait for ever; hanging up ends what they began.
        let mut service = service;
        service.stop();
    });
    let begun = memory.calls().iter().filter(|call| call.starts_with("heavy")).count();
    assert_eq!(memory.finished.load(Ordering::SeqCst) as usize, memory.calls().len(), "{begun} were begun, all ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn work_ends_when_its_caller_hangs_up() {
    let (memory, service) = serve(ServeOptions { workers: 1, ..ServeOptions::default() });
    let lookup = v1::LookupRequest::from(&heavy());
    let attend = v1::AttendRequest::from(&attend_heavily());
    for i in 0..3 {
        let (mut raw, lookup, attend) = (service.raw().await, lookup.clone(), attend.clone());
        let asking = tokio::spawn(async move {
            match i {
                0 => drop(raw.lookup(lookup).await),
                1 => drop(raw.attend(attend).await),
                _ => {
                    let (sender, receiver) = tokio::sync::mpsc::channel(1);
                    sender.send(v1::AttendStreamRequest { id: 1, request: Some(attend), timeout_ms: 0 }).await.unwrap();
                    let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
                    let mut replies = raw.attend_stream(requests).await.unwrap().into_inner();
                    drop(replies.message().await);
                }
            }
        });
        let ended = || memory.finished.load(Ordering::SeqCst);
        wait_until("it has begun", || memory.calls().len() == i + 1);
        assert_eq!(ended(), i as u32);
        asking.abort();
        wait_until("it goes on for nobody", || ended() == i as u32 + 1);
    }
    memory.verifies_on.store(true, Ordering::SeqCst);
    let mut admin = v1::admin_client::AdminClient::connect(service.target.clone()).await.unwrap();
    let verifying = admin.verify(v1::VerifyRequest { document: None, rebuild: false }).await.unwrap();
    wait_until("it has begun", || memory.calls().len() == 4);
    drop(verifying);
    wait_until("a verification goes on for nobody", || memory.finished.load(Ordering::SeqCst) == 4);
}

/// A slow reader held two gigabytes for ever, and nothing that streams had an end (finding 15).
#[test]
fn who_does_not_read_holds_little_and_not_for_ever() {
    let (memory, service) = serve(ServeOptions { stall: Duration::from_millis(300), ..ServeOptions::default() });
    let mut raw = Raw::greeting(&service.target);
    let stream = raw.open(FETCH);
    let fetch = v1::FetchRequest { document: 1, blocks: (0..2000).collect(), dtype: v1::Dtype::F32.into() };
    let message = prost::Message::encode_to_vec(&fetch);
    raw.send(stream, &header(message.len() as u32));
    raw.send(stream, &message);
    raw.finish(stream);
    let mut read = 0;
    loop {
        match raw.next() {
            // Reads what there is, and makes no more room.
            Frame::Data(_, bytes) => read += bytes,
            Frame::Closed => break,
            frame => assert_ne!(frame, Frame::End(stream), "after {read} bytes"),
        }
    }
    assert!((1..=65_535).contains(&read), "{read} bytes of the window");
    let asked = memory.calls().iter().filter(|call| call.starts_with("fetch")).count();
    assert!(asked <= 3, "{asked} reads for one that fits the window");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_at_their_deadline_with_its_error() {
    let (memory, service) = serve(ServeOptions::default());
    *memory.delay.lock().unwrap() = Duration::from_millis(80);
    let late = |status: tonic::Status| assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let soon = Duration::from_millis(200);

    let mut fetch = tonic::Request::new(v1::FetchRequest { document: 1, blocks: (0..4000).collect(), dtype: 1 });
    fetch.set_timeout(soon);
    let mut replies = service.raw().await.fetch(fetch).await.unwrap().into_inner();
    loop {
        match replies.message().await {
            Ok(Some(_)) => tokio::time::sleep(Duration::from_millis(1)).await,
            Ok(None) => panic!("a fetch that was cut looks whole"),
            Err(status) => break late(status),
        }
    }
    let range = Some(BlockRange { document: DocumentId(1), blocks: 0..2000 }.into());
    let mut list = tonic::Request::new(v1::ListBlocksRequest { range });
    list.set_timeout(soon);
    let mut admin = v1::admin_client::AdminClient::connect(service.target.clone()).await.unwrap();
    let mut replies = admin.list_blocks(list).await.unwrap().into_inner();
    loop {
        match replies.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a listing that was cut looks whole"),
            Err(status) => break late(status),
        }
    }
    let batches = (0..).map(|i| v1::AppendRequest::from(requests::append(DocumentId(1), i..i + 1)));
    let mut append = tonic::Request::new(tokio_stream::iter(batches));
    append.set_timeout(soon);
    let mut replies = service.raw().await.append(append).await.unwrap().into_inner();
    loop {
        match replies.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("an append that was cut looks whole"),
            Err(status) => break late(status),
        }
    }
}
