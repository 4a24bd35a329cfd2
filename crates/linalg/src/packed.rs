//! Products with a matrix packed into panels.
//!
//! `out (M, N) = a (M, K) b (K, N)`. `b` is cut into panels of [`PANEL`] columns, each `(K, PANEL)`: a row of a panel is a
//! few vector registers, multiplied with one element of each row of `a`. Up to [`ROWS`] rows of `a` pass over a panel
//! together: a panel is read once for all of them, and their sums stay in registers. `a` is not packed.
//!
//! Floor: 2 M N K operations at two fused multiply-adds of a register per cycle for large M (one core of a Zen 5,
//! 512 x 3072 x 576: 247 of 260 GFLOP/s; the `gemm` crate, whose AVX-512 kernel is slower than its AVX2 one, 118), one read of
//! `b` for small M.

use std::ops::Range;

use rayon::prelude::*;

use super::formats::{BlockFormat, PANEL};
use super::matrix::{Matrix, Write, reach};
use super::panels::{Panels, Slabs};
use super::simd::{Level, fma, level};

/// Rows of `a` that pass over a panel together: with four registers per panel row, 24 of AVX-512's 32 hold sums.
const ROWS: usize = 6;

/// Columns summed at once on AVX-512.
const WIDE: usize = PANEL;

/// Columns summed at once elsewhere: with [`ROWS`] rows, 12 of AVX2's 16 registers hold sums.
const NARROW: usize = 16;

/// Least operations of a task: waking a thread costs some microseconds.
const TASK_OPERATIONS_MIN: usize = 1 << 20;

/// Most tasks per thread: more than one, so that others take over from a thread that is held up.
const TASKS_PER_THREAD: usize = 4;

/// A matrix `(K, N)` packed once to be the right factor of many products.
pub struct Packed {
    /// Beside each other, all of them with K rows.
    parts: Vec<Part>,
    rows: usize,
    columns: usize,
}

/// Columns that are stored in one way.
struct Part {
    /// The last panel is padded with zeros.
    panels: Panels,
    /// How many columns the parts before it have.
    first: usize,
    columns: usize,
}

impl Packed {
    /// Packs `matrix (K, N)` as f32.
    pub fn new(matrix: Matrix) -> Self {
        let mut values = Vec::new();
        pack(matrix, &mut values);
        Packed::of_one(Panels::F32(values), matrix.rows, matrix.columns)
    }

    /// Packs N columns of `rows` values each, in the blocks of a file, which stay as they are.
    ///
    /// # Panics
    /// If `rows` is no whole number of blocks or a column has another length.
    pub fn from_blocks(format: BlockFormat, rows: usize, columns: &[&[u8]]) -> Self {
        let fits = |column: &&[u8]| column.len() == rows / format.values() * format.bytes();
        assert!(rows.is_multiple_of(format.values()) && columns.iter().all(fits));
        Packed::of_one(Panels::from_blocks(format, columns), rows, columns.len())
    }

    /// The columns of several matrices beside each other, each as it is stored.
    ///
    /// # Panics
    /// If they have different numbers of rows, or there is none.
    pub fn beside(matrices: Vec<Packed>) -> Self {
        let rows = matrices[0].rows;
        assert!(matrices.iter().all(|matrix| matrix.rows == rows));
        let mut columns = 0;
        let mut parts = Vec::new();
        for part in matrices.into_iter().flat_map(|matrix| matrix.parts) {
            parts.push(Part { first: columns, ..part });
            columns += parts[parts.len() - 1].columns;
        }
        Packed { parts, rows, columns }
    }

    fn of_one(panels: Panels, rows: usize, columns: usize) -> Self {
        Packed { parts: vec![Part { panels, first: 0, columns }], rows, columns }
    }

    /// K, the rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// N, the columns of the matrix.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Appends a column `(K)` to `out`, widened.
    ///
    /// # Panics
    /// If there is no such column.
    pub fn push_column(&self, column: usize, out: &mut Vec<f32>) {
        assert!(column < self.columns);
        let part = &self.parts[self.parts.partition_point(|part| part.first + part.columns <= column)];
        let column = column - part.first;
        part.panels.push_column(self.rows, column / PANEL, column % PANEL, out);
    }

