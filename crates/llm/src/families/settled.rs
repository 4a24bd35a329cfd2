//! Which settings that no family reads change nothing.

/// Fields of `config.json` that say nothing about a logit: what a model was trained with, how texts are generated and stored.
const FOLDER_HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "include_landmark_in_loss",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "model_name",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    // In how many parts the products were computed when it was trained.
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "train_context_length",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// What the names of further such fields begin with: notes of the programs that saved the file.
const FOLDER_NOTES: &[&str] = &["_", "unsloth"];

/// Fields beside `text_config` that are about what a model sees.
const FOLDER_VISION: &[&str] = &[
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "vision_config",
];

/// Fields that are computed only where they say what is computed anyway; true is 1.
pub(crate) const FOLDER_NEUTRAL: &[(&str, f64)] = &[
    ("add_cross_attention", 0.0),
    ("attention_bias", 0.0),
    ("attention_multiplier", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("embedding_multiplier", 1.0),
    ("final_logit_softcapping", 0.0),
    ("full_attn_mod", 1.0),
    ("interpolate_factor", 1.0),
    ("is_decoder", 0.0),
    ("is_encoder_decoder", 0.0),
    ("lm_head_bias", 0.0),
    ("logit_scale", 1.0),
    ("logits_scaling", 1.0),
    ("mlp_bias", 0.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("residual_multiplier", 1.0),
    ("rope_interleaved", 0.0),
    ("use_bidirectional_attention", 0.0),
    ("use_mrope", 0.0),
    ("use_sliding_window", 0.0),
];

/// Settings of GGUF behind the architecture and a dot that say nothing about a logit.
const GGUF_HARMLESS: &[&str] = &[
    // Rows of the embedding say it.
    "vocab_size",
    // They say where a scaling came from; those that are computed by it read it.
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    // The order of rows that every converter writes.
    "tensor_data_layout",
];

/// Settings of GGUF that are computed only where they say what is computed anyway; true is 1.
pub(crate) const GGUF_NEUTRAL: &[(&str, f64)] = &[
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.sliding_window", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("pooling_type", 0.0),
];

/// Whether a field of `config.json` says nothing about a logit.
pub(crate) fn is_harmless_field(name: &str) -> bool {
    FOLDER_HARMLESS.contains(&name) || FOLDER_NOTES.iter().any(|note| name.starts_with(note))
}

/// Whether a field beside `text_config` says nothing about what the text becomes.
pub(crate) fn is_beside_text(name: &str) -> bool {
    is_harmless_field(name) || FOLDER_VISION.contains(&name)
}

/// Whether a setting of GGUF, named behind the architecture and a dot, says nothing about a logit.
pub(crate) fn is_harmless_setting(name: &str) -> bool {
    GGUF_HARMLESS.contains(&name)
}
