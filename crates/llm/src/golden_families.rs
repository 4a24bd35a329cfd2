//! Every family against recorded outputs of Hugging Face transformers, from each of its files: `tests/golden/families` holds tiny
//! random models as a folder, as GGUF, and with the configuration that older versions wrote.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};

use super::error::{LoadError, RememberError, SaveError};
use super::families::FAMILIES;
use super::full_attention::PlainAttention;
use super::llama::{Llama, Logits};
use super::model_attention::ModelAttention;
use super::sliding::SlidingLayers;
use super::tensors::{Opened, open_weights, read_tensors, write_model};
use landmarkdb::{
    BlockAttention, BlockMemory, CollectionSpec, KeyRule, LocalMemory, NewTokens, Normalisation, Retrieval,
    SequenceAttention, Sha256Digest, Window,
};

/// Most that a logit may differ by. They are of the order of 1.
const OFF_MAX: f32 = 1e-3;

/// Models that are refused, by this.
pub(super) const REFUSED: &[(&str, &str)] = &[("ministral3", "found m")];

/// Models that take LongRoPE's long divisors for every text. Transformers takes the short ones for texts that are no longer than
/// the original context: of its answers the one to the long prompt is theirs.
const LONG: [&str; 2] = ["phi3-longrope", "phi4-mini"];
const LONG_PROMPT: &str = "p";

pub(super) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/families")
}

/// The tiny models by name.
pub(super) fn cases() -> Vec<String> {
    let entries = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.path().join("config.json").exists());
    let mut names: Vec<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(super) fn load(path: &Path) -> Result<Llama, LoadError> {
    let Opened { config, weights, .. } = open_weights(path)?;
    Llama::load(config, &*weights)
}

/// The folder with its older configuration, if it has one.
fn older(case: &str) -> Option<tempfile::TempDir> {
    let from = folder().join(case);
    let config = from.join("older/config.json");
    if !config.exists() {
        return None;
    }
    let older = tempfile::tempdir().unwrap();
    std::fs::copy(config, older.path().join("config.json")).unwrap();
    for file in ["model.safetensors", "generation_config.json"] {
        std::fs::copy(from.join(file), older.path().join(file)).unwrap();
    }
    Some(older)
}

/// One recorded prompt.
struct Recorded {
    ids: Vec<u32>,
    logits: Vec<f32>,
    greedy_ids: Vec<u32>,
}

fn recorded(case: &str) -> Vec<Recorded> {
    let path = folder().join(case).join(format!("golden/{case}.safetensors"));
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let ids = |name: String| -> Vec<u32> { tensors[&name].to_dtype(DType::U32).unwrap().to_vec1().unwrap() };
    let one = |prompt: &str| Recorded {
        ids: ids(format!("{prompt}.input_ids")),
        logits: tensors[&format!("{prompt}.logits_last")].to_vec1().unwrap(),
        greedy_ids: ids(format!("{prompt}.greedy_ids")),
    };
    let names = tensors.keys().filter_map(|name| name.strip_suffix(".input_ids"));
    names.filter(|prompt| !LONG.contains(&case) || *prompt == LONG_PROMPT).map(one).collect()
}

/// How far logits are from those that were recorded, of sequences that answer tokens with the logits of the last. Greedy tokens
/// that differ are infinitely far.
fn off<S: FnMut(&[u32]) -> Vec<f32>>(case: &str, mut begin: impl FnMut() -> S) -> f32 {
    let mut worst = 0.0_f32;
    for Recorded { ids, logits, greedy_ids } in recorded(case) {
        let mut sequence = begin();
        let mut found = sequence(&ids);
        assert_eq!(found.len(), logits.len(), "{case}");
        // NaN is far from everything.
        let far = |(a, b): (&f32, &f32)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() };
        worst = found.iter().zip(&logits).map(far).fold(worst, f32::max);
        for greedy in greedy_ids {
            let best = (0..found.len()).max_by(|&a, &b| found[a].total_cmp(&found[b])).unwrap() as u32;
            if best != greedy {
                return f32::INFINITY;
            }
            found = sequence(&[best]);
        }
    }
    assert!(worst > 0.0, "{case}: nothing was compared");
    worst
}

