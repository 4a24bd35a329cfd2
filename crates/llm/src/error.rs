//! Why a model could not be loaded, fetched or run.

use std::path::{Path, PathBuf};

use landmarkdb::{AttentionError, InvalidShape, MemoryError, Sha256Digest};

/// Why a model on disk could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The reason that the system gave.
        source: std::io::Error,
    },
    /// A file that is not GGUF, or a folder with neither `config.json` nor `adapter_config.json`.
    #[error(
        "{path} is neither a .gguf file, nor a folder with config.json, tokenizer.json and *.safetensors, nor an adapter: \
         give one of these, or the name of a model that can be pulled"
    )]
    NotAModel {
        /// Path of the file or folder.
        path: PathBuf,
    },
    /// The file is cut short, or its contents contradict each other or its format.
    #[error("{path} is damaged or cut short: {detail}; fetch it again")]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong, and in which tensor if in one.
        detail: String,
    },
    /// The file lacks a setting that has no default.
    #[error("{path}: {key} is missing; the file is incomplete, or not of a kind of model that is known here")]
    MissingKey {
        /// Path of the JSON or GGUF file.
        path: PathBuf,
        /// Name of the setting, such as `rope_scaling.factor`.
        key: String,
    },
    /// The folder of the model has no `tokenizer.json`.
    #[error(
        "{path} is missing; from a tokenizer.model, `AutoTokenizer.from_pretrained(..).save_pretrained(..)` of \
         Hugging Face transformers makes it"
    )]
    NoTokenizer {
        /// Where the file was expected.
        path: PathBuf,
    },
    /// The file is whole, and asks for something that is not computed here.
    #[error("{path}: {key}: expected {expected}, found {found}{}", way_out.map(|way| format!("; {way}")).unwrap_or_default())]
    Unsupported {
        /// Path of the file.
        path: PathBuf,
        /// The setting or tensor, or the part of the tokenizer.
        key: String,
        /// What can be computed.
        expected: String,
        /// What the file asks for.
        found: String,
        /// What to do instead, where there is a way.
        way_out: Option<&'static str>,
    },
    /// The file has a tensor that the forward pass has no place for.
    #[error(
        "{path}: this program does not know the tensor {name}, and answers that leave it out would be wrong: \
         take a model without it"
    )]
    UnknownTensor {
        /// Path of the weight file.
        path: PathBuf,
        /// The tensor's name in the file.
        name: String,
    },
    /// The file has a setting of the model or the tokenizer that is not known here.
    #[error(
        "{path}: this program does not know the setting {key} ({found}), and answers that ignore it would be wrong: \
         take a model without it"
    )]
    UnknownSetting {
        /// Path of the JSON or GGUF file.
        path: PathBuf,
        /// Name of the setting.
        key: String,
        /// Its value, shortened.
        found: String,
    },
    /// The model computes something that Llama does not, such as biases, and is wanted for training or as an adapter's base.
    #[error(
        "{path}: expected a plain Llama model, found one of another architecture: it can be asked but not trained, \
         and adapters do not fit it; take a Llama model"
    )]
    NotPlain {
        /// Path of the file or folder.
        path: PathBuf,
    },
    /// A tensor holds NaN or an infinity.
    #[error(
        "{path}: tensor {name}: expected finite numbers, found NaN or infinity; the weights are damaged: fetch them again"
    )]
    NotFinite {
        /// Path of the weight file.
        path: PathBuf,
        /// The tensor's name in the file.
        name: String,
    },
    /// The index of the weight files names one that does not lie beside it.
    #[error("{path}: {name:?}: expected the name of a file in the same folder; a model's files lie side by side")]
    OutsideFolder {
        /// Path of `model.safetensors.index.json`.
        path: PathBuf,
        /// The entry that is no plain file name.
        name: String,
    },
    /// A tensor of the model is in none of its files.
    #[error("{path}: there is no tensor {name}; the file is incomplete or of another architecture")]
    MissingTensor {
        /// Path of the weight file, or of the folder of several.
        path: PathBuf,
        /// The tensor's name.
        name: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "{path}: tensor {name}: expected shape {expected:?} from the configuration, found {found:?}; \
         configuration and weights belong to different models"
    )]
    TensorShape {
        /// Path of the weight file.
        path: PathBuf,
        /// The tensor's name in the file.
        name: String,
        /// Length of each axis by the configuration, the slowest first.
        expected: Vec<usize>,
        /// Length of each axis in the file, the slowest first.
        found: Vec<usize>,
    },
    /// A hyperparameter is out of range or contradicts another.
    #[error("{path}: {source}")]
    Shape {
        /// Path of the file with the configuration, or of the weights where a caller brings one.
        path: PathBuf,
        /// The hyperparameter, and the values that it may have.
        source: InvalidShape,
    },
    /// The base model of an adapter could not be found.
    #[error("{path}: the model that this adapter changes: {source}")]
    Base {
        /// Path of `adapter_config.json`.
        path: PathBuf,
        /// Why it could not.
        source: Box<FindError>,
    },
    /// The base model has other weights than those that the adapter was trained with.
    #[error(
        "{path}: expected the base model {base} with SHA-256 {expected}, found {found:#}; \
         an adapter fits only the weights that it was trained with: fetch those"
    )]
    OtherBase {
        /// Path of `adapter_config.json`.
        path: PathBuf,
        /// The base model, as the adapter names it.
        base: String,
        /// SHA-256 of the weights that it was trained with, in hexadecimal.
        expected: String,
        /// SHA-256 of the weights on this machine.
        found: Sha256Digest,
    },
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
    /// A file or folder cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// The reason that the system gave.
        source: std::io::Error,
    },
    /// No base and linear factor give the model's rotary frequencies.
    #[error(
        "config.json cannot tell these rotary frequencies: expected base^(-2i / dims), all divided by one factor, \
         found {frequencies:?}; start from a model with plain or linearly scaled rotation"
    )]
    Rotation {
        /// Radians per token, one per rotated pair: `(rotary_dims / 2)`.
        frequencies: Vec<f32>,
    },
    /// The model computes something that Llama does not, such as biases.
    #[error("config.json is written for plain Llama models only: start from one of those")]
    Architecture,
    /// Only the index reads the model's landmark, which `config.json` has no setting for.
    #[error("config.json cannot tell landmarks that only the index reads: save the adapter that gives them instead")]
    HiddenLandmark,
    /// The tokenizers library could not write the tokenizer as JSON.
    #[error("tokenizer.json: {detail}")]
    Tokenizer {
        /// The reason that the library gave.
        detail: String,
    },
    /// A tensor could not be converted to the dtype of the file.
    #[error("weights: {}", reason(.0))]
    Weights(#[from] candle_core::Error),
    /// The tensors could not be laid out as a safetensors file.
    #[error("weights: {0}")]
    Serialise(#[from] safetensors::SafeTensorError),
}

/// Why a text could not be tokenised.
#[derive(Debug, thiserror::Error)]
#[error("a text of {text_bytes} bytes cannot be tokenised: {detail}")]
pub struct TokenizeError {
    /// Length of the text, in bytes.
    pub text_bytes: usize,
    /// The reason that the tokenizers library gave.
    pub detail: String,
}

/// Why a forward pass failed. The attention may hold part of the tokens then: start the sequence anew.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// A token id has no row in the embedding.
    #[error("token {id} is not in the vocabulary of {vocab}: encode the text with this model's tokenizer")]
    UnknownToken {
        /// The first such id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The embeddings are not `(T, hidden)` for any T.
    #[error("embeddings: expected a multiple of {hidden} numbers, found {found}")]
    EmbeddingLength {
        /// Width of the residual stream.
        hidden: usize,
        /// Values in the embeddings.
        found: usize,
    },
    /// The caller's attention returned something else than `(T, Hq, D)`.
    #[error("attention of layer {layer} returned {found} numbers instead of {expected}")]
    AttendedLength {
        /// The layer, counted from 0.
        layer: usize,
        /// Values in `(T, Hq, D)`.
        expected: usize,
        /// Values that came.
        found: usize,
    },
    /// The caller's attention failed.
    #[error("layer {layer}: {source}")]
    Attention {
        /// The layer, counted from 0.
        layer: usize,
        /// Why it failed.
        source: AttentionError,
    },
}

/// Why a kept state of sliding layers cannot be gone on from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "state of sliding layers: {field}: expected {expected}, found {found}; encode the document again with this model"
)]
pub struct SlidingStateError {
    /// The part of the state.
    pub field: &'static str,
    /// What this model keeps there.
    pub expected: String,
    /// What the state has there.
    pub found: String,
}

