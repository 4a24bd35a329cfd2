//! How long a model takes to go on after a text that was read before: by opening its memory, or by loading a saved state.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::error::BenchError;
use super::page_cache::forget_files;
use super::percentile::percentile;
use landmarkdb::{BlockMemory, CollectionInfo, DocumentInfo, LocalMemory, Retrieval, Window};
use landmarkdb_llm::{self as model, GenerateOptions, LoadedModel, Question};

/// Openings that are timed.
const REOPENINGS: usize = 5;

/// Time to the first token after a text that was read before. Times are medians.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FirstToken {
    /// Of the text.
    pub tokens: u64,
    /// `warm`: from the page cache; `cold`: the files are not in it. The model's weights are in memory.
    pub pages: String,
    /// On disk.
    pub stored_bytes: u64,
    /// Reading the text for the first time; into a memory, keeping it included.
    pub prefill_s: f64,
    /// Saving a state, durable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_s: Option<f64>,
    /// From nothing but files to what the model goes on from.
    pub reopen_ms: f64,
    /// The same with a question read, to the first token of its answer.
    pub first_token_ms: f64,
}

impl FirstToken {
    /// Reading and keeping the text, over the time to the first token without doing so again.
    pub fn gain(&self) -> f64 {
        (self.prefill_s + self.save_s.unwrap_or(0.0)) * 1e3 / self.first_token_ms
    }
}

/// A document that is reopened.
pub(super) struct Reopened<'a> {
    pub(super) model: &'a LoadedModel,
    pub(super) collection: &'a CollectionInfo,
    pub(super) document: DocumentInfo,
    pub(super) encode_s: f64,
    pub(super) prompt: &'a [u32],
    pub(super) window: Window,
    pub(super) retrieval: Retrieval,
}

impl Reopened<'_> {
    /// Opens a data directory that no process has open, again and again, with the files in the page cache and without.
    pub(super) fn measure(&self, folder: &Path) -> Result<[FirstToken; 2], BenchError> {
        // Reads the files, so that they are in the page cache.
        self.open(folder)?;
        Ok([self.median(folder, "warm")?, self.median(folder, "cold")?])
    }

    fn median(&self, folder: &Path, pages: &str) -> Result<FirstToken, BenchError> {
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
    fn open(&self, folder: &Path) -> Result<(f64, f64), BenchError> {
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
