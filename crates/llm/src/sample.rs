//! The choice of the next token from its logits.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::error::GenerateError;

/// How far back in an answer a repeated token counts as repeated, as in llama.cpp.
const REPEAT_TOKENS: usize = 64;

/// How the next token is chosen. Filters apply in the order of llama.cpp's defaults: repeat penalty, top-k, top-p, min-p, and the
/// temperature last, so that it changes the odds of the tokens that are left and not which those are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token, of equal ones the lowest id.
    pub temperature: f32,
    /// Draw from this many of the most likely tokens; 0 from all.
    pub top_k: usize,
    /// Draw from the most likely tokens that together have this probability (Holtzman et al. 2020): above 0, at most 1.
    pub top_p: f32,
    /// Draw from the tokens at least this share as likely as the likeliest: 0 to 1.
    pub min_p: f32,
    /// Divides the logits, or multiplies negative ones, of the tokens among the answer's last 64 (Keskar et al. 2019): above 0; 1
    /// changes nothing. Greedy choices heed it too.
    pub repeat_penalty: f32,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy, no filter.
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// # Errors
    /// [`GenerateError::Invalid`] for the first number out of its range.
    pub fn check(&self) -> Result<(), GenerateError> {
        let Sampling { temperature, top_p, min_p, repeat_penalty, .. } = *self;
        let numbers = [
            ("temperature", temperature, temperature >= 0.0 && temperature.is_finite(), "a finite number from 0 on"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0, at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1"),
            ("repeat_penalty", repeat_penalty, repeat_penalty > 0.0 && repeat_penalty.is_finite(), "above 0"),
        ];
        match numbers.into_iter().find(|(_, _, allowed, _)| !allowed) {
            Some((field, found, _, expected)) => Err(GenerateError::Invalid { field, expected, found }),
            None => Ok(()),
        }
    }
}

/// A [`Sampling`] in progress.
pub(super) struct Sampler {
    sampling: Sampling,
    chance: ChaCha8Rng,
}

impl Sampler {
    /// Checks the parameters.
    pub(super) fn new(sampling: Sampling) -> Result<Self, GenerateError> {
        sampling.check()?;
        Ok(Sampler { sampling, chance: ChaCha8Rng::seed_from_u64(sampling.seed) })
    }

    /// The next token, from its `logits (vocab)`, which are changed, after the answer's tokens so far.
    pub(super) fn choose(&mut self, logits: &mut [f32], answer: &[u32]) -> Result<u32, GenerateError> {
        self.penalise(logits, answer);
        let best = most_likely(logits).ok_or(GenerateError::NoFiniteLogit)?;
        if self.sampling.temperature == 0.0 {
            return Ok(best as u32);
        }
        let left = self.left(logits, best);
        Ok(self.draw(&left) as u32)
    }

