//! Text in, answer out, with the real model: encode, restart, ask, and everything that can be typed wrong on the way.

#[path = "cli/sandbox.rs"]
#[allow(dead_code, reason = "the sandbox serves other tests too")]
mod sandbox;

use std::sync::Arc;

use landmarkdb::{
    BlockAttention, BlockMemory, CollectionSpec, DType, KeyRule, LocalMemory, NewTokens, Normalisation, Retrieval,
    Window,
};
use landmarkdb_lab::eval::BOOK;
use landmarkdb_llm::{self as model, LoadedModel, Logits};
use sandbox::Sandbox;

const KEY: &str = "48213";

/// The beginning of the novel, about 3,000 tokens, with a key hidden well before the window.
fn text() -> String {
    let at = BOOK[5_000..].find("\n\n").unwrap() + 5_000;
    let end = BOOK[13_000..].find("\n\n").unwrap() + 13_000;
    let sentence = format!("The pass key of the old lighthouse is {KEY}. Remember it. {KEY} is the pass key.");
    format!("{}\n\n{sentence}{}", &BOOK[..at], &BOOK[at..end])
}

/// A sandbox with the model; nothing where it is not here.
fn sandbox() -> Option<Sandbox> {
    model::test_model::smollm2()?;
    let models = model::models_folder().unwrap();
    Some(Sandbox::new().with_variable("LANDMARKDB_CACHE", models.to_str().unwrap()))
}

const ORCHARD: &str = "The orchard lies behind the mill and has four rows of pear trees. In spring the children paint the \
    trunks white against the beetles, and in autumn a cart comes from the village to fetch the baskets. The old fence was mended \
    twice last year, and the gate has been painted green. Visitors are asked to leave their dogs at home. The secret name of the \
    oldest pear tree is Balthasar.\n";

const LETTER: &str = "Dear Aunt Wilma, the train to Tallmark was late again, so we arrived at eleven at night. The hotel is \
    called the Silver Heron and our room is number 26. Edgar has caught a cold and drinks ginger tea all day. Tomorrow we visit \
    the glass works, which opened in 1884. The tickets cost twelve marks each. The cathedral is closed because of a wedding. Please \
    feed the cat; her name is Sultana and she eats only fish. Your nephew, Anselm\n";

const ALBATROSS: &str = "The Albatross left port on a grey morning with forty barrels of salted herring in her hold. The captain \
    of the Albatross is Ines Moreau. She had bought new charts the week before and kept them in a tin box below the bridge. The crew \
    of nine was paid in silver, and each of them had a small locker with a key. The ship's cook came from the north and baked \
    bread on every second day. Nobody aboard could remember a calmer spring.\n";

const QUESTION: &str = "\nWhat is the pass key of the old lighthouse? The pass key is";

#[test]
fn a_text_is_encoded_once_and_asked_after_a_restart() {
    let Some(sandbox) = sandbox() else { return };
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
        let asked = ["ask", QUESTION, "--raw", "--stop", "\n", "--doc", "notes", where_[0], where_[1]];
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
    let service = sandbox.serve(&["serve", "--json", "--data", "d", "--listen", "127.0.0.1:0"]);
    let address = service.target().to_string();
    assert_eq!(in_process, ask(["--connect", &address]));
}

/// `verify` and `repair` say to encode a damaged document again: that it is "already encoded" would be the end of it.
#[test]
fn a_damaged_document_is_encoded_again_in_its_place() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.write_file("orchard.txt", ORCHARD);
    let encode = ["encode", "orchard.txt", "--data", "d"];
    sandbox.run(&encode).exits(0);
    let segment = sandbox.path("d").join("segments/0000000001.seg");
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, bytes).unwrap();

    for command in [&["verify", "--data", "d"][..], &["repair", "--data", "d"]] {
        let said = sandbox.run(command).exits(5);
        assert!(said.stdout.contains("default/orchard"), "{}", said.stdout);
        assert!(said.stderr.contains("encode"), "{}", said.stderr);
    }
    let refused = sandbox.run(&encode).exits(5).stderr;
    assert!(refused.contains("--replace encodes the text again"), "{refused}");
    sandbox.run(&[&encode[..], &["--replace"]].concat()).exits(0);
    sandbox.run(&["verify", "--data", "d"]).exits(0);
}

