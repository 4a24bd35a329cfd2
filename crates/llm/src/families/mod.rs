//! Which families of models are read, and how their files tell what they are: one file and one row of [`FAMILIES`] each.
//!
//! A family says how its files are named and what it computes beyond Llama; loading, its errors and its tests follow from that.
//! The settings that all have in common are read in [`read`]. What a family does not read and `settled` does not let through is
//! refused by its name, as is every tensor that the forward pass does not ask for.
//!
//! To add one: a file beside these with its [`Family`], its row below, and recorded outputs of another implementation under
//! `tests/golden/families/`.

mod gemma3;
mod granite;
mod key;
mod llama;
mod mistral;
mod names;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod settled;
mod smollm3;

pub(super) use key::Key;
pub(super) use llama::LANDMARK_TYPE;
pub(super) use names::{Name, folder_name, gguf_name, text_name};
pub(super) use settled::{FOLDER_NEUTRAL, GGUF_NEUTRAL, is_beside_text, is_harmless_field, is_harmless_setting};

use super::architecture::{Activation, Architecture, Biases, LayerKind};
use super::config::ModelConfig;
use super::error::LoadError;
use super::rotation::Rotation;
use super::weights::LayerTensor;
use landmarkdb::InvalidShape;
use landmarkdb::limits::{HEAD_DIM_MAX, LAYERS_MAX};

/// Every family that is read.
pub(super) static FAMILIES: [&Family; 9] = [
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &gemma3::FAMILY,
    &smollm3::FAMILY,
    &phi3::FAMILY,
    &granite::FAMILY,
    &olmo2::FAMILY,
];

/// How the files of a family tell what its models are.
pub(super) struct Family {
    /// `model_type` in `config.json`: the first, or another.
    pub(super) model_types: &'static [&'static str],
    /// `general.architecture` in GGUF, and what its settings begin with; none where llama.cpp calls it by another family's.
    pub(super) gguf: Option<&'static str>,
    /// `model_type` of models that also see, whose `text_config` is one of the family: only that part is read.
    pub(super) wrapper: Option<&'static str>,
    /// Those `model_type`s whose folders name code of their own, which is what is computed here.
    pub(super) with_code: &'static [&'static str],
    /// What a `config.json` that leaves a setting out means by that, where it is not what Llama means.
    pub(super) defaults: &'static [(&'static str, f64)],
    /// The tensors that have other names than Llama's.
    pub(super) names: &'static [Name],
    /// Base of the rotation of sliding layers, if it is theirs alone and a file does not say.
    pub(super) local_base: Option<f64>,
    /// Whether GGUF holds the rows of Q and K in interleaved RoPE order (dimension 2i rotates with 2i + 1), as llama.cpp wants
    /// them for the architectures that it rotates in that order.
    pub(super) gguf_interleaved: bool,
    /// Whether safetensors hold the weights of norms less 1. GGUF never does.
    pub(super) norms_less_one: bool,
    /// Reads what is the family's own into the configuration of a plain Llama model.
    pub(super) describe: fn(&dyn Settings, &mut ModelConfig) -> Result<(), LoadError>,
}

/// A family without anything of its own, for others to differ from.
const PLAIN: Family = Family {
    model_types: &[],
    gguf: None,
    wrapper: None,
    with_code: &[],
    defaults: &[],
    names: &[],
    local_base: None,
    gguf_interleaved: false,
    norms_less_one: false,
    describe: |_, _| Ok(()),
};

/// What a model file says of itself, whichever format it has. Every setting that is asked for counts as known. A key without a
/// name in the format is never there.
pub(super) trait Settings {
    fn number(&self, key: Key) -> Result<Option<u32>, LoadError>;
    fn float(&self, key: Key) -> Result<Option<f64>, LoadError>;
    fn flag(&self, key: Key) -> Result<Option<bool>, LoadError>;
    fn text(&self, key: Key) -> Result<Option<&str>, LoadError>;
    fn numbers(&self, key: Key) -> Result<Option<Vec<u32>>, LoadError>;
    fn texts(&self, key: Key) -> Result<Option<Vec<&str>>, LoadError>;

    /// Rows of the embedding.
    fn vocab(&self) -> Result<u32, LoadError>;
    fn tied_output(&self) -> Result<bool, LoadError>;
    fn eos_ids(&self) -> Result<Vec<u32>, LoadError>;
    /// Of global layers of a model with a context of `context_tokens`.
    fn rotation(&self, head_dim: u32, context_tokens: u32) -> Result<Rotation, LoadError>;
    /// Of sliding layers with a rotation of their own.
    fn local_rotation(&self, head_dim: u32) -> Result<Rotation, LoadError>;
    /// Whether products have a bias: a folder says so in a flag, GGUF has the tensors.
    fn has_bias(&self, flag: Key, tensors: &[LayerTensor]) -> Result<bool, LoadError>;

