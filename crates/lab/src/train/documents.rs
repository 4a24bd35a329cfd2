//! Passkey documents: a key hidden in irrelevant text, and questions about it.
//!
//! An optional task, irrelevant text, the line with the key, irrelevant text, one to three questions with their answers;
//! sometimes short, with prose behind it. The words are those of the evaluation.

use std::ops::Range;

use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};

use super::error::TrainError;
use super::sequence::{Role, Token};
use super::texts::Texts;
use crate::passkey::{GARBAGE, KEY_DIGITS, QUESTION, TASK, information};
use landmarkdb_llm::Tokenizer;

/// How often a document has the task in front of it.
const TASK_SHARE: f64 = 0.5;

/// How often a document is short, with prose behind it.
const SHORT_SHARE: f64 = 0.2;

/// How often a key is made of two or three digits only: repeated digits are what a copying circuit confuses.
const HARD_SHARE: f64 = 0.5;

/// How often no digit of such a key follows itself. Without them a digit that follows itself is so frequent that a model in
/// doubt says the last one again: 50676 became 50666.
const ALTERNATING_SHARE: f64 = 0.5;

/// What the irrelevant text is, with how often: the paper's cycle, its sentences shuffled, or a window of a book.
const HAYS: [(Hay, f64); 3] = [(Hay::Cycle, 0.4), (Hay::Shuffled, 0.3), (Hay::Prose, 0.3)];

const QUESTIONS_MAX: usize = 3;

/// Below this a key would stand right before its question. It also leaves room for keys that take more tokens than the
/// one that was measured.
const HAY_TOKENS_MIN: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hay {
    Cycle,
    Shuffled,
    Prose,
}

/// Writes passkey documents of a given length.
pub(super) struct Documents<'a> {
    tokenizer: &'a Tokenizer,
    texts: &'a Texts,
    task: Vec<u32>,
    line_end: Vec<u32>,
    question: Vec<u32>,
    /// The paper's garbage, over and over.
    cycle: Vec<u32>,
    /// Its sentences, each with a space before it.
    sentences: Vec<Vec<u32>>,
    /// Between a short document and the prose behind it.
    end_of_text: Option<u32>,
}

