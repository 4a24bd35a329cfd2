//! Landmark keys for a model that stays as it is: what is trained is the landmark's embedding and low-rank updates of the
//! projections (LoRA, Hu et al. 2021) for that one token, whose output only the index sees.
//!
//! Token keys choose blocks well and cost B times the bytes (see `KeyRule::Tokens`). A landmark's key is to choose as they
//! do. So the loss needs no text to be predicted and no gradient through the model:
//!
//! ```text
//! s_b(q) = log sum_j e^(q k_bj)    what the token keys of block b say      p = softmax over the blocks before q
//! l_b(q) = q k_b                   what its landmark says                  loss = KL(p || softmax(l))
//! ```
//!
//! for the queries `q` of every head as the model itself makes them, at the distance at which a block is looked up. The
//! text's first block, the sink, is no candidate, here as in a lookup; and in the first layer landmarks have nothing to
//! say, for they are all equal before any layer.
//!
//! One inference pass over a sequence gives `q`, `k` and `v` ([`teacher`]); then B - 1 of B tokens are done with, and
//! gradients flow through the landmarks alone ([`student`]).

mod student;
mod teacher;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType as TensorType, Device, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use self::student::Student;
use self::teacher::{Lesson, Teacher};
use super::batch::Batch;
use super::error::TrainError;
use super::model::float;
use super::weights::Parameter;
use super::weights::{EMBEDDING, normal};
use landmarkdb::DType;
use landmarkdb_llm::{
    ADAPTED_LAYERS_MIN, Adapter, LANDMARK_EMBEDDING, Landmark, Llama, ModelConfig, NamedTensor, adapter_shapes,
    read_tensors, write_adapter,
};

/// Queries of a sequence that are learned from: more cost more and say little that others have not said.
const QUERIES: usize = 256;

/// Tokens before a key's digit whose queries are learned from too: where a question is read, the answer is looked for.
const QUESTION_TOKENS: usize = 24;

/// The first block that may be chosen: the one before it is the sink.
const FIRST_BLOCK: usize = 1;

/// An adapter in training, and the model that it is for.
pub struct AdapterModel {
    config: ModelConfig,
    adapter: Adapter,
    parameters: Vec<Parameter>,
    teacher: Teacher,
    student: Student,
}

/// How well landmark keys choose `top_k` blocks, added up over queries and KV heads that have more to choose from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Choices {
    /// Choices of `top_k` blocks.
    pub(super) count: usize,
    /// Share of the blocks that token keys choose which landmark keys choose as well.
    pub(super) shared: f64,
    /// The same of keys that know nothing.
    pub(super) by_chance: f64,
}

impl AdapterModel {
    /// For the model in `path`, loaded as `base`. Updates are random for each seed, and zero in effect at first.
    ///
    /// # Errors
    /// Those of reading the model; a landmark or a rank that it cannot have.
    pub fn open(path: &Path, base: Llama, adapter: Adapter, seed: u64) -> Result<Self, TrainError> {
        let (base_config, tensors) = read_tensors(path)?;
        let tensors: HashMap<String, Tensor> =
            tensors.into_iter().map(|NamedTensor { name, tensor }| (name, tensor)).collect();
        let id = adapter.landmark as usize;
        let (vocab, layers) = (base_config.vocab, base_config.layers);
        let rules = [
            ("landmark token", id <= vocab, format!("one of the model's {vocab} tokens, or {vocab}"), id.to_string()),
            (
                "from",
                layers >= ADAPTED_LAYERS_MIN,
                format!("a model of at least {ADAPTED_LAYERS_MIN} layers"),
                layers.to_string(),
            ),
            ("from", base_config.landmark.is_none(), "a model without landmarks".into(), "one with landmarks".into()),
        ];
        if let Some((field, _, expected, found)) = rules.into_iter().find(|(_, holds, ..)| !holds) {
            return Err(TrainError::Invalid { field, expected, found });
        }
        let landmark = Landmark { id: adapter.landmark, block_tokens: adapter.block_tokens, hidden: true };
        let config = ModelConfig { vocab: vocab.max(id + 1), landmark: Some(landmark), ..base_config };
        config.check()?;
        let parameters = parameters(&config, &tensors[EMBEDDING], &adapter, seed)?;
        let teacher = Teacher::new(base, &config, adapter.block_tokens)?;
        let student = Student::new(&config, tensors, &parameters, &adapter);
        Ok(AdapterModel { config, adapter, parameters, teacher, student })
    }

