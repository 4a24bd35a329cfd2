//! The whole model against recorded outputs of another implementation, and against itself.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use super::full_attention::PlainAttention;
use super::*;
use landmarkdb::limits;

/// SmolLM2, loaded once for all tests; nothing where it is not here.
fn smollm2() -> Option<&'static LoadedModel> {
    static MODEL: OnceLock<LoadedModel> = OnceLock::new();
    let path = test_model::smollm2()?;
    Some(MODEL.get_or_init(|| LoadedModel::open(&path).unwrap()))
}

fn attention(model: &LoadedModel) -> PlainAttention {
    PlainAttention::new(model.config())
}

/// One recorded prompt, from `tests/golden/smollm2.safetensors`.
struct Golden {
    text: String,
    input_ids: Vec<u32>,
    logits_last: Vec<f32>,
    greedy_ids: Vec<u32>,
}

fn golden(name: &str) -> Golden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/smollm2.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let ids = |part: &str| -> Vec<u32> {
        let ids = tensors[&format!("{name}.{part}")].to_dtype(DType::U32).unwrap();
        ids.to_vec1().unwrap()
    };
    Golden {
        text: header.metadata().as_ref().unwrap()[name].clone(),
        input_ids: ids("input_ids"),
        logits_last: tensors[&format!("{name}.logits_last")].to_vec1().unwrap(),
        greedy_ids: ids("greedy_ids"),
    }
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn smollm2_agrees_with_the_recorded_ids_logits_and_greedy_tokens() {
    let Some(model) = smollm2() else { return };
    for name in ["capital", "passkey", "code"] {
        let want = golden(name);
        assert_eq!(model.tokenizer.encode(&want.text).unwrap().ids, want.input_ids, "{name}");
        let logits = model.llama.forward(&want.input_ids, &mut attention(model), Logits::Last).unwrap();
        let off = farthest(&logits, &want.logits_last);
        assert!(off < 2e-2, "{name}: logits are off by {off}");

        let options = GenerateOptions { max_tokens: want.greedy_ids.len(), ..Default::default() };
        let mut told = String::new();
        let mut on_text = |piece: &str| told.push_str(piece);
        let found = generate(model, &mut attention(model), &want.input_ids, &options, &mut on_text).unwrap();
        let eos = want.greedy_ids.iter().position(|id| model.config().eos_ids.contains(id));
        assert_eq!(found.ids, want.greedy_ids[..eos.unwrap_or(want.greedy_ids.len())], "{name}");
        assert_eq!(found.text, told);
        assert_eq!(found.text, model.tokenizer.decode(&found.ids).trim_start());
    }
}

#[test]
fn chunks_and_single_tokens_give_what_one_pass_gives() {
    let Some(model) = smollm2() else { return };
    let ids = golden("passkey").input_ids;
    let (tokens, vocab) = (ids.len(), model.config().vocab);
    let whole = model.llama.forward(&ids, &mut attention(model), Logits::All).unwrap();
    assert_eq!(whole.len(), tokens * vocab);
    for chunk_tokens in [1, 7, 64] {
        let mut attention = attention(model);
        for (chunk, want) in ids.chunks(chunk_tokens).zip(whole.chunks(chunk_tokens * vocab)) {
            let found = model.llama.forward(chunk, &mut attention, Logits::All).unwrap();
            let off = farthest(&found, want);
            assert!(off < 1e-3, "chunks of {chunk_tokens}: off by {off}");
        }
    }
    let mut chunked = attention(model);
    let last = prefill(&model.llama, &mut chunked, &ids[..tokens - 1], 16, Logits::None).unwrap();
    assert!(last.is_empty());
    let last = prefill(&model.llama, &mut chunked, &ids[tokens - 1..], 16, Logits::Last).unwrap();
    assert!(farthest(&last, &whole[(tokens - 1) * vocab..]) < 1e-3);
}

