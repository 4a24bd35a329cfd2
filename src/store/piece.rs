//! How numbers become stored bytes and back: payload pieces (K and V of one block, layer and KV head) and landmark
//! keys. Pure functions; little-endian.
//!
//! ```text
//! f32, f16, bf16   K (T, D), V (T, D)
//! int8             K scales (D) f32, K (T, D) i8, V scales (T) f32, V (T, D) i8
//! keys f16         (m, D)
//! keys int8        scales (m) f32, (m, D) i8
//! ```
//!
//! Symmetric int8, nearest, -127 to 127. A key channel keeps its scale through a block (outlier channels are the same
//! for all tokens), a value's scale is its token's.

use std::borrow::Cow;

use half::{bf16, f16};

use super::error::StoreError;
use crate::numeric::{int8_scale, simd, to_int8, widen_f16, widen_int8};
use crate::types::DType;

/// The form of one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceLayout {
    pub dtype: DType,
    /// T, at most B.
    pub tokens: usize,
    /// D
    pub head_dim: usize,
}

impl PieceLayout {
    /// Bytes of one piece.
    pub fn bytes(&self) -> usize {
        self.k_bytes() + self.v_bytes()
    }

    fn k_bytes(&self) -> usize {
        self.count() * self.dtype.size_bytes() + if self.dtype == DType::Int8 { 4 * self.head_dim } else { 0 }
    }

    fn v_bytes(&self) -> usize {
        self.count() * self.dtype.size_bytes() + if self.dtype == DType::Int8 { 4 * self.tokens } else { 0 }
    }

    /// Numbers of K, and of V.
    fn count(&self) -> usize {
        self.tokens * self.head_dim
    }

    /// Appends one piece to `out`. `k` and `v` are `(T, D)`.
    pub fn encode(&self, k: &[f32], v: &[f32], out: &mut Vec<u8>) {
        assert_eq!((k.len(), v.len()), (self.count(), self.count()), "K and V of {self:?}");
        out.reserve(self.bytes());
        if self.dtype == DType::Int8 {
            let scales = channel_scales(k, self.head_dim);
            out.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
            out.extend(k.iter().zip(scales.iter().cycle()).map(|(&k, &scale)| to_int8(k, scale) as u8));
            encode_rows_int8(self.head_dim, v, out);
        } else {
            encode_floats(self.dtype, k, out);
            encode_floats(self.dtype, v, out);
        }
    }

    /// A piece that [`PieceLayout::encode`] made, as it lies.
    pub fn view<'a>(&self, piece: &'a [u8]) -> PieceView<'a> {
        assert_eq!(piece.len(), self.bytes(), "a piece of {self:?}");
        let (k, v) = piece.split_at(self.k_bytes());
        let (k_scales, k) = self.split_scales(k, self.head_dim);
        let (v_scales, v) = self.split_scales(v, self.tokens);
        PieceView { k: self.numbers_of(k), k_scales, v: self.numbers_of(v), v_scales }
    }

    /// The scales in front of K or V, none but for int8, and the numbers.
    fn split_scales<'a>(&self, bytes: &'a [u8], count: usize) -> (Cow<'a, [f32]>, &'a [u8]) {
        let (scales, numbers) = bytes.split_at(if self.dtype == DType::Int8 { 4 * count } else { 0 });
        (floats(scales), numbers)
    }

    fn numbers_of<'a>(&self, bytes: &'a [u8]) -> Numbers<'a> {
        match self.dtype {
            DType::F32 => Numbers::F32(floats(bytes)),
            DType::F16 => Numbers::F16(halves(bytes)),
            DType::BF16 => Numbers::BF16(halves(bytes)),
            DType::Int8 => Numbers::Int8(bytemuck::cast_slice(bytes)),
        }
    }

    /// K of a piece that [`PieceLayout::encode`] made, into `k` `(T, D)`.
    pub fn decode_k(&self, piece: &[u8], k: &mut [f32]) {
        assert_eq!(k.len(), self.count(), "K of {self:?}");
        let view = self.view(piece);
        match &view.k {
            Numbers::Int8(numbers) => widen_channels(numbers, &view.k_scales, k),
            numbers => numbers.widen(k),
        }
    }

    /// V of a piece that [`PieceLayout::encode`] made, into `v` `(T, D)`.
    pub fn decode_v(&self, piece: &[u8], v: &mut [f32]) {
        assert_eq!(v.len(), self.count(), "V of {self:?}");
        let view = self.view(piece);
        match &view.v {
            Numbers::Int8(numbers) => {
                let rows = numbers.chunks_exact(self.head_dim).zip(v.chunks_exact_mut(self.head_dim));
                rows.zip(view.v_scales.iter()).for_each(|((numbers, v), &scale)| widen_int8(numbers, scale, v));
            }
            numbers => numbers.widen(v),
        }
    }
}

/// A piece as it lies: what is borrowed from the bytes it was read as where alignment allows.
#[derive(Clone, Debug, PartialEq)]
pub struct PieceView<'a> {
    /// `(T, D)`, each column times its scale.
    pub k: Numbers<'a>,
    /// `(D)`; empty but for int8.
    pub k_scales: Cow<'a, [f32]>,
    /// `(T, D)`, each row times its scale.
    pub v: Numbers<'a>,
    /// `(T)`; empty but for int8.
    pub v_scales: Cow<'a, [f32]>,
}

