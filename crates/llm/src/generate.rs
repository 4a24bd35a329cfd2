//! Prefill in chunks, then one token at a time, with the text handed on as it becomes certain.

use std::ops::Range;

use super::LoadedModel;
use super::config::ModelConfig;
use super::error::{ForwardError, GenerateError};
use super::llama::{Llama, Logits};
use super::sample::{Sampler, Sampling};
use super::tokenizer::TextStream;
use landmarkdb::{CHUNK_TOKENS, SequenceAttention};

/// Bytes that a UTF-8 sequence may lack, and so the most tokens that finish it.
const UNFINISHED_TOKENS: usize = 3;

/// What a generation is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// How each token is chosen from its logits.
    pub sampling: Sampling,
    /// Most tokens to generate; up to three more where the answer would end inside a character.
    pub max_tokens: usize,
    /// Texts at which to stop; they are not part of the answer, and before it they do not count.
    pub stop: Vec<String>,
    /// Whether the model may end its text before it has written any: else the next likely token is taken instead.
    pub may_be_empty: bool,
    /// Tokens of the prompt that go through the model at once.
    pub chunk_tokens: usize,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its text.
    EndOfText,
    /// One of [`GenerateOptions::stop`] appeared.
    Stop,
    /// [`GenerateOptions::max_tokens`] were generated.
    MaxTokens,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The tokens chosen, without the one that ended the text. The sequence's attention holds the prompt and these,
    /// except perhaps the last.
    pub ids: Vec<u32>,
    /// `ln p` of each of `ids`, as the model gave it: at temperature 1, before penalties and filters.
    pub log_probs: Vec<f32>,
    /// Which of `ids` `text` is made of: not those of white space before it, nor of a stop text.
    pub text_ids: Range<usize>,
    /// The answer, without white space before it, up to a stop text.
    pub text: String,
    /// Why no token follows.
    pub finish: Finish,
}

impl Default for GenerateOptions {
    /// Greedy, 128 tokens, no stop texts, an empty answer is one.
    fn default() -> Self {
        GenerateOptions {
            sampling: Sampling::default(),
            max_tokens: 128,
            stop: Vec::new(),
            may_be_empty: true,
            chunk_tokens: CHUNK_TOKENS,
        }
    }
}

/// Runs `ids` through the model `chunk_tokens` at a time and returns the logits asked for of the last chunk.
pub fn prefill(
    llama: &Llama,
    attention: &mut dyn SequenceAttention,
    ids: &[u32],
    chunk_tokens: usize,
    logits: Logits,
) -> Result<Vec<f32>, ForwardError> {
    let mut chunks = ids.chunks(chunk_tokens.max(1)).peekable();
    let mut last = Vec::new();
    while let Some(chunk) = chunks.next() {
        let wanted = if chunks.peek().is_some() { Logits::None } else { logits };
        last = llama.forward(chunk, attention, wanted)?;
    }
    Ok(last)
}

/// Runs text through the model, landmarks where they belong, and returns the logits `(vocab)` for the text token that
/// comes next.
fn read(
    model: &LoadedModel,
    attention: &mut dyn SequenceAttention,
    text: &[u32],
    chunk_tokens: usize,
) -> Result<Vec<f32>, ForwardError> {
    let config = model.config();
    let ids = config.reading(attention.position(), text).ids;
    // What comes next is told by the last text token, not by a landmark after it.
    let closing = ids.last().is_some_and(|&id| config.is_landmark(id)) as usize;
    let (ids, closing) = ids.split_at(ids.len() - closing);
    let mut logits = prefill(&model.llama, attention, ids, chunk_tokens, Logits::Last)?;
    if !closing.is_empty() {
        model.llama.forward(closing, attention, Logits::None)?;
    }
    forbid_landmark(config, &mut logits);
    Ok(logits)
}

/// Takes the landmark out of `logits (vocab)`: its place is given, so the model is never asked for it.
pub(super) fn forbid_landmark(config: &ModelConfig, logits: &mut [f32]) {
    if let Some(landmark) = config.landmark {
        logits[landmark.id as usize] = f32::NEG_INFINITY;
    }
}

/// `ln p` of a token by its `logits (vocab)`.
pub(super) fn log_prob(logits: &[f32], id: u32) -> f32 {
    logits[id as usize] - linalg::log_sum_exp(logits)
}