#[test]
fn seeds_repeat_stop_texts_stop_and_the_limit_holds() {
    let Some(model) = smollm2() else { return };
    let prompt = golden("capital").input_ids;
    let run = |sampling, stop: &[&str], max_tokens| {
        let stop = stop.iter().map(|text| text.to_string()).collect();
        let options = GenerateOptions { sampling, stop, max_tokens, chunk_tokens: 2, ..Default::default() };
        generate(model, &mut attention(model), &prompt, &options, &mut |_| {}).unwrap()
    };
    let by_chance = |seed| run(Sampling { temperature: 1.5, top_p: 0.95, seed, ..Sampling::default() }, &[], 12);
    assert_eq!(by_chance(1), by_chance(1));
    assert_ne!(by_chance(1).text, by_chance(2).text);

    let free = run(Sampling::default(), &[], 8);
    assert_eq!((free.ids.len(), free.finish), (8, Finish::MaxTokens));
    assert!(free.text.contains("Paris"), "{:?}", free.text);
    let stopped = run(Sampling::default(), &["aris"], 8);
    assert_eq!(stopped.finish, Finish::Stop);
    assert_eq!(stopped.text, free.text[..free.text.find("aris").unwrap()]);
    assert!(run(Sampling::default(), &[], 0).ids.is_empty());
}

/// An answer that the limit cut inside a character ended in U+FFFD.
#[test]
fn an_answer_ends_with_a_whole_character() {
    let Some(model) = smollm2() else { return };
    let prompt = model.tokenizer.encode("🙂🙃🙂🙃🙂🙃🙂🙃🙂").unwrap().ids;
    let mut longer = 0;
    for max_tokens in 1..8 {
        let options = GenerateOptions { max_tokens, ..Default::default() };
        let found = generate(model, &mut attention(model), &prompt, &options, &mut |_| {}).unwrap();
        assert!(!found.text.contains('\u{fffd}'), "{found:?}");
        longer += (found.ids.len() > max_tokens) as usize;
    }
    assert!(longer > 0, "no limit fell inside a character: the test has no teeth");
}

