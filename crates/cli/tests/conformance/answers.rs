//! Does a lookup choose the best blocks, and does attention say what is in them? Judged by the definition.

use landmarkdb_grpc::wire::v1;
use rand::RngExt;
use v1::{BlockScore, Engine, Granularity, KeyRule, Normalisation};

use crate::data::{Model, Text, World, bytes_of, seeded, values_of};
use crate::definition::{Block, Blocks, rotated};
use crate::harness::{Named, cases};
use crate::judge::{SUMS, close, same_reply};
use crate::suite::Suite;

cases! {
    every_choice_follows_the_definition;
    every_normalisation_follows_the_definition;
    other_documents_count_as_older_blocks;
    the_tail_of_a_sealed_document_is_a_shorter_block;
    nothing_eligible_is_nothing_read;
    everything_retrieved_is_full_attention;
    equal_scores_go_to_the_lower_block;
    exact_engines_choose_the_same_blocks;
    the_same_question_gets_the_same_bits;
}

pub(crate) const GRANULARITIES: [Granularity; 5] =
    [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];

/// How far sq8 may be off in the logarithm of a share: its denominator is taken from int8 keys.
const SCANNED: f64 = 0.02;

const NORMALISATIONS: [Normalisation; 3] = [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden];

pub(crate) fn range(document: u64, begin: u32, end: u32) -> v1::BlockRange {
    v1::BlockRange { document, begin, end }
}

impl World {
    /// Random queries at these distances; top 3 by the largest key, each token and head for itself.
    pub(crate) fn question(&self, seed: u64, distances: &[u32], scope: Vec<v1::BlockRange>) -> v1::LookupRequest {
        v1::LookupRequest {
            collection: self.collection,
            layer: (seed % self.model.layers as u64) as u32,
            queries: bytes_of(&self.model.queries(&mut seeded(seed), distances.len())).into(),
            distances: distances.to_vec(),
            scope,
            top_k: 3,
            block_score: BlockScore::Max.into(),
            granularity: Granularity::TokenHead.into(),
        }
    }

    pub(crate) fn attend_question(&self, seed: u64, scope: Vec<v1::BlockRange>) -> v1::AttendRequest {
        let lookup = Some(self.question(seed, &[0, 3], scope));
        v1::AttendRequest { lookup, normalisation: Normalisation::Plain.into(), ..Default::default() }
    }
}

/// A document of so many blocks in a new collection, with its blocks as they were sent.
pub(crate) fn stored(
    suite: &Suite,
    client: &crate::client::Client,
    model: &Model,
    blocks: usize,
) -> (World, u64, Blocks) {
    let world = World::new(suite, client, model);
    let text = world.text(blocks, 7);
    let document = world.store("text", &text);
    let sent = Block::sent(document, &text.all(), model.block_tokens);
    (world, document, sent)
}

fn every_choice_follows_the_definition(suite: &Suite) {
    let shared = suite.shared();
    for (name, model) in Model::all() {
        let _named = Named(name);
        let (world, document, sent) = stored(suite, &shared.client(), &model, 11);
        let mut seed = 0;
        for granularity in GRANULARITIES {
            for block_score in [BlockScore::Max, BlockScore::LogSumExp] {
                for (top_k, scope) in [(1, 0..11), (2, 3..10), (10, 0..11), (11, 0..11), (20, 0..11), (5, 4..5)] {
                    seed += 1;
                    let mut request = world.question(seed, &[0, 5, 2], vec![range(document, scope.start, scope.end)]);
                    request.top_k = top_k;
                    request.set_granularity(granularity);
                    request.set_block_score(block_score);
                    world.judge_lookup(&request, &sent);
                }
            }
        }
    }
}

