//! `y (rows, out) = x (rows, in) w^T` for weights `w (out, in)`, as model files hold them.
//!
//! Backward: `dx = dy w` and `dw = dy^T x`. No product needs a transposed copy, and the gradient of `w` comes out as
//! `w` lies.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::numeric::{Matrix, Threads, Write, multiply};
use crate::train::numbers::{argument, gradient, numbers, width, with_width};

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
        let (x, weight) = (argument(x, x_layout)?, argument(weight, weight_layout)?);
        let rows = x.len() / ins;
        let y = product(Matrix::new(x, rows, ins), Matrix::new(weight, outs, ins).transposed(), rows, outs);
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
        let (x_numbers, weight_numbers, y_gradient) = (numbers(x)?, numbers(weight)?, numbers(y_gradient)?);
        let rows = x_numbers.len() / ins;
        let y_gradient = Matrix::new(&y_gradient, rows, outs);
        let of_x = product(y_gradient, Matrix::new(&weight_numbers, outs, ins), rows, ins);
        let of_weight = product(y_gradient.transposed(), Matrix::new(&x_numbers, rows, ins), outs, ins);
        Ok((Some(gradient(of_x, x)?), Some(gradient(of_weight, weight)?)))
    }
}

/// `a b (rows, columns)`
fn product(a: Matrix, b: Matrix, rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * columns];
    multiply(a, b, &mut out, columns, Write::Replace, Threads::All);
    out
}
