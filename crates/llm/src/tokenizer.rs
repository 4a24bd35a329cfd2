//! Text to token ids and back.
//!
//! Every token stands for a fixed string of bytes, so decoding is concatenation, and the bytes of a text that each
//! token covers follow from the lengths alone. That holds for byte-level BPE and for SentencePiece with byte fallback,
//! which are the two kinds that the families come with.

use std::cmp::Reverse;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use sha2::{Digest, Sha256};
use tokenizers::AddedToken;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::processors::template::TemplateProcessing;

use super::error::{LoadError, SaveError, TokenizeError};
use super::template::Piece;
use landmarkdb::Sha256Digest;
use landmarkdb::limits::TOKEN_IDS_MAX;

/// Control tokens that end a text or a turn whatever a file says of them, as in llama.cpp: files often name one of several.
pub(super) const ENDS: [&str; 7] =
    ["<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>"];

/// The tokenizer of one model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What a text of its own begins with.
    prefix: Vec<u32>,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// `(vocab + 1)`: where each token's bytes begin.
    starts: Vec<u32>,
    digest: Sha256Digest,
}

/// A text cut into tokens.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids in text order, without [`Tokenizer::prefix`].
    pub ids: Vec<u32>,
    /// Where each token begins in the text, in bytes: one per token, not decreasing, the first 0. A token ends where
    /// the next begins, the last with the text. Offsets may lie inside a UTF-8 sequence.
    pub offsets: Vec<usize>,
}

