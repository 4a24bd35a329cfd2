//! GGUF files: the configuration and tokenizer in their metadata, and weights: as f32, or in the quantized blocks of the file.
//!
//! llama.cpp's converter stores the rows of Q and K in interleaved RoPE order (dimension 2i rotates with 2i + 1). Here
//! they are put back into the half-split order (i rotates with i + rotary_dims / 2) that the rest of the crate uses.
//!
//! A setting or tensor that could change a logit is either computed or refused by name: see [`SETTINGS`] and
//! [`Gguf::refuse_unknown_tensors`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::config::{ModelConfig, RopeScaling};
use super::error::{LoadError, reason};
use super::gguf_header::Header;
use super::weights::{Blocks, LayerTensor, TensorName, TensorSource, is_finite, table};
use landmarkdb::limits::HEAD_DIM_MAX;
use linalg::BlockFormat;

/// llama.cpp's own tool puts the parts of a split file together.
const MERGE_PARTS: &str = "put the parts together with llama.cpp: llama-gguf-split --merge FIRST_PART OUT";

/// What a setting under `llama.` means here.
enum Meaning {
    /// Read below, or of no weight for a logit.
    Known,
    /// Computed only where it says what is computed anyway.
    Only(Value),
}

/// Every setting under `llama.` that may be in a file. Any other one is refused: what it would change is not known.
const SETTINGS: &[(&str, Meaning)] = &[
    ("llama.block_count", Meaning::Known),
    ("llama.context_length", Meaning::Known),
    ("llama.embedding_length", Meaning::Known),
    ("llama.feed_forward_length", Meaning::Known),
    ("llama.vocab_size", Meaning::Known),
    ("llama.attention.head_count", Meaning::Known),
    ("llama.attention.head_count_kv", Meaning::Known),
    ("llama.attention.key_length", Meaning::Known),
    ("llama.attention.value_length", Meaning::Known),
    ("llama.attention.layer_norm_rms_epsilon", Meaning::Known),
    ("llama.attention.scale", Meaning::Known),
    ("llama.attention.causal", Meaning::Only(Value::Bool(true))),
    ("llama.attention.clamp_kqv", Meaning::Only(Value::F32(0.0))),
    ("llama.attention.max_alibi_bias", Meaning::Only(Value::F32(0.0))),
    ("llama.attention.sliding_window", Meaning::Only(Value::U32(0))),
    ("llama.rope.dimension_count", Meaning::Known),
    ("llama.rope.freq_base", Meaning::Known),
    ("llama.rope.scale_linear", Meaning::Known),
    ("llama.rope.scaling.type", Meaning::Known),
    ("llama.rope.scaling.factor", Meaning::Known),
    ("llama.rope.scaling.attn_factor", Meaning::Only(Value::F32(1.0))),
    // They say where a scaling came from; the scalings that use them are refused.
    ("llama.rope.scaling.finetuned", Meaning::Known),
    ("llama.rope.scaling.original_context_length", Meaning::Known),
    ("llama.expert_count", Meaning::Only(Value::U32(0))),
    ("llama.expert_used_count", Meaning::Only(Value::U32(0))),
    ("llama.logit_scale", Meaning::Only(Value::F32(1.0))),
    ("llama.embedding_scale", Meaning::Only(Value::F32(1.0))),
    ("llama.residual_scale", Meaning::Only(Value::F32(1.0))),
    ("llama.pooling_type", Meaning::Only(Value::U32(0))),
    // The order of rows that every converter of this architecture writes.
    ("llama.tensor_data_layout", Meaning::Known),
];

/// Tensors beside those of the model: the divisors of Llama 3's frequencies.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// An opened GGUF file: everything but the tensors' bytes.
pub(super) struct Gguf {
    path: PathBuf,
    header: Header,
    /// Heads and rotary dimensions, for the order of Q and K rows.
    query_heads: usize,
    kv_heads: usize,
    rotary_dims: usize,
}

