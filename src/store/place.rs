//! What lies at a place of a document? Blocks first; behind all that a document can have, the parts of its state. They have a
//! kind of record of their own, and are written, found, copied and freed as blocks are.

use crate::limits;
use crate::types::{BlockId, DocumentId};

/// The place of part 0 of a state.
const STATE_FIRST: u32 = 1 << 31;
const _: () = assert!(limits::DOCUMENT_BLOCKS_MAX < STATE_FIRST);

/// The part of a state that lies at a place; `None` for a block.
pub(super) fn part_at(index: u32) -> Option<u32> {
    index.checked_sub(STATE_FIRST)
}

/// Where the first `parts` parts of a document's state lie.
pub(super) fn of_parts(document: DocumentId, parts: u32) -> impl Iterator<Item = BlockId> {
    (0..parts).map(move |part| of_part(document, part))
}

pub(super) fn of_part(document: DocumentId, part: u32) -> BlockId {
    BlockId { document, index: STATE_FIRST.saturating_add(part) }
}
