//! Where do retrieved blocks lie? The places of [`crate::api::AttendRequest`], and the rotations that queries need for them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use crate::lock::IgnorePoison;
use crate::shape::{Rope, Rotation};
use crate::types::Placement;

/// The slots before the window for one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// n
    pub(super) eligible: usize,
    /// k, blocks per row.
    pub(super) k: usize,
    /// The last this many eligible blocks are scored where they really are.
    pub(super) recent: usize,
    slots: usize,
    /// B
    block_tokens: usize,
}

impl Geometry {
    /// `last` is the number of eligible blocks of the last scope entry.
    pub(super) fn new(eligible: usize, last: usize, top_k: usize, block_tokens: usize) -> Self {
        let k = top_k.min(eligible);
        let recent = k.min(last);
        let slots = if recent == eligible { eligible } else { k + 1 };
        Geometry { eligible, k, recent, slots, block_tokens }
    }

    fn older_exist(&self) -> bool {
        self.recent < self.eligible
    }

    /// Where the `i`-th recent block is scored, `i` from 0 in document order.
    pub(super) fn recent_slot(&self, i: usize) -> usize {
        self.slots - self.recent + i
    }

    /// Where the block at `position` lies for a row that retrieved it as its `rank`-th.
    pub(super) fn slot(&self, rank: usize, position: usize) -> usize {
        let is_recent = position >= self.eligible - self.recent;
        rank + (is_recent && self.older_exist()) as usize
    }

    /// How many different rotations queries need at most for all slots.
    pub(super) fn rotations_max(&self, distances: &[u32]) -> u64 {
        self.reaches_max(distances, self.slots as u64).min(distances.len() as u64 * self.slots as u64)
    }

    /// How many different reaches there are to blocks that begin 1 to `blocks` blocks before the window.
    pub(super) fn reaches_max(&self, distances: &[u32], blocks: u64) -> u64 {
        let apart = distances.iter().max().zip(distances.iter().min()).map_or(0, |(max, min)| max - min);
        apart as u64 + blocks * self.block_tokens as u64
    }

    /// Tokens from the first token of a slot to a query that is `distance` tokens into the window.
    pub(super) fn reach(&self, distance: u32, slot: usize) -> i64 {
        distance as i64 + ((self.slots - slot) * self.block_tokens) as i64
    }

    /// Tokens from the first token of a block to a query that is `distance` tokens into the window, if the block begins `blocks`
    /// blocks before it in its document, of which the row chose `rank` older ones.
    pub(super) fn original_reach(&self, placement: Placement, distance: u32, blocks: u32, rank: u64) -> i64 {
        let farthest = placement.farthest_blocks(self.slots as u64, distance as u64, self.block_tokens as u64);
        let blocks = (blocks as u64).min(farthest - rank);
        distance as i64 + (blocks * self.block_tokens as u64) as i64
    }
}

/// One rotation per distinct number of tokens: neighbouring queries and slots share most of them.
pub(super) struct Rotations(HashMap<i64, Rotation>);

/// The rotations of the last requests: the layers of a model ask one after the other from the same places.
#[derive(Default)]
pub(super) struct LastRotations(Mutex<VecDeque<Kept>>);

struct Kept {
    distances: Vec<u32>,
    slots: usize,
    /// Whether they are of a layer that rotates.
    rotates: bool,
    rotations: Arc<Rotations>,
}

/// Sequences that may be under way at once before their rotations are made anew in every layer.
const KEPT_MAX: usize = 8;

/// Rotations of one request that are worth keeping: more than a prefill chunk's are large, and soon outweighed by the work itself.
const KEPT_ROTATIONS_MAX: usize = 4096;

impl LastRotations {
    /// The rotations for all slots, by the rotation of the collection's model or by none, made if they are not here.
    pub(super) fn get(&self, rope: &Rope, geometry: &Geometry, distances: &[u32]) -> Arc<Rotations> {
        let lock = || self.0.lock().ignore_poison();
        let rotates = !rope.frequencies.is_empty();
        let same =
            |kept: &&Kept| kept.slots == geometry.slots && kept.rotates == rotates && kept.distances == distances;
        if let Some(kept) = lock().iter().find(same) {
            return kept.rotations.clone();
        }
        let rotations = Arc::new(Rotations::new(rope, geometry, distances));
        if rotations.0.len() <= KEPT_ROTATIONS_MAX {
            let mut kept = lock();
            kept.truncate(KEPT_MAX - 1);
            kept.push_front(Kept {
                distances: distances.to_vec(),
                slots: geometry.slots,
                rotates,
                rotations: rotations.clone(),
            });
        }
        rotations
    }
}

impl Rotations {
    /// For all slots.
    fn new(rope: &Rope, geometry: &Geometry, distances: &[u32]) -> Self {
        let of_slot = |slot| distances.iter().map(move |&distance| geometry.reach(distance, slot));
        Rotations::of(rope, (0..geometry.slots).flat_map(of_slot))
    }

    /// By these numbers of tokens.
    pub(super) fn of(rope: &Rope, reaches: impl Iterator<Item = i64>) -> Self {
        let mut rotations = HashMap::new();
        for tokens in reaches {
            rotations.entry(tokens).or_insert_with(|| rope.rotation(tokens));
        }
        Rotations(rotations)
    }

    /// The rotation by `tokens`, which must be among those that it was made of.
    pub(super) fn by(&self, tokens: i64) -> &Rotation {
        &self.0[&tokens]
    }

