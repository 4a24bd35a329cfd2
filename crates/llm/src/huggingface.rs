//! `config.json` of a Hugging Face model folder, read and written.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::Value;

use super::config::{Landmark, ModelConfig};
use super::error::{LoadError, SaveError};
use super::families::{self, FOLDER_NEUTRAL, Family, Key, LANDMARK_TYPE, Settings};
use super::fields::Fields;
use super::rotation::{RopeScaling, Rotation, YARN_BETAS, Yarn, longrope_factor, yarn_mscale};
use super::weights::LayerTensor;
use landmarkdb::{InvalidShape, Rope};

/// Digits behind the first at which rounding to f32 begins to show.
const DIGITS_MAX: usize = 7;

/// Of most configurations: left out of some files.
const ROPE_BASE: f64 = 10_000.0;

/// What is said of kinds of rotation.
const ROPE_KINDS: &str = "default, linear, llama3, yarn or longrope";

/// Reads `config.json` of `folder`, and the ends of text in `generation_config.json` where there is one. Tells the family.
pub(super) fn read_config(folder: &Path) -> Result<(ModelConfig, &'static Family), LoadError> {
    let (path, generation) = (folder.join("config.json"), folder.join("generation_config.json"));
    let json: Value = read_json(&path)?;
    let whole = Fields::new(&path, &json)?;
    // The kind of model comes first: other kinds have other fields.
    let model_type = whole.text("model_type").and_then(|value| whole.need("model_type", value))?;
    let (family, text) = match families::by_wrapper(model_type) {
        Some(family) => {
            let text = whole.object("text_config").and_then(|text| whole.need("text_config", text))?;
            let inner = text.text("model_type")?;
            if inner.is_some_and(|inner| !family.model_types.contains(&inner)) {
                return Err(text.refuse("model_type", family.model_types[0], None));
            }
            (family, Some(text))
        }
        None => (families::by_model_type(model_type).ok_or_else(|| unknown_kind(&whole))?, None),
    };
    let mut eos_ids = whole.ids("eos_token_id")?;
    if let Some(text) = &text {
        eos_ids.extend(text.ids("eos_token_id")?);
    }
    if generation.exists() {
        eos_ids.extend(Fields::new(&generation, &read_json(&generation)?)?.ids("eos_token_id")?);
    }
    eos_ids.sort_unstable();
    eos_ids.dedup();

    check_extras(&whole, family, model_type)?;
    let settings = FolderSettings { family, fields: text.as_ref().unwrap_or(&whole), whole: &whole, eos_ids };
    let config = families::read(family, &settings)?;
    if let Some(text) = &text {
        check_extras(text, family, model_type)?;
        refuse_unread(text, families::is_harmless_field)?;
        refuse_unread(&whole, families::is_beside_text)?;
    } else {
        refuse_unread(&whole, families::is_harmless_field)?;
    }
    Ok((config, family))
}

fn unknown_kind(json: &Fields) -> LoadError {
    let way_out = match json.value("text_config") {
        Some(_) => "of a model that sees and reads, save the language model (text_config) in a folder of its own",
        None => "take a model of one of these kinds",
    };
    json.refuse("model_type", &families::model_types(), Some(way_out))
}

/// Refuses weights in other formats, and models that come with code.
fn check_extras(json: &Fields, family: &Family, model_type: &str) -> Result<(), LoadError> {
    if json.value("quantization_config").is_some() {
        let way_out = "take the model in F32, F16 or BF16, or as GGUF";
        return Err(json.refuse("quantization_config", "none", Some(way_out)));
    }
    let code = json.object("auto_map")?.filter(|_| !family.with_code.contains(&model_type));
    if let Some(code) = code.filter(|code| code.value("AutoModelForCausalLM").is_some()) {
        let way_out = "the model comes with code of its own, which is not run here";
        return Err(code.refuse("AutoModelForCausalLM", "none", Some(way_out)));
    }
    Ok(())
}

/// Refuses fields that nobody has asked for, but those that say nothing or nothing new.
fn refuse_unread(json: &Fields, is_harmless: fn(&str) -> bool) -> Result<(), LoadError> {
    for name in json.unread().into_iter().filter(|name| !is_harmless(name)) {
        let Some((_, neutral)) = FOLDER_NEUTRAL.iter().find(|(known, _)| *known == name) else {
            return Err(json.unknown(name));
        };
        let found = json.value(name).and_then(|value| value.as_f64().or(value.as_bool().map(f64::from)));
        if found != Some(*neutral) {
            let expected = match json.value(name) {
                Some(Value::Bool(_)) => (*neutral != 0.0).to_string(),
                _ => neutral.to_string(),
            };
            let way_out = "this kind of model is not computed with it";
            return Err(json.refuse(name, &expected, Some(way_out)));
        }
    }
    Ok(())
}

