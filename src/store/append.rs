//! Appending blocks to a document: what is checked, and what the document is afterwards.

use super::catalog::{self, key};
use super::document::{BlockExtent, BlockRecord, Manifest, Misfit, check_blocks};
use super::error::{Entity, StoreError};
use super::piece::{KeysLayout, PieceLayout};
use super::record::{DocumentEntry, Locator, Parts, meta_bytes};
use super::state::Store;
use crate::limits;
use crate::shape::CollectionSpec;
use crate::types::{BlockId, DocumentId};

impl Store {
    /// Appends consecutive blocks; the last one, if it has fewer than B tokens, becomes the document's tail in place
    /// of the one it had. All of them are durable and visible when this returns, or none.
    ///
    /// The document's state stays, unless other tokens take the place of some that it was taken after.
    ///
    /// Blocks that the document already has are a `Conflict` if their token ids differ; else those that are damaged are
    /// written again, and the others skipped.
    pub fn append(&self, document: DocumentId, blocks: &[BlockRecord]) -> Result<Manifest, StoreError> {
        self.write(|writer| {
            let mut entry = self.entry(document)?;
            self.check_undoubted(document)?;
            let collection = entry.manifest.collection;
            let spec = self
                .collection(collection)?
                .ok_or(StoreError::NotFound { entity: Entity::Collection(collection) })?
                .spec;
            let (mends, new) = self.split_durable(&entry, &spec, blocks)?;
            if new.is_empty() && mends.blocks.is_empty() {
                return Ok(entry.manifest);
            }
            if let Some(first) = new.first() {
                entry.manifest.check_next(first.index)?;
            }
            let parts = check_records(&spec, entry.manifest.blocks, new)?;
            if !self.agrees_with_state(&entry, new)? {
                writer.may_have_much_dead = true;
                entry.set_state(None);
            }
            let bytes: u64 = parts.iter().map(Parts::record_bytes).sum();
            let old_tail_bytes = self.tail_bytes(&entry.manifest)?;
            grow(&mut entry, new, bytes, old_tail_bytes)?;

            self.make_room(writer, bytes + mends.bytes())?;
            self.commit(writer, |group| {
                mends.write(group, collection, &mut entry)?;
                for (block, parts) in new.iter().zip(&parts) {
                    group.block(collection, BlockId { document, index: block.index }, block, *parts)?;
                }
                if !new.is_empty() {
                    entry.tail_sequence = if entry.manifest.tail_tokens > 0 { group.number() } else { 0 };
                }
                group.document(entry.clone())
            })?;
            Ok(entry.manifest)
        })
    }

    /// Whether the tokens that the document's state was taken after are still there once `new` blocks are in place of its
    /// tail. Of a tail that cannot be read that is not known.
    fn agrees_with_state(&self, entry: &DocumentEntry, new: &[BlockRecord]) -> Result<bool, StoreError> {
        let Manifest { id: document, blocks: index, state, .. } = entry.manifest;
        let (Some(state), Some(first)) = (state, new.first()) else { return Ok(true) };
        let in_tail = state.tokens.saturating_sub(index as u64 * entry.block_tokens as u64) as usize;
        if in_tail == 0 {
            return Ok(true);
        }
        match self.read_meta(BlockId { document, index }) {
            Ok((tail, _)) => Ok(first.meta.token_ids.get(..in_tail) == tail.token_ids.get(..in_tail)),
            Err(StoreError::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn tail_bytes(&self, manifest: &Manifest) -> Result<u64, StoreError> {
        if manifest.tail_tokens == 0 {
            return Ok(0);
        }
        let tail = BlockId { document: manifest.id, index: manifest.blocks };
        let locator = catalog::get::<Locator>(&self.catalog, &key::block(tail))?;
        Ok(locator.map_or(0, |locator| locator.bytes()))
    }
}

/// What the document is once `new` blocks of `bytes` in all are in it.
fn grow(entry: &mut DocumentEntry, new: &[BlockRecord], bytes: u64, old_tail_bytes: u64) -> Result<(), StoreError> {
    let Some(last) = new.last() else { return Ok(()) };
    let manifest = &mut entry.manifest;
    let last_tokens = last.meta.token_ids.len() as u32;
    let ends_full = last_tokens == entry.block_tokens;
    manifest.blocks = last.index + ends_full as u32;
    manifest.tail_tokens = if ends_full { 0 } else { last_tokens };
    manifest.text_bytes =
        last.meta.text_start.checked_add(last.meta.text.len() as u64).ok_or_else(|| StoreError::Invalid {
            field: "text_start",
            expected: "a position in a text".into(),
            found: last.meta.text_start.to_string(),
        })?;
    manifest.stored_bytes = (manifest.stored_bytes + bytes).saturating_sub(old_tail_bytes);
    Ok(())
}

/// Checks that blocks may follow from block `first` on and have the sizes of their collection.
pub(super) fn check_records(
    spec: &CollectionSpec,
    first: u32,
    blocks: &[BlockRecord],
) -> Result<Vec<Parts>, StoreError> {
    let block_tokens = spec.shape.block_tokens as usize;
    let extents: Vec<BlockExtent> = blocks.iter().map(BlockRecord::extent).collect();
    check_blocks(first, block_tokens, &extents).map_err(|(at, misfit)| refused(&extents[at], block_tokens, misfit))?;
    blocks.iter().map(|block| check_sizes(spec, block)).collect()
}

fn refused(block: &BlockExtent, block_tokens: usize, misfit: Misfit) -> StoreError {
    let invalid = |field, expected: String, found: String| StoreError::Invalid { field, expected, found };
    match misfit {
        Misfit::Index { expected } => StoreError::OutOfOrder { expected, found: block.index },
        Misfit::Blocks { .. } => StoreError::OutOfOrder { expected: limits::DOCUMENT_BLOCKS_MAX, found: block.index },
        Misfit::Tokens { is_last } => {
            let expected = block.tokens.clamp(if is_last { 1 } else { block_tokens }, block_tokens);
            invalid("tokens of a block", expected.to_string(), block.tokens.to_string())
        }
        Misfit::TextBytes => {
            let expected = format!("at most {} bytes", limits::BLOCK_TEXT_BYTES_MAX);
            invalid("text of a block", expected, format!("{} bytes", block.text_bytes))
        }
        Misfit::TextOffsets => {
            invalid("text_offsets of a block", block.tokens.to_string(), block.text_offsets.to_string())
        }
    }
}

fn check_sizes(spec: &CollectionSpec, block: &BlockRecord) -> Result<Parts, StoreError> {
    let (shape, tokens) = (&spec.shape, block.meta.token_ids.len());
    let layout = PieceLayout { dtype: spec.payload_dtype, tokens, head_dim: shape.head_dim as usize };
    if tokens == shape.block_tokens as usize {
        KeysLayout::of(spec).check(block.index == 0, &block.keys)?;
    } else {
        exactly("bytes of keys of a block", 0, block.keys.len())?;
    }
    exactly("bytes of pieces of a block", shape.pieces() * layout.bytes(), block.pieces.len())?;
    // All of these are bounded by `limits`, far below 4 GiB.
    Ok(Parts {
        meta_bytes: meta_bytes(&block.meta) as u32,
        keys_bytes: block.keys.len() as u32,
        piece_bytes: layout.bytes() as u32,
        pieces: shape.pieces() as u32,
    })
}

pub(super) fn exactly(field: &'static str, expected: usize, found: usize) -> Result<(), StoreError> {
    if expected == found {
        return Ok(());
    }
    Err(StoreError::Invalid { field, expected: expected.to_string(), found: found.to_string() })
}
