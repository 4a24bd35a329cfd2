//! Provenance: which blocks were read, by which layers and heads, and how much they weighed.

use std::collections::BTreeMap;

use crate::api::Hits;
use crate::types::{BlockId, Granularity};

/// How much a sequence read of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockReads {
    /// A block that a query chose.
    pub block: BlockId,
    /// Estimated attention that went to the block, summed over tokens, layers and query heads: the memory's share of
    /// the attention times the block's share of the retrieval softmax.
    pub mass: f64,
    /// Those that chose the block, by layer and KV head.
    pub heads: Vec<HeadReads>,
}

/// How often one KV head of one layer chose a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadReads {
    /// 0 to L - 1.
    pub layer: u32,
    /// 0 to Hkv - 1.
    pub kv_head: u32,
    /// Pairs of query token and query head that chose the block.
    pub choices: u64,
}

/// Collects [`BlockReads`] over the calls of a sequence.
#[derive(Default)]
pub(crate) struct Trace {
    blocks: BTreeMap<BlockId, Sum>,
}

/// What was read of one block so far.
#[derive(Default)]
struct Sum {
    mass: f64,
    /// By (layer, KV head).
    choices: BTreeMap<(u32, u32), u64>,
}

impl Trace {
    /// Adds the hits of one layer for `tokens` query tokens. `shares (T, Hq)`: the memory's share of each attention.
    pub(crate) fn add(&mut self, layer: usize, hits: &Hits, granularity: Granularity, shares: &[f32], heads: Heads) {
        let k = hits.k as usize;
        let summed = if granularity == Granularity::KvGroup { heads.query / heads.kv } else { 1 };
        for (index, &share) in shares.iter().enumerate() {
            let (token, query_head) = (index / heads.query, index % heads.query);
            let row = granularity.row(token, query_head, heads.query, heads.kv);
            let kv_head = (query_head / (heads.query / heads.kv)) as u32;
            let chosen = hits.blocks[row * k..][..k].iter().zip(&hits.scores[row * k..][..k]);
            for (&block, &score) in chosen {
                let sum = self.blocks.entry(block).or_default();
                sum.mass += share as f64 * (score as f64).exp() / summed as f64;
                *sum.choices.entry((layer as u32, kv_head)).or_default() += 1;
            }
        }
    }

    /// Everything since the last call, heaviest first.
    pub(crate) fn take(&mut self) -> Vec<BlockReads> {
        let mut reads: Vec<BlockReads> = std::mem::take(&mut self.blocks)
            .into_iter()
            .map(|(block, sum)| {
                let heads = sum
                    .choices
                    .into_iter()
                    .map(|((layer, kv_head), choices)| HeadReads { layer, kv_head, choices })
                    .collect();
                BlockReads { block, mass: sum.mass, heads }
            })
            .collect();
        reads.sort_by(|a, b| b.mass.total_cmp(&a.mass).then(a.block.cmp(&b.block)));
        reads
    }
}

/// Heads of a model: Hq and Hkv.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) query: usize,
    pub(crate) kv: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DocumentId;

    #[test]
    fn mass_is_the_memory_share_times_the_block_share() {
        let block = |index| BlockId { document: DocumentId(1), index };
        let hits = Hits { rows: 1, k: 2, blocks: vec![block(3), block(7)], scores: vec![0.5f32.ln(), 1.5f32.ln()] };
        let mut trace = Trace::default();
        trace.add(4, &hits, Granularity::KvGroup, &[0.5, 0.25], Heads { query: 2, kv: 1 });
        let reads = trace.take();
        assert_eq!(reads[0].block, block(7));
        assert!((reads[0].mass - 0.75 * 0.75).abs() < 1e-6, "{reads:?}");
        assert!((reads[1].mass - 0.75 * 0.25).abs() < 1e-6, "{reads:?}");
        assert_eq!(reads[0].heads, vec![HeadReads { layer: 4, kv_head: 0, choices: 2 }]);
        assert_eq!(trace.take(), vec![]);
    }
}
