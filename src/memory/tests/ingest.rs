//! What comes in comes out; what is wrong is refused by field; what was sent twice is stored once.

use bytes::Bytes;

use super::*;

fn append(world: &World, document: DocumentId, blocks: Vec<NewBlock>) -> Result<DocumentInfo> {
    world.memory.append(AppendRequest { document, blocks, expected_tokens: None })
}

#[test]
fn blocks_come_back_as_they_were_stored_also_after_reopening() {
    // The largest error of a stored number, for values up to 4.
    for (payload_dtype, error_max) in
        [(DType::F32, 0.0), (DType::F16, 2e-3), (DType::BF16, 1.6e-2), (DType::Int8, 3.2e-2)]
    {
        let mut world = World::new(CollectionSpec { payload_dtype, ..spec("c") });
        let document = world.memory.open_document(world.collection, "d").unwrap().id;
        let blocks = vec![world.block(0, 5), world.block(1, 5), world.block(2, 3)];
        let info = append(&world, document, blocks.clone()).unwrap();
        assert_eq!((info.blocks, info.tail_tokens, info.tokens), (2, 3, 13));

        let world = world.reopened();
        assert_eq!(world.memory.document(document).unwrap(), info);
        let read = fetch(&world.memory, document, vec![2, 0, 1, 0]);
        for (stored, index) in read.iter().zip([2, 0, 1, 0]) {
            let block: &NewBlock = &blocks[index];
            assert_eq!((stored.id.index, &stored.token_ids), (index as u32, &block.token_ids));
            assert_eq!(stored.text, block.text);
            for (stored, sent) in [(&stored.k, &block.k), (&stored.v, &block.v)] {
                assert_eq!(stored.shape, sent.shape);
                let pairs = stored.to_f32().unwrap().into_iter().zip(sent.to_f32().unwrap());
                let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error <= error_max, "{payload_dtype}: off by {error}");
            }
        }
        let described = world.memory.blocks(&range(document, 1..9)).unwrap();
        assert_eq!(described.iter().map(|block| block.id.index).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(described[1].token_ids, blocks[2].token_ids);
    }
}

#[test]
fn fetched_numbers_convert_without_loss_to_what_they_were_stored_in() {
    let mut world = World::new(spec("c"));
    let document = world.document("d", 1);
    let read = |dtype| world.memory.fetch(&FetchRequest { document, blocks: vec![0], dtype }).unwrap().remove(0).v;
    let (half, single) = (read(DType::F16), read(DType::F32));
    assert_eq!((half.dtype, half.data.len() * 2), (DType::F16, single.data.len()));
    assert_eq!(half.to_f32().unwrap(), single.to_f32().unwrap());
}

#[test]
fn appends_are_idempotent_and_tails_are_replaced() {
    let mut world = World::new(spec("c"));
    let document = world.memory.open_document(world.collection, "d").unwrap().id;
    let (full, tail) = (world.block(0, 5), world.block(1, 2));
    let sent = vec![full.clone(), tail.clone()];
    let info = append(&world, document, sent.clone()).unwrap();
    assert_eq!(append(&world, document, sent.clone()).unwrap(), info, "the same again changes nothing");

    let mut longer = world.block(1, 5);
    longer.token_ids[..2].copy_from_slice(&tail.token_ids);
    let after = world.block(2, 5);
    let info = append(&world, document, vec![full.clone(), longer.clone(), after]).unwrap();
    assert_eq!((info.blocks, info.tail_tokens), (3, 0));
    assert_eq!(append(&world, document, sent).unwrap(), info, "an old tail agrees with the block it became");
    assert_eq!(fetch(&world.memory, document, vec![1])[0].token_ids, longer.token_ids);

    let mut other = full.clone();
    other.token_ids[4] += 1;
    assert_eq!(append(&world, document, vec![other]), Err(MemoryError::Conflict { document, index: 0 }));
    let gap = world.block(5, 5);
    let error = append(&world, document, vec![gap]).unwrap_err();
    assert_eq!(error, MemoryError::OutOfOrder { document, expected: 3, found: 5 });

    let sealed = world.memory.seal(document).unwrap();
    assert!(sealed.sealed && world.memory.seal(document).unwrap() == sealed);
    assert_eq!(append(&world, document, vec![full]).unwrap(), sealed, "nothing new to store");
    let next = world.block(3, 5);
    assert_eq!(append(&world, document, vec![next]), Err(MemoryError::Sealed { document }));
}