#[test]
fn a_question_stands_in_the_model_s_own_turns() {
    let Some(model) = smollm2() else { return };
    let token = |name: &str| model.tokenizer.token_id(name).unwrap();
    let (start, end) = (token("<|im_start|>"), token("<|im_end|>"));
    let text = |text: &str| model.tokenizer.encode(text).unwrap().ids;
    let frame = |asked: &Asked| frame_question(model, asked, "text\n").unwrap();
    let asked = Asked { question: " Who is <|im_end|>? ", ..Asked::default() };
    let turn = |role: &str, words: &str| [&[start], &text(&format!("{role}\n{words}"))[..]].concat();
    let first =
        [&[end], &text("\n")[..], &turn("user", "Who is <|im_end|>?"), &[end], &text("\n"), &turn("assistant", "")];
    assert_eq!(frame(&asked), Frame { ids: first.concat(), stop: Vec::new() });

    let unfinished = frame_question(model, &asked, "text").unwrap().ids;
    assert_eq!(unfinished, [text("\n"), first.concat()].concat());

    let earlier = [("Who?".to_string(), "Emma.".to_string())];
    let later = frame(&Asked { question: "When?", system: Some("Be brief."), earlier: &earlier });
    let told = model.tokenizer.decode(&later.ids);
    let (before, last) = told.split_once("When?").unwrap();
    assert_eq!(
        before,
        "<|im_end|>\n<|im_start|>user\nBe brief.\n\nWho?<|im_end|>\n<|im_start|>assistant\nEmma.<|im_end|>\n<|im_start|>user\n"
    );
    assert_eq!(last, "<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn unknown_tokens_and_misfit_embeddings_are_refused() {
    let Some(model) = smollm2() else { return };
    let vocab = model.config().vocab;
    let unknown = model.llama.forward(&[1, vocab as u32], &mut attention(model), Logits::None);
    assert!(matches!(unknown, Err(ForwardError::UnknownToken { id, .. }) if id as usize == vocab));
    let misfit = model.llama.forward_embedded(vec![0.0; 7], &mut attention(model), Logits::None);
    assert!(matches!(misfit, Err(ForwardError::EmbeddingLength { found: 7, .. })));
    assert!(model.llama.forward(&[], &mut attention(model), Logits::Last).unwrap().is_empty());
}

#[test]
fn token_offsets_are_bytes_that_cover_the_text() {
    let Some(model) = smollm2() else { return };
    let tokenizer = &model.tokenizer;
    for text in
        ["", "a", " 123", "Hello, wörld! 🙂\n\n\tx  y", "日本語 text <|im_end|> e\u{301}", "\r\n \u{a0}\u{200b}"]
    {
        let encoded = tokenizer.encode(text).unwrap();
        assert_eq!(encoded.ids.len(), encoded.offsets.len());
        assert_eq!(tokenizer.decode(&encoded.ids), text);
        let ends = encoded.offsets.iter().skip(1).copied().chain([text.len()]);
        for ((&id, &start), end) in encoded.ids.iter().zip(&encoded.offsets).zip(ends) {
            assert_eq!(tokenizer.token_bytes(id), &text.as_bytes()[start..end], "{text:?}");
        }
    }
    let digits = tokenizer.encode(" 123").unwrap();
    assert_eq!(digits.offsets, [0, 1, 2, 3], "every digit is a token, and the space before them too");
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert_eq!(model.config().eos_ids, [end]);
    assert_eq!(model.end_ids(), [tokenizer.token_id("<|endoftext|>").unwrap(), end], "the file names one of two");
    assert!(!tokenizer.encode("<|im_end|>").unwrap().ids.contains(&end), "a text cannot end itself");
    assert!(tokenizer.prefix().is_empty());
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
}

/// A tiny Hugging Face folder with random weights, in `shards` files.
pub(super) fn write_folder(folder: &Path, dtype: DType, shards: usize) {
    let config = r#"{"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 16, "intermediate_size": 24, "vocab_size": 300, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "eos_token_id": 0}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    let alphabet = BTreeSet::from_iter(tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet());
    let vocab: Vec<String> = alphabet
        .iter()
        .enumerate()
        .map(|(id, letter)| format!("{}:{id}", serde_json::to_string(&letter.to_string()).unwrap()))
        .collect();
    let tokenizer = format!(
        r#"{{"added_tokens": [{{"id": 256, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false}}],
        "pre_tokenizer": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}},
        "post_processor": {{"type": "TemplateProcessing", "single": [{{"SpecialToken": {{"id": "<s>", "type_id": 0}}}},
        {{"Sequence": {{"id": "A", "type_id": 0}}}}], "pair": [], "special_tokens": {{"<s>": {{"id": "<s>", "ids": [256],
        "tokens": ["<s>"]}}}}}},
        "decoder": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}},
        "model": {{"type": "BPE", "vocab": {{{}}}, "merges": []}}}}"#,
        vocab.join(",")
    );
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();

    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![300, 16]),
        ("model.norm.weight".to_string(), vec![16]),
        ("lm_head.weight".to_string(), vec![300, 16]),
    ];
    let layer = [
        ("input_layernorm", vec![16]),
        ("post_attention_layernorm", vec![16]),
        ("self_attn.q_proj", vec![16, 16]),
        ("self_attn.k_proj", vec![8, 16]),
        ("self_attn.v_proj", vec![8, 16]),
        ("self_attn.o_proj", vec![16, 16]),
        ("mlp.gate_proj", vec![24, 16]),
        ("mlp.up_proj", vec![24, 16]),
        ("mlp.down_proj", vec![16, 24]),
    ];
    for index in 0..2 {
        let named = layer.iter().map(|(name, shape)| (format!("model.layers.{index}.{name}.weight"), shape.clone()));
        tensors.extend(named);
    }
    let mut weight_map = HashMap::new();
    let mut files = vec![HashMap::new(); shards];
    for (number, (name, shape)) in tensors.into_iter().enumerate() {
        let count: usize = shape.iter().product();
        // Halves, quarters, ..: exact in every dtype.
        let values: Vec<f32> = (0..count).map(|i| ((i * 7 + number * 13) % 17) as f32 / 16.0 - 0.5).collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        weight_map.insert(name.clone(), shard_name(number % shards, shards));
        files[number % shards].insert(name, tensor);
    }
    for (number, tensors) in files.iter().enumerate() {
        candle_core::safetensors::save(tensors, folder.join(shard_name(number, shards))).unwrap();
    }
    if shards > 1 {
        let index = serde_json::json!({ "weight_map": weight_map });
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

fn shard_name(number: usize, shards: usize) -> String {
    match shards {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{shards:05}.safetensors", number + 1),
    }
}

#[test]
fn a_folder_gives_the_same_model_in_one_file_or_several_and_in_each_dtype() {
    let logits = |dtype, shards| {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), dtype, shards);
        let model = LoadedModel::open(folder.path()).unwrap();
        assert_eq!(Llama::open(folder.path()).unwrap().config(), model.config());
        let encoded = model.tokenizer.encode("ab é").unwrap();
        assert_eq!(encoded.offsets, [0, 1, 2, 3, 4]);
        assert_eq!(model.tokenizer.prefix(), [256]);
        let ids: Vec<u32> = model.tokenizer.prefix().iter().chain(&encoded.ids).copied().collect();
        let logits = model.llama.forward(&ids, &mut attention(&model), Logits::All).unwrap();
        assert_eq!(logits.len(), 6 * 300);
        assert!(logits.iter().all(|logit| logit.is_finite()));
        (logits, model.model_digest)
    };
    let (one, digest) = logits(DType::F32, 1);
    for (dtype, shards) in [(DType::F16, 1), (DType::BF16, 1), (DType::F32, 3)] {
        let (other, other_digest) = logits(dtype, shards);
        assert_eq!(farthest(&one, &other), 0.0, "{dtype:?} in {shards}");
        assert_ne!(digest, other_digest);
    }
    assert!(one.windows(2).any(|pair| pair[0] != pair[1]));
}

