//! What the child does to a real directory, and what has to be found there afterwards.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use landmarkdb::store::piece::{KeysLayout, PieceLayout};
use landmarkdb::store::{BlockMeta, BlockRecord, Store, StoreError};
use landmarkdb::{BlockId, CollectionId, CollectionSpec, DType, DocumentId, KeyRule, ModelShape, Rope, Sha256Digest};

pub enum Step {
    Collection,
    Create(&'static str),
    /// Blocks `from..to`, and a tail of so many tokens. The version tells documents of one name apart.
    Append(&'static str, u32, std::ops::Range<u32>, u32),
    Seal(&'static str),
    Delete(&'static str),
}

/// Every kind of write. The deletes make compaction begin a segment, copy and remove.
pub const SCRIPT: &[Step] = &[
    Step::Collection,
    Step::Create("a"),
    Step::Append("a", 1, 0..3, 2),
    Step::Create("b"),
    Step::Append("b", 1, 0..40, 0),
    Step::Append("a", 1, 3..5, 0),
    Step::Delete("b"),
    Step::Create("c"),
    Step::Append("c", 1, 0..10, 1),
    Step::Seal("a"),
    Step::Create("b"),
    Step::Append("b", 2, 0..2, 3),
    Step::Delete("c"),
    Step::Append("b", 2, 2..6, 0),
];

/// What the child said of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Said {
    Done,
    /// It failed, and succeeded when it was repeated on a system that was well.
    Repeated,
    /// It failed both times.
    Refused,
}

/// B = 4, D = 4, two KV heads in one layer.
pub fn spec() -> CollectionSpec {
    CollectionSpec {
        name: "one".into(),
        shape: ModelShape {
            layers: 1,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 4,
            block_tokens: 4,
            rope: Rope::from_base(10_000.0, 4),
            unrotated_layers: Vec::new(),
            softmax_scale: 0.5,
        },
        key_rule: KeyRule::Landmark,
        payload_dtype: DType::F16,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([1; 32]),
        tokenizer_digest: Sha256Digest([2; 32]),
        model_name: "model".into(),
    }
}

/// Every byte depends on name, version, place and length.
pub fn made(name: &str, version: u32, index: u32, tokens: u32) -> BlockRecord {
    let seed = name.bytes().map(u32::from).sum::<u32>() * 31 + version * 7;
    let bytes = |count: usize, salt: u32| -> Vec<u8> {
        (0..count as u32).map(|i| (i * 7 + index * 31 + seed + tokens + salt * 13) as u8).collect()
    };
    let layout = PieceLayout { dtype: DType::F16, tokens: tokens as usize, head_dim: 4 };
    BlockRecord {
        index,
        meta: BlockMeta {
            token_ids: (0..tokens).map(|token| seed * 1000 + index * 10 + token).collect(),
            text_start: index as u64 * 400,
            text: bytes(tokens as usize * 100, 1),
            text_offsets: (0..tokens).map(|token| token * 100).collect(),
        },
        keys: if tokens == 4 { bytes(KeysLayout::of(&spec()).bytes(false), 2) } else { Vec::new() },
        pieces: bytes(2 * layout.bytes(), 3),
    }
}

fn find(store: &Store, name: &str) -> Result<DocumentId, StoreError> {
    store.find_document(CollectionId(1), name)?.ok_or(StoreError::Invalid {
        field: "name",
        expected: name.into(),
        found: "nothing".into(),
    })
}

impl Step {
    fn run(&self, store: &Store) -> Result<(), StoreError> {
        match self {
            Step::Collection => store.create_collection(&spec()).map(drop),
            Step::Create(name) => store.create_document(CollectionId(1), name).map(drop),
            Step::Append(name, version, blocks, tail) => {
                let mut new: Vec<_> = blocks.clone().map(|index| made(name, *version, index, 4)).collect();
                if *tail > 0 {
                    new.push(made(name, *version, blocks.end, *tail));
                }
                store.append(find(store, name)?, &new).map(drop)
            }
            Step::Seal(name) => store.seal(find(store, name)?).map(drop),
            Step::Delete(name) => store.delete(find(store, name)?).map(drop),
        }
    }

    /// Whether what failed was done all the same, as the second answer says.
    fn is_done(&self, first: &StoreError, again: &StoreError) -> bool {
        match self {
            _ if matches!(first, StoreError::Invalid { .. }) => false,
            Step::Collection | Step::Create(_) => matches!(again, StoreError::AlreadyExists { .. }),
            Step::Delete(_) => matches!(again, StoreError::Invalid { field: "name", .. }),
            Step::Append(..) | Step::Seal(_) => false,
        }
    }
}

/// Does the script in `folder`. Says on stdout what became of each step, once it is known. Heals the system by creating
/// the file `healed` when something has failed.
pub fn work(folder: &Path, healed: &Path) {
    let heal = || std::fs::write(healed, "").unwrap();
    let say = |line: String| {
        println!("{line}");
        std::io::stdout().flush().unwrap();
    };
    let store = match Store::open(folder) {
        Ok(store) => store,
        Err(error) => {
            heal();
            say(format!("open again after {error}"));
            Store::open(folder).unwrap()
        }
    };
    for (number, step) in SCRIPT.iter().enumerate() {
        let Err(first) = step.run(&store) else {
            say(format!("step {number} Done"));
            continue;
        };
        heal();
        match step.run(&store) {
            Err(again) if !step.is_done(&first, &again) => say(format!("step {number} Refused {first} / {again}")),
            _ => say(format!("step {number} Repeated {first}")),
        }
    }
}

/// What must be there of one name.
#[derive(Default)]
struct Expected {
    version: u32,
    /// Tokens that were acknowledged; more may be there.
    tokens: u64,
    /// `None`: it may be there or not.
    exists: Option<bool>,
}

/// Compares a directory with what the child acknowledged.
pub fn check(store: &Store, said: &BTreeMap<usize, Said>) -> Result<(), String> {
    let mut names = BTreeMap::<&str, Expected>::new();
    for (number, step) in SCRIPT.iter().enumerate() {
        let is_done = said.get(&number).is_some_and(|said| *said != Said::Refused);
        match step {
            Step::Create(name) => {
                let exists = is_done.then_some(true);
                names.insert(name, Expected { exists, ..Expected::default() });
            }
            Step::Delete(name) => names.entry(name).or_default().exists = is_done.then_some(false),
            Step::Append(name, version, blocks, tail) => {
                let expected = names.entry(name).or_default();
                expected.version = *version;
                if is_done {
                    expected.tokens = blocks.end as u64 * 4 + *tail as u64;
                }
            }
            Step::Collection | Step::Seal(_) => {}
        }
    }
    for (name, expected) in names {
        check_name(store, name, &expected).map_err(|problem| format!("document {name}: {problem}"))?;
    }
    let report = store.verify(None, &mut |_, _| {}).map_err(|error| error.to_string())?;
    if report.faults.is_empty() { Ok(()) } else { Err(format!("verify: {:?}", report.faults)) }
}

fn check_name(store: &Store, name: &str, expected: &Expected) -> Result<(), String> {
    let id = match (store.find_document(CollectionId(1), name).map_err(|error| error.to_string())?, expected.exists) {
        (None, Some(true)) => return Err("it was acknowledged and is gone".into()),
        (Some(_), Some(false)) => return Err("its deletion was acknowledged and it is there".into()),
        (None, _) => return Ok(()),
        (Some(id), _) => id,
    };
    let manifest = store.manifest(id).map_err(|error| error.to_string())?;
    let tokens = manifest.blocks as u64 * 4 + manifest.tail_tokens as u64;
    if expected.exists.is_some() && tokens < expected.tokens {
        return Err(format!("{} tokens were acknowledged, {tokens} are there", expected.tokens));
    }
    for index in 0..manifest.blocks + (manifest.tail_tokens > 0) as u32 {
        let block = BlockId { document: id, index };
        let found = read(store, block).map_err(|error| format!("block {index}: {error}"))?;
        let length = if index < manifest.blocks { 4 } else { manifest.tail_tokens };
        let versions = [1, 2].map(|version| made(name, version, index, length));
        let is_right = if expected.exists.is_some() {
            found == versions[expected.version.saturating_sub(1) as usize]
        } else {
            versions.contains(&found)
        };
        if !is_right {
            return Err(format!("block {index} is not what was appended"));
        }
    }
    Ok(())
}

pub fn read(store: &Store, id: BlockId) -> Result<BlockRecord, StoreError> {
    let (meta, _) = store.read_meta(id)?;
    let keys = store.read_keys(id)?;
    let mut pieces = Vec::new();
    store.read_pieces(id, &mut pieces)?;
    Ok(BlockRecord { index: id.index, meta, keys, pieces })
}
