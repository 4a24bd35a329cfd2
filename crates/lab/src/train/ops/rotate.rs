//! Rotary position embedding (Su et al. 2021) of all heads of a token by its position. Backward: rotate back.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::TASK_ROWS;
use crate::train::slices::{gradient, input, values, width};
use landmarkdb::{Rope, Rotation};

/// The rotations of a batch's tokens, taken once for all layers.
pub(in crate::train) struct Rotations {
    /// One per token of `(N, T)`.
    forth: Vec<Rotation>,
    back: Vec<Rotation>,
}

impl Rotations {
    /// For tokens at `positions (N, T)`.
    pub(in crate::train) fn new(rope: &Rope, positions: &[u32]) -> Self {
        let rotations =
            |sign: i64| positions.par_iter().map(|&position| rope.rotation(sign * position as i64)).collect();
        Rotations { forth: rotations(1), back: rotations(-1) }
    }
}

struct Rotate {
    rotations: Arc<Rotations>,
    head_dim: usize,
}

/// Rotates every head of `x (N, T, H * D)`.
pub(in crate::train) fn rotate(x: &Tensor, rotations: &Arc<Rotations>, head_dim: usize) -> Result<Tensor> {
    x.apply_op1(Rotate { rotations: rotations.clone(), head_dim })
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut x = input(x, layout)?.to_vec();
        if x.len() != self.rotations.forth.len() * width(layout) {
            bail!("x {:?} does not fit {} positions", layout.shape(), self.rotations.forth.len());
        }
        self.apply(&mut x, &self.rotations.forth);
        Ok((CpuStorage::F32(x), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _rotated: &Tensor, rotated_gradient: &Tensor) -> Result<Option<Tensor>> {
        let mut of_x = values(rotated_gradient)?.to_vec();
        self.apply(&mut of_x, &self.rotations.back);
        Ok(Some(gradient(of_x, x)?))
    }
}

impl Rotate {
    fn apply(&self, x: &mut [f32], rotations: &[Rotation]) {
        let width = x.len() / rotations.len().max(1);
        let tasks = x.par_chunks_mut((TASK_ROWS * width).max(1)).zip(rotations.par_chunks(TASK_ROWS));
        tasks.for_each(|(x, rotations)| {
            for (row, rotation) in x.chunks_exact_mut(width).zip(rotations) {
                row.chunks_exact_mut(self.head_dim).for_each(|head| rotation.apply(head));
            }
        });
    }
}
