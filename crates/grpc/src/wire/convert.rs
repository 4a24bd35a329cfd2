//! What every conversion needs: absent messages, enum numbers, raw values, tensors.

use bytes::Bytes;

use super::v1;
use landmarkdb::{BlockScore, DType, Granularity, KeyRule, MemoryError, Normalisation, Result, Tensor};

pub(super) fn missing(field: &str) -> MemoryError {
    MemoryError::Missing { field: field.into() }
}

pub(super) fn invalid(field: &str, expected: impl Into<String>, found: impl ToString) -> MemoryError {
    MemoryError::Invalid { field: field.into(), expected: expected.into(), found: found.to_string() }
}

/// A message field that must be there.
pub(super) fn required<T>(field: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| missing(field))
}

/// `values` as little-endian bytes.
pub(super) fn bytes_of_f32(values: &[f32]) -> Bytes {
    let mut bytes = vec![0u8; values.len() * 4];
    for (bytes, number) in bytes.chunks_exact_mut(4).zip(values) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    bytes.into()
}

/// Little-endian bytes as values; NaN passes.
pub(super) fn f32_of_bytes(field: &str, bytes: &[u8]) -> Result<Vec<f32>> {
    if !bytes.len().is_multiple_of(4) {
        return Err(invalid(field, "a multiple of 4 bytes", format!("{} bytes", bytes.len())));
    }
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A SHA-256.
pub(super) fn digest(field: &str, bytes: &[u8]) -> Result<[u8; 32]> {
    bytes.try_into().map_err(|_| invalid(field, "32 bytes", format!("{} bytes", bytes.len())))
}

/// An enum field as prost gives it: a bare number that may be anything.
pub(super) trait FromNumber: Sized {
    fn from_number(field: &str, number: i32) -> Result<Self>;
}

/// Both ways for each enum. A variant that has no number yet is sent as the one behind `_`, which its receiver refuses.
macro_rules! enums {
    ($($type:ident = $wire:ident { $($variant:ident = $wire_variant:ident),+ $(, _ = $unknown:ident)? })+) => {$(
        impl From<$type> for v1::$wire {
            fn from(value: $type) -> Self {
                match value {
                    $($type::$variant => v1::$wire::$wire_variant,)+
                    $(_ => v1::$wire::$unknown,)?
                }
            }
        }

        impl FromNumber for $type {
            fn from_number(field: &str, number: i32) -> Result<Self> {
                match v1::$wire::try_from(number) {
                    $(Ok(v1::$wire::$wire_variant) => Ok($type::$variant),)+
                    Ok(v1::$wire::Unspecified) => Err(missing(field)),
                    Err(_) => Err(invalid(field, concat!("a number of ", stringify!($wire)), number)),
                }
            }
        }
    )+};
}

enums! {
    DType = Dtype { F32 = F32, F16 = F16, BF16 = Bf16, Int8 = Int8 }
    KeyRule = KeyRule { Landmark = Landmark, Tokens = Tokens, Mean = Mean }
    BlockScore = BlockScore { Max = Max, LogSumExp = LogSumExp, _ = Unspecified }
    Granularity = Granularity {
        TokenHead = TokenHead, Head = Head, Token = Token, KvGroup = KvGroup, Shared = Shared, _ = Unspecified
    }
    Normalisation = Normalisation { Plain = Plain, Grouped = Grouped, Hidden = Hidden, _ = Unspecified }
}

/// The tensor called `field`, its byte count checked against its shape. Copies no values.
pub(super) fn tensor(field: &str, wire: Option<v1::Tensor>) -> Result<Tensor> {
    /// (L, Hkv, tokens, D) is the deepest.
    const AXES_MAX: usize = 4;

    let wire = required(field, wire)?;
    let dtype = DType::from_number(&format!("{field}.dtype"), wire.dtype)?;
    if dtype == DType::Int8 {
        return Err(invalid(&format!("{field}.dtype"), "f32, f16 or bf16", dtype));
    }
    if wire.shape.len() > AXES_MAX {
        return Err(invalid(field, format!("at most {AXES_MAX} axes"), format!("{} axes", wire.shape.len())));
    }
    // Any four axes of u32 fit u128; the size of a number does too unless all are at their end.
    let elements = wire.shape.iter().fold(1u128, |product, &axis| product.saturating_mul(axis.into()));
    let expected_bytes = elements.saturating_mul(dtype.size_bytes() as u128);
    if wire.data.len() as u128 != expected_bytes {
        let expected = format!("{expected_bytes} bytes of {dtype} for shape {:?}", wire.shape);
        return Err(invalid(field, expected, format!("{} bytes", wire.data.len())));
    }
    Ok(Tensor { dtype, shape: wire.shape, data: wire.data })
}

impl From<Tensor> for v1::Tensor {
    fn from(tensor: Tensor) -> Self {
        v1::Tensor { dtype: v1::Dtype::from(tensor.dtype).into(), shape: tensor.shape, data: tensor.data }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(dtype: i32, shape: &[u32], data_bytes: usize) -> Option<v1::Tensor> {
        Some(v1::Tensor { dtype, shape: shape.to_vec(), data: vec![0; data_bytes].into() })
    }

    #[test]
    fn tensors_are_taken_only_when_bytes_and_shape_agree() {
        const F32: i32 = v1::Dtype::F32 as i32;
        const F16: i32 = v1::Dtype::F16 as i32;
        const INT8: i32 = v1::Dtype::Int8 as i32;
        for (given, refused_field) in [
            (wire(F32, &[2, 3], 24), None),
            (wire(F16, &[2, 3], 12), None),
            (wire(F32, &[], 4), None),
            (wire(F32, &[0, u32::MAX], 0), None),
            (wire(F32, &[2, 3], 23), Some("k")),
            (wire(F32, &[2, 3], 28), Some("k")),
            (wire(F16, &[2, 3], 24), Some("k")),
            (wire(F32, &[u32::MAX; 4], 16), Some("k")),
            (wire(F32, &[1 << 31, 1 << 31, 4], 0), Some("k")),
            (wire(F32, &[1; 5], 4), Some("k")),
            (wire(INT8, &[2], 2), Some("k.dtype")),
            (wire(99, &[2], 2), Some("k.dtype")),
        ] {
            let case = format!("{given:?}");
            match (tensor("k", given), refused_field) {
                (Ok(_), None) => {}
                (Err(MemoryError::Invalid { field, .. }), Some(expected)) => assert_eq!(field, expected, "{case}"),
                (answer, _) => panic!("{case}: {answer:?}"),
            }
        }
        assert_eq!(tensor("k", None), Err(missing("k")));
        assert_eq!(tensor("k", wire(0, &[], 4)), Err(missing("k.dtype")));
    }

    #[test]
    fn numbers_keep_their_bits() {
        let values = [0.0, -0.0, 1.5, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7fc0_1234), f32::MIN_POSITIVE];
        let back = f32_of_bytes("x", &bytes_of_f32(&values)).unwrap();
        assert!(values.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()), "{back:?}");
        assert!(matches!(f32_of_bytes("x", &[0; 7]), Err(MemoryError::Invalid { .. })));
    }
}
