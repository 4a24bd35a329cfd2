//! How well a model does on texts that it was not trained on.

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::adapter::{AdapterModel, Choices};
use super::error::TrainError;
use super::grouped::GroupDropout;
use super::learner::Learner;
use super::mixture::{layout, plain_text};
use super::model::{Past, TrainingModel};
use super::recipe::{Kind, Recipe};
use super::sequence::{Layout, Token};
use super::texts::Texts;
use landmarkdb::Retrieval;

/// Sequences that are predicted: enough to tell models apart by a percent, few enough to take seconds.
const SEQUENCES_MAX: usize = 128;

/// Sequences that an adapter is judged by: each has choices by the ten thousand, and reading one costs seconds.
const ADAPTER_SEQUENCES_MAX: usize = 8;

/// The result over all texts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Validation {
    /// Of a whole model.
    Prediction {
        /// `e^` mean negative log-likelihood.
        perplexity: f64,
        /// Tokens that were predicted.
        counted_tokens: usize,
    },
    /// Of an adapter: how its landmarks choose blocks, where there are more than are chosen.
    Choice {
        /// Which share of the blocks that token keys choose its landmarks choose too, as many being chosen.
        shared: f64,
        /// The same share of keys that know nothing.
        by_chance: f64,
        /// Blocks of a choice.
        top_k: usize,
        /// Choices that were compared, in all layers but the first.
        choices: usize,
    },
}

/// Negative log-likelihood, added up.
#[derive(Default)]
struct Sum {
    nats: f64,
    tokens: f64,
}

/// On windows of the length of the recipe's last phase, evenly spaced over the texts.
pub(super) fn validate(learner: &Learner, recipe: &Recipe, texts: &Texts) -> Result<Validation, TrainError> {
    match learner {
        Learner::Whole(model) => predict(model, recipe, texts),
        Learner::Adapter(model) => choose(model, recipe, texts),
    }
}

fn choose(model: &AdapterModel, recipe: &Recipe, texts: &Texts) -> Result<Validation, TrainError> {
    let (phase, _) = recipe.phase(recipe.steps);
    let layout = layout(recipe, &phase, model.config().landmark.map(|landmark| landmark.id));
    texts.check_window(layout.document_tokens())?;
    let top_k = Retrieval::default().top_k as usize;
    let mut compared = Choices::default();
    for (seed, window) in texts.spread(layout.document_tokens(), ADAPTER_SEQUENCES_MAX).into_iter().enumerate() {
        compared += model.choices(&layout.step(&[plain_text(window)], 0, no_jumps).batch, top_k, seed as u64)?;
    }
    let Choices { count: choices, shared, by_chance } = compared;
    let mean = |sum: f64| sum / choices.max(1) as f64;
    Ok(Validation::Choice { shared: mean(shared), by_chance: mean(by_chance), top_k, choices })
}

/// Perplexity. Each window begins without a past; of a recurrent model each stream of windows does.
fn predict(model: &TrainingModel, recipe: &Recipe, texts: &Texts) -> Result<Validation, TrainError> {
    let (phase, _) = recipe.phase(recipe.steps);
    let layout = Layout { pos_jump: 0, ..layout(recipe, &phase, model.config().landmark.map(|landmark| landmark.id)) };
    let tokens = layout.document_tokens();
    texts.check_window(tokens)?;
    let mut sum = Sum::default();
    match recipe.kind {
        Kind::Landmark | Kind::Plain => {
            let windows: Vec<Vec<Token>> = texts.spread(tokens, SEQUENCES_MAX).into_iter().map(plain_text).collect();
            for windows in windows.chunks(phase.sequences) {
                let batch = layout.step(windows, 0, no_jumps).batch;
                sum.add(&model.loss(&batch, GroupDropout::NONE)?, &batch.weights)?;
            }
        }
        Kind::Recurrent => {
            let streams = phase.sequences.min(SEQUENCES_MAX) as u64;
            let mut past: Option<Past> = None;
            for step in 0..(SEQUENCES_MAX as u64 / streams) {
                let read = step * layout.tokens() as u64;
                let begin = |stream: u64| stream * texts.tokens() as u64 / streams;
                let windows: Vec<Vec<Token>> =
                    (0..streams).map(|stream| plain_text(&texts.read(begin(stream) + read, tokens))).collect();
                let batch = layout.step(&windows, read as u32, no_jumps).batch;
                let (loss, seen) = model.loss_with_past(&batch, past.as_ref(), layout.tokens())?;
                past = Some(seen);
                sum.add(&loss, &batch.weights)?;
            }
        }
    }
    Ok(Validation::Prediction { perplexity: (sum.nats / sum.tokens).exp(), counted_tokens: sum.tokens as usize })
}

impl Sum {
    /// Adds a batch's mean over its predicted tokens.
    fn add(&mut self, loss: &Tensor, weights: &[f32]) -> Result<(), TrainError> {
        let tokens: f64 = weights.iter().map(|&weight| weight as f64).sum();
        self.nats += loss.to_scalar::<f32>()? as f64 * tokens;
        self.tokens += tokens;
        Ok(())
    }
}

/// Positions do not jump, so nothing is drawn from this.
fn no_jumps(_: usize) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(0)
}
