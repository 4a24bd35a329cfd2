//! Layers that see the last tokens only. No memory has them: the model keeps those tokens itself, and computes exactly what it was
//! trained with.
//!
//! A [`SlidingLayers`] is the state of these layers for one sequence. Laid over the attention that the other layers have, a
//! memory's or a full one, it becomes a [`HybridAttention`], which is the attention of all layers. A sequence that goes on later
//! takes what [`SlidingLayers::state`] gave with it.

use rayon::prelude::*;

use super::architecture::LayerKind;
use super::config::ModelConfig;
use super::error::SlidingStateError;
use landmarkdb::{AttentionError, Rope, SequenceAttention};
use linalg::{add_scaled, dot, exp_sum, max};

const MAGIC: &[u8; 4] = b"LSLD";
const VERSION: u32 = 1;

/// Heads of queries that one task attends with at least.
const TASK_HEADS: usize = 4;

/// The sliding layers of one sequence: for each of them K and V of the tokens that the next ones still see.
#[derive(Clone, Debug)]
pub struct SlidingLayers {
    query_heads: usize,
    kv_heads: usize,
    /// D
    dim: usize,
    softmax_scale: f32,
    /// Where each layer of the model is attended to.
    places: Vec<Place>,
    layers: Vec<SlidingLayer>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// In `layers`.
    Sliding(usize),
    /// A layer of the attention below.
    Below(usize),
}

#[derive(Clone, Debug)]
struct SlidingLayer {
    /// Tokens that a query sees, its own included.
    window_tokens: usize,
    rope: Rope,
    /// `(tokens, Hkv, D)`, rotated by the token's position: the last ones, at least those that are still seen.
    k: Vec<f32>,
    /// `(tokens, Hkv, D)`
    v: Vec<f32>,
    /// Position of the next token.
    position: usize,
}

/// The attention of all layers of a model: sliding layers by themselves, the others by the attention below, which counts those
/// from 0.
pub struct HybridAttention<'a> {
    sliding: &'a mut SlidingLayers,
    below: &'a mut dyn SequenceAttention,
}

impl SlidingLayers {
    /// For a sequence that begins; `None` for a model without such layers, whose attention is the memory's alone.
    pub fn new(config: &ModelConfig) -> Option<Self> {
        let (mut places, mut layers) = (Vec::new(), Vec::new());
        for kind in &config.architecture.kinds {
            match kind {
                LayerKind::Global | LayerKind::Unrotated => places.push(Place::Below(places.len() - layers.len())),
                LayerKind::Sliding { window_tokens, rope, .. } => {
                    places.push(Place::Sliding(layers.len()));
                    layers.push(SlidingLayer {
                        window_tokens: *window_tokens,
                        rope: rope.clone(),
                        k: Vec::new(),
                        v: Vec::new(),
                        position: 0,
                    });
                }
            }
        }
        (!layers.is_empty()).then(|| SlidingLayers {
            query_heads: config.query_heads as usize,
            kv_heads: config.kv_heads as usize,
            dim: config.head_dim as usize,
            softmax_scale: config.softmax_scale(),
            places,
            layers,
        })
    }

