//! A model whose state is older than its document goes back to it: what it appends again is skipped, and its attention is what
//! it was the first time.

use std::sync::Arc;

use bytes::Bytes;
use landmarkdb::{
    AttentionError, BlockAttention, BlockMemory, BlockRange, BlockScore, BlockText, CollectionInfo, CollectionSpec,
    DType, DocumentInfo, Granularity, KeyRule, Layers, LocalMemory, MemoryError, ModelShape, NewTokens, Retrieval,
    Rope, SequenceAttention, SequenceState, Sha256Digest, Window,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// B
const BLOCK_TOKENS: usize = 8;
const TOKENS: usize = 150;

fn spec() -> CollectionSpec {
    CollectionSpec {
        name: "c".into(),
        shape: ModelShape {
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            block_tokens: BLOCK_TOKENS as u32,
            rope: Rope::from_base(100.0, 8),
            unrotated_layers: Vec::new(),
            softmax_scale: 8f32.powf(-0.5),
        },
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::F32,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "none".into(),
    }
}

fn retrieval() -> Retrieval {
    // All of them, so that rounding decides nothing.
    let (block_score, granularity) = (BlockScore::LogSumExp, Granularity::KvGroup);
    Retrieval { top_k: 64, block_score, granularity, layers: Layers::All, ..Retrieval::default() }
}

/// What a model asks and says at each token of a text: per layer `q (T, Hq, D)`, `k` and `v (T, Hkv, D)`.
struct Text {
    layers: Vec<[Vec<f32>; 3]>,
}

impl Text {
    fn new(tokens: usize) -> Text {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut values = |heads: usize| (0..tokens * heads * 8).map(|_| rng.random_range(-1.5f32..1.5)).collect();
        Text { layers: (0..2).map(|_| [values(4), values(2), values(2)]).collect() }
    }

    /// The attention of tokens `from..to`, of all layers one after the other.
    fn attend(&self, session: &mut BlockAttention, from: usize, to: usize) -> Vec<f32> {
        let mut outs = Vec::new();
        for (layer, [q, k, v]) in self.layers.iter().enumerate() {
            let part = |x: &[f32], heads: usize| x[from * heads * 8..to * heads * 8].to_vec();
            outs.extend(session.attend(layer, to - from, &part(q, 4), &part(k, 2), &part(v, 2)).unwrap());
        }
        outs
    }

    /// Goes on from where the session is to token `to`, in chunks that end with `chunk` tokens. Three bytes of text a token.
    fn write(&self, session: &mut BlockAttention, to: usize, chunk: usize) -> Vec<(usize, Vec<f32>)> {
        let mut outs = Vec::new();
        while session.position() < to {
            let from = session.position();
            let next = ((from / chunk + 1) * chunk).min(to);
            outs.push((from, self.attend(session, from, next)));
            let ids: Vec<u32> = (from as u32..next as u32).collect();
            let offsets: Vec<u32> = (0..ids.len() as u32).map(|token| 3 * token).collect();
            let text: Vec<u8> = (3 * from..3 * next).map(|byte| byte as u8).collect();
            session.commit(NewTokens { ids: &ids, text: &text, offsets: &offsets }).unwrap();
        }
        outs
    }
}

struct World {
    _dir: tempfile::TempDir,
    memory: Arc<dyn BlockMemory>,
    collection: CollectionInfo,
    text: Text,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(dir.path()).unwrap());
        let collection = memory.open_collection(&spec()).unwrap();
        World { _dir: dir, memory, collection, text: Text::new(TOKENS + 16) }
    }

    fn window(&self) -> Window {
        Window { tokens: 32, chunk_tokens: 16, ..Window::default() }
    }

    fn document(&self, name: &str) -> DocumentInfo {
        self.memory.open_document(self.collection.id, name).unwrap()
    }

    fn write_at(&self, name: &str, tokens: u64) -> Result<BlockAttention, AttentionError> {
        let document = self.document(name);
        let (memory, window) = (self.memory.clone(), self.window());
        BlockAttention::write_at(memory, &self.collection, &document, tokens, window, Some(retrieval()))
    }

    /// Token ids and text of a document.
    fn content(&self, document: &DocumentInfo) -> Vec<(Vec<u32>, BlockText)> {
        let blocks = 0..document.blocks + 1;
        let blocks = self.memory.blocks(&BlockRange { document: document.id, blocks }).unwrap().into_iter();
        blocks.map(|block| (block.token_ids, block.text)).collect()
    }
}

fn state(tokens: usize) -> Vec<Bytes> {
    vec![Bytes::from(vec![tokens as u8; 40]), Bytes::from_static(b"layer 1")]
}

fn assert_close(found: &[f32], expected: &[f32], context: &str) {
    assert_eq!(found.len(), expected.len(), "{context}");
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() < 1e-4, "{context}, number {at}: {a} {b}");
    }
}

