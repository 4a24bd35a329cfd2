//! Everything that decides which weights come out of a training, beside the texts.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::TrainError;
use super::vocabulary::VOCABULARY_MIN;
use landmarkdb::limits::BLOCK_TOKENS_MAX;

/// How a model is trained. Fields are named as the flags of `landmarkdb train`, which is where their defaults are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// With landmarks, plain, or recurrent.
    pub kind: Kind,
    /// Name of the model that the training starts from; none for random weights. With a name the model's own sizes
    /// replace the ones from `layers` to `vocab`.
    pub from: Option<String>,
    /// Rank of the landmark's updates if only those and its embedding are trained, as an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<usize>,
    /// LoRA alpha of an adapter: its updates are scaled by alpha / rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_alpha: Option<f32>,
    /// L, the decoder layers.
    pub layers: u32,
    /// Width of the residual stream, a multiple of `heads`.
    pub hidden: usize,
    /// Hq
    pub heads: u32,
    /// Hkv
    pub kv_heads: u32,
    /// Width inside the feed-forward network.
    pub ffn: usize,
    /// Tokens of the vocabulary, control tokens included.
    pub vocab: usize,
    /// B, the landmark included.
    pub block_tokens: u32,
    /// Which share of the sequences are passkey documents; the others are windows of prose.
    pub passkey_share: f64,
    /// Weight of a key's digit where it can be known, against 1 of any other token.
    pub answer_weight: f32,
    /// At each landmark positions jump by a random number below this.
    pub pos_jump: u32,
    /// Parts of the steps in order, each with a sequence length of its own; at least one.
    pub phases: Vec<Phase>,
    /// Updates of the whole training.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps over which the learning rate rises to its peak.
    pub warmup: u64,
    /// What the learning rate falls to, as a share of its peak.
    pub lr_floor: f64,
    /// AdamW's decay, 0 to 1: a step multiplies weights by 1 minus this times the learning rate, save norms and
    /// embedding.
    pub weight_decay: f64,
    /// Decay of the running mean of squared gradients in AdamW, 0 or more and below 1.
    pub beta2: f64,
    /// Longest gradient, in global norm; a longer one is scaled down.
    pub clip: f64,
    /// Rate at which retrieved blocks are dropped for a query.
    pub group_dropout: f32,
    /// Seed of random weights, of the sampled sequences, their position jumps and the dropped blocks.
    pub seed: u64,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Blocks end in a landmark, attention is grouped.
    Landmark,
    /// The ordinary twin: no landmarks, plain causal attention.
    Plain,
    /// The plain model on consecutive windows, keeping K and V of the window before (Transformer-XL).
    Recurrent,
}

/// A part of the steps, with sequences of one length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Phase {
    /// Blocks of a sequence. A plain model reads as many tokens.
    pub blocks: usize,
    /// Sequences of a step.
    pub sequences: usize,
    /// Its part of the steps, relative to the shares of the others.
    pub share: f64,
}

