//! Scores of some query rows against some panels of keys: `scores[row][key] = queries[row] . keys[key]`.
//!
//! Up to [`ROWS`] rows score the keys as they are stored, each value widened in a register or multiplied as an integer.
//! More rows score panels that the caller widened to f32 once, so that the widening is not repeated for every few rows.
//!
//! A panel is scored in strips, as wide as the vector registers hold sums of all rows: a strip that does not fit is spilled
//! to memory in every dimension, which costs more than half of the speed.

use half::f16;

use super::layout::{PANEL, Scanned};
use super::snapshot::KeyPanels;
use linalg::{HALVES, Level, fma, level, simd, widen};

#[cfg(target_arch = "x86_64")]
mod avx512;
mod integers;
mod nibbles;

use integers::Integers;
use nibbles::Bytes;

/// Rows that pass over the keys together.
pub(super) const ROWS: usize = 4;

/// Keys of a strip: with [`ROWS`] rows 16 of AVX-512's 32 registers, and 8 of 16 elsewhere.
const WIDE: usize = PANEL;
const NARROW: usize = 16;

/// The forms of keys and queries that a kernel multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// f16 keys as they are stored.
    Halves,
    /// int8 keys as they are stored, and queries as integers of two bytes.
    Integers,
    /// int4 keys as they are stored, and queries as bytes.
    Bytes,
    /// Keys widened by [`KeyPanels::widen`].
    Wide,
}

impl Form {
    /// The quickest for this machine, keys and number of rows.
    pub(super) fn of(keys: Scanned, rows: usize) -> Form {
        match keys {
            Scanned::F16 if rows <= ROWS => Form::Halves,
            Scanned::Int8 if rows <= ROWS && integers::available() => Form::Integers,
            Scanned::Int4 if rows <= ROWS && integers::available() => Form::Bytes,
            _ => Form::Wide,
        }
    }
}

/// Some query rows in the order in which the kernels read them.
#[derive(Clone, Debug)]
pub(super) enum Rows {
    /// Every [`ROWS`] rows (fewer at the end) as `(D, ROWS)`: the values of one dimension lie together.
    Floats {
        values: Vec<f32>,
        dim: usize,
    },
    Integers(Integers),
    Bytes(Bytes),
}

impl Rows {
    /// `queries` is `(rows, D)`.
    pub(super) fn new(form: Form, queries: &[f32], dim: usize) -> Rows {
        match form {
            Form::Integers => return Rows::Integers(Integers::new(queries, dim)),
            Form::Bytes => return Rows::Bytes(Bytes::new(queries, dim)),
            Form::Halves | Form::Wide => {}
        }
        let mut values = Vec::with_capacity(queries.len());
        for rows in queries.chunks(ROWS * dim) {
            for d in 0..dim {
                values.extend(rows[d..].iter().step_by(dim));
            }
        }
        Rows::Floats { values, dim }
    }

    /// Scores `(rows, panels * PANEL)`. `wide` is the panels widened where the form is [`Form::Wide`], and else empty.
    pub(super) fn score(&self, panels: KeyPanels<'_>, wide: &[f32], scores: &mut [f32]) {
        match (self, panels) {
            (Rows::Floats { values, dim }, KeyPanels::F16(halves)) if wide.is_empty() => {
                score_halves(halves, *dim, values, scores);
            }
            (Rows::Floats { values, dim }, panels) => {
                score_wide(wide, *dim, values, scores);
                if let KeyPanels::Int8 { scales, .. } | KeyPanels::Int4 { scales, .. } = panels {
                    for row in scores.chunks_exact_mut(scales.len()) {
                        row.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
                    }
                }
            }
            (Rows::Integers(rows), KeyPanels::Int8 { values, scales }) => score_integers(rows, values, scales, scores),
            (Rows::Bytes(rows), KeyPanels::Int4 { values, scales }) => score_nibbles(rows, values, scales, scores),
            (Rows::Integers(_) | Rows::Bytes(_), _) => {
                unreachable!("the form of queries follows from that of the keys")
            }
        }
    }
}

