//! Weights of a Hugging Face model folder: one `.safetensors` file, or several with an index.
//!
//! Files are read, not mapped: a file that another program cuts short must give an error, not a signal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::config::ModelConfig;
use super::error::LoadError;
use super::families::{self, Family};
use super::huggingface::read_json;
use super::weights::{Blocks, LayerTensor, TensorName, TensorSource, is_finite, table};
use landmarkdb::limits::SAFETENSORS_HEADER_BYTES_MAX;
use linalg::BlockFormat;

/// The weight files of one folder, headers read.
pub(super) struct SafeTensorsFolder {
    files: Vec<WeightFile>,
    /// Where each tensor lies: its name there, and an index into `files`.
    places: BTreeMap<String, (String, usize)>,
    folder: PathBuf,
    family: &'static Family,
}

struct WeightFile {
    path: PathBuf,
    header: Metadata,
    /// Where the tensors' bytes begin.
    data_offset_bytes: u64,
}

#[derive(Deserialize)]
struct IndexJson {
    weight_map: BTreeMap<String, String>,
}

impl SafeTensorsFolder {
    /// Opens the weights of a folder: the files its index names, or `model.safetensors`.
    pub(super) fn open(folder: &Path, family: &'static Family) -> Result<Self, LoadError> {
        let index = folder.join("model.safetensors.index.json");
        let names = if index.exists() {
            let names = read_json::<IndexJson>(&index)?.weight_map.into_values().collect::<BTreeSet<_>>();
            // A folder from elsewhere may not say which files of this machine are read.
            let plain = |name: &str| matches!(Path::new(name).components().next(), Some(Component::Normal(only)) if only == name);
            let outside = |name: &&String| !plain(name);
            if let Some(name) = names.iter().find(outside) {
                return Err(LoadError::OutsideFolder { path: index, name: name.clone() });
            }
            names
        } else {
            BTreeSet::from(["model.safetensors".to_string()])
        };
        let files = names.iter().map(|name| WeightFile::open(&folder.join(name))).collect::<Result<Vec<_>, _>>()?;
        let mut places = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for stored in file.header.offset_keys() {
                places.extend(families::text_name(family, &stored).map(|name| (name, (stored, number))));
            }
        }
        Ok(SafeTensorsFolder { files, places, folder: folder.into(), family })
    }

    /// Refuses tensors that `config` has no place for: left out of the sum without a word, they would make answers wrong.
    pub(super) fn refuse_unknown(&self, config: &ModelConfig) -> Result<(), LoadError> {
        let mut known: BTreeSet<String> = table(config).into_iter().map(|(name, _)| self.name(name)).collect();
        // Of a tied output some files hold a copy, which is not read.
        known.insert(self.name(TensorName::Output));
        // Older checkpoints hold the frequencies that the configuration tells.
        let unknown =
            self.places.iter().find(|(name, _)| !known.contains(*name) && !name.ends_with(".rotary_emb.inv_freq"));
        match unknown {
            Some((_, (stored, file))) => {
                Err(LoadError::UnknownTensor { path: self.files[*file].path.clone(), name: stored.clone() })
            }
            None => Ok(()),
        }
    }

    fn name(&self, name: TensorName) -> String {
        families::folder_name(self.family, name)
    }

    /// One weight file of any name, of a plain Llama model or of an adapter.
    pub(super) fn file(path: &Path) -> Result<Self, LoadError> {
        let file = WeightFile::open(path)?;
        let places = file.header.offset_keys().into_iter().map(|name| (name.clone(), (name, 0))).collect();
        Ok(SafeTensorsFolder { files: vec![file], places, folder: path.into(), family: families::plain() })
    }

    /// Reads one tensor by the name that it has in the files, like [`TensorSource::read`].
    pub(super) fn read_named(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        match self.places.get(name) {
            Some((stored, number)) => self.files[*number].read(stored, shape),
            None => Err(missing(&self.folder, name)),
        }
    }

    /// The weight files, sorted by name.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }
}

