//! Why a model could not be loaded, fetched or run.

use std::path::{Path, PathBuf};

use landmarkdb::{AttentionError, InvalidShape, MemoryError, Sha256Digest};

/// Why a model on disk could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} is neither a .gguf file, nor a folder with config.json, tokenizer.json and *.safetensors, nor an adapter: \
         give one of these, or the name of a model that can be pulled"
    )]
    NotAModel { path: PathBuf },
    #[error("{path} is damaged or cut short: {detail}; fetch it again")]
    Damaged { path: PathBuf, detail: String },
    #[error("{path}: {key} is missing; the file is incomplete, or not of a model of the Llama family")]
    MissingKey { path: PathBuf, key: String },
    #[error(
        "{path} is missing; from a tokenizer.model, `AutoTokenizer.from_pretrained(..).save_pretrained(..)` of \
         Hugging Face transformers makes it"
    )]
    NoTokenizer { path: PathBuf },
    /// The file is whole, and asks for something that is not computed here.
    #[error("{path}: {key}: expected {expected}, found {found}{}", way_out.map(|way| format!("; {way}")).unwrap_or_default())]
    Unsupported { path: PathBuf, key: String, expected: String, found: String, way_out: Option<&'static str> },
    #[error(
        "{path}: this program does not know the tensor {name}, and answers that leave it out would be wrong: \
         take a model of the Llama family without it"
    )]
    UnknownTensor { path: PathBuf, name: String },
    #[error(
        "{path}: this program does not know the setting {key} ({found}), and answers that ignore it would be wrong: \
         take a model of the Llama family without it"
    )]
    UnknownSetting { path: PathBuf, key: String, found: String },
    #[error(
        "{path}: tensor {name}: expected finite numbers, found NaN or infinity; the weights are damaged: fetch them again"
    )]
    NotFinite { path: PathBuf, name: String },
    #[error("{path}: {name:?}: expected the name of a file in the same folder; a model's files lie side by side")]
    OutsideFolder { path: PathBuf, name: String },
    #[error("{path}: there is no tensor {name}; the file is incomplete or of another architecture")]
    MissingTensor { path: PathBuf, name: String },
    #[error(
        "{path}: tensor {name}: expected shape {expected:?} from the configuration, found {found:?}; \
         configuration and weights belong to different models"
    )]
    TensorShape { path: PathBuf, name: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("{path}: {source}")]
    Shape { path: PathBuf, source: InvalidShape },
    #[error("{path}: the model that this adapter changes: {source}")]
    Base { path: PathBuf, source: Box<FindError> },
    #[error(
        "{path}: expected the base model {base} with SHA-256 {expected}, found {found:#}; \
         an adapter fits only the weights that it was trained with: fetch those"
    )]
    OtherBase { path: PathBuf, base: String, expected: String, found: Sha256Digest },
}

impl LoadError {
    /// A tensor that candle could not read.
    pub(super) fn damaged_tensor(path: &Path, name: &str, error: candle_core::Error) -> Self {
        LoadError::Damaged { path: path.into(), detail: format!("tensor {name}: {}", reason(&error)) }
    }
}

/// What candle's error says without the backtrace that it carries where RUST_BACKTRACE is set.
pub fn reason(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => reason(inner),
        candle_core::Error::WithPath { inner, path } => format!("{}: {}", path.display(), reason(inner)),
        candle_core::Error::Context { inner, context } => format!("{context}: {}", reason(inner)),
        other => other.to_string(),
    }
}

/// Why a model could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "config.json cannot tell these rotary frequencies: expected base^(-2i / dims), all divided by one factor, \
         found {frequencies:?}; start from a model with plain or linearly scaled rotation"
    )]
    Rotation { frequencies: Vec<f32> },
    #[error("config.json cannot tell landmarks that only the index reads: save the adapter that gives them instead")]
    HiddenLandmark,
    #[error("tokenizer.json: {detail}")]
    Tokenizer { detail: String },
    #[error("weights: {}", reason(.0))]
    Weights(#[from] candle_core::Error),
    #[error("weights: {0}")]
    Serialise(#[from] safetensors::SafeTensorError),
}

/// Why a text could not be tokenised.
#[derive(Debug, thiserror::Error)]
#[error("a text of {text_bytes} bytes cannot be tokenised: {detail}")]
pub struct TokenizeError {
    pub text_bytes: usize,
    pub detail: String,
}

/// Why a forward pass failed. The attention may hold part of the tokens then: start the sequence anew.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("token {id} is not in the vocabulary of {vocab}: encode the text with this model's tokenizer")]
    UnknownToken { id: u32, vocab: usize },
    #[error("embeddings: expected a multiple of {hidden} numbers, found {found}")]
    EmbeddingLength { hidden: usize, found: usize },
    #[error("attention of layer {layer} returned {found} numbers instead of {expected}")]
    AttendedLength { layer: usize, expected: usize, found: usize },
    #[error("layer {layer}: {source}")]
    Attention { layer: usize, source: AttentionError },
}

/// Why a generation stopped short.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error("an empty prompt: give at least one token")]
    EmptyPrompt,
    #[error("{field}: expected {expected}, found {found}")]
    Invalid { field: &'static str, expected: &'static str, found: f32 },
    #[error("no logit is a finite number: the weights are damaged, verify the model file")]
    NoFiniteLogit,
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

/// Why a model could not be found on this machine.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("no folder to keep models in: set LANDMARKDB_CACHE to one")]
    NoCacheFolder,
    #[error("no model {spec:?}: expected the path of a .gguf file or of a safetensors folder, or a pulled model")]
    NotFound { spec: String },
    #[error("model {spec} is not on this machine yet: pull it")]
    NotPulled { spec: String },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

/// Why a text could not be encoded into a memory, or a question about it not be answered.
#[derive(Debug, thiserror::Error)]
pub enum RememberError {
    #[error("an empty text: there is nothing to encode")]
    EmptyText,
    #[error("document {name:?} already holds another text: {difference}")]
    OtherText { name: String, difference: Difference },
    /// What it holds is not a whole beginning of the text, and going on would leave it so.
    #[error("document {name:?} is damaged ({problem}): delete it and encode it again")]
    Damaged { name: String, problem: String },
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Attention(#[from] AttentionError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// How a text differs from what a document holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The first block that has other tokens.
    Block(u32),
    /// The document is whole, and the text goes on after it.
    Longer,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Difference::Block(index) => write!(f, "they differ from block {index} on"),
            Difference::Longer => write!(f, "this one begins with it and goes on"),
        }
    }
}

impl RememberError {
    /// The memory's own error, wherever it came up.
    pub fn memory(&self) -> Option<&MemoryError> {
        let attention = match self {
            RememberError::Memory(error) => return Some(error),
            RememberError::Attention(error) => error,
            RememberError::Forward(ForwardError::Attention { source, .. })
            | RememberError::Generate(GenerateError::Forward(ForwardError::Attention { source, .. })) => source,
            _ => return None,
        };
        match attention {
            AttentionError::Memory(error) => Some(error),
            _ => None,
        }
    }
}
