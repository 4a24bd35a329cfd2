//! What sets a decoder apart from plain Llama. Loading and the forward pass follow from it; which family has which of it is
//! told in `families`.

use landmarkdb::Rope;

/// What a model computes where Llama does something else. The default is plain Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// One for each layer; none: all are [`LayerKind::Global`].
    pub kinds: Vec<LayerKind>,
    /// What products of queries and keys are multiplied with, if not with `1 / sqrt(D)`.
    pub softmax_scale: Option<f32>,
    /// What the rotated dimensions of a query are multiplied with in global layers. YaRN and LongRoPE multiply cosines
    /// and sines by a factor: its square, and on queries alone, so that stored keys stay plain.
    pub rotary_gain: f32,
    /// The longest local window of layers that the model was trained to look back over no more than so many tokens, the
    /// query's own included (Mistral, Phi-3).
    pub window_tokens_max: Option<u32>,
    /// Of the feed-forward network's gate.
    pub activation: Activation,
    /// Where a branch is normalised.
    pub norms: Norms,
    /// Whether queries and keys are normalised, before they are rotated.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Which products have a bias.
    pub biases: Biases,
    /// Whether q, k and v lie in one tensor, and gate and up in another.
    pub fused: bool,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// What a branch is multiplied with before it is added to the residual stream.
    pub residual_scale: f32,
    /// What logits are multiplied with.
    pub logit_scale: f32,
}

/// How far a layer looks back, and how it tells distances.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerKind {
    /// Over the whole text, rotated: a memory keeps its keys and values.
    Global,
    /// Over the whole text, without rotation (NoPE).
    Unrotated,
    /// Over the last tokens only. The model keeps them itself: see [`SlidingLayers`](crate::SlidingLayers).
    Sliding {
        /// Tokens that a query sees, its own included.
        window_tokens: usize,
        /// Rotation of q and k in this layer.
        rope: Rope,
        /// As [`Architecture::rotary_gain`], in this layer.
        rotary_gain: f32,
    },
}

/// What the gate goes through before it multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`
    Silu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

/// Where a branch, attention or feed-forward network, is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// What goes in.
    Before,
    /// What goes in, and what comes out before it is added.
    Around,
    /// What comes out alone.
    After,
}

/// What is one vector to the normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// `(D)`, each head.
    Head,
    /// `(Hq * D)` and `(Hkv * D)`, all heads of a token.
    Width,
}

/// Which products of a layer have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The attention's output.
    pub output: bool,
    /// The gate and what it multiplies.
    pub gate_up: bool,
    /// The feed-forward network's output.
    pub down: bool,
}

impl Default for Architecture {
    fn default() -> Self {
        Architecture {
            kinds: Vec::new(),
            softmax_scale: None,
            rotary_gain: 1.0,
            window_tokens_max: None,
            activation: Activation::Silu,
            norms: Norms::Before,
            query_key_norm: None,
            biases: Biases::default(),
            fused: false,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
        }
    }
}

impl Architecture {
    /// The kind of a layer, counted from 0.
    pub fn kind(&self, layer: usize) -> &LayerKind {
        self.kinds.get(layer).unwrap_or(&LayerKind::Global)
    }

    /// What the rotated dimensions of a layer's queries are multiplied with.
    pub fn gain(&self, layer: usize) -> f32 {
        match self.kind(layer) {
            LayerKind::Global => self.rotary_gain,
            LayerKind::Unrotated => 1.0,
            LayerKind::Sliding { rotary_gain, .. } => *rotary_gain,
        }
    }

    /// Whether the model is plain Llama, but for rotation and sizes: what can be trained here.
    pub fn is_plain(&self) -> bool {
        *self == Architecture::default()
    }
}

impl Norms {
    /// Whether what goes into a branch is normalised.
    pub fn before(self) -> bool {
        self != Norms::After
    }

    /// Whether what comes out of a branch is normalised.
    pub fn after(self) -> bool {
        self != Norms::Before
    }
}
