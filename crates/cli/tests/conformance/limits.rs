//! Is what is too much, absent or unknown refused by name, with the stated code, and does the service go on?

use landmarkdb_grpc::wire::v1;
use tonic::Code;
use v1::error::Kind;

use crate::answers::{any_question, range};
use crate::appends::{refused, world};
use crate::client::Refusal;
use crate::data::{Model, World};
use crate::harness::{Named, cases};
use crate::suite::Suite;

cases! {
    requests_over_a_limit_are_refused_by_name;
    absent_fields_are_missing_by_name;
    unknown_numbers_and_wrong_sizes_are_invalid;
    bad_models_are_refused_by_field;
}

type Change = fn(&mut v1::AttendRequest);

fn lookup(request: &mut v1::AttendRequest) -> &mut v1::LookupRequest {
    request.lookup.as_mut().expect("a lookup")
}

fn scope(request: &mut v1::AttendRequest) -> &mut v1::BlockRange {
    &mut lookup(request).scope[0]
}

#[track_caller]
fn is_missing(refusal: Refusal, field: &str) {
    let kind = refused(refusal, Code::InvalidArgument);
    let Kind::Missing(missing) = &kind else { panic!("{kind:?}") };
    assert!(missing.field.contains(field), "{:?} names {field}", missing.field);
}

#[track_caller]
fn is_over(refusal: Refusal, limit: u64, found: u64) {
    let kind = refused(refusal, Code::ResourceExhausted);
    let Kind::LimitExceeded(over) = &kind else { panic!("{kind:?}") };
    assert!(!over.what.is_empty() && (over.limit, over.found) == (limit, found), "{over:?}");
}

#[track_caller]
fn is_invalid(refusal: Refusal) {
    let kind = refused(refusal, Code::InvalidArgument);
    let Kind::Invalid(invalid) = &kind else { panic!("{kind:?}") };
    assert!(!invalid.field.is_empty() && !invalid.expected.is_empty(), "{invalid:?}");
}

fn requests_over_a_limit_are_refused_by_name(suite: &Suite) {
    let (world, document, text) = world(suite, 12);
    let client = &world.client;
    let question = any_question(&world, document, 3);
    let mut many = question.clone();
    lookup(&mut many).scope = vec![range(document, 0, 1); 1025];
    is_over(client.attend(many).expect_err("1025 ranges"), 1024, 1025);
    let mut long = question.clone();
    let tokens = lookup(&mut long);
    (tokens.distances, tokens.queries) = (vec![0; 4097], vec![0; 4097 * 4 * 8 * 4].into());
    is_over(client.attend(long).expect_err("4097 query tokens"), 4096, 4097);
    let requests = vec![question.clone(); 1025];
    is_over(client.attend_all(v1::AttendAllRequest { requests }).expect_err("1025 requests"), 1024, 1025);

    let mut blocks = vec![text.block(8..12); 1025];
    blocks.iter_mut().enumerate().for_each(|(i, block)| block.index = 3 + i as u32);
    is_over(client.append(document, blocks).expect_err("1025 blocks"), 1024, 1025);
    let mut verbose = world.text(4, 5).block(12..16);
    verbose.text.as_mut().expect("a text").text = vec![b'x'; (1 << 20) + 1].into();
    is_over(client.append(document, vec![verbose]).expect_err("more than 1 MiB of text"), 1 << 20, (1 << 20) + 1);

    for top_k in [0, 1025, u32::MAX] {
        let mut request = question.clone();
        lookup(&mut request).top_k = top_k;
        is_invalid(client.attend(request).expect_err("a top_k out of range"));
    }
    // At the limits themselves it answers.
    let mut most = question.clone();
    lookup(&mut most).top_k = 1024;
    assert_eq!(client.attend(most).expect("an attend").hits.expect("hits").k, 3);
    let fetched = client.fetch(document, (0..4096).map(|i| i % 3)).expect("4096 blocks");
    assert_eq!(fetched.len(), 4096);
    world.judge_document(document, &text.all());
}

fn absent_fields_are_missing_by_name(suite: &Suite) {
    let (world, document, text) = world(suite, 12);
    let client = &world.client;
    let cases: [(&str, Change); 6] = [
        ("lookup", |request| request.lookup = None),
        ("normalisation", |request| request.normalisation = 0),
        ("granularity", |request| lookup(request).granularity = 0),
        ("block_score", |request| lookup(request).block_score = 0),
        ("distances", |request| {
            lookup(request).distances.clear();
            lookup(request).queries.clear();
        }),
        ("lookup", |request| *request = v1::AttendRequest::default()),
    ];
    for (field, change) in cases {
        let mut request = any_question(&world, document, 3);
        change(&mut request);
        is_missing(client.attend(request).expect_err("an absent field"), field);
    }
    type Spoil = fn(&mut v1::NewBlock);
    let cases: [(&str, Spoil); 4] = [
        ("text", |block| block.text = None),
        ("k", |block| block.k = None),
        ("v", |block| block.v = None),
        ("dtype", |block| block.k.as_mut().expect("k").dtype = 0),
    ];
    for (field, change) in cases {
        let mut block = text.block(8..12);
        change(&mut block);
        is_missing(client.append(document, vec![block]).expect_err("an absent field"), field);
    }
    is_missing(client.open_collection(v1::OpenCollectionRequest::default()).expect_err("no spec"), "spec");
    let request = v1::FetchRequest { document, blocks: vec![0], dtype: 0 };
    is_missing(client.fetch_until(request).1.expect("no dtype"), "dtype");
    let request = v1::SetEngineRequest { collection: world.collection, engine: 0, faiss: None };
    is_missing(client.set_engine(request).expect_err("no engine"), "engine");
    let spec = v1::CollectionSpec { key_rule: 0, ..world.model.spec("no rule") };
    is_missing(client.collection(&spec).expect_err("no key rule"), "key_rule");
    world.judge_document(document, &text.all());
}

