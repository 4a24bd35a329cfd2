//! SmolLM 3: Llama, in which every fourth layer does not rotate.

use super::{Family, PLAIN, Settings, biases, check_kinds, key};
use crate::architecture::LayerKind;
use crate::config::ModelConfig;
use crate::error::LoadError;

pub(super) static FAMILY: Family = Family {
    model_types: &["smollm3"],
    gguf: Some("smollm3"),
    gguf_interleaved: true,
    defaults: &[("max_position_embeddings", 32_768.0), ("rope_theta", 2e6), ("tie_word_embeddings", 1.0)],
    describe,
    ..PLAIN
};

/// 1 for a layer that rotates and 0 for one that does not, whatever the name says.
const ROTATED: key::Key = key::key("no_rope_layers", "");
const INTERVAL: key::Key = key::key("no_rope_layer_interval", "");
/// Every so many layers one does not rotate, where a file does not say; GGUF never does.
const INTERVAL_DEFAULT: u32 = 4;

fn describe(settings: &dyn Settings, config: &mut ModelConfig) -> Result<(), LoadError> {
    config.architecture.biases = biases(settings)?;
    let interval = settings.number(INTERVAL)?.unwrap_or(INTERVAL_DEFAULT);
    if interval == 0 {
        return Err(settings.refuse(INTERVAL, "at least 1", None));
    }
    let rotated = match settings.numbers(ROTATED)? {
        Some(rotated) => rotated,
        None => (1..=config.layers).map(|layer| !layer.is_multiple_of(interval) as u32).collect(),
    };
    if rotated.len() != config.layers as usize || rotated.iter().any(|&flag| flag > 1) {
        return Err(settings.refuse(ROTATED, &format!("0 or 1 for each of {} layers", config.layers), None));
    }
    let kind = |flag: &u32| if *flag == 1 { LayerKind::Global } else { LayerKind::Unrotated };
    config.architecture.kinds = rotated.iter().map(kind).collect();
    // `layer_types` tells windows, which no released model has.
    check_kinds(settings)?;
    no_window(settings)
}

/// Configurations tell a window that `use_sliding_window` says is not used.
fn no_window(settings: &dyn Settings) -> Result<(), LoadError> {
    if settings.flag(key::USE_SLIDING_WINDOW)? == Some(true) {
        let way_out = "no released model of this kind has one; take a version of the model without it";
        return Err(settings.refuse(key::USE_SLIDING_WINDOW, "false", Some(way_out)));
    }
    settings.number(key::SLIDING_WINDOW)?;
    settings.number(key::WINDOW_LAYERS)?;
    Ok(())
}
