//! Stored elements (f16, bf16, int8) widened to f32.

use half::{bf16, f16};

/// Elements that are widened together: one AVX-512 register of f32.
pub const HALVES: usize = 16;

/// Widens f16 to f32, exactly; with F16C if `FMA`. The result for infinities differs between machines: check input before
/// it is stored.
#[inline(always)]
pub fn widen<const FMA: bool>(halves: &[f16; HALVES]) -> [f32; HALVES] {
    #[cfg(target_arch = "x86_64")]
    if FMA {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
        let mut wide = [0.0; HALVES];
        for (halves, wide) in halves.as_chunks::<8>().0.iter().zip(wide.as_chunks_mut::<8>().0) {
            // SAFETY: `simd!` sets FMA only where it enables F16C too, and both sides have eight elements.
            unsafe { _mm256_storeu_ps(wide.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()))) };
        }
        return wide;
    }
    halves.map(widen_one)
}

/// Widens one f16 by arithmetic, which vectorises. Infinities become large values.
#[inline(always)]
pub(super) fn widen_one(half: f16) -> f32 {
    let bits = half.to_bits() as u32;
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000); // 2^112
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// An element type of a [`Matrix`](crate::Matrix) that [`gemv`](crate::gemv) widens as it reads.
pub trait Element: Copy + Send + Sync + 'static {
    /// To f32, exactly.
    fn widen<const FMA: bool>(elements: &[Self; HALVES]) -> [f32; HALVES];

    /// One element to f32, exactly.
    fn widen_one(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen<const FMA: bool>(elements: &[f32; HALVES]) -> [f32; HALVES] {
        *elements
    }

    #[inline(always)]
    fn widen_one(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen<const FMA: bool>(elements: &[f16; HALVES]) -> [f32; HALVES] {
        widen::<FMA>(elements)
    }

    #[inline(always)]
    fn widen_one(self) -> f32 {
        widen_one(self)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<const FMA: bool>(elements: &[bf16; HALVES]) -> [f32; HALVES] {
        elements.map(Element::widen_one)
    }

    #[inline(always)]
    fn widen_one(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
}

impl Element for i8 {
    #[inline(always)]
    fn widen<const FMA: bool>(elements: &[i8; HALVES]) -> [f32; HALVES] {
        elements.map(Element::widen_one)
    }

    #[inline(always)]
    fn widen_one(self) -> f32 {
        self as f32
    }
}

simd! {
    /// Widens f16 to f32, slices of equal length.
    pub fn widen_f16(halves: &[f16], out: &mut [f32]) {
        debug_assert_eq!(halves.len(), out.len());
        let ((halves, rest), (wide, wide_rest)) = (halves.as_chunks(), out.as_chunks_mut());
        for (wide, halves) in wide.iter_mut().zip(halves) {
            *wide = widen::<FMA>(halves);
        }
        for (wide, half) in wide_rest.iter_mut().zip(rest) {
            *wide = widen_one(*half);
        }
    }
}

simd! {
    /// `out[i] = bytes[i] * scale` for slices of equal length.
    pub fn widen_int8(bytes: &[i8], scale: f32, out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len());
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = *byte as f32 * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_half_float_widens_exactly() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|h| h.is_finite()).collect();
        let mut wide = vec![0f32; halves.len()];
        widen_f16(&halves, &mut wide);
        for (half, wide) in halves.iter().zip(&wide) {
            assert_eq!(half.to_f32().to_bits(), wide.to_bits(), "{half:?}");
        }
    }

    #[test]
    fn bytes_widen_with_their_scale() {
        let bytes: Vec<i8> = (-128..=127).collect();
        let mut wide = vec![0f32; 256];
        widen_int8(&bytes, 0.5, &mut wide);
        assert!(bytes.iter().zip(&wide).all(|(b, w)| *b as f32 * 0.5 == *w));
    }

    #[test]
    fn every_element_widens_exactly() {
        let bytes: Vec<i8> = (i8::MIN..=i8::MAX).collect();
        for bytes in bytes.as_chunks().0 {
            assert_eq!(<i8 as Element>::widen::<false>(bytes), bytes.map(f32::from));
        }
        let halves: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|half| !half.is_nan()).collect();
        for halves in halves.as_chunks().0 {
            assert_eq!(<bf16 as Element>::widen::<false>(halves), halves.map(bf16::to_f32));
        }
    }
}
