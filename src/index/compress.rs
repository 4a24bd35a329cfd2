//! How do f16 keys become smaller ones to scan? One number of each channel and each key divided out, the rest in few
//! bits, and for every block how far scores may be off by it.
//!
//! A compressed key and the key differ by a vector whose length is known. The score of a query differs by at most that
//! length times the query's (Cauchy and Schwarz), which is what int8 keys are judged by: nothing is missed. For int4
//! keys that bound would let most blocks through. Their errors are taken as what they nearly are, independent of each
//! other and of the query: then a score's error has the standard deviation `length / sqrt(D)` times the query's length,
//! and [`DEVIATIONS`] of them bound it for all but three scores in 100,000. A block is missed only if its score is one
//! of these and what it lost was about to decide.

use std::ops::Range;

use half::f16;

use super::layout::{Compression, NIBBLE_OFFSET, OCTET, PANEL, QUAD};
use linalg::{larger, nearest, simd};

/// Steps from zero to the largest value of a query against int8 keys, and against int4 keys, at least.
const QUERY_STEPS_INT8: f32 = 127.0 * 508.0;
const QUERY_STEPS_INT4: f32 = 127.0;

/// Values side by side: one AVX-512 register.
const LANES: usize = 16;

/// Standard deviations that the error of a score from int4 keys stays within.
const DEVIATIONS: f32 = 4.0;

/// Compressed keys of some blocks, beside the f16 ones that they were made of.
#[derive(Debug)]
pub(super) struct Compressed {
    compression: Compression,
    dim: usize,
    keys_per_block: usize,
    blocks: usize,
    /// `(L * Hkv, panels, D / 4, PANEL, 4)` int8, or `(L * Hkv, panels, D / 8, PANEL, 4)` pairs of int4: the low half
    /// of a byte is of the first four of eight dimensions, the high half of the others.
    values: Vec<i8>,
    /// `(L * Hkv, panels, PANEL)`
    scales: Vec<f32>,
    /// `(L * Hkv, D)`: what keys were divided by. A few channels of keys are large, and would make the steps of all
    /// others coarse.
    channels: Vec<f32>,
    /// `(L * Hkv, keys, D)`: the keys themselves.
    halves: Vec<f16>,
    /// `(L * Hkv, blocks)`: how far the score of any of a block's keys may be off for a query that, times the channels,
    /// has length 1.
    errors: Vec<f32>,
    /// `(L * Hkv)`: the largest of them.
    largest_errors: Vec<f32>,
}

impl Compression {
    /// The largest number.
    fn largest(self) -> f32 {
        match self {
            Compression::Int8 => 127.0,
            Compression::Int4 => 7.0,
        }
    }

    /// How far scores are off for a query of length 1, if a key of D values became one of length `kept` and lost a
    /// vector of length `missed`.
    fn error(self, dim: usize, missed: f32, kept: f32) -> f32 {
        let root = (dim as f32).sqrt();
        // What the query loses as integers, and what f32 sums lose, is added.
        1.01 * match self {
            Compression::Int8 => missed + kept * root / QUERY_STEPS_INT8,
            // Rounding is off by a step / sqrt(12), and a query's largest number is at most its length.
            Compression::Int4 => DEVIATIONS * (missed / root).hypot(kept / (QUERY_STEPS_INT4 * 12f32.sqrt())),
        }
    }
}

impl Compressed {
    /// For so many blocks of `pieces` layers and KV heads; keys are put into it, then [`Compressed::finish`] is called.
    pub(super) fn zeroed(
        compression: Compression,
        dim: usize,
        keys_per_block: usize,
        pieces: usize,
        blocks: usize,
    ) -> Self {
        let lanes = pieces * (blocks * keys_per_block).next_multiple_of(PANEL);
        Compressed {
            compression,
            dim,
            keys_per_block,
            blocks,
            values: linalg::zeroed(lanes * compression.key_bytes(dim)),
            scales: linalg::zeroed(lanes),
            channels: vec![1.0; pieces * dim],
            halves: linalg::zeroed(pieces * blocks * keys_per_block * dim),
            errors: vec![0.0; pieces * blocks],
            largest_errors: vec![0.0; pieces],
        }
    }

    /// Sets the keys `(m, D)` of one block and piece.
    pub(super) fn put(&mut self, block: usize, piece: usize, keys: &[f16]) {
        let count = self.keys_per_block * self.dim;
        assert_eq!(keys.len(), count);
        self.halves[(piece * self.blocks + block) * count..][..count].copy_from_slice(keys);
    }

