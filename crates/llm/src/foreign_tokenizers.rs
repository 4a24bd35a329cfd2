//! Tokenizers inside GGUF files give the ids that llama.cpp gives, and the text comes back from them.
//!
//! `tests/fixtures/models/sentencepiece.json` is a small vocabulary that SentencePiece 0.2.3 was trained to, with the ids that
//! llama.cpp gives to texts, without and with `add_space_prefix`. `pre-tokenizers.json` has the pieces that one text is cut into
//! by each kind of `tokenizer.ggml.pre`, by the Python package tokenizers 0.23.3, whose regular expressions are Oniguruma's.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::foreign_files::{Parts, fixture};
use super::*;

/// The width of the tiny model.
const HIDDEN: usize = 32;

#[derive(Deserialize)]
struct SentencePiece {
    tokens: Vec<String>,
    scores: Vec<f32>,
    token_type: Vec<i32>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    after_space: Vec<u32>,
}

fn read<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn setting(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

impl SentencePiece {
    fn parts(&self) -> Parts {
        let tokens = self.tokens.iter().map(|token| Value::String(token.clone())).collect();
        let scores = self.scores.iter().map(|&score| Value::F32(score)).collect();
        let types = self.token_type.iter().map(|&kind| Value::I32(kind)).collect();
        let embedding = Tensor::zeros((self.tokens.len(), HIDDEN), DType::F32, &Device::Cpu).unwrap();
        Parts::new()
            .without(&setting("pre"))
            .without(&setting("merges"))
            .without(&setting("add_bos_token"))
            .set(&setting("model"), Value::String("llama".into()))
            .set(&setting("tokens"), Value::Array(tokens))
            .set(&setting("scores"), Value::Array(scores))
            .set(&setting("token_type"), Value::Array(types))
            .set(&setting("bos_token_id"), Value::U32(1))
            .with_tensor("token_embd.weight", embedding)
    }
}

fn sentencepiece(space_first: bool) -> Tokenizer {
    let parts = read::<SentencePiece>("sentencepiece.json").parts();
    parts.set(&setting("add_space_prefix"), Value::Bool(space_first)).open().unwrap().tokenizer
}

#[test]
fn sentencepiece_gives_the_recorded_ids() {
    let fixture: SentencePiece = read("sentencepiece.json");
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("tokenizer.json");
    for space_first in [false, true] {
        let tokenizer = sentencepiece(space_first);
        std::fs::write(&json, tokenizer.to_json(None).unwrap()).unwrap();
        let from_json = Tokenizer::open(&json).unwrap();
        for case in &fixture.cases {
            let encoded = tokenizer.encode(&case.text).unwrap();
            let want = if space_first { &case.after_space } else { &case.ids };
            assert_eq!(&encoded.ids, want, "{:?}, a space first: {space_first}", case.text);
            assert_eq!(encoded, from_json.encode(&case.text).unwrap(), "{:?} after a tokenizer.json", case.text);
        }
        // The begin-of-text token goes without saying.
        assert_eq!((tokenizer.prefix(), from_json.prefix()), (&[1][..], &[1][..]));
    }
    // So does the space.
    let silent = fixture.parts().open().unwrap().tokenizer;
    assert_eq!(silent.encode("a").unwrap(), sentencepiece(true).encode("a").unwrap());
}

#[test]
fn each_kind_of_pre_tokenizer_cuts_as_recorded() {
    #[derive(Deserialize)]
    struct Recorded {
        text: String,
        pieces: BTreeMap<String, Vec<String>>,
    }
    let recorded: Recorded = read("pre-tokenizers.json");
    let same = [
        ("llama3", "llama-bpe"),
        ("llama-v3", "llama-bpe"),
        ("falcon3", "llama-bpe"),
        ("smaug-bpe", "dbrx"),
        ("deepseek-r1-qwen", "qwen2"),
        ("megrez", "qwen2"),
        ("refact", "smollm"),
        ("starcoder", "smollm"),
    ];
    let names = recorded.pieces.keys().map(|name| (name.as_str(), name.as_str())).chain(same);
    let mut seen = Vec::new();
    for (name, recorded_as) in names {
        let mut text = PreTokenizedString::from(recorded.text.as_str());
        pre_tokenizers::by_name(name).unwrap().wrapper().unwrap().pre_tokenize(&mut text).unwrap();
        let pieces = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let pieces: Vec<&str> = pieces.into_iter().map(|(_, (start, end), _)| &recorded.text[start..end]).collect();
        assert_eq!(pieces, recorded.pieces[recorded_as], "{name}");
        seen.push(name);
    }
    let known = pre_tokenizers::names();
    assert!(known.split(", ").all(|name| seen.contains(&name)), "{known}: nothing is recorded for one of them");
}

/// Any text comes back from its tokens, and these cover it.
#[test]
fn texts_come_back_from_their_tokens() {
    let fragments = [
        " ",
        "  ",
        "\n",
        "\n\n\n",
        "\t",
        "\r\n",
        "the ",
        "he",
        "It's",
        "ÉCOLE",
        "e\u{301}",
        "猫",
        "🙂",
        "\0",
        "7",
        "12345",
        "<td>",
        "<s>",
        "</s>",
        "<0x0A>",
        "_",
        "...",
        "//",
        "\u{a0}",
        "\u{10ffff}",
        "Kellynch",
        "ǅ",
    ];
    let byte_level = |pre: &str| {
        let parts = Parts::new().set(&setting("pre"), Value::String(pre.into()));
        parts.set(&setting("add_bos_token"), Value::Bool(false)).open().unwrap().tokenizer
    };
    let names = pre_tokenizers::names();
    let mut tokenizers: Vec<(&str, Tokenizer)> = names.split(", ").map(|name| (name, byte_level(name))).collect();
    tokenizers.push(("SentencePiece", sentencepiece(false)));
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for _ in 0..300 {
        let pieces = rng.random_range(0..12);
        let text: String = (0..pieces).map(|_| fragments[rng.random_range(0..fragments.len())]).collect();
        for (name, tokenizer) in &tokenizers {
            let encoded = tokenizer.encode(&text).unwrap();
            assert_eq!(tokenizer.decode(&encoded.ids), text, "{name}");
            let mut end = 0;
            for (&id, &offset) in encoded.ids.iter().zip(&encoded.offsets) {
                assert_eq!(offset, end, "{name}: {text:?}");
                end += tokenizer.token_bytes(id).len();
            }
            assert_eq!((end, encoded.offsets.len()), (text.len(), encoded.ids.len()), "{name}: {text:?}");
        }
    }
}

/// A space that the first token brings along is no part of the text, one that follows a user-defined token neither.
#[test]
fn offsets_leave_out_the_spaces_that_no_text_has() {
    let tokenizer = sentencepiece(true);
    for (text, offsets) in [("the the", vec![0, 3]), ("<td>the<td>", vec![0, 4, 7])] {
        let encoded = tokenizer.encode(text).unwrap();
        assert_eq!(encoded.offsets, offsets, "{text}: {:?}", encoded.ids);
        assert_eq!(tokenizer.decode(&encoded.ids).replace(' ', ""), text.replace(' ', ""));
    }
}

/// Control tokens have no part in a text, whatever the type of those that end one.
#[test]
fn a_text_that_spells_control_tokens_stays_text() {
    let mut fixture: SentencePiece = read("sentencepiece.json");
    fixture.token_type[2] = 4;
    let tokenizer = fixture.parts().open().unwrap().tokenizer;
    let ids = tokenizer.encode("<s> hi </s><unk> <0x0A>").unwrap().ids;
    assert!(ids.iter().all(|&id| fixture.token_type[id as usize] == 1), "{ids:?}");
}

/// Collections are bound to the digest.
#[test]
fn a_digest_holds_for_what_decides_over_ids() {
    let digest = |parts: Parts| parts.open().unwrap().tokenizer_digest();
    let byte_level = format!("{:#}", digest(Parts::new()));
    assert_eq!(byte_level, "026be1d117edf67938d732f6e85cb586d1d81958f7ea642a847a42d4a48ae7f3");
    let fixture = || read::<SentencePiece>("sentencepiece.json");
    let changed = |change: fn(&mut SentencePiece)| {
        let mut fixture = fixture();
        change(&mut fixture);
        digest(fixture.parts())
    };
    let digests = [
        digest(fixture().parts()),
        digest(fixture().parts().set(&setting("add_space_prefix"), Value::Bool(false))),
        digest(fixture().parts().set(&setting("add_bos_token"), Value::Bool(false))),
        changed(|fixture| fixture.scores.swap(300, 301)),
        changed(|fixture| fixture.tokens.swap(300, 301)),
        changed(|fixture| fixture.token_type[3] = 3),
    ];
    for (index, digest) in digests.iter().enumerate() {
        assert!(!digests[..index].contains(digest), "{index}");
    }
    let said = fixture().parts().set(&setting("add_space_prefix"), Value::Bool(true));
    assert_eq!(digest(said), digests[0], "what goes without saying");
}

#[test]
fn a_vocabulary_that_lacks_something_is_refused_with_what_it_lacks() {
    let refused = |change: fn(&mut SentencePiece)| {
        let mut fixture: SentencePiece = read("sentencepiece.json");
        change(&mut fixture);
        fixture.parts().refused().to_string()
    };
    let whole = || read::<SentencePiece>("sentencepiece.json").parts();
    let text = |text: &str| Value::String(text.into());
    let settings = ["model", "pre", "tokens", "token_type", "merges", "eos_token_id", "add_bos_token"];
    let silent = settings.iter().fold(Parts::new(), |parts, name| parts.without(&setting(name)));
    for (message, wanted) in [
        (refused(|fixture| fixture.token_type[8 + 0x0a] = 1), "none for <0x0A>"),
        (refused(|fixture| fixture.tokens[300] = fixture.tokens[301].clone()), "each token once"),
        (refused(|fixture| fixture.tokens[300] = "a".repeat(513)), "513 for token 300"),
        (refused(|fixture| fixture.scores.fill(-1000.0)), "the same for all"),
        (refused(|fixture| fixture.scores[300] = f32::NAN), "tokenizer.ggml.scores: expected numbers, found"),
        (refused(|fixture| fixture.scores.truncate(9)), "tokenizer.ggml.scores: expected one per token: 460"),
        (refused(|fixture| fixture.token_type.truncate(9)), "tokenizer.ggml.token_type: expected one per token: 460"),
        (whole().without(&setting("scores")).refused().to_string(), "tokenizer.ggml.scores is missing"),
        (
            whole().set(&setting("remove_extra_whitespaces"), Value::Bool(true)).refused().to_string(),
            "remove_extra_whitespaces: expected false",
        ),
        (
            whole().set(&setting("precompiled_charsmap"), Value::Array(vec![Value::U8(1)])).refused().to_string(),
            "precompiled_charsmap",
        ),
        (Parts::new().set(&setting("model"), text("bert")).refused().to_string(), "found bert; take the model's"),
        (Parts::new().set(&setting("pre"), text("deepseek-llm")).refused().to_string(), "qwen2, deepseek-r1-qwen"),
        (silent.refused().to_string(), "found none: this file has no tokenizer; take the model's Hugging Face folder"),
        (Parts::new().without(&setting("pre")).refused().to_string(), "tokenizer.ggml.pre is missing"),
        (Parts::new().without(&setting("merges")).refused().to_string(), "tokenizer.ggml.merges is missing"),
    ] {
        assert!(message.contains(wanted) && !message.contains("damaged"), "{wanted}: {message}");
    }
}
