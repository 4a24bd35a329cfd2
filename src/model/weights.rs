//! Which tensors a Llama-family model consists of, and where they come from.

use candle_core::{CpuStorage, Storage, Tensor};

use super::error::LoadError;
use super::low_rank::LandmarkUpdates;

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

/// A model file. Reads from several threads at once.
pub(super) trait TensorSource: Sync {
    /// Reads one tensor as contiguous f32 on the CPU. Its shape is compared with `shape` before memory is taken for it.
    fn read(&self, name: TensorName, shape: &[usize]) -> Result<Tensor, LoadError>;

    /// What changes a layer for landmarks alone.
    fn landmark_updates(&self, _layer: u32) -> Result<Option<LandmarkUpdates>, LoadError> {
        Ok(None)
    }
}

/// Numbers that stay where they are for the life of a model: `(rows, columns)` row-major, or a vector as one row.
pub(super) struct Matrix {
    /// Contiguous f32 on the CPU.
    tensor: Tensor,
    columns: usize,
}

impl Matrix {
    /// Stacks tensors of equal width on top of each other.
    pub(super) fn stack(parts: &[Tensor]) -> candle_core::Result<Self> {
        let tensor = match parts {
            [only] => only.clone(),
            _ => Tensor::cat(parts, 0)?,
        };
        let tensor = tensor.to_device(&candle_core::Device::Cpu)?.to_dtype(candle_core::DType::F32)?.contiguous()?;
        let columns = tensor.dims().last().copied().unwrap_or(1);
        Ok(Matrix { tensor, columns })
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Lends all numbers, `(rows, columns)`.
    pub(super) fn with<R>(&self, read: impl FnOnce(&[f32]) -> R) -> R {
        let (storage, layout) = self.tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(numbers)), Some((start, end))) => read(&numbers[start..end]),
            _ => unreachable!("`stack` made it contiguous f32 on the CPU"),
        }
    }
}
