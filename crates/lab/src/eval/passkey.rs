//! The passkey test (Mohtashami and Jaggi 2023, section 4.2): five digits hidden in a long text, asked for at its end.

use std::sync::Arc;
use std::time::Instant;

use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::haystack::{Haystack, Maker, Needle};
use super::{invalid, unused_name};
use crate::passkey::QUESTION;
use landmarkdb::{BlockAttention, BlockMemory, CollectionInfo, DType, DocumentInfo, Retrieval, Window};
use landmarkdb_llm::{
    EncodeProgress, Encoding, GenerateOptions, LoadedModel, ModelAttention, Question, RememberError, ask,
    copy_document, encode, generate,
};

/// The texts of a test.
#[derive(Clone, Debug)]
pub struct PasskeyTexts {
    /// What the key is hidden in.
    pub haystack: Haystack,
    /// Text of the prose haystack.
    pub prose: String,
    /// Lengths of the texts.
    pub tokens: Vec<usize>,
    /// Texts per length.
    pub samples: usize,
    /// Seed of keys, depths and windows of the source; combined with each text's length and number.
    pub seed: u64,
}

/// How they are remembered and asked about.
#[derive(Clone, Debug)]
pub struct PasskeySettings {
    /// Each k is asked about the same encoded text.
    pub top_k: Vec<u32>,
    /// What a token sees without retrieval, while a text is encoded and while it is asked about.
    pub window: Window,
    /// While the texts are encoded.
    pub encode_retrieval: Option<Retrieval>,
    /// `top_k` is overridden by the list above.
    pub retrieval: Retrieval,
}

/// One question and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct PasskeyCase {
    /// Length that was asked for, in tokens; the text is about as long.
    pub tokens: usize,
    /// Number of the text among those of its length, from 0.
    pub sample: usize,
    /// Where the key lies, as a share of the text.
    pub depth: f64,
    /// The five digits that were hidden.
    pub key: String,
    /// The generated text, at most 8 tokens, without white space around it.
    pub answer: String,
    /// Whether `answer` begins with `key`.
    pub correct: bool,
    /// Seconds to the first piece of the answer: from the question, under full attention from the start of the text.
    pub first_token_s: f64,
    /// How the text was remembered; none for full attention over all of it.
    pub remembered: Option<Remembered>,
}

/// See [`PasskeyCase::remembered`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remembered {
    /// k, the blocks per row of choices.
    pub top_k: u32,
    /// The dtype that K and V are stored in.
    pub payload_dtype: DType,
    /// Tokens of the encoded text, landmarks included.
    pub tokens: u64,
    /// Bytes of the encoded document on disk.
    pub stored_bytes: u64,
    /// Seconds to encode the text and to copy it into all other collections: one figure for all of them.
    pub encode_s: f64,
}

/// All samples of one length, k and payload dtype.
#[derive(Clone, Debug, PartialEq)]
pub struct PasskeyScore {
    /// Length that was asked for, in tokens.
    pub tokens: usize,
    /// Cases whose answer begins with the key.
    pub correct: usize,
    /// Cases of this length, k and payload dtype.
    pub samples: usize,
    /// Means over the samples.
    pub first_token_s: f64,
    /// None for full attention.
    pub remembered: Option<RememberedScore>,
}

/// See [`PasskeyScore::remembered`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RememberedScore {
    /// k, the blocks per row of choices.
    pub top_k: u32,
    /// The dtype that K and V are stored in.
    pub payload_dtype: DType,
    /// Means over the samples. On disk: payload, keys, text and headers.
    pub bytes_per_token: f64,
    /// Tokens, landmarks included, per second of [`Remembered::encode_s`].
    pub encode_tokens_per_s: f64,
}

/// Adds cases up, in the order in which their kinds first appear.
pub fn passkey_scores(cases: &[PasskeyCase]) -> Vec<PasskeyScore> {
    let kind = |case: &PasskeyCase| (case.tokens, case.remembered.map(|r| (r.top_k, r.payload_dtype)));
    let mut kinds = Vec::new();
    for case in cases {
        if !kinds.contains(&kind(case)) {
            kinds.push(kind(case));
        }
    }
    let score = |of_kind: &(usize, Option<(u32, DType)>)| {
        let cases: Vec<&PasskeyCase> = cases.iter().filter(|case| kind(case) == *of_kind).collect();
        let mean =
            |number: fn(&PasskeyCase) -> f64| cases.iter().map(|case| number(case)).sum::<f64>() / cases.len() as f64;
        PasskeyScore {
            tokens: of_kind.0,
            correct: cases.iter().filter(|case| case.correct).count(),
            samples: cases.len(),
            first_token_s: mean(|case| case.first_token_s),
            remembered: of_kind.1.map(|(top_k, payload_dtype)| RememberedScore {
                top_k,
                payload_dtype,
                bytes_per_token: mean(|case| case.remembered.map_or(0.0, |r| r.stored_bytes as f64 / r.tokens as f64)),
                encode_tokens_per_s: mean(|case| case.remembered.map_or(0.0, |r| r.tokens as f64 / r.encode_s)),
            }),
        }
    };
    kinds.iter().map(score).collect()
}

