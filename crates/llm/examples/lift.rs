//! How well the lift of an answer tells whether it came from the documents:
//! `cargo run --release -p landmarkdb-llm --example lift -- smollm2`, with `--words` asked in words in place of the chat template.
//!
//! `texts/questions.json` asks of each text what stands in it (`answered`, or `wrong` where the model did not find it), what it does not
//! say (`unmentioned`), and what has nothing to do with it (`general`).

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use landmarkdb::{BlockMemory, CollectionSpec, DType, LocalMemory, Normalisation};
use landmarkdb_llm::{
    Asked, Encoding, Frame, GenerateOptions, Lift, LoadedModel, Question, ask, encode, frame_question, lift, resolve,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Text {
    text: Option<String>,
    /// Of the novel, where there is no text.
    chapter: Option<String>,
    /// Questions, each with words of its answer, spelled one way or another: `seven|7`.
    answered: BTreeMap<String, String>,
    unmentioned: Vec<String>,
    general: Vec<String>,
}

/// What one number of an answer could be.
type Candidate = (&'static str, fn(&Lift) -> f32);

/// What could be compared with a threshold.
const CANDIDATES: [Candidate; 3] = [
    ("the largest", |lift| lift.tokens.iter().copied().fold(f32::NEG_INFINITY, f32::max)),
    ("peak, the mean of three", Lift::peak),
    ("the mean of all", |lift| mean(&lift.tokens)),
];

/// Of answers: right ones that stand in the text, and the others that are compared with them.
const KINDS: [&str; 4] = ["answered", "wrong", "unmentioned", "general"];

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len() as f32
}

fn main() -> Result<(), Box<dyn Error>> {
    let typed: Vec<String> = std::env::args().skip(1).collect();
    let in_words = typed.iter().any(|word| word == "--words");
    let name = typed.iter().find(|word| !word.starts_with("--")).map_or("smollm2", String::as_str);
    let model = LoadedModel::open(&resolve(name)?)?;
    let texts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../texts");
    let novel = std::fs::read_to_string(texts.join("persuasion.txt"))?;
    let asked: Vec<Text> = serde_json::from_str(&std::fs::read_to_string(texts.join("questions.json"))?)?;

    let mut measured: BTreeMap<&str, Vec<Lift>> = BTreeMap::new();
    for text in &asked {
        let of_novel = text.chapter.as_deref().and_then(|heading| chapter(&novel, heading));
        let memory = Memory::with(&model, text.text.as_deref().or(of_novel).ok_or("an entry without a text")?)?;
        let answered = text.answered.iter().map(|(question, answer)| ("answered", question, Some(answer)));
        let unmentioned = text.unmentioned.iter().map(|question| ("unmentioned", question, None));
        let general = text.general.iter().map(|question| ("general", question, None));
        for (kind, question, expected) in answered.chain(unmentioned).chain(general) {
            let (answer, lift) = memory.ask(&model, question, in_words)?;
            let told = |words: &str| answer.to_lowercase().contains(&words.to_lowercase());
            let kind = match expected {
                Some(words) if !words.split('|').any(told) => "wrong",
                _ => kind,
            };
            let lift = lift.ok_or("an answer without a lift")?;
            let candidates = CANDIDATES.map(|(_, of)| format!("{:6.2}", of(&lift))).join(" ");
            println!("{kind:<12} {candidates}  {question} {answer:?}");
            measured.entry(kind).or_default().push(lift);
        }
    }
    report(&measured);
    Ok(())
}

/// The text of a chapter, without its heading.
fn chapter<'a>(novel: &'a str, heading: &str) -> Option<&'a str> {
    let (_, from) = novel.split_once(&format!("\n\n{heading}\n\n"))?;
    Some(from.split("\n\nChapter ").next().unwrap_or(from))
}

/// One text, as `landmarkdb encode` keeps it.
struct Memory {
    memory: Arc<dyn BlockMemory>,
    collection: landmarkdb::CollectionInfo,
    document: landmarkdb::DocumentInfo,
    text_end: String,
    _folder: tempfile::TempDir,
}

