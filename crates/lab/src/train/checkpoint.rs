//! All that a training needs to go on exactly where it stopped, in one safetensors file.
//!
//! Tensors, all f32: `weight.NAME`, `first.NAME` and `second.NAME` (the optimizer's moments) of every parameter, and of a
//! recurrent model `past.LAYER.key` and `past.LAYER.value`. In the
//! metadata: `format`, `step` (steps done), `recipe` (what decides the result: names and values) and `crc32` (of these and of
//! every tensor's name, shape and bytes, in the order of their names). The file is replaced as a whole, so there is always one that can be continued.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::error::{Difference, TrainError};
use super::model::Past;
use super::optimizer::{AdamW, Moments};
use super::slices::values;
use super::weights::Parameter;
use landmarkdb_llm::replace_file;

/// The only version there is.
const FORMAT: &str = "landmarkdb training 1";

/// The file's name in the folder that is trained into.
pub(super) const FILE: &str = "checkpoint.safetensors";

/// Names and values of all that decides the result of a training. A checkpoint is only continued with the same.
pub(super) type Identity = BTreeMap<String, String>;

/// What one parameter consists of, and what its tensors' names begin with.
const PARTS: [&str; 3] = ["weight", "first", "second"];

/// What changes from step to step.
pub(super) struct State<'a> {
    pub(super) parameters: &'a [Parameter],
    pub(super) optimizer: &'a mut AdamW,
    /// Of a recurrent model, once it has read something.
    pub(super) past: &'a mut Option<Past>,
}

/// Writes the state after `step` steps.
pub(super) fn save(path: &Path, step: u64, identity: &Identity, state: &State) -> Result<(), TrainError> {
    // Sorted by name: the checksum is over this order.
    let mut tensors = BTreeMap::new();
    let mut put = |name: String, shape: &[usize], values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|number| number.to_le_bytes()).collect();
        tensors.insert(name, (shape.to_vec(), bytes));
    };
    for (parameter, moments) in state.parameters.iter().zip(&state.optimizer.moments) {
        let weights = values(&parameter.var)?;
        for (part, values) in PARTS.iter().zip([&weights[..], &moments.first, &moments.second]) {
            put(format!("{part}.{}", parameter.name), parameter.var.dims(), values);
        }
    }
    for (layer, (key, value)) in state.past.iter().flat_map(|past| &past.layers).enumerate() {
        put(past_name(layer, "key"), key.dims(), &values(key)?);
        put(past_name(layer, "value"), value.dims(), &values(value)?);
    }
    let (step, recipe) = (step.to_string(), serde_json::json!(identity).to_string());
    let pieces = tensors.iter().map(|(name, (shape, bytes))| (&name[..], &shape[..], &bytes[..]));
    let metadata = HashMap::from([
        ("format".to_string(), FORMAT.to_string()),
        ("crc32".to_string(), checksum([FORMAT, &step, &recipe], pieces).to_string()),
        ("step".to_string(), step),
        ("recipe".to_string(), recipe),
    ]);
    let damaged = |error: safetensors::SafeTensorError| damaged(path, error.to_string());
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(damaged)?;
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(damaged)?;
    replace_file(path, &bytes).map_err(|source| TrainError::Io { path: path.into(), source })
}

