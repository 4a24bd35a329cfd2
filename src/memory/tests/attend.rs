//! Attention over the retrieved blocks against double precision, computed from the fetched blocks at their positions.

use super::*;

/// f32 sums over a few hundred products of values around 1; the stored values themselves are read back.
const TOLERANCE: f64 = 2e-5;

/// One query's attention over blocks, each with the tokens from its first one to the query: `(out (D), lse)`.
fn reference(
    world: &World,
    request: &AttendRequest,
    token: usize,
    head: usize,
    placed: &[(BlockId, i64)],
) -> (Vec<f64>, f64) {
    let shape = &world.spec.shape;
    let (lookup, dim, block_tokens) = (&request.lookup, shape.head_dim as usize, shape.block_tokens as i64);
    let q = &lookup.queries[(token * shape.query_heads as usize + head) * dim..][..dim];
    let q = at_position(shape.rope_of(lookup.layer), q, 0);
    // (log weight, value) of every token that takes part, and what competes.
    let mut weighed: Vec<(f64, Vec<f32>)> = Vec::new();
    let mut competing = Vec::new();
    for &(id, reach) in placed {
        let stored = fetch(&world.memory, id.document, vec![id.index]).remove(0);
        let (k, v) = (stored.k.to_f32().unwrap(), stored.v.to_f32().unwrap());
        let (layer, kv_head) = (lookup.layer as usize, head / shape.group());
        let mut scores: Vec<f64> = head_rows(&k, shape, layer, kv_head)
            .iter()
            .map(|key| dot(&q, &at_position(shape.rope_of(lookup.layer), key, -reach)) * shape.softmax_scale as f64)
            .collect();
        if request.without_first_tokens && id.index == 0 && scores.len() > 1 {
            scores[0] = f64::NEG_INFINITY;
        }
        let values = head_rows(&v, shape, layer, kv_head).into_iter().map(<[f32]>::to_vec);
        // A tail has no landmark, whatever the others have.
        let is_tail = scores.len() < block_tokens as usize;
        match request.normalisation {
            Normalisation::Grouped if !is_tail => {
                let (&landmark, inner) = scores.split_last().unwrap();
                let inside = log_sum_exp(inner);
                competing.push(landmark);
                weighed.extend(inner.iter().map(|score| landmark + score - inside).zip(values));
            }
            how => {
                let has_landmark = how == Normalisation::Hidden && !is_tail;
                let tokens = &scores[..scores.len() - has_landmark as usize];
                competing.extend(tokens);
                weighed.extend(tokens.iter().copied().zip(values));
            }
        }
    }
    let lse = log_sum_exp(&competing);
    let mut out = vec![0.0; dim];
    for (score, value) in &weighed {
        out.iter_mut().zip(value).for_each(|(out, value)| *out += (score - lse).exp() * *value as f64);
    }
    (out, lse)
}

/// Where one row's blocks stand by the rule of [`AttendRequest`]: tokens from their first one to a query so far into the window.
fn placed(world: &World, request: &AttendRequest, distance: u32, blocks: &[BlockId]) -> Vec<(BlockId, i64)> {
    let (lookup, block_tokens) = (&request.lookup, world.spec.shape.block_tokens as i64);
    let eligible: usize = lookup.scope.iter().map(|range| range.blocks.len()).sum();
    let last = lookup.scope.last().unwrap();
    let k = eligible.min(lookup.top_k as usize);
    let recent = k.min(last.blocks.len());
    let slots = if recent == eligible { eligible } else { k + 1 } as i64;
    let before_window = |(rank, &id): (usize, &BlockId)| match request.placement {
        Placement::Slots => {
            let is_recent = id.document == last.document && id.index + recent as u32 >= last.blocks.end;
            slots - (rank + (is_recent && recent < eligible) as usize) as i64
        }
        Placement::Original { within_tokens } => {
            let ranges = lookup.scope.iter().filter(|range| range.document == id.document);
            let end = ranges.map(|range| range.blocks.end).max().unwrap();
            let other = blocks[..rank].iter().rposition(|before| before.document != id.document);
            let of_document = (rank - other.map_or(0, |other| other + 1)) as i64;
            let mut fit = -1;
            while distance as i64 + (fit + 2) * block_tokens < within_tokens as i64 {
                fit += 1;
            }
            // `fit` blocks and the sink.
            ((end - id.index) as i64).min(slots.max(fit) - of_document)
        }
    };
    let place = |block| distance as i64 + before_window(block) * block_tokens;
    blocks.iter().enumerate().map(|(rank, id)| (*id, place((rank, id)))).collect()
}

