//! What do files that pose as a model, an adapter, a tokenizer or an archive become? A model that computes, or an error that
//! names what is wrong with the file.
//!
//! Files lie in a folder of their own. Inputs that stand for several files are these files one behind the other, with a zero byte
//! between: JSON holds none.

use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;

use super::adapter;
use super::architecture::Architecture;
use super::config::ModelConfig;
use super::digest::weights_digest;
use super::full_attention::PlainAttention;
use super::gguf::Gguf;
use super::llama::{Llama, Logits};
use super::pull::{Part, unpack};
use super::tensors::{NamedTensor, Opened, open_weights, tensor_shapes, write_model};
use super::tokenizer::Tokenizer;
use super::tokenizer_gguf;
use landmarkdb::Rope;

pub mod seeds;

/// What stands in an adapter's configuration for where its base lies, and for the base's digest.
const BASE: &str = "BASE_PATH";
const BASE_DIGEST: &str = "BASE_DIGEST";

/// Every kind of character that tokenizers treat in a way of its own.
const TEXT: &str = "The  cat's 12,345 hats\n\tfür 猫🙂 <s> [MEM]\u{0}";

/// The file that an archive is searched for, and its bytes.
const ARCHIVED: Part = Part { package: "", file: "model.gguf", bytes: 1000 };

thread_local! {
    static FOLDER: TempDir = tempfile::tempdir().expect("a folder for files");
}

/// Runs `read` in a folder with these files; the empty ones are not there.
fn with_files(files: &[(&str, &[u8])], read: impl FnOnce(&Path) -> bool) -> bool {
    FOLDER.with(|folder| {
        for (name, bytes) in files {
            let path = folder.path().join(name);
            let written = if bytes.is_empty() { remove(&path) } else { fs::write(path, bytes) };
            written.expect("the disk works");
        }
        read(folder.path())
    })
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.exists() { fs::remove_file(path) } else { Ok(()) }
}

/// Files that lie one behind the other.
fn parts<const N: usize>(bytes: &[u8]) -> [&[u8]; N] {
    let mut parts = bytes.splitn(N, |&byte| byte == 0);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// A GGUF file.
pub fn gguf(bytes: &[u8]) -> bool {
    with_files(&[("model.gguf", bytes)], |folder| {
        let Ok((gguf, config)) = Gguf::open(&folder.join("model.gguf")) else { return false };
        let tokenizer = tokenizer_gguf::from_gguf(&gguf);
        tokenizer.iter().for_each(cut);
        let model = Llama::load(config, &gguf);
        model.iter().for_each(compute);
        tokenizer.is_ok() && model.is_ok()
    })
}

/// `config.json`, `generation_config.json`, the index of the weights, and one file of them.
pub fn safetensors(bytes: &[u8]) -> bool {
    let [config, generation, index, weights] = parts(bytes);
    let files = [
        ("config.json", config),
        ("generation_config.json", generation),
        ("model.safetensors.index.json", index),
        ("model.safetensors", weights),
    ];
    with_files(&files, |folder| {
        let Ok(Opened { config, weights, .. }) = open_weights(folder) else { return false };
        let model = Llama::load(config, &*weights);
        model.iter().for_each(compute);
        model.is_ok()
    })
}

/// `adapter_config.json` and the weights of an adapter, of a base that is there.
pub fn adapter(bytes: &[u8]) -> bool {
    let [config, weights] = parts(bytes);
    FOLDER.with(|folder| {
        let base = folder.path().join("base");
        if !base.exists() {
            write_model(&base, &base_config(), &numbered(tensor_shapes(&base_config())), DType::F32).expect("a base");
        }
        let digest = weights_digest([base.join("model.safetensors").as_path()].into_iter()).expect("a base");
        let config = String::from_utf8_lossy(config).replace(BASE, &base.display().to_string());
        let config = config.replace(BASE_DIGEST, &format!("{digest:#}"));
        let files = [("adapter_config.json", config.as_bytes()), ("adapter_model.safetensors", weights)];
        with_files(&files, |folder| {
            let Ok((config, source, _)) = adapter::open(folder) else { return false };
            let model = Llama::load(config, &*source);
            model.iter().for_each(compute);
            model.is_ok()
        })
    })
}

/// `tokenizer.json`
pub fn tokenizer(bytes: &[u8]) -> bool {
    with_files(&[("tokenizer.json", bytes)], |folder| {
        let Ok(tokenizer) = Tokenizer::open(&folder.join("tokenizer.json")) else { return false };
        cut(&tokenizer);
        true
    })
}

/// A zip archive with a file of a known name and size.
pub fn archive(bytes: &[u8]) -> bool {
    with_files(&[("archive.whl", bytes)], |folder| {
        let target = folder.join("unpacked");
        let mut out = fs::File::create(&target).unwrap();
        let unpacked = unpack(&folder.join("archive.whl"), &ARCHIVED, &mut out, &mut |_| {});
        let bytes = fs::metadata(&target).map_or(0, |file| file.len());
        assert!(
            bytes <= ARCHIVED.bytes && (unpacked.is_err() || bytes == ARCHIVED.bytes),
            "{bytes} bytes were unpacked"
        );
        unpacked.is_ok()
    })
}

/// Two tokens go through the model, the last of its vocabulary among them.
fn compute(model: &Llama) {
    let config = model.config();
    let ids = [0, config.vocab as u32 - 1];
    let logits = model.forward(&ids, &mut PlainAttention::new(config), Logits::All).expect("plain attention answers");
    assert_eq!(logits.len(), ids.len() * config.vocab);
}

/// A text goes through the tokenizer and comes back.
fn cut(tokenizer: &Tokenizer) {
    let Ok(encoded) = tokenizer.encode(TEXT) else { return };
    assert_eq!(encoded.ids.len(), encoded.offsets.len());
    assert!(encoded.offsets.is_sorted() && encoded.offsets.last().is_none_or(|&last| last <= TEXT.len()));
    tokenizer.decode(&encoded.ids);
    let _ = tokenizer.to_json(Some("[MEM]"));
}

/// The base of every adapter, in the adapter's own tests too.
pub(super) fn base_config() -> ModelConfig {
    ModelConfig {
        layers: 2,
        query_heads: 2,
        kv_heads: 1,
        head_dim: 4,
        hidden: 6,
        ffn: 5,
        vocab: 9,
        context_tokens: 64,
        norm_epsilon: 1e-5,
        rope: Rope::from_base(100.0, 4),
        tied_output: false,
        eos_ids: vec![0],
        landmark: None,
        architecture: Architecture::default(),
    }
}

fn numbered(shapes: Vec<(String, Vec<usize>)>) -> Vec<NamedTensor> {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i % 11) as f32 / 4.0 - 1.0).collect();
        NamedTensor { name, tensor: Tensor::from_vec(values, shape, &Device::Cpu).expect("a number for each place") }
    };
    shapes.into_iter().map(tensor).collect()
}
