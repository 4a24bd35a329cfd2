//! Training of landmark models: the Llama family again, differentiable, on candle's automatic differentiation.
//!
//! The forward pass of [`model`](crate::model) keeps nothing for a gradient. Here every step is an operation with a
//! backward pass of its own, fused so that a small model trains in minutes on a few cores: between two operations the
//! numbers go through memory once.
//!
//! In reading order: `numbers` (between tensors and slices), `grouped` (the softmax of landmark attention, one row),
//! `attention` (a whole layer of it), `ops` (everything else a layer does), `batch`, `model` (parameters, loss),
//! `weights` (where parameters come from).

mod attention;
mod batch;
mod error;
mod grouped;
mod model;
mod numbers;
mod ops;
mod weights;

#[cfg(test)]
mod tests;

pub use batch::Batch;
pub use error::TrainError;
pub use grouped::GroupDropout;
pub use model::{Parameter, Past, TrainingModel};
