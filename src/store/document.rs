//! What is stored: documents, and the blocks that they consist of.

use serde::{Deserialize, Serialize};

use crate::types::{CollectionId, DocumentId};

/// A document as of its last acknowledged change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// L * Hkv times what [`piece::KeysLayout::encode`] gives; empty for a tail. If a document's blocks have codes,
    /// they lie before the keys of the first.
    pub keys: Vec<u8>,
    /// L * Hkv times what [`piece::PieceLayout::encode`] gives, for the block's own number of tokens.
    pub pieces: Vec<u8>,
}

impl Manifest {
    /// Whether block `index` is one of its full blocks or its tail.
    pub(super) fn covers(&self, index: u32) -> bool {
        index < self.blocks || index == self.blocks && self.tail_tokens > 0
    }
}
