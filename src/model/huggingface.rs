//! `config.json` of a Hugging Face model folder, read and written.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::Deserialize;

use super::config::{Landmark, ModelConfig, RopeScaling};
use super::error::{LoadError, SaveError};
use crate::limits::HEAD_DIM_MAX;
use crate::shape::Rope;

/// What the paper's code calls a Llama model trained with landmarks.
const LANDMARK_TYPE: &str = "llama_with_landmark";

/// Digits behind the first at which rounding to f32 begins to show.
const DIGITS_MAX: usize = 7;

/// The fields that a forward pass depends on. What is absent has the default of the reference implementation.
#[derive(Deserialize)]
struct ConfigJson {
    model_type: String,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    /// Hugging Face leaves its default out of some files.
    #[serde(default = "default_context_tokens")]
    max_position_embeddings: u32,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeJson>,
    /// Newer files put base and scaling here.
    rope_parameters: Option<RopeJson>,
    partial_rotary_factor: Option<f64>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    sliding_window: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    /// The landmark token of the paper's checkpoints.
    mem_id: Option<u32>,
    /// Tokens of a block of the paper's checkpoints, without its landmark.
    mem_freq: Option<u32>,
}

/// Of Hugging Face's `LlamaConfig`.
fn default_context_tokens() -> u32 {
    2048
}

#[derive(Deserialize)]
struct RopeJson {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Deserialize)]
struct GenerationJson {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// Reads `config.json` of `folder`, and the ends of text in `generation_config.json` where there is one.
pub(super) fn read_config(folder: &Path) -> Result<ModelConfig, LoadError> {
    let path = folder.join("config.json");
    let json: ConfigJson = read_json(&path)?;
    refuse_other_architectures(&path, &json)?;
    let landmark = landmark(&path, &json)?;

    let heads = json.num_attention_heads;
    let head_dim = match json.head_dim {
        Some(head_dim) => head_dim,
        None => (json.hidden_size / heads.max(1) as usize) as u32,
    };
    let scaling = json.rope_parameters.as_ref().or(json.rope_scaling.as_ref());
    let base = json.rope_theta.or(scaling.and_then(|rope| rope.rope_theta)).unwrap_or(10_000.0);
    // Pairs turn, so an odd share of the head leaves its last dimension still.
    let rotary_dims = (head_dim as f64 * json.partial_rotary_factor.unwrap_or(1.0)) as usize / 2 * 2;

    let mut eos_ids = ids(json.eos_token_id);
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        eos_ids.extend(ids(read_json::<GenerationJson>(&generation)?.eos_token_id));
    }
    eos_ids.sort_unstable();
    eos_ids.dedup();

    let config = ModelConfig {
        layers: json.num_hidden_layers,
        query_heads: heads,
        kv_heads: json.num_key_value_heads.unwrap_or(heads),
        head_dim,
        hidden: json.hidden_size,
        ffn: json.intermediate_size,
        vocab: json.vocab_size,
        context_tokens: json.max_position_embeddings,
        norm_epsilon: json.rms_norm_eps,
        rope: scaling.map_or(Ok(RopeScaling::None), |rope| rope.scaling(&path))?.rope(base, rotary_dims),
        tied_output: json.tie_word_embeddings,
        eos_ids,
        landmark,
    };
    config.check().map_err(|source| LoadError::Shape { path, source })?;
    Ok(config)
}

/// The landmarks of a checkpoint of [`LANDMARK_TYPE`].
fn landmark(path: &Path, json: &ConfigJson) -> Result<Option<Landmark>, LoadError> {
    if json.model_type != LANDMARK_TYPE {
        return Ok(None);
    }
    let need = |key: &str, value: Option<u32>| {
        value.ok_or_else(|| LoadError::MissingKey { path: path.into(), key: key.into() })
    };
    let (id, mem_freq) = (need("mem_id", json.mem_id)?, need("mem_freq", json.mem_freq)?);
    // What is too large is refused as a shape.
    Ok(Some(Landmark { id, block_tokens: mem_freq.saturating_add(1), hidden: false }))
}

