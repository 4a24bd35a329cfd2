//! OLMo 2: branches are normalised where they come out and nowhere else, and queries and keys over the whole width.

use super::names::NAMES_OF_OUTPUT_NORMS;
use super::{Family, PLAIN, biases};
use crate::architecture::{Norms, QueryKeyNorm};

pub(super) static FAMILY: Family = Family {
    model_types: &["olmo2"],
    gguf: Some("olmo2"),
    defaults: &[("max_position_embeddings", 2048.0)],
    names: NAMES_OF_OUTPUT_NORMS,
    describe: |settings, config| {
        config.architecture.norms = Norms::After;
        config.architecture.query_key_norm = Some(QueryKeyNorm::Width);
        config.architecture.biases = biases(settings)?;
        Ok(())
    },
    ..PLAIN
};
