//! `y (rows, out) = x (rows, in) w^T` for weights `w (out, in)`, as model files hold them.
//!
//! Backward: `dx = dy w` and `dw = dy^T x`, each only where somebody asks for it: weights that stay as they are have no
//! gradient. No product needs a transposed copy, and the gradient of `w` comes out as `w` lies.
//!
//! Each product is cut into tasks by the rows of its result, more than there are cores: on a machine with other work
//! the thread that gets on takes more of them, where a product shared out once waits for the thread that does not. What
//! a task computes does not depend on the number of threads.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::train::slices::{input, values, wanted, width, with_width};
use linalg::{Matrix, Write, multiply};

/// Tasks of one product at most. Each packs the other operand anew, so there should not be many more.
const TASKS_MAX: usize = 16;

/// Rows of one task at least where the other operand is weights, which may be large: at 32 packing them took a seventh
/// of a step of SmolLM2.
const ROWS_MIN: usize = 128;

/// Rows of one task at least where the other operand is activations.
const OUTER_ROWS_MIN: usize = 32;

struct Linear;

/// `x (.., in)`, `weight (out, in)` -> `(.., out)`.
pub(in crate::train) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.apply_op2(weight, Linear)
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (outs, ins) = weight_layout.shape().dims2()?;
        if width(x_layout) != ins {
            bail!("x {:?} does not fit weights {:?}", x_layout.shape(), weight_layout.shape());
        }
        let (x, weight) = (input(x, x_layout)?, input(weight, weight_layout)?);
        let y = product(x, ins, Matrix::new(weight, outs, ins).transposed(), outs);
        Ok((CpuStorage::F32(y), with_width(x_layout, outs)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        y_gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (outs, ins) = weight.dims2()?;
        let (x_values, weight_values, y_gradient) = (values(x)?, values(weight)?, values(y_gradient)?);
        let of_x = || product(&y_gradient, outs, Matrix::new(&weight_values, outs, ins), ins);
        let of_weight = || outer(&y_gradient, outs, &x_values, ins);
        Ok((wanted(x, of_x)?, wanted(weight, of_weight)?))
    }
}

/// `a (rows, width) b (width, columns)`
pub(super) fn product(a: &[f32], width: usize, b: Matrix, columns: usize) -> Vec<f32> {
    let rows = a.len() / width;
    let mut out = vec![0.0; rows * columns];
    let task_rows = task_rows(rows, ROWS_MIN);
    out.par_chunks_mut(task_rows * columns).zip(a.par_chunks(task_rows * width)).for_each(|(out, a)| {
        let a = Matrix::new(a, a.len() / width, width);
        multiply(a, b, out, columns, Write::Replace);
    });
    out
}

/// `a (rows, width)^T b (rows, columns)`
fn outer(a: &[f32], width: usize, b: &[f32], columns: usize) -> Vec<f32> {
    let rows = a.len() / width;
    let b = Matrix::new(b, rows, columns);
    let mut out = vec![0.0; width * columns];
    let task_rows = task_rows(width, OUTER_ROWS_MIN);
    out.par_chunks_mut(task_rows * columns).enumerate().for_each(|(task, out)| {
        let a = Matrix::with_stride(&a[task * task_rows..], rows, out.len() / columns, width);
        multiply(a.transposed(), b, out, columns, Write::Replace);
    });
    out
}

fn task_rows(rows: usize, rows_min: usize) -> usize {
    rows.div_ceil(TASKS_MAX).max(rows_min)
}
