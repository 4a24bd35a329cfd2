//! Mistral: Llama with a sliding window in the oldest models. llama.cpp's converter calls it llama.

use super::{Family, PLAIN, window_of_all_layers};

pub(super) static FAMILY: Family = Family {
    model_types: &["mistral"],
    defaults: &[("max_position_embeddings", 131_072.0)],
    describe: |settings, config| {
        config.architecture.window_tokens_max = window_of_all_layers(settings)?;
        Ok(())
    },
    ..PLAIN
};
