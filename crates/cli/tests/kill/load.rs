//! kill -9 of the service while several clients write, delete and read, again and again: after each kill every
//! acknowledged block is there with its bytes, what was under way is there as a whole or not at all, and a catalog that is
//! rebuilt from the segments says the same. `LANDMARKDB_KILL_CYCLES` says how often (few by default),
//! `LANDMARKDB_KILL_SEED` with which random choices.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use landmarkdb::{
    AppendRequest, BlockMemory, BlockText, CollectionId, DType, DocumentId, FetchRequest, LocalMemory, MemoryError,
    NewBlock, Tensor, Until,
};
use landmarkdb_grpc::client::{ClientOptions, RemoteMemory};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::common::{shape, spec};
use super::service::Service;
use super::{Process, landmarkdb, serve};

const WRITERS: usize = 3;
const READERS: usize = 2;
/// Names that each writer uses, again after a deletion.
const NAMES: usize = 3;
/// A longer document is deleted: so much is dead all the time that every cycle compacts.
const TOKENS_MAX: u32 = 400;

/// One name of one writer, who is alone with it.
struct Slot {
    name: String,
    document: Option<Document>,
    /// A creation that was not answered.
    creating: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Document {
    id: DocumentId,
    /// All its bytes follow from this, and from where they are.
    seed: u32,
    acknowledged: u32,
    /// With the append that was not answered, if there is one.
    attempted: u32,
    /// A deletion was not answered.
    deleting: bool,
}

/// What readers may ask for: seed and full blocks by document.
type Readable = Mutex<BTreeMap<DocumentId, (u32, u32)>>;

#[derive(Default)]
struct Counts {
    appends: AtomicU64,
    deletes: AtomicU64,
    reads: AtomicU64,
}

/// Every byte depends on the document, the place and the number of tokens; all values are exact in f16.
fn made(seed: u32, index: u32, tokens: u32) -> NewBlock {
    let shape = shape();
    let values = |salt: u32| {
        let sizes = vec![shape.layers, shape.kv_heads, tokens, shape.head_dim];
        let number = |i: u32| ((seed * 7 + index * 31 + tokens * 3 + i * 5 + salt) % 199) as f32 / 8.0 - 12.0;
        let count = sizes.iter().product();
        let data: Vec<u8> = (0..count).flat_map(|i| half::f16::from_f32(number(i)).to_le_bytes()).collect();
        Tensor { dtype: DType::F16, shape: sizes, data: data.into() }
    };
    let text = BlockText {
        start: index as u64 * shape.block_tokens as u64 * 50,
        bytes: (0..tokens * 50).map(|i| (seed + index + i) as u8).collect(),
        offsets: (0..tokens).map(|token| token * 50).collect(),
    };
    let token_ids = (0..tokens).map(|token| seed * 100_000 + index * 100 + token).collect();
    NewBlock { index, token_ids, text, k: values(1), v: values(2) }
}

/// Blocks that bring a document from so many tokens to so many.
fn blocks(seed: u32, from: u32, to: u32) -> Vec<NewBlock> {
    let of = shape().block_tokens;
    (from / of..to.div_ceil(of)).map(|index| made(seed, index, of.min(to - index * of))).collect()
}

/// Whether this is how a call fails whose service was killed; anything else is wrong.
fn is_killed(error: &MemoryError) -> bool {
    let killed = matches!(error, MemoryError::Unavailable { .. } | MemoryError::DeadlineExceeded { .. });
    assert!(killed, "a call fails with {error}");
    killed
}

fn connect(address: &str) -> Result<RemoteMemory, MemoryError> {
    let once = ClientOptions { attempts: 1, deadline: Duration::from_secs(30), ..ClientOptions::default() };
    RemoteMemory::connect(address, once)
}

/// What writers and readers of one life of the service share.
struct Load<'a> {
    address: &'a str,
    collection: CollectionId,
    readable: Readable,
    counts: &'a Counts,
}

struct Writer<'a> {
    memory: &'a dyn BlockMemory,
    load: &'a Load<'a>,
    random: ChaCha8Rng,
}

