//! The command line end to end: the real binary, in a home folder of its own.

#[path = "cli/append.rs"]
mod append;
#[path = "cli/read_only.rs"]
mod read_only;
#[path = "cli/replace.rs"]
mod replace;
#[path = "cli/sandbox.rs"]
mod sandbox;
#[path = "cli/train.rs"]
mod train;

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use landmarkdb::{AppendRequest, BlockMemory, DType, FetchRequest, LocalMemory, NewBlock};
use sandbox::Sandbox;

#[test]
fn help_says_what_there_is() {
    let sandbox = Sandbox::new();
    let help = sandbox.run(&["--help"]).exits(0).stdout;
    for word in ["serve", "model", "ls", "show", "blocks", "stats", "verify", "rm", "completions", "Exit codes:"] {
        assert!(help.contains(word), "{word} in\n{help}");
    }
    let help = sandbox.run(&["verify", "--help"]).exits(0).stdout;
    assert!(help.contains("Examples:") && help.contains("landmarkdb verify"), "{help}");
    sandbox.run(&["--version"]).exits(0);
    let help = sandbox.run(&["ask", "--help"]).exits(0).stdout;
    assert!(help.contains("- kv-group:") && help.contains("- chunk:"), "{help}");
    for of_help in [["help", "--help"], ["help", "help"]] {
        sandbox.run(&of_help).exits(0);
    }
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    let sandbox = Sandbox::new();
    let error = sandbox.run(&["lss"]).exits(2).stderr;
    assert!(error.contains("lss"), "{error}");
    assert_eq!(sandbox.run(&["lss", "--json"]).exits(2).error_kind(), "usage");
    let error = sandbox.run(&["ls", "--data", "d", "--connect", "unix:s"]).exits(2).stderr;
    assert!(error.starts_with("error: the command line: "), "{error}");
    let error = sandbox.run(&["serve", "--connect", "unix:s"]).exits(2).stderr;
    assert!(error.contains("--data DIR"), "{error}");
    sandbox.run(&["ls", "--connect", "ftp://host"]).exits(2);
    let error = sandbox.run(&["serve", "--data", "d", "--listen", "0.0.0.0:0"]).exits(2).stderr;
    assert!(error.contains("--allow-remote"), "{error}");
    let error = sandbox.run(&["ask", "--doc", "emma", "Who?", "--blocks", "0"]).exits(2).stderr;
    assert!(error.contains("--blocks") && error.contains("1..=1024"), "{error}");
    // Whether the number would be used or not, and before anything is opened.
    for (flag, number) in [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--sample-top-p", "0"),
        ("--sample-top-p", "2"),
        ("--min-p", "1.5"),
        ("--repeat-penalty", "0"),
        ("--sample-top-k", "many"),
        ("--stop", ""),
        ("--top-k", "40"),
    ] {
        let error = sandbox.run(&["ask", "--doc", "emma", "Who?", flag, number]).exits(2).stderr;
        assert!(error.contains(flag), "{error}");
    }
    for other in [&["--doc", "emma"][..], &["--raw"], &["--system", "Be brief."], &["--model", "m"]] {
        sandbox.run(&[&["ask", "--continue", "Who?"], other].concat()).exits(2);
    }
    let error = sandbox.run(&["ask", "--continue", "Who?", "--json"]).exits(3);
    assert!(error.stderr.contains("--doc DOC"), "{}", error.stderr);
}

/// Numbers that mean nothing were taken as something else, without a word.
#[test]
fn a_number_out_of_range_is_a_usage_error_that_says_the_range() {
    let sandbox = Sandbox::new();
    let encode = ["encode", "text.txt"];
    let ask = ["ask", "Who?", "--doc", "emma"];
    let cases: [(&[&str], &str, &str, &str); 17] = [
        (&encode, "--chunk", "-1", "1..=4096"),
        (&ask, "--temperature", "-1", "from 0 on"),
        (&["demo"], "--depth", "-0.5", "0 to 1"),
        (&encode, "--chunk", "0", "1..=4096"),
        (&encode, "--block-tokens", "0", "2..=1024"),
        (&encode, "--newest-blocks", "0", "1.."),
        (&ask, "--max-tokens", "0", "1.."),
        (&ask, "--sample-top-p", "3", "at most 1"),
        (&ask, "--temperature", "nan", "from 0 on"),
        (&["serve"], "--workers", "500", "1..=128"),
        (&["serve"], "--stall-ms", "0", "1.."),
        (&["index", "tune"], "--lookups", "0", "1..=16384"),
        (&["index", "tune"], "--recall", "2", "0 to 1"),
        (&["demo"], "--depth", "3", "0 to 1"),
        (&["demo"], "--tokens", "10", "1024..="),
        (&["blocks", "emma"], "--count", "0", "1.."),
        (&["bench", "lookup"], "--lookups", "0", "1.."),
    ];
    for (command, flag, found, range) in cases {
        let error = sandbox.run(&[command, &[flag, found]].concat()).exits(2).stderr;
        assert!(error.contains(flag) && error.contains(range), "{command:?} {flag} {found}: {error}");
    }
}

