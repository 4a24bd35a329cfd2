//! Products of two matrices, neither of them packed beforehand.

use std::cell::RefCell;

use super::gemv::{GEMV_ROWS_MAX, gemv};
use super::matrix::{Matrix, Write, reach};
use super::packed::{multiply_panels, pack};

thread_local! {
    /// The panels of the last product, kept so that small products do not allocate.
    static PANELS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `out (M, N) = a (M, K) b (K, N)`, or `out += a b`, on the calling thread: by [`gemv`] for a few rows, else in panels. Rows
/// of `out` begin `out_stride` elements apart; the gaps are not written.
///
/// # Panics
/// If the shapes do not match or `out` is too short.
pub fn multiply(a: Matrix, b: Matrix, out: &mut [f32], out_stride: usize, write: Write) {
    assert_eq!(a.columns, b.rows);
    assert!(b.columns <= out_stride && reach(a.rows, b.columns, out_stride) <= out.len());
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    if a.rows <= GEMV_ROWS_MAX && a.column_stride == 1 {
        gemv(a, b, out, out_stride, write);
        return;
    }
    PANELS.with_borrow_mut(|panels| {
        pack(b, panels);
        multiply_panels(a, panels, b.columns, out, out_stride, write);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * step) % 23) as f32 / 11.0 - 1.0).collect()
    }

    #[test]
    fn products_agree_with_plain_loops() {
        let sizes = [
            (0, 3, 2),
            (1, 1, 1),
            (3, 5, 7),
            (7, 16, 24),
            (8, 17, 33),
            (33, 40, 64),
            (2, 1, 0),
            (20, 1, 1),
            (13, 130, 1030),
        ];
        for (m, n, k) in sizes {
            let (a, b) = (values(m * k, 7), values(n * k, 5));
            let (a_transposed, b_transposed) = (transposed(&a, m, k), transposed(&b, n, k));
            let lefts = [Matrix::new(&a, m, k), Matrix::new(&a_transposed, k, m).transposed()];
            let rights = [Matrix::new(&b, n, k).transposed(), Matrix::new(&b_transposed, k, n)];
            let stride = n + 3;
            for (left, right, write) in lefts.iter().flat_map(|left| {
                rights.iter().flat_map(move |right| [Write::Replace, Write::Add].map(|write| (*left, *right, write)))
            }) {
                let mut out = vec![0.5; m * stride];
                multiply(left, right, &mut out, stride, write);
                for (i, out) in out.iter().enumerate() {
                    let (row, column) = (i / stride, i % stride);
                    let sum = (0..k).map(|j| a[row * k + j] * b.get(column * k + j).unwrap_or(&0.0)).sum::<f32>();
                    let want = match (column < n, write) {
                        (false, _) => 0.5,
                        (true, Write::Replace) => sum,
                        (true, Write::Add) => sum + 0.5,
                    };
                    assert!((out - want).abs() < 1e-4, "{m} {n} {k} {write:?}: {out} {want}");
                }
            }
        }
    }

    /// `(rows, columns)` as `(columns, rows)`.
    fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
        (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
    }
}
