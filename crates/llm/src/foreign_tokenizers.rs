//! Tokenizers inside GGUF files cut as those of the models do, and the text comes back from them.
//!
//! `tests/fixtures/models/pre-tokenizers.json` has the pieces that one text is cut into by each kind of `tokenizer.ggml.pre`, by
//! the Python package tokenizers 0.23.3, whose regular expressions are Oniguruma's.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Value;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::foreign_files::{Parts, fixture};
use super::*;

fn read<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn setting(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
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
    let tokenizers: Vec<(&str, Tokenizer)> = names.split(", ").map(|name| (name, byte_level(name))).collect();
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
