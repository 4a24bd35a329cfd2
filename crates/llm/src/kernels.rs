//! The loops of a forward pass that are not attention, over f32 slices.
//!
//! All of them are bound by memory: one fused pass over the values, spread over the cores, costs a fraction of a chain of
//! tensor operations.

use rayon::prelude::*;

use super::architecture::Activation;
use linalg::{add_scaled, dot, exp, simd};

/// Tokens that one task normalises or gates.
const ROW_TASK_TOKENS: usize = 8;

/// Values that one task normalises in place.
const ROW_TASK_VALUES: usize = 8192;

/// `2 sqrt(2 / pi)`
const TWICE_ROOT_2_OVER_PI: f32 = 2.0 * 0.797_884_6;

/// RMS normalisation: `out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight`, with `x, out (T, hidden)`, `weight (hidden)`.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let hidden = weight.len();
    out.par_chunks_mut(ROW_TASK_TOKENS * hidden).zip(x.par_chunks(ROW_TASK_TOKENS * hidden)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden)) {
            let scale = (dot(x, x) / hidden as f32 + epsilon).sqrt().recip();
            scale_by(x, weight, scale, out);
        }
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

/// RMS normalisation in place: `x[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight`, with `x (rows, width)`, `weight (width)`.
pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
    let width = weight.len();
    x.par_chunks_mut(ROW_TASK_VALUES.div_ceil(width) * width).for_each(|x| {
        for x in x.chunks_exact_mut(width) {
            let scale = (dot(x, x) / width as f32 + epsilon).sqrt().recip();
            x.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * scale * weight);
        }
    });
}

/// `x[r] += bias`, with `x (rows, width)`, `bias (width)`.
pub(super) fn add_bias(x: &mut [f32], bias: &[f32]) {
    for x in x.chunks_exact_mut(bias.len()) {
        add_scaled(x, 1.0, bias);
    }
}

/// `out[t] = activation(gate[t]) * up[t]`, with `gate_up (T, 2 * ffn)` holding both side by side, `out (T, ffn)`.
pub(super) fn gated(gate_up: &[f32], activation: Activation, ffn: usize, out: &mut [f32]) {
    out.par_chunks_mut(ROW_TASK_TOKENS * ffn).zip(gate_up.par_chunks(ROW_TASK_TOKENS * 2 * ffn)).for_each(
        |(out, gate_up)| {
            for (out, gate_up) in out.chunks_exact_mut(ffn).zip(gate_up.chunks_exact(2 * ffn)) {
                let (gate, up) = gate_up.split_at(ffn);
                match activation {
                    Activation::Silu => silu_times(gate, up, out),
                    Activation::GeluTanh => gelu_times(gate, up, out),
                }
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

simd! {
    /// `out[i] = g(gate[i]) * up[i]`, with `g(x) = x (1 + tanh(u)) / 2 = x / (1 + e^-2u)` and `u = sqrt(2 / pi) (x + 0.044715 x^3)`.
    /// Slices of equal length.
    fn gelu_times(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let twice = TWICE_ROOT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate);
            *out = gate / (1.0 + exp::<FMA>(-twice)) * up;
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
    use rand::{RngExt, SeedableRng};

    fn values(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn norm_and_gate_agree_with_their_formulas() {
        let (tokens, width) = (19, 37);
        let (x, w) = (values(tokens * width, 4), values(width, 5));
        let mut out = vec![0.0; tokens * width];
        rms_norm(&x, &w, 1e-5, &mut out);
        for (x, out) in x.chunks(width).zip(out.chunks(width)) {
            let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                let want = x[i] as f64 / (mean + 1e-5).sqrt() * w[i] as f64;
                assert!((out[i] as f64 - want).abs() < 1e-5);
            }
        }

        let gate_up: Vec<f32> = values(tokens * 2 * width, 6).iter().map(|x| x * 20.0).collect();
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let gelu = |x: f64| x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        for activation in [Activation::Silu, Activation::GeluTanh] {
            gated(&gate_up, activation, width, &mut out);
            for (both, out) in gate_up.chunks(2 * width).zip(out.chunks(width)) {
                for i in 0..width {
                    let (gate, up) = (both[i] as f64, both[width + i] as f64);
                    let want = up * if activation == Activation::Silu { silu(gate) } else { gelu(gate) };
                    assert!((out[i] as f64 - want).abs() < 1e-4 * want.abs().max(1.0), "{activation:?} of {gate}");
                }
            }
        }
        // Far out, both sides: neither an infinity nor NaN.
        for gate in [-1e4, 1e4f32] {
            gated(&[gate, 1.0], Activation::GeluTanh, 1, &mut out[..1]);
            assert!((out[0] - gate.max(0.0)).abs() < 1e-6, "{gate}: {}", out[0]);
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