/// Continues a sequence: `prompt` follows what `attention` already holds, then tokens are generated. `on_text` gets
/// the answer's pieces as they become certain; together they are [`Generated::text`].
pub fn generate(
    model: &LoadedModel,
    attention: &mut dyn SequenceAttention,
    prompt: &[u32],
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generated, GenerateError> {
    let mut sampler = Sampler::new(options.sampling)?;
    let ends = model.end_ids();
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    let mut logits = read(model, attention, prompt, options.chunk_tokens)?;
    let mut stream = TextStream::default();
    let mut answer = Answer::new(&options.stop);
    let (mut ids, mut log_probs) = (Vec::new(), Vec::new());
    // Bytes of the text before each token, and the first token of it.
    let (mut starts, mut first) = (Vec::new(), 0);
    // Logits that the choice may change.
    let mut left = Vec::new();
    let finish = loop {
        let most = options.max_tokens + if stream.is_open() { UNFINISHED_TOKENS } else { 0 };
        if ids.len() >= most {
            break Finish::MaxTokens;
        }
        left.clone_from(&logits);
        if !options.may_be_empty && answer.text.trim().is_empty() {
            let ends = ends.iter().map(|&id| id as usize);
            ends.for_each(|id| left.iter_mut().skip(id).take(1).for_each(|logit| *logit = f32::NEG_INFINITY));
        }
        let id = sampler.choose(&mut left, &ids)?;
        if ends.contains(&id) {
            break Finish::EndOfText;
        }
        ids.push(id);
        log_probs.push(log_prob(&logits, id));
        starts.push(answer.text.len());
        if answer.push(&stream.push(model.tokenizer.token_bytes(id)), on_text) {
            break Finish::Stop;
        }
        if answer.text.is_empty() && !stream.is_open() {
            first = ids.len();
        }
        if ids.len() < options.max_tokens || stream.is_open() {
            logits = read(model, attention, &[id], options.chunk_tokens)?;
        }
    };
    if finish != Finish::Stop {
        answer.push(&stream.finish(), on_text);
        answer.finish(on_text);
    }
    let end = starts.partition_point(|&start| start < answer.text.len());
    Ok(Generated { ids, log_probs, text_ids: first.min(end)..end, text: answer.text, finish })
}

/// The text so far, of which the end is held back while it may be the beginning of a stop text.
struct Answer<'a> {
    stop: &'a [String],
    text: String,
    /// Bytes of `text` that were handed on.
    told_bytes: usize,
}

impl<'a> Answer<'a> {
    fn new(stop: &'a [String]) -> Self {
        Answer { stop, text: String::new(), told_bytes: 0 }
    }

    /// Takes more text. True when a stop text appeared: then the text ends before it.
    fn push(&mut self, piece: &str, on_text: &mut dyn FnMut(&str)) -> bool {
        self.text.push_str(if self.text.is_empty() { piece.trim_start() } else { piece });
        let texts = || self.stop.iter().filter(|stop| !stop.is_empty());
        let found = texts().filter_map(|stop| self.text[self.told_bytes..].find(stop.as_str())).min();
        if let Some(at) = found {
            self.text.truncate(self.told_bytes + at);
            self.finish(on_text);
            return true;
        }
        let open = |from: &usize| {
            let end = &self.text[*from..];
            texts().any(|stop| stop.starts_with(end))
        };
        let boundaries = self.text[self.told_bytes..].char_indices().map(|(at, _)| self.told_bytes + at);
        let certain = boundaries.clone().find(open).unwrap_or(self.text.len());
        self.tell(certain, on_text);
        false
    }

    /// No more text will come.
    fn finish(&mut self, on_text: &mut dyn FnMut(&str)) {
        self.tell(self.text.len(), on_text);
    }

    fn tell(&mut self, up_to_bytes: usize, on_text: &mut dyn FnMut(&str)) {
        if up_to_bytes > self.told_bytes {
            on_text(&self.text[self.told_bytes..up_to_bytes]);
            self.told_bytes = up_to_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is told after each piece; `!` where a stop text ended it.
    fn told(stop: &[&str], pieces: &[&str]) -> Vec<String> {
        let stop: Vec<String> = stop.iter().map(|text| text.to_string()).collect();
        let mut answer = Answer::new(&stop);
        let mut told = Vec::new();
        for piece in pieces {
            let mut text = String::new();
            let stopped = answer.push(piece, &mut |piece| text.push_str(piece));
            told.push(text + if stopped { "!" } else { "" });
        }
        told
    }

    #[test]
    fn text_is_held_back_only_while_a_stop_text_may_follow() {
        assert_eq!(told(&[], &["a", "b"]), ["a", "b"]);
        assert_eq!(told(&["\n\n"], &["a\n", "b", "c\n", "\nd"]), ["a", "\nb", "c", "!"]);
        assert_eq!(told(&["END", "ENO"], &["xE", "N", "X"]), ["x", "", "ENX"]);
        assert_eq!(told(&["END", "ENO"], &["xE", "NO", ""]), ["x", "!", ""]);
        assert_eq!(told(&["aab"], &["a", "a", "a", "b"]), ["", "", "a", "!"]);
        assert_eq!(told(&["é!"], &["né", "e"]), ["n", "ée"]);
        assert_eq!(told(&[""], &["a"]), ["a"], "an empty stop text stops nothing");
        assert_eq!(told(&["\n"], &[" \n", "\n", "a ", "b\n"]), ["", "", "a ", "b!"], "an answer has to begin");
    }
}