    /// Rotates heads `(_, D)` by `tokens`, as [`Rotations::by`].
    pub(super) fn apply(&self, tokens: i64, heads: &mut [f32], dim: usize) {
        let rotation = self.by(tokens);
        heads.chunks_exact_mut(dim).for_each(|head| rotation.apply(head));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn older_blocks_share_slot_0_and_recent_ones_lie_where_they_are() {
        let geometry = Geometry::new(10, 10, 3, 4);
        assert_eq!((geometry.k, geometry.recent, geometry.slots), (3, 3, 4));
        assert_eq!((0..3).map(|i| geometry.recent_slot(i)).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!((geometry.slot(0, 0), geometry.slot(1, 6), geometry.slot(2, 7)), (0, 1, 3));
        assert_eq!((geometry.slot(0, 7), geometry.slot(1, 8), geometry.slot(2, 9)), (1, 2, 3));
        // The last block ends where the window begins.
        assert_eq!((geometry.reach(0, 3), geometry.reach(5, 0)), (4, 21));
    }

    #[test]
    fn with_all_blocks_of_one_document_retrieved_rank_is_slot() {
        let geometry = Geometry::new(3, 3, 8, 4);
        assert_eq!((geometry.k, geometry.recent, geometry.slots), (3, 3, 3));
        assert!((0..3).all(|i| geometry.slot(i, i) == i && geometry.recent_slot(i) == i));
        assert_eq!(geometry.reach(0, 0), 12);
    }

    #[test]
    fn rotations_are_counted_before_they_are_made() {
        for distances in [vec![0], vec![7, 8, 9], vec![0, 1 << 20], (0..100).collect()] {
            let geometry = Geometry::new(10, 10, 3, 4);
            let made = Rotations::new(&Rope::from_base(100.0, 4), &geometry, &distances).0.len() as u64;
            let counted = geometry.rotations_max(&distances);
            assert!(made <= counted && counted <= made + 3, "{made} of {counted} for {} distances", distances.len());
        }
    }

    #[test]
    fn other_documents_count_as_older() {
        let geometry = Geometry::new(5, 2, 5, 4);
        assert_eq!((geometry.k, geometry.recent, geometry.slots), (5, 2, 6));
        assert_eq!((0..5).map(|i| geometry.slot(i, i)).collect::<Vec<_>>(), [0, 1, 2, 4, 5]);
        let geometry = Geometry::new(5, 0, 2, 4);
        assert_eq!((geometry.recent, geometry.slots), (0, 3));
        assert_eq!((geometry.slot(0, 3), geometry.slot(1, 4)), (0, 1));
    }

    /// One document whose blocks begin `1..=blocks` blocks before the window.
    #[test]
    fn original_places_are_true_within_the_context_and_keep_their_order_beyond() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for _ in 0..2000 {
            let (blocks, top_k, block_tokens) =
                (rng.random_range(1..40), rng.random_range(1..50), rng.random_range(2..9));
            let (within_tokens, distance) = (rng.random_range(1..400u32), rng.random_range(0..50u32));
            let geometry = Geometry::new(blocks, blocks, top_k, block_tokens);
            let mut chosen: Vec<usize> = (1..=blocks).collect();
            while chosen.len() > geometry.k {
                chosen.remove(rng.random_range(0..chosen.len()));
            }
            chosen.reverse();
            let placement = Placement::Original { within_tokens };
            let reach = |(rank, &blocks): (usize, &usize)| {
                geometry.original_reach(placement, distance, blocks as u32, rank as u64)
            };
            let reaches: Vec<i64> = chosen.iter().enumerate().map(reach).collect();
            let what = format!("{chosen:?} of {blocks}, B = {block_tokens}, {distance} within {within_tokens}");
            let apart = reaches.windows(2).all(|pair| pair[0] - pair[1] >= block_tokens as i64);
            assert!(
                apart && reaches[chosen.len() - 1] >= (distance as usize + block_tokens) as i64,
                "{what}: {reaches:?}"
            );
            let truth = |blocks: &usize| (distance as usize + blocks * block_tokens) as i64;
            let true_reaches: Vec<i64> = chosen.iter().map(truth).collect();
            // A block is left for the sink, and the slots are there in any case.
            let fits = |reach: i64| reach + (block_tokens as i64) < within_tokens as i64;
            let in_slots = geometry.reach(distance, 0);
            assert!(reaches.iter().all(|&reach| fits(reach) || reach <= in_slots), "{what}: {reaches:?}");
            assert!(reaches.iter().zip(&true_reaches).all(|(reach, truth)| reach <= truth), "{what}: {reaches:?}");
            if fits(true_reaches[0] + (chosen.len() * block_tokens) as i64) || geometry.k == blocks {
                assert_eq!(reaches, true_reaches, "{what}");
            }
        }
    }

    #[test]
    fn rotations_are_kept_for_the_same_places_only() {
        let (rope, last) = (Rope::from_base(100.0, 4), LastRotations::default());
        let (near, far) = (Geometry::new(10, 10, 3, 4), Geometry::new(10, 10, 5, 4));
        let first = last.get(&rope, &near, &[0, 1]);
        assert!(Arc::ptr_eq(&first, &last.get(&rope, &near, &[0, 1])));
        for other in [last.get(&rope, &near, &[1, 0]), last.get(&rope, &far, &[0, 1])] {
            assert!(!Arc::ptr_eq(&first, &other));
        }
        (0..KEPT_MAX as u32).for_each(|distance| drop(last.get(&rope, &near, &[distance])));
        assert!(!Arc::ptr_eq(&first, &last.get(&rope, &near, &[0, 1])), "the oldest went");
    }
}
