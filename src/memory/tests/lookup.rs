//! Hits against scores computed from the fetched blocks at their positions, and requests that must be refused.

use super::*;
use crate::memory::ingest::encode;

/// Share of every eligible block (log) for one query, with blocks where [`AttendRequest`] says they are scored.
fn shares(world: &World, request: &LookupRequest, token: usize, head: usize) -> Vec<(BlockId, f64)> {
    let shape = &world.spec.shape;
    let (dim, block_tokens) = (shape.head_dim as usize, shape.block_tokens as i64);
    let eligible: usize = request.scope.iter().map(|range| range.blocks.len()).sum();
    let k = eligible.min(request.top_k as usize);
    let recent = k.min(request.scope.last().map_or(0, |range| range.blocks.len()));
    let slots = if recent == eligible { eligible } else { k + 1 } as i64;
    let mut scores: Vec<(BlockId, f64)> = Vec::new();
    for scoped in &request.scope {
        for stored in fetch(&world.memory, scoped.document, scoped.blocks.clone().collect()) {
            let from_end = (eligible - scores.len()) as i64;
            let slot = if from_end <= recent as i64 { slots - from_end } else { 0 };
            let q = &request.queries[(token * shape.query_heads as usize + head) * dim..][..dim];
            let q =
                at_position(shape.rope_of(request.layer), q, slots * block_tokens + request.distances[token] as i64);
            let k = stored.k.to_f32().unwrap();
            let rows = head_rows(&k, shape, request.layer as usize, head / shape.group());
            let keys: Vec<f64> = keys_of(world.spec.key_rule, stored.id.index, &rows)
                .iter()
                .map(|key| at_position(shape.rope_of(request.layer), key, slot * block_tokens))
                .map(|key| dot(&q, &key) * shape.softmax_scale as f64)
                .collect();
            let score = match request.block_score {
                BlockScore::Max => keys.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                BlockScore::LogSumExp => log_sum_exp(&keys),
            };
            scores.push((stored.id, score));
        }
    }
    let total = log_sum_exp(&scores.iter().map(|(_, score)| *score).collect::<Vec<_>>());
    scores.into_iter().map(|(id, score)| (id, score - total)).collect()
}

/// What stands for a block of these token keys.
fn keys_of(rule: KeyRule, index: u32, rows: &[&[f32]]) -> Vec<Vec<f32>> {
    // Of a document's first token there is no key, where there is another.
    let first = (index == 0 && rows.len() > 1) as usize;
    match rule {
        KeyRule::Tokens if first > 0 => rows[1..2].iter().chain(&rows[1..]).map(|row| row.to_vec()).collect(),
        KeyRule::Tokens => rows.iter().map(|row| row.to_vec()).collect(),
        KeyRule::Landmark => vec![rows[rows.len() - 1].to_vec()],
        KeyRule::Mean => {
            let rows = &rows[first..];
            let mean = |d: usize| rows.iter().map(|row| row[d]).sum::<f32>() / rows.len() as f32;
            vec![(0..rows[0].len()).map(mean).collect()]
        }
    }
}

pub(super) fn check(world: &World, request: &LookupRequest, tolerance: f64) {
    let hits = world.memory.lookup(request).unwrap();
    let heads = world.spec.shape.query_heads as usize;
    assert_eq!(hits.rows as usize, request.distances.len() * heads);
    for row in 0..hits.rows as usize {
        let shares = shares(world, request, row / heads, row % heads);
        let mut order: Vec<usize> = (0..shares.len()).collect();
        order.sort_by(|&a, &b| shares[b].1.total_cmp(&shares[a].1));
        order.truncate(request.top_k as usize);
        let k = hits.k as usize;
        assert_eq!(k, order.len());
        let least = order.last().map_or(0.0, |&i| shares[i].1);
        let got: Vec<usize> = hits.blocks[row * k..][..k]
            .iter()
            .map(|block| shares.iter().position(|(eligible, _)| eligible == block).unwrap())
            .collect();
        assert!(got.is_sorted_by(|a, b| a < b), "in order, none twice: {got:?}");
        for (score, i) in hits.scores[row * k..].iter().zip(got) {
            assert!((*score as f64 - shares[i].1).abs() < tolerance, "{score} for {}", shares[i].1);
            assert!(shares[i].1 > least - tolerance, "{} is not among the best, from {least}", shares[i].1);
        }
    }
}

