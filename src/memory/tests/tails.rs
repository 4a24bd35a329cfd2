//! The tail of a sealed document is a block like any other, only shorter: chosen, attended to, and the same after a restart.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::attend::check as check_attention;
use super::lookup::check as check_lookup;
use super::*;

/// Full blocks of a document, and tokens of its tail.
type Lengths = (u32, u32);

impl World {
    /// A document with a tail, open.
    fn open_with_tail(&mut self, name: &str, (full, tail): Lengths) -> DocumentId {
        let document = self.document(name, full);
        let blocks = vec![self.block(full, tail)];
        self.memory.append(AppendRequest { document, blocks, expected_tokens: None }).unwrap();
        document
    }

    fn sealed_with_tail(&mut self, name: &str, lengths: Lengths) -> DocumentId {
        let document = self.open_with_tail(name, lengths);
        let info = self.memory.seal(document).unwrap();
        assert_eq!((info.blocks, info.tail_tokens, info.eligible_blocks(KeyRule::Tokens)), {
            let (full, tail) = lengths;
            (full, tail, full + 1)
        });
        document
    }

    /// A sealed document of 20 to 40 tokens; the fifth key of one that `stands_out` is longer than all others.
    fn note(&mut self, number: usize, stands_out: bool) -> DocumentId {
        let document = self.memory.open_document(self.collection, &format!("note {number}")).unwrap().id;
        let tokens = 20 + number % 21;
        let mut note = self.block(0, tokens as u32);
        if stands_out {
            let mut k = note.k.to_f32().unwrap();
            k.chunks_mut(tokens * 8)
                .for_each(|piece| piece[4 * 8..5 * 8].iter_mut().for_each(|number| *number *= 10.0));
            note.k = Tensor::from_f32(note.k.shape.clone(), &k);
        }
        self.memory.append(AppendRequest { document, blocks: vec![note], expected_tokens: None }).unwrap();
        self.memory.seal(document).unwrap();
        document
    }

    /// Documents of all kinds of length: with full blocks and without.
    fn documents_with_tails(&mut self) -> Vec<BlockRange> {
        let lengths = [(3, 2), (0, 1), (0, 4), (7, 1), (1, 4)];
        let named = lengths.into_iter().enumerate();
        named
            .map(|(i, (full, tail))| range(self.sealed_with_tail(&format!("d{i}"), (full, tail)), 0..full + 1))
            .collect()
    }
}

fn refused_range(outcome: Result<Hits>, expected: &str) {
    let found = outcome.unwrap_err();
    let is_range = matches!(&found, MemoryError::Invalid { field, expected: of, .. } if field == "scope[0].blocks" && of == expected);
    assert!(is_range, "{found}");
}

#[test]
fn a_tail_can_be_looked_up_from_its_seal_on() {
    let mut world = World::new(spec("c"));
    let document = world.open_with_tail("a", (2, 3));
    let request = world.request(&[0], vec![range(document, 0..3)]);
    // The keys of the full blocks are in memory before.
    world.memory.lookup(&LookupRequest { scope: vec![range(document, 0..2)], ..request.clone() }).unwrap();
    refused_range(world.memory.lookup(&request), "a range within 0..2");
    world.memory.seal(document).unwrap();
    let hits = world.memory.lookup(&request).unwrap();
    let all: Vec<BlockId> = (0..3).map(|index| BlockId { document, index }).collect();
    assert_eq!((hits.k, &hits.blocks[..3]), (3, &all[..]));
    refused_range(
        world.memory.lookup(&LookupRequest { scope: vec![range(document, 0..4)], ..request.clone() }),
        "a range within 0..3",
    );
    // Sealed without one, there is none.
    let even = world.document("b", 2);
    world.memory.seal(even).unwrap();
    refused_range(
        world.memory.lookup(&LookupRequest { scope: vec![range(even, 0..3)], ..request.clone() }),
        "a range within 0..2",
    );
    world.memory.delete(document).unwrap();
    assert!(matches!(world.memory.lookup(&request), Err(MemoryError::NotFound { .. })));
    assert_eq!(world.memory.stats().unwrap().index_bytes, 0);
}

