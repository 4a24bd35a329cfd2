//! Rows of numbers as signed bytes, where a few channels are larger than the others.
//!
//! A row has one scale, so its largest channel makes the steps of all others coarse, and in the keys of a model the
//! same few channels are large in every row. A [`ChannelCode`] divides each channel by a factor of its own first. The
//! error of a product with a query then comes from the large channels most of all, so the largest eighth of them keep
//! what was rounded off in a second byte. On the keys and queries of SmolLM2 this takes the error of a score to a
//! third.

use super::int8::{INT8_LARGEST, int8_scale, to_int8};
use super::simd::larger;

/// The largest factor; the smallest is 1, so that no number grows. Beyond it a channel is too small to matter.
const FACTOR_MAX: f32 = 64.0;

/// One of so many channels has two bytes.
const DOUBLED_SHARE: usize = 8;

/// Steps of a second byte in one of the first: half of them fit a byte in either direction.
const FINE_STEPS: f32 = 2.0 * INT8_LARGEST;

/// How rows of D channels become W bytes: D in order, then the second bytes of `doubled`.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelCode {
    /// `(D)`: what channels are divided by, 1 to [`FACTOR_MAX`].
    factors: Vec<f32>,
    /// `(W - D)`, ascending: those with the largest factors, of equals the first.
    doubled: Vec<usize>,
}

impl ChannelCode {
    /// For rows whose channels are about as large as in these `(rows, D)`, all finite.
    pub fn of(rows: &[f32], dim: usize) -> Self {
        let mut tops = vec![0f32; dim];
        for row in rows.chunks_exact(dim) {
            tops.iter_mut().zip(row).for_each(|(top, number)| *top = larger(*top, number.abs()));
        }
        let largest = tops.iter().copied().fold(f32::MIN_POSITIVE, larger);
        Self::with((tops.iter().map(|top| larger(1.0, top / largest * FACTOR_MAX))).collect())
    }

    /// The code that had these `factors (D)`; `None` if no code has them.
    pub fn from_factors(factors: Vec<f32>) -> Option<Self> {
        factors.iter().all(|factor| (1.0..=FACTOR_MAX).contains(factor)).then(|| Self::with(factors))
    }

    fn with(factors: Vec<f32>) -> Self {
        let mut order: Vec<usize> = (0..factors.len()).collect();
        order.sort_by(|&a, &b| factors[b].total_cmp(&factors[a]));
        order.truncate(factors.len() / DOUBLED_SHARE);
        order.sort_unstable();
        ChannelCode { factors, doubled: order }
    }

    /// `(D)`
    pub fn factors(&self) -> &[f32] {
        &self.factors
    }

    /// W, the bytes of a row of D numbers.
    pub fn width(dim: usize) -> usize {
        dim + dim / DOUBLED_SHARE
    }

    /// Makes a row `(D)` bytes `(W)`. Returns its scale.
    pub fn encode(&self, row: &[f32], into: &mut [i8]) -> f32 {
        let divided = |channel: usize| row[channel] / self.factors[channel];
        let scale = int8_scale((0..row.len()).map(divided));
        let (coarse, fine) = into.split_at_mut(row.len());
        coarse.iter_mut().enumerate().for_each(|(channel, byte)| *byte = to_int8(divided(channel), scale));
        for (byte, &channel) in fine.iter_mut().zip(&self.doubled) {
            *byte = to_int8(divided(channel) - coarse[channel] as f32 * scale, scale / FINE_STEPS);
        }
        scale
    }

    /// The row `(D)` that bytes `(W)` and their scale stand for.
    pub fn decode(&self, bytes: &[i8], scale: f32, into: &mut [f32]) {
        let (coarse, fine) = bytes.split_at(into.len());
        into.iter_mut().zip(coarse).for_each(|(number, &byte)| *number = byte as f32);
        for (&byte, &channel) in fine.iter().zip(&self.doubled) {
            into[channel] += byte as f32 / FINE_STEPS;
        }
        into.iter_mut().zip(&self.factors).for_each(|(number, factor)| *number *= scale * factor);
    }

