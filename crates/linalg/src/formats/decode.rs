//! What the bytes of a block stand for, for each format. `d` and `m` are f16.
//!
//! ```text
//! f16, bf16      one value
//! q4_0, q5_0     d, [4 bytes of fifth bits,] 16 bytes of nibbles: d * (quant - 8 or 16)
//! q4_1, q5_1     d, m, ..: d * quant + m
//! q8_0           d, 32 x i8: d * quant
//! q2_K           16 x (scale, min) of 4 bits, 64 bytes, d, m: d * scale * quant - m * min
//! q3_K           32 bytes of third bits, 64 bytes, 16 scales of 6 bits, d: d * (scale - 32) * (quant - 4)
//! q4_K           d, m, 8 x (scale, min) of 6 bits, 128 bytes: d * scale * quant - m * min
//! q5_K           d, m, 8 x (scale, min), 32 bytes of fifth bits, 128 bytes
//! q6_K           128 bytes of 4 bits, 64 of upper 2 bits, 16 x i8, d: d * scale * (quant - 32)
//! iq4_nl         d, 16 bytes: d * TABLE[quant]
//! iq4_xs         d, 8 scales of 6 bits, 128 bytes: d * (scale - 32) * TABLE[quant]
//! ```
//!
//! In blocks of 32, byte j of nibbles holds quants j (low) and j + 16. In the others, of 256, quants that share a byte are 32
//! apart: in q6_K nibbles are 64 apart.

use half::f16;

use crate::simd::fma;
use crate::widen::widen_one;

/// Columns of a panel.
pub(crate) const PANEL: usize = 64;

/// Where decoded values go.
pub(super) trait Rows {
    /// Takes one row of a block; each comes once, in any order.
    fn put<const FMA: bool>(&mut self, row: usize, values: [f32; PANEL]);
}

/// How blocks are laid out and read.
pub(super) trait Decode {
    const VALUES: usize;
    const BYTES: usize;
    /// Where in a block its f16 factors are.
    const FACTORS: &'static [usize];

    /// Hands on the rows of a block of each column, `(bytes, PANEL)`.
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows);
}

pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q4With0;
pub(super) struct Q4With1;
pub(super) struct Q5With0;
pub(super) struct Q5With1;
pub(super) struct Q8With0;
pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;
pub(super) struct Iq4Nl;
pub(super) struct Iq4Xs;

/// The f16 at a byte of a block.
#[inline(always)]
fn factors(block: &[[u8; PANEL]], at: usize) -> [f32; PANEL] {
    let (low, high) = (&block[at], &block[at + 1]);
    lanes!(i: widen_one(f16::from_bits(low[i] as u16 | (high[i] as u16) << 8)))
}

/// Scale and minimum of 32 values of q4_K and q5_K, whose 12 bytes of both begin at byte 4.
#[inline(always)]
fn six_bits(block: &[[u8; PANEL]], index: usize) -> ([u8; PANEL], [u8; PANEL]) {
    let (a, b) = (&block[4 + index % 4], &block[8 + index % 4]);
    if index < 4 {
        return (lanes!(i: a[i] & 63), lanes!(i: b[i] & 63));
    }
    let c = &block[8 + index];
    (lanes!(i: c[i] & 15 | a[i] >> 6 << 4), lanes!(i: c[i] >> 4 | b[i] >> 6 << 4))
}

/// Where 32 values of q4_K or q5_K lie: steps and the values of quant 0.
#[inline(always)]
fn steps_and_lows(
    block: &[[u8; PANEL]],
    d: &[f32; PANEL],
    m: &[f32; PANEL],
    index: usize,
) -> ([f32; PANEL], [f32; PANEL]) {
    let (scale, min) = six_bits(block, index);
    (lanes!(i: d[i] * scale[i] as f32), lanes!(i: -(m[i] * min[i] as f32)))
}

/// `step * quant`
#[inline(always)]
fn scaled(quants: [i8; PANEL], step: &[f32; PANEL]) -> [f32; PANEL] {
    lanes!(i: quants[i] as f32 * step[i])
}

/// `step * quant + low`
#[inline(always)]
fn shifted<const FMA: bool>(quants: [u8; PANEL], step: &[f32; PANEL], low: &[f32; PANEL]) -> [f32; PANEL] {
    lanes!(i: fma::<FMA>(quants[i] as f32, step[i], low[i]))
}

