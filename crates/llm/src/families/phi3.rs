//! Phi-3, Phi-3.5 and Phi-4 (mini): Llama with q, k and v in one tensor, gate and up in another, LongRoPE, and in Phi-4-mini a
//! rotation of three quarters of a head.

use super::{Family, PLAIN, window_of_all_layers};

pub(super) static FAMILY: Family = Family {
    model_types: &["phi3"],
    gguf: Some("phi3"),
    // Microsoft's folders have the code that transformers took over.
    with_code: &["phi3"],
    defaults: &[("max_position_embeddings", 4096.0)],
    describe: |settings, config| {
        config.architecture.fused = true;
        config.architecture.window_tokens_max = window_of_all_layers(settings)?;
        Ok(())
    },
    ..PLAIN
};
