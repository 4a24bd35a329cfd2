//! The shape of a model as the memory sees it, what a collection is bound to, and the rotation of keys and queries.
//!
//! Notation (everywhere in this crate): `L` layers, `Hq` query heads, `Hkv` KV heads, `G = Hq / Hkv`, `D` head dim,
//! `B` block tokens, `N` blocks, `T` query tokens, `k` blocks retrieved, `m` keys per block.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::limits;
use crate::types::{DType, KeyRule};

/// Rotary position embedding (Su et al. 2021) in the half-split layout: dimension `i` rotates with `i + rotary_dims / 2`.
/// The loader of a model folds scaling rules into the frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Radians per token, one per rotated pair: `(rotary_dims / 2)`. Dimensions beyond `rotary_dims` are not rotated.
    pub frequencies: Vec<f32>,
}

/// The dimensions of a model that its memory depends on. [`limits`] bounds each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// L, at least 1.
    pub layers: u32,
    /// Hq, a multiple of `kv_heads`.
    pub query_heads: u32,
    /// Hkv, at least 1.
    pub kv_heads: u32,
    /// D, at least 1.
    pub head_dim: u32,
    /// B, at least 2, a landmark token included where the model has them.
    pub block_tokens: u32,
    /// At most `D / 2` frequencies; none for a model without RoPE.
    pub rope: Rope,
    /// Layers whose queries and keys are not rotated (NoPE), in rising order; their blocks have no place.
    #[serde(default)]
    pub unrotated_layers: Vec<u32>,
    /// The factor of `q . k` in attention, usually `1 / sqrt(D)`. Finite and positive.
    pub softmax_scale: f32,
}

/// SHA-256 over everything that makes stored keys and values meaningful to one model only: see
/// [`CollectionSpec::fingerprint`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

/// SHA-256 of a file's content (model weights, tokenizer).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sha256Digest(pub [u8; 32]);

/// The model that a collection belongs to, and the format of its blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionSpec {
    /// 1 to 255 bytes without control characters, unique within the data directory; not part of the fingerprint.
    pub name: String,
    /// Of the model's attention.
    pub shape: ModelShape,
    /// Which keys stand for a block in the index.
    pub key_rule: KeyRule,
    /// Of K and V on disk: f32, f16, bf16 or int8.
    pub payload_dtype: DType,
    /// Of the landmark keys, on disk and in the index: f16 or int8.
    pub key_dtype: DType,
    /// Of the model's weights: others give other K and V.
    pub model_digest: Sha256Digest,
    /// Of the tokenizer: another one gives stored token ids another meaning.
    pub tokenizer_digest: Sha256Digest,
    /// Human-readable, at most 255 bytes; not part of the fingerprint.
    pub model_name: String,
}

/// A field that no collection can have: see [`CollectionSpec::check`].
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field}: expected {expected}, found {found}")]
pub struct InvalidShape {
    /// Path of the field, such as `rope.frequencies`, or the product of fields that is too large.
    pub field: &'static str,
    /// The values that the field may have, human-readable.
    pub expected: String,
    /// The value that it has, human-readable.
    pub found: String,
}

impl Rope {
    /// The plain rule: `base^(-2i / rotary_dims)` for each pair `i`.
    pub fn from_base(base: f64, rotary_dims: usize) -> Self {
        let frequencies =
            (0..rotary_dims / 2).map(|i| base.powf(-2.0 * i as f64 / rotary_dims as f64) as f32).collect();
        Rope { frequencies }
    }

