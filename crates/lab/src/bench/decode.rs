//! What the memory costs a model, per token generated and per token encoded, and how soon it goes on after a text that was
//! encoded before.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::error::BenchError;
use super::first_token::{FirstToken, Reopened};
use super::peers::{self, DecodeCase, DecodePeer, PeerSettings};
use super::percentile::percentile;
use crate::eval::{BOOK, Subject};
use landmarkdb::{BlockAttention, BlockMemory, CHUNK_TOKENS, DocumentInfo, LocalMemory, SequenceAttention};
use landmarkdb_llm::{self as model, EncodeProgress, Encoding, LoadedModel, Logits, ModelAttention, RememberError};

/// How much is read, and what is timed.
#[derive(Clone, Debug)]
pub struct DecodeSettings {
    /// Tokens in the memory: each length is the beginning of one text, encoded into a document of its own.
    pub tokens: Vec<usize>,
    /// Tokens that full attention sees; 0: it is not measured.
    pub full_tokens: usize,
    /// Decode steps that are timed, of each kind in turn.
    pub steps: usize,
    /// Tokens of plain prefill that are timed.
    pub prefill_tokens: usize,
    /// What the model goes on from after a document is opened anew. What its answer is makes no difference to the time.
    pub prompt: String,
    /// What reads the same tokens with the same model file in the same minute.
    pub others: PeerSettings,
    /// The model's file, which the peers read too.
    pub model_file: PathBuf,
}

/// Where the documents are kept.
pub struct Place {
    /// Holds the collection of the subject.
    pub memory: Arc<dyn BlockMemory>,
    /// The memory's data directory, which no other process has open; none where a service has it: then reopening is not measured.
    pub folder: Option<PathBuf>,
    /// The folder goes away, so nothing in it need be deleted.
    pub is_temporary: bool,
}

/// What [`decode`] measured.
#[derive(Debug, Serialize)]
pub struct DecodeReport {
    /// What the model calls itself.
    pub model: String,
    /// k
    pub top_k: u32,
    /// Of rayon's pool.
    pub threads: usize,
    /// Medians of a decode step. `tokens` is what lies in the memory; none with the window only.
    pub steps: Vec<StepTime>,
    /// Encoding the longest text into the memory, durable.
    pub encode_tokens_per_s: f64,
    /// The same window, nothing kept.
    pub window_prefill_tokens_per_s: f64,
    /// Full attention.
    pub full_prefill_tokens_per_s: f64,
    /// That both prefills read.
    pub prefill_tokens: usize,
    /// Encoding time per token over window-only prefill time per token.
    pub encode_ratio: f64,
    /// By length, with warm pages and then with cold ones.
    pub first_tokens: Vec<FirstToken>,
    /// By peer and setting.
    pub peers: Vec<DecodePeer>,
}

/// The median of a decode step.
#[derive(Debug, Serialize)]
pub struct StepTime {
    /// `window only`, `memory` or `full attention`.
    pub attention: &'static str,
    /// In the memory, or that full attention sees; 0 with the window only.
    pub tokens: u64,
    /// Median.
    pub step_ms: f64,
    /// Over the window only.
    pub ratio: f64,
}

/// Encodes texts, times decode steps over them beside one with the window only and one with full attention, and opens them
/// anew; then deletes them. `on_encode` follows each encoding.
///
/// # Errors
/// Those of the model, of the memory and of the peers.
pub fn decode(
    subject: &Subject<'_>,
    place: Place,
    settings: &DecodeSettings,
    on_encode: &mut dyn FnMut(EncodeProgress),
) -> Result<DecodeReport, BenchError> {
    let &Subject { model, collection, window, .. } = subject;
    let longest = settings.tokens.iter().copied().max().unwrap_or(0);
    let book = BOOK.repeat((longest.max(settings.full_tokens) * 6).div_ceil(BOOK.len()));
    let encoded = model.tokenizer.encode(&book).map_err(RememberError::from)?;
    let prefill = &encoded.ids[..settings.prefill_tokens.min(longest)];
    let shape = &collection.spec.shape;
    let own = |below| ModelAttention::new(model.config(), below);
    let window_prefill = prefill_speed(model, own(BlockAttention::window_only(shape, window)), prefill)?;
    let full_prefill = prefill_speed(model, own(BlockAttention::full(shape, window.normalisation)), prefill)?;

    let bench = Bench { subject, settings, ids: &encoded.ids };
    let mut documents = Vec::new();
    for &tokens in &settings.tokens {
        let end = encoded.offsets.get(tokens).copied().unwrap_or(book.len());
        documents.push(bench.encode(&place.memory, &book[..book.floor_char_boundary(end)], tokens, on_encode)?);
    }
    let steps = bench.steps(&place.memory, &documents, longest)?;
    let encode = documents.iter().max_by_key(|(document, _)| document.tokens);
    let encode = encode.map_or(f64::NAN, |(document, encode_s)| document.tokens as f64 / encode_s);
    let first_tokens = bench.first_tokens(place, documents)?;
    Ok(DecodeReport {
        model: model.name.clone(),
        top_k: subject.retrieval.top_k,
        threads: rayon::current_num_threads(),
        steps,
        encode_tokens_per_s: encode,
        window_prefill_tokens_per_s: window_prefill,
        full_prefill_tokens_per_s: full_prefill,
        prefill_tokens: prefill.len(),
        encode_ratio: window_prefill / encode,
        first_tokens,
        peers: bench.peers()?,
    })
}

/// One run of the benchmark.
struct Bench<'a> {
    subject: &'a Subject<'a>,
    settings: &'a DecodeSettings,
    /// Of the text.
    ids: &'a [u32],
}

