//! The numbers of a matrix's panels: as single floats, or in the quantized blocks of a GGML file, which are four to six times
//! fewer bytes to read for every token that is decoded.
//!
//! Blocks are widened to what they stand for a slab at a time, so a product is the same whichever way its numbers are kept.
//!
//! ```text
//! q8_0   32 numbers: scale f16, 32 x i8           scale * number
//! q4_1   32 numbers: scale f16, least f16, 16 x u8    scale * nibble + least; byte j holds numbers j (low) and j + 16
//! q4_0   32 numbers: scale f16, 16 x u8           scale * (nibble - 8)
//! ```

use std::ops::Range;

use half::f16;

use super::simd::fma;
use super::widen::{HALVES, widen};

/// Columns of a panel.
pub(super) const PANEL: usize = 64;

/// Consecutive numbers of a column that share a scale.
pub const BLOCK: usize = 32;

/// How a file keeps [`BLOCK`] numbers (GGML's names).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q8_0,
}

/// Panels `(K, PANEL)` of a matrix with `K` rows.
pub(super) enum Panels {
    /// `(panels, K, PANEL)`
    F32(Vec<f32>),
    Q4 {
        /// `(panels, K / BLOCK, PANEL)`
        scales: Vec<f16>,
        /// As the scales: what a number of zero stands for.
        leasts: Vec<f16>,
        /// `(panels, K / BLOCK, BLOCK / 2, PANEL)`: byte j holds numbers j and j + BLOCK / 2 of its block.
        numbers: Vec<u8>,
    },
    Q8 {
        /// `(panels, K / BLOCK, PANEL)`
        scales: Vec<f16>,
        /// `(panels, K, PANEL)`
        numbers: Vec<i8>,
    },
}

/// What a product reads panels from.
pub(super) trait Slabs: Sync {
    /// Rows `slab` of a panel of a matrix with `depth` rows, `(rows, PANEL)`; `wide` is scratch space for them.
    fn slab<'a>(&'a self, depth: usize, panel: usize, slab: Range<usize>, wide: &'a mut Vec<f32>) -> &'a [f32];

    /// Rows of a slab that meets only few rows of the left factor.
    fn gemv_depth(&self) -> Option<usize>;
}

impl Slabs for [f32] {
    fn slab<'a>(&'a self, depth: usize, panel: usize, slab: Range<usize>, _: &'a mut Vec<f32>) -> &'a [f32] {
        &self[(panel * depth + slab.start) * PANEL..(panel * depth + slab.end) * PANEL]
    }

    fn gemv_depth(&self) -> Option<usize> {
        None
    }
}

impl Slabs for Panels {
    fn slab<'a>(&'a self, depth: usize, panel: usize, slab: Range<usize>, wide: &'a mut Vec<f32>) -> &'a [f32] {
        let rows = panel * depth + slab.start..panel * depth + slab.end;
        debug_assert!(matches!(self, Panels::F32(_)) || (rows.start % BLOCK, rows.end % BLOCK) == (0, 0));
        let blocks = rows.start / BLOCK * PANEL..rows.end / BLOCK * PANEL;
        match self {
            Panels::F32(numbers) => return numbers.slab(depth, panel, slab, wide),
            Panels::Q4 { scales, leasts, numbers } => {
                wide.resize(rows.len() * PANEL, 0.0);
                let bytes = &numbers[rows.start * PANEL / 2..rows.end * PANEL / 2];
                widen_q4(&scales[blocks.clone()], &leasts[blocks], bytes, wide);
            }
            Panels::Q8 { scales, numbers } => {
                wide.resize(rows.len() * PANEL, 0.0);
                widen_q8(&scales[blocks], &numbers[rows.start * PANEL..rows.end * PANEL], wide);
            }
        }
        wide
    }

    /// Widened numbers that are read once should not leave the first-level cache.
    fn gemv_depth(&self) -> Option<usize> {
        match self {
            Panels::F32(_) => None,
            Panels::Q4 { .. } | Panels::Q8 { .. } => Some(2 * BLOCK),
        }
    }
}

