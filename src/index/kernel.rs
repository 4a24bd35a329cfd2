//! Scores of some query rows against some panels of keys: `scores[row][key] = queries[row] . keys[key]`.
//!
//! Up to [`ROWS`] rows pass over the keys at once; each number is widened in a register and meets all of them. For more rows
//! the caller widens the panels to f32 first, so that the widening is not repeated for every few rows.
//!
//! A panel is scored in strips, as wide as the vector registers hold sums of all rows: a strip that does not fit is spilled
//! to memory in every dimension, which costs more than half of the speed.

use half::f16;

use super::snapshot::{PANEL, Panels};
use crate::numeric::{HALVES, Level, fma, level, simd, widen};

/// Rows that pass over the keys together.
pub(super) const ROWS: usize = 4;

/// Keys of a strip: with [`ROWS`] rows 16 of AVX-512's 32 registers, and 8 of 16 elsewhere.
const WIDE: usize = PANEL;
const NARROW: usize = 16;

/// A number that widens to f32 in a register.
trait Number: Copy {
    fn wide<const FMA: bool>(numbers: &[Self; HALVES]) -> [f32; HALVES];
}

impl Number for f32 {
    #[inline(always)]
    fn wide<const FMA: bool>(numbers: &[f32; HALVES]) -> [f32; HALVES] {
        *numbers
    }
}

impl Number for f16 {
    #[inline(always)]
    fn wide<const FMA: bool>(numbers: &[f16; HALVES]) -> [f32; HALVES] {
        widen::<FMA>(numbers)
    }
}

impl Number for i8 {
    #[inline(always)]
    fn wide<const FMA: bool>(numbers: &[i8; HALVES]) -> [f32; HALVES] {
        numbers.map(f32::from)
    }
}

/// Scores `(rows, panels * PANEL)` of `rows` queries, packed by [`pack`]. `wide` is scratch space.
pub(super) fn score(panels: Panels<'_>, dim: usize, queries: &[f32], wide: &mut Vec<f32>, scores: &mut [f32]) {
    let few = queries.len() <= ROWS * dim;
    match panels {
        Panels::F16(numbers) if few => score_as(numbers, dim, queries, scores, [score_f16_wide, score_f16_narrow]),
        Panels::Int8 { numbers, .. } if few => {
            score_as(numbers, dim, queries, scores, [score_int8_wide, score_int8_narrow]);
        }
        _ => {
            panels.widen(wide);
            score_as(wide, dim, queries, scores, [score_f32_wide, score_f32_narrow]);
        }
    }
    if let Panels::Int8 { scales, .. } = panels {
        for row in scores.chunks_exact_mut(scales.len()) {
            row.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
        }
    }
}

type Score<N> = fn(&[N], usize, &[f32], &mut [f32]);

/// Scores in the strips that suit this machine.
fn score_as<N>(numbers: &[N], dim: usize, queries: &[f32], scores: &mut [f32], [wide, narrow]: [Score<N>; 2]) {
    match level() {
        Level::Avx512 => wide(numbers, dim, queries, scores),
        Level::Avx2 | Level::Portable => narrow(numbers, dim, queries, scores),
    }
}

macro_rules! score {
    ($name:ident, $number:ty, $strip:expr) => {
        simd! {
            fn $name(numbers: &[$number], dim: usize, queries: &[f32], scores: &mut [f32]) {
                score_numbers::<FMA, { $strip }, $number>(numbers, dim, queries, scores)
            }
        }
    };
}

score!(score_f16_wide, f16, WIDE);
score!(score_f16_narrow, f16, NARROW);
score!(score_int8_wide, i8, WIDE);
score!(score_int8_narrow, i8, NARROW);
score!(score_f32_wide, f32, WIDE);
score!(score_f32_narrow, f32, NARROW);