/// A second writer, or a late repetition of an old request, replaced what another had acknowledged (finding 21).
#[test]
fn a_tail_never_goes_back_and_two_writers_notice_each_other() {
    let mut world = World::new(spec("c"));
    let document = world.memory.open_document(world.collection, "d").unwrap().id;
    let expecting = |world: &World, blocks: Vec<NewBlock>, tokens: u64| {
        world.memory.append(AppendRequest { document, blocks, expected_tokens: Some(tokens) })
    };
    let (full, tail) = (world.block(0, 5), world.block(1, 3));
    let info = expecting(&world, vec![full.clone(), tail.clone()], 0).unwrap();
    assert_eq!(info.tokens, 8);
    // The acknowledgement was lost.
    assert_eq!(expecting(&world, vec![full.clone(), tail.clone()], 0).unwrap(), info);
    let mut shorter = world.block(1, 2);
    shorter.token_ids.copy_from_slice(&tail.token_ids[..2]);
    assert_eq!(append(&world, document, vec![full.clone(), shorter.clone()]).unwrap(), info, "durable already");
    assert_eq!(expecting(&world, vec![shorter.clone()], 5).unwrap(), info);

    let mut others = world.block(1, 4);
    others.token_ids[0] += 9;
    let refused = |expected, found| Err(MemoryError::UnexpectedLength { document, expected, found });
    assert_eq!(expecting(&world, vec![others.clone()], 5), refused(5, 8));
    assert_eq!(expecting(&world, vec![full.clone(), others.clone()], 0), refused(0, 8));
    assert_eq!(world.memory.document(document).unwrap(), info, "a refused append leaves nothing");
    assert_eq!(fetch(&world.memory, document, vec![1])[0].token_ids, tail.token_ids);
    let message = refused(5, 8).unwrap_err().to_string();
    assert!(message.contains("8 tokens") && message.contains("expected 5") && message.contains("read the document"));

    assert_eq!(expecting(&world, vec![others.clone()], 8).unwrap().tokens, 9, "who knows of a tail may replace it");
    let mut longer = world.block(1, 5);
    longer.token_ids[..4].copy_from_slice(&others.token_ids);
    assert_eq!(expecting(&world, vec![longer.clone()], 9).unwrap().tokens, 10);
    // Sent again in a larger request, whose first block is durable: nothing of others lies behind it.
    let next = world.block(2, 2);
    assert_eq!(expecting(&world, vec![longer, next], 9).unwrap().tokens, 12);
    assert_eq!(append(&world, document, vec![shorter]), Err(MemoryError::Conflict { document, index: 1 }));
}

