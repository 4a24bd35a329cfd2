//! The forward pass of a decoder in f32: Llama's, and what an [`Architecture`](super::Architecture) changes about it. Attention is
//! the caller's: this hands over `q`, `k`, `v` before RoPE and takes back what attention made of them, so it neither rotates nor remembers anything.

use std::path::Path;

use rayon::prelude::*;

use super::architecture::LayerKind;
use super::config::ModelConfig;
use super::error::{ForwardError, LoadError};
use super::kernels::{add_bias, gated, rms_norm, rms_norm_in_place, take_columns};
use super::low_rank::LandmarkUpdates;
use super::packing::values;
use super::safetensors::SafeTensorsFolder;
use super::tensors::{Opened, open_weights};
use super::weights::{LayerSource, LayerTensor, TensorName, TensorSource, read_packed};
use landmarkdb::SequenceAttention;
use linalg::{Packed, Write, add_scaled};

/// The weights of a model. Shared between sequences; all state of a sequence is in its [`SequenceAttention`].
pub struct Llama {
    config: ModelConfig,
    /// `(vocab, hidden)`
    embedding: Packed,
    layers: Vec<Layer>,
    /// `(hidden)`
    norm: Vec<f32>,
    /// `(vocab, hidden)`; none when it is the embedding.
    output: Option<Packed>,
}

struct Layer {
    /// `(hidden)`: of what goes into the attention.
    attention_norm: Option<Vec<f32>>,
    /// `(Hq * D + 2 * Hkv * D, hidden)`: q, k and v in one product.
    qkv: Packed,
    /// `(Hq * D + 2 * Hkv * D)`
    qkv_bias: Option<Vec<f32>>,
    /// `(D)` or `(Hq * D)`
    query_norm: Option<Vec<f32>>,
    /// `(D)` or `(Hkv * D)`
    key_norm: Option<Vec<f32>>,
    /// `(hidden, Hq * D)`
    attention_output: Packed,
    after_attention: After,
    /// `(hidden)`: of what goes into the feed-forward network.
    ffn_norm: Option<Vec<f32>>,
    /// `(2 * ffn, hidden)`: gate and up in one product.
    gate_up: Packed,
    /// `(2 * ffn)`
    gate_up_bias: Option<Vec<f32>>,
    /// `(hidden, ffn)`
    down: Packed,
    after_ffn: After,
    /// Of a model whose landmarks were given to it by an adapter.
    landmark: Option<LandmarkUpdates>,
}

/// What becomes of a branch's output before it is added to the residual stream.
struct After {
    /// `(hidden)`
    bias: Option<Vec<f32>>,
    /// `(hidden)`
    norm: Option<Vec<f32>>,
    scale: f32,
}

/// Of which tokens the logits are wanted. The output matrix is the largest of a small model: ask for no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// Only what attention keeps of the tokens.
    None,
    /// Of the last token: `(1, vocab)`.
    Last,
    /// Of every token: `(T, vocab)`.
    All,
}

/// Memory of one forward pass, taken once for all layers.
struct Scratch {
    /// `(T, hidden)`
    normed: Vec<f32>,
    /// `(T, Hq * D + 2 * Hkv * D)`
    qkv: Vec<f32>,
    /// `(T, Hq, D)`
    q: Vec<f32>,
    /// `(T, Hkv, D)`
    k: Vec<f32>,
    /// `(T, Hkv, D)`
    v: Vec<f32>,
    /// `(T, 2 * ffn)`
    gate_up: Vec<f32>,
    /// `(T, ffn)`
    gated: Vec<f32>,
    /// `(T, hidden)`; empty where branches are added as they come out.
    branch: Vec<f32>,
}

impl Llama {
    /// Loads a folder with `config.json` and safetensors weights, for callers that bring token ids or embeddings of
    /// their own. [`LoadedModel::open`](super::LoadedModel::open) loads the tokenizer too.
    pub fn open(folder: &Path) -> Result<Self, LoadError> {
        let Opened { config, weights, .. } = open_weights(folder)?;
        Self::load(config, &*weights)
    }

