//! Attention of a run of query tokens over keys at hand, for one KV head.
//!
//! `out = softmax(scale q k^T) v` and the log of the softmax denominator, with the score rows kept whole: a run is at
//! most a few hundred rows, so its scores stay in the second-level cache.
//!
//! The grouped softmax of landmark-trained models (Mohtashami and Jaggi 2023, section 3.1) takes its place where
//! asked for: see [`Rule`].

use std::cell::RefCell;

use crate::types::Normalisation;
use linalg::{Matrix, Write};

/// Keys and values of one KV head, `(S, D)` each, keys rotated to their positions.
#[derive(Clone, Copy)]
pub(crate) struct HeadKv<'a> {
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
}

thread_local! {
    /// Score rows, kept between calls so that decoding does not allocate per layer and head.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Queries `(T, G, D)` of one KV head, multiplied with the softmax scale.
pub(crate) struct HeadQueries<'a> {
    /// Rotated to their positions.
    pub(crate) window: &'a [f32],
    /// Rotated for the sink; empty where there is none.
    pub(crate) sink: &'a [f32],
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
}

/// How the scores of one query become weights.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    /// Grouped: keys lie in blocks of `block_tokens`, each closed by its landmark. The tokens of the query's own block
    /// compete with the landmarks of the blocks before it; a landmark's weight goes to the tokens of its block, by a
    /// softmax of their own. The landmark of the query's own block is hidden, even from itself.
    ///
    /// Hidden: blocks as before. All tokens but landmarks compete; for the query of a landmark those of its block.
    pub(crate) normalisation: Normalisation,
    /// B
    pub(crate) block_tokens: usize,
}

impl Rule {
    /// Turns the scores of the keys that a query sees into weights that are not yet divided by their sum: of `lead` tokens that
    /// are in no block, then of those that begin with a block and end with the query itself. Returns `(log-sum-exp, sum)`
    /// of what competes. The lead competes with the query's own block; a landmark's query does not see it.
    fn weigh(self, lead: usize, seen: &mut [f32]) -> (f32, f32) {
        if self.normalisation == Normalisation::Plain {
            return compete(seen);
        }
        let (lead, seen) = seen.split_at_mut(lead);
        let of_landmark = self.normalisation == Normalisation::Hidden && seen.len().is_multiple_of(self.block_tokens);
        let (lse, sum) = match self.normalisation {
            Normalisation::Hidden => self.weigh_hidden(seen),
            _ => self.weigh_grouped(seen),
        };
        if lead.is_empty() || of_landmark {
            lead.fill(0.0);
            return (lse, sum);
        }
        let (lead_lse, lead_sum) = compete(lead);
        // Both parts were divided by the exponential of their own largest score.
        let (top, lead_top) = (lse - sum.ln(), lead_lse - lead_sum.ln());
        let all = top.max(lead_top);
        let (factor, lead_factor) = ((top - all).exp(), (lead_top - all).exp());
        seen.iter_mut().for_each(|weight| *weight *= factor);
        lead.iter_mut().for_each(|weight| *weight *= lead_factor);
        let sum = sum * factor + lead_sum * lead_factor;
        (all + sum.ln(), sum)
    }

    /// Cuts before the block of the query, which is the last.
    fn split_own(self, seen: &mut [f32]) -> (&mut [f32], &mut [f32]) {
        seen.split_at_mut((seen.len() - 1) / self.block_tokens * self.block_tokens)
    }

    fn weigh_hidden(self, seen: &mut [f32]) -> (f32, f32) {
        if seen.len().is_multiple_of(self.block_tokens) {
            let (before, own) = self.split_own(seen);
            before.fill(0.0);
            let (tokens, landmark) = own.split_at_mut(self.block_tokens - 1);
            landmark[0] = 0.0;
            return compete(tokens);
        }
        seen.iter_mut()
            .skip(self.block_tokens - 1)
            .step_by(self.block_tokens)
            .for_each(|score| *score = f32::NEG_INFINITY);
        compete(seen)
    }

    fn weigh_grouped(self, seen: &mut [f32]) -> (f32, f32) {
        let (before, own) = self.split_own(seen);
        let own = if own.len() == self.block_tokens {
            let (tokens, landmark) = own.split_at_mut(self.block_tokens - 1);
            landmark[0] = 0.0;
            tokens
        } else {
            own
        };
        let landmarks = before.iter().skip(self.block_tokens - 1).step_by(self.block_tokens);
        let top = landmarks.fold(linalg::max(own), |top, &landmark| top.max(landmark));
        let mut sum = linalg::exp_sum(own, top);
        for block in before.chunks_exact_mut(self.block_tokens) {
            let Some((landmark, tokens)) = block.split_last_mut() else { continue };
            let weight = (*landmark - top).exp();
            sum += weight;
            *landmark = 0.0;
            let factor = weight / linalg::exp_sum(tokens, linalg::max(tokens));
            tokens.iter_mut().for_each(|token| *token *= factor);
        }
        (top + sum.ln(), sum)
    }
}