    /// Position of the next token.
    pub fn position(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.position)
    }

    /// The attention of all layers of a sequence whose other layers are `below`.
    ///
    /// # Errors
    /// [`AttentionError::Invalid`] if `below` is at another position.
    pub fn over<'a>(&'a mut self, below: &'a mut dyn SequenceAttention) -> Result<HybridAttention<'a>, AttentionError> {
        if self.position() != below.position() {
            return Err(AttentionError::Invalid {
                field: "position of sliding layers",
                expected: format!("{}, that of the other layers", below.position()),
                found: self.position().to_string(),
            });
        }
        Ok(self.beside(below))
    }

    /// [`SlidingLayers::over`] in the midst of a group of tokens, where the positions of both differ.
    pub(super) fn beside<'a>(&'a mut self, below: &'a mut dyn SequenceAttention) -> HybridAttention<'a> {
        HybridAttention { sliding: self, below }
    }

    /// What a sequence needs to go on later: K and V of the last tokens, as exact as they are here. Little-endian: a header with
    /// magic and version, KV heads, head dim, number of layers and position; of each layer its window, then K and V of
    /// `min(window - 1, position)` tokens.
    pub fn state(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for number in [VERSION, self.kv_heads as u32, self.dim as u32, self.layers.len() as u32] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend((self.position() as u64).to_le_bytes());
        for layer in &self.layers {
            bytes.extend((layer.window_tokens as u64).to_le_bytes());
            let values = layer.kept_tokens(layer.position) * self.width();
            for values in [&layer.k[layer.k.len() - values..], &layer.v[layer.v.len() - values..]] {
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
        bytes
    }

    /// Goes on where the sequence was that [`SlidingLayers::state`] is of. After an error nothing has changed.
    ///
    /// # Errors
    /// A state of another model or version, or one that is damaged.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), SlidingStateError> {
        let mut reader = Reader { bytes: state, at: 0 };
        let magic = reader.take(MAGIC.len())?;
        if magic != MAGIC {
            return Err(invalid("magic", format!("{MAGIC:?}"), format!("{magic:?}")));
        }
        let header = [
            ("version", VERSION),
            ("KV heads", self.kv_heads as u32),
            ("head dim", self.dim as u32),
            ("layers", self.layers.len() as u32),
        ];
        for (field, expected) in header {
            let found = u32::from_le_bytes(reader.array()?);
            if found != expected {
                return Err(invalid(field, expected.to_string(), found.to_string()));
            }
        }
        let position = u64::from_le_bytes(reader.array()?);
        let position = u32::try_from(position)
            .map_err(|_| invalid("position", format!("at most {}", u32::MAX), position.to_string()))?
            as usize;
        let width = self.width();
        let mut layers = self.layers.clone();
        for layer in &mut layers {
            let window = u64::from_le_bytes(reader.array()?);
            if window != layer.window_tokens as u64 {
                return Err(invalid("window", layer.window_tokens.to_string(), window.to_string()));
            }
            let values = layer.kept_tokens(position) * width;
            (layer.k, layer.v) = (reader.floats(values)?, reader.floats(values)?);
            layer.position = position;
        }
        if reader.at != state.len() {
            return Err(invalid("length", format!("{} bytes", reader.at), format!("{} bytes", state.len())));
        }
        self.layers = layers;
        Ok(())
    }

    /// `Hkv * D`
    fn width(&self) -> usize {
        self.kv_heads * self.dim
    }

    /// Attention of one sliding layer: see [`SequenceAttention::attend`].
    fn attend(&mut self, index: usize, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (width, dim, query_heads) = (self.width(), self.dim, self.query_heads);
        let (group, softmax_scale) = (query_heads / self.kv_heads, self.softmax_scale);
        let layer = &mut self.layers[index];
        let (first_query, tokens) = (layer.position, k.len() / width);
        let rotations: Vec<_> = (0..tokens).map(|t| layer.rope.rotation((first_query + t) as i64)).collect();
        let begin = layer.k.len();
        layer.k.extend_from_slice(k);
        layer.v.extend_from_slice(v);
        for (k, rotation) in layer.k[begin..].chunks_exact_mut(width).zip(&rotations) {
            k.chunks_exact_mut(dim).for_each(|head| rotation.apply(head));
        }
        layer.position += tokens;

        // Of the tokens at hand, the one that each query is.
        let own = begin / width;
        let (keys, values, window_tokens) = (&layer.k, &layer.v, layer.window_tokens);
        let mut out = vec![0.0; q.len()];
        let rows = out.par_chunks_exact_mut(dim).zip(q.par_chunks_exact(dim)).enumerate().with_min_len(TASK_HEADS);
        rows.for_each_init(
            || (Vec::new(), vec![0.0; dim]),
            |(scores, query), (row, (out, q))| {
                let (t, kv_head) = (row / query_heads, row % query_heads / group);
                query.copy_from_slice(q);
                rotations[t].apply(query);
                let seen = (own + t + 1).saturating_sub(window_tokens)..own + t + 1;
                let head = |token: usize| token * width + kv_head * dim..token * width + (kv_head + 1) * dim;
                scores.clear();
                scores.extend(seen.clone().map(|token| dot(query, &keys[head(token)]) * softmax_scale));
                let top = max(scores);
                let sum = exp_sum(scores, top);
                for (token, weight) in seen.zip(&*scores) {
                    add_scaled(out, weight / sum, &values[head(token)]);
                }
            },
        );
        layer.forget(width);
        out
    }
}

impl SlidingLayer {
    /// Tokens before `position` that the next query sees.
    fn kept_tokens(&self, position: usize) -> usize {
        position.min(self.window_tokens - 1)
    }

    /// Drops tokens that no query will see again: not each time, as the rest has to move.
    fn forget(&mut self, width: usize) {
        let kept = self.kept_tokens(self.position);
        let at_hand = self.k.len() / width;
        if at_hand > 2 * kept + 1 {
            let gone = (at_hand - kept) * width;
            self.k.drain(..gone);
            self.v.drain(..gone);
        }
    }
}

