//! Adapters: what gives a model landmark keys, in a few megabytes beside the model itself.
//!
//! A folder with `tokenizer.json`, `adapter_config.json` and `adapter_model.safetensors`. The weights are the landmark's
//! embedding, `landmark_embedding (hidden)`, and for projections `W` of queries, keys and attention outputs (all that matter:
//! see [`LandmarkUpdates`]) `lora_A (r, in)` and `lora_B (out, r)`, for `W + (alpha / r) B A` (Hu et al. 2021), under the names
//! of the PEFT library. Unlike PEFT's, the updates hold for the landmark token alone, and no other token sees a landmark: but
//! for the positions that landmarks take, the model says what the base says. So the configuration has a type of its own,
//! with the landmark (`mem_id`, `mem_freq`, as in the paper's checkpoints) and the base's digest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::config::{Landmark, ModelConfig};
use super::digest::weights_digest;
use super::error::{LoadError, SaveError, reason};
use super::huggingface::read_json;
use super::low_rank::{LandmarkUpdates, LowRank};
use super::resolve::resolve;
use super::safetensors::{SafeTensorsFolder, huggingface_name};
use super::tensors::{NamedTensor, Opened, open_weights, put_row, replace};
use super::weights::{Blocks, LayerTensor, TensorName, TensorSource};
use landmarkdb::Sha256Digest;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Not one of PEFT's own: it would apply the updates to every token.
const PEFT_TYPE: &str = "LANDMARK_LORA";
const TARGETS: [&str; 3] = ["k_proj", "o_proj", "q_proj"];

/// Layers that a base has at least: in the first one landmarks are all equal.
pub const LAYERS_MIN: u32 = 2;

/// The landmark's row of the embedding, `(hidden)`.
pub const LANDMARK_EMBEDDING: &str = "landmark_embedding";

/// What an adapter is, beside its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The model that it changes, as [`resolve`] takes it.
    pub base: String,
    /// SHA-256 of the base's weight file, or of the digests of several.
    pub base_digest: Sha256Digest,
    /// r
    pub rank: usize,
    /// LoRA alpha: updates are multiplied by `alpha / rank`.
    pub alpha: f32,
    /// The landmark token: one that the base does not use, or the one behind its last.
    pub landmark: u32,
    /// B, the landmark included.
    pub block_tokens: u32,
}

#[derive(Serialize, Deserialize)]
struct AdapterJson {
    peft_type: String,
    r: usize,
    lora_alpha: f32,
    target_modules: BTreeSet<String>,
    base_model_name_or_path: String,
    /// SHA-256 of the base's weights, in hexadecimal.
    base_model_digest: String,
    mem_id: u32,
    /// Tokens of a block without its landmark.
    mem_freq: u32,
}

/// A base model's weights, and beside them the updates.
struct Adapted {
    base: Box<dyn TensorSource>,
    base_config: ModelConfig,
    updates: SafeTensorsFolder,
    rank: usize,
    scale: f64,
    landmark: u32,
}

impl Adapter {
    /// What the product of an update's matrices is multiplied with.
    pub fn scale(&self) -> f64 {
        self.alpha as f64 / self.rank as f64
    }
}

/// Whether a path is the folder of an adapter.
pub fn is_adapter(path: &Path) -> bool {
    path.join(CONFIG).exists()
}

/// Names of an update's two matrices, for the projection whose weights have a Hugging Face name.
pub fn update_names(weight: &str) -> [String; 2] {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    ["A", "B"].map(|matrix| format!("base_model.model.{module}.lora_{matrix}.weight"))
}

/// Name and shape of every tensor of an adapter of rank `rank`: the landmark first, then layer by layer.
pub fn adapter_shapes(config: &ModelConfig, rank: usize) -> Vec<(String, Vec<usize>)> {
    let mut shapes = vec![(LANDMARK_EMBEDDING.to_string(), vec![config.hidden])];
    for layer in 0..config.layers {
        for tensor in updated(config, layer) {
            let [a, b] = update_names(&huggingface_name(TensorName::Layer(layer, tensor)));
            let (outs, ins) = sizes(config, tensor);
            shapes.extend([(a, vec![rank, ins]), (b, vec![outs, rank])]);
        }
    }
    shapes
}

