//! A Llama-family model as parameters and a loss.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::attention::{Attention, Softmax};
use super::batch::Batch;
use super::error::TrainError;
use super::grouped::GroupDropout;
use super::ops::{Rotations, Targets, cross_entropy, embed, linear, rms_norm, rotate, swiglu};
use super::weights::{self, Parameter};
use landmarkdb::DType;
use landmarkdb_llm::{Landmark, ModelConfig, NamedTensor, read_tensors, write_model};

/// A model whose loss can be differentiated in every parameter.
pub struct TrainingModel {
    config: ModelConfig,
    parameters: Vec<Parameter>,
    /// `(vocab, hidden)`
    embedding: Tensor,
    layers: Vec<Layer>,
    /// `(hidden)`
    norm: Tensor,
    /// `(vocab, hidden)`; the embedding where they are tied.
    output: Tensor,
}

/// Handles to the tensors of one layer; shapes are those of `model::weights`.
struct Layer {
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_output: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// What a plain model keeps of the tokens before a batch (Dai et al. 2019, Transformer-XL): per layer the keys, rotated
/// to their positions, and the values, `(N, P, Hkv * D)` each. No gradient flows into it.
#[derive(Clone)]
pub struct Past {
    pub(super) layers: Vec<(Tensor, Tensor)>,
}

impl TrainingModel {
    /// A model with random weights, the same for equal seeds.
    ///
    /// # Errors
    /// A configuration that no model can have, or that of another architecture than plain Llama.
    pub fn new(config: ModelConfig, seed: u64) -> Result<Self, TrainError> {
        config.check()?;
        check_plain(&config)?;
        let parameters = weights::random(&config, seed)?;
        Ok(Self::all_trained(config, parameters))
    }

    /// A model from a `.gguf` file, or from a folder with `config.json` and safetensors weights. `landmark` makes an
    /// ordinary model one with landmarks: the landmark's rows of the embedding and the output are new, and the
    /// vocabulary grows by one if the token is the one behind its last.
    ///
    /// # Errors
    /// Those of reading the model, and a landmark that the model cannot have.
    pub fn open(path: &Path, landmark: Option<Landmark>) -> Result<Self, TrainError> {
        let (mut config, mut tensors) = read_tensors(path)?;
        if let Some(landmark) = landmark {
            weights::add_landmark(&mut config, &mut tensors, landmark)?;
            config.check()?;
        }
        let parameters = tensors.into_iter().map(weights::parameter).collect::<Result<_, _>>()?;
        Ok(Self::all_trained(config, parameters))
    }

    /// From all tensors.
    fn all_trained(config: ModelConfig, parameters: Vec<Parameter>) -> Self {
        let tensors: HashMap<&str, &Var> = parameters.iter().map(|p| (p.name.as_str(), &p.var)).collect();
        let tensor = |name: &str| tensors[format!("{name}.weight").as_str()].as_tensor().clone();
        let layer = |layer: u32| {
            let tensor = |part: &str| tensor(&format!("model.layers.{layer}.{part}"));
            Layer {
                attention_norm: tensor("input_layernorm"),
                query: tensor("self_attn.q_proj"),
                key: tensor("self_attn.k_proj"),
                value: tensor("self_attn.v_proj"),
                attention_output: tensor("self_attn.o_proj"),
                ffn_norm: tensor("post_attention_layernorm"),
                gate: tensor("mlp.gate_proj"),
                up: tensor("mlp.up_proj"),
                down: tensor("mlp.down_proj"),
            }
        };
        TrainingModel {
            embedding: tensor("model.embed_tokens"),
            layers: (0..config.layers).map(layer).collect(),
            norm: tensor("model.norm"),
            output: tensor(if config.tied_output { "model.embed_tokens" } else { "lm_head" }),
            config,
            parameters,
        }
    }

    /// The hyperparameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Every tensor that training changes, from the embedding to the output.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Mean cross-entropy of the batch, weighed, in nats: a scalar. Attention is grouped in a model with landmarks,
    /// plain causal in others.
    ///
    /// # Errors
    /// A batch or a dropout that does not fit the model.
    pub fn loss(&self, batch: &Batch, group_dropout: GroupDropout) -> Result<Tensor, TrainError> {
        batch.check(&self.config)?;
        group_dropout.check()?;
        let (logits, _) = self.forward(batch, group_dropout, None)?;
        batch_loss(&logits, batch)
    }

