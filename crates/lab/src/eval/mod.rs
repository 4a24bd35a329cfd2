//! Does the memory work? The paper's passkey test, and perplexity against full attention and against a window alone.
//!
//! Everything runs through the product: documents are encoded into a real memory, in process or remote, and read back.

mod capture;
mod golden;
mod haystack;
mod passkey;
mod perplexity;
mod questions;
mod report;

use landmarkdb::MemoryError;
use landmarkdb_llm::RememberError;

pub use capture::{About, Capture, CaptureError, Capturing, capture};
pub use golden::{GoldenError, GoldenOutput, golden, golden_prompts};
pub use haystack::{BOOK, Haystack, Needle};
pub use passkey::{
    PasskeyCase, PasskeyScore, PasskeySettings, PasskeyTexts, Remembered, RememberedScore, passkey, passkey_full,
    passkey_scores,
};
pub use perplexity::{Perplexity, PerplexityMode, PerplexitySettings, perplexity, repetitions, segments};
pub use questions::{Answered, QuestionAnswer, QuestionCase, QuestionSettings, questions, questions_full};
pub use report::{
    GranularityRow, Method, PasskeyRow, PerplexityRow, RepetitionRow, Report, ReportSettings, Subject, report,
    write_report,
};

/// A document name that no other run uses, whether it goes on at the same time or was stopped halfway: what an
/// evaluation finds in a document would count as read.
fn unused_name(what: &str) -> String {
    format!("{what}-{:016x}", rand::random::<u64>())
}

fn invalid(field: &str, expected: impl ToString, found: impl ToString) -> RememberError {
    MemoryError::Invalid { field: field.into(), expected: expected.to_string(), found: found.to_string() }.into()
}