    /// Rotates one head vector `(D)` by `position` tokens, in place. Negative positions rotate back.
    ///
    /// Angles are in double precision: at a million tokens single precision is off by whole degrees.
    pub fn rotate(&self, head: &mut [f32], position: i64) {
        let half = self.frequencies.len();
        let (low, rest) = head.split_at_mut(half);
        for ((a, b), &frequency) in low.iter_mut().zip(&mut rest[..half]).zip(&self.frequencies) {
            let (sin, cos) = (frequency as f64 * position as f64).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }

    /// The rotation by `position` tokens, for callers that rotate many heads by it.
    pub fn rotation(&self, position: i64) -> Rotation {
        let (sin, cos) = self
            .frequencies
            .iter()
            .map(|&frequency| {
                let (sin, cos) = (frequency as f64 * position as f64).sin_cos();
                (sin as f32, cos as f32)
            })
            .unzip();
        Rotation { cos, sin }
    }
}

/// Cosines and sines of one position. Gives the bits of [`Rope::rotate`].
#[derive(Clone, Debug)]
pub struct Rotation {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// `(2, rotary_dims / 2)`: cosines, then sines.
    pub fn values(&self) -> impl Iterator<Item = f32> {
        self.cos.iter().chain(&self.sin).copied()
    }

    /// Rotates one head vector `(D)` in place.
    pub fn apply(&self, head: &mut [f32]) {
        let half = self.cos.len();
        let (low, rest) = head.split_at_mut(half);
        for (((a, b), &cos), &sin) in low.iter_mut().zip(&mut rest[..half]).zip(&self.cos).zip(&self.sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

impl ModelShape {
    /// How the queries and keys of a layer rotate: not at all in an unrotated one.
    pub fn rope_of(&self, layer: u32) -> &Rope {
        static UNROTATED: Rope = Rope { frequencies: Vec::new() };
        if self.unrotated_layers.binary_search(&layer).is_ok() { &UNROTATED } else { &self.rope }
    }

    /// G, query heads that share one KV head.
    pub fn group(&self) -> usize {
        (self.query_heads / self.kv_heads) as usize
    }

    /// `L * Hkv`, the pieces of one block.
    pub fn pieces(&self) -> usize {
        (self.layers * self.kv_heads) as usize
    }

    /// m, the keys that stand for a block under `rule`.
    pub fn keys_per_block(&self, rule: KeyRule) -> usize {
        match rule {
            KeyRule::Landmark | KeyRule::Mean => 1,
            KeyRule::Tokens => self.block_tokens as usize,
        }
    }

    /// Checks every field against its limit and the fields against each other.
    ///
    /// # Errors
    /// [`InvalidShape`] for the first field that does not fit.
    pub fn check(&self) -> Result<(), InvalidShape> {
        within("layers", self.layers, 1, limits::LAYERS_MAX)?;
        within("query_heads", self.query_heads, 1, limits::HEADS_MAX)?;
        within("kv_heads", self.kv_heads, 1, limits::HEADS_MAX)?;
        within("head_dim", self.head_dim, 1, limits::HEAD_DIM_MAX)?;
        within("block_tokens", self.block_tokens, 2, limits::BLOCK_TOKENS_MAX)?;
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            return Err(InvalidShape {
                field: "query_heads",
                expected: format!("a multiple of kv_heads = {}", self.kv_heads),
                found: self.query_heads.to_string(),
            });
        }
        if self.rope.frequencies.len() * 2 > self.head_dim as usize {
            return Err(InvalidShape {
                field: "rope.frequencies",
                expected: format!("at most head_dim / 2 = {}", self.head_dim / 2),
                found: self.rope.frequencies.len().to_string(),
            });
        }
        if let Some(bad) = self.rope.frequencies.iter().find(|f| !f.is_finite()) {
            return Err(InvalidShape {
                field: "rope.frequencies",
                expected: "finite numbers".into(),
                found: bad.to_string(),
            });
        }
        let rising = self.unrotated_layers.is_sorted_by(|a, b| a < b);
        if !rising || self.unrotated_layers.last().is_some_and(|&last| last >= self.layers) {
            return Err(InvalidShape {
                field: "unrotated_layers",
                expected: format!("layers below {} in rising order", self.layers),
                found: format!("{:?}", self.unrotated_layers),
            });
        }
        if !(self.softmax_scale.is_finite() && self.softmax_scale > 0.0) {
            return Err(InvalidShape {
                field: "softmax_scale",
                expected: "a finite positive number".into(),
                found: self.softmax_scale.to_string(),
            });
        }
        let block_bytes = self.pieces() as u64 * 2 * (self.block_tokens * self.head_dim) as u64 * 4;
        if block_bytes > limits::BLOCK_BYTES_MAX {
            return Err(InvalidShape {
                field: "layers x kv_heads x block_tokens x head_dim",
                expected: format!("a block of at most {} bytes in f32", limits::BLOCK_BYTES_MAX),
                found: block_bytes.to_string(),
            });
        }
        Ok(())
    }
}

impl CollectionSpec {
    /// Checks names, shape and dtypes.
    ///
    /// # Errors
    /// [`InvalidShape`] for the first field that does not fit.
    pub fn check(&self) -> Result<(), InvalidShape> {
        check_name("name", &self.name)?;
        if self.model_name.len() > limits::NAME_BYTES_MAX {
            return Err(InvalidShape {
                field: "model_name",
                expected: format!("at most {} bytes", limits::NAME_BYTES_MAX),
                found: format!("{} bytes", self.model_name.len()),
            });
        }
        self.shape.check()?;
        if !matches!(self.key_dtype, DType::F16 | DType::Int8) {
            return Err(InvalidShape {
                field: "key_dtype",
                expected: "f16 or int8".into(),
                found: self.key_dtype.to_string(),
            });
        }
        Ok(())
    }

    /// The fingerprint of all fields but the names. Collections with equal fingerprints hold interchangeable blocks.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hash = Sha256::new();
        hash.update(b"landmarkdb fingerprint 1\0");
        let shape = &self.shape;
        for number in [shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim, shape.block_tokens] {
            hash.update(number.to_le_bytes());
        }
        hash.update(shape.softmax_scale.to_le_bytes());
        hash.update((shape.rope.frequencies.len() as u32).to_le_bytes());
        for frequency in &shape.rope.frequencies {
            hash.update(frequency.to_le_bytes());
        }
        for word in [self.key_rule.to_string(), self.payload_dtype.to_string(), self.key_dtype.to_string()] {
            hash.update(word.as_bytes());
            hash.update([0]);
        }
        hash.update(self.model_digest.0);
        hash.update(self.tokenizer_digest.0);
        // Fingerprints of models that rotate in every layer are older than this field.
        if !shape.unrotated_layers.is_empty() {
            hash.update(b"unrotated layers\0");
            shape.unrotated_layers.iter().for_each(|layer| hash.update(layer.to_le_bytes()));
        }
        Fingerprint(hash.finalize().into())
    }
}

/// Checks the name of a collection or document: 1 to [`limits::NAME_BYTES_MAX`] bytes without control characters, because
/// tables show it and people type it in shells.
///
/// # Errors
/// [`InvalidShape`] for `field`.
pub fn check_name(field: &'static str, name: &str) -> Result<(), InvalidShape> {
    let problem = if name.is_empty() {
        Some("an empty name".to_string())
    } else if name.len() > limits::NAME_BYTES_MAX {
        Some(format!("{} bytes", name.len()))
    } else if name.chars().any(char::is_control) {
        Some(format!("{name:?}"))
    } else {
        None
    };
    match problem {
        None => Ok(()),
        Some(found) => Err(InvalidShape {
            field,
            expected: format!("1 to {} bytes without control characters", limits::NAME_BYTES_MAX),
            found,
        }),
    }
}

fn within(field: &'static str, found: u32, min: u32, max: u32) -> Result<(), InvalidShape> {
    if (min..=max).contains(&found) {
        return Ok(());
    }
    Err(InvalidShape { field, expected: format!("{min} to {max}"), found: found.to_string() })
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// `{}` prints the first 16 hex digits, enough to tell two apart by eye; `{:#}` prints all 64.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(if f.alternate() { &self.0 } else { &self.0[..8] }, f)
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(if f.alternate() { &self.0 } else { &self.0[..8] }, f)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#}")
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> CollectionSpec {
        CollectionSpec {
            name: "books".into(),
            shape: ModelShape {
                layers: 2,
                query_heads: 4,
                kv_heads: 2,
                head_dim: 8,
                block_tokens: 16,
                rope: Rope::from_base(10_000.0, 8),
                unrotated_layers: Vec::new(),
                softmax_scale: 8f32.powf(-0.5),
            },
            key_rule: KeyRule::Tokens,
            payload_dtype: DType::F16,
            key_dtype: DType::Int8,
            model_digest: Sha256Digest([1; 32]),
            tokenizer_digest: Sha256Digest([2; 32]),
            model_name: "m".into(),
        }
    }

    #[test]
    fn fingerprint_ignores_names_and_nothing_else() {
        let base = spec().fingerprint();
        assert_eq!(base, CollectionSpec { name: "x".into(), model_name: "y".into(), ..spec() }.fingerprint());
        let mut others = vec![
            CollectionSpec { key_rule: KeyRule::Mean, ..spec() },
            CollectionSpec { payload_dtype: DType::Int8, ..spec() },
            CollectionSpec { key_dtype: DType::F16, ..spec() },
            CollectionSpec { model_digest: Sha256Digest([3; 32]), ..spec() },
            CollectionSpec { tokenizer_digest: Sha256Digest([3; 32]), ..spec() },
        ];
        for change in [
            |shape: &mut ModelShape| shape.layers += 1,
            |shape: &mut ModelShape| shape.query_heads += 2,
            |shape: &mut ModelShape| shape.kv_heads = 1,
            |shape: &mut ModelShape| shape.head_dim = 16,
            |shape: &mut ModelShape| shape.block_tokens = 17,
            |shape: &mut ModelShape| shape.rope.frequencies[0] = 0.5,
            |shape: &mut ModelShape| shape.softmax_scale = 1.0,
            |shape: &mut ModelShape| shape.unrotated_layers = vec![0],
            |shape: &mut ModelShape| shape.unrotated_layers = vec![1],
        ] {
            let mut other = spec();
            change(&mut other.shape);
            others.push(other);
        }
        for other in others {
            assert_ne!(base, other.fingerprint(), "{other:?}");
        }
    }

    #[test]
    fn rotating_there_and_back_is_the_identity_and_rotations_add_up() {
        let rope = Rope::from_base(10_000.0, 6);
        let head: Vec<f32> = (0..8).map(|i| i as f32 - 3.0).collect();
        let mut rotated = head.clone();
        rope.rotate(&mut rotated, 1000);
        rope.rotation(-997).apply(&mut rotated);
        rope.rotate(&mut rotated, -3);
        for (a, b) in head.iter().zip(&rotated) {
            assert!((a - b).abs() < 1e-5, "{head:?} {rotated:?}");
        }
        assert_eq!(head[6..], rotated[6..], "dimensions beyond the rotary ones stay");
    }

    #[test]
    fn impossible_shapes_are_refused_by_field() {
        let field = |change: fn(&mut CollectionSpec)| {
            let mut spec = spec();
            change(&mut spec);
            spec.check().unwrap_err().field
        };
        assert_eq!(spec().check(), Ok(()));
        assert_eq!(field(|s| s.shape.kv_heads = 3), "query_heads");
        assert_eq!(field(|s| s.shape.layers = 0), "layers");
        assert_eq!(field(|s| s.shape.block_tokens = u32::MAX), "block_tokens");
        assert_eq!(field(|s| s.shape.rope.frequencies = vec![1.0; 5]), "rope.frequencies");
        assert_eq!(field(|s| s.shape.rope.frequencies[1] = f32::NAN), "rope.frequencies");
        assert_eq!(field(|s| s.shape.softmax_scale = 0.0), "softmax_scale");
        assert_eq!(field(|s| s.shape.unrotated_layers = vec![2]), "unrotated_layers");
        assert_eq!(field(|s| s.shape.unrotated_layers = vec![1, 0]), "unrotated_layers");
        assert_eq!(field(|s| s.shape.unrotated_layers = vec![1, 1]), "unrotated_layers");
        assert_eq!(field(|s| s.key_dtype = DType::F32), "key_dtype");
        assert_eq!(field(|s| s.name = "a\nb".into()), "name");
        assert_eq!(field(|s| s.name.clear()), "name");
    }
}
