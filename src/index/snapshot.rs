//! Chunks of blocks' keys that never change, shared by every snapshot that includes them.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use half::f16;

use super::compress::Compressed;
use super::layout::{CHUNK_KEYS_MAX, KeyLayout, NIBBLE_OFFSET, OCTET, PANEL, QUAD, Scanned};
use crate::lock::IgnorePoison;
use crate::types::DType;
use linalg::{ChannelQuantizer, simd};

/// The keys of one block for one layer and KV head, row-major.
#[derive(Clone, Copy, Debug)]
pub enum Keys<'a> {
    /// `(m, D)`
    F16(&'a [f16]),
    /// Values `(m, W)`, scales `(m)`. W is D unless the chunk has quantizers.
    Int8 { values: &'a [i8], scales: &'a [f32] },
}

/// Keys of some consecutive blocks, for all layers and KV heads.
#[derive(Debug)]
pub struct Chunk {
    layout: KeyLayout,
    blocks: usize,
    /// `(L * Hkv)`, equal in all chunks of a document, or none: how its keys became int8.
    quantizers: Arc<[ChannelQuantizer]>,
    data: ChunkData,
    /// Made on first use.
    copy: Mutex<Option<Copied>>,
}

/// The same keys in a GPU's memory, in the form that [`super::cuda`] gives them.
pub(super) type Copied = Arc<dyn Any + Send + Sync>;

#[derive(Debug)]
enum ChunkData {
    /// `(L * Hkv, panels, D, PANEL)`
    F16(Vec<f16>),
    /// Values `(L * Hkv, panels, W / 4, PANEL, 4)`, scales `(L * Hkv, panels, PANEL)`.
    Int8 {
        values: Vec<i8>,
        scales: Vec<f32>,
    },
    Compressed(Compressed),
}

/// Some panels of one layer and KV head.
#[derive(Clone, Copy, Debug)]
pub(super) enum KeyPanels<'a> {
    /// `(panels, D, PANEL)`
    F16(&'a [f16]),
    /// Values `(panels, W / 4, PANEL, 4)`, scales `(panels, PANEL)`.
    Int8 { values: &'a [i8], scales: &'a [f32] },
    /// Values `(panels, D / 8, PANEL, 4)`, two in a byte, scales `(panels, PANEL)`.
    Int4 { values: &'a [i8], scales: &'a [f32] },
}

/// All keys of one document's first blocks. Immutable: a longer document is a new value that shares the old chunks.
#[derive(Clone, Debug)]
pub struct DocumentKeys {
    layout: KeyLayout,
    /// Of full blocks, in their order.
    chunks: Vec<Arc<Chunk>>,
    blocks: u32,
    /// One block of fewer tokens behind all full ones, with a key count of its own.
    tail: Option<Arc<Chunk>>,
}

impl Chunk {
    /// A chunk whose keys are all zero, to be filled with [`Chunk::put`].
    pub fn zeroed(layout: KeyLayout, blocks: usize) -> Self {
        Chunk::with_quantizers(layout, Arc::default(), blocks)
    }

    /// The same for a document with channel quantizers `(L * Hkv)`, if it has any.
    pub fn with_quantizers(layout: KeyLayout, quantizers: Arc<[ChannelQuantizer]>, blocks: usize) -> Self {
        assert!(quantizers.is_empty() || (quantizers.len() == layout.pieces() && layout.dtype == DType::Int8));
        let keys = layout.pieces() * (blocks * layout.keys_per_block).next_multiple_of(PANEL);
        let count = keys * width(&layout, &quantizers).next_multiple_of(layout.quad());
        let data = match (layout.compressed, layout.dtype) {
            (Some(compression), _) => {
                let KeyLayout { head_dim, keys_per_block, .. } = layout;
                ChunkData::Compressed(Compressed::zeroed(
                    compression,
                    head_dim,
                    keys_per_block,
                    layout.pieces(),
                    blocks,
                ))
            }
            (None, DType::Int8) => ChunkData::Int8 { values: linalg::zeroed(count), scales: linalg::zeroed(keys) },
            (None, _) => ChunkData::F16(linalg::zeroed(count)),
        };
        Chunk { layout, blocks, quantizers, data, copy: Mutex::default() }
    }

