//! Attention with a memory, from the layer down to the disk and back, in process and over the network.

mod common;

use std::sync::Arc;

use common::{Activations, Served, difference, shape, spec};
use landmarkdb::{
    AttentionError, BlockAttention, BlockMemory, BlockScore, CountedFrom, DType, Granularity, Layers, LocalMemory,
    MemoryError, NewTokens, Normalisation, Placement, Retrieval, SequenceAttention, Window,
};

const TOKENS: usize = 150;
const WINDOW: Window = Window {
    tokens: 16,
    counted_from: CountedFrom::Query,
    sink: true,
    chunk_tokens: 16,
    normalisation: Normalisation::Plain,
};

const PLACEMENTS: [Placement; 2] = [Placement::Slots, Placement::Original { within_tokens: 90 }];

fn retrieval(top_k: u32, granularity: Granularity) -> Retrieval {
    Retrieval { top_k, block_score: BlockScore::LogSumExp, granularity, layers: Layers::All, ..Retrieval::default() }
}

fn write(memory: &Arc<dyn BlockMemory>, name: &str, payload: DType, retrieval: Option<Retrieval>) -> BlockAttention {
    write_within(WINDOW, memory, name, payload, retrieval)
}

fn write_within(
    window: Window,
    memory: &Arc<dyn BlockMemory>,
    name: &str,
    payload: DType,
    retrieval: Option<Retrieval>,
) -> BlockAttention {
    let collection = memory.open_collection(&spec(&format!("{name}-{payload}"), payload)).unwrap();
    let document = memory.open_document(collection.id, name).unwrap();
    BlockAttention::write(memory.clone(), &collection, &document, window, retrieval).unwrap()
}

fn local(folder: &std::path::Path) -> Arc<dyn BlockMemory> {
    Arc::new(LocalMemory::open(folder).unwrap())
}

#[test]
fn with_everything_retrieved_attention_is_full_attention() {
    let folder = tempfile::tempdir().unwrap();
    let memory = local(folder.path());
    let text = Activations::random(TOKENS, 1);
    let all =
        [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];
    // With hidden landmarks, what a landmark reads in its own block must not change with the memory either.
    for normalisation in [Normalisation::Plain, Normalisation::Hidden] {
        let full = text.feed(&mut BlockAttention::full(&shape(), normalisation), 0, TOKENS, 16);
        let window = Window { normalisation, ..WINDOW };
        for (granularity, placement) in all.into_iter().flat_map(|all| PLACEMENTS.map(|placement| (all, placement))) {
            for (payload, tolerance) in [(DType::F32, 2e-5), (DType::F16, 2e-3), (DType::Int8, 5e-2)] {
                let name = format!("{normalisation} {granularity} {placement:?}");
                let retrieval = Retrieval { placement, ..retrieval(1000, granularity) };
                let mut session = write_within(window, &memory, &name, payload, Some(retrieval));
                let with_memory = text.feed(&mut session, 0, TOKENS, 16);
                let off = difference(&full, &with_memory);
                assert!(off < tolerance, "{normalisation}, {granularity}, {placement:?}, {payload}: {off}");
            }
        }
        let mut window_only = BlockAttention::window_only(&shape(), window);
        assert!(difference(&full, &text.feed(&mut window_only, 0, TOKENS, 16)) > 0.05, "retrieval made the difference");
    }
}

#[test]
fn what_is_retrieved_does_not_depend_on_how_tokens_are_grouped() {
    let folder = tempfile::tempdir().unwrap();
    let memory = local(folder.path());
    let text = Activations::random(TOKENS, 2);
    let granularities = [Granularity::TokenHead, Granularity::KvGroup, Granularity::Token];
    for (granularity, placement) in granularities.into_iter().flat_map(|all| PLACEMENTS.map(|place| (all, place))) {
        let mut outs = [16, 1, 5].map(|group| {
            let name = format!("{granularity} {placement:?} {group}");
            let retrieval = Retrieval { placement, ..retrieval(3, granularity) };
            let mut session = write(&memory, &name, DType::F32, Some(retrieval));
            text.feed(&mut session, 0, TOKENS, group)
        });
        let first = std::mem::take(&mut outs[0]);
        for other in &outs[1..] {
            assert!(difference(&first, other) < 2e-5, "{granularity}, {placement:?}");
        }
    }
}

#[test]
fn in_process_and_remote_agree_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let memory = local(folder.path());
    let served = Served::new(memory.clone());
    let text = Activations::random(TOKENS, 3);
    for (granularity, placement) in [
        (Granularity::TokenHead, PLACEMENTS[0]),
        (Granularity::Head, PLACEMENTS[1]),
        (Granularity::KvGroup, PLACEMENTS[0]),
        (Granularity::KvGroup, PLACEMENTS[1]),
    ] {
        for payload in [DType::F32, DType::F16, DType::BF16, DType::Int8] {
            let run = |memory: &Arc<dyn BlockMemory>, name: &str| {
                let retrieval = Retrieval { placement, ..retrieval(3, granularity) };
                let name = format!("{name} {granularity} {placement:?}");
                let mut session = write(memory, &name, payload, Some(retrieval));
                let out = text.feed(&mut session, 0, TOKENS, 16);
                session.flush().unwrap();
                let reads = session.take_reads().retrieved;
                (out, reads.iter().map(|read| (read.block.index, read.mass.to_bits())).collect::<Vec<_>>())
            };
            let what = format!("{granularity}, {placement:?}, {payload}");
            assert_eq!(run(&memory, "in process"), run(&served.remote, "remote"), "{what}");
        }
    }
}