/// Why a generation stopped short.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The prompt has no token to predict from.
    #[error("an empty prompt: give at least one token")]
    EmptyPrompt,
    /// A parameter of the sampling is out of range.
    #[error("{field}: expected {expected}, found {found}")]
    Invalid {
        /// Its name in [`Sampling`](crate::Sampling).
        field: &'static str,
        /// The values that it may have.
        expected: &'static str,
        /// The value that it has.
        found: f32,
    },
    /// The logits of the next token are all NaN or infinite.
    #[error("no logit is a finite number: the weights are damaged, verify the model file")]
    NoFiniteLogit,
    /// The forward pass of the prompt or of a generated token failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

/// Why a model could not be found on this machine.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// `LANDMARKDB_CACHE` is not set, and the system names no cache folder of the user.
    #[error("no folder to keep models in: set LANDMARKDB_CACHE to one")]
    NoCacheFolder,
    /// The name is no path that exists, and has no form that can be pulled.
    #[error("no model {spec:?}: expected the path of a .gguf file or of a safetensors folder, or a pulled model")]
    NotFound {
        /// The name or path that was asked for.
        spec: String,
    },
    /// The name is of a model that can be pulled, and its files are not in the cache folder.
    #[error("model {spec} is not on this machine yet: pull it")]
    NotPulled {
        /// The name that was asked for.
        spec: String,
    },
    /// A file or folder of pulled models cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// The reason that the system gave.
        source: std::io::Error,
    },
}