#[test]
fn what_cannot_be_encoded_or_asked_says_why() {
    let Some(sandbox) = sandbox() else { return };
    let short = "A short text that fits in one block, and a little more of it so that there is a tail.";
    sandbox.write_file("notes.txt", short);
    sandbox.run(&["encode", "notes.txt", "--data", "d"]).exits(0);
    let fails = |code: i32, words: &str, typed: &[&str]| {
        let error = sandbox.run(&[typed, &["--data", "d"]].concat()).exits(code).stderr;
        assert!(error.contains(words), "{typed:?}: {error}");
    };

    sandbox.write_file("other.txt", "Another text under the same name.");
    fails(1, "default/notes already holds another text", &["encode", "other.txt", "--name", "notes"]);
    fails(1, "--replace puts this one in its place", &["encode", "other.txt", "--name", "notes"]);
    sandbox.write_file("more.txt", &format!("{short} And more."));
    fails(1, "this one begins with it and goes on", &["encode", "more.txt", "--name", "notes"]);
    fails(2, "empty question", &["ask", "", "--doc", "notes"]);
    fails(2, "empty question", &["ask", " \n", "--doc", "notes", "--raw"]);
    fails(6, "the payload dtype is f16 there, here it is int8", &["encode", "other.txt", "--payload", "int8"]);
    fails(6, "the block size is 64 tokens there, here it is 32", &["encode", "other.txt", "--block-tokens", "32"]);
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
    assert!(answer.stdout.contains("nothing was retrieved"), "{}", answer.stdout);
}

/// What follows a document's last full block was read of the last document only: asked of two short texts, the model made up an answer
/// or took the other text's.
#[test]
fn the_end_of_every_document_is_read_whichever_is_named_last() {
    let Some(sandbox) = sandbox() else { return };
    for (name, text) in [
        ("gate", "The code word of the north gate is saffron. Remember saffron.\n"),
        ("museum", "The museum of clocks stands in Velden Street. It opens at nine.\n"),
        ("orchard", ORCHARD),
        ("letter", LETTER),
    ] {
        sandbox.write_file(&format!("{name}.txt"), text);
        sandbox.run(&["encode", &format!("{name}.txt"), "--data", "d"]).exits(0);
    }
    // The first block of the first document is the sink, if it is shorter than others too.
    for (question, found, other, answer, place_of_first) in [
        ("The code word of the north gate is", "gate", "museum", "saffron", "sink"),
        ("The secret name of the oldest pear tree is", "orchard", "letter", "balthasar", "retrieved"),
    ] {
        for [first, last] in [[found, other], [other, found]] {
            let docs = ["--doc", first, "--doc", last, "--doc", first];
            let typed = [&["ask", question, "--raw", "--data", "d", "--max-tokens", "6", "--json"], &docs[..]].concat();
            let json = sandbox.run(&typed).exits(0).json();
            assert!(json["answer"].as_str().unwrap().to_lowercase().contains(answer), "{first}, {last}: {json}");
            let blocks = json["blocks"].as_array().unwrap();
            let holding = blocks.iter().find(|block| block["text"].as_str().unwrap().to_lowercase().contains(answer));
            let place = if last == found { "window" } else { place_of_first };
            assert_eq!((&holding.unwrap()["document"], &holding.unwrap()["from"]), (&found.into(), &place.into()));
        }
    }
}

