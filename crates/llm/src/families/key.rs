//! What settings are called in `config.json` and in GGUF.

/// A setting by its name in each format; empty where a format has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// In `config.json`.
    pub(crate) folder: &'static str,
    /// In GGUF, behind the architecture and a dot.
    pub(crate) gguf: &'static str,
}

pub(crate) const fn key(folder: &'static str, gguf: &'static str) -> Key {
    Key { folder, gguf }
}

// Settings that more than one family has.
pub(crate) const LAYERS: Key = key("num_hidden_layers", "block_count");
pub(crate) const QUERY_HEADS: Key = key("num_attention_heads", "attention.head_count");
pub(crate) const KV_HEADS: Key = key("num_key_value_heads", "attention.head_count_kv");
pub(crate) const HEAD_DIM: Key = key("head_dim", "attention.key_length");
pub(crate) const VALUE_DIM: Key = key("", "attention.value_length");
pub(crate) const HIDDEN: Key = key("hidden_size", "embedding_length");
pub(crate) const FFN: Key = key("intermediate_size", "feed_forward_length");
pub(crate) const CONTEXT: Key = key("max_position_embeddings", "context_length");
pub(crate) const NORM_EPSILON: Key = key("rms_norm_eps", "attention.layer_norm_rms_epsilon");
pub(crate) const ACTIVATION: Key = key("hidden_activation", "");
pub(crate) const OLDER_ACTIVATION: Key = key("hidden_act", "");
pub(crate) const SOFTMAX_SCALE: Key = key("", "attention.scale");
pub(crate) const ATTENTION_BIAS: Key = key("attention_bias", "");
pub(crate) const FFN_BIAS: Key = key("mlp_bias", "");
pub(crate) const LAYER_TYPES: Key = key("layer_types", "");
pub(crate) const SLIDING_WINDOW: Key = key("sliding_window", "attention.sliding_window");
pub(crate) const USE_SLIDING_WINDOW: Key = key("use_sliding_window", "");
pub(crate) const WINDOW_LAYERS: Key = key("max_window_layers", "");
