//! The forms that weights have in files, by GGML's names: how long their blocks are, and what their bytes stand for.
//!
//! A block is decoded in one place for each format (`decode`), for the [`PANEL`] columns of a panel at once, and handed on
//! row by row: to memory ([`BlockFormat::widen_panel`]) or into sums ([`BlockFormat::dot_panel`]). `plain` is the judge.
//!
//! Floor: one read of the blocks for one row of `a`. One core of a Sapphire Rapids, which others used too, sums 2048 x 16384 at
//! 17 to 19 values per ns in formats of 4 and 8 bits (q8_0: 19 GB/s), 13 to 15 in q5_0, q4_k and q6_k, and 10 in f16 (20 GB/s, which is what
//! it reads). Half the columns at once were slower: the compiler found fewer vectors.

/// An array of what an expression gives for each column of a panel.
macro_rules! lanes {
    ($lane:ident: $value:expr) => {{
        let mut lanes = [Default::default(); PANEL];
        for $lane in 0..PANEL {
            lanes[$lane] = $value;
        }
        lanes
    }};
}

mod decode;
#[cfg(test)]
pub(super) mod plain;

use half::{bf16, f16};

use super::memory::prefetch_ahead_of;
use super::simd::fma;
pub(super) use decode::PANEL;
use decode::{
    Bf16, Decode, F16, Iq4Nl, Iq4Xs, Q2K, Q3K, Q4K, Q4With0, Q4With1, Q5K, Q5With0, Q5With1, Q6K, Q8With0, Rows,
};

/// A form of weights in files. Consecutive values of a row, [`BlockFormat::values`] of them, are one block of
/// [`BlockFormat::bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    /// Half precision, one value per block.
    F16,
    /// The upper half of an f32, one value per block.
    Bf16,
    /// 4 bits, symmetric.
    Q4_0,
    /// 4 bits from a minimum.
    Q4_1,
    /// 5 bits, symmetric.
    Q5_0,
    /// 5 bits from a minimum.
    Q5_1,
    /// 8 bits, symmetric.
    Q8_0,
    /// 2 bits from a minimum, 16 values to a scale.
    Q2K,
    /// 3 bits, symmetric, 16 values to a scale.
    Q3K,
    /// 4 bits from a minimum, 32 values to a scale.
    Q4K,
    /// 5 bits from a minimum, 32 values to a scale.
    Q5K,
    /// 6 bits, symmetric, 16 values to a scale.
    Q6K,
    /// 4 bits, which choose from a table.
    Iq4Nl,
    /// 4 bits, which choose from a table, 32 values to a scale.
    Iq4Xs,
}

/// What is done with a format.
struct Coding {
    values: usize,
    bytes: usize,
    /// Where in a block its f16 factors are.
    factors: &'static [usize],
    widen: fn(&[u8], &mut [f32]),
    dot: fn(&[f32], &[u8], &mut [f32; PANEL]),
}

const fn coding<F: Decode>() -> Coding {
    Coding { values: F::VALUES, bytes: F::BYTES, factors: F::FACTORS, widen: widen::<F>, dot: dot::<F> }
}

impl BlockFormat {
    /// Every format.
    pub const ALL: [BlockFormat; 14] = [
        BlockFormat::F16,
        BlockFormat::Bf16,
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
        BlockFormat::Q5_0,
        BlockFormat::Q5_1,
        BlockFormat::Q8_0,
        BlockFormat::Q2K,
        BlockFormat::Q3K,
        BlockFormat::Q4K,
        BlockFormat::Q5K,
        BlockFormat::Q6K,
        BlockFormat::Iq4Nl,
        BlockFormat::Iq4Xs,
    ];

