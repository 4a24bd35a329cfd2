//! Why training cannot go on.

use std::path::PathBuf;

use landmarkdb::InvalidShape;
use landmarkdb_llm::{ForwardError, LoadError, SaveError, TokenizeError};

/// Why a model cannot be trained, or not be trained further.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model to start from, or the folder's `tokenizer.json`, could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The trained model, or the tokenizer of the model to start from, could not be written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A hyperparameter is out of range or contradicts another.
    #[error(transparent)]
    Shape(#[from] InvalidShape),
    /// A setting is out of range, or contradicts another setting, the model or the tokenizer.
    #[error("{field}: expected {expected}, found {found}")]
    Invalid {
        /// The setting, argument or file.
        field: &'static str,
        /// The values that would do.
        expected: String,
        /// The value that it has.
        found: String,
    },
    /// A block ends in another token than the landmark, or a landmark stands elsewhere.
    #[error(
        "sequence {sequence}, token {token}: expected {}, found token {found}; \
         close every block of {block_tokens} tokens with the landmark {landmark}, and no other place",
        if *token as u32 % block_tokens == block_tokens - 1 { "the landmark" } else { "no landmark" }
    )]
    LandmarkPlace {
        /// Row of the batch, from 0.
        sequence: usize,
        /// Place in the row, from 0.
        token: usize,
        /// The token id there.
        found: u32,
        /// The model's landmark token.
        landmark: u32,
        /// B, the landmark included.
        block_tokens: u32,
    },
    /// All texts are empty, or white space alone where a vocabulary is made of them.
    #[error("there is no text to train on: every file is empty")]
    NoText,
    /// No text to train on, or to judge by, is as long as a sequence.
    #[error(
        "the longest text has {longest_tokens} tokens, a sequence needs {expected_tokens}: \
         give longer texts, or phases of fewer blocks"
    )]
    TextTooShort {
        /// Text tokens that fill a sequence, and the one that is only predicted.
        expected_tokens: usize,
        /// Tokens of the longest text.
        longest_tokens: usize,
    },
    /// A phase has no room for a passkey document, and the passkey share is above 0.
    #[error(
        "a passkey document needs {expected_tokens} tokens, the shortest sequence has {found_tokens}: \
         give phases of more blocks, larger blocks, or a passkey share of 0"
    )]
    SequenceTooShort {
        /// Tokens of the shortest passkey document.
        expected_tokens: usize,
        /// Text tokens that fill the shortest sequence, and the one that is only predicted.
        found_tokens: usize,
    },
    /// The texts repeat too little for a vocabulary of the size asked for.
    #[error(
        "the vocabulary of {expected} tokens is too large for the texts, which give {found}: \
         give more text or a smaller vocabulary"
    )]
    VocabularyTooLarge {
        /// Tokens asked for, control tokens included.
        expected: usize,
        /// Tokens that the texts give, control tokens included.
        found: usize,
    },
    /// The tokenizers library failed to train or to write the vocabulary.
    #[error("the vocabulary cannot be trained: {detail}")]
    Vocabulary {
        /// The reason that the library gave.
        detail: String,
    },
    /// The checkpoint is cut short, fails its checksum, or has another format.
    #[error("{path} is damaged, or no checkpoint of a training: {detail}; remove it to begin anew")]
    CheckpointDamaged {
        /// Path of the checkpoint.
        path: PathBuf,
        /// What does not match.
        detail: String,
    },
    /// The checkpoint belongs to a training with other settings, texts, base model or tokenizer.
    #[error(
        "{path} belongs to another training: {}; ask for the same to go on with it, or give another folder",
        differences.iter().map(|d| format!("{}: {} there, {} here", d.name, d.checkpoint, d.asked)).collect::<Vec<_>>().join("; ")
    )]
    OtherRecipe {
        /// Path of the checkpoint.
        path: PathBuf,
        /// All that differs, at least one.
        differences: Vec<Difference>,
    },
    /// A loss or a gradient is NaN or infinite.
    #[error(
        "step {step}: the {what} is {value}, expected a finite number; {}; \
         begin anew in another folder with a smaller learning rate or a longer warm-up",
        checkpoint.map_or("no checkpoint was written yet".into(), |step| format!("the checkpoint of step {step} stands"))
    )]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// `loss` or `length of the gradient`.
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// Steps done at the checkpoint on disk. `None`: there is none.
        checkpoint: Option<u64>,
    },
    /// The folder holds files of a model and no checkpoint.
    #[error(
        "{path} has a {file} and no checkpoint that could go on: expected a new folder, or that of a training; \
         give another, or move the file away"
    )]
    FolderTaken {
        /// Path of the folder to train into.
        path: PathBuf,
        /// One of the files, such as `config.json`.
        file: &'static str,
    },
    /// Another process holds the folder's lock.
    #[error("{path} is being trained into by another process: wait for it, or give another folder")]
    InUse {
        /// Path of the folder to train into.
        path: PathBuf,
    },
    /// A file or folder of the training cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// The reason that the system gave.
        source: std::io::Error,
    },
    /// A text, or a line of a passkey document, could not be tokenised.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// A forward pass of the base failed that an adapter learns from.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// An operation of candle failed, forward or backward.
    #[error("a tensor operation failed: {}", landmarkdb_llm::tensor_reason(.0))]
    Tensor(#[from] candle_core::Error),
}

/// One thing that a checkpoint and the training asked for do not have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// A field of the recipe, or a digest such as `text digest`.
    pub name: String,
    /// Its value in the checkpoint; `nothing` where there is none.
    pub checkpoint: String,
    /// Its value in the training asked for; `nothing` where there is none.
    pub asked: String,
}
