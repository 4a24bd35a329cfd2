//! Qwen 2 and 2.5: Llama with biases of q, k and v, and in some layers a window if they are set to slide.

use super::{Family, PLAIN, some_windows};
use crate::architecture::Biases;

pub(super) static FAMILY: Family = Family {
    model_types: &["qwen2"],
    gguf: Some("qwen2"),
    defaults: &[("max_position_embeddings", 32_768.0)],
    describe: |settings, config| {
        config.architecture.biases = Biases { qkv: true, ..Biases::default() };
        some_windows(settings, config)
    },
    ..PLAIN
};
