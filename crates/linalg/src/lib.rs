//! Dot products, softmax sums, conversions and matrix products, each compiled for the instruction sets a machine may
//! have and chosen at run time. Nothing here knows what a block or a memory is.
//!
//! ```
//! let mut weights = vec![0.5f32, 1.5, -1.0];
//! let sum = landmarkdb_linalg::exp_sum(&mut weights, 1.5);
//! assert!((sum - (1.0 + (-1f32).exp() + (-2.5f32).exp())).abs() < 1e-6);
//! ```
//!
//! A loop is written once, over arrays of [`LANES`] accumulators that the compiler keeps in vector registers;
//! `simd!` compiles it for AVX-512, for AVX2 with FMA, and as it stands. Sums are therefore taken in another order
//! than left to right, and may differ in the last bits between machines.

#![warn(unreachable_pub)]

mod channels;
mod few;
mod matrix;
mod memory;
mod packed;
mod panels;

pub use channels::ChannelCode;
pub use few::{FEW_ROWS, Number, multiply_few};
pub use matrix::{Matrix, Write, multiply};
pub use memory::zeroed;
pub use packed::{PANEL, Packed};
pub use panels::{BLOCK, BlockFormat};

use half::f16;

/// Accumulators that a reduction keeps apart: two AVX-512 registers' worth, to hide the latency of an addition.
pub const LANES: usize = 32;

/// Compiles a function for several instruction sets. Inside the body, `fma::<FMA>(a, b, c)` is `a * b + c`, fused
/// where the machine can.
#[macro_export]
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident$(<$generic:ident: $bound:ident>)?($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name$(<$generic: $bound>)?($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$($generic: $bound,)? const FMA: bool>($($arg: $type),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                fn avx512$(<$generic: $bound>)?($($arg: $type),*) $(-> $ret)? {
                    body::<$($generic,)? true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2$(<$generic: $bound>)?($($arg: $type),*) $(-> $ret)? {
                    body::<$($generic,)? true>($($arg),*)
                }
                match $crate::level() {
                    // SAFETY: `level` found these instruction sets on this machine.
                    $crate::Level::Avx512 => return unsafe { avx512$(::<$generic>)?($($arg),*) },
                    // SAFETY: as above.
                    $crate::Level::Avx2 => return unsafe { avx2$(::<$generic>)?($($arg),*) },
                    $crate::Level::Portable => {}
                }
            }
            body::<$($generic,)? false>($($arg),*)
        }
    };
}

/// The widest instruction set that `simd!` functions use here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Avx512,
    Avx2,
    Portable,
}

/// What this machine has; found once.
#[inline]
pub fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") && has!("f16c") {
            return Level::Avx512;
        }
        if has!("avx2") && has!("fma") && has!("f16c") {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// `a * b + c`.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a slow library call.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// ln 2 in two parts, so that a whole multiple loses nothing.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `e^x` within 2 units in the last place for `x` in -87 to 88; 0 below (there the true value is under 1.7e-38),
/// clamped above. A polynomial that vectorises, after Cephes `expf`.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const SMALLEST: f32 = -87.0;
    const LARGEST: f32 = 88.0;
    // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the lowest bits.
    const ROUND: f32 = 12_582_912.0;

    let clamped = if x < SMALLEST { SMALLEST } else { x };
    let clamped = if clamped > LARGEST { LARGEST } else { clamped };
    let shifted = fma::<FMA>(clamped, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_HIGH, clamped);
    let r = fma::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.987_569_1e-4;
    p = fma::<FMA>(p, r, 1.398_199_9e-3);
    p = fma::<FMA>(p, r, 8.333_452e-3);
    p = fma::<FMA>(p, r, 4.166_579_6e-2);
    p = fma::<FMA>(p, r, 0.166_666_65);
    p = fma::<FMA>(p, r, 0.5);
    let e = fma::<FMA>(p, r * r, r) + 1.0;
    // `n` lies in -126 to 127 by the clamps, so this is its exponent; all bits above it are shifted out.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = e * power;
    if x < SMALLEST { 0.0 } else { value }
}

/// `ln(x)` within 2 units in the last place (absolute 1e-7 near 1) for normal `x`. Vectorises, after Cephes `logf`.
#[inline(always)]
pub fn ln<const FMA: bool>(x: f32) -> f32 {
    // x = m 2^e with m from sqrt(1/2) to sqrt(2): subtracting the bits of sqrt(1/2) carries into the exponent where m is above.
    const HALF_ROOT: u32 = 0x3f35_04f3;
    let shifted = x.to_bits().wrapping_sub(HALF_ROOT) as i32;
    let e = (shifted >> 23) as f32;
    let m = f32::from_bits(((shifted & 0x7f_ffff) as u32).wrapping_add(HALF_ROOT)) - 1.0;
    let mut p = 7.037_683_6e-2;
    p = fma::<FMA>(p, m, -1.151_461e-1);
    p = fma::<FMA>(p, m, 1.167_699_9e-1);
    p = fma::<FMA>(p, m, -1.242_014_1e-1);
    p = fma::<FMA>(p, m, 1.424_932_3e-1);
    p = fma::<FMA>(p, m, -1.666_805_8e-1);
    p = fma::<FMA>(p, m, 2.000_071_5e-1);
    p = fma::<FMA>(p, m, -2.499_999_4e-1);
    p = fma::<FMA>(p, m, 3.333_333e-1);
    let square = m * m;
    let tail = fma::<FMA>(p * m, square, fma::<FMA>(e, LN2_LOW, -0.5 * square));
    fma::<FMA>(e, LN2_HIGH, m + tail)
}

