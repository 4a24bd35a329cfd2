//! Arguments that the commands with a model share, and what they mean.

use std::ffi::OsStr;
use std::str::FromStr;
use std::sync::Arc;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use landmarkdb::limits;
use landmarkdb::{
    BlockMemory, BlockScore, CollectionInfo, CollectionSpec, CountedFrom, DType, Engine, Granularity, KeyRule, Layers,
    Placement, Retrieval, Window, words,
};
use landmarkdb_llm::{self as model, LoadedModel, ModelConfig};

use super::Context;
use super::error::CliError;
use super::numbers::{from_one, integer};

/// Words of a flag, and what the help says of each.
pub(super) type Explained = &'static [(&'static str, &'static str)];

pub(super) const WINDOW_FROM: Explained = &[
    ("query", "Each query's own block: chunks change no answer"),
    ("chunk", "The block of the chunk's first token: the way of models trained with landmarks"),
];

pub(super) const BLOCK_SCORE: Explained =
    &[("max", "The best key decides"), ("log-sum-exp", "All keys of the block count, as in a softmax over them")];

pub(super) const GRANULARITY: Explained = &[
    ("token-head", "Nobody: each query token and query head chooses for itself"),
    ("head", "All query tokens of a chunk, for each query head"),
    ("token", "All heads of a layer, for each query token"),
    ("kv-group", "The query heads of a KV head, for each query token"),
    ("shared", "All query tokens of a chunk and all heads of a layer"),
];

const PLACEMENT: Explained = &[
    ("slots", "Just before the window, however far they are in their documents"),
    ("original", "As far as they are in their documents, within the context that the model was trained for"),
];

pub(super) const KEY_RULE: Explained = &[
    ("landmark", "One key that was trained to stand for the block: for models that have landmarks"),
    ("tokens", "The keys of all its tokens: finds most, and has most to scan"),
    ("mean", "The mean of its tokens' keys: one key, which finds less"),
];

/// The model.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// The model: smollm2, gemma3-270m, hf:ORG/REPO[/FILE], a .gguf file or a safetensors folder.
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    pub(super) model: String,
}

/// The local window.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct WindowArgs {
    /// Tokens attended to without retrieval before the block that --window-from names, at most the model's context, rounded up to
    /// full blocks; at least one block with --window-from query [default: 512; for a model trained with landmarks 0].
    #[arg(long, value_name = "TOKENS")]
    window: Option<usize>,

    /// Block that the window is counted back from [default: query; for a model trained with landmarks chunk].
    #[arg(long, value_name = "FROM", value_parser = explained::<CountedFrom>(WINDOW_FROM))]
    window_from: Option<CountedFrom>,

    /// Maximum tokens per forward pass [default: 512; for a model trained with landmarks 8 blocks].
    #[arg(long, value_name = "TOKENS", value_parser = integer::<usize>(1..=limits::QUERY_TOKENS_MAX))]
    chunk: Option<usize>,

    /// No attention sink: do not keep the first block of the text visible.
    #[arg(long)]
    no_sink: bool,
}

/// A [`Placement`] as it is typed: how far `original` may go follows from the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    Slots,
    Original,
}

words!(Placed, "slots" => Slots, "original" => Original);

/// What is retrieved.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct RetrievalArgs {
    /// How the scores of a block's keys become one [default: log-sum-exp; for a model trained with landmarks max].
    #[arg(long, value_name = "SCORE", value_parser = explained::<BlockScore>(BLOCK_SCORE))]
    block_score: Option<BlockScore>,

    /// Who shares a choice of blocks [default: kv-group; for a model trained with landmarks token-head].
    #[arg(long, value_name = "GRANULARITY", value_parser = explained::<Granularity>(GRANULARITY))]
    granularity: Option<Granularity>,

    /// Layers that retrieve, as numbers and ranges: 1-2,5. Counted from 0, without layers that see the last tokens only
    /// [default: all; for landmarks of an adapter all but the first].
    #[arg(long, value_name = "LAYERS", value_parser = layers)]
    retrieve_layers: Option<Layers>,

    /// Retrieve from this many of a document's newest blocks only [default: all].
    #[arg(long, value_name = "BLOCKS", value_parser = from_one::<u32>())]
    newest_blocks: Option<u32>,

    /// Where retrieved blocks and the sink stand while they are attended to [default: slots].
    #[arg(long, value_name = "PLACEMENT", value_parser = explained::<Placed>(PLACEMENT))]
    placement: Option<Placed>,
}

/// What is retrieved while a text is encoded.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct EncodeArgs {
    /// Blocks retrieved per choice while encoding; 0 encodes within the window [default: 0; for a model trained with
    /// landmarks 4].
    #[arg(long = "encode-blocks", value_name = "K", value_parser = integer::<u32>(0..=limits::TOP_K_MAX))]
    encode_top_k: Option<u32>,
}