#[test]
fn completions_know_the_commands_and_a_reader_may_leave_early() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = sandbox.run(&["completions", shell]).exits(0).stdout;
        assert!(["verify", "token-head"].iter().all(|word| script.contains(word)), "{shell}: {script}");
    }
    assert_eq!(sandbox.run_with_closed_stdout(&["completions", "bash"]), Some(0));
}

#[test]
fn an_empty_memory_has_answers_too() {
    let sandbox = Sandbox::new();
    drop(LocalMemory::open(&sandbox.path("data")).unwrap());
    let data = ["--data", "data"];
    let listing = sandbox.run(&[&data[..], &["ls"]].concat()).exits(0).stdout;
    assert!(listing.contains("no collections yet"), "{listing}");
    let stats = sandbox.run(&[&data[..], &["stats", "--json"]].concat()).exits(0).json();
    assert_eq!((&stats["documents"], &stats["live_bytes"].is_u64()), (&0.into(), &true));
    let report = sandbox.run(&[&data[..], &["verify", "--json"]].concat()).exits(0).json();
    assert_eq!(report["faults"], serde_json::json!([]));
    assert_eq!(sandbox.run(&["model", "ls", "--json"]).exits(0).json()["models"], serde_json::json!([]));
}

#[test]
fn a_mistyped_data_directory_is_not_created() {
    let sandbox = Sandbox::new();
    let answer = sandbox.run(&["--data", "nowhere", "ls", "--json"]).exits(3);
    assert_eq!(answer.error_kind(), "not_found");
    assert!(!sandbox.path("nowhere").exists());
    // The default one does not exist either, in a new home.
    sandbox.run(&["ls"]).exits(3);
}

/// `ls` in a folder of documents left a lock, a catalog and segments there.
#[test]
fn a_folder_that_is_no_data_directory_is_left_alone() {
    let sandbox = Sandbox::new();
    sandbox.make_folder("docs");
    sandbox.write_file("docs/letter.txt", "mine");
    for typed in
        [&["ls"][..], &["show", "x"], &["blocks", "x"], &["stats"], &["verify"], &["rm", "x", "--yes"], &["repair"]]
    {
        let answer = sandbox.run(&[&["--data", "docs"], typed].concat()).exits(3);
        assert!(answer.stderr.contains("no data directory"), "{typed:?}: {}", answer.stderr);
        assert_eq!(std::fs::read_dir(sandbox.path("docs")).unwrap().count(), 1, "{typed:?}");
    }
}

/// The tiny model that comes along, and a sandbox with a text for it.
fn with_text(text: &str) -> (Sandbox, impl Fn(&Sandbox, i32, &[&str]) -> sandbox::Answer + use<>) {
    let sandbox = Sandbox::new();
    sandbox.write_file("text.txt", text);
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    (sandbox, move |sandbox, code, typed| {
        sandbox.run(&[typed, &["--model", model, "--data", "d"]].concat()).exits(code)
    })
}

/// An empty text took its name for ever, and was called already encoded.
#[test]
fn an_empty_text_is_refused_and_its_name_stays_free() {
    let (sandbox, run) = with_text("The ferry leaves at nine.");
    for empty in ["", " \n\t", "\u{feff}"] {
        sandbox.write_file("empty.txt", empty);
        let error = run(&sandbox, 1, &["encode", "empty.txt", "--name", "book"]).stderr;
        assert!(error.contains("empty.txt") && error.contains("no name is taken"), "{error}");
    }
    assert!(!sandbox.path("d").exists(), "nothing was made");
    run(&sandbox, 0, &["encode", "text.txt", "--name", "book"]);
}

/// `encode --name books/emma` made a document of that name in the collection `default`, which no other command found.
#[test]
fn a_name_is_collection_and_name_for_encode_too() {
    let (sandbox, run) = with_text("The ferry leaves at nine.");
    let said = run(&sandbox, 0, &["encode", "text.txt", "--name", "books/emma"]).stdout;
    assert!(said.contains("encoded books/emma:"), "{said}");
    let shown = sandbox.run(&["show", "books/emma", "--data", "d", "--json"]).exits(0).json();
    assert_eq!((&shown["document"]["name"], &shown["document"]["collection"]), (&"emma".into(), &"books".into()));
    run(&sandbox, 0, &["encode", "text.txt", "--name", "a/b", "--collection", "books"]);
    sandbox.run(&["show", "a/b", "--collection", "books", "--data", "d"]).exits(0);
}