/// At most [`ROWS`] rows.
fn score_halves(halves: &[f16], dim: usize, queries: &[f32], scores: &mut [f32]) {
    match level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level` found the instruction set on this machine.
        Level::Avx512 => unsafe { avx512::score_halves(halves, dim, queries, scores) },
        _ => score_f16(halves, dim, queries, scores),
    }
}

/// Scores `(rows, keys)` of panels `(panels, D / 4, PANEL, 4)` with their scales.
fn score_integers(queries: &Integers, values: &[i8], scales: &[f32], scores: &mut [f32]) {
    assert!(integers::available(), "the form is chosen where it is available");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the machine has the instructions.
    unsafe {
        avx512::score_integers(queries, values, scales, scores)
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (queries, values, scales, scores);
}

/// Scores `(rows, keys)` of panels `(panels, D / 8, PANEL, 4)` with their scales.
fn score_nibbles(queries: &Bytes, values: &[i8], scales: &[f32], scores: &mut [f32]) {
    assert!(integers::available(), "the form is chosen where it is available");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the machine has the instructions.
    unsafe {
        avx512::score_nibbles(queries, values, scales, scores)
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (queries, values, scales, scores);
}

fn score_wide(wide: &[f32], dim: usize, queries: &[f32], scores: &mut [f32]) {
    match level() {
        Level::Avx512 => score_f32_wide(wide, dim, queries, scores),
        Level::Avx2 | Level::Portable => score_f32_narrow(wide, dim, queries, scores),
    }
}

/// Values that widen to f32 in a register.
trait Widen: Copy {
    fn wide<const FMA: bool>(values: &[Self; HALVES]) -> [f32; HALVES];
}

impl Widen for f32 {
    #[inline(always)]
    fn wide<const FMA: bool>(values: &[f32; HALVES]) -> [f32; HALVES] {
        *values
    }
}

impl Widen for f16 {
    #[inline(always)]
    fn wide<const FMA: bool>(values: &[f16; HALVES]) -> [f32; HALVES] {
        widen::<FMA>(values)
    }
}

macro_rules! score {
    ($name:ident, $number:ty, $strip:expr) => {
        simd! {
            fn $name(values: &[$number], dim: usize, queries: &[f32], scores: &mut [f32]) {
                score_values::<FMA, { $strip }, $number>(values, dim, queries, scores)
            }
        }
    };
}

score!(score_f16, f16, NARROW);
score!(score_f32_wide, f32, WIDE);
score!(score_f32_narrow, f32, NARROW);

#[inline(always)]
fn score_values<const FMA: bool, const STRIP: usize, N: Widen>(
    values: &[N],
    dim: usize,
    queries: &[f32],
    scores: &mut [f32],
) {
    let keys = values.len() / dim;
    for (panel, values) in values.chunks_exact(dim * PANEL).enumerate() {
        for (group, rows) in queries.chunks(ROWS * dim).enumerate() {
            for strip in (0..PANEL).step_by(STRIP) {
                let from = &values[strip..];
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

/// `R` rows `(D, R)` against one strip, the first `STRIP` values of every [`PANEL`]; row r's scores begin at
/// `scores[r * stride]`.
#[inline(always)]
fn score_strip<const FMA: bool, const STRIP: usize, const R: usize, N: Widen>(
    panel: &[N],
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
) {
    let mut sums = [[0f32; STRIP]; R];
    for (values, queries) in panel.chunks(PANEL).zip(queries.chunks_exact(R)) {
        let mut keys = [0f32; STRIP];
        for (wide, values) in keys.as_chunks_mut().0.iter_mut().zip(values[..STRIP].as_chunks().0) {
            *wide = N::wide::<FMA>(values);
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

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::index::layout::{NIBBLE_OFFSET, OCTET, QUAD};

    /// Every kernel that this machine can run, also those that it does not choose.
    #[test]
    fn every_kernel_scores_as_plain_sums_do() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut number = |_| rng.random_range(-8.0..8.0f32);
        for dim in [1, 5, 64] {
            let values: Vec<f32> = (0..2 * PANEL * dim).map(&mut number).collect();
            let halves: Vec<f16> = values.iter().map(|&number| f16::from_f32(number)).collect();
            let wide_halves: Vec<f32> = halves.iter().map(|half| half.to_f32()).collect();
            for rows in [1, 2, 3, 4, 5, 11] {
                let queries: Vec<f32> = (0..rows * dim).map(&mut number).collect();
                let Rows::Floats { values: packed, .. } = Rows::new(Form::Wide, &queries, dim) else { unreachable!() };
                let compare = |name: &str, as_f32: &[f32], score: &dyn Fn(&mut [f32])| {
                    let mut scores = vec![f32::NAN; rows * 2 * PANEL];
                    score(&mut scores);
                    check(name, as_f32, dim, &queries, &scores, 1e-3);
                };
                compare("f32 wide", &values, &|scores| score_f32_wide(&values, dim, &packed, scores));
                compare("f32 narrow", &values, &|scores| score_f32_narrow(&values, dim, &packed, scores));
                compare("f16", &wide_halves, &|scores| score_f16(&halves, dim, &packed, scores));
                if rows <= ROWS {
                    compare("f16 chosen", &wide_halves, &|scores| score_halves(&halves, dim, &packed, scores));
                }
            }
        }
    }

    #[test]
    fn integers_score_as_plain_sums_do() {
        if !integers::available() {
            return;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for dim in [1usize, 4, 5, 64, 256] {
            let padded = dim.next_multiple_of(QUAD);
            let mut bytes = vec![0i8; 2 * PANEL * padded];
            let scales: Vec<f32> = (0..2 * PANEL).map(|_| rng.random_range(0.001..0.02)).collect();
            let mut wide = vec![0f32; 2 * PANEL * dim];
            for (key, d) in (0..2 * PANEL).flat_map(|key| (0..dim).map(move |d| (key, d))) {
                let byte = rng.random_range(-127i8..=127);
                let panel = key / PANEL * PANEL;
                bytes[panel * padded + (d / QUAD * PANEL + key % PANEL) * QUAD + d % QUAD] = byte;
                wide[panel * dim + d * PANEL + key % PANEL] = byte as f32 * scales[key];
            }
            for rows in 1..=ROWS {
                let queries: Vec<f32> = (0..rows * dim).map(|_| rng.random_range(-8.0..8.0)).collect();
                let mut scores = vec![f32::NAN; rows * 2 * PANEL];
                let panels = KeyPanels::Int8 { values: &bytes, scales: &scales };
                Rows::new(Form::Integers, &queries, dim).score(panels, &[], &mut scores);
                // A query's number is off by at most 1 / 64,516 of the row's largest.
                check("integers", &wide, dim, &queries, &scores, dim as f64 * 8.0 * 2.54 / 64_516.0);
            }
        }
    }

    #[test]
    fn bytes_score_as_plain_sums_do() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for dim in [1usize, 8, 12, 64, 256] {
            let padded = dim.next_multiple_of(OCTET) / 2;
            let mut packed = vec![0i8; 2 * PANEL * padded];
            let scales: Vec<f32> = (0..2 * PANEL).map(|_| rng.random_range(0.02..0.2)).collect();
            let mut wide = vec![0f32; 2 * PANEL * dim];
            for (key, d) in (0..2 * PANEL).flat_map(|key| (0..dim).map(move |d| (key, d))) {
                let number = rng.random_range(-7..=7);
                let panel = key / PANEL * PANEL;
                let byte = &mut packed[panel * padded + (d / OCTET * PANEL + key % PANEL) * QUAD + d % QUAD];
                *byte |= ((number + NIBBLE_OFFSET) << (d % OCTET / QUAD * 4)) as i8;
                wide[panel * dim + d * PANEL + key % PANEL] = number as f32 * scales[key];
            }
            let panels = KeyPanels::Int4 { values: &packed, scales: &scales };
            for rows in 1..=ROWS {
                let queries: Vec<f32> = (0..rows * dim).map(|_| rng.random_range(-8.0..8.0)).collect();
                let (mut scores, mut widened) = (vec![f32::NAN; rows * 2 * PANEL], vec![f32::NAN; wide.len()]);
                panels.widen(dim, &mut widened);
                Rows::new(Form::Wide, &queries, dim).score(panels, &widened, &mut scores);
                check("int4 widened", &wide, dim, &queries, &scores, 1e-2);
                if integers::available() {
                    scores.fill(f32::NAN);
                    Rows::new(Form::Bytes, &queries, dim).score(panels, &[], &mut scores);
                    // A query's number is off by at most half of 1 / 127 of the row's largest.
                    check("int4", &wide, dim, &queries, &scores, dim as f64 * 8.0 * 1.4 / 254.0);
                }
            }
        }
    }

    fn check(name: &str, keys: &[f32], dim: usize, queries: &[f32], scores: &[f32], tolerance: f64) {
        for (row, scores) in scores.chunks_exact(2 * PANEL).enumerate() {
            for (key, &found) in scores.iter().enumerate() {
                let panel = &keys[key / PANEL * PANEL * dim..];
                let product = |d: usize| panel[d * PANEL + key % PANEL] as f64 * queries[row * dim + d] as f64;
                let wanted: f64 = (0..dim).map(product).sum();
                let off = (found as f64 - wanted).abs();
                assert!(off < tolerance, "{name}, D = {dim}, row {row}, key {key}: {found}, {wanted}");
            }
        }
    }
}