    pub(super) fn layout(&self) -> KeyLayout {
        self.layout
    }

    /// Keys of each block: m, fewer in a tail.
    pub(super) fn keys_per_block(&self) -> usize {
        self.layout.keys_per_block
    }

    /// Whether keys are int8 by channel quantizers.
    pub fn has_quantizers(&self) -> bool {
        !self.quantizers.is_empty()
    }

    /// Values of one key that a scan reads.
    pub(super) fn width(&self) -> usize {
        width(&self.layout, &self.quantizers)
    }

    /// Blocks in this chunk.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Sets the keys of one block and piece. Panics if `keys` has another dtype or length than the layout says.
    pub fn put(&mut self, block: usize, piece: usize, keys: Keys<'_>) {
        let (dim, count) = (self.layout.head_dim, self.layout.keys_per_block);
        assert!(block < self.blocks && piece < self.layout.pieces());
        let at = self.lane(piece, block * count);
        match (&mut self.data, keys) {
            (ChunkData::F16(into), Keys::F16(values)) => {
                assert_eq!(values.len(), count * dim);
                at.scatter(values, into);
            }
            (ChunkData::Int8 { values: into, scales: scales_into }, Keys::Int8 { values, scales }) => {
                assert_eq!((values.len(), scales.len()), (count * at.dim, count));
                at.scatter(values, into);
                scales_into[piece * at.piece_keys + at.key..][..count].copy_from_slice(scales);
            }
            (ChunkData::Compressed(compressed), Keys::F16(values)) => compressed.put(block, piece, values),
            _ => panic!("keys of another dtype than the chunk's {}", self.layout.dtype),
        }
    }

    /// Makes the compressed form, once every key is there.
    fn compress(&mut self) {
        if let ChunkData::Compressed(compressed) = &mut self.data {
            compressed.finish();
        }
    }

    /// The keys before they were compressed, and how far scores from the compressed ones may be off; `None` if they are
    /// as stored.
    pub(super) fn compressed(&self) -> Option<&Compressed> {
        match &self.data {
            ChunkData::Compressed(compressed) => Some(compressed),
            ChunkData::F16(_) | ChunkData::Int8 { .. } => None,
        }
    }

    /// Projects queries `(rows, D)` onto the form of the keys that a scan reads `(rows, W)`.
    pub(super) fn project(&self, piece: usize, queries: &[f32]) -> Vec<f32> {
        let dim = self.layout.head_dim;
        if let Some(quantizer) = self.quantizers.get(piece) {
            let width = self.width();
            let mut projected = vec![0.0; queries.len() / dim * width];
            let rows = queries.chunks_exact(dim).zip(projected.chunks_exact_mut(width));
            rows.for_each(|(query, projected)| quantizer.project(query, projected));
            return projected;
        }
        let mut queries = queries.to_vec();
        if let Some(compressed) = self.compressed() {
            for row in queries.chunks_exact_mut(dim) {
                let channels = row.iter_mut().zip(compressed.channels(piece));
                channels.for_each(|(number, channel)| *number *= channel);
            }
        }
        queries
    }

    /// One key `(D)` as single-precision values.
    pub(super) fn key(&self, piece: usize, key: usize) -> Vec<f32> {
        let at = self.lane(piece, key);
        match &self.data {
            ChunkData::F16(values) => at.gather(values).map(f16::to_f32).collect(),
            ChunkData::Int8 { values, scales } => {
                let scale = scales[piece * self.piece_keys() + key];
                match self.quantizers.get(piece) {
                    Some(quantizer) => {
                        let mut wide = vec![0.0; self.layout.head_dim];
                        quantizer.decode(&at.gather(values).collect::<Vec<i8>>(), scale, &mut wide);
                        wide
                    }
                    None => at.gather(values).map(|number| number as f32 * scale).collect(),
                }
            }
            ChunkData::Compressed(compressed) => {
                let (block, key) = (key / self.layout.keys_per_block, key % self.layout.keys_per_block);
                let halves = &compressed.halves(piece, block)[key * self.layout.head_dim..][..self.layout.head_dim];
                halves.iter().map(|half| half.to_f32()).collect()
            }
        }
    }

