//! `encode --replace`: the earlier text stays under its name until the new one is whole.

use std::process::Stdio;
use std::time::{Duration, Instant};

use landmarkdb::{AppendRequest, BlockMemory, DType, FetchRequest, LocalMemory, NewBlock};

use crate::sandbox::{Answer, Sandbox};
use crate::with_text;

const FIRST: &str = "The ferry leaves at nine, and the bell rings twice.";
const SECOND: &str = "The ferry leaves at ten now. The bell is silent, and nobody knows why the keeper went away.";

/// The texts of all documents, by name.
fn texts(sandbox: &Sandbox, at: [&str; 2]) -> Vec<(String, String)> {
    let listed = sandbox.run(&["ls", "--json", at[0], at[1]]).exits(0).json();
    let name = |document: &serde_json::Value| document["name"].as_str().unwrap().to_string();
    let text = |name: &str| {
        let blocks = sandbox.run(&["blocks", name, "--json", at[0], at[1]]).exits(0).json();
        blocks["blocks"].as_array().unwrap().iter().map(|block| block["text"].as_str().unwrap()).collect::<String>()
    };
    listed["documents"].as_array().unwrap().iter().map(|document| (name(document), text(&name(document)))).collect()
}

fn only(text: &str) -> Vec<(String, String)> {
    vec![("text".into(), text.into())]
}

#[test]
fn a_changed_text_is_put_in_the_place_of_the_earlier_one() {
    let (sandbox, run) = with_text(FIRST);
    let at = ["--data", "d"];
    // Of no document it is an encoding like any other.
    let said = run(&sandbox, 0, &["encode", "text.txt", "--replace"]).stdout;
    assert!(said.contains("encoded default/text:"), "{said}");
    let id = sandbox.run(&["show", "text", "--json", "--data", "d"]).exits(0).json()["document"]["id"].clone();

    sandbox.write_file("text.txt", SECOND);
    let refused = run(&sandbox, 1, &["encode", "text.txt"]).stderr;
    assert!(refused.contains("default/text already holds another text"), "{refused}");
    assert!(refused.contains("--replace puts this one in its place"), "{refused}");
    assert_eq!(texts(&sandbox, at), only(FIRST));
    let said = run(&sandbox, 0, &["encode", "text.txt", "--replace"]).stdout;
    assert!(said.contains("replaced default/text:"), "{said}");
    assert_eq!(texts(&sandbox, at), only(SECOND));
    let shown = sandbox.run(&["show", "text", "--json", "--data", "d"]).exits(0).json();
    assert_ne!(shown["document"]["id"], id, "it is another document");
    let again = run(&sandbox, 0, &["encode", "text.txt", "--replace"]).stdout;
    assert!(again.contains("default/text is already encoded"), "{again}");

    // A text that begins with the earlier one, through a service.
    let longer = format!("{SECOND} And more.");
    sandbox.write_file("text.txt", &longer);
    let service = sandbox.serve(&["serve", "--json", "--data", "d", "--listen", "127.0.0.1:0"]);
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    let typed = ["encode", "text.txt", "--model", model, "--connect", service.target(), "--json"];
    let refused = sandbox.run(&typed).exits(1).stderr;
    assert!(refused.contains("--replace"), "{refused}");
    let done = sandbox.run(&[&typed[..], &["--replace"]].concat()).exits(0).json();
    assert_eq!((&done["replaced"], &done["document"]["name"]), (&true.into(), &"text".into()));
    assert_eq!(texts(&sandbox, ["--connect", service.target()]), only(&longer));
    assert_eq!(service.stop().code(), Some(0));
    sandbox.run(&["verify", "--rebuild", "--data", "d"]).exits(0);
}