/// The configuration of a folder, as a family reads it.
struct FolderSettings<'a> {
    family: &'static Family,
    /// Of the language model.
    fields: &'a Fields<'a>,
    /// Of the whole file: the same, or around it.
    whole: &'a Fields<'a>,
    eos_ids: Vec<u32>,
}

impl FolderSettings<'_> {
    /// What it means that a field is not there.
    fn default(&self, key: &str) -> Option<f64> {
        self.family.defaults.iter().find(|(known, _)| *known == key).map(|&(_, value)| value)
    }

    /// Reads a field, if the setting has one here.
    fn read<T>(
        &self,
        key: Key,
        read: impl Fn(&str) -> Result<Option<T>, LoadError>,
        default: impl Fn(f64) -> T,
    ) -> Result<Option<T>, LoadError> {
        match key.folder {
            "" => Ok(None),
            field => Ok(read(field)?.or_else(|| self.default(field).map(default))),
        }
    }

    /// The dimensions of a head that rotate, `share` of them.
    fn rotary_dims(&self, head_dim: u32, share: f64) -> Result<usize, LoadError> {
        if !(0.0..=1.0).contains(&share) {
            return Err(self.fields.refuse("partial_rotary_factor", "0 to 1", None));
        }
        // Pairs rotate, so an odd share of the head leaves its last dimension still.
        Ok((head_dim as f64 * share) as usize / 2 * 2)
    }

    /// The rotation of kind `layer_type`, which newer files describe in `rope_parameters` and older ones in `rope_scaling` and
    /// beside it.
    fn described(&self, layer_type: &str, context: f64, head_dim: u32) -> Result<Rotation, LoadError> {
        let json = self.fields;
        let (newer, older) = (json.object("rope_parameters")?, json.object("rope_scaling")?);
        if newer.is_some() && older.is_some() && json.value("rope_parameters") != json.value("rope_scaling") {
            return Err(json.refuse("rope_scaling", "the same as rope_parameters, or none", None));
        }
        let mut scaling = newer.or(older);
        // One for each kind of layer, of models whose kinds differ in that.
        if self.family.local_base.is_some()
            && let Some(all) = &scaling
            && let Some(one) = all.object(layer_type)?
        {
            let kinds = [families::FULL_ATTENTION, families::SLIDING_ATTENTION];
            if let Some(other) = all.unread().into_iter().find(|name| !kinds.contains(name)) {
                return Err(all.refuse(other, "none beside the kinds of layers", None));
            }
            scaling = Some(one);
        }
        let inside = |key: &str| scaling.as_ref().map_or(Ok(None), |scaling| scaling.float(key));
        let either = |key: &'static str| match (json.float(key)?, inside(key)?) {
            (Some(outer), Some(inner)) if outer != inner => {
                Err(json.refuse(key, &format!("{inner}, as the rotation says"), None))
            }
            (outer, inner) => Ok(outer.or(inner)),
        };
        let base = either("rope_theta")?.or_else(|| self.default("rope_theta")).unwrap_or(ROPE_BASE);
        if !(base.is_finite() && base > 0.0) {
            return Err(json.refuse("rope_theta", "a positive number", None));
        }
        let rotary_dims = self.rotary_dims(head_dim, either("partial_rotary_factor")?.unwrap_or(1.0))?;
        let original = either("original_max_position_embeddings")?;
        if original.is_some_and(|tokens| !(tokens.is_finite() && tokens >= 1.0)) {
            return Err(json.refuse("original_max_position_embeddings", "at least 1", None));
        }
        let Some(scaling) = scaling else { return Ok(RopeScaling::None.rotation(base, rotary_dims)) };
        let read = scaling.scaling(original, context, rotary_dims / 2)?;
        // It may repeat the model's context.
        scaling.value("max_position_embeddings");
        match scaling.unread().first() {
            Some(other) => Err(scaling.refuse(other, "none", Some("rotations with it are not computed here"))),
            None => Ok(read.rotation(base, rotary_dims)),
        }
    }
}

