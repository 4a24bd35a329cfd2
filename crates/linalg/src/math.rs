//! `exp` and `ln` as polynomials that vectorise.

use super::simd::fma;

/// ln 2 in two parts, so that integer multiples of the high part are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `e^x` within 2 ulp for `x` in -87 to 88, after Cephes `expf`. Below it is 0 (the true value is under 1.7e-38), above it is
/// clamped; NaN stays NaN.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const SMALLEST: f32 = -87.0;
    const LARGEST: f32 = 88.0;
    // 1.5 * 2^23: adding it rounds to the nearest integer and leaves that in the lowest bits.
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
    // `n` is in -126 to 127 by the clamps, so this is its exponent; the bits above are shifted out.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = e * power;
    if x < SMALLEST { 0.0 } else { value }
}

/// `ln(x)` within 2 ulp (1e-7 near 1) for normal positive `x`, after Cephes `logf`.
#[inline(always)]
pub fn ln<const FMA: bool>(x: f32) -> f32 {
    // x = m 2^e with m in sqrt(1/2) to sqrt(2): subtracting the bits of sqrt(1/2) leaves e in the exponent.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;

    #[test]
    fn exponential_is_within_two_units_in_the_last_place() {
        for x in random(100_000, 87.0, 3) {
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
        let mut cases = random(100_000, 20.0, 4);
        cases.extend([0.0, 1e-4, -1e-4, 0.346_57, 0.346_58, -0.346_57, 80.0, -80.0]);
        for x in cases.into_iter().map(f32::exp) {
            let want = (x as f64).ln();
            for got in [ln::<true>(x), ln::<false>(x)] {
                assert!((got as f64 - want).abs() < (2.4e-7 * want.abs()).max(1e-7), "ln {x}: {got} {want}");
            }
        }
        assert_eq!(ln::<true>(1.0), 0.0);
    }
}
