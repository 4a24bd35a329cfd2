//! A byte-level BPE vocabulary, trained on the texts that the model will read.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::error::TrainError;

/// Ends a text. Always the first token.
pub(super) const END_OF_TEXT: &str = "<|endoftext|>";

/// Closes a block. Always the last token.
pub(super) const LANDMARK: &str = "<landmark>";

/// Every byte and the two control tokens.
pub(super) const VOCABULARY_MIN: usize = 256 + 2;

/// Trains a vocabulary of `size` tokens and returns it as a `tokenizer.json`. Each digit is a token of its own, because
/// a number that is to be copied should not depend on how its digits were merged. Any UTF-8 text can be encoded.
///
/// # Errors
/// When the texts repeat too little to make `size` tokens.
pub(super) fn train_vocabulary(texts: &[String], size: usize) -> Result<String, TrainError> {
    if texts.iter().all(|text| text.trim().is_empty()) {
        return Err(TrainError::NoText);
    }
    let broken = |error: tokenizers::Error| TrainError::Vocabulary { detail: error.to_string() };
    let words = Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()]);
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(words.into()))
            .with_decoder(Some(ByteLevel::default().into()))
            .build()
            .map_err(broken)?;
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        // A pair seen once is no pattern.
        .min_frequency(2)
        .vocab_size(size - 1)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .build();
    // By paragraphs, so that the work spreads over the cores. No word reaches over an empty line.
    tokenizer.train(&mut trainer, texts.iter().flat_map(|text| text.split_inclusive("\n\n"))).map_err(broken)?;
    tokenizer.add_special_tokens([AddedToken::from(LANDMARK, true)]).map_err(broken)?;
    let found = tokenizer.get_vocab_size(true);
    if found != size {
        return Err(TrainError::VocabularyTooLarge { expected: size, found });
    }
    tokenizer.to_string(false).map_err(broken)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use landmarkdb_llm::Tokenizer;

    /// Real prose.
    pub(in crate::train) fn prose(bytes: usize) -> String {
        include_str!("../../texts/persuasion.txt")[..bytes].into()
    }

    pub(in crate::train) fn tokenizer(size: usize) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, train_vocabulary(&[prose(60_000)], size).unwrap()).unwrap();
        Tokenizer::open(&path).unwrap()
    }

    #[test]
    fn control_tokens_are_first_and_last() {
        let tokenizer = tokenizer(512);
        assert_eq!(tokenizer.vocab(), 512);
        assert_eq!(tokenizer.token_id(END_OF_TEXT), Some(0));
        assert_eq!(tokenizer.token_id(LANDMARK), Some(511));
        assert!(tokenizer.prefix().is_empty());
    }

    #[test]
    fn any_text_comes_back_and_is_made_of_known_tokens() {
        let tokenizer = tokenizer(400);
        let every_byte: String = (0..=0x10ffff).filter_map(char::from_u32).step_by(997).collect();
        for text in ["", " a", "£ naïve 🙂\r\n\t\0", "<landmark><|endoftext|>", &every_byte, &prose(5000)] {
            let encoded = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&encoded.ids), text);
            assert!(encoded.ids.iter().all(|&id| 0 < id && id < 399), "a text holds no control token");
        }
    }

    #[test]
    fn every_digit_is_a_token_and_words_are_merged() {
        let tokenizer = tokenizer(512);
        let pieces = |text: &str| {
            let ids = tokenizer.encode(text).unwrap().ids;
            ids.iter().map(|id| tokenizer.decode(&[*id])).collect::<Vec<_>>()
        };
        assert_eq!(pieces(" 10203."), [" ", "1", "0", "2", "0", "3", "."]);
        assert_eq!(pieces(" and the"), [" and", " the"]);
    }

    #[test]
    fn the_same_texts_give_the_same_file() {
        let train = || train_vocabulary(&[prose(200_000)], 700).unwrap();
        let first = train();
        for _ in 0..4 {
            assert!(train() == first);
        }
    }

    #[test]
    fn too_little_text_is_refused() {
        let train = |text: &str| train_vocabulary(&[text.into()], 512).unwrap_err();
        assert!(matches!(train(""), TrainError::NoText));
        assert!(matches!(train(" \n"), TrainError::NoText));
        let few = train("The grass is green.");
        assert!(matches!(few, TrainError::VocabularyTooLarge { expected: 512, found: 258.. }), "{few}");
    }
}
