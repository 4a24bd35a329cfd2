//! The training loop: from texts and a recipe to a model folder.
//!
//! The folder holds `tokenizer.json`, `checkpoint.safetensors`, `log.csv` and `log.jsonl` from the beginning, and
//! `model.safetensors`, `config.json` and `README.md` at the end, or an adapter's files in place of the first two. A training
//! that stopped goes on from its checkpoint when the same is asked for again, and ends with the same weights, bit for
//! bit, as if it had not stopped.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Tensor;
use sha2::{Digest, Sha256};

use super::batch::Batch;
use super::card;
use super::checkpoint::{self, Identity, State};
use super::error::TrainError;
use super::job::{Event, Job, StepReport, Trained};
use super::learner::Learner;
use super::log::Log;
use super::mixture::Mixture;
use super::model::Past;
use super::optimizer::{AdamW, Gradients};
use super::schedule::learning_rate;
use super::start;
use super::texts::Texts;
use super::validation::validate;
use landmarkdb::{DType, Sha256Digest};
use landmarkdb_llm::{Tokenizer, replace_file};

/// Steps between two measurements of the loss on answers, which costs a forward pass of its own.
const ANSWER_STEPS: u64 = 25;

/// A training under way.
struct Run<'a> {
    job: &'a Job,
    learner: &'a Learner,
    mixture: Mixture<'a>,
    optimizer: AdamW,
    past: Option<Past>,
    identity: Identity,
    log: Log,
    /// The step of the checkpoint on disk.
    saved_step: Option<u64>,
    trained: Trained,
}

/// Trains until the recipe's steps are done or `stop` is set, and writes the model when they are done.
///
/// # Errors
/// A recipe, texts, a model or a checkpoint that cannot be used, a loss that is no number any more, and those of files.
pub fn train(job: &Job, stop: &AtomicBool, on_event: &mut dyn FnMut(Event)) -> Result<Trained, TrainError> {
    job.recipe.check()?;
    std::fs::create_dir_all(&job.out).map_err(|source| TrainError::Io { path: job.out.clone(), source })?;
    let _lock = lock(&job.out)?;
    start::check_folder(&job.out)?;
    let start = start::start(job, on_event)?;
    on_event(Event::Stage("reading the texts"));
    let texts = Texts::new(&job.texts, &start.tokenizer)?;
    let validation = match &job.validation[..] {
        [] => None,
        held_out => Some(Texts::new(held_out, &start.tokenizer)?),
    };
    let mixture = Mixture::new(&job.recipe, start.learner.config(), &texts, &start.tokenizer)?;
    let mut run = Run::resume(job, &start.learner, &start.tokenizer, mixture)?;
    run.steps(stop, on_event)?;
    if run.trained.finished {
        if let Some(texts) = &validation {
            on_event(Event::Stage("validation"));
            run.trained.validation = Some(validate(&start.learner, &job.recipe, texts)?);
        }
        start.learner.save(&job.out, DType::F16)?;
        let card = card::card(&job.out, start.learner.adapter(), &run.identity, &run.trained);
        let path = job.out.join("README.md");
        replace_file(&path, card.as_bytes()).map_err(|source| TrainError::Io { path, source })?;
    }
    Ok(run.trained)
}