    /// [`TrainingModel::loss`] of a batch that goes on where `past` ends, and the past for the next one: the last
    /// `keep` tokens seen. The batch's positions go on too.
    ///
    /// # Errors
    /// A batch or a past that does not fit the model; a model with landmarks.
    pub fn loss_with_past(
        &self,
        batch: &Batch,
        past: Option<&Past>,
        keep: usize,
    ) -> Result<(Tensor, Past), TrainError> {
        batch.check(&self.config)?;
        if self.config.landmark.is_some() {
            return Err(TrainError::Invalid {
                field: "model",
                expected: "one without landmarks, as the recurrent baseline is".into(),
                found: "one with landmarks".into(),
            });
        }
        let none = Past { layers: Vec::new() };
        let (logits, mut seen) = self.forward(batch, GroupDropout::NONE, Some(past.unwrap_or(&none)))?;
        for (k, v) in &mut seen.layers {
            for kept in [k, v] {
                let (_, tokens, _) = kept.dims3()?;
                let start = tokens.saturating_sub(keep);
                *kept = kept.detach().narrow(1, start, tokens - start)?.contiguous()?;
            }
        }
        Ok((batch_loss(&logits, batch)?, seen))
    }

    /// Logits `(N, T, vocab)`; keys and values of all layers if there is a past, which then is their beginning.
    fn forward(&self, batch: &Batch, dropout: GroupDropout, past: Option<&Past>) -> Result<(Tensor, Past), TrainError> {
        let rotations = Arc::new(Rotations::new(&self.config.rope, &batch.positions));
        let mut x = embed(&self.embedding, batch.ids.as_slice().into(), batch.sequences)?;
        let mut seen = Past { layers: Vec::new() };
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, self.config.norm_epsilon)?;
            let head_dim = self.config.head_dim as usize;
            let q = rotate(&linear(&normed, &layer.query)?, &rotations, head_dim)?;
            let mut k = rotate(&linear(&normed, &layer.key)?, &rotations, head_dim)?;
            let mut v = linear(&normed, &layer.value)?;
            if let Some(past) = past {
                if let Some((past_k, past_v)) = past.layers.get(index) {
                    (k, v) = (Tensor::cat(&[past_k, &k], 1)?, Tensor::cat(&[past_v, &v], 1)?);
                }
                seen.layers.push((k.clone(), v.clone()));
            }
            let attended = self.attention(index, dropout).apply(&q, &k, &v)?;
            x = (x + linear(&attended, &layer.attention_output)?)?;
            let normed = rms_norm(&x, &layer.ffn_norm, self.config.norm_epsilon)?;
            let gated = swiglu(&linear(&normed, &layer.gate)?, &linear(&normed, &layer.up)?)?;
            x = (x + linear(&gated, &layer.down)?)?;
        }
        let normed = rms_norm(&x, &self.norm, self.config.norm_epsilon)?;
        Ok((linear(&normed, &self.output)?, seen))
    }

    fn attention(&self, layer: usize, dropout: GroupDropout) -> Attention {
        Attention {
            query_heads: self.config.query_heads as usize,
            kv_heads: self.config.kv_heads as usize,
            head_dim: self.config.head_dim as usize,
            softmax: match self.config.landmark {
                None => Softmax::Plain,
                Some(landmark) => {
                    Softmax::Grouped { block_tokens: landmark.block_tokens as usize, dropout: dropout.within(layer) }
                }
            },
        }
    }

    /// Writes `model.safetensors`, its values as `dtype`, and `config.json` into a folder, each in the place of an
    /// older one at once. [`Llama::open`](landmarkdb_llm::Llama::open) reads them.
    ///
    /// # Errors
    /// A dtype that is no float, rotary frequencies that a configuration cannot tell, and those of writing files.
    pub fn save(&self, folder: &Path, dtype: DType) -> Result<(), TrainError> {
        let named = |p: &Parameter| NamedTensor { name: p.name.clone(), tensor: p.var.as_detached_tensor() };
        let tensors: Vec<NamedTensor> = self.parameters.iter().map(named).collect();
        Ok(write_model(folder, &self.config, &tensors, float(dtype)?)?)
    }
}

/// The dtype of a file's values.
pub(super) fn float(dtype: DType) -> Result<candle_core::DType, TrainError> {
    match dtype {
        DType::F32 => Ok(candle_core::DType::F32),
        DType::F16 => Ok(candle_core::DType::F16),
        DType::BF16 => Ok(candle_core::DType::BF16),
        DType::Int8 => {
            Err(TrainError::Invalid { field: "dtype", expected: "f32, f16 or bf16".into(), found: dtype.to_string() })
        }
    }
}

fn batch_loss(logits: &Tensor, batch: &Batch) -> Result<Tensor, TrainError> {
    let targets = Targets { ids: batch.targets.as_slice().into(), weights: batch.weights.as_slice().into() };
    Ok(cross_entropy(logits, targets)?)
}

/// The loss is that of plain Llama, without biases and whatever else other architectures have.
pub(super) fn check_plain(config: &ModelConfig) -> Result<(), TrainError> {
    match config.architecture.is_plain() {
        true => Ok(()),
        false => Err(TrainError::Invalid {
            field: "model",
            expected: "a plain Llama model, which is what can be trained".into(),
            found: "one of another architecture".into(),
        }),
    }
}
