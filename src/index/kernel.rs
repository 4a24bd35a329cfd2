//! Scores of some query rows against some panels of keys: `scores[row][key] = queries[row] . keys[key]`.
//!
//! Up to [`ROWS`] rows pass over the keys at once; each number is widened in a register and meets all of them. For more rows
//! the caller widens the panels to f32 first, so that the widening is not repeated for every few rows.

use half::f16;

use super::snapshot::{PANEL, Panels};
use crate::numeric::{fma, simd, widen};

/// Rows that pass over the keys together: with [`PANEL`] sums each they just fit the vector registers.
pub(super) const ROWS: usize = 4;

/// A number that widens to f32 in a register.
trait Number: Copy {
    fn wide<const FMA: bool>(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn wide<const FMA: bool>(self) -> f32 {
        self
    }
}

impl Number for f16 {
    #[inline(always)]
    fn wide<const FMA: bool>(self) -> f32 {
        widen::<FMA>(self.to_bits())
    }
}

impl Number for i8 {
    #[inline(always)]
    fn wide<const FMA: bool>(self) -> f32 {
        self as f32
    }
}

/// Scores `(rows, panels * PANEL)` of `rows` queries, packed by [`pack`]. `wide` is scratch space.
pub(super) fn score(panels: Panels<'_>, dim: usize, queries: &[f32], wide: &mut Vec<f32>, scores: &mut [f32]) {
    let few = queries.len() <= ROWS * dim;
    match panels {
        Panels::F16(numbers) if few => score_f16(numbers, dim, queries, scores),
        Panels::Int8 { numbers, .. } if few => score_int8(numbers, dim, queries, scores),
        _ => {
            panels.widen(wide);
            score_f32(wide, dim, queries, scores);
        }
    }
    if let Panels::Int8 { scales, .. } = panels {
        for row in scores.chunks_exact_mut(scales.len()) {
            row.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
        }
    }
}

simd! {
    fn score_f16(numbers: &[f16], dim: usize, queries: &[f32], scores: &mut [f32]) {
        score_numbers::<FMA, f16>(numbers, dim, queries, scores)
    }
}

simd! {
    fn score_int8(numbers: &[i8], dim: usize, queries: &[f32], scores: &mut [f32]) {
        score_numbers::<FMA, i8>(numbers, dim, queries, scores)
    }
}

simd! {
    fn score_f32(numbers: &[f32], dim: usize, queries: &[f32], scores: &mut [f32]) {
        score_numbers::<FMA, f32>(numbers, dim, queries, scores)
    }
}

#[inline(always)]
fn score_numbers<const FMA: bool, N: Number>(numbers: &[N], dim: usize, queries: &[f32], scores: &mut [f32]) {
    let keys = numbers.len() / dim;
    for (panel, numbers) in numbers.chunks_exact(dim * PANEL).enumerate() {
        for (group, rows) in queries.chunks(ROWS * dim).enumerate() {
            let into = &mut scores[group * ROWS * keys + panel * PANEL..];
            match rows.len() / dim {
                4 => score_panel::<FMA, 4, N>(numbers, rows, into, keys),
                3 => score_panel::<FMA, 3, N>(numbers, rows, into, keys),
                2 => score_panel::<FMA, 2, N>(numbers, rows, into, keys),
                _ => score_panel::<FMA, 1, N>(numbers, rows, into, keys),
            }
        }
    }
}

/// `R` rows `(D, R)` against one panel `(D, PANEL)`; row r's scores begin at `scores[r * stride]`.
#[inline(always)]
fn score_panel<const FMA: bool, const R: usize, N: Number>(
    panel: &[N],
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
) {
    let mut sums = [[0f32; PANEL]; R];
    for (numbers, queries) in panel.chunks_exact(PANEL).zip(queries.chunks_exact(R)) {
        let mut keys = [0f32; PANEL];
        for lane in 0..PANEL {
            keys[lane] = numbers[lane].wide::<FMA>();
        }
        for row in 0..R {
            for lane in 0..PANEL {
                sums[row][lane] = fma::<FMA>(queries[row], keys[lane], sums[row][lane]);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        scores[row * stride..][..PANEL].copy_from_slice(sums);
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