/// A question could be answered by an empty line, without a word about it.
#[test]
fn a_question_is_answered_and_the_answer_says_how_it_ended() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.write_file("albatross.txt", ALBATROSS);
    sandbox.run(&["encode", "albatross.txt", "--data", "d"]).exits(0);
    let typed = ["ask", "Who is the captain of the Albatross?", "--doc", "albatross", "--data", "d"];
    let json = sandbox.run(&[&typed[..], &["--json"]].concat()).exits(0).json();
    assert!(json["answer"].as_str().unwrap().contains("Moreau"), "{json}");
    assert!(["end_of_text", "stop"].contains(&json["finish"].as_str().unwrap()), "{json}");
    assert_eq!(json["incomplete"], serde_json::json!([]));
    let cut = [&typed[..], &["--max-tokens", "1", "--json"]].concat();
    assert_eq!(sandbox.run(&cut).exits(0).json()["finish"], "max_tokens");
    let cut = sandbox.run(&[&typed[..], &["--max-tokens", "3"]].concat()).exits(0).stdout;
    assert!(cut.contains("cut after 3 tokens") && cut.contains("--max-tokens"), "{cut}");
    let stopped =
        sandbox.run(&[&typed[..], &["--stop", "Moreau", "--stop", "nobody", "--json"]].concat()).exits(0).json();
    assert_eq!(stopped["finish"], "stop");
    assert!(stopped["answer"].as_str().unwrap().trim_end().ends_with("Ines"), "{stopped}");
}

/// What the model knew by itself was answered above a list of blocks of a ship's log, as if it stood there.
#[test]
fn an_answer_that_is_not_from_the_documents_says_so() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.write_file("albatross.txt", ALBATROSS);
    sandbox.run(&["encode", "albatross.txt", "--data", "d"]).exits(0);
    let line = "the answer does not seem to come from the documents";
    for (flag, question, from_documents) in [
        ("--quiet", "Who is the captain of the Albatross?", true),
        ("--quiet", "What is the capital of France?", false),
        ("--raw", "The captain of the Albatross is", true),
    ] {
        let typed = ["ask", question, flag, "--doc", "albatross", "--data", "d", "--max-tokens", "32"];
        let json = sandbox.run(&[&typed[..], &["--json"]].concat()).exits(0).json();
        assert_eq!(json["from_documents"], from_documents, "{question}: {json}");
        assert!(json["lift"].is_f64(), "{json}");
        let said = sandbox.run(&typed).exits(0).stdout;
        assert_eq!(said.contains(line), !from_documents, "{question}: {said}");
    }
}

/// How many newlines a file ends in is nothing that anybody sees.
#[test]
fn the_last_newlines_of_a_text_do_not_decide_the_answer() {
    let Some(sandbox) = sandbox() else { return };
    let answers = ["", "\n", "\n\n\n"].map(|ending| {
        let name = format!("newlines-{}", ending.len());
        sandbox.write_file(&format!("{name}.txt"), &format!("{}{ending}", ALBATROSS.trim_end()));
        sandbox.run(&["encode", &format!("{name}.txt"), "--data", "d"]).exits(0);
        let typed = ["ask", "Who is the captain of the Albatross?", "--doc", &name, "--data", "d", "--json"];
        let answer = sandbox.run(&typed).exits(0).json()["answer"].as_str().unwrap().to_string();
        assert!(answer.contains("Moreau"), "{name}: {answer}");
        answer
    });
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn a_follow_up_knows_the_documents_and_what_was_said() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.write_file("albatross.txt", ALBATROSS);
    sandbox.run(&["encode", "albatross.txt", "--data", "d"]).exits(0);
    let follow_up = ["ask", "--continue", "Where did she keep the charts?", "--max-tokens", "24"];
    sandbox.run(&follow_up).exits(3);
    let raw = ["ask", "The captain is", "--raw", "--doc", "albatross", "--data", "d", "--max-tokens", "4"];
    sandbox.run(&raw).exits(0);
    sandbox.run(&follow_up).exits(3);

    let first = ["ask", "Who is the captain?", "--doc", "albatross", "--data", "d", "--json", "--system", "Be brief."];
    let first = sandbox.run(&first).exits(0).json();
    assert_eq!(
        (&first["earlier_questions"], &first["documents"]),
        (&0.into(), &serde_json::json!(["default/albatross"]))
    );
    // From another folder, without a word of where or what.
    sandbox.make_folder("elsewhere");
    let mut second = sandbox.command(&[&follow_up[..], &["--json"]].concat());
    let second = second.current_dir(sandbox.path("elsewhere")).output().unwrap();
    let second: serde_json::Value = serde_json::from_slice(&second.stdout).unwrap();
    assert_eq!((&second["earlier_questions"], &second["documents"]), (&1.into(), &first["documents"]));
    assert!(second["prompt_tokens"].as_u64() > first["prompt_tokens"].as_u64(), "{second}");
    assert!(!second["answer"].as_str().unwrap().is_empty(), "{second}");
    let third = sandbox.run(&[&follow_up[..], &["--data", "d"]].concat()).exits(0);
    assert!(third.stderr.contains("continues 2 questions about default/albatross"), "{}", third.stderr);

    let error = sandbox.run(&[&follow_up[..], &["--data", "other"]].concat()).exits(2).stderr;
    assert!(error.contains("--data "), "{error}");
    sandbox.run(&["rm", "albatross", "--data", "d", "--yes"]).exits(0);
    sandbox.run(&follow_up).exits(3);
    sandbox.run(&["encode", "albatross.txt", "--data", "d"]).exits(0);
    let error = sandbox.run(&follow_up).exits(1).stderr;
    assert!(error.contains("default/albatross is another text"), "{error}");
}

