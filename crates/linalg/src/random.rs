//! Random values for tests.

use rand::{RngExt, SeedableRng};

pub(super) fn random(count: usize, spread: f32, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-spread..spread)).collect()
}