/// How a collection keeps its blocks. What is not typed is taken from the collection where it exists.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct StorageArgs {
    /// Tokens per block [default: 64, or the model's own if it has landmarks].
    #[arg(long, value_name = "TOKENS", value_parser = integer::<u32>(2..=limits::BLOCK_TOKENS_MAX))]
    block_tokens: Option<u32>,

    /// The keys that a new collection's index has for each block [default: tokens, or landmark if the model has them].
    #[arg(long, value_name = "RULE", value_parser = explained::<KeyRule>(KEY_RULE))]
    pub(super) key_rule: Option<KeyRule>,

    /// Data type of stored K and V [default: f16].
    #[arg(long, value_name = "DTYPE", value_parser = one_of::<DType>(DType::WORDS))]
    pub(super) payload: Option<DType>,

    /// Data type of index keys [default: int8 for token keys, else f16].
    #[arg(long, value_name = "DTYPE", value_parser = one_of::<DType>(&["f16", "int8"]))]
    keys: Option<DType>,
}

/// A model and the memory that it works with.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct SetupArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,

    #[command(flatten)]
    pub(super) window: WindowArgs,

    #[command(flatten)]
    pub(super) retrieval: RetrievalArgs,

    #[command(flatten)]
    pub(super) encode: EncodeArgs,

    #[command(flatten)]
    pub(super) storage: StorageArgs,
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
    /// A token of the window farther away than the model was trained to read would be noise.
    pub(super) fn window(&self, model: &ModelConfig) -> Result<Window, CliError> {
        let best = model.window();
        let (longest, of) = match model.longest_window() {
            Some(trained) => (trained, "the window that the model was trained with, less a block"),
            None => (model.context_tokens as usize, "the model's context"),
        };
        if let Some(tokens) = self.window
            && tokens > longest
        {
            return Err(wrong("--window", format!("0 to {longest}, {of}"), tokens));
        }
        Ok(Window {
            tokens: self.window.unwrap_or(best.tokens),
            counted_from: self.window_from.unwrap_or(best.counted_from),
            sink: best.sink && !self.no_sink,
            chunk_tokens: self.chunk.unwrap_or(best.chunk_tokens),
            normalisation: best.normalisation,
        })
    }
}

impl RetrievalArgs {
    pub(super) fn retrieval(&self, model: &ModelConfig, top_k: u32) -> Result<Retrieval, CliError> {
        if let Some(Layers::These(layers)) = &self.retrieve_layers
            && layers.len() > model.memory_layers() as usize
        {
            let last = model.memory_layers().saturating_sub(1);
            let expected = format!("0 to {last}, the layers that look back over the whole text");
            return Err(wrong("--retrieve-layers", expected, layers.len() - 1));
        }
        let best = model.retrieval();
        Ok(Retrieval {
            top_k,
            block_score: self.block_score.unwrap_or(best.block_score),
            granularity: self.granularity.unwrap_or(best.granularity),
            layers: self.retrieve_layers.clone().unwrap_or(best.layers),
            newest_blocks: self.newest_blocks.or(best.newest_blocks),
            placement: match self.placement {
                None => best.placement,
                Some(Placed::Slots) => Placement::Slots,
                Some(Placed::Original) => model.original_placement(),
            },
        })
    }
}

impl EncodeArgs {
    /// `as_asked` is what is retrieved otherwise.
    pub(super) fn retrieval(&self, model: &ModelConfig, as_asked: &Retrieval) -> Option<Retrieval> {
        let top_k = self.encode_top_k.or(model.encode_retrieval().map(|best| best.top_k)).filter(|&k| k > 0)?;
        Some(Retrieval { top_k, ..as_asked.clone() })
    }
}

impl SetupArgs {
    pub(super) fn encode_retrieval(&self, model: &ModelConfig) -> Result<Option<Retrieval>, CliError> {
        Ok(self.encode.retrieval(model, &self.retrieval.retrieval(model, 1)?))
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
        let stored = existing.map(|collection| collection.spec);
        let spec = self.spec(name, model, stored.as_ref(), None)?;
        if let Some((field, stored, offered)) = stored.and_then(|stored| difference(&stored, &spec)) {
            return Err(CliError::OtherCollection { collection: name.into(), field, stored, offered });
        }
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
        let config = model.config();
        let block_tokens = self.block_tokens.or(existing.map(|spec| spec.shape.block_tokens));
        let block_tokens = block_tokens.unwrap_or(config.block_tokens());
        if config.landmark.is_some() && block_tokens != config.block_tokens() {
            let expected = format!("{}, where the model's landmarks are", config.block_tokens());
            return Err(wrong("--block-tokens", expected, block_tokens));
        }
        let key_rule = self.key_rule.or(existing.map(|spec| spec.key_rule)).unwrap_or(config.key_rule());
        if config.landmark.is_some_and(|landmark| landmark.hidden) && key_rule != KeyRule::Landmark {
            let expected = "landmark, as the adapter's landmarks are no text; for other rules take its base";
            return Err(wrong("--key-rule", expected, key_rule));
        }
        if config.landmark.is_none() && key_rule == KeyRule::Landmark {
            let expected = "tokens or mean, as the model has no landmarks (`landmarkdb train --adapter` gives it some)";
            return Err(wrong("--key-rule", expected, key_rule));
        }
        let key_dtype = if key_rule == KeyRule::Tokens { DType::Int8 } else { DType::F16 };
        Ok(CollectionSpec {
            name: name.into(),
            shape: model.shape(block_tokens).map_err(landmarkdb::MemoryError::from)?,
            key_rule,
            payload_dtype: payload.or(self.payload).or(of_existing(|s| s.payload_dtype)).unwrap_or(DType::F16),
            key_dtype: self.keys.or(of_existing(|s| s.key_dtype)).unwrap_or(key_dtype),
            model_digest: model.model_digest,
            tokenizer_digest: model.tokenizer_digest(),
            model_name: model.name.clone(),
        })
    }
}

