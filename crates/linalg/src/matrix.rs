//! Matrix views of slices.

use std::ops::Range;

/// A view of a slice as `(rows, columns)`; strides count elements.
#[derive(Clone, Copy)]
pub struct Matrix<'a, N = f32> {
    pub(super) data: &'a [N],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

/// Whether a product replaces its output or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// `out = a b`
    Replace,
    /// `out += a b`
    Add,
}

impl<'a, N> Matrix<'a, N> {
    /// A row-major `(rows, columns)` matrix without gaps.
    ///
    /// # Panics
    /// If `data` is shorter.
    pub fn new(data: &'a [N], rows: usize, columns: usize) -> Self {
        Self::with_stride(data, rows, columns, columns)
    }

    /// A row-major `(rows, columns)` matrix whose rows begin `stride` elements apart.
    ///
    /// # Panics
    /// If rows overlap or `data` is shorter.
    pub fn with_stride(data: &'a [N], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride && reach(rows, columns, stride) <= data.len());
        Matrix { data, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// The submatrix of `rows` and `columns`.
    pub(super) fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let first = rows.start * self.row_stride + columns.start * self.column_stride;
        // An empty submatrix may begin behind the last element.
        let data = self.data.get(first..).unwrap_or_default();
        Matrix { data, rows: rows.len(), columns: columns.len(), ..self }
    }

    /// The transpose `(columns, rows)` of the same data.
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

/// Elements from the first to the last of a row-major matrix, gaps included.
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