/// Runs the test. Each text is encoded once into the first collection and copied from there into the others (other
/// payload dtypes); documents are deleted when their questions are answered. `progress` is told the encoding of each
/// text with its length and number.
///
/// # Errors
/// Errors of the model and the memory.
pub fn passkey(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collections: &[CollectionInfo],
    texts: &PasskeyTexts,
    settings: &PasskeySettings,
    progress: &mut dyn FnMut(usize, usize, EncodeProgress),
) -> Result<Vec<PasskeyCase>, RememberError> {
    let mut cases = Vec::new();
    let question_ids = model.tokenizer.encode(QUESTION)?.ids;
    texts.each(model, &mut |tokens, sample, needle| {
        let name = unused_name("passkey");
        let begin = Instant::now();
        let mut encoded: Vec<DocumentInfo> = Vec::new();
        for collection in collections {
            let encoding = Encoding {
                name: &name,
                text: &needle.text,
                window: settings.window,
                retrieval: settings.encode_retrieval.clone(),
                stays_open: false,
            };
            encoded.push(match encoded.first() {
                None => encode(model, memory, collection, &encoding, &mut |step| progress(tokens, sample, step))?,
                Some(first) => copy_document(memory.as_ref(), first, collection, &name)?,
            });
        }
        let encode_s = begin.elapsed().as_secs_f64();

        for (collection, document) in collections.iter().zip(&encoded) {
            for &top_k in &settings.top_k {
                let question = Question {
                    documents: std::slice::from_ref(document),
                    prompt: &question_ids,
                    window: settings.window,
                    retrieval: Retrieval { top_k, ..settings.retrieval.clone() },
                    options: options(),
                };
                let answer = ask(model, memory, collection, &question, &mut |_| {})?;
                cases.push(PasskeyCase {
                    remembered: Some(Remembered {
                        top_k,
                        payload_dtype: collection.spec.payload_dtype,
                        tokens: document.tokens,
                        stored_bytes: document.stored_bytes,
                        encode_s,
                    }),
                    ..PasskeyCase::new(tokens, sample, needle, &answer.generated.text, answer.first_token.as_secs_f64())
                });
            }
            memory.delete(document.id)?;
        }
        Ok(())
    })?;
    Ok(cases)
}

/// The same texts under full attention, without a memory: what the model does by itself. `progress` is told each text's
/// length and number.
///
/// # Errors
/// Errors of the model.
pub fn passkey_full(
    model: &LoadedModel,
    texts: &PasskeyTexts,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<PasskeyCase>, RememberError> {
    let config = model.config();
    let shape = model.shape(config.block_tokens()).map_err(landmarkdb::MemoryError::from)?;
    let mut cases = Vec::new();
    texts.each(model, &mut |tokens, sample, needle| {
        progress(tokens, sample);
        let begin = Instant::now();
        let mut first_token = None;
        let text = model.tokenizer.encode(&needle.text)?.ids;
        let prompt = [model.tokenizer.prefix(), &text, &model.tokenizer.encode(QUESTION)?.ids].concat();
        let mut session = ModelAttention::new(model.config(), BlockAttention::full(&shape, config.normalisation()));
        let answer = generate(model, &mut session, &prompt, &options(), &mut |_| {
            first_token.get_or_insert_with(|| begin.elapsed());
        })?;
        let first_token = first_token.unwrap_or_else(|| begin.elapsed());
        cases.push(PasskeyCase::new(tokens, sample, needle, &answer.text, first_token.as_secs_f64()));
        Ok(())
    })?;
    Ok(cases)
}

/// A key has five digits, which may be as many tokens, after a space.
fn options() -> GenerateOptions {
    GenerateOptions { max_tokens: 8, ..GenerateOptions::default() }
}

impl PasskeyTexts {
    /// Makes the texts one after the other: the same ones whenever seed, lengths and tokenizer are the same.
    fn each(
        &self,
        model: &LoadedModel,
        run: &mut dyn FnMut(usize, usize, &Needle) -> Result<(), RememberError>,
    ) -> Result<(), RememberError> {
        if self.haystack == Haystack::Prose && self.prose.is_empty() {
            return Err(invalid("prose", "a text", "an empty one"));
        }
        let longest = self.tokens.iter().copied().max().unwrap_or(0);
        let maker = Maker::new(self.haystack, &self.prose, longest, &model.tokenizer)?;
        for &tokens in &self.tokens {
            for sample in 0..self.samples {
                let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ ((tokens as u64) << 20) ^ sample as u64);
                // Depths are spread evenly, each at random in its part.
                let depth = (sample as f64 + rng.random_range(0.0..1.0)) / self.samples as f64;
                run(tokens, sample, &maker.make(tokens, depth, &mut rng)?)?;
            }
        }
        Ok(())
    }
}

impl PasskeyCase {
    fn new(tokens: usize, sample: usize, needle: &Needle, answer: &str, first_token_s: f64) -> Self {
        let answer = answer.trim().to_string();
        PasskeyCase {
            tokens,
            sample,
            depth: needle.depth,
            correct: answer.starts_with(&needle.key),
            key: needle.key.clone(),
            answer,
            first_token_s,
            remembered: None,
        }
    }
}