impl SequenceAttention for HybridAttention<'_> {
    fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Result<Vec<f32>, AttentionError> {
        let wrong = |field, expected: usize, found: usize| {
            let (expected, found) = (format!("{expected} numbers"), found.to_string());
            Err(AttentionError::Invalid { field, expected, found })
        };
        match self.sliding.places.get(layer) {
            None => Err(AttentionError::Invalid {
                field: "layer",
                expected: format!("below {}", self.sliding.places.len()),
                found: layer.to_string(),
            }),
            Some(&Place::Below(layer)) => self.below.attend(layer, tokens, q, k, v),
            Some(&Place::Sliding(layer)) => {
                let (width, query_width) = (self.sliding.width(), self.sliding.query_heads * self.sliding.dim);
                for (field, slice, expected) in [("q", q, query_width), ("k", k, width), ("v", v, width)] {
                    if slice.len() != tokens * expected {
                        return wrong(field, tokens * expected, slice.len());
                    }
                }
                Ok(self.sliding.attend(layer, q, k, v))
            }
        }
    }

    fn position(&self) -> usize {
        self.below.position()
    }
}

/// The bytes of a state from its beginning on.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], SlidingStateError> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            invalid("length", format!("{count} more bytes at {}", self.at), format!("{} in all", self.bytes.len()))
        })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SlidingStateError> {
        let taken = self.take(N)?;
        Ok(std::array::from_fn(|i| taken[i]))
    }

    fn floats(&mut self, count: usize) -> Result<Vec<f32>, SlidingStateError> {
        let bytes = self.take(count.saturating_mul(4))?;
        let (values, _) = bytes.as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
        match values.iter().find(|value| !value.is_finite()) {
            Some(bad) => Err(invalid("K and V", "finite numbers".into(), bad.to_string())),
            None => Ok(values),
        }
    }
}

