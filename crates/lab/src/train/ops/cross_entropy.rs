//! Weighted cross-entropy: `sum(w (lse(logits) - logits[target])) / sum(w)` over rows.
//!
//! Backward: `w (softmax(logits) - onehot(target)) / sum(w)`. A row of weight 0 costs nothing either way.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::TASK_ROWS;
use crate::train::slices::{gradient, input, values, width};
use linalg::{exp_sum, log_sum_exp, max};

/// What the rows of a batch should predict.
#[derive(Clone)]
pub(in crate::train) struct Targets {
    /// One per row; below the number of logits where the weight is not 0.
    pub(in crate::train) ids: Arc<[u32]>,
    /// One per row, not negative, not all 0.
    pub(in crate::train) weights: Arc<[f32]>,
}

struct CrossEntropy {
    targets: Targets,
    weight_sum: f64,
}

/// `logits (.., vocab)` -> a scalar.
pub(in crate::train) fn cross_entropy(logits: &Tensor, targets: Targets) -> Result<Tensor> {
    let weight_sum = targets.weights.iter().map(|&weight| weight as f64).sum();
    logits.apply_op1(CrossEntropy { targets, weight_sum })
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let vocab = width(layout);
        let logits = input(logits, layout)?;
        let Targets { ids, weights } = &self.targets;
        if logits.len() != ids.len() * vocab || ids.len() != weights.len() {
            bail!("logits {:?} do not fit {} targets with {} weights", layout.shape(), ids.len(), weights.len());
        }
        if let Some((_, id)) =
            weights.iter().zip(ids.iter()).find(|&(&weight, &id)| weight != 0.0 && id as usize >= vocab)
        {
            bail!("target {id} is not among {vocab} logits");
        }
        let tasks = logits.par_chunks(TASK_ROWS * vocab).zip(ids.par_chunks(TASK_ROWS));
        let parts: Vec<f64> = tasks
            .zip(weights.par_chunks(TASK_ROWS))
            .map(|((logits, ids), weights)| {
                let rows =
                    logits.chunks_exact(vocab).zip(ids.iter().zip(weights)).filter(|(_, (_, weight))| **weight != 0.0);
                rows.map(|(row, (&id, &weight))| weight as f64 * (log_sum_exp(row) - row[id as usize]) as f64).sum()
            })
            .collect();
        let loss = parts.iter().sum::<f64>() / self.weight_sum;
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, loss_gradient: &Tensor) -> Result<Option<Tensor>> {
        let vocab = logits.dims().last().copied().unwrap_or(1);
        let scale = (loss_gradient.to_scalar::<f32>()? as f64 / self.weight_sum) as f32;
        let Targets { ids, weights } = &self.targets;
        let logit_values = values(logits)?;
        let mut of_logits = vec![0.0; logit_values.len()];
        let tasks = of_logits.par_chunks_mut(TASK_ROWS * vocab).zip(logit_values.par_chunks(TASK_ROWS * vocab));
        tasks.zip(ids.par_chunks(TASK_ROWS).zip(weights.par_chunks(TASK_ROWS))).for_each(
            |((of_logits, logits), (ids, weights))| {
                let rows = of_logits.chunks_exact_mut(vocab).zip(logits.chunks_exact(vocab));
                for ((of_logits, logits), (&id, &weight)) in rows.zip(ids.iter().zip(weights)) {
                    if weight != 0.0 {
                        pull_back(logits, id as usize, weight * scale, of_logits);
                    }
                }
            },
        );
        Ok(Some(gradient(of_logits, logits)?))
    }
}

/// One row: `out = weight * (softmax(logits) - onehot(target))`.
fn pull_back(logits: &[f32], target: usize, weight: f32, out: &mut [f32]) {
    out.copy_from_slice(logits);
    let sum = exp_sum(out, max(logits));
    let share = weight / sum;
    out.iter_mut().for_each(|number| *number *= share);
    out[target] -= weight;
}