/// The projections of a layer that have updates: see [`LandmarkUpdates`].
fn updated(config: &ModelConfig, layer: u32) -> impl Iterator<Item = LayerTensor> {
    let (is_first, is_last) = (layer == 0, layer + 1 == config.layers);
    let updated =
        [(LayerTensor::Query, !is_last), (LayerTensor::Key, !is_first), (LayerTensor::AttentionOutput, !is_last)];
    updated.into_iter().filter(|(_, has)| *has).map(|(tensor, _)| tensor)
}

/// `(out, in)` of a projection that has updates.
fn sizes(config: &ModelConfig, tensor: LayerTensor) -> (usize, usize) {
    match tensor {
        LayerTensor::Key => (config.kv_width(), config.hidden),
        LayerTensor::AttentionOutput => (config.hidden, config.query_width()),
        _ => (config.query_width(), config.hidden),
    }
}

/// Writes `adapter_model.safetensors`, its values as `dtype`, and then `adapter_config.json` into `folder`. Each file
/// replaces an older one at once or not at all. The tensors are those of [`adapter_shapes`].
pub fn write_adapter(folder: &Path, adapter: &Adapter, tensors: &[NamedTensor], dtype: DType) -> Result<(), SaveError> {
    let convert = |named: &NamedTensor| Ok((named.name.clone(), named.tensor.to_dtype(dtype)?));
    let tensors = tensors.iter().map(convert).collect::<Result<BTreeMap<_, _>, candle_core::Error>>()?;
    let weights = safetensors::serialize(&tensors, None)?;
    let json = serde_json::json!(AdapterJson {
        peft_type: PEFT_TYPE.into(),
        r: adapter.rank,
        lora_alpha: adapter.alpha,
        target_modules: TARGETS.map(String::from).into(),
        base_model_name_or_path: adapter.base.clone(),
        base_model_digest: format!("{:#}", adapter.base_digest),
        mem_id: adapter.landmark,
        mem_freq: adapter.block_tokens - 1,
    });
    std::fs::create_dir_all(folder).map_err(|source| SaveError::Io { path: folder.into(), source })?;
    replace(&folder.join(WEIGHTS), &weights)?;
    replace(&folder.join(CONFIG), format!("{json:#}\n").as_bytes())
}

/// Opens an adapter and the model that it changes. The digest is of both, and of the scale.
pub(super) fn open(folder: &Path) -> Result<(ModelConfig, Box<dyn TensorSource>, Sha256Digest), LoadError> {
    let path = folder.join(CONFIG);
    let json = read_config(&path)?;
    let unresolved = |source| LoadError::Base { path: path.clone(), source: Box::new(source) };
    let base_path = resolve(&json.base_model_name_or_path).map_err(unresolved)?;
    if is_adapter(&base_path) {
        return Err(unsupported(&path, "base_model_name_or_path", "a whole model", "an adapter".into()));
    }
    let Opened { config: base_config, weights: base, paths } = open_weights(&base_path)?;
    let found = weights_digest(paths.iter().map(|path| path.as_path()))?;
    if json.base_model_digest != format!("{found:#}") {
        let (base, expected) = (json.base_model_name_or_path, json.base_model_digest);
        return Err(LoadError::OtherBase { path, base, expected, found });
    }
    if !base_config.architecture.is_plain() {
        return Err(LoadError::NotPlain { path: base_path });
    }
    if base_config.landmark.is_some() {
        let found = "one that has landmarks".into();
        return Err(unsupported(&path, "base_model_name_or_path", "a model without landmarks", found));
    }
    if base_config.layers < LAYERS_MIN {
        let (expected, found) = (format!("a model of at least {LAYERS_MIN} layers"), base_config.layers.to_string());
        return Err(unsupported(&path, "base_model_name_or_path", &expected, found));
    }
    let landmark = Landmark { id: json.mem_id, block_tokens: json.mem_freq.saturating_add(1), hidden: true };
    if landmark.id as usize > base_config.vocab {
        let expected = format!("at most {}, the one behind the base's last token", base_config.vocab);
        return Err(unsupported(&path, "mem_id", &expected, landmark.id.to_string()));
    }
    let vocab = base_config.vocab.max(landmark.id as usize + 1);
    let config = ModelConfig { vocab, landmark: Some(landmark), ..base_config.clone() };
    config.check().map_err(|source| LoadError::Shape { path, source })?;

    let weights = folder.join(WEIGHTS);
    let updates = SafeTensorsFolder::file(&weights)?;
    let scale = json.lora_alpha as f64 / json.r as f64;
    let mut hash = Sha256::new();
    hash.update(found.0);
    hash.update(weights_digest(std::iter::once(weights.as_path()))?.0);
    hash.update(scale.to_le_bytes());
    let adapted = Adapted { base, base_config, updates, rank: json.r, scale, landmark: landmark.id };
    Ok((config, Box::new(adapted), Sha256Digest(hash.finalize().into())))
}

