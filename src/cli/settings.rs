//! Arguments that the commands with a model share, and what they mean.

use std::sync::Arc;

use crate::api::{BlockMemory, CollectionInfo};
use crate::attention::{Retrieval, Window};
use crate::model::{self, LoadedModel};
use crate::shape::CollectionSpec;
use crate::types::{BlockScore, DType, Granularity, KeyRule};

use super::Context;
use super::error::CliError;

/// Tokens of a block where nothing else is asked for.
const BLOCK_TOKENS: u32 = 64;

/// The model.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// The model: smollm2, hf:ORG/REPO[/FILE], a .gguf file or a safetensors folder.
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    pub(super) model: String,
}

/// The local window.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct WindowArgs {
    /// Tokens before its own block that each token sees without retrieval.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    window: usize,

    /// Do not keep the first block of the text visible.
    #[arg(long)]
    no_sink: bool,
}

/// What is retrieved.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct RetrievalArgs {
    /// How the scores of a block's keys become one.
    #[arg(long, value_name = "SCORE", default_value = "log-sum-exp", value_parser = word::<BlockScore>)]
    block_score: BlockScore,

    /// For whom one choice of blocks is made: token-head, head, token, kv-group or shared.
    #[arg(long, value_name = "GRANULARITY", default_value = "kv-group", value_parser = word::<Granularity>)]
    granularity: Granularity,
}

/// How a collection keeps its blocks. What is not typed is taken from the collection where it exists.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct StorageArgs {
    /// Tokens per block [default: 64].
    #[arg(long, value_name = "TOKENS")]
    block_tokens: Option<u32>,

    /// What stands for a block in the index: tokens, mean or landmark [default: tokens].
    #[arg(long, value_name = "RULE", value_parser = word::<KeyRule>)]
    key_rule: Option<KeyRule>,

    /// How K and V are stored: f32, f16, bf16 or int8 [default: f16].
    #[arg(long, value_name = "DTYPE", value_parser = word::<DType>)]
    payload: Option<DType>,

    /// How index keys are stored: f16 or int8 [default: int8].
    #[arg(long, value_name = "DTYPE", value_parser = word::<DType>)]
    keys: Option<DType>,
}

impl ModelArgs {
    /// Loads the model, which must be on this machine.
    pub(super) fn load(&self, context: &Context) -> Result<LoadedModel, CliError> {
        let path = model::resolve(&self.model)?;
        let spinner = context.output.spinner(&format!("loading {}", self.model));
        let loaded = LoadedModel::open(&path);
        spinner.finish_and_clear();
        Ok(loaded?)
    }
}

impl WindowArgs {
    pub(super) fn window(&self) -> Window {
        Window { tokens: self.window, sink: !self.no_sink }
    }
}

impl RetrievalArgs {
    pub(super) fn retrieval(&self, top_k: u32) -> Retrieval {
        Retrieval { top_k, block_score: self.block_score, granularity: self.granularity, ..Retrieval::default() }
    }
}

impl StorageArgs {
    /// The collection `name` for `model`, created if it is not there.
    pub(super) fn open(
        &self,
        name: &str,
        model: &LoadedModel,
        memory: &Arc<dyn BlockMemory>,
    ) -> Result<CollectionInfo, CliError> {
        let existing = memory.collections()?.into_iter().find(|collection| collection.spec.name == name);
        let spec = self.spec(name, model, existing.map(|collection| collection.spec).as_ref(), None)?;
        Ok(memory.open_collection(&spec)?)
    }

    /// The same with one payload dtype or another, for collections that are made for a comparison.
    pub(super) fn spec(
        &self,
        name: &str,
        model: &LoadedModel,
        existing: Option<&CollectionSpec>,
        payload: Option<DType>,
    ) -> Result<CollectionSpec, CliError> {
        let of_existing = |pick: fn(&CollectionSpec) -> DType| existing.map(pick);
        let block_tokens = self.block_tokens.or(existing.map(|spec| spec.shape.block_tokens)).unwrap_or(BLOCK_TOKENS);
        Ok(CollectionSpec {
            name: name.into(),
            shape: model.shape(block_tokens).map_err(crate::api::MemoryError::from)?,
            key_rule: self.key_rule.or(existing.map(|spec| spec.key_rule)).unwrap_or(KeyRule::Tokens),
            payload_dtype: payload.or(self.payload).or(of_existing(|s| s.payload_dtype)).unwrap_or(DType::F16),
            key_dtype: self.keys.or(of_existing(|s| s.key_dtype)).unwrap_or(DType::Int8),
            model_digest: model.model_digest,
            tokenizer_digest: model.tokenizer_digest(),
            model_name: model.name.clone(),
        })
    }
}

/// A value by the word that people type for it.
pub(super) fn word<T: std::str::FromStr<Err = String>>(typed: &str) -> Result<T, String> {
    typed.parse()
}
