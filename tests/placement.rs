//! Where do the sink and retrieved blocks stand? Sessions judged by attention in double precision, over tokens whose distances are
//! counted here one by one. All that is eligible is retrieved, so that no score decides.

mod common;

use std::sync::Arc;

use common::{shape, spec};
use landmarkdb::{
    BlockAttention, BlockMemory, CollectionInfo, DType, DocumentInfo, LocalMemory, NewTokens, Placement, Retrieval,
    SequenceAttention, Window,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// B
const BLOCK_TOKENS: usize = 8;
/// Of the window, counted from the query's own block.
const WINDOW_BLOCKS: usize = 2;
const TOLERANCE: f32 = 2e-5;
const FAR: Placement = Placement::Original { within_tokens: 100_000 };

/// What a model asks and says at each token: of each layer `q (T, 4, D)`, `k` and `v (T, 2, D)`.
struct Text {
    layers: Vec<[Vec<f32>; 3]>,
}

/// A token that is attended to: of which text, which one, and how far from the query.
type Seen<'a> = (&'a Text, usize, usize);

impl Text {
    fn random(tokens: usize, seed: u64) -> Text {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = |heads: usize| (0..tokens * heads * 8).map(|_| rng.random_range(-2.0f32..2.0)).collect();
        Text { layers: (0..2).map(|_| [values(4), values(2), values(2)]).collect() }
    }

    /// The attention of tokens `from..to`, as many of them at a time as `group` says: `(T, L, Hq, D)`.
    fn feed(&self, session: &mut BlockAttention, from: usize, to: usize, group: usize) -> Vec<f32> {
        let mut outs = Vec::new();
        for begin in (from..to).step_by(group) {
            let end = to.min(begin + group);
            let layers = self.layers.iter().enumerate().map(|(layer, [q, k, v])| {
                let part = |x: &[f32], heads: usize| x[begin * heads * 8..end * heads * 8].to_vec();
                session.attend(layer, end - begin, &part(q, 4), &part(k, 2), &part(v, 2)).unwrap()
            });
            let layers: Vec<Vec<f32>> = layers.collect();
            let (ids, offsets) = (vec![7; end - begin], vec![0; end - begin]);
            session.commit(NewTokens { ids: &ids, text: &[], offsets: &offsets }).unwrap();
            outs.extend((0..end - begin).flat_map(|token| layers.iter().flat_map(move |out| &out[token * 32..][..32])));
        }
        outs
    }

    /// The attention of one token over `seen`, straight from the definition: `(L, Hq, D)`.
    fn defined(&self, token: usize, seen: &[Seen]) -> Vec<f32> {
        let heads = (0..2).flat_map(|layer| (0..4).map(move |head| (layer, head)));
        heads.flat_map(|(layer, head)| self.head(layer, head, token, seen)).collect()
    }

    fn head(&self, layer: usize, head: usize, token: usize, seen: &[Seen]) -> Vec<f32> {
        let shape = shape();
        let frequencies = &shape.rope_of(layer as u32).frequencies;
        let of = |text: &Text, which: usize, row: usize| -> Vec<f64> {
            text.layers[layer][which][row * 8..][..8].iter().map(|&number| number as f64).collect()
        };
        let q = of(self, 0, token * 4 + head);
        let weight = |&(text, token, distance): &Seen| {
            let (mut q, k) = (q.clone(), of(text, 1, token * 2 + head / 2));
            let half = frequencies.len();
            for (i, &frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = (frequency as f64 * distance as f64).sin_cos();
                (q[i], q[i + half]) = (q[i] * cos - q[i + half] * sin, q[i + half] * cos + q[i] * sin);
            }
            let product: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
            (product * shape.softmax_scale as f64).exp()
        };
        let weights: Vec<f64> = seen.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; 8];
        for (&(text, token, _), weight) in seen.iter().zip(weights) {
            let v = of(text, 2, token * 2 + head / 2);
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight / total * v);
        }
        out.into_iter().map(|number| number as f32).collect()
    }
}

struct World {
    _folder: tempfile::TempDir,
    memory: Arc<dyn BlockMemory>,
    collection: CollectionInfo,
}

impl World {
    fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path()).unwrap());
        let collection = memory.open_collection(&spec("c", DType::F32)).unwrap();
        World { _folder: folder, memory, collection }
    }

    fn write(&self, name: &str, window: Window, retrieval: Option<Retrieval>) -> BlockAttention {
        let document = self.memory.open_document(self.collection.id, name).unwrap();
        BlockAttention::write(self.memory.clone(), &self.collection, &document, window, retrieval).unwrap()
    }

    /// A document with the first `tokens` of a text.
    fn document(&self, name: &str, text: &Text, tokens: usize) -> DocumentInfo {
        let mut session = self.write(name, window(true), None);
        text.feed(&mut session, 0, tokens, 8);
        session.flush().unwrap();
        self.memory.open_document(self.collection.id, name).unwrap()
    }

    fn read(&self, documents: &[&DocumentInfo], sink: bool, placement: Placement) -> BlockAttention {
        let documents: Vec<DocumentInfo> = documents.iter().map(|&document| document.clone()).collect();
        let retrieval = Retrieval { top_k: 100, placement, ..Retrieval::default() };
        BlockAttention::read(self.memory.clone(), &self.collection, &documents, window(sink), retrieval).unwrap()
    }
}

