//! A model that was trained with landmarks, as it comes with landmarkdb: one key per block, found by attention itself.

#[path = "cli/sandbox.rs"]
#[allow(dead_code, reason = "the sandbox serves other tests too")]
mod sandbox;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use landmarkdb::{BlockMemory, BlockRange, CollectionInfo, CollectionSpec, DType, KeyRule, LocalMemory, Window};
use landmarkdb_lab::eval::{
    BOOK, Haystack, PasskeySettings, PasskeyTexts, PerplexityMode, PerplexitySettings, passkey, passkey_full,
    perplexity, segments,
};
use landmarkdb_llm::LoadedModel;
use sandbox::Sandbox;

const BLOCK_TOKENS: u32 = 17;

fn shipped() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/austen")
}

/// A memory in a folder, and a collection for the model.
fn collection(folder: &Path, model: &LoadedModel) -> (Arc<dyn BlockMemory>, CollectionInfo) {
    let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder).unwrap());
    let config = model.config();
    let spec = CollectionSpec {
        name: "keys".into(),
        shape: model.shape(config.block_tokens()).unwrap(),
        key_rule: config.key_rule(),
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: model.model_digest,
        tokenizer_digest: model.tokenizer_digest(),
        model_name: model.name.clone(),
    };
    assert_eq!((spec.shape.block_tokens, spec.key_rule), (BLOCK_TOKENS, KeyRule::Landmark));
    let collection = memory.open_collection(&spec).unwrap();
    (memory, collection)
}

#[test]
fn it_finds_keys_at_many_times_its_training_length_where_full_attention_does_not() {
    let model = LoadedModel::open(&shipped()).unwrap();
    let config = model.config();
    let folder = tempfile::tempdir().unwrap();
    let (memory, collection) = collection(folder.path(), &model);
    let settings = PasskeySettings {
        top_k: vec![1, 4],
        window: config.window(),
        encode_retrieval: config.encode_retrieval(),
        retrieval: config.retrieval(),
    };
    for haystack in [Haystack::Garbage, Haystack::Prose] {
        let texts = PasskeyTexts { haystack, prose: BOOK.into(), tokens: vec![4096], samples: 4, seed: 11 };
        let collections = std::slice::from_ref(&collection);
        let cases = passkey(&model, &memory, collections, &texts, &settings, &mut |_, _, _| {}).unwrap();
        let wrong: Vec<_> = cases.iter().filter(|case| !case.correct).collect();
        assert!(cases.len() == 8 && wrong.is_empty(), "{wrong:#?}");

        let alone = passkey_full(&model, &texts, &mut |_, _| {}).unwrap();
        assert!(alone.iter().filter(|case| case.correct).count() <= 1, "{alone:#?}");
    }
}

