//! A whole memory whose collection has the engine `cuda`, over a runner, against the answers of its CPU.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use landmarkdb::cuda::{Kernel, PageLayout, Runner};
use landmarkdb::{
    AppendRequest, AttendRequest, Attended, BlockMemory, BlockText, CollectionSpec, LocalMemory, LookupRequest,
    NewBlock, Tensor, *,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::common::spec;
use super::watched::{Seen, Watched};

/// f32 sums and exponentials in another order than the CPU's, for values of a few units.
const TOLERANCE: f32 = 1e-4;

const LARGE_CACHE: u64 = 1 << 30;

const GRANULARITIES: [Granularity; 5] =
    [Granularity::TokenHead, Granularity::Head, Granularity::Token, Granularity::KvGroup, Granularity::Shared];

/// A memory over runners, in a directory that goes away with it.
struct World {
    memory: LocalMemory,
    seen: Arc<Seen>,
    collection: CollectionId,
    spec: CollectionSpec,
    rng: ChaCha8Rng,
    _directory: tempfile::TempDir,
}

impl World {
    fn new<R, F>(open: F, spec: CollectionSpec, cache_bytes: u64) -> World
    where
        R: Runner + Send + 'static,
        F: Fn() -> R + Send + Sync + 'static,
    {
        let directory = tempfile::tempdir().unwrap();
        let (seen, rng) = (Arc::new(Seen::default()), ChaCha8Rng::seed_from_u64(5));
        let all_see = seen.clone();
        let watched = move || Ok(Watched { runner: open(), seen: all_see.clone() });
        let memory = LocalMemory::open(directory.path()).unwrap().with_runners(watched, cache_bytes);
        let collection = memory.open_collection(&spec).unwrap().id;
        World { memory, seen, collection, spec, rng, _directory: directory }
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.rng.random_range(-2.0f32..2.0)).collect()
    }

    /// Random blocks, one append.
    fn blocks(&mut self, document: DocumentId, blocks: Range<u32>) -> AppendRequest {
        let tokens = self.spec.shape.block_tokens;
        self.blocks_of(document, blocks, tokens)
    }

    fn blocks_of(&mut self, document: DocumentId, blocks: Range<u32>, tokens: u32) -> AppendRequest {
        let shape = self.spec.shape.clone();
        let blocks = blocks
            .map(|index| {
                let sizes = vec![shape.layers, shape.kv_heads, tokens, shape.head_dim];
                let count = sizes.iter().product::<u32>() as usize;
                NewBlock {
                    index,
                    token_ids: vec![index; tokens as usize],
                    text: BlockText { start: 0, bytes: vec![], offsets: vec![0; tokens as usize] },
                    k: Tensor::from_f32(sizes.clone(), &self.values(count)),
                    v: Tensor::from_f32(sizes, &self.values(count)),
                }
            })
            .collect();
        AppendRequest { document, blocks, expected_tokens: None }
    }

    fn append(&mut self, document: DocumentId, blocks: Range<u32>) {
        let request = self.blocks(document, blocks);
        self.memory.append(request).unwrap();
    }

    fn document(&mut self, name: &str, blocks: u32) -> DocumentId {
        let document = self.memory.open_document(self.collection, name).unwrap().id;
        self.append(document, 0..blocks);
        document
    }

    /// A sealed document with a tail.
    fn with_tail(&mut self, name: &str, blocks: u32, tail_tokens: u32) -> DocumentId {
        let document = self.memory.open_document(self.collection, name).unwrap().id;
        if blocks > 0 {
            self.append(document, 0..blocks);
        }
        let tail = self.blocks_of(document, blocks..blocks + 1, tail_tokens);
        self.memory.append(tail).unwrap();
        self.memory.seal(document).unwrap();
        document
    }

    /// A choice per token and head of the last layer.
    fn request(&mut self, distances: &[u32], scope: Vec<BlockRange>) -> AttendRequest {
        let shape = &self.spec.shape;
        let count = distances.len() * (shape.query_heads * shape.head_dim) as usize;
        let lookup = LookupRequest {
            collection: self.collection,
            layer: 1,
            queries: self.values(count),
            distances: distances.to_vec(),
            scope,
            top_k: 3,
            block_score: BlockScore::LogSumExp,
            granularity: Granularity::TokenHead,
        };
        AttendRequest {
            lookup,
            normalisation: Normalisation::Plain,
            placement: Placement::Slots,
            without_first_tokens: false,
        }
    }

    fn engine(&self, engine: Engine) {
        self.memory.set_engine(self.collection, engine).unwrap();
    }

    fn answers(&self, requests: &[AttendRequest]) -> Vec<Attended> {
        requests.iter().map(|request| self.memory.attend(request).unwrap()).collect()
    }
}

