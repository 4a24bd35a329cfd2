//! NaN and infinity neither enter nor leave, for any finite values.

use super::*;

/// Every pair of dtypes, with a key rule and an engine that read them in ways of their own.
fn worlds() -> Vec<World> {
    let mut worlds = Vec::new();
    for payload_dtype in [DType::F32, DType::F16, DType::BF16, DType::Int8] {
        for (key_dtype, engines) in
            [(DType::F16, &[Engine::Flat, Engine::Sq8, Engine::Sq4][..]), (DType::Int8, &[Engine::Flat][..])]
        {
            for key_rule in [KeyRule::Tokens, KeyRule::Landmark, KeyRule::Mean] {
                for engine in engines {
                    let world = World::new(CollectionSpec { payload_dtype, key_dtype, key_rule, ..spec("c") });
                    world.memory.set_engine(world.collection, engine.clone()).unwrap();
                    worlds.push(world);
                }
            }
        }
    }
    worlds
}

/// The largest values that K, and V, of a collection may have.
fn largest(spec: &CollectionSpec) -> (f32, f32) {
    let of = |dtype| if dtype == DType::F16 { 65_504.0 } else { limits::NUMBER_MAX };
    (of(spec.payload_dtype).min(of(spec.key_dtype)), of(spec.payload_dtype))
}

const GRANULARITIES: [Granularity; 5] =
    [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];

/// Queries of 3e38 gave NaN, and no error (c13).
#[test]
fn queries_whose_scores_would_overflow_are_refused_by_token_and_head() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 9);
    for bad in [3e38, -3e38, f32::NAN, f32::INFINITY, 2.0 * limits::NUMBER_MAX] {
        let mut request = world.request(&[0, 1, 2], vec![range(document, 0..9)]);
        // Token 2, head 1 of (3, 4, 8).
        request.queries[(2 * 4 + 1) * 8 + 7] = bad;
        let attend = AttendRequest {
            lookup: request.clone(),
            normalisation: Normalisation::Plain,
            placement: Placement::Slots,
            without_first_tokens: false,
        };
        for refused in [
            world.memory.lookup(&request).unwrap_err(),
            world.memory.attend(&attend).unwrap_err(),
            world.memory.attend_all(std::slice::from_ref(&attend)).remove(0).unwrap_err(),
        ] {
            let MemoryError::Invalid { field, expected, found } = refused else { panic!("{refused}") };
            assert_eq!((field.as_str(), expected.as_str()), ("queries", "finite numbers up to 1e12"));
            assert!(found.ends_with(" in query token 2, query head 1"), "{found}");
        }
    }
    // A scale makes scores larger, too.
    let mut scaled = spec("scaled");
    scaled.shape.softmax_scale = 1e30;
    let mut world = World::new(scaled);
    let document = world.document("a", 9);
    let mut request = world.request(&[0], vec![range(document, 0..9)]);
    assert!(matches!(world.memory.lookup(&request), Err(MemoryError::Invalid { .. })));
    request.queries.fill(1e-19);
    assert!(world.memory.lookup(&request).unwrap().scores.iter().all(|score| score.is_finite()));
}

/// The mean of the largest keys, their channel quantizers, their scales and the products with the largest queries.
#[test]
fn the_largest_numbers_that_enter_give_finite_answers() {
    for mut world in worlds() {
        let (k, v) = largest(&world.spec);
        let document = world.memory.open_document(world.collection, "d").unwrap().id;
        let filled = |of: &Tensor, number: &dyn Fn(usize) -> f32| {
            let count = of.to_f32().unwrap().len();
            Tensor::from_f32(of.shape.clone(), &(0..count).map(number).collect::<Vec<f32>>())
        };
        let signs: [&dyn Fn(usize) -> f32; 6] = [
            &|_| 1.0,
            &|_| -1.0,
            &|i| if i % 2 == 0 { 1.0 } else { -1.0 },
            &|i| if i % 8 == 3 { 1.0 } else { 1e-30 },
            &|_| 0.0,
            &|i| f32::from_bits(i as u32 % 2),
        ];
        let mut blocks = Vec::new();
        for index in 0..12 {
            let block = world.block(index, 5);
            let sign = signs[index as usize % signs.len()];
            blocks.push(NewBlock {
                k: filled(&block.k, &|i| sign(i) * k),
                v: filled(&block.v, &|i| sign(i) * v),
                ..block
            });
        }
        world.memory.append(AppendRequest { document, blocks, expected_tokens: None }).unwrap();
        let specified = format!("{:?}", world.spec);
        for granularity in GRANULARITIES {
            for normalisation in [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden] {
                for sign in signs {
                    let mut lookup = world.request(&[0, 9], vec![range(document, 0..12)]);
                    lookup.granularity = granularity;
                    (0..lookup.queries.len()).for_each(|i| lookup.queries[i] = sign(i) * limits::NUMBER_MAX);
                    let attended = world.memory.attend(&AttendRequest {
                        lookup,
                        normalisation,
                        placement: Placement::Slots,
                        without_first_tokens: false,
                    });
                    let attended = attended.unwrap_or_else(|error| panic!("{specified}: {error}"));
                    let mut all = attended.out.iter().chain(&attended.lse).chain(&attended.hits.scores);
                    assert!(all.all(|number| number.is_finite()), "{specified}: {attended:?}");
                }
            }
        }
    }
}

/// A mean of rounded values is no larger than the largest of them, also where f16 ends.
#[test]
fn means_of_the_largest_numbers_are_stored_finite() {
    for (key_dtype, payload_dtype) in [(DType::F16, DType::F32), (DType::Int8, DType::BF16)] {
        let mut one = spec("c");
        one.shape.block_tokens = 1000;
        let mut world = World::new(CollectionSpec { key_rule: KeyRule::Mean, key_dtype, payload_dtype, ..one });
        let (k, _) = largest(&world.spec);
        let document = world.memory.open_document(world.collection, "d").unwrap().id;
        let mut block = world.block(0, 1000);
        block.k = Tensor::from_f32(block.k.shape.clone(), &vec![k; block.k.to_f32().unwrap().len()]);
        world.memory.append(AppendRequest { document, blocks: vec![block], expected_tokens: None }).unwrap();
        let request = world.request(&[0], vec![range(document, 0..1)]);
        assert!(world.memory.lookup(&request).unwrap().scores.iter().all(|score| score.is_finite()));
    }
}
