//! Training of landmark models: the Llama family again, differentiable, on candle's automatic differentiation.
//!
//! The forward pass of [`model`](landmarkdb_llm) keeps nothing for a gradient. Here every step is an operation with a
//! backward pass of its own, fused so that a small model trains in minutes on a few cores: between two operations the
//! values go through memory once.
//!
//! In reading order, the model: `slices` (between tensors and slices), `grouped` (the softmax of landmark attention, one
//! row), `attention` (a whole layer of it), `ops` (everything else a layer does), `batch`, `model` (parameters, loss),
//! `weights` (where parameters come from), `adapter` (landmark keys for a model that stays as it is), `learner` (either of
//! them). What it reads: `recipe`, `vocabulary`, `texts`, `documents` (hidden keys),
//! `sequence` (landmarks go in), `mixture` (a step's batch). How it learns: `job`, `start`, `schedule`, `optimizer`,
//! `checkpoint`, `run` (the loop), `validation`, `log` and `card`.

mod adapter;
mod attention;
mod batch;
mod card;
mod checkpoint;
mod documents;
mod error;
mod grouped;
mod job;
mod learner;
mod log;
mod mixture;
mod model;
mod ops;
mod optimizer;
mod recipe;
mod run;
mod schedule;
mod sequence;
mod slices;
mod start;
mod texts;
mod validation;
mod vocabulary;
mod weights;

#[cfg(test)]
mod tests;

pub use adapter::AdapterModel;
pub use batch::Batch;
pub use error::{Difference, TrainError};
pub use grouped::{GroupDropout, grouped_softmax};
pub use job::{Base, Event, Job, StepReport, Trained};
pub use model::{Past, TrainingModel};
pub use recipe::{Kind, Phase, Recipe};
pub use run::train;
pub use validation::Validation;
pub use weights::Parameter;
