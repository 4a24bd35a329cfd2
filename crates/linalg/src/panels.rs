//! Panels of a packed matrix, in f32 or in the quantized blocks of a GGML file, which are four to six times fewer bytes to
//! read per decoded token.
//!
//! Blocks are widened one slab at a time, so a product does not depend on the storage of its panels.
//!
//! ```text
//! q8_0   scale f16, 32 x i8             scale * quant
//! q4_1   scale f16, min f16, 16 x u8    scale * nibble + min; byte j holds quants j (low) and j + 16
//! q4_0   scale f16, 16 x u8             scale * (nibble - 8)
//! ```

use std::ops::Range;

use half::f16;

use super::simd::fma;
use super::widen::{HALVES, widen};

/// Columns of a panel.
pub(super) const PANEL: usize = 64;

/// Consecutive values of a column that share a scale.
pub const BLOCK: usize = 32;

/// Quantized forms of [`BLOCK`] values, by GGML's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    /// 4 bits, symmetric.
    Q4_0,
    /// 4 bits from a minimum.
    Q4_1,
    /// 8 bits, symmetric.
    Q8_0,
}

/// The panels `(K, PANEL)` of a matrix `(K, N)`.
pub(super) enum Panels {
    /// `(panels, K, PANEL)`
    F32(Vec<f32>),
    Q4 {
        /// `(panels, K / BLOCK, PANEL)`
        scales: Vec<f16>,
        /// As `scales`: the value of quant 0.
        mins: Vec<f16>,
        /// `(panels, K / BLOCK, BLOCK / 2, PANEL)`: byte j holds quants j and j + BLOCK / 2 of its block.
        quants: Vec<u8>,
    },
    Q8 {
        /// `(panels, K / BLOCK, PANEL)`
        scales: Vec<f16>,
        /// `(panels, K, PANEL)`
        quants: Vec<i8>,
    },
}

/// Storage that a product reads panels from.
pub(super) trait Slabs: Sync {
    /// Rows `slab` of a panel in f32, `(slab, PANEL)`. `depth` is K; `wide` is scratch space.
    fn slab<'a>(&'a self, depth: usize, panel: usize, slab: Range<usize>, wide: &'a mut Vec<f32>) -> &'a [f32];

    /// Rows of a slab if `a` has few rows; `None` for the default.
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
            Panels::F32(values) => return values.slab(depth, panel, slab, wide),
            Panels::Q4 { scales, mins, quants } => {
                wide.resize(rows.len() * PANEL, 0.0);
                let bytes = &quants[rows.start * PANEL / 2..rows.end * PANEL / 2];
                widen_q4(&scales[blocks.clone()], &mins[blocks], bytes, wide);
            }
            Panels::Q8 { scales, quants } => {
                wide.resize(rows.len() * PANEL, 0.0);
                widen_q8(&scales[blocks], &quants[rows.start * PANEL..rows.end * PANEL], wide);
            }
        }
        wide
    }

    /// A slab that is widened to be read once stays in the first-level cache.
    fn gemv_depth(&self) -> Option<usize> {
        match self {
            Panels::F32(_) => None,
            Panels::Q4 { .. } | Panels::Q8 { .. } => Some(2 * BLOCK),
        }
    }
}

simd! {
    /// Widens blocks of one panel to `out (blocks * BLOCK, PANEL)`.
    fn widen_q4(scales: &[f16], mins: &[f16], quants: &[u8], out: &mut [f32]) {
        let params = scales.as_chunks::<PANEL>().0.iter().zip(mins.as_chunks::<PANEL>().0);
        let blocks = quants.as_chunks::<{ PANEL * BLOCK / 2 }>().0.iter().zip(out.as_chunks_mut::<{ PANEL * BLOCK }>().0);
        for ((scales, mins), (quants, out)) in params.zip(blocks) {
            let (scales, mins) = (widen_row::<FMA>(scales), widen_row::<FMA>(mins));
            let (low, high) = out.split_at_mut(PANEL * BLOCK / 2);
            let rows = low.as_chunks_mut::<PANEL>().0.iter_mut().zip(high.as_chunks_mut::<PANEL>().0);
            for (quants, (low, high)) in quants.as_chunks::<PANEL>().0.iter().zip(rows) {
                for lane in 0..PANEL {
                    low[lane] = fma::<FMA>((quants[lane] & 15) as f32, scales[lane], mins[lane]);
                    high[lane] = fma::<FMA>((quants[lane] >> 4) as f32, scales[lane], mins[lane]);
                }
            }
        }
    }
}

simd! {
    /// [`widen_q4`] for 8 bits.
    fn widen_q8(scales: &[f16], quants: &[i8], out: &mut [f32]) {
        let blocks = quants.as_chunks::<{ PANEL * BLOCK }>().0.iter().zip(out.as_chunks_mut::<{ PANEL * BLOCK }>().0);
        for (scales, (quants, out)) in scales.as_chunks::<PANEL>().0.iter().zip(blocks) {
            let scales = widen_row::<FMA>(scales);
            for (quants, out) in quants.as_chunks::<PANEL>().0.iter().zip(out.as_chunks_mut::<PANEL>().0) {
                for lane in 0..PANEL {
                    out[lane] = quants[lane] as f32 * scales[lane];
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
    /// Bytes of a block in a file.
    pub fn bytes(self) -> usize {
        match self {
            BlockFormat::Q4_0 => 2 + BLOCK / 2,
            BlockFormat::Q4_1 => 4 + BLOCK / 2,
            BlockFormat::Q8_0 => 2 + BLOCK,
        }
    }

    /// The panels of a matrix `(rows, N)` from its N columns, each `rows / BLOCK` blocks.
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
                let mut quants = vec![0; panels * rows * PANEL];
                for (block, lane, bytes) in places {
                    scales[block * PANEL + lane] = half(bytes);
                    let into = quants[block * BLOCK * PANEL + lane..].iter_mut().step_by(PANEL);
                    into.zip(&bytes[2..]).for_each(|(into, &byte)| *into = byte as i8);
                }
                Panels::Q8 { scales, quants }
            }
            BlockFormat::Q4_0 | BlockFormat::Q4_1 => {
                let mut mins = scales.clone();
                let mut quants = vec![0; panels * rows / 2 * PANEL];
                for (block, lane, bytes) in places {
                    let scale = half(bytes);
                    let (min, bytes) = match self {
                        BlockFormat::Q4_1 => (half(&bytes[2..]), &bytes[4..]),
                        // Exact unless it overflows.
                        _ => (f16::from_f32(-8.0 * scale.to_f32()), &bytes[2..]),
                    };
                    (scales[block * PANEL + lane], mins[block * PANEL + lane]) = (scale, min);
                    let into = quants[block * BLOCK / 2 * PANEL + lane..].iter_mut().step_by(PANEL);
                    into.zip(bytes).for_each(|(into, &byte)| *into = byte);
                }
                Panels::Q4 { scales, mins, quants }
            }
        }
    }
}
