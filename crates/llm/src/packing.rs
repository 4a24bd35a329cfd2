//! Tensors as plain values, and as the right factor of products.

use candle_core::Tensor;

use linalg::{Matrix, Packed};

/// A tensor `(out, in)` as the right factor of products: `x (T, in)` to `(T, out)`.
pub(super) fn pack(tensor: &Tensor) -> candle_core::Result<Packed> {
    let (rows, columns) = tensor.dims2()?;
    Ok(Packed::new(Matrix::new(&values(tensor)?, rows, columns).transposed()))
}

/// The values of a tensor as f32, row-major.
pub(super) fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()
}
