//! GGUF files: the configuration and tokenizer in their metadata, and weights: as f32, or in the quantized blocks of the file.
//!
//! llama.cpp's converter stores the rows of Q and K in interleaved RoPE order (dimension 2i turns with 2i + 1). Here
//! they are put back into the half-split order (i turns with i + rotary_dims / 2) that the rest of the crate uses.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::config::{ModelConfig, RopeScaling};
use super::error::LoadError;
use super::weights::{Blocks, LayerTensor, TensorName, TensorSource};
use crate::numeric::BlockFormat;

/// An opened GGUF file: everything but the tensors' bytes.
pub(super) struct Gguf {
    path: PathBuf,
    content: Content,
    /// Heads and rotary dimensions, for the order of Q and K rows.
    query_heads: usize,
    kv_heads: usize,
    rotary_dims: usize,
}

impl Gguf {
    /// Reads the metadata of a GGUF file of the `llama` architecture.
    pub(super) fn open(path: &Path) -> Result<(Self, ModelConfig), LoadError> {
        let file = File::open(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
        let content = Content::read(&mut BufReader::new(file)).map_err(|error| damaged(path, &error))?;
        let mut gguf = Gguf { path: path.into(), content, query_heads: 1, kv_heads: 1, rotary_dims: 0 };
        let config = gguf.config()?;
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
        match self.content.metadata.get("general.name") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        }
    }

    fn config(&self) -> Result<ModelConfig, LoadError> {
        let architecture = self.text("general.architecture")?;
        if architecture != "llama" {
            return Err(self.unsupported("general.architecture", "llama", architecture));
        }
        let query_heads = self.number("llama.attention.head_count")?;
        let hidden = self.number("llama.embedding_length")?;
        let head_dim =
            self.number_or("llama.attention.key_length", hidden.checked_div(query_heads).unwrap_or_default())?;
        let rotary_dims = self.number_or("llama.rope.dimension_count", head_dim)?;
        if rotary_dims > head_dim {
            let expected = format!("at most the head dim of {head_dim}");
            return Err(self.unsupported("llama.rope.dimension_count", &expected, &rotary_dims.to_string()));
        }
        let Some(embedding) = self.content.tensor_infos.get("token_embd.weight") else {
            return Err(LoadError::MissingTensor { path: self.path.clone(), name: "token_embd.weight".into() });
        };
        let config = ModelConfig {
            layers: self.number("llama.block_count")?,
            query_heads,
            kv_heads: self.number_or("llama.attention.head_count_kv", query_heads)?,
            head_dim,
            hidden: hidden as usize,
            ffn: self.number("llama.feed_forward_length")? as usize,
            vocab: embedding.shape.dims().first().copied().unwrap_or_default(),
            context_tokens: self.number("llama.context_length")?,
            norm_epsilon: self.float("llama.attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
                LoadError::MissingKey { path: self.path.clone(), key: "llama.attention.layer_norm_rms_epsilon".into() }
            })? as f32,
            rope: self.rope(rotary_dims as usize)?,
            tied_output: !self.content.tensor_infos.contains_key("output.weight"),
            eos_ids: self.eos_ids()?,
            landmark: None,
        };
        config.check().map_err(|source| LoadError::Shape { path: self.path.clone(), source })?;
        Ok(config)
    }

    fn rope(&self, rotary_dims: usize) -> Result<crate::shape::Rope, LoadError> {
        let base = self.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
        let scaling = match self.content.metadata.get("llama.rope.scaling.type") {
            None => RopeScaling::None,
            Some(Value::String(kind)) if kind == "none" => RopeScaling::None,
            Some(Value::String(kind)) if kind == "linear" => {
                RopeScaling::Linear { factor: self.float("llama.rope.scaling.factor")?.unwrap_or(1.0) }
            }
            Some(other) => {
                let found = format!("{other:?}");
                return Err(self.unsupported("llama.rope.scaling.type", "none or linear", &found));
            }
        };
        let mut rope = scaling.rope(base, rotary_dims);
        // The converter writes Llama 3's scaling as one divisor per frequency.
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            let divisors = self.dequantize("rope_freqs.weight", &[rotary_dims / 2])?;
            let divisors = divisors.to_vec1::<f32>().map_err(|error| damaged(&self.path, &error))?;
            for (frequency, divisor) in rope.frequencies.iter_mut().zip(divisors) {
                *frequency /= divisor;
            }
        }
        Ok(rope)
    }

    fn eos_ids(&self) -> Result<Vec<u32>, LoadError> {
        let mut ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            if self.content.metadata.contains_key(key) {
                ids.push(self.number(key)?);
            }
        }
        ids.dedup();
        Ok(ids)
    }

    pub(super) fn text(&self, key: &str) -> Result<&str, LoadError> {
        match self.value(key)? {
            Value::String(text) => Ok(text),
            other => Err(self.unsupported(key, "a string", &format!("{other:?}"))),
        }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        match self.content.metadata.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.unsupported(key, "true or false", &format!("{other:?}"))),
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
        if self.content.metadata.contains_key(key) { self.number(key) } else { Ok(default) }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.content.metadata.get(key) {
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
        self.content.metadata.get(key).ok_or_else(missing)
    }

    pub(super) fn unsupported(&self, key: &str, expected: &str, found: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path.clone(),
            key: key.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    fn dequantize(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let quantized = self.read_tensor(name, shape)?;
        quantized.dequantize(&Device::Cpu).map_err(|error| damaged(&self.path, &format!("tensor {name}: {error}")))
    }

    /// Where the rows of a tensor lie in the file, if they have another order there.
    fn row_order(&self, name: TensorName, rows: usize) -> Option<Vec<usize>> {
        match name {
            TensorName::Layer(_, LayerTensor::Query) => Some(half_split(rows, self.query_heads, self.rotary_dims)),
            TensorName::Layer(_, LayerTensor::Key) => Some(half_split(rows, self.kv_heads, self.rotary_dims)),
            _ => None,
        }
    }

    /// Opens the file anew, so that threads do not share a position.
    fn read_tensor(&self, name: &str, shape: &[usize]) -> Result<QTensor, LoadError> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            return Err(LoadError::MissingTensor { path: self.path.clone(), name: name.into() });
        };
        if info.shape.dims() != shape {
            return Err(LoadError::TensorShape {
                path: self.path.clone(),
                name: name.into(),
                expected: shape.into(),
                found: info.shape.dims().into(),
            });
        }
        let mut file = File::open(&self.path).map_err(|source| LoadError::Io { path: self.path.clone(), source })?;
        info.read(&mut file, self.content.tensor_data_offset, &Device::Cpu)
            .map_err(|error| damaged(&self.path, &format!("tensor {name}: {error}")))
    }
}

