//! What a model is, whichever file it came from.

use super::architecture::{Architecture, LayerKind};
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
    /// Rotation of q and k in global layers.
    pub rope: Rope,
    /// The output matrix is the embedding.
    pub tied_output: bool,
    /// Tokens that end a text.
    pub eos_ids: Vec<u32>,
    /// Of a model with landmarks.
    pub landmark: Option<Landmark>,
    /// What sets the model apart from plain Llama.
    pub architecture: Architecture,
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

impl ModelConfig {
    /// The shape that a memory with blocks of `block_tokens` sees: of the layers that look back over the whole text.
    ///
    /// # Errors
    /// Sizes that contradict each other or a limit.
    pub fn shape(&self, block_tokens: u32) -> Result<ModelShape, InvalidShape> {
        let shape = self.unchecked_shape(block_tokens);
        shape.check()?;
        Ok(shape)
    }

    fn unchecked_shape(&self, block_tokens: u32) -> ModelShape {
        let seen = self.architecture.kinds.iter().filter(|kind| !matches!(kind, LayerKind::Sliding { .. }));
        let unrotated = seen.zip(0..).filter(|(kind, _)| **kind == LayerKind::Unrotated);
        ModelShape {
            layers: self.memory_layers(),
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            block_tokens,
            rope: self.rope.clone(),
            unrotated_layers: unrotated.map(|(_, layer)| layer).collect(),
            softmax_scale: self.softmax_scale(),
        }
    }

    /// How many layers look back over the whole text: those of [`ModelConfig::shape`].
    pub fn memory_layers(&self) -> u32 {
        self.layers.saturating_sub(self.sliding_layers().count() as u32)
    }

    /// The layers that see the last tokens only: those that no memory has.
    pub fn sliding_layers(&self) -> impl Iterator<Item = usize> {
        let kinds = self.architecture.kinds.iter().enumerate();
        kinds.filter(|(_, kind)| matches!(kind, LayerKind::Sliding { .. })).map(|(layer, _)| layer)
    }

    /// What products of queries and keys are multiplied with.
    pub fn softmax_scale(&self) -> f32 {
        self.architecture.softmax_scale.unwrap_or_else(|| (self.head_dim as f32).sqrt().recip())
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
        positive("RMS norm epsilon", self.norm_epsilon)?;
        let Architecture { rotary_gain, embedding_scale, residual_scale, logit_scale, .. } = self.architecture;
        for (field, found) in [
            ("attention factor", rotary_gain),
            ("embedding scale", embedding_scale),
            ("residual scale", residual_scale),
            ("logit scale", logit_scale),
        ] {
            positive(field, found)?;
        }
        self.check_kinds()?;
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
    fn check_kinds(&self) -> Result<(), InvalidShape> {
        let count = self.architecture.kinds.len();
        if count != 0 && count != self.layers as usize {
            let expected = format!("one for each of {} layers", self.layers);
            return Err(InvalidShape { field: "kinds of layers", expected, found: count.to_string() });
        }
        for kind in &self.architecture.kinds {
            let LayerKind::Sliding { window_tokens, rope, rotary_gain } = kind else { continue };
            positive("attention factor", *rotary_gain)?;
            if *window_tokens == 0 {
                return Err(InvalidShape { field: "sliding window", expected: "at least 1".into(), found: "0".into() });
            }
            // Sizes and frequencies are held to the same bounds as those of global layers.
            ModelShape { layers: 1, rope: rope.clone(), ..self.unchecked_shape(2) }.check()?;
        }
        match self.sliding_layers().count() == count && count > 0 {
            false => Ok(()),
            true => Err(InvalidShape {
                field: "layers that look back over the whole text",
                expected: "at least 1".into(),
                found: "0".into(),
            }),
        }
    }
}

fn positive(field: &'static str, found: f32) -> Result<(), InvalidShape> {
    match found.is_finite() && found > 0.0 {
        true => Ok(()),
        false => Err(InvalidShape { field, expected: "a positive number".into(), found: found.to_string() }),
    }
}