    /// Loads one safetensors file with Hugging Face names as the model that `config` describes.
    pub fn open_weights(config: ModelConfig, weights: &Path) -> Result<Self, LoadError> {
        config.check().map_err(|source| LoadError::Shape { path: weights.into(), source })?;
        Self::load(config, &SafeTensorsFolder::file(weights)?)
    }

    /// Reads all weights, layers in parallel.
    pub(super) fn load(config: ModelConfig, source: &dyn TensorSource) -> Result<Self, LoadError> {
        let table = |name| read_packed(source, &[(name, [config.vocab, config.hidden])]);
        let embedding = table(TensorName::Embedding)?;
        let norm = source.read(TensorName::OutputNorm, &[config.hidden])?;
        let output = match config.tied_output {
            true => None,
            false => Some(table(TensorName::Output)?),
        };
        let layers = (0..config.layers)
            .into_par_iter()
            .map(|layer| Layer::load(&config, layer, source))
            .collect::<Result<_, _>>()?;
        let norm = values(&norm).expect("a source gives f32 tensors");
        Ok(Llama { embedding, norm, output, layers, config })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs the next tokens of a sequence through all layers. Returns the logits asked for: `(0)`, `(1, vocab)` or
    /// `(T, vocab)`. Chunks of a few hundred tokens are near full speed; memory grows with T.
    pub fn forward(
        &self,
        ids: &[u32],
        attention: &mut dyn SequenceAttention,
        logits: Logits,
    ) -> Result<Vec<f32>, ForwardError> {
        self.forward_embedded(self.embed(ids)?, attention, logits)
    }

    /// The embeddings `(T, hidden)` of tokens.
    pub fn embed(&self, ids: &[u32]) -> Result<Vec<f32>, ForwardError> {
        let (vocab, hidden) = (self.config.vocab, self.config.hidden);
        let mut x = Vec::with_capacity(ids.len() * hidden);
        for &id in ids {
            if id as usize >= vocab {
                return Err(ForwardError::UnknownToken { id, vocab });
            }
            self.embedding.push_column(id as usize, &mut x);
        }
        scale(&mut x, self.config.architecture.embedding_scale);
        Ok(x)
    }

    /// [`Llama::forward`] from embeddings `x (T, hidden)`.
    pub fn forward_embedded(
        &self,
        mut x: Vec<f32>,
        attention: &mut dyn SequenceAttention,
        logits: Logits,
    ) -> Result<Vec<f32>, ForwardError> {
        let hidden = self.config.hidden;
        if !x.len().is_multiple_of(hidden) {
            return Err(ForwardError::EmbeddingLength { hidden, found: x.len() });
        }
        let tokens = x.len() / hidden;
        let wanted = match logits {
            Logits::None => 0,
            Logits::Last => tokens.min(1),
            Logits::All => tokens,
        };
        if tokens == 0 {
            return Ok(Vec::new());
        }
        let landmarks = self.landmark_rows(attention.position(), tokens);
        let mut scratch = Scratch::new(&self.config, tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            let mut attended = self.attend(index, &x, &landmarks, attention, &mut scratch)?;
            if index + 1 == self.layers.len() {
                // Past the last attention a token serves its own logits only.
                x.drain(..(tokens - wanted) * hidden);
                attended.drain(..(tokens - wanted) * self.config.query_width());
            }
            layer.after_attention.add(&layer.attention_output, &attended, &mut x, &self.config, &mut scratch.branch);
            if let Some(output) = layer.landmark.as_ref().and_then(|updates| updates.output.as_ref()) {
                let width = self.config.query_width();
                for &row in &landmarks {
                    output.add(&attended[row * width..][..width], &mut x[row * hidden..][..hidden]);
                }
            }
            self.feed_forward(layer, &mut x, &mut scratch);
        }
        let normed = &mut scratch.normed[..x.len()];
        rms_norm(&x, &self.norm, self.config.norm_epsilon, normed);
        let mut out = vec![0.0; wanted * self.config.vocab];
        self.output.as_ref().unwrap_or(&self.embedding).multiply(normed, &mut out, Write::Replace);
        scale(&mut out, self.config.architecture.logit_scale);
        if let Some(landmark) = self.config.landmark.filter(|landmark| landmark.hidden) {
            // The model that it was given to does not know the token.
            out.chunks_exact_mut(self.config.vocab).for_each(|row| row[landmark.id as usize] = f32::NEG_INFINITY);
        }
        Ok(out)
    }

    /// Which of the tokens after `position` are landmarks that have updates of their own.
    fn landmark_rows(&self, position: usize, tokens: usize) -> Vec<usize> {
        let Some(landmark) = self.config.landmark.filter(|landmark| landmark.hidden) else { return Vec::new() };
        let block_tokens = landmark.block_tokens as usize;
        (0..tokens).filter(|row| (position + row + 1).is_multiple_of(block_tokens)).collect()
    }

    /// Attention of one layer for `x (T, hidden)`, of which `landmarks` are rows: `(T, Hq, D)`, before the output matrix.
    fn attend(
        &self,
        index: usize,
        x: &[f32],
        landmarks: &[usize],
        attention: &mut dyn SequenceAttention,
        scratch: &mut Scratch,
    ) -> Result<Vec<f32>, ForwardError> {
        let (layer, config) = (&self.layers[index], &self.config);
        let (query_width, kv_width) = (config.query_width(), config.kv_width());
        let columns = query_width + 2 * kv_width;
        let Scratch { normed, qkv, q, k, v, .. } = scratch;
        let normed = normalised(x, &layer.attention_norm, config.norm_epsilon, normed);
        layer.qkv.multiply(normed, qkv, Write::Replace);
        if let Some(updates) = &layer.landmark {
            for &row in landmarks {
                let normed = &normed[row * config.hidden..][..config.hidden];
                let (query, rest) = qkv[row * columns..].split_at_mut(query_width);
                if let Some(update) = &updates.query {
                    update.add(normed, query);
                }
                if let Some(key) = &updates.key {
                    key.add(normed, &mut rest[..kv_width]);
                }
            }
        }
        take_columns(qkv, columns, 0, q);
        take_columns(qkv, columns, query_width, k);
        take_columns(qkv, columns, query_width + kv_width, v);
        if let Some(bias) = &layer.qkv_bias {
            let (query, rest) = bias.split_at(query_width);
            let (key, value) = rest.split_at(kv_width);
            add_bias(q, query);
            add_bias(k, key);
            add_bias(v, value);
        }
        if let (Some(query), Some(key)) = (&layer.query_norm, &layer.key_norm) {
            rms_norm_in_place(q, query, config.norm_epsilon);
            rms_norm_in_place(k, key, config.norm_epsilon);
        }
        let gain = config.architecture.gain(index);
        if gain != 1.0 {
            let rope = match config.architecture.kind(index) {
                LayerKind::Sliding { rope, .. } => rope,
                _ => &config.rope,
            };
            let rotary_dims = 2 * rope.frequencies.len();
            q.chunks_exact_mut(config.head_dim as usize).for_each(|head| scale(&mut head[..rotary_dims], gain));
        }
        let attended = attention
            .attend(index, x.len() / config.hidden, q, k, v)
            .map_err(|source| ForwardError::Attention { layer: index, source })?;
        if attended.len() != q.len() {
            return Err(ForwardError::AttendedLength { layer: index, expected: q.len(), found: attended.len() });
        }
        Ok(attended)
    }

    /// Adds the feed-forward network's output to `x (T, hidden)`.
    fn feed_forward(&self, layer: &Layer, x: &mut [f32], scratch: &mut Scratch) {
        let ffn = self.config.ffn;
        let tokens = x.len() / self.config.hidden;
        let gate_up = &mut scratch.gate_up[..tokens * 2 * ffn];
        let inner = &mut scratch.gated[..tokens * ffn];
        let normed = normalised(x, &layer.ffn_norm, self.config.norm_epsilon, &mut scratch.normed);
        layer.gate_up.multiply(normed, gate_up, Write::Replace);
        if let Some(bias) = &layer.gate_up_bias {
            add_bias(gate_up, bias);
        }
        gated(gate_up, self.config.architecture.activation, ffn, inner);
        layer.after_ffn.add(&layer.down, inner, x, &self.config, &mut scratch.branch);
    }
}

impl Layer {
    fn load(config: &ModelConfig, layer: u32, source: &dyn TensorSource) -> Result<Self, LoadError> {
        use LayerTensor::*;
        let landmark = source.landmark_updates(layer)?;
        let source = LayerSource::new(config, layer, source);
        let scale = config.architecture.residual_scale;
        let after = |bias, norm| Ok(After { bias: source.vector(&[bias])?, norm: source.vector(&[norm])?, scale });
        Ok(Layer {
            attention_norm: source.vector(&[AttentionNorm])?,
            qkv: source.packed(&[Query, Key, Value, QueryKeyValue])?,
            qkv_bias: source.vector(&[QueryBias, KeyBias, ValueBias])?,
            query_norm: source.vector(&[QueryNorm])?,
            key_norm: source.vector(&[KeyNorm])?,
            attention_output: source.packed(&[AttentionOutput])?,
            after_attention: after(AttentionOutputBias, AttentionOutputNorm)?,
            ffn_norm: source.vector(&[FfnNorm])?,
            gate_up: source.packed(&[Gate, Up, GateUp])?,
            gate_up_bias: source.vector(&[GateBias, UpBias])?,
            down: source.packed(&[Down])?,
            after_ffn: after(DownBias, FfnOutputNorm)?,
            landmark,
        })
    }
}

impl After {
    /// Whether a branch is added as it comes out.
    fn is_nothing(&self) -> bool {
        self.bias.is_none() && self.norm.is_none() && self.scale == 1.0
    }