    /// Makes the compressed form, once every key is there.
    pub(super) fn finish(&mut self) {
        let (dim, count) = (self.dim, self.keys_per_block);
        let piece_keys = self.piece_keys();
        let key_bytes = self.compression.key_bytes(dim);
        let pieces = self.halves.chunks_exact(self.blocks * count * dim).zip(self.channels.chunks_exact_mut(dim));
        let into = self.values.chunks_exact_mut(piece_keys * key_bytes).zip(self.scales.chunks_exact_mut(piece_keys));
        let errors = self.errors.chunks_exact_mut(self.blocks).zip(&mut self.largest_errors);
        let mut bytes = vec![0; dim.next_multiple_of(LANES)];
        let mut divided = vec![0.0; bytes.len()];
        let mut inverses = vec![0.0; dim];
        for (((halves, channels), (values, scales)), (errors, largest_error)) in pieces.zip(into).zip(errors) {
            largest_by_channel(halves, channels);
            inverses.iter_mut().zip(&*channels).for_each(|(inverse, channel)| *inverse = channel.recip());
            let panels = values.as_chunks_mut::<QUAD>().0;
            for (key, (halves, scale)) in halves.chunks_exact(dim).zip(&mut *scales).enumerate() {
                let (of_key, missed, kept) =
                    quantise(halves, &inverses, self.compression.largest(), &mut divided, &mut bytes);
                *scale = of_key;
                let error = self.compression.error(dim, missed.sqrt(), kept.sqrt());
                errors[key / count] = larger(errors[key / count], error);
                *largest_error = larger(*largest_error, error);
                let quads = &mut panels[key / PANEL * PANEL * key_bytes / QUAD + key % PANEL..];
                let into = quads.iter_mut().step_by(PANEL);
                match self.compression {
                    Compression::Int8 => {
                        into.zip(bytes.as_chunks().0).take(key_bytes / QUAD).for_each(|(to, quad)| *to = *quad)
                    }
                    Compression::Int4 => {
                        into.zip(bytes.as_chunks().0)
                            .take(key_bytes / QUAD)
                            .for_each(|(to, octet)| *to = packed(octet));
                    }
                }
            }
        }
    }

    /// What keys were divided by `(D)`.
    pub(super) fn channels(&self, piece: usize) -> &[f32] {
        &self.channels[piece * self.dim..][..self.dim]
    }

    /// The keys of one block `(m, D)`, as they were put.
    pub(super) fn halves(&self, piece: usize, block: usize) -> &[f16] {
        let count = self.keys_per_block * self.dim;
        &self.halves[(piece * self.blocks + block) * count..][..count]
    }

    /// How far scores of some blocks may be off for a query that, times the channels, has length 1.
    pub(super) fn errors(&self, piece: usize, blocks: Range<usize>) -> &[f32] {
        &self.errors[piece * self.blocks..][blocks]
    }

    /// The largest of those of all blocks.
    pub(super) fn largest_error(&self, piece: usize) -> f32 {
        self.largest_errors[piece]
    }

    /// Values and scales of some panels of one piece.
    pub(super) fn panels(&self, piece: usize, panels: Range<usize>) -> (&[i8], &[f32]) {
        let first = piece * self.piece_keys() + panels.start * PANEL;
        let keys = first..first + panels.len() * PANEL;
        let key_bytes = self.compression.key_bytes(self.dim);
        (&self.values[keys.start * key_bytes..keys.end * key_bytes], &self.scales[keys])
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.values)
            + size_of_val(&*self.scales)
            + size_of_val(&*self.channels)
            + size_of_val(&*self.halves)
            + size_of_val(&*self.errors)
            + size_of_val(&*self.largest_errors)
    }

    fn piece_keys(&self) -> usize {
        (self.blocks * self.keys_per_block).next_multiple_of(PANEL)
    }
}

/// Eight values in four bytes.
fn packed(octet: &[i8; OCTET]) -> [i8; QUAD] {
    let nibble = |number: i8| number as i32 + NIBBLE_OFFSET;
    std::array::from_fn(|d| (nibble(octet[d]) | nibble(octet[d + QUAD]) << 4) as i8)
}

simd! {
    /// The largest number of every channel of keys `(keys, D)`; 1 where there is none.
    fn largest_by_channel(halves: &[f16], channels: &mut [f32]) {
        channels.fill(0.0);
        let mut wide = vec![0.0; channels.len()];
        for key in halves.chunks_exact(channels.len()) {
            linalg::widen_f16(key, &mut wide);
            for (top, number) in channels.iter_mut().zip(&wide) {
                *top = larger(*top, number.abs());
            }
        }
        for top in channels {
            *top = if *top == 0.0 { 1.0 } else { *top };
        }
    }
}

