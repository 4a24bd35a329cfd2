//! Text in, answer out, with the real model: encode, restart, ask, and everything that can be typed wrong on the way.

#[path = "cli/sandbox.rs"]
#[allow(dead_code, reason = "the sandbox serves other tests too")]
mod sandbox;

use std::sync::Arc;

use landmarkdb::api::BlockMemory;
use landmarkdb::attention::{BlockAttention, NewTokens, Retrieval, Window};
use landmarkdb::eval::BOOK;
use landmarkdb::memory::LocalMemory;
use landmarkdb::model::{self, LoadedModel, Logits};
use landmarkdb::shape::CollectionSpec;
use landmarkdb::types::{DType, KeyRule, Normalisation};
use sandbox::{Sandbox, Service};

const KEY: &str = "48213";

/// The beginning of the novel, about 3,000 tokens, with a key hidden well before the window.
fn text() -> String {
    let at = BOOK[5_000..].find("\n\n").unwrap() + 5_000;
    let end = BOOK[13_000..].find("\n\n").unwrap() + 13_000;
    let sentence = format!("The pass key of the old lighthouse is {KEY}. Remember it. {KEY} is the pass key.");
    format!("{}\n\n{sentence}{}", &BOOK[..at], &BOOK[at..end])
}

/// A sandbox with the model, which is fetched once for all tests.
fn sandbox() -> Sandbox {
    model::pull("smollm2", &mut |_| {}).unwrap();
    let models = model::models_folder().unwrap();
    Sandbox::new().with_variable("LANDMARKDB_CACHE", models.to_str().unwrap())
}

const QUESTION: &str = "\nWhat is the pass key of the old lighthouse? The pass key is";

#[test]
fn a_text_is_encoded_once_and_asked_after_a_restart() {
    let sandbox = sandbox();
    sandbox.write_file("notes.txt", &text());
    let encoded = sandbox.run(&["encode", "notes.txt", "--data", "d", "--json"]).exits(0).json();
    assert_eq!(encoded["document"]["sealed"], true);
    assert_eq!(encoded["resumed_tokens"], 0);
    let tokens = encoded["document"]["tokens"].as_u64().unwrap();
    assert!(tokens > 2_500, "{encoded}");

    let again = sandbox.run(&["encode", "notes.txt", "--data", "d"]).exits(0).stdout;
    assert!(again.contains("already encoded"), "{again}");

    // In process and through a service: the same answer from the same blocks.
    let ask = |where_: [&str; 2]| {
        let asked = ["ask", QUESTION, "--raw", "--doc", "notes", where_[0], where_[1]];
        let json = sandbox.run(&[&asked[..], &["--json"]].concat()).exits(0).json();
        assert!(json["answer"].as_str().unwrap().starts_with(KEY), "{}", json["answer"]);
        let cited = json["blocks"].as_array().unwrap().iter().position(|block| {
            block["text"].as_str().unwrap().contains(KEY) && !block["heads"].as_array().unwrap().is_empty()
        });
        assert!(cited.unwrap() < 3, "the block with the key is among the heaviest, found {cited:?}");
        let table = sandbox.run(&asked).exits(0).stdout;
        assert!(table.contains(KEY) && table.contains("CHOSEN BY"), "{table}");
        (json["answer"].clone(), json["blocks"].clone())
    };
    let in_process = ask(["--data", "d"]);
    let service = Service::start(&sandbox, &["serve", "--json", "--data", "d", "--listen", "127.0.0.1:0"]);
    let address = service.listening[0].clone();
    assert_eq!(in_process, ask(["--connect", &address]));
}

#[test]
fn what_cannot_be_encoded_or_asked_says_why() {
    let sandbox = sandbox();
    let short = "A short text that fits in one block, and a little more of it so that there is a tail.";
    sandbox.write_file("notes.txt", short);
    sandbox.run(&["encode", "notes.txt", "--data", "d"]).exits(0);
    let fails = |code: i32, words: &str, typed: &[&str]| {
        let error = sandbox.run(&[typed, &["--data", "d"]].concat()).exits(code).stderr;
        assert!(error.contains(words), "{typed:?}: {error}");
    };

    sandbox.write_file("other.txt", "Another text under the same name.");
    fails(1, "already holds other tokens", &["encode", "other.txt", "--name", "notes"]);
    fails(6, "fingerprint", &["encode", "other.txt", "--payload", "int8"]);
    fails(6, "fingerprint", &["encode", "other.txt", "--block-tokens", "32"]);
    fails(1, "no-such-file", &["encode", "no-such-file"]);
    fails(2, "--name", &["encode", "-"]);
    fails(3, "letters", &["ask", "What?", "--doc", "notes", "--doc", "letters"]);
    fails(3, "elsewhere", &["ask", "What?", "--doc", "elsewhere/notes"]);
    fails(3, "model pull", &["ask", "What?", "--doc", "notes", "--model", "hf:nobody/nothing"]);
    fails(2, "log-sum-exp", &["ask", "What?", "--doc", "notes", "--block-score", "best"]);
    std::fs::write(sandbox.path("latin.txt"), b"caf\xe9").unwrap();
    fails(1, "byte 3", &["encode", "latin.txt"]);

    // Asked about a text that fits in the window there is nothing to retrieve, and the answer says so.
    let answer = sandbox.run(&["ask", "What is this?", "--doc", "notes", "--data", "d", "--max-tokens", "4"]).exits(0);
    assert!(answer.stdout.contains("fit in"), "{}", answer.stdout);
}

#[test]
fn with_everything_retrieved_the_model_says_what_it_says_with_full_attention() {
    let model = LoadedModel::open(&model::pull("smollm2", &mut |_| {}).unwrap()).unwrap();
    let ids = model.tokenizer.encode(&text()).unwrap().ids[..800].to_vec();
    let shape = model.shape(64).unwrap();
    let window = Window { tokens: 128, ..Window::default() };
    let logits = |mut session: BlockAttention| {
        let mut ends = Vec::new();
        for ids in ids.chunks(100) {
            ends.extend(model.llama.forward(ids, &mut session, Logits::Last).unwrap());
            let offsets = vec![0; ids.len()];
            session.commit(NewTokens { ids, text: &[], offsets: &offsets }).unwrap();
        }
        (ends, session.take_reads().len())
    };

    let folder = tempfile::tempdir().unwrap();
    let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path()).unwrap());
    let collection = CollectionSpec {
        name: "exact".into(),
        shape: shape.clone(),
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::F32,
        key_dtype: DType::Int8,
        model_digest: model.model_digest,
        tokenizer_digest: model.tokenizer_digest(),
        model_name: model.name.clone(),
    };
    let collection = memory.open_collection(&collection).unwrap();
    let document = memory.open_document(collection.id, "text").unwrap();
    let all = Retrieval { top_k: 1000, ..Retrieval::default() };
    let with_memory = BlockAttention::write(memory.clone(), &collection, &document, window, Some(all)).unwrap();

    let (full, _) = logits(BlockAttention::full(&shape, Normalisation::Plain));
    let (remembered, blocks_read) = logits(with_memory);
    let (windowed, _) = logits(BlockAttention::window_only(&shape, window));
    let difference = |other: &[f32]| full.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert_eq!(blocks_read, 9, "800 tokens, less sink, window and the block under way");
    assert!(difference(&remembered) < 2e-3, "{}", difference(&remembered));
    assert!(difference(&windowed) > 0.5, "the window alone differs: {}", difference(&windowed));
}
