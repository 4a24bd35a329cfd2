//! The payload and key codecs.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::store::piece::KeyData;
use linalg::ChannelQuantizer;

/// Standard normal values, times a factor per channel so that some channels are outliers, as keys have them.
fn gaussian(rows: usize, head_dim: usize, channel_factor: fn(usize) -> f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..rows * head_dim)
        .map(|i| {
            let radius = (-2.0 * rng.random_range(1e-7f32..1.0).ln()).sqrt();
            radius * (std::f32::consts::TAU * rng.random_range(0f32..1.0)).cos() * channel_factor(i % head_dim)
        })
        .collect()
}

/// Root of the mean square error over that of the values.
fn relative_error(want: &[f32], got: &[f32]) -> f32 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
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
    // Relative RMS. int8: a step is 1/127 of the largest of some tens of normal values (about 2.5), and the error
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
        |values: &[f32]| -> Vec<f32> { values.chunks_exact(head_dim).flat_map(|row| row[1..].to_vec()).collect() };
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

/// Keys `(m, D)` of a part, by its quantizer if there is one.
fn widened(part: KeyData<'_>, quantizer: Option<&ChannelQuantizer>, head_dim: usize) -> Vec<f32> {
    match part {
        KeyData::F16(values) => values.iter().map(|number| number.to_f32()).collect(),
        KeyData::Int8 { values, scales } => {
            let row = |(row, &scale): (&[i8], &f32)| match quantizer {
                Some(quantizer) => {
                    let mut wide = vec![f32::NAN; head_dim];
                    quantizer.decode(row, scale, &mut wide);
                    wide
                }
                None => row.iter().map(|&number| number as f32 * scale).collect(),
            };
            values.chunks_exact(values.len() / scales.len()).zip(scales.iter()).flat_map(row).collect()
        }
    }
}

#[test]
fn keys_come_back_per_layer_and_head() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (m, head_dim, pieces) = (5, 16, 6);
    let outliers = |channel| if channel == 3 { 40.0 } else { 1.0 };
    let keys: Vec<Vec<f32>> = (0..pieces).map(|_| gaussian(m, head_dim, outliers, &mut rng)).collect();
    let quantizers: Vec<ChannelQuantizer> = keys.iter().map(|keys| ChannelQuantizer::fit(keys, head_dim)).collect();
    for (dtype, by_channel, bound) in [(DType::F16, false, 3e-4), (DType::Int8, false, 4e-2), (DType::Int8, true, 4e-3)]
    {
        let layout = KeysLayout { dtype, keys: m, head_dim, pieces };
        let quantizer = |piece: usize| by_channel.then(|| &quantizers[piece]);
        let mut bytes = Vec::new();
        keys.iter().enumerate().for_each(|(piece, keys)| layout.encode(keys, quantizer(piece), &mut bytes));
        assert_eq!(bytes.len(), layout.bytes(by_channel));
        let parts = layout.decode(by_channel, &bytes).unwrap();
        assert_eq!(parts.len(), pieces);
        for (piece, (part, want)) in parts.zip(&keys).enumerate() {
            let error = relative_error(want, &widened(part, quantizer(piece), head_dim));
            assert!(error <= bound, "{dtype}, {by_channel}: {error}");
        }
        let short = layout.decode(by_channel, &bytes[1..]).map(drop);
        assert!(matches!(short, Err(StoreError::Invalid { .. })), "{short:?}");
    }
}

#[test]
fn quantizers_lie_before_the_keys_of_a_first_block_and_are_checked() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let layout = KeysLayout { dtype: DType::Int8, keys: 3, head_dim: 8, pieces: 2 };
    let keys = gaussian(3, 8, |_| 1.0, &mut rng);
    let quantizers = vec![ChannelQuantizer::fit(&keys, 8); 2];
    let mut rest = Vec::new();
    quantizers.iter().for_each(|quantizer| layout.encode(&keys, Some(quantizer), &mut rest));
    let mut first = Vec::new();
    layout.encode_quantizers(&quantizers, &mut first);
    first.extend_from_slice(&rest);
    assert_eq!(layout.split_quantizers(&first).unwrap(), (quantizers, &rest[..]));
    let plain = vec![0; layout.bytes(false)];
    assert_eq!(layout.split_quantizers(&plain).unwrap(), (vec![], &plain[..]), "begun in an older format");

    for (bytes, first_block, right) in [
        (&first, true, true),
        (&first, false, false),
        (&rest, true, false),
        (&rest, false, true),
        (&plain, true, true),
        (&plain, false, true),
    ] {
        assert_eq!(layout.check(first_block, bytes).is_ok(), right, "{} bytes, {first_block}", bytes.len());
    }
    first[..4].copy_from_slice(&0f32.to_le_bytes());
    assert!(matches!(layout.check(true, &first), Err(StoreError::Invalid { .. })));
}
