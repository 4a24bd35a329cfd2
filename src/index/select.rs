//! Which k of many scores are the largest? Ties go to the earlier one.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::numeric;

/// Scores that are compared with the k-th best at once.
const STRIDE: usize = 64;

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

/// The `k` best positions, ascending, with their scores. `exact(position)` is the score, and at most
/// `rough[position] + slack`; it is asked for only where that could matter. `k` is at most the number of scores.
pub(super) fn top_k(rough: &[f32], k: usize, slack: f32, exact: impl Fn(usize) -> f32) -> Vec<Candidate> {
    let mut best: BinaryHeap<Reverse<Candidate>> = BinaryHeap::with_capacity(k + 1);
    let consider = |best: &mut BinaryHeap<Reverse<Candidate>>, position: usize| {
        let candidate = Candidate { score: exact(position), position: position as u32 };
        match best.peek_mut() {
            Some(mut worst) if candidate > worst.0 => *worst = Reverse(candidate),
            _ => {}
        }
    };
    best.extend((0..k).map(|position| Reverse(Candidate { score: exact(position), position: position as u32 })));
    for (stride, scores) in rough[k..].chunks(STRIDE).enumerate() {
        let worst = |best: &BinaryHeap<Reverse<Candidate>>| best.peek().map_or(f32::INFINITY, |worst| worst.0.score);
        if numeric::max(scores) + slack <= worst(&best) {
            continue;
        }
        for (i, score) in scores.iter().enumerate() {
            if score + slack > worst(&best) {
                consider(&mut best, k + stride * STRIDE + i);
            }
        }
    }
    let mut best: Vec<Candidate> = best.into_iter().map(|Reverse(candidate)| candidate).collect();
    best.sort_unstable_by_key(|candidate| candidate.position);
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_earlier_position() {
        let scores: Vec<f32> = (0..200).map(|i| (i % 3) as f32).collect();
        let positions = |k| top_k(&scores, k, 0.0, |i| scores[i]).iter().map(|c| c.position).collect::<Vec<_>>();
        assert_eq!(positions(1), [2]);
        assert_eq!(positions(4), [2, 5, 8, 11]);
        assert_eq!(positions(200), (0..200).collect::<Vec<_>>());
        assert!(positions(0).is_empty());
    }

    #[test]
    fn rough_scores_within_the_slack_lose_nothing() {
        let exact: Vec<f32> = (0..500).map(|i| ((i * 7919) % 997) as f32 / 100.0).collect();
        let rough: Vec<f32> = exact.iter().enumerate().map(|(i, x)| x - (i % 5) as f32 / 4.0).collect();
        let positions = |candidates: Vec<Candidate>| candidates.iter().map(|c| c.position).collect::<Vec<_>>();
        let want = positions(top_k(&exact, 20, 0.0, |i| exact[i]));
        assert_eq!(positions(top_k(&rough, 20, 1.0, |i| exact[i])), want);
    }

    #[test]
    fn scores_that_are_no_numbers_still_give_k_positions() {
        let scores = [f32::NAN; 10];
        assert_eq!(top_k(&scores, 3, 0.0, |i| scores[i]).len(), 3);
    }
}
