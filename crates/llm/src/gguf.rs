//! GGUF files: the configuration and tokenizer in their metadata, and weights: as f32, or in the quantized blocks of the file.
//!
//! llama.cpp's converter stores the rows of Q and K of some architectures in interleaved RoPE order (dimension 2i rotates with
//! 2i + 1). Here they are put back into the half-split order (i rotates with i + rotary_dims / 2) that the rest of the crate
//! uses.
//!
//! A setting or tensor that could change a logit is either computed or refused by name: `families` says which, and what is not
//! asked for is refused here.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::error::{LoadError, reason};
use super::families::{self, Family, GGUF_NEUTRAL, Key, Settings};
use super::gguf_header::{Format, Header};
use super::rotation::{RopeScaling, Rotation, YARN_BETAS, Yarn, yarn_mscale};
use super::weights::{Blocks, LayerTensor, TensorName, TensorSource, is_finite, table};
use landmarkdb::InvalidShape;

const OTHER_KIND: &str = "take a model of one of these kinds";

/// llama.cpp's own tool puts the parts of a split file together.
const MERGE_PARTS: &str = "put the parts together with llama.cpp: llama-gguf-split --merge FIRST_PART OUT";

/// Tensors beside those of the model: the divisors of Llama 3's frequencies, and those of LongRoPE's.
const ROPE_DIVISORS: &str = "rope_freqs.weight";
const LONG_DIVISORS: &str = "rope_factors_long.weight";
const SHORT_DIVISORS: &str = "rope_factors_short.weight";

/// An opened GGUF file: everything but the tensors' bytes.
pub(super) struct Gguf {
    path: PathBuf,
    header: Header,
    family: &'static Family,
    /// Heads and rotary dimensions, for the order of Q and K rows.
    query_heads: usize,
    kv_heads: usize,
    rotary_dims: usize,
}

impl Gguf {
    /// Reads the metadata of a GGUF file.
    pub(super) fn open(path: &Path) -> Result<(Self, ModelConfig), LoadError> {
        let header = Header::read(path)?;
        let family = Self::family(&header, path)?;
        let mut gguf = Gguf { path: path.into(), header, family, query_heads: 1, kv_heads: 1, rotary_dims: 0 };
        let settings = GgufSettings::new(&gguf);
        let config = families::read(family, &settings)?;
        settings.refuse_unread()?;
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

    /// The family, which comes first: others have other settings.
    fn family(header: &Header, path: &Path) -> Result<&'static Family, LoadError> {
        let key = "general.architecture";
        let refuse = |key: &str, expected: String, found: String, way_out| {
            let path = path.to_path_buf();
            Err(LoadError::Unsupported { path, key: key.into(), expected, found, way_out: Some(way_out) })
        };
        let architecture = match header.settings.get(key) {
            Some(Value::String(name)) => name,
            Some(other) => return refuse(key, "a string".into(), brief(other), OTHER_KIND),
            None => return Err(LoadError::MissingKey { path: path.into(), key: key.into() }),
        };
        let Some(family) = families::by_gguf(architecture) else {
            return refuse(key, families::gguf_architectures(), architecture.clone(), OTHER_KIND);
        };
        if let Some(parts) = header.settings.get("split.count").filter(|parts| number(parts) != Some(1)) {
            return refuse("split.count", "1, a model in one file".into(), brief(parts), MERGE_PARTS);
        }
        Ok(family)
    }

    /// Biases, norms and further layers that are not read would be left out of the sum without a word.
    fn refuse_unknown_tensors(&self, config: &ModelConfig) -> Result<(), LoadError> {
        let mut known: BTreeSet<String> = table(config).into_iter().map(|(name, _)| self.file_name(name)).collect();
        known.extend([ROPE_DIVISORS, LONG_DIVISORS, SHORT_DIVISORS].map(String::from));
        match self.header.tensors.keys().find(|name| !known.contains(*name)) {
            Some(name) => Err(LoadError::UnknownTensor { path: self.path.clone(), name: name.clone() }),
            None => Ok(()),
        }
    }