    fn missing(&self, key: Key) -> LoadError;
    fn refuse(&self, key: Key, expected: &str, way_out: Option<&'static str>) -> LoadError;
    fn shape(&self, source: InvalidShape) -> LoadError;
}

/// The family whose `config.json` has this `model_type`.
pub(super) fn by_model_type(model_type: &str) -> Option<&'static Family> {
    FAMILIES.into_iter().find(|family| family.model_types.contains(&model_type))
}

/// The family of models that see and read, whose `config.json` has this `model_type`.
pub(super) fn by_wrapper(model_type: &str) -> Option<&'static Family> {
    FAMILIES.into_iter().find(|family| family.wrapper == Some(model_type))
}

/// The family whose GGUF files have this `general.architecture`.
pub(super) fn by_gguf(architecture: &str) -> Option<&'static Family> {
    FAMILIES.into_iter().find(|family| family.gguf == Some(architecture))
}

/// Every `model_type` that is read, for a message.
pub(super) fn model_types() -> String {
    one_of(FAMILIES.iter().flat_map(|family| family.model_types.iter().chain(&family.wrapper)).copied())
}

/// Every `general.architecture` that is read, for a message.
pub(super) fn gguf_architectures() -> String {
    one_of(FAMILIES.iter().filter_map(|family| family.gguf))
}

fn one_of<'a>(names: impl Iterator<Item = &'a str>) -> String {
    format!("one of {}", names.collect::<Vec<_>>().join(", "))
}

/// Llama, under whose names training and adapters write tensors.
pub(super) fn plain() -> &'static Family {
    &llama::FAMILY
}

/// Reads the configuration of a model of `family`.
pub(super) fn read(family: &Family, settings: &dyn Settings) -> Result<ModelConfig, LoadError> {
    let need = |key| settings.number(key).and_then(|found| found.ok_or_else(|| settings.missing(key)));
    let query_heads = need(key::QUERY_HEADS)?;
    if query_heads == 0 {
        return Err(settings.refuse(key::QUERY_HEADS, "at least 1", None));
    }
    let layers = need(key::LAYERS)?;
    if layers > LAYERS_MAX {
        let (expected, found) = (format!("1 to {LAYERS_MAX}"), layers.to_string());
        return Err(settings.shape(InvalidShape { field: "layers", expected, found }));
    }
    let hidden = need(key::HIDDEN)?;
    let head_dim = settings.number(key::HEAD_DIM)?.unwrap_or(hidden / query_heads);
    if head_dim > HEAD_DIM_MAX {
        return Err(settings.refuse(key::HEAD_DIM, &format!("at most {HEAD_DIM_MAX}"), None));
    }
    if settings.number(key::VALUE_DIM)?.is_some_and(|found| found != head_dim) {
        return Err(settings.refuse(key::VALUE_DIM, &format!("{head_dim}, the length of keys"), None));
    }
    let context_tokens = need(key::CONTEXT)?;
    let epsilon = settings.float(key::NORM_EPSILON)?.ok_or_else(|| settings.missing(key::NORM_EPSILON))?;
    let Rotation { rope, attention_factor } = settings.rotation(head_dim, context_tokens)?;
    let mut config = ModelConfig {
        layers,
        query_heads,
        kv_heads: settings.number(key::KV_HEADS)?.unwrap_or(query_heads),
        head_dim,
        hidden: hidden as usize,
        ffn: need(key::FFN)? as usize,
        vocab: settings.vocab()? as usize,
        context_tokens,
        norm_epsilon: epsilon as f32,
        rope,
        tied_output: settings.tied_output()?,
        eos_ids: settings.eos_ids()?,
        landmark: None,
        architecture: Architecture { rotary_gain: (attention_factor * attention_factor) as f32, ..Default::default() },
    };
    (family.describe)(settings, &mut config)?;
    check_activation(settings, config.architecture.activation)?;
    check_scale(settings, &config)?;
    if config.architecture.kinds.is_empty() {
        check_kinds(settings)?;
    }
    config.check().map_err(|source| settings.shape(source))?;
    Ok(config)
}

