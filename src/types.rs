//! Ids and small values that every layer speaks.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A collection, unique within one data directory and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CollectionId(pub u32);

/// A document, unique within one data directory (over all collections) and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DocumentId(pub u64);

/// One block of a document. Ordered by document, then by position in it; ties between equally scored blocks
/// go to the lower `BlockId`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockId {
    /// The document that has the block.
    pub document: DocumentId,
    /// Position in the document, counted in blocks from 0.
    pub index: u32,
}

/// One KV head of one layer: the unit that a landmark key and a payload piece belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerHead {
    /// 0 to L - 1.
    pub layer: u32,
    /// 0 to Hkv - 1.
    pub kv_head: u32,
}

/// Consecutive blocks of one document.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// The document that has the blocks.
    pub document: DocumentId,
    /// Positions in the document, counted in blocks from 0.
    pub blocks: Range<u32>,
}

/// How values are laid out, in memory, on the wire (floats only) and on disk. Always little-endian.
///
/// Exhaustive, because records store it: every reader handles each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 single precision, 4 bytes.
    F32,
    /// IEEE 754 half precision, 2 bytes: at most 65,504 in size.
    F16,
    /// bfloat16, 2 bytes: the range of f32 with 8 bits of precision.
    BF16,
    /// Signed 8 bit, with scales that the store keeps beside the values.
    Int8,
}

/// Which keys stand for a block in the index.
///
/// Exhaustive, because records store it: every reader handles each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyRule {
    /// m = 1: the key of the block's last token, a landmark that was trained to represent it.
    Landmark,
    /// m = B: every token key of the block, for models without landmarks. A document's first token has the key of the second here:
    /// models that are not trained with landmarks attend to the first whatever they look for (Xiao et al. 2023), and every document
    /// would be chosen for it.
    Tokens,
    /// m = 1: the mean of the block's token keys, without that of the document's first token. Cheap and weak.
    Mean,
}

/// How the scores of a block's m keys become one score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum BlockScore {
    /// The largest: the best key decides.
    Max,
    /// `ln(sum(exp(score)))`: all m keys count, as in a softmax over them.
    LogSumExp,
}

/// Every engine, once: its documentation, variant and setting, its number on the wire (`landmark.v1.Engine`), the word a person
/// types, and the file of `index::engine` where the type of its name implements it. The type, parsing, printing, the wire and the choice of an implementation are
/// made from this table. `if` names what a row is compiled for.
macro_rules! engines {
    ($make:ident) => {
        $make! {
            /// Scans every key as it is stored.
            #[default]
            Flat = 1, "flat" in flat;
            /// Scans f16 keys as int8 (scalar quantization), and compares blocks that could be among the best as f16: half
            /// the bytes read, half as much memory again. Scans int8 keys as they are. Where heads choose together, blocks
            /// within a hundredth of each other may change places.
            Sq8 = 2, "sq8" in sq;
            /// [`Sq8`](Engine::Sq8) with int4: a quarter of the bytes read, a quarter as much memory again. It compares
            /// blocks by a statistical bound: one choice in 30,000 may lack the last of its best blocks. Where heads choose
            /// together, their weights are off by a tenth, and by more where few blocks have all of the weight.
            Sq4 = 3, "sq4" in sq;
            /// Scans every key as it is stored, on an NVIDIA GPU that holds a copy of the keys, and computes attention
            /// there over a cache of blocks. Scores differ from those of the CPU by rounding. The CPU does what the GPU
            /// cannot.
            Cuda = 4, "cuda" in cuda;
            /// Compares the blocks that indexes of the FAISS library find, one index per layer and KV head of every long
            /// document; needs the feature `faiss`.
            Faiss(FaissIndex) = 5, "faiss" in faiss;
            /// Chooses the last blocks for every query: for tests.
            Last = 1000, "last" in last if test;
        }
    };
}