impl Memory {
    fn with(model: &LoadedModel, text: &str) -> Result<Self, Box<dyn Error>> {
        let (folder, config) = (tempfile::tempdir()?, model.config());
        let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path())?);
        let collection = memory.open_collection(&CollectionSpec {
            name: "texts".into(),
            shape: model.shape(config.block_tokens())?,
            key_rule: config.key_rule(),
            payload_dtype: DType::F16,
            key_dtype: if config.normalisation() == Normalisation::Plain { DType::Int8 } else { DType::F16 },
            model_digest: model.model_digest,
            tokenizer_digest: model.tokenizer_digest(),
            model_name: model.name.clone(),
        })?;
        let (window, retrieval) = (config.window(), config.encode_retrieval());
        let encoding = Encoding { name: "text", text, window, retrieval, stays_open: false };
        let document = encode(model, &memory, &collection, &encoding, &mut |_| {})?;
        let text_end = text.chars().rev().take(2).collect::<Vec<_>>().into_iter().rev().collect();
        Ok(Memory { memory, collection, document, text_end, _folder: folder })
    }

    fn ask(
        &self,
        model: &LoadedModel,
        question: &str,
        in_words: bool,
    ) -> Result<(String, Option<Lift>), Box<dyn Error>> {
        let Frame { ids, stop } = if in_words {
            let words = format!("\n\nQuestion: {question}\nAnswer:");
            Frame { ids: model.tokenizer.encode(&words)?.ids, stop: vec!["\n".into()] }
        } else {
            frame_question(model, &Asked { question, ..Asked::default() }, &self.text_end)?
        };
        let (window, retrieval) = (model.config().window(), model.config().retrieval());
        let options = GenerateOptions { max_tokens: 48, stop, may_be_empty: false, ..GenerateOptions::default() };
        let documents = std::slice::from_ref(&self.document);
        let question = Question { documents, prompt: &ids, window, retrieval, options };
        let answer = ask(model, &self.memory, &self.collection, &question, &mut |_| {})?.generated;
        let lift = lift(model, &ids, &answer)?;
        Ok((answer.text.trim().to_string(), lift))
    }
}

/// How each candidate tells answers that stand in the text from the others, and how many of each kind the verdict takes for such.
fn report(measured: &BTreeMap<&str, Vec<Lift>>) {
    let of = |kind: &str| measured.get(kind).map_or(&[][..], Vec::as_slice);
    for (name, candidate) in CANDIDATES {
        println!("\n{name}: least, quartiles, most, and how well it sets apart what stands in the text");
        let scores = |kind| {
            let mut scores: Vec<f32> = of(kind).iter().map(candidate).collect();
            scores.sort_by(f32::total_cmp);
            scores
        };
        for kind in KINDS {
            let these = scores(kind);
            let at = (0..5).filter_map(|quarter| these.get(these.len().saturating_sub(1) * quarter / 4));
            let at: String = at.map(|score| format!("{score:6.2}")).collect();
            println!("{kind:<12} {:3} {at}  AUC {:.3}", these.len(), auc(&scores(KINDS[0]), &these));
        }
    }
    println!("\nseem to come from the text");
    for kind in KINDS {
        let from_text = of(kind).iter().filter(|lift| lift.is_from_documents()).count();
        println!("{kind:<12} {from_text:3} of {}", of(kind).len());
    }
}

/// The probability that one of `high` is above one of `low`: 1 where a threshold tells all of them apart, 0.5 by chance.
fn auc(high: &[f32], low: &[f32]) -> f64 {
    let pairs = high.iter().flat_map(|high| low.iter().map(move |low| (high, low)));
    let above = pairs.map(|(high, low)| {
        if high > low {
            1.0
        } else if high == low {
            0.5
        } else {
            0.0
        }
    });
    above.sum::<f64>() / (high.len() * low.len()) as f64
}