/// How a vocabulary writes bytes as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: one printable character per byte.
    ByteLevel,
    /// SentencePiece's: U+2581 for a space, `<0x0A>` for a byte that has no token of its own.
    SentencePiece,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let bytes = std::fs::read(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
        let digest = Sha256Digest(Sha256::digest(&bytes).into());
        let damaged = |detail: String| LoadError::Damaged { path: path.into(), detail };
        // The library panics at what is no JSON.
        serde_json::from_slice::<serde_json::Value>(&bytes).map_err(|error| damaged(error.to_string()))?;
        let read = || tokenizers::Tokenizer::from_bytes(&bytes);
        let inner = caught(read).and_then(|read| read.map_err(|error| error.to_string())).map_err(damaged)?;
        Self::new(path, inner, None, digest)
    }

    /// Wraps a tokenizer. Without a `prefix` it is what the tokenizer's own template puts before a text.
    pub(super) fn new(
        path: &Path,
        mut inner: tokenizers::Tokenizer,
        prefix: Option<Vec<u32>>,
        digest: Sha256Digest,
    ) -> Result<Self, LoadError> {
        // A text that spells a control token must not become one.
        inner.set_encode_special_tokens(true);
        inner.with_padding(None);
        let damaged = |error: tokenizers::Error| LoadError::Damaged { path: path.into(), detail: error.to_string() };
        inner.with_truncation(None).map_err(damaged)?;
        let prefix = match prefix {
            Some(prefix) => prefix,
            None => {
                let encode = |special| {
                    let encoding = caught(|| inner.encode_fast("a", special).map_err(|error| error.to_string()));
                    encoding.flatten().map_err(|detail| damaged(detail.into()))
                };
                let (with, without) = (encode(true)?, encode(false)?);
                let first = without.get_ids().first();
                with.get_ids().iter().copied().take_while(|id| Some(id) != first).collect()
            }
        };
        let spelling = spelling(inner.get_decoder()).ok_or_else(|| LoadError::Unsupported {
            path: path.into(),
            key: "decoder of the tokenizer".into(),
            expected: "ByteLevel, or a Sequence with ByteFallback".into(),
            found: inner.get_decoder().map_or("none".into(), |decoder| format!("{decoder:?}")),
            way_out: None,
        })?;
        let last = inner.get_vocab(true).into_values().max().unwrap_or_default();
        if last >= TOKEN_IDS_MAX {
            return Err(LoadError::Unsupported {
                path: path.into(),
                key: "vocabulary of the tokenizer".into(),
                expected: format!("ids below {TOKEN_IDS_MAX}"),
                found: last.to_string(),
                way_out: None,
            });
        }
        let (bytes, starts) = token_bytes(&inner, last, spelling);
        Ok(Tokenizer { inner, prefix, bytes, starts, digest })
    }

    /// As a `tokenizer.json`, which [`Tokenizer::open`] reads back, with a control token more if one is given that it
    /// does not have.
    pub fn to_json(&self, control: Option<&str>) -> Result<String, SaveError> {
        let failed = |error: &dyn std::fmt::Display| SaveError::Tokenizer { detail: error.to_string() };
        let mut inner = self.inner.clone();
        if inner.get_post_processor().is_none() && !self.prefix.is_empty() {
            let tokens = self.prefix.iter().map(|&id| (inner.id_to_token(id).unwrap_or_default(), id));
            let tokens: Vec<(String, u32)> = tokens.collect();
            let template: String = tokens.iter().map(|(token, _)| format!("{token} ")).collect();
            let mut builder = TemplateProcessing::builder();
            builder.try_single(format!("{template}$A")).map_err(|error| failed(&error))?.special_tokens(tokens);
            inner.with_post_processor(Some(builder.build().map_err(|error| failed(&error))?));
        }
        let control = control.filter(|token| inner.token_to_id(token).is_none());
        let control = control.map(|token| AddedToken::from(token, true));
        inner.add_special_tokens(control).map_err(|error| failed(&error))?;
        inner.to_string(false).map_err(|error| failed(&error))
    }

    /// SHA-256 of what makes up this tokenizer.
    pub fn digest(&self) -> Sha256Digest {
        self.digest
    }

    /// Tokens in the vocabulary, control tokens included.
    pub fn vocab(&self) -> usize {
        self.starts.len() - 1
    }

    /// The ids that every text of its own begins with for this model: a begin-of-text token, or none.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The id of a token by its spelling in the vocabulary, control tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token that texts are made of; none for a control token or an unused id.
    pub(super) fn text_of(&self, id: u32) -> Option<String> {
        let is_text = !self.inner.get_added_tokens_decoder().contains_key(&id);
        self.inner.id_to_token(id).filter(|_| is_text)
    }

    /// Cuts a text into tokens, without [`Tokenizer::prefix`]. Control tokens spelled out in the text stay text.
    pub fn encode(&self, text: &str) -> Result<Encoded, TokenizeError> {
        if text.is_empty() {
            return Ok(Encoded::default());
        }
        let encoding = caught(|| self.inner.encode(text, false).map_err(|error| error.to_string()));
        let encoding = encoding.flatten().map_err(|detail| TokenizeError { text_bytes: text.len(), detail })?;
        let ids = encoding.get_ids().to_vec();
        // Where a normalizer changed the text, the library knows where each character came from.
        let given = || encoding.get_offsets().iter().map(|&(start, _)| start);
        let offsets = self.offsets_by_length(&ids, text).unwrap_or_else(|| never_back(given()));
        Ok(Encoded { ids, offsets })
    }

    /// The control tokens by whose names a text or a turn ends.
    pub(super) fn ends(&self) -> impl Iterator<Item = u32> {
        let ends = |token: &AddedToken| token.special && ENDS.contains(&token.content.as_str());
        self.inner.get_added_tokens_decoder().into_iter().filter(move |(_, token)| ends(token)).map(|(id, _)| id)
    }

    /// Cuts a prompt into tokens: control tokens that markup spells are control tokens, those that words spell stay text, and
    /// what stands between two of them is cut as one text, whoever wrote it.
    pub(super) fn encode_pieces(&self, pieces: &[Piece]) -> Result<Vec<u32>, TokenizeError> {
        let mut controls = self.inner.get_added_tokens_decoder();
        controls.retain(|_, token| token.special && !token.content.is_empty());
        let first = |text: &str| {
            let found = controls.iter().filter_map(|(&id, token)| Some((text.find(&token.content)?, id, token)));
            found.min_by_key(|(at, _, token)| (*at, Reverse(token.content.len())))
        };
        let (mut ids, mut text) = (Vec::new(), String::new());
        for piece in pieces {
            let mut rest = match piece {
                Piece::Markup(markup) => markup.as_str(),
                Piece::Words(words) => {
                    text.push_str(words);
                    continue;
                }
            };
            while let Some((at, id, token)) = first(rest) {
                text.push_str(&rest[..at]);
                let before = if token.lstrip { text.trim_end() } else { &text };
                ids.extend(self.encode(before)?.ids);
                ids.push(id);
                text.clear();
                rest = &rest[at + token.content.len()..];
                rest = if token.rstrip { rest.trim_start() } else { rest };
            }
            text.push_str(rest);
        }
        ids.extend(self.encode(&text)?.ids);
        Ok(ids)
    }

    /// Offsets from the tokens' lengths; none when those do not add up to the text.
    fn offsets_by_length(&self, ids: &[u32], text: &str) -> Option<Vec<usize>> {
        let lengths = || ids.iter().map(|&id| self.token_bytes(id).len());
        // SentencePiece puts a space before the text, which the first token covers. A space between tokens is found by nobody.
        let invented = lengths().sum::<usize>().checked_sub(text.len())?;
        let is_first = || {
            let bytes = ids.iter().flat_map(|&id| self.token_bytes(id));
            bytes.eq([b' '].iter().chain(text.as_bytes()))
        };
        if invented > 1 || invented == 1 && !is_first() {
            return None;
        }
        let mut end = 0;
        let starts = lengths().map(|length| {
            let start = end;
            end += length;
            start.saturating_sub(invented)
        });
        Some(starts.collect())
    }

    /// The bytes that a token stands for: part of a UTF-8 sequence, perhaps. Empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..).and_then(|starts| starts.first_chunk()) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            None => &[],
        }
    }

    /// The text of tokens, control tokens spelled out. What is not UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Turns bytes that arrive in pieces into text, holding back a UTF-8 sequence until it is whole.
