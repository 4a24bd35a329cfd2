//! The bridge for other candle models.

use candle_core::{DType, Device, Result, Tensor};

use landmarkdb::SequenceAttention;

/// [`SequenceAttention::attend`] on tensors as candle models hold them: `q (1, Hq, T, D)`, `k` and `v (1, Hkv, T, D)`,
/// before RoPE, of any float dtype and device. Returns `(1, Hq, T, D)` of `q`'s dtype and device.
///
/// # Errors
/// Shapes that disagree with the model the attention was made for, and failures of the memory.
pub fn attend_tensors(
    attention: &mut dyn SequenceAttention,
    layer: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor> {
    let (batch, query_heads, tokens, head_dim) = q.dims4()?;
    if batch != 1 {
        candle_core::bail!("attention with memory is one sequence at a time: expected batch 1, found {batch}");
    }
    let flat = |x: &Tensor| {
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        x.transpose(1, 2)?.flatten_all()?.to_vec1::<f32>()
    };
    let out = attention.attend(layer, tokens, &flat(q)?, &flat(k)?, &flat(v)?).map_err(candle_core::Error::wrap)?;
    let out = Tensor::from_vec(out, (1, tokens, query_heads, head_dim), &Device::Cpu)?;
    out.transpose(1, 2)?.contiguous()?.to_dtype(q.dtype())?.to_device(q.device())
}