impl Gguf {
    /// Reads the metadata of a GGUF file of the `llama` architecture.
    pub(super) fn open(path: &Path) -> Result<(Self, ModelConfig), LoadError> {
        let header = Header::read(path)?;
        let mut gguf = Gguf { path: path.into(), header, query_heads: 1, kv_heads: 1, rotary_dims: 0 };
        gguf.refuse_unknown_settings()?;
        let config = gguf.config()?;
        gguf.refuse_unknown_tensors(&config)?;
        gguf.header.check_places(path)?;
        gguf.query_heads = config.query_heads as usize;
        gguf.kv_heads = config.kv_heads as usize;
        gguf.rotary_dims = config.rope.frequencies.len() * 2;
        Ok((gguf, config))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The model's own name, if the file tells it.
    pub(super) fn name(&self) -> Option<&str> {
        match self.header.settings.get("general.name") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        }
    }

    /// Settings of another architecture's prefix, and those of `general.`, are no part of the mathematics.
    fn refuse_unknown_settings(&self) -> Result<(), LoadError> {
        let architecture = self.text("general.architecture")?;
        if architecture != "llama" {
            let way_out = Some("take a model of the Llama family");
            return Err(self.refuse("general.architecture", "llama", architecture, way_out));
        }
        if self.header.settings.contains_key("split.count") && self.number("split.count")? > 1 {
            let found = self.number("split.count")?.to_string();
            return Err(self.refuse("split.count", "1, a model in one file", &found, Some(MERGE_PARTS)));
        }
        for (key, value) in &self.header.settings {
            if !key.starts_with("llama.") {
                continue;
            }
            match SETTINGS.iter().find(|(known, _)| known == key) {
                Some((_, Meaning::Known)) => {}
                Some((_, Meaning::Only(only))) if same(value, only) => {}
                Some((_, Meaning::Only(only))) => return Err(self.unsupported(key, &brief(only), &brief(value))),
                None => {
                    return Err(LoadError::UnknownSetting {
                        path: self.path.clone(),
                        key: key.clone(),
                        found: brief(value),
                    });
                }
            }
        }
        Ok(())
    }

    /// Biases, norms and further layers that are not read would be left out of the sum without a word.
    fn refuse_unknown_tensors(&self, config: &ModelConfig) -> Result<(), LoadError> {
        let known: BTreeSet<String> = table(config).into_iter().map(|(name, _)| file_name(name)).collect();
        let unknown = self.header.tensors.keys().find(|name| !known.contains(*name) && *name != ROPE_DIVISORS);
        match unknown {
            Some(name) => Err(LoadError::UnknownTensor { path: self.path.clone(), name: name.clone() }),
            None => Ok(()),
        }
    }