#[test]
fn of_many_writers_one_is_next() {
    let mut world = World::new(spec("c"));
    let document = world.memory.open_document(world.collection, "d").unwrap().id;
    let tails: Vec<NewBlock> = (0..8)
        .map(|writer| {
            let mut tail = world.block(0, 3);
            tail.token_ids[0] = writer;
            tail
        })
        .collect();
    let answers: Vec<Result<DocumentInfo>> = std::thread::scope(|scope| {
        let send = |tail: &NewBlock| AppendRequest { document, blocks: vec![tail.clone()], expected_tokens: Some(0) };
        let writers: Vec<_> = tails.iter().map(|tail| (send(tail), &world.memory)).collect();
        let writers: Vec<_> =
            writers.into_iter().map(|(request, memory)| scope.spawn(move || memory.append(request))).collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    let winner = answers.iter().position(Result::is_ok).unwrap();
    let lost = |answer: &Result<DocumentInfo>| {
        *answer == Err(MemoryError::UnexpectedLength { document, expected: 0, found: 3 })
    };
    assert_eq!(answers.iter().filter(|answer| lost(answer)).count(), 7);
    assert_eq!(fetch(&world.memory, document, vec![0])[0].token_ids, tails[winner].token_ids);
}

/// Puts `number` at the start of an f32 tensor.
fn poisoned(tensor: &Tensor, number: f32) -> Tensor {
    let mut values = tensor.to_f32().unwrap();
    values[3] = number;
    Tensor::from_f32(tensor.shape.clone(), &values)
}

#[test]
fn impossible_blocks_are_refused_by_field_and_leave_nothing() {
    let mut world = World::new(spec("c"));
    let document = world.memory.open_document(world.collection, "d").unwrap().id;
    let good = [world.block(0, 5), world.block(1, 5), world.block(2, 2)];
    let refused = |change: &dyn Fn(&mut Vec<NewBlock>)| {
        let mut blocks = good.to_vec();
        change(&mut blocks);
        match append(&world, document, blocks).unwrap_err() {
            MemoryError::Missing { field } => format!("missing {field}"),
            MemoryError::Invalid { field, .. } => field,
            MemoryError::LimitExceeded { what, .. } => format!("limit {what}"),
            error => panic!("{error}"),
        }
    };
    assert_eq!(refused(&|blocks| blocks.clear()), "missing blocks");
    assert_eq!(refused(&|blocks| blocks[2].index = 7), "blocks[2].index");
    assert_eq!(refused(&|blocks| blocks[1].token_ids.clear()), "missing blocks[1].token_ids");
    assert_eq!(refused(&|blocks| blocks[1].token_ids.truncate(4)), "blocks[1].token_ids");
    assert_eq!(refused(&|blocks| blocks[2].token_ids = vec![0; 6]), "blocks[2].token_ids");
    assert_eq!(refused(&|blocks| blocks[0].text.offsets.truncate(4)), "blocks[0].text.offsets");
    assert_eq!(refused(&|blocks| blocks[0].text.offsets[1] = 3), "blocks[0].text.offsets");
    assert_eq!(refused(&|blocks| blocks[0].text.offsets[4] = 1000), "blocks[0].text.offsets");
    assert_eq!(refused(&|blocks| blocks[0].text.bytes = vec![0; (1 << 20) + 1]), "limit blocks[0].text.bytes");
    assert_eq!(refused(&|blocks| blocks[1].k.shape[3] = 9), "blocks[1].k");
    assert_eq!(refused(&|blocks| blocks[1].v.data = blocks[1].v.data.slice(4..)), "blocks[1].v");
    assert_eq!(refused(&|blocks| blocks[1].v.dtype = DType::Int8), "blocks[1].v");
    let empty = Tensor { dtype: DType::F32, shape: vec![], data: Default::default() };
    assert_eq!(refused(&|blocks| blocks[0].k = empty.clone()), "missing blocks[0].k");
    let mut blocks = good.to_vec();
    // Layer 1, KV head 0, token 4, dim 3 of (2, 2, 5, 8).
    let mut values = blocks[1].v.to_f32().unwrap();
    values[(2 * 5 + 4) * 8 + 3] = f32::NAN;
    blocks[1].v = Tensor::from_f32(blocks[1].v.shape.clone(), &values);
    let message = append(&world, document, blocks).unwrap_err().to_string();
    assert!(message.ends_with("found NaN in block 1, layer 1, KV head 0, token 4"), "{message}");
    for bad in [f32::NAN, f32::INFINITY, -70_000.0] {
        assert_eq!(refused(&|blocks| blocks[1].k = poisoned(&blocks[1].k, bad)), "blocks[1].k");
        assert_eq!(refused(&|blocks| blocks[2].v = poisoned(&blocks[2].v, bad)), "blocks[2].v");
    }
    assert_eq!(refused(&|blocks| *blocks = vec![blocks[0].clone(); 1025]), "limit blocks");
    assert_eq!(refused(&|blocks| blocks[0].index = u32::MAX), "limit blocks of one document");
    assert_eq!(world.memory.document(document).unwrap().tokens, 0);

    let unknown = append(&world, DocumentId(999), good.to_vec()).unwrap_err();
    assert_eq!(unknown, MemoryError::NotFound { entity: Entity::Document, id: "999".into() });
}

#[test]
fn collections_are_bound_to_their_fingerprint_and_names_open_what_exists() {
    let mut world = World::new(spec("c"));
    let info = world.memory.open_collection(&spec("c")).unwrap();
    assert_eq!(info.id, world.collection);
    let other = CollectionSpec { key_rule: KeyRule::Mean, ..spec("c") };
    let error = world.memory.open_collection(&other).unwrap_err();
    let want = MemoryError::FingerprintMismatch {
        collection: "c".into(),
        stored: spec("c").fingerprint(),
        offered: other.fingerprint(),
    };
    assert_eq!(error, want);

    let document = world.document("d", 2);
    assert_eq!(world.memory.open_document(world.collection, "d").unwrap().id, document);
    assert_eq!(world.memory.documents(world.collection).unwrap().len(), 1);
    assert_eq!(world.memory.collections().unwrap()[0].documents, 1);
    assert!(matches!(world.memory.open_document(world.collection, ""), Err(MemoryError::Invalid { .. })));
    let missing = world.memory.documents(CollectionId(77)).unwrap_err();
    assert_eq!(missing, MemoryError::NotFound { entity: Entity::Collection, id: "77".into() });
}

#[test]
fn deleting_forgets_and_statistics_count() {
    let mut world = World::new(spec("c"));
    let (kept, gone) = (world.document("kept", 3), world.document("gone", 4));
    let request = world.request(&[0], vec![range(gone, 0..4), range(kept, 0..3)]);
    world.memory.lookup(&request).unwrap();
    let before = world.memory.stats().unwrap();
    assert_eq!((before.documents, before.blocks, before.lookups, before.appended_blocks), (2, 7, 1, 7));
    assert!(world.memory.verify(None, &mut |_, _| ()).unwrap().faults.is_empty());

    assert_eq!(world.memory.delete(gone).unwrap().blocks, 4);
    let after = world.memory.stats().unwrap();
    assert!(after.index_bytes < before.index_bytes && after.index_bytes > 0);
    assert_eq!((after.documents, after.blocks), (1, 3));
    let not_found = MemoryError::NotFound { entity: Entity::Document, id: gone.to_string() };
    assert_eq!(world.memory.lookup(&request).unwrap_err(), not_found);
    assert_eq!(world.memory.delete(gone).unwrap_err(), not_found);
    let missing = FetchRequest { document: kept, blocks: vec![0, 3], dtype: DType::F32 };
    let error = world.memory.fetch(&missing).unwrap_err();
    assert_eq!(error, MemoryError::NotFound { entity: Entity::Block, id: format!("{kept}:3") });
}

/// Flips one bit of the segment files, a few bytes behind where `bytes` lie.
fn damage(world: &World, bytes: &[u8], behind: usize) {
    for entry in std::fs::read_dir(world.dir.path().join("segments")).unwrap() {
        let path = entry.unwrap().path();
        let mut file = std::fs::read(&path).unwrap();
        if let Some(at) = file.windows(bytes.len()).position(|window| window == bytes) {
            file[at + bytes.len() + behind] ^= 1;
            return std::fs::write(path, file).unwrap();
        }
    }
    panic!("the bytes lie in a segment");
}

/// A damaged block that was sent again used to be acknowledged, for its token ids agreed, and stayed unreadable. The quantizers of
/// its keys lie in a document's first block: what is written in its place has to keep them.
#[test]
fn a_damaged_block_that_is_sent_again_is_mended() {
    let mut world = World::new(CollectionSpec { key_dtype: DType::Int8, ..spec("c") });
    let document = world.memory.open_document(world.collection, "d").unwrap().id;
    let blocks: Vec<NewBlock> = (0..4).map(|index| world.block(index, if index == 3 { 2 } else { 5 })).collect();
    append(&world, document, blocks.clone()).unwrap();
    world.memory.open_document(world.collection, "behind it").unwrap();
    let before = fetch(&world.memory, document, vec![0, 1, 2, 3]);
    let request = world.request(&[3, 4], vec![range(document, 0..3)]);
    let hits = world.memory.lookup(&request).unwrap();
    // Text, then the crc, then keys: the text, the quantizers, the payload.
    for (index, behind) in [(0, 0), (0, 9), (0, 800), (1, 9), (2, 600), (3, 4 + 4 + 9)] {
        damage(&world, &blocks[index].text.bytes, behind);
        world = world.reopened();
        let sent = blocks[index..index + 1].to_vec();
        assert!(!world.memory.verify(Some(document), &mut |_, _| ()).unwrap().faults.is_empty(), "{index} {behind}");
        append(&world, document, sent).unwrap();
        assert_eq!(world.memory.verify(Some(document), &mut |_, _| ()).unwrap().faults, []);
        assert_eq!(fetch(&world.memory, document, vec![0, 1, 2, 3]), before, "{index} {behind}");
        assert_eq!(world.memory.lookup(&request).unwrap(), hits, "{index} {behind}");
        // The older record lies in front of it and would be found first.
        let text = &blocks[index].text.bytes;
        world = world.reopened();
        erase(&world, text);
    }
}

/// Overwrites the first place of `bytes` in the segment files.
fn erase(world: &World, bytes: &[u8]) {
    for entry in std::fs::read_dir(world.dir.path().join("segments")).unwrap() {
        let path = entry.unwrap().path();
        let mut file = std::fs::read(&path).unwrap();
        if let Some(at) = file.windows(bytes.len()).position(|window| window == bytes) {
            file[at..at + bytes.len()].fill(b'x');
            return std::fs::write(path, file).unwrap();
        }
    }
}

#[test]
fn a_state_belongs_to_a_length_of_its_document() {
    let mut world = World::new(spec("states"));
    let document = world.document("a", 2);
    let (tail, longer) = (world.block(2, 2), world.block(2, 5));
    let append = |world: &World, block: &NewBlock, expected_tokens| {
        world.memory.append(AppendRequest { document, blocks: vec![block.clone()], expected_tokens })
    };
    append(&world, &tail, Some(10)).unwrap();
    let state = |tokens, byte: u8| SequenceState { tokens, parts: vec![vec![byte; 300].into(), vec![byte].into()] };
    let memory = &world.memory;
    assert_eq!(memory.state(document), Ok(None));
    for tokens in [0, 10, 13] {
        let refused = memory.put_state(document, state(tokens, 1));
        assert_eq!(refused, Err(MemoryError::UnexpectedLength { document, expected: tokens, found: 12 }));
    }
    let info = memory.put_state(document, state(12, 1)).unwrap();
    assert_eq!((info.state_tokens, info.tokens), (Some(12), 12));
    // A resumed writer goes back to it, and what it appends again is skipped, whatever it expects.
    append(&world, &longer, Some(12)).unwrap();
    assert_eq!(append(&world, &longer, Some(12)).unwrap().tokens, 15);
    assert_eq!(append(&world, &tail, Some(10)).unwrap().state_tokens, Some(12));
    let world = world.reopened();
    assert_eq!(world.memory.state(document), Ok(Some(state(12, 1))));
    world.memory.put_state(document, state(15, 2)).unwrap();
    let sealed = world.memory.seal(document).unwrap();
    assert_eq!(sealed.state_tokens, Some(15));
    assert_eq!(world.memory.put_state(document, state(15, 3)), Err(MemoryError::Sealed { document }));
    assert_eq!(world.memory.state(document), Ok(Some(state(15, 2))));
    assert_eq!(world.memory.state_part(document, 2), Ok(None));
    let listed = &world.memory.documents(world.collection).unwrap()[0];
    assert_eq!(*listed, world.memory.document(document).unwrap());
    world.memory.delete(document).unwrap();
    assert!(matches!(world.memory.state(document), Err(MemoryError::NotFound { .. })));
}

#[test]
fn states_are_bounded_before_anything_is_written() {
    let mut world = World::new(spec("states"));
    let document = world.document("a", 1);
    let put = |parts: Vec<Bytes>| world.memory.put_state(document, SequenceState { tokens: 5, parts });
    let limit = |what: &str, limit: usize, found: usize| {
        Err(MemoryError::LimitExceeded { what: what.into(), limit: limit as u64, found: found as u64 })
    };
    let missing = Err(MemoryError::Missing { field: "state.parts".into() });
    assert_eq!(put(vec![]), missing);
    assert_eq!(put(vec![Bytes::from_static(b"x"), Bytes::new()]), missing);
    let many = limits::STATE_PARTS_MAX + 1;
    assert_eq!(put(vec![Bytes::from_static(b"x"); many]), limit("parts of a state", many - 1, many));
    let large = Bytes::from(vec![0; limits::STATE_PART_BYTES_MAX + 1]);
    let (most, found) = (limits::STATE_PART_BYTES_MAX, large.len());
    assert_eq!(put(vec![large.clone()]), limit("bytes of a part of a state", most, found));
    let largest = large.slice(1..);
    let most = limits::STATE_BYTES_MAX as usize;
    let count = most / largest.len() + 1;
    assert_eq!(put(vec![largest.clone(); count]), limit("bytes of a state", most, count * largest.len()));
    assert_eq!(world.memory.document(document).unwrap().state_tokens, None);
    put(vec![largest]).unwrap();
}