/// A model that was trained on texts alone is asked in words, and would go on with questions of its own.
#[test]
fn a_model_without_a_template_is_asked_too() {
    let sandbox = Sandbox::new();
    let austen = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    sandbox.write_file("novel.txt", &BOOK[..2_000]);
    sandbox.run(&["encode", "novel.txt", "--data", "d", "--model", austen]).exits(0);
    let typed =
        ["ask", "Who is Anne?", "--doc", "novel", "--data", "d", "--model", austen, "--max-tokens", "12", "--json"];
    let greedy = sandbox.run(&typed).exits(0).json();
    assert!(!greedy["answer"].as_str().unwrap().contains("Question:"), "{greedy}");
    let drawn = |seed: &str| {
        let flags = ["--temperature", "1.5", "--sample-top-k", "0", "--seed", seed];
        sandbox.run(&[&typed[..], &flags].concat()).exits(0).json()["answer"].clone()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    let follow_up = ["ask", "--continue", "And Elizabeth?", "--max-tokens", "4", "--json"];
    let follow_up = sandbox.run(&follow_up).exits(0).json();
    assert_eq!(follow_up["earlier_questions"], 1);
    assert!(follow_up["lift"].is_f64() && follow_up["from_documents"].is_boolean(), "{follow_up}");

    // A question that the model could not read without a memory: nobody can say what it would have answered.
    let long = BOOK[2_000..5_000].trim();
    let typed = ["ask", long, "--raw", "--doc", "novel", "--data", "d", "--model", austen, "--max-tokens", "4"];
    let json = sandbox.run(&[&typed[..], &["--json"]].concat()).exits(0).json();
    assert!(json["lift"].is_null() && json["from_documents"].is_null(), "{json}");
    let said = sandbox.run(&typed).exits(0).stdout;
    assert!(!said.contains("seem to come from the documents"), "{said}");
}

/// The block with the answer stood in the window, and the blocks that the answer named were others.
#[test]
fn an_answer_names_the_blocks_of_window_and_sink_too() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.write_file("locker.txt", include_str!("../../../tests/fixtures/locker.txt"));
    sandbox.run(&["encode", "locker.txt", "--data", "d"]).exits(0);
    let typed =
        ["ask", "The code of the blue locker is", "--raw", "--doc", "locker", "--data", "d", "--max-tokens", "6"];
    let json = sandbox.run(&[&typed[..], &["--blocks", "16", "--json"]].concat()).exits(0).json();
    assert!(json["answer"].as_str().unwrap().contains("7719"), "{json}");
    let blocks = json["blocks"].as_array().unwrap();
    let from = |place: &str| blocks.iter().filter(|block| block["from"] == place).count();
    let document = sandbox.run(&["show", "locker", "--data", "d", "--json"]).exits(0).json()["document"].clone();
    let all = document["blocks"].as_u64().unwrap() + (document["tail_tokens"].as_u64() > Some(0)) as u64;
    assert_eq!(from("sink") + from("window") + from("retrieved"), all as usize, "with k = 16 all are read: {json}");
    assert_eq!((from("sink"), from("window") > 7), (1, true));
    assert!(blocks.iter().any(|block| block["text"].as_str().unwrap().contains("7719")), "{json}");
    let shares: f64 = blocks.iter().map(|block| block["share"].as_f64().unwrap()).sum();
    let own = json["own_share"].as_f64().unwrap();
    assert!(own > 0.05 && (shares + own - 1.0).abs() < 1e-6, "{shares} {own}");
    assert!(blocks.iter().all(|block| block["share"].as_f64() > Some(0.0)), "{json}");
    let table = sandbox.run(&typed).exits(0).stdout;
    assert!(table.contains("of all attention"), "{table}");
    assert!(table.contains("all (sink)") && table.contains("all (window)"), "{table}");
}

