//! Each operation against its formula in double precision, value and gradient.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use rand::{RngExt, SeedableRng};

use super::*;
use landmarkdb::Rope;

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Compares `op`'s value, and the gradient of `sum(value * upstream)` in every input, with `formula` and its central
/// differences.
fn check(
    inputs: &[(&[usize], u64)],
    op: impl Fn(&[&Tensor]) -> candle_core::Result<Tensor>,
    formula: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|&(dims, seed)| Var::from_vec(random(dims.iter().product(), seed), dims, &Device::Cpu).unwrap())
        .collect();
    let tensors: Vec<&Tensor> = vars.iter().map(|var| var.as_tensor()).collect();
    let mut wide: Vec<Vec<f64>> = tensors.iter().map(|x| flat(x).into_iter().map(f64::from).collect()).collect();

    let value = op(&tensors).unwrap();
    let want = formula(&wide);
    assert_eq!(value.elem_count(), want.len());
    for (got, want) in flat(&value).iter().zip(&want) {
        assert!((*got as f64 - want).abs() < 1e-5 * want.abs().max(1.0), "{got} {want}");
    }

    let upstream = random(want.len(), 77);
    let upstream_tensor = Tensor::from_slice(&upstream, value.shape(), &Device::Cpu).unwrap();
    let grads = (value * upstream_tensor).unwrap().sum_all().unwrap().backward().unwrap();
    let sum = |inputs: &[Vec<f64>]| -> f64 {
        formula(inputs).iter().zip(&upstream).map(|(value, g)| value * *g as f64).sum()
    };
    for which in 0..wide.len() {
        let found = flat(grads.get(tensors[which]).unwrap());
        for at in (0..found.len()).step_by((found.len() / 50) | 1) {
            let kept = wide[which][at];
            let mut shifted = |by: f64| {
                wide[which][at] = kept + by;
                let value = sum(&wide);
                wide[which][at] = kept;
                value
            };
            let want = (shifted(1e-4) - shifted(-1e-4)) / 2e-4;
            let got = found[at] as f64;
            assert!((got - want).abs() < 2e-5 * want.abs().max(1.0), "input {which}, number {at}: {got} {want}");
        }
    }
}

#[test]
fn linear_multiplies_with_the_transposed_weights() {
    for (rows, ins, outs) in [(1, 1, 1), (3, 5, 7), (31, 33, 33), (65, 3, 64)] {
        let product = |inputs: &[Vec<f64>]| {
            let (x, w) = (&inputs[0], &inputs[1]);
            let number = |at: usize| (0..ins).map(|i| x[at / outs * ins + i] * w[at % outs * ins + i]).sum();
            (0..rows * outs).map(number).collect()
        };
        check(&[(&[1, rows, ins], 1), (&[outs, ins], 2)], |x| linear(x[0], x[1]), product);
    }
}

#[test]
fn rms_norm_divides_by_the_root_of_the_mean_square() {
    for (rows, hidden) in [(1, 1), (3, 37), (130, 8)] {
        let norm = |inputs: &[Vec<f64>]| {
            let rows = inputs[0].chunks(hidden);
            let norm = |x: &[f64]| {
                let scale = (x.iter().map(|x| x * x).sum::<f64>() / hidden as f64 + 1e-3).sqrt();
                x.iter().zip(&inputs[1]).map(|(x, w)| x / scale * w).collect::<Vec<f64>>()
            };
            rows.flat_map(norm).collect()
        };
        check(&[(&[rows, hidden], 1), (&[hidden], 2)], |x| rms_norm(x[0], x[1], 1e-3), norm);
    }
}

