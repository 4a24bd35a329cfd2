//! Every family's files with one thing wrong: the error names it, in both formats. So no family forgets a check that others have.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::error::LoadError;
use super::foreign_files::Parts;
use super::golden_families::{REFUSED, cases, folder, load};
use super::tensors::open_weights;

type Tensors = HashMap<String, Tensor>;

/// The tiny models that open.
fn opened() -> Vec<String> {
    let opened = cases().into_iter().filter(|case| !REFUSED.iter().any(|(refused, _)| refused == case));
    let opened: Vec<String> = opened.collect();
    assert!(opened.len() > 20, "{opened:?}");
    opened
}

/// Why the folder of a case is refused after a change.
fn refused_folder(case: &str, change: impl FnOnce(&mut serde_json::Value, &mut Tensors)) -> LoadError {
    let (from, copy) = (folder().join(case), tempfile::tempdir().unwrap());
    let mut json = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    let mut tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    change(&mut json, &mut tensors);
    std::fs::write(copy.path().join("config.json"), json.to_string()).unwrap();
    candle_core::safetensors::save(&tensors, copy.path().join("model.safetensors")).unwrap();
    load(copy.path()).err().unwrap_or_else(|| panic!("{case}: the folder was opened"))
}

/// Why the GGUF file of a case is refused after a change; none if the case has no such file.
fn refused_gguf(case: &str, change: impl FnOnce(Parts) -> Parts) -> Option<LoadError> {
    let path = folder().join(case).join("model.gguf");
    if !path.exists() {
        return None;
    }
    let copy = tempfile::tempdir().unwrap();
    let changed = copy.path().join("model.gguf");
    std::fs::write(&changed, change(Parts::of(&path)).bytes()).unwrap();
    Some(load(&changed).err().unwrap_or_else(|| panic!("{case}: the file was opened")))
}

/// The names of a file's tensors that a text goes through.
fn names(case: &str) -> Vec<String> {
    let path = folder().join(case).join("model.safetensors");
    let mut names: Vec<String> = candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_keys().collect();
    names.retain(|name| !name.contains("vision_tower") && !name.contains("multi_modal_projector"));
    // One layer tells as much as all.
    names.retain(|name| !name.contains("layers.") || name.contains("layers.1."));
    names
}

fn like(tensor: &Tensor, value: f32) -> Tensor {
    Tensor::full(value, tensor.shape(), &Device::Cpu).unwrap().to_dtype(tensor.dtype()).unwrap()
}

#[test]
fn each_tensor_is_needed_finite_and_known() {
    for case in opened() {
        for name in names(&case) {
            match refused_folder(&case, |_, tensors| {
                drop(tensors.insert(name.clone(), like(&tensors[&name], f32::NAN)))
            }) {
                LoadError::NotFinite { name: found, .. } => assert_eq!(found, name, "{case}"),
                other => panic!("{case}: NaN in {name}: {other}"),
            }
            match refused_folder(&case, |_, tensors| drop(tensors.remove(&name))) {
                LoadError::MissingTensor { name: found, .. } => {
                    assert!(name.ends_with(&found), "{case}: {name} {found}")
                }
                other => panic!("{case}: without {name}: {other}"),
            }
        }
        let extra = "model.layers.1.self_attn.sinks";
        let one = Tensor::ones(1, candle_core::DType::F32, &Device::Cpu).unwrap();
        match refused_folder(&case, |_, tensors| drop(tensors.insert(extra.into(), one))) {
            LoadError::UnknownTensor { name, .. } => assert_eq!(name, extra),
            other => panic!("{case}: {other}"),
        }
    }
}

#[test]
fn each_gguf_tensor_is_needed_finite_and_known() {
    for case in opened() {
        let path = folder().join(&case).join("model.gguf");
        if !path.exists() {
            continue;
        }
        let names: Vec<String> = Parts::of(&path).tensors.into_iter().map(|(name, _)| name).collect();
        for name in names.iter().filter(|name| !name.starts_with("blk.") || name.starts_with("blk.1.")) {
            let nan = |mut parts: Parts| {
                let tensor = &mut parts.tensors.iter_mut().find(|(known, _)| known == name).unwrap().1;
                let values = tensor.dequantize(&Device::Cpu).unwrap();
                *tensor = QTensor::quantize(&like(&values, f32::NAN), GgmlDType::F32).unwrap();
                parts
            };
            match refused_gguf(&case, nan).unwrap() {
                LoadError::NotFinite { name: found, .. } => assert_eq!(found, *name, "{case}"),
                other => panic!("{case}: NaN in {name}: {other}"),
            }
            // Without its output matrix a model is a tied one, and without divisors one that does not stretch.
            if ["output.weight", "rope_freqs.weight", "rope_factors_long.weight"].contains(&name.as_str()) {
                continue;
            }
            let without = |mut parts: Parts| {
                parts.tensors.retain(|(known, _)| known != name);
                parts
            };
            // Without one bias of several the others are not computed; the only one of a group makes the group.
            let alone = ["attn_output.bias", "ffn_down.bias"].iter().any(|bias| name.ends_with(bias));
            if alone && Parts::of(&path).tensors.iter().filter(|(known, _)| known.ends_with(&name[5..])).count() == 1 {
                continue;
            }
            match refused_gguf(&case, without).unwrap() {
                LoadError::MissingTensor { name: found, .. } => assert_eq!(found, *name, "{case}"),
                other => panic!("{case}: without {name}: {other}"),
            }
        }
        match refused_gguf(&case, |parts| parts.with("blk.1.attn_sinks.weight", vec![1.0])).unwrap() {
            LoadError::UnknownTensor { name, .. } => assert_eq!(name, "blk.1.attn_sinks.weight"),
            other => panic!("{case}: {other}"),
        }
    }
}

