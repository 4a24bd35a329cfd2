//! What an adapter changes: low-rank updates of a layer's projections, for the tokens that are landmarks and no others.

use candle_core::Tensor;

use super::packing::pack;
use linalg::{Packed, Write};

/// `y += scale B A x` (Hu et al. 2021).
pub(super) struct LowRank {
    /// `A (r, in)`
    down: Packed,
    /// `scale B (out, r)`
    up: Packed,
}

/// The updates of one layer. In the first layer all landmarks are equal, so their keys have none; nor has what a landmark
/// reads in the last layer, whose output is not used.
pub(super) struct LandmarkUpdates {
    pub(super) query: Option<LowRank>,
    pub(super) key: Option<LowRank>,
    /// Of the attention's output matrix.
    pub(super) output: Option<LowRank>,
}

impl LowRank {
    /// From `A (r, in)` and `B (out, r)`.
    pub(super) fn new(down: &Tensor, up: &Tensor, scale: f64) -> candle_core::Result<Self> {
        Ok(LowRank { down: pack(down)?, up: pack(&(up * scale)?)? })
    }

    /// For one token: `x (in)`, `y (out)`.
    pub(super) fn add(&self, x: &[f32], y: &mut [f32]) {
        let mut inner = vec![0.0; self.down.columns()];
        self.down.multiply(x, &mut inner, Write::Replace);
        self.up.multiply(&inner, y, Write::Add);
    }
}