    fn coding(self) -> &'static Coding {
        match self {
            BlockFormat::F16 => &const { coding::<F16>() },
            BlockFormat::Bf16 => &const { coding::<Bf16>() },
            BlockFormat::Q4_0 => &const { coding::<Q4With0>() },
            BlockFormat::Q4_1 => &const { coding::<Q4With1>() },
            BlockFormat::Q5_0 => &const { coding::<Q5With0>() },
            BlockFormat::Q5_1 => &const { coding::<Q5With1>() },
            BlockFormat::Q8_0 => &const { coding::<Q8With0>() },
            BlockFormat::Q2K => &const { coding::<Q2K>() },
            BlockFormat::Q3K => &const { coding::<Q3K>() },
            BlockFormat::Q4K => &const { coding::<Q4K>() },
            BlockFormat::Q5K => &const { coding::<Q5K>() },
            BlockFormat::Q6K => &const { coding::<Q6K>() },
            BlockFormat::Iq4Nl => &const { coding::<Iq4Nl>() },
            BlockFormat::Iq4Xs => &const { coding::<Iq4Xs>() },
        }
    }

    /// Values of a block, at most 256.
    pub fn values(self) -> usize {
        self.coding().values
    }

    /// Bytes of a block in a file.
    pub fn bytes(self) -> usize {
        self.coding().bytes
    }

    /// Whether all that whole blocks stand for is finite: their factors, or each value where they have none.
    pub fn is_finite(self, blocks: &[u8]) -> bool {
        let two = |block: &[u8], at: usize| [block[at], block[at + 1]];
        let Coding { bytes, factors, .. } = *self.coding();
        let mut blocks = blocks.chunks_exact(bytes);
        match self {
            BlockFormat::Bf16 => blocks.all(|block| bf16::from_le_bytes(two(block, 0)).is_finite()),
            _ => blocks.all(|block| factors.iter().all(|&at| f16::from_le_bytes(two(block, at)).is_finite())),
        }
    }

    /// What whole blocks stand for.
    ///
    /// # Panics
    /// If the last block is cut short.
    pub fn widen(self, blocks: &[u8]) -> Vec<f32> {
        let Coding { values, bytes, widen, .. } = *self.coding();
        assert!(blocks.len().is_multiple_of(bytes));
        let mut out = Vec::with_capacity(blocks.len() / bytes * values);
        let (mut panel, mut wide) = (vec![0; bytes * PANEL], vec![0.0; values * PANEL]);
        for blocks in blocks.chunks(bytes * PANEL) {
            let columns: Vec<&[u8]> = blocks.chunks_exact(bytes).collect();
            interleave(&columns, &mut panel);
            widen(&panel, &mut wide);
            for column in 0..columns.len() {
                out.extend(wide.iter().skip(column).step_by(PANEL));
            }
        }
        out
    }

    /// Widens blocks of one panel, `(blocks, bytes, PANEL)`, to `out (blocks * values, PANEL)`.
    pub(super) fn widen_panel(self, blocks: &[u8], out: &mut [f32]) {
        (self.coding().widen)(blocks, out);
    }

    /// `sums (PANEL) = a (blocks * values)` times blocks of one panel, `(blocks, bytes, PANEL)`.
    pub(super) fn dot_panel(self, a: &[f32], blocks: &[u8], sums: &mut [f32; PANEL]) {
        (self.coding().dot)(a, blocks, sums);
    }
}

/// Interleaves at most [`PANEL`] columns of equal length into `panel (length, PANEL)`.
pub(super) fn interleave(columns: &[&[u8]], panel: &mut [u8]) {
    /// Rows interleaved at once, a cache line of each column: columns are often some KiB apart, and their lines would push each
    /// other out of the cache.
    const TOGETHER: usize = 64;
    for (index, rows) in panel.chunks_mut(TOGETHER * PANEL).enumerate() {
        let rows = rows.as_chunks_mut::<PANEL>().0;
        let mut tile = [[0; TOGETHER]; PANEL];
        for (tile, column) in tile.iter_mut().zip(columns) {
            tile[..rows.len()].copy_from_slice(&column[index * TOGETHER..][..rows.len()]);
        }
        for (at, row) in rows.iter_mut().enumerate() {
            for (lane, byte) in row.iter_mut().enumerate() {
                *byte = tile[lane][at];
            }
        }
    }
}

/// Decoded rows that are written.
struct Written<'a>(&'a mut [[f32; PANEL]]);

impl Rows for Written<'_> {
    #[inline(always)]
    fn put<const FMA: bool>(&mut self, row: usize, values: [f32; PANEL]) {
        self.0[row] = values;
    }
}

/// Decoded rows that are summed with the weights `a (values)`.
struct Summed<'a> {
    a: &'a [f32],
    sums: [f32; PANEL],
}

impl Rows for Summed<'_> {
    #[inline(always)]
    fn put<const FMA: bool>(&mut self, row: usize, values: [f32; PANEL]) {
        let weight = self.a[row];
        self.sums = lanes!(i: fma::<FMA>(weight, values[i], self.sums[i]));
    }
}