#[test]
fn each_impossible_or_unknown_setting_is_named() {
    let named = |case: &str, error: LoadError, names: &[&str]| {
        let message = error.to_string();
        assert!(names.iter().any(|name| message.contains(name)), "{case}: {names:?}: {message}");
        assert!(!message.contains("damaged"), "{case}: {message}");
    };
    for case in opened() {
        for (key, value, names) in [
            ("rms_norm_eps", serde_json::json!(0.0), "RMS norm epsilon"),
            ("rms_norm_eps", serde_json::json!(-1e-5), "RMS norm epsilon"),
            ("max_position_embeddings", serde_json::json!(0), "context length"),
            ("num_attention_heads", serde_json::json!(0), "num_attention_heads"),
            ("num_attention_heads", serde_json::json!("four"), "num_attention_heads"),
            ("num_hidden_layers", serde_json::json!(0), "layers"),
            ("num_hidden_layers", serde_json::json!(4_000_000_000u32), "layers"),
            ("head_dim", serde_json::json!(4_000_000_000u32), "head_dim"),
            ("rope_theta", serde_json::json!(-1.0), "rope_theta"),
            ("eos_token_id", serde_json::json!(-1), "eos_token_id"),
            ("hidden_act", serde_json::json!("relu"), "hidden_act"),
            ("num_local_experts", serde_json::json!(8), "num_local_experts"),
            ("final_logit_softcapping", serde_json::json!(30.0), "final_logit_softcapping"),
            ("a_setting_of_tomorrow", serde_json::json!(true), "a_setting_of_tomorrow"),
        ] {
            let refused = refused_folder(&case, |json, _| {
                let inner = if json["text_config"].is_null() { json } else { &mut json["text_config"] };
                inner[key] = value;
            });
            // A count of layers that contradicts a list beside it is found by the list.
            named(&case, refused, &[names, "layer_types", "no_rope_layers"]);
        }
        let architecture = |parts: &Parts| match &parts.settings.iter().find(|(key, _)| key == "general.architecture") {
            Some((_, Value::String(name))) => name.clone(),
            _ => panic!("{case}"),
        };
        for (key, value, name) in [
            ("attention.layer_norm_rms_epsilon", Value::F32(f32::INFINITY), "RMS norm epsilon"),
            ("attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "RMS norm epsilon"),
            ("context_length", Value::U32(0), "context length"),
            ("attention.head_count", Value::U32(0), "attention.head_count"),
            ("attention.head_count_kv", Value::Array(vec![Value::U32(2)]), "attention.head_count_kv"),
            ("block_count", Value::I32(-1), "block_count"),
            ("rope.freq_base", Value::F32(f32::INFINITY), "rope.freq_base"),
            ("rope.scaling.factor", Value::F32(-2.0), "rope.scaling.factor"),
            ("rope.scaling.type", Value::String("dynamic".into()), "rope.scaling.type"),
            ("attention.scale", Value::F32(0.9), "attention.scale"),
            ("expert_count", Value::U32(8), "expert_count"),
            ("a_setting_of_tomorrow", Value::Bool(true), "a_setting_of_tomorrow"),
        ] {
            // What is Granite's own is computed, and LongRoPE's divisors are told by tensors.
            let read = (case == "granite" && key == "attention.scale")
                || (key == "rope.scaling.type" && ["phi3-longrope", "phi4-mini"].contains(&case.as_str()));
            if read {
                continue;
            }
            let change = |parts: Parts| {
                let key = format!("{}.{key}", architecture(&parts));
                parts.set(&key, value)
            };
            if let Some(refused) = refused_gguf(&case, change) {
                named(&case, refused, &[name]);
            }
        }
    }
}

/// Whether the setting is there or not, what is not of the kind that is expected is no reason to panic.
#[test]
fn no_value_of_a_setting_makes_a_family_panic() {
    let values =
        ["null", "true", "-1", "0", "1", "4294967295", "1e308", "\"x\"", "[]", "[0]", "[\"x\"]", "{}", "{\"a\": {}}"];
    for case in opened() {
        let from = folder().join(&case);
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(from.join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
        let try_it = |json: serde_json::Value| {
            std::fs::write(copy.path().join("config.json"), json.to_string()).unwrap();
            let _ = open_weights(copy.path());
        };
        let places = places(&json, Vec::new());
        for place in places {
            for value in values {
                let mut changed = json.clone();
                let at = place.iter().fold(&mut changed, |at, key| &mut at[key]);
                *at = serde_json::from_str(value).unwrap();
                try_it(changed);
            }
        }
    }
}

/// Where the fields of an object and of those inside are.
fn places(json: &serde_json::Value, before: Vec<String>) -> Vec<Vec<String>> {
    let serde_json::Value::Object(fields) = json else { return Vec::new() };
    let of = |(key, value): (&String, &serde_json::Value)| {
        let place = [&before[..], std::slice::from_ref(key)].concat();
        [vec![place.clone()], places(value, place)].concat()
    };
    fields.iter().flat_map(of).collect()
}