    /// The place of the copy, which goes when the chunk goes. Locked while the copy is made, so that it is made once.
    pub(super) fn copy(&self) -> MutexGuard<'_, Option<Copied>> {
        self.copy.lock().ignore_poison()
    }

    /// The panels of all pieces.
    pub(super) fn all_panels(&self) -> KeyPanels<'_> {
        self.panels(0, 0..self.layout.pieces() * self.piece_keys() / PANEL)
    }

    /// Some panels of one piece.
    pub(super) fn panels(&self, piece: usize, panels: Range<usize>) -> KeyPanels<'_> {
        let first = piece * self.piece_keys() + panels.start * PANEL;
        let (keys, dim) = (first..first + panels.len() * PANEL, self.lane(piece, 0).padded);
        let values_at = keys.start * dim..keys.end * dim;
        match &self.data {
            ChunkData::F16(values) => KeyPanels::F16(&values[values_at]),
            ChunkData::Int8 { values, scales } => KeyPanels::Int8 { values: &values[values_at], scales: &scales[keys] },
            ChunkData::Compressed(compressed) => {
                let (values, scales) = compressed.panels(piece, panels);
                match self.layout.scanned() {
                    Scanned::Int4 => KeyPanels::Int4 { values, scales },
                    Scanned::Int8 | Scanned::F16 => KeyPanels::Int8 { values, scales },
                }
            }
        }
    }

    fn lane(&self, piece: usize, key: usize) -> Lane {
        let (dim, quad) = (self.width(), self.layout.quad());
        Lane { piece_keys: self.piece_keys(), dim, padded: dim.next_multiple_of(quad), quad, piece, key }
    }

    fn piece_keys(&self) -> usize {
        (self.blocks * self.layout.keys_per_block).next_multiple_of(PANEL)
    }

    fn bytes(&self) -> u64 {
        let bytes = match &self.data {
            ChunkData::F16(values) => size_of_val(values.as_slice()),
            ChunkData::Int8 { values, scales } => size_of_val(values.as_slice()) + size_of_val(scales.as_slice()),
            ChunkData::Compressed(compressed) => compressed.bytes(),
        };
        bytes as u64
    }

    /// One chunk that holds the blocks of `a`, then those of `b`.
    fn merged(a: &Chunk, b: &Chunk) -> Chunk {
        debug_assert_eq!(a.quantizers, b.quantizers, "chunks of one document");
        let mut merged = Chunk::with_quantizers(a.layout, a.quantizers.clone(), a.blocks + b.blocks);
        for piece in 0..a.layout.pieces() {
            merged.copy_piece(a, piece, 0);
            merged.copy_piece(b, piece, a.blocks * a.layout.keys_per_block);
        }
        merged.compress();
        merged
    }

    /// Copies one piece of `from` to where key `first_key` of this chunk lies.
    fn copy_piece(&mut self, from: &Chunk, piece: usize, first_key: usize) {
        let layout = self.layout;
        let first_block = first_key / layout.keys_per_block;
        if let Some(compressed) = from.compressed() {
            for block in 0..from.blocks {
                self.put(first_block + block, piece, Keys::F16(compressed.halves(piece, block)));
            }
            return;
        }
        for key in 0..from.blocks * layout.keys_per_block {
            let (source, target) = (from.lane(piece, key), self.lane(piece, first_key + key));
            match (&mut self.data, &from.data) {
                (ChunkData::F16(to), ChunkData::F16(values)) => target.copy(source, values, to),
                (ChunkData::Int8 { values: to, scales: to_scales }, ChunkData::Int8 { values, scales }) => {
                    target.copy(source, values, to);
                    to_scales[piece * target.piece_keys + target.key] = scales[piece * source.piece_keys + key];
                }
                _ => unreachable!("chunks of one document have one dtype"),
            }
        }
    }
}

fn width(layout: &KeyLayout, quantizers: &[ChannelQuantizer]) -> usize {
    if quantizers.is_empty() { layout.head_dim } else { ChannelQuantizer::width(layout.head_dim) }
}

/// Where one key lies in a chunk's values.
#[derive(Clone, Copy)]
struct Lane {
    /// Keys of one piece, filled up to whole panels.
    piece_keys: usize,
    /// Values of one key.
    dim: usize,
    /// `dim`, filled up to a multiple of `quad`.
    padded: usize,
    /// Dimensions that lie together.
    quad: usize,
    piece: usize,
    key: usize,
}

