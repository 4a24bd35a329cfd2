//! What the paper measured, to stand beside our figures (Mohtashami and Jaggi 2023, Tables 1 and 2, Figure 3).
//!
//! Its models were of another size (12 layers of width 1024; LLaMA 7B for passkeys) and read other texts (PG-19), so
//! only differences between rows compare.

/// A row of the paper's Table 1: evaluation length, what attends, blocks kept, k, tokens attended to, perplexity on PG-19.
pub(super) struct PaperPerplexity {
    pub(super) length_tokens: usize,
    pub(super) method: &'static str,
    pub(super) blocks: Option<u32>,
    pub(super) top_k: Option<u32>,
    pub(super) attention_tokens: usize,
    pub(super) perplexity: f64,
}

const fn row(
    length_tokens: usize,
    method: &'static str,
    blocks: Option<u32>,
    top_k: Option<u32>,
    attention_tokens: usize,
    perplexity: f64,
) -> PaperPerplexity {
    PaperPerplexity { length_tokens, method, blocks, top_k, attention_tokens, perplexity }
}

pub(super) const TABLE_1: [PaperPerplexity; 13] = [
    row(512, "full attention", None, None, 512, 16.12),
    row(512, "window", None, None, 360, 16.76),
    row(512, "landmarks, local 250", Some(10), Some(2), 360, 16.23),
    row(2048, "Transformer-XL, cache 256", None, None, 512, 14.72),
    row(2048, "landmarks, local 250", Some(40), Some(2), 360, 15.14),
    row(2048, "landmarks, local 350", Some(40), Some(2), 460, 15.07),
    row(2048, "landmarks, local 300", Some(40), Some(3), 460, 14.97),
    row(2048, "landmarks, local 250", Some(20), Some(4), 460, 15.02),
    row(2048, "landmarks, local 250", Some(40), Some(4), 460, 14.92),
    row(4096, "Transformer-XL, cache 256", None, None, 512, 14.55),
    row(4096, "landmarks, local 250", Some(40), Some(4), 460, 14.79),
    row(4096, "landmarks, local 250", Some(80), Some(2), 370, 15.00),
    row(4096, "landmarks, local 250", Some(80), Some(4), 470, 14.72),
];

/// Table 2: granularity in our words, evaluation length, k, perplexity on PG-19.
pub(super) const TABLE_2: [(&str, usize, u32, f64); 9] = [
    ("token-head", 2048, 2, 15.14),
    ("token-head", 2048, 4, 14.92),
    ("token-head", 4096, 4, 14.72),
    ("head", 2048, 2, 15.48),
    ("head", 2048, 4, 15.10),
    ("head", 4096, 4, 14.95),
    ("token", 2048, 2, 15.44),
    ("token", 2048, 4, 15.04),
    ("token", 4096, 4, 14.89),
];

/// Figure 3: LLaMA 7B fine-tuned with landmarks, k = 4, 50 texts among garbage; the base model.
pub(super) const FIGURE_3: &str = "the paper (LLaMA 7B, 50 texts among garbage): fine-tuned with landmarks near 100 % at every length up to \
     32,000 tokens (98 % at 32,070); the base model near 100 % up to 2,048 tokens, its training length, and 0 % from about 4,000";
