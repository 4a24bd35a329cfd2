//! Llama, and Llama trained with landmarks (Mohtashami and Jaggi 2023).

use super::{Family, PLAIN, Settings, biases, key};
use crate::config::{Landmark, ModelConfig};
use crate::error::LoadError;

pub(super) static FAMILY: Family = Family {
    model_types: &["llama", LANDMARK_TYPE],
    gguf: Some("llama"),
    with_code: &[LANDMARK_TYPE],
    gguf_interleaved: true,
    defaults: &[("max_position_embeddings", 2048.0)],
    describe,
    ..PLAIN
};

/// What the paper's code calls its models.
pub(crate) const LANDMARK_TYPE: &str = "llama_with_landmark";

const MODEL_TYPE: key::Key = key::key("model_type", "");
const LANDMARK_ID: key::Key = key::key("mem_id", "");
/// Tokens of a block without its landmark.
const LANDMARK_FREQUENCY: key::Key = key::key("mem_freq", "");

fn describe(settings: &dyn Settings, config: &mut ModelConfig) -> Result<(), LoadError> {
    config.architecture.biases = biases(settings)?;
    if settings.text(MODEL_TYPE)? == Some(LANDMARK_TYPE) {
        let need = |key| settings.number(key).and_then(|found| found.ok_or_else(|| settings.missing(key)));
        // What is too large is refused as a shape.
        let (id, mem_freq) = (need(LANDMARK_ID)?, need(LANDMARK_FREQUENCY)?);
        config.landmark = Some(Landmark { id, block_tokens: mem_freq.saturating_add(1), hidden: false });
    }
    Ok(())
}