    /// `out (M, N) = a (M, K) self`, or `out += a self`, on rayon's pool. `a` and `out` have no gaps.
    ///
    /// # Panics
    /// If the shapes do not match.
    pub fn multiply(&self, a: &[f32], out: &mut [f32], write: Write) {
        let m = out.len().checked_div(self.columns).unwrap_or(0);
        assert!(a.len() == m * self.rows && out.len() == m * self.columns);
        if m == 0 {
            return;
        }
        let a = Matrix::new(a, m, self.rows);
        let out = Out(out.as_mut_ptr());
        // Panels are counted through all parts.
        let panels: usize = self.parts.iter().map(|part| part.columns.div_ceil(PANEL)).sum();
        let run = |range: Range<usize>| {
            let mut before = 0;
            for Part { panels, first, columns } in &self.parts {
                let count = columns.div_ceil(PANEL);
                let of_part = |index: usize| index.clamp(before, before + count) - before;
                let product = Product { a, panels, columns: *columns, out_stride: self.columns, write };
                // SAFETY: `out` holds all rows and columns of the product (asserted above), of which the part's begin at `first`, and
                // is borrowed mutably until all tasks are done; no two tasks write the same column.
                unsafe { product.run(of_part(range.start)..of_part(range.end), &out.at_column(*first)) };
                before += count;
            }
        };
        let tasks = a.rows * self.columns * self.rows / (TASK_OPERATIONS_MIN / 2);
        let tasks = tasks.clamp(1, rayon::current_num_threads() * TASKS_PER_THREAD);
        let task_panels = panels.div_ceil(tasks).max(1);
        if task_panels >= panels {
            run(0..panels);
        } else {
            (0..panels.div_ceil(task_panels))
                .into_par_iter()
                .for_each(|task| run(task * task_panels..(task + 1) * task_panels));
        }
    }
}

/// Packs `matrix (K, N)` into panels `(panels, K, PANEL)`, the last one padded with zeros.
pub(super) fn pack(matrix: Matrix, values: &mut Vec<f32>) {
    let Matrix { rows, columns, .. } = matrix;
    values.clear();
    values.resize(columns.div_ceil(PANEL) * PANEL * rows, 0.0);
    for (index, panel) in values.chunks_exact_mut((PANEL * rows).max(1)).enumerate() {
        let first = index * PANEL;
        let width = PANEL.min(columns - first);
        if matrix.column_stride == 1 {
            for (row, panel) in panel.chunks_exact_mut(PANEL).enumerate() {
                panel[..width].copy_from_slice(&matrix.data[row * matrix.row_stride + first..][..width]);
            }
        } else {
            debug_assert_eq!(matrix.row_stride, 1);
            pack_columns(&matrix.data[first * matrix.column_stride..], matrix.column_stride, width, panel);
        }
    }
}

/// Columns transposed at once.
const TRANSPOSED: usize = 16;

simd! {
    /// Packs `width` contiguous columns, `stride` elements apart, into `panel (K, PANEL)`.
    fn pack_columns(columns: &[f32], stride: usize, width: usize, panel: &mut [f32]) {
        let rows = panel.len() / PANEL;
        for first in (0..width).step_by(TRANSPOSED) {
            let count = TRANSPOSED.min(width - first);
            let mut from: [&[f32]; TRANSPOSED] = [&[]; TRANSPOSED];
            for (column, from) in from.iter_mut().enumerate() {
                // The last column stands in for missing ones and is not written.
                *from = &columns[(first + column.min(count - 1)) * stride..][..rows];
            }
            for (row, panel) in panel.chunks_exact_mut(PANEL).enumerate() {
                let mut transposed = [0f32; TRANSPOSED];
                for (transposed, from) in transposed.iter_mut().zip(from) {
                    *transposed = from[row];
                }
                panel[first..][..count].copy_from_slice(&transposed[..count]);
            }
        }
        let _ = FMA;
    }
}

