//! Matrices as views of slices.

use std::ops::Range;

/// Numbers read as `rows` x `columns`; strides count numbers.
#[derive(Clone, Copy)]
pub struct Matrix<'a, N = f32> {
    pub(super) numbers: &'a [N],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

/// What a product does with what was in its place before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Replace,
    Add,
}

impl<'a, N> Matrix<'a, N> {
    /// A row-major matrix without gaps.
    ///
    /// # Panics
    /// When there are fewer numbers than that.
    pub fn new(numbers: &'a [N], rows: usize, columns: usize) -> Self {
        Self::with_stride(numbers, rows, columns, columns)
    }

    /// A row-major matrix whose rows begin `stride` numbers apart.
    ///
    /// # Panics
    /// When rows overlap or reach beyond the numbers.
    pub fn with_stride(numbers: &'a [N], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride && reach(rows, columns, stride) <= numbers.len());
        Matrix { numbers, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// Some rows and columns, in their place.
    pub(super) fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let first = rows.start * self.row_stride + columns.start * self.column_stride;
        // Nothing may begin behind the last number.
        let numbers = self.numbers.get(first..).unwrap_or_default();
        Matrix { numbers, rows: rows.len(), columns: columns.len(), ..self }
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
pub(super) fn reach(rows: usize, columns: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + columns }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic]
    fn sizes_that_do_not_fit_are_refused() {
        Matrix::new(&[0.0; 5], 2, 3);
    }
}