simd! {
    fn widen<F: Decode>(blocks: &[u8], out: &mut [f32]) {
        let (blocks, out) = (blocks.as_chunks::<PANEL>().0, out.as_chunks_mut::<PANEL>().0);
        for (block, out) in blocks.chunks_exact(F::BYTES).zip(out.chunks_exact_mut(F::VALUES)) {
            F::decode::<FMA>(block, &mut Written(out));
        }
    }
}

simd! {
    fn dot<F: Decode>(a: &[f32], blocks: &[u8], sums: &mut [f32; PANEL]) {
        let mut kept = [0.0; PANEL];
        for (block, a) in blocks.as_chunks::<PANEL>().0.chunks_exact(F::BYTES).zip(a.chunks_exact(F::VALUES)) {
            prefetch_ahead_of(block);
            let mut summed = Summed { a, sums: kept };
            F::decode::<FMA>(block, &mut summed);
            kept = summed.sums;
        }
        *sums = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plain::{plain, random_blocks};

    /// Relative to the largest value of a block: a few roundings of f32.
    const TOLERANCE: f64 = 1e-6;

    #[test]
    fn blocks_stand_for_what_their_format_says() {
        for format in BlockFormat::ALL {
            for count in [0, 1, 63, 64, 65, 130] {
                let blocks = random_blocks(format, count, count as u64);
                let wide = format.widen(&blocks);
                let wanted = plain(format, &blocks);
                assert_eq!(wide.len(), count * format.values());
                for (wide, wanted) in wide.chunks(format.values()).zip(wanted.chunks(format.values())) {
                    let top = wanted.iter().fold(0f64, |top, value| top.max(value.abs()));
                    for (wide, wanted) in wide.iter().zip(wanted) {
                        let error = (*wide as f64 - wanted).abs();
                        assert!(error <= TOLERANCE * top, "{format:?}: {wide} {wanted}");
                    }
                }
            }
        }
    }

    /// What machines without vector instructions run.
    #[test]
    fn portable_code_decodes_as_the_vectors_do() {
        fn portable<F: Decode>(format: BlockFormat) {
            let blocks = random_blocks(format, PANEL, 3);
            let columns: Vec<&[u8]> = blocks.chunks_exact(F::BYTES).collect();
            let (mut panel, mut out) = (vec![0; F::BYTES * PANEL], vec![f32::NAN; F::VALUES * PANEL]);
            interleave(&columns, &mut panel);
            F::decode::<false>(panel.as_chunks().0, &mut Written(out.as_chunks_mut().0));
            let mut wanted = vec![0.0; out.len()];
            format.widen_panel(&panel, &mut wanted);
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * (1.0 + b.abs());
            assert!(out.iter().zip(&wanted).all(near), "{format:?}");
        }
        for format in BlockFormat::ALL {
            match format {
                BlockFormat::F16 => portable::<F16>(format),
                BlockFormat::Bf16 => portable::<Bf16>(format),
                BlockFormat::Q4_0 => portable::<Q4With0>(format),
                BlockFormat::Q4_1 => portable::<Q4With1>(format),
                BlockFormat::Q5_0 => portable::<Q5With0>(format),
                BlockFormat::Q5_1 => portable::<Q5With1>(format),
                BlockFormat::Q8_0 => portable::<Q8With0>(format),
                BlockFormat::Q2K => portable::<Q2K>(format),
                BlockFormat::Q3K => portable::<Q3K>(format),
                BlockFormat::Q4K => portable::<Q4K>(format),
                BlockFormat::Q5K => portable::<Q5K>(format),
                BlockFormat::Q6K => portable::<Q6K>(format),
                BlockFormat::Iq4Nl => portable::<Iq4Nl>(format),
                BlockFormat::Iq4Xs => portable::<Iq4Xs>(format),
            }
        }
    }

    #[test]
    fn a_factor_that_is_not_finite_is_found_wherever_it_is() {
        let nan = f16::NAN.to_le_bytes();
        for format in BlockFormat::ALL {
            let blocks = random_blocks(format, 3, 9);
            assert!(format.is_finite(&blocks), "{format:?}");
            for at in plain::factors(format) {
                for infinite in [nan, f16::INFINITY.to_le_bytes()] {
                    let infinite = if format == BlockFormat::Bf16 { bf16::INFINITY.to_le_bytes() } else { infinite };
                    let mut blocks = blocks.clone();
                    let last = 2 * format.bytes();
                    blocks[last + at..][..2].copy_from_slice(&infinite);
                    assert!(!format.is_finite(&blocks), "{format:?}, byte {at}");
                }
            }
        }
    }
}
