//! The grouped softmax of landmark attention, one row of scores at a time (Mohtashami and Jaggi 2023, section 3.1).
//!
//! Keys are cut into blocks of `B` tokens, each closed by its landmark. The query at row `t` sees the tokens of its own
//! block up to itself, never that block's landmark (a landmark's own query therefore sees the `B - 1` tokens before it
//! and not itself), and all earlier blocks. With scores `s` and block `c`:
//!
//! ```text
//! p = softmax over {own block's visible tokens} and {landmarks of earlier blocks}
//! weight of an own token j                   p_j
//! weight of token i of an earlier block c    m_c p_c softmax(s of c's tokens)_i
//! ```
//!
//! `m_c` is 1, or with group dropout of rate `r` either 0 or `1 / (1 - r)`, drawn per row and block. A landmark passes
//! its weight on and brings no value of its own.
//!
//! A row of *weights* holds these at the columns of tokens, **`p_c` at the columns of landmarks**, and 0 at columns
//! that the query does not see: that is all the backward pass needs. The caller that multiplies weights with values gives
//! landmarks the value zero.
//!
//! Backward, for `g` = the gradient of the weights of tokens: with `a_c` the sum of `weight_i g_i` over the tokens of
//! `c`, and `e` the sum of all `weight_i g_i`,
//!
//! ```text
//! own token        p_j (g_j - e)
//! earlier token    weight_i (g_i - a_c / sum of c's weights)
//! landmark         a_c - p_c e
//! ```
//!
//! The cost of a row is one `exp` per column and about 20 bytes moved inside the first-level cache, both ways.

use linalg::{exp, fma, fold, larger, simd};

/// Values that one step of a loop takes: one AVX-512 register. The tokens of a block are few, so loops that the
/// compiler unrolls further would spend their time in the remainder.
const STEP: usize = 16;

/// Whole earlier blocks left out at random, so that a model does not rely on a single one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupDropout {
    /// The share of blocks left out, 0 up to but not including 1.
    pub rate: f32,
    /// What is left out depends on this and on the place alone.
    pub seed: u64,
}

impl GroupDropout {
    /// Nothing is left out.
    pub const NONE: GroupDropout = GroupDropout { rate: 0.0, seed: 0 };

    /// Other choices for each `place`: a layer, a sequence, a head, a query.
    pub(super) fn within(self, place: usize) -> Self {
        GroupDropout { seed: mix(self.seed.wrapping_add(mix(place as u64))), ..self }
    }

    /// `m_c` of block `c` of a row.
    #[inline(always)]
    pub(super) fn factor(self, block: usize) -> f32 {
        if self.rate == 0.0 {
            return 1.0;
        }
        let uniform = (self.within(block).seed >> 40) as f32 / (1u64 << 24) as f32;
        if uniform < self.rate { 0.0 } else { 1.0 / (1.0 - self.rate) }
    }
}

/// A bijection of 64 bits in which every output bit depends on every input bit (the finaliser of SplitMix64, Steele et
/// al. 2014).
#[inline(always)]
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Where the own block begins and where what row `t` sees of it ends.
#[inline(always)]
fn own_block(row: usize, block_tokens: usize) -> (usize, usize) {
    let start = row / block_tokens * block_tokens;
    let is_landmark = row + 1 == start + block_tokens;
    (start, if is_landmark { row } else { row + 1 })
}

