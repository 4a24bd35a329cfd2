//! What is the right answer? Plain loops in double precision, one step of the definition after the other. Slow;
//! the judge of [`super::fast`].

use super::{Found, Query};
use crate::types::{BlockScore, Granularity};

/// Chooses the blocks of every row.
pub fn search(query: &Query<'_>) -> Found {
    let eligible = query.eligible();
    let k = query.top_k.min(eligible);
    let mut found = Found { rows: query.rows(), k, ..Found::default() };
    if k == 0 {
        return found;
    }
    for row in aggregated(query).chunks_exact(eligible) {
        let mut order: Vec<usize> = (0..eligible).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.truncate(k);
        order.sort_unstable();
        found.positions.extend(order.iter().map(|&position| position as u32));
        found.scores.extend(order.iter().map(|&position| row[position] as f32));
    }
    found
}

/// `(rows, N)`: the score of every eligible block in every row of choices, as in [`Found::scores`].
pub(super) fn aggregated(query: &Query<'_>) -> Vec<f64> {
    let eligible = query.eligible();
    let mut rows = vec![f64::NEG_INFINITY; query.rows() * eligible];
    for token in 0..query.tokens {
        for head in 0..query.query_heads {
            let scores = block_scores(query, token, head);
            let total = log_sum_exp(&scores);
            let row = query.granularity.row(token, head, query.query_heads, query.layout.kv_heads);
            for (into, score) in rows[row * eligible..][..eligible].iter_mut().zip(scores) {
                *into = match query.granularity {
                    Granularity::KvGroup => log_sum_exp(&[*into, score - total]),
                    _ => into.max(score - total),
                };
            }
        }
    }
    rows
}

/// `(N)`: the score of every eligible block for one query token and head.
fn block_scores(query: &Query<'_>, token: usize, head: usize) -> Vec<f64> {
    let (layout, eligible, recent) = (query.layout, query.eligible(), query.recent());
    let piece = query.layer * layout.kv_heads + head / (query.query_heads / layout.kv_heads);
    let mut scores = Vec::with_capacity(eligible);
    for scoped in query.scope {
        for (chunk, blocks) in scoped.keys.parts(scoped.blocks.clone()) {
            let m = chunk.keys_per_block();
            for block in blocks {
                let set = (scores.len() + recent + 1).saturating_sub(eligible);
                let q = &query.query_set(set)[(token * query.query_heads + head) * layout.head_dim..];
                let keys: Vec<f64> = (0..m)
                    .map(|key| chunk.key(piece, block * m + key))
                    .map(|key| key.iter().zip(q).map(|(k, q)| *k as f64 * *q as f64).sum::<f64>())
                    .map(|product| product * query.softmax_scale as f64)
                    .collect();
                scores.push(match query.block_score {
                    BlockScore::Max => keys.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                    BlockScore::LogSumExp => log_sum_exp(&keys),
                });
            }
        }
    }
    scores
}

fn log_sum_exp(values: &[f64]) -> f64 {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY {
        return top;
    }
    top + values.iter().map(|number| (number - top).exp()).sum::<f64>().ln()
}