/// Opens the tiny folder after `change`.
fn open_changed(change: impl FnOnce(&Path)) -> LoadError {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), DType::F32, 1);
    change(folder.path());
    match LoadedModel::open(folder.path()) {
        Ok(_) => panic!("a damaged model was loaded"),
        Err(error) => error,
    }
}

#[test]
fn damaged_folders_are_refused_with_what_is_wrong() {
    let weights = |folder: &Path| folder.join("model.safetensors");
    let cut = |bytes: usize| {
        open_changed(|folder| {
            let whole = std::fs::read(weights(folder)).unwrap();
            std::fs::write(weights(folder), &whole[..bytes.min(whole.len() - 1)]).unwrap();
        })
    };
    for bytes in [0, 7, 8, 100, usize::MAX] {
        let error = cut(bytes);
        assert!(matches!(error, LoadError::Damaged { .. }), "{bytes}: {error}");
    }
    let huge = open_changed(|folder| std::fs::write(weights(folder), [0xff; 64]).unwrap());
    assert!(matches!(huge, LoadError::Damaged { .. }), "{huge}");

    let edit = |from: &'static str, to: &'static str| {
        open_changed(move |folder| {
            let path = folder.join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            std::fs::write(path, text.replace(from, to)).unwrap();
        })
    };
    let misfit = edit("\"intermediate_size\": 24", "\"intermediate_size\": 25");
    assert!(
        matches!(&misfit, LoadError::TensorShape { expected, found, .. } if *expected == [25, 16] && *found == [24, 16]),
        "{misfit}"
    );
    let missing = edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert!(
        matches!(&missing, LoadError::MissingTensor { name, .. } if name.starts_with("model.layers.2")),
        "{missing}"
    );
    let deep = edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4000000000");
    assert!(matches!(&deep, LoadError::Shape { .. }), "{deep}; at most {} layers", limits::LAYERS_MAX);
    let gone = open_changed(|folder| std::fs::remove_file(weights(folder)).unwrap());
    assert!(matches!(gone, LoadError::Io { .. }), "{gone}");
    let none = open_changed(|folder| std::fs::remove_file(folder.join("config.json")).unwrap());
    assert!(matches!(none, LoadError::NotAModel { .. }), "{none}");
}

#[test]
fn a_gguf_cut_short_anywhere_is_refused() {
    let Some(model) = test_model::smollm2() else { return };
    let whole = std::fs::read(model).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    for bytes in [0, 4, 100, 1_000_000, whole.len() / 2, whole.len() - 1000] {
        std::fs::write(&path, &whole[..bytes]).unwrap();
        let error = LoadedModel::open(&path).err().expect("a cut file was loaded");
        assert!(matches!(error, LoadError::Damaged { .. }), "{bytes}: {error}");
    }
    let mut foreign = whole[..2_000_000].to_vec();
    let at = foreign.windows(5).position(|window| window == b"llama").unwrap();
    foreign[at..at + 5].copy_from_slice(b"mamba");
    std::fs::write(&path, foreign).unwrap();
    let error = LoadedModel::open(&path).err().unwrap();
    assert!(matches!(&error, LoadError::Unsupported { found, .. } if found == "mamba"), "{error}");
}
