//! The paper's evaluation at the scale of one model: perplexity by evaluation length and k (its Table 1), by selection
//! granularity (Table 2), and passkeys by length (Figure 3), with the control that the paper does not have.

mod chart;
mod markdown;
mod paper;

use std::sync::Arc;

use serde::Serialize;

pub use markdown::write_report;

use super::haystack::Haystack;
use super::invalid;
use super::passkey::{PasskeySettings, PasskeyTexts, passkey, passkey_full, passkey_scores};
use super::perplexity::{PerplexityMode, PerplexitySettings, perplexity, repetitions, segments};
use landmarkdb::{BlockMemory, CollectionInfo, Granularity, Normalisation, Retrieval, Window};
use landmarkdb_llm::{LoadedModel, RememberError};

/// Tokens of the passage that the repetition test says twice.
const PASSAGE_TOKENS: usize = 128;

/// Tokens of a repeated passage that are not counted: before them nothing tells that it is repeated.
const RECOGNISED_TOKENS: usize = 16;

/// A model, and where it keeps its blocks.
pub struct Subject<'a> {
    /// The model to measure.
    pub model: &'a LoadedModel,
    /// The collection for the model's blocks, bound to it.
    pub collection: &'a CollectionInfo,
    /// What a token sees without retrieval.
    pub window: Window,
    /// Which blocks are retrieved, and by which layers; k and, in Table 2, the granularity are replaced.
    pub retrieval: Retrieval,
    /// The same while passkey texts are encoded. `None`: nothing is retrieved then.
    pub encode_retrieval: Option<Retrieval>,
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct ReportSettings {
    /// Text that the models were not trained on.
    pub text: String,
    /// Tokens of it that perplexity is measured on.
    pub text_tokens: usize,
    /// Evaluation lengths: the text is cut into segments that each are read from nothing.
    pub lengths: Vec<usize>,
    /// Values of k for perplexity, 1 or more each. Repetition, and the rows that keep half of the blocks, take the
    /// last.
    pub top_k: Vec<u32>,
    /// Lengths of the passkey texts, in tokens.
    pub passkey_lengths: Vec<usize>,
    /// Values of k for passkeys, all asked about the same encoded text.
    pub passkey_top_k: Vec<u32>,
    /// Texts per length and haystack.
    pub samples: usize,
    /// Longest text that full attention is asked about: its cost grows with the square.
    pub full_tokens_max: usize,
    /// Seed of the passkey texts.
    pub seed: u64,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Name of the model.
    pub model: String,
    /// Name of the twin without landmarks. `None`: it was not measured.
    pub plain: Option<String>,
    /// Name of the recurrent baseline. `None`: it was not measured.
    pub recurrent: Option<String>,
    /// Whether the model has landmarks.
    pub landmarks: bool,
    /// B, the landmark included.
    pub block_tokens: u32,
    /// The context that the model was trained with, in tokens.
    pub context_tokens: u32,
    /// Tokens of the text that perplexity was measured on.
    pub text_tokens: usize,
    /// Passkey texts per length and haystack, and the most repetition texts per gap.
    pub samples: usize,
    /// Seed of the passkey texts.
    pub seed: u64,
    /// Table 1: perplexity by evaluation length, method and k.
    pub perplexity: Vec<PerplexityRow>,
    /// Table 2: perplexity by granularity, evaluation length and k.
    pub granularity: Vec<GranularityRow>,
    /// Perplexity of a repeated passage by gap and method.
    pub repetition: Vec<RepetitionRow>,
    /// Figure 3: pass keys found by haystack, length, method and k.
    pub passkey: Vec<PasskeyRow>,
}

/// One row of Table 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PerplexityRow {
    /// Evaluation length, in tokens.
    pub length_tokens: usize,
    /// Who was measured.
    pub method: Method,
    /// Blocks retrieved, or shown unasked.
    pub top_k: Option<u32>,
    /// Newest blocks that are kept; none for all.
    pub blocks: Option<u32>,
    /// Most tokens that a query can attend to.
    pub attention_tokens: usize,
    /// `exp` of the mean loss in nats.
    pub perplexity: f64,
    /// Tokens evaluated per second.
    pub tokens_per_s: f64,
}

