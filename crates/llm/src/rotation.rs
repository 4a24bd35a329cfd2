//! Which frequencies does a model rotate with, after whatever stretches them beyond its first context?
//!
//! Frequencies are fixed when a model is opened: stored keys are rotated within their block by them. LongRoPE has two sets, one
//! for sequences of up to the original context and one for longer ones. A model opened here takes the long set if its context
//! is longer than the original, since a memory is there for long texts, and the short set otherwise.

use landmarkdb::Rope;

/// How a model stretches its rotation beyond the context it was first trained with.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RopeScaling {
    None,
    /// Every frequency divided by one factor (position interpolation, Chen et al. 2023).
    Linear {
        factor: f64,
    },
    /// Llama 3: slow pairs are divided by `factor`, fast ones stay, and those between are blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context_tokens: f64,
    },
    /// The same with a blend that is linear in the pair's number (Peng et al. 2023).
    Yarn(Yarn),
    /// A divisor for each pair (Ding et al. 2024).
    LongRope {
        divisors: Vec<f64>,
        attention_factor: f64,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Yarn {
    pub(super) factor: f64,
    pub(super) original_context_tokens: f64,
    /// Pairs of at least so many turns over the original context stay.
    pub(super) beta_fast: f64,
    /// Pairs of at most so many turns are divided by the factor.
    pub(super) beta_slow: f64,
    /// Whether the blend begins and ends at whole pairs.
    pub(super) truncate: bool,
    pub(super) attention_factor: f64,
}

/// Frequencies, and what cosines and sines are multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rotation {
    pub(super) rope: Rope,
    pub(super) attention_factor: f64,
}

/// Beta of YaRN's fast and slow pairs where a file does not say.
pub(super) const YARN_BETAS: [f64; 2] = [32.0, 1.0];

/// YaRN's factor of cosines and sines where a file does not say: `0.1 mscale ln(factor) + 1`.
pub(super) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// LongRoPE's factor of cosines and sines where a file does not say.
pub(super) fn longrope_factor(context_tokens: f64, original_context_tokens: f64) -> f64 {
    let stretched = context_tokens / original_context_tokens;
    if stretched <= 1.0 { 1.0 } else { (1.0 + stretched.ln() / original_context_tokens.ln()).sqrt() }
}

impl RopeScaling {
    pub(super) fn rotation(&self, base: f64, rotary_dims: usize) -> Rotation {
        let attention_factor = match self {
            RopeScaling::Yarn(yarn) => yarn.attention_factor,
            RopeScaling::LongRope { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        };
        Rotation { rope: self.rope(base, rotary_dims), attention_factor }
    }

    /// The frequencies `(rotary_dims / 2)` of `base` after scaling.
    pub(super) fn rope(&self, base: f64, rotary_dims: usize) -> Rope {
        let mut rope = Rope::from_base(base, rotary_dims);
        for (i, frequency) in rope.frequencies.iter_mut().enumerate() {
            let plain = base.powf(-2.0 * i as f64 / rotary_dims as f64);
            *frequency = self.scale(plain, i, base, rotary_dims) as f32;
        }
        rope
    }

    fn scale(&self, frequency: f64, pair: usize, base: f64, rotary_dims: usize) -> f64 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_tokens } => {
                let turns = original_context_tokens * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
            RopeScaling::Yarn(yarn) => {
                let kept = yarn.kept(pair, base, rotary_dims);
                frequency * (kept + (1.0 - kept) / yarn.factor)
            }
            RopeScaling::LongRope { divisors, .. } => frequency / divisors[pair],
        }
    }
}

impl Yarn {
    /// Which share of a pair's frequency stays.
    fn kept(&self, pair: usize, base: f64, rotary_dims: usize) -> f64 {
        let dims = rotary_dims as f64;
        // The pair that turns so many times over the original context.
        let pair_of = |turns: f64| {
            dims * (self.original_context_tokens / (turns * std::f64::consts::TAU)).ln() / (2.0 * base.ln())
        };
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dims - 1.0));
        if low == high {
            high += 0.001;
        }
        1.0 - ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_scaling_keeps_fast_pairs_slows_slow_ones_and_blends_between() {
        // Llama 3.1 8B.
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context_tokens: 8192.0,
        };
        let (plain, scaled) = (Rope::from_base(500_000.0, 128), scaling.rope(500_000.0, 128));
        let ratio = |i: usize| scaled.frequencies[i] / plain.frequencies[i];
        for (i, frequency) in plain.frequencies.iter().enumerate() {
            let wavelength = std::f32::consts::TAU / frequency;
            let expected = if wavelength < 2048.0 {
                1.0
            } else if wavelength > 8192.0 {
                0.125
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                (1.0 - smooth) / 8.0 + smooth
            };
            assert!((ratio(i) - expected).abs() < 1e-5, "pair {i}: {} {expected}", ratio(i));
        }
        assert!((29..35).any(|i| ratio(i) > 0.126 && ratio(i) < 0.999), "no pair is blended: the test has no teeth");
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let (plain, scaled) = (Rope::from_base(10_000.0, 8), RopeScaling::Linear { factor: 4.0 }.rope(10_000.0, 8));
        for (a, b) in plain.frequencies.iter().zip(&scaled.frequencies) {
            assert!((a / 4.0 - b).abs() < 1e-9);
        }
    }
}
