//! How values become stored bytes and back: payload pieces (K and V of one block, layer and KV head) and landmark
//! keys. Pure functions; little-endian.
//!
//! ```text
//! f32, f16, bf16   K (T, D), V (T, D)
//! int8             K scales (D) f32, K (T, D) i8, V scales (T) f32, V (T, D) i8
//! keys f16         (m, D)
//! keys int8        scales (m) f32, (m, W) i8
//! quantizer        factors (D) f32
//! ```
//!
//! Symmetric int8, nearest, -127 to 127. A key channel keeps its scale through a block (outlier channels are the same
//! for all tokens), a value's scale is its token's.
//!
//! Blocks with several int8 keys have W bytes per key, by a [`ChannelQuantizer`] for each layer and KV head that all blocks
//! of the document share; they lie before the keys of its first block. Blocks with one int8 key, and all blocks of
//! documents that were begun in format 2 or before, have none, and W = D.

use std::borrow::Cow;

use half::{bf16, f16};

use super::error::StoreError;
use crate::shape::CollectionSpec;
use crate::types::{BlockId, DType};
use linalg::{ChannelQuantizer, int8_scale, simd, to_int8, widen_f16, widen_int8};

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

    /// Checks that what was read of a block has the length of a piece.
    ///
    /// # Errors
    /// `Damaged` with both lengths.
    pub fn check(&self, block: BlockId, piece: &[u8]) -> Result<(), StoreError> {
        if piece.len() == self.bytes() {
            return Ok(());
        }
        let (expected, found) = (self.bytes(), piece.len());
        Err(StoreError::damaged(block, &format!("a piece has {found} bytes, {expected} for {} tokens", self.tokens)))
    }

    fn k_bytes(&self) -> usize {
        self.count() * self.dtype.size_bytes() + if self.dtype == DType::Int8 { 4 * self.head_dim } else { 0 }
    }

    fn v_bytes(&self) -> usize {
        self.count() * self.dtype.size_bytes() + if self.dtype == DType::Int8 { 4 * self.tokens } else { 0 }
    }

    /// Values of K, and of V.
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
        PieceView { k: self.values_of(k), k_scales, v: self.values_of(v), v_scales }
    }

    /// The scales in front of K or V (int8 only), and the values.
    fn split_scales<'a>(&self, bytes: &'a [u8], count: usize) -> (Cow<'a, [f32]>, &'a [u8]) {
        let (scales, values) = bytes.split_at(if self.dtype == DType::Int8 { 4 * count } else { 0 });
        (floats(scales), values)
    }

    fn values_of<'a>(&self, bytes: &'a [u8]) -> PieceData<'a> {
        match self.dtype {
            DType::F32 => PieceData::F32(floats(bytes)),
            DType::F16 => PieceData::F16(halves(bytes)),
            DType::BF16 => PieceData::BF16(halves(bytes)),
            DType::Int8 => PieceData::Int8(bytemuck::cast_slice(bytes)),
        }
    }

    /// K of a piece that [`PieceLayout::encode`] made, into `k` `(T, D)`.
    pub fn decode_k(&self, piece: &[u8], k: &mut [f32]) {
        assert_eq!(k.len(), self.count(), "K of {self:?}");
        let view = self.view(piece);
        match &view.k {
            PieceData::Int8(values) => widen_channels(values, &view.k_scales, k),
            values => values.widen(k),
        }
    }

    /// V of a piece that [`PieceLayout::encode`] made, into `v` `(T, D)`.
    pub fn decode_v(&self, piece: &[u8], v: &mut [f32]) {
        assert_eq!(v.len(), self.count(), "V of {self:?}");
        let view = self.view(piece);
        match &view.v {
            PieceData::Int8(values) => {
                let rows = values.chunks_exact(self.head_dim).zip(v.chunks_exact_mut(self.head_dim));
                rows.zip(view.v_scales.iter()).for_each(|((values, v), &scale)| widen_int8(values, scale, v));
            }
            values => values.widen(v),
        }
    }
}

/// A piece as it lies: what is borrowed from the bytes it was read as where alignment allows.
#[derive(Clone, Debug, PartialEq)]
pub struct PieceView<'a> {
    /// `(T, D)`, each column times its scale.
    pub k: PieceData<'a>,
    /// `(D)`; empty unless int8.
    pub k_scales: Cow<'a, [f32]>,
    /// `(T, D)`, each row times its scale.
    pub v: PieceData<'a>,
    /// `(T)`; empty unless int8.
    pub v_scales: Cow<'a, [f32]>,
}

