//! Which tensors a Llama-family model consists of, and where they come from.

use candle_core::{Storage, Tensor};
use half::f16;

use super::config::ModelConfig;
use super::error::LoadError;
use super::low_rank::LandmarkUpdates;
use super::packing::{pack, values};
use linalg::{BLOCK, BlockFormat, Packed};

/// The tensors of a model by what they do; each file format has its own names for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TensorName {
    /// `(vocab, hidden)`
    Embedding,
    /// `(hidden)`
    OutputNorm,
    /// `(vocab, hidden)`, absent when tied to the embedding.
    Output,
    Layer(u32, LayerTensor),
}

/// The tensors of one layer. Matrices are `(out, in)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerTensor {
    /// `(hidden)`
    AttentionNorm,
    /// `(Hq * D, hidden)`, rows of each head in half-split RoPE order.
    Query,
    /// `(Hkv * D, hidden)`, rows of each head in half-split RoPE order.
    Key,
    /// `(Hkv * D, hidden)`
    Value,
    /// `(hidden, Hq * D)`
    AttentionOutput,
    /// `(hidden)`
    FfnNorm,
    /// `(ffn, hidden)`
    Gate,
    /// `(ffn, hidden)`
    Up,
    /// `(hidden, ffn)`
    Down,
}

/// Every tensor of a model with its shape, from the embedding to the output.
pub(super) fn table(config: &ModelConfig) -> Vec<(TensorName, Vec<usize>)> {
    use LayerTensor::*;
    let (hidden, ffn) = (config.hidden, config.ffn);
    let (query_width, kv_width) = (config.query_width(), config.kv_width());
    let mut table = vec![(TensorName::Embedding, vec![config.vocab, hidden])];
    for layer in 0..config.layers {
        let tensors = [
            (AttentionNorm, vec![hidden]),
            (Query, vec![query_width, hidden]),
            (Key, vec![kv_width, hidden]),
            (Value, vec![kv_width, hidden]),
            (AttentionOutput, vec![hidden, query_width]),
            (FfnNorm, vec![hidden]),
            (Gate, vec![ffn, hidden]),
            (Up, vec![ffn, hidden]),
            (Down, vec![hidden, ffn]),
        ];
        table.extend(tensors.map(|(tensor, shape)| (TensorName::Layer(layer, tensor), shape)));
    }
    table.push((TensorName::OutputNorm, vec![hidden]));
    if !config.tied_output {
        table.push((TensorName::Output, vec![config.vocab, hidden]));
    }
    table
}

/// A model file. Reads from several threads at once.
pub(super) trait TensorSource: Sync {
    /// Reads one tensor as contiguous f32 on the CPU. Its shape is compared with `shape` before memory is taken for it.
    fn read(&self, name: TensorName, shape: &[usize]) -> Result<Tensor, LoadError>;

    /// Reads one matrix as the quantized blocks that the file holds; none if it holds no such.
    fn read_blocks(&self, _name: TensorName, _shape: &[usize]) -> Result<Option<Blocks>, LoadError> {
        Ok(None)
    }

    /// What changes a layer for landmarks alone.
    fn landmark_updates(&self, _layer: u32) -> Result<Option<LandmarkUpdates>, LoadError> {
        Ok(None)
    }
}

/// A matrix `(out, in)` in quantized blocks, row by row.
pub(super) struct Blocks {
    pub(super) format: BlockFormat,
    pub(super) bytes: Vec<u8>,
}

/// Reads matrices `(out, in)` of equal width, on top of each other, as the right factor of products: in the blocks of the
/// file if they all have the same.
pub(super) fn read_packed(source: &dyn TensorSource, parts: &[(TensorName, [usize; 2])]) -> Result<Packed, LoadError> {
    let blocks = parts.iter().map(|(name, shape)| source.read_blocks(*name, shape));
    if let Some(blocks) = blocks.collect::<Result<Option<Vec<Blocks>>, _>>()?
        && let [first, rest @ ..] = &blocks[..]
        && rest.iter().all(|part| part.format == first.format)
    {
        let width = parts[0].1[1];
        let row_bytes = width / BLOCK * first.format.bytes();
        let rows: Vec<&[u8]> = blocks.iter().flat_map(|part| part.bytes.chunks_exact(row_bytes)).collect();
        return Ok(Packed::from_blocks(first.format, width, &rows));
    }
    let tensors = parts.iter().map(|(name, shape)| source.read(*name, shape)).collect::<Result<Vec<_>, _>>()?;
    Ok(pack(&tensors).expect("a source gives f32 tensors of the shapes it was asked for"))
}

/// Whether a contiguous f32 tensor on the CPU, as a [`TensorSource`] gives it, holds neither NaN nor infinity.
pub(super) fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => {
            Ok(storage.as_slice::<f32>()?[start..end].iter().all(|number| number.is_finite()))
        }
        _ => Ok(values(tensor)?.iter().all(|number| number.is_finite())),
    }
}

impl Blocks {
    /// Whether every block's scale, and its smallest number where the format has one, is finite.
    pub(super) fn is_finite(&self) -> bool {
        let factors = match self.format {
            BlockFormat::Q4_1 => 2,
            BlockFormat::Q4_0 | BlockFormat::Q8_0 => 1,
        };
        let finite = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).is_finite();
        let mut blocks = self.bytes.chunks_exact(self.format.bytes());
        blocks.all(|block| block[..2 * factors].chunks_exact(2).all(finite))
    }
}
