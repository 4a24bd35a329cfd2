//! Does the memory work? The paper's passkey test, and perplexity against full attention and against a window alone.
//!
//! Everything runs through the product: documents are encoded into a real memory, in process or remote, and read back.

mod golden;
mod haystack;
mod passkey;
mod perplexity;
mod report;

pub use golden::{GoldenError, GoldenOutput, golden};
pub use haystack::{BOOK, Haystack, Needle};
pub use passkey::{
    PasskeyCase, PasskeyScore, PasskeySettings, PasskeyTexts, Remembered, RememberedScore, passkey, passkey_full,
    passkey_scores,
};
pub use perplexity::{Perplexity, PerplexityMode, PerplexitySettings, perplexity, repetitions, segments};
pub use report::{Report, ReportSettings, Subject, report, write_report};
