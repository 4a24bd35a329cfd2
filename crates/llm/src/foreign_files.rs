//! Files as they come from elsewhere: whatever one says that changes a logit is computed or refused by name, a whole file is never
//! called damaged, and none makes the program panic.
//!
//! `tests/fixtures/models` holds one tiny random model as GGUF and as a folder, made with Hugging Face transformers 5.23.0,
//! its logits there (`golden/`), and configurations that transformers writes for other kinds of models. Each test changes one
//! thing.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};

use super::full_attention::PlainAttention;
use super::*;

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name)
}

/// Opens a model that must be refused; gives why.
fn refused(path: &Path) -> LoadError {
    LoadedModel::open(path).err().expect("the model was opened")
}

/// How far the logits of `model` are from those that were recorded.
fn off(model: &LoadedModel, golden: &str) -> f32 {
    let tensors = candle_core::safetensors::load(fixture("golden").join(golden), &Device::Cpu).unwrap();
    let ids: Vec<u32> = tensors["p.input_ids"].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    let want: Vec<f32> = tensors["p.logits_last"].to_vec1().unwrap();
    let mut attention = PlainAttention::new(model.config());
    let found = model.llama.forward(&ids, &mut attention, Logits::Last).unwrap();
    found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A GGUF file, taken apart.
pub(super) struct Parts {
    pub(super) settings: Vec<(String, Value)>,
    pub(super) tensors: Vec<(String, QTensor)>,
}

impl Parts {
    /// The tiny one.
    pub(super) fn new() -> Self {
        Self::of(&fixture("tiny.gguf"))
    }

    pub(super) fn of(path: &Path) -> Self {
        let mut file = std::fs::File::open(path).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        let mut names: Vec<String> = content.tensor_infos.keys().cloned().collect();
        names.sort();
        let read = |name: &String| (name.clone(), content.tensor(&mut &file, name, &Device::Cpu).unwrap());
        let tensors = names.iter().map(read).collect();
        Parts { settings: content.metadata.into_iter().collect(), tensors }
    }

    pub(super) fn set(mut self, key: &str, value: Value) -> Self {
        self.settings.retain(|(known, _)| known != key);
        self.settings.push((key.into(), value));
        self
    }

    pub(super) fn with(self, name: &str, values: Vec<f32>) -> Self {
        let count = values.len();
        self.with_tensor(name, Tensor::from_vec(values, count, &Device::Cpu).unwrap())
    }

    pub(super) fn without(mut self, key: &str) -> Self {
        self.settings.retain(|(known, _)| known != key);
        self
    }

    pub(super) fn with_tensor(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.retain(|(known, _)| known != name);
        self.tensors.push((name.into(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap()));
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let settings: Vec<(&str, &Value)> = self.settings.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut bytes, &settings, &tensors).unwrap();
        bytes.into_inner()
    }

    pub(super) fn open(&self) -> Result<LoadedModel, LoadError> {
        open_bytes(&self.bytes())
    }

    pub(super) fn refused(&self) -> LoadError {
        self.open().err().expect("the file was opened")
    }
}

fn open_bytes(bytes: &[u8]) -> Result<LoadedModel, LoadError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    LoadedModel::open(&path)
}

/// Where the header's entry of this tensor goes on behind its name: dimensions, format, offset.
fn behind_name(bytes: &[u8], name: &str) -> usize {
    bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap() + name.len()
}

#[test]
fn the_tiny_model_gives_the_recorded_logits_from_gguf_and_from_a_folder() {
    for path in [fixture("tiny.gguf"), fixture("folder")] {
        let off = off(&LoadedModel::open(&path).unwrap(), "plain.safetensors");
        assert!(off < 1e-4, "{}: off by {off}", path.display());
    }
    assert!(off(&Parts::new().open().unwrap(), "plain.safetensors") < 1e-4, "taken apart and put together");
}

/// Biases in a GGUF file were left out without a word: logits were off by 4, and other tokens came out.
#[test]
fn a_gguf_tensor_that_nobody_reads_is_refused_by_name() {
    for name in
        ["blk.0.attn_sinks", "blk.0.attn_norm.bias", "blk.1.attn_norm.weight", "output_norm.bias", "v.patch_embd"]
    {
        match Parts::new().with(name, vec![1.0; 32]).refused() {
            LoadError::UnknownTensor { name: found, .. } => assert_eq!(found, name),
            other => panic!("{name}: {other}"),
        }
    }
}

