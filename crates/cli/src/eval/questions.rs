//! `landmarkdb eval questions`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::Context;
use crate::encode::{read, token_bar};
use crate::error::CliError;
use crate::numbers::{from_one, top_k};
use crate::output::{Report, excerpt, shown_line, table, write_table};
use crate::settings::SetupArgs;
use landmarkdb_lab::eval::{self, QuestionAnswer, QuestionCase, QuestionSettings};

/// Characters of a wrong answer that are shown.
const EXCERPT_CHARS: usize = 100;

/// Ask questions about your own texts, and count the right answers.
///
/// FILE is a JSON list of cases: {"documents": ["a.txt"], "question": "..", "answers": ["..", ".."], "group": ".."}. Documents are
/// found beside FILE; an answer is right if it holds one of "answers"; cases of a "group" are counted together. Every text is encoded
/// once, all questions are asked as `ask` asks them. Works in a temporary directory unless --data or --connect is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb eval questions questions.json
  landmarkdb eval questions questions.json --blocks 2,4,8 --window 1024 --json
  landmarkdb eval questions questions.json --full-attention
")]
pub(crate) struct Args {
    /// The questions.
    file: PathBuf,

    /// Blocks retrieved per choice (k); several share the encoded texts.
    #[arg(long = "blocks", value_name = "K", value_delimiter = ',', default_value = "4", value_parser = top_k())]
    top_k: Vec<u32>,

    /// The baseline: ask the model alone, with full attention over the texts, where they fit its context.
    #[arg(long)]
    full_attention: bool,

    /// Maximum length of an answer in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = from_one::<usize>())]
    max_tokens: usize,

    #[command(flatten)]
    setup: SetupArgs,
}

/// How the questions were answered.
#[derive(Debug, Serialize)]
struct QuestionsReport {
    model: String,
    results: Vec<GroupResult>,
    cases: Vec<Case>,
}

/// All cases of one group, or all of them, and one k.
#[derive(Debug, Serialize)]
struct GroupResult {
    /// None: all cases.
    group: Option<String>,
    /// None, here and below: full attention.
    top_k: Option<u32>,
    correct: usize,
    asked: usize,
    /// Cases whose texts are longer than the model's context.
    too_long: usize,
    /// Mean over those that were asked.
    first_token_s: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Case {
    group: String,
    question: String,
    expected: Vec<String>,
    top_k: Option<u32>,
    /// None: too long for full attention.
    answer: Option<String>,
    correct: bool,
    first_token_s: Option<f64>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let cases = cases(&args.file)?;
    let texts = texts(&args.file, &cases)?;
    let model = args.setup.model.load(context)?;
    let config = model.config();
    let bar = token_bar(context, "");
    let answers = if args.full_attention {
        eval::questions_full(&model, &cases, &texts, args.max_tokens, &mut |case| {
            bar.label(&format!("question {} of {}", case + 1, cases.len()));
        })?
    } else {
        let settings = QuestionSettings {
            top_k: args.top_k.clone(),
            window: args.setup.window.window(config)?,
            encode_retrieval: args.setup.encode_retrieval(config)?,
            retrieval: args.setup.retrieval.retrieval(config, 1)?,
            max_tokens: args.max_tokens,
        };
        let scratch = context.scratch_memory()?;
        let collection = &scratch.collections(&args.setup.storage, &[], &model)?[0];
        let mut progress = |file: &PathBuf, step| {
            bar.label(&file.display().to_string());
            bar.show(step);
        };
        eval::questions(&model, &scratch.memory, collection, &cases, &texts, &settings, &mut progress)?
    };
    bar.finish();
    context.output.print(&QuestionsReport::new(&model.name, &cases, answers))
}

fn cases(file: &Path) -> Result<Vec<QuestionCase>, CliError> {
    let json = read(file)?;
    let wrong = |problem: String| CliError::Questions { path: file.into(), problem };
    let cases: Vec<QuestionCase> = serde_json::from_str(&json).map_err(|error| wrong(error.to_string()))?;
    if cases.is_empty() {
        return Err(wrong("expected at least one question, found none".into()));
    }
    for (number, case) in cases.iter().enumerate() {
        let problem = match case {
            QuestionCase { documents, .. } if documents.is_empty() => "documents: expected a file, found none",
            QuestionCase { question, .. } if question.trim().is_empty() => "question: expected words, found none",
            QuestionCase { answers, .. } if answers.is_empty() || answers.iter().any(|a| a.trim().is_empty()) => {
                "answers: expected words that a right answer holds, found none"
            }
            _ => continue,
        };
        return Err(wrong(format!("question {}: {problem}", number + 1)));
    }
    Ok(cases)
}

/// Every file that is asked about, by the name that the cases have for it.
fn texts(file: &Path, cases: &[QuestionCase]) -> Result<BTreeMap<PathBuf, String>, CliError> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let mut texts = BTreeMap::new();
    for document in cases.iter().flat_map(|case| &case.documents) {
        if !texts.contains_key(document) {
            let path = folder.join(document);
            let text = read(&path)?;
            if text.trim().is_empty() {
                return Err(CliError::EmptyText { path });
            }
            texts.insert(document.clone(), text);
        }
    }
    Ok(texts)
}

