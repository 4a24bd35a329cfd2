//! Perplexity on a text: full attention, a window with a sink, and a memory that is written and read as the text goes.

use std::sync::Arc;

use rayon::prelude::*;

use super::{invalid, unused_name};
use landmarkdb::{
    BlockAttention, BlockMemory, CollectionInfo, CountedFrom, NewTokens, Retrieval, SequenceAttention, Window,
};
use landmarkdb_llm::{LoadedModel, Logits, ModelAttention, Reading, RememberError};

/// Tokens whose logits are held at once: `(128, vocab)` stays near 25 MB for a vocabulary of 49,152.
const LOGIT_TOKENS: usize = 128;

/// What to run.
#[derive(Clone, Debug)]
pub struct PerplexitySettings {
    /// The first tokens of each text are read but not counted: they have little past to look at, or are not the question.
    pub skip_tokens: usize,
    /// What a token sees without retrieval; without effect on full attention, except for the normalisation.
    pub window: Window,
    /// `top_k` and `newest_blocks` are those of the mode.
    pub retrieval: Retrieval,
}

/// What the model may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerplexityMode {
    /// Everything.
    Full,
    /// The window and the sink.
    Window,
    /// The window, the sink, and the last blocks before the window in place of retrieved ones: the control that retrieval has
    /// to beat.
    Recent {
        /// Blocks before the window that every query reads.
        blocks: u32,
    },
    /// The window, the sink, and k blocks retrieved from the newest ones, or from all.
    Memory {
        /// k, the blocks per row of choices.
        top_k: u32,
        /// Newest blocks before the window that can be retrieved. `None`: all.
        newest_blocks: Option<u32>,
    },
}

/// The result of one mode over all texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// The mode that was measured.
    pub mode: PerplexityMode,
    /// `e^` mean negative log-likelihood.
    pub perplexity: f64,
    /// Tokens whose likelihood is in the mean, over all texts.
    pub counted_tokens: usize,
    /// Tokens of the texts per second, those not counted included, landmarks not.
    pub tokens_per_s: f64,
}

/// Texts of `tokens` tokens each, evenly spaced in `source`; side by side where it is just long enough.
pub fn segments(source: &[u32], tokens: usize, samples: usize) -> Vec<Vec<u32>> {
    let tokens = tokens.min(source.len());
    let rest = source.len() - tokens;
    let start = |sample: usize| if samples < 2 { 0 } else { rest * sample / (samples - 1) };
    (0..samples).map(|sample| source[start(sample)..][..tokens].to_vec()).collect()
}

/// Texts that say something twice: a passage, `gap_tokens` of what follows it, and the passage again. A model that can reach
/// the first mention reads the second with less surprise.
pub fn repetitions(source: &[u32], passage_tokens: usize, gap_tokens: usize, samples: usize) -> Vec<Vec<u32>> {
    let texts = segments(source, passage_tokens + gap_tokens, samples);
    texts.into_iter().map(|text| [&text[..], &text[..passage_tokens.min(text.len())]].concat()).collect()
}

/// Measures one mode on texts given as tokens. Each is written to a document of `collection` for the modes with blocks,
/// which is deleted afterwards. `progress` is told the tokens done and in all.
///
/// # Errors
/// Texts of which no token would be counted; errors of the model and the memory.
pub fn perplexity(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collection: &CollectionInfo,
    texts: &[Vec<u32>],
    mode: PerplexityMode,
    settings: &PerplexitySettings,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, RememberError> {
    let all_tokens: usize = texts.iter().map(Vec::len).sum();
    // Nothing can be known before the first token.
    let skipped = settings.skip_tokens.max(1);
    let counted: usize = texts.iter().map(|text| text.len().saturating_sub(skipped)).sum();
    if counted == 0 {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let found = format!("{} texts of at most {longest} tokens", texts.len());
        return Err(invalid("texts", format!("more than the {skipped} tokens that are not counted"), found));
    }
    let begin = std::time::Instant::now();
    let (mut loss, mut done) = (0.0, 0);
    for text in texts {
        let shape = &collection.spec.shape;
        let mut written = None;
        let mut write = |top_k, newest_blocks| -> Result<ModelAttention, RememberError> {
            let document = memory.open_document(collection.id, &unused_name("perplexity"))?;
            written = Some(document.id);
            let retrieval = Some(Retrieval { top_k, newest_blocks, ..settings.retrieval.clone() });
            ModelAttention::write(model.config(), memory, collection, &document, settings.window, retrieval)
        };
        let mut session = match mode {
            PerplexityMode::Full => {
                ModelAttention::new(model.config(), BlockAttention::full(shape, settings.window.normalisation))
            }
            PerplexityMode::Window => {
                ModelAttention::new(model.config(), BlockAttention::window_only(shape, settings.window))
            }
            PerplexityMode::Recent { blocks } => write(blocks, Some(blocks))?,
            PerplexityMode::Memory { top_k, newest_blocks } => write(top_k, newest_blocks)?,
        };
        let lost = negative_log_likelihood(model, &mut session, text, settings, &mut |tokens_done| {
            progress(done + tokens_done, all_tokens);
        });
        if let Some(document) = written {
            memory.delete(document)?;
        }
        loss += lost?;
        done += text.len();
    }
    let tokens_per_s = all_tokens as f64 / begin.elapsed().as_secs_f64();
    Ok(Perplexity { mode, perplexity: (loss / counted as f64).exp(), counted_tokens: counted, tokens_per_s })
}

/// The sum over the counted tokens.
fn negative_log_likelihood(
    model: &LoadedModel,
    session: &mut ModelAttention,
    text: &[u32],
    settings: &PerplexitySettings,
    progress: &mut dyn FnMut(usize),
) -> Result<f64, RememberError> {
    let Reading { ids, text_tokens } = model.config().reading(session.position(), text);
    let chunk = match settings.window.counted_from {
        // Chunks change nothing but the memory that their logits take.
        CountedFrom::Query => LOGIT_TOKENS.min(settings.window.written_chunk_tokens()),
        _ => settings.window.written_chunk_tokens(),
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
                Some((linalg::log_sum_exp(logits) - logits[id as usize]) as f64)
            })
            .sum::<f64>();
        progress(text_tokens[from + ids_here.len() - 1]);
    }
    Ok(loss)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_a_source_side_by_side_or_spread_over_it() {
        let source: Vec<u32> = (0..12).collect();
        assert_eq!(segments(&source, 4, 3), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]);
        assert_eq!(segments(&source, 5, 2), [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]);
        assert_eq!(segments(&source, 5, 1), [[0, 1, 2, 3, 4]]);
        assert_eq!(segments(&source, 50, 1), [source]);
    }

    #[test]
    fn a_repetition_ends_as_it_begins() {
        let source: Vec<u32> = (0..9).collect();
        assert_eq!(repetitions(&source, 2, 3, 2), [[0, 1, 2, 3, 4, 0, 1], [4, 5, 6, 7, 8, 4, 5]]);
    }
}