/// What llama.cpp adds where it is there, and takes one by one.
#[test]
fn a_gguf_bias_without_those_beside_it_is_missed_by_name() {
    for (name, missing) in [("blk.0.attn_q.bias", "blk.0.attn_k.bias"), ("blk.0.ffn_up.bias", "blk.0.ffn_gate.bias")] {
        let width = if name.contains("attn") { 32 } else { 64 };
        match Parts::new().with(name, vec![1.0; width]).refused() {
            LoadError::MissingTensor { name: found, .. } => assert_eq!(found, missing),
            other => panic!("{name}: {other}"),
        }
    }
}

/// A factor without a type of scaling was ignored; llama.cpp scales linearly then, and so it does for the older key.
#[test]
fn a_linear_factor_alone_scales() {
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        let scaled = Parts::new().set(key, Value::F32(4.0)).open().unwrap();
        assert!(off(&scaled, "rope-linear.safetensors") < 1e-4, "{key}");
        assert!(off(&scaled, "plain.safetensors") > 0.1, "{key} changes nothing: the test has no teeth");
        for wrong in [0.0, -1.0, f32::INFINITY, f32::NAN] {
            let refused = Parts::new().set(key, Value::F32(wrong)).refused();
            assert!(matches!(&refused, LoadError::Unsupported { key: found, .. } if found == key), "{refused}");
        }
    }
    let none = Parts::new().set("llama.rope.scaling.factor", Value::F32(4.0));
    let none = none.set("llama.rope.scaling.type", Value::String("none".into())).open().unwrap();
    assert!(off(&none, "plain.safetensors") < 1e-4);
}

#[test]
fn a_gguf_setting_that_is_not_computed_is_refused_by_name() {
    let text = |text: &str| Value::String(text.into());
    for (key, value) in [
        ("llama.attention.scale", Value::F32(0.5)),
        ("llama.rope.scaling.type", text("dynamic")),
        ("llama.rope.scaling.yarn_beta_fast", Value::F32(32.0)),
        ("llama.rope.scaling.attn_factor", Value::F32(2.0)),
        ("llama.logit_scale", Value::F32(0.5)),
        ("llama.attention.causal", Value::Bool(false)),
        ("llama.attention.sliding_window", Value::U32(128)),
        ("llama.attention.value_length", Value::U32(8)),
        ("llama.expert_count", Value::U32(8)),
        ("llama.rope.dimension_count", Value::U32(15)),
        ("llama.rope.freq_base", Value::F32(f32::INFINITY)),
        ("llama.a_setting_of_tomorrow", Value::Bool(true)),
        ("tokenizer.ggml.a_rule_of_tomorrow", Value::Bool(true)),
        ("tokenizer.ggml.model", text("bert")),
        ("tokenizer.ggml.pre", text("deepseek-llm")),
        ("general.architecture", text("command-r")),
        ("general.alignment", Value::U32(0)),
        ("general.alignment", Value::U32(7)),
        ("split.count", Value::U16(3)),
    ] {
        match Parts::new().set(key, value).refused() {
            LoadError::Unsupported { key: found, .. } | LoadError::UnknownSetting { key: found, .. } => {
                assert_eq!(found, key)
            }
            other => panic!("{key}: {other}"),
        }
    }
    for (key, value) in [
        ("llama.context_length", Value::U32(0)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::INFINITY)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(-1e-5)),
    ] {
        let refused = Parts::new().set(key, value).refused();
        assert!(matches!(refused, LoadError::Shape { .. }), "{key}: {refused}");
    }
    let harmless = Parts::new()
        .set("llama.attention.scale", Value::F32(0.25))
        .set("llama.expert_count", Value::U32(0))
        .set("llama.vocab_size", Value::U32(320))
        .set("llama.tensor_data_layout", text("Meta AI original pth"))
        .set("tokenizer.chat_template", text("{{ bos_token }}"))
        .set("quantize.imatrix.file", text("imatrix.dat"));
    assert!(off(&harmless.open().unwrap(), "plain.safetensors") < 1e-4, "what changes nothing is let through");
}