impl Recipe {
    /// Refuses settings that contradict each other or are out of range. What belongs to the model's shape is checked with the model.
    pub fn check(&self) -> Result<(), TrainError> {
        let rules = [
            ("block_tokens", (2..=BLOCK_TOKENS_MAX).contains(&self.block_tokens), "2 to 1024 with the landmark"),
            ("heads", self.heads > 0 && self.hidden.is_multiple_of(self.heads as usize), "a divisor of hidden"),
            ("kv_heads", self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "a divisor of heads"),
            ("vocab", self.from.is_some() || self.vocab >= VOCABULARY_MIN, "at least 258, which any text needs"),
            ("vocab", self.vocab <= VOCABULARY_MAX, "at most 1048576"),
            ("hidden", self.hidden <= WIDTH_MAX, "at most 65536"),
            ("ffn", (1..=WIDTH_MAX).contains(&self.ffn), "1 to 65536"),
            ("adapter", self.adapter.is_none_or(|rank| rank > 0), "a rank of at least 1"),
            ("adapter", self.adapter.is_none() || self.from.is_some(), "none without a model to start from"),
            ("adapter", self.adapter.is_none() || self.kind == Kind::Landmark, "none for a model without landmarks"),
            (
                "adapter_alpha",
                self.adapter.is_some() == self.adapter_alpha.is_some()
                    && self.adapter_alpha.is_none_or(|alpha| alpha > 0.0 && alpha.is_finite()),
                "a positive number with an adapter, none without one",
            ),
            ("pos_jump", self.adapter.is_none() || self.pos_jump == 0, "0 for an adapter"),
            (
                "pos_jump",
                self.pos_jump == 0 || self.last_position() <= POSITION_MAX,
                "jumps that keep every position below 16777216",
            ),
            ("group_dropout", self.adapter.is_none() || self.group_dropout == 0.0, "0 for an adapter"),
            (
                "phases",
                self.adapter.is_none() || self.phases.iter().all(|phase| phase.blocks >= 4),
                "sequences of at least 4 blocks, for an adapter",
            ),
            ("passkey_share", (0.0..=1.0).contains(&self.passkey_share), "0 to 1"),
            (
                "passkey_share",
                self.kind != Kind::Recurrent || self.passkey_share == 0.0,
                "0 for a recurrent model, which reads prose in its order",
            ),
            ("answer_weight", self.answer_weight > 0.0 && self.answer_weight.is_finite(), "a positive number"),
            ("answer_weight", self.adapter.is_none() || self.answer_weight > 1.0, "more than 1 for an adapter"),
            ("pos_jump", self.kind == Kind::Landmark || self.pos_jump == 0, "0 for a model without landmarks"),
            ("group_dropout", (0.0..1.0).contains(&self.group_dropout), "0 or more, and less than 1"),
            (
                "group_dropout",
                self.kind == Kind::Landmark || self.group_dropout == 0.0,
                "0 for a model without landmarks",
            ),
            ("phases", !self.phases.is_empty(), "at least one BLOCKS:SEQUENCES:SHARE"),
            ("steps", self.steps > 0, "at least 1"),
            ("lr", self.lr > 0.0 && self.lr.is_finite(), "a positive number"),
            ("lr_floor", (0.0..=1.0).contains(&self.lr_floor), "0 to 1"),
            ("weight_decay", (0.0..=1.0).contains(&self.weight_decay), "0 to 1"),
            ("beta2", (0.0..1.0).contains(&self.beta2), "0 or more, and less than 1"),
            ("clip", self.clip > 0.0, "a positive number"),
        ];
        match rules.into_iter().find(|(_, holds, _)| !holds) {
            None => Ok(()),
            Some((field, _, expected)) => {
                Err(TrainError::Invalid { field, expected: expected.into(), found: self.value(field) })
            }
        }
    }

    /// A field as it stands in JSON.
    fn value(&self, field: &str) -> String {
        let value = self.values().into_iter().find(|(name, _)| name == field).map(|(_, value)| value);
        value.unwrap_or_else(|| "none".into())
    }

    /// Every field by name, for comparing and showing.
    pub fn values(&self) -> Vec<(String, String)> {
        let serde_json::Value::Object(fields) = serde_json::json!(self) else { return Vec::new() };
        fields.into_iter().map(|(name, value)| (name, shown(&value))).collect()
    }

    /// The phase that a step is in and its first step. Steps are cut where the shares say, rounded.
    pub fn phase(&self, step: u64) -> (Phase, u64) {
        let total: f64 = self.phases.iter().map(|phase| phase.share).sum();
        let (mut share, mut first) = (0.0, 0);
        for (index, phase) in self.phases.iter().enumerate() {
            share += phase.share;
            let end = (self.steps as f64 * share / total).round() as u64;
            if step < end || index + 1 == self.phases.len() {
                return (*phase, first);
            }
            first = end;
        }
        unreachable!("`check` saw that there are phases, and the last one returns")
    }

