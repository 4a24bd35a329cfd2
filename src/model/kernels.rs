//! The loops of a forward pass that are not attention, over f32 slices.
//!
//! Matrix times matrix is a library's; everything else is memory-bound and written here, because one fused
//! pass over the numbers, spread over the cores, costs a fraction of a chain of tensor operations.

use rayon::prelude::*;

use super::weights::Matrix;
use crate::numeric::{self, LANES, Threads, Write, dot, exp, fma, simd};

/// Rows of a matrix that one task multiplies with a single vector: long enough that starting it costs nothing.
const GEMV_TASK_ROWS: usize = 64;

/// Up to here tokens go one by one: packing the weights for a matrix product costs more than it saves (measured: at 2
/// tokens 4 times slower, at 8 twice, at 16 faster).
const GEMV_TOKENS_MAX: usize = 8;

/// Tokens that one task normalises or gates.
const ROW_TASK_TOKENS: usize = 8;

/// `out (T, rows) = x (T, columns) . weight (rows, columns)^T`, or `out += ..`.
pub(super) fn multiply(x: &[f32], weight: &Matrix, out: &mut [f32], write: Write) {
    let columns = weight.columns();
    debug_assert!(x.len().is_multiple_of(columns));
    let tokens = x.len() / columns;
    if tokens == 0 {
        return;
    }
    weight.with(|weight| {
        let rows = weight.len() / columns;
        if tokens <= GEMV_TOKENS_MAX {
            x.chunks_exact(columns).zip(out.chunks_exact_mut(rows)).for_each(|(x, out)| gemv(x, weight, out, write));
        } else {
            let matrix = numeric::Matrix::new(weight, rows, columns).transposed();
            numeric::multiply(numeric::Matrix::new(x, tokens, columns), matrix, out, rows, write, Threads::All);
        }
    });
}

/// One token: bound by reading the weights, which packing would read and write again.
fn gemv(x: &[f32], weight: &[f32], out: &mut [f32], write: Write) {
    let columns = x.len();
    out.par_chunks_mut(GEMV_TASK_ROWS)
        .zip(weight.par_chunks(GEMV_TASK_ROWS * columns))
        .for_each(|(out, weight)| gemv_rows(x, weight, out, write == Write::Add));
}

simd! {
    /// `out[r] (+)= x . weight[r]` for some rows: `x (columns)`, `weight (rows, columns)`, `out (rows)`.
    fn gemv_rows(x: &[f32], weight: &[f32], out: &mut [f32], add: bool) {
        for (out, row) in out.iter_mut().zip(weight.chunks_exact(x.len())) {
            let mut sums = [0f32; LANES];
            let (x_blocks, row_blocks) = (x.chunks_exact(LANES), row.chunks_exact(LANES));
            let (x_rest, row_rest) = (x_blocks.remainder(), row_blocks.remainder());
            for (x, row) in x_blocks.zip(row_blocks) {
                for lane in 0..LANES {
                    sums[lane] = fma::<FMA>(x[lane], row[lane], sums[lane]);
                }
            }
            for ((sum, x), row) in sums.iter_mut().zip(x_rest).zip(row_rest) {
                *sum = fma::<FMA>(*x, *row, *sum);
            }
            let sum = sums.iter().sum::<f32>();
            *out = if add { *out + sum } else { sum };
        }
    }
}

/// RMS normalisation: `out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight`, with `x, out (T, hidden)`, `weight (hidden)`.
pub(super) fn rms_norm(x: &[f32], weight: &Matrix, epsilon: f32, out: &mut [f32]) {
    let hidden = weight.columns();
    weight.with(|weight| {
        out.par_chunks_mut(ROW_TASK_TOKENS * hidden).zip(x.par_chunks(ROW_TASK_TOKENS * hidden)).for_each(
            |(out, x)| {
                for (out, x) in out.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden)) {
                    let scale = (dot(x, x) / hidden as f32 + epsilon).sqrt().recip();
                    scale_by(x, weight, scale, out);
                }
            },
        );
    });
}