/// A tokenizer that GGUF tells too little of is in the Hugging Face folder, and the message says so.
#[test]
fn a_refusal_names_the_way_out() {
    for (key, value) in [("tokenizer.ggml.model", "bert"), ("tokenizer.ggml.pre", "deepseek-llm")] {
        let message = Parts::new().set(key, Value::String(value.into())).refused().to_string();
        assert!(message.contains("Hugging Face folder") && !message.contains("damaged"), "{message}");
    }
    let message = Parts::new().set("split.count", Value::U16(3)).refused().to_string();
    assert!(message.contains("llama-gguf-split --merge"), "{message}");
}

/// Tensors in a format that is not read were a reason to call a file damaged and to have gigabytes fetched again.
#[test]
fn a_format_that_is_not_read_is_named_and_not_called_damage() {
    for (format, name) in [(16_u32, "IQ2_XXS"), (39, "MXFP4"), (15, "Q8_K"), (77, "number 77")] {
        let mut bytes = std::fs::read(fixture("tiny.gguf")).unwrap();
        // Two dimensions lie between the name and the format.
        let at = behind_name(&bytes, "token_embd.weight") + 4 + 2 * 8;
        bytes[at..at + 4].copy_from_slice(&format.to_le_bytes());
        let refused = open_bytes(&bytes).err().unwrap();
        assert!(matches!(&refused, LoadError::Unsupported { key, .. } if key.contains("token_embd")), "{refused}");
        let message = refused.to_string();
        assert!(message.contains(name) && message.contains("Q8_0") && !message.contains("damaged"), "{message}");
    }
}

/// One product may read q, k and v of three formats, as Q4_K_M files have them.
#[test]
fn matrices_of_different_formats_give_the_logits_of_what_they_stand_for() {
    let formats = [GgmlDType::Q8_0, GgmlDType::F16, GgmlDType::Q5_1, GgmlDType::F32, GgmlDType::BF16];
    let (mut mixed, mut wide) = (Parts::new(), Parts::new());
    for (index, ((_, mixed), (_, wide))) in mixed.tensors.iter_mut().zip(&mut wide.tensors).enumerate() {
        let values = wide.dequantize(&Device::Cpu).unwrap();
        if values.dims().len() == 2 {
            *mixed = QTensor::quantize(&values, formats[index % formats.len()]).unwrap();
            *wide = QTensor::quantize(&mixed.dequantize(&Device::Cpu).unwrap(), GgmlDType::F32).unwrap();
        }
    }
    let logits = |parts: &Parts| {
        let model = parts.open().unwrap();
        let mut attention = PlainAttention::new(model.config());
        let many = model.llama.forward(&[3, 1, 4, 1, 5, 9, 2, 6], &mut attention, Logits::All).unwrap();
        let one = model.llama.forward(&[5], &mut attention, Logits::All).unwrap();
        [many, one].concat()
    };
    let (found, wanted) = (logits(&mixed), logits(&wide));
    let off = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(found.len() == wanted.len() && off < 1e-4, "off by {off}");
}