/// A tail has no landmark.
#[test]
fn a_collection_of_landmarks_keeps_its_tails_out() {
    let mut world = World::new(CollectionSpec { key_rule: KeyRule::Landmark, ..spec("c") });
    let document = world.open_with_tail("a", (2, 3));
    let info = world.memory.seal(document).unwrap();
    assert_eq!(info.eligible_blocks(KeyRule::Landmark), 2);
    let request = world.request(&[0], vec![range(document, 0..3)]);
    refused_range(world.memory.lookup(&request), "a range within 0..2");
}

#[test]
fn tails_are_chosen_by_their_own_keys() {
    for (key_rule, key_dtype, tolerance) in [
        (KeyRule::Tokens, DType::F16, 5e-3),
        (KeyRule::Tokens, DType::Int8, 5e-2),
        (KeyRule::Mean, DType::F16, 5e-3),
        (KeyRule::Mean, DType::Int8, 5e-2),
    ] {
        let mut world = World::new(CollectionSpec { key_rule, key_dtype, payload_dtype: DType::F32, ..spec("c") });
        let scope = world.documents_with_tails();
        for block_score in [BlockScore::Max, BlockScore::LogSumExp] {
            for scope in [scope.clone(), vec![scope[0].clone()], vec![scope[3].clone(), scope[1].clone()]] {
                let request = LookupRequest { block_score, ..world.request(&[0, 7], scope) };
                check_lookup(&world, &request, tolerance);
            }
        }
    }
}

#[test]
fn attention_over_tails_is_that_of_the_definition() {
    for payload_dtype in [DType::F32, DType::F16, DType::BF16, DType::Int8] {
        let mut world = World::new(CollectionSpec { payload_dtype, ..spec("c") });
        let scope = world.documents_with_tails();
        for granularity in [Granularity::TokenHead, Granularity::KvGroup, Granularity::Shared] {
            for normalisation in [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden] {
                // Few rows read a piece as it is stored, many widen it first.
                for (distances, top_k) in [(vec![2], 3), ((0..40).collect::<Vec<u32>>(), 3), (vec![1, 9], 30)] {
                    for placement in [Placement::Slots, Placement::Original { within_tokens: 60 }] {
                        // A document of one token is read all the same.
                        let without_first_tokens = normalisation == Normalisation::Plain && top_k == 3;
                        let lookup = LookupRequest { granularity, top_k, ..world.request(&distances, scope.clone()) };
                        let request = AttendRequest { lookup, normalisation, placement, without_first_tokens };
                        check_attention(&world, &request);
                    }
                }
            }
        }
    }
}

#[test]
fn every_engine_finds_tails_and_finds_them_again_after_a_restart() {
    for (key_dtype, payload_dtype) in [(DType::F16, DType::F16), (DType::Int8, DType::F16), (DType::Int8, DType::Int8)]
    {
        for engine in [Engine::Flat, Engine::Sq8, Engine::Sq4] {
            let mut world = World::new(CollectionSpec { key_dtype, payload_dtype, ..spec("c") });
            let scope = world.documents_with_tails();
            let request = attend(LookupRequest { block_score: BlockScore::Max, ..world.request(&[0, 9], scope) });
            let flat = world.memory.attend(&request).unwrap();
            world.memory.set_engine(world.collection, engine.clone()).unwrap();
            let before = world.memory.attend(&request).unwrap();
            // One head's choice is that of `flat`, but for chance with sq4; among so few blocks it is the same.
            assert_eq!(before.hits.blocks, flat.hits.blocks, "{engine}");
            let has_tail =
                |block: &BlockId| fetch(&world.memory, block.document, vec![block.index])[0].token_ids.len() < 5;
            assert!(before.hits.blocks.iter().any(has_tail), "{engine}: some of 5 tails among 16 blocks");
            let world = world.reopened();
            assert_eq!(world.memory.attend(&request).unwrap(), before, "{engine}");
            // And where no keys stay in memory.
            let world = World { memory: world.memory.with_keys(0), ..world };
            assert_eq!(world.memory.attend(&request).unwrap(), before, "{engine}, in passing");
        }
    }
}

