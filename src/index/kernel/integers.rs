//! Queries as integers, for int8 keys: one instruction multiplies and sums four dimensions of sixteen keys.
//!
//! A query row is `scale * (high + low / 254)` with two signed bytes per number, so that it keeps 15 bits: what is lost is far
//! below what the keys lost when they became int8.

use crate::index::layout::QUAD;
use linalg::{larger, simd};

/// What the instruction adds to keys, which it takes unsigned.
pub(super) const KEY_OFFSET: i32 = 128;

/// Steps of `low` in one of `high`: half of them fit a byte in either direction.
pub(super) const LOW_STEPS: f32 = 254.0;

/// Values that are compared side by side: one AVX-512 register.
const LANES: usize = 16;

/// Some query rows.
#[derive(Clone, Debug, Default)]
pub(in crate::index) struct Integers {
    /// `(D / 4, rows, 2)`: four dimensions of `high`, then of `low`.
    pub(super) quads: Vec<[[i8; QUAD]; 2]>,
    /// `(rows)`
    pub(super) rows: Vec<Row>,
}

/// What holds for all values of a row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Row {
    pub(super) scale: f32,
    /// Sums of `high` and of `low`.
    pub(super) sums: [i32; 2],
}

/// Whether this machine has the instruction.
pub(super) fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    if linalg::level() == linalg::Level::Avx512 {
        return std::arch::is_x86_feature_detected!("avx512vnni");
    }
    false
}

simd! {
    /// Splits values, in steps of `1 / inverse`, into two bytes each.
    fn split(values: &[f32], inverse: f32, high: &mut [i8], low: &mut [i8]) {
        // Added to a number, it leaves the nearest whole one in the lowest bits.
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
        for ((number, high), low) in values.iter().zip(high).zip(low) {
            let steps = number * inverse;
            let shifted = steps + ROUND;
            *high = shifted.to_bits() as i8;
            *low = ((steps - (shifted - ROUND)) * LOW_STEPS + ROUND).to_bits() as i8;
        }
    }
}

simd! {
    /// The largest size of a number.
    pub(super) fn largest(values: &[f32]) -> f32 {
        let mut tops = [0f32; LANES];
        for part in values.chunks(LANES) {
            for (top, number) in tops.iter_mut().zip(part) {
                *top = larger(*top, number.abs());
            }
        }
        linalg::fold(tops, larger)
    }
}

simd! {
    pub(super) fn sum(bytes: &[i8]) -> i32 {
        bytes.iter().map(|&byte| byte as i32).sum()
    }
}

impl Integers {
    /// `queries` is `(rows, D)`.
    pub(super) fn new(queries: &[f32], dim: usize) -> Integers {
        let count = queries.len() / dim;
        let padded = dim.next_multiple_of(QUAD);
        let mut quads = vec![[[0; QUAD]; 2]; padded / QUAD * count];
        let (mut high, mut low) = (vec![0; padded], vec![0; padded]);
        let rows = queries.chunks_exact(dim).enumerate().map(|(row, values)| {
            let scale = largest(values) / i8::MAX as f32;
            let inverse = if scale > 0.0 { scale.recip().min(f32::MAX) } else { 0.0 };
            split(values, inverse, &mut high, &mut low);
            let parts = high.as_chunks().0.iter().zip(low.as_chunks().0);
            for (quad, (&high, &low)) in quads[row..].iter_mut().step_by(count).zip(parts) {
                *quad = [high, low];
            }
            Row { scale, sums: [sum(&high), sum(&low)] }
        });
        let rows = rows.collect();
        Integers { quads, rows }
    }
}