/// A tensor whose place is off by a byte was read shifted, weights of NaN were noticed by the memory at the first append.
#[test]
fn misplaced_and_infinite_numbers_are_found_when_a_file_is_opened() {
    let whole = std::fs::read(fixture("tiny.gguf")).unwrap();
    let at = behind_name(&whole, "blk.0.attn_k.weight") + 4 + 2 * 8 + 4;
    let offset = u64::from_le_bytes(whole[at..at + 8].try_into().unwrap());
    for wrong in [offset + 1, offset + 32, u64::MAX - 31, 0] {
        let mut bytes = whole.clone();
        bytes[at..at + 8].copy_from_slice(&wrong.to_le_bytes());
        let refused = open_bytes(&bytes).err().unwrap();
        assert!(matches!(refused, LoadError::Damaged { .. }), "{wrong}: {refused}");
    }
    for wrong in [f32::NAN, f32::INFINITY] {
        match Parts::new().with("blk.0.attn_norm.weight", vec![wrong; 32]).refused() {
            LoadError::NotFinite { name, .. } => assert_eq!(name, "blk.0.attn_norm.weight"),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn entries_that_are_there_twice_are_damage() {
    let mut twice = Parts::new();
    twice.settings.push(("general.name".into(), Value::String("another".into())));
    assert!(twice.refused().to_string().contains("general.name"));
    let mut twice = Parts::new();
    let copy = Parts::new().tensors.pop().unwrap();
    let name = copy.0.clone();
    twice.tensors.push(copy);
    assert!(twice.refused().to_string().contains(&name));
}

/// An alignment of 0 made candle divide by it. Whatever the bytes, the answer is a model or an error.
#[test]
fn no_change_of_a_byte_of_the_header_makes_it_panic() {
    let whole = std::fs::read(fixture("tiny.gguf")).unwrap();
    let header = behind_name(&whole, "output_norm.weight") + 30;
    // Names and vocabulary are most of it: every byte of its beginning and of the tensors' entries, and some between.
    let tensors = behind_name(&whole, "token_embd.weight") - 30;
    let places = (0..600).chain((600..tensors).step_by(397)).chain(tensors..header);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for at in places {
        for byte in [0, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            std::fs::write(&path, &bytes).unwrap();
            // Only what is opened may run, and what runs gives finite values.
            if let Ok((gguf, config)) = gguf::Gguf::open(&path) {
                let _ = tokenizer_gguf::from_gguf(&gguf);
                let _ = Llama::load(config, &gguf);
            }
        }
    }
    for bytes in (0..600).chain((600..whole.len()).step_by(1997)) {
        std::fs::write(&path, &whole[..bytes]).unwrap();
        let error = refused(&path);
        assert!(matches!(error, LoadError::Damaged { .. }), "{bytes}: {error}");
    }
}

/// Ollama keeps its files under their digests.
#[test]
fn a_gguf_file_is_known_by_how_it_begins() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sha256-0123");
    std::fs::copy(fixture("tiny.gguf"), &path).unwrap();
    assert!(off(&LoadedModel::open(&path).unwrap(), "plain.safetensors") < 1e-4);
    std::fs::write(&path, "hello\n").unwrap();
    assert!(matches!(refused(&path), LoadError::NotAModel { .. }));
    let named = folder.path().join("not-a-model.gguf");
    std::fs::write(&named, "hello\n").unwrap();
    let message = refused(&named).to_string();
    assert!(message.contains("begins with GGUF") && message.contains("fetch it again"), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}

/// The tiny folder after `change` to its configuration.
fn folder(change: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("folder")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
    copy
}

/// Required fields were read before the kind of model, and the kind is what tells that they are not there.
#[test]
fn a_configuration_of_another_kind_is_refused_by_its_kind_and_not_called_damaged() {
    for (name, kind) in [
        ("cohere2", "found cohere2"),
        ("gptneox", "found gpt_neox"),
        ("ministral3", "found ministral3"),
        ("multimodal", "found mistral3"),
    ] {
        let folder = folder(|_| {});
        std::fs::copy(fixture(&format!("config-{name}.json")), folder.path().join("config.json")).unwrap();
        let message = refused(folder.path()).to_string();
        assert!(message.contains("model_type") && message.contains(kind) && !message.contains("damaged"), "{message}");
        assert_eq!(message.contains("text_config"), name == "multimodal", "{message}");
    }
}

/// Transformers saves a linear scaling under both names, and such folders were called damaged.
#[test]
fn a_scaling_under_both_of_its_names_is_one_scaling() {
    let scaled = folder(|json| {
        json.as_object_mut().unwrap().remove("rope_parameters");
        json["rope_theta"] = 10_000.0.into();
        json["rope_scaling"] = serde_json::json!({"type": "linear", "rope_type": "linear", "factor": 4.0});
    });
    assert!(off(&LoadedModel::open(scaled.path()).unwrap(), "rope-linear.safetensors") < 1e-4);
    let differing = folder(|json| {
        json["rope_parameters"] = serde_json::json!({"type": "linear", "rope_type": "default", "factor": 4.0});
    });
    assert!(matches!(refused(differing.path()), LoadError::Unsupported { key, .. } if key == "rope_parameters.type"));
}

#[test]
fn what_a_folder_says_and_is_not_computed_is_refused_by_name() {
    let rope = |more: serde_json::Value| {
        let mut rope = serde_json::json!({"rope_type": "default", "rope_theta": 10000.0});
        rope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        rope
    };
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for (field, value, key) in [
        ("hidden_act", "gelu".into(), "hidden_act"),
        ("quantization_config", json(r#"{"quant_method": "fp8"}"#), "quantization_config"),
        ("auto_map", json(r#"{"AutoModelForCausalLM": "m.M"}"#), "auto_map.AutoModelForCausalLM"),
        ("logits_scaling", 8.into(), "logits_scaling"),
        ("rope_parameters", rope(json(r#"{"attention_factor": 2.0}"#)), "rope_parameters.attention_factor"),
        ("rope_parameters", json(r#"{"full_attention": {"rope_theta": 1e6}}"#), "rope_parameters.full_attention"),
        ("rope_parameters", json(r#"{"factor": 4.0}"#), "rope_parameters.rope_type"),
        ("rope_theta", 5000.0.into(), "rope_theta"),
        ("eos_token_id", json("-1"), "eos_token_id"),
        ("num_hidden_layers", json("-1"), "num_hidden_layers"),
        ("num_hidden_layers", "one".into(), "num_hidden_layers"),
    ] {
        let folder = folder(|json| json[field] = value);
        match refused(folder.path()) {
            LoadError::Unsupported { key: found, .. } => assert_eq!(found, key),
            other => panic!("{key}: {other}"),
        }
    }
    let nameless = folder(|json| drop(json.as_object_mut().unwrap().remove("model_type")));
    assert!(matches!(refused(nameless.path()), LoadError::MissingKey { key, .. } if key == "model_type"));
    let half = folder(|json| json["rope_parameters"]["partial_rotary_factor"] = 0.5.into());
    let full = folder(|_| {});
    let frequencies = |folder: &Path| LoadedModel::open(folder).unwrap().config().rope.frequencies.len();
    assert_eq!((frequencies(half.path()), frequencies(full.path())), (4, 8));
}

/// A bias whose flag in the configuration was forgotten would be left out without a word.
#[test]
fn a_safetensors_tensor_that_nobody_reads_is_refused_by_name() {
    let add = |name: &str, number: f32| {
        let folder = folder(|_| {});
        let path = folder.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        tensors.insert(name.into(), Tensor::full(number, 32, &Device::Cpu).unwrap());
        candle_core::safetensors::save(&tensors, &path).unwrap();
        folder
    };
    for name in ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.input_layernorm.weight"] {
        let folder = add(name, 1.0);
        assert!(matches!(refused(folder.path()), LoadError::UnknownTensor { name: found, .. } if found == name));
    }
    for harmless in ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"] {
        let folder = add(harmless, 1.0);
        assert!(off(&LoadedModel::open(folder.path()).unwrap(), "plain.safetensors") < 1e-4, "{harmless}");
    }
    let folder = add("model.norm.weight", f32::NAN);
    assert!(matches!(refused(folder.path()), LoadError::NotFinite { name, .. } if name == "model.norm.weight"));
}

/// An index could name any file of the machine that the program may read.
#[test]
fn an_index_names_files_of_its_own_folder_only() {
    let folder = folder(|_| {});
    let index = |file: &str| {
        let json = serde_json::json!({"weight_map": {"model.norm.weight": file}});
        std::fs::write(folder.path().join("model.safetensors.index.json"), json.to_string()).unwrap();
    };
    let absolute = folder.path().join("model.safetensors");
    for outside in ["../model.safetensors", absolute.to_str().unwrap(), "a/../../b", "sub/model.safetensors", "..", ""]
    {
        index(outside);
        assert!(
            matches!(refused(folder.path()), LoadError::OutsideFolder { name, .. } if name == outside),
            "{outside}"
        );
    }
    index("model.safetensors");
    LoadedModel::open(folder.path()).unwrap();
}

/// Llama 2's kind of tokenizer, from its folder: pieces of words, bytes that have no piece, spaces as U+2581.
#[test]
fn a_sentencepiece_tokenizer_of_a_folder_gives_back_its_text() {
    let folder = folder(|_| {});
    std::fs::copy(fixture("tokenizer-spm.json"), folder.path().join("tokenizer.json")).unwrap();
    let tokenizer = LoadedModel::open(folder.path()).unwrap().tokenizer;
    let text = "The code word of the north gate is saffron: é, 🙂.";
    let encoded = tokenizer.encode(text).unwrap();
    assert_eq!(tokenizer.decode(&encoded.ids).trim_start(), text);
    assert!(encoded.offsets.is_sorted() && encoded.offsets.iter().all(|&offset| offset <= text.len()));
}
