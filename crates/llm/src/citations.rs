//! What an answer was read from: blocks and their text.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::ask::Answer;
use landmarkdb::{BlockId, BlockMemory, BlockRange, DocumentInfo, HeadReads, MemoryError, Place, Reads};

/// A block that an answer was read from.
#[derive(Clone, Debug, PartialEq)]
pub struct Citation {
    /// The document's name.
    pub document: String,
    /// The id of its document, and its index there.
    pub block: BlockId,
    /// Retrieved from the memory, or a place at hand.
    pub from: ReadFrom,
    /// The block's part of all attention of prompt and answer, 0 to 1: over tokens, query heads and the layers that a memory has.
    /// What the shares of all citations leave out of 1 went to prompt and answer themselves. Of retrieved blocks an estimate: the scores of their
    /// keys divide the attention that they had together.
    pub share: f64,
    /// Which KV heads of which layers chose the block, and how often. Empty for blocks at hand, which all heads read.
    pub heads: Vec<HeadReads>,
    /// Where `text` begins in the document's source text, in bytes.
    pub text_start_bytes: u64,
    /// The source text. Characters that a block boundary cuts are replaced by U+FFFD.
    pub text: String,
}

/// Where a cited block was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// From the memory, chosen by some heads.
    Retrieved,
    /// At hand: the first block of the first document.
    Sink,
    /// At hand: tokens after the last full block of an earlier document, if they cannot be retrieved.
    Tail,
    /// At hand: the end of the last document.
    Window,
}

/// The blocks that an answer was read from: those that were retrieved, as [`Reads::retrieved`] sorts them, then those at hand: tails, the sink, the
/// window.
///
/// `memory` and `documents` are those that the question was asked of. The memory is called once for each run of consecutive
/// blocks of a document. Gaps between runs stay unread: damage there has no part in the answer and is no error.
///
/// # Errors
/// Those of [`BlockMemory::blocks`].
pub fn citations(
    answer: &Answer,
    memory: &dyn BlockMemory,
    documents: &[DocumentInfo],
) -> Result<Vec<Citation>, MemoryError> {
    let Reads { retrieved, at_hand, own_mass } = &answer.reads;
    let (reads, at_hand) = (retrieved.iter(), at_hand.iter());
    let blocks = reads.clone().map(|read| read.block).chain(at_hand.clone().map(|read| read.block));
    let texts = texts(memory, &blocks.collect())?;
    let masses = reads.clone().map(|read| read.mass).chain(at_hand.clone().map(|read| read.mass));
    let all = (masses.sum::<f64>() + own_mass).max(f64::MIN_POSITIVE);
    let cite = |block: BlockId, from, mass: f64| {
        let document = documents.iter().find(|document| document.id == block.document);
        let (text_start_bytes, text) = texts.get(&block).cloned().unwrap_or_default();
        Citation {
            document: document.map(|document| document.name.clone()).unwrap_or_default(),
            block,
            from,
            share: mass / all,
            heads: Vec::new(),
            text_start_bytes,
            text,
        }
    };
    let retrieved =
        reads.map(|read| Citation { heads: read.heads.clone(), ..cite(read.block, ReadFrom::Retrieved, read.mass) });
    Ok(retrieved.chain(at_hand.map(|read| cite(read.block, read.place.into(), read.mass))).collect())
}

/// Of each block where its text begins in the source text, in bytes, and the text.
fn texts(
    memory: &dyn BlockMemory,
    blocks: &BTreeSet<BlockId>,
) -> Result<BTreeMap<BlockId, (u64, String)>, MemoryError> {
    let mut texts = BTreeMap::new();
    for run in runs(blocks) {
        for info in memory.blocks(&run)? {
            texts.insert(info.id, (info.text.start, String::from_utf8_lossy(&info.text.bytes).into_owned()));
        }
    }
    Ok(texts)
}

/// Blocks as ranges of consecutive ones.
fn runs(blocks: &BTreeSet<BlockId>) -> Vec<BlockRange> {
    let mut runs: Vec<BlockRange> = Vec::new();
    for &BlockId { document, index } in blocks {
        match runs.last_mut() {
            Some(run) if run.document == document && run.blocks.end == index => run.blocks.end += 1,
            _ => runs.push(BlockRange { document, blocks: index..index + 1 }),
        }
    }
    runs
}

impl From<Place> for ReadFrom {
    fn from(place: Place) -> Self {
        match place {
            Place::Sink => ReadFrom::Sink,
            Place::Tail => ReadFrom::Tail,
            Place::Window => ReadFrom::Window,
        }
    }
}

impl fmt::Display for ReadFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ReadFrom::Retrieved => "retrieved",
            ReadFrom::Sink => "sink",
            ReadFrom::Tail => "tail",
            ReadFrom::Window => "window",
        })
    }
}

#[cfg(test)]
mod tests;
