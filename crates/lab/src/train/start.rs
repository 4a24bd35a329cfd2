//! What a training begins with: a tokenizer and a model, made or taken from another model.

use std::path::Path;

use super::adapter::AdapterModel;
use super::checkpoint;
use super::error::TrainError;
use super::job::{Event, Job};
use super::learner::Learner;
use super::model::{TrainingModel, check_plain};
use super::recipe::{Kind, Recipe};
use super::vocabulary::{END_OF_TEXT, LANDMARK, train_vocabulary};
use landmarkdb::Rope;
use landmarkdb_llm::{Adapter, Architecture, Landmark, LoadedModel, ModelConfig, Tokenizer, is_adapter, replace_file};

/// Added to the mean square in RMS normalisation of a new model.
const NORM_EPSILON: f32 = 1e-5;

/// Base of a new model's rotation.
const ROPE_BASE: f64 = 10_000.0;

pub(super) struct Start {
    pub(super) tokenizer: Tokenizer,
    pub(super) learner: Learner,
}

/// Files that a finished training leaves, and other models have: without a checkpoint beside them they are not ours to
/// replace.
const FINISHED: [&str; 5] =
    ["config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", "README.md"];

/// Refuses a folder with a model in it that no checkpoint belongs to.
pub(super) fn check_folder(out: &Path) -> Result<(), TrainError> {
    if out.join(checkpoint::FILE).exists() {
        return Ok(());
    }
    match FINISHED.into_iter().find(|file| out.join(file).exists()) {
        None => Ok(()),
        Some(file) => Err(TrainError::FolderTaken { path: out.into(), file }),
    }
}

/// Leaves `tokenizer.json` in the folder. One that belongs to a checkpoint there is used as it is.
pub(super) fn start(job: &Job, on_event: &mut dyn FnMut(Event)) -> Result<Start, TrainError> {
    let path = job.out.join("tokenizer.json");
    let resumes = path.exists() && job.out.join(checkpoint::FILE).exists();
    let write = |json: String| {
        replace_file(&path, json.as_bytes()).map_err(|source| TrainError::Io { path: path.clone(), source })
    };
    let Some(base) = &job.from else {
        if !resumes {
            on_event(Event::Stage("making the vocabulary"));
            write(train_vocabulary(&job.texts, job.recipe.vocab)?)?;
        }
        let tokenizer = Tokenizer::open(&path)?;
        let model = TrainingModel::new(new_config(&job.recipe, &tokenizer)?, job.recipe.seed)?;
        return Ok(Start { tokenizer, learner: Learner::Whole(Box::new(model)) });
    };
    if is_adapter(&base.path) {
        return Err(TrainError::Invalid {
            field: "from",
            expected: "a whole model".into(),
            found: format!("{}, an adapter", base.name),
        });
    }
    on_event(Event::Stage("loading the model"));
    let known = LoadedModel::open(&base.path)?;
    check_plain(known.config())?;
    let landmark = landmark_of(&job.recipe, known.config(), &known.tokenizer)?;
    if !resumes {
        // What only the index reads is no token of texts.
        let control = landmark.filter(|_| job.recipe.adapter.is_none()).map(|_| LANDMARK);
        write(known.tokenizer.to_json(control)?)?;
    }
    let learner = match (job.recipe.adapter.zip(job.recipe.adapter_alpha), landmark) {
        (Some((rank, alpha)), Some(Landmark { id, block_tokens, .. })) => {
            let (base_name, base_digest) = (base.name.clone(), known.model_digest);
            let adapter = Adapter { base: base_name, base_digest, rank, alpha, landmark: id, block_tokens };
            Learner::Adapter(Box::new(AdapterModel::open(&base.path, known.llama, adapter, job.recipe.seed)?))
        }
        (_, landmark) => {
            drop(known);
            Learner::Whole(Box::new(TrainingModel::open(&base.path, landmark)?))
        }
    };
    Ok(Start { tokenizer: Tokenizer::open(&path)?, learner })
}

fn new_config(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<ModelConfig, TrainError> {
    let token = |name: &'static str| {
        tokenizer.token_id(name).ok_or_else(|| TrainError::Invalid {
            field: "tokenizer.json",
            expected: format!("a token {name}"),
            found: "none: remove the folder to begin anew".into(),
        })
    };
    let head_dim = recipe.hidden as u32 / recipe.heads;
    let landmark = Landmark { id: token(LANDMARK)?, block_tokens: recipe.block_tokens, hidden: false };
    Ok(ModelConfig {
        layers: recipe.layers,
        query_heads: recipe.heads,
        kv_heads: recipe.kv_heads,
        head_dim,
        hidden: recipe.hidden,
        ffn: recipe.ffn,
        vocab: tokenizer.vocab(),
        context_tokens: recipe.longest_tokens() as u32,
        norm_epsilon: NORM_EPSILON,
        rope: Rope::from_base(ROPE_BASE, head_dim as usize),
        tied_output: true,
        eos_ids: vec![token(END_OF_TEXT)?],
        landmark: (recipe.kind == Kind::Landmark).then_some(landmark),
        architecture: Architecture::default(),
    })
}

/// The landmark to give to a model that is trained further: none if it is to have none or has it already. A tokenizer
/// made here keeps a token for it.
fn landmark_of(recipe: &Recipe, config: &ModelConfig, tokenizer: &Tokenizer) -> Result<Option<Landmark>, TrainError> {
    let wrong = |field, expected: String, found: String| Err(TrainError::Invalid { field, expected, found });
    match (recipe.kind, config.landmark) {
        (Kind::Plain | Kind::Recurrent, None) => Ok(None),
        (kind @ (Kind::Plain | Kind::Recurrent), Some(_)) => {
            wrong("from", format!("a model without landmarks, for a {kind:?} one"), "one with landmarks".into())
        }
        (Kind::Landmark, known @ Some(_)) if recipe.adapter.is_some() => Ok(known),
        (Kind::Landmark, Some(known)) if known.block_tokens != recipe.block_tokens => {
            wrong("block_tokens", format!("{}, as the model has", known.block_tokens), recipe.block_tokens.to_string())
        }
        (Kind::Landmark, Some(_)) => Ok(None),
        (Kind::Landmark, None) => {
            // An adapter's landmark needs no name; another becomes the tokenizer's next token.
            let next = if recipe.adapter.is_some() { config.vocab } else { tokenizer.vocab() };
            let id = tokenizer.token_id(LANDMARK).unwrap_or(next as u32);
            Ok(Some(Landmark { id, block_tokens: recipe.block_tokens, hidden: false }))
        }
    }
}