/// Reads the state back and says how many steps were done. None without a file. Nothing is changed unless all of the
/// file is whole and of this training.
pub(super) fn load(path: &Path, identity: &Identity, state: &mut State) -> Result<Option<u64>, TrainError> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|source| TrainError::Io { path: path.into(), source })?,
    };
    let from_library = |error: safetensors::SafeTensorError| damaged(path, error.to_string());
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(from_library)?;
    let file = SafeTensors::deserialize(&bytes).map_err(from_library)?;
    let entry = |key: &str| {
        let found = header.metadata().as_ref().and_then(|metadata| metadata.get(key));
        found.ok_or_else(|| damaged(path, format!("its metadata has no {key}")))
    };
    if entry("format")? != FORMAT {
        return Err(damaged(path, format!("expected format {FORMAT:?}, found {:?}", entry("format")?)));
    }
    let sorted: BTreeMap<&str, TensorView> = file.iter().collect();
    let texts = [entry("format")?, entry("step")?, entry("recipe")?].map(|text| &text[..]);
    let found = checksum(texts, sorted.iter().map(|(name, view)| (*name, view.shape(), view.data()))).to_string();
    if found != *entry("crc32")? {
        return Err(damaged(path, format!("expected checksum {}, found {found}", entry("crc32")?)));
    }
    let recipe = serde_json::from_str(entry("recipe")?).map_err(|error| damaged(path, error.to_string()))?;
    refuse_another(path, &recipe, identity)?;
    let step = entry("step")?;
    let step = step.parse().map_err(|_| damaged(path, format!("{step:?} is no step")))?;

    let mut read = Vec::with_capacity(state.parameters.len());
    for parameter in state.parameters {
        let values = |part: &str| {
            let name = format!("{part}.{}", parameter.name);
            let view = sorted.get(name.as_str()).ok_or_else(|| damaged(path, format!("there is no {name}")))?;
            if (view.dtype(), view.shape()) != (Dtype::F32, parameter.var.dims()) {
                let expected = format!("F32 {:?}", parameter.var.dims());
                let found = format!("{:?} {:?}", view.dtype(), view.shape());
                return Err(damaged(path, format!("{name}: expected {expected}, found {found}")));
            }
            Ok(view_values(view))
        };
        let [weights, first, second] = PARTS.map(values);
        read.push((weights?, Moments { first: first?, second: second? }));
    }
    let past = read_past(&sorted)?;

    let slots = state.parameters.iter().zip(&mut state.optimizer.moments);
    for ((weights, moments), (parameter, slot)) in read.into_iter().zip(slots) {
        let shape = parameter.var.shape().clone();
        parameter.var.set(&Tensor::from_vec(weights, shape, parameter.var.device())?)?;
        *slot = moments;
    }
    *state.past = past;
    state.optimizer.steps = step;
    Ok(Some(step))
}

/// Keys and values of layers 0, 1 and so on, as far as there are any.
fn read_past(tensors: &BTreeMap<&str, TensorView>) -> Result<Option<Past>, TrainError> {
    let read = |layer: usize, what: &str| {
        let view = tensors.get(past_name(layer, what).as_str())?;
        Some(Tensor::from_vec(view_values(view), view.shape(), &Device::Cpu))
    };
    let pairs = (0..).map_while(|layer| Some((read(layer, "key")?, read(layer, "value")?)));
    let layers = pairs.map(|(key, value)| Ok((key?, value?))).collect::<Result<Vec<_>, TrainError>>()?;
    Ok(if layers.is_empty() { None } else { Some(Past { layers }) })
}

fn past_name(layer: usize, what: &str) -> String {
    format!("past.{layer}.{what}")
}

fn view_values(view: &TensorView) -> Vec<f32> {
    view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn refuse_another(path: &Path, found: &Identity, asked: &Identity) -> Result<(), TrainError> {
    let names = found.keys().chain(asked.keys().filter(|name| !found.contains_key(*name)));
    let value = |of: &Identity, name: &String| of.get(name).cloned().unwrap_or_else(|| "nothing".into());
    let differences: Vec<Difference> = names
        .map(|name| Difference { name: name.clone(), checkpoint: value(found, name), asked: value(asked, name) })
        .filter(|difference| difference.checkpoint != difference.asked)
        .collect();
    if differences.is_empty() { Ok(()) } else { Err(TrainError::OtherRecipe { path: path.into(), differences }) }
}

/// Of the metadata, and of the name, shape and bytes of every tensor.
fn checksum<'a>(texts: [&str; 3], tensors: impl Iterator<Item = (&'a str, &'a [usize], &'a [u8])>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    texts.iter().for_each(|text| hasher.update(text.as_bytes()));
    for (name, shape, bytes) in tensors {
        hasher.update(format!("{name} {shape:?}").as_bytes());
        hasher.update(bytes);
    }
    hasher.finalize()
}