    fn config(&self) -> Result<ModelConfig, LoadError> {
        let query_heads = self.number("llama.attention.head_count")?;
        let hidden = self.number("llama.embedding_length")?;
        let head_dim =
            self.number_or("llama.attention.key_length", hidden.checked_div(query_heads).unwrap_or_default())?;
        let value_length = self.number_or("llama.attention.value_length", head_dim)?;
        if value_length != head_dim {
            let expected = format!("{head_dim}, the length of keys");
            return Err(self.unsupported("llama.attention.value_length", &expected, &value_length.to_string()));
        }
        let rotary_dims = self.number_or("llama.rope.dimension_count", head_dim)?;
        if rotary_dims > head_dim || !rotary_dims.is_multiple_of(2) {
            let expected = format!("an even number of at most the head dim, {head_dim}");
            return Err(self.unsupported("llama.rope.dimension_count", &expected, &rotary_dims.to_string()));
        }
        if head_dim > HEAD_DIM_MAX {
            let expected = format!("at most {HEAD_DIM_MAX}");
            return Err(self.unsupported("llama.attention.key_length", &expected, &head_dim.to_string()));
        }
        self.check_attention_scale(head_dim)?;
        let Some(embedding) = self.header.tensors.get("token_embd.weight") else {
            return Err(LoadError::MissingTensor { path: self.path.clone(), name: "token_embd.weight".into() });
        };
        let config = ModelConfig {
            layers: self.number("llama.block_count")?,
            query_heads,
            kv_heads: self.number_or("llama.attention.head_count_kv", query_heads)?,
            head_dim,
            hidden: hidden as usize,
            ffn: self.number("llama.feed_forward_length")? as usize,
            vocab: embedding.dims.first().copied().unwrap_or_default(),
            context_tokens: self.number("llama.context_length")?,
            norm_epsilon: self.float("llama.attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
                LoadError::MissingKey { path: self.path.clone(), key: "llama.attention.layer_norm_rms_epsilon".into() }
            })? as f32,
            rope: self.rope(rotary_dims as usize)?,
            tied_output: !self.header.tensors.contains_key("output.weight"),
            eos_ids: self.eos_ids()?,
            landmark: None,
        };
        config.check().map_err(|source| LoadError::Shape { path: self.path.clone(), source })?;
        Ok(config)
    }

    /// Scores are divided by the root of the head dim, which 0 asks for too.
    fn check_attention_scale(&self, head_dim: u32) -> Result<(), LoadError> {
        let key = "llama.attention.scale";
        let scale = (head_dim as f64).sqrt().recip();
        match self.float(key)? {
            Some(found) if found != 0.0 && (found - scale).abs() > 1e-6 * scale => {
                Err(self.unsupported(key, &format!("{scale}, of the head dim"), &found.to_string()))
            }
            _ => Ok(()),
        }
    }

    fn rope(&self, rotary_dims: usize) -> Result<landmarkdb::Rope, LoadError> {
        let base = self.positive("llama.rope.freq_base")?.unwrap_or(10_000.0);
        let mut rope = self.scaling()?.rope(base, rotary_dims);
        // The converter writes Llama 3's scaling as one divisor per frequency.
        if self.header.tensors.contains_key(ROPE_DIVISORS) {
            let divisors = self.dequantize(ROPE_DIVISORS, &[rotary_dims / 2])?;
            let divisors = divisors.to_vec1::<f32>().map_err(|error| damaged(&self.path, &reason(&error)))?;
            for (frequency, divisor) in rope.frequencies.iter_mut().zip(divisors) {
                *frequency /= divisor;
            }
        }
        Ok(rope)
    }

    /// As llama.cpp reads it: a factor alone means linear scaling, and an older key has the factor too.
    fn scaling(&self) -> Result<RopeScaling, LoadError> {
        let factor = match self.positive("llama.rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.positive("llama.rope.scale_linear")?,
        };
        let linear = RopeScaling::Linear { factor: factor.unwrap_or(1.0) };
        match self.header.settings.get("llama.rope.scaling.type") {
            None => Ok(factor.map_or(RopeScaling::None, |_| linear)),
            Some(Value::String(kind)) if kind == "none" => Ok(RopeScaling::None),
            Some(Value::String(kind)) if kind == "linear" => Ok(linear),
            Some(other) => Err(self.unsupported("llama.rope.scaling.type", "none or linear", &brief(other))),
        }
    }

    fn eos_ids(&self) -> Result<Vec<u32>, LoadError> {
        let mut ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            if self.header.settings.contains_key(key) {
                ids.push(self.number(key)?);
            }
        }
        ids.dedup();
        Ok(ids)
    }

    /// Names and values of the settings that begin with `prefix`.
    pub(super) fn settings_under(&self, prefix: &str) -> impl Iterator<Item = (&str, String)> {
        let of_prefix = self.header.settings.iter().filter(move |(key, _)| key.starts_with(prefix));
        of_prefix.map(|(key, value)| (key.as_str(), brief(value)))
    }

    pub(super) fn text(&self, key: &str) -> Result<&str, LoadError> {
        match self.value(key)? {
            Value::String(text) => Ok(text),
            other => Err(self.unsupported(key, "a string", &brief(other))),
        }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        match self.header.settings.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.unsupported(key, "true or false", &brief(other))),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<u32, LoadError> {
        let value = self.value(key)?;
        let number = match value {
            Value::I32(number) => u32::try_from(*number).ok(),
            Value::I64(number) => u32::try_from(*number).ok(),
            other => other.to_u64().ok().and_then(|number| u32::try_from(number).ok()),
        };
        number.ok_or_else(|| self.unsupported(key, "a whole number of at most 32 bits", &brief(value)))
    }

    fn number_or(&self, key: &str, default: u32) -> Result<u32, LoadError> {
        if self.header.settings.contains_key(key) { self.number(key) } else { Ok(default) }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.header.settings.get(key) {
            None => Ok(None),
            Some(Value::F32(number)) => Ok(Some(*number as f64)),
            Some(Value::F64(number)) => Ok(Some(*number)),
            Some(other) => Err(self.unsupported(key, "a floating-point number", &brief(other))),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.float(key)? {
            Some(found) if !(found.is_finite() && found > 0.0) => {
                Err(self.unsupported(key, "a positive number", &found.to_string()))
            }
            found => Ok(found),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<&[Value], LoadError> {
        match self.value(key)? {
            Value::Array(values) => Ok(values),
            other => Err(self.unsupported(key, "a list", &brief(other))),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<Vec<&str>, LoadError> {
        let texts = self.list(key)?.iter().map(|value| match value {
            Value::String(text) => Ok(text.as_str()),
            other => Err(self.unsupported(key, "strings", &brief(other))),
        });
        texts.collect()
    }

    fn value(&self, key: &str) -> Result<&Value, LoadError> {
        let missing = || LoadError::MissingKey { path: self.path.clone(), key: key.into() };
        self.header.settings.get(key).ok_or_else(missing)
    }

    pub(super) fn unsupported(&self, key: &str, expected: &str, found: &str) -> LoadError {
        self.refuse(key, expected, found, None)
    }

    pub(super) fn refuse(&self, key: &str, expected: &str, found: &str, way_out: Option<&'static str>) -> LoadError {
        let (path, key, expected, found) = (self.path.clone(), key.into(), expected.into(), found.into());
        LoadError::Unsupported { path, key, expected, found, way_out }
    }

    fn dequantize(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let quantized = self.read_tensor(name, shape)?;
        let failed = |error| LoadError::damaged_tensor(&self.path, name, error);
        let tensor = quantized.dequantize(&Device::Cpu).map_err(failed)?;
        match is_finite(&tensor).map_err(failed)? {
            true => Ok(tensor),
            false => Err(LoadError::NotFinite { path: self.path.clone(), name: name.into() }),
        }
    }

    /// Where the rows of a tensor lie in the file, if they have another order there.
    fn row_order(&self, name: TensorName, rows: usize) -> Option<Vec<usize>> {
        match name {
            TensorName::Layer(_, LayerTensor::Query) => Some(half_split(rows, self.query_heads, self.rotary_dims)),
            TensorName::Layer(_, LayerTensor::Key) => Some(half_split(rows, self.kv_heads, self.rotary_dims)),
            _ => None,
        }
    }

    fn read_tensor(&self, name: &str, shape: &[usize]) -> Result<QTensor, LoadError> {
        let Some(entry) = self.header.tensors.get(name) else {
            return Err(LoadError::MissingTensor { path: self.path.clone(), name: name.into() });
        };
        if entry.dims != shape {
            return Err(LoadError::TensorShape {
                path: self.path.clone(),
                name: name.into(),
                expected: shape.into(),
                found: entry.dims.clone(),
            });
        }
        self.header.tensor(&self.path, name, entry)
    }
}

impl TensorSource for Gguf {
    fn read(&self, name: TensorName, shape: &[usize]) -> Result<Tensor, LoadError> {
        let tensor = self.dequantize(&file_name(name), shape)?;
        match self.row_order(name, shape[0]) {
            None => Ok(tensor),
            Some(order) => Tensor::from_iter(order.iter().map(|&row| row as u32), &Device::Cpu)
                .and_then(|order| tensor.index_select(&order, 0))
                .map_err(|error| damaged(&self.path, &reason(&error))),
        }
    }

    fn read_blocks(&self, name: TensorName, shape: &[usize]) -> Result<Option<Blocks>, LoadError> {
        let file_name = file_name(name);
        let Some(entry) = self.header.tensors.get(&file_name) else { return Ok(None) };
        let format = match entry.format(&self.path, &file_name)? {
            GgmlDType::Q4_0 => BlockFormat::Q4_0,
            GgmlDType::Q4_1 => BlockFormat::Q4_1,
            GgmlDType::Q8_0 => BlockFormat::Q8_0,
            _ => return Ok(None),
        };
        let tensor = self.read_tensor(&file_name, shape)?;
        let bytes = tensor.data().map_err(|error| LoadError::damaged_tensor(&self.path, &file_name, error))?;
        let bytes = match self.row_order(name, shape[0]) {
            None => bytes.into_owned(),
            Some(order) => {
                let row_bytes = bytes.len() / shape[0];
                order.iter().flat_map(|row| &bytes[row * row_bytes..][..row_bytes]).copied().collect()
            }
        };
        let blocks = Blocks { format, bytes };
        match blocks.is_finite() {
            true => Ok(Some(blocks)),
            false => Err(LoadError::NotFinite { path: self.path.clone(), name: file_name }),
        }
    }
}

/// Where each row of Q or K lies in the file, `rows` of `heads` heads: the first half of a head's rotary rows are the even ones,
/// the other half the odd ones.
fn half_split(rows: usize, heads: usize, rotary_dims: usize) -> Vec<usize> {
    let head_dim = rows / heads;
    let of_head = |row: usize| match row {
        row if row < rotary_dims / 2 => 2 * row,
        row if row < rotary_dims => 2 * (row - rotary_dims / 2) + 1,
        row => row,
    };
    (0..rows).map(|row| row / head_dim * head_dim + of_head(row % head_dim)).collect()
}

fn file_name(name: TensorName) -> String {
    let (layer, tensor) = match name {
        TensorName::Embedding => return "token_embd.weight".into(),
        TensorName::OutputNorm => return "output_norm.weight".into(),
        TensorName::Output => return "output.weight".into(),
        TensorName::Layer(layer, tensor) => (layer, tensor),
    };
    let part = match tensor {
        LayerTensor::AttentionNorm => "attn_norm",
        LayerTensor::Query => "attn_q",
        LayerTensor::Key => "attn_k",
        LayerTensor::Value => "attn_v",
        LayerTensor::AttentionOutput => "attn_output",
        LayerTensor::FfnNorm => "ffn_norm",
        LayerTensor::Gate => "ffn_gate",
        LayerTensor::Up => "ffn_up",
        LayerTensor::Down => "ffn_down",
    };
    format!("blk.{layer}.{part}.weight")
}

fn damaged(path: &Path, detail: &str) -> LoadError {
    LoadError::Damaged { path: path.into(), detail: detail.into() }
}

/// A setting for an error message; lists and templates are too long to print.
fn brief(value: &Value) -> String {
    const CHARS_MAX: usize = 60;
    match value {
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::String(text) if text.chars().count() > CHARS_MAX => {
            format!("{:?} and more", text.chars().take(CHARS_MAX).collect::<String>())
        }
        Value::String(text) => format!("{text:?}"),
        Value::Bool(flag) => flag.to_string(),
        Value::F32(number) => number.to_string(),
        Value::F64(number) => number.to_string(),
        Value::I8(number) => number.to_string(),
        Value::I16(number) => number.to_string(),
        Value::I32(number) => number.to_string(),
        Value::I64(number) => number.to_string(),
        other => other.to_u64().map_or_else(|_| format!("{other:?}"), |number| number.to_string()),
    }
}

/// Whether two settings say the same, in any width.
fn same(a: &Value, b: &Value) -> bool {
    brief(a) == brief(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_become_half_split_and_the_rest_stays() {
        // Two heads of 6 rows, of which 4 rotate.
        assert_eq!(half_split(12, 2, 4), [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]);
    }
}