fn unknown_numbers_and_wrong_sizes_are_invalid(suite: &Suite) {
    let (world, document, text) = world(suite, 12);
    let client = &world.client;
    let cases: [Change; 12] = [
        |request| request.normalisation = 99,
        |request| request.original_within_tokens = Some(0),
        |request| lookup(request).granularity = 99,
        |request| lookup(request).block_score = -1,
        |request| lookup(request).layer = 2,
        |request| lookup(request).layer = u32::MAX,
        |request| lookup(request).queries = vec![0; 7].into(),
        |request| lookup(request).queries = vec![0; 4 * 4 * 8].into(),
        |request| lookup(request).distances.push(1),
        |request| scope(request).end = 4,
        |request| scope(request).end = u32::MAX,
        |request| (scope(request).begin, scope(request).end) = (2, 1),
    ];
    for (i, change) in cases.into_iter().enumerate() {
        let _named = Named(format!("change {i}"));
        let mut request = any_question(&world, document, 3);
        change(&mut request);
        if i == 11 {
            // "Not larger than `begin` means none": none is an answer, too.
            if let Ok(reply) = client.attend(request) {
                assert_eq!(reply.hits.expect("always present").k, 0);
            }
            continue;
        }
        is_invalid(client.attend(request).expect_err("a request that makes no sense"));
    }
    let cases: [fn(&mut v1::NewBlock); 8] = [
        |block| block.k.as_mut().expect("k").dtype = 4,
        |block| block.k.as_mut().expect("k").dtype = 99,
        |block| block.k.as_mut().expect("k").shape = vec![u32::MAX; 4],
        |block| block.k.as_mut().expect("k").shape = vec![1 << 31, 1 << 31, 4, 1],
        |block| block.v.as_mut().expect("v").data = vec![0; 5].into(),
        |block| block.token_ids.push(1),
        |block| block.text.as_mut().expect("text").offsets.truncate(3),
        |block| block.text.as_mut().expect("text").offsets[3] = 1 << 20,
    ];
    for (i, change) in cases.into_iter().enumerate() {
        let _named = Named(format!("block change {i}"));
        let mut block = world.text(4, 6).block(12..16);
        change(&mut block);
        is_invalid(client.append(document, vec![block]).expect_err("a block that makes no sense"));
    }
    let request = v1::FetchRequest { document, blocks: vec![0], dtype: v1::Dtype::Int8.into() };
    is_invalid(client.fetch_until(request).1.expect("int8 is no dtype of a tensor"));
    world.judge_document(document, &text.all());
}

fn bad_models_are_refused_by_field(suite: &Suite) {
    let client = suite.shared().client();
    type Spoil = fn(&mut v1::CollectionSpec, &mut v1::ModelShape);
    let cases: [Spoil; 15] = [
        |_, shape| shape.layers = 0,
        |_, shape| shape.layers = u32::MAX,
        |_, shape| shape.query_heads = 3,
        |_, shape| shape.kv_heads = 0,
        |_, shape| shape.head_dim = 0,
        |_, shape| shape.head_dim = 1 << 20,
        |_, shape| shape.block_tokens = 1,
        |_, shape| shape.softmax_scale = f32::NAN,
        |_, shape| shape.softmax_scale = 0.0,
        |_, shape| shape.rope_frequencies = vec![1; 5].into(),
        |_, shape| shape.rope_frequencies = vec![0; 4 * 5].into(),
        |_, shape| shape.rope_frequencies = f32::INFINITY.to_le_bytes().to_vec().into(),
        |spec, _| spec.model_digest = b"short".to_vec().into(),
        |spec, _| spec.key_dtype = v1::Dtype::F32.into(),
        |spec, _| spec.payload_dtype = 99,
    ];
    let name = suite.name("bad model");
    for (i, spoil) in cases.into_iter().enumerate() {
        let _named = Named(format!("case {i}"));
        let mut spec = Model::small().spec(&name);
        let mut shape = spec.shape.take().expect("a shape");
        spoil(&mut spec, &mut shape);
        spec.shape = Some(shape);
        is_invalid(client.collection(&spec).expect_err("a model that nobody has"));
    }
    assert!(
        client
            .collections()
            .expect("a list")
            .iter()
            .all(|info| { info.spec.as_ref().is_some_and(|spec| spec.name != name) })
    );
    World::new(suite, &client, &Model::small()).open("the service goes on");
}