#[test]
fn commands_know_what_a_landmark_model_needs() {
    let sandbox = Sandbox::new();
    let text = &BOOK[..20_000];
    sandbox.write_file("chapter.txt", text);
    let model = shipped();
    let model = model.to_str().unwrap();
    let encode = ["encode", "chapter.txt", "--model", model, "--data", "d"];
    let encoded = sandbox.run(&[&encode[..], &["--json"]].concat()).exits(0).json();
    assert_eq!(encoded["document"]["sealed"], true, "{encoded}");

    let memory = LocalMemory::open(&sandbox.path("d")).unwrap();
    let collection = memory.collections().unwrap().remove(0);
    assert_eq!((collection.spec.shape.block_tokens, collection.spec.key_rule), (BLOCK_TOKENS, KeyRule::Landmark));
    let document = memory.documents(collection.id).unwrap().remove(0);
    let blocks = memory.blocks(&BlockRange { document: document.id, blocks: 0..u32::MAX }).unwrap();
    let landmark = LoadedModel::open(&shipped()).unwrap().config().landmark.unwrap().id;
    for block in &blocks {
        let at: Vec<usize> =
            block.token_ids.iter().enumerate().filter(|(_, id)| **id == landmark).map(|(at, _)| at).collect();
        let full = block.token_ids.len() == BLOCK_TOKENS as usize;
        assert_eq!(at, if full { vec![BLOCK_TOKENS as usize - 1] } else { vec![] }, "block {}", block.id);
    }
    let stored: Vec<u8> = blocks.iter().flat_map(|block| block.text.bytes.clone()).collect();
    assert_eq!(String::from_utf8(stored).unwrap(), text, "the blocks cover the text exactly once");
    drop(memory);

    let asked = ["ask", "\nAnne ", "--raw", "--model", model, "--doc", "chapter", "--data", "d", "--json"];
    let answer = sandbox.run(&asked).exits(0).json();
    assert!(!answer["blocks"].as_array().unwrap().is_empty(), "{answer}");
    assert!(!answer["answer"].as_str().unwrap().contains("landmark"), "{answer}");

    let other =
        sandbox.run(&[&encode[..], &["--collection", "other", "--block-tokens", "16"]].concat()).exits(2).stderr;
    assert!(other.contains("expected 17") && other.contains("found 16"), "{other}");
}