fn close(got: &[f32], lse: f32, want: &(Vec<f64>, f64), what: &str) {
    assert!((lse as f64 - want.1).abs() < TOLERANCE * 5.0, "{what}: lse {lse} for {}", want.1);
    for (got, want) in got.iter().zip(&want.0) {
        assert!((*got as f64 - want).abs() < TOLERANCE, "{what}: {got} for {want}");
    }
}

pub(super) fn check(world: &World, request: &AttendRequest) {
    let shape = &world.spec.shape;
    let (heads, kv_heads, dim) = (shape.query_heads as usize, shape.kv_heads as usize, shape.head_dim as usize);
    let attended = world.memory.attend(request).unwrap();
    assert_eq!(attended.hits, world.memory.lookup(&request.lookup).unwrap());
    let k = attended.hits.k as usize;
    for token in 0..request.lookup.distances.len() {
        for head in 0..heads {
            let row = request.lookup.granularity.row(token, head, heads, kv_heads);
            let blocks = &attended.hits.blocks[row * k..][..k];
            let placed = placed(world, request, request.lookup.distances[token], blocks);
            let want = reference(world, request, token, head, &placed);
            let at = token * heads + head;
            close(&attended.out[at * dim..][..dim], attended.lse[at], &want, &format!("{request:?}"));
        }
    }
}

const GRANULARITIES: [Granularity; 5] =
    [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];

#[test]
fn attention_equals_double_precision_for_every_choice() {
    for payload_dtype in [DType::F32, DType::F16, DType::BF16, DType::Int8] {
        let mut world = World::new(CollectionSpec { payload_dtype, ..spec("c") });
        let (a, b) = (world.document("a", 7), world.document("b", 4));
        for granularity in GRANULARITIES {
            for normalisation in [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden] {
                for (distances, top_k) in [(vec![2], 3), (vec![0, 1, 2, 3, 30], 3), (vec![1, 9], 20)] {
                    for scope in [vec![range(a, 0..7)], vec![range(b, 1..4), range(a, 3..5)]] {
                        let lookup = LookupRequest { granularity, top_k, ..world.request(&distances, scope) };
                        for without_first_tokens in [false, normalisation == Normalisation::Plain] {
                            let (lookup, placement) = (lookup.clone(), Placement::Slots);
                            check(&world, &AttendRequest { lookup, normalisation, placement, without_first_tokens });
                        }
                    }
                }
            }
        }
    }
}