fn refuse_other_architectures(path: &Path, json: &ConfigJson) -> Result<(), LoadError> {
    let refuse = |key: &str, expected: &str, found: String| {
        Err(LoadError::Unsupported { path: path.into(), key: key.into(), expected: expected.into(), found })
    };
    if !matches!(json.model_type.as_str(), "llama" | "mistral" | LANDMARK_TYPE) {
        return refuse("model_type", &format!("llama, mistral or {LANDMARK_TYPE}"), json.model_type.clone());
    }
    if let Some(other) = json.hidden_act.as_ref().filter(|name| *name != "silu") {
        return refuse("hidden_act", "silu", other.clone());
    }
    if json.attention_bias || json.mlp_bias {
        return refuse("attention_bias, mlp_bias", "false", "true".into());
    }
    if let Some(window) = json.sliding_window {
        return refuse("sliding_window", "null", window.to_string());
    }
    if let Some(share) = json.partial_rotary_factor.filter(|share| !(0.0..=1.0).contains(share)) {
        return refuse("partial_rotary_factor", "0 to 1", share.to_string());
    }
    if let Some(head_dim) = json.head_dim.filter(|&head_dim| head_dim > HEAD_DIM_MAX) {
        return refuse("head_dim", &format!("at most {HEAD_DIM_MAX}"), head_dim.to_string());
    }
    if json.num_attention_heads == 0 {
        return refuse("num_attention_heads", "at least 1", "0".into());
    }
    Ok(())
}

impl RopeJson {
    fn scaling(&self, path: &Path) -> Result<RopeScaling, LoadError> {
        let need = |field: &str, value: Option<f64>| {
            let key = format!("rope scaling's {field}");
            match value {
                None => Err(LoadError::MissingKey { path: path.into(), key }),
                Some(value) if value > 0.0 => Ok(value),
                Some(value) => Err(LoadError::Unsupported {
                    path: path.into(),
                    key,
                    expected: "a positive number".into(),
                    found: value.to_string(),
                }),
            }
        };
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: need("factor", self.factor)? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: need("factor", self.factor)?,
                low_freq_factor: need("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", self.high_freq_factor)?,
                original_context_tokens: need(
                    "original_max_position_embeddings",
                    self.original_max_position_embeddings,
                )?,
            }),
            Some(other) => Err(LoadError::Unsupported {
                path: path.into(),
                key: "rope_type".into(),
                expected: "default, linear or llama3".into(),
                found: other.into(),
            }),
        }
    }
}

/// The `config.json` that [`read_config`] makes `config` of, for weights of `dtype`.
pub(super) fn write_config(config: &ModelConfig, dtype: DType) -> Result<String, SaveError> {
    let (base, factor) = base_and_factor(&config.rope)?;
    let rotary_dims = 2 * config.rope.frequencies.len();
    let mut json = serde_json::json!({
        "model_type": "llama",
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.norm_epsilon.to_string().parse::<f64>().unwrap_or_default(),
        "rope_theta": base,
        "tie_word_embeddings": config.tied_output,
        "hidden_act": "silu",
        "eos_token_id": config.eos_ids,
        "torch_dtype": match dtype { DType::F16 => "float16", DType::BF16 => "bfloat16", _ => "float32" },
    });
    if factor != 1.0 {
        json["rope_scaling"] = serde_json::json!({ "rope_type": "linear", "factor": factor });
    }
    if rotary_dims != config.head_dim as usize {
        let (rotary_dims, head_dim) = (rotary_dims as f64, config.head_dim as f64);
        let share = rotary_dims / head_dim;
        // Readers round `head_dim * share` down.
        json["partial_rotary_factor"] = if share * head_dim < rotary_dims { share.next_up() } else { share }.into();
    }
    match config.landmark {
        None => json["architectures"] = serde_json::json!(["LlamaForCausalLM"]),
        Some(Landmark { hidden: true, .. }) => return Err(SaveError::HiddenLandmark),
        Some(Landmark { id, block_tokens, .. }) => {
            json["model_type"] = LANDMARK_TYPE.into();
            json["mem_id"] = id.into();
            json["mem_freq"] = (block_tokens - 1).into();
        }
    }
    Ok(format!("{json:#}\n"))
}

