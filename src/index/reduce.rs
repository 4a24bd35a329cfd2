//! How do the scores of many keys become one? Maxima and log-sum-exps of rows.

use crate::types::BlockScore;
use linalg::{exp, larger, simd};

/// `log(e^a + e^b)`.
pub(super) fn add_logs(a: f32, b: f32) -> f32 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == f32::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// `keys (blocks * m)` to `scores (blocks)`.
pub(super) fn reduce(rule: BlockScore, keys: &[f32], per_block: usize, scores: &mut [f32]) {
    if per_block == 1 {
        scores.copy_from_slice(keys);
        return;
    }
    match rule {
        BlockScore::Max => maxima(keys, per_block, scores),
        BlockScore::LogSumExp => log_sum_exps(keys, per_block, scores),
    }
}

/// Values that are compared or summed side by side: one AVX-512 register.
const LANES: usize = 16;

/// The largest of some values; -inf for none.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; LANES];
    let (parts, rest) = values.as_chunks::<LANES>();
    for part in parts {
        for lane in 0..LANES {
            tops[lane] = larger(tops[lane], part[lane]);
        }
    }
    for (top, &number) in tops.iter_mut().zip(rest) {
        *top = larger(*top, number);
    }
    linalg::fold(tops, larger)
}

simd! {
    /// The largest of every `count` values, fewer at the end.
    pub(super) fn maxima(values: &[f32], count: usize, into: &mut [f32]) {
        for (top, values) in into.iter_mut().zip(values.chunks(count)) {
            *top = largest(values);
        }
    }
}

simd! {
    /// The log-sum-exp of every `count` values.
    fn log_sum_exps(values: &[f32], count: usize, into: &mut [f32]) {
        /// Results whose logarithms are taken together: one alone waits for every step of its polynomial.
        const TOGETHER: usize = 64;
        for (results, values) in into.chunks_mut(TOGETHER).zip(values.chunks(TOGETHER * count)) {
            let (mut tops, mut totals) = ([0f32; TOGETHER], [1f32; TOGETHER]);
            for ((top, total), values) in tops.iter_mut().zip(&mut totals).zip(values.chunks_exact(count)) {
                *top = largest(values);
                let mut sums = [0f32; LANES];
                let (parts, rest) = values.as_chunks::<LANES>();
                for part in parts {
                    for lane in 0..LANES {
                        sums[lane] += exp::<FMA>(part[lane] - *top);
                    }
                }
                for (sum, &number) in sums.iter_mut().zip(rest) {
                    *sum += exp::<FMA>(number - *top);
                }
                *total = linalg::fold(sums, |a, b| a + b);
            }
            for (top, total) in tops.iter_mut().zip(totals) {
                *top += linalg::ln::<FMA>(total);
            }
            results.copy_from_slice(&tops[..results.len()]);
        }
    }
}
