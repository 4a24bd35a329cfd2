//! The two matrix products of attention over one block, for one row or many.

use gemm::{Parallelism, gemm};

use crate::numeric;

/// From so many rows on, packing the operands for a blocked product pays.
const GEMM_ROWS_MIN: usize = 8;

/// `scores (rows, B) = queries (rows, D) . keys (B, D)` transposed.
pub(super) fn scores(queries: &[f32], keys: &[f32], dim: usize, scores: &mut [f32]) {
    let (rows, tokens) = (queries.len() / dim, keys.len() / dim);
    assert_eq!((queries.len(), keys.len(), scores.len()), (rows * dim, tokens * dim, rows * tokens));
    if rows < GEMM_ROWS_MIN {
        for (query, scores) in queries.chunks_exact(dim).zip(scores.chunks_exact_mut(tokens)) {
            scores.iter_mut().zip(keys.chunks_exact(dim)).for_each(|(score, key)| *score = numeric::dot(query, key));
        }
        return;
    }
    let transposed = Matrix { start: keys.as_ptr(), row_stride: 1, column_stride: dim as isize };
    // SAFETY: the lengths were checked above: `scores` is rows x tokens, `queries` rows x dim, both row-major, and
    // `keys` read with these strides is dim x tokens. `scores` is borrowed mutably, so it overlaps neither.
    unsafe { multiply((rows, tokens, dim), scores, row_major(queries, dim), transposed) }
}

/// `mixed (rows, D) = weights (rows, B) . values (B, D)`.
pub(super) fn mix(weights: &[f32], values: &[f32], dim: usize, mixed: &mut [f32]) {
    let (rows, tokens) = (mixed.len() / dim, values.len() / dim);
    assert_eq!((weights.len(), values.len(), mixed.len()), (rows * tokens, tokens * dim, rows * dim));
    if rows < GEMM_ROWS_MIN {
        mixed.fill(0.0);
        for (weights, mixed) in weights.chunks_exact(tokens).zip(mixed.chunks_exact_mut(dim)) {
            let pairs = weights.iter().zip(values.chunks_exact(dim));
            pairs.for_each(|(&weight, value)| numeric::add_scaled(mixed, weight, value));
        }
        return;
    }
    // SAFETY: the lengths were checked above: `mixed` is rows x dim, `weights` rows x tokens, `values` tokens x dim,
    // all row-major. `mixed` is borrowed mutably, so it overlaps neither.
    unsafe { multiply((rows, dim, tokens), mixed, row_major(weights, tokens), row_major(values, dim)) }
}

/// Strides count numbers.
struct Matrix {
    start: *const f32,
    row_stride: isize,
    column_stride: isize,
}

fn row_major(numbers: &[f32], columns: usize) -> Matrix {
    Matrix { start: numbers.as_ptr(), row_stride: columns as isize, column_stride: 1 }
}

/// `out = a . b`, on the calling thread: callers share out the heads.
///
/// # Safety
/// With `sizes = (m, n, depth)`: `out` has `m * n` numbers, row-major; `a` may be read as `(m, depth)` and `b` as `(depth, n)`.
unsafe fn multiply(sizes: (usize, usize, usize), out: &mut [f32], a: Matrix, b: Matrix) {
    let (m, n, depth) = sizes;
    // SAFETY: the caller vouches for the sizes; `out` is not read (`read_dst` is false).
    unsafe {
        gemm(
            m,
            n,
            depth,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.start,
            a.column_stride,
            a.row_stride,
            b.start,
            b.column_stride,
            b.row_stride,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_rows_agree_with_plain_loops() {
        for (rows, tokens, dim) in [(1, 3, 5), (7, 16, 24), (8, 17, 33), (40, 16, 8)] {
            let numbers = |count: usize, step: usize| -> Vec<f32> {
                (0..count).map(|i| ((i * step) % 23) as f32 / 11.0 - 1.0).collect()
            };
            let (q, k, v) = (numbers(rows * dim, 7), numbers(tokens * dim, 5), numbers(tokens * dim, 3));
            let (mut s, mut out) = (vec![9.0; rows * tokens], vec![9.0; rows * dim]);
            scores(&q, &k, dim, &mut s);
            mix(&s, &v, dim, &mut out);
            for row in 0..rows {
                let want: Vec<f32> =
                    (0..tokens).map(|token| (0..dim).map(|d| q[row * dim + d] * k[token * dim + d]).sum()).collect();
                assert!(want.iter().zip(&s[row * tokens..]).all(|(a, b)| (a - b).abs() < 1e-4));
                for d in 0..dim {
                    let want: f32 = want.iter().enumerate().map(|(token, s)| s * v[token * dim + d]).sum();
                    assert!((want - out[row * dim + d]).abs() < 1e-3);
                }
            }
        }
    }
}