impl Lane {
    /// Index of the number of one dimension.
    fn at(self, d: usize) -> usize {
        let panel = (self.piece * self.piece_keys + self.key / PANEL * PANEL) * self.padded;
        panel + (d / self.quad * PANEL + self.key % PANEL) * self.quad + d % self.quad
    }

    fn gather<N: Copy>(self, values: &[N]) -> impl Iterator<Item = N> {
        (0..self.dim).map(move |d| values[self.at(d)])
    }

    /// Writes consecutive keys `(count, D)` from this one on.
    fn scatter<N: Copy>(self, keys: &[N], into: &mut [N]) {
        for (i, key) in keys.chunks_exact(self.dim).enumerate() {
            let lane = Lane { key: self.key + i, ..self };
            key.iter().enumerate().for_each(|(d, number)| into[lane.at(d)] = *number);
        }
    }

    fn copy<N: Copy>(self, source: Lane, from: &[N], into: &mut [N]) {
        (0..self.dim).for_each(|d| into[self.at(d)] = from[source.at(d)]);
    }
}

impl DocumentKeys {
    /// The keys of no block.
    pub fn empty(layout: KeyLayout) -> Self {
        DocumentKeys { layout, chunks: Vec::new(), blocks: 0, tail: None }
    }

    pub fn layout(&self) -> KeyLayout {
        self.layout
    }

    /// Full blocks whose keys are here: the document's first ones.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether the keys of the tail are here, which is block `blocks`.
    pub fn has_tail(&self) -> bool {
        self.tail.is_some()
    }

    /// A chunk, for what is equal in all of them.
    pub(super) fn first(&self) -> Option<&Chunk> {
        self.all_chunks().next()
    }

    fn all_chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().chain(&self.tail).map(|chunk| &**chunk)
    }

    /// A chunk with the document's quantizers, if it has any.
    pub(super) fn chunk_with_quantizers(&self) -> Option<&Chunk> {
        self.first().filter(|chunk| chunk.has_quantizers())
    }

    /// Bytes of keys held.
    pub fn bytes(&self) -> u64 {
        self.all_chunks().map(Chunk::bytes).sum()
    }

    /// This document with more blocks at its end. Old chunks are shared, not copied, except that small ones at the
    /// end grow together: their sizes stay a falling geometric series, so that appending block by block copies each
    /// key a logarithmic number of times and leaves few chunks.
    pub fn extended(&self, chunks: impl IntoIterator<Item = Chunk>) -> Self {
        let mut longer = self.clone();
        for mut chunk in chunks {
            debug_assert_eq!(chunk.layout, self.layout);
            chunk.compress();
            longer.blocks += chunk.blocks as u32;
            longer.chunks.push(Arc::new(chunk));
            longer.merge_small();
        }
        longer
    }

    /// This document, all of whose full blocks are here, with the keys of its tail: one block of the shape that
    /// [`KeyLayout::of_tail`] gives.
    pub fn with_tail(&self, mut tail: Chunk) -> Self {
        debug_assert_eq!((tail.layout, tail.blocks), (self.layout.of_tail(tail.keys_per_block()), 1));
        tail.compress();
        DocumentKeys { tail: Some(Arc::new(tail)), ..self.clone() }
    }

    fn merge_small(&mut self) {
        while let [.., a, b] = self.chunks.as_slice() {
            let keys = (a.blocks + b.blocks) * self.layout.keys_per_block;
            if keys > CHUNK_KEYS_MAX || a.blocks >= 2 * b.blocks {
                break;
            }
            let merged = Arc::new(Chunk::merged(a, b));
            self.chunks.truncate(self.chunks.len() - 2);
            self.chunks.push(merged);
        }
    }

    /// The chunks that hold a range of blocks, each with the blocks wanted of it, counted from its own first.
    pub(super) fn parts(&self, blocks: Range<u32>) -> impl Iterator<Item = (&Chunk, Range<usize>)> {
        let mut first = 0;
        let (start, end) = (blocks.start as usize, blocks.end as usize);
        self.all_chunks().filter_map(move |chunk| {
            let part = start.max(first)..end.min(first + chunk.blocks);
            let inside = part.start.wrapping_sub(first)..part.end.wrapping_sub(first);
            first += chunk.blocks;
            (part.start < part.end).then_some((chunk, inside))
        })
    }
}