#[inline(always)]
fn score_numbers<const FMA: bool, const STRIP: usize, N: Number>(
    numbers: &[N],
    dim: usize,
    queries: &[f32],
    scores: &mut [f32],
) {
    let keys = numbers.len() / dim;
    for (panel, numbers) in numbers.chunks_exact(dim * PANEL).enumerate() {
        for (group, rows) in queries.chunks(ROWS * dim).enumerate() {
            for strip in (0..PANEL).step_by(STRIP) {
                let from = &numbers[strip..];
                let into = &mut scores[group * ROWS * keys + panel * PANEL + strip..];
                match rows.len() / dim {
                    4 => score_strip::<FMA, STRIP, 4, N>(from, rows, into, keys),
                    3 => score_strip::<FMA, STRIP, 3, N>(from, rows, into, keys),
                    2 => score_strip::<FMA, STRIP, 2, N>(from, rows, into, keys),
                    _ => score_strip::<FMA, STRIP, 1, N>(from, rows, into, keys),
                }
            }
        }
    }
}

/// `R` rows `(D, R)` against one strip, the first `STRIP` numbers of every [`PANEL`]; row r's scores begin at
/// `scores[r * stride]`.
#[inline(always)]
fn score_strip<const FMA: bool, const STRIP: usize, const R: usize, N: Number>(
    panel: &[N],
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
) {
    let mut sums = [[0f32; STRIP]; R];
    for (numbers, queries) in panel.chunks(PANEL).zip(queries.chunks_exact(R)) {
        let mut keys = [0f32; STRIP];
        for (wide, numbers) in keys.as_chunks_mut().0.iter_mut().zip(numbers[..STRIP].as_chunks().0) {
            *wide = N::wide::<FMA>(numbers);
        }
        for row in 0..R {
            for lane in 0..STRIP {
                sums[row][lane] = fma::<FMA>(queries[row], keys[lane], sums[row][lane]);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        scores[row * stride..][..STRIP].copy_from_slice(sums);
    }
}

/// Reorders query rows `(rows, D)` for [`score`]: every [`ROWS`] rows (fewer at the end) become `(D, ROWS)`, so that the
/// numbers that meet one dimension of the keys lie together.
pub(super) fn pack(queries: &[f32], dim: usize) -> Vec<f32> {
    let mut packed = Vec::with_capacity(queries.len());
    for rows in queries.chunks(ROWS * dim) {
        for d in 0..dim {
            packed.extend(rows[d..].iter().step_by(dim));
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Every strip on every machine: a test runs on one of them only.
    #[test]
    fn strips_of_any_width_score_as_plain_sums_do() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut number = |_| rng.random_range(-8.0..8.0f32);
        for dim in [1, 5, 64] {
            let numbers: Vec<f32> = (0..2 * PANEL * dim).map(&mut number).collect();
            let halves: Vec<f16> = numbers.iter().map(|&number| f16::from_f32(number)).collect();
            let bytes: Vec<i8> = numbers.iter().map(|&number| number as i8).collect();
            for rows in [1, 2, 3, 4, 5, 11] {
                let queries: Vec<f32> = (0..rows * dim).map(&mut number).collect();
                let wide_halves: Vec<f32> = halves.iter().map(|half| half.to_f32()).collect();
                let wide_bytes: Vec<f32> = bytes.iter().map(|&byte| byte.into()).collect();
                compare(&numbers, &numbers, dim, &queries, [score_f32_wide, score_f32_narrow]);
                compare(&halves, &wide_halves, dim, &queries, [score_f16_wide, score_f16_narrow]);
                compare(&bytes, &wide_bytes, dim, &queries, [score_int8_wide, score_int8_narrow]);
            }
        }
    }

    fn compare<N>(numbers: &[N], as_f32: &[f32], dim: usize, queries: &[f32], strips: [Score<N>; 2]) {
        for score in strips {
            let mut scores = vec![f32::NAN; queries.len() / dim * 2 * PANEL];
            score(numbers, dim, &pack(queries, dim), &mut scores);
            for (row, scores) in scores.chunks_exact(2 * PANEL).enumerate() {
                for (key, &found) in scores.iter().enumerate() {
                    let panel = &as_f32[key / PANEL * PANEL * dim..];
                    let product = |d: usize| panel[d * PANEL + key % PANEL] as f64 * queries[row * dim + d] as f64;
                    let wanted: f64 = (0..dim).map(product).sum();
                    assert!((found as f64 - wanted).abs() < 1e-3, "row {row}, key {key}: {found}, {wanted}");
                }
            }
        }
    }
}