impl QuestionsReport {
    fn new(model: &str, cases: &[QuestionCase], answers: Vec<QuestionAnswer>) -> Self {
        let mut groups: Vec<Option<&str>> = Vec::new();
        for case in cases {
            if !groups.contains(&Some(&case.group[..])) {
                groups.push(Some(&case.group));
            }
        }
        if groups.len() > 1 {
            groups.push(None);
        } else {
            groups = vec![None];
        }
        let mut ks: Vec<Option<u32>> = Vec::new();
        for answer in &answers {
            if !ks.contains(&answer.top_k) {
                ks.push(answer.top_k);
            }
        }
        let kinds = ks.iter().flat_map(|&top_k| groups.iter().map(move |&group| (group, top_k)));
        let results = kinds.map(|(group, top_k)| {
            let of_kind = |answer: &&QuestionAnswer| {
                answer.top_k == top_k && group.is_none_or(|group| cases[answer.case].group == group)
            };
            GroupResult::new(group, top_k, &answers.iter().filter(of_kind).collect::<Vec<_>>())
        });
        QuestionsReport {
            model: model.into(),
            results: results.collect(),
            cases: answers.into_iter().map(|answer| Case::new(&cases[answer.case], answer)).collect(),
        }
    }
}

impl GroupResult {
    fn new(group: Option<&str>, top_k: Option<u32>, answers: &[&QuestionAnswer]) -> Self {
        let answered: Vec<_> = answers.iter().filter_map(|answer| answer.answered.as_ref()).collect();
        let seconds: f64 = answered.iter().map(|answered| answered.first_token_s).sum();
        GroupResult {
            group: group.map(str::to_string),
            top_k,
            correct: answered.iter().filter(|answered| answered.correct).count(),
            asked: answered.len(),
            too_long: answers.len() - answered.len(),
            first_token_s: (!answered.is_empty()).then(|| seconds / answered.len() as f64),
        }
    }
}

impl Case {
    fn new(case: &QuestionCase, answer: QuestionAnswer) -> Self {
        Case {
            group: case.group.clone(),
            question: case.question.clone(),
            expected: case.answers.clone(),
            top_k: answer.top_k,
            correct: answer.answered.as_ref().is_some_and(|answered| answered.correct),
            first_token_s: answer.answered.as_ref().map(|answered| answered.first_token_s),
            answer: answer.answered.map(|answered| answered.text),
        }
    }
}

impl Report for QuestionsReport {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut rows = table(["QUESTIONS", "K>", "CORRECT>", "FIRST TOKEN>"]);
        for result in &self.results {
            rows.add_row([
                result.group.clone().unwrap_or_else(|| "all".into()),
                result.top_k.map_or("all".into(), |k| k.to_string()),
                format!("{} of {}", result.correct, result.asked),
                result.first_token_s.map(|seconds| format!("{seconds:.2} s")).unwrap_or_default(),
            ]);
        }
        write_table(to, &rows)?;
        for Case { question, expected, top_k, answer, correct, .. } in &self.cases {
            let with = top_k.map_or("full attention".into(), |k| format!("k = {k}"));
            let question = shown_line(question);
            match answer {
                _ if *correct => {}
                None => writeln!(to, "not asked, longer than the model's context: {question}")?,
                Some(answer) => {
                    let answer = excerpt(answer.as_bytes(), EXCERPT_CHARS);
                    let expected = shown_line(&expected.join(" or "));
                    writeln!(to, "wrong: {question} ({with}): expected {expected}, answered {answer}")?;
                }
            }
        }
        Ok(())
    }
}