/// Who was measured, and what it could see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The model with its memory.
    Memory,
    /// The model with the last k blocks instead of retrieved ones.
    RecentBlocks,
    /// The model without a memory.
    LocalOnly,
    /// The model with full attention.
    Full,
    /// The twin without landmarks, full attention over segments of the length it was trained with.
    PlainTrained,
    /// The twin without landmarks, window sliding.
    PlainWindow,
    /// The recurrent baseline, cache sliding.
    Recurrent,
}

/// One row of Table 2.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GranularityRow {
    /// The [`Granularity`](landmarkdb::Granularity), by its word.
    pub granularity: String,
    /// Evaluation length, in tokens.
    pub length_tokens: usize,
    /// k, blocks retrieved per choice.
    pub top_k: u32,
    /// Choices of blocks per chunk and layer.
    pub choices: usize,
    /// `exp` of the mean loss in nats.
    pub perplexity: f64,
    /// Tokens evaluated per second.
    pub tokens_per_s: f64,
}

/// Perplexity of a passage that was read before, so many tokens ago.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RepetitionRow {
    /// Tokens between the passage and its repetition.
    pub gap_tokens: usize,
    /// Who was measured.
    pub method: Method,
    /// k, blocks retrieved per choice. `None` where nothing is retrieved.
    pub top_k: Option<u32>,
    /// `exp` of the mean loss in nats.
    pub perplexity: f64,
    /// Texts measured.
    pub texts: usize,
}

/// One point of Figure 3.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PasskeyRow {
    /// The [`Haystack`](super::Haystack), by its word.
    pub haystack: String,
    /// Who was measured.
    pub method: Method,
    /// Length of the texts, in tokens.
    pub tokens: usize,
    /// k, blocks retrieved per choice. `None` where nothing is retrieved.
    pub top_k: Option<u32>,
    /// Texts whose key was answered.
    pub correct: usize,
    /// Texts asked about.
    pub samples: usize,
    /// On disk: payload, keys, text and headers. `None` without a memory.
    pub bytes_per_token: Option<f64>,
    /// Tokens encoded per second. `None` without a memory.
    pub encode_tokens_per_s: Option<f64>,
    /// Mean time to the first token of the answer, in seconds.
    pub first_token_s: f64,
}

/// Measures everything. `plain` is a twin of the subject's size and training without landmarks, `recurrent` one trained
/// with a cache of what came before. `progress` is told what is measured and how far it is, from 0 to 1.
///
/// # Errors
/// Nothing to measure, a text that is shorter than what is measured on it, and errors of models and memory.
pub fn report(
    subject: &Subject,
    memory: &Arc<dyn BlockMemory>,
    plain: Option<&Subject>,
    recurrent: Option<&Subject>,
    settings: &ReportSettings,
    progress: &mut dyn FnMut(&str, f64),
) -> Result<Report, RememberError> {
    settings.check()?;
    let config = subject.model.config();
    let mut run = Run { memory, settings, progress };
    for of in [Some(subject), plain, recurrent].into_iter().flatten() {
        run.check_text(of)?;
    }
    let mut report = Report {
        model: subject.model.name.clone(),
        plain: plain.map(|plain| plain.model.name.clone()),
        recurrent: recurrent.map(|recurrent| recurrent.model.name.clone()),
        landmarks: config.landmark.is_some(),
        block_tokens: subject.collection.spec.shape.block_tokens,
        context_tokens: config.context_tokens,
        text_tokens: run.source(subject)?.len(),
        samples: settings.samples,
        seed: settings.seed,
        ..Report::default()
    };
    for &length in &settings.lengths {
        run.perplexity(subject, length, &mut report.perplexity)?;
        run.baselines(plain, recurrent, length, &mut report.perplexity)?;
    }
    for &length in &settings.lengths {
        run.granularity(subject, length, &mut report.granularity)?;
    }
    // A passage and what lies between are taken from the text.
    for &gap in settings.lengths.iter().filter(|&&gap| PASSAGE_TOKENS + gap <= report.text_tokens) {
        run.repetition(subject, gap, &mut report.repetition)?;
    }
    for haystack in [Haystack::Garbage, Haystack::Prose] {
        run.passkey(subject, plain, haystack, &mut report.passkey)?;
    }
    Ok(report)
}

