//! Questions about documents in a memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LoadedModel;
use super::error::RememberError;
use super::generate::{GenerateOptions, Generated, generate};
use crate::api::{BlockMemory, CollectionInfo, DocumentInfo};
use crate::attention::{BlockAttention, BlockReads, Retrieval, Window};

/// An answer, and what it rests on.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub generated: Generated,
    /// Which blocks were read for the prompt and the answer, heaviest first.
    pub reads: Vec<BlockReads>,
    pub prompt_tokens: usize,
    /// From the call to the first piece of the answer: window and sink read back, prompt through the model, blocks
    /// retrieved.
    pub first_token: Duration,
    /// From the call to the end of the answer.
    pub total: Duration,
}

/// Continues after `documents` with `prompt`, retrieving from all of them. Nothing is written. `on_text` gets the
/// answer's pieces as they become certain.
///
/// # Errors
/// Whatever the model or the memory report; an empty prompt; no document.
#[allow(clippy::too_many_arguments)]
pub fn ask(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collection: &CollectionInfo,
    documents: &[DocumentInfo],
    prompt: &str,
    window: Window,
    retrieval: Retrieval,
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str),
) -> Result<Answer, RememberError> {
    let begin = Instant::now();
    let prompt = model.tokenizer.encode(prompt)?.ids;
    let mut session = BlockAttention::read(memory.clone(), collection, documents, window, retrieval)?;
    let mut first_token = None;
    let generated = generate(model, &mut session, &prompt, options, &mut |piece| {
        first_token.get_or_insert_with(|| begin.elapsed());
        on_text(piece);
    })?;
    let total = begin.elapsed();
    Ok(Answer {
        generated,
        reads: session.take_reads(),
        prompt_tokens: prompt.len(),
        first_token: first_token.unwrap_or(total),
        total,
    })
}