impl WeightFile {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.into(), source };
        let damaged = |detail: String| LoadError::Damaged { path: path.into(), detail };
        let mut file = File::open(path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        if file_bytes < length.len() as u64 {
            return Err(damaged(format!("expected a header, found {file_bytes} bytes")));
        }
        file.read_exact(&mut length).map_err(io)?;
        let header_bytes = u64::from_le_bytes(length);
        let data_offset_bytes = header_bytes.saturating_add(length.len() as u64);
        if data_offset_bytes > file_bytes {
            return Err(damaged(format!("expected a header of {header_bytes} bytes, found a file of {file_bytes}")));
        }
        if header_bytes > SAFETENSORS_HEADER_BYTES_MAX {
            return Err(damaged(format!(
                "expected a header of at most {SAFETENSORS_HEADER_BYTES_MAX} bytes, found {header_bytes}"
            )));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|error| damaged(error.to_string()))?;
        let expected_bytes = data_offset_bytes + header.data_len() as u64;
        if file_bytes != expected_bytes {
            return Err(damaged(format!("expected {expected_bytes} bytes, found {file_bytes}")));
        }
        Ok(WeightFile { path: path.into(), header, data_offset_bytes })
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let (dtype, bytes) = self.read_bytes(name, shape)?;
        let failed = |error| LoadError::damaged_tensor(&self.path, name, error);
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu);
        let tensor = tensor.and_then(|tensor| tensor.to_dtype(DType::F32)).map_err(failed)?;
        match is_finite(&tensor).map_err(failed)? {
            true => Ok(tensor),
            false => Err(LoadError::NotFinite { path: self.path.clone(), name: name.into() }),
        }
    }

    /// Numbers of two bytes stay as they are.
    fn read_blocks(&self, name: &str, shape: &[usize]) -> Result<Option<Blocks>, LoadError> {
        let format = match self.header.info(name).map(|info| info.dtype) {
            Some(Dtype::F16) => BlockFormat::F16,
            Some(Dtype::BF16) => BlockFormat::Bf16,
            _ => return Ok(None),
        };
        let (_, bytes) = self.read_bytes(name, shape)?;
        match format.is_finite(&bytes) {
            true => Ok(Some(Blocks { format, bytes })),
            false => Err(LoadError::NotFinite { path: self.path.clone(), name: name.into() }),
        }
    }

    fn read_bytes(&self, name: &str, shape: &[usize]) -> Result<(DType, Vec<u8>), LoadError> {
        let path = || self.path.clone();
        let info = self.header.info(name).ok_or_else(|| missing(&self.path, name))?;
        if info.shape != shape {
            return Err(LoadError::TensorShape {
                path: path(),
                name: name.into(),
                expected: shape.into(),
                found: info.shape.clone(),
            });
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(LoadError::Unsupported {
                    path: path(),
                    key: name.into(),
                    expected: "F32, F16 or BF16".into(),
                    found: format!("{other:?}"),
                    way_out: Some("take the model in one of these, or as GGUF"),
                });
            }
        };
        // The header was checked against the file's length, so this allocates no more than the file holds.
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        let mut file = File::open(&self.path).map_err(|source| LoadError::Io { path: path(), source })?;
        file.seek(SeekFrom::Start(self.data_offset_bytes + start as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| LoadError::Io { path: path(), source })?;
        Ok((dtype, bytes))
    }
}

impl TensorSource for SafeTensorsFolder {
    fn read(&self, name: TensorName, shape: &[usize]) -> Result<Tensor, LoadError> {
        let tensor = self.read_named(&self.name(name), shape)?;
        match self.family.norms_less_one && is_norm(name) {
            true => Ok((tensor + 1.0).expect("a source gives f32 tensors")),
            false => Ok(tensor),
        }
    }

    fn read_blocks(&self, name: TensorName, shape: &[usize]) -> Result<Option<Blocks>, LoadError> {
        let place = self.places.get(&self.name(name));
        place.map_or(Ok(None), |(stored, number)| self.files[*number].read_blocks(stored, shape))
    }
}

fn missing(path: &Path, name: &str) -> LoadError {
    LoadError::MissingTensor { path: path.into(), name: name.into() }
}

/// What Hugging Face calls a tensor of a plain Llama model.
pub(super) fn huggingface_name(name: TensorName) -> String {
    families::folder_name(families::plain(), name)
}

fn is_norm(name: TensorName) -> bool {
    use LayerTensor::*;
    let of_layer = [AttentionNorm, AttentionOutputNorm, FfnNorm, FfnOutputNorm, QueryNorm, KeyNorm];
    match name {
        TensorName::OutputNorm => true,
        TensorName::Layer(_, tensor) => of_layer.contains(&tensor),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn numbers_of_two_bytes_stay_as_they_are_and_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let name = huggingface_name(TensorName::Output);
        for (dtype, format) in [(DType::F16, BlockFormat::F16), (DType::BF16, BlockFormat::Bf16)] {
            for wrong in [None, Some(f32::NAN), Some(f32::NEG_INFINITY)] {
                let mut values: Vec<f32> = (0..35).map(|i| i as f32 / 8.0 - 2.0).collect();
                values[34] = wrong.unwrap_or(values[34]);
                let tensor = Tensor::from_vec(values.clone(), (5, 7), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                candle_core::safetensors::save(&HashMap::from([(name.clone(), tensor)]), &path).unwrap();
                let found = SafeTensorsFolder::file(&path).unwrap().read_blocks(TensorName::Output, &[5, 7]);
                match (wrong, found) {
                    (None, Ok(Some(blocks))) => {
                        assert_eq!(blocks.format, format);
                        assert_eq!(format.widen(&blocks.bytes), values);
                    }
                    (Some(_), Err(LoadError::NotFinite { name: found, .. })) => assert_eq!(found, name),
                    (_, found) => panic!("{dtype:?} {wrong:?}: {:?}", found.map(|blocks| blocks.is_some())),
                }
            }
        }
    }
}
