//! The model as a whole: gradients, agreement with the model that answers, files.

use std::time::Instant;

use candle_core::Tensor;
use rand::{RngExt, SeedableRng};

use super::*;
use landmarkdb::{BlockAttention, DType, Rope};
use landmarkdb_llm::{Architecture, Biases, Landmark, Llama, LoadedModel, Logits, ModelConfig, test_model};

const LANDMARK: Landmark = Landmark { id: 29, block_tokens: 5, hidden: false };

pub(super) fn config(landmark: Option<Landmark>) -> ModelConfig {
    ModelConfig {
        layers: 2,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 6,
        hidden: 16,
        ffn: 20,
        vocab: 30,
        context_tokens: 64,
        norm_epsilon: 1e-5,
        rope: Rope::from_base(100.0, 6),
        tied_output: true,
        eos_ids: vec![0],
        landmark,
        architecture: Architecture::default(),
    }
}

/// Random tokens; landmarks where the model has them, without targets.
pub(super) fn batch(config: &ModelConfig, sequences: usize, tokens: usize, seed: u64) -> Batch {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let count = sequences * tokens;
    let ordinary = config.vocab as u32 - 1;
    let mut random = || (0..count).map(|_| rng.random_range(0..ordinary)).collect::<Vec<u32>>();
    let (mut ids, targets) = (random(), random());
    let mut weights: Vec<f32> = (0..count).map(|at| [1.0, 0.5, 10.0][at % 3]).collect();
    if let Some(landmark) = config.landmark {
        for at in (0..count).filter(|at| (at % tokens) as u32 % landmark.block_tokens == landmark.block_tokens - 1) {
            (ids[at], weights[at]) = (landmark.id, 0.0);
        }
    }
    let positions = (0..count).map(|at| (at % tokens) as u32).collect();
    Batch { sequences, tokens, ids, positions, targets, weights }
}

pub(super) fn scalar(x: &Tensor) -> f32 {
    x.to_scalar().unwrap()
}

pub(super) fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Larger weights than a fresh model's, so that no gradient drowns in rounding.
pub(super) fn enlarge(model: &TrainingModel) {
    for parameter in model.parameters().iter().filter(|parameter| !parameter.name.ends_with("norm.weight")) {
        parameter.var.set(&(parameter.var.as_detached_tensor() * 15.0).unwrap()).unwrap();
    }
}

#[test]
fn gradients_of_every_parameter_agree_with_finite_differences() {
    let cases = [
        (config(None), GroupDropout::NONE),
        (config(Some(LANDMARK)), GroupDropout::NONE),
        (ModelConfig { tied_output: false, ..config(Some(LANDMARK)) }, GroupDropout { rate: 0.3, seed: 4 }),
    ];
    for (config, dropout) in cases {
        let model = TrainingModel::new(config.clone(), 1).unwrap();
        enlarge(&model);
        let batch = batch(&config, 2, 17, 2);
        check_gradients(model.parameters(), || model.loss(&batch, dropout).unwrap());
    }
}

/// Compares the gradient of every parameter with finite differences.
pub(super) fn check_gradients(parameters: &[Parameter], loss: impl Fn() -> Tensor) {
    let grads = loss().backward().unwrap();
    let loss = || scalar(&loss()) as f64;
    for parameter in parameters {
        let gradient = flat(grads.get(parameter.var.as_tensor()).unwrap());
        let kept = parameter.var.as_detached_tensor().copy().unwrap();
        // Along the gradient itself the loss changes by its square: one number that every entry has a part in.
        let square: f64 = gradient.iter().map(|g| *g as f64 * *g as f64).sum();
        let step = 4e-3 / square.sqrt();
        let direction = grads.get(parameter.var.as_tensor()).unwrap().copy().unwrap();
        let shifted = |by: f64| {
            parameter.var.set(&(&kept + (&direction * by).unwrap()).unwrap()).unwrap();
            let loss = loss();
            parameter.var.set(&kept).unwrap();
            loss
        };
        let found = (shifted(step) - shifted(-step)) / (2.0 * step);
        assert!(square > 1e-9, "{}: no gradient", parameter.name);
        assert!((found / square - 1.0).abs() < 2e-2, "{}: {found} {square}", parameter.name);
    }
}