/// Joins accumulators at shrinking distance: for 16 of them four dependent steps, in registers, and not sixteen.
#[inline(always)]
pub fn fold<const N: usize>(mut lanes: [f32; N], two: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = two(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The larger one; the first if the second is no number.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// How far ahead of its use memory is asked for: two pages. The hardware's own prefetcher stops at every page of 4 KiB;
/// with this two cores read 1.1 to 1.6 times as fast, and one core 1.2 times. 4 KiB were slower, 16 no faster.
const AHEAD: usize = 8192;

const CACHE_LINE: usize = 64;

/// Asks for the `BYTES` that lie some way ahead of a pointer. Past the end of an allocation this does nothing.
#[inline(always)]
pub fn prefetch<const BYTES: usize>(from: *const i8) {
    for line in (0..BYTES).step_by(CACHE_LINE) {
        prefetch_line(from.wrapping_add(AHEAD + line));
    }
}

/// Asks for numbers that will be read soon, in no order that the hardware could guess.
#[inline(always)]
pub fn ask_for<N>(numbers: &[N]) {
    for line in (0..size_of_val(numbers)).step_by(CACHE_LINE) {
        prefetch_line(numbers.as_ptr().cast::<i8>().wrapping_add(line));
    }
}

#[inline(always)]
fn prefetch_line(address: *const i8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing that the program sees, and never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Half floats that [`widen`] takes at once: one AVX-512 register of single ones.
pub const HALVES: usize = 16;

/// Widens half floats, by the instruction for it where the machine has one. What infinities become differs between
/// machines; callers check for them where numbers come in.
#[inline(always)]
pub fn widen<const FMA: bool>(halves: &[f16; HALVES]) -> [f32; HALVES] {
    #[cfg(target_arch = "x86_64")]
    if FMA {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
        let mut wide = [0.0; HALVES];
        for (halves, wide) in halves.as_chunks::<8>().0.iter().zip(wide.as_chunks_mut::<8>().0) {
            // SAFETY: `simd!` sets FMA only where it enables F16C too, and both sides are eight numbers long.
            unsafe { _mm256_storeu_ps(wide.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()))) };
        }
        return wide;
    }
    halves.map(widen_one)
}

/// Widens one half float. Vectorises, which a call per number does not. Infinities become large numbers.
#[inline(always)]
fn widen_one(half: f16) -> f32 {
    let bits = half.to_bits() as u32;
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000); // 2^112
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

simd! {
    /// `sum(a[i] * b[i])`. Slices of equal length.
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
    /// `sum(a[i] * b[i])` with half floats. Slices of equal length.
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

/// The largest size of a number in symmetric int8.
const INT8_LARGEST: f32 = 127.0;

/// The scale of symmetric int8 for some numbers: the largest of them becomes 127 or -127.
pub fn int8_scale(numbers: impl Iterator<Item = f32>) -> f32 {
    numbers.fold(0.0, |top: f32, number| top.max(number.abs())) / INT8_LARGEST
}

/// A number in steps of `scale`, nearest. A scale of zero means that all numbers are (or are so small that they round to it).
#[inline]
pub fn to_int8(number: f32, scale: f32) -> i8 {
    if scale == 0.0 {
        return 0;
    }
    (number / scale).round().clamp(-INT8_LARGEST, INT8_LARGEST) as i8
}

/// The whole number nearest to one between -128 and 127.
#[inline(always)]
pub fn nearest(number: f32) -> i8 {
    // Added to a number, it leaves the nearest whole one in the lowest bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    (number + ROUND).to_bits() as i8
}

simd! {
    /// `out[i] += factor * x[i]`. Slices of equal length.
    pub fn add_scaled(out: &mut [f32], factor: f32, x: &[f32]) {
        debug_assert_eq!(out.len(), x.len());
        for (out, x) in out.iter_mut().zip(x) {
            *out = fma::<FMA>(factor, *x, *out);
        }
    }
}

simd! {
    /// The largest number; -inf for none.
    pub fn max(numbers: &[f32]) -> f32 {
        let mut tops = [f32::NEG_INFINITY; LANES];
        let blocks = numbers.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            for lane in 0..LANES {
                tops[lane] = if block[lane] > tops[lane] { block[lane] } else { tops[lane] };
            }
        }
        tops.iter().chain(rest).fold(f32::NEG_INFINITY, |top, &number| if number > top { number } else { top })
    }
}

simd! {
    /// Replaces each `x` by `e^(x - shift)` and returns their sum. `-inf` becomes 0.
    pub fn exp_sum(numbers: &mut [f32], shift: f32) -> f32 {
        let mut sums = [0f32; LANES];
        let mut blocks = numbers.chunks_exact_mut(LANES);
        for block in &mut blocks {
            for lane in 0..LANES {
                block[lane] = exp::<FMA>(block[lane] - shift);
                sums[lane] += block[lane];
            }
        }
        for (sum, number) in sums.iter_mut().zip(blocks.into_remainder()) {
            *number = exp::<FMA>(*number - shift);
            *sum += *number;
        }
        sums.iter().sum()
    }
}

simd! {
    /// `log(sum(e^x))`; -inf for none.
    pub fn log_sum_exp(numbers: &[f32]) -> f32 {
        log_sum_exp_below(numbers, max(numbers))
    }
}

simd! {
    /// [`log_sum_exp`] of numbers whose largest is `top`.
    pub fn log_sum_exp_below(numbers: &[f32], top: f32) -> f32 {
        if top == f32::NEG_INFINITY {
            return top;
        }
        let mut sums = [0f32; LANES];
        let blocks = numbers.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            for lane in 0..LANES {
                sums[lane] += exp::<FMA>(block[lane] - top);
            }
        }
        for (sum, number) in sums.iter_mut().zip(rest) {
            *sum += exp::<FMA>(*number - top);
        }
        top + sums.iter().sum::<f32>().ln()
    }
}