/// `out (M, N) = a (M, K) b`, or `out += a b`, on the calling thread; `b` in panels, N = `columns`. Rows of `out` begin
/// `out_stride` elements apart.
pub(super) fn multiply_panels(
    a: Matrix,
    panels: &[f32],
    columns: usize,
    out: &mut [f32],
    out_stride: usize,
    write: Write,
) {
    assert!(columns <= out_stride && reach(a.rows, columns, out_stride) <= out.len());
    let product = Product { a, panels, columns, out_stride, write };
    // SAFETY: the assertion says that `out` holds all rows and columns, and it is borrowed mutably.
    unsafe { product.run(0..columns.div_ceil(PANEL), &Out(out.as_mut_ptr())) };
}

/// The output of a product, shared by its tasks.
struct Out(*mut f32);

// SAFETY: its tasks write disjoint columns: see `Product::run`.
unsafe impl Sync for Out {}

impl Out {
    /// The output from a column on.
    fn at_column(&self, first: usize) -> Out {
        Out(self.0.wrapping_add(first))
    }
}

/// A product of `a` and panels.
struct Product<'a, P: ?Sized> {
    /// `(M, K)`
    a: Matrix<'a>,
    /// `(K, PANEL)` each.
    panels: &'a P,
    /// N, the columns of the matrix.
    columns: usize,
    out_stride: usize,
    write: Write,
}

impl<P: Slabs + ?Sized> Product<'_, P> {
    /// Computes the columns of `panels`.
    ///
    /// # Safety
    /// `out` is writable for M rows of N elements, `out_stride` apart, and nobody else accesses the columns of these panels
    /// meanwhile.
    unsafe fn run(&self, panels: Range<usize>, out: &Out) {
        let kernel = match level() {
            Level::Avx512 => rows_wide,
            Level::Avx2 | Level::Portable => rows_narrow,
        };
        let depth = self.a.columns;
        let slab_depth = self.panels.slab_depth(self.a.rows);
        let mut wide = Vec::new();
        let mut sums = [[0f32; PANEL]; ROWS];
        for index in panels {
            // With K = 0 one empty slab writes the zeros.
            for first in (0..depth.max(1)).step_by(slab_depth) {
                let slab = first..depth.min(first + slab_depth);
                let add = self.write == Write::Add || first > 0;
                // SAFETY: the caller reserved the columns of this panel for us.
                let put = |row: usize, sums: &[[f32; PANEL]]| unsafe { self.put(out, row, index, sums, add) };
                if self.a.rows == 1 && self.a.column_stride == 1 {
                    let a = &self.a.data[slab.clone()];
                    if self.panels.dot(depth, index, slab.clone(), a, &mut sums[0]) {
                        put(0, &sums[..1]);
                        continue;
                    }
                }
                let slab_values = self.panels.slab(depth, index, slab.clone(), &mut wide);
                for row in (0..self.a.rows).step_by(ROWS) {
                    let a = self.a.part(row..self.a.rows.min(row + ROWS), slab.clone());
                    kernel(a, slab_values, &mut sums);
                    put(row, &sums[..a.rows]);
                }
            }
        }
    }

    /// Writes sums of rows from `row` on, or adds them, to the columns of a panel.
    ///
    /// # Safety
    /// As [`Product::run`] for this panel.
    unsafe fn put(&self, out: &Out, row: usize, panel: usize, sums: &[[f32; PANEL]], add: bool) {
        let width = PANEL.min(self.columns - panel * PANEL);
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: row + r < M and the panel's columns end at N: the caller reserved them for us.
            let out = unsafe {
                let start = out.0.add((row + r) * self.out_stride + panel * PANEL);
                std::slice::from_raw_parts_mut(start, width)
            };
            if add {
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            } else {
                out.copy_from_slice(&sums[..width]);
            }
        }
    }
}

type Sums = [[f32; PANEL]; ROWS];