/// Mean weighted cross-entropy of what the model that answers says, in double precision.
fn inference_loss(llama: &Llama, batch: &Batch) -> f64 {
    let (mut sum, mut total) = (0.0, 0.0);
    let rows = batch.targets.chunks(batch.tokens).zip(batch.weights.chunks(batch.tokens));
    for (ids, (targets, weights)) in batch.ids.chunks(batch.tokens).zip(rows) {
        let mut attention = {
            let config = llama.config();
            BlockAttention::full(
                &config.shape(config.landmark.map_or(8, |l| l.block_tokens)).unwrap(),
                config.normalisation(),
            )
        };
        let logits = llama.forward(ids, &mut attention, Logits::All).unwrap();
        for ((row, &target), &weight) in logits.chunks(llama.config().vocab).zip(targets).zip(weights) {
            let lse = row.iter().map(|x| (*x as f64).exp()).sum::<f64>().ln();
            sum += weight as f64 * (lse - row[target as usize] as f64);
            total += weight as f64;
        }
    }
    sum / total
}

#[test]
fn a_saved_model_answers_with_the_loss_it_was_trained_at() {
    for (tied_output, landmark) in [(true, None), (false, None), (true, Some(LANDMARK)), (false, Some(LANDMARK))] {
        let config = ModelConfig { tied_output, ..config(landmark) };
        let model = TrainingModel::new(config.clone(), 3).unwrap();
        enlarge(&model);
        let batch = batch(&config, 2, 23, 4);
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path(), DType::F32).unwrap();
        let (trained, answered) = (
            scalar(&model.loss(&batch, GroupDropout::NONE).unwrap()),
            inference_loss(&Llama::open(folder.path()).unwrap(), &batch),
        );
        assert!((trained as f64 - answered).abs() < 1e-4, "{trained} {answered}");
    }
}

#[test]
fn smollm2_can_be_trained_further_from_its_gguf_file() {
    let Some(path) = test_model::smollm2() else { return };
    let model = TrainingModel::open(&path, None).unwrap();
    let answering = LoadedModel::open(&path).unwrap();
    assert_eq!(model.config(), answering.config());
    let text = "The river runs through the town and under three old bridges before it meets the sea.";
    let ids = answering.tokenizer.encode(text).unwrap().ids;
    let tokens = ids.len() - 1;
    let batch = Batch {
        sequences: 1,
        tokens,
        ids: ids[..tokens].to_vec(),
        positions: (0..tokens as u32).collect(),
        targets: ids[1..].to_vec(),
        weights: vec![1.0; tokens],
    };
    let (trained, answered) =
        (scalar(&model.loss(&batch, GroupDropout::NONE).unwrap()) as f64, inference_loss(&answering.llama, &batch));
    assert!((trained - answered).abs() < 1e-3 && answered < 6.0, "{trained} {answered}");
}

