//! Kernels for few rows in AVX-512. The speed of memory decides: keys are asked for well before they are needed.

use std::arch::x86_64::*;
use std::array::from_fn;

use half::f16;

use super::integers::{Integers, KEY_OFFSET, LOW_STEPS};
use super::nibbles::Bytes;
use crate::index::layout::{NIBBLE_OFFSET, PANEL, QUAD};
use linalg::prefetch_ahead;

/// Values in a register.
const LANES: usize = 16;

/// Registers of one dimension of a panel.
const PARTS: usize = PANEL / LANES;

/// Scores `(rows, panels * PANEL)` of up to four rows, packed as `(D, rows)`.
#[target_feature(enable = "avx512f")]
pub(super) fn score_halves(halves: &[f16], dim: usize, queries: &[f32], scores: &mut [f32]) {
    match queries.len() / dim {
        4 => halves_rows::<4>(halves, dim, queries, scores),
        3 => halves_rows::<3>(halves, dim, queries, scores),
        2 => halves_rows::<2>(halves, dim, queries, scores),
        _ => halves_rows::<1>(halves, dim, queries, scores),
    }
}

#[target_feature(enable = "avx512f")]
fn halves_rows<const R: usize>(halves: &[f16], dim: usize, queries: &[f32], scores: &mut [f32]) {
    let keys = halves.len() / dim;
    for (panel, halves) in halves.chunks_exact(dim * PANEL).enumerate() {
        let mut sums = [[_mm512_setzero_ps(); PARTS]; R];
        for (halves, queries) in halves.as_chunks::<PANEL>().0.iter().zip(queries.as_chunks::<R>().0) {
            prefetch_ahead::<{ size_of::<[f16; PANEL]>() }>(halves.as_ptr().cast());
            let values: [__m512; PARTS] = from_fn(|part| {
                // SAFETY: 16 of the panel's 64 values; the load needs no alignment.
                _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves.as_ptr().add(part * LANES).cast()) })
            });
            for (sums, &query) in sums.iter_mut().zip(queries) {
                let query = _mm512_set1_ps(query);
                for (sum, values) in sums.iter_mut().zip(values) {
                    *sum = _mm512_fmadd_ps(query, values, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            store(sums, &mut scores[row * keys + panel * PANEL..][..PANEL]);
        }
    }
}

/// Scores `(rows, panels * PANEL)` of up to four rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn score_integers(queries: &Integers, values: &[i8], scales: &[f32], scores: &mut [f32]) {
    match queries.rows.len() {
        4 => integers_rows::<4>(queries, values, scales, scores),
        3 => integers_rows::<3>(queries, values, scales, scores),
        2 => integers_rows::<2>(queries, values, scales, scores),
        _ => integers_rows::<1>(queries, values, scales, scores),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn integers_rows<const R: usize>(queries: &Integers, values: &[i8], scales: &[f32], scores: &mut [f32]) {
    /// Registers of four dimensions of a strip: half a panel, so that all sums stay in registers.
    const STRIP: usize = PARTS / 2;
    let quads = queries.quads.as_chunks::<R>().0;
    let keys = scales.len();
    let offset = _mm512_set1_epi8(KEY_OFFSET as u8 as i8);
    for (panel, (values, scales)) in
        values.chunks_exact(quads.len() * PANEL * QUAD).zip(scales.as_chunks::<PANEL>().0).enumerate()
    {
        for strip in [0, STRIP] {
            let mut sums = [[[_mm512_setzero_si512(); STRIP]; 2]; R];
            for (sums, row) in sums.iter_mut().zip(&queries.rows) {
                // What the offset of the keys will have added.
                *sums = row.sums.map(|sum| [_mm512_set1_epi32(-KEY_OFFSET * sum); STRIP]);
            }
            for (values, rows) in values.as_chunks::<{ PANEL * QUAD }>().0.iter().zip(quads) {
                let from = values[strip * LANES * QUAD..].as_ptr();
                prefetch_ahead::<{ STRIP * LANES * QUAD }>(from);
                let strip_keys: [__m512i; STRIP] = from_fn(|part| {
                    // SAFETY: 64 of the strip's 128 values; the load needs no alignment.
                    _mm512_xor_si512(unsafe { _mm512_loadu_si512(from.add(part * LANES * QUAD).cast()) }, offset)
                });
                for (sums, row) in sums.iter_mut().zip(rows) {
                    for (sums, quad) in sums.iter_mut().zip(row) {
                        let query = _mm512_set1_epi32(i32::from_le_bytes(quad.map(i8::cast_unsigned)));
                        for (sum, keys) in sums.iter_mut().zip(strip_keys) {
                            *sum = _mm512_dpbusd_epi32(*sum, keys, query);
                        }
                    }
                }
            }
            for (row, ([high, low], query)) in sums.iter().zip(&queries.rows).enumerate() {
                let low_step = _mm512_set1_ps(query.scale / LOW_STEPS);
                let products: [__m512; STRIP] = from_fn(|part| {
                    let high = _mm512_mul_ps(_mm512_cvtepi32_ps(high[part]), _mm512_set1_ps(query.scale));
                    let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[part]), low_step, high);
                    // SAFETY: 16 of the panel's 64 scales; the load needs no alignment.
                    _mm512_mul_ps(sum, unsafe { _mm512_loadu_ps(scales[(strip + part) * LANES..].as_ptr()) })
                });
                store(&products, &mut scores[row * keys + panel * PANEL + strip * LANES..]);
            }
        }
    }
}