/// Why a chat template draws no prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// It is no template, asks for something that is not there, or says itself that the turns do not suit it.
    #[error("line {line}: {detail}")]
    Render {
        /// Counted from 1; 0 where there is none.
        line: usize,
        /// Human-readable.
        detail: String,
    },
    /// A turn is missing in what was drawn, or stands there twice.
    #[error("it does not show every turn once")]
    LostTurn,
}

/// Why a text could not be encoded into a memory, or a question about it not be answered.
#[derive(Debug, thiserror::Error)]
pub enum RememberError {
    /// The text has no byte.
    #[error("an empty text: there is nothing to encode")]
    EmptyText,
    /// The document holds other tokens than the text, or is sealed with a beginning of it.
    #[error("document {name:?} already holds another text: {difference}")]
    OtherText {
        /// Name of the document.
        name: String,
        /// Where document and text part.
        difference: Difference,
    },
    /// What it holds is not a whole beginning of the text, and going on would leave it so.
    #[error("document {name:?} is damaged ({problem}): delete it and encode it again")]
    Damaged {
        /// Name of the document.
        name: String,
        /// The first fault that verification found, human-readable.
        problem: String,
    },
    /// The model has layers that see the last tokens only, and the document does not keep those for it.
    #[error("{name} cannot be asked with this model yet: its encoding was interrupted; run it again, it goes on")]
    NoState {
        /// The document's.
        name: String,
    },
    /// As before, of a document that takes no more.
    #[error("{name} has lost what it kept for the model to continue it: delete it and encode its text again")]
    LostState {
        /// The document's.
        name: String,
    },
    /// The document keeps the last tokens of layers that are not this model's.
    #[error("the state of sliding layers: {0}")]
    SlidingState(#[from] SlidingStateError),
    /// The model's chat template draws no prompt.
    #[error("the model's chat template: {0}; the question can be asked without it")]
    Template(#[from] TemplateError),
    /// The text or the prompt could not be tokenised.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// A forward pass outside of a generation failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The answer could not be generated.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The attention of a sequence could not be opened, or its tokens not be kept.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// The memory failed or refused a request.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// How a text differs from what a document holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The first block that has other tokens.
    Block(u32),
    /// The document is whole and takes no more, and the text goes on after it.
    Longer,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Difference::Block(index) => write!(f, "they differ from block {index} on"),
            Difference::Longer => write!(f, "this one begins with it and goes on, and the document is sealed"),
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
