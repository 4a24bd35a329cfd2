//! Whether documents had a part in an answer: how much likelier they made its tokens.

use super::LoadedModel;
use super::config::ModelConfig;
use super::error::RememberError;
use super::generate::{Generated, forbid_landmark, log_prob, prefill};
use super::landmarks::Reading;
use super::llama::Logits;
use super::model_attention::ModelAttention;
use landmarkdb::{BlockAttention, CHUNK_TOKENS, MemoryError};

/// Tokens whose logits are held at once: those of one take a MiB where the vocabulary is large.
const LOGIT_TOKENS: usize = 16;

/// Tokens that a measure of the whole answer is taken over: a fact has few, and all others of a long answer would hide it.
const PEAK_TOKENS: usize = 3;

/// Least [`Lift::peak`] of an answer that seems to come from the documents. Measured with `examples/lift.rs` on SmolLM2 and Gemma 3 270M:
/// of answers that stand in the text 61 of 63 reach it, of those to questions of general knowledge 3 of 60.
const PEAK_NATS_MIN: f32 = 1.5;

/// What documents did for an answer, in nats.
///
/// The lift of a token is `ln p` with the documents less `ln p` without them, both after the same prompt and the same tokens of the
/// answer, both at temperature 1. A name that the model copied from a text is some nats likelier with it; a word that the
/// model would have said anyway has a lift near 0, or below. It is the effect of the documents that is measured. Whether the answer is right is another question.
#[derive(Clone, Debug, PartialEq)]
pub struct Lift {
    /// Of each token of the answer's text ([`Generated::text_ids`]), at least one.
    pub tokens: Vec<f32>,
}

impl Lift {
    /// The mean of the three largest, or of all where there are fewer.
    pub fn peak(&self) -> f32 {
        let mut tokens = self.tokens.clone();
        tokens.sort_by(|a, b| b.total_cmp(a));
        tokens.truncate(PEAK_TOKENS);
        tokens.iter().sum::<f32>() / tokens.len().max(1) as f32
    }

    /// Whether the answer seems to come from the documents: an estimate, by its peak.
    pub fn is_from_documents(&self) -> bool {
        self.peak() >= PEAK_NATS_MIN
    }
}

/// Has `model` read `prompt` and `answer` once more, without the documents that it was asked about, under full attention: one pass over
/// as many tokens as both have. `None` for an answer without text, and for one that the model could not read as it was trained to,
/// because prompt and answer are longer than its context.
///
/// # Errors
/// Errors of the model.
pub fn lift(model: &LoadedModel, prompt: &[u32], answer: &Generated) -> Result<Option<Lift>, RememberError> {
    let config = model.config();
    let counted = answer.text_ids.clone();
    if counted.is_empty() {
        return Ok(None);
    }
    let text = [model.tokenizer.prefix(), prompt, &answer.ids[..counted.end]].concat();
    let first = text.len() - counted.len();
    // Nothing follows the last token.
    let Reading { ids, text_tokens } = config.reading(0, &text[..text.len() - 1]);
    if ids.len() > longest_text(config) {
        return Ok(None);
    }
    let shape = model.shape(config.block_tokens()).map_err(MemoryError::from)?;
    let mut attention = ModelAttention::new(config, BlockAttention::full(&shape, config.normalisation()));
    let from = text_tokens.partition_point(|&token| token + 1 < first);
    prefill(&model.llama, &mut attention, &ids[..from], CHUNK_TOKENS, Logits::None)?;
    let mut with = answer.log_probs[counted].iter();
    let mut tokens = Vec::with_capacity(with.len());
    for (ids, text_tokens) in ids[from..].chunks(LOGIT_TOKENS).zip(text_tokens[from..].chunks(LOGIT_TOKENS)) {
        let mut logits = model.llama.forward(ids, &mut attention, Logits::All)?;
        let rows = logits.chunks_exact_mut(config.vocab).zip(ids).zip(text_tokens);
        let rows = rows.filter(|((_, id), _)| !config.is_landmark(**id));
        for (((logits, _), token), with) in rows.zip(&mut with) {
            forbid_landmark(config, logits);
            tokens.push(with - log_prob(logits, text[token + 1]));
        }
    }
    // Damaged weights give what is no number.
    Ok(tokens.iter().all(|lift| lift.is_finite()).then_some(Lift { tokens }))
}

/// Tokens that the model was trained to look back over.
fn longest_text(config: &ModelConfig) -> usize {
    let window = config.architecture.window_tokens_max;
    window.map_or(config.context_tokens, |tokens| tokens.min(config.context_tokens)) as usize
}

