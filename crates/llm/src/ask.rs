//! Questions about documents in a memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LoadedModel;
use super::error::{RememberError, TemplateError};
use super::generate::{GenerateOptions, Generated, generate};
use super::model_attention::ModelAttention;
use super::template::{ChatTemplate, Piece, Role};
use landmarkdb::{BlockMemory, CollectionInfo, DocumentInfo, Reads, Retrieval, Window};

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
    /// The tokens that the model continues, landmarks not counted: of a text of any kind, or of what [`frame_question`] makes of a
    /// question.
    pub prompt: &'a [u32],
    /// What a token sees without retrieval.
    pub window: Window,
    /// Which blocks of the documents are retrieved, and by which layers.
    pub retrieval: Retrieval,
    /// Chunks are those of the window.
    pub options: GenerateOptions,
}

/// A question in a conversation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// White space around it is dropped.
    pub question: &'a str,
    /// How to answer, for the model to heed.
    pub system: Option<&'a str>,
    /// The conversation so far: questions, each with its answer.
    pub earlier: &'a [(String, String)],
}

/// The prompt that asks a question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Texts that the model writes when it goes on after its answer.
    pub stop: Vec<String>,
}

/// The prompt that asks `model` a question after a text: in the turns that the model's chat template draws, or, where it has none,
/// in words that a model continues with an answer. `text_end` is how the text ends that the prompt follows.
///
/// # Errors
/// A template that cannot be used; words that cannot be tokenised.
pub fn frame_question(model: &LoadedModel, asked: &Asked, text_end: &str) -> Result<Frame, RememberError> {
    let Some(template) = &model.chat_template else {
        let ids = model.tokenizer.encode(&plain_frame(asked, text_end))?.ids;
        return Ok(Frame { ids, stop: vec![NEXT_QUESTION.into()] });
    };
    let pieces = chat_frame(template, asked, text_end)?;
    Ok(Frame { ids: model.tokenizer.encode_pieces(&pieces)?, stop: Vec::new() })
}

/// How a model without a template begins a question of its own.
const NEXT_QUESTION: &str = "\nQuestion:";

fn plain_frame(asked: &Asked, text_end: &str) -> String {
    let present = text_end.bytes().rev().take_while(|&byte| byte == b'\n').count();
    let mut frame = "\n".repeat(2usize.saturating_sub(present));
    if let Some(system) = asked.system {
        frame += &format!("{}\n\n", system.trim());
    }
    for (question, answer) in asked.earlier {
        frame += &format!("Question: {}\nAnswer: {}\n\n", question.trim(), answer.trim());
    }
    frame + &format!("Question: {}\nAnswer:", asked.question.trim())
}

/// The documents are running text, and were encoded without a turn around them. The template is drawn as if they ended what the
/// model itself said last; from there on it is the prompt: that turn's end, and the question's turn. What templates put at the very
/// beginning stays away: behind a text, a system turn costs a small model a third of its right answers and more. So how to answer
/// is said in front of the first question, in its turn. A text that ends without a newline gets the one that most files end in.
fn chat_frame(template: &ChatTemplate, asked: &Asked, text_end: &str) -> Result<Vec<Piece>, TemplateError> {
    let mut turns = vec![(Role::User, String::new()), (Role::Assistant, String::new())];
    let text = turns.len() - 1;
    for (question, answer) in asked.earlier {
        turns.push((Role::User, question.trim().into()));
        turns.push((Role::Assistant, answer.trim().into()));
    }
    turns.push((Role::User, asked.question.trim().into()));
    if let Some(system) = asked.system {
        let first = &mut turns[text + 1].1;
        *first = format!("{}\n\n{first}", system.trim());
    }
    let newline = if text_end.ends_with('\n') { "" } else { "\n" };
    Ok([vec![Piece::Markup(newline.into())], template.render(&turns, text)?].concat())
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
    let Question { documents, prompt, window, ref retrieval, ref options, .. } = *question;
    let mut session = ModelAttention::read(model.config(), memory, collection, documents, window, retrieval.clone())?;
    let mut first_token = None;
    let options = GenerateOptions { chunk_tokens: window.chunk_tokens, ..options.clone() };
    let generated = generate(model, &mut session, prompt, &options, &mut |piece| {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_template_the_words_ask() {
        let asked = Asked { question: " Who? ", ..Asked::default() };
        // The text has the newlines that it ends in already.
        for (text_end, first) in
            [("", "\n\n"), ("text", "\n\n"), ("text\n", "\n"), ("text\n\n", ""), ("text\n\n\n", "")]
        {
            assert_eq!(plain_frame(&asked, text_end), format!("{first}Question: Who?\nAnswer:"), "{text_end:?}");
        }
        let earlier = [("Who?".to_string(), "Emma.".to_string())];
        let later = Asked { question: "When?", system: Some("Be brief.\n"), earlier: &earlier };
        assert_eq!(
            plain_frame(&later, ""),
            "\n\nBe brief.\n\nQuestion: Who?\nAnswer: Emma.\n\nQuestion: When?\nAnswer:"
        );
    }
}
