//! Gemma 3: of every six layers five see the last tokens only, with a rotation of their own; branches are normalised on both
//! sides, heads of queries and keys too.

use super::names::NAMES_OF_OUTPUT_NORMS;
use super::{Family, PLAIN, Settings, are_global, biases, key};
use crate::architecture::{Activation, Architecture, LayerKind, Norms, QueryKeyNorm};
use crate::config::ModelConfig;
use crate::error::LoadError;

pub(super) static FAMILY: Family = Family {
    model_types: &["gemma3_text"],
    gguf: Some("gemma3"),
    wrapper: Some("gemma3"),
    // Google's own configurations leave most of them out.
    defaults: &[
        ("num_attention_heads", 8.0),
        ("num_key_value_heads", 4.0),
        ("head_dim", 256.0),
        ("vocab_size", 262_208.0),
        ("max_position_embeddings", 131_072.0),
        ("rms_norm_eps", 1e-6),
        ("query_pre_attn_scalar", 256.0),
        ("sliding_window", 4096.0),
        ("rope_theta", 1e6),
        ("tie_word_embeddings", 1.0),
    ],
    local_base: Some(1e4),
    names: NAMES_OF_OUTPUT_NORMS,
    norms_less_one: true,
    describe,
    ..PLAIN
};

const SCALAR: key::Key = key::key("query_pre_attn_scalar", "");
const PATTERN: key::Key = key::key("sliding_window_pattern", "attention.sliding_window_pattern");
const OLDER_PATTERN: key::Key = key::key("_sliding_window_pattern", "");
/// Every so many layers one sees the whole text.
const PATTERN_DEFAULT: u32 = 6;

/// The layers of the 27B model, whose scale GGUF does not tell and llama.cpp knows by them.
const LAYERS_27B: u32 = 62;

fn describe(settings: &dyn Settings, config: &mut ModelConfig) -> Result<(), LoadError> {
    let window = settings.number(key::SLIDING_WINDOW)?.ok_or_else(|| settings.missing(key::SLIDING_WINDOW))?;
    let scalar = match settings.float(SCALAR)? {
        Some(scalar) => scalar,
        None if config.layers == LAYERS_27B => config.hidden as f64 / config.query_heads as f64,
        None => config.head_dim as f64,
    };
    let rope = settings.local_rotation(config.head_dim)?.rope;
    let sliding = LayerKind::Sliding { window_tokens: window as usize, rope, rotary_gain: 1.0 };
    let kinds = is_global(settings, config.layers)?.into_iter();
    config.architecture = Architecture {
        kinds: kinds.map(|is_global| if is_global { LayerKind::Global } else { sliding.clone() }).collect(),
        softmax_scale: Some(scalar.powf(-0.5) as f32),
        activation: Activation::GeluTanh,
        norms: Norms::Around,
        query_key_norm: Some(QueryKeyNorm::Head),
        biases: biases(settings)?,
        embedding_scale: (config.hidden as f32).sqrt(),
        ..config.architecture.clone()
    };
    Ok(())
}

/// For each layer whether it sees the whole text.
fn is_global(settings: &dyn Settings, layers: u32) -> Result<Vec<bool>, LoadError> {
    let pattern = match settings.number(PATTERN)? {
        Some(pattern) => Some(pattern),
        None => settings.number(OLDER_PATTERN)?,
    };
    let by_pattern = |pattern: u32| (1..=layers).map(|layer| layer.is_multiple_of(pattern)).collect::<Vec<_>>();
    if pattern == Some(0) {
        return Err(settings.refuse(PATTERN, "at least 1", None));
    }
    let Some(kinds) = settings.texts(key::LAYER_TYPES)? else {
        return Ok(by_pattern(pattern.unwrap_or(PATTERN_DEFAULT)));
    };
    are_global(settings, &kinds, layers)
}