fn read_config(path: &Path) -> Result<AdapterJson, LoadError> {
    let json: AdapterJson = read_json(&path.to_path_buf())?;
    if json.peft_type != PEFT_TYPE {
        return Err(unsupported(path, "peft_type", PEFT_TYPE, json.peft_type));
    }
    if !json.target_modules.iter().map(String::as_str).eq(TARGETS) {
        let found = json.target_modules.into_iter().collect::<Vec<_>>().join(" and ");
        return Err(unsupported(path, "target_modules", &TARGETS.join(" and "), found));
    }
    if json.r == 0 {
        return Err(unsupported(path, "r", "at least 1", "0".into()));
    }
    if !json.lora_alpha.is_finite() {
        return Err(unsupported(path, "lora_alpha", "a finite number", json.lora_alpha.to_string()));
    }
    Ok(json)
}

fn unsupported(path: &Path, key: &str, expected: &str, found: String) -> LoadError {
    LoadError::Unsupported { path: path.into(), key: key.into(), expected: expected.into(), found, way_out: None }
}

impl Adapted {
    /// The update of one projection.
    fn low_rank(&self, layer: u32, tensor: LayerTensor) -> Result<LowRank, LoadError> {
        let [a, b] = update_names(&huggingface_name(TensorName::Layer(layer, tensor)));
        let (outs, ins) = sizes(&self.base_config, tensor);
        let (a, b) =
            (self.updates.read_named(&a, &[self.rank, ins])?, self.updates.read_named(&b, &[outs, self.rank])?);
        LowRank::new(&a, &b, self.scale).map_err(|error| self.failed(error))
    }

    /// A base's table `(vocab, hidden)` with the landmark's row in its place; without one it is the mean of all rows.
    fn with_landmark(&self, name: TensorName, row: Option<Tensor>) -> Result<Tensor, LoadError> {
        let table = self.base.read(name, &[self.base_config.vocab, self.base_config.hidden])?;
        let row = match row {
            Some(row) => row.unsqueeze(0),
            None => table.mean_keepdim(0),
        };
        row.and_then(|row| put_row(&table, self.landmark as usize, &row)).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: candle_core::Error) -> LoadError {
        let path = self.updates.paths().next().map(Path::to_path_buf).unwrap_or_default();
        LoadError::Damaged { path, detail: reason(&error) }
    }
}

impl TensorSource for Adapted {
    fn read(&self, name: TensorName, shape: &[usize]) -> Result<Tensor, LoadError> {
        match name {
            TensorName::Embedding => {
                let row = self.updates.read_named(LANDMARK_EMBEDDING, &[self.base_config.hidden])?;
                self.with_landmark(name, Some(row))
            }
            TensorName::Output => self.with_landmark(name, None),
            _ => self.base.read(name, shape),
        }
    }

    fn read_blocks(&self, name: TensorName, shape: &[usize]) -> Result<Option<Blocks>, LoadError> {
        match name {
            // They have a row that the base does not have.
            TensorName::Embedding | TensorName::Output => Ok(None),
            _ => self.base.read_blocks(name, shape),
        }
    }