/// The values that 4 bits choose from in iq4_nl and iq4_xs.
const TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `TABLE[quant]` of quants below 16.
#[inline(always)]
fn looked_up<const FMA: bool>(quants: [u8; PANEL]) -> [i8; PANEL] {
    #[cfg(target_arch = "x86_64")]
    if FMA {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_broadcastsi128_si256, _mm256_loadu_si256};
        use std::arch::x86_64::{_mm256_shuffle_epi8, _mm256_storeu_si256};
        let mut values = [0; PANEL];
        for (quants, values) in quants.as_chunks::<32>().0.iter().zip(values.as_chunks_mut::<32>().0) {
            // SAFETY: `simd!` sets FMA only where it enables AVX2 too; the table has 16 bytes, both sides have 32.
            unsafe {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(TABLE.as_ptr().cast()));
                let chosen = _mm256_shuffle_epi8(table, _mm256_loadu_si256(quants.as_ptr().cast()));
                _mm256_storeu_si256(values.as_mut_ptr().cast(), chosen);
            }
        }
        return values;
    }
    lanes!(i: TABLE[quants[i] as usize])
}

impl Decode for F16 {
    const VALUES: usize = 1;
    const BYTES: usize = 2;
    const FACTORS: &'static [usize] = &[0];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        rows.put::<FMA>(0, factors(block, 0));
    }
}

impl Decode for Bf16 {
    const VALUES: usize = 1;
    const BYTES: usize = 2;
    const FACTORS: &'static [usize] = &[];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let (low, high) = (&block[0], &block[1]);
        rows.put::<FMA>(0, lanes!(i: f32::from_bits((low[i] as u32) << 16 | (high[i] as u32) << 24)));
    }
}

impl Decode for Q4With0 {
    const VALUES: usize = 32;
    const BYTES: usize = 18;
    const FACTORS: &'static [usize] = &[0];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let d = factors(block, 0);
        for j in 0..16 {
            let q = &block[2 + j];
            rows.put::<FMA>(j, scaled(lanes!(i: (q[i] & 15) as i8 - 8), &d));
            rows.put::<FMA>(j + 16, scaled(lanes!(i: (q[i] >> 4) as i8 - 8), &d));
        }
    }
}

impl Decode for Q4With1 {
    const VALUES: usize = 32;
    const BYTES: usize = 20;
    const FACTORS: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let (d, m) = (factors(block, 0), factors(block, 2));
        for j in 0..16 {
            let q = &block[4 + j];
            rows.put::<FMA>(j, shifted::<FMA>(lanes!(i: q[i] & 15), &d, &m));
            rows.put::<FMA>(j + 16, shifted::<FMA>(lanes!(i: q[i] >> 4), &d, &m));
        }
    }
}

/// Quants j and j + 16 of q5_0 and q5_1, whose fifth bits begin at a byte.
#[inline(always)]
fn five_bits(block: &[[u8; PANEL]], at: usize, j: usize) -> ([u8; PANEL], [u8; PANEL]) {
    let (low_fifth, high_fifth) = (&block[at + j / 8], &block[at + 2 + j / 8]);
    let (q, bit) = (&block[at + 4 + j], 1 << (j % 8));
    let fifth = |byte: u8| if byte & bit != 0 { 16 } else { 0 };
    (lanes!(i: q[i] & 15 | fifth(low_fifth[i])), lanes!(i: q[i] >> 4 | fifth(high_fifth[i])))
}

impl Decode for Q5With0 {
    const VALUES: usize = 32;
    const BYTES: usize = 22;
    const FACTORS: &'static [usize] = &[0];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let d = factors(block, 0);
        // As exact as `d * (quant - 16)`, and compiled as well as q5_1.
        let low = lanes!(i: -16.0 * d[i]);
        for j in 0..16 {
            let (lower, upper) = five_bits(block, 2, j);
            rows.put::<FMA>(j, shifted::<FMA>(lower, &d, &low));
            rows.put::<FMA>(j + 16, shifted::<FMA>(upper, &d, &low));
        }
    }
}

impl Decode for Q5With1 {
    const VALUES: usize = 32;
    const BYTES: usize = 24;
    const FACTORS: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let (d, m) = (factors(block, 0), factors(block, 2));
        for j in 0..16 {
            let (low, high) = five_bits(block, 4, j);
            rows.put::<FMA>(j, shifted::<FMA>(low, &d, &m));
            rows.put::<FMA>(j + 16, shifted::<FMA>(high, &d, &m));
        }
    }
}