/// Values of a dtype.
#[derive(Clone, Debug, PartialEq)]
pub enum PieceData<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    BF16(Cow<'a, [bf16]>),
    Int8(&'a [i8]),
}

/// The form of the landmark keys of a collection's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeysLayout {
    /// f16 or int8.
    pub dtype: DType,
    /// m
    pub keys: usize,
    /// D
    pub head_dim: usize,
    /// L * Hkv
    pub pieces: usize,
}

impl KeysLayout {
    /// Of the blocks of a collection.
    pub fn of(spec: &CollectionSpec) -> Self {
        let shape = &spec.shape;
        let (keys, head_dim) = (shape.keys_per_block(spec.key_rule), shape.head_dim as usize);
        KeysLayout { dtype: spec.key_dtype, keys, head_dim, pieces: shape.pieces() }
    }

    /// Whether new documents have channel quantizers: one key of a block says too little about the channels of others.
    pub fn has_quantizers(&self) -> bool {
        self.dtype == DType::Int8 && self.keys > 1
    }

    /// Bytes of a block's keys, quantized by channel or not, without the quantizers themselves.
    pub fn bytes(&self, by_channel: bool) -> usize {
        self.pieces * self.piece_bytes(self.width(by_channel))
    }

    /// The bytes that keys of a full block may take: plain, or by channel, which in a first block includes the quantizers.
    pub(super) fn sizes(&self, first_block: bool) -> Vec<u32> {
        let mut sizes = vec![self.bytes(false)];
        if self.has_quantizers() {
            sizes.push(if first_block { self.quantizers_bytes() + self.bytes(true) } else { self.bytes(true) });
        }
        sizes.into_iter().map(|bytes| bytes as u32).collect()
    }

    /// Values stored of one key.
    fn width(&self, by_channel: bool) -> usize {
        if by_channel { ChannelQuantizer::width(self.head_dim) } else { self.head_dim }
    }

    fn quantizers_bytes(&self) -> usize {
        self.pieces * self.head_dim * size_of::<f32>()
    }

    fn piece_bytes(&self, width: usize) -> usize {
        self.keys * width * self.dtype.size_bytes() + if self.dtype == DType::Int8 { 4 * self.keys } else { 0 }
    }

    /// Checks the keys of a full block, of a document with quantizers or without.
    pub(super) fn check(&self, first_block: bool, bytes: &[u8]) -> Result<(), StoreError> {
        let (quantizers, keys) = if first_block { self.split_quantizers(bytes)? } else { (Vec::new(), bytes) };
        let by_channel = if first_block { !quantizers.is_empty() } else { self.has_quantizers() };
        if keys.len() == self.bytes(by_channel) || keys.len() == self.bytes(false) {
            return Ok(());
        }
        Err(self.wrong_bytes(self.has_quantizers(), keys.len()))
    }

    fn wrong_bytes(&self, by_channel: bool, found: usize) -> StoreError {
        let expected = self.bytes(by_channel).to_string();
        StoreError::Invalid { field: "bytes of keys of a block", expected, found: found.to_string() }
    }

    /// Appends a document's quantizers `(L * Hkv)` to `out`.
    pub fn encode_quantizers(&self, quantizers: &[ChannelQuantizer], out: &mut Vec<u8>) {
        assert_eq!(quantizers.len(), self.pieces, "quantizers of {self:?}");
        out.extend(quantizers.iter().flat_map(ChannelQuantizer::factors).flat_map(|factor| factor.to_le_bytes()));
    }

    /// Appends the landmark keys `(m, D)` of one block, layer and KV head to `out`, by their quantizer if the
    /// document has any.
    pub fn encode(&self, keys: &[f32], quantizer: Option<&ChannelQuantizer>, out: &mut Vec<u8>) {
        assert_eq!(keys.len(), self.keys * self.head_dim, "keys of {self:?}");
        match (self.dtype, quantizer) {
            (DType::Int8, Some(quantizer)) => encode_rows_by_channel(quantizer, self.head_dim, keys, out),
            (DType::Int8, None) => encode_rows_int8(self.head_dim, keys, out),
            _ => encode_floats(DType::F16, keys, out),
        }
    }

