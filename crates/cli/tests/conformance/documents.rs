//! What are names and ids? A name is one living document, a deletion is final, and an id is never given out twice.

use landmarkdb_grpc::wire::v1;
use tonic::Code;
use v1::error::{Entity, Kind};

use crate::answers::{any_question, range};
use crate::appends::{refused, world};
use crate::client::{Client, Refusal};
use crate::data::{Model, World};
use crate::definition::Block;
use crate::harness::cases;
use crate::suite::Suite;

cases! {
    a_name_is_one_document_of_its_collection;
    names_are_refused_that_could_not_be_shown;
    a_replacement_is_one_step;
    a_replacement_survives_kill_and_rebuild needs [Kill, Rebuild];
    a_deletion_is_final;
    a_deletion_survives_kill_and_rebuild needs [Kill, Rebuild];
    ids_are_never_given_out_twice needs [Restart, Rebuild];
    what_does_not_exist_is_not_found;
    totals_are_what_was_stored needs [Restart];
}

fn a_name_is_one_document_of_its_collection(suite: &Suite) {
    let client = suite.shared().client();
    let (one, other) = (World::new(suite, &client, &Model::small()), World::new(suite, &client, &Model::small()));
    let a = one.store("b", &one.text(2, 1));
    let b = other.open("b");
    assert_ne!(a, b, "a document of each collection");
    assert_eq!(one.open("b"), a, "opening again gives the same");
    for name in ["ä", "a", "c c"] {
        one.open(name);
    }
    let listed = client.documents(one.collection).expect("a list");
    assert_eq!(listed.iter().map(|info| info.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c c", "ä"], "by name");
    assert!(listed.iter().all(|info| info.collection == one.collection));
    assert_eq!(listed[1], client.info(a).expect("the document"));
    let collections = client.collections().expect("a list");
    let counted = |id| collections.iter().find(|info| info.id == id).map(|info| info.documents);
    assert_eq!((counted(one.collection), counted(other.collection)), (Some(4), Some(1)));
}

fn names_are_refused_that_could_not_be_shown(suite: &Suite) {
    let client = suite.shared().client();
    let world = World::new(suite, &client, &Model::small());
    let long = "x".repeat(255);
    world.open(&long);
    for name in ["", "a\nb", "a\0", "\u{1b}[31m", "\u{9b}31m", &(long + "x")] {
        let refusal = client.document(world.collection, name).expect_err("a bad name");
        assert!(matches!(refused(refusal, Code::InvalidArgument), Kind::Invalid(_) | Kind::Missing(_)), "{name:?}");
        let refusal = client.collection(&world.model.spec(name)).expect_err("a bad name");
        assert!(matches!(refused(refusal, Code::InvalidArgument), Kind::Invalid(_) | Kind::Missing(_)), "{name:?}");
    }
    assert_eq!(client.documents(world.collection).expect("a list").len(), 1);
}

#[track_caller]
fn is_gone(refusal: Refusal) {
    let kind = refused(refusal, Code::NotFound);
    let Kind::NotFound(found) = &kind else { panic!("{kind:?}") };
    assert_eq!(found.entity(), Entity::Document);
}

/// No call finds the document.
#[track_caller]
fn all_say_gone(world: &World, document: u64) {
    let client = &world.client;
    is_gone(client.info(document).expect_err("info"));
    is_gone(client.fetch(document, [0]).expect_err("fetch"));
    is_gone(client.blocks(document, 0, 9).expect_err("blocks"));
    is_gone(client.seal(document).expect_err("seal"));
    is_gone(client.delete(document).expect_err("delete"));
    is_gone(client.append(document, world.text(1, 1).all()).expect_err("append"));
    let question = any_question(world, document, 2);
    is_gone(client.lookup(question.lookup.clone().expect("a lookup")).expect_err("lookup"));
    is_gone(client.attend(question).expect_err("attend"));
    let listed = client.documents(world.collection).expect("a list");
    assert!(listed.iter().all(|info| info.id != document), "{listed:?}");
}

/// What a document is called until it replaces another.
fn replacement(document: u64) -> String {
    format!("replacement-of-{document}")
}

fn a_replacement_is_one_step(suite: &Suite) {
    let (world, document, text) = world(suite, 14);
    let client = &world.client;
    let (fresh, other) = (world.text(3, 7), world.store("other", &world.text(2, 2)));
    let by = world.store(&replacement(document), &fresh);
    client.seal(by).expect("a seal");
    let early = world.store(&replacement(by + 2), &world.text(1, 3));
    let late = world.store("late", &world.text(1, 4));
    let elsewhere = World::new(suite, client, &world.model).open(&replacement(document));
    for (document, by) in [(document, other), (document, document), (other, by), (late, early), (document, elsewhere)] {
        refused(client.replace(document, by).expect_err("it was not made for this"), Code::InvalidArgument);
    }
    is_gone(client.replace(document, u64::MAX).expect_err("replaced by nothing"));
    is_gone(client.replace(u64::MAX / 2, by).expect_err("nothing to replace"));
    world.judge_document(document, &text.all());

    let info = client.replace(document, by).expect("a replacement");
    assert_eq!((info.id, info.name.as_str(), info.sealed), (by, "text", true));
    assert_eq!(client.info(by).expect("the document"), info);
    assert_eq!(world.open("text"), by, "it has the name");
    all_say_gone(&world, document);
    is_gone(client.replace(document, by).expect_err("it is done"));
    world.judge_document(by, &fresh.all());
    let again = world.open(&replacement(document));
    assert!(again > by, "the name that it had is free");
}

fn a_replacement_survives_kill_and_rebuild(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let (old, new) = (world.text(6, 1), world.text(5, 2));
    let document = world.store("name", &old);
    let by = world.store(&replacement(document), &new);
    let mut replaced = false;
    for rebuild in [false, true, false, true] {
        service.kill();
        if rebuild {
            service.discard_derived();
        }
        service.start();
        world.client = service.client();
        let listed = world.client.documents(world.collection).expect("a list");
        if !replaced {
            world.judge_document(document, &old.all());
            assert_eq!(listed.len(), 2, "{listed:?}");
            if rebuild {
                world.client.replace(document, by).expect("a replacement");
                replaced = true;
            }
            continue;
        }
        assert_eq!(listed.iter().map(|info| (info.id, info.name.as_str())).collect::<Vec<_>>(), [(by, "name")]);
        assert_eq!(world.open("name"), by);
        all_say_gone(&world, document);
        world.judge_document(by, &new.all());
    }
}

fn a_deletion_is_final(suite: &Suite) {
    let (world, document, text) = world(suite, 14);
    let other = world.store("other", &world.text(3, 2));
    world.judge_attend(&any_question(&world, document, 3), &Block::sent(document, &text.all(), 4));
    assert_eq!(world.client.delete(document).expect("a deletion").blocks, 3);
    all_say_gone(&world, document);
    let again = world.client.document(world.collection, "text").expect("the name is free");
    assert!(again.id != document && (again.blocks, again.tail_tokens, again.sealed) == (0, 0, false), "{again:?}");
    let fresh = world.text(2, 77);
    world.client.append(again.id, fresh.all()).expect("another text");
    world.judge_document(again.id, &fresh.all());
    world.judge_document(other, &world.text(3, 2).all());
    all_say_gone_but_listed(&world, document);
}

/// As [`all_say_gone`], while another document has the name.
#[track_caller]
fn all_say_gone_but_listed(world: &World, document: u64) {
    is_gone(world.client.info(document).expect_err("info"));
    is_gone(world.client.fetch(document, [0]).expect_err("fetch"));
    is_gone(world.client.attend(any_question(world, document, 2)).expect_err("attend"));
}

fn a_deletion_survives_kill_and_rebuild(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let (old, kept) = (world.text(6, 1), world.text(6, 2));
    let document = world.store("name", &old);
    let other = world.store("other", &kept);
    world.client.delete(document).expect("a deletion");
    let again = world.store("name", &kept);
    for rebuild in [false, true, false] {
        service.kill();
        if rebuild {
            service.discard_derived();
        }
        service.start();
        world.client = service.client();
        all_say_gone_but_listed(&world, document);
        assert_eq!(world.open("name"), again, "the name is the new document's");
        world.judge_document(again, &kept.all());
        world.judge_document(other, &kept.all());
    }
}

fn ids_are_never_given_out_twice(suite: &Suite) {
    let mut service = suite.alone();
    let mut world = World::new(suite, &service.client(), &Model::small());
    let mut given = Vec::new();
    for round in 0..4 {
        let ids = [world.store("a", &world.text(1, round)), world.open("b")];
        let other = World::new(suite, &world.client, &world.model);
        let collections = world.client.collections().expect("a list");
        assert_eq!(collections.iter().filter(|info| info.id == other.collection).count(), 1);
        assert!(ids.iter().all(|id| !given.contains(id)), "{ids:?} after {given:?}");
        given.extend(ids);
        for id in ids {
            world.client.delete(id).expect("a deletion");
        }
        service.stop();
        if round % 2 == 1 {
            service.discard_derived();
        }
        service.start();
        world.client = service.client();
    }
}

fn what_does_not_exist_is_not_found(suite: &Suite) {
    let (world, document, _) = world(suite, 14);
    let client: &Client = &world.client;
    for unknown in [0, u64::MAX, u64::MAX / 2] {
        all_say_gone(&world, unknown);
    }
    let not_found = |refusal: Refusal, entity: Entity| {
        let kind = refused(refusal, Code::NotFound);
        assert!(matches!(&kind, Kind::NotFound(found) if found.entity() == entity), "{kind:?}");
    };
    not_found(client.fetch(document, [4]).expect_err("a block behind the tail"), Entity::Block);
    not_found(client.fetch(document, [0, u32::MAX]).expect_err("a block far behind"), Entity::Block);
    not_found(client.document(u32::MAX, "x").expect_err("no such collection"), Entity::Collection);
    not_found(client.documents(u32::MAX).expect_err("no such collection"), Entity::Collection);
    let mut question = world.question(1, &[0], vec![range(document, 0, 2)]);
    question.collection = u32::MAX;
    not_found(client.lookup(question).expect_err("no such collection"), Entity::Collection);
}

fn totals_are_what_was_stored(suite: &Suite) {
    let mut service = suite.alone();
    let mut client = service.client();
    let before = client.stats().expect("totals");
    let world = World::new(suite, &client, &Model::small());
    let kept = world.store("kept", &crate::data::Text::random(&world.model, 22, 1));
    let gone = world.store("gone", &world.text(3, 2));
    client.delete(gone).expect("a deletion");
    for _ in 0..2 {
        let after = client.stats().expect("totals");
        let grown = [
            after.collections - before.collections,
            after.documents - before.documents,
            after.blocks - before.blocks,
            after.tokens - before.tokens,
        ];
        assert_eq!(grown, [1, 1, 5, 22], "collections, documents, blocks, tokens");
        let report = client.verify(None).expect("a report");
        assert_eq!(report.faults, vec![]);
        let report = client.verify(Some(kept)).expect("a report");
        assert_eq!((report.documents, report.blocks), (1, 6), "five blocks and a tail");
        service.stop();
        service.start();
        client = service.client();
    }
}
