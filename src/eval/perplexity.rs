//! Perplexity on a text: full attention, a window with a sink, and a memory that is written and read as the text goes.

use std::sync::Arc;

use rayon::prelude::*;

use crate::api::{BlockMemory, CollectionInfo};
use crate::attention::{BlockAttention, CountedFrom, NewTokens, Retrieval, SequenceAttention, Window};
use crate::model::{LoadedModel, Logits, Reading, RememberError};
use crate::numeric;

/// Tokens whose logits are held at once: `(128, vocab)` stays near 25 MB for a vocabulary of 49,152.
const LOGIT_TOKENS: usize = 128;

/// What to run.
#[derive(Clone, Debug)]
pub struct PerplexitySettings {
    /// Length of each text, in tokens.
    pub tokens: usize,
    /// The first tokens are read but not counted, so that every counted token has a past to look at.
    pub skip_tokens: usize,
    /// Texts, taken evenly spaced from the source.
    pub samples: usize,
    pub window: Window,
    /// `top_k` is that of the mode.
    pub retrieval: Retrieval,
}

/// What the model may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerplexityMode {
    /// Everything.
    Full,
    /// The window and the sink.
    Window,
    /// The window, the sink, and k retrieved blocks.
    Memory { top_k: u32 },
}

/// The result of one mode over all texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    pub mode: PerplexityMode,
    /// `e^` mean negative log-likelihood.
    pub perplexity: f64,
    pub counted_tokens: usize,
    pub tokens_per_s: f64,
}

/// Measures one mode on `source`, the tokens of a long text. A document is written to `collection` for the memory
/// mode and deleted afterwards. `progress` is told the tokens done and in all.
///
/// # Errors
/// Whatever the model or the memory report.
pub fn perplexity(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collection: &CollectionInfo,
    source: &[u32],
    mode: PerplexityMode,
    settings: &PerplexitySettings,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, RememberError> {
    let tokens = settings.tokens.min(source.len());
    let step = (source.len() - tokens) / settings.samples.max(1);
    let begin = std::time::Instant::now();
    let (mut loss, mut counted) = (0.0, 0);
    for sample in 0..settings.samples {
        let text = &source[sample * step..][..tokens];
        let name = format!("perplexity-{sample}");
        let shape = &collection.spec.shape;
        let mut written = None;
        let mut session = match mode {
            PerplexityMode::Full => BlockAttention::full(shape, settings.window.normalisation),
            PerplexityMode::Window => BlockAttention::window_only(shape, settings.window),
            PerplexityMode::Memory { top_k } => {
                let document = memory.open_document(collection.id, &name)?;
                written = Some(document.id);
                let retrieval = Retrieval { top_k, ..settings.retrieval.clone() };
                BlockAttention::write(memory.clone(), collection, &document, settings.window, Some(retrieval))?
            }
        };
        let done = sample * tokens;
        let lost = negative_log_likelihood(model, &mut session, text, settings, &mut |tokens_done| {
            progress(done + tokens_done, settings.samples * tokens);
        });
        if let Some(document) = written {
            memory.delete(document)?;
        }
        loss += lost?;
        counted += tokens - settings.skip_tokens.max(1).min(tokens);
    }
    let tokens_per_s = (settings.samples * tokens) as f64 / begin.elapsed().as_secs_f64();
    Ok(Perplexity { mode, perplexity: (loss / counted as f64).exp(), counted_tokens: counted, tokens_per_s })
}

/// The sum over the counted tokens.
fn negative_log_likelihood(
    model: &LoadedModel,
    session: &mut BlockAttention,
    text: &[u32],
    settings: &PerplexitySettings,
    progress: &mut dyn FnMut(usize),
) -> Result<f64, RememberError> {
    let Reading { ids, text_tokens } = model.config().reading(session.position(), text);
    let chunk = match settings.window.counted_from {
        // Chunks change nothing but the memory that their logits take.
        CountedFrom::Query => LOGIT_TOKENS.min(settings.window.written_chunk_tokens()),
        CountedFrom::Chunk => settings.window.written_chunk_tokens(),
    };
    let mut loss = 0.0;
    for (index, ids_here) in ids.chunks(chunk).enumerate() {
        let from = index * chunk;
        let counts = text_tokens[from + ids_here.len() - 1] + 1 >= settings.skip_tokens;
        let logits = model.llama.forward(ids_here, session, if counts { Logits::All } else { Logits::None })?;
        let offsets = vec![0; ids_here.len()];
        session.commit(NewTokens { ids: ids_here, text: &[], offsets: &offsets })?;
        let vocab = model.config().vocab;
        loss += logits
            .par_chunks_exact(vocab)
            .enumerate()
            .filter_map(|(token, logits)| {
                let read = from + token;
                if model.config().is_landmark(ids[read]) {
                    return None;
                }
                let next = text_tokens[read] + 1;
                let id = *text.get(next).filter(|_| next >= settings.skip_tokens.max(1))?;
                Some((numeric::log_sum_exp(logits) - logits[id as usize]) as f64)
            })
            .sum::<f64>();
        progress(text_tokens[from + ids_here.len() - 1]);
    }
    Ok(loss)
}