simd! {
    /// Half floats to single. Slices of equal length.
    pub fn widen_f16(halves: &[f16], out: &mut [f32]) {
        debug_assert_eq!(halves.len(), out.len());
        let ((halves, rest), (wide, wide_rest)) = (halves.as_chunks(), out.as_chunks_mut());
        for (wide, halves) in wide.iter_mut().zip(halves) {
            *wide = widen::<FMA>(halves);
        }
        for (wide, half) in wide_rest.iter_mut().zip(rest) {
            *wide = widen_one(*half);
        }
    }
}

simd! {
    /// Signed bytes to single, times one scale. Slices of equal length.
    pub fn widen_int8(bytes: &[i8], scale: f32, out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len());
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = *byte as f32 * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn numbers(count: usize, spread: f32, seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-spread..spread)).collect()
    }

    const SIZES: [usize; 9] = [0, 1, 7, 31, 32, 33, 64, 100, 1025];

    #[test]
    fn reductions_agree_with_double_precision_at_every_remainder() {
        for size in SIZES {
            let (a, b) = (numbers(size, 2.0, 1), numbers(size, 2.0, 2));
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
    fn exponential_is_within_two_units_in_the_last_place() {
        for x in numbers(100_000, 87.0, 3) {
            let want = (x as f64).exp();
            let (fused, plain) = (exp::<true>(x) as f64, exp::<false>(x) as f64);
            assert!((fused / want - 1.0).abs() < 2.4e-7, "e^{x}: {fused} {want}");
            assert!((plain / want - 1.0).abs() < 2.4e-7, "e^{x}: {plain} {want}");
        }
        for none in [-87.1, -1000.0, f32::NEG_INFINITY] {
            assert_eq!(exp::<true>(none), 0.0);
        }
        assert_eq!(exp::<true>(0.0), 1.0);
        assert!(exp::<true>(f32::NAN).is_nan() && exp::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn logarithm_is_within_two_units_in_the_last_place() {
        let mut cases = numbers(100_000, 20.0, 4);
        cases.extend([0.0, 1e-4, -1e-4, 0.346_57, 0.346_58, -0.346_57, 80.0, -80.0]);
        for x in cases.into_iter().map(f32::exp) {
            let want = (x as f64).ln();
            for got in [ln::<true>(x), ln::<false>(x)] {
                assert!((got as f64 - want).abs() < (2.4e-7 * want.abs()).max(1e-7), "ln {x}: {got} {want}");
            }
        }
        assert_eq!(ln::<true>(1.0), 0.0);
    }

    #[test]
    fn sums_of_nothing_but_minus_infinity() {
        let mut masked = vec![f32::NEG_INFINITY; 40];
        assert_eq!(log_sum_exp(&masked), f32::NEG_INFINITY);
        assert_eq!(exp_sum(&mut masked, 0.0), 0.0);
        assert!(masked.iter().all(|&x| x == 0.0));
    }

    #[test]
    fn every_finite_half_float_widens_exactly() {
        let halves: Vec<half::f16> = (0..=u16::MAX).map(half::f16::from_bits).filter(|h| h.is_finite()).collect();
        let mut wide = vec![0f32; halves.len()];
        widen_f16(&halves, &mut wide);
        for (half, wide) in halves.iter().zip(&wide) {
            assert_eq!(half.to_f32().to_bits(), wide.to_bits(), "{half:?}");
        }
    }

    #[test]
    fn bytes_widen_with_their_scale() {
        let bytes: Vec<i8> = (-128..=127).collect();
        let mut wide = vec![0f32; 256];
        widen_int8(&bytes, 0.5, &mut wide);
        assert!(bytes.iter().zip(&wide).all(|(b, w)| *b as f32 * 0.5 == *w));
    }
}
