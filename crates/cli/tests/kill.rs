//! kill -9 of the real service, and of the real encoder, again and again. `LANDMARKDB_KILLS` says how often (few by
//! default: each encoder start loads a model).

#[path = "../../grpc/tests/common/mod.rs"]
mod common;
#[path = "kill/load.rs"]
mod load;
#[allow(dead_code, reason = "shared with tests, which use the rest")]
mod service;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use landmarkdb::{BlockMemory, BlockRange, DocumentInfo, LocalMemory};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use landmarkdb_lab::eval::BOOK;
use landmarkdb_llm as model;
use rand::{RngExt, SeedableRng};
use service::Service;

const NAME: &str = "book";

/// An encoder that does not outlive the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn landmarkdb(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landmarkdb"));
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    command
}

fn serve(data: &Path) -> Service {
    let program = Path::new(env!("CARGO_BIN_EXE_landmarkdb"));
    Service::start(service::serve(program, data).stderr(Stdio::null())).unwrap()
}

fn find(memory: &dyn BlockMemory) -> Option<DocumentInfo> {
    let collection = memory.collections().ok()?.pop()?;
    memory.documents(collection.id).ok()?.into_iter().find(|document| document.name == NAME)
}

/// Watches the document through the service until it has more than `before` tokens, and `longer` after that: the most
/// tokens that were ever acknowledged.
fn watch(address: &str, before: u64, longer: Duration) -> u64 {
    let memory = RemoteMemory::connect(address, ClientOptions::default()).unwrap();
    let hopeless = Instant::now() + Duration::from_secs(120);
    let (mut acknowledged, mut until) = (0, None);
    while until.is_none_or(|until| Instant::now() < until) {
        let tokens = find(&memory).map_or(0, |document| document.tokens);
        assert!(tokens >= acknowledged, "{acknowledged} tokens were acknowledged, {tokens} are there");
        acknowledged = tokens;
        if acknowledged > before && until.is_none() {
            until = Some(Instant::now() + longer);
        }
        assert!(until.is_some() || Instant::now() < hopeless, "the encoder stays at {before} tokens");
        std::thread::sleep(Duration::from_millis(20));
    }
    acknowledged
}

#[test]
fn nothing_acknowledged_is_lost_when_service_or_encoder_are_killed() {
    if model::test_model::smollm2().is_none() {
        return;
    }
    let kills: usize = std::env::var("LANDMARKDB_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(3);
    let folder = tempfile::tempdir().unwrap();
    let (data, text) = (folder.path().join("data"), folder.path().join("book.txt"));
    // What a few rounds can encode at most, or many on average and some more: every kill hits an encoding under way, and
    // little is left for the end.
    let source = &BOOK[..BOOK.len().min((kills + 2) * 9_000).min(60_000 + kills * 5_000)];
    std::fs::write(&text, source).unwrap();

    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut acknowledged = 0;
    let mut service = serve(&data);
    let mut address = service.target().to_string();
    for round in 0..kills {
        let encode = ["encode", text.to_str().unwrap(), "--name", NAME, "--connect", &address];
        let mut encoder = Process(landmarkdb(&encode).stdout(Stdio::null()).spawn().unwrap());
        acknowledged = watch(&address, acknowledged, Duration::from_millis(rng.random_range(0..2_500)));
        if round % 2 == 0 {
            service.child.kill().unwrap();
        }
        encoder.0.kill().unwrap();
        encoder.0.wait().unwrap();
        if round % 2 == 0 {
            service.child.wait().unwrap();
            service = serve(&data);
            address = service.target().to_string();
        }
        let memory = RemoteMemory::connect(&address, ClientOptions::default()).unwrap();
        let here = find(&memory).map_or(0, |document| document.tokens);
        assert!(here >= acknowledged, "round {round}: {acknowledged} tokens were acknowledged, {here} survived");
        acknowledged = here;
        let report = memory.verify(None, &mut |_, _| {}).unwrap();
        assert_eq!(report.faults, vec![], "round {round}");
        println!("round {round}: {here} tokens survived, verify clean ({} blocks)", report.blocks);
    }

    let finish = ["encode", text.to_str().unwrap(), "--name", NAME, "--connect", &address, "--json"];
    let output = landmarkdb(&finish).output().unwrap();
    let encoded: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(encoded["resumed_tokens"], acknowledged);
    assert_eq!(encoded["document"]["sealed"], true);
    drop(service);

    let memory = LocalMemory::open(&data).unwrap();
    let document = find(&memory).unwrap();
    let blocks = memory.blocks(&BlockRange { document: document.id, blocks: 0..u32::MAX }).unwrap();
    let text: Vec<u8> = blocks.iter().flat_map(|block| block.text.bytes.clone()).collect();
    assert_eq!(String::from_utf8(text).unwrap(), source, "the blocks cover the source text exactly once");
    assert_eq!(memory.verify(None, &mut |_, _| {}).unwrap().faults, vec![]);
}