#[test]
fn hits_are_the_best_blocks_where_they_are_scored() {
    let mut world = World::new(spec("c"));
    let (a, b) = (world.document("a", 9), world.document("b", 6));
    for scope in [
        vec![range(a, 0..9)],
        vec![range(a, 2..4)],
        vec![range(b, 1..4), range(a, 5..8)],
        vec![range(b, 0..6), range(a, 0..2)],
        vec![range(b, 0..6), range(a, 9..9)],
        vec![range(b, 4..4), range(b, 5..6), range(a, 3..9)],
    ] {
        let request = world.request(&[0, 3, 40], scope);
        check(&world, &request, 1e-4);
    }
}

#[test]
fn int8_token_keys_choose_the_best_blocks_in_documents_of_any_format() {
    let mut world = World::new(CollectionSpec { key_dtype: DType::Int8, ..spec("c") });
    let new = world.document("new", 6);
    // Begun by a build without channel quantizers; this build goes on without.
    let old = world.document("old", 0);
    let tokens = world.spec.shape.block_tokens;
    let collection = world.memory.collection_of(world.collection).unwrap();
    let blocks: Vec<NewBlock> = (0..3).map(|index| world.block(index, tokens)).collect();
    let records: Vec<_> = blocks.iter().map(|block| encode(&collection, block, &[], 0).unwrap()).collect();
    world.memory.store.append(old, &records).unwrap();
    for round in 0..3 {
        let more = world.block(3 + round, tokens);
        world.memory.append(AppendRequest { document: old, blocks: vec![more], expected_tokens: None }).unwrap();
        for scope in [vec![range(new, 0..6)], vec![range(old, 0..3 + round)], vec![range(new, 1..6), range(old, 1..4)]]
        {
            let request = world.request(&[0, 3], scope);
            check(&world, &request, 0.05);
        }
        world = world.reopened();
        assert_eq!(world.memory.verify(None, &mut |_, _| {}).unwrap().faults, []);
    }
    let key_bytes = |document, index| world.memory.store.read_keys(BlockId { document, index }).unwrap().len();
    assert_eq!(key_bytes(old, 0), key_bytes(old, 5));
    assert_eq!(key_bytes(new, 0), key_bytes(new, 5) + 4 * 8 * world.spec.shape.pieces());
    assert!(key_bytes(new, 5) > key_bytes(old, 5));
}

#[test]
fn nothing_eligible_gives_rows_without_hits() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 2);
    for scope in [vec![], vec![range(document, 1..1)]] {
        let request = world.request(&[0, 1], scope);
        let hits = world.memory.lookup(&request).unwrap();
        assert_eq!(hits, Hits { rows: 8, k: 0, ..Hits::default() });
    }
}

#[test]
fn what_was_loaded_from_disk_equals_what_appends_left_in_memory() {
    for (key_rule, key_dtype) in
        [(KeyRule::Tokens, DType::Int8), (KeyRule::Landmark, DType::F16), (KeyRule::Mean, DType::Int8)]
    {
        let mut world = World::new(CollectionSpec { key_rule, key_dtype, ..spec("c") });
        let document = world.document("a", 7);
        let request = world.request(&[0, 1], vec![range(document, 0..7)]);
        let hits = world.memory.lookup(&request).unwrap();
        let mut world = world.reopened();
        assert_eq!(world.memory.stats().unwrap().index_bytes, 0, "nothing is loaded before it is asked for");
        assert_eq!(world.memory.lookup(&request).unwrap(), hits);

        // An append to a document that is loaded, and one to a document that is not, are both seen.
        for round in 0..2 {
            let more = world.block(7 + round, 5);
            world.memory.append(AppendRequest { document, blocks: vec![more], expected_tokens: None }).unwrap();
            let request = LookupRequest { scope: vec![range(document, 0..8 + round)], ..request.clone() };
            let hits = world.memory.lookup(&request).unwrap();
            world = world.reopened();
            assert_eq!(world.memory.lookup(&request).unwrap(), hits);
        }
    }
}

