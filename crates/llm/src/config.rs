//! What a Llama-family model is, whichever file it came from.

use landmarkdb::{InvalidShape, ModelShape, Rope};

/// The hyperparameters of a model. RoPE scaling is already folded into the frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// L
    pub layers: u32,
    /// Hq
    pub query_heads: u32,
    /// Hkv
    pub kv_heads: u32,
    /// D
    pub head_dim: u32,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding, the landmark's included: every token id is below.
    pub vocab: usize,
    /// The window that the model was trained for.
    pub context_tokens: u32,
    /// Added to the mean square in RMS normalisation.
    pub norm_epsilon: f32,
    /// Rotation of q and k.
    pub rope: Rope,
    /// The output matrix is the embedding.
    pub tied_output: bool,
    /// Tokens that end a text.
    pub eos_ids: Vec<u32>,
    /// Of a model with landmarks.
    pub landmark: Option<Landmark>,
}

/// How a model with landmarks reads a text: cut into blocks, each closed by the landmark token (Mohtashami and Jaggi
/// 2023, section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landmark {
    /// The landmark token.
    pub id: u32,
    /// B, the landmark included: `mem_freq + 1` of the paper's checkpoints.
    pub block_tokens: u32,
    /// Whether only the index reads it ([`Normalisation::Hidden`](landmarkdb::Normalisation::Hidden)): the landmark of a model
    /// that was given one by an adapter and not trained with it.
    pub hidden: bool,
}

/// How a model stretches its rotation beyond the context it was first trained with.
#[derive(Clone, Copy, Debug, PartialEq)]
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
}

impl ModelConfig {
    /// The shape that a memory with blocks of `block_tokens` sees.
    pub fn shape(&self, block_tokens: u32) -> Result<ModelShape, InvalidShape> {
        let shape = ModelShape {
            layers: self.layers,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            block_tokens,
            rope: self.rope.clone(),
            unrotated_layers: Vec::new(),
            softmax_scale: (self.head_dim as f32).sqrt().recip(),
        };
        shape.check()?;
        Ok(shape)
    }

    /// `Hq * D`
    pub fn query_width(&self) -> usize {
        (self.query_heads * self.head_dim) as usize
    }

    /// `Hkv * D`
    pub fn kv_width(&self) -> usize {
        (self.kv_heads * self.head_dim) as usize
    }

    /// Checks what every later product of sizes relies on. Any block size would do; 2 is the smallest.
    pub fn check(&self) -> Result<(), InvalidShape> {
        for (field, found) in [("hidden", self.hidden), ("ffn", self.ffn), ("vocab", self.vocab)] {
            if found == 0 {
                return Err(InvalidShape { field, expected: "at least 1".into(), found: "0".into() });
            }
        }
        if self.context_tokens == 0 {
            return Err(InvalidShape { field: "context length", expected: "at least 1".into(), found: "0".into() });
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon > 0.0) {
            let found = self.norm_epsilon.to_string();
            return Err(InvalidShape { field: "RMS norm epsilon", expected: "a positive number".into(), found });
        }
        if let Some(landmark) = self.landmark {
            if landmark.id as usize >= self.vocab {
                return Err(InvalidShape {
                    field: "landmark token (mem_id)",
                    expected: format!("one of the {} tokens that the model has embeddings for", self.vocab),
                    found: landmark.id.to_string(),
                });
            }
            return self.shape(landmark.block_tokens).map(|_| ());
        }
        self.shape(2).map(|_| ())
    }
}

impl RopeScaling {
    /// The frequencies `(rotary_dims / 2)` of `base` after scaling.
    pub(super) fn rope(self, base: f64, rotary_dims: usize) -> Rope {
        let mut rope = Rope::from_base(base, rotary_dims);
        for (i, frequency) in rope.frequencies.iter_mut().enumerate() {
            *frequency = self.scale(base.powf(-2.0 * i as f64 / rotary_dims as f64)) as f32;
        }
        rope
    }

    fn scale(self, frequency: f64) -> f64 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_tokens } => {
                let turns = original_context_tokens * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
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
