//! The choice of the next token from its logits.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::error::GenerateError;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The most likely token; of equal ones the lowest id.
    Greedy,
    /// By chance, among the most likely tokens that together have probability `top_p` (Holtzman et al. 2020).
    Nucleus {
        /// Above 0; divides the logits.
        temperature: f32,
        /// Above 0, at most 1.
        top_p: f32,
        /// The same seed gives the same text.
        seed: u64,
    },
}

/// A [`Sampling`] in progress.
pub(super) struct Sampler {
    sampling: Sampling,
    chance: ChaCha8Rng,
}

impl Sampler {
    /// Checks the parameters.
    pub(super) fn new(sampling: Sampling) -> Result<Self, GenerateError> {
        let seed = match sampling {
            Sampling::Greedy => 0,
            Sampling::Nucleus { temperature, top_p, seed } => {
                if !(temperature > 0.0 && temperature.is_finite()) {
                    let expected = "a finite number above 0 (for 0 sample greedily)";
                    return Err(GenerateError::Invalid { field: "temperature", expected, found: temperature });
                }
                if !(top_p > 0.0 && top_p <= 1.0) {
                    let expected = "above 0, at most 1";
                    return Err(GenerateError::Invalid { field: "top_p", expected, found: top_p });
                }
                seed
            }
        };
        Ok(Sampler { sampling, chance: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The next token, from `logits (vocab)`.
    pub(super) fn choose(&mut self, logits: &[f32]) -> Result<u32, GenerateError> {
        let best = most_likely(logits).ok_or(GenerateError::NoFiniteLogit)?;
        Ok(match self.sampling {
            Sampling::Greedy => best as u32,
            Sampling::Nucleus { temperature, top_p, .. } => self.draw(logits, logits[best], temperature, top_p) as u32,
        })
    }

    /// Draws from the nucleus. `top` is the largest of the logits.
    fn draw(&mut self, logits: &[f32], top: f32, temperature: f32, top_p: f32) -> usize {
        let weight = |logit: f32| if logit.is_finite() { ((logit - top) / temperature).exp() } else { 0.0 };
        let total: f32 = logits.iter().map(|&logit| weight(logit)).sum();
        // Tokens below this share, all together, have less than what the nucleus leaves out: no need to sort them.
        let least = (1.0 - top_p) * total / logits.len() as f32;
        let weighted = logits.iter().map(|&logit| weight(logit)).enumerate();
        let mut candidates: Vec<(usize, f32)> = weighted.filter(|&(_, weight)| weight >= least).collect();
        candidates.sort_by(|(_, a), (_, b)| b.total_cmp(a));

        let mut sum = 0.0;
        let within = candidates.iter().position(|&(_, weight)| {
            sum += weight;
            sum >= top_p * total
        });
        candidates.truncate(within.map_or(candidates.len(), |last| last + 1));
        let mut left = self.chance.random::<f32>() * sum;
        let drawn = candidates.iter().find(|&&(_, weight)| {
            left -= weight;
            left < 0.0
        });
        drawn.unwrap_or(&candidates[0]).0
    }
}

/// The index of the largest finite number, the first of equal ones.
fn most_likely(logits: &[f32]) -> Option<usize> {
    let finite = logits.iter().enumerate().filter(|(_, logit)| logit.is_finite());
    finite.reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(top_p: f32, temperature: f32, logits: &[f32]) -> Vec<usize> {
        let mut sampler = Sampler::new(Sampling::Nucleus { temperature, top_p, seed: 1 }).unwrap();
        let mut counts = vec![0; logits.len()];
        (0..10_000).for_each(|_| counts[sampler.choose(logits).unwrap() as usize] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_skips_what_is_not_finite() {
        let mut greedy = Sampler::new(Sampling::Greedy).unwrap();
        assert_eq!(greedy.choose(&[0.0, f32::NAN, 3.0, f32::INFINITY, 3.0]).unwrap(), 2);
        assert!(matches!(greedy.choose(&[f32::NAN]), Err(GenerateError::NoFiniteLogit)));
        assert!(matches!(greedy.choose(&[]), Err(GenerateError::NoFiniteLogit)));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.1f32.ln(), 0.6f32.ln(), f32::NEG_INFINITY, 0.3f32.ln()];
        for (count, want) in draws(1.0, 1.0, &logits).iter().zip([1000, 6000, 0, 3000]) {
            assert!(count.abs_diff(want) < 200, "{count} {want}");
        }
        // 0.36 : 0.09 : 0.01 after squaring.
        for (count, want) in draws(1.0, 0.5, &logits).iter().zip([217, 7826, 0, 1957]) {
            assert!(count.abs_diff(want) < 200, "{count} {want}");
        }
    }

    #[test]
    fn the_nucleus_is_the_smallest_set_that_reaches_top_p() {
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        assert_eq!(draws(0.5, 1.0, &logits)[1], 10_000);
        let two = draws(0.8, 1.0, &logits);
        assert_eq!(two[0], 0);
        assert!(two[1].abs_diff(6667) < 200, "{two:?}");
    }

    #[test]
    fn impossible_parameters_are_refused() {
        let field = |temperature, top_p| match Sampler::new(Sampling::Nucleus { temperature, top_p, seed: 0 }) {
            Err(GenerateError::Invalid { field, .. }) => field,
            _ => "",
        };
        assert_eq!(field(0.0, 0.5), "temperature");
        assert_eq!(field(f32::NAN, 0.5), "temperature");
        assert_eq!(field(1.0, 0.0), "top_p");
        assert_eq!(field(1.0, 1.1), "top_p");
        assert_eq!(field(1.0, 1.0), "");
    }
}
