//! `landmarkdb rm`: deletes a document.

use std::io::{self, Write};

use serde::Serialize;

use super::Context;
use super::error::CliError;
use super::open::DocumentName;
use super::output::{Report, plural, size};

/// Delete a document and give its space back.
///
/// Asks for confirmation; scripts pass --yes.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb rm books/persuasion
  landmarkdb rm books/persuasion --yes
")]
pub(super) struct Args {
    /// NAME in the collection given by --collection, or COLLECTION/NAME.
    doc: String,

    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
}

/// What was deleted.
#[derive(Debug, Serialize)]
struct Deletion {
    /// COLLECTION/NAME
    document: String,
    blocks: u32,
    /// Bytes by which the segment files shrank.
    freed_bytes: u64,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let memory = context.memory()?;
    let name = DocumentName::new(&args.doc, &context.config);
    let (_, document) = name.find(memory.as_ref())?;
    if !args.yes {
        let held = format!("{}, {}", plural(document.tokens, "token"), size(document.stored_bytes));
        match context.output.confirm(&format!("delete {name} ({held})?")) {
            None => return Err(CliError::NeedsYes { document: name.to_string() }),
            Some(false) => return Err(CliError::NotConfirmed { document: name.to_string() }),
            Some(true) => {}
        }
    }
    let deleted = memory.delete(document.id)?;
    context.output.print(&Deletion {
        document: name.to_string(),
        blocks: deleted.blocks,
        freed_bytes: deleted.freed_bytes,
    })
}

impl Report for Deletion {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let blocks = plural(self.blocks.into(), "block");
        writeln!(to, "deleted {}: {blocks}, {} given back", self.document, size(self.freed_bytes))
    }
}