/// The first thing that keeps blocks of one specification out of a collection of another: its name, and what both say.
fn difference(stored: &CollectionSpec, offered: &CollectionSpec) -> Option<(&'static str, String, String)> {
    let said = |spec: &CollectionSpec| {
        let model = format!("{} (SHA-256 {})", spec.model_name, spec.model_digest);
        let words = [spec.key_rule.to_string(), spec.payload_dtype.to_string(), spec.key_dtype.to_string()];
        let [key_rule, payload, keys] = words;
        let tokenizer = format!("with SHA-256 {}", spec.tokenizer_digest);
        [model, tokenizer, format!("{} tokens", spec.shape.block_tokens), key_rule, payload, keys]
    };
    // The model's name is no part of it.
    let renamed = CollectionSpec { model_name: stored.model_name.clone(), ..offered.clone() };
    let names = ["the model", "the tokenizer", "the block size", "the key rule", "the payload dtype", "the key dtype"];
    let differs = std::iter::zip(said(stored), said(&renamed)).position(|(stored, offered)| stored != offered)?;
    let [stored, offered] = [said(stored), said(offered)].map(|mut said| std::mem::take(&mut said[differs]));
    Some((names[differs], stored, offered))
}

/// What only the model can tell to be out of range.
fn wrong(flag: &'static str, expected: impl ToString, found: impl ToString) -> CliError {
    CliError::Flag { flag, expected: expected.to_string(), found: found.to_string() }
}

/// Numbers and ranges of layers.
pub(super) fn layers(typed: &str) -> Result<Layers, String> {
    let mut layers = Vec::new();
    for item in typed.split(',') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let number = |text: &str| match text.trim().parse::<usize>() {
            Ok(layer) if layer < landmarkdb::limits::LAYERS_MAX as usize => Ok(layer),
            _ => Err(format!("expected numbers and ranges of layers like 1-2,5, found {item:?}")),
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("expected the lower layer of a range first, found {item:?}"));
        }
        layers.resize(layers.len().max(last + 1), false);
        layers[first..=last].fill(true);
    }
    Ok(Layers::These(layers))
}

/// A value by its word on the command line.
pub(super) fn word<T: std::str::FromStr<Err = String>>(typed: &str) -> Result<T, String> {
    typed.parse()
}

/// For `value_parser`: the same where the help lists the words.
pub(super) fn one_of<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: std::str::FromStr<Err = String> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(words).try_map(|typed| word(&typed))
}

/// For `value_parser`: the same with a line for each word.
pub(super) fn explained<T>(words: Explained) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = String> + Clone + Send + Sync + 'static,
{
    let values = words.iter().map(|&(word, about)| PossibleValue::new(word).help(about));
    PossibleValuesParser::new(values).try_map(|typed| word(&typed))
}

/// A command's arguments as they are where nothing but `words` is typed.
///
/// # Panics
/// If the command needs more words.
pub(super) fn typed<A: clap::Args>(words: &[&OsStr]) -> A {
    let command = A::augment_args(clap::Command::new("landmarkdb")).no_binary_name(true);
    let matches = command.try_get_matches_from(words);
    matches.and_then(|matches| A::from_arg_matches(&matches)).expect("every word that the command needs")
}

/// For `value_parser`: FACTORY or FACTORY@EFFORT.
pub(super) fn faiss_index(typed: &str) -> Result<Engine, String> {
    format!("faiss:{typed}").parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_explained() {
        let words = |explained: Explained| explained.iter().map(|(word, _)| *word).collect::<Vec<_>>();
        assert_eq!(words(WINDOW_FROM), CountedFrom::WORDS);
        assert_eq!(words(BLOCK_SCORE), BlockScore::WORDS);
        assert_eq!(words(GRANULARITY), Granularity::WORDS);
        assert_eq!(words(KEY_RULE), KeyRule::WORDS);
        assert_eq!(words(PLACEMENT), Placed::WORDS);
    }

    #[test]
    fn layers_are_numbers_and_ranges() {
        assert_eq!(layers("1"), Ok(Layers::These(vec![false, true])));
        assert_eq!(layers("0, 2-3"), Ok(Layers::These(vec![true, false, true, true])));
        for bad in ["", "a", "1-", "99999999", "1;2"] {
            assert!(layers(bad).unwrap_err().contains("1-2,5"), "{bad:?}");
        }
        assert!(layers("5-2").unwrap_err().contains("lower layer"));
    }
}
