//! Questions about texts of one's own, and whether the answers hold what they have to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;

use super::{invalid, unused_name};
use landmarkdb::{BlockAttention, BlockMemory, CollectionInfo, DocumentInfo, Retrieval, Window};
use landmarkdb_llm::{
    Asked, EncodeProgress, Encoding, Frame, GenerateOptions, LoadedModel, ModelAttention, Question, RememberError, ask,
    encode, frame_question, generate,
};

/// A question about texts, and what its answer has to hold.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuestionCase {
    /// The files that are asked, in this order.
    pub documents: Vec<PathBuf>,
    /// What is asked.
    pub question: String,
    /// An answer is right if it holds one of these, in upper or lower case.
    pub answers: Vec<String>,
    /// Cases of one group are counted together.
    #[serde(default)]
    pub group: String,
}

/// How the questions are asked.
#[derive(Clone, Debug)]
pub struct QuestionSettings {
    /// Each k is asked about the same encoded texts.
    pub top_k: Vec<u32>,
    /// What a token sees without retrieval, while a text is encoded and while it is asked about.
    pub window: Window,
    /// While the texts are encoded.
    pub encode_retrieval: Option<Retrieval>,
    /// `top_k` is overridden by the list above.
    pub retrieval: Retrieval,
    /// Of each answer.
    pub max_tokens: usize,
}

/// How one question was answered.
#[derive(Clone, Debug, PartialEq)]
pub struct QuestionAnswer {
    /// Number of its case, from 0.
    pub case: usize,
    /// k, the blocks per row of choices; none for full attention over the texts.
    pub top_k: Option<u32>,
    /// What was answered; none where texts and question are longer than the model's context, which only full attention needs.
    pub answered: Option<Answered>,
}

/// See [`QuestionAnswer::answered`].
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    /// The answer, without white space around it.
    pub text: String,
    /// Whether it holds one of [`QuestionCase::answers`].
    pub correct: bool,
    /// Seconds to its first piece: from the question, under full attention from the start of the texts.
    pub first_token_s: f64,
}

/// Encodes every text once and asks all questions, framed as `landmarkdb ask` frames them; greedy. The documents are deleted when all
/// is answered. `texts` has every file that a case names. `progress` is told the encoding of each text with its file.
///
/// # Errors
/// A file without a text; errors of the model and the memory.
pub fn questions(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collection: &CollectionInfo,
    cases: &[QuestionCase],
    texts: &BTreeMap<PathBuf, String>,
    settings: &QuestionSettings,
    progress: &mut dyn FnMut(&PathBuf, EncodeProgress),
) -> Result<Vec<QuestionAnswer>, RememberError> {
    let mut documents: BTreeMap<&PathBuf, DocumentInfo> = BTreeMap::new();
    for (file, text) in texts {
        let name = unused_name("questions");
        let encoding = Encoding {
            name: &name,
            text,
            window: settings.window,
            retrieval: settings.encode_retrieval.clone(),
            stays_open: false,
        };
        let document = encode(model, memory, collection, &encoding, &mut |step| progress(file, step))?;
        documents.insert(file, document);
    }
    let mut answers = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let frame = frame(model, case, texts)?;
        let asked = case.documents.iter().map(|file| documents.get(file).cloned().ok_or_else(|| missing(file)));
        let asked = asked.collect::<Result<Vec<DocumentInfo>, _>>()?;
        for &top_k in &settings.top_k {
            let question = Question {
                documents: &asked,
                prompt: &frame.ids,
                window: settings.window,
                retrieval: Retrieval { top_k, ..settings.retrieval.clone() },
                options: options(&frame, settings.max_tokens),
            };
            let answer = ask(model, memory, collection, &question, &mut |_| {})?;
            let answered = Answered::new(case, &answer.generated.text, answer.first_token.as_secs_f64());
            answers.push(QuestionAnswer { case: number, top_k: Some(top_k), answered: Some(answered) });
        }
    }
    for document in documents.values() {
        memory.delete(document.id)?;
    }
    Ok(answers)
}

/// The baseline: the same prompts behind the same texts, one after the other, under full attention. `progress` is told each case's
/// number.
///
/// # Errors
/// A file without a text; errors of the model.
pub fn questions_full(
    model: &LoadedModel,
    cases: &[QuestionCase],
    texts: &BTreeMap<PathBuf, String>,
    max_tokens: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<QuestionAnswer>, RememberError> {
    let config = model.config();
    let shape = model.shape(config.block_tokens()).map_err(landmarkdb::MemoryError::from)?;
    let mut answers = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        progress(number);
        let begin = Instant::now();
        let frame = frame(model, case, texts)?;
        let mut text = String::new();
        for file in &case.documents {
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(texts.get(file).ok_or_else(|| missing(file))?);
        }
        let prompt = [model.tokenizer.prefix(), &model.tokenizer.encode(&text)?.ids, &frame.ids].concat();
        let fits = prompt.len() + max_tokens <= config.context_tokens as usize;
        let answered = if fits {
            let mut first_token = None;
            let mut session = ModelAttention::new(config, BlockAttention::full(&shape, config.normalisation()));
            let answer = generate(model, &mut session, &prompt, &options(&frame, max_tokens), &mut |_| {
                first_token.get_or_insert_with(|| begin.elapsed());
            })?;
            let first_token = first_token.unwrap_or_else(|| begin.elapsed());
            Some(Answered::new(case, &answer.text, first_token.as_secs_f64()))
        } else {
            None
        };
        answers.push(QuestionAnswer { case: number, top_k: None, answered });
    }
    Ok(answers)
}

/// The question behind the last text.
fn frame(model: &LoadedModel, case: &QuestionCase, texts: &BTreeMap<PathBuf, String>) -> Result<Frame, RememberError> {
    let Some(last) = case.documents.last() else { return Err(invalid("documents", "at least one file", "none")) };
    let text_end = texts.get(last).ok_or_else(|| missing(last))?;
    frame_question(model, &Asked { question: &case.question, ..Asked::default() }, text_end)
}

fn options(frame: &Frame, max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, stop: frame.stop.clone(), may_be_empty: false, ..GenerateOptions::default() }
}

fn missing(file: &Path) -> RememberError {
    invalid("documents", "a file with a text", file.display())
}

impl Answered {
    fn new(case: &QuestionCase, text: &str, first_token_s: f64) -> Self {
        Answered { text: text.trim().into(), correct: case.is_answered_by(text), first_token_s }
    }
}

impl QuestionCase {
    /// White space, such as a line's end inside a name, counts as one space.
    fn is_answered_by(&self, text: &str) -> bool {
        let plain = |text: &str| text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ");
        let text = plain(text);
        self.answers.iter().any(|answer| text.contains(&plain(answer)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_if_it_holds_one_of_the_words() {
        let case = QuestionCase {
            documents: vec!["ship.txt".into()],
            question: "Who is the captain?".into(),
            answers: vec!["Ines Moreau".into(), "Captain Moreau".into()],
            group: String::new(),
        };
        for right in ["Ines Moreau.", "It is INES\nMOREAU", "captain  moreau"] {
            assert!(case.is_answered_by(right), "{right:?}");
        }
        for wrong in ["", "Moreau", "Inès Moreau", "Ines, Moreau"] {
            assert!(!case.is_answered_by(wrong), "{wrong:?}");
        }
    }
}