impl Settings for FolderSettings<'_> {
    fn number(&self, key: Key) -> Result<Option<u32>, LoadError> {
        self.read(key, |field| self.fields.count(field), |default| default as u32)
    }

    fn float(&self, key: Key) -> Result<Option<f64>, LoadError> {
        self.read(key, |field| self.fields.float(field), |default| default)
    }

    fn flag(&self, key: Key) -> Result<Option<bool>, LoadError> {
        self.read(key, |field| self.fields.flag(field), |default| default != 0.0)
    }

    fn text(&self, key: Key) -> Result<Option<&str>, LoadError> {
        if key.folder.is_empty() { Ok(None) } else { self.fields.text(key.folder) }
    }

    fn numbers(&self, key: Key) -> Result<Option<Vec<u32>>, LoadError> {
        if key.folder.is_empty() { Ok(None) } else { self.fields.counts(key.folder) }
    }

    fn texts(&self, key: Key) -> Result<Option<Vec<&str>>, LoadError> {
        if key.folder.is_empty() { Ok(None) } else { self.fields.texts(key.folder) }
    }

    fn vocab(&self) -> Result<u32, LoadError> {
        let found = self.fields.count("vocab_size")?.or_else(|| self.default("vocab_size").map(|size| size as u32));
        self.fields.need("vocab_size", found)
    }

    fn tied_output(&self) -> Result<bool, LoadError> {
        let key = "tie_word_embeddings";
        let found = match self.fields.flag(key)? {
            Some(tied) => Some(tied),
            None => self.whole.flag(key)?,
        };
        self.whole.value(key);
        Ok(found.unwrap_or_else(|| self.default(key).is_some_and(|tied| tied != 0.0)))
    }

    fn eos_ids(&self) -> Result<Vec<u32>, LoadError> {
        Ok(self.eos_ids.clone())
    }

    fn rotation(&self, head_dim: u32, context_tokens: u32) -> Result<Rotation, LoadError> {
        self.described(families::FULL_ATTENTION, context_tokens as f64, head_dim)
    }

    fn local_rotation(&self, head_dim: u32) -> Result<Rotation, LoadError> {
        let sliding = self.fields.object("rope_parameters")?;
        let sliding = sliding.map_or(Ok(None), |kinds| kinds.object(families::SLIDING_ATTENTION))?;
        if let Some(sliding) = sliding {
            if sliding.kind()?.is_some_and(|kind| kind != "default") {
                return Err(sliding.refuse("rope_type", "default", None));
            }
            let base = sliding.float("rope_theta")?.or(self.family.local_base).unwrap_or(ROPE_BASE);
            let rotary_dims = self.rotary_dims(head_dim, sliding.float("partial_rotary_factor")?.unwrap_or(1.0))?;
            if !(base.is_finite() && base > 0.0) {
                return Err(sliding.refuse("rope_theta", "a positive number", None));
            }
            return match sliding.unread().first() {
                Some(other) => Err(sliding.refuse(other, "none", Some("rotations with it are not computed here"))),
                None => Ok(RopeScaling::None.rotation(base, rotary_dims)),
            };
        }
        let key = "rope_local_base_freq";
        let base = self.fields.float(key)?.or(self.family.local_base).unwrap_or(ROPE_BASE);
        if !(base.is_finite() && base > 0.0) {
            return Err(self.fields.refuse(key, "a positive number", None));
        }
        Ok(RopeScaling::None.rotation(base, head_dim as usize / 2 * 2))
    }

    fn has_bias(&self, flag: Key, _: &[LayerTensor]) -> Result<bool, LoadError> {
        Ok(self.flag(flag)?.unwrap_or(false))
    }

    fn missing(&self, key: Key) -> LoadError {
        let none: Option<()> = None;
        self.fields.need(key.folder, none).expect_err("there is none")
    }

    fn refuse(&self, key: Key, expected: &str, way_out: Option<&'static str>) -> LoadError {
        self.fields.refuse(key.folder, expected, way_out)
    }

    fn shape(&self, source: InvalidShape) -> LoadError {
        LoadError::Shape { path: self.fields.path(), source }
    }
}

