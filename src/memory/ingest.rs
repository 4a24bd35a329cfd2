//! How do blocks come in? Checked field by field, encoded, made durable, then visible to lookups.

use std::sync::{Arc, PoisonError};

use rayon::prelude::*;

use super::error::{at_most, invalid, writing};
use super::{Collection, LocalMemory};
use crate::api::{AppendRequest, BlockText, DocumentInfo, MemoryError, NewBlock, Result, Tensor};
use crate::limits;
use crate::numeric::{self, ChannelCode};
use crate::shape::CollectionSpec;
use crate::store::piece::{KeysLayout, PieceLayout};
use crate::store::{BlockMeta, BlockRecord, Manifest};
use crate::types::{BlockId, DType, DocumentId, KeyRule};
use crate::until::Until;

impl LocalMemory {
    pub(super) fn append_blocks(&self, request: AppendRequest) -> Result<DocumentInfo> {
        let document = request.document;
        let collection = self.collection_of(self.store.manifest(document)?.collection)?;
        check_request(&collection, &request.blocks)?;
        // Encoded once more, and widened on the way; the largest block does not have to fit twice.
        let payload: usize = request.blocks.iter().map(|block| block.k.data.len() + block.v.data.len()).sum();
        let _taken = self.take((2 * payload as u64).min(self.work.limit()), &Until::FOREVER)?;

        // Encoded before the lock is taken, which is not held over work of the pool, and again where another writer was faster.
        loop {
            let manifest = self.store.manifest(document)?;
            let skipped = self.durable(&manifest, &request.blocks)?;
            if skipped == request.blocks.len() {
                return Ok(self.info(&collection, manifest));
            }
            let records = self.encode_new(&collection, &manifest, &request.blocks, skipped)?;
            if let Some(manifest) = self.write(&collection, &manifest, &records)? {
                return Ok(self.info(&collection, manifest));
            }
        }
    }

    /// The blocks behind the first `skipped` as the store keeps them, if they may come next.
    fn encode_new(
        &self,
        collection: &Collection,
        manifest: &Manifest,
        blocks: &[NewBlock],
        skipped: usize,
    ) -> Result<Vec<BlockRecord>> {
        let (document, new) = (manifest.id, &blocks[skipped..]);
        if manifest.sealed {
            return Err(MemoryError::Sealed { document });
        }
        if new[0].index != manifest.blocks {
            return Err(MemoryError::OutOfOrder { document, expected: manifest.blocks, found: new[0].index });
        }
        let codes = match manifest.blocks {
            0 => first_codes(collection, &new[0], skipped)?,
            _ => self.loader(collection).codes(document)?,
        };
        let encode = |(i, block)| encode(collection, block, &codes, skipped + i);
        new.par_iter().enumerate().map(encode).collect()
    }

    /// Makes records durable behind what a document holds, and shows them to lookups; nothing if it is not as `before` any more.
    fn write(&self, collection: &Collection, before: &Manifest, records: &[BlockRecord]) -> Result<Option<Manifest>> {
        let document = before.id;
        let writer = self.writers.of(document);
        let _writing = writer.lock().unwrap_or_else(PoisonError::into_inner);
        if self.store.manifest(document)? != *before {
            return Ok(None);
        }
        let manifest = self.store.append(document, records).map_err(writing(document))?;
        let full = (manifest.blocks - before.blocks) as usize;
        let keys: Vec<&[u8]> = records.iter().take(full).map(|record| &record.keys[..]).collect();
        self.keys.extend(self.loader(collection), document, before.blocks, &keys)?;
        self.counters.appended_blocks.add(full);
        Ok(Some(manifest))
    }

    /// How many of the first blocks are durable with these token ids.
    fn durable(&self, manifest: &Manifest, blocks: &[NewBlock]) -> Result<usize> {
        for (i, block) in blocks.iter().enumerate() {
            let is_tail = block.index == manifest.blocks && manifest.tail_tokens > 0;
            if block.index >= manifest.blocks && !is_tail {
                return Ok(i);
            }
            let id = BlockId { document: manifest.id, index: block.index };
            let (stored, _) = self.store.read_meta(id)?;
            if is_tail && stored.token_ids != block.token_ids {
                return Ok(i);
            }
            // A repeated tail may meanwhile have grown to a full block.
            if !stored.token_ids.starts_with(&block.token_ids) {
                return Err(MemoryError::Conflict { document: manifest.id, index: block.index });
            }
        }
        Ok(blocks.len())
    }

    pub(super) fn seal_document(&self, document: DocumentId) -> Result<DocumentInfo> {
        let manifest = self.store.manifest(document)?;
        let collection = self.collection_of(manifest.collection)?;
        let writer = self.writers.of(document);
        let _writing = writer.lock().unwrap_or_else(PoisonError::into_inner);
        let manifest = self.store.manifest(document)?;
        let manifest = if manifest.sealed { manifest } else { self.store.seal(document).map_err(writing(document))? };
        Ok(self.info(&collection, manifest))
    }
}

