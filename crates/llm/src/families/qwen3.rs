//! Qwen 3, the dense models: each head of queries and keys is normalised.

use super::{Family, PLAIN, biases, some_windows};
use crate::architecture::QueryKeyNorm;

pub(super) static FAMILY: Family = Family {
    model_types: &["qwen3"],
    gguf: Some("qwen3"),
    defaults: &[("max_position_embeddings", 32_768.0), ("head_dim", 128.0)],
    describe: |settings, config| {
        config.architecture.query_key_norm = Some(QueryKeyNorm::Head);
        config.architecture.biases = biases(settings)?;
        some_windows(settings, config)
    },
    ..PLAIN
};