#[derive(Debug, Default)]
pub struct TextStream {
    pending: Vec<u8>,
}

impl TextStream {
    /// Takes more bytes; gives the text that is certain now. What can never become UTF-8 is U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut whole_bytes = 0;
        for chunk in self.pending.utf8_chunks() {
            let invalid = chunk.invalid();
            let at_end = whole_bytes + chunk.valid().len() + invalid.len() == self.pending.len();
            text.push_str(chunk.valid());
            whole_bytes += chunk.valid().len();
            if at_end && is_unfinished(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                whole_bytes += invalid.len();
            }
        }
        self.pending.drain(..whole_bytes);
        text
    }

    /// Whether the text so far ends inside a UTF-8 sequence.
    pub fn is_open(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The end of the stream: what was held back, as U+FFFD.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Whether more bytes could make a whole sequence of these.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

fn spelling(decoder: Option<&DecoderWrapper>) -> Option<Spelling> {
    match decoder? {
        DecoderWrapper::ByteLevel(_) => Some(Spelling::ByteLevel),
        DecoderWrapper::Sequence(sequence) => {
            let mut spellings = sequence.get_decoders().iter().map(|decoder| match decoder {
                DecoderWrapper::ByteFallback(_) => Some(Spelling::SentencePiece),
                other => spelling(Some(other)),
            });
            spellings.find_map(|spelling| spelling)
        }
        _ => None,
    }
}

/// Raises each offset to the largest before it, and begins at 0.
fn never_back(offsets: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut largest = 0;
    let raised = offsets.enumerate().map(|(token, offset)| {
        largest = if token == 0 { 0 } else { largest.max(offset) };
        largest
    });
    raised.collect()
}

/// What a call of the tokenizers library gives; it panics at some files and texts that are not what it expects.
fn caught<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| "the tokenizers library could not read it".into())
}

/// The bytes of every token up to the `last` id, and where each token's begin.
fn token_bytes(tokenizer: &tokenizers::Tokenizer, last: u32, spelling: Spelling) -> (Vec<u8>, Vec<u32>) {
    let added = tokenizer.get_added_tokens_decoder();
    let (mut bytes, mut starts) = (Vec::new(), vec![0]);
    for id in 0..=last {
        let token = tokenizer.id_to_token(id).unwrap_or_default();
        match spelling {
            _ if added.contains_key(&id) => bytes.extend_from_slice(token.as_bytes()),
            Spelling::ByteLevel => push_byte_level(&token, &mut bytes),
            Spelling::SentencePiece => push_sentence_piece(&token, &mut bytes),
        }
        starts.push(bytes.len() as u32);
    }
    (bytes, starts)
}

