//! What does a healthy client notice while others flood its service, and what does the service hold?
//!
//! `cargo bench --bench floods -- --server PROGRAM` floods any landmarkdb program, this build's own by default; `cargo test` runs
//! each flood once, for a moment. Options: `--seconds N` of each flood, `--megabytes N` of the message of empty blocks, `--flood NAME`.
//! Inputs are random by seed. The healthy client attends one token's queries over 400 blocks, one call after the other.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use landmarkdb::{CollectionSpec, ModelShape, Rope, Sha256Digest, *};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "../../grpc/tests/remote/raw.rs"]
#[allow(dead_code, reason = "shared with tests, which use the rest")]
mod raw;
#[path = "../tests/service/mod.rs"]
#[allow(dead_code, reason = "shared with tests, which use the rest")]
mod service;

use raw::{Raw, header};
use service::{Service, serve};

const SEED: u64 = 1;
const BLOCKS: u32 = 400;
const BLOCK_TOKENS: u32 = 16;
const QUERY_HEADS: usize = 8;
const HEAD_DIM: usize = 64;

struct Options {
    server: PathBuf,
    seconds: f64,
    empty_blocks_bytes: usize,
    /// How many of everything: in tests one twentieth.
    share: f64,
    only: Option<String>,
}

/// A service, its data and what floods it.
struct Flooded<'a> {
    options: &'a Options,
    target: String,
    collection: CollectionId,
    document: DocumentId,
    stop: AtomicBool,
}

type Flood = fn(&Flooded<'_>);

/// In the order of the table.
const FLOODS: [(&str, Flood); 7] = [
    ("quiet", |_| {}),
    ("32 clients of small lookups", small_lookups),
    ("4 legal giant lookups", giant_lookups),
    ("2,000 idle connections", idle_connections),
    ("slow readers of Fetch", slow_readers),
    ("half-open streams", half_open_streams),
    ("empty blocks", empty_blocks),
];

fn options() -> Options {
    let given: Vec<String> = std::env::args().collect();
    let value = |name: &str| given.iter().position(|arg| arg == name).and_then(|at| given.get(at + 1)).cloned();
    let number = |name: &str| value(name).and_then(|number| number.parse::<f64>().ok());
    let is_test = !given.iter().any(|arg| arg == "--bench");
    Options {
        server: value("--server").map_or_else(|| env!("CARGO_BIN_EXE_landmarkdb").into(), PathBuf::from),
        seconds: number("--seconds").unwrap_or(if is_test { 0.2 } else { 10.0 }),
        empty_blocks_bytes: number("--megabytes")
            .map_or(if is_test { 1 << 20 } else { 100 << 20 }, |mb| (mb * 1e6) as usize),
        share: if is_test { 0.05 } else { 1.0 },
        only: value("--flood"),
    }
}

fn main() {
    let options = options();
    // Held connections are files of this process too.
    landmarkdb_grpc::server::raise_open_files();
    let folder = tempfile::tempdir().expect("a temporary folder");
    println!("{} for {} s each, seed {SEED}", options.server.display(), options.seconds);
    println!(
        "{:<28} {:>7} {:>9} {:>9} {:>9} {:>7} {:>9}",
        "flood", "calls", "p50 ms", "p99 ms", "max ms", "errors", "peak MiB"
    );
    for (name, flood) in FLOODS {
        if options.only.as_ref().is_none_or(|only| name.contains(only.as_str())) {
            run(&options, folder.path(), name, flood);
        }
    }
}

fn run(options: &Options, data: &Path, name: &str, flood: Flood) {
    let server = Service::start(serve(&options.server, data).stderr(Stdio::null())).expect("the server starts");
    let target = server.target().to_string();
    let healthy = connect(&target, 60.0);
    let (collection, document) = fill(&healthy);
    let flooded = Flooded { options, target, collection, document, stop: AtomicBool::new(false) };
    let (mut times, mut errors) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        // A flood that a dying service ends says so on standard error; the others go on.
        scope.spawn(|| catch_unwind(AssertUnwindSafe(|| flood(&flooded))).is_err());
        // What the flood needs to begin is not what is measured.
        std::thread::sleep(Duration::from_secs_f64(options.seconds / 10.0));
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let request = attend(lookup(&mut rng, &flooded, 1, 1, 8));
        let end = Instant::now() + Duration::from_secs_f64(options.seconds);
        while Instant::now() < end {
            let begun = Instant::now();
            errors += healthy.attend(&request).is_err() as u32;
            times.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        flooded.stop.store(true, Ordering::Relaxed);
        let peak = peak_mib(&server.child).map_or("died".into(), |mib| format!("{mib}"));
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        let (p50, p99, max) = (at(0.5), at(0.99), at(1.0));
        println!("{name:<28} {:>7} {p50:>9.2} {p99:>9.2} {max:>9.2} {errors:>7} {peak:>9}", times.len());
        // Ends the floods that wait for an answer.
        drop(server);
    });
}

/// The largest resident size so far, of a process that still runs.
fn peak_mib(server: &Child) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib >> 10)
}

fn connect(target: &str, seconds: f64) -> RemoteMemory {
    let deadline = Duration::from_secs_f64(seconds);
    let options = ClientOptions { deadline, connect_timeout: Duration::from_secs(60), ..ClientOptions::default() };
    RemoteMemory::connect(target, options).expect("the service answers")
}

