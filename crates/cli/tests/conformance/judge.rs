//! Is an answer right? Compares it with the definition, within a tolerance that follows from the dtypes.
//!
//! f32, f16 and bf16 hold the values of our texts exactly, so that only sums are rounded: [`SUMS`]. A key in int8 is off by
//! half a step of its largest number, a mean in f16 by its last bit; what this does to a score is bounded for each request.

use landmarkdb_grpc::wire::v1;
use v1::{Dtype, KeyRule};

use crate::client::Answer;
use crate::data::{LARGEST, Model, World, values_of};
use crate::definition::{Block, Blocks, Definition};

/// What single precision may lose in a score, a log-sum-exp or a mixture of values up to 2.
pub(crate) const SUMS: f64 = 2e-4;

/// Stored values in int8 are off by at most this: a step of the largest.
pub(crate) const INT8_STEP: f64 = LARGEST / 127.0;

/// How far the logarithm of a share may be off.
fn share_tolerance(model: &Model, request: &v1::LookupRequest) -> f64 {
    let of_keys = match (model.keys, model.rule) {
        (Dtype::Int8, _) => 0.51 * INT8_STEP,
        (_, KeyRule::Mean) => LARGEST / 2048.0,
        _ => 0.0,
    };
    // A service may take keys from K as it was sent or as it is stored.
    let of_payload = if model.payload == Dtype::Int8 { INT8_STEP } else { 0.0 };
    let queries = values_of(&request.queries);
    let longest = queries.chunks(model.head_dim).map(|q| q.iter().map(|q| q.abs() as f64).sum::<f64>());
    // A rotated query is longer than it was by at most the square root of 2.
    let score = longest.fold(0.0, f64::max) * 1.42 * model.scale as f64 * (of_keys + of_payload);
    // The block's own score and the denominator.
    SUMS + 2.0 * score
}

#[track_caller]
pub(crate) fn close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "numbers of {what}");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let same = found as f64 == expected || (found as f64 - expected).abs() <= tolerance;
        assert!(same, "{what}[{i}]: expected {expected} within {tolerance}, found {found}");
    }
}

/// Positions `(rows, k)` among the eligible blocks that a reply chose. Fails if it could not be the right choice.
#[track_caller]
pub(crate) fn choices(definition: &Definition, hits: &v1::LookupReply, tolerance: f64) -> Vec<Vec<usize>> {
    let (rows, k) = (definition.rows(), definition.k);
    assert_eq!((hits.rows as usize, hits.k as usize), (rows, k), "rows and k");
    let scores = values_of(&hits.scores);
    assert_eq!((hits.documents.len(), hits.indices.len(), scores.len()), (rows * k, rows * k, rows * k), "hits");
    if k == 0 {
        return vec![Vec::new(); rows];
    }
    let right = definition.scores();
    let mut chosen = Vec::new();
    for (row, right) in right.iter().enumerate() {
        let at = row * k..(row + 1) * k;
        let ids = hits.documents[at.clone()].iter().copied().zip(hits.indices[at.clone()].iter().copied());
        let of = |id| definition.eligible.iter().position(|&eligible| eligible == id);
        let positions: Vec<usize> =
            ids.map(|id| of(id).unwrap_or_else(|| panic!("row {row}: {id:?} is not eligible"))).collect();
        assert!(positions.is_sorted_by(|a, b| a < b), "row {row} is in the order of the scope: {positions:?}");
        let expected: Vec<f64> = positions.iter().map(|&position| right[position]).collect();
        close(&format!("scores of row {row}"), &scores[at], &expected, tolerance);
        let least = expected.iter().copied().fold(f64::INFINITY, f64::min);
        for (position, &score) in right.iter().enumerate().filter(|(position, _)| !positions.contains(position)) {
            let id = definition.eligible[position];
            assert!(score <= least + 2.0 * tolerance, "row {row} chose {least} and left {id:?} with {score}");
        }
        chosen.push(positions);
    }
    chosen
}

impl World {
    /// Judges a lookup by the blocks as they were sent.
    #[track_caller]
    pub(crate) fn judge_lookup(&self, request: &v1::LookupRequest, blocks: &Blocks) {
        let hits = self.client.lookup(request.clone()).expect("a lookup");
        choices(&Definition::of(&self.model, request, blocks), &hits, share_tolerance(&self.model, request));
    }

    /// Judges an attend: the choice by the blocks as they were sent, the rest by the blocks as they are fetched.
    #[track_caller]
    pub(crate) fn judge_attend(&self, request: &v1::AttendRequest, blocks: &Blocks) {
        let reply = self.client.attend(request.clone()).expect("an attend");
        self.judge_attended(request, &reply, blocks);
    }