simd! {
    /// Turns the scores of row `t` into weights, in place. `scores (columns)`, more than `row` of them.
    pub(super) fn weigh(scores: &mut [f32], row: usize, block_tokens: usize, dropout: GroupDropout) {
        let (start, end) = own_block(row, block_tokens);
        let (seen, hidden) = scores.split_at_mut(end);
        hidden.fill(0.0);
        let (earlier, own) = seen.split_at_mut(start);
        let landmark = block_tokens - 1;

        // Each softmax is shifted by its own maximum; then one pass takes all exponentials.
        let mut top = max(own);
        for block in earlier.chunks_exact(block_tokens) {
            top = if block[landmark] > top { block[landmark] } else { top };
        }
        each(own, |score| score - top);
        for block in earlier.chunks_exact_mut(block_tokens) {
            block[landmark] -= top;
            let tokens = &mut block[..landmark];
            let top = max(tokens);
            each(tokens, |score| score - top);
        }
        #[expect(clippy::redundant_closure, reason = "a closure is compiled for each instruction set")]
        each(seen, |score| exp::<FMA>(score));

        let (earlier, own) = seen.split_at_mut(start);
        let mut total = sum(own);
        for block in earlier.chunks_exact(block_tokens) {
            total += block[landmark];
        }
        each(own, |weight| weight / total);
        for (index, block) in earlier.chunks_exact_mut(block_tokens).enumerate() {
            block[landmark] /= total;
            let weight = block[landmark] * dropout.factor(index);
            let tokens = &mut block[..landmark];
            let share = weight / sum(tokens);
            each(tokens, |inner| inner * share);
        }
    }
}

simd! {
    /// Turns the gradient of row `t`'s weights into the gradient of its scores, in place. `weights (columns)` from
    /// [`weigh`]; what `gradient (columns)` says of landmarks and of columns not seen is ignored.
    pub(super) fn pull_back(weights: &[f32], gradient: &mut [f32], row: usize, block_tokens: usize) {
        let (start, end) = own_block(row, block_tokens);
        gradient[end..].fill(0.0);
        let landmark = block_tokens - 1;
        let mut total = dot::<FMA>(&weights[start..end], &gradient[start..end]);

        let blocks = weights[..start].chunks_exact(block_tokens);
        for (weights, gradient) in blocks.zip(gradient.chunks_exact_mut(block_tokens)) {
            let (weights, gradient_tokens) = (&weights[..landmark], &mut gradient[..landmark]);
            let of_block = dot::<FMA>(weights, gradient_tokens);
            let weight = sum(weights);
            let mean = if weight > 0.0 { of_block / weight } else { 0.0 };
            scale(gradient_tokens, mean, weights);
            gradient[landmark] = of_block;
            total += of_block;
        }
        let blocks = weights[..start].chunks_exact(block_tokens);
        for (weights, gradient) in blocks.zip(gradient.chunks_exact_mut(block_tokens)) {
            gradient[landmark] -= weights[landmark] * total;
        }
        scale(&mut gradient[start..end], total, &weights[start..end]);
    }
}

/// The weights of all queries of one head, and the gradient of their scores for a gradient `upstream` of the weights: both
/// `(T, T)`, as `scores` and `upstream` are. Landmarks have weight 0, since their values are never read. Without dropout.
pub fn grouped_softmax(scores: &[f32], upstream: &[f32], tokens: usize, block_tokens: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut weights, mut gradient) = (scores.to_vec(), upstream.to_vec());
    let rows = weights.chunks_exact_mut(tokens).zip(gradient.chunks_exact_mut(tokens));
    for (row, (weights, gradient)) in rows.enumerate() {
        weigh(weights, row, block_tokens, GroupDropout::NONE);
        pull_back(weights, gradient, row, block_tokens);
        weights.iter_mut().skip(block_tokens - 1).step_by(block_tokens).for_each(|landmark| *landmark = 0.0);
    }
    (weights, gradient)
}

/// `values[i] = change(values[i])`
#[inline(always)]
fn each(values: &mut [f32], change: impl Fn(f32) -> f32) {
    let (steps, rest) = values.as_chunks_mut::<STEP>();
    for step in steps {
        for lane in step {
            *lane = change(*lane);
        }
    }
    rest.iter_mut().for_each(|number| *number = change(*number));
}

/// `gradient[i] = weights[i] * (gradient[i] - mean)`
#[inline(always)]
fn scale(gradient: &mut [f32], mean: f32, weights: &[f32]) {
    let ((gradient, gradient_rest), (weights, weights_rest)) =
        (gradient.as_chunks_mut::<STEP>(), weights.as_chunks::<STEP>());
    for (gradient, weights) in gradient.iter_mut().zip(weights) {
        for lane in 0..STEP {
            gradient[lane] = weights[lane] * (gradient[lane] - mean);
        }
    }
    for (gradient, weight) in gradient_rest.iter_mut().zip(weights_rest) {
        *gradient = weight * (*gradient - mean);
    }
}

