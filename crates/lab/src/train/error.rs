//! Why training cannot go on.

use std::path::PathBuf;

use landmarkdb::InvalidShape;
use landmarkdb_llm::{ForwardError, LoadError, SaveError, TokenizeError};

/// Why a model cannot be trained, or not be trained further.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    Shape(#[from] InvalidShape),
    #[error("{field}: expected {expected}, found {found}")]
    Invalid { field: &'static str, expected: String, found: String },
    #[error(
        "sequence {sequence}, token {token}: expected {}, found token {found}; \
         close every block of {block_tokens} tokens with the landmark {landmark}, and no other place",
        if *token as u32 % block_tokens == block_tokens - 1 { "the landmark" } else { "no landmark" }
    )]
    LandmarkPlace { sequence: usize, token: usize, found: u32, landmark: u32, block_tokens: u32 },
    #[error("there is no text to train on: every file is empty")]
    NoText,
    #[error(
        "the longest text has {longest_tokens} tokens, a sequence needs {expected_tokens}: \
         give longer texts, or phases of fewer blocks"
    )]
    TextTooShort { expected_tokens: usize, longest_tokens: usize },
    #[error(
        "a passkey document needs {expected_tokens} tokens, the shortest sequence has {found_tokens}: \
         give phases of more blocks, larger blocks, or a passkey share of 0"
    )]
    SequenceTooShort { expected_tokens: usize, found_tokens: usize },
    #[error(
        "the vocabulary of {expected} tokens is too large for the texts, which give {found}: \
         give more text or a smaller vocabulary"
    )]
    VocabularyTooLarge { expected: usize, found: usize },
    #[error("the vocabulary cannot be trained: {detail}")]
    Vocabulary { detail: String },
    #[error("{path} is damaged, or no checkpoint of a training: {detail}; remove it to begin anew")]
    CheckpointDamaged { path: PathBuf, detail: String },
    #[error(
        "{path} belongs to another training: {}; ask for the same to go on with it, or give another folder",
        differences.iter().map(|d| format!("{}: {} there, {} here", d.name, d.checkpoint, d.asked)).collect::<Vec<_>>().join("; ")
    )]
    OtherRecipe { path: PathBuf, differences: Vec<Difference> },
    #[error(
        "step {step}: the {what} is {value}, expected a finite number; {}; \
         begin anew in another folder with a smaller learning rate or a longer warm-up",
        checkpoint.map_or("no checkpoint was written yet".into(), |step| format!("the checkpoint of step {step} stands"))
    )]
    NotFinite { step: u64, what: &'static str, value: f64, checkpoint: Option<u64> },
    #[error(
        "{path} has a {file} and no checkpoint that could go on: expected a new folder, or that of a training; \
         give another, or move the file away"
    )]
    FolderTaken { path: PathBuf, file: &'static str },
    #[error("{path} is being trained into by another process: wait for it, or give another folder")]
    InUse { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error("a tensor operation failed: {}", landmarkdb_llm::tensor_reason(.0))]
    Tensor(#[from] candle_core::Error),
}

/// One thing that a checkpoint and the training asked for do not have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub name: String,
    pub checkpoint: String,
    pub asked: String,
}