    fn file_name(&self, name: TensorName) -> String {
        families::gguf_name(self.family, name)
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

    pub(super) fn text_if_any(&self, key: &str) -> Result<Option<&str>, LoadError> {
        if self.header.settings.contains_key(key) { self.text(key).map(Some) } else { Ok(None) }
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
        number(value).ok_or_else(|| self.unsupported(key, "a whole number of at most 32 bits", &brief(value)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.header.settings.get(key) {
            None => Ok(None),
            Some(Value::F32(number)) => Ok(Some(*number as f64)),
            Some(Value::F64(number)) => Ok(Some(*number)),
            Some(other) => Err(self.unsupported(key, "a floating-point number", &brief(other))),
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
        let (format, bytes) = self.read_bytes(name, shape)?;
        let values: Vec<f32> = match format {
            Format::F32 => bytes.as_chunks().0.iter().map(|&number| f32::from_le_bytes(number)).collect(),
            Format::Blocks(format) => format.widen(&bytes),
        };
        let failed = |error| LoadError::damaged_tensor(&self.path, name, error);
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).map_err(failed)?;
        match is_finite(&tensor).map_err(failed)? {
            true => Ok(tensor),
            false => Err(LoadError::NotFinite { path: self.path.clone(), name: name.into() }),
        }
    }

    /// Where the rows of a tensor lie in the file, if they have another order there.
    fn row_order(&self, name: TensorName, rows: usize) -> Option<Vec<usize>> {
        if !self.family.gguf_interleaved {
            return None;
        }
        let heads = match name {
            TensorName::Layer(_, LayerTensor::Query | LayerTensor::QueryBias) => self.query_heads,
            TensorName::Layer(_, LayerTensor::Key | LayerTensor::KeyBias) => self.kv_heads,
            _ => return None,
        };
        Some(half_split(rows, heads, self.rotary_dims))
    }

    fn read_bytes(&self, name: &str, shape: &[usize]) -> Result<(Format, Vec<u8>), LoadError> {
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
        Ok((entry.format(&self.path, name)?, self.header.bytes(&self.path, name, entry)?))
    }
}

impl TensorSource for Gguf {
    fn read(&self, name: TensorName, shape: &[usize]) -> Result<Tensor, LoadError> {
        let tensor = self.dequantize(&self.file_name(name), shape)?;
        match self.row_order(name, shape[0]) {
            None => Ok(tensor),
            Some(order) => Tensor::from_iter(order.iter().map(|&row| row as u32), &Device::Cpu)
                .and_then(|order| tensor.index_select(&order, 0))
                .map_err(|error| damaged(&self.path, &reason(&error))),
        }
    }

    fn read_blocks(&self, name: TensorName, shape: &[usize]) -> Result<Option<Blocks>, LoadError> {
        let file_name = self.file_name(name);
        let Some(entry) = self.header.tensors.get(&file_name) else { return Ok(None) };
        let Format::Blocks(format) = entry.format(&self.path, &file_name)? else { return Ok(None) };
        let (_, bytes) = self.read_bytes(&file_name, shape)?;
        let bytes = match self.row_order(name, shape[0]) {
            None => bytes,
            Some(order) => {
                let row_bytes = bytes.len() / shape[0];
                order.iter().flat_map(|row| &bytes[row * row_bytes..][..row_bytes]).copied().collect()
            }
        };
        match format.is_finite(&bytes) {
            true => Ok(Some(Blocks { format, bytes })),
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

/// A setting as a whole number of 32 bits, if it is one.
fn number(value: &Value) -> Option<u32> {
    match value {
        Value::I32(number) => u32::try_from(*number).ok(),
        Value::I64(number) => u32::try_from(*number).ok(),
        other => other.to_u64().ok().and_then(|number| u32::try_from(number).ok()),
    }
}

/// A setting as a number of any kind; true is 1.
fn any_number(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(flag) => Some(f64::from(*flag)),
        Value::F32(number) => Some(*number as f64),
        Value::F64(number) => Some(*number),
        other => number(other).map(f64::from),
    }
}

/// The settings of a file, as a family reads them: those behind its architecture and a dot.
struct GgufSettings<'a> {
    file: &'a Gguf,
    /// Names that were asked for, in full.
    read: RefCell<BTreeSet<String>>,
}

impl<'a> GgufSettings<'a> {
    fn new(file: &'a Gguf) -> Self {
        GgufSettings { file, read: RefCell::default() }
    }

    /// `llama.` and the like.
    fn prefix(&self) -> String {
        format!("{}.", self.file.family.gguf.unwrap_or_default())
    }

    fn name(&self, key: &str) -> String {
        let name = format!("{}{key}", self.prefix());
        self.read.borrow_mut().insert(name.clone());
        name
    }

    /// The name of a setting that the file has, if the setting has a name here.
    fn found(&self, key: &str) -> Option<String> {
        let name = self.name(key);
        (!key.is_empty() && self.file.header.settings.contains_key(&name)).then_some(name)
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let Some(name) = self.found(key) else { return Ok(None) };
        match self.file.float(&name)? {
            Some(found) if !(found.is_finite() && found > 0.0) => {
                Err(self.file.unsupported(&name, "a positive number", &found.to_string()))
            }
            found => Ok(found),
        }
    }

    /// Refuses settings that the family has not asked for, but those that say nothing or nothing new. Settings of another
    /// architecture's prefix, and those of `general.`, are no part of the mathematics.
    fn refuse_unread(&self) -> Result<(), LoadError> {
        let (prefix, read) = (self.prefix(), self.read.borrow());
        for (name, value) in &self.file.header.settings {
            let Some(key) = name.strip_prefix(&prefix) else { continue };
            if read.contains(name) || families::is_harmless_setting(key) {
                continue;
            }
            match GGUF_NEUTRAL.iter().find(|(known, _)| *known == key) {
                Some((_, neutral)) if any_number(value) == Some(*neutral) => {}
                Some((_, neutral)) => {
                    let expected = match value {
                        Value::Bool(_) => (*neutral != 0.0).to_string(),
                        _ => neutral.to_string(),
                    };
                    return Err(self.file.unsupported(name, &expected, &brief(value)));
                }
                None => {
                    let (path, key, found) = (self.file.path.clone(), name.clone(), brief(value));
                    return Err(LoadError::UnknownSetting { path, key, found });
                }
            }
        }
        Ok(())
    }

    fn rotary_dims(&self, head_dim: u32) -> Result<usize, LoadError> {
        let Some(name) = self.found("rope.dimension_count") else { return Ok(head_dim as usize / 2 * 2) };
        let found = self.file.number(&name)?;
        if found > head_dim || !found.is_multiple_of(2) {
            let expected = format!("an even number of at most the head dim, {head_dim}");
            return Err(self.file.unsupported(&name, &expected, &found.to_string()));
        }
        Ok(found as usize)
    }

    /// As llama.cpp reads it: a factor alone means linear scaling, and an older key has the factor too.
    fn scaling(&self, context: f64, pairs: usize) -> Result<RopeScaling, LoadError> {
        let factor = match self.positive("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.positive("rope.scale_linear")?,
        };
        let original = match self.found("rope.scaling.original_context_length") {
            Some(name) => self.file.number(&name)?.max(1) as f64,
            None => context,
        };
        let attention_factor = self.positive("rope.scaling.attn_factor")?;
        let linear = RopeScaling::Linear { factor: factor.unwrap_or(1.0) };
        let kind = self.found("rope.scaling.type").map(|name| self.file.text(&name)).transpose()?;
        let scaling = match kind {
            _ if self.file.header.tensors.contains_key(LONG_DIVISORS) => {
                let long = self.divisors(LONG_DIVISORS, pairs)?;
                let short = self.divisors(SHORT_DIVISORS, pairs)?;
                let attention_factor = attention_factor.unwrap_or(1.0);
                return Ok(RopeScaling::LongRope {
                    divisors: if context > original { long } else { short },
                    attention_factor,
                });
            }
            None => factor.map_or(RopeScaling::None, |_| linear),
            Some("none") => RopeScaling::None,
            Some("linear") => linear,
            Some("yarn") => {
                let factor = factor.unwrap_or(1.0);
                let [fast, slow] = YARN_BETAS;
                return Ok(RopeScaling::Yarn(Yarn {
                    factor,
                    original_context_tokens: original,
                    beta_fast: self.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(fast),
                    beta_slow: self.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(slow),
                    truncate: true,
                    attention_factor: attention_factor.unwrap_or(1.0) * yarn_mscale(factor, 1.0),
                }));
            }
            // What it divides by is in tensors.
            Some("longrope") => {
                return Err(LoadError::MissingTensor { path: self.file.path.clone(), name: LONG_DIVISORS.into() });
            }
            Some(other) => {
                let name = self.name("rope.scaling.type");
                return Err(self.file.unsupported(&name, "none, linear, yarn or longrope", &format!("{other:?}")));
            }
        };
        match attention_factor {
            Some(found) if found != 1.0 => {
                let name = self.name("rope.scaling.attn_factor");
                Err(self.file.unsupported(&name, "1, of this kind of scaling", &found.to_string()))
            }
            _ => Ok(scaling),
        }
    }

    /// One divisor for each pair that rotates.
    fn divisors(&self, name: &str, pairs: usize) -> Result<Vec<f64>, LoadError> {
        let tensor = self.file.dequantize(name, &[pairs])?;
        let divisors = tensor.to_vec1::<f32>().map_err(|error| damaged(&self.file.path, &reason(&error)))?;
        match divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
            Some(bad) => Err(self.file.unsupported(name, "positive numbers", &bad.to_string())),
            None => Ok(divisors.into_iter().map(f64::from).collect()),
        }
    }
}

impl Settings for GgufSettings<'_> {
    fn number(&self, key: Key) -> Result<Option<u32>, LoadError> {
        self.found(key.gguf).map(|name| self.file.number(&name)).transpose()
    }

    fn float(&self, key: Key) -> Result<Option<f64>, LoadError> {
        Ok(self.found(key.gguf).map(|name| self.file.float(&name)).transpose()?.flatten())
    }

    fn flag(&self, key: Key) -> Result<Option<bool>, LoadError> {
        self.found(key.gguf).map(|name| self.file.flag_or(&name, false)).transpose()
    }

    fn text(&self, key: Key) -> Result<Option<&str>, LoadError> {
        self.found(key.gguf).map(|name| self.file.text(&name)).transpose()
    }

    fn numbers(&self, key: Key) -> Result<Option<Vec<u32>>, LoadError> {
        let Some(name) = self.found(key.gguf) else { return Ok(None) };
        let numbers: Option<Vec<u32>> = self.file.list(&name)?.iter().map(number).collect();
        numbers.map(Some).ok_or_else(|| self.file.unsupported(&name, "whole numbers", "others"))
    }

    fn texts(&self, key: Key) -> Result<Option<Vec<&str>>, LoadError> {
        self.found(key.gguf).map(|name| self.file.texts(&name)).transpose()
    }

    fn vocab(&self) -> Result<u32, LoadError> {
        let name = self.file.file_name(TensorName::Embedding);
        let Some(embedding) = self.file.header.tensors.get(&name) else {
            return Err(LoadError::MissingTensor { path: self.file.path.clone(), name });
        };
        let rows = embedding.dims.first().copied().unwrap_or_default();
        u32::try_from(rows).map_err(|_| self.file.unsupported(&name, "rows of at most 32 bits", &rows.to_string()))
    }

    fn tied_output(&self) -> Result<bool, LoadError> {
        Ok(!self.file.header.tensors.contains_key(&self.file.file_name(TensorName::Output)))
    }

    fn eos_ids(&self) -> Result<Vec<u32>, LoadError> {
        let keys = ["eos", "eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id"));
        let found = keys.iter().filter(|key| self.file.header.settings.contains_key(*key));
        let mut ids = found.map(|key| self.file.number(key)).collect::<Result<Vec<u32>, LoadError>>()?;
        ids.dedup();
        Ok(ids)
    }

    fn rotation(&self, head_dim: u32, context_tokens: u32) -> Result<Rotation, LoadError> {
        let rotary_dims = self.rotary_dims(head_dim)?;
        let base = self.positive("rope.freq_base")?.unwrap_or(10_000.0);
        let mut rotation = self.scaling(context_tokens as f64, rotary_dims / 2)?.rotation(base, rotary_dims);
        // The converter writes Llama 3's scaling as one divisor per frequency.
        if self.file.header.tensors.contains_key(ROPE_DIVISORS) {
            let divisors = self.divisors(ROPE_DIVISORS, rotary_dims / 2)?;
            for (frequency, divisor) in rotation.rope.frequencies.iter_mut().zip(divisors) {
                *frequency /= divisor as f32;
            }
        }
        Ok(rotation)
    }

    fn local_rotation(&self, head_dim: u32) -> Result<Rotation, LoadError> {
        let base = self.positive("rope.freq_base_swa")?.or(self.file.family.local_base).unwrap_or(10_000.0);
        Ok(RopeScaling::None.rotation(base, self.rotary_dims(head_dim)?))
    }

    fn has_bias(&self, _: Key, tensors: &[LayerTensor]) -> Result<bool, LoadError> {
        let endings = tensors.iter().map(|&tensor| self.file.file_name(TensorName::Layer(0, tensor)));
        let endings: Vec<String> = endings.map(|name| name.trim_start_matches("blk.0").into()).collect();
        let is_one = |name: &String| name.starts_with("blk.") && endings.iter().any(|ending| name.ends_with(ending));
        Ok(self.file.header.tensors.keys().any(is_one))
    }

    fn missing(&self, key: Key) -> LoadError {
        LoadError::MissingKey { path: self.file.path.clone(), key: self.name(key.gguf) }
    }

    fn refuse(&self, key: Key, expected: &str, way_out: Option<&'static str>) -> LoadError {
        let name = self.name(key.gguf);
        let found = self.file.header.settings.get(&name).map_or("nothing".into(), brief);
        self.file.refuse(&name, expected, &found, way_out)
    }

    fn shape(&self, source: InvalidShape) -> LoadError {
        LoadError::Shape { path: self.file.path.clone(), source }
    }
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