    fn penalise(&self, logits: &mut [f32], answer: &[u32]) {
        let penalty = self.sampling.repeat_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut recent = answer[answer.len().saturating_sub(REPEAT_TOKENS)..].to_vec();
        recent.sort_unstable();
        recent.dedup();
        for id in recent {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// The tokens that may be drawn, the likeliest first, each with its logit less the largest; `best` is the index of that.
    fn left(&self, logits: &[f32], best: usize) -> Vec<(usize, f32)> {
        let Sampling { top_k, top_p, min_p, .. } = self.sampling;
        let finite = logits.iter().enumerate().filter(|(_, logit)| logit.is_finite());
        let mut left: Vec<(usize, f32)> = finite.map(|(id, logit)| (id, logit - logits[best])).collect();
        let likelier = |(_, a): &(usize, f32), (_, b): &(usize, f32)| b.total_cmp(a);
        if top_k > 0 && top_k < left.len() {
            left.select_nth_unstable_by(top_k - 1, likelier);
            left.truncate(top_k);
        }
        let total: f32 = left.iter().map(|(_, logit)| logit.exp()).sum();
        if top_p < 1.0 {
            // Tokens below this share, all together, have less than what the nucleus leaves out: no need to sort them.
            let least = (1.0 - top_p) * total / left.len() as f32;
            left.retain(|(_, logit)| logit.exp() >= least);
        }
        left.sort_by(likelier);
        let mut sum = 0.0;
        let within = left.iter().position(|(_, logit)| {
            sum += logit.exp();
            sum >= top_p * total
        });
        left.truncate(within.map_or(left.len(), |last| last + 1));
        left.retain(|(_, logit)| logit.exp() >= min_p);
        left
    }

    fn draw(&mut self, left: &[(usize, f32)]) -> usize {
        let weight = |logit: f32| (logit / self.sampling.temperature).exp();
        let total: f32 = left.iter().map(|&(_, logit)| weight(logit)).sum();
        let mut rest = self.chance.random::<f32>() * total;
        let drawn = left.iter().find(|&&(_, logit)| {
            rest -= weight(logit);
            rest < 0.0
        });
        drawn.unwrap_or(&left[0]).0
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

    const BY_CHANCE: Sampling =
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, seed: 1 };

    /// How often each token is drawn in 10,000 tries, where their probabilities are these.
    fn draws(sampling: Sampling, probabilities: &[f32]) -> Vec<usize> {
        let logits: Vec<f32> = probabilities.iter().map(|probability| probability.ln()).collect();
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut counts = vec![0; logits.len()];
        (0..10_000).for_each(|_| counts[sampler.choose(&mut logits.clone(), &[]).unwrap() as usize] += 1);
        counts
    }

    #[track_caller]
    fn near(sampling: Sampling, probabilities: &[f32], want: &[usize]) {
        let found = draws(sampling, probabilities);
        for (&count, &want) in found.iter().zip(want) {
            assert!(if want == 0 { count == 0 } else { count.abs_diff(want) < 200 }, "{found:?}, expected {want}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_skips_what_is_not_finite() {
        let mut greedy = Sampler::new(Sampling::default()).unwrap();
        assert_eq!(greedy.choose(&mut [0.0, f32::NAN, 3.0, f32::INFINITY, 3.0], &[]).unwrap(), 2);
        assert!(matches!(greedy.choose(&mut [f32::NAN], &[]), Err(GenerateError::NoFiniteLogit)));
        assert!(matches!(greedy.choose(&mut [], &[]), Err(GenerateError::NoFiniteLogit)));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let probabilities = [0.1, 0.6, 0.0, 0.3];
        near(BY_CHANCE, &probabilities, &[1000, 6000, 0, 3000]);
        // 0.36 : 0.09 : 0.01 after squaring.
        near(Sampling { temperature: 0.5, ..BY_CHANCE }, &probabilities, &[217, 7826, 0, 1957]);
    }

    #[test]
    fn filters_leave_what_they_say() {
        let probabilities = [0.1, 0.5, 0.15, 0.25];
        let top_k = |top_k| Sampling { top_k, ..BY_CHANCE };
        near(top_k(1), &probabilities, &[0, 10_000, 0, 0]);
        near(top_k(2), &probabilities, &[0, 6667, 0, 3333]);
        near(top_k(9), &probabilities, &[1000, 5000, 1500, 2500]);
        // The smallest set that reaches top_p.
        let top_p = |top_p| Sampling { top_p, ..BY_CHANCE };
        near(top_p(0.45), &probabilities, &[0, 10_000, 0, 0]);
        near(top_p(0.7), &probabilities, &[0, 6667, 0, 3333]);
        near(top_p(0.8), &probabilities, &[0, 5556, 1667, 2778]);
        // 0.25 is half of 0.5, 0.15 is not.
        let min_p = |min_p| Sampling { min_p, ..BY_CHANCE };
        near(min_p(0.49), &probabilities, &[0, 6667, 0, 3333]);
        near(min_p(0.0), &probabilities, &[1000, 5000, 1500, 2500]);
        near(min_p(1.0), &probabilities, &[0, 10_000, 0, 0]);
    }

    #[test]
    fn filters_come_in_llama_cpp_s_order() {
        let probabilities = [0.1, 0.5, 0.15, 0.25];
        // Of the two that top-k leaves the first has two thirds already; of all four it would have a half only.
        near(Sampling { top_k: 2, top_p: 0.6, ..BY_CHANCE }, &probabilities, &[0, 10_000, 0, 0]);
        // The temperature flattens what is left, and leaves no more: 0.707 to 0.5 after the root.
        near(Sampling { top_p: 0.7, temperature: 2.0, ..BY_CHANCE }, &probabilities, &[0, 5858, 0, 4142]);
        near(Sampling { min_p: 0.49, temperature: 2.0, ..BY_CHANCE }, &probabilities, &[0, 5858, 0, 4142]);
    }

    #[test]
    fn what_was_said_is_less_likely_to_be_said_again() {
        let choose = |repeat_penalty, answer: &[u32]| {
            let mut sampler = Sampler::new(Sampling { repeat_penalty, ..Sampling::default() }).unwrap();
            sampler.choose(&mut [2.0, 1.5, -1.0], answer).unwrap()
        };
        assert_eq!(choose(1.0, &[0, 0]), 0);
        assert_eq!(choose(1.3, &[0, 0]), 0, "2 / 1.3 is above 1.5, and a token counts once");
        assert_eq!(choose(1.4, &[0]), 1);
        assert_eq!(choose(1.4, &[0, 1]), 0, "both are divided");
        assert_eq!(choose(4.0, &[0, 1, 2]), 0, "a negative logit moves down");
        let long_ago = [&[0][..], &[2; REPEAT_TOKENS]].concat();
        assert_eq!(choose(4.0, &long_ago), 0);
    }

    #[test]
    fn impossible_parameters_are_refused() {
        let field = |sampling| match Sampler::new(sampling) {
            Err(GenerateError::Invalid { field, .. }) => field,
            _ => "",
        };
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(field(Sampling { temperature, ..BY_CHANCE }), "temperature");
        }
        // Out of range is out of range, whether it is used or not.
        for top_p in [0.0, 1.1, f32::NAN] {
            assert_eq!(field(Sampling { top_p, ..Sampling::default() }), "top_p");
        }
        assert_eq!(field(Sampling { min_p: -0.1, ..BY_CHANCE }), "min_p");
        assert_eq!(field(Sampling { repeat_penalty: 0.0, ..BY_CHANCE }), "repeat_penalty");
        assert_eq!(field(BY_CHANCE), "");
    }
}
