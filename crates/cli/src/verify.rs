//! `landmarkdb verify`: reads everything and checks it.

use std::io::{self, Write};

use serde::Serialize;

use landmarkdb::{Until, VerifyReport};

use super::Context;
use super::error::CliError;
use super::faults::{FaultReport, Names, fault_table, names};
use super::hints::Hints;
use super::open::DocumentName;
use super::output::{Report, count, plural, size, write_table};

/// Read everything that is stored and referred to, and check it against its checksums.
///
/// Exits with code 5 if anything is wrong, after listing it.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb verify
  landmarkdb verify books/persuasion
  landmarkdb verify --rebuild
  landmarkdb verify --json | jq '.faults[]'
")]
pub(super) struct Args {
    /// Check this document only: NAME in the collection given by --collection, or COLLECTION/NAME.
    doc: Option<String>,

    /// Also rebuild the catalog in memory from the segments and report every difference as a fault. Changes nothing on disk. It
    /// checks everything, so it takes no DOC.
    #[arg(long, conflicts_with = "doc")]
    rebuild: bool,
}

/// What was read, and found.
#[derive(Debug, Serialize)]
struct Findings {
    documents: u64,
    /// Full blocks and tails.
    blocks: u64,
    /// Bytes read.
    read_bytes: u64,
    /// Bytes in DIR/torn, kept until `landmarkdb repair --discard-torn`. No fault.
    set_aside_bytes: u64,
    /// Whether the catalog was compared with one that was rebuilt from the segments.
    rebuilt: bool,
    /// Empty when all is well.
    faults: Vec<FaultReport>,
    #[serde(skip)]
    hints: Hints,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let memory = context.memory()?;
    let document = match &args.doc {
        Some(doc) => Some(DocumentName::new(doc, &context.config).find(memory.as_ref())?.1.id),
        None => None,
    };
    let bar = context.output.bytes_bar("verify");
    let told = &mut |read_bytes, total_bytes| {
        bar.set_length(total_bytes);
        bar.set_position(read_bytes);
    };
    let report =
        if args.rebuild { memory.verify_rebuild(told, &Until::FOREVER) } else { memory.verify(document, told) };
    bar.finish_and_clear();
    let report = report?;
    // Where they cannot be listed, ids have to do.
    let names = if report.faults.is_empty() { Names::new() } else { names(memory.as_ref()).unwrap_or_default() };
    let findings = Findings { rebuilt: args.rebuild, hints: context.hints.clone(), ..Findings::new(report, &names) };
    context.output.print(&findings)?;
    match findings.faults.len() {
        0 => Ok(()),
        faults => Err(CliError::Faults { faults }),
    }
}

impl Findings {
    fn new(report: VerifyReport, names: &Names) -> Self {
        let faults = report.faults.into_iter();
        Findings {
            documents: report.documents,
            blocks: report.blocks,
            read_bytes: report.bytes,
            set_aside_bytes: report.set_aside_bytes,
            rebuilt: false,
            faults: faults.map(|fault| FaultReport::new(fault.document, fault.block, fault.problem, names)).collect(),
            hints: Hints::default(),
        }
    }
}

/// What the count of a verification has in it.
fn blocks_and_tails(number: u64) -> String {
    if number == 1 { "1 block or tail".into() } else { format!("{} blocks and tails", count(number)) }
}

impl Report for Findings {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        if !self.faults.is_empty() {
            write_table(to, &fault_table(&self.faults, "PROBLEM"))?;
        }
        if self.set_aside_bytes > 0 {
            let set_aside = size(self.set_aside_bytes);
            let removes = self.hints.command("repair --discard-torn");
            writeln!(to, "{set_aside} set aside in the folder torn of the data directory: {removes} removes it")?;
        }
        let read = format!(
            "{}, {}, {} read{}",
            plural(self.documents, "document"),
            blocks_and_tails(self.blocks),
            size(self.read_bytes),
            if self.rebuilt { ", catalog compared with a rebuilt one" } else { "" }
        );
        match self.faults.len() as u64 {
            0 => writeln!(to, "{read}: all is well"),
            faults => writeln!(to, "{read}: {}", plural(faults, "fault")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::{BlockId, DocumentId, Fault};

    #[test]
    fn a_fault_names_its_document_and_block() {
        let block = BlockId { document: DocumentId(3), index: 7 };
        let fault = Fault { document: None, block: Some(block), problem: "checksum".into() };
        let findings = Findings::new(
            VerifyReport { documents: 1, blocks: 8, bytes: 2048, set_aside_bytes: 0, faults: vec![fault] },
            &Names::new(),
        );
        let mut text = Vec::new();
        findings.human(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>(), ["id", "3", "7", "checksum"]);
        assert!(text.ends_with("1 document, 8 blocks and tails, 2.0 KiB read: 1 fault\n"), "{text}");
        let json = serde_json::to_value(&findings).unwrap();
        assert_eq!(
            json["faults"][0],
            serde_json::json!({"document": 3, "name": null, "block": 7, "problem": "checksum"})
        );
    }
}