    /// No token of a sequence has a position beyond this.
    fn last_position(&self) -> u64 {
        let jumps = self.phases.iter().map(|phase| phase.blocks as u64).max().unwrap_or(0);
        self.longest_tokens() as u64 + jumps * self.pos_jump as u64
    }

    /// Tokens of the longest sequence, landmarks included.
    pub fn longest_tokens(&self) -> usize {
        self.phases.iter().map(|phase| phase.tokens(self.block_tokens)).max().unwrap_or(0)
    }
}

/// A string without its quotes, a list with commas, anything else as JSON writes it.
fn shown(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(","),
        serde_json::Value::Null => "none".into(),
        other => other.to_string(),
    }
}

impl Phase {
    /// Tokens of a sequence, landmarks included.
    pub fn tokens(&self, block_tokens: u32) -> usize {
        self.blocks * block_tokens as usize
    }
}

impl Display for Phase {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.blocks, self.sequences, self.share)
    }
}

impl From<Phase> for String {
    fn from(phase: Phase) -> Self {
        phase.to_string()
    }
}

impl TryFrom<String> for Phase {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let [blocks, sequences, share] = text.split(':').collect::<Vec<_>>().try_into().ok()?;
            let phase =
                Phase { blocks: blocks.parse().ok()?, sequences: sequences.parse().ok()?, share: share.parse().ok()? };
            let sane = (1..=PHASE_BLOCKS_MAX).contains(&phase.blocks)
                && (1..=PHASE_SEQUENCES_MAX).contains(&phase.sequences)
                && phase.share > 0.0
                && phase.share.is_finite();
            sane.then_some(phase)
        };
        parsed().ok_or_else(|| format!("expected BLOCKS:SEQUENCES:SHARE with positive numbers, found {text:?}"))
    }
}

/// Of a model made here: far beyond what a CPU trains, and small enough to refuse a slip before memory is taken for it.
const VOCABULARY_MAX: usize = 1 << 20;
const WIDTH_MAX: usize = 1 << 16;

/// The angles of later positions are no longer whole numbers times a frequency: f32 counts to here.
const POSITION_MAX: u64 = 1 << 24;

