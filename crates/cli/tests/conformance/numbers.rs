//! Are numbers numbers? NaN and infinity never enter, and never come out of finite ones.

use landmarkdb_grpc::wire::v1;
use tonic::Code;
use v1::error::Kind;
use v1::{BlockScore, Dtype, Normalisation};

use crate::answers::{GRANULARITIES, any_question, stored};
use crate::appends::{refused, world};
use crate::client::Refusal;
use crate::data::{Model, Text, World, bytes_of, values_of};
use crate::harness::{Named, cases};
use crate::suite::Suite;

cases! {
    numbers_that_are_none_never_enter;
    queries_that_are_no_numbers_are_refused;
    finite_queries_get_finite_answers_or_none;
    zeros_and_tiny_numbers_are_numbers;
}

#[track_caller]
fn is_invalid(refusal: Refusal, field: &str) {
    let kind = refused(refusal, Code::InvalidArgument);
    let Kind::Invalid(invalid) = &kind else { panic!("{kind:?}") };
    assert!(invalid.field.contains(field), "{:?} names {field}", invalid.field);
}

/// A tensor of a dtype with one number in place of its `at`-th.
fn with_number(tensor: &mut v1::Tensor, dtype: Dtype, at: usize, bits: u32) {
    let values = values_of(&tensor.data);
    let mut bytes: Vec<Vec<u8>> = match dtype {
        Dtype::F16 => values.iter().map(|&x| half::f16::from_f32(x).to_le_bytes().to_vec()).collect(),
        Dtype::Bf16 => values.iter().map(|&x| half::bf16::from_f32(x).to_le_bytes().to_vec()).collect(),
        _ => values.iter().map(|&x| x.to_le_bytes().to_vec()).collect(),
    };
    let size = bytes[at].len();
    bytes[at] = bits.to_le_bytes()[..size].to_vec();
    tensor.set_dtype(dtype);
    tensor.data = bytes.concat().into();
}

fn numbers_that_are_none_never_enter(suite: &Suite) {
    let client = suite.shared().client();
    let (f32_bits, f16, bf16) = (f32::to_bits, Dtype::F16, Dtype::Bf16);
    for (name, model) in Model::all() {
        let world = World::new(suite, &client, &model);
        let text = Text::random(&model, 3 * model.block_tokens, 1);
        let document = world.open("text");
        client.append(document, text.cut(0..model.block_tokens)).expect("an append");
        let mut none = vec![
            (Dtype::F32, f32_bits(f32::NAN)),
            (Dtype::F32, f32_bits(f32::INFINITY)),
            (Dtype::F32, f32_bits(f32::NEG_INFINITY)),
            (Dtype::F32, 0x7f80_0001),
            (f16, 0x7c00),
            (f16, 0xfe00),
            (bf16, 0x7f80),
            (bf16, 0xffc0),
        ];
        if model.payload == Dtype::F16 {
            // 65,520 is rounded to infinity.
            none.extend([(Dtype::F32, f32_bits(65_520.0)), (bf16, 0x7f00)]);
        }
        for (dtype, bits) in none {
            for is_k in [true, false] {
                let _named = Named(format!("{name}, {dtype:?} {bits:#x} in K: {is_k}"));
                let mut blocks = text.cut(model.block_tokens..3 * model.block_tokens);
                let block = &mut blocks[1];
                let tensor = if is_k { &mut block.k } else { &mut block.v }.as_mut().expect("sent");
                let last = tensor.shape.iter().product::<u32>() as usize - 1;
                with_number(tensor, dtype, last, bits);
                is_invalid(client.append(document, blocks).expect_err("no number"), if is_k { "k" } else { "v" });
            }
        }
        world.judge_document(document, &text.cut(0..model.block_tokens));
    }
}

fn queries_that_are_no_numbers_are_refused(suite: &Suite) {
    let (world, document, _) = world(suite, 12);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut request = any_question(&world, document, 3);
        let lookup = request.lookup.as_mut().expect("a lookup");
        let mut queries = values_of(&lookup.queries);
        *queries.last_mut().expect("a number") = bad;
        lookup.queries = bytes_of(&queries).into();
        is_invalid(world.client.lookup(lookup.clone()).expect_err("no number"), "queries");
        is_invalid(world.client.attend(request.clone()).expect_err("no number"), "queries");
        let all = v1::AttendAllRequest { requests: vec![request] };
        let outcome = world.client.attend_all(all).expect("outcomes").outcomes.remove(0).outcome;
        let Some(v1::attend_outcome::Outcome::Error(error)) = outcome else { panic!("{outcome:?}") };
        assert!(matches!(error.kind, Some(Kind::Invalid(_))), "{error:?}");
    }
}

/// Queries of 3e38 gave NaN with status OK: their scores overflow.
fn finite_queries_get_finite_answers_or_none(suite: &Suite) {
    let client = suite.shared().client();
    for (name, model) in Model::all() {
        let (world, document, _) = stored(suite, &client, &model, 6);
        for size in [1e4, 1e20, 1e30, 3e38] {
            for granularity in GRANULARITIES {
                for block_score in [BlockScore::Max, BlockScore::LogSumExp] {
                    for how in [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden] {
                        let _named = Named(format!("{name}, {size:e}, {granularity:?}, {block_score:?}, {how:?}"));
                        let mut request = any_question(&world, document, 6);
                        request.set_normalisation(how);
                        let lookup = request.lookup.as_mut().expect("a lookup");
                        lookup.set_granularity(granularity);
                        lookup.set_block_score(block_score);
                        lookup.queries = bytes_of(&vec![size; lookup.queries.len() / 4]).into();
                        match world.client.attend(request) {
                            Ok(reply) => {
                                let scores = values_of(&reply.hits.expect("always present").scores);
                                assert!(scores.iter().all(|score| !score.is_nan() && *score < f32::INFINITY), "scores");
                                assert!(values_of(&reply.out).iter().all(|number| number.is_finite()), "out");
                                assert!(values_of(&reply.lse).iter().all(|number| number.is_finite()), "lse");
                            }
                            Err(refusal) => is_invalid(refusal, "queries"),
                        }
                    }
                }
            }
        }
    }
}

fn zeros_and_tiny_numbers_are_numbers(suite: &Suite) {
    let client = suite.shared().client();
    for (name, model) in Model::all() {
        let _named = Named(name);
        let world = World::new(suite, &client, &model);
        let mut text = world.text(4, 1);
        let zero = vec![0.0; model.token_len()];
        let tiny = vec![-1e-30; model.token_len()];
        for token in 0..text.tokens() / 2 {
            text.with_token(token, &zero, if token % 2 == 0 { &zero } else { &tiny });
        }
        let document = world.store("zeros", &text);
        let mut request = any_question(&world, document, 4);
        let lookup = request.lookup.as_mut().expect("a lookup");
        lookup.top_k = 4;
        for queries in [vec![0.0; lookup.queries.len() / 4], vec![-0.0; lookup.queries.len() / 4]] {
            request.lookup.as_mut().expect("a lookup").queries = bytes_of(&queries).into();
            let reply = client.attend(request.clone()).expect("an attend");
            // Every token weighs the same, and every block has a quarter.
            let tokens = (4 * model.block_tokens) as f32;
            assert!(values_of(&reply.lse).iter().all(|lse| (lse - tokens.ln()).abs() < 1e-4), "{:?}", reply.lse);
            let scores = values_of(&reply.hits.expect("always present").scores);
            assert!(scores.iter().all(|score| (score + 4f32.ln()).abs() < 1e-4), "{scores:?}");
            assert!(values_of(&reply.out).iter().all(|number| number.is_finite()));
        }
    }
}