#[test]
fn with_all_blocks_retrieved_the_tail_of_an_earlier_document_stands_at_the_begin_of_its_slot() {
    let mut world = World::new(spec("c"));
    let (a, b) = (world.sealed_with_tail("a", (2, 3)), world.document("b", 2));
    let lookup = LookupRequest { top_k: 9, ..world.request(&[0, 4], vec![range(a, 0..3), range(b, 0..2)]) };
    check_attention(&world, &attend(lookup));
}

/// What the index holds of a tail follows from what is stored, not from what was sent.
#[test]
fn the_keys_of_a_tail_are_those_of_its_stored_payload() {
    let mut world = World::new(CollectionSpec { payload_dtype: DType::Int8, key_dtype: DType::F16, ..spec("c") });
    let document = world.sealed_with_tail("a", (0, 4));
    let other = world.document("b", 3);
    let request = world.request(&[0, 3], vec![range(document, 0..1), range(other, 0..3)]);
    // The definition reads the keys of full blocks as they are stored in int8: they were made before.
    check_lookup(&world, &request, 0.1);
    let alone = LookupRequest { block_score: BlockScore::Max, ..request };
    let before = world.memory.lookup(&alone).unwrap();
    assert_eq!(world.reopened().memory.lookup(&alone).unwrap(), before);
}

#[test]
fn sealing_while_lookups_run_gives_each_the_blocks_that_it_asked_for() {
    let mut world = World::new(spec("c"));
    let documents: Vec<DocumentId> = (0..20).map(|i| world.open_with_tail(&format!("d{i}"), (i % 3, 3))).collect();
    let request = world.request(&[0], vec![]);
    let ask = |document, full, blocks: u32| {
        let scope = vec![range(document, 0..blocks)];
        let hits = world.memory.lookup(&LookupRequest { scope, top_k: 9, ..request.clone() })?;
        assert_eq!((hits.k, blocks >= full), (blocks, true));
        Ok(hits)
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    for (&document, i) in documents.iter().zip(0u32..) {
                        let full = i % 3;
                        let before: Result<Hits> = ask(document, full, full);
                        before.unwrap();
                        if let Err(error) = ask(document, full, full + 1) {
                            assert!(matches!(error, MemoryError::Invalid { .. }), "{error}");
                        }
                    }
                }
            });
        }
        for &document in &documents {
            world.memory.seal(document).unwrap();
            std::thread::yield_now();
        }
        done.store(true, Ordering::Release);
    });
    for (&document, i) in documents.iter().zip(0u32..) {
        assert_eq!(ask(document, i % 3, i % 3 + 1).unwrap().blocks.last().unwrap().index, i % 3);
    }
}

/// A sealed tail that is damaged may be written again; its keys were made of what was there before.
#[test]
fn a_tail_that_is_written_again_has_the_keys_of_what_was_written() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 1);
    let tail = world.block(1, 3);
    let append = |world: &World, tail: &NewBlock| {
        let blocks = vec![tail.clone()];
        world.memory.append(AppendRequest { document, blocks, expected_tokens: None })
    };
    append(&world, &tail).unwrap();
    world.memory.seal(document).unwrap();
    let request = LookupRequest { top_k: 1, ..world.request(&[0], vec![range(document, 0..2)]) };
    world.memory.lookup(&request).unwrap();
    let block = BlockId { document, index: 1 };
    let (file, begin) = world.memory.store.place_of_piece(block, 0).unwrap();
    let mut path = std::fs::read_dir(world.dir.path()).unwrap().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
    path.extend(
        path.clone().iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten().map(|e| e.path()),
    );
    let path = path.into_iter().find(|path| path.file_name().is_some_and(|name| name.to_str() == Some(&file))).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[begin as usize] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let damaged = world.memory.fetch(&FetchRequest { document, blocks: vec![1], dtype: DType::F32 });
    assert!(matches!(damaged, Err(MemoryError::DataLoss { .. })), "{damaged:?}");
    // The same tokens, with other bits.
    let larger: Vec<f32> = tail.k.to_f32().unwrap().iter().map(|number| number * 1.5).collect();
    append(&world, &NewBlock { k: Tensor::from_f32(tail.k.shape.clone(), &larger), ..tail }).unwrap();
    check_lookup(&world, &request, 5e-3);
}