#[test]
fn an_engine_is_kept_and_chooses_the_same_blocks() {
    for (engine, tolerance) in [(Engine::Sq8, 0.02), (Engine::Sq4, 0.5)] {
        let mut world = World::new(spec("c"));
        let document = world.document("a", 90);
        let request = world.request(&[0, 1, 9], vec![range(document, 0..90)]);
        let flat = world.memory.lookup(&request).unwrap();
        let flat_bytes = world.memory.stats().unwrap().index_bytes;

        let info = world.memory.set_engine(world.collection, engine.clone()).unwrap();
        assert_eq!(info.engine, engine);
        for round in 0..2 {
            let hits = world.memory.lookup(&request).unwrap();
            assert_eq!(hits.blocks, flat.blocks);
            assert!(hits.scores.iter().zip(&flat.scores).all(|(a, b)| (a - b).abs() < tolerance));
            assert!(world.memory.stats().unwrap().index_bytes > flat_bytes, "both forms of the keys");
            // Blocks that come later are found as well.
            let more = world.block(90 + round, 5);
            world.memory.append(AppendRequest { document, blocks: vec![more], expected_tokens: None }).unwrap();
            let newest = LookupRequest { scope: vec![range(document, 90 + round..91 + round)], ..request.clone() };
            assert_eq!(world.memory.lookup(&newest).unwrap().k, 1);
            world = world.reopened();
            assert_eq!(world.memory.collections().unwrap()[0].engine, engine);
        }
        world.memory.set_engine(world.collection, Engine::Flat).unwrap();
        assert_eq!(world.memory.lookup(&request).unwrap(), flat);

        let gone = world.memory.set_engine(CollectionId(99), Engine::Flat);
        assert!(matches!(gone, Err(MemoryError::NotFound { entity: Entity::Collection, .. })), "{gone:?}");
    }
}

/// `Last` is one file of `index::engine` and one row of the table of engines.
#[test]
fn an_engine_of_one_file_and_one_row_is_typed_kept_and_asked() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 20);
    let request = LookupRequest { top_k: 3, ..world.request(&[0, 9], vec![range(document, 0..20)]) };
    let last: Engine = "last".parse().unwrap();
    assert_eq!((last.to_string(), last.number()), ("last".into(), 1000));
    assert_eq!(Engine::from_number(1000, || None), Some(last.clone()));
    assert!("nonsense".parse::<Engine>().unwrap_err().contains("last"));
    assert_eq!(world.memory.set_engine(world.collection, last.clone()).unwrap().engine, last);
    for _ in 0..2 {
        let hits = world.memory.lookup(&request).unwrap();
        let chosen: Vec<u32> = hits.blocks[..3].iter().map(|block| block.index).collect();
        assert_eq!(chosen, [17, 18, 19]);
        world = world.reopened();
        assert_eq!(world.memory.collections().unwrap()[0].engine, last);
    }
}

/// Where there is no GPU the engine is refused, and what another machine set is answered by the CPU.
#[test]
fn the_engine_cuda_keeps_no_collection_out_of_reach() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 30);
    let lookup = world.request(&[0, 9], vec![range(document, 0..30)]);
    let request = AttendRequest {
        lookup,
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    };
    let flat = world.memory.attend(&request).unwrap();
    let here = world.memory.set_engine(world.collection, Engine::Cuda);
    if let Err(error) = &here {
        let refused = matches!(error, MemoryError::Invalid { field, found, .. } if field == "engine" && found.starts_with("cuda: "));
        assert!(refused, "{error}");
        assert_eq!(world.memory.collections().unwrap()[0].engine, Engine::Flat);
    }
    world.memory.store.set_engine(world.collection, Engine::Cuda).unwrap();
    let world = world.reopened();
    assert_eq!(world.memory.collections().unwrap()[0].engine, Engine::Cuda);
    let answered = world.memory.attend(&request).unwrap();
    assert_eq!(answered.hits.blocks, flat.hits.blocks);
    assert!(here.is_ok() || answered == flat);
}