impl<'a> Documents<'a> {
    /// `longest` is the most tokens that a document will have.
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        texts: &'a Texts,
        end_of_text: Option<u32>,
        longest: usize,
    ) -> Result<Self, TrainError> {
        let ids = |text: &str| Ok::<_, TrainError>(tokenizer.encode(text)?.ids);
        let once = ids(GARBAGE)?.len();
        // One cycle more than a window needs, so that it can begin anywhere in the first.
        let cycle = ids(&GARBAGE.repeat(longest / once.max(1) + 3))?;
        let sentences = GARBAGE.split_inclusive('.').filter(|sentence| !sentence.trim().is_empty());
        Ok(Documents {
            task: ids(TASK)?,
            line_end: ids("\n")?,
            question: ids(QUESTION)?,
            cycle,
            sentences: sentences.map(|sentence| ids(&format!(" {}", sentence.trim()))).collect::<Result<_, _>>()?,
            end_of_text,
            tokenizer,
            texts,
        })
    }

    /// The shortest document: no task and one question.
    pub(super) fn shortest_tokens(&self) -> Result<usize, TrainError> {
        let key = "12345";
        Ok(self.frame_tokens(&self.information(key)?) + self.asked(key)?.len())
    }

    /// One document of `tokens` tokens, which must be [`Documents::shortest_tokens`] or more.
    pub(super) fn write(&self, tokens: usize, rng: &mut impl Rng) -> Result<Vec<Token>, TrainError> {
        let key = key(rng);
        let (information, asked) = (self.information(&key)?, self.asked(&key)?);
        let room = tokens.saturating_sub(self.frame_tokens(&information));
        let questions = rng.random_range(1..=QUESTIONS_MAX).min(room / asked.len()).max(1);
        let room = room.saturating_sub(questions * asked.len());
        let task = if rng.random_bool(TASK_SHARE) && self.task.len() <= room { &self.task[..] } else { &[] };
        let room = room - task.len();
        // What the prose behind a short document takes.
        let rest = if rng.random_bool(SHORT_SHARE) { rng.random_range(0..=room) } else { 0 };
        let hay = self.hay(HAY_TOKENS_MIN + room - rest, rng);
        let (before, after) = hay.split_at(rng.random_range(0..=hay.len()));

        let mut document = Vec::with_capacity(tokens);
        push_text(&mut document, task);
        push_text(&mut document, before);
        document.extend(information);
        push_text(&mut document, after);
        // The last sentence of the text ends before the line of the first question.
        push_text(&mut document, &self.line_end);
        document.extend(&asked);
        // The next answer can be copied from the one before, so it says nothing about finding the key.
        let role = |role| if role == Role::Answer { Role::Repeated } else { role };
        let again = asked.iter().map(|token| Token { role: role(token.role), ..*token });
        (1..questions).for_each(|_| document.extend(again.clone()));
        document.truncate(tokens);
        let rest = tokens - document.len();
        if rest > 0 {
            let prose = self.texts.window(rest, rng);
            push_text(&mut document, prose);
            if let Some(end) = self.end_of_text {
                document[tokens - rest].id = end;
            }
        }
        Ok(document)
    }

    /// What a document has beside task, questions and longer hay.
    fn frame_tokens(&self, information: &[Token]) -> usize {
        information.len() + HAY_TOKENS_MIN + self.line_end.len()
    }

    /// The line with the key, between two line ends.
    fn information(&self, key: &str) -> Result<Vec<Token>, TrainError> {
        let text = format!("\n{}\n", information(key));
        let second = text.rfind(key).expect("the line holds the key");
        self.marked(&text, second..second + key.len(), Role::Repeated)
    }

    /// A question with its answer and a line end.
    fn asked(&self, key: &str) -> Result<Vec<Token>, TrainError> {
        let mut asked = Vec::new();
        push_text(&mut asked, &self.question);
        // Cut on its own, because the evaluation lets the model go on from the question's tokens.
        asked.extend(self.marked(&format!(" {key}.\n"), 1..1 + key.len(), Role::Answer)?);
        Ok(asked)
    }

    /// The tokens of `text`; those that cover bytes of `range` have a role.
    fn marked(&self, text: &str, range: Range<usize>, role: Role) -> Result<Vec<Token>, TrainError> {
        let encoded = self.tokenizer.encode(text)?;
        let ends = encoded.offsets.iter().skip(1).copied().chain([text.len()]);
        let covers = |start: usize, end: usize| start < range.end && range.start < end;
        let tokens = encoded
            .ids
            .iter()
            .zip(encoded.offsets.iter().zip(ends))
            .map(|(&id, (&start, end))| Token { id, role: if covers(start, end) { role } else { Role::Text } });
        Ok(tokens.collect())
    }

    /// Irrelevant text.
    fn hay(&self, tokens: usize, rng: &mut impl Rng) -> Vec<u32> {
        let (hay, _) = HAYS.choose_weighted(rng, |(_, share)| *share).expect("the shares are positive");
        match hay {
            Hay::Cycle => self.cycle[rng.random_range(0..self.cycle.len() - tokens)..][..tokens].to_vec(),
            Hay::Shuffled => {
                let mut ids = Vec::with_capacity(tokens);
                while ids.len() < tokens {
                    ids.extend(self.sentences.choose(rng).expect("there are sentences"));
                }
                ids.truncate(tokens);
                ids
            }
            Hay::Prose => self.texts.window(tokens, rng).to_vec(),
        }
    }
}

/// A key without a leading zero, as the evaluation draws them; about half of two or three digits only.
fn key(rng: &mut impl Rng) -> String {
    if !rng.random_bool(HARD_SHARE) {
        let smallest = 10u32.pow(KEY_DIGITS as u32 - 1);
        return rng.random_range(smallest..10 * smallest).to_string();
    }
    let mut digits: Vec<char> = ('0'..='9').collect();
    let distinct = rng.random_range(2..=3);
    let (digits, _) = rand::seq::SliceRandom::partial_shuffle(&mut digits[..], rng, distinct);
    let alternating = rng.random_bool(ALTERNATING_SHARE);
    loop {
        let key: String = (0..KEY_DIGITS).map(|_| digits[rng.random_range(0..distinct)]).collect();
        let doubled = key.as_bytes().windows(2).any(|pair| pair[0] == pair[1]);
        if digits.iter().all(|&digit| key.contains(digit)) && !key.starts_with('0') && !(alternating && doubled) {
            return key;
        }
    }
}