/// Their records are as old as the format, and say nothing of keys for a tail.
#[test]
fn tails_of_documents_of_every_format_are_retrieved_once_they_are_sealed() {
    for format in ["format-1", "format-2", "format-3", "format-4"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("segments")).unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format).join("segments");
        for file in std::fs::read_dir(from).unwrap().flatten() {
            std::fs::copy(file.path(), dir.path().join("segments").join(file.file_name())).unwrap();
        }
        let memory = LocalMemory::open(dir.path()).unwrap();
        let codes = memory.collections().unwrap().into_iter().find(|found| found.spec.name == "codes").unwrap();
        let documents = memory.documents(codes.id).unwrap();
        let document = documents.iter().find(|document| document.name == "coded").unwrap().id;
        memory.seal(document).unwrap();
        let rng = ChaCha8Rng::seed_from_u64(1);
        let mut world = World { dir, memory, collection: codes.id, spec: codes.spec, rng };
        // What the fixtures hold of the other blocks are keys of no payload.
        let alone = attend(world.request(&[0, 3], vec![range(document, 3..4)]));
        check_attention(&world, &alone);
        let all = world.request(&[0, 3], vec![range(document, 0..4)]);
        let before = world.memory.lookup(&all).unwrap();
        let world = world.reopened();
        assert_eq!(world.memory.lookup(&all).unwrap(), before, "{format}");
        check_attention(&world, &alone);
    }
}

/// Notes of one paragraph: the one that a query is about is found among all.
#[test]
fn one_of_a_thousand_notes_is_found() {
    let shape = ModelShape { block_tokens: 64, ..spec("c").shape };
    for key_dtype in [DType::F16, DType::Int8] {
        let mut world = World::new(CollectionSpec { shape: shape.clone(), key_dtype, ..spec("c") });
        let wanted = [0, 17, 998];
        let notes: Vec<DocumentId> = (0..1000).map(|i| world.note(i, wanted.contains(&i))).collect();
        let scope: Vec<BlockRange> = notes.iter().map(|&note| range(note, 0..1)).collect();
        for note in wanted.map(|i| notes[i]) {
            let k = fetch(&world.memory, note, vec![0]).remove(0).k.to_f32().unwrap();
            let request =
                LookupRequest { top_k: 2, block_score: BlockScore::Max, ..world.request(&[0], scope.clone()) };
            // Where the note is scored, the query of each head points along one of its keys.
            let rotated_by = request.slots() as i64 * 64;
            let of_head = |head: usize| {
                let mut query = head_rows(&k, &shape, 1, head / 2)[4].to_vec();
                shape.rope.rotate(&mut query, -rotated_by);
                query
            };
            let request = LookupRequest { queries: (0..4).flat_map(of_head).collect(), ..request };
            let hits = world.memory.lookup(&request).unwrap();
            assert_eq!(best_of(&hits), [BlockId { document: note, index: 0 }; 4], "{key_dtype}");
            check_attention(&world, &attend(request));
        }
    }
}

/// The block of the highest score of each row.
fn best_of(hits: &Hits) -> Vec<BlockId> {
    let rows = hits.blocks.chunks_exact(hits.k as usize).zip(hits.scores.chunks_exact(hits.k as usize));
    rows.map(|(blocks, scores)| {
        let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
        blocks[best]
    })
    .collect()
}
