//! How long a model takes to go on after a text that was read before: by opening its memory, or by loading a saved state.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::forget_pages;
use crate::error::CliError;
use crate::output::{Rows, count, plain_table, size};
use landmarkdb::api::{BlockMemory, CollectionInfo, DocumentInfo};
use landmarkdb::attention::{Retrieval, Window};
use landmarkdb::memory::LocalMemory;
use landmarkdb_lab::bench::percentile;
use landmarkdb_llm::{self as model, GenerateOptions, LoadedModel, Question};

/// Openings that are timed.
const REOPENINGS: usize = 5;

/// Time to the first token after a text that was read before. Times are medians.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct FirstToken {
    pub(super) tokens: u64,
    /// `warm`: from the page cache; `cold`: the files are not in it. The model's weights are in memory.
    pub(super) pages: String,
    pub(super) stored_bytes: u64,
    /// Reading the text for the first time; into a memory, keeping it included.
    pub(super) prefill_s: f64,
    /// Saving a state, durable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) save_s: Option<f64>,
    /// From nothing but files to what the model goes on from.
    pub(super) reopen_ms: f64,
    /// The same with a question read, to the first token of its answer.
    pub(super) first_token_ms: f64,
}

impl FirstToken {
    /// Reading and keeping the text, over the time to the first token without doing so again.
    pub(super) fn gain(&self) -> f64 {
        (self.prefill_s + self.save_s.unwrap_or(0.0)) * 1e3 / self.first_token_ms
    }
}

/// A document that is reopened.
pub(super) struct Reopened<'a> {
    pub(super) model: &'a LoadedModel,
    pub(super) collection: &'a CollectionInfo,
    pub(super) document: DocumentInfo,
    pub(super) encode_s: f64,
    pub(super) prompt: &'a str,
    pub(super) window: Window,
    pub(super) retrieval: Retrieval,
}

impl Reopened<'_> {
    /// Opens a data directory that nobody has open, again and again, with the files in the page cache and without.
    pub(super) fn measure(&self, folder: &Path) -> Result<[FirstToken; 2], CliError> {
        // Reads the files, so that they are in the page cache.
        self.open(folder)?;
        Ok([self.median(folder, "warm")?, self.median(folder, "cold")?])
    }

    fn median(&self, folder: &Path, pages: &str) -> Result<FirstToken, CliError> {
        let (mut reopen_ms, mut first_token_ms) = (Vec::new(), Vec::new());
        for _ in 0..REOPENINGS {
            if pages == "cold" {
                forget_files(folder)?;
            }
            let (reopened, first_token) = self.open(folder)?;
            reopen_ms.push(reopened);
            first_token_ms.push(first_token);
        }
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            percentile(&times, 0.5)
        };
        Ok(FirstToken {
            tokens: self.document.tokens,
            pages: pages.into(),
            stored_bytes: self.document.stored_bytes,
            prefill_s: self.encode_s,
            save_s: None,
            reopen_ms: median(reopen_ms),
            first_token_ms: median(first_token_ms),
        })
    }

    /// Milliseconds until the memory is open, and until the first token of the answer.
    fn open(&self, folder: &Path) -> Result<(f64, f64), CliError> {
        let begin = Instant::now();
        let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder)?);
        let documents = [memory.document(self.document.id)?];
        let reopen_ms = begin.elapsed().as_secs_f64() * 1e3;
        let question = Question {
            documents: &documents,
            prompt: self.prompt,
            window: self.window,
            retrieval: self.retrieval.clone(),
            options: GenerateOptions { max_tokens: 1, ..GenerateOptions::default() },
        };
        model::ask(self.model, &memory, self.collection, &question, &mut |_| {})?;
        Ok((reopen_ms, begin.elapsed().as_secs_f64() * 1e3))
    }
}

/// Drops every file under a folder from the page cache.
fn forget_files(folder: &Path) -> Result<(), CliError> {
    let failed = |source| CliError::Io { what: "emptying the page cache", source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            forget_files(&path)?;
        } else {
            let file = File::open(&path).and_then(|file| file.sync_all().map(|()| file));
            forget_pages(&file.map_err(failed)?)?;
        }
    }
    Ok(())
}

/// Rows for people, of whoever measured them.
pub(super) fn first_token_table<'a>(rows: impl Iterator<Item = (String, &'a FirstToken)>) -> Rows {
    let headings =
        ["FIRST TOKEN", "TOKENS>", "PAGES", "ON DISK>", "READ>", "SAVE>", "REOPEN>", "TO FIRST TOKEN>", "TIMES LESS>"];
    let mut table = plain_table(headings);
    for (who, row) in rows {
        table.add_row([
            who,
            count(row.tokens),
            row.pages.clone(),
            size(row.stored_bytes),
            format!("{:.1} s", row.prefill_s),
            row.save_s.map(|save_s| format!("{save_s:.2} s")).unwrap_or_default(),
            format!("{:.0} ms", row.reopen_ms),
            format!("{:.0} ms", row.first_token_ms),
            format!("{:.0}", row.gain()),
        ]);
    }
    table
}
