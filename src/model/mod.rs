//! Language models of the Llama family: where they come from, what they are, and how text goes in and out.
//!
//! A model file becomes a [`LoadedModel`]. Its forward pass hands `q`, `k`, `v` of every layer to a
//! [`SequenceAttention`](crate::attention::SequenceAttention), which owns all state of a sequence; only `encode` and
//! `ask` know that there is a memory behind it.
//!
//! In reading order: [`LoadedModel`], `pull`, `pulled` and `cache` (from where), `config`, `gguf`, `huggingface`, `safetensors`,
//! `weights` and `tensors` (what), `tokenizer` and `tokenizer_gguf`, `llama` and `kernels` (the mathematics), `sample` and
//! `generate`, then `encode` and `ask`.

mod ask;
mod cache;
mod config;
mod encode;
mod error;
mod files;
mod generate;
mod gguf;
mod huggingface;
mod kernels;
mod llama;
mod pull;
mod pulled;
mod safetensors;
mod sample;
mod tensors;
mod tokenizer;
mod tokenizer_gguf;
mod weights;

#[cfg(test)]
mod full_attention;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use ask::{Answer, Question, ask};
pub use cache::models_folder;
pub use config::{Landmark, ModelConfig};
pub use encode::{EncodeProgress, check_model, copy_document, encode};
pub use error::{
    ForwardError, GenerateError, LoadError, PipAttempt, PullError, RememberError, SaveError, TokenizeError,
};
pub use files::replace_file;
pub use generate::{Finish, GenerateOptions, Generated, PREFILL_TOKENS, generate, prefill};
pub use llama::{Llama, Logits};
pub use pull::{PullStep, pull, resolve};
pub use pulled::{PulledModel, pulled};
pub use sample::Sampling;
pub use tensors::{NamedTensor, read_tensors, tensor_shapes, write_model};
pub use tokenizer::{Encoded, TextStream, Tokenizer};

use crate::shape::{InvalidShape, ModelShape, Sha256Digest};

/// A model ready to run, and what a collection is bound to.
pub struct LoadedModel {
    /// For people: the file's own name for the model, or the folder's.
    pub name: String,
    pub tokenizer: Tokenizer,
    pub llama: Llama,
    /// Of the weight file, or of the digests of several.
    pub model_digest: Sha256Digest,
}

impl LoadedModel {
    /// Loads a `.gguf` file, or a folder with `config.json`, `tokenizer.json` and safetensors weights. All weights
    /// become f32 in memory.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() {
            Self::open_folder(path)
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            Self::open_gguf(path)
        } else {
            Err(LoadError::NotAModel { path: path.into() })
        }
    }

    fn open_gguf(path: &Path) -> Result<Self, LoadError> {
        let (gguf, config) = gguf::Gguf::open(path)?;
        Ok(LoadedModel {
            name: gguf.name().map_or_else(|| file_name(path), str::to_string),
            tokenizer: tokenizer_gguf::from_gguf(&gguf)?,
            llama: Llama::load(config, &gguf)?,
            model_digest: cache::weights_digest(std::iter::once(path))?,
        })
    }

    fn open_folder(folder: &Path) -> Result<Self, LoadError> {
        if !folder.join("config.json").exists() {
            return Err(LoadError::NotAModel { path: folder.into() });
        }
        let config = huggingface::read_config(folder)?;
        let weights = safetensors::SafeTensorsFolder::open(folder)?;
        Ok(LoadedModel {
            name: file_name(folder),
            tokenizer: Tokenizer::open(&folder.join("tokenizer.json"))?,
            llama: Llama::load(config, &weights)?,
            model_digest: cache::weights_digest(weights.paths())?,
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &ModelConfig {
        self.llama.config()
    }

    /// The shape that a memory with blocks of `block_tokens` sees.
    pub fn shape(&self, block_tokens: u32) -> Result<ModelShape, InvalidShape> {
        self.config().shape(block_tokens)
    }

    /// Of the tokenizer file, or of what a GGUF file says of its tokenizer.
    pub fn tokenizer_digest(&self) -> Sha256Digest {
        self.tokenizer.digest()
    }
}

fn file_name(path: &Path) -> String {
    let absolute = path.canonicalize();
    let path = absolute.as_deref().unwrap_or(path);
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