impl Writer<'_> {
    /// Works on its slots until the service is gone.
    fn work(mut self, slots: &mut [Slot]) {
        loop {
            let at = self.random.random_range(0..slots.len());
            let slot = &mut slots[at];
            let done = match slot.document {
                None => self.create(slot),
                Some(document) if document.acknowledged > TOKENS_MAX => self.delete(slot, document),
                Some(document) if self.random.random_range(0..12) == 0 => self.delete(slot, document),
                Some(document) => self.append(slot, document),
            };
            if done.is_err_and(|error| is_killed(&error)) {
                return;
            }
        }
    }

    fn create(&mut self, slot: &mut Slot) -> Result<(), MemoryError> {
        let seed = self.random.random_range(0..10_000);
        slot.creating = Some(seed);
        let id = self.memory.open_document(self.load.collection, &slot.name)?.id;
        slot.creating = None;
        slot.document = Some(Document { id, seed, acknowledged: 0, attempted: 0, deleting: false });
        Ok(())
    }

    fn append(&mut self, slot: &mut Slot, mut document: Document) -> Result<(), MemoryError> {
        let from = document.acknowledged;
        document.attempted = from + self.random.random_range(1..60);
        slot.document = Some(document);
        let blocks = blocks(document.seed, from, document.attempted);
        let now = self.memory.append(AppendRequest { document: document.id, blocks, expected_tokens: None })?;
        assert_eq!(now.tokens, document.attempted as u64, "what an append acknowledges");
        document.acknowledged = document.attempted;
        slot.document = Some(document);
        self.load.counts.appends.fetch_add(1, Ordering::Relaxed);
        self.load.readable.lock().unwrap().insert(document.id, (document.seed, now.blocks));
        Ok(())
    }

    fn delete(&mut self, slot: &mut Slot, mut document: Document) -> Result<(), MemoryError> {
        self.load.readable.lock().unwrap().remove(&document.id);
        document.deleting = true;
        slot.document = Some(document);
        self.memory.delete(document.id)?;
        slot.document = None;
        self.load.counts.deletes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Load<'_> {
    /// Writers and readers work until the service is killed under them.
    fn run(&self, mut service: Service, slots: &mut [Slot], after: Duration, seed: u64) {
        let clients: Vec<RemoteMemory> = (0..WRITERS + READERS).map(|_| connect(self.address).unwrap()).collect();
        std::thread::scope(|scope| {
            let (writers, readers) = clients.split_at(WRITERS);
            for (number, (memory, slots)) in writers.iter().zip(slots.chunks_mut(NAMES)).enumerate() {
                let random = ChaCha8Rng::seed_from_u64(seed ^ number as u64);
                let writer = Writer { memory, load: self, random };
                scope.spawn(move || writer.work(slots));
            }
            for (number, memory) in readers.iter().enumerate() {
                let random = ChaCha8Rng::seed_from_u64(seed ^ (100 + number as u64));
                scope.spawn(move || self.read(memory, random));
            }
            std::thread::sleep(after);
            service.child.kill().unwrap();
            service.child.wait().unwrap();
        });
    }

    /// Reads acknowledged blocks until the service is gone.
    fn read(&self, memory: &dyn BlockMemory, mut random: ChaCha8Rng) {
        loop {
            let some = {
                let readable = self.readable.lock().unwrap();
                let at = random.random_range(0..readable.len().max(1));
                readable.iter().nth(at).map(|(&id, &of)| (id, of)).filter(|(_, (_, blocks))| *blocks > 0)
            };
            let Some((document, (seed, blocks))) = some else {
                if let Err(error) = memory.stats() {
                    is_killed(&error);
                    return;
                }
                continue;
            };
            let index = random.random_range(0..blocks);
            match memory.fetch(&FetchRequest { document, blocks: vec![index], dtype: DType::F16 }) {
                Ok(found) => {
                    assert_same(&found, document, &[made(seed, index, shape().block_tokens)]);
                    self.counts.reads.fetch_add(1, Ordering::Relaxed);
                }
                Err(MemoryError::NotFound { .. }) => {
                    let deleted = !self.readable.lock().unwrap().contains_key(&document);
                    assert!(deleted, "block {index} of document {document} was acknowledged and is not found");
                }
                Err(error) => {
                    is_killed(&error);
                    return;
                }
            }
        }
    }
}

fn assert_same(found: &[landmarkdb::StoredBlock], document: DocumentId, expected: &[NewBlock]) {
    assert_eq!(found.len(), expected.len(), "blocks of document {document}");
    for (found, expected) in found.iter().zip(expected) {
        let same = found.id.index == expected.index
            && found.token_ids == expected.token_ids
            && found.text == expected.text
            && (&found.k.data, &found.v.data) == (&expected.k.data, &expected.v.data);
        assert!(same, "block {} of document {document} is not what was appended", expected.index);
    }
}

