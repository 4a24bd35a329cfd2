#!/usr/bin/env python3
"""Makes families/: tiny random models of many families, with what Hugging Face transformers computes with them.

    python3 tests/golden/make_families.py [NAME ...]           writes all cases, or those named
    python3 tests/golden/make_families.py --check [NAME ...]   checks the files written; see below

Needs these packages of PyPI; the recorded files were made with these versions:

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 gguf==0.19.0 numpy==2.4.6 accelerate==1.15.0

No weight is downloaded, and no tokenizer but that of tests/fixtures/models. Each weight is drawn from a generator that
its case and its name seed, and is a small integer times a power of two: f32, f16 and bf16 all hold it exactly, so storage
changes no logit. Logits are computed in f32 with eager attention and without a cache.

families/NAME/ is what `save_pretrained` writes, `model.gguf` beside it what llama.cpp's converter would write of it (F32),
and golden/NAME.safetensors the recorded prompts of docs/golden.md: `p` of 100 tokens, `one` of a single one, which neither
a rotation nor a window can change, and others where a case has them.

--check says of each case how far the last logits of `p` move when a part is left out (each kind of norm and of bias, and
the settings that the case is about), and fails below 0.05. It also prints how far from the recorded ones they are when
others read the files:

    folder        transformers, the folder
    older         the same with older/config.json
    gguf          transformers, model.gguf alone
    gguf tensors  the same with the folder's config.json
    llama.cpp     model.gguf, log-probabilities; where xllamacpp (2026.10.11549) is installed too
"""

import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gguf
import numpy as np
import torch
import transformers
import transformers.utils.logging
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

transformers.utils.logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent
FAMILIES = HERE / "families"
TOKENIZER = HERE.parent / "fixtures/models/folder/tokenizer.json"

VOCAB = 320
EOS = 0
CONTROL_TOKENS = 3  # The first of the tokenizer; prompts have none of them.
PROMPT_TOKENS = 100
GREEDY_TOKENS = 8
MARGIN = 0.02  # Between the best two logits, so that rounding cannot turn a greedy token.
MATTERS = 0.05

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=EOS,
    pad_token_id=None,
    tie_word_embeddings=True,
)
THETA = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Case:
    """A folder under families/. `without`: settings that must move the logits when they are set to this instead."""

    def __init__(self, model_type, *, what, arch=None, dtype="float32", prompts=None, without=(), **config):
        self.model_type, self.what, self.dtype = model_type, what, dtype
        self.arch = arch  # Of the GGUF; none where a GGUF cannot say what the folder says.
        self.prompts = {"p": PROMPT_TOKENS, "one": 1} | (prompts or {})
        self.without = list(without)
        self.config = config


def longrope(rotary_dims, **more):
    pairs = rotary_dims // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.25 * i for i in range(pairs)],
        "long_factor": [1.5 + 1.25 * i for i in range(pairs)],
        "original_max_position_embeddings": 64,
    } | more


GEMMA_3 = SMALL | dict(
    num_hidden_layers=6,
    intermediate_size=40,
    head_dim=16,
    query_pre_attn_scalar=16,
    sliding_window=16,
    rms_norm_eps=1e-6,
)


def gemma_rope(**scaling):
    return {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0} | scaling,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }


CASES = {
    "llama": Case("llama", arch="llama", what="the plain model, tied", **SMALL | dict(rope_parameters=THETA)),
    "llama-bias": Case(
        "llama",
        arch="llama",
        dtype="bfloat16",
        what="`attention_bias`, `mlp_bias`; untied",
        **SMALL | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_parameters=THETA),
    ),
    "llama-linear": Case(
        "llama",
        arch="llama",
        what="RoPE linear, factor 4",
        **SMALL | dict(rope_parameters=THETA | {"rope_type": "linear", "factor": 4.0}),
        without=[dict(rope_parameters=THETA)],
    ),
    "llama-llama3": Case(
        "llama",
        arch="llama",
        what="RoPE llama3, all three ranges of wavelengths; head dim 16, not hidden / heads",
        **SMALL
        | dict(
            head_dim=16,
            rope_parameters=THETA
            | {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        without=[dict(rope_parameters=THETA)],
    ),
    "llama-yarn": Case(
        "llama",
        arch="llama",
        what="RoPE yarn, factor 4: attention factor 0.1 ln 4 + 1",
        **SMALL | dict(rope_parameters=YARN),
        without=[dict(rope_parameters=THETA), dict(rope_parameters=YARN | {"attention_factor": 1.0})],
    ),
    "qwen2": Case(
        "qwen2", arch="qwen2", what="bias of q, k, v", **SMALL | dict(rope_parameters=THETA | {"rope_theta": 1000000.0})
    ),
    "qwen2-yarn": Case(
        "qwen2",
        arch="qwen2",
        what="the same with yarn; untied",
        dtype="bfloat16",
        **SMALL | dict(tie_word_embeddings=False, rope_parameters=YARN | {"rope_theta": 1000000.0}),
        without=[dict(rope_parameters=THETA | {"rope_theta": 1000000.0})],
    ),
    "qwen2-window": Case(
        "qwen2",
        what="`use_sliding_window`, window 24 from layer `max_window_layers` = 1 on (a GGUF does not say it)",
        **SMALL
        | dict(
            num_hidden_layers=3, use_sliding_window=True, sliding_window=24, max_window_layers=1, rope_parameters=THETA
        ),
        without=[dict(use_sliding_window=False)],
    ),
    "qwen3": Case(
        "qwen3",
        arch="qwen3",
        what="norm of q and k per head; head dim 16, not hidden / heads; tied",
        **SMALL | dict(head_dim=16, rope_parameters=THETA | {"rope_theta": 1000000.0}),
    ),
    "qwen3-untied": Case(
        "qwen3",
        arch="qwen3",
        what="the same, untied",
        dtype="bfloat16",
        **SMALL | dict(head_dim=16, tie_word_embeddings=False, rope_parameters=THETA | {"rope_theta": 1000000.0}),
    ),
    "mistral": Case(
        "mistral",
        arch="llama",
        what="`sliding_window` null; head dim 16, not hidden / heads; untied",
        dtype="bfloat16",
        **SMALL | dict(head_dim=16, sliding_window=None, tie_word_embeddings=False, rope_parameters=THETA),
    ),
    "mistral-window": Case(
        "mistral",
        what="`sliding_window` 24 in all layers (a GGUF of arch llama does not say it)",
        **SMALL | dict(sliding_window=24, rope_parameters=THETA),
        without=[dict(sliding_window=None)],
    ),
    "ministral3": Case(
        "ministral3",
        arch="mistral3",
        what="yarn, `mscale` = `mscale_all_dim`: attention factor 1; queries grow with position (`llama_4_scaling_beta`)",
        **SMALL
        | dict(
            head_dim=16,
            rope_parameters=YARN
            | {
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
                "max_position_embeddings": 512,
            },
        ),
        without=[dict(rope_parameters=dict(llama_4_scaling_beta=0.0)), dict(rope_parameters=dict(mscale=None))],
    ),
    "gemma3-270m": Case(
        "gemma3_text",
        arch="gemma3",
        dtype="bfloat16",
        what="6 layers, the last global, window 16, one KV head, local RoPE base 1e4",
        **GEMMA_3 | dict(num_key_value_heads=1, rope_parameters=gemma_rope()),
        without=[
            dict(sliding_window=4096),
            dict(rope_parameters=dict(sliding_attention={"rope_type": "default", "rope_theta": 1e6})),
        ],
    ),
    "gemma3-4b": Case(
        "gemma3_text",
        arch="gemma3",
        dtype="bfloat16",
        what="7 layers, two KV heads, RoPE linear (factor 8) in the global layer alone",
        **GEMMA_3 | dict(num_hidden_layers=7, rope_parameters=gemma_rope(rope_type="linear", factor=8.0)),
        without=[dict(sliding_window=4096), dict(rope_parameters=gemma_rope()), dict(hidden_activation="silu")],
    ),
    "gemma3-27b": Case(
        "gemma3_text",
        dtype="bfloat16",
        what="`query_pre_attn_scalar` 6, not the head dim; global layers 1 and 2 of 4, by `layer_types`; no GGUF says either",
        **GEMMA_3
        | dict(
            num_hidden_layers=4,
            query_pre_attn_scalar=6,
            rope_parameters=gemma_rope(rope_type="linear", factor=8.0),
            layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        ),
        without=[dict(query_pre_attn_scalar=16), dict(layer_types=["sliding_attention"] * 3 + ["full_attention"])],
    ),
    "gemma3-wrapper": Case(
        "gemma3",
        dtype="bfloat16",
        what="`text_config` beside a vision tower, whose weights are in the file too",
        text_config=GEMMA_3
        | dict(
            model_type="gemma3_text",
            num_hidden_layers=3,
            sliding_window_pattern=3,
            rope_parameters=gemma_rope(rope_type="linear", factor=8.0),
        ),
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
        image_token_index=319,
        boi_token_index=318,
        eoi_token_index=317,
        eos_token_id=EOS,
    ),
    "smollm3": Case(
        "smollm3",
        arch="smollm3",
        dtype="bfloat16",
        what="no RoPE in every fourth layer (layer 3 of 5)",
        **SMALL | dict(num_hidden_layers=5, rope_parameters=THETA | {"rope_theta": 5000000.0}),
        without=[dict(no_rope_layers=[1] * 5)],
    ),
    "smollm3-list": Case(
        "smollm3",
        what="`no_rope_layers` [0, 1, 0] (a GGUF does not say it)",
        **SMALL | dict(num_hidden_layers=3, no_rope_layers=[0, 1, 0], rope_parameters=THETA),
        without=[dict(no_rope_layers=[1, 1, 1]), dict(no_rope_layers=[1, 0, 1])],
    ),
    "phi3": Case(
        "phi3",
        arch="phi3",
        what="q, k, v in one tensor, gate and up in one; untied",
        dtype="bfloat16",
        **SMALL | dict(tie_word_embeddings=False, original_max_position_embeddings=512, rope_parameters=THETA),
    ),
    "phi3-window": Case(
        "phi3",
        arch="phi3",
        what="`sliding_window` 24 in all layers",
        **SMALL | dict(sliding_window=24, original_max_position_embeddings=512, rope_parameters=THETA),
        without=[dict(sliding_window=None)],
    ),
    "phi3-longrope": Case(
        "phi3",
        arch="phi3",
        prompts={"short": 40},
        what="longrope, original context 64: `p` takes the long factors for all of it, `short` the short ones",
        **SMALL | dict(max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=longrope(8)),
        without=[
            dict(rope_parameters=longrope(8, long_factor=longrope(8)["short_factor"])),
            dict(rope_parameters=longrope(8, attention_factor=1.0)),
        ],
    ),
    "phi4-mini": Case(
        "phi3",
        arch="phi3",
        prompts={"short": 40},
        what="`partial_rotary_factor` 0.75 (6 of 8), longrope, tied",
        **SMALL
        | dict(
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            partial_rotary_factor=0.75,
            rope_parameters=longrope(6, partial_rotary_factor=0.75),
        ),
        without=[
            dict(partial_rotary_factor=1.0, rope_parameters=longrope(8, partial_rotary_factor=1.0)),
            dict(rope_parameters=longrope(6, partial_rotary_factor=0.75, long_factor=longrope(6)["short_factor"])),
        ],
    ),
    "granite": Case(
        "granite",
        arch="granite",
        what="the four multipliers",
        **SMALL
        | dict(
            embedding_multiplier=3.0,
            attention_multiplier=0.25,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            rope_parameters=THETA,
        ),
        without=[
            dict(embedding_multiplier=1.0),
            dict(attention_multiplier=8**-0.5),
            dict(residual_multiplier=1.0),
            dict(logits_scaling=1.0),
        ],
    ),
    "olmo2": Case(
        "olmo2",
        arch="olmo2",
        what="norms after the branches only, norm of q and k over all heads; untied",
        dtype="bfloat16",
        **SMALL | dict(tie_word_embeddings=False, rms_norm_eps=1e-6, rope_parameters=THETA | {"rope_theta": 500000.0}),
    ),
}

EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
REFUSED = {
    "cohere2": {},
    "deepseek_v3": dict(n_routed_experts=4, **EXPERTS),
    "falcon": {},
    "gemma2": {},
    "gpt_neox": {},
    "gpt_oss": dict(num_local_experts=4),
    "llama-dynamic": dict(rope_parameters=THETA | {"rope_type": "dynamic", "factor": 4.0}),
    "llama4_text": dict(num_local_experts=4),
    "mixtral": dict(num_local_experts=4),
    "qwen3_moe": dict(num_experts=4, **EXPERTS),
    "qwen3_next": dict(num_experts=4, **EXPERTS),
}


def random(case, name, shape):
    """Integers around zero with a standard deviation of 16 to 64, times a power of two."""
    generator = np.random.default_rng(zlib.crc32(f"{case} {name}".encode()))
    normal = generator.standard_normal(shape)
    is_norm = name.endswith("norm.weight") or "layernorm" in name or "layer_norm" in name
    if is_norm and name.endswith("weight"):
        # Gemma adds the 1 itself.
        return (np.clip(np.rint(normal * 20), -50, 50) / 64 + (0 if case.startswith("gemma") else 1)).astype(np.float32)
    if len(shape) == 1:
        return (np.clip(np.rint(normal * 26), -120, 120) / 64).astype(np.float32)
    if "embed_tokens" in name or "lm_head" in name:
        return (np.clip(np.rint(normal * 32), -120, 120) / 64).astype(np.float32)
    step = 2.0 ** -round(math.log2(32 * math.sqrt(shape[-1]) / 1.5))
    return (np.clip(np.rint(normal * 32), -120, 120) * step).astype(np.float32)


def build(name, case):
    config = AutoConfig.for_model(case.model_type, **json.loads(json.dumps(case.config)))
    auto = AutoModelForImageTextToText if case.model_type == "gemma3" else AutoModelForCausalLM
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random(name, key, tuple(parameter.shape))))
    return model


