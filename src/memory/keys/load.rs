//! How do landmark keys come out of the store? Chunk by chunk, as appends would have left them, for all layers or for one.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use crate::api::{MemoryError, Result};
use crate::index::{Chunk, DocumentKeys, KeyLayout, Keys};
use crate::lock::IgnorePoison;
use crate::lru::LruCache;
use crate::memory::collection::{Collection, Extent};
use crate::store::piece::{KeyData, KeysLayout, PieceLayout};
use crate::store::{Store, StoreError};
use crate::types::{BlockId, DocumentId};
use crate::until::Until;
use linalg::ChannelQuantizer;

/// Bytes of quantizers that are kept: those of some hundred documents that are appended to in turn. One that is not here is read
/// with the keys of the document's first block.
const QUANTIZERS_BYTES: u64 = 16 << 20;

/// By which the keys of documents are int8, of those that were asked for last.
pub(in crate::memory) struct Quantizers(Mutex<LruCache<DocumentId, Arc<[ChannelQuantizer]>>>);

impl Default for Quantizers {
    fn default() -> Quantizers {
        Quantizers(Mutex::new(LruCache::new(QUANTIZERS_BYTES)))
    }
}

impl Quantizers {
    pub(in crate::memory) fn forget(&self, document: DocumentId) {
        self.0.lock().ignore_poison().retain(|kept| *kept != document);
    }
}

/// Reads the keys of a collection's documents.
#[derive(Clone, Copy)]
pub(in crate::memory) struct Loader<'a> {
    pub(in crate::memory) store: &'a Store,
    pub(in crate::memory) quantizers: &'a Quantizers,
    pub(in crate::memory) collection: &'a Collection,
}

