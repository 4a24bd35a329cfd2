//! What a sequence keeps at hand and what it asks the memory for.

use std::ops::Range;

use crate::types::{BlockRange, BlockScore, Granularity, Normalisation, Placement};
use crate::words;

/// The tokens that a query sees without retrieval, and how attention is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Tokens visible before the block that `counted_from` names, rounded up to full blocks.
    pub tokens: usize,
    /// The block that `tokens` are counted back from.
    pub counted_from: CountedFrom,
    /// Whether the first block of the text stays visible: models without landmark training need it
    /// (Xiao et al. 2023, attention sinks).
    pub sink: bool,
    /// Most tokens that go through the model at once, at least 1.
    pub chunk_tokens: usize,
    /// Of the local attention and of that over retrieved blocks.
    pub normalisation: Normalisation,
}

/// The block that the sliding window is counted back from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CountedFrom {
    /// The query's own block, so that chunks change no answer. A sequence that writes takes chunks of at most the window.
    Query,
    /// The block of the chunk's first token: a chunk is local to itself, and a token decoded alone sees its own block
    /// (the paper's inference, section 3.2).
    Chunk,
}

/// Which blocks are retrieved, and by which layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retrieval {
    /// k, the blocks per row of choices: 1 to [`TOP_K_MAX`](crate::limits::TOP_K_MAX).
    pub top_k: u32,
    /// How the m scores of a block become one.
    pub block_score: BlockScore,
    /// Which query tokens and heads choose blocks together.
    pub granularity: Granularity,
    /// The layers that retrieve.
    pub layers: Layers,
    /// Newest eligible blocks per document; older ones are not eligible. `None`: all.
    pub newest_blocks: Option<u32>,
    /// Where retrieved blocks stand, and the sink, of all layers.
    pub placement: Placement,
}

/// The layers that retrieve; the others see the window and the sink only.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layers {
    /// Every layer.
    All,
    /// Those whose entry is true; layers beyond the list do not retrieve.
    These(Vec<bool>),
}

words!(CountedFrom, "query" => Query, "chunk" => Chunk);

/// Default of [`Window::chunk_tokens`]: larger matrix products are no faster.
pub const CHUNK_TOKENS: usize = 512;

impl Default for Window {
    /// 512 tokens and a sink: what SmolLM2 was measured with.
    fn default() -> Self {
        Window {
            tokens: 512,
            counted_from: CountedFrom::Query,
            sink: true,
            chunk_tokens: CHUNK_TOKENS,
            normalisation: Normalisation::Plain,
        }
    }
}

impl Window {
    /// The window of landmark-trained models: a chunk is local to itself and reaches earlier blocks through their landmarks.
    pub fn landmark(chunk_tokens: usize) -> Self {
        Window {
            tokens: 0,
            counted_from: CountedFrom::Chunk,
            sink: false,
            chunk_tokens,
            normalisation: Normalisation::Grouped,
        }
    }

    /// Most tokens per chunk of a sequence that writes: a larger chunk could push blocks out of the window that are not in
    /// the memory yet.
    pub fn written_chunk_tokens(&self) -> usize {
        match self.counted_from {
            CountedFrom::Query => self.chunk_tokens.min(self.tokens),
            CountedFrom::Chunk => self.chunk_tokens,
        }
        .max(1)
    }
}

impl Default for Retrieval {
    /// For models without landmarks: log-sum-exp over token keys, one choice per token and KV head, 4 blocks.
    fn default() -> Self {
        Retrieval {
            top_k: 4,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::KvGroup,
            layers: Layers::All,
            newest_blocks: None,
            placement: Placement::Slots,
        }
    }
}

impl Retrieval {
    /// The paper's: one choice per query token and head, by one landmark key per block; 4 blocks.
    pub fn landmark() -> Self {
        Retrieval {
            top_k: 4,
            block_score: BlockScore::Max,
            granularity: Granularity::TokenHead,
            layers: Layers::All,
            newest_blocks: None,
            placement: Placement::Slots,
        }
    }

    /// What of a range may be retrieved from.
    pub(crate) fn newest(&self, range: BlockRange) -> BlockRange {
        let Range { start, end } = range.blocks;
        let first = self.newest_blocks.map_or(start, |newest| start.max(end.saturating_sub(newest)));
        BlockRange { document: range.document, blocks: first..end }
    }
}

impl Layers {
    /// Whether `layer`, counted from 0, retrieves.
    pub fn include(&self, layer: usize) -> bool {
        match self {
            Layers::All => true,
            Layers::These(layers) => layers.get(layer).copied().unwrap_or(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DocumentId;

    #[test]
    fn the_oldest_blocks_leave_first() {
        let newest = |newest_blocks, blocks: Range<u32>| {
            let retrieval = Retrieval { newest_blocks, ..Retrieval::default() };
            retrieval.newest(BlockRange { document: DocumentId(1), blocks }).blocks
        };
        assert_eq!(newest(None, 1..9), 1..9);
        assert_eq!(newest(Some(3), 1..9), 6..9);
        assert_eq!(newest(Some(30), 1..9), 1..9);
        assert_eq!(newest(Some(0), 1..9), 9..9);
    }
}