def last_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def greedy_tokens(model, ids):
    """The logits after `ids`, and the tokens that follow; none where one is close to another, or ends the text."""
    greedy, first = [], None
    for _ in range(GREEDY_TOKENS):
        logits = last_logits(model, ids + greedy)
        first = logits.clone() if first is None else first
        best = logits.topk(2).values
        greedy.append(int(logits.argmax()))
        if best[0] - best[1] < MARGIN or greedy[-1] == EOS:
            return first, None
    return first, greedy


def record(name, case, model):
    tensors = {}
    for prompt, tokens in case.prompts.items():
        greedy = None
        for attempt in range(100):
            generator = np.random.default_rng(zlib.crc32(f"{name} {prompt} {attempt}".encode()))
            ids = generator.integers(CONTROL_TOKENS, VOCAB - 3, tokens).tolist()
            logits, greedy = greedy_tokens(model, ids)
            if greedy:
                break
        tensors[f"{prompt}.input_ids"] = torch.tensor(ids)
        tensors[f"{prompt}.logits_last"] = logits
        tensors[f"{prompt}.greedy_ids"] = torch.tensor(greedy)
    return tensors


def permute(rows, heads):
    """Half-split rows of q or k as interleaved ones, as llama.cpp has them for its own architectures."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config, rope):
    dim = config["head_dim"]
    for i in range(dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        yield 1 / ((1 - smooth) / rope["factor"] + smooth)


def write_metadata(writer, arch, config):
    """As `set_gguf_parameters` of the converter's class for the architecture; returns tensors that it adds."""
    rope = config["rope_parameters"]
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    head_dim = config.get("head_dim")
    if arch == "granite":
        head_dim = None
    width = config["hidden_size"] // config["num_attention_heads"]
    extra = {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if arch == "phi3":
        turning = int(rope["partial_rotary_factor"] * config["hidden_size"]) // config["num_attention_heads"]
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_dimension_count(turning)
        writer.add_sliding_window(config["sliding_window"] or 0)
        if rope["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
            extra["rope_factors_long.weight"] = np.array(rope["long_factor"], np.float32)
            extra["rope_factors_short.weight"] = np.array(rope["short_factor"], np.float32)
        return extra
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    elif rope["rope_type"] == "llama3":
        extra["rope_freqs.weight"] = np.array(list(llama3_factors(config, rope)), np.float32)
    if arch in ("llama", "granite", "smollm3", "mistral3"):
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim or width)
    if arch == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if arch == "mistral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        # Converters of 2025 left it out: one case each.
        if rope["rope_type"] == "linear":
            writer.add_rope_freq_base_swa(local["rope_theta"])
    return extra


def write_tokenizer(writer):
    tokenizer = json.loads(TOKENIZER.read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    control = {token["content"] for token in tokenizer["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(False)


def write_plain_tokens(writer):
    """llama.cpp's server holds back the probabilities of a token that is no whole character."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}t" for i in range(VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(False)


def write_gguf(path, arch, model, write_tokenizer=write_tokenizer):
    config = model.config.to_dict()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tiny")  # transformers and llama.cpp both read more into "mistral" or "phi3".
    extra = write_metadata(writer, arch, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tokenizer(writer)
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == arch)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for tensor, values in extra.items():
        writer.add_tensor(tensor, values)
    for tensor, values in model.state_dict().items():
        if tensor == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        values = values.numpy().astype(np.float32)
        if arch in ("llama", "granite", "smollm3", "mistral3"):
            if ".q_proj." in tensor:
                values = permute(values, config["num_attention_heads"])
            if ".k_proj." in tensor:
                values = permute(values, config["num_key_value_heads"])
        if arch == "gemma3" and tensor.endswith("norm.weight"):
            values = values + np.float32(1)
        writer.add_tensor(names.get_name(tensor, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(name, case):
    folder = FAMILIES / name
    shutil.rmtree(folder, ignore_errors=True)
    model = build(name, case)
    tensors = record(name, case, model)
    if case.arch:
        folder.mkdir(parents=True)
        write_gguf(folder / "model.gguf", case.arch, model)
    model.to(getattr(torch, case.dtype)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if case.model_type not in ("ministral3",):
        (folder / "older").mkdir()
        (folder / "older/config.json").write_text(json.dumps(older(config), indent=2) + "\n")
    (folder / "golden").mkdir()
    save_file(tensors, folder / "golden" / f"{name}.safetensors")
    sizes = [
        path.stat().st_size // 1024 for path in (folder / "model.safetensors", folder / "model.gguf") if path.exists()
    ]
    print(f"{name}: {sizes} KiB, largest logit {float(tensors['p.logits_last'].abs().max()):.1f}", flush=True)


def older(config):
    """The configuration as transformers before 5 wrote it, and most files on the Hub have it."""
    config = dict(config)
    if "text_config" in config:
        return config | {"text_config": older(config["text_config"])}
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        pattern = config.pop("_sliding_window_pattern")
        if all((kind == "full_attention") == ((i + 1) % pattern == 0) for i, kind in enumerate(config["layer_types"])):
            config["sliding_window_pattern"] = pattern
            del config["layer_types"]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    config.pop("partial_rotary_factor", None)
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if config["model_type"] == "phi3":
        rope.pop("original_max_position_embeddings", None)
    kind = rope.pop("rope_type")
    old_name = "rope_type" if kind == "llama3" or "rope_local_base_freq" in config else "type"
    config["rope_scaling"] = None if kind == "default" else {old_name: kind} | rope
    config["torch_dtype"] = config.pop("dtype")
    return config


def write_refused():
    for name, own in REFUSED.items():
        model_type = name.split("-")[0]
        config = AutoConfig.for_model(model_type)
        known = {key: value for key, value in SMALL.items() if hasattr(config, key)}
        config = AutoConfig.for_model(model_type, **known | own)
        mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        config.architectures = [mapping[model_type]]
        folder = FAMILIES / "refused" / name
        shutil.rmtree(folder, ignore_errors=True)
        config.save_pretrained(folder)


def merged(config, change):
    merged = dict(config)
    for key, value in change.items():
        both = (
            isinstance(value, dict)
            and isinstance(config.get(key), dict)
            and not {"rope_type", "full_attention"} & value.keys()
        )
        merged[key] = config[key] | value if both else value
    return merged


def llama_cpp(arch, model, ids):
    """The log-probabilities after `ids`."""
    import xllamacpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, arch, model, write_plain_tokens)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        # More than the original context of longrope, so that it takes the long factors, whatever the prompt's length.
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params, params.cache_ram_mib = (
            256,
            1,
            False,
            False,
            0,
        )
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        request = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "n_probs": VOCAB, "cache_prompt": False}
        answer = xllamacpp.Server(params).handle_completions(request)
    first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return torch.tensor([token["logprob"] for token in sorted(first, key=lambda token: token["id"])])


def readings(name, case, model, ids, want):
    """Who reads the files, and what they compute."""
    read = dict(dtype=torch.float32, attn_implementation="eager")
    auto = AutoModelForImageTextToText if case.model_type == "gemma3" else AutoModelForCausalLM
    folder = FAMILIES / name

    def distance(**more):
        return float((last_logits(auto.from_pretrained(folder, **read, **more), ids) - want).abs().max())

    yield "folder", distance
    if (folder / "older").exists():
        yield "older", lambda: distance(config=AutoConfig.from_pretrained(folder / "older"))
    if case.arch:
        yield "gguf", lambda: distance(gguf_file="model.gguf")
        yield "gguf tensors", lambda: distance(gguf_file="model.gguf", config=AutoConfig.from_pretrained(folder))
        log_probabilities = torch.log_softmax(want, 0)
        yield "llama.cpp", lambda: float((llama_cpp(case.arch, model, ids) - log_probabilities).abs().max())


def check(name, case):
    model = build(name, case)
    recorded = load_file(FAMILIES / name / "golden" / f"{name}.safetensors")
    ids, want = recorded["p.input_ids"].tolist(), recorded["p.logits_last"]
    print(name)
    for reader, distance in readings(name, case, model, ids, want):
        try:
            print(f"    {reader:12} {distance():.1e}", flush=True)
        except Exception as error:
            print(f"    {reader:12} refused: {str(error).splitlines()[0][:90]}", flush=True)

    def moved(model):
        return float((last_logits(model, ids) - want).abs().max())

    def parts(model):
        vectors = [(key, values) for key, values in model.named_parameters() if values.dim() == 1]
        return [(key, values) for key, values in vectors if "vision" not in key and "multi_modal" not in key]

    without = {}
    for kind in sorted({".".join(key.split(".")[-2:]) for key, _ in parts(model)}):
        changed = build(name, case)
        with torch.no_grad():
            for key, values in parts(changed):
                if f".{key}".endswith(f".{kind}"):
                    values.fill_(1.0 if kind.endswith("weight") and "gemma" not in name else 0.0)
        without[kind] = moved(changed)
    for change in case.without:
        other = Case(case.model_type, what="", **merged(case.config, change))
        without[json.dumps(change)[:90]] = moved(build(name, other))
    for part, far in without.items():
        print(f"    {far:6.3f} without {part}{'  TOO LITTLE' if far < MATTERS else ''}")
    return min(without.values()) >= MATTERS


def write_table():
    """The cases in README.md."""
    rows = [f"| `{name}` | {case.model_type} | {case.arch or ''} | {case.what} |" for name, case in CASES.items()]
    lines = (FAMILIES / "README.md").read_text().splitlines()
    first = lines.index("|---|---|---|---|") + 1
    after = lines.index("", first)
    (FAMILIES / "README.md").write_text("\n".join(lines[:first] + rows + lines[after:]) + "\n")


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    names = arguments or CASES
    if "--check" in sys.argv:
        sys.exit(not all([check(name, CASES[name]) for name in names]))
    for name in names:
        write(name, CASES[name])
    if not arguments:
        write_refused()
        write_table()


if __name__ == "__main__":
    main()
