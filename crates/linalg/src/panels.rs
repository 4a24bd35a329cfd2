//! Panels of a packed matrix, in f32 or in the blocks of a file, which are up to seven times fewer bytes to read per decoded
//! token.
//!
//! The blocks of a panel's columns are interleaved byte by byte and otherwise as they were, whatever their format. One row
//! of `a` is summed with them as they are decoded; for more rows they are widened one slab at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::formats::{BlockFormat, PANEL, interleave};
use super::memory::zeroed;

/// Rows of a panel that all rows of `a` pass over before the next: 256 KiB, which stay in a core's own cache. A whole number of
/// blocks in every format.
const DEPTH: usize = 1024;

/// [`DEPTH`] for one row of `a`, which blocks are summed with as they are decoded: they stay in the first-level cache.
const SUMMED_DEPTH: usize = 256;

/// [`DEPTH`] for few rows of `a` where blocks are no longer: a slab that is widened for them stays in the first-level cache.
const WIDENED_DEPTH: usize = 64;

/// Most rows of `a` that are few.
const ROWS_FEW: usize = 6;

/// The panels `(K, PANEL)` of a matrix `(K, N)`.
pub(super) enum Panels {
    /// `(panels, K, PANEL)`
    F32(Vec<f32>),
    Blocks {
        format: BlockFormat,
        /// `(panels, K / values, bytes, PANEL)`: of a format's block.
        bytes: Vec<u8>,
    },
}

/// Storage that a product reads panels from. `depth` is K.
pub(super) trait Slabs: Sync {
    /// Rows of a slab if `a` has that many rows.
    fn slab_depth(&self, rows: usize) -> usize;

    /// Rows `slab` of a panel in f32, `(slab, PANEL)`; `wide` is scratch space.
    fn slab<'a>(&'a self, depth: usize, panel: usize, slab: Range<usize>, wide: &'a mut Vec<f32>) -> &'a [f32];

    /// `sums (PANEL) = a (slab)` times rows `slab` of a panel, if that takes no slab in f32; false if it does.
    fn dot(&self, depth: usize, panel: usize, slab: Range<usize>, a: &[f32], sums: &mut [f32; PANEL]) -> bool;
}

impl Slabs for [f32] {
    fn slab_depth(&self, _: usize) -> usize {
        DEPTH
    }

    fn slab<'a>(&'a self, depth: usize, panel: usize, slab: Range<usize>, _: &'a mut Vec<f32>) -> &'a [f32] {
        &self[(panel * depth + slab.start) * PANEL..(panel * depth + slab.end) * PANEL]
    }

    fn dot(&self, _: usize, _: usize, _: Range<usize>, _: &[f32], _: &mut [f32; PANEL]) -> bool {
        false
    }
}

impl Slabs for Panels {
    fn slab_depth(&self, rows: usize) -> usize {
        match self {
            Panels::Blocks { .. } if rows == 1 => SUMMED_DEPTH,
            Panels::Blocks { format, .. } if rows <= ROWS_FEW => format.values().max(WIDENED_DEPTH),
            _ => DEPTH,
        }
    }

    fn slab<'a>(&'a self, depth: usize, panel: usize, slab: Range<usize>, wide: &'a mut Vec<f32>) -> &'a [f32] {
        match self {
            Panels::F32(values) => values.slab(depth, panel, slab, wide),
            Panels::Blocks { format, bytes } => {
                wide.resize(slab.len() * PANEL, 0.0);
                format.widen_panel(blocks(*format, bytes, depth, panel, slab), wide);
                wide
            }
        }
    }

    fn dot(&self, depth: usize, panel: usize, slab: Range<usize>, a: &[f32], sums: &mut [f32; PANEL]) -> bool {
        let Panels::Blocks { format, bytes } = self else { return false };
        format.dot_panel(a, blocks(*format, bytes, depth, panel, slab), sums);
        true
    }
}

/// The blocks of rows `slab` of a panel.
fn blocks(format: BlockFormat, bytes: &[u8], depth: usize, panel: usize, slab: Range<usize>) -> &[u8] {
    debug_assert!(slab.start.is_multiple_of(format.values()) && slab.end.is_multiple_of(format.values()));
    let at = |row: usize| (panel * depth + row) / format.values() * format.bytes() * PANEL;
    &bytes[at(slab.start)..at(slab.end)]
}

impl Panels {
    /// The panels of a matrix from its columns, each as long as the others: whole blocks.
    pub(super) fn from_blocks(format: BlockFormat, columns: &[&[u8]]) -> Self {
        let length = columns.first().map_or(0, |column| column.len());
        let mut bytes = zeroed(columns.len().div_ceil(PANEL) * PANEL * length);
        let panels = bytes.par_chunks_mut((PANEL * length).max(1));
        panels.zip(columns.par_chunks(PANEL)).for_each(|(panel, columns)| interleave(columns, panel));
        Panels::Blocks { format, bytes }
    }

    /// Appends column `lane` of a panel to `out`, widened.
    pub(super) fn push_column(&self, depth: usize, panel: usize, lane: usize, out: &mut Vec<f32>) {
        match self {
            Panels::F32(values) => {
                out.extend(values[panel * depth * PANEL..][..depth * PANEL].iter().skip(lane).step_by(PANEL));
            }
            Panels::Blocks { format, bytes } => {
                let panel = blocks(*format, bytes, depth, panel, 0..depth);
                let column: Vec<u8> = panel.iter().skip(lane).step_by(PANEL).copied().collect();
                out.extend(format.widen(&column));
            }
        }
    }
}
