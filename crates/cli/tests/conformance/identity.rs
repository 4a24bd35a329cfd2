//! Whose blocks are these? Keys and values mean something to one model only, and to any other the collection is closed.

use landmarkdb_grpc::wire::v1;
use sha2::{Digest, Sha256};
use tonic::Code;
use v1::error::Kind;
use v1::{Dtype, KeyRule};

use crate::answers::range;
use crate::appends::refused;
use crate::data::{Model, World, bytes_of};
use crate::harness::{Named, cases};
use crate::suite::Suite;

cases! {
    the_same_model_finds_its_collection;
    another_model_is_refused;
    one_changed_weight_or_an_adapter_is_another_model;
    another_model_is_refused_after_a_rebuild needs [Rebuild];
    blocks_of_another_shape_are_refused;
    a_document_of_another_collection_is_no_scope;
}

/// Another spec of the same name is refused, and the message shows both fingerprints.
#[track_caller]
fn is_refused(client: &crate::client::Client, info: &v1::CollectionInfo, other: &v1::CollectionSpec) {
    let refusal = client.collection(other).expect_err("another model");
    let kind = refused(refusal, Code::FailedPrecondition);
    let Kind::FingerprintMismatch(v1::error::FingerprintMismatch { collection, stored, offered }) = kind else {
        panic!("{kind:?}")
    };
    let name = info.spec.as_ref().map(|spec| spec.name.clone());
    assert_eq!((Some(collection), &stored), (name, &info.fingerprint));
    assert_eq!((stored.len(), offered.len()), (32, 32));
    assert_ne!(stored, offered);
}

fn the_same_model_finds_its_collection(suite: &Suite) {
    let client = suite.shared().client();
    let spec = Model::small().spec(&suite.name("same"));
    let info = client.collection(&spec).expect("a collection");
    assert_eq!(info.spec.as_ref(), Some(&spec), "what was asked is what it is");
    assert_eq!(client.collection(&spec).expect("again"), info);
    // Human-readable; not part of the fingerprint.
    let renamed = v1::CollectionSpec { model_name: "another name".into(), ..spec.clone() };
    assert_eq!(client.collection(&renamed).expect("the same model").id, info.id);
    let elsewhere = client.collection(&Model::small().spec(&suite.name("elsewhere"))).expect("another collection");
    assert_ne!(elsewhere.id, info.id);
    assert_eq!(elsewhere.fingerprint, info.fingerprint, "blocks of one are those of the other");
}

/// Every field that gives stored values their meaning, changed a little.
fn another_model_is_refused(suite: &Suite) {
    let client = suite.shared().client();
    let model = Model { scale: 0.5, ..Model::small() };
    let spec = model.spec(&suite.name("one model"));
    let info = client.collection(&spec).expect("a collection");
    let nearest = |number: f32| f32::from_bits(number.to_bits() + 1);
    let mut turned = model.frequencies.clone();
    turned[2] = nearest(turned[2]);
    let changes: Vec<(&str, Model)> = vec![
        ("layers", Model { layers: 3, ..model.clone() }),
        ("query heads", Model { query_heads: 8, ..model.clone() }),
        ("KV heads", Model { kv_heads: 1, ..model.clone() }),
        ("head dim", Model { head_dim: 10, ..model.clone() }),
        ("block tokens", Model { block_tokens: 5, ..model.clone() }),
        ("a frequency's last bit", Model { frequencies: turned, ..model.clone() }),
        ("fewer frequencies", Model { frequencies: model.frequencies[..2].to_vec(), ..model.clone() }),
        ("the scale's last bit", Model { scale: nearest(0.5), ..model.clone() }),
        ("key rule", Model { rule: KeyRule::Landmark, ..model.clone() }),
        ("payload", Model { payload: Dtype::Bf16, ..model.clone() }),
        ("keys", Model { keys: Dtype::Int8, ..model.clone() }),
    ];
    for (what, other) in changes {
        let _named = Named(what);
        is_refused(&client, &info, &other.spec(&spec.name));
    }
    let tokenizer = v1::CollectionSpec { tokenizer_digest: vec![9; 32].into(), ..spec.clone() };
    is_refused(&client, &info, &tokenizer);
    assert_eq!(client.collection(&spec).expect("its own model").id, info.id);
}

/// Weights as bytes: tensors one after the other. Whoever digests them cannot mistake one model for another.
fn one_changed_weight_or_an_adapter_is_another_model(suite: &Suite) {
    let client = suite.shared().client();
    let weights = bytes_of(&(0..4096).map(|i| (i as f32).sin()).collect::<Vec<f32>>());
    let spec = Model { weights: weights.clone(), ..Model::small() }.spec(&suite.name("weights"));
    let info = client.collection(&spec).expect("a collection");
    let mut changed = weights.clone();
    changed[9000] ^= 1;
    let adapted = [weights.clone(), b"adapter 1".to_vec()].concat();
    let adapted_otherwise = [weights, b"adapter 2".to_vec()].concat();
    for other in [&changed, &adapted, &adapted_otherwise] {
        let model_digest = Sha256::digest(other).to_vec().into();
        is_refused(&client, &info, &v1::CollectionSpec { model_digest, ..spec.clone() });
    }
}

fn another_model_is_refused_after_a_rebuild(suite: &Suite) {
    let mut service = suite.alone();
    let spec = Model::small().spec(&suite.name("kept"));
    let info = service.client().collection(&spec).expect("a collection");
    service.stop();
    service.discard_derived();
    service.start();
    let client = service.client();
    assert_eq!(client.collection(&spec).expect("its own model"), info);
    is_refused(&client, &info, &v1::CollectionSpec { model_digest: vec![9; 32].into(), ..spec });
}

fn blocks_of_another_shape_are_refused(suite: &Suite) {
    let client = suite.shared().client();
    let world = World::new(suite, &client, &Model::small());
    let document = world.open("text");
    for (name, model) in Model::all().into_iter().filter(|(_, model)| {
        let shape = |model: &Model| (model.layers, model.kv_heads, model.head_dim, model.block_tokens);
        shape(model) != shape(&world.model)
    }) {
        let _named = Named(name);
        let text = crate::data::Text::random(&model, model.block_tokens, 1);
        let refusal = client.append(document, text.all()).expect_err("blocks of another model");
        assert!(matches!(refused(refusal, Code::InvalidArgument), Kind::Invalid(_)));
    }
    world.judge_document(document, &[]);
}

fn a_document_of_another_collection_is_no_scope(suite: &Suite) {
    let client = suite.shared().client();
    let (one, other) = (World::new(suite, &client, &Model::small()), World::new(suite, &client, &Model::small()));
    let (a, b) = (one.store("a", &one.text(3, 1)), other.store("b", &other.text(3, 2)));
    for scope in [vec![range(b, 0, 3)], vec![range(a, 0, 3), range(b, 0, 1)], vec![range(b, 1, 1), range(a, 0, 3)]] {
        let refusal = client.attend(one.attend_question(1, scope)).expect_err("another model's blocks");
        assert!(matches!(refused(refusal, Code::InvalidArgument), Kind::Invalid(_)));
    }
}
