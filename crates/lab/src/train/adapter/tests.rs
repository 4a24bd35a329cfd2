//! A random base with an adapter: its loss against the definition, its gradients, what it learns, and whom it learns from.

use std::path::Path;

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::teacher::Recorder;
use super::{AdapterModel, QUERIES, queries};
use crate::train::tests::{batch, check_gradients, config, enlarge, scalar};
use crate::train::vocabulary::tests::prose;
use crate::train::vocabulary::train_vocabulary;
use crate::train::weights::normal;
use crate::train::{Batch, TrainingModel};
use landmarkdb::{DType, Retrieval};
use landmarkdb_llm::{Adapter, LoadedModel, Logits, ModelConfig, adapter_shapes};

const VOCAB: usize = 300;
const BLOCK_TOKENS: usize = 5;

/// The tokenizer's own token for it, and the one behind the vocabulary.
const LANDMARKS: [u32; 2] = [299, 300];

/// A folder with a random base model.
fn base(tied_output: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig { vocab: VOCAB, layers: 3, tied_output, ..config(None) };
    let model = TrainingModel::new(config, 3).unwrap();
    enlarge(&model);
    model.save(folder.path(), DType::F32).unwrap();
    add_tokenizer(folder.path());
    folder
}

fn add_tokenizer(folder: &Path) {
    std::fs::write(folder.join("tokenizer.json"), train_vocabulary(&[prose(60_000)], VOCAB).unwrap()).unwrap();
}

/// An adapter past the state in which every update is zero and half of the gradients vanish.
fn open(base: &Path, landmark: u32) -> AdapterModel {
    let known = LoadedModel::open(base).unwrap();
    let adapter = Adapter {
        base: base.display().to_string(),
        base_digest: known.model_digest,
        rank: 3,
        alpha: 6.0,
        landmark,
        block_tokens: BLOCK_TOKENS as u32,
    };
    let model = AdapterModel::open(base, known.llama, adapter, 1).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for parameter in model.parameters().iter().filter(|parameter| !parameter.name.contains("lora_A")) {
        let values = normal(&mut rng, parameter.var.elem_count(), 0.3);
        let random = Tensor::from_vec(values, parameter.var.shape(), parameter.var.device()).unwrap();
        parameter.var.set(&random).unwrap();
    }
    model
}

/// Saves the adapter and opens it as the model that answers.
fn reopen(model: &AdapterModel) -> LoadedModel {
    let folder = tempfile::tempdir().unwrap();
    model.save(folder.path(), DType::F32).unwrap();
    add_tokenizer(folder.path());
    LoadedModel::open(folder.path()).unwrap()
}

fn loss(model: &AdapterModel, batch: &Batch) -> Tensor {
    model.loss(batch, 0).unwrap().unwrap()
}

/// The loss by its definition, in double precision, from what the adapted model that answers computes.
fn defined(model: &LoadedModel, batch: &Batch) -> f64 {
    let config = model.config();
    let shape = config.shape(BLOCK_TOKENS as u32).unwrap();
    let (d, heads, group) = (shape.head_dim as usize, shape.query_heads as usize, shape.group());
    let kv_heads = heads / group;
    let reach = (Retrieval::default().top_k as usize + 1) * BLOCK_TOKENS + config.window().tokens + BLOCK_TOKENS / 2;
    let rotated = |x: &[f32], position: usize| {
        let mut x = x.to_vec();
        shape.rope.rotation(position as i64).apply(&mut x);
        x
    };
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    let log_sum_exp = |x: &[f64]| x.iter().map(|x| x.exp()).sum::<f64>().ln();
    let mut mean = 0.0;
    for sequence in 0..batch.sequences {
        let (mut total, mut losses) = (0.0, 0.0);
        let range = sequence * batch.tokens..(sequence + 1) * batch.tokens;
        let mut calls = Recorder::new(&shape, config.window());
        model.llama.forward(&batch.ids[range.clone()], &mut calls, Logits::None).unwrap();
        for [q, k, _] in &calls.layers[1..] {
            for (token, weight) in batch.weights[range.clone()].iter().map(|&weight| weight as f64).enumerate() {
                if token < 3 * BLOCK_TOKENS || weight == 0.0 {
                    continue;
                }
                for head in 0..heads {
                    let q = rotated(&q[(token * heads + head) * d..][..d], reach);
                    let score = |block: usize, place: usize| {
                        let token = block * BLOCK_TOKENS + place;
                        let key = rotated(&k[(token * kv_heads + head / group) * d..][..d], place);
                        dot(&q, &key) * shape.softmax_scale as f64
                    };
                    let blocks = 1..token / BLOCK_TOKENS;
                    let by_tokens =
                        |block| log_sum_exp(&(0..BLOCK_TOKENS - 1).map(|i| score(block, i)).collect::<Vec<_>>());
                    let by_tokens: Vec<f64> = blocks.clone().map(by_tokens).collect();
                    let by_landmark: Vec<f64> = blocks.map(|block| score(block, BLOCK_TOKENS - 1)).collect();
                    let (a, b) = (log_sum_exp(&by_tokens), log_sum_exp(&by_landmark));
                    let terms = by_tokens.iter().zip(by_landmark).map(|(t, l)| (t - a).exp() * ((t - a) - (l - b)));
                    losses += weight * terms.sum::<f64>();
                    total += weight;
                }
            }
        }
        mean += losses / total / batch.sequences as f64;
    }
    mean
}