/// Names of the activation, under both keys that configurations have for it.
fn check_activation(settings: &dyn Settings, activation: Activation) -> Result<(), LoadError> {
    let expected = match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    for key in [key::ACTIVATION, key::OLDER_ACTIVATION] {
        if settings.text(key)?.is_some_and(|name| name != expected) {
            return Err(settings.refuse(key, expected, None));
        }
    }
    Ok(())
}

/// Holds what a file says of the scores' scale, which 0 leaves to the family, against what is computed.
fn check_scale(settings: &dyn Settings, config: &ModelConfig) -> Result<(), LoadError> {
    let scale = config.softmax_scale() as f64;
    match settings.float(key::SOFTMAX_SCALE)? {
        Some(found) if found != 0.0 && (found - scale).abs() > 1e-6 * scale => {
            Err(settings.refuse(key::SOFTMAX_SCALE, &format!("{scale}, of the head dim"), None))
        }
        _ => Ok(()),
    }
}

/// A family that does not read the kinds of its layers has one kind.
fn check_kinds(settings: &dyn Settings) -> Result<(), LoadError> {
    let kinds = settings.texts(key::LAYER_TYPES)?.unwrap_or_default();
    match kinds.iter().all(|kind| *kind == FULL_ATTENTION) {
        true => Ok(()),
        false => Err(settings.refuse(key::LAYER_TYPES, &format!("{FULL_ATTENTION} for every layer"), None)),
    }
}

/// Hugging Face's words for kinds of layers.
pub(super) const FULL_ATTENTION: &str = "full_attention";
pub(super) const SLIDING_ATTENTION: &str = "sliding_attention";

/// The biases of families whose configuration has a flag for those of attention and one for those of the feed-forward network.
fn biases(settings: &dyn Settings) -> Result<Biases, LoadError> {
    use LayerTensor::*;
    Ok(Biases {
        qkv: settings.has_bias(key::ATTENTION_BIAS, &[QueryBias, KeyBias, ValueBias])?,
        output: settings.has_bias(key::ATTENTION_BIAS, &[AttentionOutputBias])?,
        gate_up: settings.has_bias(key::FFN_BIAS, &[GateBias, UpBias])?,
        down: settings.has_bias(key::FFN_BIAS, &[DownBias])?,
    })
}

/// The longest window of a family whose layers all look back over `sliding_window` tokens; none if that is not set or 0.
///
/// Such a model has no layer that sees the whole text, and was trained for none. Its layers are treated as global with a local
/// window of at most so many tokens: what is older is retrieved, and retrieved blocks stand in slots just before the window, at
/// distances that the model knows.
fn window_of_all_layers(settings: &dyn Settings) -> Result<Option<u32>, LoadError> {
    Ok(settings.number(key::SLIDING_WINDOW)?.filter(|&tokens| tokens > 0))
}

/// For families in which some layers see the last tokens only, with the same rotation, if `use_sliding_window` says so.
fn some_windows(settings: &dyn Settings, config: &mut ModelConfig) -> Result<(), LoadError> {
    let window = settings.number(key::SLIDING_WINDOW)?;
    // The layers before have none.
    let first = settings.number(key::WINDOW_LAYERS)?;
    if settings.flag(key::USE_SLIDING_WINDOW)? != Some(true) {
        return Ok(());
    }
    let window_tokens = window.ok_or_else(|| settings.missing(key::SLIDING_WINDOW))? as usize;
    let global = match settings.texts(key::LAYER_TYPES)? {
        Some(kinds) => are_global(settings, &kinds, config.layers)?,
        None => {
            let first = first.ok_or_else(|| settings.missing(key::WINDOW_LAYERS))?;
            (0..config.layers).map(|layer| layer < first).collect()
        }
    };
    let Architecture { rotary_gain, .. } = config.architecture;
    let sliding = LayerKind::Sliding { window_tokens, rope: config.rope.clone(), rotary_gain };
    let kind = |is_global| if is_global { LayerKind::Global } else { sliding.clone() };
    config.architecture.kinds = global.into_iter().map(kind).collect();
    Ok(())
}

/// Which layers see the whole text, by Hugging Face's words for their kinds.
fn are_global(settings: &dyn Settings, kinds: &[&str], layers: u32) -> Result<Vec<bool>, LoadError> {
    if kinds.len() != layers as usize || !kinds.iter().all(|kind| [FULL_ATTENTION, SLIDING_ATTENTION].contains(kind)) {
        let expected = format!("{FULL_ATTENTION} or {SLIDING_ATTENTION} for each of {layers} layers");
        return Err(settings.refuse(key::LAYER_TYPES, &expected, None));
    }
    Ok(kinds.iter().map(|kind| *kind == FULL_ATTENTION).collect())
}
