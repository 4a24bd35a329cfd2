//! The search where documents have indexes: these name blocks, and only named ones are scored and compared.
//!
//! Named for every query: the blocks of the keys that the index of its document, layer and KV head finds nearest; where those are
//! fewer than k eligible ones, all that the index covers. Always named: the recent blocks, which have queries of their own, and
//! blocks that no index covers. A row of choices compares what any of its members names.

use rayon::prelude::*;

use super::indexes::DocumentIndexes;
use crate::index::choose::Member;
use crate::index::kernel::{Form, Rows};
use crate::index::layout::PANEL;
use crate::index::reduce::{add_logs, reduce};
use crate::index::scan::{Tile, tiles};
use crate::index::select::{Best, Candidate};
use crate::index::{Found, Query};
use crate::types::Granularity;

/// Keys that are asked of an index, at least: sums over heads are better guessed from more.
const KEYS_MIN: usize = 32;

/// Consecutive eligible blocks of one document that its indexes cover.
struct Indexed<'a> {
    indexes: &'a DocumentIndexes,
    /// In the document.
    first_block: u32,
    blocks: u32,
    /// Of the first one among the eligible blocks.
    position: u32,
}

/// What all rows share.
struct Candidates<'a> {
    query: &'a Query<'a>,
    tiles: Vec<Tile<'a>>,
    indexed: Vec<Indexed<'a>>,
    /// Positions that are always named, ascending.
    always: Vec<u32>,
    /// `(Hkv, T * G)`: positions that the indexes name.
    named: Vec<Vec<Vec<u32>>>,
}

/// Chooses the blocks of every row.
pub(super) fn search(query: &Query<'_>) -> Found {
    let k = query.top_k.min(query.eligible());
    let rows = query.rows();
    if k == 0 || rows == 0 {
        return Found { rows, ..Found::default() };
    }
    let mut candidates =
        Candidates { query, tiles: tiles(query), indexed: Vec::new(), always: Vec::new(), named: Vec::new() };
    candidates.part();
    candidates.named = (0..query.layout.kv_heads).into_par_iter().map(|head| candidates.named_by(head)).collect();
    let chosen: Vec<Vec<Candidate>> = (0..rows).into_par_iter().map(|row| candidates.choose(row, k)).collect();
    let chosen = chosen.iter().flatten();
    let (positions, scores) = chosen.map(|candidate| (candidate.position, candidate.score)).unzip();
    Found { rows, k, positions, scores }
}