impl KeyPanels<'_> {
    /// The same panels as single-precision values `(panels, D, PANEL)`, scales not yet applied.
    pub(super) fn widen(self, dim: usize, into: &mut [f32]) {
        match self {
            KeyPanels::F16(values) => linalg::widen_f16(values, into),
            KeyPanels::Int8 { values, .. } => {
                let panels = values.chunks_exact(dim.next_multiple_of(QUAD) * PANEL);
                for (values, into) in panels.zip(into.chunks_exact_mut(dim * PANEL)) {
                    widen_quads(values, into);
                }
            }
            KeyPanels::Int4 { values, .. } => {
                let panels = values.chunks_exact(dim.next_multiple_of(OCTET) / 2 * PANEL);
                for (values, into) in panels.zip(into.chunks_exact_mut(dim * PANEL)) {
                    widen_octets(values, into);
                }
            }
        }
    }
}

simd! {
    /// One panel `(D / 4, PANEL, 4)` to `(D, PANEL)`.
    fn widen_quads(values: &[i8], into: &mut [f32]) {
        for (quads, rows) in values.as_chunks::<{ PANEL * QUAD }>().0.iter().zip(into.chunks_mut(PANEL * QUAD)) {
            for (d, row) in rows.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
                for (number, quad) in row.iter_mut().zip(quads.as_chunks::<QUAD>().0) {
                    // The d-th byte, with its sign.
                    *number = (i32::from_le_bytes(quad.map(i8::cast_unsigned)) << (24 - 8 * d) >> 24) as f32;
                }
            }
        }
    }
}

