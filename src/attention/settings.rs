//! What a sequence keeps at hand and what it asks the memory for.

use crate::types::{BlockScore, Granularity, Normalisation};
use crate::words;

/// What a query sees without retrieval, and how attention is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Full blocks that make up this many tokens (rounded up to whole blocks) are visible before the block that
    /// `counted_from` says.
    pub tokens: usize,
    pub counted_from: CountedFrom,
    /// Whether the first block of the text stays visible: models without landmark training need it
    /// (Xiao et al. 2023, attention sinks).
    pub sink: bool,
    /// Most tokens that go through the model at once.
    pub chunk_tokens: usize,
    /// Of the local attention and of that over retrieved blocks.
    pub normalisation: Normalisation,
}

/// Where the window of a query is counted back from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountedFrom {
    /// The block that the query is in, so that it does not matter how tokens are grouped into chunks. While a
    /// sequence is written, a chunk is at most the window.
    Query,
    /// The block that the first token of its chunk is in: a chunk is local to itself, and a token that is decoded
    /// alone sees its own block (the paper's inference, section 3.2).
    Chunk,
}

/// What is retrieved, and how it is attended to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retrieval {
    /// k
    pub top_k: u32,
    pub block_score: BlockScore,
    pub granularity: Granularity,
    pub layers: Layers,
    /// Only this many of a document's newest blocks are retrieved from; the oldest leave. `None`: all.
    pub newest_blocks: Option<u32>,
}

/// The layers that retrieve; the others see the window and the sink only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layers {
    All,
    /// Those whose entry is true; layers beyond the list do not retrieve.
    These(Vec<bool>),
}

words!(CountedFrom, "query" => Query, "chunk" => Chunk);

/// Past this, larger products are no faster.
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
    /// What a landmark-trained model was trained for: a chunk is local to itself, earlier blocks are reached through
    /// their landmarks.
    pub fn landmark(chunk_tokens: usize) -> Self {
        Window {
            tokens: 0,
            counted_from: CountedFrom::Chunk,
            sink: false,
            chunk_tokens,
            normalisation: Normalisation::Grouped,
        }
    }

    /// Most tokens of a sequence that may be attended to at once while it is written: a larger chunk could push blocks
    /// out of the window that are not in the memory yet.
    pub fn written_chunk_tokens(&self) -> usize {
        match self.counted_from {
            CountedFrom::Query => self.chunk_tokens.min(self.tokens),
            CountedFrom::Chunk => self.chunk_tokens,
        }
        .max(1)
    }
}

impl Default for Retrieval {
    /// What an untrained model needs: log-sum-exp over token keys, one choice per token and KV head, 4 blocks.
    fn default() -> Self {
        Retrieval {
            top_k: 4,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::KvGroup,
            layers: Layers::All,
            newest_blocks: None,
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
        }
    }
}

impl Layers {
    pub fn include(&self, layer: usize) -> bool {
        match self {
            Layers::All => true,
            Layers::These(layers) => layers.get(layer).copied().unwrap_or(false),
        }
    }
}
