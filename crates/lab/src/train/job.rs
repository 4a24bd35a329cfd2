//! What a training is asked for, and what it tells.

use std::path::PathBuf;

use serde::Serialize;

use super::recipe::Recipe;
use super::validation::Validation;

/// What to train, from what, and where to.
#[derive(Clone, Debug)]
pub struct Job {
    /// The folder of the model. Created if it is not there.
    pub out: PathBuf,
    /// All settings that decide the weights.
    pub recipe: Recipe,
    /// Texts to train on. Empty ones are left out.
    pub texts: Vec<String>,
    /// Texts to judge by, never trained on; may be none.
    pub validation: Vec<String>,
    /// The model to start from; random weights without one.
    pub from: Option<Base>,
    /// Steps between two checkpoints.
    pub checkpoint_every: u64,
}

/// A model that a training starts from.
#[derive(Clone, Debug)]
pub struct Base {
    /// What [`resolve`](landmarkdb_llm::resolve) takes, which an adapter remembers.
    pub name: String,
    /// A `.gguf` file or a folder.
    pub path: PathBuf,
}

/// What a training tells while it goes on.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Something that takes seconds and has no steps.
    Stage(&'static str),
    /// The loop begins, after steps that were done before.
    Begin {
        /// Steps done at the checkpoint that the run resumes, else 0.
        done_steps: u64,
        /// Steps of the whole training.
        steps: u64,
    },
    /// A step is done and in the log.
    Step(&'a StepReport),
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Counted from 1.
    pub step: u64,
    /// What the step lowered, in nats: the weighed mean of the cross-entropy over all predicted tokens; of an adapter,
    /// of the divergence of its choices.
    pub loss: f32,
    /// The same over the digits of first answers; measured in some steps, before their update.
    pub answer_loss: Option<f32>,
    /// By the schedule, for the step's update.
    pub learning_rate: f64,
    /// Before clipping.
    pub gradient_norm: f64,
    /// Landmarks included.
    pub tokens_per_s: f64,
}

/// How a training ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trained {
    /// Numbers that were trained.
    pub parameters: usize,
    /// Steps done, those of earlier runs included.
    pub steps: u64,
    /// Steps that an earlier run had done.
    pub resumed_steps: u64,
    /// Tokens read in this run, landmarks included.
    pub tokens: u64,
    /// Of the loop, in this run.
    pub train_s: f64,
    /// Of the last step that this run did.
    pub loss: Option<f32>,
    /// The last one that this run measured.
    pub answer_loss: Option<f32>,
    /// None without texts to judge by.
    pub validation: Option<Validation>,
    /// False if the training was stopped: the same call goes on with it.
    pub finished: bool,
}