fn window(sink: bool) -> Window {
    Window { tokens: WINDOW_BLOCKS * BLOCK_TOKENS, chunk_tokens: 16, sink, ..Window::default() }
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The tokens of a block whose first is so far from the query.
fn block(text: &Text, index: usize, distance: usize) -> impl Iterator<Item = Seen<'_>> {
    (0..BLOCK_TOKENS).map(move |token| (text, index * BLOCK_TOKENS + token, distance - token))
}

/// A writer's sink and its newest two blocks: at their true distances as long as those are within the context, and beyond it as
/// far as may be.
#[test]
fn a_writer_sees_sink_and_blocks_where_they_are_in_its_text() {
    let (world, text) = (World::new(), Text::random(120, 1));
    let retrieval = |placement| Some(Retrieval { top_k: 2, newest_blocks: Some(2), placement, ..Retrieval::default() });
    for within_tokens in [100_000, 90, 60, 1] {
        let placement = Placement::Original { within_tokens };
        let [by_one, by_sixteen] = [1, 16].map(|group| {
            let mut session = world.write(&format!("{within_tokens} {group}"), window(true), retrieval(placement));
            text.feed(&mut session, 0, 120, group)
        });
        assert!(difference(&by_one, &by_sixteen) < TOLERANCE, "groups of tokens change nothing");
        for token in 0..120 {
            let start = (token / BLOCK_TOKENS).saturating_sub(WINDOW_BLOCKS);
            let into_window = token - start * BLOCK_TOKENS;
            let eligible: Vec<usize> = (1..start).rev().take(2).collect();
            // Blocks before the window, the sink's place among them, whose first token is within the context.
            let fit = (1..).take_while(|blocks| into_window + blocks * BLOCK_TOKENS < within_tokens as usize).count();
            let most = (eligible.len() + 1).max(fit);
            let mut seen: Vec<Seen> = (start * BLOCK_TOKENS..=token).map(|seen| (&text, seen, token - seen)).collect();
            for &index in &eligible {
                seen.extend(block(&text, index, token - index * BLOCK_TOKENS));
            }
            if start > 0 {
                seen.extend(block(&text, 0, into_window + start.min(most) * BLOCK_TOKENS));
            }
            let off = difference(&by_one[token * 64..][..64], &text.defined(token, &seen));
            assert!(off < TOLERANCE, "token {token} within {within_tokens}: {off}");
        }
    }
    let outs = [Placement::Slots, FAR].map(|placement| {
        let mut session = world.write(&format!("{placement:?}"), window(true), retrieval(placement));
        text.feed(&mut session, 0, 120, 16)
    });
    assert!(difference(&outs[0], &outs[1]) > 1e-2, "the placement makes a difference");
}

/// Every document ends where the window begins, but for its tail, which ends where the query begins.
#[test]
fn each_document_is_read_as_far_as_it_would_be_alone() {
    let (world, texts) = (World::new(), [Text::random(80, 2), Text::random(80, 3), Text::random(80, 4)]);
    let [a, b, question] = &texts;
    for (name, in_a, in_b) in [("long", 43, 68), ("short last", 47, 5), ("short first", 16, 67)] {
        let [first, last] = [("first", a, in_a), ("last", b, in_b)]
            .map(|(which, text, tokens)| world.document(&format!("{name}, {which}"), text, tokens));
        for sink in [true, false] {
            let mut session = world.read(&[&first, &last], sink, FAR);
            let outs = question.feed(&mut session, 0, 3, 3);
            let start = (in_b / BLOCK_TOKENS).saturating_sub(WINDOW_BLOCKS) * BLOCK_TOKENS;
            for token in 0..3 {
                let position = in_b + token;
                let own = (0..=token).map(|earlier| (question, earlier, token - earlier));
                // All of the last document is where it is, its first block and its window too. One sink is enough: with it the first
                // token of the last document is left out.
                let of_last = (sink as usize..in_b).map(|earlier| (b, earlier, position - earlier));
                let full = in_a / BLOCK_TOKENS * BLOCK_TOKENS;
                let of_first = (0..full).map(|earlier| (a, earlier, position - start + full - earlier));
                let tail = (full..in_a).map(|earlier| (a, earlier, token + in_a - earlier));
                let seen: Vec<Seen> = own.chain(of_last).chain(of_first).chain(tail).collect();
                let off = difference(&outs[token * 64..][..64], &question.defined(token, &seen));
                assert!(off < TOLERANCE, "{name}, sink {sink}, token {token}: {off}");
            }
        }
    }
}

#[test]
fn the_order_of_documents_matters_in_slots_and_not_at_original_distances() {
    let (world, question) = (World::new(), Text::random(3, 9));
    let documents = [(5, 43), (6, 61), (7, 50)];
    let [a, b, c] =
        documents.map(|(seed, tokens)| world.document(&seed.to_string(), &Text::random(tokens, seed), tokens));
    let out =
        |documents: &[&DocumentInfo], placement| question.feed(&mut world.read(documents, false, placement), 0, 3, 3);
    let moved = |placement| difference(&out(&[&a, &b, &c], placement), &out(&[&b, &a, &c], placement));
    assert!(moved(FAR) < TOLERANCE, "{}", moved(FAR));
    assert!(moved(Placement::Slots) > 1e-3, "{}", moved(Placement::Slots));
}