/// Escape sequences of a text that was encoded coloured the terminal of whoever asked about it.
#[test]
fn control_characters_of_a_text_stay_in_it() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.write_file("log.txt", &"log line \u{1b}[31mERROR\u{1b}[0m disk is on fire\n".repeat(12));
    sandbox.run(&["encode", "log.txt", "--data", "d"]).exits(0);
    let typed = ["ask", "log line", "--raw", "--doc", "log", "--data", "d", "--max-tokens", "20"];
    let answer = sandbox.run(&typed).exits(0).stdout;
    assert!(answer.contains("\\u{1b}[31mERROR") && !answer.contains('\u{1b}'), "{answer:?}");
}

#[test]
fn with_everything_retrieved_the_model_says_what_it_says_with_full_attention() {
    let Some(path) = model::test_model::smollm2() else { return };
    let model = LoadedModel::open(&path).unwrap();
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
        (ends, session.take_reads().retrieved.len())
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

#[test]
fn questions_of_a_file_are_counted() {
    let Some(sandbox) = sandbox() else { return };
    std::fs::create_dir(sandbox.path("texts")).unwrap();
    for (name, text) in [("ship.txt", ALBATROSS), ("orchard.txt", ORCHARD)] {
        sandbox.write_file(&format!("texts/{name}"), text);
    }
    let question = "Who is the captain of the Albatross?";
    let cases = serde_json::json!([
        { "documents": ["ship.txt"], "question": question, "answers": ["Nobody else", "ines MOREAU"], "group": "alone" },
        { "documents": ["orchard.txt", "ship.txt"], "question": question, "answers": ["Ines Moreau"], "group": "two" },
        { "documents": ["ship.txt"], "question": question, "answers": ["Captain Ahab"], "group": "two" },
    ]);
    sandbox.write_file("texts/cases.json", &cases.to_string());
    for baseline in [&["--blocks", "2,4"][..], &["--full-attention"]] {
        let typed = [&["eval", "questions", "texts/cases.json", "--max-tokens", "24"], baseline].concat();
        let report = sandbox.run(&[&typed[..], &["--json"]].concat()).exits(0).json();
        let ks = if baseline.len() == 1 { vec![serde_json::Value::Null] } else { vec![2.into(), 4.into()] };
        let mut results = report["results"].as_array().unwrap().iter();
        for k in &ks {
            // Full attention passes over the name behind another text: the model is small.
            let in_two = usize::from(!k.is_null());
            for (group, correct, asked) in [("alone", 1, 1), ("two", in_two, 2), ("", 1 + in_two, 3)] {
                let result = results.next().unwrap();
                assert_eq!(result["group"].as_str().unwrap_or_default(), group, "{report}");
                assert_eq!((&result["top_k"], &result["too_long"]), (k, &0.into()));
                assert_eq!((&result["correct"], &result["asked"]), (&correct.into(), &asked.into()), "{report}");
            }
        }
        assert!(results.next().is_none());
        let shown = sandbox.run(&typed).exits(0).stdout;
        assert!(shown.contains("wrong: Who is the captain of the Albatross? ("), "{shown}");
        assert!(shown.contains("expected Captain Ahab, answered"), "{shown}");
    }
}