    /// A query `(D)` as it meets bytes: its product with a row's W bytes, times the row's scale, is that with the row.
    pub fn meet(&self, query: &[f32], into: &mut [f32]) {
        let (coarse, fine) = into.split_at_mut(query.len());
        let channels = query.iter().zip(&self.factors);
        coarse.iter_mut().zip(channels).for_each(|(into, (number, factor))| *into = number * factor);
        fine.iter_mut().zip(&self.doubled).for_each(|(into, &channel)| *into = coarse[channel] / FINE_STEPS);
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::vector::dot;

    fn rows(count: usize, dim: usize, large: f32) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let size = |channel: usize| if channel % 16 == 3 { large } else { 1.0 };
        (0..count * dim).map(|i| rng.random_range(-1.0f32..1.0) * size(i % dim)).collect()
    }

    /// Root of the mean square error of products with a query, by a code and with one scale per row alone.
    fn errors(rows: &[f32], dim: usize) -> [f32; 2] {
        let code = ChannelCode::of(&rows[..16 * dim], dim);
        let query: Vec<f32> = (0..dim).map(|d| (d as f32).sin()).collect();
        let (mut bytes, mut meets) = (vec![0; ChannelCode::width(dim)], vec![0.0; ChannelCode::width(dim)]);
        code.meet(&query, &mut meets);
        let mut squares = [0f32; 2];
        for row in rows.chunks_exact(dim) {
            let scale = code.encode(row, &mut bytes);
            let wide: Vec<f32> = bytes.iter().map(|&byte| byte as f32).collect();
            let product = dot(&wide, &meets) * scale;
            let mut decoded = vec![0.0; dim];
            code.decode(&bytes, scale, &mut decoded);
            assert!((product - dot(&decoded, &query)).abs() < 1e-4 * row.iter().map(|x| x.abs()).sum::<f32>());
            let scale = int8_scale(row.iter().copied());
            let plain: Vec<f32> = row.iter().map(|&number| to_int8(number, scale) as f32 * scale).collect();
            let right = dot(row, &query);
            for (square, found) in squares.iter_mut().zip([product, dot(&plain, &query)]) {
                *square += (found - right) * (found - right);
            }
        }
        squares.map(|square| (square / (rows.len() / dim) as f32).sqrt())
    }

    #[test]
    fn large_channels_cost_the_others_nothing() {
        for (dim, gain) in [(16, 2.0), (64, 3.0), (128, 3.0)] {
            let [coded, plain] = errors(&rows(200, dim, 30.0), dim);
            assert!(coded * gain < plain, "D = {dim}: {coded} against {plain}");
        }
    }

    #[test]
    fn rows_that_the_code_was_not_made_for_come_back_within_a_step() {
        for dim in [1, 7, 8, 65] {
            for of in [vec![0.0; dim], vec![f32::MAX; dim], vec![1e-30; dim], rows(3, dim, 1e6)] {
                let code = ChannelCode::of(&of, dim);
                assert_eq!(ChannelCode::from_factors(code.factors().to_vec()), Some(code.clone()));
                let row = rows(1, dim, 1000.0);
                let (mut bytes, mut decoded) = (vec![0; ChannelCode::width(dim)], vec![f32::NAN; dim]);
                let scale = code.encode(&row, &mut bytes);
                code.decode(&bytes, scale, &mut decoded);
                for ((number, found), factor) in row.iter().zip(&decoded).zip(code.factors()) {
                    assert!((number - found).abs() <= 0.51 * scale * factor, "D = {dim}: {found} for {number}");
                }
            }
        }
    }

    #[test]
    fn factors_that_no_code_has_are_refused() {
        for wrong in [0.0, -1.0, 64.5, f32::NAN, f32::INFINITY] {
            assert_eq!(ChannelCode::from_factors(vec![1.0, wrong]), None);
        }
    }
}
