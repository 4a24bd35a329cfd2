//! Rotary position embedding (Su et al. 2021) of all heads of a token by its position. Backward: turn back.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::TASK_ROWS;
use crate::train::numbers::{argument, gradient, numbers, width};
use landmarkdb::shape::{Rope, Turn};

/// The turns of a batch's tokens, taken once for all layers.
pub(in crate::train) struct Turns {
    /// One per token of `(N, T)`.
    forth: Vec<Turn>,
    back: Vec<Turn>,
}

impl Turns {
    /// For tokens at `positions (N, T)`.
    pub(in crate::train) fn new(rope: &Rope, positions: &[u32]) -> Self {
        let turns = |sign: i64| positions.par_iter().map(|&position| rope.turn(sign * position as i64)).collect();
        Turns { forth: turns(1), back: turns(-1) }
    }
}

struct Rotate {
    turns: Arc<Turns>,
    head_dim: usize,
}

/// Turns every head of `x (N, T, H * D)`.
pub(in crate::train) fn rotate(x: &Tensor, turns: &Arc<Turns>, head_dim: usize) -> Result<Tensor> {
    x.apply_op1(Rotate { turns: turns.clone(), head_dim })
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut x = argument(x, layout)?.to_vec();
        if x.len() != self.turns.forth.len() * width(layout) {
            bail!("x {:?} does not fit {} positions", layout.shape(), self.turns.forth.len());
        }
        self.turn(&mut x, &self.turns.forth);
        Ok((CpuStorage::F32(x), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _turned: &Tensor, turned_gradient: &Tensor) -> Result<Option<Tensor>> {
        let mut of_x = numbers(turned_gradient)?.to_vec();
        self.turn(&mut of_x, &self.turns.back);
        Ok(Some(gradient(of_x, x)?))
    }
}

impl Rotate {
    fn turn(&self, x: &mut [f32], turns: &[Turn]) {
        let width = x.len() / turns.len().max(1);
        let tasks = x.par_chunks_mut((TASK_ROWS * width).max(1)).zip(turns.par_chunks(TASK_ROWS));
        tasks.for_each(|(x, turns)| {
            for (row, turn) in x.chunks_exact_mut(width).zip(turns) {
                row.chunks_exact_mut(self.head_dim).for_each(|head| turn.apply(head));
            }
        });
    }
}
