//! The payload and key codecs.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::store::piece::{KeyNumbers, decode_keys, encode_keys};

/// Standard normal numbers, times a factor per channel so that some channels are outliers, as keys have them.
fn gaussian(rows: usize, head_dim: usize, channel_factor: fn(usize) -> f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..rows * head_dim)
        .map(|i| {
            let radius = (-2.0 * rng.random_range(1e-7f32..1.0).ln()).sqrt();
            radius * (std::f32::consts::TAU * rng.random_range(0f32..1.0)).cos() * channel_factor(i % head_dim)
        })
        .collect()
}

/// Root of the mean square error over that of the numbers.
fn relative_error(want: &[f32], got: &[f32]) -> f32 {
    let square = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| x * x).sum::<f32>();
    (square(&mut want.iter().zip(got).map(|(a, b)| a - b)) / square(&mut want.iter().copied())).sqrt()
}

fn round_trip(layout: PieceLayout, k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    // One byte in front, so that nothing is aligned.
    let mut bytes = vec![0];
    layout.encode(k, v, &mut bytes);
    assert_eq!(bytes.len() - 1, layout.bytes(), "{layout:?}");
    let (mut k_back, mut v_back) = (vec![f32::NAN; k.len()], vec![f32::NAN; v.len()]);
    layout.decode_k(&bytes[1..], &mut k_back);
    layout.decode_v(&bytes[1..], &mut v_back);
    let aligned = bytes[1..].to_vec();
    let mut again = vec![f32::NAN; k.len()];
    layout.decode_k(&aligned, &mut again);
    assert_eq!(again, k_back, "alignment changes nothing");
    (k_back, v_back)
}

#[test]
fn payload_errors_stay_within_their_dtype() {
    // Relative RMS. int8: a step is 1/127 of the largest of some tens of normal numbers (about 2.5), and the error
    // of rounding is a step / sqrt(12): 0.0057.
    let bounds = [(DType::F32, 0.0), (DType::F16, 3e-4), (DType::BF16, 2.4e-3), (DType::Int8, 8e-3)];
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (tokens, head_dim) in [(1, 8), (17, 32), (64, 64), (64, 128)] {
        let k = gaussian(tokens, head_dim, |channel| if channel % 16 == 3 { 40.0 } else { 1.0 }, &mut rng);
        let v = gaussian(tokens, head_dim, |_| 1.0, &mut rng);
        for (dtype, bound) in bounds {
            let (k_back, v_back) = round_trip(PieceLayout { dtype, tokens, head_dim }, &k, &v);
            for (what, error) in [("K", relative_error(&k, &k_back)), ("V", relative_error(&v, &v_back))] {
                assert!(error <= bound, "{what} ({tokens}, {head_dim}) in {dtype}: {error} > {bound}");
            }
        }
    }
}

#[test]
fn an_outlier_channel_does_not_drown_the_others() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (tokens, head_dim) = (64, 32);
    let k = gaussian(tokens, head_dim, |channel| if channel == 0 { 1000.0 } else { 1.0 }, &mut rng);
    let layout = PieceLayout { dtype: DType::Int8, tokens, head_dim };
    let (k_back, _) = round_trip(layout, &k, &k);
    let rest =
        |numbers: &[f32]| -> Vec<f32> { numbers.chunks_exact(head_dim).flat_map(|row| row[1..].to_vec()).collect() };
    let error = relative_error(&rest(&k), &rest(&k_back));
    assert!(error < 8e-3, "{error}");
}

#[test]
fn zeros_and_the_extremes_are_exact_in_int8() {
    let layout = PieceLayout { dtype: DType::Int8, tokens: 2, head_dim: 3 };
    let k = [0.0, 127.0, -2.0, 0.0, -127.0, 1.0];
    let v = [0.0, 0.0, 0.0, 12.7, -12.7, 0.1];
    let (k_back, v_back) = round_trip(layout, &k, &v);
    assert_eq!(k_back[..2], k[..2]);
    assert_eq!(k_back[3..5], k[3..5]);
    assert_eq!(v_back[..3], v[..3]);
    assert!((v_back[5] - 0.1).abs() < 1e-6, "{v_back:?}");
}

#[test]
fn keys_come_back_per_layer_and_head() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (m, head_dim, count) = (5, 12, 6);
    let keys: Vec<Vec<f32>> = (0..count).map(|_| gaussian(m, head_dim, |_| 3.0, &mut rng)).collect();
    for (dtype, bound) in [(DType::F16, 3e-4), (DType::Int8, 8e-3)] {
        let mut bytes = Vec::new();
        keys.iter().for_each(|keys| encode_keys(dtype, m, head_dim, keys, &mut bytes));
        assert_eq!(bytes.len(), count * keys_bytes(dtype, m, head_dim));
        let parts = decode_keys(dtype, m, head_dim, count, &bytes).unwrap();
        assert_eq!(parts.len(), count);
        for (part, want) in parts.zip(&keys) {
            let got: Vec<f32> = match part {
                KeyNumbers::F16(numbers) => numbers.iter().map(|number| number.to_f32()).collect(),
                KeyNumbers::Int8 { numbers, scales } => {
                    let row = |(row, scale): (&[i8], &f32)| row.iter().map(|&n| n as f32 * scale).collect::<Vec<f32>>();
                    numbers.chunks_exact(head_dim).zip(scales.iter()).flat_map(row).collect()
                }
            };
            let error = relative_error(want, &got);
            assert!(error <= bound, "{dtype}: {error}");
        }
        let short = decode_keys(dtype, m, head_dim, count, &bytes[1..]).map(drop);
        assert!(matches!(short, Err(StoreError::Invalid { .. })), "{short:?}");
    }
}