/// One document or several, with holes and again, near enough for the context and far beyond it.
#[test]
fn attention_at_original_distances_equals_double_precision_on_random_shapes() {
    let mut farther_than_slots = 0;
    for payload_dtype in [DType::F32, DType::F16, DType::BF16, DType::Int8] {
        let mut world = World::new(CollectionSpec { payload_dtype, ..spec("c") });
        let documents = [("a", 23), ("b", 4), ("c", 9)].map(|(name, blocks)| world.document(name, blocks));
        for case in 0..60 {
            let tokens = world.rng.random_range(1..5);
            let distances: Vec<u32> = (0..tokens).map(|_| world.rng.random_range(0..40)).collect();
            let scope = (0..world.rng.random_range(1..5)).map(|_| {
                let document = documents[world.rng.random_range(0..3)];
                let blocks = world.memory.document(document).unwrap().blocks;
                let ends = [(); 2].map(|()| world.rng.random_range(0..=blocks));
                range(document, ends[0].min(ends[1])..ends[0].max(ends[1]))
            });
            let scope: Vec<BlockRange> = scope.collect();
            if scope.iter().all(|range| range.blocks.is_empty()) {
                continue;
            }
            let (top_k, within_tokens) = (world.rng.random_range(1..9), world.rng.random_range(1..200));
            let granularity = GRANULARITIES[case % 5];
            let lookup = LookupRequest { granularity, top_k, ..world.request(&distances, scope) };
            let normalisation = [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden][case % 3];
            let request = AttendRequest {
                lookup,
                normalisation,
                placement: Placement::Original { within_tokens },
                without_first_tokens: false,
            };
            check(&world, &request);
            let out = |placement| world.memory.attend(&AttendRequest { placement, ..request.clone() }).unwrap().out;
            farther_than_slots += (out(Placement::Slots) != out(request.placement)) as u32;
        }
    }
    assert!((100..240).contains(&farther_than_slots), "{farther_than_slots} of 240");
}

#[test]
fn a_placement_where_nothing_may_stand_is_refused() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 3);
    let lookup = world.request(&[0], vec![range(document, 0..3)]);
    let placement = Placement::Original { within_tokens: 0 };
    let nowhere = AttendRequest { lookup, normalisation: Normalisation::Plain, placement, without_first_tokens: false };
    let within = |within_tokens| AttendRequest { placement: Placement::Original { within_tokens }, ..nowhere.clone() };
    let requests = [within(1), nowhere.clone(), within(u32::MAX)];
    for outcomes in [world.memory.attend_all(&requests), requests.iter().map(|one| world.memory.attend(one)).collect()]
    {
        assert!(outcomes[0].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
        let field = match &outcomes[1] {
            Err(MemoryError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field, "original_within_tokens");
    }
}

/// The rotations of one layer are kept for the next, but not for one that does not rotate.
#[test]
fn layers_without_rotation_are_attended_to_where_nothing_has_a_place() {
    let shape = ModelShape { unrotated_layers: vec![0], ..spec("c").shape };
    let mut world = World::new(CollectionSpec { shape, ..spec("c") });
    let document = world.document("a", 9);
    let lookup = world.request(&[0, 3, 11], vec![range(document, 0..9)]);
    for layer in [1, 0, 1, 0] {
        for placement in [Placement::Slots, Placement::Original { within_tokens: 60 }] {
            let lookup = LookupRequest { layer, ..lookup.clone() };
            check(
                &world,
                &AttendRequest { lookup, normalisation: Normalisation::Plain, placement, without_first_tokens: false },
            );
        }
    }
}

#[test]
fn with_all_blocks_retrieved_it_is_full_attention_at_true_positions() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 6);
    let lookup = LookupRequest { top_k: 9, ..world.request(&[0, 4], vec![range(document, 0..6)]) };
    let request = AttendRequest {
        lookup,
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    };
    let attended = world.memory.attend(&request).unwrap();
    for row in 0..8 {
        let distance = |index| (6 - index as i64) * 5 + request.lookup.distances[row / 4] as i64;
        let truth: Vec<(BlockId, i64)> = (0..6).map(|index| (BlockId { document, index }, distance(index))).collect();
        let want = reference(&world, &request, row / 4, row % 4, &truth);
        close(&attended.out[row * 8..][..8], attended.lse[row], &want, "full attention");
    }
    // However far that is.
    for within_tokens in [1, 20, 1000] {
        let placement = Placement::Original { within_tokens };
        assert_eq!(world.memory.attend(&AttendRequest { placement, ..request.clone() }).unwrap(), attended);
    }
}