#[test]
fn landmark_and_mean_rules_score_what_they_say() {
    for key_rule in [KeyRule::Landmark, KeyRule::Mean] {
        let mut world = World::new(CollectionSpec { key_rule, payload_dtype: DType::F32, ..spec("c") });
        let document = world.document("a", 9);
        let request = world.request(&[0, 7], vec![range(document, 0..9)]);
        // The payload is exact here, the keys are rounded to f16.
        check(&world, &request, 5e-3);
    }
}

#[test]
fn impossible_requests_are_refused_by_field() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 2);
    let elsewhere = world.memory.open_collection(&spec("other")).unwrap().id;
    let stranger = world.memory.open_document(elsewhere, "s").unwrap().id;
    let good = world.request(&[0, 1], vec![range(document, 0..2)]);
    let large = range(world.document("large", 200), 0..200);
    let refused = |change: &dyn Fn(&mut LookupRequest)| {
        let mut request = good.clone();
        change(&mut request);
        match world.memory.lookup(&request).unwrap_err() {
            MemoryError::Missing { field } => format!("missing {field}"),
            MemoryError::Invalid { field, .. } => field,
            MemoryError::LimitExceeded { what, .. } => format!("limit {what}"),
            MemoryError::NotFound { entity, id } => format!("no {entity} {id}"),
            error => panic!("{error}"),
        }
    };
    assert_eq!(refused(&|request| request.collection = CollectionId(9)), "no collection 9");
    assert_eq!(refused(&|request| request.layer = 2), "layer");
    assert_eq!(refused(&|request| request.top_k = 0), "top_k");
    assert_eq!(refused(&|request| request.top_k = 1025), "top_k");
    assert_eq!(refused(&|request| request.distances.clear()), "missing distances");
    assert_eq!(refused(&|request| request.distances = vec![0; 4097]), "limit query tokens");
    assert_eq!(refused(&|request| request.queries.truncate(63)), "queries");
    assert_eq!(refused(&|request| request.queries[5] = f32::NAN), "queries");
    assert_eq!(refused(&|request| request.queries[5] = f32::INFINITY), "queries");
    assert_eq!(refused(&|request| request.scope[0].blocks = 0..3), "scope[0].blocks");
    assert_eq!(refused(&|request| request.scope[0].blocks = std::ops::Range { start: 2, end: 1 }), "scope[0].blocks");
    assert_eq!(refused(&|request| request.scope.push(range(stranger, 0..0))), "scope[1].document");
    assert_eq!(refused(&|request| request.scope.push(range(DocumentId(99), 0..0))), "no document 99");
    assert_eq!(refused(&|request| request.scope = vec![range(document, 0..0); 1025]), "limit scope");
    assert!(
        refused(&|request| {
            request.distances = vec![0; 4096];
            request.queries = vec![0.0; 4096 * 32];
            request.scope = vec![large.clone(); 1024];
        })
        .starts_with("limit scores")
    );
}

/// A document that is long enough for indexes, and queries for it: first such as an index answers alone, then such as heads
/// or tokens answer together.
fn long_document(world: &mut World) -> (DocumentId, u32, [Vec<LookupRequest>; 2]) {
    let blocks = (limits::INDEXED_KEYS_MIN / 5 + 1) as u32;
    let document = world.document("long", blocks);
    let mut requests = |granularity, block_score| -> Vec<LookupRequest> {
        let of_layer = |layer| LookupRequest {
            layer,
            granularity,
            block_score,
            ..world.request(&[0, 1, 9], vec![range(document, 1..blocks)])
        };
        (0..2).map(of_layer).collect()
    };
    let alone = requests(Granularity::TokenHead, BlockScore::Max);
    let together = [Granularity::KvGroup, Granularity::Token, Granularity::Shared, Granularity::Head];
    let together = together.into_iter().flat_map(|granularity| requests(granularity, BlockScore::LogSumExp)).collect();
    (document, blocks, [alone, together])
}

fn index_files(world: &World, document: DocumentId) -> Vec<std::path::PathBuf> {
    let folders = std::fs::read_dir(world.dir.path().join("indexes").join(document.to_string())).unwrap();
    let files = folders.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}