impl Loader<'_> {
    /// The quantizers `(L * Hkv)` of a document whose first block is durable; none if it has none.
    pub(in crate::memory) fn quantizers(&self, document: DocumentId) -> Result<Arc<[ChannelQuantizer]>> {
        let layout = KeysLayout::of(&self.collection.spec);
        if !layout.has_quantizers() {
            return Ok(Arc::default());
        }
        let kept = self.quantizers.0.lock().ignore_poison().get(document);
        if let Some(quantizers) = kept {
            return Ok(quantizers);
        }
        let block = BlockId { document, index: 0 };
        let bytes = self.store.read_keys(block)?;
        let quantizers: Arc<[ChannelQuantizer]> = layout.split_quantizers(&bytes).map_err(data_loss(block))?.0.into();
        let kept_bytes = quantizers_bytes(&self.collection.layout);
        self.quantizers.0.lock().ignore_poison().put(document, quantizers.clone(), kept_bytes);
        Ok(quantizers)
    }

    /// The keys of some first blocks, which must be durable, of those layers that `here` has, the first of which is
    /// `first_layer`. `here` are those of the first blocks that need not be read.
    pub(in crate::memory) fn load(
        &self,
        here: &DocumentKeys,
        first_layer: usize,
        document: DocumentId,
        extent: Extent,
        until: &Until,
    ) -> Result<DocumentKeys> {
        let layout = here.layout();
        let pieces = first_layer * layout.kv_heads..first_layer * layout.kv_heads + layout.pieces();
        let blocks = extent.full;
        let lacks_tail = extent.tail_tokens > 0 && !here.has_tail();
        let is_asked = blocks > here.blocks() || (lacks_tail && blocks > 0);
        let quantizers = if is_asked { self.quantizers(document)? } else { Arc::default() };
        let quantizers: Arc<[ChannelQuantizer]> = match quantizers.len() > layout.pieces() {
            true => quantizers[pieces.clone()].into(),
            false => quantizers,
        };
        let step = layout.chunk_blocks();
        let parts: Vec<Range<u32>> = (here.blocks()..blocks)
            .step_by(step)
            .map(|start| start..blocks.min(start.saturating_add(step as u32)))
            .collect();
        let chunk = |part: Range<u32>| {
            let mut chunk = Chunk::with_quantizers(layout, quantizers.clone(), part.len());
            for (i, index) in part.enumerate() {
                until.check()?;
                let block = BlockId { document, index };
                self.put(&mut chunk, i, &pieces, block, &self.store.read_keys(block)?)?;
            }
            Ok(chunk)
        };
        let chunks = parts.into_par_iter().map(chunk).collect::<Result<Vec<Chunk>>>()?;
        let keys = here.extended(chunks);
        if !lacks_tail {
            return Ok(keys);
        }
        until.check()?;
        let tail = BlockId { document, index: blocks };
        Ok(keys.with_tail(self.tail(layout, &pieces, tail, extent.tail_tokens as usize, quantizers)?))
    }

    /// The keys of a sealed document's tail. The store keeps none, because a tail may be replaced until then: they are made of its K as
    /// it is stored, so that they are the same whenever they are made. Without a full block the document has quantizers of these.
    fn tail(
        &self,
        layout: KeyLayout,
        pieces: &Range<usize>,
        block: BlockId,
        tokens: usize,
        quantizers: Arc<[ChannelQuantizer]>,
    ) -> Result<Chunk> {
        let (spec, dim) = (&self.collection.spec, layout.head_dim);
        let stored = PieceLayout { dtype: spec.payload_dtype, tokens, head_dim: dim };
        let mut bytes = Vec::new();
        let read = |piece: usize| {
            self.store.read_piece(block, piece, &mut bytes)?;
            stored.check(block, &bytes)?;
            let mut k = vec![0.0; tokens * dim];
            stored.decode_k(&bytes, &mut k);
            Ok(k)
        };
        let k = pieces.clone().map(read).collect::<Result<Vec<Vec<f32>>>>()?;
        let of_spec = KeysLayout::of(spec);
        let quantizers = match block.index == 0 && of_spec.has_quantizers() {
            true => k.iter().map(|k| ChannelQuantizer::fit(k, dim)).collect(),
            false => quantizers,
        };
        let layout = layout.of_tail(tokens);
        let of_tail = KeysLayout { keys: layout.keys_per_block, pieces: k.len(), ..of_spec };
        let mut encoded = Vec::with_capacity(of_tail.bytes(!quantizers.is_empty()));
        for (piece, k) in k.iter().enumerate() {
            of_tail.encode(&self.collection.landmark_keys(block.index, k), quantizers.get(piece), &mut encoded);
        }
        let mut chunk = Chunk::with_quantizers(layout, quantizers, 1);
        let decoded = of_tail.decode(chunk.has_quantizers(), &encoded).map_err(data_loss(block))?;
        put_pieces(&mut chunk, 0, decoded);
        Ok(chunk)
    }

    /// `here` with the keys of blocks that just became durable behind it, each as the store keeps them.
    pub(in crate::memory) fn appended(
        &self,
        here: &DocumentKeys,
        document: DocumentId,
        encoded: &[&[u8]],
    ) -> Result<DocumentKeys> {
        let mut chunk = Chunk::with_quantizers(here.layout(), self.quantizers(document)?, encoded.len());
        for (i, bytes) in encoded.iter().enumerate() {
            let block = BlockId { document, index: here.blocks() + i as u32 };
            self.put(&mut chunk, i, &(0..here.layout().pieces()), block, bytes)?;
        }
        Ok(here.extended([chunk]))
    }

    /// Sets the keys of one block and some pieces from the bytes that the store keeps of all.
    fn put(&self, chunk: &mut Chunk, at: usize, pieces: &Range<usize>, block: BlockId, bytes: &[u8]) -> Result<()> {
        let layout = KeysLayout::of(&self.collection.spec);
        let bytes = if block.index == 0 { layout.split_quantizers(bytes).map_err(data_loss(block))?.1 } else { bytes };
        let decoded = layout.decode(chunk.has_quantizers(), bytes).map_err(data_loss(block))?;
        put_pieces(chunk, at, decoded.skip(pieces.start).take(pieces.len()));
        Ok(())
    }
}

/// Sets the keys of one block, those of one piece after the other.
fn put_pieces<'a>(chunk: &mut Chunk, at: usize, pieces: impl Iterator<Item = KeyData<'a>>) {
    for (piece, values) in pieces.enumerate() {
        let keys = match &values {
            KeyData::F16(values) => Keys::F16(values),
            KeyData::Int8 { values, scales } => Keys::Int8 { values, scales },
        };
        chunk.put(at, piece, keys);
    }
}

/// Bytes of a document's quantizers: a factor for each channel and the index of each doubled one.
pub(super) fn quantizers_bytes(layout: &KeyLayout) -> u64 {
    (layout.pieces() * layout.head_dim * 5) as u64
}

/// For `map_err`: a block's bytes do not decode.
fn data_loss(block: BlockId) -> impl FnOnce(StoreError) -> MemoryError {
    move |error| MemoryError::DataLoss { block: Some(block), detail: error.to_string() }
}
