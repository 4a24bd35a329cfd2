//! Products of matrices: the `gemm` crate for many rows, plain vector loops where its packing would not pay.

use super::{add_scaled, dot};

/// Rows from which packing the operands for a blocked product pays.
const PACKED_ROWS_MIN: usize = 8;

/// Numbers read as `rows` x `columns`; strides count numbers.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    numbers: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// What a product does with what was in its place before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Replace,
    Add,
}

/// Who computes a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread: callers share out other work.
    One,
    /// All threads of rayon's pool.
    All,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix without gaps.
    ///
    /// # Panics
    /// When there are fewer numbers than that.
    pub fn new(numbers: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::with_stride(numbers, rows, columns, columns)
    }

    /// A row-major matrix whose rows begin `stride` numbers apart.
    ///
    /// # Panics
    /// When rows overlap or reach beyond the numbers.
    pub fn with_stride(numbers: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride && reach(rows, columns, stride) <= numbers.len());
        Matrix { numbers, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// The same numbers read as `columns` x `rows`.
    pub fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Numbers from the first to the last of a row-major matrix.
fn reach(rows: usize, columns: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + columns }
}

/// `out (a.rows, b.columns) = a b`, or `out += a b`. Rows of `out` begin `out_stride` numbers apart; what lies between
/// them stays.
///
/// # Panics
/// When the sizes do not fit each other.
pub fn multiply(a: Matrix, b: Matrix, out: &mut [f32], out_stride: usize, write: Write, threads: Threads) {
    assert_eq!(a.columns, b.rows);
    assert!(b.columns <= out_stride && reach(a.rows, b.columns, out_stride) <= out.len());
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    if a.rows < PACKED_ROWS_MIN && threads == Threads::One && a.column_stride == 1 {
        let row = |row: usize| &a.numbers[row * a.row_stride..][..a.columns];
        let outs = out.chunks_mut(out_stride).take(a.rows);
        outs.enumerate().for_each(|(index, out)| multiply_row(row(index), b, &mut out[..b.columns], write));
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(rayon::current_num_threads()),
    };
    let strides = |matrix: Matrix| (matrix.column_stride as isize, matrix.row_stride as isize);
    let ((a_column, a_row), (b_column, b_row)) = (strides(a), strides(b));
    // SAFETY: the constructors of `Matrix` keep every number that its strides reach inside its slice, and transposing
    // reaches the same ones; the assertion above does so for `out`. `out` is borrowed mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            write == Write::Add,
            a.numbers.as_ptr(),
            a_column,
            a_row,
            b.numbers.as_ptr(),
            b_column,
            b_row,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `out (b.columns) = row b`, or `out += row b`, whichever way `b` is contiguous.
fn multiply_row(row: &[f32], b: Matrix, out: &mut [f32], write: Write) {
    if write == Write::Replace {
        out.fill(0.0);
    }
    if b.row_stride == 1 {
        for (column, out) in out.iter_mut().enumerate() {
            *out += dot(row, &b.numbers[column * b.column_stride..][..b.rows]);
        }
    } else {
        for (index, &weight) in row.iter().enumerate() {
            add_scaled(out, weight, &b.numbers[index * b.row_stride..][..b.columns]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * step) % 23) as f32 / 11.0 - 1.0).collect()
    }

    #[test]
    fn products_agree_with_plain_loops() {
        let sizes = [(0, 3, 2), (1, 1, 1), (3, 5, 7), (7, 16, 24), (8, 17, 33), (33, 40, 64), (2, 1, 0), (20, 1, 1)];
        for (m, n, k) in sizes {
            let (a, b) = (numbers(m * k, 7), numbers(n * k, 5));
            let b_transposed: Vec<f32> = (0..k * n).map(|i| b[(i % n) * k + i / n]).collect();
            let stride = n + 3;
            for write in [Write::Replace, Write::Add] {
                for threads in [Threads::One, Threads::All] {
                    for matrix in [Matrix::new(&b, n, k).transposed(), Matrix::new(&b_transposed, k, n)] {
                        let mut out = vec![0.5; m * stride];
                        multiply(Matrix::new(&a, m, k), matrix, &mut out, stride, write, threads);
                        for (i, out) in out.iter().enumerate() {
                            let (row, column) = (i / stride, i % stride);
                            let sum =
                                (0..k).map(|j| a[row * k + j] * b.get(column * k + j).unwrap_or(&0.0)).sum::<f32>();
                            let want = match (column < n, write) {
                                (false, _) => 0.5,
                                (true, Write::Replace) => sum,
                                (true, Write::Add) => sum + 0.5,
                            };
                            assert!((out - want).abs() < 1e-4, "{m} {n} {k} {write:?} {threads:?}: {out} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic]
    fn sizes_that_do_not_fit_are_refused() {
        Matrix::new(&[0.0; 5], 2, 3);
    }
}
