//! Dot products, reductions and softmax sums of vectors.

use half::f16;

use super::math::exp;
use super::simd::{LANES, fma, fold};
use super::widen::{HALVES, widen, widen_one};

simd! {
    /// `sum(a[i] * b[i])` of slices of equal length.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        debug_assert_eq!(a.len(), b.len());
        let mut sums = [0f32; LANES];
        let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let (a_rest, b_rest) = (a_blocks.remainder(), b_blocks.remainder());
        for (a, b) in a_blocks.zip(b_blocks) {
            for lane in 0..LANES {
                sums[lane] = fma::<FMA>(a[lane], b[lane], sums[lane]);
            }
        }
        for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
            *sum = fma::<FMA>(*a, *b, *sum);
        }
        sums.iter().sum()
    }
}

simd! {
    /// `sum(a[i] * b[i])` of slices of equal length, `b` widened in registers.
    pub fn dot_f16(a: &[f32], b: &[f16]) -> f32 {
        debug_assert_eq!(a.len(), b.len());
        let mut sums = [0f32; HALVES];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<HALVES>(), b.as_chunks::<HALVES>());
        for (a, b) in a.iter().zip(b) {
            let b = widen::<FMA>(b);
            for lane in 0..HALVES {
                sums[lane] = fma::<FMA>(a[lane], b[lane], sums[lane]);
            }
        }
        for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
            *sum = fma::<FMA>(*a, widen_one(*b), *sum);
        }
        fold(sums, |a, b| a + b)
    }
}

simd! {
    /// `out[i] += factor * x[i]` for slices of equal length.
    pub fn add_scaled(out: &mut [f32], factor: f32, x: &[f32]) {
        debug_assert_eq!(out.len(), x.len());
        for (out, x) in out.iter_mut().zip(x) {
            *out = fma::<FMA>(factor, *x, *out);
        }
    }
}

simd! {
    /// The largest value, NaN ignored; -inf if there is none.
    pub fn max(values: &[f32]) -> f32 {
        let mut tops = [f32::NEG_INFINITY; LANES];
        let blocks = values.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            for lane in 0..LANES {
                tops[lane] = if block[lane] > tops[lane] { block[lane] } else { tops[lane] };
            }
        }
        tops.iter().chain(rest).fold(f32::NEG_INFINITY, |top, &value| if value > top { value } else { top })
    }
}

simd! {
    /// Replaces each `x` by `e^(x - shift)` and returns the sum. -inf becomes 0.
    pub fn exp_sum(values: &mut [f32], shift: f32) -> f32 {
        let mut sums = [0f32; LANES];
        let mut blocks = values.chunks_exact_mut(LANES);
        for block in &mut blocks {
            for lane in 0..LANES {
                block[lane] = exp::<FMA>(block[lane] - shift);
                sums[lane] += block[lane];
            }
        }
        for (sum, value) in sums.iter_mut().zip(blocks.into_remainder()) {
            *value = exp::<FMA>(*value - shift);
            *sum += *value;
        }
        sums.iter().sum()
    }
}

simd! {
    /// `ln(sum(e^x))`; -inf for an empty slice.
    pub fn log_sum_exp(values: &[f32]) -> f32 {
        log_sum_exp_below(values, max(values))
    }
}

simd! {
    /// [`log_sum_exp`] of values whose maximum is `top`.
    pub fn log_sum_exp_below(values: &[f32], top: f32) -> f32 {
        if top == f32::NEG_INFINITY {
            return top;
        }
        let mut sums = [0f32; LANES];
        let blocks = values.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            for lane in 0..LANES {
                sums[lane] += exp::<FMA>(block[lane] - top);
            }
        }
        for (sum, value) in sums.iter_mut().zip(rest) {
            *sum += exp::<FMA>(*value - top);
        }
        top + sums.iter().sum::<f32>().ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;

    const SIZES: [usize; 9] = [0, 1, 7, 31, 32, 33, 64, 100, 1025];

    #[test]
    fn reductions_agree_with_double_precision_at_every_remainder() {
        for size in SIZES {
            let (a, b) = (random(size, 2.0, 1), random(size, 2.0, 2));
            let want: f64 = a.iter().zip(&b).map(|(a, b)| *a as f64 * *b as f64).sum();
            assert!((dot(&a, &b) as f64 - want).abs() < 1e-4, "dot of {size}");

            let halves: Vec<f16> = b.iter().map(|&b| f16::from_f32(b)).collect();
            let want: f64 = a.iter().zip(&halves).map(|(a, b)| *a as f64 * b.to_f64()).sum();
            assert!((dot_f16(&a, &halves) as f64 - want).abs() < 1e-4, "dot_f16 of {size}");

            let mut out = b.clone();
            add_scaled(&mut out, 0.5, &a);
            assert!(out.iter().zip(a.iter().zip(&b)).all(|(o, (a, b))| (o - (0.5 * a + b)).abs() < 1e-6));

            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max), "max of {size}");

            let want = a.iter().map(|x| (*x as f64).exp()).sum::<f64>().ln();
            let got = log_sum_exp(&a) as f64;
            assert!(got == want || (got - want).abs() < 1e-5, "log_sum_exp of {size}: {got} {want}");

            let mut weights = a.clone();
            let sum = exp_sum(&mut weights, 0.25) as f64;
            let want: f64 = a.iter().map(|x| (*x as f64 - 0.25).exp()).sum();
            assert!((sum - want).abs() <= 1e-5 * want.max(1.0), "exp_sum of {size}");
        }
    }

    #[test]
    fn sums_of_nothing_but_minus_infinity() {
        let mut masked = vec![f32::NEG_INFINITY; 40];
        assert_eq!(log_sum_exp(&masked), f32::NEG_INFINITY);
        assert_eq!(exp_sum(&mut masked, 0.0), 0.0);
        assert!(masked.iter().all(|&x| x == 0.0));
    }
}