simd! {
    /// A key `(D)` times `inverses` in steps of a scale, so that its largest number becomes `largest`. `divided` and
    /// `into` are as long as D, filled up to a multiple of [`LANES`] with zeros. Returns the scale, and the squared
    /// lengths of what was lost and kept.
    fn quantise(key: &[f16], inverses: &[f32], largest: f32, divided: &mut [f32], into: &mut [i8]) -> (f32, f32, f32) {
        linalg::widen_f16(key, &mut divided[..key.len()]);
        for (number, inverse) in divided.iter_mut().zip(inverses) {
            *number *= inverse;
        }
        let mut tops = [0f32; LANES];
        for part in divided.as_chunks::<LANES>().0 {
            for (top, number) in tops.iter_mut().zip(part) {
                *top = larger(*top, number.abs());
            }
        }
        let scale = linalg::fold(tops, larger) / largest;
        let inverse = if scale > 0.0 { scale.recip().min(f32::MAX) } else { 0.0 };
        let (mut missed, mut kept) = ([0f32; LANES], [0f32; LANES]);
        for (part, into) in divided.as_chunks::<LANES>().0.iter().zip(into.as_chunks_mut::<LANES>().0) {
            for lane in 0..LANES {
                into[lane] = nearest(part[lane] * inverse);
                let compressed = into[lane] as f32 * scale;
                missed[lane] += (part[lane] - compressed) * (part[lane] - compressed);
                kept[lane] += compressed * compressed;
            }
        }
        (scale, linalg::fold(missed, |a, b| a + b), linalg::fold(kept, |a, b| a + b))
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// The number of a dimension of a key as it lies in a panel.
    fn number(keys: &Compressed, panels: &[i8], key: usize, d: usize) -> f32 {
        let at = |d: usize| {
            key / PANEL * PANEL * keys.compression.key_bytes(keys.dim)
                + (d / QUAD * PANEL + key % PANEL) * QUAD
                + d % QUAD
        };
        match keys.compression {
            Compression::Int8 => panels[at(d)] as f32,
            Compression::Int4 => {
                let byte = panels[at(d / OCTET * QUAD + d % QUAD)].cast_unsigned();
                ((byte >> (d % OCTET / QUAD * 4) & 15) as i32 - NIBBLE_OFFSET) as f32
            }
        }
    }

    #[test]
    fn scores_are_off_by_no_more_than_said() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for (dim, count, blocks) in [(1, 1, 3), (20, 3, 50), (64, 1, 700), (128, 1, 700)] {
            for compression in [Compression::Int8, Compression::Int4] {
                let mut keys = Compressed::zeroed(compression, dim, count, 1, blocks);
                let size = |d: usize| if d % 16 == 3 { 30.0 } else { 1.0 };
                for block in 0..blocks {
                    let of_block: Vec<f16> =
                        (0..count * dim).map(|i| f16::from_f32(rng.random_range(-1.0..1.0) * size(i % dim))).collect();
                    keys.put(block, 0, &of_block);
                }
                keys.finish();
                let (panels, scales) = keys.panels(0, 0..(blocks * count).div_ceil(PANEL));
                let (mut scores, mut beyond) = (0, 0);
                for _ in 0..10 {
                    let query: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
                    let projected: Vec<f32> =
                        query.iter().zip(keys.channels(0)).map(|(q, channel)| q * channel).collect();
                    let length = linalg::dot(&projected, &projected).sqrt();
                    for (key, &scale) in scales[..blocks * count].iter().enumerate() {
                        let block = key / count;
                        let right = linalg::dot_f16(&query, &keys.halves(0, block)[key % count * dim..][..dim]);
                        let product: f32 = (0..dim).map(|d| number(&keys, panels, key, d) * projected[d]).sum();
                        let error = keys.errors(0, block..block + 1)[0];
                        assert!(error <= keys.largest_error(0));
                        scores += 1;
                        beyond += ((product * scale - right).abs() > error * length) as usize;
                    }
                }
                // Four standard deviations are exceeded, in either direction, by one in 15,800.
                let allowed = if compression == Compression::Int4 { scores / 1000 } else { 0 };
                assert!(beyond <= allowed, "{compression:?}, D = {dim}: {beyond} of {scores}");
            }
        }
    }
}