#[test]
fn a_past_stands_for_the_tokens_before() {
    let config = config(None);
    let model = TrainingModel::new(config.clone(), 3).unwrap();
    enlarge(&model);
    let whole = batch(&config, 2, 12, 5);
    let part = |range: std::ops::Range<usize>| {
        let take = |values: &[u32]| values.chunks(12).flat_map(|row| row[range.clone()].to_vec()).collect();
        Batch {
            sequences: 2,
            tokens: range.len(),
            ids: take(&whole.ids),
            positions: take(&whole.positions),
            targets: take(&whole.targets),
            weights: vec![1.0; 2 * range.len()],
        }
    };
    let equal = Batch { weights: vec![1.0; 24], ..whole.clone() };
    let want = scalar(&model.loss(&equal, GroupDropout::NONE).unwrap());
    let (first, past) = model.loss_with_past(&part(0..5), None, 100).unwrap();
    let (second, longer) = model.loss_with_past(&part(5..12), Some(&past), 3).unwrap();
    let got = (5.0 * scalar(&first) + 7.0 * scalar(&second)) / 12.0;
    assert!((got - want).abs() < 1e-5, "{got} {want}");
    assert!(second.backward().unwrap().get(model.parameters()[0].var.as_tensor()).is_some());
    let (third, _) = model.loss_with_past(&part(5..12), Some(&longer), 3).unwrap();
    assert_ne!(scalar(&third), scalar(&second), "a past of three tokens is another");
    let landmarks = TrainingModel::new(self::config(Some(LANDMARK)), 1).unwrap();
    let refused = landmarks.loss_with_past(&batch(landmarks.config(), 1, 5, 1), None, 4);
    assert!(matches!(refused, Err(TrainError::Invalid { field: "model", .. })));
}

#[test]
fn gradient_steps_lower_the_loss_of_what_is_seen_again() {
    for landmark in [None, Some(LANDMARK)] {
        let config = config(landmark);
        let model = TrainingModel::new(config.clone(), 6).unwrap();
        let batch = batch(&config, 2, 15, 7);
        let mut losses = Vec::new();
        for _ in 0..30 {
            let loss = model.loss(&batch, GroupDropout::NONE).unwrap();
            let grads = loss.backward().unwrap();
            for Parameter { var, .. } in model.parameters() {
                let step = (grads.get(var.as_tensor()).unwrap() * 0.1).unwrap();
                var.set(&(var.as_detached_tensor() - step).unwrap()).unwrap();
            }
            losses.push(scalar(&loss));
        }
        assert!((losses[0] - 30f32.ln()).abs() < 0.1, "a fresh model knows nothing: {losses:?}");
        assert!(losses[29] < 0.8 * losses[0], "{losses:?}");
    }
}

#[test]
fn what_is_saved_comes_back_and_equal_seeds_give_equal_models() {
    let config = ModelConfig { tied_output: false, ..config(Some(LANDMARK)) };
    let model = TrainingModel::new(config.clone(), 8).unwrap();
    let weights = |model: &TrainingModel| -> Vec<(String, Vec<f32>, bool)> {
        model.parameters().iter().map(|p| (p.name.clone(), flat(p.var.as_tensor()), p.decay)).collect()
    };
    assert_eq!(weights(&model), weights(&TrainingModel::new(config.clone(), 8).unwrap()));
    assert_ne!(weights(&model), weights(&TrainingModel::new(config.clone(), 9).unwrap()));
    let undecayed = model.parameters().iter().filter(|p| !p.decay).count();
    assert_eq!(undecayed, 1 + 2 * 2 + 1, "norms and the embedding");

    let folder = tempfile::tempdir().unwrap();
    model.save(folder.path(), DType::F16).unwrap();
    model.save(folder.path(), DType::F32).unwrap();
    let again = TrainingModel::open(folder.path(), None).unwrap();
    assert_eq!(again.config(), &config);
    assert_eq!(weights(&model), weights(&again));
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(files.len(), 2, "nothing temporary is left: {files:?}");

    model.save(folder.path(), DType::F16).unwrap();
    for ((_, exact, _), (_, rounded, _)) in
        weights(&model).iter().zip(weights(&TrainingModel::open(folder.path(), None).unwrap()))
    {
        assert!(exact.iter().zip(&rounded).all(|(a, b)| (a - b).abs() <= a.abs() / 2048.0 + 1e-7));
    }
    assert!(matches!(model.save(folder.path(), DType::Int8), Err(TrainError::Invalid { field: "dtype", .. })));
}

