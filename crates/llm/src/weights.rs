//! Which tensors a model consists of, and where they come from.

use candle_core::{Storage, Tensor};

use super::architecture::{Architecture, QueryKeyNorm};
use super::config::ModelConfig;
use super::error::LoadError;
use super::low_rank::LandmarkUpdates;
use super::packing::{pack, values};
use linalg::{BlockFormat, Packed};

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

/// The tensors of one layer. Matrices are `(out, in)`, everything else has one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LayerTensor {
    /// `(hidden)`: of what goes into the attention.
    AttentionNorm,
    /// `(Hq * D, hidden)`, rows of each head in half-split RoPE order.
    Query,
    /// `(Hkv * D, hidden)`, rows of each head in half-split RoPE order.
    Key,
    /// `(Hkv * D, hidden)`
    Value,
    /// `(Hq * D + 2 * Hkv * D, hidden)`: the three above in one.
    QueryKeyValue,
    /// `(Hq * D)`
    QueryBias,
    /// `(Hkv * D)`
    KeyBias,
    /// `(Hkv * D)`
    ValueBias,
    /// `(D)` or `(Hq * D)`
    QueryNorm,
    /// `(D)` or `(Hkv * D)`
    KeyNorm,
    /// `(hidden, Hq * D)`
    AttentionOutput,
    /// `(hidden)`
    AttentionOutputBias,
    /// `(hidden)`: of what comes out of the attention.
    AttentionOutputNorm,
    /// `(hidden)`: of what goes into the feed-forward network.
    FfnNorm,
    /// `(ffn, hidden)`
    Gate,
    /// `(ffn, hidden)`
    Up,
    /// `(2 * ffn, hidden)`: the two above in one.
    GateUp,
    /// `(ffn)`
    GateBias,
    /// `(ffn)`
    UpBias,
    /// `(hidden, ffn)`
    Down,
    /// `(hidden)`
    DownBias,
    /// `(hidden)`: of what comes out of the feed-forward network.
    FfnOutputNorm,
}

/// Every tensor of a model with its shape, from the embedding to the output.
pub(super) fn table(config: &ModelConfig) -> Vec<(TensorName, Vec<usize>)> {
    let hidden = config.hidden;
    let mut table = vec![(TensorName::Embedding, vec![config.vocab, hidden])];
    for layer in 0..config.layers {
        let tensors = layer_table(config);
        table.extend(tensors.into_iter().map(|(tensor, shape)| (TensorName::Layer(layer, tensor), shape)));
    }
    table.push((TensorName::OutputNorm, vec![hidden]));
    if !config.tied_output {
        table.push((TensorName::Output, vec![config.vocab, hidden]));
    }
    table
}

/// The tensors of each layer. The forward pass asks for these and no others.
fn layer_table(config: &ModelConfig) -> Vec<(LayerTensor, Vec<usize>)> {
    use LayerTensor::*;
    let Architecture { norms, query_key_norm, biases, fused, .. } = config.architecture;
    let (hidden, ffn) = (config.hidden, config.ffn);
    let (query_width, kv_width) = (config.query_width(), config.kv_width());
    let (query_norm, key_norm) = match query_key_norm {
        Some(QueryKeyNorm::Width) => (query_width, kv_width),
        _ => (config.head_dim as usize, config.head_dim as usize),
    };
    let tensors = [
        (AttentionNorm, vec![hidden], norms.before()),
        (QueryKeyValue, vec![query_width + 2 * kv_width, hidden], fused),
        (Query, vec![query_width, hidden], !fused),
        (Key, vec![kv_width, hidden], !fused),
        (Value, vec![kv_width, hidden], !fused),
        (QueryBias, vec![query_width], biases.qkv),
        (KeyBias, vec![kv_width], biases.qkv),
        (ValueBias, vec![kv_width], biases.qkv),
        (QueryNorm, vec![query_norm], query_key_norm.is_some()),
        (KeyNorm, vec![key_norm], query_key_norm.is_some()),
        (AttentionOutput, vec![hidden, query_width], true),
        (AttentionOutputBias, vec![hidden], biases.output),
        (AttentionOutputNorm, vec![hidden], norms.after()),
        (FfnNorm, vec![hidden], norms.before()),
        (GateUp, vec![2 * ffn, hidden], fused),
        (Gate, vec![ffn, hidden], !fused),
        (Up, vec![ffn, hidden], !fused),
        (GateBias, vec![ffn], biases.gate_up),
        (UpBias, vec![ffn], biases.gate_up),
        (Down, vec![hidden, ffn], true),
        (DownBias, vec![hidden], biases.down),
        (FfnOutputNorm, vec![hidden], norms.after()),
    ];
    tensors.into_iter().filter(|(_, _, is_there)| *is_there).map(|(tensor, shape, _)| (tensor, shape)).collect()
}

/// The tensors of one layer, read from a file as what the forward pass multiplies and adds.
pub(super) struct LayerSource<'a> {
    source: &'a dyn TensorSource,
    layer: u32,
    tensors: Vec<(LayerTensor, Vec<usize>)>,
}

impl<'a> LayerSource<'a> {
    pub(super) fn new(config: &ModelConfig, layer: u32, source: &'a dyn TensorSource) -> Self {
        LayerSource { source, layer, tensors: layer_table(config) }
    }

    /// The shape of a tensor that the layer has.
    fn shape(&self, tensor: LayerTensor) -> Option<&[usize]> {
        self.tensors.iter().find(|(known, _)| *known == tensor).map(|(_, shape)| &shape[..])
    }

    /// The values of vectors, one behind the other; none if the layer has none of them.
    pub(super) fn vector(&self, parts: &[LayerTensor]) -> Result<Option<Vec<f32>>, LoadError> {
        let mut vector = Vec::new();
        for &tensor in parts {
            let Some(shape) = self.shape(tensor) else { return Ok(None) };
            let read = self.source.read(TensorName::Layer(self.layer, tensor), shape)?;
            vector.extend(values(&read).expect("a source gives f32 tensors"));
        }
        Ok(Some(vector))
    }

    /// Those of these matrices that the layer has, on top of each other.
    pub(super) fn packed(&self, parts: &[LayerTensor]) -> Result<Packed, LoadError> {
        let parts = parts.iter().filter_map(|&tensor| match self.shape(tensor)? {
            &[rows, columns] => Some((TensorName::Layer(self.layer, tensor), [rows, columns])),
            _ => None,
        });
        read_packed(self.source, &parts.collect::<Vec<_>>())
    }
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

/// Reads matrices `(out, in)` of equal width, on top of each other, as the right factor of products: each as the file has it.
pub(super) fn read_packed(source: &dyn TensorSource, parts: &[(TensorName, [usize; 2])]) -> Result<Packed, LoadError> {
    let read = |&(name, shape): &(TensorName, [usize; 2])| {
        if let Some(Blocks { format, bytes }) = source.read_blocks(name, &shape)? {
            let row_bytes = shape[1] / format.values() * format.bytes();
            let rows: Vec<&[u8]> = bytes.chunks_exact(row_bytes).collect();
            return Ok(Packed::from_blocks(format, shape[1], &rows));
        }
        let tensor = source.read(name, &shape)?;
        Ok(pack(&tensor).expect("a source gives f32 tensors of the shapes it was asked for"))
    };
    Ok(Packed::beside(parts.iter().map(read).collect::<Result<_, LoadError>>()?))
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