    /// Splits the keys of a document's first block into quantizers `(L * Hkv)`, none if the document has none, and the rest.
    ///
    /// `Invalid` if no quantizer has these factors.
    pub fn split_quantizers<'a>(&self, bytes: &'a [u8]) -> Result<(Vec<ChannelQuantizer>, &'a [u8]), StoreError> {
        if !self.has_quantizers() || bytes.len() != self.quantizers_bytes() + self.bytes(true) {
            return Ok((Vec::new(), bytes));
        }
        let (factors, keys) = bytes.split_at(self.quantizers_bytes());
        let factors = floats(factors);
        let quantizers =
            factors.chunks_exact(self.head_dim).map(|factors| ChannelQuantizer::from_factors(factors.to_vec()));
        let quantizers = quantizers.collect::<Option<_>>().ok_or_else(|| StoreError::Invalid {
            field: "factors of channels of keys",
            expected: "1 to 64".into(),
            found: format!("{:?}", factors.iter().find(|factor| !(1.0..=64.0).contains(*factor))),
        })?;
        Ok((quantizers, keys))
    }

    /// Splits what [`KeysLayout::encode`] gave for every layer and KV head into L * Hkv parts; that of a layer and KV head
    /// is the one at `layer * Hkv + kv_head`.
    ///
    /// `Invalid` if the bytes do not have the length of that many.
    pub fn decode<'a>(
        &self,
        by_channel: bool,
        bytes: &'a [u8],
    ) -> Result<impl ExactSizeIterator<Item = KeyData<'a>>, StoreError> {
        if bytes.len() != self.bytes(by_channel) {
            return Err(self.wrong_bytes(by_channel, bytes.len()));
        }
        let KeysLayout { dtype, keys, .. } = *self;
        Ok(bytes.chunks_exact(self.piece_bytes(self.width(by_channel)).max(1)).map(move |part| match dtype {
            DType::Int8 => {
                let (scales, values) = part.split_at(4 * keys);
                KeyData::Int8 { values: bytemuck::cast_slice(values), scales: floats(scales) }
            }
            _ => KeyData::F16(halves(part)),
        }))
    }
}

/// The landmark keys of one block, layer and KV head, borrowed from the bytes they were read as where alignment allows.
#[derive(Clone, Debug, PartialEq)]
pub enum KeyData<'a> {
    /// `(m, D)`
    F16(Cow<'a, [f16]>),
    /// `values` `(m, W)`, each row times its scale in `scales` `(m)`.
    Int8 { values: &'a [i8], scales: Cow<'a, [f32]> },
}

/// One scale per row of `(rows, D)`, then the values.
fn encode_rows_int8(head_dim: usize, rows: &[f32], out: &mut Vec<u8>) {
    let scales: Vec<f32> = rows.chunks_exact(head_dim).map(|row| int8_scale(row.iter().copied())).collect();
    out.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    for (row, &scale) in rows.chunks_exact(head_dim).zip(&scales) {
        out.extend(row.iter().map(|&number| to_int8(number, scale) as u8));
    }
}

/// One scale per row of `(rows, D)`, then the quantizer's bytes `(rows, W)`.
fn encode_rows_by_channel(quantizer: &ChannelQuantizer, head_dim: usize, rows: &[f32], out: &mut Vec<u8>) {
    let width = ChannelQuantizer::width(head_dim);
    let mut bytes = vec![0; rows.len() / head_dim * width];
    for (row, bytes) in rows.chunks_exact(head_dim).zip(bytes.chunks_exact_mut(width)) {
        out.extend(quantizer.encode(row, bytes).to_le_bytes());
    }
    out.extend(bytes.iter().map(|byte| byte.cast_unsigned()));
}

/// One scale per column of `(T, D)`.
fn channel_scales(k: &[f32], head_dim: usize) -> Vec<f32> {
    (0..head_dim).map(|channel| int8_scale(k.iter().skip(channel).step_by(head_dim).copied())).collect()
}

fn encode_floats(dtype: DType, values: &[f32], out: &mut Vec<u8>) {
    match dtype {
        DType::F32 => out.extend(values.iter().flat_map(|number| number.to_le_bytes())),
        DType::F16 => out.extend(values.iter().flat_map(|&number| f16::from_f32(number).to_le_bytes())),
        DType::BF16 => out.extend(values.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes())),
        DType::Int8 => unreachable!("int8 has scales and is encoded by rows"),
    }
}

impl PieceData<'_> {
    /// To single ones, exactly and without scales.
    fn widen(&self, out: &mut [f32]) {
        match self {
            PieceData::F32(values) => out.copy_from_slice(values),
            PieceData::F16(values) => widen_f16(values, out),
            PieceData::BF16(values) => {
                out.iter_mut().zip(values.iter()).for_each(|(out, number)| *out = number.to_f32())
            }
            PieceData::Int8(values) => widen_int8(values, 1.0, out),
        }
    }
}

simd! {
    /// Rows of D signed bytes, each channel times its own scale: `(T, D)`.
    fn widen_channels(values: &[i8], scales: &[f32], out: &mut [f32]) {
        for (values, out) in values.chunks_exact(scales.len()).zip(out.chunks_exact_mut(scales.len())) {
            for ((out, number), scale) in out.iter_mut().zip(values).zip(scales) {
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
