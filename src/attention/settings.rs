//! What a sequence keeps at hand and what it asks the memory for.

use crate::types::{BlockScore, Granularity, Normalisation};

/// The local window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// A query sees the block it is in and the full blocks before it that make up this many tokens (rounded up to
    /// whole blocks). At least the tokens of one group that is attended to at once.
    pub tokens: usize,
    /// Whether the first block of the text stays visible: models without landmark training need it
    /// (Xiao et al. 2023, attention sinks).
    pub sink: bool,
}

/// What is retrieved, and how it is attended to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retrieval {
    /// k
    pub top_k: u32,
    pub block_score: BlockScore,
    pub granularity: Granularity,
    pub normalisation: Normalisation,
    pub layers: Layers,
}

/// The layers that retrieve; the others see the window and the sink only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layers {
    All,
    /// Those whose entry is true; layers beyond the list do not retrieve.
    These(Vec<bool>),
}

impl Default for Window {
    /// 512 tokens and a sink: what SmolLM2 was measured with.
    fn default() -> Self {
        Window { tokens: 512, sink: true }
    }
}

impl Default for Retrieval {
    /// What an untrained model needs: log-sum-exp over token keys, one choice per token and KV head, 4 blocks.
    fn default() -> Self {
        Retrieval {
            top_k: 4,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::KvGroup,
            normalisation: Normalisation::Plain,
            layers: Layers::All,
        }
    }
}

impl Layers {
    pub(crate) fn include(&self, layer: usize) -> bool {
        match self {
            Layers::All => true,
            Layers::These(layers) => layers.get(layer).copied().unwrap_or(false),
        }
    }
}