/// Bytes of one page.
fn page_bytes(spec: &CollectionSpec) -> u64 {
    let (block_tokens, head_dim) = (spec.shape.block_tokens as usize, spec.shape.head_dim as usize);
    PageLayout { dtype: spec.payload_dtype, block_tokens, head_dim }.bytes() as u64
}

fn range(document: DocumentId, blocks: Range<u32>) -> BlockRange {
    BlockRange { document, blocks }
}

fn same(got: &Attended, want: &Attended, what: &dyn std::fmt::Debug) {
    let near = |(a, b): (&f32, &f32)| a == b || (a - b).abs() < TOLERANCE;
    assert_eq!(got.hits.blocks, want.hits.blocks, "{what:?}");
    assert!(got.hits.scores.iter().zip(&want.hits.scores).all(near), "{what:?}");
    assert_eq!((got.out.len(), got.lse.len()), (want.out.len(), want.lse.len()), "{what:?}");
    assert!(got.out.iter().zip(&want.out).all(near), "{what:?}: {:?} for {:?}", got.out, want.out);
    assert!(got.lse.iter().zip(&want.lse).all(near), "{what:?}: {:?} for {:?}", got.lse, want.lse);
}

/// Every dtype and key rule, choice and normalisation, over parts of several documents, with recent blocks and without.
pub fn agreement<R, F>(open: F)
where
    R: Runner + Send + 'static,
    F: Fn() -> R + Clone + Send + Sync + 'static,
{
    for (payload_dtype, key_dtype, key_rule) in [
        (DType::F16, DType::F16, KeyRule::Tokens),
        (DType::Int8, DType::Int8, KeyRule::Tokens),
        (DType::F16, DType::Int8, KeyRule::Mean),
        (DType::Int8, DType::F16, KeyRule::Landmark),
    ] {
        let mut spec = CollectionSpec { key_dtype, key_rule, ..spec("c", payload_dtype) };
        // The last two dimensions are not rotated, and do not fill what lies together of int8 keys.
        spec.shape.head_dim = 10;
        let mut world = World::new(open.clone(), spec, LARGE_CACHE);
        let (a, b) = (world.document("a", 9), world.document("b", 6));
        let (c, d) = (world.with_tail("c", 2, 3), world.with_tail("d", 0, 1));
        // A tail has no landmark.
        let tails = key_rule.covers_tails() as u32;
        let mut requests = Vec::new();
        for (i, granularity) in GRANULARITIES.into_iter().enumerate() {
            for (distances, scope, top_k) in [
                (vec![2], vec![range(a, 0..9)], 3),
                (vec![0, 1, 30], vec![range(b, 1..4), range(a, 3..8)], 2),
                (vec![1, 9], vec![range(a, 2..4), range(b, 6..6)], 20),
                (vec![0, 5], vec![range(d, 0..tails), range(b, 1..4), range(c, 1..2 + tails)], 4),
                (vec![3], vec![range(c, 0..2 + tails), range(d, 0..tails), range(a, 7..9)], 20),
                (vec![0], vec![], 4),
            ] {
                let mut request = world.request(&distances, scope);
                request.lookup = LookupRequest { granularity, top_k, ..request.lookup };
                request.lookup.block_score = [BlockScore::Max, BlockScore::LogSumExp][i % 2];
                request.placement = [Placement::Slots, Placement::Original { within_tokens: 60 }][i % 2];
                request.normalisation =
                    [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden][(i + top_k as usize) % 3];
                requests.push(request);
            }
        }
        let want = world.answers(&requests);
        world.engine(Engine::Cuda);
        for (request, want) in requests.iter().zip(&want) {
            let got = world.memory.attend(request).unwrap();
            same(&got, want, request);
            assert_eq!(world.memory.lookup(&request.lookup).unwrap(), got.hits);
        }
        // Requests without eligible blocks have nothing to run.
        let asked = requests.iter().filter(|request| !request.lookup.scope.is_empty()).count() as u64;
        let scores = match key_dtype {
            DType::Int8 => [Kernel::ScoreFewInt8, Kernel::ScoreManyInt8],
            _ => [Kernel::ScoreFewF16, Kernel::ScoreManyF16],
        };
        let attend = if payload_dtype == DType::Int8 { Kernel::AttendInt8 } else { Kernel::AttendF16 };
        let scans: u64 = scores.iter().map(|&kernel| world.seen.launches(kernel)).sum();
        assert_eq!((scans, world.seen.launches(attend)), (2 * asked, asked));

        // An engine that needs no GPU leaves nothing there.
        world.engine(Engine::Flat);
        assert_eq!(world.seen.live_bytes(), 0);
        assert_eq!(world.answers(&requests), want);
    }
}

