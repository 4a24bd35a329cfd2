//! Queries as integers, for int8 keys: one instruction multiplies and sums four dimensions of sixteen keys.
//!
//! A query row is `scale * (high + low / 256)` with two signed bytes per number, so that it keeps 15 bits: what is lost is far
//! below what the keys lost when they became int8.

use crate::index::snapshot::QUAD;

/// What the instruction adds to keys, which it takes unsigned.
pub(super) const KEY_OFFSET: i32 = 128;

/// Steps of `low` in one of `high`.
pub(super) const LOW_STEPS: f32 = 256.0;

/// Some query rows.
#[derive(Clone, Debug, Default)]
pub(in crate::index) struct Integers {
    /// `(D / 4, rows, 2)`: four dimensions of `high`, then of `low`.
    pub(super) quads: Vec<[[i8; QUAD]; 2]>,
    /// `(rows)`
    pub(super) rows: Vec<Row>,
}

/// What holds for all numbers of a row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Row {
    pub(super) scale: f32,
    /// Sums of `high` and of `low`.
    pub(super) sums: [i32; 2],
}

/// Whether this machine has the instruction.
pub(super) fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    if crate::numeric::level() == crate::numeric::Level::Avx512 {
        return std::arch::is_x86_feature_detected!("avx512vnni");
    }
    false
}

/// To the nearest whole number, up to 2^22: without the instruction for it a call per number.
fn round(number: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
    number + SHIFT - SHIFT
}

impl Integers {
    /// `queries` is `(rows, D)`.
    pub(super) fn new(queries: &[f32], dim: usize) -> Integers {
        let count = queries.len() / dim;
        let mut quads = vec![[[0; QUAD]; 2]; dim.div_ceil(QUAD) * count];
        let rows = queries.chunks_exact(dim).enumerate().map(|(row, numbers)| {
            let scale = numbers.iter().fold(0f32, |top, number| top.max(number.abs())) / i8::MAX as f32;
            let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
            let mut sums = [0; 2];
            for (d, number) in numbers.iter().enumerate() {
                let steps = number * inverse;
                let high = round(steps);
                let parts = [high as i8, round((steps - high) * LOW_STEPS) as i8];
                for (part, (byte, sum)) in parts.into_iter().zip(&mut sums).enumerate() {
                    quads[d / QUAD * count + row][part][d % QUAD] = byte;
                    *sum += byte as i32;
                }
            }
            Row { scale, sums }
        });
        let rows = rows.collect();
        Integers { quads, rows }
    }

    /// Scores `(rows, keys)` of panels `(panels, D / 4, PANEL, 4)` with their scales.
    pub(super) fn score(&self, numbers: &[i8], scales: &[f32], scores: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if available() {
            // SAFETY: the machine has the instructions.
            unsafe { super::avx512::score_integers(self, numbers, scales, scores) };
            return;
        }
        let _ = (numbers, scales, scores);
        unreachable!("the form is chosen where it is available");
    }
}