/// Makes [`Engine`] of the table.
macro_rules! engine_type {
    ($(
        $(#[$about:meta])*
        $name:ident $(($setting:ident))? = $number:literal, $word:literal in $file:ident $(if $cfg:meta)?;
    )+) => {
        /// The algorithm that answers lookups in a collection. Every engine except [`Faiss`](Engine::Faiss) is exact with
        /// respect to the stored keys, apart from the rounding noted per variant: where heads choose together, a head's
        /// weight comes from its softmax over all blocks as they were scanned. `Faiss` finds most of the best blocks.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[non_exhaustive]
        pub enum Engine {
            $( $(#[cfg($cfg)])? $(#[$about])* $name $(($setting))?, )+
        }

        impl Engine {
            /// What a person types for each, by example where there is something to set.
            const FORMS: &[&str] = &[$( $(#[cfg($cfg)])? engine_type!(@form $word $($setting)?), )+];

            /// The word that people type and read, without a setting.
            pub fn word(&self) -> &'static str {
                match self { $( $(#[cfg($cfg)])? Engine::$name { .. } => $word, )+ }
            }

            /// The engine's number in `landmark.v1.Engine`.
            pub fn number(&self) -> i32 {
                match self { $( $(#[cfg($cfg)])? Engine::$name { .. } => $number, )+ }
            }

            /// The engine with a number of `landmark.v1.Engine`. Calls `setting` for an engine that has one. `None` for an
            /// unknown number or a missing setting.
            pub fn from_number(number: i32, setting: impl FnOnce() -> Option<FaissIndex>) -> Option<Engine> {
                match number {
                    $( $(#[cfg($cfg)])? $number => Some(Engine::$name $(({ let set: $setting = setting()?; set }))?), )+
                    _ => None,
                }
            }

            /// The engine of a word, and of what stands behind its colon.
            fn of(word: &str, setting: Option<&str>) -> Option<Result<Engine, String>> {
                match (word, setting) {
                    $( $(#[cfg($cfg)])? engine_type!(@given $word $($setting)?) => {
                        Some(engine_type!(@parsed $name $($setting)?; setting))
                    } )+
                    _ => None,
                }
            }
        }
    };
    (@form $word:literal) => { $word };
    (@form $word:literal $setting:ident) => { $setting::FORM };
    (@given $word:literal) => { ($word, None) };
    (@given $word:literal $setting:ident) => { ($word, Some(_)) };
    (@parsed $name:ident; $given:ident) => { Ok(Engine::$name) };
    (@parsed $name:ident $setting:ident; $given:ident) => {
        $given.unwrap_or_default().parse::<$setting>().map(Engine::$name)
    };
}

engines!(engine_type);
#[allow(unused_imports, reason = "implemented with the feature `local`")]
pub(crate) use engines;

/// How FAISS indexes keys. Typed as `faiss:FACTORY` or `faiss:FACTORY@EFFORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FaissIndex {
    /// In the language of `faiss::index_factory`, at most 128 bytes: `IVF256,Flat`, `HNSW32`, `SQ8`, `IVF256,PQ32x4fs`.
    pub factory: String,
    /// 1 to 65,536: clusters that a search scans (`nprobe`) or, in a graph, candidates that it keeps (`efSearch`).
    pub effort: u32,
}

/// Which query tokens and heads choose blocks together. Scores are aggregated after a softmax over the eligible blocks,
/// which each query token and query head computes for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Granularity {
    /// One choice per query token and query head: rows (T, Hq).
    TokenHead,
    /// One choice per query head, the maximum over tokens: rows (Hq).
    Head,
    /// One choice per query token, the maximum over query heads: rows (T).
    Token,
    /// One choice per query token and KV head, the sum over its G query heads: rows (T, Hkv).
    KvGroup,
    /// One choice for all, the maximum over tokens and query heads: rows (1).
    Shared,
}

/// How attention inside retrieved blocks is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Normalisation {
    /// All tokens of all retrieved blocks compete in one softmax: ordinary models.
    Plain,
    /// Softmax inside each block, weighted by the block's landmark (its last token), which competes in its
    /// block's stead and has no value of its own: landmark-trained models (Mohtashami and Jaggi 2023, section 3.1).
    Grouped,
    /// Plain, without the last token of each block, a landmark that only the index reads: ordinary models with landmark
    /// keys from an adapter. The landmark's own query reads its block alone and retrieves nothing.
    Hidden,
}

/// Where retrieved blocks stand while they are attended to. They are chosen by their scores in slots either way;
/// [`AttendRequest`](crate::AttendRequest) has the geometry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Placement {
    /// In slots just before the window, however far they are: for models that read nothing at long distances.
    #[default]
    Slots,
    /// At the positions that they have in their documents, and the sink with them: for models that read what is far.
    Original {
        /// Nothing begins this many tokens before a query or more, at least 1: the context that the model was trained for.
        within_tokens: u32,
    },
}

impl Placement {
    /// Most blocks of B tokens from where a retrieved block begins to the window, for a query that is `distance` tokens into it.
    pub(crate) fn farthest_blocks(self, slots: u64, distance: u64, block_tokens: u64) -> u64 {
        match self {
            Placement::Slots => slots,
            Placement::Original { within_tokens } => {
                let fit = (within_tokens as u64).saturating_sub(distance + 1) / block_tokens;
                // The sink stands before all of them.
                slots.max(fit.saturating_sub(1))
            }
        }
    }

    /// Tokens from the sink's first token to a query that is `distance` tokens into the window. `slots` are those of
    /// [`LookupRequest::slots`](crate::LookupRequest::slots), 0 where nothing is retrieved. The sink is the first of
    /// `document_blocks` blocks that its document has before the window.
    pub fn sink_distance(self, slots: u32, distance: u32, document_blocks: u32, block_tokens: u32) -> u64 {
        let (distance, block_tokens) = (distance as u64, block_tokens as u64);
        let before_all = self.farthest_blocks(slots as u64, distance, block_tokens) + 1;
        let blocks = match self {
            Placement::Slots => before_all,
            Placement::Original { .. } => before_all.min(document_blocks as u64),
        };
        distance + blocks * block_tokens
    }
}

impl FaissIndex {
    /// The effort where a setting names none.
    pub const EFFORT: u32 = 64;

    const FORM: &str = "faiss:FACTORY or faiss:FACTORY@EFFORT";
}

impl fmt::Display for FaissIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.factory, self.effort)
    }
}

impl FromStr for FaissIndex {
    type Err = String;

    fn from_str(setting: &str) -> Result<Self, String> {
        let Some((factory, effort)) = setting.split_once('@') else {
            return Ok(FaissIndex { factory: setting.into(), effort: FaissIndex::EFFORT });
        };
        let effort = effort.parse().map_err(|_| format!("expected a number behind @, found {effort:?}"))?;
        Ok(FaissIndex { factory: factory.into(), effort })
    }
}

impl Engine {
    /// The setting of [`Faiss`](Engine::Faiss); `None` for other engines.
    pub fn setting(&self) -> Option<&FaissIndex> {
        match self {
            Engine::Faiss(setting) => Some(setting),
            _ => None,
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.setting() {
            Some(setting) => f.pad(&format!("{}:{setting}", self.word())),
            None => f.pad(self.word()),
        }
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let (word, setting) = match typed.split_once(':') {
            Some((word, setting)) => (word, Some(setting)),
            None => (typed, None),
        };
        let unknown = || Err(format!("expected {}, found {typed:?}", Engine::FORMS.join(", ")));
        Engine::of(word, setting).unwrap_or_else(unknown).map_err(|error| match setting {
            Some(_) if !error.contains(typed) => format!("{error} in {typed:?}"),
            _ => error,
        })
    }
}

impl DType {
    /// Bytes of one value, without scales.
    pub fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Int8 => 1,
        }
    }
}

impl Granularity {
    /// Rows of choices that `tokens` query tokens make.
    pub fn rows(self, tokens: usize, query_heads: usize, kv_heads: usize) -> usize {
        match self {
            Granularity::TokenHead => tokens * query_heads,
            Granularity::Head => query_heads,
            Granularity::Token => tokens,
            Granularity::KvGroup => tokens * kv_heads,
            Granularity::Shared => 1,
        }
    }

    /// The row of choices, from 0, of one query token and query head.
    pub fn row(self, token: usize, query_head: usize, query_heads: usize, kv_heads: usize) -> usize {
        match self {
            Granularity::TokenHead => token * query_heads + query_head,
            Granularity::Head => query_head,
            Granularity::Token => token,
            Granularity::KvGroup => token * kv_heads + query_head / (query_heads / kv_heads),
            Granularity::Shared => 0,
        }
    }
}

impl fmt::Display for CollectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How the names of documents begin that are to take the place of others.
const REPLACEMENT: &str = "replacement-of-";

impl DocumentId {
    /// The name of a document that is to take the place of this one: see [`BlockMemory::replace`](crate::BlockMemory::replace).
    pub fn replacement_name(self) -> String {
        format!("{REPLACEMENT}{self}")
    }

    /// The document whose place one of this name is to take; `None` of every other name.
    pub fn of_replacement_name(name: &str) -> Option<DocumentId> {
        let document = DocumentId(name.strip_prefix(REPLACEMENT)?.parse().ok()?);
        Some(document).filter(|document| document.replacement_name() == name)
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.document, self.index)
    }
}

/// The word a person types and reads for each variant; `FromStr` takes it back.
#[doc(hidden)]
#[macro_export]
macro_rules! words {
    ($type:ident, $($word:literal => $variant:ident),+ $(,)?) => {
        impl $type {
            /// The word of each variant, for messages and help.
            pub const WORDS: &'static [&'static str] = &[$($word),+];
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self { $($type::$variant => $word),+ })
            }
        }

        impl std::str::FromStr for $type {
            type Err = String;

            fn from_str(word: &str) -> Result<Self, Self::Err> {
                match word {
                    $($word => Ok($type::$variant),)+
                    _ => Err(format!("expected one of {}, found {word:?}", Self::WORDS.join(", "))),
                }
            }
        }
    };
}

impl KeyRule {
    /// Whether a tail has keys. Its last token is no landmark, so a rule that asks for one leaves it without.
    pub fn covers_tails(self) -> bool {
        self != KeyRule::Landmark
    }
}

words!(DType, "f32" => F32, "f16" => F16, "bf16" => BF16, "int8" => Int8);
words!(KeyRule, "landmark" => Landmark, "tokens" => Tokens, "mean" => Mean);
words!(BlockScore, "max" => Max, "log-sum-exp" => LogSumExp);
words!(Granularity, "token-head" => TokenHead, "head" => Head, "token" => Token, "kv-group" => KvGroup, "shared" => Shared);
words!(Normalisation, "plain" => Plain, "grouped" => Grouped, "hidden" => Hidden);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_typed_as_they_are_shown() {
        let faiss = |factory: &str, effort| Engine::Faiss(FaissIndex { factory: factory.into(), effort });
        let cases = [("flat", Engine::Flat), ("sq4", Engine::Sq4), ("faiss:IVF256,Flat@8", faiss("IVF256,Flat", 8))];
        for (word, engine) in cases {
            assert_eq!((word.parse(), engine.to_string()), (Ok(engine.clone()), word.into()));
            assert_eq!(Engine::from_number(engine.number(), || engine.setting().cloned()), Some(engine.clone()));
        }
        assert_eq!("faiss:HNSW32".parse(), Ok(faiss("HNSW32", FaissIndex::EFFORT)));
        for wrong in ["", "flat:x", "faiss", "faiss:HNSW32@much", "FLAT"] {
            assert!(wrong.parse::<Engine>().unwrap_err().contains(wrong), "{wrong}");
        }
        assert_eq!(Engine::from_number(0, || None), None);
        assert_eq!(Engine::from_number(faiss("x", 1).number(), || None), None, "nothing is set");
    }

    #[test]
    fn the_sink_stands_before_the_slots_or_where_the_text_begins() {
        // 3 slots of 4 tokens, a query 2 tokens into the window, a document of 10 blocks before it.
        let distance = |placement: Placement| placement.sink_distance(3, 2, 10, 4);
        let original = |within_tokens| distance(Placement::Original { within_tokens });
        assert_eq!(distance(Placement::Slots), 2 + 4 * 4);
        assert_eq!((original(1000), original(43)), (42, 42));
        assert_eq!(
            (original(42), original(39)),
            (38, 38),
            "42 tokens back is one too far, so it stands a block nearer"
        );
        assert_eq!((original(20), original(1)), (18, 18), "never nearer than the slots");
        assert_eq!(
            Placement::Original { within_tokens: 1000 }.sink_distance(0, 5, 1, 4),
            9,
            "the first block has just left"
        );
    }
}
