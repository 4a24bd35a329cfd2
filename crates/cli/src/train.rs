//! `landmarkdb train`: a small landmark model from texts.

use std::io::{self, Write};
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use landmarkdb_lab::train::{self, Base, Event, Job, Kind, Phase, Recipe, Trained, Validation};
use landmarkdb_llm as model;

use super::Context;
use super::encode::read;
use super::error::CliError;
use super::output::{Report, count, plural, write_facts};
use super::signals::Listening;

/// Train a small landmark model on texts, on the CPU.
///
/// Sequences are passkey documents (a key hidden in irrelevant text, and questions about it) and windows of the texts.
/// OUT becomes a model folder that every other command reads. When interrupted, the training goes on from its last
/// checkpoint when the same command is run again, and ends with the same weights as if it had not stopped.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb train my-austen --text corpus/train/*.txt --validation corpus/validation/*.txt
  landmarkdb train my-plain --plain --text corpus/train/*.txt
  landmarkdb train my-more --from models/austen --lr 1e-3 --phases 60:2:1 --steps 600 --text corpus/train/*.txt
  landmarkdb train smollm2-landmark --from smollm2 --adapter 16 --text corpus/train/*.txt
  landmarkdb train tiny --text texts/persuasion.txt --steps 100 --phases 8:4:1 --json
")]
pub(super) struct Args {
    /// The folder of the model; a training that stopped there goes on.
    out: PathBuf,

    /// UTF-8 texts to train on.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,

    /// UTF-8 texts for validation, not trained on.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    validation: Vec<PathBuf>,

    /// Steps between two checkpoints.
    #[arg(long, value_name = "STEPS", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: u64,

    /// Seed of everything random: weights, sequences, position jumps, dropped blocks.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    #[command(flatten)]
    shape: ShapeArgs,

    #[command(flatten)]
    reading: ReadingArgs,

    #[command(flatten)]
    learning: LearningArgs,
}

/// What is trained.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "The model")]
struct ShapeArgs {
    /// Start from this model instead of random weights: a name, a .gguf file or a safetensors folder.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["layers", "hidden", "heads", "kv_heads", "ffn", "vocab"])]
    from: Option<String>,

    /// Leave the model as it is and train landmark keys for it: a token that only the index reads, and updates of this
    /// rank for it alone (LoRA). One key per block is trained to choose as all its token keys do. OUT is a small adapter, which
    /// needs the model that it starts from.
    #[arg(long, value_name = "RANK", requires = "from", conflicts_with_all = ["plain", "recurrent"])]
    adapter: Option<usize>,

    /// LoRA alpha: updates are scaled by alpha / rank [default: twice the rank]
    #[arg(long, value_name = "ALPHA", requires = "adapter")]
    adapter_alpha: Option<f32>,

    /// No landmarks: the ordinary twin, on sequences of as many tokens.
    #[arg(long)]
    plain: bool,

    /// The ordinary twin on consecutive windows, keeping K and V of the window before (Transformer-XL).
    #[arg(long, conflicts_with_all = ["plain", "passkey_share"])]
    recurrent: bool,

    /// Layers.
    #[arg(long, default_value_t = 3)]
    layers: u32,

    /// Width of the residual stream.
    #[arg(long, value_name = "WIDTH", default_value_t = 128)]
    hidden: usize,

    /// Query heads.
    #[arg(long, default_value_t = 4)]
    heads: u32,

    /// KV heads.
    #[arg(long, value_name = "HEADS", default_value_t = 2)]
    kv_heads: u32,

    /// Width of the feed-forward network.
    #[arg(long, value_name = "WIDTH", default_value_t = 256)]
    ffn: usize,

    /// Tokens of the vocabulary that is made from the texts.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    vocab: usize,

    /// Tokens of a block, the landmark included [default: 17, with --adapter 64]
    #[arg(long, value_name = "TOKENS")]
    block_tokens: Option<u32>,
}

/// What is read.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "What it reads")]
struct ReadingArgs {
    /// Share of sequences that are passkey documents; the others are windows of the texts [default: 0.5, with --adapter
    /// 0.6]
    #[arg(long, value_name = "SHARE")]
    passkey_share: Option<f64>,

    /// Parts of the steps, with sequences of growing length: BLOCKS:SEQUENCES:SHARE each [default:
    /// 8:16:35,16:8:35,30:4:30, with --adapter 32:1:1]
    #[arg(long, value_delimiter = ',', value_name = "PHASES")]
    phases: Option<Vec<Phase>>,

    /// Weight in the loss of a key's digit that can be known, against 1 of any other token [default: 10, with --adapter
    /// 20]
    #[arg(long, value_name = "WEIGHT")]
    answer_weight: Option<f32>,

    /// At each landmark, let positions jump by a random number below this.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pos_jump: u32,
}

/// How it learns.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "How it learns")]
struct LearningArgs {
    /// Training steps [default: 7200, with --adapter 400]
    #[arg(long)]
    steps: Option<u64>,

    /// Peak learning rate [default: 0.002, with --adapter 0.001]
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,

    /// Warm-up steps of the learning rate [default: 150, with --adapter 20]
    #[arg(long, value_name = "STEPS")]
    warmup: Option<u64>,

    /// Final learning rate, as a share of its peak.
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    lr_floor: f64,

    /// Weight decay, not applied to norms and the embedding.
    #[arg(long, value_name = "RATE", default_value_t = 0.05)]
    weight_decay: f64,

    /// Adam's beta2, the decay of squared gradients.
    #[arg(long, default_value_t = 0.98)]
    beta2: f64,

    /// Gradient clipping: maximum norm.
    #[arg(long, value_name = "LENGTH", default_value_t = 1.0)]
    clip: f64,

    /// Dropout of retrieved blocks, per query.
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    group_dropout: f32,
}

/// What suits a whole small model does not suit landmark keys of a model that exists.
struct Defaults {
    block_tokens: u32,
    passkey_share: f64,
    phases: &'static [Phase],
    answer_weight: f32,
    steps: u64,
    lr: f64,
    warmup: u64,
}

/// The circuit that copies forms in sequences of 128 tokens; then they may grow.
const WHOLE_MODEL: Defaults = Defaults {
    block_tokens: 17,
    passkey_share: 0.5,
    phases: &[phase(8, 16, 35.0), phase(16, 8, 35.0), phase(30, 4, 30.0)],
    answer_weight: 10.0,
    steps: 7200,
    lr: 2e-3,
    warmup: 150,
};

/// docs/landmark-keys.md has what these lead to.
const ADAPTER: Defaults = Defaults {
    block_tokens: 64,
    passkey_share: 0.6,
    phases: &[phase(32, 1, 1.0)],
    answer_weight: 20.0,
    steps: 400,
    lr: 1e-3,
    warmup: 20,
};

const fn phase(blocks: usize, sequences: usize, share: f64) -> Phase {
    Phase { blocks, sequences, share }
}

/// A model that was trained.
#[derive(Debug, Serialize)]
struct TrainReport {
    /// What `--model` takes.
    path: String,
    parameters: usize,
    steps: u64,
    /// Steps that an earlier run had done.
    resumed_steps: u64,
    /// Tokens read in this run, landmarks included.
    tokens: u64,
    train_s: f64,
    tokens_per_s: f64,
    /// Of the last step, in nats.
    loss: Option<f32>,
    /// On the digits of first answers, in nats.
    answer_loss: Option<f32>,
    /// On the validation texts.
    validation: Option<Validation>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let texts = |files: &[PathBuf]| files.iter().map(|file| read(file)).collect::<Result<Vec<_>, _>>();
    let from = match &args.shape.from {
        Some(name) => Some(base(name)?),
        None => None,
    };
    let job = Job {
        out: args.out.clone(),
        recipe: args.recipe(from.as_ref().map(|base| base.path.as_path())),
        texts: texts(&args.text)?,
        validation: texts(&args.validation)?,
        from,
        checkpoint_every: args.checkpoint_every,
    };
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = stop.clone();
    let _listening = Listening::begin(move || stopping.store(true, Ordering::Relaxed))?;
    let bar = step_bar(context);
    let trained = train::train(&job, &stop, &mut |event| show(&bar, event));
    bar.finish_and_clear();
    let trained = trained?;
    if !trained.finished {
        return Err(CliError::TrainingStopped { done: trained.steps, steps: job.recipe.steps });
    }
    context.output.print(&TrainReport::new(&args.out, &trained))
}

impl Args {
    fn recipe(&self, from: Option<&Path>) -> Recipe {
        let Args { shape, reading, learning, .. } = self;
        let kind = match (shape.recurrent, shape.plain) {
            (true, _) => Kind::Recurrent,
            (false, true) => Kind::Plain,
            (false, false) => Kind::Landmark,
        };
        let defaults = if shape.adapter.is_some() { &ADAPTER } else { &WHOLE_MODEL };
        let passkey_share = reading.passkey_share.unwrap_or(defaults.passkey_share);
        Recipe {
            kind,
            from: from.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()),
            adapter: shape.adapter,
            adapter_alpha: shape.adapter.map(|rank| shape.adapter_alpha.unwrap_or(2.0 * rank as f32)),
            layers: shape.layers,
            hidden: shape.hidden,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            ffn: shape.ffn,
            vocab: shape.vocab,
            block_tokens: shape.block_tokens.unwrap_or(defaults.block_tokens),
            // Passkey documents have no order that a past could go on.
            passkey_share: if shape.recurrent { 0.0 } else { passkey_share },
            answer_weight: reading.answer_weight.unwrap_or(defaults.answer_weight),
            pos_jump: reading.pos_jump,
            phases: reading.phases.clone().unwrap_or_else(|| defaults.phases.to_vec()),
            steps: learning.steps.unwrap_or(defaults.steps),
            lr: learning.lr.unwrap_or(defaults.lr),
            warmup: learning.warmup.unwrap_or(defaults.warmup),
            lr_floor: learning.lr_floor,
            weight_decay: learning.weight_decay,
            beta2: learning.beta2,
            clip: learning.clip,
            group_dropout: learning.group_dropout,
            seed: self.seed,
        }
    }
}

/// The model that a training starts from. An adapter remembers its name, so a path must mean the same from everywhere.
fn base(name: &str) -> Result<Base, CliError> {
    let path = model::resolve(name)?;
    let name = match path == Path::new(name) {
        true => absolute(&path).map_err(|source| CliError::Io { what: "finding the model", source })?,
        false => PathBuf::from(name),
    };
    Ok(Base { name: name.display().to_string(), path })
}

fn step_bar(context: &Context) -> ProgressBar {
    let template = "{msg} {wide_bar} {human_pos} of {human_len} steps {eta:>4}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    context.output.bar("", style)
}

fn show(bar: &ProgressBar, event: Event) {
    match event {
        Event::Stage(what) => {
            tracing::info!("{what}");
            bar.set_message(what);
            bar.tick();
        }
        Event::Begin { done_steps, steps } => {
            bar.set_length(steps);
            bar.set_position(done_steps);
            // What an earlier run did does not count towards the speed.
            bar.reset_eta();
        }
        Event::Step(report) => {
            bar.set_position(report.step);
            bar.set_message(format!("loss {:.3}, {:.0} tokens/s", report.loss, report.tokens_per_s));
            if let Some(answer_loss) = report.answer_loss {
                let (step, loss, speed) = (report.step, report.loss, report.tokens_per_s);
                tracing::info!("step {step}: loss {loss:.3}, on answers {answer_loss:.4}, {speed:.0} tokens/s");
            }
        }
    }
}

impl TrainReport {
    fn new(out: &Path, trained: &Trained) -> Self {
        TrainReport {
            path: out.display().to_string(),
            parameters: trained.parameters,
            steps: trained.steps,
            resumed_steps: trained.resumed_steps,
            tokens: trained.tokens,
            train_s: trained.train_s,
            tokens_per_s: if trained.tokens == 0 { 0.0 } else { trained.tokens as f64 / trained.train_s },
            loss: trained.loss,
            answer_loss: trained.answer_loss,
            validation: trained.validation,
        }
    }
}

impl Report for TrainReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let steps = match self.resumed_steps {
            0 => count(self.steps),
            resumed => format!("{}, {} of them before", count(self.steps), count(resumed)),
        };
        let mut facts = vec![
            ("model", self.path.clone()),
            ("parameters", count(self.parameters as u64)),
            ("steps", steps),
            ("tokens", count(self.tokens)),
            ("time", format!("{:.1} s ({:.0} tokens/s)", self.train_s, self.tokens_per_s)),
        ];
        facts.extend(self.loss.map(|loss| ("loss", format!("{loss:.3}"))));
        facts.extend(self.answer_loss.map(|loss| ("loss on answers", format!("{loss:.4}"))));
        facts.extend(self.validation.map(|validation| match validation {
            Validation::Prediction { perplexity, counted_tokens } => {
                ("perplexity", format!("{perplexity:.2} over {} of validation", plural(counted_tokens as u64, "token")))
            }
            Validation::Choice { shared, by_chance, top_k, choices } => (
                "choices",
                format!(
                    "{:.1} % of the {top_k} blocks that token keys choose ({:.1} % by chance), over {} choices in validation",
                    100.0 * shared,
                    100.0 * by_chance,
                    count(choices as u64)
                ),
            ),
        }));
        write_facts(to, &facts)
    }
}