/// The object that describes a rotation.
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
            expected: ROPE_KINDS.into(),
            found: kind.into(),
            way_out: None,
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.float(key)? {
            Some(found) if !(found.is_finite() && found > 0.0) => Err(self.refuse(key, "a positive number", None)),
            found => Ok(found),
        }
    }

    /// The scaling of a model of `context` tokens, first trained with `original`, that rotates so many pairs.
    fn scaling(&self, original: Option<f64>, context: f64, pairs: usize) -> Result<RopeScaling, LoadError> {
        let need = |key: &str| self.positive(key).and_then(|value| self.need(key, value));
        match self.kind()? {
            Some("linear") => Ok(RopeScaling::Linear { factor: need("factor")? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context_tokens: self.need("original_max_position_embeddings", original)?,
            }),
            Some("yarn") => {
                let factor = need("factor")?;
                let [fast, slow] = YARN_BETAS;
                let attention_factor = match (self.positive("mscale")?, self.positive("mscale_all_dim")?) {
                    (Some(one), Some(all)) => yarn_mscale(factor, one) / yarn_mscale(factor, all),
                    _ => yarn_mscale(factor, 1.0),
                };
                Ok(RopeScaling::Yarn(Yarn {
                    factor,
                    original_context_tokens: original.unwrap_or(context),
                    beta_fast: self.positive("beta_fast")?.unwrap_or(fast),
                    beta_slow: self.positive("beta_slow")?.unwrap_or(slow),
                    truncate: self.flag("truncate")?.unwrap_or(true),
                    attention_factor: self.positive("attention_factor")?.unwrap_or(attention_factor),
                }))
            }
            // Phi-3 called it su at first.
            Some("longrope" | "su") => self.longrope(original, context, pairs),
            Some("default") => Ok(RopeScaling::None),
            // A factor without a kind says that something is scaled, and not what.
            None if self.value("factor").is_some() => Err(self.refuse("rope_type", ROPE_KINDS, None)),
            None => Ok(RopeScaling::None),
            Some(other) => Err(self.refuse_kind(other)),
        }
    }

    fn longrope(&self, original: Option<f64>, context: f64, pairs: usize) -> Result<RopeScaling, LoadError> {
        let factor = self.positive("factor")?;
        let original = original.or(factor.map(|factor| context / factor));
        let original = self.need("original_max_position_embeddings", original)?;
        if factor.is_some_and(|factor| (factor - context / original).abs() > 1e-6 * factor) {
            return Err(self.refuse("factor", &format!("{}, of the contexts", context / original), None));
        }
        // Both are looked at, the one that is not used too.
        let divisors = |key: &str| {
            let found = self.floats(key)?;
            let found = self.need(key, found)?;
            match found.len() == pairs && found.iter().all(|divisor| divisor.is_finite() && *divisor > 0.0) {
                true => Ok(found),
                false => Err(self.refuse(key, &format!("{pairs} positive numbers"), None)),
            }
        };
        let (short, long) = (divisors("short_factor")?, divisors("long_factor")?);
        Ok(RopeScaling::LongRope {
            divisors: if context > original { long } else { short },
            attention_factor: self.positive("attention_factor")?.unwrap_or(longrope_factor(context, original)),
        })
    }
}

/// The `config.json` that [`read_config`] makes `config` of, for weights of `dtype`.
pub(super) fn write_config(config: &ModelConfig, dtype: DType) -> Result<String, SaveError> {
    if !config.architecture.is_plain() {
        return Err(SaveError::Architecture);
    }
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
    use crate::Architecture;

    const LLAMA: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 100,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 5000, "eos_token_id": [7, 3]"#;

    fn read(more: &str) -> Result<ModelConfig, LoadError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), format!("{LLAMA}{more}}}")).unwrap();
        read_config(folder.path()).map(|(config, _)| config)
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
            read_config(folder.path()).map(|(config, _)| config)
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
            architecture: Architecture::default(),
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
            assert_eq!(read_config(folder.path()).unwrap().0, config);
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
            LoadError::UnknownSetting { key, .. } => key,
            other => other.to_string(),
        };
        assert_eq!(key(r#", "a_setting_of_tomorrow": 1"#), "a_setting_of_tomorrow");
        assert_eq!(key(r#", "layer_types": ["full_attention", "sliding_attention"]"#), "layer_types");
        assert_eq!(key(r#", "hidden_act": "gelu""#), "hidden_act");
        assert_eq!(key(r#", "sliding_window": 4096"#), "sliding_window");
        assert_eq!(key(r#", "rope_scaling": {"rope_type": "dynamic", "factor": 2}"#), "rope_type");
        let yarn = r#", "rope_scaling": {"rope_type": "yarn", "factor": 2, "high_freq_factor": 2}"#;
        assert_eq!(key(yarn), "rope_scaling.high_freq_factor");
        let longrope =
            r#", "rope_scaling": {"rope_type": "longrope", "factor": 2, "short_factor": [1], "long_factor": []}"#;
        assert_eq!(key(longrope), "rope_scaling.short_factor");
        assert_eq!(key(r#", "rope_scaling": {"rope_type": "linear"}"#), "rope_scaling.factor");
        assert_eq!(key(r#", "head_dim": 4294967295"#), "head_dim");
        assert_eq!(key(r#", "partial_rotary_factor": 1e12"#), "partial_rotary_factor");
    }
}
