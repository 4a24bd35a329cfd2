//! Between tensors and slices: all tensors of this folder are contiguous f32 on the CPU.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};

/// The values of a tensor, row-major, lent.
pub(super) struct Values<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

/// Lends the values of a contiguous f32 tensor.
pub(super) fn values(tensor: &Tensor) -> Result<Values<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else {
        bail!("expected a tensor on the CPU, found one on {:?}", tensor.device())
    };
    cpu.as_slice::<f32>()?;
    let range = range(layout)?;
    Ok(Values { storage, range })
}

/// The values of what an operation is given.
pub(super) fn input<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[range(layout)?])
}

/// A tensor of what a backward pass computed, shaped like `like`.
pub(super) fn gradient(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), &Device::Cpu)
}

/// The gradient of `like`, computed if it leads to something that is trained.
pub(super) fn wanted(like: &Tensor, compute: impl FnOnce() -> Vec<f32>) -> Result<Option<Tensor>> {
    like.track_op().then(|| gradient(compute(), like)).transpose()
}

/// The shape with another last dimension.
pub(super) fn with_width(layout: &Layout, width: usize) -> Shape {
    let mut dims = layout.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    Shape::from(dims)
}

/// The last dimension.
pub(super) fn width(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1)
}

fn range(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, found {layout:?}"),
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("`values` found f32 on the CPU"),
        }
    }
}
