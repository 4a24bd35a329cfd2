//! Tensors as plain values, and as the right factor of products.

use candle_core::Tensor;

use linalg::{Matrix, Packed};

/// Tensors `(out, in)` of equal width, on top of each other, as the right factor of products: `x (T, in)` to `(T, out)`.
pub(super) fn pack(parts: &[Tensor]) -> candle_core::Result<Packed> {
    let tensor = match parts {
        [only] => only.clone(),
        _ => Tensor::cat(parts, 0)?,
    };
    let (rows, columns) = tensor.dims2()?;
    Ok(Packed::new(Matrix::new(&values(&tensor)?, rows, columns).transposed()))
}

/// The values of a tensor as f32, row-major.
pub(super) fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()
}