#[test]
fn a_landmark_added_to_a_model_begins_as_the_mean_token() {
    let plain = TrainingModel::new(ModelConfig { tied_output: false, ..config(None) }, 8).unwrap();
    let folder = tempfile::tempdir().unwrap();
    plain.save(folder.path(), DType::F32).unwrap();
    let open = |id| TrainingModel::open(folder.path(), Some(Landmark { id, block_tokens: 5, hidden: false }));
    let before = plain.parameters()[0].var.as_tensor().to_vec2::<f32>().unwrap();
    let mean: Vec<f32> = (0..16).map(|i| before.iter().map(|row| row[i]).sum::<f32>() / 30.0).collect();
    for (id, vocab) in [(30, 31), (0, 30), (12, 30), (29, 30)] {
        let model = open(id).unwrap();
        assert_eq!((model.config().vocab, model.config().landmark.unwrap().id), (vocab, id));
        for parameter in model.parameters().iter().filter(|p| p.name.contains("embed") || p.name.contains("lm_head")) {
            assert_eq!(parameter.var.dims(), [vocab, 16], "{}", parameter.name);
        }
        let after = model.parameters()[0].var.as_tensor().to_vec2::<f32>().unwrap();
        for (row, values) in after.iter().enumerate() {
            let want = if row == id as usize { &mean } else { &before[row] };
            assert!(values.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "row {row} of landmark {id}");
        }
    }
    assert!(matches!(open(31), Err(TrainError::Invalid { field: "landmark token", .. })));

    let trained = tempfile::tempdir().unwrap();
    let model = open(12).unwrap();
    model.parameters()[0]
        .var
        .set(&Tensor::from_vec(vec![0.5f32; 480], (30, 16), &candle_core::Device::Cpu).unwrap())
        .unwrap();
    model.save(trained.path(), DType::F32).unwrap();
    let again = TrainingModel::open(trained.path(), Some(Landmark { id: 12, block_tokens: 9, hidden: false })).unwrap();
    assert_eq!(again.config().landmark.unwrap().block_tokens, 9, "another block length");
    assert!(flat(again.parameters()[0].var.as_tensor()).iter().all(|&x| x == 0.5), "a trained landmark stays");
}

#[test]
fn batches_that_do_not_fit_are_refused_by_field() {
    let model = TrainingModel::new(config(Some(LANDMARK)), 1).unwrap();
    let refused = |change: fn(&mut Batch)| {
        let mut batch = batch(model.config(), 2, 10, 1);
        change(&mut batch);
        model.loss(&batch, GroupDropout::NONE).err().map(|error| match error {
            TrainError::Invalid { field, .. } => field,
            TrainError::LandmarkPlace { .. } => "landmark",
            other => panic!("{other}"),
        })
    };
    assert_eq!(refused(|_| {}), None);
    assert_eq!(refused(|b| b.tokens = 0), Some("sequences and tokens"));
    assert_eq!(refused(|b| b.ids.truncate(7)), Some("ids"));
    assert_eq!(refused(|b| b.positions.push(1)), Some("positions"));
    assert_eq!(refused(|b| b.ids[0] = 30), Some("ids"));
    assert_eq!(refused(|b| b.targets[0] = 30), Some("targets"));
    assert_eq!(refused(|b| b.targets[4] = 30), None, "a landmark's target is not read");
    assert_eq!(refused(|b| b.weights[3] = -1.0), Some("weights"));
    assert_eq!(refused(|b| b.weights[3] = f32::NAN), Some("weights"));
    assert_eq!(refused(|b| b.weights.fill(0.0)), Some("weights"));
    assert_eq!(refused(|b| b.ids[14] = 3), Some("landmark"));
    assert_eq!(refused(|b| b.ids[12] = 29), Some("landmark"));
    for rate in [-0.1, 1.0, f32::NAN] {
        let refused = model.loss(&batch(model.config(), 1, 5, 1), GroupDropout { rate, seed: 1 });
        assert!(matches!(refused, Err(TrainError::Invalid { field: "group dropout", .. })));
    }
    let impossible = ModelConfig { kv_heads: 3, ..config(None) };
    assert!(matches!(TrainingModel::new(impossible, 1), Err(TrainError::Shape(_))));
    let biases = Biases { qkv: true, ..Biases::default() };
    let other = ModelConfig { architecture: Architecture { biases, ..Architecture::default() }, ..config(None) };
    assert!(matches!(TrainingModel::new(other, 1), Err(TrainError::Invalid { field: "model", .. })));
}