/// What only the model can tell is a usage error as well.
#[test]
fn what_the_model_cannot_do_is_a_usage_error_too() {
    let (sandbox, run) = with_text("The ferry leaves at nine.");
    let cases =
        [("--window", "100000", "0 to 510"), ("--retrieve-layers", "40", "0 to 2"), ("--block-tokens", "16", "17")];
    for (flag, found, expected) in cases {
        let error = run(&sandbox, 2, &["encode", "text.txt", flag, found]).stderr;
        assert!(error.contains(&format!("{flag}: expected {expected}")), "{error}");
    }
}

/// A payload dtype that the collection does not have was said to be another model.
#[test]
fn a_collection_of_another_kind_says_what_differs() {
    let (sandbox, run) = with_text("The ferry leaves at nine.");
    run(&sandbox, 0, &["encode", "text.txt"]);
    let error = run(&sandbox, 6, &["encode", "text.txt", "--name", "other", "--payload", "int8"]).stderr;
    assert!(error.contains("collection default") && error.contains("f16 there, here it is int8"), "{error}");
}

/// The collection was made before the name of the document was found wanting.
#[test]
fn a_name_that_is_none_leaves_nothing_behind() {
    let (sandbox, run) = with_text("The ferry leaves at nine.");
    for name in ["", "/", "books/", "/emma", &"x".repeat(300)] {
        let error = run(&sandbox, 2, &["encode", "text.txt", "--name", name]).stderr;
        assert!(error.contains("--name: expected 1 to 255 bytes"), "{error}");
    }
    assert!(!sandbox.path("d").exists());
}

/// An interrupted encoding ended without a word of what was kept.
#[test]
fn an_interrupted_encoding_says_what_is_kept() {
    let (sandbox, run) = with_text(&"The ferry leaves at nine, and the bell rings twice. ".repeat(40_000));
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    let typed = ["encode", "text.txt", "--model", model, "--data", "d"];
    let child = sandbox.command(&typed).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let segment = sandbox.path("d/segments/0000000001.seg");
    let is_begun = || std::fs::metadata(&segment).is_ok_and(|file| file.len() > 100_000);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_begun() {
        assert!(Instant::now() < deadline, "nothing is written");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("default/text keeps its first") && said.contains("goes on from there"), "{said}");
    sandbox.write_file("text.txt", "Another text.");
    run(&sandbox, 1, &["encode", "text.txt"]);
}

/// A byte order mark became the first tokens, which every later token attends to.
#[test]
fn a_byte_order_mark_is_no_part_of_a_text() {
    let (sandbox, run) = with_text("\u{feff}The keeper is Harald.\u{feff}");
    run(&sandbox, 0, &["encode", "text.txt"]);
    let blocks = sandbox.run(&["blocks", "text", "--data", "d", "--json"]).exits(0).json();
    let text = blocks["blocks"].as_array().unwrap().iter().map(|block| block["text"].as_str().unwrap());
    assert_eq!(text.collect::<String>(), "The keeper is Harald.\u{feff}");
}

