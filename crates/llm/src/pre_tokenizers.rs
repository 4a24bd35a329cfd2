//! How words are cut apart before byte-level BPE, as `tokenizer.ggml.pre` of a GGUF file names it.
//!
//! The names are llama.cpp's. Where it rewrites a pattern for its own engine, the pattern here is the one that it rewrites: that
//! of the models' own `tokenizer.json`, which they were trained with.

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

/// One way to cut, and what else goes with its name.
#[derive(Clone, Copy)]
pub(super) struct PreTokenizer {
    /// Each cuts the pieces that the one before left.
    cuts: &'static [Cut],
    /// GPT-2's pattern follows the cuts.
    gpt2_pattern: bool,
    /// A whole word that is in the vocabulary is one token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a text begins with the begin-of-text token where the file does not say.
    pub(super) add_bos: bool,
}

#[derive(Clone, Copy)]
enum Cut {
    EveryDigit,
    /// What matches is a piece, and what lies between.
    Pattern(&'static str),
}

const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_CODER: &[Cut] = &[
    Cut::Pattern(r"[\r\n]"),
    Cut::Pattern(r"\s?\p{L}+"),
    Cut::Pattern(r"\s?\p{P}+"),
    Cut::Pattern(r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"),
    Cut::EveryDigit,
];
const DEFAULT: &[Cut] = &[
    Cut::Pattern(r"[\p{P}\$\+<=>\^~\|]+"),
    Cut::Pattern(GPT_2),
    Cut::Pattern(r"\p{N}+"),
    Cut::Pattern("[0-9][0-9][0-9]"),
];

const GPT2_ALONE: PreTokenizer = PreTokenizer { cuts: &[], gpt2_pattern: true, ignore_merges: false, add_bos: false };
const DIGITS_AND_GPT2: PreTokenizer = PreTokenizer { cuts: &[Cut::EveryDigit], ..GPT2_ALONE };

const fn cut(cuts: &'static [Cut]) -> PreTokenizer {
    PreTokenizer { cuts, gpt2_pattern: false, ignore_merges: false, add_bos: false }
}

const fn whole_words(cuts: &'static [Cut]) -> PreTokenizer {
    PreTokenizer { ignore_merges: true, add_bos: true, ..cut(cuts) }
}

/// Names that mean the same, and what they mean. Another rule gives other ids without any error, so a name that is not here is
/// refused.
const KINDS: &[(&[&str], PreTokenizer)] = &[
    (&["llama-bpe", "llama3", "llama-v3", "falcon3"], whole_words(&[Cut::Pattern(LLAMA_3)])),
    // Phi-4, OLMo 2 and SmolLM3: Llama 3's pattern, and merges as they are.
    (&["dbrx", "smaug-bpe"], cut(&[Cut::Pattern(LLAMA_3)])),
    (&["qwen2", "deepseek-r1-qwen", "megrez"], cut(&[Cut::Pattern(QWEN_2)])),
    (&["qwen35"], cut(&[Cut::Pattern(QWEN_35)])),
    (&["tekken"], whole_words(&[Cut::Pattern(TEKKEN)])),
    (&["gpt-4o"], cut(&[Cut::Pattern(GPT_4O)])),
    (&["smollm", "refact", "starcoder"], DIGITS_AND_GPT2),
    (&["gpt-2"], GPT2_ALONE),
    (&["deepseek-coder"], cut(DEEPSEEK_CODER)),
    (&["seed-coder"], cut(&[Cut::Pattern(SEED_CODER)])),
    (&["default"], cut(DEFAULT)),
];

/// The kind of this name, if it is known here.
pub(super) fn by_name(name: &str) -> Option<PreTokenizer> {
    KINDS.iter().find(|(names, _)| names.contains(&name)).map(|&(_, kind)| kind)
}

/// All names that are known, for an error message.
pub(super) fn names() -> String {
    let names: Vec<&str> = KINDS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
    names.join(", ")
}

impl PreTokenizer {
    /// Cuts and then spells each byte as a character.
    pub(super) fn wrapper(&self) -> tokenizers::Result<PreTokenizerWrapper> {
        let bytes: PreTokenizerWrapper = ByteLevel::new(false, false, self.gpt2_pattern).into();
        let mut steps = self.cuts.iter().map(Cut::wrapper).collect::<Result<Vec<_>, _>>()?;
        if steps.is_empty() {
            return Ok(bytes);
        }
        steps.push(bytes);
        Ok(Sequence::new(steps).into())
    }
}

impl Cut {
    fn wrapper(&self) -> tokenizers::Result<PreTokenizerWrapper> {
        Ok(match self {
            Cut::EveryDigit => Digits::new(true).into(),
            Cut::Pattern(pattern) => {
                let pattern = SplitPattern::Regex((*pattern).into());
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into()
            }
        })
    }
}