simd! {
    /// One panel `(D / 8, PANEL, 4)` of pairs to `(D, PANEL)`.
    fn widen_octets(values: &[i8], into: &mut [f32]) {
        for (pairs, rows) in values.as_chunks::<{ PANEL * QUAD }>().0.iter().zip(into.chunks_mut(PANEL * OCTET)) {
            for (d, row) in rows.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
                let shift = d % QUAD * 8 + d / QUAD * 4;
                for (number, pair) in row.iter_mut().zip(pairs.as_chunks::<QUAD>().0) {
                    let pair = u32::from_le_bytes(pair.map(i8::cast_unsigned));
                    *number = ((pair >> shift & 0xf) as i32 - NIBBLE_OFFSET) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Compression;
    use super::*;

    fn layout(keys_per_block: usize) -> KeyLayout {
        KeyLayout { layers: 1, kv_heads: 2, head_dim: 3, keys_per_block, dtype: DType::F16, compressed: None }
    }

    /// A chunk in which every number names its block, piece, key and dimension.
    fn chunk(layout: KeyLayout, first_block: usize, blocks: usize) -> Chunk {
        let mut chunk = Chunk::zeroed(layout, blocks);
        for block in 0..blocks {
            for piece in 0..layout.pieces() {
                let keys: Vec<f16> = (0..layout.keys_per_block)
                    .flat_map(|key| (0..layout.head_dim).map(move |d| (key, d)))
                    .map(|(key, d)| f16::from_f32(number(first_block + block, piece, key, d)))
                    .collect();
                chunk.put(block, piece, Keys::F16(&keys));
            }
        }
        chunk
    }

    fn number(block: usize, piece: usize, key: usize, d: usize) -> f32 {
        (block % 97 * 10 + piece * 5 + d) as f32 + key as f32 / 8.0
    }

    #[test]
    fn growing_block_by_block_keeps_every_key_in_few_chunks_and_leaves_old_snapshots_alone() {
        for (keys_per_block, compressed) in [(1, None), (5, None), (64, None), (5, Some(Compression::Int4))] {
            let layout = KeyLayout { compressed, ..layout(keys_per_block) };
            let blocks = 3 * layout.chunk_blocks() + 7;
            let mut keys = DocumentKeys::empty(layout);
            let mut old = Vec::new();
            for block in 0..blocks {
                keys = keys.extended([chunk(layout, block, 1)]);
                if block % 50 == 0 {
                    old.push(keys.clone());
                }
            }
            assert_eq!(keys.blocks() as usize, blocks);
            let bound = 2 * blocks.div_ceil(layout.chunk_blocks()) + layout.chunk_blocks().ilog2() as usize + 1;
            assert!(keys.chunks.len() <= bound, "{} chunks of {blocks} blocks", keys.chunks.len());

            for snapshot in old.iter().chain([&keys]) {
                let mut block = 0;
                for (chunk, part) in snapshot.parts(0..snapshot.blocks()) {
                    for (within, piece) in part.flat_map(|within| [(within, 0), (within, 1)]) {
                        for key in 0..keys_per_block {
                            let want: Vec<f32> =
                                (0..3).map(|d| f16::from_f32(number(block + within, piece, key, d)).to_f32()).collect();
                            assert_eq!(chunk.key(piece, within * keys_per_block + key), want);
                        }
                    }
                    block += chunk.blocks();
                }
                assert_eq!(block as u32, snapshot.blocks());
            }
        }
    }

    #[test]
    fn keys_take_no_more_than_is_foretold() {
        let of = |dtype, compressed, keys_per_block| KeyLayout { dtype, compressed, ..layout(keys_per_block) };
        for layout in [
            of(DType::F16, None, 1),
            of(DType::F16, None, 5),
            of(DType::F16, Some(Compression::Int8), 5),
            of(DType::F16, Some(Compression::Int4), 64),
            of(DType::Int8, None, 5),
        ] {
            let quantizers: Arc<[ChannelQuantizer]> = match layout.dtype {
                DType::Int8 => (0..2).map(|_| ChannelQuantizer::fit(&[1.0; 3], 3)).collect(),
                _ => Arc::default(),
            };
            for blocks in [0, 1, layout.chunk_blocks(), 2 * layout.chunk_blocks() + 3] {
                let parts = (0..blocks).step_by(layout.chunk_blocks());
                let chunks = parts.map(|first| {
                    Chunk::with_quantizers(layout, quantizers.clone(), layout.chunk_blocks().min(blocks - first))
                });
                let (held, foretold) =
                    (DocumentKeys::empty(layout).extended(chunks).bytes(), layout.bytes(blocks as u32));
                assert!(held <= foretold && foretold <= held + held / 8 + 64, "{layout:?}: {held} of {foretold}");
            }
        }
    }

    #[test]
    fn a_tail_is_one_block_behind_all_others_with_keys_of_its_own_number() {
        for compressed in [None, Some(Compression::Int8)] {
            let layout = KeyLayout { compressed, ..layout(5) };
            for full in [0, 3] {
                let keys = DocumentKeys::empty(layout).extended((full > 0).then(|| chunk(layout, 0, full)));
                let longer = keys.with_tail(chunk(layout.of_tail(2), full, 1));
                assert_eq!((longer.blocks() as usize, longer.has_tail(), keys.has_tail()), (full, true, false));
                let parts: Vec<_> = longer.parts(0..full as u32 + 1).collect();
                let counts: Vec<_> = parts.iter().map(|(chunk, part)| (chunk.keys_per_block(), part.clone())).collect();
                let of_full = (full > 0).then_some((5, 0..full));
                assert_eq!(counts, of_full.into_iter().chain([(2, 0..1)]).collect::<Vec<_>>());
                let want: Vec<f32> = (0..3).map(|d| f16::from_f32(number(full, 1, 1, d)).to_f32()).collect();
                assert_eq!(parts.last().unwrap().0.key(1, 1), want);
                assert!(longer.bytes() > keys.bytes() && longer.bytes() <= layout.bytes(full as u32) + layout.bytes(1));
            }
        }
    }

    #[test]
    fn parts_cover_a_range_once() {
        let layout = layout(1);
        let keys = DocumentKeys::empty(layout).extended([5, 2, 1].map(|blocks| chunk(layout, 0, blocks)));
        assert_eq!(keys.chunks.len(), 3);
        let parts = |range| keys.parts(range).map(|(chunk, part)| (chunk.blocks(), part)).collect::<Vec<_>>();
        assert_eq!(parts(0..8), [(5, 0..5), (2, 0..2), (1, 0..1)]);
        assert_eq!(parts(3..6), [(5, 3..5), (2, 0..1)]);
        assert_eq!(parts(5..5), []);
        assert_eq!(parts(7..8), [(1, 0..1)]);
    }
}