/// Pages come and go; what is kept stays within the bound, and a page that is kept is not copied again.
pub fn evictions<R, F>(open: F)
where
    R: Runner + Send + 'static,
    F: Fn() -> R + Clone + Send + Sync + 'static,
{
    let spec = spec("c", DType::F16);
    for cache_pages in [0, 1, 5] {
        let cache_bytes = cache_pages * page_bytes(&spec);
        let mut world = World::new(open.clone(), spec.clone(), cache_bytes);
        let document = world.document("a", 12);
        let requests: Vec<_> = (0..8).map(|i| world.request(&[i, 40], vec![range(document, 0..12)])).collect();
        let want = world.answers(&requests);
        world.engine(Engine::Cuda);
        world.memory.lookup(&requests[0].lookup).unwrap();
        let key_bytes = world.seen.live_bytes();
        for (request, want) in requests.iter().zip(&want).cycle().take(2 * requests.len()) {
            same(&world.memory.attend(request).unwrap(), want, request);
            assert_eq!(world.seen.live_bytes(), key_bytes + cache_bytes, "as much is kept as may be");
        }
    }

    let mut world = World::new(open, spec.clone(), LARGE_CACHE);
    let document = world.document("a", 12);
    let request = world.request(&[1], vec![range(document, 0..12)]);
    world.engine(Engine::Cuda);
    let written_bytes = [(); 3].map(|()| {
        let before = world.seen.written_bytes();
        world.memory.attend(&request).unwrap();
        world.seen.written_bytes() - before
    });
    assert!(written_bytes[0] >= written_bytes[1] + 3 * page_bytes(&spec), "{written_bytes:?}");
    assert_eq!(written_bytes[1], written_bytes[2]);
}

/// An append copies the keys of new blocks, and now and then of some before them; a delete gives all memory back.
pub fn appends_and_deletes<R, F>(open: F)
where
    R: Runner + Send + 'static,
    F: Fn() -> R + Clone + Send + Sync + 'static,
{
    let spec = spec("c", DType::F16);
    // Both draw the same values; one of them never uses its runners.
    let mut worlds = [0, 1].map(|_| World::new(open.clone(), spec.clone(), LARGE_CACHE));
    let [long, short] = [("a", 513), ("b", 4)].map(|(name, blocks)| {
        let [_, document] = worlds.each_mut().map(|world| world.document(name, blocks));
        document
    });
    worlds[1].engine(Engine::Cuda);
    let agree = |scope: Vec<BlockRange>, worlds: &mut [World; 2]| {
        let [want, got] = worlds.each_mut().map(|world| {
            let request = world.request(&[0, 3], scope.clone());
            world.memory.attend(&request).unwrap()
        });
        same(&got, &want, &scope);
    };
    agree(vec![range(short, 0..4), range(long, 0..513)], &mut worlds);
    let all_bytes = worlds[1].seen.live_bytes();
    for blocks in 514..530 {
        worlds.iter_mut().for_each(|world| world.append(long, blocks - 1..blocks));
        let before = worlds[1].seen.written_bytes();
        agree(vec![range(short, 0..4), range(long, 0..blocks)], &mut worlds);
        let copied = worlds[1].seen.written_bytes() - before;
        assert!(copied < all_bytes / 4, "{copied} of {all_bytes} bytes at {blocks} blocks");
    }

    for world in &worlds {
        world.memory.delete(long).unwrap();
    }
    // A panel of keys for each piece, and what was attended to of the last layer.
    let key_bytes = spec.shape.pieces() as u64 * 64 * spec.shape.head_dim as u64 * 2;
    let most_bytes = key_bytes + 4 * spec.shape.kv_heads as u64 * page_bytes(&spec);
    assert!(worlds[1].seen.live_bytes() <= most_bytes, "{} of {most_bytes} bytes", worlds[1].seen.live_bytes());
    agree(vec![range(short, 0..4)], &mut worlds);
    assert!(worlds[1].seen.live_bytes() <= most_bytes);
    assert_eq!(worlds[0].seen.written_bytes(), 0);
}

