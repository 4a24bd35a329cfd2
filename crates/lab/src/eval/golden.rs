//! Cases recorded elsewhere: does this implementation say what the paper's own code said?
//!
//! A folder holds any number of cases, told apart by their files:
//!
//! | files | what is compared |
//! |---|---|
//! | `NAME.json`, `NAME.model.safetensors`, `NAME.expected.safetensors` | logits of a landmark model, without and with memory |
//! | `NAME.safetensors` with `scores` | the grouped softmax alone, and its gradient |
//! | `NAME.safetensors` with `*.input_ids` | token ids, last logits and greedy tokens of a model that is given |

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType as TensorType, Device, Tensor};
use serde::Deserialize;

use super::unused_name;
use crate::train::grouped_softmax;
use landmarkdb::{
    BlockAttention, BlockMemory, CollectionSpec, DType, Granularity, KeyRule, MemoryError, ModelShape, NewTokens,
    Retrieval, Rope, SequenceAttention, Sha256Digest, Window,
};
use landmarkdb_llm::{
    self, Architecture, ForwardError, GenerateOptions, Landmark, Llama, LoadError, LoadedModel, Logits, ModelAttention,
    ModelConfig, RememberError, generate,
};

/// Largest difference of a logit that rounding explains, between two implementations in single precision.
const LOGIT_TOLERANCE: f32 = 1e-3;

/// The same where the weights were dequantized elsewhere too.
const QUANTIZED_LOGIT_TOLERANCE: f32 = 2e-2;

/// Largest difference of a probability or of a score's gradient.
const SOFTMAX_TOLERANCE: f32 = 1e-5;

/// The memory outputs of a model case, and the choice of blocks that each was recorded with.
const GRANULARITIES: [(&str, Granularity); 5] = [
    ("logits_per_token_and_head", Granularity::TokenHead),
    ("logits_per_head_max_over_tokens", Granularity::Head),
    ("logits_per_token_max_over_heads", Granularity::Token),
    ("logits_per_kv_group", Granularity::KvGroup),
    ("logits_shared", Granularity::Shared),
];

/// One output of one case.
#[derive(Clone, Debug, PartialEq)]
pub struct GoldenOutput {
    /// The `name` in the JSON file of a model case; of any other case, its file's name without `.safetensors`.
    pub case: String,
    /// Name of the recorded tensor, such as `logits_full`.
    pub output: String,
    /// Values compared.
    pub compared: usize,
    /// The largest difference; for ids, how many differ.
    pub difference: f32,
    /// What is still agreement.
    pub tolerance: f32,
}

impl GoldenOutput {
    /// Whether the difference is at most the tolerance; NaN is not.
    pub fn agrees(&self) -> bool {
        self.difference <= self.tolerance
    }
}

