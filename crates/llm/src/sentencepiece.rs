//! The SentencePiece tokenizer inside a GGUF file (`tokenizer.ggml.model` = `llama`): BPE whose pairs merge by the scores of the
//! tokens that they become, and bytes for what has no token.
//!
//! A file has no list of merges. Any two neighbours that are a token together may merge, the highest score first, so the list
//! follows from the vocabulary. Control tokens and bytes are never the outcome of a merge: a text that spells `<s>` stays text.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use sha2::{Digest, Sha256};
use tokenizers::AddedToken;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NormalizerWrapper, Sequence as Normalizers};

use super::error::LoadError;
use super::gguf::Gguf;
use super::gguf_vocabulary::{BYTE, CONTROL, TAKE_THE_FOLDER, UNKNOWN, USER_DEFINED, Vocabulary, damaged};
use super::tokenizer::{ENDS, Tokenizer};
use landmarkdb::Sha256Digest;

/// What stands for a space in a token.
const SPACE: &str = "\u{2581}";

const SCORES: &str = "tokenizer.ggml.scores";

/// Bytes of one token that merges are looked for in: the longest of known models has 93, and each place in it is looked at.
const TOKEN_BYTES_MAX: usize = 512;

/// Builds the tokenizer from a file's vocabulary.
pub(super) fn from_gguf(gguf: &Gguf, mut vocabulary: Vocabulary) -> Result<Tokenizer, LoadError> {
    refuse_normalizers(gguf)?;
    // Files call some of them user-defined; like llama.cpp, a text that spells one stays text.
    for (token, kind) in vocabulary.tokens.iter().zip(&mut vocabulary.kinds) {
        *kind = if ENDS.contains(token) { CONTROL } else { *kind };
    }
    let vocabulary = &vocabulary;
    let scores = scores(gguf, vocabulary)?;
    let pieces = pieces(gguf, vocabulary)?;
    let merges = merges(vocabulary, &pieces, &scores);
    // A converter that knows no scores writes the same for all; the merges that it knew are not those of the scores.
    if let [best, .., worst] = &merges[..]
        && best.outcome != worst.outcome
        && scores[best.outcome] == scores[worst.outcome]
    {
        let expected = "a score of its own for each token";
        return Err(gguf.refuse(SCORES, expected, "the same for all", Some(TAKE_THE_FOLDER)));
    }
    let space_first = gguf.flag_or("tokenizer.ggml.add_space_prefix", true)?;
    let prefix = vocabulary.prefix(gguf, true)?;
    let digest = digest(vocabulary, &scores, space_first, &prefix);

    let damaged = |error: tokenizers::Error| damaged(gguf, &error);
    let spelled = |merge: &Merge| {
        let (left, right) = vocabulary.tokens[merge.outcome].split_at(merge.cut);
        (left.to_string(), right.to_string())
    };
    let ids = vocabulary.tokens.iter().zip(0..).filter(|(token, _)| !token.is_empty());
    let vocab: Vocab = ids.map(|(token, id)| (token.to_string(), id)).collect();
    let mut bpe =
        BPE::builder().vocab_and_merges(vocab, merges.iter().map(spelled).collect()).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = vocabulary.of_kind(UNKNOWN).next() {
        bpe = bpe.unk_token(unknown.into());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(bpe.build().map_err(damaged)?);
    let (normalizer, decoder) = spaces(space_first).map_err(damaged)?;
    tokenizer.with_normalizer(Some(normalizer)).map_err(damaged)?;
    tokenizer.with_decoder(Some(decoder));
    let control = vocabulary.of_kind(CONTROL).chain(vocabulary.of_kind(UNKNOWN));
    tokenizer.add_special_tokens(control.map(|token| AddedToken::from(token, true))).map_err(damaged)?;
    // They are matched in the text as it is given; one that is spelled as a text is after its spaces are replaced is merged.
    let user_defined = vocabulary.of_kind(USER_DEFINED).filter(|token| !token.contains(SPACE));
    let user_defined = user_defined.map(|token| AddedToken::from(token, false).normalized(false));
    tokenizer.add_tokens(user_defined).map_err(damaged)?;
    Tokenizer::new(gguf.path(), tokenizer, Some(prefix), digest)
}

/// What SentencePiece can do to a text before it looks at its tokens, and no model of these families asks for.
fn refuse_normalizers(gguf: &Gguf) -> Result<(), LoadError> {
    let key = "tokenizer.ggml.remove_extra_whitespaces";
    if gguf.flag_or(key, false)? {
        return Err(gguf.refuse(key, "false", "true", Some(TAKE_THE_FOLDER)));
    }
    let key = "tokenizer.ggml.precompiled_charsmap";
    match gguf.settings_under(key).next() {
        Some(_) if !gguf.list(key)?.is_empty() => {
            Err(gguf.refuse(key, "none: texts as they are", "a table", Some(TAKE_THE_FOLDER)))
        }
        _ => Ok(()),
    }
}

fn scores(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Vec<f32>, LoadError> {
    let list = gguf.list(SCORES)?;
    if list.len() != vocabulary.tokens.len() {
        let expected = format!("one per token: {}", vocabulary.tokens.len());
        return Err(gguf.unsupported(SCORES, &expected, &list.len().to_string()));
    }
    let scores = list.iter().map(|value| match value {
        Value::F32(score) if !score.is_nan() => Ok(*score),
        Value::I32(score) => Ok(*score as f32),
        other => Err(gguf.unsupported(SCORES, "numbers", &format!("{other:?}"))),
    });
    scores.collect()
}

/// The tokens that texts are merged from and into, with their ids, after a look at whether every text has tokens.
fn pieces<'a>(gguf: &Gguf, vocabulary: &Vocabulary<'a>) -> Result<HashMap<&'a str, usize>, LoadError> {
    let key = "tokenizer.ggml.tokens";
    let mut ids = HashMap::with_capacity(vocabulary.tokens.len());
    for (id, &token) in vocabulary.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()) {
        if let Some(before) = ids.insert(token, id) {
            let found = format!("{token:?} as {before} and {id}");
            return Err(gguf.refuse(key, "each token once", &found, Some(TAKE_THE_FOLDER)));
        }
    }
    let is_byte = |byte: &u8| {
        let id = ids.get(format!("<0x{byte:02X}>").as_str());
        id.is_some_and(|&id| vocabulary.kinds[id] == BYTE)
    };
    if let Some(byte) = (0..=u8::MAX).find(|byte| !is_byte(byte)) {
        let expected = "a token of type 6 for each byte, <0x00> to <0xFF>";
        return Err(gguf.refuse(key, expected, &format!("none for <0x{byte:02X}>"), Some(TAKE_THE_FOLDER)));
    }
    ids.retain(|_, id| !matches!(vocabulary.kinds[*id], UNKNOWN | CONTROL | BYTE));
    match ids.iter().find(|(token, _)| token.len() > TOKEN_BYTES_MAX) {
        Some((token, id)) => {
            let expected = format!("at most {TOKEN_BYTES_MAX} bytes per token");
            Err(gguf.unsupported(key, &expected, &format!("{} for token {id}", token.len())))
        }
        None => Ok(ids),
    }
}

