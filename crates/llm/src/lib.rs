//! Language models whose attention reads a landmarkdb memory.
//!
//! A model file becomes a [`LoadedModel`]. Its forward pass hands `q`, `k`, `v` of every layer to a
//! [`SequenceAttention`](landmarkdb::SequenceAttention), which owns all state of a sequence; only `encode`,
//! `ask` and `citations` know that there is a memory behind it. Models of your own in candle need one call,
//! [`attend_tensors`]: `examples/plug_in.rs`.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use landmarkdb::{BlockMemory, CollectionInfo, Retrieval, Window};
//! use landmarkdb_llm::{Encoding, GenerateOptions, LoadedModel, Question, RememberError, ask, encode};
//!
//! /// Reads a text into a memory, local or remote, and answers from it.
//! fn answer(
//!     model: &LoadedModel,
//!     memory: &Arc<dyn BlockMemory>,
//!     collection: &CollectionInfo,
//!     text: &str,
//!     prompt: &str,
//! ) -> Result<String, RememberError> {
//!     let window = Window::default();
//!     let encoding = Encoding { name: "text", text, window, retrieval: None, stays_open: false };
//!     let document = encode(model, memory, collection, &encoding, &mut |_| {})?;
//!     let (retrieval, options) = (Retrieval::default(), GenerateOptions::default());
//!     let prompt = model.tokenizer.encode(prompt)?.ids;
//!     let question = Question { documents: &[document], prompt: &prompt, window, retrieval, options };
//!     Ok(ask(model, memory, collection, &question, &mut |piece| print!("{piece}"))?.generated.text)
//! }
//! ```
//!
//! In reading order: [`LoadedModel`], `resolve`, `pull` and `pulled` (from where), `digest`, `architecture`, `config`, `rotation` and `families` (which
//! models there are), `gguf`, `gguf_header`, `huggingface`, `safetensors`,
//! `weights`, `tensors` and `adapter` (what), `tokenizer`, `gguf_vocabulary`, `tokenizer_gguf`, `pre_tokenizers` and `sentencepiece`,
//! `landmarks`, `llama`, `sliding`, `low_rank`, `packing` and `kernels` (the mathematics), `sample` and `generate`, then `model_attention`,
//! `encode`, `template`, `ask`, `citations` and `lift`.

#![warn(missing_docs, unreachable_pub)]

mod adapter;
mod architecture;
mod ask;
mod attend_tensors;
mod citations;
mod config;
mod digest;
mod encode;
mod error;
mod families;
mod fields;
mod files;
mod generate;
mod gguf;
mod gguf_header;
mod gguf_vocabulary;
mod huggingface;
mod kernels;
mod landmarks;
mod lift;
mod llama;
mod low_rank;
mod model_attention;
mod packaged;
mod packing;
mod pre_tokenizers;
#[cfg(feature = "pull")]
mod pull;
mod pulled;
mod resolve;
mod rotation;
mod safetensors;
mod sample;
mod sentencepiece;
mod sliding;
mod template;
mod tensors;
mod tokenizer;
mod tokenizer_gguf;
mod weights;

#[cfg(test)]
mod foreign_files;
#[cfg(test)]
mod foreign_tokenizers;
#[cfg(any(test, feature = "fuzzing"))]
mod full_attention;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod golden_families;
#[cfg(test)]
mod strict_families;
#[cfg(all(any(test, feature = "fuzzing"), feature = "pull"))]
pub mod test_model;
#[cfg(all(test, feature = "pull"))]
mod tests;

use std::io::Read;
use std::path::{Path, PathBuf};

