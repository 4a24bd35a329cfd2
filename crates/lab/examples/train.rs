//! A landmark model from nothing: `cargo run --release --example train`.
//!
//! Trains a model of a few thousand parameters on pages of a novel, for seconds: the loss falls, English takes longer
//! (`landmarkdb train`). Then the model reads a text into a memory and goes on with it.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use landmarkdb::{BlockMemory, CollectionSpec, DType, KeyRule, LocalMemory, Retrieval, Window};
use landmarkdb_lab::eval::BOOK;
use landmarkdb_lab::train::{Event, Job, Kind, Phase, Recipe, train};
use landmarkdb_llm::{Encoding, GenerateOptions, LoadedModel, Question, ask, encode};

/// B, the landmark included.
const BLOCK_TOKENS: u32 = 9;

fn recipe() -> Recipe {
    Recipe {
        kind: Kind::Landmark,
        from: None,
        adapter: None,
        adapter_alpha: None,
        layers: 2,
        hidden: 32,
        heads: 2,
        kv_heads: 1,
        ffn: 64,
        vocab: 300,
        block_tokens: BLOCK_TOKENS,
        passkey_share: 0.5,
        answer_weight: 10.0,
        pos_jump: 0,
        phases: vec![Phase { blocks: 20, sequences: 4, share: 1.0 }],
        steps: 40,
        lr: 1e-2,
        warmup: 4,
        lr_floor: 0.1,
        weight_decay: 0.05,
        beta2: 0.98,
        clip: 1.0,
        group_dropout: 0.0,
        seed: 1,
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let job = Job {
        out: folder.path().join("model"),
        recipe: recipe(),
        texts: vec![BOOK[..60_000].into()],
        validation: vec![BOOK[60_000..70_000].into()],
        from: None,
        checkpoint_every: 20,
    };
    let mut losses = Vec::new();
    let trained = train(&job, &AtomicBool::new(false), &mut |event| {
        if let Event::Step(step) = event {
            losses.push(step.loss);
        }
    })?;
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("{} parameters, {} steps, loss {first:.2} to {last:.2}", trained.parameters, trained.steps);
    assert!(last < first);

    // The folder is a model like any other. Its blocks end in a landmark, whose key stands for the block.
    let model = LoadedModel::open(&job.out)?;
    let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(&folder.path().join("memory"))?);
    let collection = memory.open_collection(&CollectionSpec {
        name: "example".into(),
        shape: model.shape(BLOCK_TOKENS)?,
        key_rule: KeyRule::Landmark,
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: model.model_digest,
        tokenizer_digest: model.tokenizer_digest(),
        model_name: model.name.clone(),
    })?;

    // It was trained on 20 blocks, and reads some hundred: 8 at once, and 4 that each query chooses.
    let (window, retrieval) = (Window::landmark(8 * BLOCK_TOKENS as usize), Retrieval::landmark());
    let encoding =
        Encoding { name: "novel", text: &BOOK[..4_000], window, retrieval: Some(retrieval.clone()), stays_open: false };
    let document = encode(&model, &memory, &collection, &encoding, &mut |_| {})?;
    println!("{} tokens in {} blocks", document.tokens, document.blocks);

    let options = GenerateOptions { max_tokens: 32, ..GenerateOptions::default() };
    let prompt = model.tokenizer.encode("Anne ")?.ids;
    let question = Question { documents: &[document], prompt: &prompt, window, retrieval, options };
    let answer = ask(&model, &memory, &collection, &question, &mut |_| {})?;
    println!("Anne {:?}, from {} of the blocks", answer.generated.text, answer.reads.retrieved.len());
    Ok(())
}

#[test]
fn runs() -> Result<(), Box<dyn Error>> {
    main()
}
