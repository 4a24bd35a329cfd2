//! How do blocks come in? Checked field by field, encoded, made durable, then visible to lookups.

use std::sync::Arc;

use rayon::prelude::*;

use super::collection::Collection;
use super::error::{at_most, invalid, writing};
use super::local::LocalMemory;
use super::work;
use crate::api::{AppendRequest, BlockText, DocumentInfo, MemoryError, NewBlock, Result, SequenceState, Tensor};
use crate::limits;
use crate::lock::IgnorePoison;
use crate::shape::CollectionSpec;
use crate::store::piece::{KeysLayout, PieceLayout};
use crate::store::{self, BlockExtent, BlockMeta, BlockRecord, Held, Manifest, Misfit};
use crate::types::{BlockId, DType, DocumentId};
use crate::until::Until;
use linalg::ChannelQuantizer;

impl LocalMemory {
    pub(super) fn append_blocks(&self, request: AppendRequest) -> Result<DocumentInfo> {
        let document = request.document;
        let collection = self.collection_of(self.store.manifest(document)?.collection)?;
        check_request(&collection, &request.blocks)?;
        // Encoded once more, and widened on the way; the largest block does not have to fit twice.
        let payload: usize = request.blocks.iter().map(|block| block.k.data.len() + block.v.data.len()).sum();
        let _taken = work::take(&self.work, (2 * payload as u64).min(self.work.limit()), &Until::FOREVER)?;

        // Encoded before the lock is taken, which is not held over work of the pool, and again where another writer was faster.
        loop {
            let manifest = self.store.manifest(document)?;
            let wanted = self.wanted(&collection, &manifest, &request.blocks)?;
            if wanted.is_empty() {
                return Ok(self.info(&collection, manifest));
            }
            check_length(&collection, &manifest, &request, &wanted)?;
            let records = self.encode_wanted(&collection, &manifest, &request.blocks, &wanted)?;
            if let Some(manifest) = self.write(&collection, &manifest, &records)? {
                return Ok(self.info(&collection, manifest));
            }
        }
    }

    /// The blocks at places `wanted` as the store keeps them, if they may be written.
    fn encode_wanted(
        &self,
        collection: &Collection,
        manifest: &Manifest,
        blocks: &[NewBlock],
        wanted: &[usize],
    ) -> Result<Vec<BlockRecord>> {
        let document = manifest.id;
        let new = wanted.iter().map(|&i| &blocks[i]).find(|block| block.index >= manifest.blocks);
        // A tail that is damaged is written again, sealed or not.
        if let Some(new) = new.filter(|new| !manifest.is_tail(new.index, new.token_ids.len())) {
            manifest.check_next(new.index).map_err(writing(document))?;
        }
        let quantizers = self.quantizers_for(collection, manifest, blocks, wanted)?;
        let encode = |&i: &usize| encode(collection, &blocks[i], &quantizers, i);
        wanted.par_iter().map(encode).collect()
    }

    /// The channel quantizers of the document that blocks at places `wanted` are written to.
    fn quantizers_for(
        &self,
        collection: &Collection,
        manifest: &Manifest,
        blocks: &[NewBlock],
        wanted: &[usize],
    ) -> Result<Arc<[ChannelQuantizer]>> {
        let first = wanted.first().copied().filter(|&i| blocks[i].index == 0);
        match first {
            Some(i) if manifest.blocks == 0 => first_quantizers(collection, &blocks[i], i),
            // Those that all its blocks share stay, if they can be read. From the same block follow the same.
            Some(i) => match self.loader(collection).quantizers(manifest.id) {
                Err(MemoryError::DataLoss { .. }) if self.has_quantizers(collection, manifest)? => {
                    first_quantizers(collection, &blocks[i], i)
                }
                Err(MemoryError::DataLoss { .. }) => Ok(Arc::default()),
                quantizers => quantizers,
            },
            None if manifest.blocks == 0 => Ok(Arc::default()),
            None => self.loader(collection).quantizers(manifest.id),
        }
    }