/// Numbers of a dtype.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    BF16(Cow<'a, [bf16]>),
    Int8(&'a [i8]),
}

/// Bytes of the keys of one block, layer and KV head.
pub fn keys_bytes(dtype: DType, m: usize, head_dim: usize) -> usize {
    m * head_dim * dtype.size_bytes() + if dtype == DType::Int8 { 4 * m } else { 0 }
}

/// Appends the landmark keys of one block, layer and KV head to `out`. `keys` is `(m, D)`; `dtype` is f16 or int8.
pub fn encode_keys(dtype: DType, m: usize, head_dim: usize, keys: &[f32], out: &mut Vec<u8>) {
    assert_eq!(keys.len(), m * head_dim, "{m} keys of {head_dim}");
    match dtype {
        DType::Int8 => encode_rows_int8(head_dim, keys, out),
        _ => encode_floats(DType::F16, keys, out),
    }
}

/// The landmark keys of one block, layer and KV head, borrowed from the bytes they were read as where alignment allows.
#[derive(Clone, Debug, PartialEq)]
pub enum KeyNumbers<'a> {
    /// `(m, D)`
    F16(Cow<'a, [f16]>),
    /// `numbers` `(m, D)`, each row times its scale in `scales` `(m)`.
    Int8 { numbers: &'a [i8], scales: Cow<'a, [f32]> },
}

/// Splits what `read_keys` gave into its `count` = L * Hkv parts, in order of `layer * Hkv + kv_head`.
///
/// `Invalid` if the bytes do not have the length of that many.
pub fn decode_keys(
    dtype: DType,
    m: usize,
    head_dim: usize,
    count: usize,
    bytes: &[u8],
) -> Result<impl ExactSizeIterator<Item = KeyNumbers<'_>>, StoreError> {
    let part_bytes = keys_bytes(dtype, m, head_dim);
    if bytes.len() != count * part_bytes {
        return Err(StoreError::Invalid {
            field: "bytes of keys",
            expected: (count * part_bytes).to_string(),
            found: bytes.len().to_string(),
        });
    }
    Ok(bytes.chunks_exact(part_bytes.max(1)).map(move |part| match dtype {
        DType::Int8 => {
            let (scales, numbers) = part.split_at(4 * m);
            KeyNumbers::Int8 { numbers: bytemuck::cast_slice(numbers), scales: floats(scales) }
        }
        _ => KeyNumbers::F16(halves(part)),
    }))
}

/// One scale per row of `(rows, D)`, then the numbers.
fn encode_rows_int8(head_dim: usize, rows: &[f32], out: &mut Vec<u8>) {
    let scales: Vec<f32> = rows.chunks_exact(head_dim).map(|row| int8_scale(row.iter().copied())).collect();
    out.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    for (row, &scale) in rows.chunks_exact(head_dim).zip(&scales) {
        out.extend(row.iter().map(|&number| to_int8(number, scale) as u8));
    }
}

/// One scale per column of `(T, D)`.
fn channel_scales(k: &[f32], head_dim: usize) -> Vec<f32> {
    (0..head_dim).map(|channel| int8_scale(k.iter().skip(channel).step_by(head_dim).copied())).collect()
}

fn encode_floats(dtype: DType, numbers: &[f32], out: &mut Vec<u8>) {
    match dtype {
        DType::F32 => out.extend(numbers.iter().flat_map(|number| number.to_le_bytes())),
        DType::F16 => out.extend(numbers.iter().flat_map(|&number| f16::from_f32(number).to_le_bytes())),
        DType::BF16 => out.extend(numbers.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes())),
        DType::Int8 => unreachable!("int8 has scales and is encoded by rows"),
    }
}

impl Numbers<'_> {
    /// To single ones, exactly and without scales.
    fn widen(&self, out: &mut [f32]) {
        match self {
            Numbers::F32(numbers) => out.copy_from_slice(numbers),
            Numbers::F16(numbers) => widen_f16(numbers, out),
            Numbers::BF16(numbers) => {
                out.iter_mut().zip(numbers.iter()).for_each(|(out, number)| *out = number.to_f32())
            }
            Numbers::Int8(numbers) => widen_int8(numbers, 1.0, out),
        }
    }
}

simd! {
    /// Rows of D signed bytes, each channel times its own scale: `(T, D)`.
    fn widen_channels(numbers: &[i8], scales: &[f32], out: &mut [f32]) {
        for (numbers, out) in numbers.chunks_exact(scales.len()).zip(out.chunks_exact_mut(scales.len())) {
            for ((out, number), scale) in out.iter_mut().zip(numbers).zip(scales) {
                *out = *number as f32 * scale;
            }
        }
    }
}

/// Little-endian bytes as f32: in place if they are aligned and the machine is little-endian.
fn floats(bytes: &[u8]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(floats) if cfg!(target_endian = "little") => Cow::Borrowed(floats),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// As [`floats`], for f16 and bf16.
fn halves<T: bytemuck::Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(halves) if cfg!(target_endian = "little") => Cow::Borrowed(halves),
        _ => bytes.chunks_exact(2).map(|b| bytemuck::cast(u16::from_le_bytes([b[0], b[1]]))).collect(),
    }
}
