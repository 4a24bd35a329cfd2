//! The tokenizer inside a GGUF file.

use sha2::{Digest, Sha256};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::error::LoadError;
use super::gguf::Gguf;
use super::gguf_vocabulary::{CONTROL, TAKE_THE_FOLDER, USER_DEFINED, Vocabulary, damaged};
use super::tokenizer::Tokenizer;
use super::{pre_tokenizers, sentencepiece};
use landmarkdb::Sha256Digest;

const PREFIX: &str = "tokenizer.ggml.";

/// What may be said of a tokenizer. Scores, spaces before a text and the normalizer's table say nothing to byte-level BPE, nor
/// merges and `pre` to SentencePiece; an end of text is never put behind a text, for it goes on. Anything else might change ids.
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

/// Builds the tokenizer that a GGUF file describes.
pub(super) fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, LoadError> {
    let key = "tokenizer.ggml.model";
    let expected = "gpt2 (byte-level BPE) or llama (SentencePiece)";
    if gguf.settings_under(PREFIX).next().is_none() {
        return Err(gguf.refuse(key, expected, "none: this file has no tokenizer", Some(TAKE_THE_FOLDER)));
    }
    let read = match gguf.text(key)? {
        "gpt2" => byte_level,
        "llama" => sentencepiece::from_gguf,
        other => return Err(gguf.refuse(key, expected, other, Some(TAKE_THE_FOLDER))),
    };
    for (key, found) in gguf.settings_under(PREFIX) {
        if !SETTINGS.contains(&&key[PREFIX.len()..]) {
            return Err(LoadError::UnknownSetting { path: gguf.path().into(), key: key.into(), found });
        }
    }
    read(gguf, Vocabulary::read(gguf)?)
}

/// Byte-level BPE (`gpt2`).
fn byte_level(gguf: &Gguf, vocabulary: Vocabulary) -> Result<Tokenizer, LoadError> {
    let pre_name = gguf.text("tokenizer.ggml.pre")?;
    let Some(pre) = pre_tokenizers::by_name(pre_name) else {
        let expected = format!("one of {}", pre_tokenizers::names());
        return Err(gguf.refuse("tokenizer.ggml.pre", &expected, pre_name, Some(TAKE_THE_FOLDER)));
    };
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    let prefix = vocabulary.prefix(gguf, pre.add_bos)?;
    let digest = digest(pre_name, &vocabulary, &merges);

    let damaged = |error: tokenizers::Error| damaged(gguf, &error);
    let mut tokenizer = tokenizers::Tokenizer::new(bpe(gguf, &vocabulary.tokens, &merges, pre.ignore_merges)?);
    tokenizer.with_pre_tokenizer(Some(pre.wrapper().map_err(damaged)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    let of_kind = |kind| vocabulary.of_kind(kind).map(move |token| AddedToken::from(token, kind == CONTROL));
    tokenizer.add_special_tokens(of_kind(CONTROL)).map_err(damaged)?;
    tokenizer.add_tokens(of_kind(USER_DEFINED)).map_err(damaged)?;
    Tokenizer::new(gguf.path(), tokenizer, Some(prefix), digest)
}

fn bpe(gguf: &Gguf, tokens: &[&str], merges: &[&str], ignore_merges: bool) -> Result<BPE, LoadError> {
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| (token.to_string(), id)).collect();
    let pairs = merges.iter().map(|merge| {
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| gguf.unsupported("tokenizer.ggml.merges", "two tokens with a space between", merge))?;
        Ok((left.to_string(), right.to_string()))
    });
    let bpe = BPE::builder().vocab_and_merges(vocab, pairs.collect::<Result<_, _>>()?).ignore_merges(ignore_merges);
    bpe.build().map_err(|error| damaged(gguf, &error))
}

/// SHA-256 over everything that decides which ids a text gets.
fn digest(pre: &str, vocabulary: &Vocabulary, merges: &[&str]) -> Sha256Digest {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add(pre);
    vocabulary.tokens.iter().chain(merges).for_each(|text| add(text));
    hash.update((vocabulary.tokens.len() as u64).to_le_bytes());
    vocabulary.kinds.iter().for_each(|kind| hash.update(kind.to_le_bytes()));
    Sha256Digest(hash.finalize().into())
}
