//! Texts as token ids, and windows of them.

use rand::{Rng, RngExt};
use rayon::prelude::*;

use super::error::TrainError;
use landmarkdb_llm::{TokenizeError, Tokenizer};

/// The tokens of several texts, each cut once.
pub(super) struct Texts {
    texts: Vec<Vec<u32>>,
}

impl Texts {
    /// Cuts all texts into tokens. Empty ones are left out.
    pub(super) fn new(texts: &[String], tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        let texts: Vec<Vec<u32>> = texts
            .par_iter()
            .map(|text| Ok(tokenizer.encode(text)?.ids))
            .filter(|ids| !ids.as_ref().is_ok_and(Vec::is_empty))
            .collect::<Result<_, TokenizeError>>()?;
        if texts.is_empty() { Err(TrainError::NoText) } else { Ok(Texts { texts }) }
    }

    /// Tokens of all texts.
    pub(super) fn tokens(&self) -> usize {
        self.texts.iter().map(Vec::len).sum()
    }

    /// Refuses texts that hold no window of `tokens`.
    pub(super) fn check_window(&self, tokens: usize) -> Result<(), TrainError> {
        let longest = self.texts.iter().map(Vec::len).max().unwrap_or(0);
        match longest >= tokens {
            true => Ok(()),
            false => Err(TrainError::TextTooShort { expected_tokens: tokens, longest_tokens: longest }),
        }
    }

    /// A window of one text, every place of every text as likely as any other.
    ///
    /// # Panics
    /// When no text is that long: see [`Texts::check_window`].
    pub(super) fn window(&self, tokens: usize, rng: &mut impl Rng) -> &[u32] {
        let places = |text: &[u32]| (text.len() + 1).saturating_sub(tokens);
        let mut place = rng.random_range(0..self.texts.iter().map(|text| places(text)).sum::<usize>());
        for text in &self.texts {
            if place < places(text) {
                return &text[place..][..tokens];
            }
            place -= places(text);
        }
        unreachable!("the place was drawn among those counted")
    }

    /// `tokens` tokens from place `at` on, all texts read one after the other as a ring.
    pub(super) fn read(&self, at: u64, tokens: usize) -> Vec<u32> {
        let begin = (at % self.tokens() as u64) as usize;
        self.texts.iter().flatten().cycle().skip(begin).take(tokens).copied().collect()
    }

    /// At most `count_max` windows of `tokens`, evenly spaced over all texts and not overlapping.
    pub(super) fn spread(&self, tokens: usize, count_max: usize) -> Vec<&[u32]> {
        let windows: Vec<&[u32]> = self.texts.iter().flat_map(|text| text.chunks_exact(tokens)).collect();
        let count = count_max.min(windows.len());
        (0..count).map(|index| windows[index * windows.len() / count]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::vocabulary::tests::{prose, tokenizer};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn numbered(lengths: &[usize]) -> Texts {
        let mut next = 0..;
        Texts { texts: lengths.iter().map(|&length| next.by_ref().take(length).collect()).collect() }
    }

    #[test]
    fn windows_come_from_every_place_and_never_span_two_texts() {
        let texts = numbered(&[3, 2, 5]);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut starts = [0; 10];
        for _ in 0..4000 {
            let window = texts.window(3, &mut rng);
            assert!(window.windows(2).all(|pair| pair[1] == pair[0] + 1));
            starts[window[0] as usize] += 1;
        }
        for (start, count) in starts.into_iter().enumerate() {
            let possible = [0, 5, 6, 7].contains(&start);
            assert!(if possible { count > 800 } else { count == 0 }, "{start}: {count}");
        }
        assert!(texts.check_window(5).is_ok());
        let error = texts.check_window(6).unwrap_err();
        assert!(matches!(error, TrainError::TextTooShort { expected_tokens: 6, longest_tokens: 5 }), "{error}");
    }

    #[test]
    fn reading_goes_round() {
        let texts = numbered(&[3, 2]);
        assert_eq!(texts.read(1, 3), [1, 2, 3]);
        assert_eq!(texts.read(14, 7), [4, 0, 1, 2, 3, 4, 0]);
    }

    #[test]
    fn spread_windows_are_apart() {
        let texts = numbered(&[7, 2, 20]);
        assert_eq!(texts.spread(3, 100).len(), 2 + 6);
        let few = texts.spread(3, 4);
        assert_eq!(few.iter().map(|window| window[0]).collect::<Vec<_>>(), [0, 9, 15, 21]);
        assert!(texts.spread(30, 4).is_empty());
    }

    #[test]
    fn texts_without_a_token_are_no_texts() {
        let tokenizer = tokenizer(300);
        assert!(matches!(Texts::new(&[], &tokenizer), Err(TrainError::NoText)));
        assert!(matches!(Texts::new(&["".into()], &tokenizer), Err(TrainError::NoText)));
        let text = prose(2000);
        let texts = Texts::new(&["".into(), text.clone()], &tokenizer).unwrap();
        assert_eq!(tokenizer.decode(&texts.read(0, texts.tokens())), text);
    }
}