/// A document of 400 random blocks, made once.
fn fill(memory: &RemoteMemory) -> (CollectionId, DocumentId) {
    let shape = ModelShape {
        layers: 4,
        query_heads: QUERY_HEADS as u32,
        kv_heads: 2,
        head_dim: HEAD_DIM as u32,
        block_tokens: BLOCK_TOKENS,
        rope: Rope::from_base(10_000.0, HEAD_DIM),
        unrotated_layers: Vec::new(),
        softmax_scale: (HEAD_DIM as f32).powf(-0.5),
    };
    let spec = CollectionSpec {
        name: "floods".into(),
        shape,
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "random".into(),
    };
    let collection = memory.open_collection(&spec).expect("a collection").id;
    let document = memory.open_document(collection, "flooded").expect("a document");
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let shape = vec![4, 2, BLOCK_TOKENS, HEAD_DIM as u32];
    let count = shape.iter().product::<u32>();
    let mut tensor = || {
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-2.0..2.0)).collect();
        Tensor::from_f32(shape.clone(), &values)
    };
    let blocks: Vec<NewBlock> = (document.blocks..BLOCKS)
        .map(|index| {
            let text = BlockText { start: 0, bytes: Vec::new(), offsets: vec![0; BLOCK_TOKENS as usize] };
            NewBlock { index, token_ids: (0..BLOCK_TOKENS).collect(), text, k: tensor(), v: tensor() }
        })
        .collect();
    for blocks in blocks.chunks(50) {
        memory
            .append(AppendRequest { document: document.id, blocks: blocks.to_vec(), expected_tokens: None })
            .expect("an append");
    }
    (collection, document.id)
}

/// So many tokens over the document, so many times.
fn lookup(rng: &mut ChaCha8Rng, flooded: &Flooded<'_>, tokens: u32, times: usize, top_k: u32) -> LookupRequest {
    let query_len = tokens as usize * QUERY_HEADS * HEAD_DIM;
    LookupRequest {
        collection: flooded.collection,
        layer: 0,
        queries: (0..query_len).map(|_| rng.random_range(-2.0..2.0)).collect(),
        distances: (0..tokens).collect(),
        scope: vec![BlockRange { document: flooded.document, blocks: 0..BLOCKS }; times],
        top_k,
        block_score: BlockScore::Max,
        granularity: Granularity::TokenHead,
    }
}

fn attend(lookup: LookupRequest) -> AttendRequest {
    AttendRequest {
        lookup,
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    }
}

impl Flooded<'_> {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn some(&self, count: usize) -> usize {
        ((count as f64 * self.options.share) as usize).max(1)
    }

    /// Until the flood is over.
    fn hold<T>(&self, held: T) {
        while !self.is_over() {
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(held);
    }

    /// Clients that ask again and again, and give up after so many seconds.
    fn ask(&self, clients: usize, seconds: f64, request: &LookupRequest) {
        std::thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| {
                    let client = connect(&self.target, seconds);
                    while !self.is_over() {
                        // Refusals and passed deadlines are what a flood gets.
                        let _ = client.lookup(request);
                    }
                });
            }
        });
    }
}

fn small_lookups(flooded: &Flooded<'_>) {
    let request = lookup(&mut ChaCha8Rng::seed_from_u64(SEED), flooded, 1, 1, 8);
    flooded.ask(flooded.some(32), 60.0, &request);
}

fn giant_lookups(flooded: &Flooded<'_>) {
    let request = lookup(&mut ChaCha8Rng::seed_from_u64(SEED), flooded, 4096, 8, 64);
    flooded.ask(4, 3.0, &request);
}

fn idle_connections(flooded: &Flooded<'_>) {
    let open =
        |i: usize| if i.is_multiple_of(2) { Raw::silent(&flooded.target) } else { Raw::greeting(&flooded.target) };
    let connections = (0..flooded.some(2000)).take_while(|_| !flooded.is_over());
    flooded.hold(connections.map(open).collect::<Vec<Raw>>());
}

fn slow_readers(flooded: &Flooded<'_>) {
    // Field 1: the document; field 2: 4,096 blocks, packed; field 3: f32. All below 128 are one byte.
    let mut message = vec![1 << 3, flooded.document.0 as u8, 2 << 3 | 2, 0x80, 0x20];
    message.extend((0..4096u32).map(|i| (i % 128) as u8));
    message.extend([3 << 3, 1]);
    let reader = |_| {
        let mut raw = Raw::greeting(&flooded.target);
        for _ in 0..8 {
            let stream = raw.open("/landmark.v1.BlockMemory/Fetch");
            raw.send(stream, &header(message.len() as u32));
            raw.send(stream, &message);
            raw.finish(stream);
        }
        raw
    };
    flooded.hold((0..flooded.some(64)).map(reader).collect::<Vec<Raw>>());
}

fn half_open_streams(flooded: &Flooded<'_>) {
    let caller = |_| {
        let mut raw = Raw::greeting(&flooded.target);
        for _ in 0..100 {
            let stream = raw.open("/landmark.v1.BlockMemory/Append");
            raw.send(stream, &header(1 << 30));
            raw.send(stream, &[0; 100]);
        }
        raw
    };
    flooded.hold((0..flooded.some(32)).map(caller).collect::<Vec<Raw>>());
}

fn empty_blocks(flooded: &Flooded<'_>) {
    let blocks = [2 << 3 | 2, 0].repeat(flooded.options.empty_blocks_bytes / 2);
    while !flooded.is_over() {
        let mut raw = Raw::greeting(&flooded.target);
        let stream = raw.open("/landmark.v1.BlockMemory/Append");
        raw.send(stream, &header(blocks.len() as u32));
        raw.send(stream, &blocks);
        raw.finish(stream);
        raw.ends(stream);
    }
}
