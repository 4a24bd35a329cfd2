//! `landmarkdb train`, on a model so small that it trains in seconds.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::sandbox::Sandbox;

const BOOK: &str = include_str!("../../../../texts/persuasion.txt");

/// 20 steps of a tiny model, but for what `more` says otherwise.
fn args<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let tiny = [
        ["--text", "book.txt"],
        ["--layers", "2"],
        ["--hidden", "16"],
        ["--heads", "2"],
        ["--kv-heads", "1"],
        ["--ffn", "24"],
        ["--vocab", "300"],
        ["--block-tokens", "9"],
        ["--phases", "20:2:1"],
        ["--steps", "20"],
        ["--warmup", "4"],
        ["--lr", "1e-2"],
    ];
    let kept = tiny.into_iter().filter(|[flag, _]| !more.contains(flag)).flatten();
    ["train", out].into_iter().chain(kept).chain(more.iter().copied()).collect()
}

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write_file("book.txt", &BOOK[..60_000]);
    sandbox.write_file("held-out.txt", &BOOK[60_000..70_000]);
    sandbox
}

#[test]
fn a_model_is_trained_from_a_text() {
    let sandbox = sandbox();
    let report = sandbox.run(&args("landmark", &["--validation", "held-out.txt", "--json"])).exits(0).json();
    assert_eq!((&report["steps"], &report["tokens"]), (&20.into(), &(20 * 2 * 180).into()));
    assert!(
        report["validation"]["perplexity"].as_f64().is_some_and(|perplexity| (2.0..300.0).contains(&perplexity)),
        "{report}"
    );
    let config = std::fs::read_to_string(sandbox.path("landmark").join("config.json")).unwrap();
    assert!(config.contains(r#""mem_freq": 8"#) && config.contains(r#""mem_id": 299"#), "{config}");
    let card = std::fs::read_to_string(sandbox.path("landmark").join("README.md")).unwrap();
    assert!(card.starts_with("# landmark\n") && card.contains("| `phases` | 20:2:1 |"), "{card}");

    let text = sandbox.run(&args("plain", &["--plain"])).exits(0).stdout;
    assert!(text.contains("steps") && text.contains("loss on answers"), "{text}");
    sandbox.write_file("note.txt", &BOOK[..2000]);
    sandbox.run(&["encode", "note.txt", "--model", "plain", "--data", "data"]).exits(0);
}

#[test]
fn an_adapter_gives_a_model_landmark_keys() {
    let sandbox = sandbox();
    sandbox.run(&args("plain", &["--plain"])).exits(0);
    let adapter =
        ["train", "adapter", "--text", "book.txt", "--from", "plain", "--adapter", "4", "--block-tokens", "9"];
    let recipe = ["--phases", "20:2:1", "--steps", "5", "--warmup", "1", "--validation", "held-out.txt", "--json"];
    let report = sandbox.run(&[&adapter[..], &recipe].concat()).exits(0).json();
    let number = |name: &str| report["validation"][name].as_f64().unwrap_or_else(|| panic!("{report}"));
    assert!(number("shared") > number("by_chance") && number("choices") > 100.0, "{report}");
    let refused = sandbox.run(&[&adapter[..], &["--answer-weight", "1"]].concat()).exits(2).stderr;
    assert!(refused.contains("more than 1 for an adapter"), "{refused}");
    let config = std::fs::read_to_string(sandbox.path("adapter/adapter_config.json")).unwrap();
    let base = sandbox.path("plain");
    assert!(config.contains(base.to_str().unwrap()), "the base is found from any working directory: {config}");

    sandbox.write_file("note.txt", &BOOK[..3000]);
    let encode = ["encode", "note.txt", "--model", "adapter", "--data", "data"];
    let refused = sandbox.run(&[&encode[..], &["--key-rule", "tokens"]].concat()).exits(2).stderr;
    assert!(refused.contains("expected landmark"), "{refused}");
    let unmarked = ["encode", "note.txt", "--model", "plain", "--data", "plain-data", "--key-rule", "landmark"];
    let refused = sandbox.run(&unmarked).exits(2).stderr;
    assert!(refused.contains("tokens or mean") && refused.contains("found landmark"), "{refused}");
    sandbox.run(&[&encode[..], &["--encode-blocks", "1", "--retrieve-layers", "1"]].concat()).exits(0);
    let ask = ["ask", "What?", "--doc", "note", "--model", "adapter", "--data", "data", "--window", "18", "--json"];
    let answer = sandbox.run(&ask).exits(0).json();
    assert!(answer["blocks"].as_array().is_some_and(|blocks| !blocks.is_empty()), "{answer}");
    let refused = sandbox.run(&[&ask[..], &["--retrieve-layers", "1-2"]].concat()).exits(2).stderr;
    assert!(refused.contains("0 to 1") && refused.contains("found 2"), "{refused}");
}

#[test]
fn a_model_that_no_training_left_there_is_not_replaced() {
    let sandbox = sandbox();
    sandbox.run(&args("model", &["--plain"])).exits(0);
    std::fs::remove_file(sandbox.path("model/checkpoint.safetensors")).unwrap();
    let before = std::fs::read(sandbox.path("model/tokenizer.json")).unwrap();
    let refused = sandbox.run(&args("model", &["--seed", "2"])).exits(2).stderr;
    assert!(refused.contains("has a config.json and no checkpoint"), "{refused}");
    assert!(std::fs::read(sandbox.path("model/tokenizer.json")).unwrap() == before);
}

#[test]
fn an_interrupted_training_leaves_a_checkpoint() {
    let sandbox = sandbox();
    let endless = args("model", &["--steps", "1000000", "--checkpoint-every", "3"]);
    let child = sandbox.command(&endless).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while !sandbox.path("model/checkpoint.safetensors").exists() {
        assert!(begin.elapsed() < Duration::from_secs(60), "no checkpoint");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("of 1000000 steps: the same command goes on from there"), "{said}");

    let other = sandbox.run(&args("model", &["--json"])).exits(2);
    assert_eq!(other.error_kind(), "usage");
    assert!(other.stderr.contains("steps: 1000000 there, 20 here"), "{}", other.stderr);
}

#[test]
fn what_cannot_be_trained_is_told() {
    let sandbox = sandbox();
    sandbox.write_file("empty.txt", "");
    let refused = |more: &[&str], code: i32, expected: &str| {
        let error = sandbox.run(&args("model", more)).exits(code).stderr;
        assert!(error.contains(expected), "{expected} in {error}");
    };
    refused(&["--phases", "8:16"], 2, "BLOCKS:SEQUENCES:SHARE");
    refused(&["--phases", "2:2:1"], 1, "a passkey document needs");
    refused(&["--phases", "90000:1:1"], 1, "the longest text has");
    refused(&["--hidden", "17"], 2, "heads: expected a divisor of hidden, found 2");
    refused(&["--recurrent", "--plain"], 2, "cannot be used with");
    refused(&["--validation", "empty.txt"], 1, "no text");
    refused(&["--validation", "none.txt"], 1, "none.txt");
    refused(&["--vocab", "60000"], 1, "too large");
    refused(&["--block-tokens", "1"], 2, "block_tokens: expected 2 to 1024");
    refused(&["--text", "empty.txt"], 1, "no text");
    refused(&["--from", "landmark", "--vocab", "400"], 2, "cannot be used with");
    refused(&["--group-dropout", "1.5"], 2, "group_dropout: expected 0 or more, and less than 1, found 1.5");
}