simd! {
    /// `out[i] = x[i] * scale * weight[i]`. Slices of equal length.
    fn scale_by(x: &[f32], weight: &[f32], scale: f32, out: &mut [f32]) {
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// SwiGLU: `out[t] = silu(gate[t]) * up[t]`, with `gate_up (T, 2 * ffn)` holding both side by side, `out (T, ffn)`.
pub(super) fn swiglu(gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    out.par_chunks_mut(ROW_TASK_TOKENS * ffn).zip(gate_up.par_chunks(ROW_TASK_TOKENS * 2 * ffn)).for_each(
        |(out, gate_up)| {
            for (out, gate_up) in out.chunks_exact_mut(ffn).zip(gate_up.chunks_exact(2 * ffn)) {
                let (gate, up) = gate_up.split_at(ffn);
                silu_times(gate, up, out);
            }
        },
    );
}

simd! {
    /// `out[i] = gate[i] / (1 + e^-gate[i]) * up[i]`. Slices of equal length.
    fn silu_times(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp::<FMA>(-*gate)) * up;
        }
    }
}

/// Copies columns `start..start + width` of every row of `x (T, columns)` to `out (T, width)`.
pub(super) fn take_columns(x: &[f32], columns: usize, start: usize, out: &mut [f32]) {
    let width = if x.is_empty() { 0 } else { out.len() / (x.len() / columns) };
    for (out, x) in out.chunks_exact_mut(width.max(1)).zip(x.chunks_exact(columns)) {
        out.copy_from_slice(&x[start..start + width]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use rand::{RngExt, SeedableRng};

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    fn matrix(rows: usize, columns: usize, numbers: &[f32]) -> Matrix {
        Matrix::stack(&[Tensor::from_slice(numbers, (rows, columns), &Device::Cpu).unwrap()]).unwrap()
    }

    #[test]
    fn products_agree_with_double_precision_for_one_token_and_many() {
        for (tokens, rows, columns) in [(1, 1, 1), (1, 130, 33), (2, 5, 31), (8, 64, 100), (9, 65, 96)] {
            let (x, w) = (numbers(tokens * columns, 1), numbers(rows * columns, 2));
            let before = numbers(tokens * rows, 3);
            let weight = matrix(rows, columns, &w);
            let (mut replaced, mut added) = (before.clone(), before.clone());
            multiply(&x, &weight, &mut replaced, Write::Replace);
            multiply(&x, &weight, &mut added, Write::Add);
            for t in 0..tokens {
                for r in 0..rows {
                    let want: f64 = (0..columns).map(|c| x[t * columns + c] as f64 * w[r * columns + c] as f64).sum();
                    let at = t * rows + r;
                    assert!((replaced[at] as f64 - want).abs() < 1e-4, "{tokens} {rows} {columns}");
                    assert!((added[at] as f64 - want - before[at] as f64).abs() < 1e-4, "{tokens} {rows} {columns}");
                }
            }
        }
    }

    #[test]
    fn norm_and_gate_agree_with_their_formulas() {
        let (tokens, width) = (19, 37);
        let (x, w) = (numbers(tokens * width, 4), numbers(width, 5));
        let mut out = vec![0.0; tokens * width];
        rms_norm(&x, &matrix(1, width, &w), 1e-5, &mut out);
        for (x, out) in x.chunks(width).zip(out.chunks(width)) {
            let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                let want = x[i] as f64 / (mean + 1e-5).sqrt() * w[i] as f64;
                assert!((out[i] as f64 - want).abs() < 1e-5);
            }
        }

        let gate_up: Vec<f32> = numbers(tokens * 2 * width, 6).iter().map(|x| x * 20.0).collect();
        swiglu(&gate_up, width, &mut out);
        for (both, out) in gate_up.chunks(2 * width).zip(out.chunks(width)) {
            for i in 0..width {
                let (gate, up) = (both[i] as f64, both[width + i] as f64);
                let want = gate / (1.0 + (-gate).exp()) * up;
                assert!((out[i] as f64 - want).abs() < 1e-4 * want.abs().max(1.0));
            }
        }
    }

    #[test]
    fn columns_are_taken_row_by_row() {
        let x: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut out = [0.0; 6];
        take_columns(&x, 4, 1, &mut out);
        assert_eq!(out, [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
    }
}