/// Readers on several streams share keys and pages, of which there are too few, while a writer makes new ones.
pub fn at_the_same_time<R, F>(open: F)
where
    R: Runner + Send + 'static,
    F: Fn() -> R + Clone + Send + Sync + 'static,
{
    let spec = spec("c", DType::Int8);
    let cache_bytes = 6 * page_bytes(&spec);
    let mut world = World::new(open, spec, cache_bytes);
    let (document, growing) = (world.document("a", 12), world.document("b", 1));
    let requests: Vec<_> = (0..4).map(|i| world.request(&[i, 9], vec![range(document, 0..12)])).collect();
    let want = world.answers(&requests);
    world.engine(Engine::Cuda);
    let newest = world.request(&[0], vec![]).lookup;
    let appends: Vec<AppendRequest> = (1..6).map(|block| world.blocks(growing, block..block + 1)).collect();
    let memory = &world.memory;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for (request, want) in requests.iter().zip(&want) {
                    same(&memory.attend(request).unwrap(), want, request);
                }
            });
        }
        for append in appends {
            let blocks = memory.append(append).unwrap().blocks;
            let all = LookupRequest { scope: vec![range(growing, 0..blocks)], ..newest.clone() };
            assert_eq!(memory.lookup(&all).unwrap().k, blocks.min(3));
        }
    });
}

/// Where there are no kernels, the CPU gives the very answers that it gives otherwise.
pub fn unsupported<R, F>(open: F)
where
    R: Runner + Send + 'static,
    F: Fn() -> R + Clone + Send + Sync + 'static,
{
    for (head_dim, payload_dtype, scans) in [(258, DType::F16, 0), (8, DType::F32, 2), (8, DType::BF16, 2)] {
        let mut spec = spec("c", payload_dtype);
        spec.shape.head_dim = head_dim;
        let mut world = World::new(open.clone(), spec, LARGE_CACHE);
        let document = world.document("a", 5);
        let requests = [0, 1].map(|layer| {
            let mut request = world.request(&[1], vec![range(document, 0..5)]);
            request.lookup.layer = layer;
            request
        });
        let want = world.answers(&requests);
        world.engine(Engine::Cuda);
        for (got, want) in world.answers(&requests).iter().zip(&want) {
            same(got, want, &payload_dtype);
            assert_eq!(got.out, want.out, "the same blocks, attended to by the same code");
        }
        assert_eq!(world.seen.launches(Kernel::Merge), scans);
        assert_eq!(world.seen.launches(Kernel::AttendF16), 0);
    }
}

/// A GPU that fails delays an answer and nothing else, and is asked again.
pub fn failures<R, F>(open: F)
where
    R: Runner + Send + 'static,
    F: Fn() -> R + Clone + Send + Sync + 'static,
{
    let mut world = World::new(open, spec("c", DType::F16), LARGE_CACHE);
    let document = world.document("a", 5);
    let requests = [world.request(&[1], vec![range(document, 0..5)])];
    let want = world.answers(&requests);
    world.engine(Engine::Cuda);
    world.seen.fails.store(true, SeqCst);
    assert_eq!(world.answers(&requests), want);
    assert_eq!(world.seen.launches(Kernel::Merge), 0);
    world.seen.fails.store(false, SeqCst);
    same(&world.answers(&requests)[0], &want[0], &requests);
    assert_eq!((world.seen.launches(Kernel::Merge), world.seen.launches(Kernel::AttendF16)), (1, 1));
}