fn damaged(path: &Path, detail: String) -> TrainError {
    TrainError::CheckpointDamaged { path: path.into(), detail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    /// All of a state, owned.
    struct Owned {
        parameters: Vec<Parameter>,
        optimizer: AdamW,
        past: Option<Past>,
    }

    impl Owned {
        fn new(shift: f32) -> Self {
            let parameter = |name: &str, rows: usize, columns: usize| {
                let values: Vec<f32> = (0..rows * columns).map(|i| i as f32 + shift).collect();
                let var = Var::from_slice(&values, (rows, columns), &Device::Cpu).unwrap();
                Parameter { name: name.into(), var, decay: true }
            };
            let parameters = vec![parameter("b", 2, 3), parameter("a", 4, 1)];
            let mut optimizer = AdamW::new(&parameters, 0.98, 0.1);
            optimizer.moments[0].first[4] = f32::MIN_POSITIVE;
            optimizer.moments[1].second[3] = shift;
            Owned { parameters, optimizer, past: None }
        }

        fn state(&mut self) -> State<'_> {
            State { parameters: &self.parameters, optimizer: &mut self.optimizer, past: &mut self.past }
        }

        /// Everything but the step.
        fn values(&self) -> Vec<Vec<f32>> {
            let weights = self.parameters.iter().map(|parameter| values(&parameter.var).unwrap().to_vec());
            let moments = self.optimizer.moments.iter().flat_map(|m| [m.first.clone(), m.second.clone()]);
            let past = self.past.iter().flat_map(|past| &past.layers).flat_map(|(key, value)| [key, value]);
            weights.chain(moments).chain(past.map(|tensor| values(tensor).unwrap().to_vec())).collect()
        }
    }

    fn identity(steps: &str) -> Identity {
        Identity::from([("steps".into(), steps.into()), ("seed".into(), "1".into())])
    }

    #[test]
    fn what_was_saved_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let tensor = |first: f32| Tensor::from_slice(&[first, 2.0, 3.0, 4.0], (1, 2, 2), &Device::Cpu).unwrap();
        let past = Past { layers: vec![(tensor(0.1), tensor(0.2)), (tensor(0.3), tensor(0.4))] };
        for past in [None, Some(past)] {
            let mut saved = Owned { past, ..Owned::new(0.5) };
            save(&path, 42, &identity("100"), &saved.state()).unwrap();
            let mut loaded = Owned::new(-7.25);
            assert_eq!(load(&path, &identity("100"), &mut loaded.state()).unwrap(), Some(42));
            assert_eq!(loaded.values(), saved.values());
            assert_eq!(loaded.optimizer.steps, 42);
        }
        let none = load(&folder.path().join("none"), &identity("100"), &mut Owned::new(0.0).state());
        assert_eq!(none.unwrap(), None);
    }

    #[test]
    fn another_recipe_is_refused_with_both_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let mut owned = Owned::new(0.0);
        save(&path, 42, &identity("100"), &owned.state()).unwrap();
        let error = load(&path, &identity("200"), &mut owned.state()).unwrap_err();
        assert!(matches!(&error, TrainError::OtherRecipe { differences, .. } if differences.len() == 1), "{error}");
        assert!(error.to_string().contains("steps: 100 there, 200 here"), "{error}");
    }

    #[test]
    fn damage_anywhere_is_told_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        save(&path, 42, &identity("100"), &Owned::new(0.5).state()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let mut loaded = Owned::new(0.0);
        let before = loaded.values();
        let mut refuses = |bytes: &[u8], what: &str| {
            std::fs::write(&path, bytes).unwrap();
            let error = load(&path, &identity("100"), &mut loaded.state()).unwrap_err();
            assert!(matches!(error, TrainError::CheckpointDamaged { .. }), "{what}: {error}");
            assert_eq!(loaded.values(), before, "{what}");
        };
        for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            refuses(&whole[..length], &format!("cut to {length}"));
        }
        let header_bytes = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for at in (0..header_bytes).chain((header_bytes..whole.len()).step_by(5)) {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            refuses(&flipped, &format!("bit at {at}"));
        }
        refuses(b"not a checkpoint at all", "another file");
        let weight = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
        refuses(&safetensors::serialize([("weight.a", weight)], None).unwrap(), "a model");
    }
}