/// One softmax, not yet divided by its sum. Returns `(log-sum-exp, sum)`.
fn compete(scores: &mut [f32]) -> (f32, f32) {
    let top = linalg::max(scores);
    let sum = linalg::exp_sum(scores, top);
    (top + sum.ln(), sum)
}

/// Attention over keys at hand, ready to be merged with that over other keys.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LocalAttention {
    /// `(rows, D)`
    pub(crate) out: Vec<f32>,
    /// `(rows)`: log-sum-exp.
    pub(crate) lse: Vec<f32>,
    /// `(rows, segments)`: the share of each segment that [`attend`] was given.
    pub(crate) shares: Vec<f32>,
}

/// What one KV head has at hand.
#[derive(Clone, Copy)]
pub(crate) struct AtHand<'a> {
    /// Tokens that are in no block and lie beside the window.
    pub(crate) lead: HeadKv<'a>,
    pub(crate) sink: HeadKv<'a>,
    pub(crate) window: HeadKv<'a>,
    /// Tokens at the begin of the window that nothing sees.
    pub(crate) hidden: usize,
}

/// Attends to the window, of which the run's first token sees `visible` rows and each further token one more, and to all
/// of lead and sink. Rows are `(T, G)`. `segments` are lengths in tokens, from the first of the lead on: which parts of what all
/// rows see are told apart in [`LocalAttention::shares`].
pub(crate) fn attend(
    queries: &HeadQueries,
    at_hand: AtHand,
    visible: usize,
    rule: Rule,
    segments: &[usize],
) -> LocalAttention {
    let HeadQueries { group, head_dim, .. } = *queries;
    let AtHand { lead, sink, window, hidden } = at_hand;
    let rows = queries.window.len() / head_dim;
    let (lead_rows, sink_rows) = (lead.k.len() / head_dim, sink.k.len() / head_dim);
    let window_rows = visible + rows / group - 1;
    let before = lead_rows + sink_rows;
    let columns = before + window_rows;
    let matrix = |values, rows| Matrix::new(values, rows, head_dim);

    SCORES.with_borrow_mut(|scores| {
        scores.resize(rows * columns, 0.0);
        let scores = &mut scores[..rows * columns];
        let score = |queries, keys: Matrix, scores: &mut [f32]| {
            let keys = keys.transposed();
            linalg::multiply(matrix(queries, rows), keys, scores, columns, Write::Replace);
        };
        if lead_rows > 0 {
            score(queries.window, matrix(lead.k, lead_rows), scores);
        }
        if sink_rows > 0 {
            score(queries.sink, matrix(sink.k, sink_rows), &mut scores[lead_rows..]);
        }
        score(queries.window, matrix(window.k, window_rows), &mut scores[before..]);

        let mut lse = Vec::with_capacity(rows);
        let mut sums = Vec::with_capacity(rows);
        let mut shares = Vec::with_capacity(rows * segments.len());
        for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
            let (seen, future) = scores.split_at_mut(before + visible + row / group);
            // A token sees itself in any case.
            let hidden = hidden.min(seen.len() - before - 1);
            seen[before..before + hidden].fill(f32::NEG_INFINITY);
            let (log_sum_exp, sum) = rule.weigh(lead_rows, seen);
            future.fill(0.0);
            let mut rest = &*seen;
            for &tokens in segments {
                let (segment, after) = rest.split_at(tokens);
                shares.push(segment.iter().sum::<f32>() / sum);
                rest = after;
            }
            sums.push(sum);
            lse.push(log_sum_exp);
        }

        let mut out = vec![0.0; rows * head_dim];
        let mut mix = |weights, seen_rows, values| {
            let weights = Matrix::with_stride(weights, rows, seen_rows, columns);
            linalg::multiply(weights, matrix(values, seen_rows), &mut out, head_dim, Write::Add);
        };
        if lead_rows > 0 {
            mix(&*scores, lead_rows, lead.v);
        }
        mix(&scores[lead_rows..], sink_rows, sink.v);
        mix(&scores[before..], window_rows, window.v);
        for (out, sum) in out.chunks_exact_mut(head_dim).zip(sums) {
            out.iter_mut().for_each(|x| *x /= sum);
        }
        LocalAttention { out, lse, shares }
    })
}

