//! Which blocks a sequence reads without choosing them.

use crate::api::DocumentInfo;
use crate::attention::trace::{AtHandReads, Place};
use crate::types::{BlockId, KeyRule};

/// Whether an earlier document has a tail that cannot be looked up. `rule` is the collection's.
pub(crate) fn has_tail_at_hand(document: &DocumentInfo, rule: KeyRule) -> bool {
    document.tail_tokens > 0 && document.eligible_blocks(rule) == document.blocks
}

/// What is at hand of `documents`, in the order of [`AtHand`](crate::attention::local::AtHand): the tails of those before the last
/// that cannot be looked up, the sink, and the last from block `windowed` on; and how many tokens each has.
pub(crate) fn at_hand(
    documents: &[&DocumentInfo],
    rule: KeyRule,
    sink: bool,
    windowed: u32,
    block_tokens: u32,
) -> (Vec<AtHandReads>, Vec<usize>) {
    let (mut blocks, mut tokens) = (Vec::new(), Vec::new());
    let mut push = |document: &DocumentInfo, index, place| {
        let is_tail = index == document.blocks;
        blocks.push(AtHandReads { block: BlockId { document: document.id, index }, place, mass: 0.0 });
        tokens.push(if is_tail { document.tail_tokens } else { block_tokens } as usize);
    };
    let Some((last, earlier)) = documents.split_last() else { return (blocks, tokens) };
    let tails = earlier.iter().filter(|document| has_tail_at_hand(document, rule));
    tails.for_each(|document| push(document, document.blocks, Place::Tail));
    if sink {
        push(documents[0], 0, Place::Sink);
    }
    let end = last.blocks + (last.tail_tokens > 0) as u32;
    (windowed..end).for_each(|index| push(last, index, Place::Window));
    (blocks, tokens)
}