/// Compares all documents with what was acknowledged, and takes over what was under way. Returns blocks compared.
fn settle(memory: &dyn BlockMemory, collection: CollectionId, slots: &mut [Slot], context: &str) -> u64 {
    let listed = memory.documents(collection).unwrap();
    let mut here: BTreeMap<_, _> = listed.into_iter().map(|document| (document.name.clone(), document)).collect();
    let mut compared = 0;
    for slot in slots {
        let found = here.remove(&slot.name);
        let creating = slot.creating.take();
        let expected = match (slot.document, &found) {
            (Some(document), Some(found)) if document.id == found.id => Some(document),
            (Some(document), _) => {
                assert!(document.deleting, "{context}: {document:?}, {} is lost: found {found:?}", slot.name);
                assert!(found.is_none(), "{context}: {} after its deletion: {found:?}", slot.name);
                None
            }
            (None, Some(found)) => {
                let seed = creating.unwrap_or_else(|| panic!("{context}: nobody created {found:?}"));
                Some(Document { id: found.id, seed, acknowledged: 0, attempted: 0, deleting: false })
            }
            (None, None) => None,
        };
        slot.document = expected.zip(found).map(|(mut document, found)| {
            let tokens = found.tokens as u32;
            let allowed = [document.acknowledged, document.attempted];
            assert!(allowed.contains(&tokens), "{context}: {document:?} has {tokens} tokens");
            let expected = blocks(document.seed, 0, tokens);
            for run in expected.chunks(64) {
                let blocks = run.iter().map(|block| block.index).collect();
                let request = FetchRequest { document: document.id, blocks, dtype: DType::F16 };
                assert_same(&memory.fetch(&request).unwrap(), document.id, run);
            }
            compared += expected.len() as u64;
            (document.acknowledged, document.attempted, document.deleting) = (tokens, tokens, false);
            document
        });
    }
    assert!(here.is_empty(), "{context}: nobody made {here:?}");
    compared
}

/// The same of a memory that has nothing but the segments of this directory.
fn settle_rebuilt(data: &Path, collection: CollectionId, slots: &mut [Slot], context: &str) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("data");
    copy_without_catalog(data, &copy);
    let memory = LocalMemory::open(&copy).unwrap();
    settle(&memory, collection, slots, &format!("{context}, without the catalog"));
    assert_eq!(memory.verify(None, &mut |_, _| {}).unwrap().faults, vec![], "{context}, without the catalog");
}

fn copy_without_catalog(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::set_permissions(to, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_name() == "catalog" {
            continue;
        }
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy_without_catalog(&entry.path(), &target),
            _ => drop(std::fs::copy(entry.path(), &target).unwrap()),
        }
    }
}

fn number_from(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
}

#[test]
fn nothing_acknowledged_is_lost_when_a_busy_service_is_killed() {
    let (cycles, seed) = (number_from("LANDMARKDB_KILL_CYCLES", 3), number_from("LANDMARKDB_KILL_SEED", 1));
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let name = |writer: usize, number: usize| format!("document {number} of writer {writer}");
    let slot = |writer: usize, number: usize| Slot { name: name(writer, number), document: None, creating: None };
    let mut slots: Vec<Slot> = (0..WRITERS * NAMES).map(|at| slot(at / NAMES, at % NAMES)).collect();
    let (counts, mut compared) = (Counts::default(), 0);
    let collection = {
        let service = serve(&data);
        connect(service.target()).unwrap().open_collection(&spec("killed", DType::F16)).unwrap().id
    };
    for cycle in 0..cycles {
        if random.random_range(0..4) == 0 {
            // Killed while it recovers, or creates what it needs.
            let arguments = ["serve", "--json", "--data", data.to_str().unwrap(), "--listen", "127.0.0.1:0"];
            let _early = Process(landmarkdb(&arguments).stdout(std::process::Stdio::null()).spawn().unwrap());
            std::thread::sleep(Duration::from_millis(random.random_range(0..40)));
        }
        let context = format!("seed {seed}, cycle {cycle}");
        let service = serve(&data);
        let address = service.target().to_string();
        let memory = connect(&address).unwrap();
        compared += settle(&memory, collection, &mut slots, &context);
        let faults = memory.verify_rebuild(&mut |_, _| {}, &Until::FOREVER).unwrap().faults;
        assert_eq!(faults, vec![], "{context}");
        let documents = slots.iter().filter_map(|slot| slot.document);
        let of = shape().block_tokens;
        let readable = Mutex::new(documents.map(|one| (one.id, (one.seed, one.acknowledged / of))).collect());
        let load = Load { address: &address, collection, readable, counts: &counts };
        let after = Duration::from_millis(random.random_range(20..600));
        load.run(service, &mut slots, after, random.random());
        settle_rebuilt(&data, collection, &mut slots, &context);
    }
    let [appends, deletes, reads] =
        [&counts.appends, &counts.deletes, &counts.reads].map(|count| count.load(Ordering::Relaxed));
    println!(
        "{cycles} kills under {appends} appends, {deletes} deletes and {reads} reads: 0 lost, 0 wrong in {compared} blocks"
    );
    assert!(appends > 10 * cycles && deletes > 0 && reads > cycles, "{appends}, {deletes}, {reads}: there was no load");
}
