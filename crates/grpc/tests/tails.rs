//! The ends of documents. Those of sealed ones are retrieved like blocks; those that nobody can look up are read of every document,
//! and where they lie does not depend on the order that documents are named in.

mod common;

use std::sync::Arc;

use common::{Activations, Served, difference, shape, spec};
use landmarkdb::{
    AtHandReads, BlockAttention, BlockId, BlockMemory, CollectionSpec, DType, DocumentInfo, KeyRule, LocalMemory,
    ModelShape, Normalisation, Place, Reads, Retrieval, Window,
};

/// A memory with a document of each length, in tokens.
fn memory(lengths: &[usize]) -> (tempfile::TempDir, Arc<dyn BlockMemory>, Vec<DocumentInfo>) {
    memory_of(&spec("c", DType::F32), lengths)
}

fn memory_of(spec: &CollectionSpec, lengths: &[usize]) -> (tempfile::TempDir, Arc<dyn BlockMemory>, Vec<DocumentInfo>) {
    let folder = tempfile::tempdir().unwrap();
    let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path()).unwrap());
    let collection = memory.open_collection(spec).unwrap();
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

fn sealed(memory: &Arc<dyn BlockMemory>, documents: &[DocumentInfo]) -> Vec<DocumentInfo> {
    documents.iter().map(|document| memory.seal(document.id).unwrap()).collect()
}

/// What one more token attends to after these documents, with so many blocks retrieved: `(L, Hq, D)`, and what was read.
fn read_one(memory: &Arc<dyn BlockMemory>, documents: &[DocumentInfo], top_k: u32) -> (Vec<Vec<f32>>, Reads) {
    let collection = memory.collections().unwrap().remove(0);
    let retrieval = Retrieval { top_k, ..Retrieval::default() };
    let window = window(Normalisation::Plain);
    let mut session = BlockAttention::read(memory.clone(), &collection, documents, window, retrieval).unwrap();
    let outs = Activations::random(1, 99).feed(&mut session, 0, 1, 1);
    (outs, session.take_reads())
}

/// A token of a text, and how many tokens it stands before the next one.
type Seen<'a> = (&'a Activations, usize, i64);

/// Attention of the next token over these and itself: `(Hq, D)`, from the definition.
fn attention(layer: usize, seen: &[Seen]) -> Vec<f32> {
    let (shape, next) = (shape(), Activations::random(1, 99));
    let rope = shape.rope_of(layer as u32);
    let of_head = |head: usize| {
        let part = |row: &[f32], head: usize| row[head * 8..][..8].to_vec();
        let q = part(next.query(layer, 0), head);
        let (mut weights, mut values) = (Vec::new(), Vec::new());
        for &(text, token, before) in seen.iter().chain([&(&next, 0, 0)]) {
            let [mut k, v] = text.key_and_value(layer, token).map(|row| part(row, head / 2));
            rope.rotate(&mut k, -before);
            let score = q.iter().zip(&k).map(|(q, k)| *q as f64 * *k as f64).sum::<f64>();
            weights.push((score * shape.softmax_scale as f64).exp());
            values.push(v);
        }
        let sum: f64 = weights.iter().sum();
        let mixed = |d: usize| weights.iter().zip(&values).map(|(w, v)| w / sum * v[d] as f64).sum::<f64>() as f32;
        (0..8).map(mixed).collect::<Vec<f32>>()
    };
    (0..4).flat_map(of_head).collect()
}

