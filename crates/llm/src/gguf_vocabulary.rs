//! What a GGUF file says of its tokens, whatever the kind of its tokenizer.

use candle_core::quantized::gguf_file::Value;

use super::error::LoadError;
use super::gguf::Gguf;

/// Token types of `tokenizer.ggml.token_type`. User-defined tokens are matched in a text before BPE.
pub(super) const UNKNOWN: u64 = 2;
pub(super) const CONTROL: u64 = 3;
pub(super) const USER_DEFINED: u64 = 4;
pub(super) const BYTE: u64 = 6;

pub(super) const TAKE_THE_FOLDER: &str = "take the model's Hugging Face folder, whose tokenizer.json says all of it";

/// Tokens in the order of their ids.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: Vec<&'a str>,
    /// The type of each token.
    pub(super) kinds: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn read(gguf: &'a Gguf) -> Result<Self, LoadError> {
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let types = gguf.list("tokenizer.ggml.token_type")?;
        if types.len() != tokens.len() {
            let expected = format!("one per token: {}", tokens.len());
            return Err(gguf.unsupported("tokenizer.ggml.token_type", &expected, &types.len().to_string()));
        }
        let kinds = types.iter().map(|kind| kind_of(kind).unwrap_or_default()).collect();
        Ok(Vocabulary { tokens, kinds })
    }

    /// The tokens of a type.
    pub(super) fn of_kind(&self, wanted: u64) -> impl Iterator<Item = &'a str> {
        let marked = self.tokens.iter().zip(&self.kinds).filter(move |(_, kind)| **kind == wanted);
        marked.map(|(token, _)| *token)
    }

    /// What a text of its own begins with, where `add_bos` is what goes without saying.
    pub(super) fn prefix(&self, gguf: &Gguf, add_bos: bool) -> Result<Vec<u32>, LoadError> {
        match gguf.flag_or("tokenizer.ggml.add_bos_token", add_bos)? {
            true => Ok(vec![gguf.number("tokenizer.ggml.bos_token_id")?]),
            false => Ok(Vec::new()),
        }
    }
}

/// What the tokenizers library found wrong.
pub(super) fn damaged(gguf: &Gguf, error: &tokenizers::Error) -> LoadError {
    LoadError::Damaged { path: gguf.path().into(), detail: format!("its tokenizer: {error}") }
}

fn kind_of(value: &Value) -> Option<u64> {
    match value {
        Value::I32(kind) => u64::try_from(*kind).ok(),
        other => other.to_u64().ok(),
    }
}