fn every_normalisation_follows_the_definition(suite: &Suite) {
    let shared = suite.shared();
    for (name, model) in Model::all() {
        let _named = Named(name);
        let (world, document, sent) = stored(suite, &shared.client(), &model, 9);
        for (seed, granularity) in GRANULARITIES.into_iter().enumerate() {
            for normalisation in NORMALISATIONS {
                for (top_k, distances) in [(1, vec![0]), (3, vec![0, 1, 70]), (9, vec![2, 1]), (12, vec![0; 20])] {
                    let mut lookup = world.question(seed as u64, &distances, vec![range(document, 0, 9)]);
                    lookup.top_k = top_k;
                    lookup.set_granularity(granularity);
                    for original_within_tokens in [None, Some(4 * model.block_tokens as u32), Some(1 << 20)] {
                        let (lookup, normalisation) = (Some(lookup.clone()), normalisation.into());
                        let mut request = v1::AttendRequest { lookup, normalisation, ..Default::default() };
                        request.original_within_tokens = original_within_tokens;
                        for without_first_tokens in [false, request.normalisation() == Normalisation::Plain] {
                            request.without_first_tokens = without_first_tokens;
                            world.judge_attend(&request, &sent);
                        }
                    }
                }
            }
        }
    }
}

/// Documents that end in tails, two of them without a full block, looked up and attended to with others that have none.
fn the_tail_of_a_sealed_document_is_a_shorter_block(suite: &Suite) {
    let shared = suite.shared();
    for (name, model) in Model::all() {
        let _named = Named(name);
        let world = World::new(suite, &shared.client(), &model);
        let size = model.block_tokens;
        let mut sent = Blocks::new();
        let mut scope = Vec::new();
        let lengths = [3 * size + 1, size - 1, 2 * size, 1, 5 * size - 1];
        for (seed, tokens) in (40..).zip(lengths) {
            let text = Text::random(&model, tokens, seed);
            let document = world.store(&format!("text {seed}"), &text);
            let info = world.client.seal(document).expect("a seal");
            let blocks = info.blocks + u32::from(info.tail_tokens > 0);
            sent.extend(Block::sealed(document, &text.all()));
            scope.push(range(document, 0, blocks));
            let beyond = world.question(1, &[0], vec![range(document, 0, blocks + 1)]);
            let refusal = world.client.lookup(beyond).expect_err("a block behind the tail");
            assert_eq!(refusal.code, tonic::Code::InvalidArgument, "{refusal:?}");
            if model.rule == KeyRule::Landmark && info.tail_tokens > 0 {
                let tail = world.question(1, &[0], vec![range(document, 0, blocks)]);
                let refusal = world.client.lookup(tail).expect_err("a tail has no landmark");
                assert_eq!(refusal.code, tonic::Code::InvalidArgument, "{refusal:?}");
            }
        }
        if model.rule == KeyRule::Landmark {
            continue;
        }
        let mut seed = 0;
        for granularity in GRANULARITIES {
            for (normalisation, block_score) in
                NORMALISATIONS.into_iter().zip([BlockScore::LogSumExp, BlockScore::Max, BlockScore::LogSumExp])
            {
                for scope in [scope.clone(), scope[..2].to_vec(), vec![scope[3]]] {
                    seed += 1;
                    let mut lookup = world.question(seed, &[0, 5], scope);
                    lookup.top_k = [1, 4, 30][seed as usize % 3];
                    lookup.set_granularity(granularity);
                    lookup.set_block_score(block_score);
                    world.judge_lookup(&lookup, &sent);
                    for original_within_tokens in [None, Some(1 << 20)] {
                        let (lookup, normalisation) = (Some(lookup.clone()), normalisation.into());
                        let mut request = v1::AttendRequest { lookup, normalisation, ..Default::default() };
                        request.original_within_tokens = original_within_tokens;
                        for without_first_tokens in [false, request.normalisation() == Normalisation::Plain] {
                            request.without_first_tokens = without_first_tokens;
                            world.judge_attend(&request, &sent);
                        }
                    }
                }
            }
        }
    }
}