/// The first document is a tail and nothing else, the second ends in one, and so does the last, in the window.
#[test]
fn with_everything_retrieved_attention_over_sealed_documents_is_full_attention() {
    let lengths = [5, 13, 3, 11];
    let (_folder, memory, documents) = memory(&lengths);
    let documents = sealed(&memory, &documents);
    let texts: Vec<Activations> = (0..).zip(lengths).map(|(seed, tokens)| Activations::random(tokens, seed)).collect();
    let [a, b, c, d] = &texts[..] else { unreachable!("four texts") };
    // Before the 11 tokens of the window there are 4 slots of 8, the first three with a block each, and before those the sink.
    let at = |first: i64, tokens: std::ops::Range<usize>| {
        tokens.clone().map(move |token| (token, first - (token - tokens.start) as i64)).collect::<Vec<_>>()
    };
    let places = [(a, at(51, 0..5)), (b, at(43, 0..8)), (b, at(35, 8..13)), (c, at(27, 0..3)), (d, at(11, 0..11))];
    // One sink is enough: the first tokens of the other documents are left out.
    let seen: Vec<Seen> = places
        .iter()
        .flat_map(|(text, places)| places.iter().map(move |&(token, before)| (*text, token, before)))
        .filter(|&(text, token, _)| token > 0 || std::ptr::eq(text, a))
        .collect();
    let (outs, reads) = read_one(&memory, &documents, 9);
    let want = [attention(0, &seen), attention(1, &seen)];
    assert!(difference(&outs, &want) < 1e-4, "{}", difference(&outs, &want));

    let mut retrieved: Vec<BlockId> = reads.retrieved.iter().map(|read| read.block).collect();
    retrieved.sort();
    let block = |document: usize, index| BlockId { document: documents[document].id, index };
    assert_eq!(retrieved, [block(1, 0), block(1, 1), block(2, 0)]);
    let at_hand: Vec<_> = reads.at_hand.iter().map(|read| (read.block, read.place)).collect();
    let window = [(block(3, 0), Place::Window), (block(3, 1), Place::Window)];
    assert_eq!(at_hand, [&[(block(0, 0), Place::Sink)][..], &window[..]].concat());
    let all = reads.retrieved.iter().map(|read| read.mass).chain(reads.at_hand.iter().map(|read| read.mass));
    // 1 token, 2 layers, 4 query heads.
    assert!((all.sum::<f64>() + reads.own_mass - 8.0).abs() < 1e-4, "{reads:?}");
}

#[test]
fn a_service_answers_about_sealed_tails_as_the_memory_does() {
    let (_folder, memory, documents) = memory(&[5, 13, 3, 20, 11]);
    let documents = sealed(&memory, &documents);
    let served = Served::new(memory.clone());
    for top_k in [1, 3, 20] {
        let (here, there) = (read_one(&memory, &documents, top_k), read_one(&served.remote, &documents, top_k));
        assert_eq!((here.0, here.1.retrieved), (there.0, there.1.retrieved));
    }
}

/// A tail has no landmark: sealed or not, it stays beside the window.
#[test]
fn tails_beside_landmark_keys_stay_at_hand() {
    let spec = CollectionSpec { key_rule: KeyRule::Landmark, ..spec("c", DType::F32) };
    let (_folder, memory, documents) = memory_of(&spec, &[13, 11]);
    let places = |documents: &[DocumentInfo]| -> Vec<Place> {
        read_one(&memory, documents, 9).1.at_hand.iter().map(|read| read.place).collect()
    };
    let open = places(&documents);
    assert_eq!(open, [Place::Tail, Place::Sink, Place::Window, Place::Window]);
    assert_eq!(places(&sealed(&memory, &documents)), open);
}

/// The ends of 600 notes of 30 tokens were refused: all were to be held in memory, and attended to by every head.
#[test]
fn hundreds_of_notes_are_asked_without_holding_any() {
    let shape = ModelShape { block_tokens: 64, ..shape() };
    let (_folder, memory, documents) = memory_of(&CollectionSpec { shape, ..spec("c", DType::F16) }, &[30; 600]);
    let collection = memory.collections().unwrap().remove(0);
    let open = BlockAttention::read(
        memory.clone(),
        &collection,
        &documents,
        window(Normalisation::Plain),
        Retrieval::default(),
    );
    let refused = open.err().unwrap().to_string();
    assert!(refused.contains("16384") && refused.contains("17970") && refused.contains("seal"), "{refused}");

    let documents = sealed(&memory, &documents);
    let before = memory.stats().unwrap().fetched_blocks;
    let (_, reads) = read_one(&memory, &documents, 4);
    assert_eq!(
        memory.stats().unwrap().fetched_blocks - before,
        2,
        "the first note as the sink, the last as the window"
    );
    assert_eq!(reads.at_hand.iter().map(|read| read.place).collect::<Vec<_>>(), [Place::Sink, Place::Window]);
    assert!(reads.retrieved.len() >= 4 && reads.retrieved.iter().all(|read| read.mass > 0.0), "{reads:?}");
}
