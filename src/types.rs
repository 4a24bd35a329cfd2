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
    pub document: DocumentId,
    /// Position in the document, counted in blocks from 0.
    pub index: u32,
}

/// One KV head of one layer: the unit that a landmark key and a payload piece belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerHead {
    pub layer: u32,
    pub kv_head: u32,
}

/// Consecutive blocks of one document.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    pub document: DocumentId,
    pub blocks: Range<u32>,
}

/// How numbers are laid out, in memory, on the wire (floats only) and on disk. Always little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    F32,
    F16,
    BF16,
    /// Signed 8 bit with scales beside the numbers; where they lie is said by whoever stores it.
    Int8,
}

/// What stands for a block in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyRule {
    /// m = 1: the key of the block's last token, a landmark that was trained to represent it.
    Landmark,
    /// m = B: every token key of the block. What a model without landmarks needs.
    Tokens,
    /// m = 1: the mean of the block's token keys. Cheap and weak.
    Mean,
}

/// How the scores of a block's m keys become one score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockScore {
    Max,
    LogSumExp,
}

/// What answers lookups in a collection. All but `Faiss` choose the blocks that the keys, as they are stored, say, but
/// for what is said of each where heads choose together: then a head's weight comes from its softmax over all blocks,
/// as they were scanned. `Faiss` finds most of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Every key is scanned as it is stored.
    #[default]
    Flat,
    /// f16 keys are scanned as int8 (scalar quantization), and blocks that could be among the best are compared as f16:
    /// half the bytes read, half as much memory again. int8 keys are scanned as they are. Where heads choose together,
    /// blocks within a hundredth of each other may change places.
    Sq8,
    /// The same with int4: a quarter of the bytes read, a quarter as much memory again. The bound by which blocks are
    /// compared is a statistical one: one choice in 30,000 may lack the last of its best blocks. Where heads choose
    /// together, their weights are off by a tenth, and by more where few blocks have all of the weight.
    Sq4,
    /// Every key is scanned as it is stored, by an NVIDIA GPU that holds a copy of the keys, and attention is computed
    /// there over a cache of blocks. Scores differ from those of the CPU by rounding. What the GPU cannot do the CPU does.
    Cuda,
    /// Indexes of the FAISS library, one per layer and KV head of every long document, say which blocks are compared; needs
    /// the feature `faiss`.
    Faiss(FaissIndex),
}

/// How FAISS indexes keys. Written as people type it: `faiss:FACTORY` or `faiss:FACTORY@EFFORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FaissIndex {
    /// In the language of `faiss::index_factory`: `IVF256,Flat`, `HNSW32`, `SQ8`, `IVF256,PQ32x4fs`.
    pub factory: String,
    /// Clusters that a search looks into (`nprobe`), or candidates that it keeps on its way through a graph (`efSearch`),
    /// whichever the index has.
    pub effort: u32,
}

/// For whom one choice of blocks is made. Scores are aggregated after a softmax over the eligible blocks,
/// which each query token and query head computes for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
pub enum Normalisation {
    /// All tokens of all retrieved blocks compete in one softmax: ordinary models.
    Plain,
    /// Softmax inside each block, weighted by the block's landmark (its last token), which competes in its
    /// block's stead and has no value of its own: landmark-trained models (Mohtashami and Jaggi 2023, section 3.1).
    Grouped,
    /// As plain, without the last token of each block, a landmark that only the index reads: models that were given
    /// landmark keys and are otherwise as they were. Its own query reads its block alone, so it asks for nothing.
    Hidden,
}

impl FaissIndex {
    /// Where no effort is given.
    pub const EFFORT: u32 = 64;

    const PREFIX: &str = "faiss:";
}

impl Engine {
    /// Those with nothing to set, by the word for each.
    const PLAIN: &[(&str, Engine)] =
        &[("flat", Engine::Flat), ("sq8", Engine::Sq8), ("sq4", Engine::Sq4), ("cuda", Engine::Cuda)];
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Engine::Faiss(FaissIndex { factory, effort }) = self {
            return f.pad(&format!("{}{factory}@{effort}", FaissIndex::PREFIX));
        }
        let plain = Engine::PLAIN.iter().find(|(_, engine)| engine == self);
        f.pad(plain.map_or("", |(word, _)| word))
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        if let Some((_, engine)) = Engine::PLAIN.iter().find(|(plain, _)| *plain == word) {
            return Ok(engine.clone());
        }
        let index = word.strip_prefix(FaissIndex::PREFIX).ok_or_else(|| {
            let plain: Vec<&str> = Engine::PLAIN.iter().map(|(word, _)| *word).collect();
            format!("expected {}, faiss:FACTORY or faiss:FACTORY@EFFORT, found {word:?}", plain.join(", "))
        })?;
        let Some((factory, effort)) = index.split_once('@') else {
            return Ok(Engine::Faiss(FaissIndex { factory: index.into(), effort: FaissIndex::EFFORT }));
        };
        let effort = effort.parse().map_err(|_| format!("expected a number behind @ in {word:?}, found {effort:?}"))?;
        Ok(Engine::Faiss(FaissIndex { factory: factory.into(), effort }))
    }
}

impl DType {
    /// Bytes of one number, without scales.
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

    /// The row that the query of `token` and `query_head` reads its blocks from.
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

words!(DType, "f32" => F32, "f16" => F16, "bf16" => BF16, "int8" => Int8);
words!(KeyRule, "landmark" => Landmark, "tokens" => Tokens, "mean" => Mean);
words!(BlockScore, "max" => Max, "log-sum-exp" => LogSumExp);
words!(Granularity, "token-head" => TokenHead, "head" => Head, "token" => Token, "kv-group" => KvGroup, "shared" => Shared);
words!(Normalisation, "plain" => Plain, "grouped" => Grouped, "hidden" => Hidden);