/// Merges another part `other_out (rows, D)`, `other_lse (rows)` into `part`'s output, which becomes attention over
/// both. Returns each row's share of the other part.
pub(crate) fn merge(part: &mut LocalAttention, other_out: &[f32], other_lse: &[f32]) -> Vec<f32> {
    let head_dim = part.out.len() / part.lse.len().max(1);
    let rows = part.out.chunks_exact_mut(head_dim).zip(other_out.chunks_exact(head_dim));
    rows.zip(part.lse.iter().zip(other_lse))
        .map(|((out, other), (&lse, &other_lse))| {
            // 1 / (1 + e^(lse - other)) is safe at both ends: the exponential may be 0 or infinite.
            let share = 1.0 / (1.0 + (lse - other_lse).exp());
            for (out, other) in out.iter_mut().zip(other) {
                *out = *out * (1.0 - share) + other * share;
            }
            share
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn values(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    const NONE: HeadKv = HeadKv { k: &[], v: &[] };
    const PLAIN: Rule = Rule { normalisation: Normalisation::Plain, block_tokens: 16 };

    /// Attention of one query over `(S, D)`, in double precision, straight from the definition.
    fn defined(rule: Rule, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f64>, f64) {
        let d = q.len();
        let scores: Vec<f64> = k.chunks(d).map(|k| q.iter().zip(k).map(|(a, b)| *a as f64 * *b as f64).sum()).collect();
        let exps: Vec<f64> = scores.iter().map(|score| score.exp()).collect();
        let last = scores.len() - 1;
        let block = |key: usize| key / rule.block_tokens;
        let is_landmark = |key: usize| (key + 1).is_multiple_of(rule.block_tokens);
        let competes = |key: &usize| match rule.normalisation {
            Normalisation::Plain => true,
            Normalisation::Grouped => (block(*key) == block(last)) != is_landmark(*key),
            Normalisation::Hidden => !is_landmark(*key) && (!is_landmark(last) || block(*key) == block(last)),
        };
        let total: f64 = (0..=last).filter(competes).map(|key| exps[key]).sum();
        let weight = |key: usize| match rule.normalisation {
            Normalisation::Plain | Normalisation::Hidden if competes(&key) => exps[key] / total,
            Normalisation::Plain | Normalisation::Hidden => 0.0,
            Normalisation::Grouped if is_landmark(key) => 0.0,
            Normalisation::Grouped if block(key) == block(last) => exps[key] / total,
            Normalisation::Grouped => {
                let first = block(key) * rule.block_tokens;
                let tokens = first..first + rule.block_tokens - 1;
                exps[tokens.end] / total * exps[key] / exps[tokens].iter().sum::<f64>()
            }
        };
        let mut out = vec![0.0; d];
        for (key, v) in v.chunks(d).enumerate() {
            out.iter_mut().zip(v).for_each(|(o, v)| *o += weight(key) * *v as f64);
        }
        (out, total.ln())
    }

    #[test]
    fn agrees_with_double_precision_at_every_edge() {
        let grouped = |block_tokens| Rule { normalisation: Normalisation::Grouped, block_tokens };
        let hidden = |block_tokens| Rule { normalisation: Normalisation::Hidden, block_tokens };
        for (tokens, group, d, sink, visible, rule) in [
            (1, 1, 4, 0, 1, PLAIN),
            (1, 3, 64, 64, 512, PLAIN),
            (5, 3, 64, 16, 1, PLAIN),
            (64, 3, 8, 0, 65, PLAIN),
            (2, 2, 6, 3, 7, PLAIN),
            (1, 1, 4, 0, 1, grouped(2)),
            (3, 1, 4, 0, 6, grouped(7)),
            (30, 2, 8, 0, 1, grouped(7)),
            (9, 3, 16, 5, 12, grouped(5)),
            (70, 1, 8, 0, 3, grouped(17)),
            (1, 1, 4, 0, 1, hidden(2)),
            (9, 3, 16, 5, 12, hidden(5)),
            (70, 2, 8, 17, 3, hidden(17)),
        ] {
            let q = values(tokens * group * d, 1);
            let (sink_k, sink_v) = (values(sink * d, 2), values(sink * d, 3));
            let rows = visible + tokens - 1;
            let (k, v) = (values(rows * d, 4), values(rows * d, 5));
            let sink_kv = HeadKv { k: &sink_k, v: &sink_v };
            let queries = HeadQueries { window: &q, sink: &q, group, head_dim: d };
            // Where another text's sink is at hand, the window's first token is hidden, but for itself.
            let hidden = (sink > 0 && rule.normalisation == Normalisation::Plain) as usize;
            let at_hand = AtHand { lead: NONE, sink: sink_kv, window: HeadKv { k: &k, v: &v }, hidden };
            // The sink in two segments where it can be cut, and the window's tokens that every query sees.
            let segments = [sink / 2, sink - sink / 2, visible - 1];
            let LocalAttention { out, lse, shares } = attend(&queries, at_hand, visible, rule, &segments);
            for row in 0..tokens * group {
                let seen = (visible + row / group) * d;
                let from = hidden.min(visible + row / group - 1) * d;
                let (keys, values) = ([&sink_k, &k[from..seen]].concat(), [&sink_v, &v[from..seen]].concat());
                let (want, want_lse) = defined(rule, &q[row * d..][..d], &keys, &values);
                assert!((lse[row] as f64 - want_lse).abs() < 1e-5);
                if rule.normalisation == Normalisation::Plain {
                    let keys = [&sink_k[..], &k].concat();
                    let weights = keys.chunks(d).map(|key| {
                        let score: f64 = q[row * d..][..d].iter().zip(key).map(|(a, b)| *a as f64 * *b as f64).sum();
                        (score - want_lse).exp()
                    });
                    let mut weights: Vec<f64> = weights.collect();
                    weights[sink..][..from / d].fill(0.0);
                    let mut from = 0;
                    for (&tokens, share) in segments.iter().zip(&shares[row * 3..]) {
                        let want: f64 = weights[from..from + tokens].iter().sum();
                        assert!((*share as f64 - want).abs() < 1e-5, "{share} {want}");
                        from += tokens;
                    }
                }
                for (got, want) in out[row * d..][..d].iter().zip(want) {
                    assert!((*got as f64 - want).abs() < 1e-5, "{tokens} {group} {d} {sink} {visible}");
                }
            }
        }
    }

    /// Tokens in no block are a part of their own, which competes with what the query sees; a landmark does not see them.
    #[test]
    fn a_lead_is_merged_in_whatever_the_normalisation() {
        let (tokens, group, d, lead, sink, visible) = (9, 2, 8, 7, 5, 3);
        for normalisation in [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden] {
            let rule = Rule { normalisation, block_tokens: 5 };
            let rows = visible + tokens - 1;
            let (q, lead_k, lead_v) = (values(tokens * group * d, 1), values(lead * d, 2), values(lead * d, 3));
            let (sink_k, sink_v) = (values(sink * d, 4), values(sink * d, 5));
            let (k, v) = (values(rows * d, 6), values(rows * d, 7));
            let queries = HeadQueries { window: &q, sink: &q, group, head_dim: d };
            let (lead, sink) = (HeadKv { k: &lead_k, v: &lead_v }, HeadKv { k: &sink_k, v: &sink_v });
            let window = HeadKv { k: &k, v: &v };
            let found = attend(&queries, AtHand { lead, sink, window, hidden: 0 }, visible, rule, &[]);

            let mut want = attend(&queries, AtHand { lead: NONE, sink, window, hidden: 0 }, visible, rule, &[]);
            let plain: Vec<_> = q.chunks(d).map(|q| defined(PLAIN, q, &lead_k, &lead_v)).collect();
            let is_landmark = |row: usize| {
                normalisation == Normalisation::Hidden && (visible + row / group).is_multiple_of(rule.block_tokens)
            };
            let lse = |(row, part): (usize, &(Vec<f64>, f64))| match is_landmark(row) {
                true => f32::NEG_INFINITY,
                false => part.1 as f32,
            };
            let lead_lse: Vec<f32> = plain.iter().enumerate().map(lse).collect();
            let lead_out: Vec<f32> = plain.iter().flat_map(|(out, _)| out.iter().map(|&x| x as f32)).collect();
            assert!((0..tokens * group).any(is_landmark) == (normalisation == Normalisation::Hidden));
            merge(&mut want, &lead_out, &lead_lse);
            for (index, (found, want)) in found.out.iter().zip(&want.out).enumerate() {
                assert!((found - want).abs() < 1e-5, "{normalisation:?}, number {index}: {found} {want}");
            }
        }
    }

    #[test]
    fn merging_two_halves_is_attention_over_both() {
        let d = 16;
        let (q, k, v) = (values(d, 1), values(40 * d, 2), values(40 * d, 3));
        let part = |range: std::ops::Range<usize>| {
            let kv = HeadKv { k: &k[range.start * d..range.end * d], v: &v[range.start * d..range.end * d] };
            let queries = HeadQueries { window: &q, sink: &[], group: 1, head_dim: d };
            attend(&queries, AtHand { lead: NONE, sink: NONE, window: kv, hidden: 0 }, range.len(), PLAIN, &[])
        };
        let mut merged = part(0..13);
        let other = part(13..40);
        merge(&mut merged, &other.out, &other.lse);
        for (got, want) in merged.out.iter().zip(part(0..40).out) {
            assert!((got - want).abs() < 1e-6);
        }
        let kept = merged.clone();
        let shares = merge(&mut merged, &vec![0.0; d], &[f32::NEG_INFINITY]);
        assert_eq!((merged, shares), (kept, vec![0.0]), "an empty part changes nothing");
    }
}