#[test]
fn a_reader_and_a_resumed_writer_go_on_as_the_writer_would_have() {
    let folder = tempfile::tempdir().unwrap();
    let text = Activations::random(TOKENS, 4);
    let stop = 101; // in the middle of a block: the tail is read back too
    let uninterrupted = {
        let memory = local(folder.path());
        let mut session = write(&memory, "whole", DType::F32, Some(retrieval(3, Granularity::KvGroup)));
        text.feed(&mut session, 0, stop, 16);
        text.feed(&mut session, stop, TOKENS, 7)
    };
    {
        let memory = local(folder.path());
        let mut session = write(&memory, "part", DType::F32, Some(retrieval(3, Granularity::KvGroup)));
        text.feed(&mut session, 0, stop, 16);
        session.flush().unwrap();
    }
    let memory = local(folder.path());
    let collection = memory.open_collection(&spec("part-f32", DType::F32)).unwrap();
    let document = memory.open_document(collection.id, "part").unwrap();
    assert_eq!((document.blocks, document.tail_tokens), (12, 5));

    let mut resumed = write(&memory, "part", DType::F32, Some(retrieval(3, Granularity::KvGroup)));
    assert_eq!(resumed.position(), stop);
    // A reader's window does not slide, so only the tokens of the block it begins in see what the writer sees.
    let mut reader =
        BlockAttention::read(memory.clone(), &collection, &[document], WINDOW, retrieval(3, Granularity::KvGroup))
            .unwrap();
    let read = text.feed(&mut reader, stop, 104, 2);
    let off = uninterrupted.iter().zip(&read).map(|(a, b)| a[..b.len()].to_vec()).collect::<Vec<_>>();
    assert!(difference(&off, &read) < 2e-5, "{}", difference(&off, &read));
    let resumed = text.feed(&mut resumed, stop, TOKENS, 7);
    assert!(difference(&uninterrupted, &resumed) < 2e-5);
}

#[test]
fn answers_survive_a_restart_and_the_loss_of_the_catalog() {
    let folder = tempfile::tempdir().unwrap();
    let text = Activations::random(TOKENS, 5);
    {
        let memory = local(folder.path());
        let mut session = write(&memory, "text", DType::Int8, None);
        text.feed(&mut session, 0, 140, 16);
        session.flush().unwrap();
    }
    let ask = || {
        let memory = local(folder.path());
        let collection = memory.open_collection(&spec("text-int8", DType::Int8)).unwrap();
        let document = memory.open_document(collection.id, "text").unwrap();
        let retrieval = retrieval(4, Granularity::KvGroup);
        let mut session = BlockAttention::read(memory.clone(), &collection, &[document], WINDOW, retrieval).unwrap();
        (text.feed(&mut session, 140, TOKENS, 10), session.take_reads())
    };
    let before = ask();
    assert_eq!(before, ask(), "after a restart");
    std::fs::remove_dir_all(folder.path().join("catalog")).unwrap();
    assert_eq!(before, ask(), "after the catalog was deleted");
}

#[test]
fn several_documents_are_read_together() {
    let folder = tempfile::tempdir().unwrap();
    let memory = local(folder.path());
    let collection = memory.open_collection(&spec("shelf", DType::F32)).unwrap();
    let text = Activations::random(TOKENS, 6);
    let documents: Vec<_> = ["a", "b", "c"]
        .map(|name| {
            let document = memory.open_document(collection.id, name).unwrap();
            let mut session = BlockAttention::write(memory.clone(), &collection, &document, WINDOW, None).unwrap();
            text.feed(&mut session, 0, 64, 16);
            memory.seal(document.id).unwrap()
        })
        .into();
    let ask = |documents: &[_]| {
        let retrieval = retrieval(3, Granularity::TokenHead);
        let mut session = BlockAttention::read(memory.clone(), &collection, documents, WINDOW, retrieval).unwrap();
        let out = text.feed(&mut session, 64, 72, 8);
        (out, session.take_reads().retrieved)
    };
    let (one, _) = ask(&documents[..1]);
    let (three, reads) = ask(&documents);
    assert!(difference(&one, &three) > 1e-3);
    let read: std::collections::BTreeSet<_> = reads.iter().map(|read| read.block.document).collect();
    assert_eq!(read.len(), 3, "every document was read: {reads:?}");
    let sink = landmarkdb::BlockId { document: documents[0].id, index: 0 };
    assert!(reads.iter().all(|read| read.block != sink), "the sink is not retrieved");
}

#[test]
fn a_sealed_document_and_an_uncommitted_group_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let memory = local(folder.path());
    let mut session = write(&memory, "text", DType::F32, None);
    let text = Activations::random(32, 7);
    text.feed(&mut session, 0, 16, 16);
    for layer in 0..2 {
        session.attend(layer, 8, &[0.0; 256], &[0.0; 128], &[0.0; 128]).unwrap();
    }
    let uncommitted = session.attend(0, 1, &[0.0; 32], &[0.0; 16], &[0.0; 16]);
    assert!(matches!(uncommitted, Err(AttentionError::Invalid { field: "commit", .. })), "{uncommitted:?}");
    let too_many = session.commit(NewTokens { ids: &[0; 16], text: &[], offsets: &[0; 16] });
    assert!(matches!(too_many, Err(AttentionError::Invalid { field: "ids", .. })), "{too_many:?}");

    let collection = memory.open_collection(&spec("text-f32", DType::F32)).unwrap();
    let document = memory.open_document(collection.id, "text").unwrap();
    memory.seal(document.id).unwrap();
    let late = session.commit(NewTokens { ids: &[0; 8], text: &[], offsets: &[0; 8] });
    assert!(matches!(late, Err(AttentionError::Memory(MemoryError::Sealed { .. }))), "{late:?}");
}
