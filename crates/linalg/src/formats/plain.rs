//! The judge: what blocks stand for, one value at a time and in double precision, in the order of GGML's specification.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::BlockFormat;

/// Where the f16 factors of a block are, or the value that it is.
pub(crate) fn factors(format: BlockFormat) -> &'static [usize] {
    match format {
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
        BlockFormat::Q2K => &[80, 82],
        BlockFormat::Q3K => &[108],
        BlockFormat::Q6K => &[208],
        _ => &[0],
    }
}

/// Blocks of random bytes, with factors as models have them.
pub(crate) fn random_blocks(format: BlockFormat, count: usize, seed: u64) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut blocks: Vec<u8> = (0..count * format.bytes()).map(|_| rng.random()).collect();
    for block in blocks.chunks_exact_mut(format.bytes()) {
        for &at in factors(format) {
            let factor = rng.random_range(-0.02..0.02f32);
            let bytes = match format {
                BlockFormat::Bf16 => bf16::from_f32(factor).to_le_bytes(),
                _ => f16::from_f32(factor).to_le_bytes(),
            };
            block[at..][..2].copy_from_slice(&bytes);
        }
    }
    blocks
}

/// The values of whole blocks.
pub(crate) fn plain(format: BlockFormat, blocks: &[u8]) -> Vec<f64> {
    blocks.chunks_exact(format.bytes()).flat_map(|block| plain_block(format, block)).collect()
}

fn plain_block(format: BlockFormat, b: &[u8]) -> Vec<f64> {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f64();
    match format {
        BlockFormat::F16 => vec![half(0)],
        BlockFormat::Bf16 => vec![bf16::from_le_bytes([b[0], b[1]]).to_f64()],
        BlockFormat::Q4_0 => (0..32).map(|i| half(0) * (nibble(&b[2..], i) - 8.0)).collect(),
        BlockFormat::Q4_1 => (0..32).map(|i| half(0) * nibble(&b[4..], i) + half(2)).collect(),
        BlockFormat::Q5_0 => (0..32).map(|i| half(0) * (nibble(&b[6..], i) + fifth(&b[2..], i) - 16.0)).collect(),
        BlockFormat::Q5_1 => (0..32).map(|i| half(0) * (nibble(&b[8..], i) + fifth(&b[4..], i)) + half(2)).collect(),
        BlockFormat::Q8_0 => (0..32).map(|i| half(0) * (b[2 + i] as i8) as f64).collect(),
        BlockFormat::Iq4Nl => (0..32).map(|i| half(0) * TABLE[nibble(&b[2..], i) as usize]).collect(),
        BlockFormat::Q2K => (0..256)
            .map(|i| {
                let (scales, quant) = (b[i / 16], b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3);
                half(80) * (scales & 15) as f64 * quant as f64 - half(82) * (scales >> 4) as f64
            })
            .collect(),
        BlockFormat::Q3K => (0..256)
            .map(|i| {
                let third = if b[i % 32] >> (i / 32) & 1 == 1 { 0.0 } else { 4.0 };
                let quant = (b[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3) as f64 - third;
                half(108) * (q3_scales(&b[96..108])[i / 16] - 32.0) * quant
            })
            .collect(),
        BlockFormat::Q4K => (0..256)
            .map(|i| {
                let (scale, min) = q4_scale_and_min(&b[4..16], i / 32);
                let byte = b[16 + i / 64 * 32 + i % 32];
                let quant = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
                half(0) * scale * quant as f64 - half(2) * min
            })
            .collect(),
        BlockFormat::Q5K => (0..256)
            .map(|i| {
                let (scale, min) = q4_scale_and_min(&b[4..16], i / 32);
                let byte = b[48 + i / 64 * 32 + i % 32];
                let quant = if i % 64 < 32 { byte & 15 } else { byte >> 4 } + (b[16 + i % 32] >> (i / 32) & 1) * 16;
                half(0) * scale * quant as f64 - half(2) * min
            })
            .collect(),
        BlockFormat::Q6K => (0..256)
            .map(|i| {
                let byte = b[i / 128 * 64 + i % 64];
                let lower = if i % 128 < 64 { byte & 15 } else { byte >> 4 };
                let upper = b[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
                half(208) * (b[192 + i / 16] as i8) as f64 * ((lower + upper * 16) as f64 - 32.0)
            })
            .collect(),
        BlockFormat::Iq4Xs => (0..256)
            .map(|i| {
                let group = i / 32;
                let upper = u16::from_le_bytes([b[2], b[3]]) >> (2 * group) & 3;
                let lower = b[4 + group / 2] >> (group % 2 * 4) & 15;
                let scale = (lower as f64) + (upper * 16) as f64 - 32.0;
                half(0) * scale * TABLE[nibble(&b[8 + group * 16..], i % 32) as usize]
            })
            .collect(),
    }
}

const TABLE: [f64; 16] = [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];

fn nibble(bytes: &[u8], i: usize) -> f64 {
    (if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }) as f64
}

fn fifth(bytes: &[u8], i: usize) -> f64 {
    ((bytes[i / 8] >> (i % 8) & 1) * 16) as f64
}

fn q4_scale_and_min(q: &[u8], j: usize) -> (f64, f64) {
    let (scale, min) = match j {
        0..4 => (q[j] & 63, q[j + 4] & 63),
        _ => (q[j + 4] & 15 | (q[j - 4] >> 6) << 4, q[j + 4] >> 4 | (q[j] >> 6) << 4),
    };
    (scale as f64, min as f64)
}

/// As GGML shuffles them, four at a time.
fn q3_scales(bytes: &[u8]) -> Vec<f64> {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let (a, b, upper) = (word(0), word(4), word(8));
    let (two, four) = (0x0303_0303, 0x0f0f_0f0f);
    let words = [
        a & four | (upper & two) << 4,
        b & four | (upper >> 2 & two) << 4,
        a >> 4 & four | (upper >> 4 & two) << 4,
        b >> 4 & four | (upper >> 6 & two) << 4,
    ];
    words.iter().flat_map(|word| word.to_le_bytes()).map(f64::from).collect()
}