/// The folder, held until this is dropped or the process ends. Its files come and go, so it is locked itself; on a file
/// system that cannot do that, it is not.
fn lock(folder: &Path) -> Result<File, TrainError> {
    let file = File::open(folder).map_err(|source| TrainError::Io { path: folder.into(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TrainError::InUse { path: folder.into() }),
        Err(TryLockError::Error(error)) => {
            tracing::warn!("{} cannot be locked, so nothing keeps a second training out: {error}", folder.display());
            Ok(file)
        }
    }
}

impl<'a> Run<'a> {
    /// From the checkpoint where there is one.
    fn resume(
        job: &'a Job,
        learner: &'a Learner,
        tokenizer: &Tokenizer,
        mixture: Mixture<'a>,
    ) -> Result<Self, TrainError> {
        let recipe = &job.recipe;
        let mut identity: Identity = recipe.values().into_iter().collect();
        let config = learner.config();
        // Of a model that is trained further they are its own.
        let sizes = [
            ("layers", config.layers as usize),
            ("hidden", config.hidden),
            ("heads", config.query_heads as usize),
            ("kv_heads", config.kv_heads as usize),
            ("ffn", config.ffn),
            ("vocab", config.vocab),
        ];
        identity.extend(sizes.map(|(name, size)| (name.to_string(), size.to_string())));
        identity.insert("text digest".into(), format!("{:#}", text_digest(&job.texts)));
        if let Some(adapter) = learner.adapter() {
            // What a checkpoint does not hold.
            identity.insert("base digest".into(), format!("{:#}", adapter.base_digest));
        }
        identity.insert("tokenizer digest".into(), format!("{:#}", tokenizer.digest()));
        let mut optimizer = AdamW::new(learner.parameters(), recipe.beta2, recipe.weight_decay);
        let mut past = None;
        let mut state = State { parameters: learner.parameters(), optimizer: &mut optimizer, past: &mut past };
        let saved_step = checkpoint::load(&job.out.join(checkpoint::FILE), &identity, &mut state)?;
        let done = saved_step.unwrap_or(0);
        let trained = Trained {
            parameters: learner.parameters().iter().map(|parameter| parameter.var.elem_count()).sum(),
            steps: done,
            resumed_steps: done,
            tokens: 0,
            train_s: 0.0,
            loss: None,
            answer_loss: None,
            validation: None,
            finished: false,
        };
        let log = Log::open(&job.out, done)?;
        Ok(Run { job, learner, mixture, optimizer, past, identity, log, saved_step, trained })
    }

    fn steps(&mut self, stop: &AtomicBool, on_event: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let steps = self.job.recipe.steps;
        on_event(Event::Begin { done_steps: self.trained.steps, steps });
        while self.trained.steps < steps && !stop.load(Ordering::Relaxed) {
            let begin = Instant::now();
            let (mut report, tokens) = self.step(self.trained.steps)?;
            let step_s = begin.elapsed().as_secs_f64();
            report.tokens_per_s = tokens as f64 / step_s;
            self.trained.steps += 1;
            self.trained.tokens += tokens as u64;
            self.trained.train_s += step_s;
            self.trained.loss = Some(report.loss);
            self.trained.answer_loss = report.answer_loss.or(self.trained.answer_loss);
            self.log.write(&report)?;
            on_event(Event::Step(&report));
            if self.trained.steps.is_multiple_of(self.job.checkpoint_every) {
                self.save()?;
            }
        }
        if self.saved_step != Some(self.trained.steps) {
            self.save()?;
        }
        self.trained.finished = self.trained.steps == steps;
        Ok(())
    }

    /// One update, and how many tokens it was made from.
    fn step(&mut self, step: u64) -> Result<(StepReport, usize), TrainError> {
        let recipe = &self.job.recipe;
        let (_, first_step) = recipe.phase(step);
        let read = self.mixture.step(step)?;
        let answer_loss = match (step + 1).is_multiple_of(ANSWER_STEPS) || step + 1 == recipe.steps {
            true => self.answer_loss(&read.batch, read.answers)?,
            false => None,
        };
        if step == first_step {
            // Sequences of another phase are others, and so many more or fewer.
            self.past = None;
        }
        let loss = self.learner.loss(recipe, step, &read.batch, &mut self.past)?;
        let (value, gradients, gradient_norm) = self.differentiate(step, &loss)?;
        let scale = (recipe.clip / gradient_norm.max(recipe.clip)).min(1.0);
        let learning_rate = learning_rate(recipe, step);
        self.optimizer.step(self.learner.parameters(), &gradients, scale, learning_rate)?;
        let report =
            StepReport { step: step + 1, loss: value, answer_loss, learning_rate, gradient_norm, tokens_per_s: 0.0 };
        Ok((report, read.batch.ids.len()))
    }

    /// The loss on the digits of first answers only; none in a batch without any.
    fn answer_loss(&self, batch: &Batch, weights: Vec<f32>) -> Result<Option<f32>, TrainError> {
        if weights.iter().all(|&weight| weight == 0.0) {
            return Ok(None);
        }
        let loss = self.learner.measured_loss(&Batch { weights, ..batch.clone() })?;
        Ok(loss.map(|loss| loss.to_scalar()).transpose()?)
    }

    /// Refuses a number that would spoil the weights. The checkpoint on disk is from before, and was [judged](Self::judge).
    fn finite(&self, step: u64, what: &'static str, value: f64) -> Result<(), TrainError> {
        match value.is_finite() {
            true => Ok(()),
            false => Err(TrainError::NotFinite { step: step + 1, what, value, checkpoint: self.saved_step }),
        }
    }

    /// The value of a loss, its gradients and their length.
    fn differentiate(&self, step: u64, loss: &Tensor) -> Result<(f32, Gradients, f64), TrainError> {
        let value = loss.to_scalar::<f32>()?;
        self.finite(step, "loss", value as f64)?;
        let gradients = Gradients::take(&loss.backward()?, self.learner.parameters())?;
        let gradient_norm = gradients.norm();
        self.finite(step, "length of the gradient", gradient_norm)?;
        Ok((value, gradients, gradient_norm))
    }

    /// Refuses weights that the last update ruined, so that the checkpoint before them stands: the same batch must still
    /// have a loss and a gradient.
    fn judge(&self) -> Result<(), TrainError> {
        let last = self.trained.steps.saturating_sub(1);
        if let Some(loss) = self.learner.measured_loss(&self.mixture.step(last)?.batch)? {
            self.differentiate(last, &loss)?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.judge()?;
        let state =
            State { parameters: self.learner.parameters(), optimizer: &mut self.optimizer, past: &mut self.past };
        checkpoint::save(&self.job.out.join(checkpoint::FILE), self.trained.steps, &self.identity, &state)?;
        self.saved_step = Some(self.trained.steps);
        Ok(())
    }
}

/// Of all texts, one after the other, with their lengths.
fn text_digest(texts: &[String]) -> Sha256Digest {
    let mut hasher = Sha256::new();
    for text in texts {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    Sha256Digest(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::train::job::Base;
    use crate::train::recipe::tests::tiny;
    use crate::train::recipe::{Kind, Recipe};
    use crate::train::validation::Validation;
    use crate::train::vocabulary::tests::prose;
    use landmarkdb_llm::{Landmark, LoadedModel};

    fn job(out: &Path, recipe: Recipe) -> Job {
        let (texts, validation) = (vec![prose(60_000)], vec![prose(70_000)[60_000..].into()]);
        Job { out: out.into(), recipe, texts, validation, from: None, checkpoint_every: 5 }
    }

    fn base(path: &Path) -> Base {
        Base { name: path.display().to_string(), path: path.into() }
    }

    fn finish(job: &Job) -> Trained {
        let trained = train(job, &AtomicBool::new(false), &mut |_| {}).unwrap();
        assert!(trained.finished);
        trained
    }

    fn failure(job: &Job) -> TrainError {
        train(job, &AtomicBool::new(false), &mut |_| {}).unwrap_err()
    }

    /// The log without its last column, the speed.
    fn log(out: &Path) -> Vec<String> {
        let log = fs::read_to_string(out.join("log.csv")).unwrap();
        log.lines().map(|line| line.rsplit_once(',').unwrap().0.to_string()).collect()
    }

    fn copy_folder(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }

    #[test]
    fn a_resumed_training_equals_an_uninterrupted_one() {
        let landmark = Recipe { group_dropout: 0.2, pos_jump: 4, ..tiny() };
        let recurrent = Recipe { kind: Kind::Recurrent, passkey_share: 0.0, ..tiny() };
        for recipe in [landmark, recurrent] {
            let folder = tempfile::tempdir().unwrap();
            let [whole, killed, stopped] = ["whole", "killed", "stopped"].map(|name| folder.path().join(name));
            let stop = AtomicBool::new(false);
            // A copy of the folder after 13 steps is what a kill would have left, with the checkpoint of step 10.
            let trained = train(&job(&whole, recipe.clone()), &stop, &mut |event| {
                if matches!(event, Event::Step(report) if report.step == 13) {
                    copy_folder(&whole, &killed);
                }
            });
            let trained = trained.unwrap();
            assert_eq!((trained.steps, trained.resumed_steps), (20, 0));
            let Some(Validation::Prediction { perplexity, .. }) = trained.validation else { panic!("{trained:?}") };
            assert!((2.0..300.0).contains(&perplexity), "{perplexity}");

            let resumed = finish(&job(&killed, recipe.clone()));
            assert_eq!((resumed.steps, resumed.resumed_steps), (20, 10));

            let unfinished = train(&job(&stopped, recipe.clone()), &stop, &mut |event| {
                if matches!(event, Event::Step(report) if report.step == 7) {
                    stop.store(true, Ordering::Relaxed);
                }
            });
            let unfinished = unfinished.unwrap();
            assert_eq!((unfinished.steps, unfinished.finished), (7, false));
            assert!(!stopped.join("model.safetensors").exists());
            assert_eq!(finish(&job(&stopped, recipe)).resumed_steps, 7);

            for other in [&killed, &stopped] {
                for file in ["model.safetensors", "config.json", "tokenizer.json", "README.md"] {
                    let read = |folder: &Path| fs::read(folder.join(file)).unwrap();
                    let name = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).replacen("whole", "", 1);
                    if file == "README.md" {
                        let (card, other_card) = (name(read(&whole)), name(read(other)));
                        assert_eq!(
                            card.lines().skip(1).collect::<Vec<_>>(),
                            other_card.lines().skip(1).collect::<Vec<_>>()
                        );
                    } else {
                        assert!(read(&whole) == read(other), "{file} of {other:?}");
                    }
                }
                assert_eq!(log(&whole), log(other));
            }
        }
    }

    #[test]
    fn training_lowers_the_loss_and_leaves_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path(), tiny());
        let mut losses = Vec::new();
        let trained = train(&job, &AtomicBool::new(false), &mut |event| {
            if let Event::Step(report) = event {
                losses.push(report.loss);
            }
        });
        let trained = trained.unwrap();
        assert_eq!(losses.len(), 20);
        assert!(losses[19] < 0.9 * losses[0], "{losses:?}");
        assert!(trained.answer_loss.is_some(), "the last step measures it");
        assert_eq!(trained.tokens, 10 * 2 * (180 + 216));

        let model = LoadedModel::open(folder.path()).unwrap();
        assert_eq!(model.config().landmark, Some(Landmark { id: 299, block_tokens: 9, hidden: false }));
        assert_eq!((model.config().context_tokens, &model.config().eos_ids[..]), (216, &[0][..]));
        assert_eq!(model.tokenizer.vocab(), 300);
        // Asked again it has nothing left to do.
        let again = finish(&job);
        assert_eq!((again.resumed_steps, again.tokens, again.validation), (20, 0, trained.validation));
    }

    #[test]
    fn a_loss_that_is_no_number_stops_and_keeps_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let recipe = Recipe { lr: 1e30, warmup: 0, clip: f64::INFINITY, ..tiny() };
        let job = Job { checkpoint_every: 1, ..job(folder.path(), recipe) };
        let error = failure(&job);
        // The weights of the first step are ruined, so they never become a checkpoint.
        assert!(matches!(error, TrainError::NotFinite { step: 1, checkpoint: None, .. }), "{error}");
        assert!(!folder.path().join(checkpoint::FILE).exists());

        // A checkpoint from before stands: here one weight is ruined by hand.
        let folder = tempfile::tempdir().unwrap();
        let job = Job { checkpoint_every: 1, ..self::job(folder.path(), tiny()) };
        let start = start::start(&job, &mut |_| {}).unwrap();
        let texts = Texts::new(&job.texts, &start.tokenizer).unwrap();
        let mixture = Mixture::new(&job.recipe, start.learner.config(), &texts, &start.tokenizer).unwrap();
        let mut run = Run::resume(&job, &start.learner, &start.tokenizer, mixture).unwrap();
        run.save().unwrap();
        let saved = fs::read(folder.path().join(checkpoint::FILE)).unwrap();
        let weights = &start.learner.parameters()[0].var;
        weights.set(&weights.affine(f64::NAN, 0.0).unwrap()).unwrap();
        let error = run.save().unwrap_err();
        assert!(matches!(error, TrainError::NotFinite { checkpoint: Some(0), .. }), "{error}");
        assert!(fs::read(folder.path().join(checkpoint::FILE)).unwrap() == saved);
    }

    #[test]
    fn a_folder_with_another_model_is_left_alone() {
        for file in ["config.json", "adapter_config.json", "README.md"] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(file), "{}").unwrap();
            fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
            let refused = failure(&job(folder.path(), tiny()));
            assert!(matches!(refused, TrainError::FolderTaken { file: found, .. } if found == file), "{refused}");
            assert_eq!(fs::read_to_string(folder.path().join("tokenizer.json")).unwrap(), "{}");
        }
    }

    #[test]
    fn what_cannot_be_trained_on_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let good = job(folder.path(), tiny());
        let with_texts = |text: &str| failure(&Job { texts: vec![text.into()], ..good.clone() });
        assert!(matches!(with_texts(""), TrainError::NoText));
        // Repeated enough for a vocabulary, and still shorter than a sequence.
        let short = with_texts(&"one two three four five six seven eight nine ten ".repeat(3));
        assert!(matches!(short, TrainError::TextTooShort { .. } | TrainError::VocabularyTooLarge { .. }), "{short}");
        let held = lock(folder.path()).unwrap();
        assert!(matches!(failure(&good), TrainError::InUse { path } if path == folder.path()));
        drop(held);
        let no_validation = failure(&Job { validation: vec!["too short".into()], ..good.clone() });
        assert!(matches!(no_validation, TrainError::TextTooShort { .. }), "{no_validation}");

        finish(&good);
        let other = failure(&Job { recipe: Recipe { seed: 2, ..tiny() }, ..good.clone() });
        assert!(other.to_string().contains("seed: 1 there, 2 here"), "{other}");
        let other_text = failure(&Job { texts: vec![prose(61_000)], ..good.clone() });
        assert!(other_text.to_string().contains("text digest"), "{other_text}");
        let checkpoint = folder.path().join(checkpoint::FILE);
        let bytes = fs::read(&checkpoint).unwrap();
        fs::write(&checkpoint, &bytes[..bytes.len() / 2]).unwrap();
        assert!(matches!(failure(&good), TrainError::CheckpointDamaged { .. }));
    }

    #[test]
    fn a_tokenizer_without_a_landmark_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path(), tiny());
        finish(&job);
        let path = folder.path().join("tokenizer.json");
        let json = fs::read_to_string(&path).unwrap();
        fs::write(&path, json.replace("<landmark>", "<marker>")).unwrap();
        let error = failure(&job);
        assert!(matches!(error, TrainError::Invalid { field: "tokenizer.json", .. }), "{error}");
    }

    #[test]
    fn a_plain_model_is_trained_further_into_one_with_landmarks() {
        let folder = tempfile::tempdir().unwrap();
        let [plain, landmark, other] = ["plain", "landmark", "other"].map(|name| folder.path().join(name));
        finish(&job(&plain, Recipe { kind: Kind::Plain, ..tiny() }));
        assert_eq!(LoadedModel::open(&plain).unwrap().config().landmark, None);

        let named = |name: &str| Recipe { from: Some(name.into()), ..tiny() };
        finish(&Job { from: Some(base(&plain)), ..job(&landmark, named("plain")) });
        let config = LoadedModel::open(&landmark).unwrap().config().clone();
        assert_eq!(config.landmark, Some(Landmark { id: 299, block_tokens: 9, hidden: false }));

        // A tokenizer that knows no landmark gets one, behind its last token.
        let unknowing = folder.path().join("unknowing");
        copy_folder(&plain, &unknowing);
        let path = unknowing.join("tokenizer.json");
        fs::write(&path, fs::read_to_string(&path).unwrap().replace("<landmark>", "<marker>")).unwrap();
        let taught = folder.path().join("taught");
        finish(&Job { from: Some(base(&unknowing)), ..job(&taught, named("unknowing")) });
        let model = LoadedModel::open(&taught).unwrap();
        assert_eq!(model.config().landmark, Some(Landmark { id: 300, block_tokens: 9, hidden: false }));
        assert_eq!((model.tokenizer.token_id("<landmark>"), model.config().vocab), (Some(300), 301));

        let further = |recipe| failure(&Job { from: Some(base(&landmark)), ..job(&other, recipe) });
        let blocks = further(Recipe { block_tokens: 8, ..named("landmark") });
        assert!(matches!(blocks, TrainError::Invalid { field: "block_tokens", .. }), "{blocks}");
        let no_landmarks = further(Recipe { kind: Kind::Plain, ..named("landmark") });
        assert!(matches!(no_landmarks, TrainError::Invalid { field: "from", .. }), "{no_landmarks}");
    }

    #[test]
    fn an_adapter_is_trained_beside_a_base_that_stays() {
        let folder = tempfile::tempdir().unwrap();
        let [plain, whole, stopped, other] =
            ["plain", "whole", "stopped", "other"].map(|name| folder.path().join(name));
        finish(&job(&plain, Recipe { kind: Kind::Plain, ..tiny() }));
        let weights = fs::read(plain.join("model.safetensors")).unwrap();

        let recipe = || Recipe { from: Some("plain".into()), adapter: Some(4), adapter_alpha: Some(8.0), ..tiny() };
        let adapted = |out: &Path| Job { from: Some(base(&plain)), ..job(out, recipe()) };
        let trained = finish(&adapted(&whole));
        // The landmark; queries and outputs of the first layer, keys of the second.
        let (query, key, output) = (4 * (16 + 16), 4 * (16 + 8), 4 * (16 + 16));
        assert_eq!(trained.parameters, 16 + query + key + output);
        let Some(Validation::Choice { shared, by_chance, top_k: 4, choices }) = trained.validation else {
            panic!("{trained:?}")
        };
        assert!(shared > by_chance && choices > 1000, "{:?}", trained.validation);
        let stop = AtomicBool::new(false);
        let unfinished = train(&adapted(&stopped), &stop, &mut |event| {
            if matches!(event, Event::Step(report) if report.step == 7) {
                stop.store(true, Ordering::Relaxed);
            }
        });
        assert!(!unfinished.unwrap().finished && !stopped.join("adapter_config.json").exists());
        assert_eq!(finish(&adapted(&stopped)).resumed_steps, 7);
        for file in ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"] {
            assert!(fs::read(whole.join(file)).unwrap() == fs::read(stopped.join(file)).unwrap(), "{file}");
        }
        assert_eq!(log(&whole), log(&stopped));
        assert!(fs::read_to_string(whole.join("README.md")).unwrap().contains("An adapter that gives"));
        assert!(!whole.join("model.safetensors").exists());
        assert!(fs::read(plain.join("model.safetensors")).unwrap() == weights);

        let model = LoadedModel::open(&whole).unwrap();
        assert_eq!(model.config().landmark, Some(Landmark { id: 299, block_tokens: 9, hidden: true }));
        assert_ne!(model.model_digest, LoadedModel::open(&plain).unwrap().model_digest);
        let of_adapter = failure(&Job { from: Some(base(&whole)), ..job(&other, recipe()) });
        assert!(matches!(of_adapter, TrainError::Invalid { field: "from", .. }), "{of_adapter}");
        let large = failure(&Job { from: Some(base(&plain)), ..job(&other, Recipe { adapter: Some(9), ..recipe() }) });
        assert!(matches!(large, TrainError::Invalid { field: "adapter", .. }), "{large}");

        fs::remove_dir_all(&plain).unwrap();
        finish(&job(&plain, Recipe { kind: Kind::Plain, seed: 2, ..tiny() }));
        let other_base = failure(&adapted(&stopped));
        assert!(other_base.to_string().contains("base digest"), "{other_base}");
    }
}