/// The share of the right blocks that are among those that were found.
fn share_found(found: &Hits, right: &Hits) -> f64 {
    let k = right.k as usize;
    let rows = found.blocks.chunks_exact(k).zip(right.blocks.chunks_exact(k));
    let same: usize = rows.map(|(found, right)| found.iter().filter(|block| right.contains(block)).count()).sum();
    same as f64 / right.blocks.len() as f64
}

#[test]
#[cfg_attr(not(feature = "faiss"), ignore = "needs a build with --features faiss")]
fn indexes_of_faiss_find_blocks_and_are_only_a_cache() {
    let mut world = World::new(spec("c"));
    let (document, blocks, requests) = long_document(&mut world);
    let lookups = |world: &World, requests: &[LookupRequest]| -> Vec<Hits> {
        requests.iter().map(|request| world.memory.lookup(request).unwrap()).collect()
    };
    let right = requests.each_ref().map(|requests| lookups(&world, requests));
    let recall = |world: &World| -> [f64; 2] {
        [0, 1].map(|kind| {
            let found = lookups(world, &requests[kind]);
            let shares = found.iter().zip(&right[kind]).map(|(found, right)| share_found(found, right));
            shares.sum::<f64>() / found.len() as f64
        })
    };

    // At full effort all of them look at everything. Their own rounding of keys may cost a block or two.
    for (engine, least) in
        [("Flat@1", 1.0), ("IVF16,Flat@16", 1.0), ("HNSW16@4096", 0.97), ("SQ8@1", 0.97), ("IVF4,PQ4x4fs@4", 0.3)]
    {
        let engine: Engine = format!("faiss:{engine}").parse().unwrap();
        world.memory.set_engine(world.collection, engine.clone()).unwrap();
        let found = recall(&world);
        assert!(found[0] >= least && found[1] > 0.7 * least, "{engine}: {found:?}");
        let files = index_files(&world, document);
        assert_eq!(files.len(), 4, "an index per layer and KV head");
        let first = &files[0];
        let built = std::fs::metadata(first).unwrap().modified().unwrap();
        world = world.reopened();
        let part = LookupRequest { scope: vec![range(document, 1..blocks - 9)], ..requests[0][0].clone() };
        world.memory.lookup(&part).unwrap();
        assert_eq!(recall(&world), found, "{engine} is read as it was written");
        assert_eq!(std::fs::metadata(first).unwrap().modified().unwrap(), built, "nothing is built again");

        // Damage is noticed, and mended.
        let whole = std::fs::read(first).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        for bytes in [&damaged[..], &whole[..whole.len() - 1], &[]] {
            std::fs::write(first, bytes).unwrap();
            world = world.reopened();
            assert_eq!(recall(&world), found, "{engine}");
            assert!(std::fs::read(first).unwrap() == whole, "{engine} is built again");
        }
    }

    // Blocks that no index covers yet are found as well, and a deleted document leaves nothing behind.
    let more = world.block(blocks, 5);
    world.memory.append(AppendRequest { document, blocks: vec![more], expected_tokens: None }).unwrap();
    let newest = LookupRequest { scope: vec![range(document, blocks..blocks + 1)], ..requests[0][0].clone() };
    assert_eq!(world.memory.lookup(&newest).unwrap().k, 1);
    let all = LookupRequest { scope: vec![range(document, 1..blocks + 1)], ..requests[0][0].clone() };
    world.memory.set_engine(world.collection, "faiss:Flat@1".parse().unwrap()).unwrap();
    let found = world.memory.lookup(&all).unwrap();
    world.memory.set_engine(world.collection, Engine::Flat).unwrap();
    assert_eq!(found.blocks, world.memory.lookup(&all).unwrap().blocks);
    world.memory.delete(document).unwrap();
    assert!(!world.dir.path().join("indexes").join(document.to_string()).exists());
}

