//! Queries as bytes, for int4 keys: a register of 64 bytes holds eight dimensions of sixteen keys, which become two
//! registers of unsigned bytes by a mask and a shift.
//!
//! One byte per number of a query is enough: it loses less than the keys did, and what could be among the best is
//! scored again.

use super::integers::{Row, largest, sum};
use crate::index::layout::{OCTET, QUAD};
use linalg::{nearest, simd};

/// Some query rows.
#[derive(Clone, Debug, Default)]
pub(in crate::index) struct Bytes {
    /// `(D / 8, rows, 2)`: four dimensions, then the next four.
    pub(super) octets: Vec<[[i8; QUAD]; 2]>,
    /// `(rows)`; the second sum is 0.
    pub(super) rows: Vec<Row>,
}

simd! {
    /// The nearest bytes to values in steps of `1 / inverse`.
    fn round(values: &[f32], inverse: f32, into: &mut [i8]) {
        for (number, into) in values.iter().zip(into) {
            *into = nearest(number * inverse);
        }
    }
}

impl Bytes {
    /// `queries` is `(rows, D)`.
    pub(super) fn new(queries: &[f32], dim: usize) -> Bytes {
        let count = queries.len() / dim;
        let mut octets = vec![[[0; QUAD]; 2]; dim.div_ceil(OCTET) * count];
        let mut bytes = vec![0i8; dim.next_multiple_of(OCTET)];
        let rows = queries.chunks_exact(dim).enumerate().map(|(row, values)| {
            let scale = largest(values) / i8::MAX as f32;
            round(values, if scale > 0.0 { scale.recip().min(f32::MAX) } else { 0.0 }, &mut bytes);
            let halves = bytes.as_chunks::<QUAD>().0.as_chunks::<2>().0;
            octets[row..].iter_mut().step_by(count).zip(halves).for_each(|(octet, halves)| *octet = *halves);
            Row { scale, sums: [sum(&bytes), 0] }
        });
        let rows = rows.collect();
        Bytes { octets, rows }
    }
}
