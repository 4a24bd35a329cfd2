//! The tokenizer inside a GGUF file.

use candle_core::quantized::gguf_file::Value;
use sha2::{Digest, Sha256};
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::error::LoadError;
use super::gguf::Gguf;
use super::pre_tokenizers;
use super::tokenizer::Tokenizer;
use landmarkdb::Sha256Digest;

/// Token types of `tokenizer.ggml.token_type` that are matched in a text before BPE.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

const PREFIX: &str = "tokenizer.ggml.";

/// What may be said of a tokenizer. Scores, spaces before a text and the normalizer's table are for other kinds than
/// byte-level BPE; an end of text is never put behind a text, for it goes on. Anything else might change ids.
const SETTINGS: [&str; 37] = [
    "model",
    "pre",
    "tokens",
    "token_type",
    "token_type_count",
    "scores",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "unknown_token_id",
    "seperator_token_id",
    "separator_token_id",
    "padding_token_id",
    "cls_token_id",
    "mask_token_id",
    "prefix_token_id",
    "suffix_token_id",
    "middle_token_id",
    "fim_pre_token_id",
    "fim_suf_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "image_token_id",
    "add_bos_token",
    "add_eos_token",
    "add_sep_token",
    "add_space_prefix",
    "remove_extra_whitespaces",
    "escape_whitespaces",
    "precompiled_charsmap",
    "added_tokens",
    "eot_token",
    "chat_template",
];

const TAKE_THE_FOLDER: &str = "take the model's Hugging Face folder, whose tokenizer.json says all of it";

/// Builds the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`).
pub(super) fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, LoadError> {
    let model = gguf.text("tokenizer.ggml.model")?;
    if model != "gpt2" {
        let found = if model == "llama" { "llama (SentencePiece)" } else { model };
        return Err(gguf.refuse("tokenizer.ggml.model", "gpt2 (byte-level BPE)", found, Some(TAKE_THE_FOLDER)));
    }
    let pre_name = gguf.text("tokenizer.ggml.pre")?;
    let Some(pre) = pre_tokenizers::by_name(pre_name) else {
        let expected = format!("one of {}", pre_tokenizers::names());
        return Err(gguf.refuse("tokenizer.ggml.pre", &expected, pre_name, Some(TAKE_THE_FOLDER)));
    };
    for (key, found) in gguf.settings_under(PREFIX) {
        if !SETTINGS.contains(&&key[PREFIX.len()..]) {
            return Err(LoadError::UnknownSetting { path: gguf.path().into(), key: key.into(), found });
        }
    }
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    let types = gguf.list("tokenizer.ggml.token_type")?;
    if types.len() != tokens.len() {
        let expected = format!("one per token: {}", tokens.len());
        return Err(gguf.unsupported("tokenizer.ggml.token_type", &expected, &types.len().to_string()));
    }
    let prefix = match gguf.flag_or("tokenizer.ggml.add_bos_token", pre.add_bos)? {
        true => vec![gguf.number("tokenizer.ggml.bos_token_id")?],
        false => Vec::new(),
    };
    let digest = digest(pre_name, &tokens, &merges, types);

    let damaged = |error: tokenizers::Error| LoadError::Damaged {
        path: gguf.path().into(),
        detail: format!("its tokenizer: {error}"),
    };
    let mut tokenizer = tokenizers::Tokenizer::new(bpe(gguf, &tokens, &merges, pre.ignore_merges)?);
    tokenizer.with_pre_tokenizer(Some(pre.wrapper().map_err(damaged)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    let of_type = |wanted: u64| {
        let marked = tokens.iter().zip(types).filter(move |(_, kind)| kind_of(kind) == Some(wanted));
        marked.map(move |(token, _)| AddedToken::from(*token, wanted == CONTROL))
    };
    tokenizer.add_special_tokens(of_type(CONTROL)).map_err(damaged)?;
    tokenizer.add_tokens(of_type(USER_DEFINED)).map_err(damaged)?;
    Tokenizer::new(gguf.path(), tokenizer, Some(prefix), digest)
}

fn bpe(gguf: &Gguf, tokens: &[&str], merges: &[&str], ignore_merges: bool) -> Result<BPE, LoadError> {
    let vocab: std::collections::HashMap<String, u32> =
        tokens.iter().zip(0..).map(|(token, id)| (token.to_string(), id)).collect();
    let pairs = merges.iter().map(|merge| {
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| gguf.unsupported("tokenizer.ggml.merges", "two tokens with a space between", merge))?;
        Ok((left.to_string(), right.to_string()))
    });
    BPE::builder()
        .vocab_and_merges(
            vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(),
            pairs.collect::<Result<_, _>>()?,
        )
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|error| LoadError::Damaged { path: gguf.path().into(), detail: format!("its tokenizer: {error}") })
}

fn kind_of(value: &Value) -> Option<u64> {
    match value {
        Value::I32(kind) => u64::try_from(*kind).ok(),
        other => other.to_u64().ok(),
    }
}

/// SHA-256 over everything that decides which ids a text gets.
fn digest(pre: &str, tokens: &[&str], merges: &[&str], types: &[Value]) -> Sha256Digest {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add(pre);
    tokens.iter().chain(merges).for_each(|text| add(text));
    hash.update((tokens.len() as u64).to_le_bytes());
    types.iter().for_each(|kind| hash.update(kind_of(kind).unwrap_or_default().to_le_bytes()));
    Sha256Digest(hash.finalize().into())
}
