//! What is the right answer? Plain loops in double precision, one step of the definition after the other.
//!
//! From the proto and docs/architecture.md ("Positions", "What stands for a block"), and from no code of a service.

use std::collections::HashMap;

use landmarkdb_grpc::wire::v1;
use v1::{BlockScore, Granularity, KeyRule, Normalisation};

use crate::data::{Model, values_of};

/// K and V of a block: (L, Hkv, B, D), of a tail with fewer tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Block {
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
}

/// By document and index.
pub(crate) type Blocks = HashMap<(u64, u32), Block>;

/// A request with everything that its answer follows from.
pub(crate) struct Definition<'a> {
    model: &'a Model,
    layer: usize,
    /// (T, Hq, D)
    queries: Vec<f64>,
    distances: Vec<u32>,
    /// The eligible blocks in the order of the scope.
    pub(crate) eligible: Vec<(u64, u32)>,
    blocks: Vec<&'a Block>,
    /// By document, the largest end of its ranges.
    ends: HashMap<u64, usize>,
    /// min(top_k, eligible)
    pub(crate) k: usize,
    recent: usize,
    slots: usize,
    score: BlockScore,
    granularity: Granularity,
}

impl Block {
    /// Of the tensors of a block.
    pub(crate) fn of(k: &v1::Tensor, v: &v1::Tensor) -> Block {
        let values = |tensor: &v1::Tensor| values_of(&tensor.data).into_iter().map(f64::from).collect();
        Block { k: values(k), v: values(v) }
    }

    /// The blocks of a text as they are sent, its tail included: what may be looked up once it is sealed.
    pub(crate) fn sealed(document: u64, blocks: &[v1::NewBlock]) -> Blocks {
        let of = |block: &v1::NewBlock| Some(Block::of(block.k.as_ref()?, block.v.as_ref()?));
        blocks.iter().filter_map(|block| Some(((document, block.index), of(block)?))).collect()
    }

    /// The same without the tail.
    pub(crate) fn sent(document: u64, blocks: &[v1::NewBlock], block_tokens: usize) -> Blocks {
        let is_full = |block: &v1::NewBlock| block.token_ids.len() == block_tokens;
        Self::sealed(document, &blocks.iter().filter(|block| is_full(block)).cloned().collect::<Vec<_>>())
    }
}

