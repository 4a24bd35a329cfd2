//! How do keys lie in memory? The shape of a collection's keys, and the panels that a chunk has them in.
//!
//! Inside a chunk the keys of one layer and KV head are contiguous, and interleaved in panels of [`PANEL`] keys, so
//! that one vector register holds the same dimensions of many keys and scores need no sum across a register. An f16
//! panel is `(D, PANEL)`, an int8 one `(D / 4, PANEL, 4)`: integer instructions sum four products at once. The last
//! panel is filled up with zeros, and so are the last four dimensions. Documents with channel quantizers have W
//! values per key in place of D.

use half::f16;

use crate::types::DType;
use linalg::ChannelQuantizer;

/// Keys of one panel: four AVX-512 registers of sums for each of the kernel's rows.
pub(super) const PANEL: usize = 64;

/// Dimensions of an int8 key that lie together.
pub(super) const QUAD: usize = 4;

/// Dimensions of an int4 key that lie together: two quads, of which one is in the low and one in the high halves of
/// four bytes.
pub(super) const OCTET: usize = 2 * QUAD;

/// Chunks are merged up to this many keys. Larger ones would cost more to rewrite than they save: a scan is cut into
/// tiles of about this size anyway.
pub(super) const CHUNK_KEYS_MAX: usize = 2048;

/// What is added to an int4 number, so that four bits hold it without a sign.
pub(super) const NIBBLE_OFFSET: i32 = 8;

/// What f16 keys are compressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// -127 to 127, a byte each.
    Int8,
    /// -7 to 7, half a byte each.
    Int4,
}

/// The shape of keys, equal for all full blocks of a collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLayout {
    /// L
    pub layers: usize,
    /// Hkv
    pub kv_heads: usize,
    /// D
    pub head_dim: usize,
    /// m
    pub keys_per_block: usize,
    /// f16 or int8.
    pub dtype: DType,
    /// f16 keys are scanned as these; blocks that could be among the best are compared as f16.
    pub compressed: Option<Compression>,
}

/// What a scan reads of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scanned {
    F16,
    Int8,
    Int4,
}

impl KeyLayout {
    /// Layers times KV heads; a piece is `layer * Hkv + kv_head`.
    pub fn pieces(&self) -> usize {
        self.layers * self.kv_heads
    }

    /// What a scan reads.
    pub(super) fn scanned(&self) -> Scanned {
        match self.compressed {
            Some(Compression::Int8) => Scanned::Int8,
            Some(Compression::Int4) => Scanned::Int4,
            None if self.dtype == DType::Int8 => Scanned::Int8,
            None => Scanned::F16,
        }
    }

    /// Dimensions of keys as they are stored that lie together in a panel.
    pub(super) fn quad(&self) -> usize {
        if self.dtype == DType::Int8 { QUAD } else { 1 }
    }

    /// Bytes that the keys of `blocks` consecutive blocks take at most, loaded at once.
    pub fn bytes(&self, blocks: u32) -> u64 {
        let (blocks, chunk) = (blocks as usize, self.chunk_blocks());
        (blocks / chunk) as u64 * self.chunk_bytes(chunk) + self.chunk_bytes(blocks % chunk)
    }

    /// With channel quantizers, if keys may have some.
    fn chunk_bytes(&self, blocks: usize) -> u64 {
        let (dim, keys) = (self.head_dim, blocks * self.keys_per_block);
        let lanes = keys.next_multiple_of(PANEL);
        let piece_bytes = match (self.compressed, self.dtype) {
            (Some(compression), _) => {
                lanes * (compression.key_bytes(dim) + size_of::<f32>())
                    + keys * dim * size_of::<f16>()
                    + (dim + blocks + 1) * size_of::<f32>()
            }
            (None, DType::Int8) => lanes * (ChannelQuantizer::width(dim).next_multiple_of(QUAD) + size_of::<f32>()),
            (None, _) => lanes * dim * size_of::<f16>(),
        };
        (self.pieces() * piece_bytes) as u64
    }

    /// The shape of the keys of a tail of `tokens` tokens, which has no more keys than tokens.
    pub fn of_tail(self, tokens: usize) -> KeyLayout {
        KeyLayout { keys_per_block: self.keys_per_block.min(tokens), ..self }
    }

    /// Blocks that a chunk should hold when many are loaded at once.
    pub fn chunk_blocks(&self) -> usize {
        (CHUNK_KEYS_MAX / self.keys_per_block).max(1)
    }
}

impl Compression {
    /// Bytes of a key of D values in a panel, filling included.
    pub(super) fn key_bytes(self, dim: usize) -> usize {
        match self {
            Compression::Int8 => dim.next_multiple_of(QUAD),
            Compression::Int4 => dim.next_multiple_of(OCTET) / 2,
        }
    }
}
