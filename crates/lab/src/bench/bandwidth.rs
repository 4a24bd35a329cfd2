//! What a scan could reach at best: the bandwidth of reading memory.

use std::time::Instant;

use rayon::prelude::*;

use linalg::simd;

/// Bytes that the read bandwidth is measured on: far more than any cache.
pub(super) const BANDWIDTH_BYTES: usize = 512 << 20;

/// What all threads together read from memory.
pub(super) struct Bandwidth(Vec<u64>);

impl Bandwidth {
    pub(super) fn new() -> Self {
        // In large pages, as keys are.
        let mut words = linalg::zeroed(BANDWIDTH_BYTES / 8);
        words.fill(1);
        Bandwidth(words)
    }

    /// Bytes per second, now.
    pub(super) fn pass(&self) -> f64 {
        let part = self.0.len() / rayon::current_num_threads();
        let begin = Instant::now();
        let total: u64 = self.0.par_chunks(part.max(1)).map(sum).sum();
        assert_eq!(total, self.0.len() as u64);
        BANDWIDTH_BYTES as f64 / begin.elapsed().as_secs_f64()
    }
}

simd! {
    fn sum(words: &[u64]) -> u64 {
        const LINES: usize = 32;
        let (parts, rest) = words.as_chunks::<LINES>();
        let mut sums = [0u64; LINES];
        for part in parts {
            linalg::prefetch_ahead::<{ size_of::<[u64; LINES]>() }>(part.as_ptr().cast());
            for (sum, word) in sums.iter_mut().zip(part) {
                *sum += word;
            }
        }
        sums.iter().chain(rest).sum()
    }
}
