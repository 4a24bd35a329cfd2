//! Which k of many scores are the largest? Ties go to the earlier one.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// A block under consideration: better ones are greater.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) score: f32,
    pub(super) position: u32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.position.cmp(&self.position))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The best candidates so far.
pub(super) struct Best {
    k: usize,
    /// At most `k`; the worst on top.
    kept: BinaryHeap<Reverse<Candidate>>,
}

impl Best {
    pub(super) fn new(k: usize) -> Self {
        Best { k, kept: BinaryHeap::with_capacity(k + 1) }
    }

    /// Whether a candidate could be among the best with such a score.
    pub(super) fn may_take(&self, score: f32) -> bool {
        self.least().is_none_or(|least| score >= least)
    }

    /// The score that a candidate needs to be among the best; `None` while any will do.
    pub(super) fn least(&self) -> Option<f32> {
        let worst = self.kept.peek().filter(|_| self.kept.len() == self.k);
        worst.map(|worst| worst.0.score)
    }

    pub(super) fn offer(&mut self, candidate: Candidate) {
        if self.kept.len() < self.k {
            self.kept.push(Reverse(candidate));
        } else if let Some(mut worst) = self.kept.peek_mut().filter(|worst| candidate > worst.0) {
            *worst = Reverse(candidate);
        }
    }

    /// Offers consecutive positions from `first` on. The score of the i-th is `exact(i)`, at most `bounds[i]`; it is asked for
    /// only where that could matter.
    pub(super) fn offer_all(&mut self, first: usize, bounds: &[f32], mut exact: impl FnMut(usize) -> f32) {
        for (i, &bound) in bounds.iter().enumerate() {
            if self.may_take(bound) {
                self.offer(Candidate { score: exact(i), position: (first + i) as u32 });
            }
        }
    }

    /// Ascending by position.
    pub(super) fn into_positions(self) -> Vec<Candidate> {
        let mut best: Vec<Candidate> = self.kept.into_iter().map(|Reverse(candidate)| candidate).collect();
        best.sort_unstable_by_key(|candidate| candidate.position);
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offered in parts of different lengths, the last ones first.
    fn top_k(bounds: &[f32], k: usize, exact: impl Fn(usize) -> f32) -> Vec<u32> {
        let mut best = Best::new(k);
        let mut end = bounds.len();
        while end > 0 {
            let first = end.saturating_sub(1 + end % 150);
            best.offer_all(first, &bounds[first..end], |i| exact(first + i));
            end = first;
        }
        best.into_positions().iter().map(|candidate| candidate.position).collect()
    }

    #[test]
    fn ties_go_to_the_earlier_position() {
        let scores: Vec<f32> = (0..200).map(|i| (i % 3) as f32).collect();
        let positions = |k| top_k(&scores, k, |i| scores[i]);
        assert_eq!(positions(1), [2]);
        assert_eq!(positions(4), [2, 5, 8, 11]);
        assert_eq!(positions(200), (0..200).collect::<Vec<_>>());
        assert!(positions(0).is_empty());
    }

    #[test]
    fn bounds_lose_nothing() {
        let exact: Vec<f32> = (0..500).map(|i| ((i * 7919) % 997) as f32 / 100.0).collect();
        let bounds: Vec<f32> = exact.iter().enumerate().map(|(i, x)| x + (i % 5) as f32 / 4.0).collect();
        let want = top_k(&exact, 20, |i| exact[i]);
        assert_eq!(top_k(&bounds, 20, |i| exact[i]), want);
    }

    #[test]
    fn scores_that_are_no_numbers_still_give_k_positions() {
        let scores = [f32::NAN; 10];
        assert_eq!(top_k(&scores, 3, |i| scores[i]).len(), 3);
    }
}