fn other_documents_count_as_older_blocks(suite: &Suite) {
    let shared = suite.shared();
    let world = World::new(suite, &shared.client(), &Model::small());
    let mut sent = Blocks::new();
    let documents: Vec<u64> = (0..3)
        .map(|i| {
            let text = world.text(6, 20 + i);
            let document = world.store(&format!("text {i}"), &text);
            sent.extend(Block::sent(document, &text.all(), world.model.block_tokens));
            document
        })
        .collect();
    let [a, b, c] = documents[..] else { unreachable!("three documents") };
    for (seed, scope) in [
        vec![range(a, 0, 6), range(b, 1, 4), range(c, 0, 2)],
        vec![range(c, 0, 2), range(a, 0, 6)],
        vec![range(a, 2, 2), range(b, 0, 6), range(c, 5, 5)],
        vec![range(a, 0, 3), range(a, 4, 6)],
        vec![range(b, 0, 1), range(c, 0, 6), range(a, 5, 6)],
    ]
    .into_iter()
    .enumerate()
    {
        for top_k in [1, 2, 4, 30] {
            let mut request = world.attend_question(seed as u64, scope.clone());
            request.lookup.as_mut().expect("a lookup").top_k = top_k;
            for within in [None, Some(5 * world.model.block_tokens as u32), Some(1 << 20)] {
                request.original_within_tokens = within;
                world.judge_attend(&request, &sent);
            }
        }
    }
}

fn nothing_eligible_is_nothing_read(suite: &Suite) {
    let shared = suite.shared();
    let (world, document, _) = stored(suite, &shared.client(), &Model::small(), 2);
    for scope in [vec![], vec![range(document, 1, 1)], vec![range(document, 0, 0), range(document, 2, 2)]] {
        let reply = world.client.attend(world.attend_question(1, scope)).expect("an attend");
        let hits = reply.hits.expect("always present");
        assert_eq!((hits.k, hits.documents.len(), hits.indices.len(), hits.scores.len()), (0, 0, 0, 0));
        assert_eq!(values_of(&reply.lse), vec![f32::NEG_INFINITY; 2 * world.model.query_heads]);
        assert_eq!(values_of(&reply.out), vec![0.0; 2 * world.model.query_heads * world.model.head_dim]);
    }
}

/// With every block retrieved each is at its true distance: the answer is that of attention over the whole text, which is
/// written down here without slots.
fn everything_retrieved_is_full_attention(suite: &Suite) {
    let shared = suite.shared();
    let model = Model::small();
    let (world, document, sent) = stored(suite, &shared.client(), &model, 7);
    let mut request = world.attend_question(2, vec![range(document, 0, 7)]);
    let lookup = request.lookup.as_mut().expect("a lookup");
    (lookup.top_k, lookup.layer) = (7, 1);
    let (queries, distances) = (values_of(&lookup.queries), lookup.distances.clone());
    let reply = world.client.attend(request.clone()).expect("an attend");
    // That distance is the original one, so that it is the same to say so, however short the model's context.
    for within in [1, 1 << 20] {
        request.original_within_tokens = Some(within);
        let original = world.client.attend(request.clone()).expect("an attend");
        assert_eq!(same_reply(&original, &reply), Ok(()), "within {within} tokens");
    }

    let (dim, size) = (model.head_dim, model.block_tokens);
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (row, query) in queries.chunks(dim).enumerate() {
        let query: Vec<f64> = query.iter().map(|&number| number.into()).collect();
        let (token, head) = (row / model.query_heads, row % model.query_heads);
        let piece = model.kv_heads + head / (model.query_heads / model.kv_heads);
        let (mut values, mut sum) = (vec![0.0; dim], 0.0);
        for position in 0..7 * size {
            let block = &sent[&(document, (position / size) as u32)];
            let at = (piece * size + position % size) * dim;
            // Token `j` of a block is stored rotated by `j`; the window begins behind the last block.
            let distance = (7 * size + distances[token] as usize - position / size * size) as f64;
            let query = rotated(&model.frequencies, &query, distance);
            let score: f64 = query.iter().zip(&block.k[at..]).map(|(q, k)| q * k).sum::<f64>() * model.scale as f64;
            sum += score.exp();
            values.iter_mut().zip(&block.v[at..]).for_each(|(value, v)| *value += score.exp() * v);
        }
        out.extend(values.into_iter().map(|value| value / sum));
        lse.push(sum.ln());
    }
    close("out", &values_of(&reply.out), &out, SUMS);
    close("lse", &values_of(&reply.lse), &lse, SUMS);
}

