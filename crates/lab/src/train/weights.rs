//! Where a model's parameters come from, by chance or from a file.

use candle_core::{Device, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::error::TrainError;
use landmarkdb_llm::{Landmark, ModelConfig, NamedTensor, put_row, tensor_shapes};

/// Standard deviation of random weights.
const DEVIATION: f32 = 0.02;

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
const OUTPUT: &str = "lm_head.weight";

/// One tensor that training changes.
pub struct Parameter {
    /// Its Hugging Face name; of an adapter, its name in the adapter's file.
    pub name: String,
    /// Its values, f32. Each step sets new ones.
    pub var: Var,
    /// Whether weight decay applies: false for norms and embeddings.
    pub decay: bool,
}

/// Random weights: normal, those that write to the residual stream smaller by `sqrt(2 L)` so that its variance does not
/// grow with depth (Radford et al. 2019); norms are 1.
pub(super) fn random(config: &ModelConfig, seed: u64) -> Result<Vec<Parameter>, TrainError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let residual = DEVIATION / (2.0 * config.layers as f32).sqrt();
    let random = |(name, shape): (String, Vec<usize>)| {
        let count = shape.iter().product();
        let values = if is_norm(&name) {
            vec![1.0; count]
        } else if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
            normal(&mut rng, count, residual)
        } else {
            normal(&mut rng, count, DEVIATION)
        };
        parameter(NamedTensor { name, tensor: Tensor::from_vec(values, shape, &Device::Cpu)? })
    };
    tensor_shapes(config).into_iter().map(random).collect()
}

/// A parameter that starts as `tensor`.
pub(super) fn parameter(NamedTensor { name, tensor }: NamedTensor) -> Result<Parameter, TrainError> {
    let decay = !is_norm(&name) && name != EMBEDDING;
    Ok(Parameter { name, var: Var::from_tensor(&tensor)?, decay })
}

/// Makes the model one with landmarks. Unless the token was the landmark before, its rows of the embedding and of the
/// output become the mean of all: a token unlike no other, whose meaning is learned.
pub(super) fn add_landmark(
    config: &mut ModelConfig,
    tensors: &mut [NamedTensor],
    landmark: Landmark,
) -> Result<(), TrainError> {
    let id = landmark.id as usize;
    if id > config.vocab {
        return Err(TrainError::Invalid {
            field: "landmark token",
            expected: format!("one of the model's {0} tokens, or {0}, the next one", config.vocab),
            found: id.to_string(),
        });
    }
    if config.landmark.is_none_or(|known| known.id != landmark.id) {
        for named in tensors.iter_mut().filter(|named| named.name == EMBEDDING || named.name == OUTPUT) {
            named.tensor = put_row(&named.tensor, id, &named.tensor.mean_keepdim(0)?)?;
        }
        config.vocab = config.vocab.max(id + 1);
    }
    config.landmark = Some(landmark);
    Ok(())
}

fn is_norm(name: &str) -> bool {
    name.ends_with("norm.weight")
}

/// Normal values of mean 0, two from each pair of uniform ones (Box and Muller 1958).
pub(super) fn normal(rng: &mut ChaCha8Rng, count: usize, deviation: f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // 1 - u is above 0, so that its logarithm is finite.
        let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt() * deviation;
        let (sin, cos) = (std::f32::consts::TAU * rng.random::<f32>()).sin_cos();
        values.extend([radius * cos, radius * sin]);
    }
    values.truncate(count);
    values
}