impl Decode for Q8With0 {
    const VALUES: usize = 32;
    const BYTES: usize = 34;
    const FACTORS: &'static [usize] = &[0];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let d = factors(block, 0);
        for j in 0..32 {
            let q = &block[2 + j];
            rows.put::<FMA>(j, scaled(lanes!(i: q[i] as i8), &d));
        }
    }
}

impl Decode for Q2K {
    const VALUES: usize = 256;
    const BYTES: usize = 84;
    const FACTORS: &'static [usize] = &[80, 82];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let (d, m) = (factors(block, 80), factors(block, 82));
        // 16 bytes hold four times 16 values, 32 apart.
        for (half, upper) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let (mut steps, mut lows) = ([[0f32; PANEL]; 4], [[0f32; PANEL]; 4]);
            for (quarter, (step, low)) in steps.iter_mut().zip(&mut lows).enumerate() {
                let both = &block[half * 8 + quarter * 2 + upper];
                *step = lanes!(i: d[i] * (both[i] & 15) as f32);
                *low = lanes!(i: -(m[i] * (both[i] >> 4) as f32));
            }
            for j in 0..16 {
                let (q, row) = (&block[16 + half * 32 + upper * 16 + j], half * 128 + upper * 16 + j);
                rows.put::<FMA>(row, shifted::<FMA>(lanes!(i: q[i] & 3), &steps[0], &lows[0]));
                rows.put::<FMA>(row + 32, shifted::<FMA>(lanes!(i: q[i] >> 2 & 3), &steps[1], &lows[1]));
                rows.put::<FMA>(row + 64, shifted::<FMA>(lanes!(i: q[i] >> 4 & 3), &steps[2], &lows[2]));
                rows.put::<FMA>(row + 96, shifted::<FMA>(lanes!(i: q[i] >> 6), &steps[3], &lows[3]));
            }
        }
    }
}

impl Decode for Q3K {
    const VALUES: usize = 256;
    const BYTES: usize = 110;
    const FACTORS: &'static [usize] = &[108];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let d = factors(block, 108);
        let step = |index: usize| -> [f32; PANEL] {
            let (lower, upper) = (&block[96 + index % 8], &block[104 + index % 4]);
            let (nibble, pair) = (index / 8 * 4, index / 4 * 2);
            lanes!(i: d[i] * ((lower[i] >> nibble & 15 | (upper[i] >> pair & 3) << 4) as i8 - 32) as f32)
        };
        for (half, upper) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let mut steps = [[0f32; PANEL]; 4];
            for (quarter, steps) in steps.iter_mut().enumerate() {
                *steps = step(half * 8 + quarter * 2 + upper);
            }
            for j in 0..16 {
                let (q, row) = (&block[32 + half * 32 + upper * 16 + j], half * 128 + upper * 16 + j);
                let third = &block[upper * 16 + j];
                let quant = |quant: u8, third: u8, quarter: usize| {
                    (quant & 3) as i8 - if third & 1 << (half * 4 + quarter) != 0 { 0 } else { 4 }
                };
                rows.put::<FMA>(row, scaled(lanes!(i: quant(q[i], third[i], 0)), &steps[0]));
                rows.put::<FMA>(row + 32, scaled(lanes!(i: quant(q[i] >> 2, third[i], 1)), &steps[1]));
                rows.put::<FMA>(row + 64, scaled(lanes!(i: quant(q[i] >> 4, third[i], 2)), &steps[2]));
                rows.put::<FMA>(row + 96, scaled(lanes!(i: quant(q[i] >> 6, third[i], 3)), &steps[3]));
            }
        }
    }
}

impl Decode for Q4K {
    const VALUES: usize = 256;
    const BYTES: usize = 144;
    const FACTORS: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let (d, m) = (factors(block, 0), factors(block, 2));
        for pair in 0..4 {
            let (low_step, low) = steps_and_lows(block, &d, &m, 2 * pair);
            let (high_step, high) = steps_and_lows(block, &d, &m, 2 * pair + 1);
            for j in 0..32 {
                let q = &block[16 + pair * 32 + j];
                rows.put::<FMA>(pair * 64 + j, shifted::<FMA>(lanes!(i: q[i] & 15), &low_step, &low));
                rows.put::<FMA>(pair * 64 + j + 32, shifted::<FMA>(lanes!(i: q[i] >> 4), &high_step, &high));
            }
        }
    }
}