macro_rules! kernel {
    ($name:ident, $strip:expr) => {
        simd! {
            /// `sums (M, PANEL) = a (M, K) panel (K, PANEL)` for at most [`ROWS`] rows.
            fn $name(a: Matrix, panel: &[f32], sums: &mut Sums) {
                for first in (0..PANEL).step_by($strip) {
                    match a.rows {
                        6 => strip::<FMA, { $strip }, 6>(a, panel, first, sums),
                        5 => strip::<FMA, { $strip }, 5>(a, panel, first, sums),
                        4 => strip::<FMA, { $strip }, 4>(a, panel, first, sums),
                        3 => strip::<FMA, { $strip }, 3>(a, panel, first, sums),
                        2 => strip::<FMA, { $strip }, 2>(a, panel, first, sums),
                        _ => strip::<FMA, { $strip }, 1>(a, panel, first, sums),
                    }
                }
            }
        }
    };
}

kernel!(rows_wide, WIDE);
kernel!(rows_narrow, NARROW);

/// Sums `R` rows of `a` over `STRIP` columns of a panel, from its column `first`.
#[inline(always)]
fn strip<const FMA: bool, const STRIP: usize, const R: usize>(a: Matrix, panel: &[f32], first: usize, sums: &mut Sums) {
    let Matrix { data: factors, rows, columns: depth, row_stride, column_stride } = a;
    assert!(rows == R && panel.len() == depth * PANEL);
    let mut kept = [[0f32; STRIP]; R];
    for (k, panel_row) in panel.chunks_exact(PANEL).enumerate() {
        let panel_row: &[f32; STRIP] = panel_row[first..].first_chunk().expect("a strip lies inside its panel");
        for (row, kept) in kept.iter_mut().enumerate() {
            // SAFETY: row < rows and k < columns, which `Matrix` keeps inside its slice.
            let factor = unsafe { *factors.get_unchecked(row * row_stride + k * column_stride) };
            for (kept, value) in kept.iter_mut().zip(panel_row) {
                *kept = fma::<FMA>(factor, *value, *kept);
            }
        }
    }
    for (sums, kept) in sums.iter_mut().zip(&kept) {
        sums[first..][..STRIP].copy_from_slice(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::plain::{plain, random_blocks};
    use crate::random::random;

    /// Every strip on every machine: a product runs on one of them only.
    #[test]
    fn strips_of_any_width_sum_as_plain_loops_do() {
        for (rows, depth) in (1..=ROWS).flat_map(|rows| [0, 1, 5, 64].map(|depth| (rows, depth))) {
            let (a, panel) = (random(rows * depth, 1.0, 1), random(depth * PANEL, 1.0, 2));
            for kernel in [rows_wide, rows_narrow] {
                let mut sums = [[f32::NAN; PANEL]; ROWS];
                kernel(Matrix::new(&a, rows, depth), &panel, &mut sums);
                for (row, sums) in sums[..rows].iter().enumerate() {
                    for (column, found) in sums.iter().enumerate() {
                        let product = |k: usize| a[row * depth + k] as f64 * panel[k * PANEL + column] as f64;
                        let wanted: f64 = (0..depth).map(product).sum();
                        assert!((*found as f64 - wanted).abs() < 1e-5, "{rows} {depth}: {found} {wanted}");
                    }
                }
                assert!(sums[rows..].iter().flatten().all(|sum| sum.is_nan()));
            }
        }
    }

    #[test]
    fn products_agree_with_double_precision_for_one_row_and_many() {
        let sizes =
            [(0, 9, 4), (1, 1, 1), (1, 130, 33), (2, 5, 31), (8, 64, 100), (9, 65, 96), (70, 700, 1100), (3, 4, 0)];
        for (m, n, k) in sizes {
            let (a, b, before) = (random(m * k, 1.0, 1), random(k * n, 1.0, 2), random(m * n, 1.0, 3));
            let packed = Packed::new(Matrix::new(&b, n, k).transposed());
            assert_eq!((packed.rows(), packed.columns()), (k, n));
            let (mut replaced, mut added) = (before.clone(), before.clone());
            packed.multiply(&a, &mut replaced, Write::Replace);
            packed.multiply(&a, &mut added, Write::Add);
            for (at, before) in before.iter().enumerate() {
                let (row, column) = (at / n, at % n);
                let want: f64 = (0..k).map(|i| a[row * k + i] as f64 * b[column * k + i] as f64).sum();
                assert!((replaced[at] as f64 - want).abs() < 1e-4, "{m} {n} {k}");
                assert!((added[at] as f64 - want - *before as f64).abs() < 1e-4, "{m} {n} {k}");
            }
            let mut columns = Vec::new();
            (0..n).for_each(|column| packed.push_column(column, &mut columns));
            assert_eq!(columns, b);
        }
    }

    /// Sums of up to 1,280 products of values up to 1 with values of blocks.
    const TOLERANCE: f64 = 1e-5;

    /// `n` columns of random blocks: what they stand for, and packed.
    fn random_columns(format: BlockFormat, n: usize, k: usize, seed: u64) -> (Vec<f64>, Packed) {
        let blocks = random_blocks(format, n * k / format.values(), seed);
        let column_bytes = k / format.values() * format.bytes();
        let columns: Vec<&[u8]> = (0..n).map(|column| &blocks[column * column_bytes..][..column_bytes]).collect();
        (plain(format, &blocks), Packed::from_blocks(format, k, &columns))
    }

    /// Compares products with `packed`, whose columns are `wide (N, K)`, with double precision.
    fn agrees(packed: &Packed, wide: &[f64], m: usize, name: &str) {
        let (k, n) = (packed.rows(), packed.columns());
        let (a, before) = (random(m * k, 1.0, 5), random(m * n, 1.0, 6));
        for write in [Write::Replace, Write::Add] {
            let mut out = before.clone();
            packed.multiply(&a, &mut out, write);
            for (at, (found, before)) in out.iter().zip(&before).enumerate() {
                let (row, column) = (at / n, at % n);
                let products = (0..k).map(|i| a[row * k + i] as f64 * wide[column * k + i]);
                let (sum, size) = products.fold((0.0, 1.0), |(sum, size), x| (sum + x, size + x.abs()));
                let want = if write == Write::Add { sum + *before as f64 } else { sum };
                assert!((*found as f64 - want).abs() < TOLERANCE * size, "{name} {m} {n} {k}: {found} {want}");
            }
        }
        for column in [0, n / 2, n - 1] {
            let mut values = Vec::new();
            packed.push_column(column, &mut values);
            let wide = &wide[column * k..][..k];
            let top = wide.iter().fold(0f64, |top, value| top.max(value.abs()));
            assert!(values.len() == k && values.iter().zip(wide).all(|(a, b)| (*a as f64 - b).abs() <= 1e-6 * top));
        }
    }

    #[test]
    fn products_with_blocks_agree_with_double_precision_for_one_row_and_many() {
        for format in BlockFormat::ALL {
            // One value to a block: sizes of K that are no multiple of anything.
            let k = |blocks: usize| if format.values() == 1 { blocks * 37 } else { blocks * format.values() };
            for (m, n, blocks) in [(1, 1, 1), (1, 70, 5), (2, 64, 2), (6, 129, 1), (7, 130, 3), (33, 65, 5)] {
                let (wide, packed) = random_columns(format, n, k(blocks), n as u64);
                agrees(&packed, &wide, m, &format!("{format:?}"));
            }
            assert_eq!(random_columns(format, 0, k(1), 0).1.columns(), 0);
        }
    }

    #[test]
    fn matrices_of_different_formats_stand_beside_each_other() {
        let k = 512;
        let f32s = random(3 * k, 1.0, 7);
        let of_f32s: Vec<f64> = f32s.iter().map(|&value| value as f64).collect();
        for m in [1, 2, 7, 33] {
            let mut wide = of_f32s.clone();
            let mut matrices = vec![Packed::new(Matrix::new(&f32s, 3, k).transposed())];
            for (format, n) in BlockFormat::ALL.into_iter().zip([64, 1, 65, 0, 130, 7, 64].into_iter().cycle()) {
                let (of_format, packed) = random_columns(format, n, k, n as u64);
                wide.extend(of_format);
                matrices.push(packed);
            }
            let packed = Packed::beside(matrices);
            assert_eq!(packed.columns() * k, wide.len());
            agrees(&packed, &wide, m, "all");
            // Parts that are parts.
            agrees(&Packed::beside(vec![packed]), &wide, m, "all again");
        }
    }
}