/// Undoes GPT-2's spelling: printable Latin-1 characters stand for themselves, the other 68 bytes, in order, for the
/// characters from U+0100 on.
fn push_byte_level(token: &str, bytes: &mut Vec<u8>) {
    for character in token.chars() {
        match character as u32 {
            code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => bytes.push(code as u8),
            code @ 0x100..=0x120 => bytes.push((code - 0x100) as u8),
            code @ 0x121..=0x142 => bytes.push((code - 0x121) as u8 + 0x7f),
            0x143 => bytes.push(0xad),
            _ => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn push_sentence_piece(token: &str, bytes: &mut Vec<u8>) {
    let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => bytes.push(byte),
        None => bytes.extend_from_slice(token.replace('\u{2581}', " ").as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_level_spelling_covers_every_byte_once() {
        let printable = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff);
        let spelled: String = printable.chain(0x100..=0x143).filter_map(char::from_u32).collect();
        let mut bytes = Vec::new();
        push_byte_level(&spelled, &mut bytes);
        assert_eq!(bytes[bytes.len() - 68..][..34], (0..=0x20).chain([0x7f]).collect::<Vec<u8>>());
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn sentence_piece_spells_spaces_and_bytes() {
        let mut bytes = Vec::new();
        for token in ["\u{2581}a\u{2581}b", "<0x0A>", "<0xE2>", "<0xzz>", "<s>"] {
            push_sentence_piece(token, &mut bytes);
        }
        assert_eq!(bytes, b" a b\n\xe2<0xzz><s>");
    }

    #[test]
    fn a_tokenizer_is_the_same_after_a_file() {
        let json = r#"{"version": "1.0", "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}], "pre_tokenizer": {"type": "ByteLevel",
            "add_prefix_space": false, "trim_offsets": true, "use_regex": true}, "decoder": {"type": "ByteLevel",
            "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}}"#;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        for prefix in [vec![], vec![0]] {
            let inner = tokenizers::Tokenizer::from_bytes(json).unwrap();
            let tokenizer = Tokenizer::new(&path, inner, Some(prefix.clone()), Sha256Digest([0; 32])).unwrap();
            std::fs::write(&path, tokenizer.to_json(None).unwrap()).unwrap();
            let read = Tokenizer::open(&path).unwrap();
            assert_eq!((read.prefix(), read.vocab()), (&prefix[..], 4));
            assert_eq!(read.encode("abab<s>b").unwrap(), tokenizer.encode("abab<s>b").unwrap());
        }
    }

    /// A question could end its own turn, and a document open one, by spelling a control token.
    #[test]
    fn only_markup_has_control_tokens() {
        let control = |id: u32, content: &str, strips: bool| {
            format!(
                r#"{{"id": {id}, "content": "{content}", "single_word": false, "lstrip": {strips}, "rstrip": {strips},
                "normalized": false, "special": true}}"#
            )
        };
        let json = format!(
            r#"{{"version": "1.0", "added_tokens": [{}, {}, {}], "pre_tokenizer": {{"type": "ByteLevel",
            "add_prefix_space": false, "trim_offsets": true, "use_regex": true}}, "decoder": {{"type": "ByteLevel",
            "add_prefix_space": false, "trim_offsets": true, "use_regex": true}},
            "model": {{"type": "BPE", "vocab": {{"a": 0, "b": 1, "ab": 2, "Ġ": 3}}, "merges": [["a", "b"]]}}}}"#,
            control(4, "</s>", false),
            control(5, "</s>+", false),
            control(6, "<e>", true),
        );
        let inner = tokenizers::Tokenizer::from_bytes(json).unwrap();
        let tokenizer = Tokenizer::new(Path::new("t"), inner, Some(Vec::new()), Sha256Digest([0; 32])).unwrap();
        let ids = |pieces: &[Piece]| tokenizer.encode_pieces(pieces).unwrap();
        let (markup, words) = (|text: &str| Piece::Markup(text.into()), |text: &str| Piece::Words(text.into()));
        assert_eq!(ids(&[markup("</s>a"), words("b</s>"), markup("b</s>")]), [4, 2, 1, 4], "cut across who wrote it");
        assert_eq!(ids(&[markup("</s>+</s>")]), [5, 4], "the longest at a place");
        assert_eq!(ids(&[markup("a </s> b")]), [0, 3, 4, 3, 1]);
        assert_eq!(ids(&[markup("a <e> b")]), [0, 6, 1], "some take the white space beside them");
        assert!(ids(&[]).is_empty());
        assert_eq!(tokenizer.ends().collect::<Vec<_>>(), [4], "by its whole name");
    }

    #[test]
    fn a_stream_holds_back_what_is_not_whole() {
        let text = "aé€🙂z";
        let mut stream = TextStream::default();
        let pieces: Vec<String> = text.bytes().map(|byte| stream.push(&[byte])).collect();
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "🙂", "z"]);
        assert_eq!(stream.finish(), "");

        let mut stream = TextStream::default();
        assert_eq!(stream.push(b"\xf0\x9fx\xffy\xe2\x82"), "\u{fffd}x\u{fffd}y");
        assert_eq!(stream.push(b"\xe2\x82\xac"), "\u{fffd}€");
        assert_eq!(stream.push(b"\xf0"), "");
        assert_eq!(stream.finish(), "\u{fffd}");
    }
}
