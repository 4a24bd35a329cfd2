//! Vector and matrix kernels for AVX-512, AVX2 and plain processors, chosen at run time. Nothing here knows what a block
//! or a memory is.
//!
//! ```
//! let mut weights = vec![0.5f32, 1.5, -1.0];
//! let sum = landmarkdb_linalg::exp_sum(&mut weights, 1.5);
//! assert!((sum - (1.0 + (-1f32).exp() + (-2.5f32).exp())).abs() < 1e-6);
//! ```
//!
//! A kernel is written once, over arrays of [`LANES`] accumulators that the compiler keeps in vector registers; [`simd!`]
//! compiles it for every [`Level`]. Sums are reordered by lane, so results may differ in the last bits between machines.
//!
//! Matrices are row-major. A product is `out (M, N) = a (M, K) b (K, N)`; `_` is any number of rows.

#![warn(missing_docs, unreachable_pub)]

// One function for every instruction set.
#[macro_use]
mod simd;

// Vectors.
mod math;
mod vector;
mod widen;

// Quantizers.
mod channels;
mod int8;

// Matrix products.
mod formats;
mod gemv;
mod matrix;
mod multiply;
mod packed;
mod panels;

// Pages and cache lines.
mod memory;

#[cfg(test)]
mod random;

pub use channels::ChannelQuantizer;
pub use formats::BlockFormat;
pub use gemv::{GEMV_ROWS_MAX, gemv};
pub use int8::{int8_scale, nearest, to_int8};
pub use math::{exp, ln};
pub use matrix::{Matrix, Write};
pub use memory::{prefetch_ahead, prefetch_slice, zeroed};
pub use multiply::multiply;
pub use packed::Packed;
pub use simd::{LANES, Level, fma, fold, larger, level};
pub use vector::{add_scaled, dot, dot_f16, exp_sum, log_sum_exp, log_sum_exp_below, max};
pub use widen::{Element, HALVES, widen, widen_f16, widen_int8};