/// Where all nearest keys were of blocks that may not be chosen, only the recent blocks were compared.
#[test]
#[cfg_attr(not(feature = "faiss"), ignore = "needs a build with --features faiss")]
fn an_index_that_finds_nothing_eligible_names_all_that_it_covers() {
    let mut world = World::new(spec("c"));
    let blocks = (limits::INDEXED_KEYS_MIN / 5 + 1) as u32;
    let eligible = blocks * 3 / 5;
    let document = world.document("long", eligible);
    for first in (eligible..blocks).step_by(limits::APPEND_BLOCKS_MAX) {
        let larger = |mut block: NewBlock| {
            let values: Vec<f32> = block.k.to_f32().unwrap().iter().map(|number| number * 100.0).collect();
            block.k = Tensor::from_f32(block.k.shape.clone(), &values);
            block
        };
        let end = blocks.min(first + limits::APPEND_BLOCKS_MAX as u32);
        let more = (first..end).map(|index| larger(world.block(index, 5))).collect();
        world.memory.append(AppendRequest { document, blocks: more, expected_tokens: None }).unwrap();
    }
    let request =
        LookupRequest { block_score: BlockScore::Max, ..world.request(&[0, 7], vec![range(document, 1..eligible)]) };
    let right = world.memory.lookup(&request).unwrap();
    world.memory.set_engine(world.collection, "faiss:Flat@1".parse().unwrap()).unwrap();
    assert_eq!(world.memory.lookup(&request).unwrap().blocks, right.blocks);
}

#[test]
#[cfg_attr(not(feature = "faiss"), ignore = "needs a build with --features faiss")]
fn indexes_of_int8_keys_name_blocks_that_are_compared_by_their_quantizers() {
    let mut world = World::new(CollectionSpec { key_dtype: DType::Int8, ..spec("c") });
    let (_, _, [alone, _]) = long_document(&mut world);
    for request in &alone {
        world.memory.set_engine(world.collection, Engine::Flat).unwrap();
        let right = world.memory.lookup(request).unwrap();
        world.memory.set_engine(world.collection, "faiss:Flat@1".parse().unwrap()).unwrap();
        // Against int8 keys a query is rounded too, which may decide a near tie.
        assert!(share_found(&world.memory.lookup(request).unwrap(), &right) > 0.97);
    }
}

#[test]
#[cfg_attr(not(feature = "faiss"), ignore = "needs a build with --features faiss")]
fn a_grown_document_gets_larger_indexes_while_lookups_go_on() {
    let mut world = World::new(spec("c"));
    let (document, blocks, requests) = long_document(&mut world);
    world.memory.set_engine(world.collection, "faiss:IVF8,Flat@8".parse().unwrap()).unwrap();
    world.memory.lookup(&requests[0][0]).unwrap();
    let first_index = index_files(&world, document);
    assert_eq!(first_index.len(), 2, "of the layer that was asked");
    let all = LookupRequest { scope: vec![range(document, 1..2 * blocks)], ..requests[0][0].clone() };
    for first in (blocks..2 * blocks).step_by(500) {
        let more = (first..(first + 500).min(2 * blocks)).map(|index| world.block(index, 5)).collect();
        world.memory.append(AppendRequest { document, blocks: more, expected_tokens: None }).unwrap();
    }
    let hits = world.memory.lookup(&all).unwrap();
    let begin = std::time::Instant::now();
    while first_index[0].exists() && begin.elapsed().as_secs() < 60 {
        assert_eq!(world.memory.lookup(&all).unwrap().blocks, hits.blocks);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(world.memory.lookup(&all).unwrap().blocks, hits.blocks);
    let larger = index_files(&world, document);
    assert!(larger.len() == 4 && larger.iter().all(|file| file.parent() != first_index[0].parent()), "{larger:?}");
}

#[test]
fn an_engine_that_is_not_to_be_had_is_refused_and_changes_nothing() {
    let world = World::new(spec("c"));
    let refused = |engine: &str| {
        let refused = world.memory.set_engine(world.collection, engine.parse().unwrap()).unwrap_err().to_string();
        assert_eq!(world.memory.collections().unwrap()[0].engine, Engine::Flat);
        refused
    };
    assert!(refused("faiss:nonsense").contains("nonsense"));
    assert!(refused(&format!("faiss:{}", "x".repeat(200))).contains("faiss.factory"));
    assert!(refused("faiss:Flat@0").contains("effort"));
    assert!(cfg!(feature = "faiss") || refused("faiss:Flat").contains("--features faiss"));
}