/// Scores `(rows, panels * PANEL)` of up to four rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn score_nibbles(queries: &Bytes, values: &[i8], scales: &[f32], scores: &mut [f32]) {
    match queries.rows.len() {
        4 => nibbles_rows::<4>(queries, values, scales, scores),
        3 => nibbles_rows::<3>(queries, values, scales, scores),
        2 => nibbles_rows::<2>(queries, values, scales, scores),
        _ => nibbles_rows::<1>(queries, values, scales, scores),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn nibbles_rows<const R: usize>(queries: &Bytes, values: &[i8], scales: &[f32], scores: &mut [f32]) {
    let octets = queries.octets.as_chunks::<R>().0;
    let keys = scales.len();
    let mask = _mm512_set1_epi8(0x0f);
    for (panel, (values, scales)) in
        values.chunks_exact(octets.len() * PANEL * QUAD).zip(scales.as_chunks::<PANEL>().0).enumerate()
    {
        let mut sums = [[_mm512_setzero_si512(); PARTS]; R];
        for (sums, row) in sums.iter_mut().zip(&queries.rows) {
            // What the offset of the keys will have added.
            *sums = [_mm512_set1_epi32(-NIBBLE_OFFSET * row.sums[0]); PARTS];
        }
        for (values, rows) in values.as_chunks::<{ PANEL * QUAD }>().0.iter().zip(octets) {
            prefetch_ahead::<{ PANEL * QUAD }>(values.as_ptr());
            let pairs: [__m512i; PARTS] = from_fn(|part| {
                // SAFETY: 64 of the octet's 256 bytes; the load needs no alignment.
                unsafe { _mm512_loadu_si512(values.as_ptr().add(part * LANES * QUAD).cast()) }
            });
            let low = pairs.map(|pair| _mm512_and_si512(pair, mask));
            let high = pairs.map(|pair| _mm512_and_si512(_mm512_srli_epi16::<4>(pair), mask));
            for (half, keys) in [low, high].iter().enumerate() {
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let query = _mm512_set1_epi32(i32::from_le_bytes(row[half].map(i8::cast_unsigned)));
                    for (sum, &keys) in sums.iter_mut().zip(keys) {
                        *sum = _mm512_dpbusd_epi32(*sum, keys, query);
                    }
                }
            }
        }
        for (row, (sums, query)) in sums.iter().zip(&queries.rows).enumerate() {
            let products: [__m512; PARTS] = from_fn(|part| {
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[part]), _mm512_set1_ps(query.scale));
                // SAFETY: 16 of the panel's 64 scales; the load needs no alignment.
                _mm512_mul_ps(sum, unsafe { _mm512_loadu_ps(scales[part * LANES..].as_ptr()) })
            });
            store(&products, &mut scores[row * keys + panel * PANEL..]);
        }
    }
}

/// Stores registers one after the other.
#[inline]
#[target_feature(enable = "avx512f")]
fn store<const N: usize>(values: &[__m512; N], into: &mut [f32]) {
    for (values, into) in values.iter().zip(into.as_chunks_mut::<LANES>().0) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(into.as_mut_ptr(), *values) };
    }
}