/// The base and the linear scaling factor that give exactly these frequencies. Both are read off the numbers, which the
/// rounding to f32 has touched, so the ones of the fewest digits that give them back are taken, as people write them.
fn base_and_factor(rope: &Rope) -> Result<(f64, f64), SaveError> {
    let frequencies = &rope.frequencies;
    let (Some(&first), Some(&last)) = (frequencies.first(), frequencies.last()) else { return Ok((10_000.0, 1.0)) };
    let pairs = frequencies.len();
    let base = match pairs {
        1 => 10_000.0,
        _ => (last as f64 / first as f64).powf(-(pairs as f64) / (pairs - 1) as f64),
    };
    let factor = 1.0 / first as f64;
    let rounded = |digits: usize| {
        let round = |number: f64| format!("{number:.digits$e}").parse().unwrap_or(number);
        (round(base), round(factor))
    };
    let gives_them = |&(base, factor): &(f64, f64)| {
        let scaling = if factor == 1.0 { RopeScaling::None } else { RopeScaling::Linear { factor } };
        scaling.rope(base, 2 * pairs) == *rope
    };
    let found = (0..=DIGITS_MAX).map(rounded).find(gives_them);
    found.ok_or_else(|| SaveError::Rotation { frequencies: frequencies.clone() })
}

fn ids(ids: Option<OneOrMany>) -> Vec<u32> {
    match ids {
        None => Vec::new(),
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) => ids,
    }
}