impl Candidates<'_> {
    /// Says which eligible blocks are asked of an index, and which are always named.
    fn part(&mut self) {
        let query = self.query;
        let older = (query.eligible() - query.recent()) as u32;
        let mut start = 0;
        for scoped in query.scope {
            let end = start + scoped.blocks.len() as u32;
            let mut covered = 0;
            if let Some(indexes) = &scoped.indexes {
                let last = indexes.blocks().min(scoped.blocks.end);
                covered = last.saturating_sub(scoped.blocks.start).min(older.saturating_sub(start));
                // An index that finds mostly what is not eligible is slower than a scan, and misses more.
                if covered > 0 && covered >= indexes.blocks() / 2 {
                    let first_block = scoped.blocks.start;
                    self.indexed.push(Indexed { indexes, first_block, blocks: covered, position: start });
                } else {
                    covered = 0;
                }
            }
            self.always.extend(start + covered..end);
            start = end;
        }
    }

    /// `(T * G)`: what the indexes of one KV head name.
    fn named_by(&self, head: usize) -> Vec<Vec<u32>> {
        let query = self.query;
        let (dim, m) = (query.layout.head_dim, query.layout.keys_per_block);
        let rows = query.tokens * query.query_heads / query.layout.kv_heads;
        let queries: Vec<f32> = (0..rows).flat_map(|row| query.row(0, Member { head, row })).copied().collect();
        let mut named = vec![Vec::new(); rows];
        for part in &self.indexed {
            // So many that k blocks are among them, whatever block the nearest keys are of, and whatever is not eligible.
            let wanted = ((query.top_k - 1) * m + 1).max(KEYS_MIN);
            let not_eligible = (part.indexes.blocks() - part.blocks) as usize * m;
            let count = (wanted + not_eligible.min(wanted)).min(part.indexes.blocks() as usize * m);
            let nearest = part.indexes.nearest(query.layer * query.layout.kv_heads + head);
            let found = nearest.map(|nearest| nearest.search(&queries, dim, count));
            let found = found.and_then(Result::ok).unwrap_or_default();
            for (row, named) in named.iter_mut().enumerate() {
                let keys = found.get(row * count..(row + 1) * count).unwrap_or_default();
                let blocks = keys.iter().filter(|&&key| key >= 0).map(|&key| (key as usize / m) as u32);
                let eligible = blocks.filter_map(|block| block.checked_sub(part.first_block));
                let mut eligible: Vec<u32> = eligible.filter(|&block| block < part.blocks).collect();
                eligible.sort_unstable();
                eligible.dedup();
                if eligible.len() < query.top_k {
                    eligible = (0..part.blocks).collect();
                }
                named.extend(eligible.iter().map(|block| part.position + block));
            }
        }
        named
    }

    /// The best blocks of one row of choices.
    fn choose(&self, row: usize, k: usize) -> Vec<Candidate> {
        if self.query.until.is_over() {
            return Vec::new();
        }
        let members = self.query.members(row, self.query.tokens);
        let mut positions = self.always.clone();
        for member in &members {
            positions.extend(&self.named[member.head][member.row]);
        }
        positions.sort_unstable();
        positions.dedup();
        let mut shares = vec![f32::NEG_INFINITY; positions.len()];
        let mut scores = Vec::new();
        for of_head in members.chunk_by(|a, b| a.head == b.head) {
            self.score(of_head, &positions, &mut scores);
            for scores in scores.chunks_exact(positions.len()) {
                let total = linalg::log_sum_exp_below(scores, linalg::max(scores));
                for (share, score) in shares.iter_mut().zip(scores) {
                    *share = match self.query.granularity {
                        Granularity::KvGroup => add_logs(*share, score - total),
                        _ => linalg::larger(*share, score - total),
                    };
                }
            }
        }
        let mut best = Best::new(k);
        positions.iter().zip(shares).for_each(|(&position, score)| best.offer(Candidate { score, position }));
        best.into_positions()
    }

    /// Replaces `scores` by `(members, positions)`, for members of one KV head and ascending positions.
    fn score(&self, members: &[Member], positions: &[u32], scores: &mut Vec<f32>) {
        let query = self.query;
        let form = Form::of(query.layout.scanned(), members.len());
        let piece = query.layer * query.layout.kv_heads + members[0].head;
        scores.clear();
        scores.resize(members.len() * positions.len(), 0.0);
        let (mut queries, mut projected_for) = (None, None);
        let (mut wide, mut of_keys, mut next) = (Vec::new(), Vec::new(), 0);
        for tile in &self.tiles {
            let end = positions[next..].partition_point(|&p| (p as usize) < tile.start + tile.blocks.len()) + next;
            let inside = next..end;
            next = end;
            if inside.is_empty() {
                continue;
            }
            if projected_for != Some((tile.set, tile.entry)) {
                let scaled = |number: &f32| number * query.softmax_scale;
                let rows: Vec<f32> =
                    members.iter().flat_map(|&member| query.row(tile.set, member)).map(scaled).collect();
                queries = Some(Rows::new(form, &tile.chunk.project(piece, &rows), tile.chunk.width()));
                projected_for = Some((tile.set, tile.entry));
            }
            let Some(queries) = &queries else { continue };
            let m = tile.chunk.keys_per_block();
            let first_key = |i: usize| (positions[i] as usize - tile.start + tile.blocks.start) * m;
            let panels_of = |i: usize| first_key(i) / PANEL..(first_key(i) + m).div_ceil(PANEL);
            let mut at = inside.start;
            while at < inside.end {
                // Blocks whose panels touch are scored together.
                let mut run = panels_of(at);
                let together = (at + 1..inside.end).take_while(|&i| {
                    let touches = panels_of(i).start <= run.end;
                    run.end = if touches { panels_of(i).end } else { run.end };
                    touches
                });
                let after = at + 1 + together.count();
                let panels = tile.chunk.panels(piece, run.clone());
                let width = run.len() * PANEL;
                if form == Form::Wide {
                    wide.resize(width * tile.chunk.width(), 0.0);
                    panels.widen(tile.chunk.width(), &mut wide);
                }
                of_keys.resize(members.len() * width, 0.0);
                queries.score(panels, &wide, &mut of_keys);
                for (member, of_keys) in of_keys.chunks_exact(width).enumerate() {
                    for i in at..after {
                        let keys = &of_keys[first_key(i) - run.start * PANEL..][..m];
                        let score = &mut scores[member * positions.len() + i..][..1];
                        reduce(query.block_score, keys, m, score);
                    }
                }
                at = after;
            }
        }
    }
}

impl Query<'_> {
    /// The query `(D)` of one query row, of those that a set of blocks is scored with.
    fn row(&self, set: usize, Member { head, row }: Member) -> &[f32] {
        let (dim, group) = (self.layout.head_dim, self.query_heads / self.layout.kv_heads);
        let query_row = row / group * self.query_heads + head * group + row % group;
        &self.query_set(set)[query_row * dim..][..dim]
    }
}