/// Why a case could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// The folder, or the JSON file of a model case, cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Path of the folder or file.
        path: PathBuf,
        /// The reason that the system gave.
        source: std::io::Error,
    },
    /// The folder holds no case, or only recorded prompts and no model was given for them.
    #[error(
        "{path}: no case here: expected NAME.json with NAME.model.safetensors and NAME.expected.safetensors, or NAME.safetensors with recorded prompts, which take a model"
    )]
    NoCase {
        /// Path of the folder.
        path: PathBuf,
    },
    /// A file cannot be read as JSON, or as safetensors with values of the expected kind.
    #[error("{path}: {detail}")]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// The reason that the library gave.
        detail: String,
    },
    /// A recorded tensor or setting is missing, or does not fit the rest of its case.
    #[error("{path}: {name}: expected {expected}, found {found}")]
    Invalid {
        /// Path of the file.
        path: PathBuf,
        /// The tensors or settings, with commas.
        name: String,
        /// The shape, count or values that fit.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// The weights of a model case could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A forward pass, a generation or the memory failed.
    #[error(transparent)]
    Remember(#[from] RememberError),
}

impl From<MemoryError> for GoldenError {
    fn from(error: MemoryError) -> Self {
        GoldenError::Remember(error.into())
    }
}

impl From<ForwardError> for GoldenError {
    fn from(error: ForwardError) -> Self {
        GoldenError::Remember(error.into())
    }
}

/// `NAME.json` of a model case: the fields of a Hugging Face configuration that its models differ in, and how its tokens
/// were grouped.
#[derive(Deserialize)]
struct ModelCase {
    name: String,
    hidden_size: usize,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    intermediate_size: usize,
    vocab_size: usize,
    rope_theta: f64,
    rms_norm_eps: f32,
    mem_id: u32,
    mem_freq: u32,
    top_k: u32,
    chunk_tokens: usize,
    chunks: usize,
    decode_steps: usize,
}

/// Recorded tensors by name.
struct Recorded {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

/// Whether a folder has recorded prompts, which need the model that they were given to.
///
/// # Errors
/// A file that cannot be read.
pub fn golden_prompts(folder: &Path) -> Result<bool, GoldenError> {
    for path in files(folder)? {
        if is_recording(&path) && Recorded::open(path)?.has_prompts() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A file of its own, not one that belongs to a model case.
fn is_recording(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_suffix(".safetensors").is_some_and(|name| !name.ends_with(".model") && !name.ends_with(".expected"))
}

/// Checks every case of a folder. Model cases keep their blocks in `memory`, in collections named `golden-NAME`, and
/// delete their documents afterwards. `prompts` is the model that recorded prompts were given to; without it those
/// cases are left out. `progress` is told each case by name.
///
/// # Errors
/// A case that cannot be read or run. Disagreement is not an error: see [`GoldenOutput::agrees`].
pub fn golden(
    folder: &Path,
    memory: &Arc<dyn BlockMemory>,
    prompts: Option<&LoadedModel>,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<GoldenOutput>, GoldenError> {
    let mut outputs = Vec::new();
    for path in files(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".json") {
            progress(name);
            outputs.extend(model_case(folder, name, &path, memory)?);
        } else if is_recording(&path) {
            let name = name.trim_end_matches(".safetensors");
            let recorded = Recorded::open(path)?;
            match prompts {
                _ if recorded.has("scores") => {
                    progress(name);
                    outputs.extend(softmax_case(name, &recorded)?);
                }
                Some(model) if recorded.has_prompts() => {
                    progress(name);
                    outputs.extend(prompt_case(name, &recorded, model)?);
                }
                _ => {}
            }
        }
    }
    if outputs.is_empty() {
        return Err(GoldenError::NoCase { path: folder.into() });
    }
    Ok(outputs)
}

/// The files of a folder, sorted by name.
fn files(folder: &Path) -> Result<Vec<PathBuf>, GoldenError> {
    let failed = |source| GoldenError::Io { path: folder.into(), source };
    let entries = std::fs::read_dir(folder).map_err(failed)?;
    let mut files =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    files.sort();
    Ok(files)
}

fn model_case(
    folder: &Path,
    file: &str,
    json: &Path,
    memory: &Arc<dyn BlockMemory>,
) -> Result<Vec<GoldenOutput>, GoldenError> {
    let bytes = std::fs::read(json).map_err(|source| GoldenError::Io { path: json.into(), source })?;
    let case: ModelCase = serde_json::from_slice(&bytes)
        .map_err(|error| GoldenError::Damaged { path: json.into(), detail: error.to_string() })?;
    let weights = folder.join(format!("{file}.model.safetensors"));
    let config = case.config(json)?;
    let shape = config.shape(case.mem_freq + 1).map_err(MemoryError::from)?;
    let llama = Llama::open_weights(config, &weights)?;
    let recorded = Recorded::open(folder.join(format!("{file}.expected.safetensors")))?;
    let ids = recorded.ids("input_ids")?;
    let embedded = recorded.values("inputs_embeds")?;
    let tokens = case.chunks * case.chunk_tokens + case.decode_steps;
    if ids.len() != tokens || embedded.len() != tokens * case.hidden_size {
        return Err(recorded.invalid(
            "input_ids, inputs_embeds",
            format!("{tokens} tokens: chunks x chunk_tokens + decode_steps"),
            format!("{} and {}", ids.len(), embedded.len() / case.hidden_size.max(1)),
        ));
    }

    let mut outputs = Vec::new();
    if recorded.has("logits_full") {
        let window = Window::landmark(case.chunk_tokens);
        let mut session = BlockAttention::full(&shape, window.normalisation);
        let logits = llama.forward_embedded(embedded.clone(), &mut session, Logits::All)?;
        outputs.push(recorded.compare(&case.name, "logits_full", &logits, LOGIT_TOLERANCE)?);
    }
    let collection = memory.open_collection(&case.collection(shape, landmarkdb_llm::file_digest(&weights)?))?;
    for (output, granularity) in GRANULARITIES.into_iter().filter(|(output, _)| recorded.has(output)) {
        let document = memory.open_document(collection.id, &unused_name(output))?;
        let retrieval = Retrieval { top_k: case.top_k, granularity, ..Retrieval::landmark() };
        let window = Window::landmark(case.chunk_tokens);
        let logits = BlockAttention::write(memory.clone(), &collection, &document, window, Some(retrieval))
            .map_err(|error| GoldenError::Remember(error.into()))
            .and_then(|mut session| case.run(&llama, &mut session, &ids, &embedded));
        memory.delete(document.id)?;
        outputs.push(recorded.compare(&case.name, output, &logits?, LOGIT_TOLERANCE)?);
    }
    Ok(outputs)
}

impl ModelCase {
    fn config(&self, path: &Path) -> Result<ModelConfig, GoldenError> {
        let heads = self.num_attention_heads;
        if heads == 0 || !self.hidden_size.is_multiple_of(heads as usize) || self.mem_freq == u32::MAX {
            return Err(GoldenError::Invalid {
                path: path.into(),
                name: "hidden_size, num_attention_heads, mem_freq".into(),
                expected: "a width that its heads divide, and a block size".into(),
                found: format!("{}, {heads}, {}", self.hidden_size, self.mem_freq),
            });
        }
        let head_dim = self.hidden_size / heads as usize;
        Ok(ModelConfig {
            layers: self.num_hidden_layers,
            query_heads: heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: head_dim as u32,
            hidden: self.hidden_size,
            ffn: self.intermediate_size,
            vocab: self.vocab_size,
            context_tokens: self.chunk_tokens as u32,
            norm_epsilon: self.rms_norm_eps,
            rope: Rope::from_base(self.rope_theta, head_dim),
            tied_output: false,
            eos_ids: Vec::new(),
            landmark: Some(Landmark { id: self.mem_id, block_tokens: self.mem_freq + 1, hidden: false }),
            architecture: Architecture::default(),
        })
    }

    fn collection(&self, shape: ModelShape, model_digest: Sha256Digest) -> CollectionSpec {
        let name = format!("golden-{}", self.name);
        CollectionSpec {
            name: name.clone(),
            shape,
            key_rule: KeyRule::Landmark,
            payload_dtype: DType::F32,
            key_dtype: DType::F16,
            model_digest,
            // Tokens come as embeddings: there is no tokenizer.
            tokenizer_digest: model_digest,
            model_name: name,
        }
    }

    /// The logits `(T, vocab)` of all tokens, read in the recorded chunks and then one by one, with memory.
    fn run(
        &self,
        llama: &Llama,
        session: &mut BlockAttention,
        ids: &[u32],
        embedded: &[f32],
    ) -> Result<Vec<f32>, GoldenError> {
        let mut logits = Vec::new();
        let groups =
            std::iter::repeat_n(self.chunk_tokens, self.chunks).chain(std::iter::repeat_n(1, self.decode_steps));
        for tokens in groups {
            let from = session.position();
            let x = embedded[from * self.hidden_size..][..tokens * self.hidden_size].to_vec();
            logits.extend(llama.forward_embedded(x, session, Logits::All)?);
            let new = NewTokens { ids: &ids[from..from + tokens], text: &[], offsets: &vec![0; tokens] };
            session.commit(new).map_err(RememberError::from)?;
        }
        Ok(logits)
    }
}

/// The grouped softmax alone: `scores (H, T, T)`, `is_landmark (T)`, `upstream (H, T, T)`; `probs` and `grad_scores`.
fn softmax_case(case: &str, recorded: &Recorded) -> Result<Vec<GoldenOutput>, GoldenError> {
    let (scores, upstream) = (recorded.values("scores")?, recorded.values("upstream")?);
    let landmarks = recorded.ids("is_landmark")?;
    let tokens = landmarks.len();
    let first = landmarks.iter().position(|&is_landmark| is_landmark != 0).unwrap_or(tokens);
    let block_tokens = first + 1;
    let in_place = landmarks.iter().enumerate().all(|(at, &is)| (is != 0) == (at + 1).is_multiple_of(block_tokens));
    if !in_place
        || first == 0
        || scores.len() != upstream.len()
        || !scores.len().is_multiple_of((tokens * tokens).max(1))
    {
        return Err(recorded.invalid(
            "scores, upstream, is_landmark",
            "(H, T, T) twice, and a landmark at the end of every block of two tokens or more".into(),
            format!("{} and {} numbers, {tokens} tokens, the first landmark at {first}", scores.len(), upstream.len()),
        ));
    }
    let heads = scores.chunks_exact(tokens * tokens).zip(upstream.chunks_exact(tokens * tokens));
    let (weights, gradients): (Vec<_>, Vec<_>) =
        heads.map(|(scores, upstream)| grouped_softmax(scores, upstream, tokens, block_tokens)).unzip();
    Ok(vec![
        recorded.compare(case, "probs", &weights.concat(), SOFTMAX_TOLERANCE)?,
        recorded.compare(case, "grad_scores", &gradients.concat(), SOFTMAX_TOLERANCE)?,
    ])
}

/// Recorded prompts: `PROMPT.input_ids`, `PROMPT.logits_last`, `PROMPT.greedy_ids`.
fn prompt_case(case: &str, recorded: &Recorded, model: &LoadedModel) -> Result<Vec<GoldenOutput>, GoldenError> {
    let shape = model.shape(model.config().block_tokens()).map_err(MemoryError::from)?;
    let mut prompts: Vec<&str> = recorded.tensors.keys().filter_map(|name| name.strip_suffix(".input_ids")).collect();
    prompts.sort_unstable();
    let mut outputs = Vec::new();
    for prompt in prompts {
        let ids = recorded.ids(&format!("{prompt}.input_ids"))?;
        let mut session =
            ModelAttention::new(model.config(), BlockAttention::full(&shape, model.config().normalisation()));
        let logits = model.llama.forward(&ids, &mut session, Logits::Last)?;
        let name = format!("{prompt}.logits_last");
        outputs.push(recorded.compare(case, &name, &logits, QUANTIZED_LOGIT_TOLERANCE)?);

        let name = format!("{prompt}.greedy_ids");
        let mut want = recorded.ids(&name)?;
        let options = GenerateOptions { max_tokens: want.len(), ..GenerateOptions::default() };
        let mut session =
            ModelAttention::new(model.config(), BlockAttention::full(&shape, model.config().normalisation()));
        let found = generate(model, &mut session, &ids, &options, &mut |_| {}).map_err(RememberError::from)?.ids;
        let end = want.iter().position(|id| model.config().eos_ids.contains(id));
        want.truncate(end.unwrap_or(want.len()));
        let unequal = want.iter().zip(&found).filter(|(want, found)| want != found).count();
        let difference = (unequal + want.len().abs_diff(found.len())) as f32;
        outputs.push(GoldenOutput {
            case: case.into(),
            output: name,
            compared: want.len(),
            difference,
            tolerance: 0.0,
        });
    }
    Ok(outputs)
}

impl Recorded {
    fn open(path: PathBuf) -> Result<Self, GoldenError> {
        match candle_core::safetensors::load(&path, &Device::Cpu) {
            Ok(tensors) => Ok(Recorded { path, tensors }),
            Err(error) => Err(GoldenError::Damaged { path, detail: landmarkdb_llm::tensor_reason(&error) }),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn has_prompts(&self) -> bool {
        self.tensors.keys().any(|name| name.ends_with(".input_ids"))
    }

    fn invalid(&self, name: &str, expected: String, found: String) -> GoldenError {
        GoldenError::Invalid { path: self.path.clone(), name: name.into(), expected, found }
    }

    /// All values of a tensor, row-major.
    fn values(&self, name: &str) -> Result<Vec<f32>, GoldenError> {
        let read = |tensor: &Tensor| tensor.to_dtype(TensorType::F32)?.flatten_all()?.to_vec1();
        self.read(name, read)
    }

    fn ids(&self, name: &str) -> Result<Vec<u32>, GoldenError> {
        let read = |tensor: &Tensor| tensor.to_dtype(TensorType::U32)?.flatten_all()?.to_vec1();
        self.read(name, read)
    }

    fn read<N>(
        &self,
        name: &str,
        read: impl Fn(&Tensor) -> candle_core::Result<Vec<N>>,
    ) -> Result<Vec<N>, GoldenError> {
        let tensor = self.tensors.get(name).ok_or_else(|| self.invalid(name, "a tensor".into(), "none".into()))?;
        read(tensor).map_err(|error| GoldenError::Damaged {
            path: self.path.clone(),
            detail: format!("{name}: {}", landmarkdb_llm::tensor_reason(&error)),
        })
    }

    fn compare(&self, case: &str, name: &str, found: &[f32], tolerance: f32) -> Result<GoldenOutput, GoldenError> {
        let want = self.values(name)?;
        if want.len() != found.len() {
            return Err(self.invalid(name, format!("{} numbers", found.len()), want.len().to_string()));
        }
        let difference = largest_difference(&want, found);
        Ok(GoldenOutput { case: case.into(), output: name.into(), compared: want.len(), difference, tolerance })
    }
}

/// A NaN on either side is the largest difference, and stays it.
fn largest_difference(want: &[f32], found: &[f32]) -> f32 {
    let larger = |worst: f32, d: f32| if d <= worst || worst.is_nan() { worst } else { d };
    want.iter().zip(found).map(|(want, found)| (want - found).abs()).fold(0.0, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A NaN counted only at the end: `[0, NaN, 0.1, 0.05]` differed by 0.1 from zeros, so outputs with NaN could agree.
    #[test]
    fn a_nan_never_agrees() {
        let agrees = |found: &[f32]| {
            let difference = largest_difference(&[0.0; 4], found);
            GoldenOutput { case: String::new(), output: String::new(), compared: 4, difference, tolerance: 0.5 }
                .agrees()
        };
        assert!(agrees(&[0.0, 0.1, -0.5, 0.05]));
        assert!(!agrees(&[0.0, 0.1, -0.6, 0.05]));
        for at in 0..4 {
            let mut found = [0.0, 0.1, 0.1, 0.05];
            found[at] = f32::NAN;
            assert!(!agrees(&found), "{at}");
        }
    }
}
