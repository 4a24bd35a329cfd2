//! A model as a list of named tensors, for those that change or write it: training reads a model with
//! [`read_tensors`] and leaves one with [`write_model`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};

use super::config::ModelConfig;
use super::error::{LoadError, SaveError};
use super::files::replace_file;
use super::safetensors::{SafeTensorsFolder, huggingface_name};
use super::weights::{TensorName, TensorSource, table};
use super::{gguf, huggingface};

/// One tensor of a model.
#[derive(Clone, Debug)]
pub struct NamedTensor {
    /// Its Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Its values, matrices `(out, in)`.
    pub tensor: Tensor,
}

/// Name and shape of every tensor of a model, from the embedding to the output: under Hugging Face names, matrices
/// `(out, in)`.
pub fn tensor_shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    table(config).into_iter().map(|(name, shape)| (huggingface_name(name), shape)).collect()
}

/// A model whose configuration is read and whose values are not.
pub(super) struct Opened {
    pub(super) config: ModelConfig,
    pub(super) weights: Box<dyn TensorSource>,
    /// The weight files.
    pub(super) paths: Vec<PathBuf>,
}

/// Opens a `.gguf` file, or a folder with `config.json` and safetensors weights.
pub(super) fn open_weights(path: &Path) -> Result<Opened, LoadError> {
    if path.is_dir() {
        let (config, family) = huggingface::read_config(path)?;
        let weights = SafeTensorsFolder::open(path, family)?;
        weights.refuse_unknown(&config)?;
        let paths = weights.paths().map(Path::to_path_buf).collect();
        Ok(Opened { config, weights: Box::new(weights), paths })
    } else {
        let (gguf, config) = gguf::Gguf::open(path)?;
        Ok(Opened { config, weights: Box::new(gguf), paths: vec![path.into()] })
    }
}

/// Reads every tensor of a `.gguf` file, or of a folder with `config.json` and safetensors weights, as f32 on the CPU.
/// Names, order and shapes are those of [`tensor_shapes`].
///
/// # Errors
/// Beside those of files: a model that is not plain Llama, as only that can be trained and written.
pub fn read_tensors(path: &Path) -> Result<(ModelConfig, Vec<NamedTensor>), LoadError> {
    let Opened { config, weights: source, .. } = open_weights(path)?;
    if !config.architecture.is_plain() {
        return Err(LoadError::NotPlain { path: path.into() });
    }
    let read = |(name, shape): (TensorName, Vec<usize>)| {
        Ok(NamedTensor { name: huggingface_name(name), tensor: source.read(name, &shape)? })
    };
    let tensors = table(&config).into_iter().map(read).collect::<Result<_, LoadError>>()?;
    Ok((config, tensors))
}

/// `table (rows, columns)` with `row (1, columns)` in the place of row `at`, which may be the one behind the last.
pub fn put_row(table: &Tensor, at: usize, row: &Tensor) -> candle_core::Result<Tensor> {
    let (rows, _) = table.dims2()?;
    let rest = (at + 1).min(rows);
    Tensor::cat(&[&table.narrow(0, 0, at)?, row, &table.narrow(0, rest, rows - rest)?], 0)
}

/// Writes `config.json` and `model.safetensors` into `folder`, the values as `dtype`. Each file replaces an older one
/// at once or not at all.
pub fn write_model(
    folder: &Path,
    config: &ModelConfig,
    tensors: &[NamedTensor],
    dtype: DType,
) -> Result<(), SaveError> {
    let json = huggingface::write_config(config, dtype)?;
    let convert = |named: &NamedTensor| Ok((named.name.clone(), named.tensor.to_dtype(dtype)?));
    let tensors = tensors.iter().map(convert).collect::<Result<BTreeMap<_, _>, candle_core::Error>>()?;
    let weights = safetensors::serialize(&tensors, None)?;
    std::fs::create_dir_all(folder).map_err(|source| SaveError::Io { path: folder.into(), source })?;
    replace(&folder.join("model.safetensors"), &weights)?;
    replace(&folder.join("config.json"), json.as_bytes())
}

/// Replaces a file at once or not at all.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    replace_file(path, bytes).map_err(|source| SaveError::Io { path: path.into(), source })
}
