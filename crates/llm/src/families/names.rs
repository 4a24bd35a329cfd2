//! What tensors are called in safetensors folders and in GGUF: Llama's names, and those in which a family differs.

use super::Family;
use crate::weights::{LayerTensor, TensorName};

/// A layer's tensor by its names in a folder and in GGUF.
pub(crate) type Name = (LayerTensor, &'static str, &'static str);

/// The names of most families.
const NAMES: &[Name] = &[
    (LayerTensor::AttentionNorm, "input_layernorm.weight", "attn_norm.weight"),
    (LayerTensor::Query, "self_attn.q_proj.weight", "attn_q.weight"),
    (LayerTensor::Key, "self_attn.k_proj.weight", "attn_k.weight"),
    (LayerTensor::Value, "self_attn.v_proj.weight", "attn_v.weight"),
    (LayerTensor::QueryKeyValue, "self_attn.qkv_proj.weight", "attn_qkv.weight"),
    (LayerTensor::QueryBias, "self_attn.q_proj.bias", "attn_q.bias"),
    (LayerTensor::KeyBias, "self_attn.k_proj.bias", "attn_k.bias"),
    (LayerTensor::ValueBias, "self_attn.v_proj.bias", "attn_v.bias"),
    (LayerTensor::QueryNorm, "self_attn.q_norm.weight", "attn_q_norm.weight"),
    (LayerTensor::KeyNorm, "self_attn.k_norm.weight", "attn_k_norm.weight"),
    (LayerTensor::AttentionOutput, "self_attn.o_proj.weight", "attn_output.weight"),
    (LayerTensor::AttentionOutputBias, "self_attn.o_proj.bias", "attn_output.bias"),
    (LayerTensor::FfnNorm, "post_attention_layernorm.weight", "ffn_norm.weight"),
    (LayerTensor::Gate, "mlp.gate_proj.weight", "ffn_gate.weight"),
    (LayerTensor::Up, "mlp.up_proj.weight", "ffn_up.weight"),
    (LayerTensor::GateUp, "mlp.gate_up_proj.weight", "ffn_up.weight"),
    (LayerTensor::GateBias, "mlp.gate_proj.bias", "ffn_gate.bias"),
    (LayerTensor::UpBias, "mlp.up_proj.bias", "ffn_up.bias"),
    (LayerTensor::Down, "mlp.down_proj.weight", "ffn_down.weight"),
    (LayerTensor::DownBias, "mlp.down_proj.bias", "ffn_down.bias"),
];

/// The names where what comes out of a branch is normalised: Hugging Face calls that norm by what is Llama's name for another.
pub(crate) const NAMES_OF_OUTPUT_NORMS: &[Name] = &[
    (LayerTensor::AttentionOutputNorm, "post_attention_layernorm.weight", "post_attention_norm.weight"),
    (LayerTensor::FfnNorm, "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    (LayerTensor::FfnOutputNorm, "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
];

/// The name of a tensor in a folder.
pub(crate) fn folder_name(family: &Family, name: TensorName) -> String {
    match name {
        TensorName::Embedding => "model.embed_tokens.weight".into(),
        TensorName::OutputNorm => "model.norm.weight".into(),
        TensorName::Output => "lm_head.weight".into(),
        TensorName::Layer(layer, tensor) => format!("model.layers.{layer}.{}", of_layer(family, tensor).1),
    }
}

/// The name of a tensor in GGUF.
pub(crate) fn gguf_name(family: &Family, name: TensorName) -> String {
    match name {
        TensorName::Embedding => "token_embd.weight".into(),
        TensorName::OutputNorm => "output_norm.weight".into(),
        TensorName::Output => "output.weight".into(),
        TensorName::Layer(layer, tensor) => format!("blk.{layer}.{}", of_layer(family, tensor).2),
    }
}

fn of_layer(family: &Family, tensor: LayerTensor) -> Name {
    let known = |names: &[Name]| names.iter().find(|(known, ..)| *known == tensor).copied();
    // Only a family that names it has a norm behind a branch.
    let name = known(family.names).or_else(|| known(NAMES)).or_else(|| known(NAMES_OF_OUTPUT_NORMS));
    name.expect("every tensor of a layer has a name")
}

/// What the names of tensors begin with in folders of models that also see, and what that is in a folder of the language model:
/// transformers wrote the first two before its version 5, and the last since then.
const WRAPPED: &[(&str, &str)] = &[
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// What the names of tensors begin with that turn pictures into embeddings: no text goes through them.
const VISION: &[&str] =
    &["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."];

/// The name of a stored tensor in a folder of the language model alone; none if it is about pictures.
pub(crate) fn text_name(family: &Family, stored: &str) -> Option<String> {
    if family.wrapper.is_none() {
        return Some(stored.into());
    }
    if VISION.iter().any(|vision| stored.starts_with(vision)) {
        return None;
    }
    let unwrapped = WRAPPED.iter().find_map(|(begin, plain)| Some(format!("{plain}{}", stored.strip_prefix(begin)?)));
    Some(unwrapped.unwrap_or_else(|| stored.into()))
}
