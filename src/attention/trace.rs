//! Provenance: which blocks were read, by which layers and heads, and how much they weighed.

use std::collections::BTreeMap;

use crate::api::Hits;
use crate::types::{BlockId, Granularity};

/// Where the attention of a sequence went, as masses: the attention of one query head of one token at one layer is 1.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Reads {
    /// The blocks that were retrieved. First come those that stood out most: the memory's share of each attention times the block's
    /// share of the scores of all eligible blocks, not of the chosen alone, summed up. Where all blocks suit a query equally, one
    /// of them has to be chosen, and says little about the answer however much attention it had.
    pub retrieved: Vec<BlockReads>,
    /// What all layers and heads of a [`read`](super::BlockAttention::read) sequence read without choosing it: the tails of the
    /// documents before the last, the sink, and the window. Empty for other sequences.
    pub at_hand: Vec<AtHandReads>,
    /// The mass of the rest: the sequence's own tokens, and of one that is no [`read`](super::BlockAttention::read) all that is
    /// not retrieved.
    pub own_mass: f64,
}

/// How much a sequence read of one block at hand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AtHandReads {
    /// A full block or, with index `blocks` of its document, a tail.
    pub block: BlockId,
    /// Why the block is at hand.
    pub place: Place,
    /// Attention that went to the block, summed over tokens, layers and query heads.
    pub mass: f64,
}

/// Where a block at hand lies. Exhaustive, because citations name each place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The first block of the first document.
    Sink,
    /// Tokens after the last full block of an earlier document.
    Tail,
    /// The end of the last document, its tail included.
    Window,
}

/// How much a sequence read of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockReads {
    /// A block that a query chose.
    pub block: BlockId,
    /// Estimated attention that went to the block, summed over tokens, layers and query heads: the memory's share of
    /// the attention times the block's share of the scores of the chosen.
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

/// Collects [`Reads`] over the calls of a sequence.
#[derive(Default)]
pub(crate) struct Trace {
    blocks: BTreeMap<BlockId, Sum>,
    at_hand: Vec<AtHandReads>,
    own_mass: f64,
}

/// What was read of one block so far.
#[derive(Default)]
struct Sum {
    mass: f64,
    /// What [`Reads::retrieved`] is sorted by.
    standing: f64,
    /// By (layer, KV head).
    choices: BTreeMap<(u32, u32), u64>,
}

impl Trace {
    /// With the blocks at hand, whose masses are 0.
    pub(crate) fn new(at_hand: Vec<AtHandReads>) -> Self {
        Trace { at_hand, ..Trace::default() }
    }

    /// Adds local attention: `at_hand (rows, blocks)` are its shares, `memory (rows)` the shares of all attention that went to
    /// retrieved blocks instead.
    pub(crate) fn add_local(&mut self, at_hand: &[f32], memory: &[f32]) {
        let blocks = self.at_hand.len();
        for (row, &memory) in memory.iter().enumerate() {
            let mut own = 1.0 - memory as f64;
            for (read, &share) in self.at_hand.iter_mut().zip(&at_hand[row * blocks..]) {
                let mass = share as f64 * (1.0 - memory as f64);
                read.mass += mass;
                own -= mass;
            }
            self.own_mass += own;
        }
    }

    /// Adds the hits of one layer for `tokens` query tokens. `shares (T, Hq)`: the memory's share of each attention.
    pub(crate) fn add(&mut self, layer: usize, hits: &Hits, granularity: Granularity, shares: &[f32], heads: Heads) {
        let k = hits.k as usize;
        let summed = if granularity == Granularity::KvGroup { heads.query / heads.kv } else { 1 };
        for (index, &share) in shares.iter().enumerate() {
            let (token, query_head) = (index / heads.query, index % heads.query);
            let row = granularity.row(token, query_head, heads.query, heads.kv);
            let kv_head = (query_head / (heads.query / heads.kv)) as u32;
            let scores = &hits.scores[row * k..][..k];
            let weight = |&score: &f32| (score as f64).exp();
            let all: f64 = scores.iter().map(weight).sum();
            for (&block, score) in hits.blocks[row * k..].iter().zip(scores) {
                let sum = self.blocks.entry(block).or_default();
                sum.mass += share as f64 * weight(score) / all.max(f64::MIN_POSITIVE);
                sum.standing += share as f64 * weight(score) / summed as f64;
                *sum.choices.entry((layer as u32, kv_head)).or_default() += 1;
            }
        }
    }

    /// Everything since the last call.
    pub(crate) fn take(&mut self) -> Reads {
        let mut blocks: Vec<(BlockId, Sum)> = std::mem::take(&mut self.blocks).into_iter().collect();
        blocks.sort_by(|(a, of_a), (b, of_b)| of_b.standing.total_cmp(&of_a.standing).then(a.cmp(b)));
        let retrieved = blocks
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
        let at_hand = self.at_hand.clone();
        self.at_hand.iter_mut().for_each(|read| read.mass = 0.0);
        Reads { retrieved, at_hand, own_mass: std::mem::take(&mut self.own_mass) }
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
        let reads = trace.take().retrieved;
        assert_eq!(reads[0].block, block(7));
        assert!((reads[0].mass - 0.75 * 0.75).abs() < 1e-6, "{reads:?}");
        assert!((reads[1].mass - 0.75 * 0.25).abs() < 1e-6, "{reads:?}");
        assert_eq!(reads[0].heads, vec![HeadReads { layer: 4, kv_head: 0, choices: 2 }]);
        assert_eq!(trace.take(), Reads::default());
    }

    /// Two queries choose one block each: one block had all of half an attention among equals, the other stood out.
    #[test]
    fn blocks_that_stood_out_come_before_those_that_had_more_attention() {
        let block = |index| BlockId { document: DocumentId(1), index };
        let hits = Hits { rows: 2, k: 1, blocks: vec![block(3), block(7)], scores: vec![0.01f32.ln(), 0.9f32.ln()] };
        let mut trace = Trace::default();
        trace.add(0, &hits, Granularity::TokenHead, &[0.5, 0.25], Heads { query: 2, kv: 2 });
        let reads = trace.take().retrieved;
        assert_eq!(
            [(reads[0].block, reads[0].mass), (reads[1].block, reads[1].mass)],
            [(block(7), 0.25), (block(3), 0.5)]
        );
    }

    #[test]
    fn what_no_block_at_hand_and_no_memory_took_is_the_sequences_own() {
        let block = |index| BlockId { document: DocumentId(1), index };
        let at_hand = |index, mass| AtHandReads { block: block(index), place: Place::Window, mass };
        let mut trace = Trace::new(vec![at_hand(0, 0.0), at_hand(1, 0.0)]);
        trace.add_local(&[0.5, 0.25, 1.0, 0.0], &[0.0, 0.75]);
        assert_eq!(
            trace.take(),
            Reads { retrieved: vec![], at_hand: vec![at_hand(0, 0.75), at_hand(1, 0.25)], own_mass: 0.25 }
        );
        assert_eq!(trace.take().at_hand, [at_hand(0, 0.0), at_hand(1, 0.0)]);
    }
}