/// Reads and parses one JSON file.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &PathBuf) -> Result<T, LoadError> {
    let bytes = std::fs::read(path).map_err(|source| LoadError::Io { path: path.clone(), source })?;
    serde_json::from_slice(&bytes).map_err(|error| LoadError::Damaged { path: path.clone(), detail: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 100,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 5000, "eos_token_id": [7, 3]"#;

    fn read(more: &str) -> Result<ModelConfig, LoadError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), format!("{LLAMA}{more}}}")).unwrap();
        read_config(folder.path())
    }

    #[test]
    fn a_plain_config_is_read() {
        let config = read("").unwrap();
        assert_eq!((config.head_dim, config.kv_heads, config.context_tokens), (8, 2, 128));
        assert_eq!(config.rope, crate::shape::Rope::from_base(5000.0, 8));
        assert_eq!(config.eos_ids, [3, 7]);
        assert!(!config.tied_output);
    }

    #[test]
    fn rotation_variants_change_the_frequencies() {
        let partial = read(r#", "partial_rotary_factor": 0.5"#).unwrap();
        assert_eq!(partial.rope, crate::shape::Rope::from_base(5000.0, 4));
        let linear = read(r#", "rope_scaling": {"type": "linear", "factor": 2.0}"#).unwrap();
        assert_eq!(linear.rope.frequencies[0], 0.5);
        let newer = read(
            r#", "rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 64}"#,
        )
        .unwrap();
        assert_ne!(newer.rope, crate::shape::Rope::from_base(5000.0, 8));
    }

    #[test]
    fn a_landmark_checkpoint_names_its_landmark_and_blocks() {
        let read = |more: &str| {
            let folder = tempfile::tempdir().unwrap();
            let json = LLAMA.replace("\"llama\"", "\"llama_with_landmark\"");
            std::fs::write(folder.path().join("config.json"), format!("{json}{more}}}")).unwrap();
            read_config(folder.path())
        };
        let config = read(r#", "mem_id": 99, "mem_freq": 50"#).unwrap();
        assert_eq!(config.landmark, Some(Landmark { id: 99, block_tokens: 51, hidden: false }));
        assert!(matches!(read(r#", "mem_id": 99"#), Err(LoadError::MissingKey { key, .. }) if key == "mem_freq"));
        let field = |more: &str| match read(more).unwrap_err() {
            LoadError::Shape { source, .. } => source.field,
            other => panic!("{other}"),
        };
        assert_eq!(field(r#", "mem_id": 100, "mem_freq": 50"#), "landmark token (mem_id)");
        assert_eq!(field(r#", "mem_id": 99, "mem_freq": 0"#), "block_tokens");
        assert_eq!(field(r#", "mem_id": 99, "mem_freq": 4294967295"#), "block_tokens");
    }

    #[test]
    fn what_is_written_is_read_back_the_same() {
        let plain = ModelConfig {
            layers: 3,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 32,
            hidden: 100,
            ffn: 256,
            vocab: 512,
            context_tokens: 2048,
            norm_epsilon: 1e-5,
            rope: Rope::from_base(10_000.0, 32),
            tied_output: true,
            eos_ids: vec![0, 7],
            landmark: None,
        };
        let landmark = Some(Landmark { id: 511, block_tokens: 17, hidden: false });
        let variants = [
            plain.clone(),
            ModelConfig { landmark, tied_output: false, eos_ids: Vec::new(), ..plain.clone() },
            ModelConfig { rope: Rope::from_base(500_000.0, 8), norm_epsilon: 1e-6, ..plain.clone() },
            ModelConfig { rope: Rope::from_base(10_000.0, 2), ..plain.clone() },
            ModelConfig { rope: Rope::from_base(10_000.0, 8), ..plain.clone() },
            ModelConfig { rope: RopeScaling::Linear { factor: 8.0 }.rope(150_000.0, 32), ..plain.clone() },
            ModelConfig { head_dim: 44, rope: Rope::from_base(1e6, 30), ..plain.clone() },
            ModelConfig { rope: RopeScaling::Linear { factor: 2.5 }.rope(1e7, 32), ..plain.clone() },
        ];
        for config in variants {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("config.json"), write_config(&config, DType::F16).unwrap()).unwrap();
            assert_eq!(read_config(folder.path()).unwrap(), config);
        }
        let hidden = Some(Landmark { id: 511, block_tokens: 17, hidden: true });
        let adapted = ModelConfig { landmark: hidden, ..plain.clone() };
        assert!(matches!(write_config(&adapted, DType::F32), Err(SaveError::HiddenLandmark)));
        let mut odd = plain;
        odd.rope.frequencies[3] *= 2.0;
        assert!(matches!(write_config(&odd, DType::F32), Err(SaveError::Rotation { .. })));
    }

    #[test]
    fn what_cannot_be_computed_faithfully_is_refused_by_key() {
        let key = |more: &str| match read(more).unwrap_err() {
            LoadError::Unsupported { key, .. } | LoadError::MissingKey { key, .. } => key,
            other => other.to_string(),
        };
        assert_eq!(key(r#", "attention_bias": true"#), "attention_bias, mlp_bias");
        assert_eq!(key(r#", "hidden_act": "gelu""#), "hidden_act");
        assert_eq!(key(r#", "sliding_window": 4096"#), "sliding_window");
        assert_eq!(key(r#", "rope_scaling": {"rope_type": "yarn", "factor": 2}"#), "rope_type");
        assert_eq!(key(r#", "rope_scaling": {"rope_type": "linear"}"#), "rope scaling's factor");
        assert_eq!(key(r#", "head_dim": 4294967295"#), "head_dim");
        assert_eq!(key(r#", "partial_rotary_factor": 1e12"#), "partial_rotary_factor");
    }
}