    fn landmark_updates(&self, layer: u32) -> Result<Option<LandmarkUpdates>, LoadError> {
        let update = |wanted| {
            let tensor = updated(&self.base_config, layer).find(|&tensor| tensor == wanted);
            tensor.map(|tensor| self.low_rank(layer, tensor)).transpose()
        };
        Ok(Some(LandmarkUpdates {
            query: update(LayerTensor::Query)?,
            key: update(LayerTensor::Key)?,
            output: update(LayerTensor::AttentionOutput)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use candle_core::Device;

    use super::*;
    use crate::fuzz::base_config as config;
    use crate::{Llama, Logits, tensor_shapes, write_model};
    use landmarkdb::{AttentionError, SequenceAttention};

    const RANK: usize = 2;

    /// Values that tell their tensor and their place.
    fn numbered((index, (name, shape)): (usize, (String, Vec<usize>))) -> NamedTensor {
        let count = shape.iter().product::<usize>();
        let values = (0..count).map(|i| ((i * 7 + index * 3) % 11) as f32 / 4.0 - 1.0).collect();
        NamedTensor { name, tensor: Tensor::from_vec(values, shape, &Device::Cpu).unwrap() }
    }

    /// A folder with a base and an adapter of it.
    fn adapter(landmark: u32, config: &ModelConfig) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        let tensors: Vec<_> = tensor_shapes(config).into_iter().enumerate().map(numbered).collect();
        write_model(&base, config, &tensors, DType::F32).unwrap();
        let adapter = Adapter {
            base_digest: weights_digest(std::iter::once(base.join("model.safetensors").as_path())).unwrap(),
            base: base.display().to_string(),
            rank: RANK,
            alpha: 3.0,
            landmark,
            block_tokens: 5,
        };
        let tensors: Vec<_> = adapter_shapes(config, RANK).into_iter().enumerate().map(numbered).collect();
        write_adapter(&folder.path().join("adapter"), &adapter, &tensors, DType::F32).unwrap();
        folder
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
        tensor.to_vec2().unwrap()
    }

    /// Keeps what it is called with, `(q, k)` per layer, and answers with the queries.
    struct Calls(Vec<[Vec<f32>; 2]>);

    impl SequenceAttention for Calls {
        fn attend(&mut self, _: usize, _: usize, q: &[f32], k: &[f32], _: &[f32]) -> Result<Vec<f32>, AttentionError> {
            self.0.push([q.to_vec(), k.to_vec()]);
            Ok(q.to_vec())
        }

        fn position(&self) -> usize {
            2
        }
    }

    /// `y = W x + 1.5 B A x`, `W` from the base's tensors and the update from the adapter's.
    fn projected(
        base: &BTreeMap<String, Tensor>,
        updates: &BTreeMap<String, Tensor>,
        name: &str,
        x: &[f64],
    ) -> Vec<f64> {
        let times = |matrix: &Tensor, x: &[f64]| -> Vec<f64> {
            rows(matrix).iter().map(|row| row.iter().zip(x).map(|(a, b)| *a as f64 * b).sum()).collect()
        };
        let mut y = times(&base[name], x);
        let [a, b] = update_names(name);
        if let (Some(a), Some(b)) = (updates.get(&a), updates.get(&b)) {
            y.iter_mut().zip(times(b, &times(a, x))).for_each(|(y, update)| *y += 1.5 * update);
        }
        y
    }

    #[test]
    fn landmarks_are_updated_and_nobody_else() {
        for landmark in [9, 4] {
            let folder = adapter(landmark, &config());
            let open = |name: &str| {
                let path = folder.path().join(name);
                match is_adapter(&path) {
                    true => open(&path).map(|(config, source, _)| Llama::load(config, &*source).unwrap()),
                    false => Llama::open(&path),
                }
            };
            let (base, adapted) = (open("base").unwrap(), open("adapter").unwrap());
            let vocab = adapted.config().vocab;
            assert_eq!(vocab, 9.max(landmark as usize + 1));
            let expected = Landmark { id: landmark, block_tokens: 5, hidden: true };
            assert_eq!(adapted.config().landmark, Some(expected));

            let named = |shapes: Vec<(String, Vec<usize>)>| -> BTreeMap<String, Tensor> {
                shapes.into_iter().enumerate().map(numbered).map(|named| (named.name, named.tensor)).collect()
            };
            let (tensors, updates) = (named(tensor_shapes(&config())), named(adapter_shapes(&config(), RANK)));
            let row: Vec<f32> = updates[LANDMARK_EMBEDDING].to_vec1().unwrap();
            assert_eq!(adapted.embed(&[landmark]).unwrap(), row);
            assert_eq!(adapted.embed(&[0, 8]).unwrap(), base.embed(&[0, 8]).unwrap());

            // After two tokens, the third of these closes the block.
            let x: Vec<f32> = [base.embed(&[1, 2]).unwrap(), row, base.embed(&[3]).unwrap()].concat();
            let run = |model: &Llama| {
                let mut calls = Calls(Vec::new());
                let logits = model.forward_embedded(x.clone(), &mut calls, Logits::All).unwrap();
                let words = model.config().vocab;
                (calls.0, logits.chunks(words).map(|row| row[..4].to_vec()).collect::<Vec<_>>())
            };
            let ((before, logits_before), (after, logits)) = (run(&base), run(&adapted));
            let all = adapted.forward_embedded(x.clone(), &mut Calls(Vec::new()), Logits::All).unwrap();
            let unlikely: Vec<f32> = all.chunks(vocab).map(|row| row[landmark as usize]).collect();
            for token in [0, 1, 3] {
                assert_eq!(logits_before[token], logits[token]);
                assert_eq!(unlikely[token], f32::NEG_INFINITY, "a landmark is never predicted");
                for (before, after) in before.iter().zip(&after) {
                    assert_eq!(before[0][token * 8..][..8], after[0][token * 8..][..8]);
                    assert_eq!(before[1][token * 4..][..4], after[1][token * 4..][..4]);
                }
            }

            // The landmark from its embedding to the second layer's key, in double precision.
            let normed = |x: &[f64], name: &str| -> Vec<f64> {
                let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-5).sqrt().recip();
                let weight: Vec<f32> = tensors[name].to_vec1().unwrap();
                x.iter().zip(weight).map(|(x, weight)| x * scale * weight as f64).collect()
            };
            let plain = |name: &str, x: &[f64]| -> Vec<f64> {
                rows(&tensors[name]).iter().map(|row| row.iter().zip(x).map(|(a, b)| *a as f64 * b).sum()).collect()
            };
            let mut x: Vec<f64> = x[12..18].iter().map(|&x| x as f64).collect();
            for (layer, call) in after.iter().enumerate() {
                let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
                let h = normed(&x, &name("input_layernorm"));
                let q = projected(&tensors, &updates, &name("self_attn.q_proj"), &h);
                let k = projected(&tensors, &updates, &name("self_attn.k_proj"), &h);
                for (got, want) in call[0][16..24].iter().zip(&q).chain(call[1][8..12].iter().zip(&k)) {
                    assert!((*got as f64 - want).abs() < 1e-3 * want.abs().max(1.0), "layer {layer}: {got} {want}");
                }
                if layer == 0 {
                    let o = projected(&tensors, &updates, &name("self_attn.o_proj"), &q);
                    x.iter_mut().zip(o).for_each(|(x, o)| *x += o);
                    let h = normed(&x, &name("post_attention_layernorm"));
                    let (gate, up) = (plain(&name("mlp.gate_proj"), &h), plain(&name("mlp.up_proj"), &h));
                    let gated: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                    x.iter_mut().zip(plain(&name("mlp.down_proj"), &gated)).for_each(|(x, d)| *x += d);
                }
            }
        }
    }

    #[test]
    fn the_digest_is_of_the_base_the_updates_and_the_scale() {
        let folder = adapter(9, &config());
        let folder = folder.path().join("adapter");
        let digest = || open(&folder).unwrap().2;
        let first = digest();
        assert_eq!(digest(), first);
        edit(&folder, "lora_alpha", 4.0.into());
        assert_ne!(digest(), first);
    }

    /// Changes one value of the configuration.
    fn edit(folder: &Path, key: &str, value: serde_json::Value) {
        let path = folder.join(CONFIG);
        let mut json: serde_json::Value = read_json(&path).unwrap();
        json[key] = value;
        fs::write(path, json.to_string()).unwrap();
    }

    #[test]
    fn a_configuration_that_is_no_adapters_is_refused_by_key() {
        let refused = |key: &str, value: serde_json::Value| {
            let folder = adapter(9, &config());
            edit(&folder.path().join("adapter"), key, value);
            match open(&folder.path().join("adapter")).err().unwrap() {
                LoadError::Unsupported { key, .. } => key,
                LoadError::Shape { source, .. } => source.field.into(),
                other => other.to_string(),
            }
        };
        assert_eq!(refused("peft_type", "LORA".into()), "peft_type");
        assert_eq!(refused("target_modules", vec!["q_proj", "v_proj"].into()), "target_modules");
        assert_eq!(refused("r", 0.into()), "r");
        assert_eq!(refused("mem_id", 10.into()), "mem_id");
        assert_eq!(refused("mem_freq", 0.into()), "block_tokens");
        assert_eq!(refused("mem_freq", u32::MAX.into()), "block_tokens");
        assert!(refused("lora_alpha", serde_json::Value::Null).contains("damaged"));
    }

    #[test]
    fn weights_that_do_not_fit_or_are_not_whole_are_refused() {
        let folder = adapter(9, &config());
        let path = folder.path().join("adapter");
        let load = || open(&path).and_then(|(config, source, _)| Llama::load(config, &*source));
        let refused = || load().err().unwrap();
        edit(&path, "r", 3.into());
        assert!(matches!(refused(), LoadError::TensorShape { found, .. } if found.contains(&RANK)));
        edit(&path, "r", RANK.into());
        assert!(load().is_ok());

        let whole = fs::read(path.join(WEIGHTS)).unwrap();
        for length in [0, 7, 100, whole.len() - 1] {
            fs::write(path.join(WEIGHTS), &whole[..length]).unwrap();
            assert!(matches!(refused(), LoadError::Damaged { .. }), "{length}");
        }
        for missing in [LANDMARK_EMBEDDING, "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"] {
            let all: BTreeMap<_, _> =
                candle_core::safetensors::load_buffer(&whole, &Device::Cpu).unwrap().into_iter().collect();
            let fewer = all.iter().filter(|(name, _)| *name != missing);
            fs::write(path.join(WEIGHTS), safetensors::serialize(fewer, None).unwrap()).unwrap();
            assert!(matches!(refused(), LoadError::MissingTensor { name, .. } if name == missing), "{missing}");
        }
        fs::remove_file(path.join(WEIGHTS)).unwrap();
        assert!(matches!(refused(), LoadError::Io { .. }));
    }

    #[test]
    fn a_base_that_cannot_have_one_is_refused() {
        let landmark = Some(Landmark { id: 8, block_tokens: 5, hidden: false });
        for (base, expected) in [
            (ModelConfig { landmark, ..config() }, "a model without landmarks"),
            (ModelConfig { layers: 1, ..config() }, "a model of at least 2 layers"),
        ] {
            let folder = adapter(9, &base);
            let refused = open(&folder.path().join("adapter")).err().unwrap().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[test]
    fn a_base_that_is_not_there_or_another_is_refused_with_what_to_do() {
        let folder = adapter(9, &config());
        let (path, base) = (folder.path().join("adapter"), folder.path().join("base"));
        let refused = || open(&path).err().unwrap();
        let tensors: Vec<_> = tensor_shapes(&config()).into_iter().enumerate().map(numbered).collect();
        write_model(&base, &config(), &tensors, DType::F16).unwrap();
        assert!(matches!(refused(), LoadError::OtherBase { .. }), "{}", refused());
        edit(&path, "base_model_name_or_path", "hf:nobody/nothing".into());
        let missing = refused();
        assert!(missing.to_string().contains("hf:nobody/nothing is not on this machine yet"), "{missing}");
        edit(&path, "base_model_name_or_path", path.display().to_string().into());
        assert!(matches!(refused(), LoadError::Unsupported { found, .. } if found == "an adapter"));
    }
}