/// Two tokens that become one.
struct Merge {
    /// The id of what they become.
    outcome: usize,
    /// Where in its spelling the second begins, in bytes.
    cut: usize,
}

/// All merges, the first to be done first.
fn merges(vocabulary: &Vocabulary, pieces: &HashMap<&str, usize>, scores: &[f32]) -> Vec<Merge> {
    let mut outcomes: Vec<usize> = pieces.values().copied().collect();
    outcomes.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let of_outcome = |outcome: usize| {
        let token = vocabulary.tokens[outcome];
        let cuts = token.char_indices().map(|(cut, _)| cut).skip(1).filter(move |&cut| {
            let (left, right) = token.split_at(cut);
            pieces.contains_key(left) && pieces.contains_key(right)
        });
        cuts.map(move |cut| Merge { outcome, cut })
    };
    outcomes.into_iter().flat_map(of_outcome).collect()
}

/// Between a text and its spelling in tokens.
fn spaces(space_first: bool) -> tokenizers::Result<(NormalizerWrapper, DecoderWrapper)> {
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if space_first {
        normalizers.push(Prepend::new(SPACE.into()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE)?.into());
    Ok((Normalizers::new(normalizers).into(), Decoders::new(decoders).into()))
}

/// SHA-256 over everything that decides which ids a text gets.
fn digest(vocabulary: &Vocabulary, scores: &[f32], space_first: bool, prefix: &[u32]) -> Sha256Digest {
    let mut hash = Sha256::new();
    hash.update(b"SentencePiece in GGUF\0");
    hash.update([u8::from(space_first)]);
    hash.update((prefix.len() as u64).to_le_bytes());
    prefix.iter().for_each(|id| hash.update(id.to_le_bytes()));
    hash.update((vocabulary.tokens.len() as u64).to_le_bytes());
    for ((token, kind), score) in vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(scores) {
        hash.update((token.len() as u64).to_le_bytes());
        hash.update(token);
        hash.update(kind.to_le_bytes());
        hash.update(score.to_le_bytes());
    }
    Sha256Digest(hash.finalize().into())
}