    /// Adds `scale * norm(matrix inner + bias)` to `x (T, hidden)`, with `inner (T, in)`.
    fn add(&self, matrix: &Packed, inner: &[f32], x: &mut [f32], config: &ModelConfig, branch: &mut Vec<f32>) {
        if self.is_nothing() {
            return matrix.multiply(inner, x, Write::Add);
        }
        branch.resize(x.len(), 0.0);
        matrix.multiply(inner, branch, Write::Replace);
        if let Some(bias) = &self.bias {
            add_bias(branch, bias);
        }
        if let Some(norm) = &self.norm {
            rms_norm_in_place(branch, norm, config.norm_epsilon);
        }
        add_scaled(x, self.scale, branch);
    }
}

/// `x (T, hidden)` after RMS normalisation, in the beginning of `room`; as it is without `weight`.
fn normalised<'a>(x: &'a [f32], weight: &Option<Vec<f32>>, epsilon: f32, room: &'a mut [f32]) -> &'a [f32] {
    let Some(weight) = weight else { return x };
    let room = &mut room[..x.len()];
    rms_norm(x, weight, epsilon, room);
    room
}

fn scale(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|value| *value *= factor);
    }
}

impl Scratch {
    fn new(config: &ModelConfig, tokens: usize) -> Self {
        let values = |width: usize| vec![0.0; tokens * width];
        let (query_width, kv_width) = (config.query_width(), config.kv_width());
        Scratch {
            normed: values(config.hidden),
            qkv: values(query_width + 2 * kv_width),
            q: values(query_width),
            k: values(kv_width),
            v: values(kv_width),
            gate_up: values(2 * config.ffn),
            gated: values(config.ffn),
            branch: Vec::new(),
        }
    }
}
