//! `config.json` of a Hugging Face model folder, read and written.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::Value;

use super::config::{Landmark, ModelConfig, RopeScaling};
use super::error::{LoadError, SaveError};
use super::fields::Fields;
use landmarkdb::Rope;
use landmarkdb::limits::HEAD_DIM_MAX;

/// What the paper's code calls a Llama model trained with landmarks.
const LANDMARK_TYPE: &str = "llama_with_landmark";

/// Digits behind the first at which rounding to f32 begins to show.
const DIGITS_MAX: usize = 7;

/// The kinds of model that are read.
const MODEL_TYPES: [&str; 3] = ["llama", "mistral", LANDMARK_TYPE];

/// Fields that change a logit where they say something else than this. The reference implementation of [`MODEL_TYPES`] does not
/// read them, so a configuration that has one was written for other code.
const NEUTRAL: [(&str, f64); 8] = [
    ("attention_multiplier", 1.0),
    ("embedding_multiplier", 1.0),
    ("residual_multiplier", 1.0),
    ("logits_scaling", 1.0),
    ("logit_scale", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("num_local_experts", 0.0),
];

/// Settings that a rotation may have, used or not. Any other might rotate keys in another way.
const ROPE_FIELDS: [&str; 9] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "partial_rotary_factor",
];

/// Of Hugging Face's `LlamaConfig`: its default is left out of some files.
const CONTEXT_TOKENS: u32 = 2048;

/// Reads `config.json` of `folder`, and the ends of text in `generation_config.json` where there is one.
pub(super) fn read_config(folder: &Path) -> Result<ModelConfig, LoadError> {
    let path = folder.join("config.json");
    let json: Value = read_json(&path)?;
    let json = Fields::new(&path, &json)?;
    let model_type = check_kind(&json)?;
    let count = |key: &str| json.count(key).and_then(|value| json.need(key, value));

    let heads = count("num_attention_heads")?;
    if heads == 0 {
        return Err(json.refuse("num_attention_heads", "at least 1", None));
    }
    let hidden = count("hidden_size")?;
    let head_dim = json.count("head_dim")?.unwrap_or(hidden / heads);
    if head_dim > HEAD_DIM_MAX {
        return Err(json.refuse("head_dim", &format!("at most {HEAD_DIM_MAX}"), None));
    }
    let mut eos_ids = json.ids("eos_token_id")?;
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        eos_ids.extend(Fields::new(&generation, &read_json(&generation)?)?.ids("eos_token_id")?);
    }
    eos_ids.sort_unstable();
    eos_ids.dedup();

    let epsilon = json.float("rms_norm_eps")?;
    let config = ModelConfig {
        layers: count("num_hidden_layers")?,
        query_heads: heads,
        kv_heads: json.count("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        hidden: hidden as usize,
        ffn: count("intermediate_size")? as usize,
        vocab: count("vocab_size")? as usize,
        context_tokens: json.count("max_position_embeddings")?.unwrap_or(CONTEXT_TOKENS),
        norm_epsilon: json.need("rms_norm_eps", epsilon)? as f32,
        rope: rope(&json, head_dim)?,
        tied_output: json.flag("tie_word_embeddings")?.unwrap_or(false),
        eos_ids,
        landmark: landmark(&json, model_type)?,
    };
    config.check().map_err(|source| LoadError::Shape { path: json.path(), source })?;
    Ok(config)
}

/// The landmarks of a checkpoint of [`LANDMARK_TYPE`].
fn landmark(json: &Fields, model_type: &str) -> Result<Option<Landmark>, LoadError> {
    if model_type != LANDMARK_TYPE {
        return Ok(None);
    }
    let need = |key: &str| json.count(key).and_then(|value| json.need(key, value));
    // What is too large is refused as a shape.
    let (id, mem_freq) = (need("mem_id")?, need("mem_freq")?);
    Ok(Some(Landmark { id, block_tokens: mem_freq.saturating_add(1), hidden: false }))
}

/// Refuses what the forward pass does not compute. The kind of model comes first: other kinds have other fields.
fn check_kind<'a>(json: &Fields<'a>) -> Result<&'a str, LoadError> {
    let model_type = json.text("model_type").and_then(|value| json.need("model_type", value))?;
    if !MODEL_TYPES.contains(&model_type) {
        let way_out = match json.value("text_config") {
            Some(_) => "of a model that sees and reads, save the language model (text_config) in a folder of its own",
            None => "take a model of the Llama family",
        };
        return Err(json.refuse("model_type", "llama, mistral or llama_with_landmark", Some(way_out)));
    }
    if json.text("hidden_act")?.is_some_and(|name| name != "silu") {
        return Err(json.refuse("hidden_act", "silu", None));
    }
    for bias in ["attention_bias", "mlp_bias"] {
        if json.flag(bias)? == Some(true) {
            return Err(json.refuse(bias, "false", Some("models with biases are not computed here")));
        }
    }
    if json.value("sliding_window").is_some() {
        let way_out =
            "if its texts are longer than that, answers would be wrong; take a version of the model without it";
        return Err(json.refuse("sliding_window", "null", Some(way_out)));
    }
    if json.value("quantization_config").is_some() {
        let way_out = "take the model in F32, F16 or BF16, or as GGUF in Q4_0, Q4_1 or Q8_0";
        return Err(json.refuse("quantization_config", "none", Some(way_out)));
    }
    // The paper's checkpoints name their own code, which is what is computed here.
    let code = json.object("auto_map.")?.filter(|_| model_type != LANDMARK_TYPE);
    if let Some(code) = code.filter(|code| code.value("AutoModelForCausalLM").is_some()) {
        let way_out = "the model comes with code of its own, which is not run here";
        return Err(code.refuse("AutoModelForCausalLM", "none", Some(way_out)));
    }
    for (key, neutral) in NEUTRAL {
        if json.float(key)?.is_some_and(|found| found != neutral) {
            return Err(json.refuse(key, &neutral.to_string(), None));
        }
    }
    Ok(model_type)
}