#[inline(always)]
fn max(values: &[f32]) -> f32 {
    let (steps, rest) = values.as_chunks::<STEP>();
    let mut lanes = [f32::NEG_INFINITY; STEP];
    for step in steps {
        for lane in 0..STEP {
            lanes[lane] = larger(lanes[lane], step[lane]);
        }
    }
    for (lane, number) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, *number);
    }
    fold(lanes, larger)
}

#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (steps, rest) = values.as_chunks::<STEP>();
    let mut lanes = [0.0; STEP];
    for step in steps {
        for lane in 0..STEP {
            lanes[lane] += step[lane];
        }
    }
    for (lane, number) in lanes.iter_mut().zip(rest) {
        *lane += number;
    }
    fold(lanes, |a, b| a + b)
}

#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<STEP>(), b.as_chunks::<STEP>());
    let mut lanes = [0.0; STEP];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..STEP {
            lanes[lane] = fma::<FMA>(a[lane], b[lane], lanes[lane]);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane = fma::<FMA>(*a, *b, *lane);
    }
    fold(lanes, |a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use rand::{RngExt, SeedableRng};

    fn values(count: usize, spread: f32, seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-spread..spread)).collect()
    }

    /// The definition in double precision: weights of tokens, 0 at landmarks.
    fn plain(scores: &[f32], row: usize, block_tokens: usize, factors: &[f64]) -> Vec<f64> {
        let exps: Vec<f64> = scores.iter().map(|score| (*score as f64).exp()).collect();
        let own = row / block_tokens;
        let is_landmark = |column: usize| column % block_tokens == block_tokens - 1;
        let visible = |column: usize| column <= row && !(column / block_tokens == own && is_landmark(column));
        let sum = |of: &dyn Fn(usize) -> bool| (0..scores.len()).filter(|&i| of(i)).map(|i| exps[i]).sum::<f64>();
        let total = sum(&|i| visible(i) && (i / block_tokens == own || is_landmark(i)));
        let weight = |i: usize| {
            let block = i / block_tokens;
            if !visible(i) || is_landmark(i) {
                return 0.0;
            }
            if block == own {
                return exps[i] / total;
            }
            let inner = sum(&|j| j / block_tokens == block && !is_landmark(j));
            factors[block] * exps[(block + 1) * block_tokens - 1] / total * exps[i] / inner
        };
        (0..scores.len()).map(weight).collect()
    }

    fn tokens_only(weights: &[f32], block_tokens: usize) -> Vec<f32> {
        let mut weights = weights.to_vec();
        weights.iter_mut().skip(block_tokens - 1).step_by(block_tokens).for_each(|landmark| *landmark = 0.0);
        weights
    }

    #[test]
    fn every_weight_and_gradient_is_that_of_the_papers_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/softmax-b8.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let cube = |name: &str| tensors[name].to_vec3::<f32>().unwrap();
        let (scores, probs) = (cube("scores"), cube("probs"));
        let (upstream, grad_scores) = (cube("upstream"), cube("grad_scores"));
        let seen = tensors["visible"].to_dtype(DType::U8).unwrap().to_vec2::<u8>().unwrap();
        let mut compared = 0;
        for head in 0..scores.len() {
            for row in 0..scores[head].len() {
                let mut weights = scores[head][row].clone();
                weigh(&mut weights, row, 8, GroupDropout::NONE);
                let mut gradient = upstream[head][row].clone();
                pull_back(&weights, &mut gradient, row, 8);
                for (column, weight) in tokens_only(&weights, 8).into_iter().enumerate() {
                    let at = format!("head {head}, row {row}, column {column}");
                    assert!((weight - probs[head][row][column]).abs() < 1e-6, "{at}");
                    assert!((gradient[column] - grad_scores[head][row][column]).abs() < 2e-6, "{at}");
                    assert!(seen[row][column] == 1 || weights[column] == 0.0, "{at} is not visible");
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 2 * 37 * 37);
    }

    #[test]
    fn agrees_with_the_definition_at_every_block_size_and_row() {
        for (columns, block_tokens) in [(7, 2), (20, 5), (103, 17), (70, 33), (153, 51), (10, 64)] {
            for dropout in [GroupDropout::NONE, GroupDropout { rate: 0.4, seed: 5 }] {
                for row in 0..columns {
                    let scores = values(columns, 6.0, row as u64);
                    let factors: Vec<f64> = (0..columns).map(|block| dropout.factor(block) as f64).collect();
                    let want = plain(&scores, row, block_tokens, &factors);
                    let mut weights = scores.clone();
                    weigh(&mut weights, row, block_tokens, dropout);
                    for (got, want) in tokens_only(&weights, block_tokens).iter().zip(&want) {
                        assert!((*got as f64 - want).abs() < 1e-6, "B {block_tokens}, row {row}: {got} {want}");
                    }
                    check_gradient(&scores, &weights, row, block_tokens, &factors);
                }
            }
        }
    }

    /// Central differences of the definition, weighed with a random upstream gradient.
    fn check_gradient(scores: &[f32], weights: &[f32], row: usize, block_tokens: usize, factors: &[f64]) {
        let upstream = values(scores.len(), 1.0, 99);
        let mut gradient = upstream.clone();
        pull_back(weights, &mut gradient, row, block_tokens);
        let value = |scores: &[f32]| -> f64 {
            let weights = plain(scores, row, block_tokens, factors);
            weights.iter().zip(&upstream).map(|(weight, g)| weight * *g as f64).sum()
        };
        for column in (0..scores.len()).step_by(3) {
            let shifted = |by: f32| {
                let mut scores = scores.to_vec();
                scores[column] += by;
                (value(&scores), scores[column] as f64)
            };
            let ((above, high), (below, low)) = (shifted(1e-2), shifted(-1e-2));
            let want = (above - below) / (high - low);
            let got = gradient[column] as f64;
            assert!((got - want).abs() < 2e-5, "B {block_tokens}, row {row}, column {column}: {got} {want}");
        }
    }

    #[test]
    fn a_landmarks_query_does_not_see_itself() {
        let mut weights = vec![0.0; 8];
        weigh(&mut weights, 7, 4, GroupDropout::NONE);
        // Three own tokens and one landmark compete; the landmark's share goes to its three tokens.
        let (own, inner) = (1.0 / 4.0, 1.0 / 12.0);
        for (got, want) in weights.iter().zip([inner, inner, inner, own, own, own, own, 0.0]) {
            assert!((got - want).abs() < 1e-7, "{weights:?}");
        }
    }

    #[test]
    fn scores_far_apart_stay_finite() {
        let mut weights: Vec<f32> = (0..40).map(|i| if i < 16 { -1e4 } else { 1e4 * (i % 3) as f32 }).collect();
        weigh(&mut weights, 38, 8, GroupDropout::NONE);
        let mut gradient = vec![1.0; 40];
        pull_back(&weights, &mut gradient, 38, 8);
        assert!(weights.iter().chain(&gradient).all(|number| number.is_finite()), "{weights:?} {gradient:?}");
    }

    #[test]
    fn dropout_leaves_out_its_share_of_blocks_and_keeps_the_mean() {
        let dropout = GroupDropout { rate: 0.3, seed: 1 };
        let factors: Vec<f32> = (0..200).flat_map(|row| (0..100).map(move |b| dropout.within(row).factor(b))).collect();
        let dropped = factors.iter().filter(|&&factor| factor == 0.0).count() as f32 / factors.len() as f32;
        let mean = factors.iter().sum::<f32>() / factors.len() as f32;
        assert!((dropped - 0.3).abs() < 0.02 && (mean - 1.0).abs() < 0.03, "{dropped} {mean}");
        let again: Vec<f32> = (0..100).map(|block| dropout.within(0).factor(block)).collect();
        assert_eq!(factors[..100], again);
        assert_ne!(factors[..100], factors[100..200]);
    }
}