#[test]
fn the_loss_is_the_divergence_of_the_model_that_answers() {
    for (tied_output, landmark) in [(true, 299), (true, 300), (false, 299), (false, 300)] {
        let base = base(tied_output);
        let model = open(base.path(), landmark);
        let batch = batch(model.config(), 2, 40, 4);
        let (trained, answered) = (scalar(&loss(&model, &batch)) as f64, defined(&reopen(&model), &batch));
        assert!(trained > 1e-2 && (trained - answered).abs() < 1e-4 * trained.max(1.0), "{trained} {answered}");
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for landmark in LANDMARKS {
        let base = base(true);
        let model = open(base.path(), landmark);
        let batch = batch(model.config(), 2, 30, 2);
        check_gradients(model.parameters(), || loss(&model, &batch));
    }
}

#[test]
fn gradient_steps_bring_the_choices_together() {
    let base = base(true);
    let model = open(base.path(), 300);
    let names: Vec<&str> = model.parameters().iter().map(|parameter| parameter.name.as_str()).collect();
    let shapes = adapter_shapes(model.config(), 3);
    assert_eq!(names, shapes.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());

    let batch = batch(model.config(), 2, 60, 7);
    let shared = || {
        let choices = model.choices(&batch, 2, 0).unwrap();
        assert!(choices.count > 0);
        choices.shared / choices.count as f64
    };
    let (before, first) = (shared(), scalar(&loss(&model, &batch)));
    for _ in 0..60 {
        let grads = loss(&model, &batch).backward().unwrap();
        for parameter in model.parameters() {
            let by = (grads.get(parameter.var.as_tensor()).unwrap() * 0.3).unwrap();
            parameter.var.set(&(parameter.var.as_detached_tensor() - by).unwrap()).unwrap();
        }
    }
    let (after, last) = (shared(), scalar(&loss(&model, &batch)));
    assert!(last < 0.8 * first && after > before, "{first} {last}, {before} {after}");
    let chance = model.choices(&batch, 2, 0).unwrap();
    // Queries of blocks 4 to 11 choose 2 of 3 to 10.
    assert!((0.2..0.4).contains(&(chance.by_chance / chance.count as f64)), "{chance:?}");
}

#[test]
fn questions_are_learned_from_first() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // Landmarks weigh nothing; the digits of a key more than others.
    let mut weights: Vec<f32> = (0..4096).map(|token| if (token + 1) % 64 == 0 { 0.0 } else { 1.0 }).collect();
    weights[3000..3005].fill(10.0);
    let found = queries(&weights, 64, &mut rng);
    assert_eq!(found.len(), QUERIES);
    assert!(found.is_sorted() && found[0] >= 192);
    assert!(found.iter().all(|&token| weights[token] > 0.0));
    let near = (2976..3005).filter(|&token| weights[token] > 0.0);
    assert!(near.into_iter().all(|token| found.contains(&token)));
    assert_ne!(found, queries(&weights, 64, &mut rng), "the others are drawn");

    let few = queries(&weights[..200], 64, &mut rng);
    assert_eq!(few, (192..200).collect::<Vec<_>>());
    assert!(queries(&weights[..192], 64, &mut rng).is_empty());
}
