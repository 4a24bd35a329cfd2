//! Questions about documents in a memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LoadedModel;
use super::encode::check_layers;
use super::error::RememberError;
use super::generate::{GenerateOptions, Generated, generate};
use landmarkdb::{BlockAttention, BlockMemory, CollectionInfo, DocumentInfo, Reads, Retrieval, Window};

/// An answer, and what it rests on.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The answer's tokens and text, and why it ended.
    pub generated: Generated,
    /// Where the attention of prompt and answer went.
    pub reads: Reads,
    /// Tokens of the prompt, landmarks not counted.
    pub prompt_tokens: usize,
    /// From the call to the first piece of the answer: window and sink read back, prompt through the model, blocks
    /// retrieved.
    pub first_token: Duration,
    /// From the call to the end of the answer.
    pub total: Duration,
}

/// What is asked, of which documents, and how they are read.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// All of one collection; the prompt continues the last one.
    pub documents: &'a [DocumentInfo],
    /// The words that the model continues: a text of any kind, or what [`frame_question`] makes of a question.
    pub prompt: &'a str,
    /// What a token sees without retrieval.
    pub window: Window,
    /// Which blocks of the documents are retrieved, and by which layers.
    pub retrieval: Retrieval,
    /// Chunks are those of the window.
    pub options: GenerateOptions,
}

/// The prompt that asks a question: words that a model continues with its answer. White space around `question` is dropped.
pub fn frame_question(question: &str) -> String {
    format!("\n\nQuestion: {}\nAnswer:", question.trim())
}

/// Continues after the documents with the prompt, retrieving from all of them. Nothing is written. `on_text` gets the
/// answer's pieces as they become certain.
///
/// # Errors
/// Errors of the model and the memory; an empty prompt; no document.
pub fn ask(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collection: &CollectionInfo,
    question: &Question,
    on_text: &mut dyn FnMut(&str),
) -> Result<Answer, RememberError> {
    let begin = Instant::now();
    check_layers(model)?;
    let prompt = model.tokenizer.encode(question.prompt)?.ids;
    let Question { documents, window, ref retrieval, ref options, .. } = *question;
    let mut session = BlockAttention::read(memory.clone(), collection, documents, window, retrieval.clone())?;
    let mut first_token = None;
    let options = GenerateOptions { chunk_tokens: window.chunk_tokens, ..options.clone() };
    let generated = generate(model, &mut session, &prompt, &options, &mut |piece| {
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