    /// The hyperparameters, the landmark among them.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Every tensor that training changes.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// What is trained.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Mean divergence of what landmarks choose from what token keys choose, in nats: a scalar. Of each sequence it looks at
    /// some queries, others for another seed; they count by the batch's weights. None without a query that weighs
    /// something and has blocks to choose from.
    ///
    /// # Errors
    /// A batch that does not fit the model.
    pub fn loss(&self, batch: &Batch, seed: u64) -> Result<Option<Tensor>, TrainError> {
        let lessons = self.lessons(batch, seed)?;
        let losses = lessons.iter().map(|lesson| self.student.loss(lesson)).collect::<candle_core::Result<Vec<_>>>()?;
        match &losses[..] {
            [] => Ok(None),
            losses => Ok(Some(Tensor::stack(losses, 0)?.mean_all()?)),
        }
    }

    /// How many of the `top_k` blocks that token keys choose the landmarks choose too.
    pub(super) fn choices(&self, batch: &Batch, top_k: usize, seed: u64) -> Result<Choices, TrainError> {
        let mut choices = Choices::default();
        for lesson in self.lessons(batch, seed)? {
            choices += self.student.choices(&lesson, top_k)?;
        }
        Ok(choices)
    }

    /// One per sequence that there is something to learn from.
    fn lessons(&self, batch: &Batch, seed: u64) -> Result<Vec<Lesson>, TrainError> {
        batch.check(&self.config)?;
        if let Some((at, position)) =
            batch.positions.iter().enumerate().find(|(at, p)| at % batch.tokens != **p as usize)
        {
            return Err(TrainError::Invalid {
                field: "positions",
                expected: format!("{}, the token's place in its sequence", at % batch.tokens),
                found: position.to_string(),
            });
        }
        let mut lessons = Vec::with_capacity(batch.sequences);
        for (sequence, (ids, weights)) in
            batch.ids.chunks_exact(batch.tokens).zip(batch.weights.chunks_exact(batch.tokens)).enumerate()
        {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(sequence as u64);
            let queries = queries(weights, self.adapter.block_tokens as usize, &mut rng);
            if !queries.is_empty() {
                lessons.push(self.teacher.lesson(ids, &queries, weights)?);
            }
        }
        Ok(lessons)
    }

    /// Writes the files of [`write_adapter`] into a folder, values as `dtype`.
    ///
    /// # Errors
    /// A dtype that is no float, and those of writing files.
    pub fn save(&self, folder: &Path, dtype: DType) -> Result<(), TrainError> {
        let named = |p: &Parameter| NamedTensor { name: p.name.clone(), tensor: p.var.as_detached_tensor() };
        let tensors: Vec<NamedTensor> = self.parameters.iter().map(named).collect();
        Ok(write_adapter(folder, &self.adapter, &tensors, float(dtype)?)?)
    }
}

impl std::ops::AddAssign for Choices {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.shared += other.shared;
        self.by_chance += other.by_chance;
    }
}

/// Tokens whose queries are learned from, in order: keys' digits, which weigh more than other text, and what leads to them
/// first, then others by chance. Each has two blocks to choose from at least; none is a landmark.
fn queries(weights: &[f32], block_tokens: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let usual = weights.iter().copied().filter(|&weight| weight > 0.0).fold(f32::INFINITY, f32::min);
    let mut wanted = vec![false; weights.len()];
    for (token, _) in weights.iter().enumerate().filter(|(_, weight)| **weight > usual) {
        wanted[token.saturating_sub(QUESTION_TOKENS)..=token].fill(true);
    }
    let may = |token: &usize| *token >= (FIRST_BLOCK + 2) * block_tokens && weights[*token] > 0.0;
    let (mut queries, mut others): (Vec<usize>, Vec<usize>) =
        (0..weights.len()).filter(may).partition(|&token| wanted[token]);
    queries.truncate(QUERIES);
    while queries.len() < QUERIES && !others.is_empty() {
        queries.push(others.swap_remove(rng.random_range(0..others.len())));
    }
    queries.sort_unstable();
    queries
}

/// What an adapter begins as: the landmark a mean of all tokens, `A` random so that `A x` is as large as `x`, `B` zero.
fn parameters(
    config: &ModelConfig,
    embedding: &Tensor,
    adapter: &Adapter,
    seed: u64,
) -> Result<Vec<Parameter>, TrainError> {
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
            _ if name == LANDMARK_EMBEDDING => embedding.mean(0)?,
            &[rank, ins] if name.ends_with("lora_A.weight") => {
                let values = normal(&mut rng, rank * ins, (ins as f32).sqrt().recip());
                Tensor::from_vec(values, shape, &Device::Cpu)?
            }
            _ => Tensor::zeros(shape, TensorType::F32, &Device::Cpu)?,
        };
        let decay = name != LANDMARK_EMBEDDING;
        Ok(Parameter { name, var: Var::from_tensor(&tensor)?, decay })
    };
    adapter_shapes(config, adapter.rank).into_iter().map(parameter).collect()
}
