//! Texts with something hidden inside.

use rand::{Rng, RngExt};

use crate::passkey::{GARBAGE, TASK, information};
use landmarkdb::words;
use landmarkdb_llm::{Encoded, TokenizeError, Tokenizer};

/// A public-domain novel of about 110,000 tokens: `texts/README.md` tells where it is from.
pub const BOOK: &str = include_str!("../../texts/persuasion.txt");

/// What the needle is hidden in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haystack {
    /// Windows of a novel: the honest test (a repetitive haystack is solved by nearly every block key).
    Prose,
    /// The paper's five sentences, over and over.
    Garbage,
}

words!(Haystack, "prose" => Prose, "garbage" => Garbage);

/// A text with a pass key hidden in it, without the question.
#[derive(Clone, Debug, PartialEq)]
pub struct Needle {
    /// The task, the source text and, between two of its sentences, the information line.
    pub text: String,
    /// Five digits.
    pub key: String,
    /// Where the information line begins, as a share of the text.
    pub depth: f64,
}

/// Makes texts of a given length. Holds the source text in tokens, so that making one is cheap.
pub(super) struct Maker<'a> {
    source: String,
    encoded: Encoded,
    tokenizer: &'a Tokenizer,
}

impl<'a> Maker<'a> {
    /// `longest` is the most tokens that will be asked for; the source text is repeated until it is long enough.
    pub(super) fn new(
        kind: Haystack,
        prose: &str,
        longest: usize,
        tokenizer: &'a Tokenizer,
    ) -> Result<Self, TokenizeError> {
        let once = match kind {
            Haystack::Prose => prose,
            Haystack::Garbage => GARBAGE,
        };
        // A token of prose is four bytes and more; the paper's garbage is read as a text of its own length.
        let enough = longest * 6;
        let source = once.repeat(enough.div_ceil(once.len().max(1)).max(1));
        let encoded = tokenizer.encode(&source)?;
        Ok(Maker { source, encoded, tokenizer })
    }

    /// A text of about `tokens` tokens that begins anywhere in the source and hides the key at about `depth`.
    pub(super) fn make(&self, tokens: usize, depth: f64, rng: &mut impl Rng) -> Result<Needle, TokenizeError> {
        let key = rng.random_range(10_000..100_000u32).to_string();
        let info = information(&key);
        let frame = self.tokenizer.encode(&format!("{TASK}\n{info}\n"))?.ids.len();
        let hay = tokens.saturating_sub(frame).clamp(1, self.encoded.ids.len() - 1);
        let from = rng.random_range(0..self.encoded.ids.len() - hay);
        let bytes = self.encoded.offsets[from]..self.encoded.offsets[from + hay];
        let hay = String::from_utf8_lossy(&self.source.as_bytes()[bytes]);

        // Between two sentences at or after the depth asked for; at the end if there is none.
        let near = (0..=(hay.len() as f64 * depth) as usize).rev().find(|&at| hay.is_char_boundary(at)).unwrap_or(0);
        let at = hay[near..].find(". ").map_or(hay.len(), |found| near + found + 2);
        let (before, after) = hay.split_at(at);
        let head = format!("{TASK}{}\n", before.trim());
        let depth = head.len() as f64 / (head.len() + info.len() + after.len()) as f64;
        Ok(Needle { text: format!("{head}{info}\n{}\n", after.trim()), key, depth })
    }
}
