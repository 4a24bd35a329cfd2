//! A candle model of your own, with a memory in place of its KV cache: `cargo run --release --example plug_in`.
//!
//! `Decoder` stands for any candle model; its attention becomes one call. With every block retrieved its outputs are
//! those of full attention, which this example checks.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor};
use landmarkdb::{
    BlockAttention, BlockMemory, CollectionSpec, DType as Stored, KeyRule, LocalMemory, ModelShape, NewTokens,
    Normalisation, Retrieval, Rope, SequenceAttention, Sha256Digest, Window,
};
use landmarkdb_llm::attend_tensors;

const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const HIDDEN: usize = 64;

/// A transformer without its feed-forward parts: enough to have layers, heads and projections.
struct Decoder {
    /// Per layer: q, k, v and output projections.
    layers: Vec<[Tensor; 4]>,
}

impl Decoder {
    fn random() -> Result<Self> {
        let matrix = |rows: usize, columns: usize| Tensor::randn(0f32, 0.2, (rows, columns), &Device::Cpu);
        let layer = |_| {
            let kv = KV_HEADS * HEAD_DIM;
            Ok([
                matrix(HIDDEN, HEADS * HEAD_DIM)?,
                matrix(HIDDEN, kv)?,
                matrix(HIDDEN, kv)?,
                matrix(HEADS * HEAD_DIM, HIDDEN)?,
            ])
        };
        Ok(Decoder { layers: (0..LAYERS).map(layer).collect::<Result<_>>()? })
    }

    /// `x (1, T, hidden)` to the same shape.
    fn forward(&self, x: &Tensor, attention: &mut dyn SequenceAttention) -> Result<Tensor> {
        let (_, tokens, _) = x.dims3()?;
        let mut x = x.clone();
        for (index, [q, k, v, output]) in self.layers.iter().enumerate() {
            let normed = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?)?;
            let heads = |matrix: &Tensor, heads: usize| {
                normed.broadcast_matmul(matrix)?.reshape((1, tokens, heads, HEAD_DIM))?.transpose(1, 2)
            };
            // The one line that changes: before RoPE, `(1, heads, T, D)` each.
            let attended =
                attend_tensors(attention, index, &heads(q, HEADS)?, &heads(k, KV_HEADS)?, &heads(v, KV_HEADS)?)?;
            let attended = attended.transpose(1, 2)?.reshape((1, tokens, HEADS * HEAD_DIM))?;
            x = (x + attended.broadcast_matmul(output)?)?;
        }
        Ok(x)
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let model = Decoder::random()?;
    let text = Tensor::randn(0f32, 1.0, (1, 512, HIDDEN), &Device::Cpu)?;
    let shape = ModelShape {
        layers: LAYERS as u32,
        query_heads: HEADS as u32,
        kv_heads: KV_HEADS as u32,
        head_dim: HEAD_DIM as u32,
        block_tokens: 16,
        rope: Rope::from_base(10_000.0, HEAD_DIM),
        unrotated_layers: Vec::new(),
        softmax_scale: (HEAD_DIM as f32).powf(-0.5),
    };

    // A dozen lines: a memory, a collection for this model, a document, and an attention that writes to it.
    let folder = tempfile::tempdir()?;
    let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path())?);
    let collection = memory.open_collection(&CollectionSpec {
        name: "example".into(),
        shape: shape.clone(),
        key_rule: KeyRule::Tokens,
        payload_dtype: Stored::F32,
        key_dtype: Stored::F16,
        model_digest: Sha256Digest([0; 32]),
        tokenizer_digest: Sha256Digest([0; 32]),
        model_name: "decoder".into(),
    })?;
    let document = memory.open_document(collection.id, "text")?;
    let retrieval = Retrieval { top_k: 1000, ..Retrieval::default() };
    let window = Window { tokens: 64, ..Window::default() };
    let mut with_memory = BlockAttention::write(memory, &collection, &document, window, Some(retrieval))?;

    let mut window_only = BlockAttention::window_only(&shape, window);
    let mut full = BlockAttention::full(&shape, Normalisation::Plain);
    let (mut memory_off, mut window_off) = (0f32, 0f32);
    for from in (0..512).step_by(64) {
        let chunk = text.narrow(1, from, 64)?;
        let right = model.forward(&chunk, &mut full)?;
        let off = |out: Tensor| (out - &right)?.abs()?.to_dtype(DType::F32)?.max_all()?.to_scalar::<f32>();
        memory_off = memory_off.max(off(model.forward(&chunk, &mut with_memory)?)?);
        window_off = window_off.max(off(model.forward(&chunk, &mut window_only)?)?);
        // What the tokens were: from here on their blocks can be retrieved, in this and in any later session.
        with_memory.commit(NewTokens { ids: &[0; 64], text: &[], offsets: &[0; 64] })?;
    }
    println!("largest difference from full attention over 512 tokens, window of 64:");
    println!("  window only   {window_off:.6}");
    println!("  with memory   {memory_off:.6}");
    assert!(memory_off < 1e-3 && memory_off < window_off);
    Ok(())
}

#[test]
fn runs() -> std::result::Result<(), Box<dyn std::error::Error>> {
    main()
}
