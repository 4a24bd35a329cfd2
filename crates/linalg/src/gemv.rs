//! Products of a few rows with a matrix in its stored form: elements are widened in registers and never written back.
//!
//! For 4 rows of 128 and 64 int8 keys, dot products take 2.1 us and weighted sums 0.9 on one core of a Xeon with AVX-512;
//! widening the keys first took 2.8 and 3.2. Dot products of several rows with a key at once would widen it once, but were 3
//! to 5 times slower: the compiler spills their sums.

use super::matrix::{Matrix, Write, reach};
use super::simd::{fma, fold};
use super::widen::{Element, HALVES};

/// Rows up to which [`gemv`] beats packing `b` into panels, which costs as much as some ten rows.
pub const GEMV_ROWS_MAX: usize = 8;

/// Rows summed together by `mix`; eight were slower.
const ROWS: usize = 4;

/// `out (M, N) = a (M, K) b (K, N)`, or `out += a b`, fast for M up to [`GEMV_ROWS_MAX`]. `a` is row-major; `b` is row-major
/// or the transpose of such a matrix. Rows of `out` begin `out_stride` elements apart; the gaps are not written.
///
/// # Panics
/// If the shapes do not match, `out` is too short or a factor has another layout.
pub fn gemv<N: Element>(a: Matrix, b: Matrix<N>, out: &mut [f32], out_stride: usize, write: Write) {
    assert_eq!(a.columns, b.rows);
    assert!(a.column_stride == 1 && (b.row_stride == 1 || b.column_stride == 1));
    assert!(b.columns <= out_stride && reach(a.rows, b.columns, out_stride) <= out.len());
    if b.row_stride == 1 {
        dots(a, b.transposed(), out, out_stride, write);
        return;
    }
    for first in (0..a.rows).step_by(ROWS) {
        let rows = ROWS.min(a.rows - first);
        let (a, out) = (a.part(first..first + rows, 0..a.columns), &mut out[first * out_stride..]);
        // One row would waste three of four sums.
        match rows {
            1 => mix_one(a, b, out, out_stride, write),
            _ => mix_four(a, b, out, out_stride, write),
        }
    }
}

simd! {
    /// `out (M, N) = a (M, K) b^T`, `b (N, K)`: dot products of rows.
    fn dots<N: Element>(a: Matrix, b: Matrix<N>, out: &mut [f32], out_stride: usize, write: Write) {
        for index in 0..b.rows {
            let (elements, elements_rest) = b.data[index * b.row_stride..][..b.columns].as_chunks();
            for row in 0..a.rows {
                let (weights, weights_rest) = a.data[row * a.row_stride..][..b.columns].as_chunks::<HALVES>();
                let mut sums = [0f32; HALVES];
                for (weights, elements) in weights.iter().zip(elements) {
                    let elements = N::widen::<FMA>(elements);
                    for lane in 0..HALVES {
                        sums[lane] = fma::<FMA>(weights[lane], elements[lane], sums[lane]);
                    }
                }
                let rest = weights_rest.iter().zip(elements_rest);
                let rest = rest.fold(0.0, |sum, (weight, element)| fma::<FMA>(*weight, element.widen_one(), sum));
                put(&mut out[row * out_stride + index], fold(sums, |a, b| a + b) + rest, write);
            }
        }
    }
}

simd! {
    fn mix_one<N: Element>(a: Matrix, b: Matrix<N>, out: &mut [f32], out_stride: usize, write: Write) {
        mix::<FMA, N, 1>(a, b, out, out_stride, write);
    }
}

simd! {
    fn mix_four<N: Element>(a: Matrix, b: Matrix<N>, out: &mut [f32], out_stride: usize, write: Write) {
        mix::<FMA, N, ROWS>(a, b, out, out_stride, write);
    }
}

#[inline(always)]
fn put(place: &mut f32, sum: f32, write: Write) {
    *place = if write == Write::Add { *place + sum } else { sum };
}