    #[track_caller]
    pub(crate) fn judge_attended(&self, request: &v1::AttendRequest, reply: &v1::AttendReply, blocks: &Blocks) {
        let lookup = request.lookup.as_ref().expect("a lookup in it");
        let hits = reply.hits.as_ref().expect("hits are always present");
        let choices = choices(&Definition::of(&self.model, lookup, blocks), hits, share_tolerance(&self.model, lookup));
        let read = self.fetched(lookup).expect("blocks in the scope");
        let (out, lse) = Definition::of(&self.model, lookup, &read).attend(request, &choices);
        close("out", &values_of(&reply.out), &out, SUMS);
        close("lse", &values_of(&reply.lse), &lse, SUMS);
    }

    /// The blocks of a scope as the service hands them out.
    pub(crate) fn fetched(&self, request: &v1::LookupRequest) -> Answer<Blocks> {
        let mut blocks = Blocks::new();
        for range in &request.scope {
            for reply in self.client.fetch(range.document, range.begin..range.end)? {
                let id = reply.id.expect("always present");
                let (k, v) = (reply.k.expect("always present"), reply.v.expect("always present"));
                blocks.insert((id.document, id.index), Block::of(&k, &v));
            }
        }
        Ok(blocks)
    }

    /// That a fetched block is the one that was sent.
    #[track_caller]
    pub(crate) fn judge_block(&self, document: u64, sent: &v1::NewBlock, found: &v1::FetchReply) {
        assert_eq!(found.id, Some(v1::BlockId { document, index: sent.index }));
        assert_eq!(found.token_ids, sent.token_ids, "token ids");
        assert_eq!(found.text, sent.text, "text");
        for (what, sent, found) in [("k", &sent.k, &found.k), ("v", &sent.v, &found.v)] {
            let (sent, found) = (sent.as_ref().expect("sent"), found.as_ref().expect("always present"));
            assert_eq!(found.shape, sent.shape, "shape of {what}");
            if self.model.is_exact() {
                assert!(found.data == sent.data, "{what} of block {} came back with other bytes", sent.shape.len());
            } else {
                let sent: Vec<f64> = values_of(&sent.data).into_iter().map(f64::from).collect();
                close(what, &values_of(&found.data), &sent, INT8_STEP);
            }
        }
    }

    /// That a document holds exactly these blocks, and says so.
    #[track_caller]
    pub(crate) fn judge_document(&self, document: u64, sent: &[v1::NewBlock]) {
        let size = self.model.block_tokens;
        let tokens: usize = sent.iter().map(|block| block.token_ids.len()).sum();
        let info = self.client.info(document).expect("the document");
        let counts = (info.blocks as usize, info.tail_tokens as usize, info.tokens as usize);
        assert_eq!(counts, (tokens / size, tokens % size, tokens), "blocks, tail and tokens of {}", info.name);
        let found = self.client.fetch(document, 0..sent.len() as u32).expect("all of its blocks");
        assert_eq!(found.len(), sent.len());
        sent.iter().zip(&found).for_each(|(sent, found)| self.judge_block(document, sent, found));
        let beyond = self.client.fetch(document, [sent.len() as u32]).expect_err("nothing behind the end");
        assert_eq!(beyond.code, tonic::Code::NotFound, "{beyond:?}");
    }
}

/// Whether two replies name the same blocks and say the same within what sums may lose.
pub(crate) fn same_reply(found: &v1::AttendReply, right: &v1::AttendReply) -> Result<(), String> {
    let hits = |reply: &v1::AttendReply| reply.hits.clone().unwrap_or_default();
    let (of_found, of_right) = (hits(found), hits(right));
    if (&of_found.documents, &of_found.indices) != (&of_right.documents, &of_right.indices) {
        return Err(format!("blocks {:?} for {:?}", of_found.indices, of_right.indices));
    }
    let scores = (&of_found.scores, &of_right.scores);
    for (what, (found, right)) in
        [("out", (&found.out, &right.out)), ("lse", (&found.lse, &right.lse)), ("scores", scores)]
    {
        let pairs = values_of(found).into_iter().zip(values_of(right));
        let off = pairs.map(|(found, right)| f64::from(found - right).abs()).fold(0.0, f64::max);
        if found.len() != right.len() || off > SUMS {
            return Err(format!("{what} is off by {off}"));
        }
    }
    Ok(())
}