#[test]
fn a_resumed_writer_goes_back_to_its_state() {
    let world = World::new();
    let mut whole = world.write_at("whole", 0).unwrap();
    let first_time = world.text.write(&mut whole, TOKENS, 16);
    whole.flush_with_state(state(TOKENS)).unwrap();
    let expected = world.content(&world.document("whole"));
    assert_eq!(world.document("whole").state_tokens, Some(TOKENS as u64));

    // States at a block's end, inside of blocks, and none; the document ends inside and at the end of blocks, behind them.
    for (taken, end, has_tail) in [
        (96, 128, false),
        (96, 139, true),
        (112, 117, true),
        (90, 96, false),
        (90, 93, true),
        (5, 7, true),
        (0, 77, true),
    ] {
        let name = format!("{taken} of {end}");
        let mut session = world.write_at(&name, 0).unwrap();
        world.text.write(&mut session, taken, 16);
        if taken > 0 {
            session.flush_with_state(state(taken)).unwrap();
        }
        world.text.write(&mut session, end, 16);
        if has_tail {
            session.flush().unwrap();
        }
        drop(session);

        let document = world.document(&name);
        let kept = world.memory.state(document.id).unwrap();
        let from = kept.as_ref().map_or(0, |kept| kept.tokens as usize);
        assert_eq!(from, taken, "{name}: {document:?}");
        assert_eq!(kept, (taken > 0).then(|| SequenceState { tokens: taken as u64, parts: state(taken) }));
        assert!(document.tokens as usize > taken || taken == 0, "{name}: {document:?}");
        let mut session = world.write_at(&name, from as u64).unwrap();
        assert_eq!(session.position(), taken, "{name}");
        let behind = (taken / 16 + 1) * 16;
        world.text.write(&mut session, behind, 16);
        // As long as the document has more, its state stays.
        session.flush_with_state(state(behind)).unwrap();
        let now = world.document(&name);
        let is_past = behind as u64 >= document.tokens;
        let stays = (taken > 0).then_some(taken as u64);
        assert_eq!(now.state_tokens, if is_past { Some(behind as u64) } else { stays }, "{name}: {now:?}");
        for (at, out) in world.text.write(&mut session, TOKENS, 16) {
            let (_, expected) = first_time.iter().find(|(from, _)| *from == at).expect("the same chunks");
            assert_close(&out, expected, &format!("{name}, chunk at {at}"));
        }
        session.flush_with_state(state(TOKENS)).unwrap();
        let document = world.memory.seal(document.id).unwrap();
        assert_eq!((document.tokens, document.state_tokens), (TOKENS as u64, Some(TOKENS as u64)), "{name}");
        assert_eq!(world.content(&document), expected, "{name}");
    }
}

#[test]
fn a_reader_of_an_open_document_ends_at_its_state() {
    let world = World::new();
    let mut session = world.write_at("longer", 0).unwrap();
    world.text.write(&mut session, TOKENS, 16);
    session.flush().unwrap();
    let longer = world.document("longer");
    for taken in [3usize, 8, 90, 96, 97, TOKENS] {
        let name = format!("{taken} tokens");
        let mut session = world.write_at(&name, 0).unwrap();
        world.text.write(&mut session, taken, 16);
        session.flush().unwrap();
        let short = world.document(&name);
        let read = |document: &DocumentInfo, tokens| {
            let (memory, window) = (world.memory.clone(), world.window());
            let documents = std::slice::from_ref(document);
            BlockAttention::read_at(memory, &world.collection, documents, tokens, window, retrieval()).unwrap()
        };
        let mut expected = read(&short, short.tokens);
        let mut found = read(&longer, taken as u64);
        assert_eq!(found.position(), taken, "{name}");
        let places = |session: &mut BlockAttention| -> Vec<_> {
            session.take_reads().at_hand.iter().map(|read| (read.block.index, read.place)).collect()
        };
        assert_eq!(places(&mut found), places(&mut expected), "{name}");
        for (from, to) in [(TOKENS, TOKENS + 1), (TOKENS + 1, TOKENS + 16)] {
            let expected = world.text.attend(&mut expected, from, to);
            assert_close(&world.text.attend(&mut found, from, to), &expected, &name);
        }
    }
}

#[test]
fn what_a_document_has_not_is_refused_and_another_writer_is_noticed() {
    let world = World::new();
    let refused = world.write_at("a", 1).map(drop);
    assert!(matches!(refused, Err(AttentionError::Invalid { field: "tokens", .. })), "{refused:?}");
    let mut session = world.write_at("a", 0).unwrap();
    world.text.write(&mut session, 44, 16);
    session.flush_with_state(state(44)).unwrap();
    world.text.write(&mut session, 60, 16);
    drop(session);
    let mut one = world.write_at("a", 44).unwrap();
    let mut other = world.write_at("a", 44).unwrap();
    world.text.write(&mut other, 80, 16);
    other.flush_with_state(state(80)).unwrap();
    // What is the same is skipped; the state of a document that has grown is not replaced.
    world.text.write(&mut one, 60, 16);
    one.flush_with_state(state(60)).unwrap();
    assert_eq!(world.document("a").state_tokens, Some(80));
    // A group that was attended to and not committed is no part of the document.
    world.text.attend(&mut other, 80, 96);
    let early = other.flush_with_state(state(96));
    assert!(matches!(early, Err(AttentionError::Invalid { field: "commit", .. })), "{early:?}");
    world.memory.seal(world.document("a").id).unwrap();
    let mut late = world.write_at("a", 80).unwrap();
    let sealed = late.flush_with_state(state(80));
    assert!(matches!(sealed, Err(AttentionError::Memory(MemoryError::Sealed { .. }))), "{sealed:?}");
}
