//! Symmetric int8.

/// The largest size of a number in symmetric int8.
pub(super) const INT8_LARGEST: f32 = 127.0;

/// The scale of symmetric int8 for some numbers: the largest of them becomes 127 or -127.
pub fn int8_scale(numbers: impl Iterator<Item = f32>) -> f32 {
    numbers.fold(0.0, |top: f32, number| top.max(number.abs())) / INT8_LARGEST
}

/// A number in steps of `scale`, nearest. A scale of zero means that all numbers are (or are so small that they round to it).
#[inline]
pub fn to_int8(number: f32, scale: f32) -> i8 {
    if scale == 0.0 {
        return 0;
    }
    (number / scale).round().clamp(-INT8_LARGEST, INT8_LARGEST) as i8
}

/// The whole number nearest to one between -128 and 127.
#[inline(always)]
pub fn nearest(number: f32) -> i8 {
    // Added to a number, it leaves the nearest whole one in the lowest bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    (number + ROUND).to_bits() as i8
}