/// The rotation, which newer files describe in `rope_parameters` and older ones in `rope_scaling` and beside it.
fn rope(json: &Fields, head_dim: u32) -> Result<Rope, LoadError> {
    let (newer, older) = (json.object("rope_parameters.")?, json.object("rope_scaling.")?);
    if newer.is_some() && older.is_some() && json.value("rope_parameters") != json.value("rope_scaling") {
        return Err(json.refuse("rope_scaling", "the same as rope_parameters, or none", None));
    }
    let scaling = newer.or(older);
    if let Some(scaling) = &scaling
        && let Some(other) = scaling.names().find(|name| !ROPE_FIELDS.contains(name))
    {
        return Err(match scaling.kind()? {
            // Their own fields say less than their name.
            Some(kind) if !["default", "linear", "llama3"].contains(&kind) => scaling.refuse_kind(kind),
            _ => scaling.refuse(other, "none", Some("rotations with it are not computed here")),
        });
    }
    let inside = |key: &str| scaling.as_ref().map_or(Ok(None), |scaling| scaling.float(key));
    let either = |key: &'static str, default: f64| match (json.float(key)?, inside(key)?) {
        (Some(outer), Some(inner)) if outer != inner => {
            Err(json.refuse(key, &format!("{inner}, as the rotation says"), None))
        }
        (outer, inner) => Ok(outer.or(inner).unwrap_or(default)),
    };
    let base = either("rope_theta", 10_000.0)?;
    if !(base.is_finite() && base > 0.0) {
        return Err(json.refuse("rope_theta", "a positive number", None));
    }
    let share = either("partial_rotary_factor", 1.0)?;
    if !(0.0..=1.0).contains(&share) {
        return Err(json.refuse("partial_rotary_factor", "0 to 1", None));
    }
    // Pairs rotate, so an odd share of the head leaves its last dimension still.
    let rotary_dims = (head_dim as f64 * share) as usize / 2 * 2;
    let scaling = scaling.map_or(Ok(RopeScaling::None), |scaling| scaling.scaling())?;
    Ok(scaling.rope(base, rotary_dims))
}

impl<'a> Fields<'a> {
    /// What kind of scaling a rotation says: under its newer name, its older one, or both.
    fn kind(&self) -> Result<Option<&'a str>, LoadError> {
        match (self.text("rope_type")?, self.text("type")?) {
            (Some(newer), Some(older)) if newer != older => {
                Err(self.refuse("type", &format!("{newer}, as rope_type says"), None))
            }
            (newer, older) => Ok(newer.or(older)),
        }
    }

    fn refuse_kind(&self, kind: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path(),
            key: "rope_type".into(),
            expected: "default, linear or llama3".into(),
            found: kind.into(),
            way_out: None,
        }
    }

    fn scaling(&self) -> Result<RopeScaling, LoadError> {
        let need = |key: &str| match self.float(key).and_then(|value| self.need(key, value))? {
            value if value.is_finite() && value > 0.0 => Ok(value),
            _ => Err(self.refuse(key, "a positive number", None)),
        };
        match self.kind()? {
            Some("linear") => Ok(RopeScaling::Linear { factor: need("factor")? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context_tokens: need("original_max_position_embeddings")?,
            }),
            Some("default") => Ok(RopeScaling::None),
            // A factor without a kind says that something is scaled, and not what.
            None if self.value("factor").is_some() => Err(self.refuse("rope_type", "default, linear or llama3", None)),
            None => Ok(RopeScaling::None),
            Some(other) => Err(self.refuse_kind(other)),
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
/// rounding to f32 has touched, so the ones of the fewest digits that give them back are taken, as a person writes them.
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
        assert_eq!(config.rope, landmarkdb::Rope::from_base(5000.0, 8));
        assert_eq!(config.eos_ids, [3, 7]);
        assert!(!config.tied_output);
    }

    #[test]
    fn rotation_variants_change_the_frequencies() {
        let partial = read(r#", "partial_rotary_factor": 0.5"#).unwrap();
        assert_eq!(partial.rope, landmarkdb::Rope::from_base(5000.0, 4));
        let linear = read(r#", "rope_scaling": {"type": "linear", "factor": 2.0}"#).unwrap();
        assert_eq!(linear.rope.frequencies[0], 0.5);
        let newer = read(
            r#", "rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 64}"#,
        )
        .unwrap();
        assert_ne!(newer.rope, landmarkdb::Rope::from_base(5000.0, 8));
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
        assert_eq!(key(r#", "attention_bias": true"#), "attention_bias");
        assert_eq!(key(r#", "mlp_bias": true"#), "mlp_bias");
        assert_eq!(key(r#", "hidden_act": "gelu""#), "hidden_act");
        assert_eq!(key(r#", "sliding_window": 4096"#), "sliding_window");
        assert_eq!(key(r#", "rope_scaling": {"rope_type": "yarn", "factor": 2}"#), "rope_type");
        assert_eq!(key(r#", "rope_scaling": {"rope_type": "linear"}"#), "rope_scaling.factor");
        assert_eq!(key(r#", "head_dim": 4294967295"#), "head_dim");
        assert_eq!(key(r#", "partial_rotary_factor": 1e12"#), "partial_rotary_factor");
    }
}
