//! Landmarks for a model whose weights stay as they are: what is trained is the landmark's row of the embedding and a
//! low-rank update of every query and key projection (LoRA, Hu et al. 2021).

#[cfg(test)]
mod tests;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::error::TrainError;
use super::model::Parameter;
use super::ops::{LandmarkRow, linear};
use super::weights::{EMBEDDING, normal};
use crate::model::{Adapter, LANDMARK_EMBEDDING, ModelConfig, NamedTensor, adapter_shapes, put_row, update_names};

/// One projection: `y = W x + scale B A x`.
pub(super) struct Projection {
    /// `W (out, in)`
    pub(super) weight: Tensor,
    pub(super) update: Option<Update>,
}

/// A low-rank update.
pub(super) struct Update {
    /// `A (r, in)`
    down: Var,
    /// `B (out, r)`
    up: Var,
    scale: f64,
}

impl Projection {
    /// `x (.., in)` -> `(.., out)`
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = linear(x, &self.weight)?;
        match &self.update {
            None => Ok(y),
            Some(Update { down, up, scale }) => y + (linear(&linear(x, down)?, up)? * *scale)?,
        }
    }
}

impl Update {
    /// That of the projection whose weights have this Hugging Face name.
    pub(super) fn of(parameters: &[Parameter], weight: &str, scale: f64) -> Self {
        let [down, up] = update_names(weight).map(|name| find(parameters, &name));
        Update { down, up, scale }
    }
}

/// What an adapter of `config` begins as: the landmark's row as it is in `tensors`, `A` random so that `A x` is as large as
/// `x`, `B` zero. The model computes what it computed before.
pub(super) fn parameters(
    config: &ModelConfig,
    tensors: &[NamedTensor],
    adapter: &Adapter,
    seed: u64,
) -> std::result::Result<Vec<Parameter>, TrainError> {
    let rank_max = config.hidden.min(config.query_width()).min(config.kv_width());
    if !(1..=rank_max).contains(&adapter.rank) {
        return Err(TrainError::Invalid {
            field: "adapter",
            expected: format!("a rank of 1 to {rank_max}, that of the smallest projection"),
            found: adapter.rank.to_string(),
        });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let parameter = |(name, shape): (String, Vec<usize>)| {
        let tensor = match &shape[..] {
            _ if name == LANDMARK_EMBEDDING => embedding(tensors).get(adapter.landmark.id as usize)?.copy()?,
            &[rank, ins] if name.ends_with("lora_A.weight") => {
                let numbers = normal(&mut rng, rank * ins, (ins as f32).sqrt().recip());
                Tensor::from_vec(numbers, shape, &Device::Cpu)?
            }
            _ => Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
        };
        let decay = name != LANDMARK_EMBEDDING;
        Ok(Parameter { name, var: Var::from_tensor(&tensor)?, decay })
    };
    adapter_shapes(config, adapter.rank).into_iter().map(parameter).collect()
}

/// Takes the landmark's row out of the embedding among `tensors`: the parameter stands for it.
pub(super) fn landmark_row(
    tensors: &mut [NamedTensor],
    adapter: &Adapter,
    parameters: &[Parameter],
) -> Result<LandmarkRow> {
    let id = adapter.landmark.id;
    for named in tensors.iter_mut().filter(|named| named.name == EMBEDDING) {
        let zeros = named.tensor.narrow(0, 0, 1)?.zeros_like()?;
        named.tensor = put_row(&named.tensor, id as usize, &zeros)?;
    }
    Ok(LandmarkRow { id, row: find(parameters, LANDMARK_EMBEDDING) })
}

fn embedding(tensors: &[NamedTensor]) -> &Tensor {
    let named = tensors.iter().find(|named| named.name == EMBEDDING);
    &named.expect("every model has an embedding").tensor
}

fn find(parameters: &[Parameter], name: &str) -> Var {
    let parameter = parameters.iter().find(|parameter| parameter.name == name);
    parameter.expect("an adapter has the tensors of `adapter_shapes`").var.clone()
}