pub use adapter::LAYERS_MIN as ADAPTED_LAYERS_MIN;
pub use adapter::{Adapter, LANDMARK_EMBEDDING, adapter_shapes, is_adapter, update_names, write_adapter};
pub use architecture::{Activation, Architecture, Biases, LayerKind, Norms, QueryKeyNorm};
pub use ask::{Answer, Asked, Frame, Question, ask, frame_question};
pub use attend_tensors::attend_tensors;
pub use citations::{Citation, ReadFrom, citations};
pub use config::{Landmark, ModelConfig};
pub use digest::file_digest;
pub use encode::{EncodeProgress, Encoding, check_model, copy_document, encode, encode_replacing};
pub use error::{
    Difference, FindError, ForwardError, GenerateError, LoadError, RememberError, SaveError, SlidingStateError,
    TemplateError, TokenizeError, reason as tensor_reason,
};
pub use files::replace_file;
pub use generate::{Finish, GenerateOptions, Generated, generate, prefill};
pub use landmarks::Reading;
pub use lift::{Lift, lift};
pub use llama::{Llama, Logits};
pub use model_attention::ModelAttention;
#[cfg(feature = "pull")]
pub use pull::{License, PipAttempt, PullError, PullStep, pull};
pub use pulled::{PulledModel, pulled};
pub use resolve::{models_folder, resolve};
pub use sample::Sampling;
pub use sliding::{HybridAttention, SlidingLayers};
pub use template::ChatTemplate;
pub use tensors::{NamedTensor, put_row, read_tensors, tensor_shapes, write_model};
pub use tokenizer::{Encoded, TextStream, Tokenizer};

use self::tensors::{Opened, open_weights};
use landmarkdb::{InvalidShape, ModelShape, Sha256Digest};

/// A model ready to run, and what a collection is bound to.
pub struct LoadedModel {
    /// Human-readable: the file's own name for the model, or the folder's.
    pub name: String,
    /// From text to the ids that `llama` reads, and back.
    pub tokenizer: Tokenizer,
    /// The weights and hyperparameters.
    pub llama: Llama,
    /// How the model was taught to hold a conversation; none for one that only continues texts.
    pub chat_template: Option<ChatTemplate>,
    /// Of the weight file, or of the digests of several; of an adapter, of both models' and the scale.
    pub model_digest: Sha256Digest,
}

impl LoadedModel {
    /// Loads a GGUF file of any name, or a folder with `config.json`, `tokenizer.json` and safetensors weights, or an adapter,
    /// whose base must be on this machine. Weights stay in memory as the file has them.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() {
            Self::open_folder(path)
        } else if is_gguf(path)? {
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
            chat_template: ChatTemplate::of_gguf(&gguf)?,
            llama: Llama::load(config, &gguf)?,
            model_digest: digest::weights_digest(std::iter::once(path))?,
        })
    }

    fn open_folder(folder: &Path) -> Result<Self, LoadError> {
        let (config, weights, model_digest) = if adapter::is_adapter(folder) {
            adapter::open(folder)?
        } else if folder.join("config.json").exists() {
            let Opened { config, weights, paths } = open_weights(folder)?;
            (config, weights, digest::weights_digest(paths.iter().map(PathBuf::as_path))?)
        } else {
            return Err(LoadError::NotAModel { path: folder.into() });
        };
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return Err(LoadError::NoTokenizer { path });
        }
        let tokenizer = Tokenizer::open(&path)?;
        if let Some(text) = config.landmark.and_then(|landmark| tokenizer.text_of(landmark.id)) {
            return Err(LoadError::Unsupported {
                path,
                key: "landmark token (mem_id)".into(),
                expected: "a control token, or an id that the tokenizer does not use".into(),
                found: format!("{text:?}, which texts are made of"),
                way_out: None,
            });
        }
        let llama = Llama::load(config, &*weights)?;
        let chat_template = ChatTemplate::of_folder(folder)?;
        Ok(LoadedModel { name: file_name(folder), tokenizer, llama, chat_template, model_digest })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &ModelConfig {
        self.llama.config()
    }

    /// The tokens at which an answer ends: those that the files name, and the vocabulary's control tokens of well-known names.
    pub fn end_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.config().eos_ids.iter().copied().chain(self.tokenizer.ends()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
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

/// Whether a file is meant to be GGUF: by how it begins, as Ollama's files have no such name, or else by its name.
fn is_gguf(path: &Path) -> Result<bool, LoadError> {
    let io = |source| LoadError::Io { path: path.into(), source };
    let mut begin = Vec::new();
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(gguf_header::MAGIC.len() as u64).read_to_end(&mut begin).map_err(io)?;
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    Ok(named || begin == gguf_header::MAGIC)
}

fn file_name(path: &Path) -> String {
    let absolute = path.canonicalize();
    let path = absolute.as_deref().unwrap_or(path);
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