#[test]
fn a_report_has_every_table_and_plot() {
    let sandbox = Sandbox::new();
    let model = shipped();
    sandbox.write_file("book.txt", &BOOK[..60_000]);
    for (out, kind) in [("plain", "--plain"), ("recurrent", "--recurrent")] {
        let shape =
            ["--layers", "1", "--hidden", "16", "--heads", "2", "--kv-heads", "1", "--ffn", "24", "--vocab", "300"];
        let recipe = ["--block-tokens", "9", "--phases", "20:2:1", "--steps", "2", "--text", "book.txt"];
        sandbox.run(&[&["train", out, kind], &shape[..], &recipe].concat()).exits(0);
    }
    let twins = ["--plain", "plain", "--recurrent", "recurrent"];
    let typed = [&["eval", "report", "out", "--model", model.to_str().unwrap()], &twins[..]].concat();
    let small = ["--text-tokens", "4096", "--lengths", "256,512", "--blocks", "2", "--samples", "1"];
    let passkey = ["--passkey-lengths", "512,1024", "--passkey-blocks", "1", "--full-tokens-max", "512", "--json"];
    let written = sandbox.run(&[&typed[..], &small, &passkey].concat()).exits(0).json();
    let rows = |table: &str| written["report"][table].as_array().unwrap().clone();

    let perplexity = |method: &str| {
        let of_method = |row: &&serde_json::Value| row["method"] == method && row["length_tokens"] == 512;
        rows("perplexity").iter().find(of_method).unwrap()["perplexity"].as_f64().unwrap()
    };
    assert!(perplexity("memory") < perplexity("local_only"), "{written}");
    assert!(perplexity("recent_blocks") < perplexity("local_only"), "{written}");
    // Twins of two steps know little, but no less than to name a byte.
    for method in ["plain_window", "recurrent"] {
        assert!((10.0..400.0).contains(&perplexity(method)), "{method}: {written}");
    }
    let granularities: Vec<_> = rows("granularity").iter().map(|row| row["granularity"].clone()).collect();
    assert_eq!(granularities[..5], ["token-head", "head", "token", "kv-group", "shared"]);
    let again = |method: &str| {
        let of_method = |row: &&serde_json::Value| row["method"] == method && row["gap_tokens"] == 512;
        rows("repetition").iter().find(of_method).unwrap()["perplexity"].as_f64().unwrap()
    };
    assert_eq!(rows("repetition").len(), 6);
    // Whether far text helps takes many texts to say: in one passage a model this small goes either way.
    for method in ["local_only", "recent_blocks", "memory"] {
        assert!((5.0..100.0).contains(&again(method)), "{method}: {written}");
    }
    // Two haystacks, each remembered at two lengths and asked under full attention at the shorter one.
    assert_eq!(rows("passkey").len(), 6);
    assert!(rows("passkey").iter().all(|row| row["method"] != "memory" || row["correct"] == 1), "{written}");

    let read = |name: &str| std::fs::read_to_string(sandbox.path("out").join(name)).unwrap();
    for heading in ["Table 1", "Table 2", "A passage read again", "Figure 3", "eval report out --model"] {
        assert!(read("report.md").contains(heading), "{heading}");
    }
    for plot in ["perplexity.svg", "passkey-garbage.svg", "passkey-prose.svg"] {
        assert!(read("report.md").contains(plot) && read(plot).contains("<polyline"), "{plot}");
    }
    let saved: serde_json::Value = serde_json::from_str(&read("report.json")).unwrap();
    assert_eq!(saved, written["report"]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let sandbox = Sandbox::new();
    let model = shipped();
    let with_model = ["--model", model.to_str().unwrap()];
    let refused = |typed: &[&str], expected: &str| {
        let error = sandbox.run(&[typed, &with_model].concat()).exits(1).stderr;
        assert!(error.contains(expected), "{expected} in {error}");
    };
    refused(&["eval", "perplexity", "--tokens", "512"], "more than the 1024 tokens that are not counted");
    sandbox.write_file("empty.txt", "");
    sandbox.write_file("short.txt", "Too short for a table.");
    refused(&["eval", "passkey", "--tokens", "512", "--text", "empty.txt"], "expected a text, found an empty one");
    refused(&["eval", "report", "out", "--text", "short.txt"], "4096 tokens or more, the longest evaluation length");
    assert!(!sandbox.path("out").exists());
}

#[test]
fn questions_that_cannot_be_asked_are_refused_and_those_that_do_not_fit_are_said() {
    let sandbox = Sandbox::new();
    sandbox.write_file("short.txt", "The captain is Ines Moreau.");
    sandbox.write_file("empty.txt", " \n");
    sandbox.write_file("long.txt", &BOOK[..20_000]);
    let case = |document: &str, question: &str, answer: &str| {
        serde_json::json!([{ "documents": [document], "question": question, "answers": [answer] }]).to_string()
    };
    for (file, exit, expected) in [
        ("words", 2, "expected value at line 1"),
        ("[]", 2, "expected at least one question, found none"),
        ("[{\"documents\": [\"short.txt\"], \"question\": \"Who?\"}]", 2, "missing field `answers`"),
        (
            "[{\"documents\": [], \"question\": \"Who?\", \"answers\": [\"a\"]}]",
            2,
            "question 1: documents: expected a file",
        ),
        (&case("short.txt", " ", "a"), 2, "question 1: question: expected words"),
        (&case("short.txt", "Who?", ""), 2, "question 1: answers: expected words"),
        (&case("missing.txt", "Who?", "a"), 1, "missing.txt"),
        (&case("empty.txt", "Who?", "a"), 1, "empty.txt: expected a text"),
    ] {
        sandbox.write_file("cases.json", file);
        let error = sandbox.run(&["eval", "questions", "cases.json"]).exits(exit).stderr;
        assert!(error.contains(expected), "{expected} in {error}");
    }
    let model = shipped();
    sandbox.write_file("cases.json", &case("long.txt", "Who?", "nobody would say this"));
    let typed = ["eval", "questions", "cases.json", "--max-tokens", "4", "--model", model.to_str().unwrap()];
    let report = sandbox.run(&[&typed[..], &["--json"]].concat()).exits(0).json();
    assert_eq!(report["results"][0]["asked"], 1, "{report}");
    assert_eq!(report["cases"][0]["correct"], false);
    let full = [&typed[..], &["--full-attention"]].concat();
    let report = sandbox.run(&[&full[..], &["--json"]].concat()).exits(0).json();
    assert_eq!((&report["results"][0]["asked"], &report["results"][0]["too_long"]), (&0.into(), &1.into()), "{report}");
    let shown = sandbox.run(&full).exits(0).stdout;
    assert!(shown.contains("not asked, longer than the model's context: Who?"), "{shown}");
}

#[test]
fn an_evaluation_does_not_read_what_another_left() {
    let model = LoadedModel::open(&shipped()).unwrap();
    let config = model.config();
    let folder = tempfile::tempdir().unwrap();
    let (memory, collection) = collection(folder.path(), &model);
    let ids = model.tokenizer.encode(&BOOK[..8000]).unwrap().ids;
    let texts = segments(&ids, 1200, 1);
    let settings = PerplexitySettings { skip_tokens: 0, window: config.window(), retrieval: config.retrieval() };
    let mode = PerplexityMode::Memory { top_k: 4, newest_blocks: None };
    let measure = |progress: &mut dyn FnMut(usize, usize)| {
        perplexity(&model, &memory, &collection, &texts, mode, &settings, progress).unwrap().perplexity
    };
    let before = measure(&mut |_, _| {});
    let stopped = catch_unwind(AssertUnwindSafe(|| {
        measure(&mut |done, _| assert!(done < 600, "stopped here"));
    }));
    assert!(stopped.is_err());
    let left = memory.documents(collection.id).unwrap();
    assert!(left.len() == 1 && left[0].blocks > 20, "{left:?}");
    assert_eq!(measure(&mut |_, _| {}), before);
}

#[test]
fn checkpoints_with_a_landmark_in_the_wrong_place_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let broken = |file: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            std::fs::copy(shipped().join(name), folder.path().join(name)).unwrap();
        }
        let path = folder.path().join(file);
        std::fs::write(&path, change(std::fs::read(&path).unwrap())).unwrap();
        LoadedModel::open(folder.path()).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let config = |from: &'static str, to: &'static str| {
        let change = move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(from, to).into_bytes();
        broken("config.json", &change)
    };
    assert_eq!(config("\"mem_id\": 511", "\"mem_id\": 511"), "", "unchanged it opens");
    let ordinary = config("\"mem_id\": 511", "\"mem_id\": 300");
    assert!(ordinary.contains("mem_id") && ordinary.contains("control token"), "{ordinary}");
    assert!(config("\"mem_id\": 511", "\"mem_id\": 512").contains("landmark token"), "an id without an embedding");
    assert!(config("\"mem_freq\": 16,", "").contains("mem_freq is missing"));
    assert!(config("\"mem_freq\": 16", "\"mem_freq\": 0").contains("block_tokens"));
    assert!(config("\"hidden_size\": 128", "\"hidden_size\": 96").contains("shape"));
    let cut = broken("model.safetensors", &|bytes| bytes[..bytes.len() - 100].to_vec());
    assert!(cut.contains("damaged or cut short"), "{cut}");
}

#[test]
fn a_window_that_slides_serves_a_landmark_model_too() {
    // Other windows than the paper's may be asked for: the blocks that a token does not see are retrievable all the same.
    let model = LoadedModel::open(&shipped()).unwrap();
    let window = Window { tokens: 136, counted_from: landmarkdb::CountedFrom::Query, ..model.config().window() };
    let shape = model.shape(BLOCK_TOKENS).unwrap();
    let ids = model.config().reading(0, &model.tokenizer.encode(&BOOK[..2_000]).unwrap().ids).ids;
    let run = |chunk_tokens| {
        let mut session = landmarkdb::BlockAttention::window_only(&shape, window);
        let last = landmarkdb_llm::Logits::Last;
        landmarkdb_llm::prefill(&model.llama, &mut session, &ids, chunk_tokens, last).unwrap()
    };
    for (at_once, in_pieces) in run(ids.len()).iter().zip(run(50)) {
        assert!((at_once - in_pieces).abs() < 1e-3, "{at_once} {in_pieces}");
    }
}