/// `out (M, N) = a (M, K) b (K, N)` for at most `R` rows: weighted sums of the rows of `b`.
#[inline(always)]
fn mix<const FMA: bool, N: Element, const R: usize>(
    a: Matrix,
    b: Matrix<N>,
    out: &mut [f32],
    out_stride: usize,
    write: Write,
) {
    // The last row stands in for missing ones; their sums are dropped.
    let rows: [&[f32]; R] = std::array::from_fn(|row| &a.data[row.min(a.rows - 1) * a.row_stride..][..a.columns]);
    let tiles = b.columns / HALVES * HALVES;
    for first in (0..tiles).step_by(HALVES) {
        let mut sums = [[0f32; HALVES]; R];
        for index in 0..b.rows {
            let (elements, _) = b.data[index * b.row_stride + first..][..HALVES].as_chunks();
            let elements = N::widen::<FMA>(&elements[0]);
            for (sums, row) in sums.iter_mut().zip(rows) {
                let weight = row[index];
                for lane in 0..HALVES {
                    sums[lane] = fma::<FMA>(weight, elements[lane], sums[lane]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate().take(a.rows) {
            let places = &mut out[row * out_stride + first..][..HALVES];
            places.iter_mut().zip(sums).for_each(|(place, sum)| put(place, *sum, write));
        }
    }
    for (index, row) in rows.iter().enumerate().take(a.rows) {
        for column in tiles..b.columns {
            let elements = (0..b.rows).map(|index| b.data[index * b.row_stride + column].widen_one());
            let sum = row.iter().zip(elements).fold(0.0, |sum, (weight, element)| fma::<FMA>(*weight, element, sum));
            put(&mut out[index * out_stride + column], sum, write);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// f32 sums over at most 131 products of values up to 1 with values up to 4.
    const TOLERANCE: f64 = 1e-4;

    fn agrees_with_plain_loops<N: Element>(element: impl Fn(f32) -> N) {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (m, k, n) in
            [(0, 3, 2), (1, 0, 5), (1, 1, 1), (1, 64, 128), (2, 15, 17), (3, 16, 16), (5, 33, 80), (9, 131, 7)]
        {
            let a: Vec<f32> = (0..m * k).map(|_| rng.random_range(-1.0..1.0)).collect();
            let b: Vec<N> = (0..k * n).map(|_| element(rng.random_range(-4.0..4.0))).collect();
            let stride = n + 3;
            for (is_transposed, write) in
                [(false, Write::Replace), (false, Write::Add), (true, Write::Replace), (true, Write::Add)]
            {
                let right = if is_transposed { Matrix::new(&b, n, k).transposed() } else { Matrix::new(&b, k, n) };
                let mut out = vec![0.5; m * stride];
                gemv(Matrix::new(&a, m, k), right, &mut out, stride, write);
                for (i, &got) in out.iter().enumerate() {
                    let (row, column) = (i / stride, i % stride);
                    let of_b =
                        |j: usize| b[if is_transposed { column * k + j } else { j * n + column }].widen_one() as f64;
                    let want = match (column < n, write) {
                        (false, _) => 0.5,
                        (true, Write::Replace) => (0..k).map(|j| a[row * k + j] as f64 * of_b(j)).sum::<f64>(),
                        (true, Write::Add) => (0..k).map(|j| a[row * k + j] as f64 * of_b(j)).sum::<f64>() + 0.5,
                    };
                    assert!(
                        (got as f64 - want).abs() < TOLERANCE,
                        "{m} {k} {n} {is_transposed} {write:?}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_with_stored_elements_agree_with_plain_loops() {
        agrees_with_plain_loops(|x| x);
        agrees_with_plain_loops(f16::from_f32);
        agrees_with_plain_loops(bf16::from_f32);
        agrees_with_plain_loops(|x| x as i8);
    }
}