/// Enough rows per block for blocked products, and enough uses for several tasks per KV head.
#[test]
fn many_tokens_over_many_blocks_agree_too() {
    for payload_dtype in [DType::F16, DType::Int8] {
        let mut world = World::new(CollectionSpec { payload_dtype, ..spec("c") });
        let document = world.document("a", 60);
        let distances: Vec<u32> = (0..64).collect();
        for granularity in [Granularity::KvGroup, Granularity::Shared] {
            let lookup = world.request(&distances, vec![range(document, 0..60)]);
            let lookup = LookupRequest { granularity, top_k: 8, ..lookup };
            let request = AttendRequest {
                lookup,
                normalisation: Normalisation::Plain,
                placement: Placement::Slots,
                without_first_tokens: false,
            };
            check(&world, &request);
            check(&world, &AttendRequest { placement: Placement::Original { within_tokens: 250 }, ..request });
        }
    }
}

#[test]
fn requests_asked_together_are_answered_as_if_alone() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 66);
    let mut request = |tokens: u32, layer: u32, end: u32| {
        let distances: Vec<u32> = (0..tokens).collect();
        let lookup = LookupRequest { layer, ..world.request(&distances, vec![range(document, 0..end)]) };
        AttendRequest {
            lookup,
            normalisation: Normalisation::Plain,
            placement: Placement::Slots,
            without_first_tokens: false,
        }
    };
    let refused = request(1, 9, 66);
    let small = [request(1, 0, 66), refused.clone(), request(3, 1, 66), request(1, 1, 0)];
    let large = [request(4096, 1, 66), refused, request(1, 0, 66)];
    // Nothing is in memory, so the keys are read by the first of them.
    let world = world.reopened();
    for requests in [&small[..], &large, &[]] {
        let together = world.memory.attend_all(requests);
        let alone: Vec<Result<Attended>> = requests.iter().map(|request| world.memory.attend(request)).collect();
        assert_eq!(together, alone);
        let refused = together.iter().filter(|outcome| outcome.is_err()).count();
        assert_eq!(refused, requests.len().min(1), "layer 9 is refused, and nothing else");
    }
    assert_eq!(world.memory.stats().unwrap().attends, 2 * 5);
}

#[test]
fn attention_is_the_same_from_a_cold_disk() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 40);
    let lookup = world.request(&[0, 1], vec![range(document, 0..40)]);
    let request = AttendRequest {
        lookup,
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    };
    let warm = world.memory.attend(&request).unwrap();
    for segment in std::fs::read_dir(world.dir.path().join("segments")).unwrap() {
        let file = std::fs::File::open(segment.unwrap().path()).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    assert_eq!(world.memory.attend(&request).unwrap(), warm);
}

#[test]
fn nothing_eligible_gives_zeros_and_no_mass() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 1);
    let lookup = world.request(&[0, 1], vec![range(document, 0..0)]);
    let attended = world
        .memory
        .attend(&AttendRequest {
            lookup,
            normalisation: Normalisation::Grouped,
            placement: Placement::Slots,
            without_first_tokens: false,
        })
        .unwrap();
    assert_eq!(attended.out, vec![0.0; 2 * 4 * 8]);
    assert_eq!(attended.lse, vec![f32::NEG_INFINITY; 2 * 4]);
}

/// Readers and a writer of one document at once: every answer is that of some prefix, none fails.
#[test]
fn lookups_run_while_blocks_are_appended() {
    let mut world = World::new(spec("c"));
    let document = world.document("a", 3);
    let request = world.request(&[0], vec![range(document, 0..3)]);
    let blocks: Vec<NewBlock> = (3..40).map(|index| world.block(index, 5)).collect();
    let memory = &world.memory;
    let want = memory.lookup(&request).unwrap();
    std::thread::scope(|scope| {
        let readers: Vec<_> =
            (0..2).map(|_| scope.spawn(|| (0..200).all(|_| memory.lookup(&request).unwrap() == want))).collect();
        for block in blocks {
            memory.append(AppendRequest { document, blocks: vec![block], expected_tokens: None }).unwrap();
            let blocks = memory.document(document).unwrap().blocks;
            let all = LookupRequest { scope: vec![range(document, 0..blocks)], ..request.clone() };
            assert_eq!(memory.lookup(&all).unwrap().k, 3);
        }
        assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
    });
}