/// A question about a text that was encoded in part was answered from that part, without a word.
#[test]
fn a_document_that_is_not_whole_is_said_to_be() {
    let (sandbox, run) = with_text(&"The ferry leaves at nine, and the bell rings twice. ".repeat(20));
    run(&sandbox, 0, &["encode", "text.txt", "--name", "whole"]);
    // What an interrupted encoding leaves: the same blocks, not sealed.
    {
        let memory = LocalMemory::open(&sandbox.path("d")).unwrap();
        let collection = memory.collections().unwrap().remove(0);
        let whole = memory.documents(collection.id).unwrap().remove(0);
        let part = memory.open_document(collection.id, "part").unwrap();
        let request = FetchRequest { document: whole.id, blocks: vec![0, 1], dtype: DType::F16 };
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
    let typed = ["ask", "The ferry", "--raw", "--doc", "part", "--max-tokens", "2"];
    let table = run(&sandbox, 0, &typed).stdout;
    assert!(table.contains("default/part is open: only the 34 tokens that it has so far were read"), "{table}");
    let json = run(&sandbox, 0, &[&typed[..], &["--json"]].concat()).json();
    assert_eq!(json["incomplete"], serde_json::json!([{"document": "default/part", "tokens": 34}]));
    assert_eq!(
        run(&sandbox, 0, &["ask", "The ferry", "--raw", "--doc", "whole", "--json"]).json()["incomplete"]
            .as_array()
            .map(Vec::len),
        Some(0)
    );
}

/// A text could be taken to a service that a cloned repository names, and nothing was said of where a command worked.
#[test]
fn a_file_in_the_working_directory_decides_little_and_not_silently() {
    let (sandbox, _) = with_text("private");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    for hijack in ["connect = 'unix:evil.sock'", "[server]\nunix = 'evil.sock'", "[server]\nallow_remote = true"] {
        sandbox.write_file("landmarkdb.toml", hijack);
        let error = sandbox.run(&["encode", "text.txt", "--model", model]).exits(2).stderr;
        assert!(error.contains("landmarkdb.toml of the working directory") && error.contains("--config"), "{error}");
    }
    sandbox.write_file("landmarkdb.toml", "connect = 'unix:evil.sock'");
    sandbox.run(&["ls", "--config", "landmarkdb.toml"]).exits(4);

    sandbox.write_file("landmarkdb.toml", "data = 'here'");
    let said = sandbox.run(&["encode", "text.txt", "--model", model]).exits(0).stderr;
    assert!(said.contains("working directory decides") && said.contains("here"), "{said}");
    let quiet = sandbox.run(&["ls", "--json"]).exits(0).stderr;
    assert_eq!(quiet, "");
    let typed = sandbox.run(&["ls", "--data", "here"]).exits(0).stderr;
    assert_eq!(typed, "", "what was typed needs no word");
    // An empty variable is as good as none.
    let sandbox = sandbox.with_variable("LANDMARKDB__DATA", "").with_variable("RUST_LOG", "");
    assert_eq!(sandbox.run(&["ls", "--json"]).exits(0).json()["documents"][0]["name"], "text");
}

/// The one line of an error ran on with the frames and build paths of a backtrace.
#[test]
fn an_error_is_one_line_whatever_the_environment_asks_for() {
    let sandbox = Sandbox::new().with_variable("RUST_BACKTRACE", "1");
    sandbox.write_document("data", "books", "emma");
    let whole = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/models/tiny.gguf")).unwrap();
    std::fs::write(sandbox.path("cut.gguf"), &whole[..whole.len() / 2]).unwrap();
    sandbox.write_file("hello.gguf", "hello\n");
    for model in ["cut.gguf", "hello.gguf"] {
        let error =
            sandbox.run(&["ask", "hi", "--doc", "books/emma", "--data", "data", "--model", model]).exits(1).stderr;
        assert!(error.lines().count() == 1 && error.contains("fetch it again"), "{error}");
    }
}

/// A question about more documents than a lookup takes failed in the first layer, after the model had been loaded.
#[test]
fn too_many_documents_are_a_usage_error() {
    let sandbox = Sandbox::new();
    sandbox.write_document("data", "books", "emma");
    let names: Vec<String> = (0..1025).map(|note| format!("books/note-{note}")).collect();
    let ask = |names: &[String]| {
        let docs = names.iter().flat_map(|name| ["--doc", name]);
        let typed = ["ask", "hi", "--data", "data", "--model", "none.gguf"].into_iter().chain(docs);
        sandbox.run(&typed.collect::<Vec<&str>>())
    };
    let error = ask(&names).exits(2).stderr;
    assert!(error.contains("at most 1024") && error.contains("found 1025"), "{error}");
    // So many are looked for; one that is named again is one.
    let error = ask(&[&names[..1024], &names[..1]].concat()).exits(3).stderr;
    assert!(error.contains("books/note-0"), "{error}");
}

/// `landmarkdb ls` was advised where `--data` had been typed, and listed another directory.
#[test]
fn an_advised_command_works_where_the_user_does() {
    let sandbox = Sandbox::new();
    sandbox.write_document("my data", "books", "emma");
    let error = sandbox.run(&["show", "x", "--data", "my data"]).exits(3).stderr;
    assert!(error.contains("`landmarkdb ls --data 'my data'`"), "{error}");
    sandbox.damage("my data", b"test model");
    std::fs::remove_dir_all(sandbox.path("my data/catalog")).unwrap();
    let repaired = sandbox.run(&["repair", "--data", "my data"]).exits(5);
    assert!(repaired.stdout.contains("my data/torn") && !repaired.stdout.contains("DIR"), "{}", repaired.stdout);
}

#[test]
fn unknown_documents_are_not_found() {
    let sandbox = Sandbox::new();
    sandbox.write_document("data", "books", "emma");
    for command in ["show", "blocks", "verify", "rm"] {
        for doc in ["books/persuasion", "letters/emma", "emma"] {
            let answer = sandbox.run(&["--data", "data", command, doc, "--json"]).exits(3);
            assert_eq!(answer.error_kind(), "not_found", "{command} {doc}");
        }
    }
}

#[test]
fn a_document_is_listed_shown_and_removed() {
    let sandbox = Sandbox::new();
    sandbox.write_document("data", "books", "emma");
    let run = |args: &[&str]| sandbox.run(&[&["--data", "data"], args].concat());

    let listing = run(&["ls", "--json"]).exits(0).json();
    assert_eq!(listing["collections"][0]["name"], "books");
    let document = &listing["documents"][0];
    assert_eq!(
        (&document["name"], &document["blocks"], &document["tail_tokens"]),
        (&"emma".into(), &2.into(), &1.into())
    );
    run(&["ls", "--collection", "letters"]).exits(3);
    assert!(run(&["ls"]).exits(0).stdout.contains("books/emma"));

    let shown = run(&["show", "emma", "--collection", "books", "--json"]).exits(0).json();
    assert_eq!(shown["document"], *document);
    assert_eq!(shown["collection"]["fingerprint"].as_str().map(str::len), Some(64));

    let blocks = run(&["blocks", "books/emma", "--json"]).exits(0).json();
    let text: String =
        blocks["blocks"].as_array().unwrap().iter().map(|block| block["text"].as_str().unwrap()).collect();
    assert_eq!(text, sandbox::TEXT);
    assert_eq!(blocks["blocks"][2]["tail"], true);
    let second = run(&["blocks", "books/emma", "--start", "1", "--count", "1", "--json"]).exits(0).json();
    assert_eq!(second["blocks"], serde_json::json!([blocks["blocks"][1]]));
    let none = run(&["blocks", "books/emma", "--start", "7"]).exits(0).stdout;
    assert!(none.contains("books/emma has 3 blocks, none from 7 on"), "{none}");
    let stats = run(&["stats"]).exits(0).stdout;
    assert!(stats.contains("2 and 1 tail"), "{stats}");

    let verified = run(&["verify", "books/emma"]).exits(0).stdout;
    assert!(verified.contains("3 blocks and tails") && verified.contains("all is well"), "{verified}");
    let error = run(&["rm", "books/emma"]).exits(2).stderr;
    assert!(error.contains("--yes"), "{error}");
    assert_eq!(run(&["rm", "books/emma", "--yes", "--json"]).exits(0).json()["blocks"], 2);
    run(&["show", "books/emma"]).exits(3);
}

#[test]
fn a_collection_says_which_engine_answers() {
    let sandbox = Sandbox::new();
    sandbox.write_document("data", "books", "emma");
    let run = |args: &[&str]| sandbox.run(&[&["--data", "data", "--collection", "books"], args].concat());
    let engine = || run(&["ls", "--json"]).exits(0).json()["collections"][0]["engine"].clone();
    assert_eq!(engine(), "flat");
    assert_eq!(run(&["index", "set", "sq8", "--json"]).exits(0).json()["engine"], "sq8");
    assert_eq!(engine(), "sq8");
    run(&["index", "set", "hnsw"]).exits(2);
    let error = run(&["index", "set", "faiss:Flot"]).exits(1).stderr;
    assert!(error.contains("Flot") && (cfg!(feature = "faiss") || error.contains("--features faiss")), "{error}");
    assert_eq!(engine(), "sq8");
    if !cfg!(feature = "cuda") {
        let error = run(&["index", "set", "cuda"]).exits(1).stderr;
        assert!(error.contains("--features cuda"), "{error}");
        assert_eq!(engine(), "sq8");
    }
    sandbox.run(&["--data", "data", "--collection", "letters", "index", "set", "flat"]).exits(3);

    let tuned = run(&["index", "tune", "--lookups", "5", "--json"]).exits(0).json();
    let measured = tuned["measured"].as_array().unwrap();
    let engines: Vec<_> = measured.iter().map(|measured| measured["engine"].as_str().unwrap()).collect();
    assert_eq!(engines[..3], ["flat", "sq4", "sq8"]);
    assert!(measured.iter().all(|measured| measured["recall"] == 1.0), "{tuned}");
    assert_eq!(engine(), tuned["engine"]);
    run(&["rm", "emma", "--yes"]).exits(0);
    let error = run(&["index", "tune"]).exits(3).stderr;
    assert!(error.contains("with a full block"), "{error}");
    assert_eq!(engine(), tuned["engine"], "a measurement that fails changes nothing");
}

#[test]
fn lookups_are_measured_by_every_way_and_found_right() {
    let sandbox = Sandbox::new();
    let sizes = "--blocks 40 --head-dim 8 --kv-heads 2 --query-heads 4 --keys-per-block 3 --lookups 3".split(' ');
    let ways = ["--ways", "tcp,unix", "--attend", "--json"];
    let typed: Vec<&str> = ["bench", "lookup"].into_iter().chain(sizes).chain(ways).collect();
    let measured = sandbox.run(&typed).exits(0).json();
    let results = measured["results"].as_array().unwrap();
    // f16 with both engines and int8, in process and two ways more, lookups and attends.
    assert_eq!(results.len(), 3 * 3 * 2);
    for result in results {
        let recall = result["recall"].as_f64().unwrap();
        assert!(recall == 1.0 || (recall > 0.9 && result["key_dtype"] == "int8"), "{result}");
        assert!(result["p99_us"].as_f64() >= result["p50_us"].as_f64(), "{result}");
    }
    if !cfg!(feature = "cuda") {
        let measured = sandbox.run(&[&typed[..], &["--engines", "flat,cuda"]].concat()).exits(0).json();
        assert_eq!(measured["results"].as_array().map(Vec::len), Some(2 * 3 * 2));
        assert_eq!(measured["skipped"][0]["engine"], "cuda");
    }

    sandbox.write_file("peer", "#!/bin/sh\necho '{\"peer\": \"other\", \"skipped\": \"not here\"}'\n");
    let peer = sandbox.path("peer");
    std::fs::set_permissions(&peer, std::fs::Permissions::from_mode(0o755)).unwrap();
    let with_peer = [&typed[..], &["--peers", "other", "--python", peer.to_str().unwrap()]].concat();
    assert_eq!(sandbox.run(&with_peer).exits(0).json()["peers"][0]["skipped"], "not here");
    let error = sandbox.run(&[&typed[..], &["--peers", "other", "--python", "./absent"]].concat()).exits(1).stderr;
    assert!(error.contains("--python"), "{error}");
    let error = sandbox.run(&["bench", "lookup", "--captured", "peer"]).exits(1).stderr;
    assert!(error.contains("landmarkdb capture"), "{error}");
}

#[test]
fn payload_reads_are_measured() {
    let sandbox = Sandbox::new();
    let typed = "bench payload --blocks 4 --block-tokens 4 --head-dim 8 --batch 5 --batches 3 --json".split(' ');
    let measured = sandbox.run(&typed.collect::<Vec<_>>()).exits(0).json();
    let results: Vec<_> = measured["results"].as_array().unwrap().iter().map(|result| &result["what"]).collect();
    let of_pages = ["store", "store-ahead", "pread", "store", "pread"];
    assert_eq!(results, [of_pages, of_pages].concat(), "warm and cold, by one thread and by two");
    assert_eq!(measured["piece_bytes"], 4 * 8 * 2 * 2);
}

/// A model that sees all of a text in its window asks nothing; a lookup in what was captured of it divided by zero.
#[test]
fn a_capture_without_queries_is_refused() {
    let sandbox = Sandbox::new();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    sandbox.run(&["capture", "few", "--model", model, "--tokens", "256", "--queries", "2", "--window", "510"]).exits(0);
    let error = sandbox.run(&["bench", "lookup", "--captured", "few"]).exits(1).stderr;
    assert!(error.contains("longer than the window"), "{error}");
}

#[test]
fn a_report_runs_every_benchmark_and_writes_the_page() {
    let sandbox = Sandbox::new();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
    let typed = ["bench", "report", "--quick", "--out", "page.md", "--json", "--python", "./absent", "--model"];
    let absent = sandbox.run(&[&typed[..], &[model]].concat()).exits(1).stderr;
    assert!(absent.contains("--python"), "{absent}");
    assert!(!sandbox.path("page.md").exists(), "a page is written whole or not at all");

    // A Python in which no peer is installed.
    sandbox.write_file("python", "#!/bin/sh\necho '{\"peer\": \"other\", \"skipped\": \"not here\"}'\n");
    std::fs::set_permissions(sandbox.path("python"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let typed = typed.map(|word| if word == "./absent" { "./python" } else { word });
    let report = sandbox.run(&[&typed[..], &[model]].concat()).exits(0).json();
    let sections = report["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 7);
    let page = std::fs::read_to_string(sandbox.path("page.md")).unwrap();
    for section in sections {
        for command in section["commands"].as_array().unwrap() {
            assert!(page.contains(&format!("\n$ {}\n", command.as_str().unwrap())), "{command} in\n{page}");
        }
    }
    let mut words = page.split(|letter: char| !letter.is_alphanumeric());
    assert!(!words.any(|word| word == "NaN" || word == "inf"), "{page}");
    assert!(page.contains("other: not here"), "{page}");
    let reopened = sections[6]["figures"]["first_tokens"].as_array().unwrap();
    let pages =
        |pages: &str| reopened.iter().filter(|row| row["pages"] == pages && row["tokens"].as_u64() > Some(0)).count();
    assert_eq!((pages("warm"), pages("cold")), (2, 2), "two lengths: {reopened:?}");
    let within = |row: &serde_json::Value| row["reopen_ms"].as_f64() < row["first_token_ms"].as_f64();
    assert!(reopened.iter().all(within), "{reopened:?}");
}

/// With nine files the runtime panicked; with seventeen the service listened and let nobody in.
#[test]
fn a_service_needs_some_open_files() {
    let sandbox = Sandbox::new();
    let serve = format!("ulimit -n 20; exec {} serve --data d --listen 127.0.0.1:0", env!("CARGO_BIN_EXE_landmarkdb"));
    let output = std::process::Command::new("sh").args(["-c", &serve]).current_dir(sandbox.path("")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("at most 20 files may be open"), "{said}");
}

#[test]
fn a_damaged_document_is_reported_and_named() {
    let sandbox = Sandbox::new();
    let id = sandbox.write_document("data", "books", "emma");
    sandbox.damage_text("data");
    let answer = sandbox.run(&["--data", "data", "verify", "--json"]).exits(5);
    assert_eq!(answer.error_kind(), "damaged");
    assert_eq!(answer.json()["faults"][0]["document"], id);
}

/// One damaged block hid all others, and a question about it named ids and advised a repair that could not help.
#[test]
fn the_blocks_beside_a_damaged_one_are_listed_and_it_is_named() {
    let (sandbox, run) = with_text(&"The ferry leaves at nine, and the bell rings twice. ".repeat(20));
    run(&sandbox, 0, &["encode", "text.txt"]);
    let all = sandbox.run(&["blocks", "text", "--data", "d", "--json"]).exits(0).json();
    let first = all["blocks"][0]["text"].as_str().unwrap();
    sandbox.damage("d", first.as_bytes());
    let listed = sandbox.run(&["blocks", "text", "--data", "d", "--json"]).exits(5).json();
    let rest = all["blocks"].as_array().unwrap().len() - 1;
    assert_eq!((listed["blocks"].as_array().unwrap().len(), &listed["damaged"][0]["index"]), (rest, &0.into()));
    let table = sandbox.run(&["blocks", "text", "--data", "d"]).exits(5).stdout;
    assert!(table.lines().nth(1).is_some_and(|row| row.contains("damaged: checksum mismatch")), "{table}");
    for _ in 0..2 {
        let error = run(&sandbox, 5, &["ask", "The ferry", "--raw", "--doc", "text", "--max-tokens", "2"]).stderr;
        assert!(error.contains("block 0 of default/text") && error.contains("landmarkdb rm default/text"), "{error}");
        sandbox.run(&["repair", "--data", "d"]).exits(5);
    }
}

#[test]
fn engines_that_would_compress_int8_keys_are_said_to_be_flat() {
    let (sandbox, run) = with_text("The ferry leaves at nine.");
    run(&sandbox, 0, &["encode", "text.txt", "--key-rule", "tokens"]);
    let said = sandbox.run(&["index", "set", "sq8", "--data", "d"]).exits(0).stdout;
    assert!(said.contains("answered by sq8, which is the same as flat"), "{said}");
    let said = sandbox.run(&["index", "set", "flat", "--data", "d"]).exits(0).stdout;
    assert!(!said.contains("the same as"), "{said}");
}

#[test]
fn a_whole_directory_is_verified_against_a_rebuild_and_repaired_to_itself() {
    let sandbox = Sandbox::new();
    sandbox.write_document("data", "books", "emma");
    let run = |args: &[&str]| sandbox.run(&[&["--data", "data"], args].concat());
    assert_eq!(run(&["verify", "--rebuild", "--json"]).exits(0).json()["faults"], serde_json::json!([]));
    let compared = run(&["verify", "--rebuild"]).exits(0).stdout;
    assert!(compared.contains("catalog compared with a rebuilt one: all is well"), "{compared}");
    run(&["verify", "books/emma", "--rebuild"]).exits(2);
    let listed = run(&["ls", "--json"]).exits(0).json();
    let repaired = run(&["repair", "--json"]).exits(0).json();
    assert_eq!((&repaired["lost"], &repaired["salvaged"]), (&false.into(), &serde_json::json!([])));
    assert_eq!(run(&["ls", "--json"]).exits(0).json(), listed);
    let service = sandbox.serve(&["serve", "--data", "data", "--listen", "127.0.0.1:0", "--json"]);
    let target = service.target();
    sandbox.run(&["--connect", target, "verify", "--rebuild"]).exits(0);
    assert_eq!(sandbox.run(&["--connect", target, "repair", "--json"]).exits(2).error_kind(), "usage");
    assert_eq!(run(&["repair", "--json"]).exits(4).error_kind(), "unavailable");
}

/// What is damaged itself cannot be made whole; it is named, and the exit code says so, each time.
#[test]
fn a_repair_says_what_is_gone() {
    let sandbox = Sandbox::new();
    let id = sandbox.write_document("data", "books", "emma");
    sandbox.write_document("data", "books", "persuasion");
    sandbox.damage_text("data");
    for _ in 0..2 {
        let answer = sandbox.run(&["--data", "data", "repair", "--json"]).exits(5);
        assert_eq!(answer.error_kind(), "damaged");
        let gone = &answer.json()["gone"][0];
        assert_eq!((&gone["document"], &gone["block"]), (&id.into(), &0.into()));
    }
    let answer = sandbox.run(&["--data", "data", "repair"]).exits(5);
    assert!(answer.stdout.contains("not readable any more: 1 block of books/emma"), "{}", answer.stdout);
    assert!(answer.stdout.contains("books/emma") && answer.stderr.contains("landmarkdb rm"), "{}", answer.stdout);
}

#[test]
fn a_lost_collection_is_put_back_from_what_was_printed_of_it() {
    let sandbox = Sandbox::new();
    for (data, printer) in [("one", &["ls", "--json"][..]), ("other", &["show", "books/emma", "--json"][..])] {
        sandbox.write_document(data, "books", "emma");
        let run = |args: &[&str]| sandbox.run(&[&["--data", data], args].concat());
        sandbox.write_file("spec.json", &run(printer).exits(0).stdout);
        let listed = run(&["ls", "--json"]).exits(0).json();
        sandbox.damage(data, b"test model");
        std::fs::remove_dir_all(sandbox.path(data).join("catalog")).unwrap();
        let lost = run(&["repair", "--json"]).exits(5).json();
        assert_eq!(lost["missing_collections"][0]["blocks"], 3, "{lost}");
        assert_eq!(run(&["ls", "--json"]).exits(0).json()["documents"], serde_json::json!([]));

        let text = std::fs::read_to_string(sandbox.path("spec.json")).unwrap();
        sandbox.write_file("changed.json", &text.replace("\"block_tokens\":4", "\"block_tokens\":8"));
        let refused = run(&["repair", "--collection-spec", "changed.json"]).exits(2).stderr;
        assert!(refused.contains("fingerprint"), "{refused}");
        let repaired = run(&["repair", "--collection-spec", "spec.json", "--json"]).exits(0).json();
        assert_eq!(repaired["collections"], serde_json::json!([listed["collections"][0]["id"]]));
        assert_eq!(run(&["ls", "--json"]).exits(0).json(), listed);
        run(&["verify", "--rebuild"]).exits(0);
    }
}

#[test]
fn settings_come_from_the_file_then_the_environment_then_flags() {
    let sandbox = Sandbox::new();
    for folder in ["from-file", "from-environment", "from-flag"] {
        sandbox.write_document(folder, folder, "emma");
    }
    let listed = |sandbox: &Sandbox, args: &[&str]| {
        let listing = sandbox.run(&[args, &["ls", "--json"]].concat()).exits(0).json();
        listing["collections"][0]["name"].as_str().unwrap().to_string()
    };
    sandbox.write_file("landmarkdb.toml", "data = 'from-file'\n");
    assert_eq!(listed(&sandbox, &[]), "from-file");
    let sandbox = sandbox.with_variable("LANDMARKDB__DATA", "from-environment");
    assert_eq!(listed(&sandbox, &[]), "from-environment");
    assert_eq!(listed(&sandbox, &["--data", "from-flag"]), "from-flag");

    sandbox.write_file("other.toml", "colection = 'books'\n");
    let error = sandbox.run(&["--config", "other.toml", "ls"]).exits(2).stderr;
    assert!(error.contains("other.toml") && error.contains("colection"), "{error}");
    sandbox.run(&["--config", "absent.toml", "ls"]).exits(2);
}

#[test]
fn a_directory_has_one_owner_at_a_time_and_others_ask_the_service() {
    let sandbox = Sandbox::new();
    sandbox.write_document("data", "books", "emma");
    let direct = sandbox.run(&["--data", "data", "ls", "--json"]).exits(0).json();
    let service = sandbox.serve(&["--data", "data", "serve", "--listen", "127.0.0.1:0", "--unix", "s", "--json"]);
    assert_eq!(service.listening.len(), 2);

    let answer = sandbox.run(&["--data", "data", "ls", "--json"]).exits(4);
    assert_eq!(answer.error_kind(), "unavailable");
    sandbox.run(&["--data", "data", "serve", "--listen", "127.0.0.1:0"]).exits(4);
    for target in &service.listening {
        assert_eq!(sandbox.run(&["--connect", target, "ls", "--json"]).exits(0).json(), direct, "{target}");
        sandbox.run(&["--connect", target, "show", "books/persuasion"]).exits(3);
    }
    sandbox.run(&["--connect", service.target(), "rm", "books/emma", "--yes"]).exits(0);

    let gone = service.target().to_string();
    assert_eq!(service.stop().code(), Some(0));
    assert_eq!(sandbox.run(&["--connect", &gone, "ls", "--json"]).exits(4).error_kind(), "unavailable");
    let after = sandbox.run(&["--data", "data", "ls", "--json"]).exits(0).json();
    assert_eq!(after["documents"], serde_json::json!([]));
}

#[test]
fn a_taken_port_is_unavailable() {
    let sandbox = Sandbox::new();
    let service = sandbox.serve(&["--data", "one", "serve", "--listen", "127.0.0.1:0", "--json"]);
    let address = service.target().trim_start_matches("http://");
    let error = sandbox.run(&["--data", "two", "serve", "--listen", address]).exits(4).stderr;
    assert!(error.contains(address), "{error}");
    assert_eq!(service.stop().code(), Some(0));
}
