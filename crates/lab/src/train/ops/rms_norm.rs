//! RMS normalisation: with `r = 1 / sqrt(mean(x^2) + epsilon)`, `y = r x w`.
//!
//! Backward, with `c = sum(dy w x)`: `dx = r (dy w - r^2 c x / hidden)` and `dw = sum over rows of (dy r x)`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::TASK_ROWS;
use crate::train::slices::{input, values, wanted, width};
use linalg::{LANES, add_scaled, dot, fma, simd};

struct RmsNorm {
    epsilon: f32,
}

/// `x (.., hidden)`, `weight (hidden)` -> `(.., hidden)`.
pub(in crate::train) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    x.apply_op2(weight, RmsNorm { epsilon })
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (input(x, x_layout)?, input(weight, weight_layout)?);
        let hidden = width(x_layout);
        if weight.len() != hidden {
            bail!("x {:?} does not fit weights {:?}", x_layout.shape(), weight_layout.shape());
        }
        let mut y = vec![0.0; x.len()];
        let tasks = y.par_chunks_mut(TASK_ROWS * hidden).zip(x.par_chunks(TASK_ROWS * hidden));
        tasks.for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden)) {
                scale(x, weight, self.scale(x), y);
            }
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        y_gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x_values, weight_values, y_gradient) = (values(x)?, values(weight)?, values(y_gradient)?);
        let (weights, hidden) = (&*weight_values, weight_values.len());
        let task_len = TASK_ROWS * hidden;
        let mut of_x = vec![0.0; x_values.len()];
        let tasks = of_x.par_chunks_mut(task_len).zip(x_values.par_chunks(task_len));
        let parts: Vec<Vec<f32>> = tasks
            .zip(y_gradient.par_chunks(task_len))
            .map(|((of_x, x), of_y)| {
                let mut of_weight = vec![0.0; if weight.track_op() { hidden } else { 0 }];
                let rows = of_x.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden));
                for ((of_x, x), of_y) in rows.zip(of_y.chunks_exact(hidden)) {
                    let scale = self.scale(x);
                    pull_back(x, weights, of_y, scale, of_x);
                    add_products(&mut of_weight, of_y, x, scale);
                }
                of_weight
            })
            .collect();
        let of_weight = || {
            let mut of_weight = vec![0.0; hidden];
            parts.iter().for_each(|part| add_scaled(&mut of_weight, 1.0, part));
            of_weight
        };
        Ok((wanted(x, || of_x)?, wanted(weight, of_weight)?))
    }
}

impl RmsNorm {
    /// `r` of one row.
    fn scale(&self, x: &[f32]) -> f32 {
        (dot(x, x) / x.len() as f32 + self.epsilon).sqrt().recip()
    }
}

simd! {
    /// `y[i] = x[i] * scale * weight[i]`. Slices of equal length.
    fn scale(x: &[f32], weight: &[f32], scale: f32, y: &mut [f32]) {
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * weight;
        }
    }
}

simd! {
    /// One row: writes `of_x`. Slices of equal length.
    fn pull_back(x: &[f32], weight: &[f32], of_y: &[f32], scale: f32, of_x: &mut [f32]) {
        let mut sums = [0f32; LANES];
        for ((x, weight), of_y) in x.chunks(LANES).zip(weight.chunks(LANES)).zip(of_y.chunks(LANES)) {
            for (((sum, x), weight), of_y) in sums.iter_mut().zip(x).zip(weight).zip(of_y) {
                *sum = fma::<FMA>(*of_y * *weight, *x, *sum);
            }
        }
        let back = scale * scale * scale * sums.iter().sum::<f32>() / x.len() as f32;
        for (((of_x, x), weight), of_y) in of_x.iter_mut().zip(x).zip(weight).zip(of_y) {
            *of_x = scale * of_y * weight - back * x;
        }
    }
}

simd! {
    /// One row of the weights' gradient: `sums += of_y * scale * x`, as far as `sums` reaches.
    fn add_products(sums: &mut [f32], of_y: &[f32], x: &[f32], scale: f32) {
        for ((sum, of_y), x) in sums.iter_mut().zip(of_y).zip(x) {
            *sum = fma::<FMA>(*of_y * scale, *x, *sum);
        }
    }
}