#[test]
fn every_case_gives_the_recorded_logits_from_each_of_its_files() {
    let mut wrong = Vec::new();
    for case in cases() {
        let path = folder().join(&case);
        let older = older(&case);
        let mut files = vec![("folder", path.clone())];
        files.extend(path.join("model.gguf").exists().then(|| ("gguf", path.join("model.gguf"))));
        files.extend(older.as_ref().map(|older| ("older", older.path().to_path_buf())));
        for (format, path) in files {
            match (load(&path), REFUSED.iter().find(|(name, _)| *name == case)) {
                (Ok(model), None) => {
                    let off = off(&case, || {
                        let (model, mut attention) = (&model, PlainAttention::new(model.config()));
                        move |ids| model.forward(ids, &mut attention, Logits::Last).unwrap()
                    });
                    println!("{case:<16} {format:<8} {off:.1e}");
                    if off.is_nan() || off > OFF_MAX {
                        wrong.push(format!("{case}, {format}: off by {off}"));
                    }
                }
                (Err(error), Some((_, key))) if error.to_string().contains(key) => {}
                (Err(error), _) => wrong.push(format!("{case}, {format}: {error}")),
                (Ok(_), Some((_, key))) => wrong.push(format!("{case}, {format}: is not refused for {key}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// With the attention that memories have, over layers that it counts from 0, and sliding layers beside it.
#[test]
fn every_case_gives_the_recorded_logits_with_the_attention_of_a_memory() {
    let mut compared = 0;
    for case in cases() {
        let Ok(model) = load(&folder().join(&case)) else { continue };
        let shape = model.config().shape(8).unwrap();
        // That attention sees everything.
        if model.config().architecture.window_tokens_max.is_some() {
            continue;
        }
        let off = off(&case, || {
            let mut below = BlockAttention::full(&shape, Normalisation::Plain);
            let mut sliding = SlidingLayers::new(model.config());
            let model = &model;
            move |ids| match &mut sliding {
                None => model.forward(ids, &mut below, Logits::Last).unwrap(),
                Some(sliding) => model.forward(ids, &mut sliding.over(&mut below).unwrap(), Logits::Last).unwrap(),
            }
        });
        println!("{case:<16} {off:.1e}");
        assert!(off < OFF_MAX, "{case}: off by {off}");
        compared += 1;
    }
    assert!(compared > 10, "{compared}");
}

/// A document that was interrupted twice and reopened gives what the model gives at once: sliding layers from the state that it
/// keeps, the others from its blocks.
#[test]
fn a_reopened_document_gives_the_recorded_logits() {
    for case in ["gemma3-270m", "gemma3-4b", "qwen2-window", "smollm3", "qwen3"] {
        let model = load(&folder().join(case)).unwrap();
        let config = model.config();
        let Recorded { ids, logits, .. } =
            recorded(case).into_iter().max_by_key(|recorded| recorded.ids.len()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(dir.path()).unwrap());
        let collection = memory.open_collection(&CollectionSpec {
            name: case.into(),
            shape: config.shape(8).unwrap(),
            key_rule: KeyRule::Tokens,
            payload_dtype: landmarkdb::DType::F32,
            key_dtype: landmarkdb::DType::F16,
            model_digest: Sha256Digest([1; 32]),
            tokenizer_digest: Sha256Digest([2; 32]),
            model_name: case.into(),
        });
        let collection = collection.unwrap();
        let window = Window { tokens: 16, ..Window::default() };
        let all = Retrieval { top_k: 100, ..Retrieval::default() };
        let document = || memory.open_document(collection.id, "text").unwrap();
        let read = || ModelAttention::read(config, &memory, &collection, &[document()], window, all.clone());
        let write = |to: usize| {
            let mut session =
                ModelAttention::write(config, &memory, &collection, &document(), window, Some(all.clone())).unwrap();
            let from = session.position();
            for ids in ids[from..to].chunks(16) {
                model.forward(ids, &mut session, Logits::None).unwrap();
                session.commit(NewTokens { ids, text: &[], offsets: &vec![0; ids.len()] }).unwrap();
            }
            (from, session)
        };
        let is_hybrid = SlidingLayers::new(config).is_some();
        drop(write(20));
        assert_eq!(is_hybrid, matches!(read().map(drop), Err(RememberError::NoState { .. })), "{case}");
        // Blocks alone do not bring the sliding layers back.
        let (from, mut session) = write(37);
        assert_eq!(from, if is_hybrid { 0 } else { 16 }, "{case}");
        session.flush().unwrap();
        drop(write(70));
        let (from, mut session) = write(95);
        assert_eq!(from, if is_hybrid { 37 } else { 64 }, "{case}");
        session.flush().unwrap();
        memory.seal(document().id).unwrap();

        let found = model.forward(&ids[95..], &mut read().unwrap(), Logits::Last).unwrap();
        let off = found.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{case:<16} {off:.1e}");
        assert!(off < OFF_MAX, "{case}: off by {off}");

        // Sealed by a writer that kept no state.
        let lost = memory.open_document(collection.id, "lost").unwrap();
        let mut session = ModelAttention::write(config, &memory, &collection, &lost, window, None).unwrap();
        model.forward(&ids[..16], &mut session, Logits::None).unwrap();
        session.commit(NewTokens { ids: &ids[..16], text: &[], offsets: &[0; 16] }).unwrap();
        let lost = memory.seal(lost.id).unwrap();
        let read = ModelAttention::read(config, &memory, &collection, &[lost], window, all.clone()).map(drop);
        assert_eq!(is_hybrid, matches!(read, Err(RememberError::LostState { .. })), "{case}");
    }
}

/// Training and adapters know plain Llama only: biases must not be dropped on the way to a file.
#[test]
fn what_is_not_plain_llama_is_asked_but_neither_trained_nor_written() {
    for case in ["llama-bias", "qwen2", "phi3", "mistral-window"] {
        let read = read_tensors(&folder().join(case));
        assert!(matches!(read, Err(LoadError::NotPlain { .. })), "{case}");
        let Opened { config, .. } = open_weights(&folder().join(case)).unwrap();
        let written = write_model(tempfile::tempdir().unwrap().path(), &config, &[], DType::F32);
        assert!(matches!(written, Err(SaveError::Architecture)), "{case}");
    }
    for case in ["llama", "mistral", "llama-linear"] {
        read_tensors(&folder().join(case)).unwrap();
    }
}

/// Whoever adds a family records what another implementation makes of it.
#[test]
fn every_family_has_a_case_in_each_of_its_formats() {
    let json = |case: &String| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder().join(case).join("config.json")).unwrap()).unwrap()
    };
    let cases: Vec<(String, bool)> = cases()
        .iter()
        .map(|case| {
            (json(case)["model_type"].as_str().unwrap().into(), folder().join(case).join("model.gguf").exists())
        })
        .collect();
    for family in FAMILIES {
        let of = |kind: &str, in_gguf: bool| cases.iter().any(|(case, gguf)| case == kind && (*gguf || !in_gguf));
        assert!(family.model_types.iter().any(|kind| of(kind, family.gguf.is_some())), "{}", family.model_types[0]);
        assert!(family.wrapper.is_none_or(|kind| of(kind, false)), "{:?}", family.wrapper);
    }
}

#[test]
fn other_kinds_of_models_are_refused_by_their_kind() {
    for entry in std::fs::read_dir(folder().join("refused")).unwrap() {
        let path = entry.unwrap().path();
        let message = open_weights(&path).err().expect("the model was opened").to_string();
        let kind = path.file_name().unwrap().to_str().unwrap();
        let named = if kind == "llama-dynamic" { "rope_type" } else { "model_type" };
        assert!(message.contains(named) && message.contains("expected") && !message.contains("damaged"), "{message}");
        assert!(kind == "llama-dynamic" || message.contains(&format!("found {kind}")), "{message}");
    }
}

/// The short divisors are those of a model that is used within its original context.
#[test]
fn longrope_of_a_short_context_takes_the_short_divisors() {
    let model = |context: u32| {
        let from = folder().join("phi3-longrope");
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        json["max_position_embeddings"] = context.into();
        json["rope_parameters"]["attention_factor"] = 1.25.into();
        std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        let Opened { config, .. } = open_weights(folder.path()).unwrap();
        (config.rope.frequencies[1], config.architecture.rotary_gain)
    };
    let ((short, gain), (long, _)) = (model(64), model(65));
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder().join("phi3-longrope/config.json")).unwrap()).unwrap();
    let divisor = |key: &str| json["rope_parameters"][key][1].as_f64().unwrap();
    assert!(((short / long) as f64 - divisor("long_factor") / divisor("short_factor")).abs() < 1e-5);
    assert_eq!(gain, 1.25 * 1.25);
}