simd! {
    /// Some blocks `(blocks, ..)` of one panel to `out (blocks * BLOCK, PANEL)`.
    fn widen_q4(scales: &[f16], leasts: &[f16], numbers: &[u8], out: &mut [f32]) {
        let params = scales.as_chunks::<PANEL>().0.iter().zip(leasts.as_chunks::<PANEL>().0);
        let blocks = numbers.as_chunks::<{ PANEL * BLOCK / 2 }>().0.iter().zip(out.as_chunks_mut::<{ PANEL * BLOCK }>().0);
        for ((scales, leasts), (numbers, out)) in params.zip(blocks) {
            let (scales, leasts) = (widen_row::<FMA>(scales), widen_row::<FMA>(leasts));
            let (low, high) = out.split_at_mut(PANEL * BLOCK / 2);
            let rows = low.as_chunks_mut::<PANEL>().0.iter_mut().zip(high.as_chunks_mut::<PANEL>().0);
            for (numbers, (low, high)) in numbers.as_chunks::<PANEL>().0.iter().zip(rows) {
                for lane in 0..PANEL {
                    low[lane] = fma::<FMA>((numbers[lane] & 15) as f32, scales[lane], leasts[lane]);
                    high[lane] = fma::<FMA>((numbers[lane] >> 4) as f32, scales[lane], leasts[lane]);
                }
            }
        }
    }
}

simd! {
    /// As [`widen_q4`], for numbers of 8 bits.
    fn widen_q8(scales: &[f16], numbers: &[i8], out: &mut [f32]) {
        let blocks = numbers.as_chunks::<{ PANEL * BLOCK }>().0.iter().zip(out.as_chunks_mut::<{ PANEL * BLOCK }>().0);
        for (scales, (numbers, out)) in scales.as_chunks::<PANEL>().0.iter().zip(blocks) {
            let scales = widen_row::<FMA>(scales);
            for (numbers, out) in numbers.as_chunks::<PANEL>().0.iter().zip(out.as_chunks_mut::<PANEL>().0) {
                for lane in 0..PANEL {
                    out[lane] = numbers[lane] as f32 * scales[lane];
                }
            }
        }
    }
}

#[inline(always)]
fn widen_row<const FMA: bool>(halves: &[f16; PANEL]) -> [f32; PANEL] {
    let mut wide = [0.0; PANEL];
    for (wide, halves) in wide.as_chunks_mut::<HALVES>().0.iter_mut().zip(halves.as_chunks::<HALVES>().0) {
        *wide = widen::<FMA>(halves);
    }
    wide
}

impl BlockFormat {
    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            BlockFormat::Q4_0 => 2 + BLOCK / 2,
            BlockFormat::Q4_1 => 4 + BLOCK / 2,
            BlockFormat::Q8_0 => 2 + BLOCK,
        }
    }

    /// Panels of the matrix whose columns are these, each `rows` numbers in blocks.
    pub(super) fn panels(self, rows: usize, columns: &[&[u8]]) -> Panels {
        let blocks = rows / BLOCK;
        let panels = columns.len().div_ceil(PANEL);
        let mut scales = vec![f16::ZERO; panels * blocks * PANEL];
        let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]);
        let places = columns.iter().enumerate().flat_map(|(column, bytes)| {
            let first = column / PANEL * blocks;
            let block = move |(block, bytes)| (first + block, column % PANEL, bytes);
            bytes.chunks_exact(self.bytes()).enumerate().map(block)
        });
        match self {
            BlockFormat::Q8_0 => {
                let mut numbers = vec![0; panels * rows * PANEL];
                for (block, lane, bytes) in places {
                    scales[block * PANEL + lane] = half(bytes);
                    let into = numbers[block * BLOCK * PANEL + lane..].iter_mut().step_by(PANEL);
                    into.zip(&bytes[2..]).for_each(|(into, &byte)| *into = byte as i8);
                }
                Panels::Q8 { scales, numbers }
            }
            BlockFormat::Q4_0 | BlockFormat::Q4_1 => {
                let mut leasts = scales.clone();
                let mut numbers = vec![0; panels * rows / 2 * PANEL];
                for (block, lane, bytes) in places {
                    let scale = half(bytes);
                    let (least, bytes) = match self {
                        BlockFormat::Q4_1 => (half(&bytes[2..]), &bytes[4..]),
                        // Exact: eight times a half float is one, but for the largest.
                        _ => (f16::from_f32(-8.0 * scale.to_f32()), &bytes[2..]),
                    };
                    (scales[block * PANEL + lane], leasts[block * PANEL + lane]) = (scale, least);
                    let into = numbers[block * BLOCK / 2 * PANEL + lane..].iter_mut().step_by(PANEL);
                    into.zip(bytes).for_each(|(into, &byte)| *into = byte);
                }
                Panels::Q4 { scales, leasts, numbers }
            }
        }
    }
}
