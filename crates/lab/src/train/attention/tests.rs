//! Attention against plain loops in double precision, value and gradients.

use super::*;
use candle_core::{Device, Var};
use rand::{RngExt, SeedableRng};

struct Case {
    sequences: usize,
    tokens: usize,
    past: usize,
    attention: Attention,
}

fn random(dims: (usize, usize, usize), seed: u64) -> Var {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let count = dims.0 * dims.1 * dims.2;
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.5..1.5)).collect();
    Var::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// Attention in plain loops and double precision, `sum(out * upstream)`.
fn plain_value(case: &Case, q: &[f64], k: &[f64], v: &[f64], upstream: &[f32]) -> f64 {
    let Attention { query_heads, kv_heads, head_dim: d, softmax } = case.attention;
    let (tokens, keys) = (case.tokens, case.past + case.tokens);
    let mut value = 0.0;
    for row in 0..case.sequences * tokens * query_heads {
        let (head, token) = (row % query_heads, row / query_heads % tokens);
        let sequence = row / query_heads / tokens;
        let key = |s: usize| ((sequence * keys + s) * kv_heads + head / (query_heads / kv_heads)) * d;
        let score = |s: usize| (0..d).map(|i| q[row * d + i] * k[key(s) + i]).sum::<f64>() / (d as f64).sqrt();
        let scores: Vec<f64> = (0..keys).map(score).collect();
        let weights = match softmax {
            Softmax::Plain => {
                let total: f64 = scores[..=case.past + token].iter().map(|s| s.exp()).sum();
                (0..keys).map(|s| if s <= case.past + token { scores[s].exp() / total } else { 0.0 }).collect()
            }
            Softmax::Grouped { block_tokens, dropout } => {
                let place = dropout.within(sequence * query_heads + head).within(token);
                grouped_weights(&scores, token, block_tokens, place)
            }
        };
        for (s, weight) in weights.iter().enumerate() {
            value += (0..d).map(|i| weight * v[key(s) + i] * upstream[row * d + i] as f64).sum::<f64>();
        }
    }
    value
}

/// Weights of a row of scores in double precision.
fn grouped_weights(scores: &[f64], token: usize, block_tokens: usize, dropout: GroupDropout) -> Vec<f64> {
    let visible = |s: usize| s <= token && (s % block_tokens != block_tokens - 1);
    let own = token / block_tokens;
    let landmark = |block: usize| scores[(block + 1) * block_tokens - 1].exp();
    let tokens_of = |block: usize| (block * block_tokens..(block + 1) * block_tokens).filter(|&s| visible(s));
    let own_sum: f64 = (own * block_tokens..=token).filter(|&s| visible(s)).map(|s| scores[s].exp()).sum();
    let total = own_sum + (0..own).map(landmark).sum::<f64>();
    let weight = |s: usize| {
        let block = s / block_tokens;
        if !visible(s) {
            0.0
        } else if block == own {
            scores[s].exp() / total
        } else {
            let inner: f64 = tokens_of(block).map(|s| scores[s].exp()).sum();
            dropout.factor(block) as f64 * landmark(block) / total * scores[s].exp() / inner
        }
    };
    (0..scores.len()).map(weight).collect()
}

fn check(case: Case) {
    let Attention { query_heads, kv_heads, head_dim, .. } = case.attention;
    let keys = case.past + case.tokens;
    let q = random((case.sequences, case.tokens, query_heads * head_dim), 1);
    let k = random((case.sequences, keys, kv_heads * head_dim), 2);
    let v = random((case.sequences, keys, kv_heads * head_dim), 3);
    let upstream = random((case.sequences, case.tokens, query_heads * head_dim), 4);
    let out = case.attention.clone().apply(q.as_tensor(), k.as_tensor(), v.as_tensor()).unwrap();
    let value = (out * upstream.as_tensor()).unwrap().sum_all().unwrap();
    let grads = value.backward().unwrap();

    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let upstream = flat(upstream.as_tensor());
    let wide = |x: &Var| flat(x.as_tensor()).into_iter().map(f64::from).collect::<Vec<f64>>();
    let inputs = [wide(&q), wide(&k), wide(&v)];
    let plain = |inputs: &[Vec<f64>; 3]| plain_value(&case, &inputs[0], &inputs[1], &inputs[2], &upstream);
    let got = value.to_scalar::<f32>().unwrap() as f64;
    let want = plain(&inputs);
    assert!((got - want).abs() < 1e-4 * want.abs().max(10.0), "{:?}: {got} {want}", case.attention);

    for (which, var) in [&q, &k, &v].into_iter().enumerate() {
        let found = flat(grads.get(var.as_tensor()).unwrap());
        // Some of many, at a step that reaches every dimension, head and token.
        let step = (found.len() / 40) | 1;
        for at in (0..found.len()).step_by(step).chain(found.len().saturating_sub(3)..found.len()) {
            let shifted = |by: f64| {
                let mut inputs = inputs.clone();
                inputs[which][at] += by;
                plain(&inputs)
            };
            let want = (shifted(1e-4) - shifted(-1e-4)) / 2e-4;
            let got = found[at] as f64;
            let name = ["q", "k", "v"][which];
            assert!((got - want).abs() < 2e-5 * want.abs().max(1.0), "{:?} {name} {at}: {got} {want}", case.attention);
        }
    }
}

fn attention(query_heads: usize, kv_heads: usize, head_dim: usize, softmax: Softmax) -> Attention {
    Attention { query_heads, kv_heads, head_dim, softmax }
}

#[test]
fn plain_attention_agrees_with_double_precision_at_tile_edges_and_with_a_past() {
    for (tokens, past) in [(1, 0), (5, 3), (63, 0), (64, 0), (65, 0), (2, 40)] {
        check(Case { sequences: 2, tokens, past, attention: attention(4, 2, 4, Softmax::Plain) });
    }
    check(Case { sequences: 1, tokens: 130, past: 0, attention: attention(1, 1, 3, Softmax::Plain) });
    check(Case { sequences: 1, tokens: 3, past: 0, attention: attention(130, 1, 2, Softmax::Plain) });
}

#[test]
fn grouped_attention_agrees_with_double_precision_at_block_and_tile_edges() {
    for dropout in [GroupDropout::NONE, GroupDropout { rate: 0.3, seed: 3 }] {
        for tokens in [1, 6, 7, 8, 14, 63, 64, 65] {
            let softmax = Softmax::Grouped { block_tokens: 7, dropout };
            check(Case { sequences: 2, tokens, past: 0, attention: attention(4, 2, 4, softmax) });
        }
    }
    let softmax = Softmax::Grouped { block_tokens: 17, dropout: GroupDropout::NONE };
    check(Case { sequences: 1, tokens: 51, past: 0, attention: attention(3, 3, 5, softmax) });
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let (q, k, long) = (random((1, 4, 8), 1), random((1, 4, 4), 2), random((1, 6, 4), 3));
    let softmax = Softmax::Grouped { block_tokens: 4, dropout: GroupDropout::NONE };
    let apply = |attention: Attention, k: &Var| attention.apply(q.as_tensor(), k.as_tensor(), k.as_tensor());
    assert!(apply(attention(4, 2, 2, Softmax::Plain), &long).is_ok());
    assert!(apply(attention(4, 2, 2, softmax), &long).is_err(), "landmarks know no past");
    assert!(apply(attention(2, 2, 2, softmax), &k).is_err());
}
