//! The ends of documents, which nobody can look up: read of every document, and where they lie does not depend on the order that
//! documents are named in.

mod common;

use std::sync::Arc;

use common::{Activations, difference, spec};
use landmarkdb::{
    AtHandReads, BlockAttention, BlockId, BlockMemory, DType, DocumentInfo, LocalMemory, Normalisation, Place,
    Retrieval, Window,
};

/// A memory with a document of each length, in tokens.
fn memory(lengths: &[usize]) -> (tempfile::TempDir, Arc<dyn BlockMemory>, Vec<DocumentInfo>) {
    let folder = tempfile::tempdir().unwrap();
    let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path()).unwrap());
    let collection = memory.open_collection(&spec("c", DType::F32)).unwrap();
    let encode = |(seed, &tokens): (usize, &usize)| {
        let document = memory.open_document(collection.id, &seed.to_string()).unwrap();
        let mut session =
            BlockAttention::write(memory.clone(), &collection, &document, window(Normalisation::Plain), None);
        let session = session.as_mut().unwrap();
        Activations::random(tokens, seed as u64).feed(session, 0, tokens, 8);
        session.flush().unwrap();
        memory.document(document.id).unwrap()
    };
    let documents = lengths.iter().enumerate().map(encode).collect();
    (folder, memory, documents)
}

fn window(normalisation: Normalisation) -> Window {
    Window { tokens: 16, normalisation, ..Window::default() }
}

/// What two more tokens attend to after these documents, and what they have at hand.
fn read(
    memory: &Arc<dyn BlockMemory>,
    documents: &[&DocumentInfo],
    normalisation: Normalisation,
) -> (Vec<Vec<f32>>, Vec<AtHandReads>) {
    let collection = memory.collections().unwrap().remove(0);
    let documents: Vec<DocumentInfo> = documents.iter().map(|&document| document.clone()).collect();
    let retrieval = Retrieval::default();
    let session = BlockAttention::read(memory.clone(), &collection, &documents, window(normalisation), retrieval);
    let mut session = session.unwrap();
    let outs = Activations::random(2, 99).feed(&mut session, 0, 2, 2);
    let reads = session.take_reads();
    let retrieved: f64 = reads.retrieved.iter().map(|read| read.mass).sum();
    let at_hand: f64 = reads.at_hand.iter().map(|read| read.mass).sum();
    // 2 tokens, 2 layers, 4 query heads.
    assert!((retrieved + at_hand + reads.own_mass - 16.0).abs() < 1e-4, "{reads:?}");
    assert!(reads.own_mass > 0.0 && reads.at_hand.iter().all(|read| read.mass > 0.0), "{reads:?}");
    (outs, reads.at_hand)
}

#[test]
fn the_order_of_short_documents_changes_nothing() {
    let (_folder, memory, documents) = memory(&[5, 5, 5]);
    let [a, b, c] = [&documents[0], &documents[1], &documents[2]];
    for normalisation in [Normalisation::Plain, Normalisation::Hidden] {
        let (outs, at_hand) = read(&memory, &[a, b, c], normalisation);
        assert!(difference(&outs, &read(&memory, &[c, a, b], normalisation).0) < 1e-5);
        assert!(difference(&outs, &read(&memory, &[b, c], normalisation).0) > 1e-3, "all three are read");
        let at_hand: Vec<_> = at_hand.iter().map(|read| (read.block, read.place)).collect();
        let tail = |document: &DocumentInfo, place| (BlockId { document: document.id, index: 0 }, place);
        assert_eq!(at_hand, [tail(a, Place::Tail), tail(b, Place::Tail), tail(c, Place::Window)]);
    }
}

/// The window of the last document filled the sink of a first one that has no full block, and was read twice.
#[test]
fn a_first_document_without_a_full_block_has_no_sink() {
    let (_folder, memory, documents) = memory(&[5, 11]);
    let [short, long] = [&documents[0], &documents[1]];
    let (outs, at_hand) = read(&memory, &[short, long], Normalisation::Plain);
    let places: Vec<(u32, Place)> = at_hand.iter().map(|at_hand| (at_hand.block.index, at_hand.place)).collect();
    assert_eq!(places, [(0, Place::Tail), (0, Place::Window), (1, Place::Window)]);
    let without_sink = {
        let collection = memory.collections().unwrap().remove(0);
        let window = Window { sink: false, ..window(Normalisation::Plain) };
        let documents = [short.clone(), long.clone()];
        let mut session =
            BlockAttention::read(memory.clone(), &collection, &documents, window, Retrieval::default()).unwrap();
        Activations::random(2, 99).feed(&mut session, 0, 2, 2)
    };
    assert!(difference(&outs, &without_sink) < 1e-6, "{}", difference(&outs, &without_sink));
}

#[test]
fn tails_sink_and_window_are_named() {
    let (_folder, memory, documents) = memory(&[19, 8, 45]);
    let (_, at_hand) = read(&memory, &documents.iter().collect::<Vec<_>>(), Normalisation::Plain);
    let places: Vec<(u64, u32, Place)> =
        at_hand.iter().map(|at_hand| (at_hand.block.document.0, at_hand.block.index, at_hand.place)).collect();
    let [a, _, c] = [&documents[0], &documents[1], &documents[2]];
    let window = (3..6).map(|index| (c.id.0, index, Place::Window));
    let before = [(a.id.0, 2, Place::Tail), (a.id.0, 0, Place::Sink)];
    assert_eq!(places, before.into_iter().chain(window).collect::<Vec<_>>());
}
