//! Symmetric int8: values in steps of a scale, -127 to 127.

/// The largest step, either way.
pub(super) const INT8_LARGEST: f32 = 127.0;

/// The scale that maps the largest magnitude to 127.
pub fn int8_scale(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |top: f32, value| top.max(value.abs())) / INT8_LARGEST
}

/// The nearest step of `scale`, clamped to -127 to 127. A scale of 0 gives 0: all values were 0, or too small for a scale.
#[inline]
pub fn to_int8(value: f32, scale: f32) -> i8 {
    if scale == 0.0 {
        return 0;
    }
    (value / scale).round().clamp(-INT8_LARGEST, INT8_LARGEST) as i8
}

/// The nearest integer to a value in -128 to 127, ties to even; without a call, so that loops vectorise.
#[inline(always)]
pub fn nearest(value: f32) -> i8 {
    // Adding it leaves the nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    (value + ROUND).to_bits() as i8
}