    /// Whether a document has channel quantizers, by the size of its second block: the format it was begun in may have had none.
    fn has_quantizers(&self, collection: &Collection, manifest: &Manifest) -> Result<bool> {
        let layout = KeysLayout::of(&collection.spec);
        if manifest.blocks < 2 || !layout.has_quantizers() {
            return Ok(true);
        }
        let keys = self.store.read_keys(BlockId { document: manifest.id, index: 1 })?;
        Ok(keys.len() == layout.bytes(true))
    }

    /// Makes records durable in place of damaged ones and behind what a document holds, and shows them to lookups; nothing if
    /// it is not as `before` any more.
    fn write(&self, collection: &Collection, before: &Manifest, records: &[BlockRecord]) -> Result<Option<Manifest>> {
        let document = before.id;
        let writer = self.writers.of(document);
        let _writing = writer.lock().ignore_poison();
        if self.store.manifest(document)? != *before {
            return Ok(None);
        }
        let manifest = self.store.append(document, records).map_err(writing(document))?;
        let mended = records.iter().take_while(|record| record.index < before.blocks).count();
        // What is written again may differ in its last bits: of a sealed document that may be the tail.
        if mended > 0 || before.sealed {
            self.forget_document(document);
        }
        let full = (manifest.blocks - before.blocks) as usize;
        let keys: Vec<&[u8]> = records[mended..].iter().take(full).map(|record| &record.keys[..]).collect();
        self.keys.extend(self.loader(collection), document, before.blocks, &keys)?;
        self.counters.appended_blocks.add(full);
        Ok(Some(manifest))
    }

    /// The places of blocks that have to be written: all but the first that are durable with these token ids and whole.
    fn wanted(&self, collection: &Collection, manifest: &Manifest, blocks: &[NewBlock]) -> Result<Vec<usize>> {
        let (document, block_tokens) = (manifest.id, collection.spec.shape.block_tokens as usize);
        let mut wanted = Vec::new();
        for (i, block) in blocks.iter().enumerate() {
            let is_tail = block.index == manifest.blocks && manifest.tail_tokens > 0;
            if block.index >= manifest.blocks && !is_tail {
                wanted.extend(i..blocks.len());
                break;
            }
            let Held { token_ids, damage } = self.store.held(BlockId { document, index: block.index })?;
            if is_tail {
                if damage.is_some() || token_ids.is_none_or(|held| !held.starts_with(&block.token_ids)) {
                    wanted.extend(i..blocks.len());
                    break;
                }
                continue;
            }
            // A repeated tail may meanwhile have grown, to a longer one or to a full block.
            if token_ids.is_some_and(|held| !held.starts_with(&block.token_ids)) {
                return Err(MemoryError::Conflict { document, index: block.index });
            }
            match damage {
                None => {}
                // It cannot be mended with a part of it.
                Some(damage) if block.token_ids.len() < block_tokens => return Err(damage.into()),
                Some(_) => wanted.push(i),
            }
        }
        Ok(wanted)
    }

    pub(super) fn keep_state(&self, document: DocumentId, state: &SequenceState) -> Result<DocumentInfo> {
        state.check()?;
        let collection = self.collection_of(self.store.manifest(document)?.collection)?;
        let writer = self.writers.of(document);
        let _writing = writer.lock().ignore_poison();
        let manifest = self.store.manifest(document)?;
        if manifest.sealed {
            return Err(MemoryError::Sealed { document });
        }
        let (expected, found) = (state.tokens, collection.tokens(&manifest));
        if expected != found {
            return Err(MemoryError::UnexpectedLength { document, expected, found });
        }
        let manifest = self.store.put_state(document, state.tokens, &state.parts).map_err(writing(document))?;
        Ok(self.info(&collection, manifest))
    }

    pub(super) fn seal_document(&self, document: DocumentId) -> Result<DocumentInfo> {
        let manifest = self.store.manifest(document)?;
        let collection = self.collection_of(manifest.collection)?;
        let writer = self.writers.of(document);
        let _writing = writer.lock().ignore_poison();
        let manifest = self.store.manifest(document)?;
        let manifest = if manifest.sealed { manifest } else { self.store.seal(document).map_err(writing(document))? };
        Ok(self.info(&collection, manifest))
    }
}

