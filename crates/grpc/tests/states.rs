//! What a document keeps for its model, over the network: whole, within the memory that a service has for messages, and
//! nothing of one that did not come to its end.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::spec;
use landmarkdb::{
    AppendRequest, BlockMemory, BlockText, CollectionSpec, DType, DocumentId, LocalMemory, MemoryError, NewBlock,
    SequenceState, Tensor, limits,
};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_grpc::server::{ListenOptions, Listeners, ServeOptions, serve};
use landmarkdb_grpc::wire::v1::block_memory_client::BlockMemoryClient;
use landmarkdb_grpc::wire::{from_status, v1};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::Status;

/// A service over a directory with a document of one token.
struct World {
    _folder: tempfile::TempDir,
    memory: Arc<LocalMemory>,
    document: DocumentId,
    target: String,
    runtime: Runtime,
    _stop: oneshot::Sender<()>,
}

impl World {
    fn new(options: ServeOptions) -> World {
        let folder = tempfile::tempdir().unwrap();
        let memory = Arc::new(LocalMemory::open(folder.path()).unwrap());
        let spec = spec("c", DType::F32);
        let collection = memory.open_collection(&spec).unwrap();
        let document = memory.open_document(collection.id, "d").unwrap().id;
        memory.append(AppendRequest { document, blocks: vec![tail(&spec)], expected_tokens: None }).unwrap();
        let runtime = Runtime::new().unwrap();
        let listen = ListenOptions { tcp: Some(([127, 0, 0, 1], 0).into()), unix: None, allow_remote: false };
        let listeners = runtime.block_on(Listeners::bind(&listen)).unwrap();
        let target = format!("http://{}", listeners.tcp_address().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        runtime.spawn(serve(memory.clone(), listeners, options, async {
            let _ = stopped.await;
        }));
        World { _folder: folder, memory, document, target, runtime, _stop: stop }
    }

    fn connect(&self) -> RemoteMemory {
        let options = ClientOptions { attempts: 2, backoff: Duration::from_millis(5), ..ClientOptions::default() };
        RemoteMemory::connect(&self.target, options).unwrap()
    }

    /// Sends these messages and no more, and leaves the stream open for `pause`.
    fn put_raw(&self, messages: Vec<v1::PutStateRequest>, pause: Duration) -> Result<v1::PutStateReply, Status> {
        self.runtime.block_on(async {
            let mut client = BlockMemoryClient::connect(self.target.clone()).await.unwrap();
            let (sender, receiver) = tokio::sync::mpsc::channel(1);
            let sending = tokio::spawn(async move {
                for message in messages {
                    let _ = sender.send(message).await;
                }
                tokio::time::sleep(pause).await;
            });
            let answer = client.put_state(tokio_stream::wrappers::ReceiverStream::new(receiver)).await;
            sending.abort();
            answer.map(|answer| answer.into_inner())
        })
    }

    fn message(&self, parts: u32, len: usize) -> v1::PutStateRequest {
        v1::PutStateRequest { document: self.document.0, tokens: 1, parts, part: vec![7; len].into() }
    }
}

fn tail(spec: &CollectionSpec) -> NewBlock {
    let shape = vec![spec.shape.layers, spec.shape.kv_heads, 1, spec.shape.head_dim];
    let values = vec![0.5; shape.iter().product::<u32>() as usize];
    let text = BlockText { start: 0, bytes: b"x".to_vec(), offsets: vec![0] };
    let (k, v) = (Tensor::from_f32(shape.clone(), &values), Tensor::from_f32(shape, &values));
    NewBlock { index: 0, token_ids: vec![9], text, k, v }
}

fn state(lens: &[usize]) -> SequenceState {
    let part = |(number, &len): (usize, &usize)| Bytes::from(vec![number as u8; len]);
    SequenceState { tokens: 1, parts: lens.iter().enumerate().map(part).collect() }
}

/// Keeps a state once the room of calls that have failed is given back, which they do when their streams have ended.
fn put_soon(remote: &RemoteMemory, document: DocumentId, state: &SequenceState) {
    let begun = Instant::now();
    loop {
        match remote.put_state(document, state.clone()) {
            Err(MemoryError::Busy { .. }) if begun.elapsed() < Duration::from_secs(20) => {}
            put => return drop(put.unwrap()),
        }
    }
}

#[test]
fn a_large_state_goes_there_and_comes_back() {
    let world = World::new(ServeOptions::default());
    let remote = world.connect();
    assert_eq!(remote.state(world.document), Ok(None));
    let large = state(&[limits::STATE_PART_BYTES_MAX, 1, 9 << 20, limits::STATE_PART_BYTES_MAX]);
    let info = remote.put_state(world.document, large.clone()).unwrap();
    assert_eq!(info.state_tokens, Some(1));
    assert_eq!(info, world.memory.document(world.document).unwrap());
    assert!(remote.state(world.document) == Ok(Some(large.clone())));
    assert!(world.memory.state(world.document) == Ok(Some(large)));
    let other = SequenceState { tokens: 2, ..state(&[3]) };
    let (document, expected, found) = (world.document, 2, 1);
    assert_eq!(
        remote.put_state(world.document, other),
        Err(MemoryError::UnexpectedLength { document, expected, found })
    );
}

#[test]
fn a_state_that_does_not_fit_beside_the_other_messages_is_refused_and_gives_its_room_back() {
    let world = World::new(ServeOptions { message_bytes: 8 << 20, ..ServeOptions::default() });
    let remote = world.connect();
    let fits = state(&[1 << 20; 5]);
    put_soon(&remote, world.document, &fits);
    for _ in 0..3 {
        let refused = remote.put_state(world.document, state(&[1 << 20; 9]));
        assert!(matches!(refused, Err(MemoryError::Busy { .. } | MemoryError::LimitExceeded { .. })), "{refused:?}");
        assert!(remote.state(world.document) == Ok(Some(fits.clone())), "the one that was there");
    }
    put_soon(&remote, world.document, &state(&[1 << 20; 5]));
}

#[test]
fn a_state_that_does_not_come_to_its_end_is_none() {
    let stall = Duration::from_millis(300);
    let world = World::new(ServeOptions { stall, message_bytes: 8 << 20, ..ServeOptions::default() });
    let kept = state(&[4, 4]);
    world.memory.put_state(world.document, kept.clone()).unwrap();
    let error = |answer: Result<v1::PutStateReply, Status>| from_status(&answer.unwrap_err(), "there", 0);

    let short = error(world.put_raw(vec![world.message(3, 9); 2], Duration::ZERO));
    assert!(matches!(short, MemoryError::Invalid { .. }), "{short:?}");
    let none = error(world.put_raw(vec![], Duration::ZERO));
    assert!(matches!(none, MemoryError::Invalid { .. }), "{none:?}");
    let mut other = world.message(2, 9);
    other.tokens = 5;
    let changed = error(world.put_raw(vec![world.message(2, 9), other], Duration::ZERO));
    assert!(matches!(changed, MemoryError::Invalid { .. }), "{changed:?}");
    let large = error(world.put_raw(vec![world.message(2, limits::STATE_PART_BYTES_MAX + 2000)], Duration::ZERO));
    assert!(matches!(large, MemoryError::LimitExceeded { .. }), "{large:?}");
    // What has come of it is held no longer than the next byte may take.
    let begun = Instant::now();
    let stalled = error(world.put_raw(vec![world.message(9, 1 << 20); 5], Duration::from_secs(60)));
    assert!(matches!(stalled, MemoryError::DeadlineExceeded { .. }), "{stalled:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    assert_eq!(world.memory.state(world.document), Ok(Some(kept)));
    let remote = world.connect();
    put_soon(&remote, world.document, &state(&[1 << 20; 5]));

    // What was announced is there: nothing behind it is waited for.
    let (pause, begun) = (Duration::from_secs(60), Instant::now());
    world.put_raw(vec![world.message(2, 9); 2], pause).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30));
}