/// Bounds that keep the product with `block_tokens` far from overflow; memory is exhausted long before.
const PHASE_BLOCKS_MAX: usize = 1 << 20;
const PHASE_SEQUENCES_MAX: usize = 1 << 20;

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Two layers and 20 steps.
    pub(in crate::train) fn tiny() -> Recipe {
        Recipe {
            kind: Kind::Landmark,
            from: None,
            adapter: None,
            adapter_alpha: None,
            layers: 2,
            hidden: 16,
            heads: 2,
            kv_heads: 1,
            ffn: 24,
            vocab: 300,
            block_tokens: 9,
            passkey_share: 0.5,
            answer_weight: 10.0,
            pos_jump: 0,
            phases: vec!["20:2:1".parse().unwrap(), "24:2:1".parse().unwrap()],
            steps: 20,
            lr: 1e-2,
            warmup: 4,
            lr_floor: 0.1,
            weight_decay: 0.05,
            beta2: 0.98,
            clip: 1.0,
            group_dropout: 0.0,
            seed: 1,
        }
    }

    #[test]
    fn phases_share_the_steps() {
        let phases = ["8:16:35", "16:8:35", "30:4:30"].map(|phase| phase.parse().unwrap()).to_vec();
        let recipe = Recipe { steps: 2400, phases, ..tiny() };
        let at = |step| {
            let (phase, first) = recipe.phase(step);
            (phase.blocks, first)
        };
        assert_eq!((at(0), at(839)), ((8, 0), (8, 0)));
        assert_eq!((at(840), at(1679)), ((16, 840), (16, 840)));
        assert_eq!((at(1680), at(2399), at(9999)), ((30, 1680), (30, 1680), (30, 1680)));
        assert_eq!(Recipe { block_tokens: 17, ..recipe }.longest_tokens(), 510);
    }

    #[test]
    fn a_recipe_is_the_same_after_a_file() {
        let recipe = tiny();
        let json = serde_json::to_string(&recipe).unwrap();
        assert!(json.contains(r#""phases":["20:2:1","24:2:1"]"#), "{json}");
        assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
        assert!(recipe.values().contains(&("phases".into(), "20:2:1,24:2:1".into())));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let refused = |change: fn(&mut Recipe)| {
            let mut recipe = tiny();
            change(&mut recipe);
            match recipe.check().unwrap_err() {
                TrainError::Invalid { field, found, .. } => (field, found),
                other => panic!("{other}"),
            }
        };
        assert!(tiny().check().is_ok());
        assert_eq!(refused(|r| r.block_tokens = 1), ("block_tokens", "1".into()));
        assert_eq!(refused(|r| r.block_tokens = 2000), ("block_tokens", "2000".into()));
        assert_eq!(refused(|r| r.heads = 3), ("heads", "3".into()));
        assert_eq!(refused(|r| r.kv_heads = 0), ("kv_heads", "0".into()));
        assert_eq!(refused(|r| r.vocab = 257), ("vocab", "257".into()));
        assert_eq!(refused(|r| r.vocab = 1 << 40), ("vocab", (1u64 << 40).to_string()));
        assert_eq!(refused(|r| r.hidden = 1 << 40), ("hidden", (1u64 << 40).to_string()));
        assert_eq!(refused(|r| r.ffn = 0), ("ffn", "0".into()));
        assert_eq!(refused(|r| r.pos_jump = 1_000_000_000), ("pos_jump", "1000000000".into()));
        assert_eq!(refused(|r| (r.adapter, r.adapter_alpha) = (Some(4), Some(8.0))), ("adapter", "4".into()));
        let adapted = |change: fn(&mut Recipe)| {
            let mut recipe = Recipe { from: Some("m".into()), adapter: Some(4), adapter_alpha: Some(8.0), ..tiny() };
            assert!(recipe.check().is_ok());
            change(&mut recipe);
            recipe.check().unwrap_err().to_string()
        };
        assert!(adapted(|r| r.adapter = Some(0)).contains("a rank of at least 1, found 0"));
        assert!(adapted(|r| r.kind = Kind::Plain).contains("without landmarks, found 4"));
        assert!(adapted(|r| r.adapter_alpha = None).contains("found none"));
        assert!(adapted(|r| r.adapter_alpha = Some(-1.0)).contains("found -1"));
        assert!(adapted(|r| r.adapter = None).contains("none without one, found 8"));
        assert!(adapted(|r| r.pos_jump = 4).starts_with("pos_jump"));
        assert!(adapted(|r| r.group_dropout = 0.1).starts_with("group_dropout"));
        assert!(adapted(|r| r.answer_weight = 1.0).starts_with("answer_weight"));
        assert!(adapted(|r| r.phases = vec!["3:1:1".parse().unwrap()]).contains("at least 4 blocks"));
        assert_eq!(refused(|r| r.passkey_share = 1.5), ("passkey_share", "1.5".into()));
        assert_eq!(refused(|r| r.kind = Kind::Recurrent), ("passkey_share", "0.5".into()));
        assert_eq!(refused(|r| r.phases.clear()), ("phases", "".into()));
        assert_eq!(refused(|r| (r.kind, r.pos_jump) = (Kind::Plain, 4)), ("pos_jump", "4".into()));
        assert_eq!(refused(|r| r.group_dropout = 1.0), ("group_dropout", "1.0".into()));
        assert_eq!(refused(|r| r.lr = f64::NAN), ("lr", "none".into()));
        for text in ["", "8:16", "0:1:1", "8:0:1", "8:1:0", "8:1:nan", "8:1:1:1", "a:b:c"] {
            assert!(text.parse::<Phase>().is_err(), "{text:?}");
        }
    }
}
