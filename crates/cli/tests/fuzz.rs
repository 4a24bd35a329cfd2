//! Do the corpora hold, and what lies next to them? Every input of `fuzz/corpus/` goes through its target, and so do inputs made
//! of them by chance: `LANDMARKDB_FUZZ` says how many for each target, `LANDMARKDB_FUZZ_SEED` where to begin.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use landmarkdb::store::fuzz::seeds as store;
use landmarkdb::{
    AppendRequest, AttendRequest, BlockRange, BlockScore, CollectionId, DType, DocumentId, Engine, FetchRequest,
    Granularity, KeyRule, LookupRequest, Normalisation, Placement, SequenceState,
};
use landmarkdb_grpc::wire::fuzz::{Request, seeds as wire};
use landmarkdb_llm::fuzz::seeds as model;

#[path = "../../../fuzz/src/targets.rs"]
mod targets;

type Target = fn(&[u8]) -> bool;

const TARGETS: [(&str, Target); 9] = [
    ("adapter", targets::adapter),
    ("archive", targets::archive),
    ("gguf", targets::gguf),
    ("record", targets::record),
    ("reply", targets::reply),
    ("request", targets::request),
    ("safetensors", targets::safetensors),
    ("segment", targets::segment),
    ("tokenizer", targets::tokenizer),
];

/// What a clone has to carry.
const INPUT_BYTES_MAX: usize = 64 << 10;
const CORPORA_BYTES_MAX: usize = 1 << 20;

/// Inputs made by chance, for each target.
const CHANGED: usize = 500;

/// Bytes that lengths, counts and kinds end at.
const EDGES: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz").join(name)
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder("corpus").join(target)).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Runs a target; a panic in it is one that names the input.
fn run(target: Target, bytes: &[u8], input: impl FnOnce() -> String) -> bool {
    catch_unwind(AssertUnwindSafe(|| target(bytes))).unwrap_or_else(|_| panic!("the target panicked on {}", input()))
}

#[test]
fn every_target_has_a_corpus() {
    let names = |of: &str, suffix: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(folder(of)).unwrap().map(|entry| entry.unwrap().file_name());
        entries.map(|name| name.to_str().unwrap().strip_suffix(suffix).unwrap().to_string()).collect()
    };
    let known = TARGETS.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(names("fuzz_targets", ".rs"), known, "fuzz/fuzz_targets, and what is replayed");
    assert_eq!(names("corpus", ""), known, "fuzz/corpus, and what is replayed");
    let bytes: usize = TARGETS.iter().flat_map(|(name, _)| corpus(name)).map(|(_, bytes)| bytes.len()).sum();
    assert!(bytes <= CORPORA_BYTES_MAX, "{bytes} bytes: run `cargo fuzz cmin`");
}

/// Of each corpus some inputs are what they pose as, so that a change of a format does not leave inputs that are all refused at
/// their first byte.
#[test]
fn corpora_hold() {
    for (name, target) in TARGETS {
        let inputs = corpus(name);
        let input_bytes = inputs.iter().map(|(_, bytes)| bytes.len()).max();
        assert!(input_bytes.is_some_and(|bytes| bytes <= INPUT_BYTES_MAX), "{name}: {input_bytes:?}");
        let whole = inputs.iter().filter(|(path, bytes)| run(target, bytes, || path.display().to_string())).count();
        assert!(whole > 0 && whole < inputs.len(), "{name}: of {} inputs {whole} are what they pose as", inputs.len());
    }
}

#[test]
fn what_lies_next_to_the_corpora_holds() {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|number| number.parse().ok());
    let (count, seed) = (number("LANDMARKDB_FUZZ").unwrap_or(CHANGED), number("LANDMARKDB_FUZZ_SEED").unwrap_or(1));
    println!("LANDMARKDB_FUZZ={count} LANDMARKDB_FUZZ_SEED={seed}");
    for (name, target) in TARGETS {
        let inputs: Vec<Vec<u8>> = corpus(name).into_iter().map(|(_, bytes)| bytes).collect();
        for number in seed..seed + count {
            let mut random = ChaCha8Rng::seed_from_u64(number as u64);
            let bytes = changed(&inputs, &mut random);
            run(target, &bytes, || {
                let path = folder("artifacts").join(name).join(format!("changed-{number}"));
                fs::create_dir_all(folder("artifacts").join(name)).unwrap();
                fs::write(&path, &bytes).unwrap();
                path.display().to_string()
            });
        }
    }
}