fn push_text(document: &mut Vec<Token>, ids: &[u32]) {
    document.extend(ids.iter().map(|&id| Token { id, role: Role::Text }));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::train::vocabulary::tests::{prose, tokenizer};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    const TOKENS: usize = 320;

    fn decoded(tokenizer: &Tokenizer, document: &[Token], role: Role) -> String {
        let ids: Vec<u32> = document.iter().filter(|token| token.role == role).map(|token| token.id).collect();
        tokenizer.decode(&ids)
    }

    fn text(tokenizer: &Tokenizer, document: &[Token]) -> String {
        tokenizer.decode(&document.iter().map(|token| token.id).collect::<Vec<_>>())
    }

    #[test]
    fn a_document_hides_a_key_and_asks_for_it() {
        let tokenizer = tokenizer(512);
        let texts = Texts::new(&[prose(100_000)], &tokenizer).unwrap();
        let documents = Documents::new(&tokenizer, &texts, Some(0), TOKENS).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let (mut tasks, mut short, mut questions) = (0, 0, BTreeSet::new());
        for _ in 0..200 {
            let document = documents.write(TOKENS, &mut rng).unwrap();
            assert_eq!(document.len(), TOKENS);
            let text = text(&tokenizer, &document);
            let key = decoded(&tokenizer, &document, Role::Answer);
            assert_eq!(key.len(), KEY_DIGITS, "{text}");
            assert_eq!(text.matches(&format!("\n{}\n", information(&key))).count(), 1, "{text}");
            let asked = text.matches(&format!("{QUESTION} {key}.\n")).count();
            assert!(text.contains(&format!("\n{QUESTION}")), "{text}");
            // Said twice in its line, and once more in every answer.
            assert_eq!(decoded(&tokenizer, &document, Role::Repeated), key.repeat(asked), "{text}");
            assert!(text.find(&information(&key)) < text.find(QUESTION), "{text}");
            questions.insert(asked);
            tasks += text.starts_with(TASK) as usize;
            let ended = document.iter().position(|token| token.id == 0);
            assert_eq!(ended.is_none(), text.ends_with(&format!("{QUESTION} {key}.\n")), "{text}");
            short += ended.is_some() as usize;
        }
        assert_eq!(questions, BTreeSet::from([1, 2, 3]));
        assert!((70..130).contains(&tasks) && (20..60).contains(&short), "{tasks} {short}");
    }

    #[test]
    fn every_kind_of_hay_comes_up() {
        let tokenizer = tokenizer(512);
        let texts = Texts::new(&[prose(100_000)], &tokenizer).unwrap();
        let documents = Documents::new(&tokenizer, &texts, None, TOKENS).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let (mut cycles, mut shuffled, mut books) = (0, 0, 0);
        for _ in 0..300 {
            let hay = tokenizer.decode(&documents.hay(160, &mut rng));
            let whole_cycle = GARBAGE.repeat(40);
            match hay {
                hay if whole_cycle.contains(&hay) => cycles += 1,
                hay if hay.contains(" Here we go.") || hay.contains(" The sun is yellow.") => shuffled += 1,
                _ => books += 1,
            }
        }
        assert!((90..150).contains(&cycles) && (60..120).contains(&shuffled) && (60..120).contains(&books));
    }

    #[test]
    fn half_of_the_keys_repeat_their_digits() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let keys: Vec<String> = (0..1000).map(|_| key(&mut rng)).collect();
        let hard = |key: &&String| key.chars().collect::<BTreeSet<_>>().len() <= 3;
        assert!(keys.iter().all(|key| key.len() == KEY_DIGITS && !key.starts_with('0')));
        // Of keys drawn at random every fifth has three different digits or fewer.
        assert!((540..660).contains(&keys.iter().filter(hard).count()));
    }

    #[test]
    fn the_shortest_document_still_hides_and_asks() {
        let tokenizer = tokenizer(512);
        let texts = Texts::new(&[prose(100_000)], &tokenizer).unwrap();
        let documents = Documents::new(&tokenizer, &texts, Some(0), TOKENS).unwrap();
        let shortest = documents.shortest_tokens().unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        for tokens in [shortest, shortest + 1, shortest + 20] {
            let document = documents.write(tokens, &mut rng).unwrap();
            assert_eq!(document.len(), tokens);
            assert_eq!(decoded(&tokenizer, &document, Role::Answer).len(), KEY_DIGITS);
        }
    }
}