/// Checks everything but the numbers themselves.
fn check_request(collection: &Collection, blocks: &[NewBlock]) -> Result<()> {
    let Some(first) = blocks.first() else { return Err(missing("blocks".into())) };
    at_most("blocks", limits::APPEND_BLOCKS_MAX as u64, blocks.len() as u64)?;
    let end = first.index as u64 + blocks.len() as u64;
    at_most("blocks of one document", limits::DOCUMENT_BLOCKS_MAX as u64, end)?;

    let block_tokens = collection.spec.shape.block_tokens as usize;
    for (i, block) in blocks.iter().enumerate() {
        let field = |name: &str| format!("blocks[{i}].{name}");
        let expected = first.index + i as u32;
        if block.index != expected {
            return Err(invalid(field("index"), expected, block.index));
        }
        let tokens = block.token_ids.len();
        if tokens == 0 {
            return Err(missing(field("token_ids")));
        }
        let is_last = i + 1 == blocks.len();
        if tokens > block_tokens || (tokens < block_tokens && !is_last) {
            let expected =
                if is_last { format!("1 to {block_tokens} tokens") } else { format!("{block_tokens} tokens") };
            return Err(invalid(field("token_ids"), expected, tokens));
        }
        check_text(&field("text"), &block.text, tokens)?;
        let shape = &collection.spec.shape;
        let shape = [shape.layers, shape.kv_heads, tokens as u32, shape.head_dim];
        check_tensor(field("k"), &block.k, &shape)?;
        check_tensor(field("v"), &block.v, &shape)?;
    }
    Ok(())
}

fn check_text(field: &str, text: &BlockText, tokens: usize) -> Result<()> {
    at_most(&format!("{field}.bytes"), limits::BLOCK_TEXT_BYTES_MAX as u64, text.bytes.len() as u64)?;
    let field = format!("{field}.offsets");
    if text.offsets.len() != tokens {
        return Err(invalid(field, format!("{tokens} offsets, one per token"), text.offsets.len()));
    }
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

/// The largest number that storing in a dtype does not turn into infinity.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F32 | DType::Int8 => f32::MAX,
        DType::F16 => half::f16::MAX.to_f32(),
        DType::BF16 => half::bf16::MAX.to_f32(),
    }
}

/// The numbers `(L, Hkv, tokens, D)` as f32, all of size `limit` or less.
fn numbers(field: String, tensor: &Tensor, limit: f32) -> Result<Vec<f32>> {
    let numbers = tensor.to_f32()?;
    match numbers.iter().find(|number| !number.is_finite() || number.abs() > limit) {
        None => Ok(numbers),
        Some(bad) => Err(invalid(field, format!("finite numbers up to {limit:e}"), bad)),
    }
}

/// K `(L, Hkv, T, D)` of a checked block. `i` is its place in the request.
fn k_numbers(spec: &CollectionSpec, block: &NewBlock, i: usize) -> Result<Vec<f32>> {
    numbers(format!("blocks[{i}].k"), &block.k, largest(spec.payload_dtype).min(largest(spec.key_dtype)))
}

/// The codes `(L * Hkv)` of a document that begins with this block; none if its keys need none, or if it is a tail.
fn first_codes(collection: &Collection, block: &NewBlock, i: usize) -> Result<Arc<[ChannelCode]>> {
    let spec = &collection.spec;
    let tokens = block.token_ids.len();
    if !KeysLayout::of(spec).has_codes() || tokens < spec.shape.block_tokens as usize {
        return Ok(Arc::default());
    }
    let (k, dim) = (k_numbers(spec, block, i)?, collection.layout.head_dim);
    Ok(k.chunks_exact(tokens * dim).map(|k| ChannelCode::of(k, dim)).collect())
}

/// One checked block as the store keeps it, by the codes of its document. `i` is its place in the request.
pub(super) fn encode(
    collection: &Collection,
    block: &NewBlock,
    codes: &[ChannelCode],
    i: usize,
) -> Result<BlockRecord> {
    let (spec, dim) = (&collection.spec, collection.layout.head_dim);
    let tokens = block.token_ids.len();
    let k = k_numbers(spec, block, i)?;
    let v = numbers(format!("blocks[{i}].v"), &block.v, largest(spec.payload_dtype))?;

    let layout = PieceLayout { dtype: spec.payload_dtype, tokens, head_dim: dim };
    let mut pieces = Vec::with_capacity(layout.bytes() * spec.shape.pieces());
    let is_full = tokens == spec.shape.block_tokens as usize;
    let keys_layout = KeysLayout::of(spec);
    let mut keys = Vec::new();
    if is_full && block.index == 0 && !codes.is_empty() {
        keys_layout.encode_codes(codes, &mut keys);
    }
    for (piece, (k, v)) in k.chunks_exact(tokens * dim).zip(v.chunks_exact(tokens * dim)).enumerate() {
        layout.encode(k, v, &mut pieces);
        if is_full {
            keys_layout.encode(&landmark_keys(spec.key_rule, k, dim), codes.get(piece), &mut keys);
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

/// What stands for the token keys `(B, D)` of one layer and KV head: `(m, D)`.
fn landmark_keys(rule: KeyRule, k: &[f32], dim: usize) -> Vec<f32> {
    match rule {
        KeyRule::Tokens => k.to_vec(),
        KeyRule::Landmark => k[k.len() - dim..].to_vec(),
        KeyRule::Mean => {
            let mut mean = vec![0.0; dim];
            let share = dim as f32 / k.len() as f32;
            k.chunks_exact(dim).for_each(|key| numeric::add_scaled(&mut mean, share, key));
            mean
        }
    }
}