/// Milliseconds of the fastest of some runs.
fn fastest(runs: usize, mut run: impl FnMut()) -> f64 {
    (0..runs).fold(f64::INFINITY, |best, _| {
        let start = Instant::now();
        run();
        best.min(start.elapsed().as_secs_f64() * 1e3)
    })
}

/// `CANDLE_NUM_THREADS=1 cargo test --release -p landmarkdb-lab --lib train::tests::a_step_takes -- --ignored --nocapture`; why, says
/// `main`.
#[test]
#[ignore = "a measurement"]
fn a_step_takes() {
    use super::attention::{Attention, Softmax};
    use super::ops::*;
    let landmark = Landmark { id: 511, block_tokens: 17, hidden: false };
    let shipped = ModelConfig {
        layers: 3,
        head_dim: 32,
        hidden: 128,
        ffn: 256,
        vocab: 512,
        rope: Rope::from_base(10_000.0, 32),
        ..config(Some(landmark))
    };
    for (sequences, blocks) in [(16, 8), (8, 16), (4, 30)] {
        let batch = batch(&shipped, sequences, blocks * 17, 1);
        println!("{sequences} sequences of {} tokens", batch.tokens);
        let model = TrainingModel::new(shipped.clone(), 1).unwrap();
        let dropout = GroupDropout::NONE;
        let forward = fastest(10, || drop(model.loss(&batch, dropout).unwrap()));
        let both = fastest(10, || drop(model.loss(&batch, dropout).unwrap().backward().unwrap()));
        println!("{:<34}{forward:9.2}{:9.2}{both:9.2} ms", "step: forward, backward, both", both - forward);

        let var = |dims: &[usize]| candle_core::Var::randn(0f32, 1.0, dims, &candle_core::Device::Cpu).unwrap();
        let rows = |width| var(&[sequences, batch.tokens, width]);
        let part = |name: &str, times: usize, op: &dyn Fn() -> candle_core::Result<Tensor>| {
            let forward = fastest(10, || drop(op().unwrap()));
            let value = op().unwrap();
            let both = fastest(10, || drop(value.backward().unwrap()));
            println!("  {times} x {name:<28}{forward:9.2}{both:9.2} ms");
        };
        let (q, k, x, ffn) = (rows(128), rows(64), rows(128), rows(256));
        let grouped = Softmax::Grouped { block_tokens: 17, dropout };
        for (name, softmax) in [("grouped attention", grouped), ("plain attention", Softmax::Plain)] {
            let attention = Attention { query_heads: 4, kv_heads: 2, head_dim: 32, softmax };
            part(name, 3, &|| attention.clone().apply(&q, &k, &k));
        }
        let rotations = std::sync::Arc::new(Rotations::new(&shipped.rope, &batch.positions));
        let rotation = fastest(10, || drop(Rotations::new(&shipped.rope, &batch.positions)));
        println!("  1 x rotations               {rotation:9.2} ms");
        part("rotate q", 3, &|| rotate(&q, &rotations, 32));
        part("rms norm", 7, &|| rms_norm(&x, &var(&[128]), 1e-5));
        part("swiglu", 3, &|| swiglu(&ffn, &ffn));
        for (times, ins, outs) in [(6, 128, 128), (6, 128, 64), (6, 128, 256), (3, 256, 128), (1, 128, 512)] {
            let (x, w) = (rows(ins), var(&[outs, ins]));
            part(&format!("linear {ins} -> {outs}"), times, &|| linear(&x, &w));
        }
        let logits = rows(512);
        let targets = Targets { ids: batch.targets.as_slice().into(), weights: batch.weights.as_slice().into() };
        part("cross-entropy", 1, &|| cross_entropy(&logits, targets.clone()));
    }
}
