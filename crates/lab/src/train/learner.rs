//! What a training changes: a whole model or an adapter.

use std::path::Path;

use candle_core::Tensor;

use super::adapter::AdapterModel;
use super::batch::Batch;
use super::error::TrainError;
use super::grouped::GroupDropout;
use super::model::{Past, TrainingModel};
use super::recipe::{Kind, Recipe};
use super::weights::Parameter;
use landmarkdb::DType;
use landmarkdb_llm::{Adapter, ModelConfig};

pub(super) enum Learner {
    Whole(Box<TrainingModel>),
    Adapter(Box<AdapterModel>),
}

impl Learner {
    pub(super) fn config(&self) -> &ModelConfig {
        match self {
            Learner::Whole(model) => model.config(),
            Learner::Adapter(model) => model.config(),
        }
    }

    pub(super) fn parameters(&self) -> &[Parameter] {
        match self {
            Learner::Whole(model) => model.parameters(),
            Learner::Adapter(model) => model.parameters(),
        }
    }

    /// What is trained, unless it is the whole model.
    pub(super) fn adapter(&self) -> Option<&Adapter> {
        match self {
            Learner::Whole(_) => None,
            Learner::Adapter(model) => Some(model.adapter()),
        }
    }

    /// What the step lowers, in nats: a scalar. A recurrent model takes `past` and leaves the one for the next step.
    pub(super) fn loss(
        &self,
        recipe: &Recipe,
        step: u64,
        batch: &Batch,
        past: &mut Option<Past>,
    ) -> Result<Tensor, TrainError> {
        // Another pattern of dropped blocks, or other queries, in every step.
        let seed = (recipe.seed << 32) ^ step;
        match (self, recipe.kind) {
            (Learner::Adapter(model), _) => {
                let loss = model.loss(batch, seed)?;
                Ok(loss.expect("a recipe's sequences have 4 blocks, of which the last has something to choose from"))
            }
            (Learner::Whole(model), Kind::Landmark | Kind::Plain) => {
                model.loss(batch, GroupDropout { rate: recipe.group_dropout, seed })
            }
            (Learner::Whole(model), Kind::Recurrent) => {
                let (loss, seen) = model.loss_with_past(batch, past.as_ref(), batch.tokens)?;
                *past = Some(seen);
                Ok(loss)
            }
        }
    }

    /// The loss on a batch by itself, for measuring.
    pub(super) fn measured_loss(&self, batch: &Batch) -> Result<Option<Tensor>, TrainError> {
        match self {
            Learner::Whole(model) => model.loss(batch, GroupDropout::NONE).map(Some),
            Learner::Adapter(model) => model.loss(batch, 0),
        }
    }

    pub(super) fn save(&self, folder: &Path, dtype: DType) -> Result<(), TrainError> {
        match self {
            Learner::Whole(model) => model.save(folder, dtype),
            Learner::Adapter(model) => model.save(folder, dtype),
        }
    }
}