#[cfg(all(test, feature = "pull"))]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::DType;

    use super::*;
    use crate::full_attention::PlainAttention;
    use crate::tests::write_folder;
    use crate::{
        Encoding, Finish, GenerateOptions, Question, Sampling, ask, encode, generate, golden_families as families,
    };
    use landmarkdb::{
        BlockMemory, CollectionSpec, KeyRule, LocalMemory, Normalisation, Retrieval, SequenceAttention, Window,
    };

    /// `ln p` of each of `answer`, in double precision, where `text` is read one token at a time and the answer follows it.
    fn log_probs(model: &LoadedModel, attention: &mut dyn SequenceAttention, text: &[u32], answer: &[u32]) -> Vec<f64> {
        let config = model.config();
        let mut ends = Vec::new();
        for &id in text.iter().chain(answer) {
            for id in config.reading(attention.position(), &[id]).ids {
                let logits = model.llama.forward(&[id], attention, Logits::Last).unwrap();
                if !config.is_landmark(id) {
                    ends.push(logits);
                }
            }
        }
        let told = ends[text.len() - 1..].iter().zip(answer);
        let log_prob = |(logits, &id): (&Vec<f32>, &u32)| {
            let others = logits.iter().zip(0..).filter(|(_, other)| !config.is_landmark(*other));
            logits[id as usize] as f64 - others.map(|(logit, _)| (*logit as f64).exp()).sum::<f64>().ln()
        };
        told.map(log_prob).collect()
    }

    /// What the lift of an answer has to be: two plain passes, with the document and without.
    fn judge(model: &LoadedModel, document: &[u32], prompt: &[u32], answer: &[u32]) -> Vec<f64> {
        let after = |text: &[&[u32]]| log_probs(model, &mut *full(model), &text.concat(), answer);
        let with = after(&[model.tokenizer.prefix(), document, prompt]);
        let without = after(&[model.tokenizer.prefix(), prompt]);
        with.iter().zip(without).map(|(with, without)| with - without).collect()
    }

    /// In plain loops where they compute what the model does.
    fn full(model: &LoadedModel) -> Box<dyn SequenceAttention> {
        let config = model.config();
        match config.normalisation() {
            Normalisation::Plain => Box::new(PlainAttention::new(config)),
            grouped => Box::new(BlockAttention::full(&model.shape(config.block_tokens()).unwrap(), grouped)),
        }
    }

    #[track_caller]
    fn near(found: &Lift, want: &[f64]) {
        assert_eq!(found.tokens.len(), want.len());
        for (found, want) in found.tokens.iter().zip(want) {
            assert!((*found as f64 - want).abs() < 1e-3, "{found}, expected {want}");
        }
    }

    fn tiny() -> LoadedModel {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), DType::F32, 1);
        LoadedModel::open(folder.path()).unwrap()
    }

    fn of_family(case: &str) -> LoadedModel {
        LoadedModel { llama: families::load(&families::folder().join(case)).unwrap(), ..tiny() }
    }

    fn austen() -> LoadedModel {
        LoadedModel::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen"))).unwrap()
    }

    fn ids(model: &LoadedModel, text: &str) -> Vec<u32> {
        model.tokenizer.encode(text).unwrap().ids
    }

    /// An answer after a document and a prompt, under full attention.
    fn answer(model: &LoadedModel, document: &[u32], prompt: &[u32], options: &GenerateOptions) -> Generated {
        let text = [model.tokenizer.prefix(), document, prompt].concat();
        generate(model, &mut *full(model), &text, options, &mut |_| {}).unwrap()
    }

    const PROMPT: &str = " Who sails it?";

    #[test]
    fn the_lift_of_an_answer_is_what_two_plain_passes_say() {
        let model = tiny();
        let (text, prompt) = ("Ines Moreau sails.", ids(&model, PROMPT));
        let folder = tempfile::tempdir().unwrap();
        let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path()).unwrap());
        let collection = CollectionSpec {
            name: "ships".into(),
            shape: model.shape(8).unwrap(),
            key_rule: KeyRule::Tokens,
            payload_dtype: landmarkdb::DType::F32,
            key_dtype: landmarkdb::DType::F16,
            model_digest: model.model_digest,
            tokenizer_digest: model.tokenizer_digest(),
            model_name: model.name.clone(),
        };
        let collection = memory.open_collection(&collection).unwrap();
        let window = Window::default();
        let encoding = Encoding { name: "albatross", text, window, retrieval: None, stays_open: false };
        let document = encode(&model, &memory, &collection, &encoding, &mut |_| {}).unwrap();
        // What filters and penalties make of the odds is no matter.
        let by_chance = Sampling { temperature: 1.5, top_k: 20, repeat_penalty: 1.5, seed: 3, ..Sampling::default() };
        for sampling in [Sampling::default(), by_chance] {
            let options =
                GenerateOptions { max_tokens: 20, may_be_empty: false, sampling, ..GenerateOptions::default() };
            let retrieval = Retrieval::default();
            let question =
                Question { documents: std::slice::from_ref(&document), prompt: &prompt, window, retrieval, options };
            let answer = ask(&model, &memory, &collection, &question, &mut |_| {}).unwrap().generated;
            let found = lift(&model, &prompt, &answer).unwrap().unwrap();
            let want = judge(&model, &ids(&model, text), &prompt, &answer.ids);
            near(&found, &want[answer.text_ids.clone()]);
            assert!(found.tokens.len() > 1 && found.peak() > 1e-2, "nothing was lifted: {found:?}");
        }
    }

    /// Sliding layers, layers without rotation, and landmarks among the tokens.
    #[test]
    fn every_kind_of_model_reads_its_answer_again() {
        for model in ["gemma3-270m", "smollm3", "qwen3"].map(of_family).into_iter().chain([austen()]) {
            let (document, prompt) = (ids(&model, "Ines Moreau sails the Albatross."), ids(&model, PROMPT));
            // Of landmark models the answer spans blocks.
            let answer = answer(&model, &document, &prompt, &GenerateOptions { max_tokens: 40, ..Default::default() });
            let found = lift(&model, &prompt, &answer).unwrap().unwrap();
            near(&found, &judge(&model, &document, &prompt, &answer.ids)[answer.text_ids.clone()]);
            assert!(found.peak() > 1e-2, "{}: nothing was lifted", model.name);
        }
    }

    #[test]
    fn the_peak_is_of_the_three_tokens_that_rose_most() {
        for (tokens, peak, from_documents) in [
            (&[0.1, 5.0, -3.0, 2.0, 0.5][..], 2.5, true),
            (&[0.0, 1.5, 1.5, 1.5], 1.5, true),
            (&[1.4, 1.5, 1.5, 0.0], 4.4 / 3.0, false),
            (&[3.0, 1.0], 2.0, true),
            (&[-2.0], -2.0, false),
        ] {
            let lift = Lift { tokens: tokens.to_vec() };
            assert!((lift.peak() - peak).abs() < 1e-6, "{tokens:?}: {}", lift.peak());
            assert_eq!(lift.is_from_documents(), from_documents, "{tokens:?}");
        }
    }

    #[test]
    fn without_documents_nothing_is_lifted() {
        for model in [tiny(), austen()] {
            let prompt = ids(&model, PROMPT);
            let answer = answer(&model, &[], &prompt, &GenerateOptions { max_tokens: 40, ..Default::default() });
            near(&lift(&model, &prompt, &answer).unwrap().unwrap(), &vec![0.0; answer.text_ids.len()]);
        }
    }

    #[test]
    fn tokens_outside_of_the_text_do_not_count() {
        let model = austen();
        let (document, prompt) = (ids(&model, "Anne was gone. "), ids(&model, "She"));
        let options = |max_tokens, stop: &str| {
            let stop = Vec::from_iter((!stop.is_empty()).then(|| stop.to_string()));
            GenerateOptions { max_tokens, stop, ..GenerateOptions::default() }
        };
        let whole = answer(&model, &document, &prompt, &options(24, ""));
        let all = lift(&model, &prompt, &whole).unwrap().unwrap();
        assert_eq!(whole.log_probs.len(), whole.ids.len());

        // The text ends in the midst of a token, which counts; those behind it do not.
        let middle = whole.text.char_indices().nth(whole.text.chars().count() / 2).unwrap().0;
        let stopped = answer(&model, &document, &prompt, &options(24, &whole.text[middle..middle + 4]));
        assert_eq!(stopped.finish, Finish::Stop);
        let text = model.tokenizer.decode(&stopped.ids[stopped.text_ids.clone()]);
        assert!(text.trim_start().starts_with(&stopped.text), "{text:?}");
        let shorter = model.tokenizer.decode(&stopped.ids[..stopped.text_ids.end - 1]);
        assert!(shorter.trim_start().len() < stopped.text.len(), "{shorter:?}");
        let counted = lift(&model, &prompt, &stopped).unwrap().unwrap();
        near(&counted, &all.tokens[..counted.tokens.len()].iter().map(|lift| *lift as f64).collect::<Vec<_>>());

        assert_eq!(lift(&model, &prompt, &answer(&model, &document, &prompt, &options(0, ""))).unwrap(), None);
        let one = answer(&model, &document, &prompt, &options(1, ""));
        assert_eq!(lift(&model, &prompt, &one).unwrap().map(|lift| lift.tokens.len()), Some(1));
    }

    #[test]
    fn more_than_the_context_has_no_lift() {
        let options = GenerateOptions { max_tokens: 4, ..GenerateOptions::default() };
        // The context, and what all layers look back over.
        for (model, longest) in [(tiny(), 64), (of_family("mistral-window"), 24)] {
            let prompt = |tokens: usize| vec![ids(&model, "a")[0]; tokens];
            // A prefix of one token, and the last of the answer is not read.
            let fits = prompt(longest - 4);
            let told = answer(&model, &[], &fits, &options);
            assert_eq!(told.text_ids, 0..4);
            assert!(lift(&model, &fits, &told).unwrap().is_some());
            assert_eq!(lift(&model, &prompt(longest - 3), &told).unwrap(), None);
        }
    }
}