/// Inputs to begin with, where a format has changed: written beside those that are there.
#[test]
#[ignore = "writes to fuzz/corpus"]
fn seeds_are_written() {
    let seeds = [
        ("adapter", model::adapters()),
        ("archive", model::archives()),
        ("gguf", model::gguf()),
        ("record", store::records()),
        ("reply", wire::replies(&targets::spec("tokens", KeyRule::Tokens, DType::Int8), &targets::block(0, 2))),
        ("request", requests()),
        ("safetensors", model::safetensors()),
        ("segment", store::segments()),
        ("tokenizer", model::tokenizers()),
    ];
    for (target, inputs) in seeds {
        fs::create_dir_all(folder("corpus").join(target)).unwrap();
        for (number, bytes) in inputs.iter().enumerate() {
            fs::write(folder("corpus").join(target).join(format!("seed-{number:02}")), bytes).unwrap();
        }
    }
}

/// Calls of every method, one by one and one after the other.
fn requests() -> Vec<Vec<u8>> {
    let (one, two) = (CollectionId(1), CollectionId(2));
    let (long, landmarks, sealed, empty) = (DocumentId(1), DocumentId(2), DocumentId(3), DocumentId(4));
    let lookup = |collection, document, end, granularity| LookupRequest {
        collection,
        layer: 0,
        queries: (0..16).map(|i| i as f32 / 4.0 - 2.0).collect(),
        distances: vec![0, 1],
        scope: vec![BlockRange { document, blocks: 0..end }],
        top_k: 2,
        block_score: BlockScore::Max,
        granularity,
    };
    let attend = |collection, document, normalisation| AttendRequest {
        lookup: lookup(collection, document, 3, Granularity::KvGroup),
        normalisation,
        // The third kind stands for the other placement too.
        placement: match normalisation {
            Normalisation::Hidden => Placement::Original { within_tokens: 9 },
            _ => Placement::Slots,
        },
        without_first_tokens: normalisation == Normalisation::Plain,
    };
    let more = |document, blocks, expected_tokens| AppendRequest { document, blocks, expected_tokens };
    let mut spec = targets::spec("new", KeyRule::Mean, DType::BF16);
    spec.key_dtype = DType::F16;
    let calls = [
        (0, Request::Append(targets::append(empty, 2, 1))),
        (1, Request::Lookup(lookup(one, long, 3, Granularity::TokenHead))),
        (2, Request::Attend(attend(one, long, Normalisation::Plain))),
        (0, Request::Append(more(long, vec![targets::block(3, 2), targets::block(4, 1)], Some(7)))),
        (
            3,
            Request::AttendAll(vec![
                attend(two, landmarks, Normalisation::Grouped),
                attend(one, long, Normalisation::Hidden),
            ]),
        ),
        (4, Request::Lookup(lookup(two, landmarks, 2, Granularity::Shared))),
        (5, Request::Attend(attend(two, landmarks, Normalisation::Hidden))),
        (6, Request::Fetch(FetchRequest { document: long, blocks: vec![3, 0, 0], dtype: DType::F16 })),
        (7, Request::OpenCollection(spec)),
        (10, Request::OpenDocument(CollectionId(3), "first".into())),
        (0, Request::Append(targets::append(DocumentId(5), 1, 1))),
        (8, Request::ListCollections),
        (9, Request::SetEngine(two, Engine::Sq4)),
        (1, Request::Lookup(lookup(two, landmarks, 3, Granularity::Token))),
        (11, Request::ListDocuments(one)),
        (12, Request::GetDocument(sealed)),
        (18, Request::PutState(long, SequenceState { tokens: 7, parts: vec![vec![1; 20].into()] })),
        (19, Request::GetStatePart(long, 0)),
        (13, Request::SealDocument(long)),
        (14, Request::ListBlocks(BlockRange { document: long, blocks: 1..9 })),
        (15, Request::DeleteDocument(landmarks)),
        (10, Request::OpenDocument(one, sealed.replacement_name())),
        (20, Request::ReplaceDocument(sealed, DocumentId(6))),
        (16, Request::GetStats),
        (17, Request::Verify(Some(long))),
    ];
    let framed: Vec<Vec<u8>> = calls
        .iter()
        .map(|(method, request)| {
            let message = wire::message(*method, request);
            [&[*method][..], &(message.len() as u16).to_le_bytes(), &message].concat()
        })
        .collect();
    let together = framed.chunks(targets::REQUESTS_MAX).map(<[Vec<u8>]>::concat);
    together.chain(framed.iter().cloned()).collect()
}

/// One of the inputs with a few changes.
fn changed(inputs: &[Vec<u8>], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = inputs[random.random_range(0..inputs.len())].clone();
    for _ in 0..random.random_range(1..=4) {
        let at = random.random_range(0..=bytes.len());
        let until = bytes.len().min(at + random.random_range(0..64));
        match random.random_range(0..6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..until)),
            2 => bytes.splice(at..at, bytes[at..until].to_vec()).for_each(drop),
            3 => {
                let other = &inputs[random.random_range(0..inputs.len())];
                bytes.splice(at.., other[at.min(other.len())..].iter().copied()).for_each(drop);
            }
            4 => bytes[at..until].iter_mut().take(8).for_each(|byte| *byte = EDGES[random.random_range(0..6)]),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.random_range(0..8)),
        }
    }
    bytes
}