fn invalid(field: &'static str, expected: String, found: String) -> SlidingStateError {
    SlidingStateError { field, expected, found }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::Architecture;
    use crate::full_attention::PlainAttention;
    use crate::fuzz::base_config;
    use rand::{RngExt, SeedableRng};

    const TOKENS: usize = 40;

    /// Layers that slide, one that does not between them; the last has another window.
    fn config(window_tokens: usize) -> ModelConfig {
        let sliding =
            |window_tokens| LayerKind::Sliding { window_tokens, rope: Rope::from_base(50.0, 4), rotary_gain: 1.0 };
        let kinds = vec![sliding(window_tokens), LayerKind::Global, sliding(window_tokens + 2)];
        let architecture = Architecture { kinds, softmax_scale: Some(0.7), ..Architecture::default() };
        ModelConfig { layers: 3, query_heads: 4, kv_heads: 2, head_dim: 6, architecture, ..base_config() }
    }

    /// `q`, `k` and `v` of each layer.
    fn values(config: &ModelConfig) -> Vec<[Vec<f32>; 3]> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let mut values = |width: usize| (0..TOKENS * width).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        (0..config.layers)
            .map(|_| [config.query_width(), config.kv_width(), config.kv_width()].map(&mut values))
            .collect()
    }

    /// What each layer answers to tokens `from..to`, one layer behind the other.
    fn attend(
        attention: &mut dyn SequenceAttention,
        config: &ModelConfig,
        values: &[[Vec<f32>; 3]],
        tokens: std::ops::Range<usize>,
    ) -> Vec<Vec<f32>> {
        let of = |slice: &[f32]| -> Vec<f32> {
            let width = slice.len() / TOKENS;
            slice[tokens.start * width..tokens.end * width].to_vec()
        };
        let layers = values.iter().enumerate();
        let answer = |(layer, [q, k, v]): (usize, &[Vec<f32>; 3])| {
            attention.attend(layer, tokens.len(), &of(q), &of(k), &of(v)).unwrap()
        };
        assert_eq!(values.len(), config.layers as usize);
        layers.map(answer).collect()
    }

    /// The other layers of `config`, numbered from 0.
    fn below(config: &ModelConfig) -> PlainAttention {
        let layers = config.layers - config.sliding_layers().count() as u32;
        let architecture = Architecture { kinds: Vec::new(), ..config.architecture.clone() };
        PlainAttention::new(&ModelConfig { layers, architecture, ..config.clone() })
    }

    fn farthest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
        assert_eq!(a.len(), b.len());
        let far = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        a.iter().zip(b).map(far).fold(0.0, f32::max)
    }

    #[test]
    fn sliding_layers_agree_with_plain_loops_however_tokens_are_grouped() {
        for window in [1, 2, 7, TOKENS - 1, TOKENS, TOKENS + 1] {
            let config = config(window);
            let values = values(&config);
            let want = attend(&mut PlainAttention::new(&config), &config, &values, 0..TOKENS);
            for chunk in [1, 2, 6, 7, 8, 15, TOKENS] {
                let (mut sliding, mut below) = (SlidingLayers::new(&config).unwrap(), below(&config));
                let mut found = vec![Vec::new(); 3];
                for from in (0..TOKENS).step_by(chunk) {
                    let mut attention = sliding.over(&mut below).unwrap();
                    let to = TOKENS.min(from + chunk);
                    let answers = attend(&mut attention, &config, &values, from..to);
                    found.iter_mut().zip(answers).for_each(|(found, answer)| found.extend(answer));
                }
                let off = farthest(&found, &want);
                assert!(off < 1e-5, "window {window}, chunks of {chunk}: off by {off}");
                let kept = sliding.layers[0].k.len() / config.kv_width();
                assert!(kept <= 2 * window + 1, "window {window}, chunks of {chunk}: {kept} tokens are kept");
            }
        }
    }

    #[test]
    fn a_restored_state_goes_on_with_the_same_bits() {
        for window in [1, 5, 30] {
            let config = config(window);
            let values = values(&config);
            for split in [0, 1, 4, 5, 6, 20] {
                let (mut first, mut below) = (SlidingLayers::new(&config).unwrap(), below(&config));
                attend(&mut first.over(&mut below).unwrap(), &config, &values, 0..split);
                let state = first.state();
                let mut second = SlidingLayers::new(&config).unwrap();
                second.restore(&state).unwrap();
                assert_eq!((second.position(), second.state()), (split, state));
                let goes_on = |sliding: &mut SlidingLayers| -> Vec<Vec<f32>> {
                    let answer = |layer: usize| {
                        let [q, k, v] = &values[[0, 2][layer]];
                        let rest = |slice: &[f32]| slice[split * slice.len() / TOKENS..].to_vec();
                        sliding.attend(layer, &rest(q), &rest(k), &rest(v))
                    };
                    [0, 1].map(answer).to_vec()
                };
                assert_eq!(goes_on(&mut first), goes_on(&mut second), "window {window}, after {split}");
            }
        }
    }

    #[test]
    fn a_state_that_is_damaged_or_of_another_model_is_refused() {
        let config = config(5);
        let mut sliding = SlidingLayers::new(&config).unwrap();
        attend(&mut sliding.over(&mut below(&config)).unwrap(), &config, &values(&config), 0..9);
        let state = sliding.state();
        for length in 0..state.len() {
            SlidingLayers::new(&config).unwrap().restore(&state[..length]).unwrap_err();
        }
        let longer = [&state[..], &[0]].concat();
        assert_eq!(sliding.restore(&longer).unwrap_err().field, "length");
        let changed = |at: usize, bytes: &[u8]| {
            let mut state = state.clone();
            state[at..at + bytes.len()].copy_from_slice(bytes);
            let mut sliding = SlidingLayers::new(&config).unwrap();
            let field = sliding.restore(&state).unwrap_err().field;
            assert_eq!((sliding.position(), sliding.layers[0].k.len()), (0, 0));
            field
        };
        assert_eq!(changed(0, b"x"), "magic");
        assert_eq!(changed(4, &2u32.to_le_bytes()), "version");
        assert_eq!(changed(20, &u64::MAX.to_le_bytes()), "position");
        assert_eq!(changed(20, &2u64.to_le_bytes()), "window");
        assert_eq!(changed(28, &6u64.to_le_bytes()), "window");
        assert_eq!(changed(36, &f32::NAN.to_le_bytes()), "K and V");
        let mut other = SlidingLayers::new(&ModelConfig { head_dim: 4, ..config }).unwrap();
        assert_eq!(other.restore(&state).unwrap_err().field, "head dim");
    }

    #[test]
    fn layers_at_different_positions_are_not_joined() {
        let config = config(5);
        let (mut sliding, mut below) = (SlidingLayers::new(&config).unwrap(), below(&config));
        attend(&mut sliding.over(&mut below).unwrap(), &config, &values(&config), 0..3);
        let anew = SlidingLayers::new(&config).unwrap().over(&mut below).err().unwrap();
        assert!(matches!(anew, AttentionError::Invalid { field: "position of sliding layers", .. }), "{anew}");
        assert!(SlidingLayers::new(&base_config()).is_none());
    }
}
