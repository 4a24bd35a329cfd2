//! `landmarkdb verify`: reads everything and checks it.

use std::io::{self, Write};

use serde::Serialize;

use crate::api::VerifyReport;
use crate::until::Until;

use super::Context;
use super::error::CliError;
use super::output::{Report, plural, size, table, write_table};
use super::target::DocumentName;

/// Read every stored byte and check it against its checksums.
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

    /// Compare the catalog with one that is rebuilt from the segments, too. Changes nothing.
    #[arg(long, conflicts_with = "doc")]
    rebuild: bool,
}

/// What was read, and found.
#[derive(Debug, Serialize)]
struct Findings {
    documents: u64,
    blocks: u64,
    /// Bytes read.
    read_bytes: u64,
    /// Bytes in DIR/torn, kept until `landmarkdb repair --discard-torn`. No fault.
    set_aside_bytes: u64,
    /// Empty when all is well.
    faults: Vec<FaultReport>,
}

/// One thing that is wrong.
#[derive(Debug, Serialize)]
struct FaultReport {
    /// Id of the damaged document, where it is known.
    document: Option<u64>,
    /// Index of the damaged block in that document, where it is known.
    block: Option<u32>,
    /// For people.
    problem: String,
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
    let findings = Findings::from(report?);
    context.output.print(&findings)?;
    match findings.faults.len() {
        0 => Ok(()),
        faults => Err(CliError::Faults { faults }),
    }
}

impl From<VerifyReport> for Findings {
    fn from(report: VerifyReport) -> Self {
        let faults = report.faults.into_iter().map(|fault| FaultReport {
            document: fault.document.or(fault.block.map(|block| block.document)).map(|document| document.0),
            block: fault.block.map(|block| block.index),
            problem: fault.problem,
        });
        Findings {
            documents: report.documents,
            blocks: report.blocks,
            read_bytes: report.bytes,
            set_aside_bytes: report.set_aside_bytes,
            faults: faults.collect(),
        }
    }
}

impl Report for Findings {
    fn people(&self, to: &mut dyn Write) -> io::Result<()> {
        if !self.faults.is_empty() {
            let known = |id: Option<String>| id.unwrap_or_else(|| "-".into());
            let mut rows = table(["DOCUMENT>", "BLOCK>", "PROBLEM"]);
            for fault in &self.faults {
                rows.add_row([
                    known(fault.document.map(|id| id.to_string())),
                    known(fault.block.map(|index| index.to_string())),
                    fault.problem.clone(),
                ]);
            }
            write_table(to, &rows)?;
        }
        if self.set_aside_bytes > 0 {
            let set_aside = size(self.set_aside_bytes);
            writeln!(to, "{set_aside} set aside in DIR/torn: `landmarkdb repair --discard-torn` lets it go")?;
        }
        let read = format!(
            "{}, {}, {} read",
            plural(self.documents, "document"),
            plural(self.blocks, "block"),
            size(self.read_bytes)
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
    use crate::api::Fault;
    use crate::types::{BlockId, DocumentId};

    #[test]
    fn a_fault_names_its_document_and_block() {
        let block = BlockId { document: DocumentId(3), index: 7 };
        let fault = Fault { document: None, block: Some(block), problem: "checksum".into() };
        let findings = Findings::from(VerifyReport {
            documents: 1,
            blocks: 8,
            bytes: 2048,
            set_aside_bytes: 0,
            faults: vec![fault],
        });
        let mut text = Vec::new();
        findings.people(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>(), ["3", "7", "checksum"]);
        assert!(text.ends_with("1 document, 8 blocks, 2.0 KiB read: 1 fault\n"), "{text}");
        let json = serde_json::to_value(&findings).unwrap();
        assert_eq!(json["faults"][0], serde_json::json!({"document": 3, "block": 7, "problem": "checksum"}));
    }
}
