//! The program itself: what signals and a lack of descriptors do to a process.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use landmarkdb::api::*;
use landmarkdb::client::RemoteMemory;
use landmarkdb::types::BlockRange;

use crate::raw::{Raw, header};
use crate::requests;
use crate::service::hasty;

/// `landmarkdb serve`, killed with the test.
struct Program {
    child: Child,
    /// `http://127.0.0.1:port`
    target: String,
}

impl Program {
    /// Starts it in a shell, after `before`.
    fn start(data: &Path, before: &str, stderr: Stdio) -> Program {
        let serve = format!("{before}; exec \"$0\" serve --json --listen 127.0.0.1:0 --data \"$1\"");
        let mut command = Command::new("sh");
        command.args(["-c", &serve, env!("CARGO_BIN_EXE_landmarkdb")]).arg(data);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let mut program = Program { child, target: String::new() };
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        program.target = ready["listening"][0].as_str().unwrap().to_string();
        program
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Reads what it logs until that says `word`.
    fn says(&mut self, word: &str) {
        let stderr = self.child.stderr.as_mut().unwrap();
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(word) {
            let mut bytes = [0; 1024];
            let count = stderr.read(&mut bytes).unwrap();
            assert!(count > 0, "it ended without {word:?}: {}", String::from_utf8_lossy(&said));
            said.extend(&bytes[..count]);
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first signal waits for work, here for the rest of a message; the second one does not.
#[test]
fn a_second_signal_ends_it_whatever_it_waits_for() {
    let folder = tempfile::tempdir().unwrap();
    for names in [["TERM", "INT"], ["INT", "TERM"]] {
        let mut program = Program::start(folder.path(), "true", Stdio::piped());
        let mut raw = Raw::greeting(&program.target);
        let append = raw.open("/landmark.v1.BlockMemory/Append");
        assert_eq!(raw.send(append, &header(1000)), 5);
        raw.settle();
        program.signal(names[0]);
        program.says("a second signal stops at once");
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(program.child.try_wait().unwrap(), None, "the first signal waits for work");
        let begun = Instant::now();
        program.signal(names[1]);
        assert_eq!(program.child.wait().unwrap().code(), Some(130));
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

/// Connections that say nothing took the last descriptors, and the next append ended all writing (c05).
#[test]
fn a_service_that_runs_out_of_open_files_serves_whom_it_has_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(folder.path(), "ulimit -n 64", Stdio::null());
    let remote = RemoteMemory::connect(&program.target, hasty()).unwrap();
    let collection = remote.open_collection(&requests::spec()).unwrap();
    let document = remote.open_document(collection.id, "text").unwrap();
    let append = |remote: &RemoteMemory, at: u32| {
        let block = requests::block(at);
        let block = NewBlock { v: block.k.clone(), ..block };
        remote.append(AppendRequest { document: document.id, blocks: vec![block], expected_tokens: None }).unwrap()
    };
    append(&remote, 0);

    let idle: Vec<Raw> = (0..100).map(|_| Raw::greeting(&program.target)).collect();
    for at in 1..4 {
        append(&remote, at);
        let request = AttendRequest {
            lookup: LookupRequest {
                collection: collection.id,
                scope: vec![BlockRange { document: document.id, blocks: 0..at + 1 }],
                ..requests::attend(1).lookup
            },
            ..requests::attend(1)
        };
        assert_eq!(remote.attend(&request).unwrap().hits.k, 3.min(at + 1));
    }
    drop(idle);

    let later = Instant::now() + Duration::from_secs(20);
    let another = loop {
        match RemoteMemory::connect(&program.target, hasty()) {
            Ok(another) => break another,
            Err(error) => assert!(Instant::now() < later, "{error}"),
        }
    };
    append(&another, 4);
    assert_eq!(another.document(document.id).unwrap().blocks, 5);
    assert_eq!(another.verify(None, &mut |_, _| {}).unwrap().faults, []);
}
