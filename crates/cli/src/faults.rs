//! What is wrong with stored documents, for `verify` and `repair`.

use std::collections::BTreeMap;

use serde::Serialize;

use landmarkdb::{BlockId, BlockMemory, DocumentId, MemoryError, Result};

use super::error::CliError;
use super::output::{Rows, table};

/// What documents are called: COLLECTION/NAME.
pub(super) type Names = BTreeMap<DocumentId, String>;

/// One thing that is wrong.
#[derive(Debug, Serialize)]
pub(super) struct FaultReport {
    /// Id of the damaged document, where it is known.
    document: Option<u64>,
    /// COLLECTION/NAME of it, where it has one.
    name: Option<String>,
    /// Index of the damaged block in that document, where it is known.
    pub(super) block: Option<u32>,
    /// Human-readable.
    problem: String,
}

impl FaultReport {
    pub(super) fn new(document: Option<DocumentId>, block: Option<BlockId>, problem: String, names: &Names) -> Self {
        let document = document.or(block.map(|block| block.document));
        FaultReport {
            document: document.map(|document| document.0),
            name: document.and_then(|document| names.get(&document).cloned()),
            block: block.map(|block| block.index),
            problem,
        }
    }

    /// COLLECTION/NAME, or its id where it has no name.
    pub(super) fn title(&self) -> String {
        let id = self.document.map(|id| format!("id {id}"));
        self.name.clone().or(id).unwrap_or_else(|| "-".into())
    }
}

/// An error that knows a damaged block by its ids only, with the document's name.
pub(super) fn named(error: CliError, memory: &dyn BlockMemory) -> CliError {
    let Some(MemoryError::DataLoss { block: Some(block), detail }) = error.memory() else { return error };
    match names(memory).ok().and_then(|mut names| names.remove(&block.document)) {
        Some(document) => CliError::DamagedBlock { document, block: block.index, problem: detail.clone() },
        None => error,
    }
}

/// What the documents of a memory are called.
pub(super) fn names(memory: &dyn BlockMemory) -> Result<Names> {
    let mut names = Names::new();
    for collection in memory.collections()? {
        for document in memory.documents(collection.id)? {
            names.insert(document.id, format!("{}/{}", collection.spec.name, document.name));
        }
    }
    Ok(names)
}

/// A row for each thing, and one for consecutive blocks with the same problem.
pub(super) fn fault_table(faults: &[FaultReport], heading: &str) -> Rows {
    let known = |said: Option<String>| said.unwrap_or_else(|| "-".into());
    let mut rows = table(["DOCUMENT", "BLOCKS>", heading]);
    let mut left = faults;
    while let [first, ..] = left {
        let follows = |pair: &[FaultReport]| {
            let [one, next] = pair else { return false };
            let is_next = one.block.zip(next.block).is_some_and(|(one, next)| one.checked_add(1) == Some(next));
            is_next && one.document == next.document && one.problem == next.problem
        };
        let alike = 1 + left.windows(2).take_while(|pair| follows(pair)).count();
        let blocks = first.block.map(|block| match alike {
            1 => block.to_string(),
            _ => format!("{block}-{}", left[alike - 1].block.unwrap_or(block)),
        });
        rows.add_row([first.title(), known(blocks), first.problem.clone()]);
        left = &left[alike..];
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::super::output::write_table;
    use super::*;

    #[test]
    fn a_row_names_a_document_and_joins_its_blocks() {
        let names = Names::from([(DocumentId(3), "books/emma".to_string())]);
        let block = |document, index| Some(BlockId { document: DocumentId(document), index });
        let fault = |block, problem: &str| FaultReport::new(None, block, problem.into(), &names);
        let faults = [
            fault(block(3, 6), "gone"),
            fault(block(3, 7), "gone"),
            fault(block(3, 8), "checksum"),
            fault(block(4, 9), "checksum"),
            FaultReport::new(None, None, "a header".into(), &names),
        ];
        let mut text = Vec::new();
        write_table(&mut text, &fault_table(&faults, "PROBLEM")).unwrap();
        let text = String::from_utf8(text).unwrap();
        let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        let expected: [&[&str]; 4] = [
            &["books/emma", "6-7", "gone"],
            &["books/emma", "8", "checksum"],
            &["id", "4", "9", "checksum"],
            &["-", "-", "a", "header"],
        ];
        assert_eq!(rows, expected);
    }
}