impl TensorSource for Gguf {
    fn read(&self, name: TensorName, shape: &[usize]) -> Result<Tensor, LoadError> {
        let tensor = self.dequantize(&file_name(name), shape)?;
        match self.row_order(name, shape[0]) {
            None => Ok(tensor),
            Some(order) => Tensor::from_iter(order.iter().map(|&row| row as u32), &Device::Cpu)
                .and_then(|order| tensor.index_select(&order, 0))
                .map_err(|error| damaged(&self.path, &error)),
        }
    }

    fn read_blocks(&self, name: TensorName, shape: &[usize]) -> Result<Option<Blocks>, LoadError> {
        let file_name = file_name(name);
        let format = match self.content.tensor_infos.get(&file_name).map(|info| info.ggml_dtype) {
            Some(GgmlDType::Q4_0) => BlockFormat::Q4_0,
            Some(GgmlDType::Q4_1) => BlockFormat::Q4_1,
            Some(GgmlDType::Q8_0) => BlockFormat::Q8_0,
            _ => return Ok(None),
        };
        let tensor = self.read_tensor(&file_name, shape)?;
        let bytes = tensor.data().map_err(|error| damaged(&self.path, &format!("tensor {file_name}: {error}")))?;
        let bytes = match self.row_order(name, shape[0]) {
            None => bytes.into_owned(),
            Some(order) => {
                let row_bytes = bytes.len() / shape[0];
                order.iter().flat_map(|row| &bytes[row * row_bytes..][..row_bytes]).copied().collect()
            }
        };
        Ok(Some(Blocks { format, bytes }))
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

fn damaged(path: &Path, detail: &dyn std::fmt::Display) -> LoadError {
    LoadError::Damaged { path: path.into(), detail: detail.to_string() }
}

/// A metadata value for an error message; lists are too long to print.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("a list of {}", values.len()),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_become_half_split_and_the_rest_stays() {
        // Two heads of 6 rows, of which 4 turn.
        assert_eq!(half_split(12, 2, 4), [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]);
    }
}
