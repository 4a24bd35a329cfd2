//! What a layer does besides attention, each with its backward pass: one operation per file.
//!
//! Activations are `(N, T, width)`; an operation sees them as rows. Rows are spread over the cores in tasks of a fixed
//! number, and sums over rows are taken task by task in order, so that a result does not depend on who computed what.

mod cross_entropy;
mod embedding;
mod linear;
mod rms_norm;
mod rotate;
mod swiglu;

#[cfg(test)]
mod tests;

pub(super) use cross_entropy::{Targets, cross_entropy};
pub(super) use embedding::embed;
pub(super) use linear::linear;
pub(super) use rms_norm::rms_norm;
pub(super) use rotate::{Rotations, rotate};
pub(super) use swiglu::swiglu;

/// Rows of one task: some tens of microseconds of work at the width of a small model.
const TASK_ROWS: usize = 64;