/// Checks that a document is as long as the caller thinks, not counting blocks of the request that it has: a tail that another writer
/// wrote behind them would be replaced unnoticed. Blocks that are only mended change no length.
fn check_length(collection: &Collection, manifest: &Manifest, request: &AppendRequest, wanted: &[usize]) -> Result<()> {
    let is_durable = |block: &NewBlock| block.index < manifest.blocks;
    let only_mends = wanted.iter().all(|&i| is_durable(&request.blocks[i]));
    let has_only_ours = request.blocks.first().is_some_and(is_durable) && manifest.tail_tokens == 0;
    let found = collection.tokens(manifest);
    match request.expected_tokens {
        Some(expected) if expected != found && !has_only_ours && !only_mends => {
            Err(MemoryError::UnexpectedLength { document: manifest.id, expected, found })
        }
        _ => Ok(()),
    }
}

/// Checks everything but the values themselves.
fn check_request(collection: &Collection, blocks: &[NewBlock]) -> Result<()> {
    let Some(first) = blocks.first() else { return Err(missing("blocks".into())) };
    at_most("blocks", limits::APPEND_BLOCKS_MAX as u64, blocks.len() as u64)?;
    let extent = |block: &NewBlock| BlockExtent {
        index: block.index,
        tokens: block.token_ids.len(),
        text_bytes: block.text.bytes.len(),
        text_offsets: block.text.offsets.len(),
    };
    let extents: Vec<BlockExtent> = blocks.iter().map(extent).collect();
    let shape = &collection.spec.shape;
    let block_tokens = shape.block_tokens as usize;
    store::check_blocks(first.index, block_tokens, &extents)
        .map_err(|(at, misfit)| refused(at, &extents[at], block_tokens, misfit))?;
    for (i, block) in blocks.iter().enumerate() {
        let field = |name: &str| format!("blocks[{i}].{name}");
        check_offsets(field("text.offsets"), &block.text)?;
        let shape = [shape.layers, shape.kv_heads, block.token_ids.len() as u32, shape.head_dim];
        check_tensor(field("k"), &block.k, &shape)?;
        check_tensor(field("v"), &block.v, &shape)?;
    }
    Ok(())
}

/// The error for a block of a request, by field.
fn refused(at: usize, block: &BlockExtent, block_tokens: usize, misfit: Misfit) -> MemoryError {
    let field = |name: &str| format!("blocks[{at}].{name}");
    let limit_exceeded = |what, limit, found| MemoryError::LimitExceeded { what, limit, found };
    match misfit {
        Misfit::Index { expected } => invalid(field("index"), expected, block.index),
        Misfit::Blocks { end } => {
            limit_exceeded("blocks of one document".into(), limits::DOCUMENT_BLOCKS_MAX as u64, end)
        }
        Misfit::Tokens { .. } if block.tokens == 0 => missing(field("token_ids")),
        Misfit::Tokens { is_last: true } => {
            invalid(field("token_ids"), format!("1 to {block_tokens} tokens"), block.tokens)
        }
        Misfit::Tokens { is_last: false } => {
            invalid(field("token_ids"), format!("{block_tokens} tokens"), block.tokens)
        }
        Misfit::TextBytes => {
            limit_exceeded(field("text.bytes"), limits::BLOCK_TEXT_BYTES_MAX as u64, block.text_bytes as u64)
        }
        Misfit::TextOffsets => {
            invalid(field("text.offsets"), format!("{} offsets, one per token", block.tokens), block.text_offsets)
        }
    }
}

fn check_offsets(field: String, text: &BlockText) -> Result<()> {
    if let Some(pair) = text.offsets.windows(2).find(|pair| pair[0] > pair[1]) {
        return Err(invalid(field, "offsets that do not decrease", format!("{} after {}", pair[1], pair[0])));
    }
    if let Some(&last) = text.offsets.last().filter(|&&last| last as usize > text.bytes.len()) {
        return Err(invalid(field, format!("at most {}", text.bytes.len()), last));
    }
    Ok(())
}

