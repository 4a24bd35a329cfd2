//! Hits against scores computed from the fetched blocks at their positions, and requests that must be refused.

use super::*;

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
            let q = at_position(&shape.rope, q, slots * block_tokens + request.distances[token] as i64);
            let k = stored.k.to_f32().unwrap();
            let rows = head_rows(&k, shape, request.layer as usize, head / shape.group());
            let keys: Vec<f64> = keys_of(world.spec.key_rule, &rows)
                .iter()
                .map(|key| at_position(&shape.rope, key, slot * block_tokens))
                .map(|key| dot(&q, &key) * shape.softmax_scale as f64)
                .collect();
            scores.push((stored.id, log_sum_exp(&keys)));
        }
    }
    let total = log_sum_exp(&scores.iter().map(|(_, score)| *score).collect::<Vec<_>>());
    scores.into_iter().map(|(id, score)| (id, score - total)).collect()
}

/// What stands for a block of these token keys.
fn keys_of(rule: KeyRule, rows: &[&[f32]]) -> Vec<Vec<f32>> {
    match rule {
        KeyRule::Tokens => rows.iter().map(|row| row.to_vec()).collect(),
        KeyRule::Landmark => vec![rows[rows.len() - 1].to_vec()],
        KeyRule::Mean => {
            let mean = |d: usize| rows.iter().map(|row| row[d]).sum::<f32>() / rows.len() as f32;
            vec![(0..rows[0].len()).map(mean).collect()]
        }
    }
}

fn check(world: &World, request: &LookupRequest, tolerance: f64) {
    let hits = world.memory.lookup(request).unwrap();
    let heads = world.spec.shape.query_heads as usize;
    assert_eq!(hits.rows as usize, request.distances.len() * heads);
    for row in 0..hits.rows as usize {
        let shares = shares(world, request, row / heads, row % heads);
        let mut order: Vec<usize> = (0..shares.len()).collect();
        order.sort_by(|&a, &b| shares[b].1.total_cmp(&shares[a].1));
        order.truncate(request.top_k as usize);
        order.sort_unstable();
        let k = hits.k as usize;
        let got: Vec<BlockId> = hits.blocks[row * k..][..k].to_vec();
        assert_eq!(got, order.iter().map(|&i| shares[i].0).collect::<Vec<_>>());
        for (score, &i) in hits.scores[row * k..].iter().zip(&order) {
            assert!((*score as f64 - shares[i].1).abs() < tolerance, "{score} for {}", shares[i].1);
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
            world.memory.append(AppendRequest { document, blocks: vec![more] }).unwrap();
            let request = LookupRequest { scope: vec![range(document, 0..8 + round)], ..request.clone() };
            let hits = world.memory.lookup(&request).unwrap();
            world = world.reopened();
            assert_eq!(world.memory.lookup(&request).unwrap(), hits);
        }
    }
}

#[test]
fn an_engine_is_kept_and_chooses_the_same_blocks() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 90);
    let request = world.request(&[0, 1, 9], vec![range(document, 0..90)]);
    let flat = world.memory.lookup(&request).unwrap();
    let flat_bytes = world.memory.stats().unwrap().index_bytes;

    let info = world.memory.set_engine(world.collection, Engine::Sq8).unwrap();
    assert_eq!(info.engine, Engine::Sq8);
    for round in 0..2 {
        let hits = world.memory.lookup(&request).unwrap();
        assert_eq!(hits.blocks, flat.blocks);
        assert!(hits.scores.iter().zip(&flat.scores).all(|(a, b)| (a - b).abs() < 0.02));
        assert!(world.memory.stats().unwrap().index_bytes > flat_bytes, "both forms of the keys");
        // Blocks that come later are found as well.
        let more = world.block(90 + round, 5);
        world.memory.append(AppendRequest { document, blocks: vec![more] }).unwrap();
        let newest = LookupRequest { scope: vec![range(document, 90 + round..91 + round)], ..request.clone() };
        assert_eq!(world.memory.lookup(&newest).unwrap().k, 1);
        world = world.reopened();
        assert_eq!(world.memory.collections().unwrap()[0].engine, Engine::Sq8);
    }
    world.memory.set_engine(world.collection, Engine::Flat).unwrap();
    assert_eq!(world.memory.lookup(&request).unwrap(), flat);

    let gone = world.memory.set_engine(CollectionId(99), Engine::Flat);
    assert!(matches!(gone, Err(MemoryError::NotFound { entity: Entity::Collection, .. })), "{gone:?}");
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
        .starts_with("limit bytes of scores")
    );
}
