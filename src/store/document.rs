//! What is stored: documents, the blocks that they consist of, and which may be appended.

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::place;
use crate::limits;
use crate::types::{CollectionId, DocumentId};

/// A document as of its last acknowledged change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub id: DocumentId,
    pub collection: CollectionId,
    pub name: String,
    /// Takes no more appends.
    pub sealed: bool,
    /// Full blocks.
    pub blocks: u32,
    /// Tokens after the last full block, 0 to B - 1; stored as block index `blocks`.
    pub tail_tokens: u32,
    /// Bytes of source text that the tokens cover.
    pub text_bytes: u64,
    /// Bytes of this document's records, this manifest included.
    pub stored_bytes: u64,
    /// What it keeps for its model.
    pub state: Option<KeptState>,
}

/// The state that a document keeps for its model: bytes that only the model understands, in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptState {
    /// Tokens of the document, from its first on, that it was taken after.
    pub tokens: u64,
    pub parts: u32,
    /// Of the records of its parts.
    pub bytes: u64,
    /// The sequence of these records: those of another state have another.
    pub sequence: u64,
}

/// The tokens of one block and the text they came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockMeta {
    pub token_ids: Vec<u32>,
    /// Where the block begins in the document's source text, in bytes.
    pub text_start: u64,
    pub text: Vec<u8>,
    /// Where each token begins in `text`: one per token.
    pub text_offsets: Vec<u32>,
}

/// One block to store: full, or a tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRecord {
    /// Position in the document, counted in blocks.
    pub index: u32,
    pub meta: BlockMeta,
    /// L * Hkv times what [`KeysLayout::encode`](super::piece::KeysLayout::encode) gives; empty for a tail.
    /// If a document has channel quantizers, they lie before the keys of the first.
    pub keys: Vec<u8>,
    /// L * Hkv times what [`PieceLayout::encode`](super::piece::PieceLayout::encode) gives, for the block's own number of tokens.
    pub pieces: Vec<u8>,
}

/// What the rule of appends looks at in a block, encoded or not.
#[derive(Clone, Copy, Debug)]
pub struct BlockExtent {
    /// Position in the document, counted in blocks.
    pub index: u32,
    pub tokens: usize,
    pub text_bytes: usize,
    pub text_offsets: usize,
}

/// How a block breaks the rule of [`check_blocks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// Another block comes next.
    Index { expected: u32 },
    /// The document would have `end` blocks, more than `limits::DOCUMENT_BLOCKS_MAX`.
    Blocks { end: u64 },
    /// Not B tokens, or, if it is the last, not 1 to B.
    Tokens { is_last: bool },
    /// More bytes of text than `limits::BLOCK_TEXT_BYTES_MAX`.
    TextBytes,
    /// Not one offset per token.
    TextOffsets,
}

/// The rule of appends: from block `first` on one follows the other, all have B tokens but the last, which has 1 to B, and each
/// token has one offset in its block's text. `block_tokens` is B.
///
/// # Errors
/// The place in `blocks` of the first block that breaks the rule, and how.
pub fn check_blocks(first: u32, block_tokens: usize, blocks: &[BlockExtent]) -> Result<(), (usize, Misfit)> {
    let end = first as u64 + blocks.len() as u64;
    if end > limits::DOCUMENT_BLOCKS_MAX as u64 {
        let fit = (limits::DOCUMENT_BLOCKS_MAX.saturating_sub(first) as usize).min(blocks.len().saturating_sub(1));
        return Err((fit, Misfit::Blocks { end }));
    }
    for (at, block) in blocks.iter().enumerate() {
        let expected = first + at as u32;
        let is_last = at + 1 == blocks.len();
        let least = if is_last { 1 } else { block_tokens };
        let misfit = if block.index != expected {
            Misfit::Index { expected }
        } else if block.tokens < least || block.tokens > block_tokens {
            Misfit::Tokens { is_last }
        } else if block.text_bytes > limits::BLOCK_TEXT_BYTES_MAX {
            Misfit::TextBytes
        } else if block.text_offsets != block.tokens {
            Misfit::TextOffsets
        } else {
            continue;
        };
        return Err((at, misfit));
    }
    Ok(())
}

impl BlockRecord {
    pub(super) fn extent(&self) -> BlockExtent {
        let BlockMeta { token_ids, text, text_offsets, .. } = &self.meta;
        let (tokens, text_bytes, text_offsets) = (token_ids.len(), text.len(), text_offsets.len());
        BlockExtent { index: self.index, tokens, text_bytes, text_offsets }
    }
}

impl KeptState {
    /// Whether its numbers are such as a state can have.
    pub(super) fn is_sound(&self) -> bool {
        (1..=limits::STATE_PARTS_MAX as u32).contains(&self.parts) && self.bytes < 2 * limits::STATE_BYTES_MAX
    }
}

impl Manifest {
    /// Whether what lies at place `index` is one of its full blocks, its tail, or a part of its state.
    pub(super) fn covers(&self, index: u32) -> bool {
        if let Some(part) = place::part_at(index) {
            return self.state.is_some_and(|state| part < state.parts);
        }
        index < self.blocks || index == self.blocks && self.tail_tokens > 0
    }

    /// Whether a block of so many tokens is as long as the tail, and in its place.
    pub fn is_tail(&self, index: u32, tokens: usize) -> bool {
        index == self.blocks && tokens == self.tail_tokens as usize
    }

    /// Whether new blocks may begin with block `index`.
    ///
    /// # Errors
    /// `Sealed`, or `OutOfOrder` if another block comes next.
    pub fn check_next(&self, index: u32) -> Result<(), StoreError> {
        if self.sealed {
            return Err(StoreError::Sealed);
        }
        if index != self.blocks {
            return Err(StoreError::OutOfOrder { expected: self.blocks, found: index });
        }
        Ok(())
    }
}
