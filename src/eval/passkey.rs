//! The passkey test (Mohtashami and Jaggi 2023, section 4.2): five digits hidden in a long text, asked for at its end.

use std::sync::Arc;
use std::time::Instant;

use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::haystack::{Haystack, Maker};
use crate::api::{BlockMemory, CollectionInfo};
use crate::attention::{Retrieval, Window};
use crate::model::{EncodeProgress, GenerateOptions, LoadedModel, Question, RememberError, ask, copy_document, encode};
use crate::passkey::QUESTION;
use crate::types::DType;

/// What to run.
#[derive(Clone, Debug)]
pub struct PasskeySettings {
    pub haystack: Haystack,
    /// Text of the prose haystack.
    pub prose: String,
    /// Lengths of the texts.
    pub tokens: Vec<usize>,
    /// Texts per length.
    pub samples: usize,
    /// Each k is asked about the same encoded text.
    pub top_k: Vec<u32>,
    pub window: Window,
    /// `top_k` is overridden by the list above.
    pub retrieval: Retrieval,
    pub seed: u64,
}

/// One question and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct PasskeyCase {
    pub tokens: usize,
    pub sample: usize,
    pub top_k: u32,
    pub payload_dtype: DType,
    /// Where the key lies, as a share of the text.
    pub depth: f64,
    pub key: String,
    pub answer: String,
    pub correct: bool,
    /// Tokens of the encoded text.
    pub text_tokens: u64,
    /// Bytes of the encoded document on disk.
    pub stored_bytes: u64,
    pub encode_s: f64,
    pub first_token_s: f64,
}

/// Runs the test. Each text is encoded once into the first collection and copied from there into the others (other
/// payload dtypes); documents are deleted when their questions are answered. `progress` is told the encoding of each
/// text with its length and number.
///
/// # Errors
/// Whatever the model or the memory report.
pub fn passkey(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collections: &[CollectionInfo],
    settings: &PasskeySettings,
    progress: &mut dyn FnMut(usize, usize, EncodeProgress),
) -> Result<Vec<PasskeyCase>, RememberError> {
    let longest = settings.tokens.iter().copied().max().unwrap_or(0);
    let maker = Maker::new(settings.haystack, &settings.prose, longest, &model.tokenizer)?;
    let options = GenerateOptions { max_tokens: 8, ..GenerateOptions::default() };
    let mut cases = Vec::new();
    for &tokens in &settings.tokens {
        for sample in 0..settings.samples {
            let mut rng = ChaCha8Rng::seed_from_u64(settings.seed ^ ((tokens as u64) << 20) ^ sample as u64);
            // Depths are spread evenly, each at random in its part.
            let depth = (sample as f64 + rng.random_range(0.0..1.0)) / settings.samples as f64;
            let needle = maker.make(tokens, depth, &mut rng)?;
            let name = format!("passkey-{}-{tokens}-{sample}", settings.haystack);

            let begin = Instant::now();
            let mut encoded = Vec::new();
            for collection in collections {
                encoded.push(match encoded.first() {
                    None => encode(model, memory, collection, &name, &needle.text, settings.window, &mut |step| {
                        progress(tokens, sample, step);
                    })?,
                    Some(first) => copy_document(memory.as_ref(), first, collection, &name)?,
                });
            }
            let encode_s = begin.elapsed().as_secs_f64();

            for (collection, document) in collections.iter().zip(&encoded) {
                for &top_k in &settings.top_k {
                    let question = Question {
                        documents: std::slice::from_ref(document),
                        prompt: QUESTION,
                        window: settings.window,
                        retrieval: Retrieval { top_k, ..settings.retrieval.clone() },
                        options: options.clone(),
                    };
                    let answer = ask(model, memory, collection, &question, &mut |_| {})?;
                    let text = answer.generated.text.trim().to_string();
                    cases.push(PasskeyCase {
                        tokens,
                        sample,
                        top_k,
                        payload_dtype: collection.spec.payload_dtype,
                        depth: needle.depth,
                        correct: text.starts_with(&needle.key),
                        key: needle.key.clone(),
                        answer: text,
                        text_tokens: document.tokens,
                        stored_bytes: document.stored_bytes,
                        encode_s,
                        first_token_s: answer.first_token.as_secs_f64(),
                    });
                }
                memory.delete(document.id)?;
            }
        }
    }
    Ok(cases)
}