#[test]
fn swiglu_gates() {
    for count in [1, 7, 20_000] {
        let gated = |inputs: &[Vec<f64>]| {
            inputs[0].iter().zip(&inputs[1]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
        };
        check(&[(&[count], 1), (&[count], 2)], |x| swiglu(x[0], x[1]), gated);
    }
}

#[test]
fn heads_rotate_by_their_tokens_position() {
    let rope = Rope::from_base(100.0, 4);
    let positions: Vec<u32> = (0..70).map(|token| token * 3 + 5).collect();
    let rotations = Arc::new(Rotations::new(&rope, &positions));
    let rotated = |inputs: &[Vec<f64>]| {
        let mut x = inputs[0].clone();
        for (row, x) in x.chunks_mut(6).enumerate() {
            for i in 0..2 {
                let (sin, cos) = (rope.frequencies[i] as f64 * positions[row / 2] as f64).sin_cos();
                (x[i], x[i + 2]) = (x[i] * cos - x[i + 2] * sin, x[i + 2] * cos + x[i] * sin);
            }
        }
        x
    };
    check(&[(&[2, 35, 12], 1)], |x| rotate(x[0], &rotations, 6), rotated);
}

#[test]
fn embeddings_are_rows_and_their_gradients_add_up() {
    let ids: Arc<[u32]> = [3, 0, 3, 3, 1, 4].into();
    let rows = |inputs: &[Vec<f64>]| ids.iter().flat_map(|&id| inputs[0][id as usize * 3..][..3].to_vec()).collect();
    check(&[(&[5, 3], 1)], |x| embed(x[0], ids.clone(), 2), rows);
}

#[test]
fn cross_entropy_weighs_rows_and_skips_those_of_weight_0() {
    let (rows, vocab) = (70, 9);
    let ids: Arc<[u32]> = (0..rows as u32).map(|row| if row % 4 == 0 { u32::MAX } else { row % 9 }).collect();
    let weights: Arc<[f32]> = (0..rows).map(|row| (row % 4) as f32).collect();
    let targets = Targets { ids: ids.clone(), weights: weights.clone() };
    let loss = |inputs: &[Vec<f64>]| {
        let rows =
            inputs[0].chunks(vocab).zip(ids.iter().zip(weights.iter())).filter(|(_, (_, weight))| **weight > 0.0);
        let nll = |row: &[f64], id: u32| row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[id as usize];
        let sum: f64 = rows.map(|(row, (&id, &weight))| weight as f64 * nll(row, id)).sum();
        vec![sum / weights.iter().map(|weight| *weight as f64).sum::<f64>()]
    };
    check(&[(&[2, rows / 2, vocab], 1)], |x| cross_entropy(x[0], targets.clone()), loss);

    let logits = Tensor::zeros((1, 1, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    let outside = Targets { ids: [4].into(), weights: [1.0].into() };
    assert!(cross_entropy(&logits, outside).is_err());
    let misfit = Targets { ids: [1, 2].into(), weights: [1.0, 1.0].into() };
    assert!(cross_entropy(&logits, misfit).is_err());
}

#[test]
fn what_is_frozen_gets_no_gradient() {
    let frozen = |dims: &[usize]| Tensor::from_vec(random(dims.iter().product(), 3), dims, &Device::Cpu).unwrap();
    let trained = |dims: &[usize]| Var::from_tensor(&frozen(dims)).unwrap();
    type Op = fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>;
    let cases: [(Op, &[usize]); 2] = [(linear, &[5, 4]), (|x, weight| rms_norm(x, weight, 1e-3), &[4])];
    for (op, dims) in cases {
        let (x, weight) = (trained(&[3, 4]), trained(dims));
        let sum = |x: &Tensor, weight: &Tensor| op(x, weight).unwrap().sqr().unwrap().sum_all().unwrap();
        let both = sum(&x, &weight).backward().unwrap();
        let still = weight.as_detached_tensor();
        let of_x = sum(&x, &still).backward().unwrap();
        assert_eq!(flat(of_x.get(x.as_tensor()).unwrap()), flat(both.get(x.as_tensor()).unwrap()));
        assert!(of_x.get(&still).is_none());
        let still = x.as_detached_tensor();
        let of_weight = sum(&still, &weight).backward().unwrap();
        assert_eq!(flat(of_weight.get(weight.as_tensor()).unwrap()), flat(both.get(weight.as_tensor()).unwrap()));
        assert!(of_weight.get(&still).is_none());
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(linear(&zeros(&[2, 3]), &zeros(&[4, 5])).is_err());
    assert!(rms_norm(&zeros(&[2, 3]), &zeros(&[2]), 0.0).is_err());
    assert!(swiglu(&zeros(&[2]), &zeros(&[3])).is_err());
    let rotations = Arc::new(Rotations::new(&Rope::from_base(10.0, 2), &[1, 2]));
    assert!(rotate(&zeros(&[1, 3, 2]), &rotations, 2).is_err());
    assert!(embed(&zeros(&[2, 3]), [2].into(), 1).is_err());
}
