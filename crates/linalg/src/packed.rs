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

use super::matrix::{Matrix, Write, reach};
use super::panels::{BLOCK, BlockFormat, PANEL, Panels, Slabs};
use super::simd::{Level, fma, level};

/// Rows of `a` that pass over a panel together: with four registers per panel row, 24 of AVX-512's 32 hold sums.
const ROWS: usize = 6;

/// Columns summed at once on AVX-512.
const WIDE: usize = PANEL;

/// Columns summed at once elsewhere: with [`ROWS`] rows, 12 of AVX2's 16 registers hold sums.
const NARROW: usize = 16;

/// Rows of a panel that all rows of `a` pass over before the next: 256 KiB, which stay in a core's own cache.
const DEPTH: usize = 1024;

/// Least operations of a task: waking a thread costs some microseconds.
const TASK_OPERATIONS_MIN: usize = 1 << 20;

/// Most tasks per thread: more than one, so that others take over from a thread that is held up.
const TASKS_PER_THREAD: usize = 4;

/// A matrix `(K, N)` packed once to be the right factor of many products.
pub struct Packed {
    /// The last panel is padded with zeros.
    panels: Panels,
    rows: usize,
    columns: usize,
}

impl Packed {
    /// Packs `matrix (K, N)` as f32.
    pub fn new(matrix: Matrix) -> Self {
        let mut values = Vec::new();
        pack(matrix, &mut values);
        Packed { panels: Panels::F32(values), rows: matrix.rows, columns: matrix.columns }
    }

    /// Packs N columns of `rows` values each, in quantized blocks that stay quantized.
    ///
    /// # Panics
    /// If `rows` is no multiple of [`BLOCK`] or a column has another length.
    pub fn from_blocks(format: BlockFormat, rows: usize, columns: &[&[u8]]) -> Self {
        let fits = |column: &&[u8]| column.len() == rows / BLOCK * format.bytes();
        assert!(rows.is_multiple_of(BLOCK) && columns.iter().all(fits));
        Packed { panels: format.panels(rows, columns), rows, columns: columns.len() }
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
        let mut wide = Vec::new();
        let panel = self.panels.slab(self.rows, column / PANEL, 0..self.rows, &mut wide);
        out.extend(panel.iter().skip(column % PANEL).step_by(PANEL));
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
        let panels = self.columns.div_ceil(PANEL);
        let tasks = a.rows * self.columns * self.rows / (TASK_OPERATIONS_MIN / 2);
        let tasks = tasks.clamp(1, rayon::current_num_threads() * TASKS_PER_THREAD);
        let task_panels = panels.div_ceil(tasks).max(1);
        let product = Product { a, panels: &self.panels, columns: self.columns, out_stride: self.columns, write };
        let out = Out(out.as_mut_ptr());
        // SAFETY: `out` holds all rows and columns of the product (asserted above) and is borrowed mutably until all tasks are done;
        // no two tasks write the same column.
        let run = |first: usize| unsafe { product.run(first..(first + task_panels).min(panels), &out) };
        if task_panels >= panels {
            run(0);
        } else {
            (0..panels.div_ceil(task_panels)).into_par_iter().for_each(|task| run(task * task_panels));
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
        let slab_depth = self.panels.gemv_depth().filter(|_| self.a.rows <= ROWS).unwrap_or(DEPTH);
        let mut wide = Vec::new();
        let mut sums = [[0f32; PANEL]; ROWS];
        for index in panels {
            let width = PANEL.min(self.columns - index * PANEL);
            // With K = 0 one empty slab writes the zeros.
            for first in (0..depth.max(1)).step_by(slab_depth) {
                let slab = first..depth.min(first + slab_depth);
                let slab_values = self.panels.slab(depth, index, slab.clone(), &mut wide);
                let add = self.write == Write::Add || first > 0;
                for row in (0..self.a.rows).step_by(ROWS) {
                    let a = self.a.part(row..self.a.rows.min(row + ROWS), slab.clone());
                    kernel(a, slab_values, &mut sums);
                    for (r, sums) in sums.iter().take(a.rows).enumerate() {
                        // SAFETY: row + r < M and the panel's columns end at N: the caller reserved them for us.
                        let out = unsafe {
                            let start = out.0.add((row + r) * self.out_stride + index * PANEL);
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
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
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

    #[test]
    fn blocks_stand_for_what_their_format_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for format in [BlockFormat::Q4_0, BlockFormat::Q4_1, BlockFormat::Q8_0] {
            for (m, n, blocks) in [(1, 1, 1), (1, 70, 5), (6, 64, 2), (7, 130, 3), (40, 65, 40)] {
                let k = blocks * BLOCK;
                let mut bytes = |count: usize| (0..count).map(|_| rng.random::<u8>()).collect::<Vec<u8>>();
                let mut columns: Vec<Vec<u8>> = (0..n).map(|_| bytes(blocks * format.bytes())).collect();
                for (i, block) in columns.iter_mut().flat_map(|column| column.chunks_mut(format.bytes())).enumerate() {
                    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
                    block[..2].copy_from_slice(&half(0.01 + (i % 7) as f32 / 50.0));
                    if format == BlockFormat::Q4_1 {
                        block[2..4].copy_from_slice(&half(-0.5 - (i % 5) as f32 / 10.0));
                    }
                }
                let wide: Vec<f64> = columns.iter().flat_map(|column| plain(format, column)).collect();
                let packed =
                    Packed::from_blocks(format, k, &columns.iter().map(|column| &column[..]).collect::<Vec<_>>());
                let a = random(m * k, 1.0, 5);
                let mut out = vec![0.0; m * n];
                packed.multiply(&a, &mut out, Write::Replace);
                for (at, found) in out.iter().enumerate() {
                    let (row, column) = (at / n, at % n);
                    let want: f64 = (0..k).map(|i| a[row * k + i] as f64 * wide[column * k + i]).sum();
                    assert!((*found as f64 - want).abs() < 1e-3, "{format:?} {m} {n} {k}: {found} {want}");
                }
                let mut column = Vec::new();
                packed.push_column(n - 1, &mut column);
                assert!(column.iter().zip(&wide[(n - 1) * k..]).all(|(a, b)| (*a as f64 - b).abs() < 1e-5));
            }
        }
    }

    /// A column from its blocks, as the format is defined.
    fn plain(format: BlockFormat, column: &[u8]) -> Vec<f64> {
        let half = |bytes: &[u8]| half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f64();
        let block = |block: &[u8]| -> Vec<f64> {
            let nibble = |bytes: &[u8], i: usize| (if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }) as f64;
            (0..BLOCK)
                .map(|i| match format {
                    BlockFormat::Q8_0 => half(block) * (block[2 + i] as i8) as f64,
                    BlockFormat::Q4_0 => half(block) * (nibble(&block[2..], i) - 8.0),
                    BlockFormat::Q4_1 => half(block) * nibble(&block[4..], i) + half(&block[2..]),
                })
                .collect()
        };
        column.chunks_exact(format.bytes()).flat_map(block).collect()
    }
}