fn log_sum_exp(values: &[f64]) -> f64 {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY { top } else { top + values.iter().map(|x| (x - top).exp()).sum::<f64>().ln() }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `head` (D) rotated by so many tokens, half-split layout.
pub(crate) fn rotated(frequencies: &[f32], head: &[f64], tokens: f64) -> Vec<f64> {
    let mut out = head.to_vec();
    let half = frequencies.len();
    for (i, &frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (frequency as f64 * tokens).sin_cos();
        out[i] = head[i] * cos - head[i + half] * sin;
        out[i + half] = head[i + half] * cos + head[i] * sin;
    }
    out
}

impl<'a> Definition<'a> {
    pub(crate) fn of(model: &'a Model, request: &v1::LookupRequest, blocks: &'a Blocks) -> Self {
        let scope = request.scope.iter();
        let eligible: Vec<(u64, u32)> =
            scope.flat_map(|range| (range.begin..range.end).map(|index| (range.document, index))).collect();
        let mut ends = HashMap::new();
        for range in &request.scope {
            let end = ends.entry(range.document).or_insert(0);
            *end = (range.end as usize).max(*end);
        }
        let last = request.scope.last().map_or(0, |range| range.end.saturating_sub(range.begin) as usize);
        let k = eligible.len().min(request.top_k as usize);
        let recent = k.min(last);
        Definition {
            model,
            layer: request.layer as usize,
            queries: values_of(&request.queries).into_iter().map(f64::from).collect(),
            distances: request.distances.clone(),
            blocks: eligible.iter().map(|id| blocks.get(id).expect("a block that was stored")).collect(),
            ends,
            k,
            recent,
            slots: if recent == eligible.len() { eligible.len() } else { k + 1 },
            eligible,
            score: request.block_score(),
            granularity: request.granularity(),
        }
    }

    fn is_recent(&self, position: usize) -> bool {
        position >= self.eligible.len() - self.recent
    }

    /// For a block that begins so many blocks before the window.
    fn rotated_query(&self, token: usize, head: usize, blocks_before: usize) -> Vec<f64> {
        let dim = self.model.head_dim;
        let query = &self.queries[(token * self.model.query_heads + head) * dim..][..dim];
        let before = blocks_before * self.model.block_tokens;
        rotated(&self.model.frequencies, query, self.distances[token] as f64 + before as f64)
    }

    /// Blocks from where the block of this rank begins to the window. Slot `s` begins `slots - s` blocks before it.
    fn blocks_before(&self, token: usize, row: &[usize], rank: usize, original_within: Option<u32>) -> usize {
        let position = row[rank];
        let Some(within) = original_within else {
            let older_exist = self.recent < self.eligible.len();
            return self.slots - (rank + (self.is_recent(position) && older_exist) as usize);
        };
        let (document, index) = self.eligible[position];
        let of_document = |position: &&usize| self.eligible[**position].0 == document;
        let rank = row[..rank].iter().rev().take_while(of_document).count();
        let room = (within as usize).saturating_sub(1 + self.distances[token] as usize);
        let farthest = self.slots.max((room / self.model.block_tokens).saturating_sub(1));
        (self.ends[&document] - index as usize).min(farthest - rank)
    }

    /// One layer and KV head of a block's K or V: (B, D), of a tail with fewer tokens.
    fn piece<'b>(&self, data: &'b [f64], head: usize) -> Vec<&'b [f64]> {
        let model = self.model;
        let kv_head = head / (model.query_heads / model.kv_heads);
        let size = data.len() / (model.layers * model.kv_heads);
        data[(self.layer * model.kv_heads + kv_head) * size..][..size].chunks_exact(model.head_dim).collect()
    }

    /// The keys that stand for a block: (m, D). Of a document's first token there is none, where it has others.
    fn landmark_keys(&self, position: usize, head: usize) -> Vec<Vec<f64>> {
        let mut rows = self.piece(&self.blocks[position].k, head);
        let has_first = self.eligible[position].1 == 0 && rows.len() > 1;
        match self.model.rule {
            KeyRule::Landmark => vec![rows[rows.len() - 1].to_vec()],
            KeyRule::Mean => {
                let rows = &rows[has_first as usize..];
                let sum = |d: usize| rows.iter().map(|row| row[d]).sum::<f64>() / rows.len() as f64;
                vec![(0..self.model.head_dim).map(sum).collect()]
            }
            _ => {
                if has_first {
                    rows[0] = rows[1];
                }
                rows.into_iter().map(<[f64]>::to_vec).collect()
            }
        }
    }

    /// Natural log of every eligible block's share for one query token and head.
    fn shares_of(&self, token: usize, head: usize) -> Vec<f64> {
        let score = |position: usize| {
            let before = if self.is_recent(position) { self.eligible.len() - position } else { self.slots };
            let query = self.rotated_query(token, head, before);
            let keys = self.landmark_keys(position, head);
            let scores: Vec<f64> = keys.iter().map(|key| dot(&query, key) * self.model.scale as f64).collect();
            match self.score {
                BlockScore::Max => scores.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                _ => log_sum_exp(&scores),
            }
        };
        let scores: Vec<f64> = (0..self.eligible.len()).map(score).collect();
        let total = log_sum_exp(&scores);
        scores.into_iter().map(|score| score - total).collect()
    }

    /// Which row of choices a query token and head read.
    fn row(&self, token: usize, head: usize) -> usize {
        let model = self.model;
        match self.granularity {
            Granularity::TokenHead => token * model.query_heads + head,
            Granularity::Head => head,
            Granularity::Token => token,
            Granularity::KvGroup => token * model.kv_heads + head / (model.query_heads / model.kv_heads),
            _ => 0,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.row(self.distances.len() - 1, self.model.query_heads - 1) + 1
    }

    /// (rows, N): the scores by which each row chooses.
    pub(crate) fn scores(&self) -> Vec<Vec<f64>> {
        let mut rows = vec![vec![f64::NEG_INFINITY; self.eligible.len()]; self.rows()];
        for token in 0..self.distances.len() {
            for head in 0..self.model.query_heads {
                let shares = self.shares_of(token, head);
                for (into, share) in rows[self.row(token, head)].iter_mut().zip(shares) {
                    *into = match self.granularity {
                        Granularity::KvGroup => log_sum_exp(&[*into, share]),
                        _ => into.max(share),
                    };
                }
            }
        }
        rows
    }

    /// `out` (T, Hq, D) and `lse` (T, Hq) of attention over chosen positions `(rows, k)`, each row ascending.
    pub(crate) fn attend(&self, request: &v1::AttendRequest, choices: &[Vec<usize>]) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for token in 0..self.distances.len() {
            for head in 0..self.model.query_heads {
                let (values, sum) = self.attend_row(request, token, head, &choices[self.row(token, head)]);
                out.extend(values);
                lse.push(sum);
            }
        }
        (out, lse)
    }

    fn attend_row(&self, request: &v1::AttendRequest, token: usize, head: usize, row: &[usize]) -> (Vec<f64>, f64) {
        // Log weights and values of everything that is attended to, and what the denominator counts.
        let mut weighed: Vec<(f64, &[f64])> = Vec::new();
        let mut counted = Vec::new();
        for (rank, &position) in row.iter().enumerate() {
            let before = self.blocks_before(token, row, rank, request.original_within_tokens);
            let query = self.rotated_query(token, head, before);
            let block = self.blocks[position];
            let mut scores: Vec<f64> =
                self.piece(&block.k, head).iter().map(|key| dot(&query, key) * self.model.scale as f64).collect();
            if request.without_first_tokens && self.eligible[position].1 == 0 && scores.len() > 1 {
                scores[0] = f64::NEG_INFINITY;
            }
            let values = self.piece(&block.v, head);
            let inner = scores.len() - 1;
            // A tail has no landmark: its tokens compete themselves.
            let is_tail = scores.len() < self.model.block_tokens;
            match if is_tail { Normalisation::Plain } else { request.normalisation() } {
                Normalisation::Grouped => {
                    let total = log_sum_exp(&scores[..inner]);
                    let of_token = |(score, value): (&f64, _)| (score - total + scores[inner], value);
                    weighed.extend(scores[..inner].iter().zip(values).map(of_token));
                    counted.push(scores[inner]);
                }
                Normalisation::Hidden => {
                    weighed.extend(scores[..inner].iter().copied().zip(values));
                    counted.extend(&scores[..inner]);
                }
                _ => {
                    weighed.extend(scores.iter().copied().zip(values));
                    counted.extend(&scores);
                }
            }
        }
        let lse = log_sum_exp(&counted);
        let mut out = vec![0.0; self.model.head_dim];
        for (weight, value) in weighed {
            out.iter_mut().zip(value).for_each(|(out, value)| *out += (weight - lse).exp() * value);
        }
        (out, lse)
    }
}
