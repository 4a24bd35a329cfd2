//! A random base with an adapter: what it computes, what it learns, and what the model that answers makes of its files.

use std::path::Path;

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::attention::BlockAttention;
use crate::model::{Adapter, Landmark, LoadedModel, Logits, ModelConfig, adapter_shapes, read_tensors};
use crate::train::tests::{batch, check_gradients, config, enlarge, flat, inference_loss, scalar};
use crate::train::vocabulary::tests::prose;
use crate::train::vocabulary::train_vocabulary;
use crate::train::weights::normal;
use crate::train::{Batch, GroupDropout, TrainingModel};
use crate::types::{DType, Normalisation};

const VOCAB: usize = 300;

/// The tokenizer's own token for it, and the one behind the vocabulary.
const LANDMARKS: [u32; 2] = [299, 300];

fn base_config(tied_output: bool) -> ModelConfig {
    ModelConfig { vocab: VOCAB, tied_output, ..config(None) }
}

/// A folder with a random base model.
fn base(config: ModelConfig) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = TrainingModel::new(config, 3).unwrap();
    enlarge(&model);
    model.save(folder.path(), DType::F32).unwrap();
    add_tokenizer(folder.path());
    folder
}

fn add_tokenizer(folder: &Path) {
    std::fs::write(folder.join("tokenizer.json"), train_vocabulary(&[prose(60_000)], VOCAB).unwrap()).unwrap();
}

fn open_adapted(base: &Path, landmark: u32) -> TrainingModel {
    let adapter = Adapter {
        base: base.display().to_string(),
        base_digest: LoadedModel::open(base).unwrap().model_digest,
        rank: 3,
        alpha: 6.0,
        landmark: Landmark { id: landmark, block_tokens: 5 },
    };
    TrainingModel::open_adapted(base, adapter, 1).unwrap()
}

/// Saves the adapter and opens it as the model that answers.
fn reopen(model: &TrainingModel) -> LoadedModel {
    let folder = tempfile::tempdir().unwrap();
    model.save(folder.path(), DType::F32).unwrap();
    add_tokenizer(folder.path());
    LoadedModel::open(folder.path()).unwrap()
}

/// Ends the state in which every update is zero and half of the gradients vanish. The landmark starts as a mean of random
/// rows, so small that its normalisation bends within a finite difference: it becomes as large as other rows.
fn stir(model: &TrainingModel) {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for parameter in model.parameters().iter().filter(|parameter| !parameter.name.contains("lora_A")) {
        let numbers = normal(&mut rng, parameter.var.elem_count(), 0.3);
        let random = Tensor::from_vec(numbers, parameter.var.shape(), parameter.var.device()).unwrap();
        parameter.var.set(&random).unwrap();
    }
}

#[test]
fn an_adapter_that_learned_nothing_changes_nothing() {
    for (tied_output, landmark) in [(true, 299), (true, 300), (false, 299), (false, 300)] {
        let base = base(base_config(tied_output));
        let adapted = reopen(&open_adapted(base.path(), landmark));
        let logits = |model: &LoadedModel| {
            let mut attention = BlockAttention::full(&model.shape(5).unwrap(), Normalisation::Plain);
            let logits = model.llama.forward(&[1, 5, 2, 8, 3, 13], &mut attention, Logits::All).unwrap();
            let rows = logits.chunks(model.config().vocab);
            rows.map(|row| row[..LANDMARKS[0] as usize].to_vec()).collect::<Vec<_>>()
        };
        assert_eq!(logits(&adapted), logits(&LoadedModel::open(base.path()).unwrap()));
    }
}

#[test]
fn gradients_of_an_adapter_agree_with_finite_differences() {
    for (tied_output, landmark) in [(true, 299), (true, 300), (false, 300)] {
        let base = base(base_config(tied_output));
        let model = open_adapted(base.path(), landmark);
        stir(&model);
        check_gradients(&model, &batch(model.config(), 2, 17, 2), GroupDropout { rate: 0.3, seed: 4 });
    }
}

#[test]
fn a_saved_adapter_answers_with_the_loss_it_was_trained_at() {
    for (tied_output, landmark) in [(true, 299), (true, 300), (false, 299), (false, 300)] {
        let base = base(base_config(tied_output));
        let model = open_adapted(base.path(), landmark);
        stir(&model);
        let batch = batch(model.config(), 2, 23, 4);
        let trained = scalar(&model.loss(&batch, GroupDropout::NONE).unwrap()) as f64;
        let answered = inference_loss(&reopen(&model).llama, &batch);
        assert!((trained - answered).abs() < 1e-4, "{trained} {answered}");
    }
}

#[test]
fn gradient_steps_lower_the_loss_and_leave_the_base() {
    for landmark in LANDMARKS {
        let base = base(base_config(true));
        let model = open_adapted(base.path(), landmark);
        let names: Vec<String> = model.parameters().iter().map(|parameter| parameter.name.clone()).collect();
        let shapes = adapter_shapes(model.config(), 3);
        assert_eq!(names, shapes.into_iter().map(|(name, _)| name).collect::<Vec<_>>());

        let batch = batch(model.config(), 2, 15, 7);
        let losses = descend(&model, &batch);
        assert!(losses[29] < 0.97 * losses[0], "{losses:?}");

        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path(), DType::F32).unwrap();
        let (_, before) = read_tensors(base.path()).unwrap();
        let (_, after) = read_tensors(folder.path()).unwrap();
        for (before, after) in before.iter().zip(&after) {
            let (name, before, after) = (&before.name, flat(&before.tensor), flat(&after.tensor));
            if name.contains("q_proj") || name.contains("k_proj") {
                assert_ne!(before, after, "{name}");
            } else {
                let rows = before.chunks(16).zip(after.chunks(16)).enumerate();
                let changed: Vec<usize> = rows.filter(|(_, (a, b))| a != b).map(|(row, _)| row).collect();
                let own = name.contains("embed") && landmark == 299;
                assert_eq!(changed, if own { vec![299] } else { vec![] }, "{name}");
            }
        }
    }
}

/// Thirty steps of plain gradient descent.
fn descend(model: &TrainingModel, batch: &Batch) -> Vec<f32> {
    let step = |_| {
        let loss = model.loss(batch, GroupDropout::NONE).unwrap();
        let grads = loss.backward().unwrap();
        for parameter in model.parameters() {
            let by = (grads.get(parameter.var.as_tensor()).unwrap() * 0.02).unwrap();
            parameter.var.set(&(parameter.var.as_detached_tensor() - by).unwrap()).unwrap();
        }
        scalar(&loss)
    };
    (0..30).map(step).collect()
}
