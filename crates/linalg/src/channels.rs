//! Rows quantized to int8 where a few channels are larger than the others.
//!
//! A row has one scale, so its largest channel coarsens the steps of all others, and in a model's keys the same few
//! channels are large in every row. A [`ChannelQuantizer`] first divides each channel by a factor of its own. The error of
//! a dot product then comes mostly from the large channels, so the largest eighth of them store their rounding error in a
//! second byte. On keys and queries of SmolLM2 this cuts the error of a score to a third.

use super::int8::{INT8_LARGEST, int8_scale, to_int8};
use super::simd::larger;

/// The largest factor; the smallest is 1, so that no value grows. Beyond it a channel is too small to matter.
const FACTOR_MAX: f32 = 64.0;

/// One of so many channels has two bytes.
const DOUBLED_SHARE: usize = 8;

/// Steps of a second byte in one of the first: half of them fit a byte in either direction.
const FINE_STEPS: f32 = 2.0 * INT8_LARGEST;

/// Quantizes rows of D channels to W bytes: D in order, then the second bytes of the doubled channels.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelQuantizer {
    /// `(D)`: divisors of the channels, 1 to [`FACTOR_MAX`].
    factors: Vec<f32>,
    /// `(W - D)`, ascending: the channels with the largest factors; of equals the first.
    doubled: Vec<usize>,
}

impl ChannelQuantizer {
    /// Fits a quantizer to the channels' largest values in `rows (_, D)`, all finite.
    pub fn fit(rows: &[f32], dim: usize) -> Self {
        let mut tops = vec![0f32; dim];
        for row in rows.chunks_exact(dim) {
            tops.iter_mut().zip(row).for_each(|(top, value)| *top = larger(*top, value.abs()));
        }
        let largest = tops.iter().copied().fold(f32::MIN_POSITIVE, larger);
        Self::with((tops.iter().map(|top| larger(1.0, top / largest * FACTOR_MAX))).collect())
    }

    /// The quantizer with these `factors (D)`; `None` if one of them is out of range.
    pub fn from_factors(factors: Vec<f32>) -> Option<Self> {
        factors.iter().all(|factor| (1.0..=FACTOR_MAX).contains(factor)).then(|| Self::with(factors))
    }

    fn with(factors: Vec<f32>) -> Self {
        let mut order: Vec<usize> = (0..factors.len()).collect();
        order.sort_by(|&a, &b| factors[b].total_cmp(&factors[a]));
        order.truncate(factors.len() / DOUBLED_SHARE);
        order.sort_unstable();
        ChannelQuantizer { factors, doubled: order }
    }

    /// Divisors of the channels `(D)`.
    pub fn factors(&self) -> &[f32] {
        &self.factors
    }

    /// W, the bytes of a row of `dim` channels.
    pub fn width(dim: usize) -> usize {
        dim + dim / DOUBLED_SHARE
    }

    /// Quantizes a row `(D)` to bytes `(W)` and returns its scale.
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

    /// Restores a row `(D)` from its bytes `(W)` and scale.
    pub fn decode(&self, bytes: &[i8], scale: f32, into: &mut [f32]) {
        let (coarse, fine) = bytes.split_at(into.len());
        into.iter_mut().zip(coarse).for_each(|(value, &byte)| *value = byte as f32);
        for (&byte, &channel) in fine.iter().zip(&self.doubled) {
            into[channel] += byte as f32 / FINE_STEPS;
        }
        into.iter_mut().zip(&self.factors).for_each(|(value, factor)| *value *= scale * factor);
    }

    /// Projects a query `(D)` to `(W)`: its dot product with a row's bytes, times the row's scale, approximates that of
    /// query and row.
    pub fn project(&self, query: &[f32], into: &mut [f32]) {
        let (coarse, fine) = into.split_at_mut(query.len());
        let channels = query.iter().zip(&self.factors);
        coarse.iter_mut().zip(channels).for_each(|(into, (value, factor))| *into = value * factor);
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

    /// Root of the mean square error of products with a query, by channel and with one scale per row.
    fn errors(rows: &[f32], dim: usize) -> [f32; 2] {
        let quantizer = ChannelQuantizer::fit(&rows[..16 * dim], dim);
        let query: Vec<f32> = (0..dim).map(|d| (d as f32).sin()).collect();
        let (mut bytes, mut projected) =
            (vec![0; ChannelQuantizer::width(dim)], vec![0.0; ChannelQuantizer::width(dim)]);
        quantizer.project(&query, &mut projected);
        let mut squares = [0f32; 2];
        for row in rows.chunks_exact(dim) {
            let scale = quantizer.encode(row, &mut bytes);
            let wide: Vec<f32> = bytes.iter().map(|&byte| byte as f32).collect();
            let product = dot(&wide, &projected) * scale;
            let mut decoded = vec![0.0; dim];
            quantizer.decode(&bytes, scale, &mut decoded);
            assert!((product - dot(&decoded, &query)).abs() < 1e-4 * row.iter().map(|x| x.abs()).sum::<f32>());
            let scale = int8_scale(row.iter().copied());
            let plain: Vec<f32> = row.iter().map(|&value| to_int8(value, scale) as f32 * scale).collect();
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
            let [by_channel, plain] = errors(&rows(200, dim, 30.0), dim);
            assert!(by_channel * gain < plain, "D = {dim}: {by_channel} against {plain}");
        }
    }

    #[test]
    fn rows_that_the_quantizer_was_not_fitted_to_come_back_within_a_step() {
        for dim in [1, 7, 8, 65] {
            for of in [vec![0.0; dim], vec![f32::MAX; dim], vec![1e-30; dim], rows(3, dim, 1e6)] {
                let quantizer = ChannelQuantizer::fit(&of, dim);
                assert_eq!(ChannelQuantizer::from_factors(quantizer.factors().to_vec()), Some(quantizer.clone()));
                let row = rows(1, dim, 1000.0);
                let (mut bytes, mut decoded) = (vec![0; ChannelQuantizer::width(dim)], vec![f32::NAN; dim]);
                let scale = quantizer.encode(&row, &mut bytes);
                quantizer.decode(&bytes, scale, &mut decoded);
                for ((value, found), factor) in row.iter().zip(&decoded).zip(quantizer.factors()) {
                    assert!((value - found).abs() <= 0.51 * scale * factor, "D = {dim}: {found} for {value}");
                }
            }
        }
    }

    #[test]
    fn factors_out_of_range_are_refused() {
        for wrong in [0.0, -1.0, 64.5, f32::NAN, f32::INFINITY] {
            assert_eq!(ChannelQuantizer::from_factors(vec![1.0, wrong]), None);
        }
    }
}