fn equal_scores_go_to_the_lower_block(suite: &Suite) {
    let shared = suite.shared();
    // Without rotation recent blocks score as older ones do.
    let model = Model { frequencies: Vec::new(), ..Model::small() };
    let world = World::new(suite, &shared.client(), &model);
    let once = world.text(1, 3);
    let mut text = world.text(9, 4);
    for token in 0..text.tokens() {
        let (k, v) = once.token(token % model.block_tokens);
        text.with_token(token, k, v);
    }
    let document = world.store("nine times the same block", &text);
    for granularity in GRANULARITIES {
        let mut request = world.question(5, &[0, 1], vec![range(document, 1, 9)]);
        request.set_granularity(granularity);
        let hits = world.client.lookup(request).expect("a lookup");
        assert!(hits.indices.chunks(3).all(|row| row == [1, 2, 3]), "{granularity:?}: {:?}", hits.indices);
    }
}

fn exact_engines_choose_the_same_blocks(suite: &Suite) {
    let shared = suite.shared();
    let (world, document, sent) = stored(suite, &shared.client(), &Model::small(), 40);
    let questions: Vec<_> = (0..20).map(|seed| world.question(seed, &[0, 9], vec![range(document, 0, 40)])).collect();
    questions.iter().for_each(|question| world.judge_lookup(question, &sent));
    let ask = || questions.iter().map(|question| world.client.lookup(question.clone()).expect("a lookup"));
    let flat: Vec<_> = ask().collect();
    for engine in [Engine::Sq8, Engine::Flat] {
        let request = v1::SetEngineRequest { collection: world.collection, engine: engine.into(), faiss: None };
        let info = world.client.set_engine(request).expect("an engine that needs nothing");
        assert_eq!(info.engine(), engine);
        for (flat, found) in flat.iter().zip(ask()) {
            assert_eq!((&flat.documents, &flat.indices), (&found.documents, &found.indices), "{engine:?}");
            let expected: Vec<f64> = values_of(&flat.scores).into_iter().map(f64::from).collect();
            close("scores", &values_of(&found.scores), &expected, SCANNED);
        }
    }
}

fn the_same_question_gets_the_same_bits(suite: &Suite) {
    let shared = suite.shared();
    let (world, document, _) = stored(suite, &shared.client(), &Model::small(), 30);
    let mut rng = seeded(9);
    for seed in 0..10 {
        let begin = rng.random_range(0..10);
        let request = world.attend_question(seed, vec![range(document, begin, 30)]);
        let first = world.client.attend(request.clone()).expect("an attend");
        // Another connection, and beside other requests.
        let again = shared.client().attend(request.clone()).expect("an attend");
        let others = (0..8).map(|other| world.attend_question(100 + other, vec![range(document, 0, 20)]));
        let requests = others.chain([request.clone()]).collect();
        let mut all = shared.client().attend_all(v1::AttendAllRequest { requests }).expect("outcomes").outcomes;
        let beside = all.pop().and_then(|last| last.outcome);
        assert_eq!(first, again);
        assert_eq!(beside, Some(v1::attend_outcome::Outcome::Reply(first.clone())));
        let hits = world.client.lookup(request.lookup.clone().expect("a lookup")).expect("a lookup");
        assert_eq!(first.hits, Some(hits), "attend reads what lookup chooses");
    }
}

/// Queries for tests that only want an answer.
pub(crate) fn any_question(world: &World, document: u64, blocks: u32) -> v1::AttendRequest {
    world.attend_question(u64::from(blocks), vec![range(document, 0, blocks)])
}