impl ReportSettings {
    fn check(&self) -> Result<(), RememberError> {
        let rules = [
            ("lengths", self.lengths.iter().all(|&length| length > 1) && !self.lengths.is_empty(), "2 tokens or more"),
            ("top-k", self.top_k.iter().all(|&k| k > 0) && !self.top_k.is_empty(), "1 or more"),
            ("passkey lengths", self.passkey_lengths.iter().all(|&length| length > 0), "1 token or more"),
            ("passkey top-k", self.passkey_top_k.iter().all(|&k| k > 0), "1 or more"),
            ("samples", self.samples > 0, "1 or more"),
        ];
        match rules.into_iter().find(|(_, holds, _)| !holds) {
            None => Ok(()),
            Some((field, _, expected)) => Err(invalid(field, expected, "0, or none")),
        }
    }
}

/// What the measurements share.
struct Run<'a> {
    memory: &'a Arc<dyn BlockMemory>,
    settings: &'a ReportSettings,
    progress: &'a mut dyn FnMut(&str, f64),
}

impl Run<'_> {
    /// Perplexity of one mode on texts: `(perplexity, tokens per second)`.
    fn measure(
        &mut self,
        what: &str,
        subject: &Subject,
        texts: &[Vec<u32>],
        mode: PerplexityMode,
        settings: &PerplexitySettings,
    ) -> Result<(f64, f64), RememberError> {
        let progress = &mut *self.progress;
        let told = &mut |done: usize, all: usize| progress(what, done as f64 / all.max(1) as f64);
        let measured = perplexity(subject.model, self.memory, subject.collection, texts, mode, settings, told)?;
        Ok((measured.perplexity, measured.tokens_per_s))
    }

    /// The text as tokens of a subject's model.
    fn source(&self, subject: &Subject) -> Result<Vec<u32>, RememberError> {
        let mut ids = subject.model.tokenizer.encode(&self.settings.text)?.ids;
        ids.truncate(self.settings.text_tokens);
        Ok(ids)
    }

    fn check_text(&self, subject: &Subject) -> Result<(), RememberError> {
        let longest = self.settings.lengths.iter().copied().max().unwrap_or(0);
        match self.source(subject)?.len() {
            enough if enough >= longest => Ok(()),
            found => {
                let expected = format!("{longest} tokens or more, the longest evaluation length");
                Err(invalid(
                    "text",
                    expected,
                    format!("{found}: give a longer text, or `text_tokens` or `lengths` to fit"),
                ))
            }
        }
    }

    /// Segments of a length that cover the text.
    fn texts(&self, subject: &Subject, length: usize) -> Result<Vec<Vec<u32>>, RememberError> {
        let source = self.source(subject)?;
        let samples = (source.len() / length.max(1)).max(1);
        Ok(segments(&source[..source.len().min(samples * length)], length, samples))
    }

    fn perplexity(
        &mut self,
        subject: &Subject,
        length: usize,
        rows: &mut Vec<PerplexityRow>,
    ) -> Result<(), RememberError> {
        let texts = self.texts(subject, length)?;
        let block_tokens = subject.collection.spec.shape.block_tokens as usize;
        let local = subject.window.tokens.max(subject.window.chunk_tokens.min(length));
        let whole = (length / block_tokens) as u32;
        let mut modes = vec![(Method::LocalOnly, PerplexityMode::Window)];
        if subject.model.config().normalisation() != Normalisation::Grouped && length <= self.settings.full_tokens_max {
            modes.push((Method::Full, PerplexityMode::Full));
        }
        for &top_k in &self.settings.top_k {
            modes.push((Method::RecentBlocks, PerplexityMode::Recent { blocks: top_k }));
            modes.push((Method::Memory, PerplexityMode::Memory { top_k, newest_blocks: None }));
            if top_k == *self.settings.top_k.last().unwrap_or(&0) && whole / 2 > top_k {
                modes.push((Method::Memory, PerplexityMode::Memory { top_k, newest_blocks: Some(whole / 2) }));
            }
        }
        for (method, mode) in modes {
            let (top_k, blocks) = match mode {
                PerplexityMode::Recent { blocks } => (Some(blocks), Some(blocks)),
                PerplexityMode::Memory { top_k, newest_blocks } => (Some(top_k), newest_blocks),
                _ => (None, None),
            };
            let (perplexity, tokens_per_s) = self.measure(
                &format!("perplexity, {length} tokens, {mode:?}"),
                subject,
                &texts,
                mode,
                &subject.plainly(),
            )?;
            let retrieved = top_k.map_or(0, |k| k as usize * block_tokens);
            let attention_tokens = if method == Method::Full { length } else { local + retrieved };
            rows.push(PerplexityRow {
                length_tokens: length,
                method,
                top_k,
                blocks,
                attention_tokens,
                perplexity,
                tokens_per_s,
            });
        }
        Ok(())
    }

    fn baselines(
        &mut self,
        plain: Option<&Subject>,
        recurrent: Option<&Subject>,
        length: usize,
        rows: &mut Vec<PerplexityRow>,
    ) -> Result<(), RememberError> {
        let mut row = |run: &mut Self, method, subject: &Subject, segment: usize, mode| -> Result<(), RememberError> {
            let texts = run.texts(subject, segment)?;
            let what = format!("perplexity, {length} tokens, {method:?}");
            let (perplexity, tokens_per_s) = run.measure(&what, subject, &texts, mode, &subject.plainly())?;
            let attention_tokens = subject.model.config().context_tokens as usize;
            rows.push(PerplexityRow {
                length_tokens: segment,
                method,
                top_k: None,
                blocks: None,
                attention_tokens,
                perplexity,
                tokens_per_s,
            });
            Ok(())
        };
        if let Some(plain) = plain {
            if length == self.settings.lengths[0] {
                let trained = plain.model.config().context_tokens as usize;
                row(self, Method::PlainTrained, plain, trained, PerplexityMode::Full)?;
            }
            row(self, Method::PlainWindow, plain, length, PerplexityMode::Window)?;
        }
        if let Some(recurrent) = recurrent {
            row(self, Method::Recurrent, recurrent, length, PerplexityMode::Window)?;
        }
        Ok(())
    }

    fn granularity(
        &mut self,
        subject: &Subject,
        length: usize,
        rows: &mut Vec<GranularityRow>,
    ) -> Result<(), RememberError> {
        let texts = self.texts(subject, length)?;
        let shape = &subject.collection.spec.shape;
        for &word in Granularity::WORDS {
            let Ok(granularity) = word.parse::<Granularity>() else { continue };
            for &top_k in &self.settings.top_k {
                let mut settings = subject.plainly();
                settings.retrieval.granularity = granularity;
                let mode = PerplexityMode::Memory { top_k, newest_blocks: None };
                let what = format!("granularity {word}, {length} tokens, k = {top_k}");
                let (perplexity, tokens_per_s) = self.measure(&what, subject, &texts, mode, &settings)?;
                let (query_heads, kv_heads) = (shape.query_heads as usize, shape.kv_heads as usize);
                rows.push(GranularityRow {
                    granularity: word.into(),
                    length_tokens: length,
                    top_k,
                    choices: granularity.rows(subject.window.chunk_tokens, query_heads, kv_heads),
                    perplexity,
                    tokens_per_s,
                });
            }
        }
        Ok(())
    }

    fn repetition(
        &mut self,
        subject: &Subject,
        gap: usize,
        rows: &mut Vec<RepetitionRow>,
    ) -> Result<(), RememberError> {
        let source = self.source(subject)?;
        let samples = (source.len() / (PASSAGE_TOKENS + gap)).clamp(1, self.settings.samples.max(1));
        let texts = repetitions(&source, PASSAGE_TOKENS, gap, samples);
        let settings =
            PerplexitySettings { skip_tokens: PASSAGE_TOKENS + gap + RECOGNISED_TOKENS, ..subject.plainly() };
        let blocks = self.settings.top_k.last().copied().unwrap_or(1);
        for (method, mode, top_k) in [
            (Method::LocalOnly, PerplexityMode::Window, None),
            (Method::RecentBlocks, PerplexityMode::Recent { blocks }, Some(blocks)),
            (Method::Memory, PerplexityMode::Memory { top_k: blocks, newest_blocks: None }, Some(blocks)),
        ] {
            let what = format!("a passage repeated after {gap} tokens, {mode:?}");
            let (perplexity, _) = self.measure(&what, subject, &texts, mode, &settings)?;
            rows.push(RepetitionRow { gap_tokens: gap, method, top_k, perplexity, texts: texts.len() });
        }
        Ok(())
    }

    fn passkey(
        &mut self,
        subject: &Subject,
        plain: Option<&Subject>,
        haystack: Haystack,
        rows: &mut Vec<PasskeyRow>,
    ) -> Result<(), RememberError> {
        let settings = self.settings;
        let texts = PasskeyTexts {
            haystack,
            prose: settings.text.clone(),
            tokens: settings.passkey_lengths.clone(),
            samples: settings.samples,
            seed: settings.seed,
        };
        let remember = PasskeySettings {
            top_k: settings.passkey_top_k.clone(),
            window: subject.window,
            encode_retrieval: subject.encode_retrieval.clone(),
            retrieval: subject.retrieval.clone(),
        };
        let progress = &mut *self.progress;
        let collections = std::slice::from_ref(subject.collection);
        let cases =
            passkey(subject.model, self.memory, collections, &texts, &remember, &mut |tokens, sample, step| {
                let done = step.done_tokens as f64 / step.total_tokens.max(1) as f64;
                let all = settings.samples.max(1) as f64;
                progress(&format!("passkey, {haystack}, {tokens} tokens"), (sample as f64 + done) / all);
            })?;
        rows.extend(passkey_scores(&cases).into_iter().map(|score| PasskeyRow::new(haystack, Method::Memory, score)));

        let (baseline, method) = match plain {
            Some(plain) => (plain, Method::PlainTrained),
            None => (subject, Method::Full),
        };
        let mut short = texts;
        short.tokens.retain(|&tokens| tokens <= settings.full_tokens_max);
        let cases = passkey_full(baseline.model, &short, &mut |tokens, sample| {
            let what = format!("passkey, {haystack}, {tokens} tokens, full attention");
            progress(&what, sample as f64 / settings.samples.max(1) as f64);
        })?;
        rows.extend(passkey_scores(&cases).into_iter().map(|score| PasskeyRow::new(haystack, method, score)));
        Ok(())
    }
}

impl Subject<'_> {
    /// Settings that count every token.
    fn plainly(&self) -> PerplexitySettings {
        PerplexitySettings { skip_tokens: 0, window: self.window, retrieval: self.retrieval.clone() }
    }
}

impl PasskeyRow {
    fn new(haystack: Haystack, method: Method, score: super::passkey::PasskeyScore) -> Self {
        PasskeyRow {
            haystack: haystack.to_string(),
            method,
            tokens: score.tokens,
            top_k: score.remembered.map(|of| of.top_k),
            correct: score.correct,
            samples: score.samples,
            bytes_per_token: score.remembered.map(|of| of.bytes_per_token),
            encode_tokens_per_s: score.remembered.map(|of| of.encode_tokens_per_s),
            first_token_s: score.first_token_s,
        }
    }
}