/// Whatever stops it, the name has the earlier text, whole.
#[test]
fn a_replacement_that_is_stopped_leaves_the_earlier_text_as_it_was() {
    let (sandbox, run) = with_text(FIRST);
    run(&sandbox, 0, &["encode", "text.txt"]);
    sandbox.write_file("text.txt", &"The keeper is Harald, and his dog is old. ".repeat(40_000));
    for signal in ["INT", "KILL"] {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
        let typed = ["encode", "text.txt", "--replace", "--model", model, "--data", "d"];
        let child = sandbox.command(&typed).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let bytes = || -> u64 {
            let files = std::fs::read_dir(sandbox.path("d/segments")).unwrap();
            files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
        };
        let (before, deadline) = (bytes(), Instant::now() + Duration::from_secs(60));
        while bytes() < before + 100_000 {
            assert!(Instant::now() < deadline, "nothing is written");
            std::thread::sleep(Duration::from_millis(20));
        }
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if signal == "INT" {
            assert_eq!(output.status.code(), Some(130), "{said}");
            assert!(said.contains("default/text is as it was") && said.contains("kept beside it"), "{said}");
        }
        let found = texts(&sandbox, ["--data", "d"]);
        let [(beside, begun), (name, text)] = &found[..] else { panic!("two documents, found {}", found.len()) };
        assert!(beside.starts_with("replacement-of-") && begun.starts_with("The keeper is Harald"), "{beside}");
        assert_eq!((name.as_str(), text.as_str()), ("text", FIRST));
        run(&sandbox, 0, &["ask", "The ferry", "--raw", "--doc", "text", "--max-tokens", "2"]);
    }
    // Another text is wanted by now: what was begun goes too.
    sandbox.write_file("text.txt", SECOND);
    run(&sandbox, 0, &["encode", "text.txt", "--replace"]);
    assert_eq!(texts(&sandbox, ["--data", "d"]), only(SECOND));
    sandbox.run(&["verify", "--rebuild", "--data", "d"]).exits(0);
}

#[test]
fn a_replacement_goes_on_where_it_was_stopped() {
    let (sandbox, run) = with_text(FIRST);
    run(&sandbox, 0, &["encode", "text.txt"]);
    sandbox.write_file("text.txt", SECOND);
    run(&sandbox, 0, &["encode", "text.txt", "--name", "whole"]);
    // What an interrupted replacement leaves: the first blocks of the new text, beside the earlier one.
    {
        let memory = LocalMemory::open(&sandbox.path("d")).unwrap();
        let collection = memory.collections().unwrap().remove(0);
        let documents = memory.documents(collection.id).unwrap();
        let [text, whole] = &documents[..] else { panic!("two documents") };
        let part = memory.open_document(collection.id, &text.id.replacement_name()).unwrap();
        let request = FetchRequest { document: whole.id, blocks: vec![0], dtype: DType::F16 };
        let blocks = memory.fetch(&request).unwrap().into_iter().map(|block| NewBlock {
            index: block.id.index,
            token_ids: block.token_ids,
            text: block.text,
            k: block.k,
            v: block.v,
        });
        let blocks = blocks.collect();
        memory.append(AppendRequest { document: part.id, blocks, expected_tokens: None }).unwrap();
    }
    let said = run(&sandbox, 0, &["encode", "text.txt", "--replace"]).stdout;
    assert!(said.starts_with("resumed after 17 tokens\nreplaced default/text:"), "{said}");
    let names: Vec<_> = texts(&sandbox, ["--data", "d"]).into_iter().collect();
    assert_eq!(names, [("text".to_string(), SECOND.to_string()), ("whole".to_string(), SECOND.to_string())]);
}

/// Lost blocks, and not another text: the document is encoded again in its place.
#[test]
fn a_damaged_document_is_replaced_too() {
    let (sandbox, run) = with_text(FIRST);
    run(&sandbox, 0, &["encode", "text.txt"]);
    sandbox.damage("d", b"ferry");
    let refused = run(&sandbox, 5, &["encode", "text.txt"]).stderr;
    assert!(refused.contains("--replace encodes the text again"), "{refused}");
    run(&sandbox, 0, &["encode", "text.txt", "--replace"]);
    assert_eq!(texts(&sandbox, ["--data", "d"]), only(FIRST));
}

#[test]
fn names_of_replacements_in_the_making_are_not_given_out() {
    let (sandbox, run) = with_text(FIRST);
    let refused: Answer = run(&sandbox, 2, &["encode", "text.txt", "--name", "replacement-of-7"]);
    assert!(refused.stderr.contains("--name: expected a name that"), "{}", refused.stderr);
    run(&sandbox, 0, &["encode", "text.txt", "--name", "replacement-of-seven"]);
}