fn check_tensor(field: String, tensor: &Tensor, shape: &[u32]) -> Result<()> {
    if tensor.shape.is_empty() && tensor.data.is_empty() {
        return Err(missing(field));
    }
    tensor.check(&field, shape)
}

fn missing(field: String) -> MemoryError {
    MemoryError::Missing { field }
}

/// The largest number that storing in a dtype, and computing with it, does not turn into infinity.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f32(),
        DType::F32 | DType::BF16 | DType::Int8 => limits::NUMBER_MAX,
    }
}

/// The values `(L, Hkv, T, D)` of block `index` as f32, all of size `limit` or less.
fn values(field: String, index: u32, tensor: &Tensor, limit: f32) -> Result<Vec<f32>> {
    let values = tensor.to_f32()?;
    let Some(at) = values.iter().position(|number| number.is_nan() || number.abs() > limit) else {
        return Ok(values);
    };
    let axis = |axis: usize| tensor.shape.get(axis).map_or(1, |&count| count as usize).max(1);
    let (row, layer_rows) = (at / axis(3), axis(1) * axis(2));
    let (layer, head, token) = (row / layer_rows, row / axis(2) % axis(1), row % axis(2));
    let place = format!("block {index}, layer {layer}, KV head {head}, token {token}");
    Err(invalid(field, format!("finite numbers up to {limit:e}"), format!("{} in {place}", values[at])))
}

/// K `(L, Hkv, tokens, D)` of a checked block. `i` is its place in the request.
fn k_values(spec: &CollectionSpec, block: &NewBlock, i: usize) -> Result<Vec<f32>> {
    let limit = largest(spec.payload_dtype).min(largest(spec.key_dtype));
    values(format!("blocks[{i}].k"), block.index, &block.k, limit)
}

/// The channel quantizers `(L * Hkv)` of a document that begins with this block; none if its keys need none, or if it is a tail.
fn first_quantizers(collection: &Collection, block: &NewBlock, i: usize) -> Result<Arc<[ChannelQuantizer]>> {
    let spec = &collection.spec;
    let tokens = block.token_ids.len();
    if !KeysLayout::of(spec).has_quantizers() || tokens < spec.shape.block_tokens as usize {
        return Ok(Arc::default());
    }
    let (k, dim) = (k_values(spec, block, i)?, collection.layout.head_dim);
    Ok(k.chunks_exact(tokens * dim).map(|k| ChannelQuantizer::fit(k, dim)).collect())
}

/// One checked block as the store keeps it, by its document's quantizers. `i` is its place in the request.
pub(super) fn encode(
    collection: &Collection,
    block: &NewBlock,
    quantizers: &[ChannelQuantizer],
    i: usize,
) -> Result<BlockRecord> {
    let (spec, dim) = (&collection.spec, collection.layout.head_dim);
    let tokens = block.token_ids.len();
    let k = k_values(spec, block, i)?;
    let v = values(format!("blocks[{i}].v"), block.index, &block.v, largest(spec.payload_dtype))?;

    let layout = PieceLayout { dtype: spec.payload_dtype, tokens, head_dim: dim };
    let mut pieces = Vec::with_capacity(layout.bytes() * spec.shape.pieces());
    let is_full = tokens == spec.shape.block_tokens as usize;
    let keys_layout = KeysLayout::of(spec);
    let mut keys = Vec::new();
    if is_full && block.index == 0 && !quantizers.is_empty() {
        keys_layout.encode_quantizers(quantizers, &mut keys);
    }
    for (piece, (k, v)) in k.chunks_exact(tokens * dim).zip(v.chunks_exact(tokens * dim)).enumerate() {
        layout.encode(k, v, &mut pieces);
        if is_full {
            keys_layout.encode(&collection.landmark_keys(block.index, k), quantizers.get(piece), &mut keys);
        }
    }
    let meta = BlockMeta {
        token_ids: block.token_ids.clone(),
        text_start: block.text.start,
        text: block.text.bytes.clone(),
        text_offsets: block.text.offsets.clone(),
    };
    Ok(BlockRecord { index: block.index, meta, keys, pieces })
}