impl Bench<'_> {
    /// A document of that many tokens, and the seconds that it took.
    fn encode(
        &self,
        memory: &Arc<dyn BlockMemory>,
        text: &str,
        tokens: usize,
        on_encode: &mut dyn FnMut(EncodeProgress),
    ) -> Result<(DocumentInfo, f64), BenchError> {
        let &Subject { model, collection, window, ref encode_retrieval, .. } = self.subject;
        let name = format!("bench-{tokens}");
        let encoding = Encoding { name: &name, text, window, retrieval: encode_retrieval.clone(), stays_open: false };
        let begin = Instant::now();
        let document = model::encode(model, memory, collection, &encoding, on_encode)?;
        Ok((document, begin.elapsed().as_secs_f64()))
    }

    /// Decode steps of every kind, in turn, after the text's first `tokens`.
    fn steps(
        &self,
        memory: &Arc<dyn BlockMemory>,
        documents: &[(DocumentInfo, f64)],
        tokens: usize,
    ) -> Result<Vec<StepTime>, BenchError> {
        let &Subject { model, collection, window, ref retrieval, .. } = self.subject;
        let shape = &collection.spec.shape;
        let tokens = tokens.min(self.ids.len());
        let recent = &self.ids[tokens.saturating_sub(window.tokens)..tokens];
        let mut window_only = ModelAttention::new(model.config(), BlockAttention::window_only(shape, window));
        model::prefill(&model.llama, &mut window_only, recent, CHUNK_TOKENS, Logits::None)
            .map_err(RememberError::from)?;
        let mut sessions = vec![("window only", 0, window_only)];
        for (document, _) in documents {
            let documents = [document.clone()];
            let session =
                ModelAttention::read(model.config(), memory, collection, &documents, window, retrieval.clone())?;
            sessions.push(("memory", document.tokens, session));
        }
        let full_tokens = self.settings.full_tokens.min(self.ids.len());
        if full_tokens > 0 {
            let mut full = ModelAttention::new(model.config(), BlockAttention::full(shape, window.normalisation));
            let ids = &self.ids[..full_tokens];
            model::prefill(&model.llama, &mut full, ids, CHUNK_TOKENS, Logits::None).map_err(RememberError::from)?;
            sessions.push(("full attention", full_tokens as u64, full));
        }
        let mut times_ms = vec![Vec::new(); sessions.len()];
        // The first step of each loads what later steps find at hand; it is not counted.
        for step in 0..=self.settings.steps {
            let id = self.ids[(tokens + step) % self.ids.len()];
            for ((_, _, session), times_ms) in sessions.iter_mut().zip(&mut times_ms) {
                let time_ms = step_ms(model, session, id)?;
                if step > 0 {
                    times_ms.push(time_ms);
                }
            }
        }
        times_ms.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
        let medians: Vec<f64> = times_ms.iter().map(|times| percentile(times, 0.5)).collect();
        let steps = sessions.iter().zip(&medians).map(|(&(attention, tokens, _), &step_ms)| StepTime {
            attention,
            tokens,
            step_ms,
            ratio: step_ms / medians[0],
        });
        Ok(steps.collect())
    }

    /// What a document that is opened anew takes to its first token; then the documents are deleted.
    fn first_tokens(&self, place: Place, documents: Vec<(DocumentInfo, f64)>) -> Result<Vec<FirstToken>, BenchError> {
        let Place { mut memory, folder, is_temporary } = place;
        let ids: Vec<_> = documents.iter().map(|(document, _)| document.id).collect();
        let mut measured = Vec::new();
        let prompt = self.prompt()?;
        if let Some(folder) = &folder {
            // A data directory has one owner at a time.
            drop(memory);
            for (document, encode_s) in documents {
                let reopened = Reopened {
                    model: self.subject.model,
                    collection: self.subject.collection,
                    document,
                    encode_s,
                    prompt: &prompt,
                    window: self.subject.window,
                    retrieval: self.subject.retrieval.clone(),
                };
                measured.extend(reopened.measure(folder)?);
            }
            if is_temporary {
                return Ok(measured);
            }
            memory = Arc::new(LocalMemory::open(folder)?);
        }
        for id in ids {
            memory.delete(id)?;
        }
        Ok(measured)
    }

    fn peers(&self) -> Result<Vec<DecodePeer>, BenchError> {
        let others = &self.settings.others;
        if others.peers.is_empty() {
            return Ok(Vec::new());
        }
        let case = DecodeCase {
            model: &self.settings.model_file,
            prefill_tokens: self.settings.prefill_tokens,
            context_tokens: self.settings.full_tokens,
            steps: self.settings.steps,
            reopened_tokens: &self.settings.tokens,
            seconds: others.seconds,
            peers: &others.peers,
        };
        peers::decode(&case, self.ids, &self.prompt()?, &others.python)
    }

    fn prompt(&self) -> Result<Vec<u32>, BenchError> {
        let encoded = self.subject.model.tokenizer.encode(&self.settings.prompt);
        Ok(encoded.map_err(RememberError::from)?.ids)
    }
}

fn prefill_speed(model: &LoadedModel, mut session: ModelAttention, ids: &[u32]) -> Result<f64, BenchError> {
    let begin = Instant::now();
    model::prefill(&model.llama, &mut session, ids, CHUNK_TOKENS, Logits::None).map_err(RememberError::from)?;
    Ok(ids.len() as f64 / begin.elapsed().as_secs_f64())
}

fn step_ms(model: &LoadedModel, session: &mut dyn SequenceAttention, id: u32) -> Result<f64, BenchError> {
    let begin = Instant::now();
    model.llama.forward(&[id], session, Logits::Last).map_err(RememberError::from)?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}