impl Decode for Q5K {
    const VALUES: usize = 256;
    const BYTES: usize = 176;
    const FACTORS: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let (d, m) = (factors(block, 0), factors(block, 2));
        for pair in 0..4 {
            let (low_step, low) = steps_and_lows(block, &d, &m, 2 * pair);
            let (high_step, high) = steps_and_lows(block, &d, &m, 2 * pair + 1);
            let (low_bit, high_bit) = (1 << (2 * pair), 2 << (2 * pair));
            for j in 0..32 {
                let (fifth, q) = (&block[16 + j], &block[48 + pair * 32 + j]);
                let low_quants = lanes!(i: q[i] & 15 | if fifth[i] & low_bit != 0 { 16 } else { 0 });
                let high_quants = lanes!(i: q[i] >> 4 | if fifth[i] & high_bit != 0 { 16 } else { 0 });
                rows.put::<FMA>(pair * 64 + j, shifted::<FMA>(low_quants, &low_step, &low));
                rows.put::<FMA>(pair * 64 + j + 32, shifted::<FMA>(high_quants, &high_step, &high));
            }
        }
    }
}

impl Decode for Q6K {
    const VALUES: usize = 256;
    const BYTES: usize = 210;
    const FACTORS: &'static [usize] = &[208];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let d = factors(block, 208);
        for (half, upper) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let mut steps = [[0f32; PANEL]; 4];
            for (quarter, step) in steps.iter_mut().enumerate() {
                let scale = &block[192 + half * 8 + quarter * 2 + upper];
                *step = lanes!(i: d[i] * (scale[i] as i8) as f32);
            }
            for j in 0..16 {
                let row = half * 128 + upper * 16 + j;
                let (a, b) = (&block[half * 64 + upper * 16 + j], &block[half * 64 + 32 + upper * 16 + j]);
                let h = &block[128 + half * 32 + upper * 16 + j];
                let quant = |lower: u8, upper: u8| (lower | (upper & 3) << 4) as i8 - 32;
                rows.put::<FMA>(row, scaled(lanes!(i: quant(a[i] & 15, h[i])), &steps[0]));
                rows.put::<FMA>(row + 32, scaled(lanes!(i: quant(b[i] & 15, h[i] >> 2)), &steps[1]));
                rows.put::<FMA>(row + 64, scaled(lanes!(i: quant(a[i] >> 4, h[i] >> 4)), &steps[2]));
                rows.put::<FMA>(row + 96, scaled(lanes!(i: quant(b[i] >> 4, h[i] >> 6)), &steps[3]));
            }
        }
    }
}

impl Decode for Iq4Nl {
    const VALUES: usize = 32;
    const BYTES: usize = 18;
    const FACTORS: &'static [usize] = &[0];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let d = factors(block, 0);
        for j in 0..16 {
            let q = &block[2 + j];
            rows.put::<FMA>(j, scaled(looked_up::<FMA>(lanes!(i: q[i] & 15)), &d));
            rows.put::<FMA>(j + 16, scaled(looked_up::<FMA>(lanes!(i: q[i] >> 4)), &d));
        }
    }
}

impl Decode for Iq4Xs {
    const VALUES: usize = 256;
    const BYTES: usize = 136;
    const FACTORS: &'static [usize] = &[0];

    #[inline(always)]
    fn decode<const FMA: bool>(block: &[[u8; PANEL]], rows: &mut impl Rows) {
        let d = factors(block, 0);
        for group in 0..8 {
            let (upper, lower) = (&block[2 + group / 4], &block[4 + group / 2]);
            let (pair, nibble) = (group % 4 * 2, group % 2 * 4);
            let scale = |lower: u8, upper: u8| (lower >> nibble & 15 | (upper >> pair & 3) << 4) as i8 - 32;
            let step = lanes!(i: d[i] * scale(lower[i], upper[i]) as f32);
            for j in 0..16 {
                let q = &block[8 + group * 16 + j];
                rows.put::<FMA>(group * 32 + j, scaled(looked_up::<FMA>(lanes!(i: q[i] & 15)), &step));
                rows.put::<FMA>(group * 32 + j + 16, scaled(looked_up::<FMA>(lanes!(i: q[i] >> 4)), &step));
            }
        }
    }
}
