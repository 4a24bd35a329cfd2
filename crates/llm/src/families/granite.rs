//! Granite 3, the dense models: Llama with four factors.

use super::{Family, PLAIN, Settings, biases, key};
use crate::config::ModelConfig;
use crate::error::LoadError;

pub(super) static FAMILY: Family = Family {
    model_types: &["granite"],
    gguf: Some("granite"),
    gguf_interleaved: true,
    defaults: &[("max_position_embeddings", 2048.0), ("attention_multiplier", 1.0)],
    describe,
    ..PLAIN
};

const SOFTMAX_SCALE: key::Key = key::key("attention_multiplier", key::SOFTMAX_SCALE.gguf);
const EMBEDDING_SCALE: key::Key = key::key("embedding_multiplier", "embedding_scale");
const RESIDUAL_SCALE: key::Key = key::key("residual_multiplier", "residual_scale");
/// Logits are divided by it.
const LOGIT_DIVISOR: key::Key = key::key("logits_scaling", "logit_scale");

fn describe(settings: &dyn Settings, config: &mut ModelConfig) -> Result<(), LoadError> {
    let factor = |key| match settings.float(key)? {
        Some(found) if !(found.is_finite() && found > 0.0) => Err(settings.refuse(key, "a positive number", None)),
        found => Ok(found.map(|found| found as f32)),
    };
    config.architecture.biases = biases(settings)?;
    config.architecture.softmax_scale = factor(SOFTMAX_SCALE)?;
    config.architecture.embedding_scale = factor(EMBEDDING_SCALE)?.unwrap_or(1.0);
    config.architecture.residual_scale = factor(RESIDUAL_SCALE)?.unwrap_or(1.0);
    config.architecture.logit_scale = factor(LOGIT_DIVISOR)?.unwrap_or(1.0).recip();
    Ok(())
}
