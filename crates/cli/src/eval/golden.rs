//! `landmarkdb eval golden`.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use crate::Context;
use crate::error::CliError;
use crate::output::{Report, count, table, write_table};
use crate::settings::ModelArgs;
use landmarkdb_lab::eval::{self, GoldenOutput};

/// Check recorded cases: outputs of the paper's own code, of Hugging Face, or of yours.
///
/// Runs every case of a folder and prints the largest difference of each output; docs/golden.md describes the format.
/// Model cases keep their blocks in a temporary directory unless --data or --connect is given. Fails when an output
/// differs by more than its tolerance.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb eval golden tests/golden
  landmarkdb eval golden tests/golden --connect http://127.0.0.1:7601
  landmarkdb eval golden my-cases --no-prompts --json
")]
pub(crate) struct Args {
    /// The folder with the cases.
    folder: PathBuf,

    /// Skip recorded prompts, which need the model that they were recorded with.
    #[arg(long)]
    no_prompts: bool,

    #[command(flatten)]
    model: ModelArgs,
}

/// What was compared.
#[derive(Debug, Serialize)]
struct GoldenReport {
    outputs: Vec<Output>,
}

#[derive(Debug, Serialize)]
struct Output {
    case: String,
    output: String,
    /// Numbers compared.
    numbers: usize,
    /// The largest difference; for ids, how many differ.
    difference: f32,
    tolerance: f32,
    agrees: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let wanted = !args.no_prompts && eval::golden_prompts(&args.folder)?;
    let prompts = if wanted { Some(args.model.load(context)?) } else { None };
    let scratch = context.scratch_memory()?;
    let spinner = context.output.spinner("");
    let outputs = eval::golden(&args.folder, &scratch.memory, prompts.as_ref(), &mut |case| {
        spinner.set_message(case.to_string());
    });
    spinner.finish_and_clear();
    let outputs = outputs?;
    let differing = outputs.iter().filter(|output| !output.agrees()).count();
    context.output.print(&GoldenReport { outputs: outputs.into_iter().map(Output::new).collect() })?;
    if differing > 0 {
        return Err(CliError::GoldenDiffers { outputs: differing });
    }
    Ok(())
}

impl Output {
    fn new(output: GoldenOutput) -> Self {
        Output {
            agrees: output.agrees(),
            case: output.case,
            output: output.output,
            numbers: output.compared,
            difference: output.difference,
            tolerance: output.tolerance,
        }
    }
}

impl Report for GoldenReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut rows = table(["CASE", "OUTPUT", "NUMBERS>", "DIFFERENCE>", "TOLERANCE>", ""]);
        for output in &self.outputs {
            rows.add_row([
                output.case.clone(),
                output.output.clone(),
                count(output.numbers as u64),
                format!("{:.1e}", output.difference),
                format!("{:.0e}", output.tolerance),
                if output.agrees { "" } else { "differs" }.into(),
            ]);
        }
        write_table(to, &rows)
    }
}
