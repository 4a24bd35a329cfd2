//! What do arbitrary bytes of a segment or a record make of a store? An answer that a record holds whose
//! checksum agrees, or an error that says what is wrong: never a panic, and never an answer that changes when the store is
//! opened again, worked with, or repaired.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::document::{BlockMeta, BlockRecord};
use super::entry::StoredSpec;
use super::error::StoreError;
use super::fault_disk::{FaultDisk, Files, Table};
use super::handles::Handles;
use super::ledger::{Damage, Doubt, SegmentState, Totals};
use super::piece::{KeysLayout, PieceLayout};
use super::place;
use super::record::{
    CRC_BYTES, CollectionEntry, Content, DocumentEntry, GroupEntry, Kind, Locator, Part, RECORD_HEADER_BYTES,
    RECORD_MAGIC, RecordHeader, SEGMENT_HEADER_BYTES, Salt, SegmentHeader, Tombstone, decode_meta, encode_meta, pack,
    unpack,
};
use super::repair::{RepairOptions, repair};
use super::scan::{Item, Scanned};
use super::segment::{DirectoryId, SegmentId};
use super::state::{Sizes, Store};
use crate::shape::{CollectionSpec, ModelShape, Rope, Sha256Digest};
use crate::types::{BlockId, CollectionId, DType, DocumentId, KeyRule};
use crate::until::Until;

pub mod seeds;

/// Segments so small that a few appends fill one.
const SIZES: Sizes = Sizes { segment_bytes: 4000, group_bytes: 1000 };

/// The directory of every [`FaultDisk`] that is not told another.
const DIRECTORY: DirectoryId = DirectoryId([0; 16]);

/// Blocks that are read of one document, and pieces of one block.
const READ_MAX: u32 = 64;

/// B, D, and L * Hkv of what is written here.
const BLOCK_TOKENS: u32 = 4;
const HEAD_DIM: u32 = 4;
const PIECES: u32 = 2;

/// A segment file. It is judged as it is, and with all checksums made to agree: behind them lies what flipped bytes alone
/// do not reach.
pub fn segment(bytes: &[u8], visit: fn(Store)) -> bool {
    let as_it_is = judge(bytes, visit);
    let mended = mend(bytes);
    let with_checksums = mended != bytes && judge(&mended, visit);
    as_it_is || with_checksums
}

/// Whether a store that opens on it answers anything.
fn judge(bytes: &[u8], visit: fn(Store)) -> bool {
    let id = SegmentHeader::check(bytes).map_or(SegmentId(1), |header| header.segment);
    let disk = FaultDisk::default();
    disk.place(id, Some(bytes.to_vec()));
    let Intact { answers, is_in_order } = Intact::of(&disk, id);
    let Some(store) = check(open(&disk)) else { return false };
    let mut read = read_all(&store);
    let answers_any = !read.is_empty();
    for ((block, what), bytes) in &read {
        let found = (*block, *what, bytes.clone());
        assert!(answers.contains(&found), "{what:?} of block {block} is what no intact record holds");
    }
    let found = check(store.verify_rebuild(&mut |_, _| {}, &Until::FOREVER)).map(|report| report.faults);
    let found_alone = check(store.verify(None, &mut |_, _| {})).map(|report| report.faults);
    if is_in_order {
        assert_eq!(found, found_alone, "a catalog that was just rebuilt is what a rebuild makes");
    }

    if let Some(gone) = go_on(&store) {
        read.retain(|(block, _), _| block.document != gone);
    }
    keeps(&store, &read, is_in_order, "after more work");
    drop(store);
    let rebuilt = disk.restart(Files::Written, Table::Deleted);
    if let Some(store) = check(open(&rebuilt)) {
        keeps(&store, &read, is_in_order, "after a rebuild");
    }
    let handles = Handles::new(Box::new(rebuilt.clone()));
    if check(repair(&handles, &rebuilt, SIZES, &RepairOptions::default())).is_some()
        && let Some(store) = check(open(&rebuilt))
    {
        keeps(&store, &read, is_in_order, "after a repair");
        visit(store);
    }
    answers_any
}

fn open(disk: &FaultDisk) -> Result<Store, StoreError> {
    Store::open_sized(Box::new(disk.clone()), Arc::new(disk.clone()), SIZES)
}

/// What a call gave, or nothing where it refused. The disk works, so no call may blame it.
fn check<T>(result: Result<T, StoreError>) -> Option<T> {
    use StoreError::*;
    match result {
        Ok(value) => Some(value),
        Err(error @ (Locked { .. } | GivenUp | Poisoned | Io { .. } | Catalog { .. })) => panic!("{error}"),
        Err(_) => None,
    }
}

/// What is read of a block with one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Meta,
    Keys,
    Pieces,
    Piece(u32),
}

type Read = BTreeMap<(BlockId, What), Vec<u8>>;

/// All that blocks answer with.
fn read_all(store: &Store) -> Read {
    let mut read = Read::new();
    for (collection, _) in check(store.collections()).unwrap_or_default() {
        for manifest in check(store.manifests(collection)).unwrap_or_default() {
            let blocks = manifest.blocks.min(READ_MAX);
            let indices = (0..blocks).chain([manifest.blocks, manifest.blocks.saturating_add(1)]);
            indices.for_each(|index| read_block(store, BlockId { document: manifest.id, index }, &mut read));
            read_state(store, manifest.id, &mut read);
        }
    }
    read
}

/// All parts of a state, or nothing: repair takes away what is left of one that is not whole.
fn read_state(store: &Store, document: DocumentId, read: &mut Read) {
    let part = |part| check(store.read_state_part(document, part)).flatten();
    let Some((state, _)) = part(0) else { return };
    let parts = (0..state.parts).map(|number| {
        let (found, bytes) = part(number)?;
        assert_eq!(found, state, "no writer is at work");
        Some(((place::of_part(document, number), What::Piece(0)), bytes))
    });
    read.extend(parts.collect::<Option<Vec<_>>>().unwrap_or_default());
}

fn read_block(store: &Store, block: BlockId, read: &mut Read) {
    if place::part_at(block.index).is_some() {
        return read_state(store, block.document, read);
    }
    if let Some((meta, _)) = check(store.read_meta(block)) {
        read.insert((block, What::Meta), encode_meta(&meta));
    }
    if let Some(keys) = check(store.read_keys(block)) {
        read.insert((block, What::Keys), keys);
    }
    let mut bytes = Vec::new();
    if check(store.read_pieces(block, &mut bytes)).is_some() {
        read.insert((block, What::Pieces), bytes.clone());
    }
    for piece in 0..READ_MAX {
        store.expect_piece(block, piece as usize);
        let found = store.read_piece(block, piece as usize, &mut bytes);
        if matches!(found, Err(StoreError::Invalid { .. } | StoreError::NotFound { .. })) {
            return;
        }
        if check(found).is_some() {
            read.insert((block, What::Piece(piece)), bytes.clone());
        }
    }
}

/// What lies in a segment, looked at one by one.
#[derive(Default)]
struct Intact {
    /// Everything that a block may answer with: parts whose checksums agree.
    answers: BTreeSet<(BlockId, What, Vec<u8>)>,
    /// Its groups have rising numbers from its header's on. Where records agree with their checksums and not with each other,
    /// what is known of a document may be less the next time.
    is_in_order: bool,
}

impl Intact {
    fn of(disk: &FaultDisk, id: SegmentId) -> Self {
        let mut intact = Intact::default();
        let Some(segment) = check(Handles::new(Box::new(disk.clone())).get(id)) else { return intact };
        let Some(len) = check(segment.len_bytes()) else { return intact };
        let mut numbers = Vec::from_iter(segment.header.map(|header| header.next_sequence.saturating_sub(1)));
        for item in segment.scan(segment.salt.first_record(), len) {
            let Some(Item::Record(scanned)) = check(item) else { continue };
            match scanned.content() {
                Some(Content::Group(end)) => numbers.push(end.number),
                Some(Content::Block(_)) => intact.add(&scanned, segment.salt),
                _ => {}
            }
        }
        intact.is_in_order = segment.header.is_some() && numbers.windows(2).all(|pair| pair[0] < pair[1]);
        intact
    }

    fn add(&mut self, scanned: &Scanned, salt: Salt) {
        let (header, mut pieces) = (scanned.header, Some(Vec::new()));
        for part in header.parts.iter() {
            let (at, part_bytes) = header.parts.span(part);
            let stored = &scanned.record[at as usize..at as usize + part_bytes + CRC_BYTES];
            let what = match part {
                Part::Meta => What::Meta,
                Part::Keys => What::Keys,
                Part::Piece(piece) => What::Piece(piece),
            };
            let found = header.stamp(salt).checked(part, stored);
            if let Part::Piece(_) = part {
                pieces = pieces.zip(found).map(|(pieces, piece)| [&pieces, piece].concat());
            }
            self.answers.extend(found.map(|bytes| (header.block, what, bytes.to_vec())));
        }
        self.answers.extend(pieces.map(|bytes| (header.block, What::Pieces, bytes)));
    }
}

/// That nothing is read as something else than it was; `all`: and that it is read.
fn keeps(store: &Store, read: &Read, all: bool, when: &str) {
    let mut now = Read::new();
    let blocks: BTreeSet<BlockId> = read.keys().map(|&(block, _)| block).collect();
    blocks.into_iter().for_each(|block| read_block(store, block, &mut now));
    for ((block, what), bytes) in read {
        let found = now.get(&(*block, *what));
        let is_kept = if all { found == Some(bytes) } else { found.is_none_or(|found| found == bytes) };
        assert!(is_kept, "{what:?} of block {block} {when}: {found:?}, and was {bytes:?}");
    }
}

/// Work that a store goes on with after any opening; each call is done or refused. Gives the document that it deleted.
fn go_on(store: &Store) -> Option<DocumentId> {
    let known: Vec<CollectionId> = check(store.collections())?.into_iter().map(|(id, _)| id).collect();
    let manifests = known.iter().filter_map(|&id| check(store.manifests(id))).flatten();
    let documents: Vec<DocumentId> = manifests.map(|manifest| manifest.id).collect();
    if let Some(collection) = check(store.create_collection(&spec("fuzzed")))
        && let Some(manifest) = check(store.create_document(collection, "new"))
    {
        assert!(!known.contains(&collection) && !documents.contains(&manifest.id), "ids are never reused");
        check(store.append(manifest.id, &(0..6).map(block).collect::<Vec<_>>()));
        check(store.put_state(manifest.id, 24, &[b"state".as_slice().into()]));
        check(store.seal(manifest.id));
    }
    documents.first().and_then(|&last| check(store.seal(last)));
    let gone = documents.last().copied().filter(|&gone| check(store.delete(gone)).is_some());
    check(store.compact());
    gone
}

fn spec(name: &str) -> CollectionSpec {
    CollectionSpec {
        name: name.into(),
        shape: ModelShape {
            layers: 1,
            query_heads: PIECES,
            kv_heads: PIECES,
            head_dim: HEAD_DIM,
            block_tokens: BLOCK_TOKENS,
            rope: Rope::from_base(10_000.0, HEAD_DIM as usize),
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

/// A full block of such a collection.
fn block(index: u32) -> BlockRecord {
    let layout = PieceLayout { dtype: DType::F16, tokens: BLOCK_TOKENS as usize, head_dim: HEAD_DIM as usize };
    BlockRecord {
        index,
        meta: BlockMeta {
            token_ids: (0..BLOCK_TOKENS).collect(),
            text_start: 4 * index as u64,
            text: b"text".to_vec(),
            text_offsets: (0..BLOCK_TOKENS).collect(),
        },
        keys: vec![0; KeysLayout::of(&spec("")).bytes(false)],
        pieces: vec![0; PIECES as usize * layout.bytes()],
    }
}

/// The same segment, as one of [`DIRECTORY`] whose checksums agree wherever there is something to check.
fn mend(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let (id, salt) = mend_segment_header(&mut bytes);
    let mut at = salt.first_record() as usize;
    while let Some(record) = bytes.get_mut(at..).filter(|rest| rest.len() >= RECORD_HEADER_BYTES) {
        at += match record.starts_with(&RECORD_MAGIC) {
            true => mend_record(record, salt, id, at as u64),
            false => 1,
        };
    }
    bytes
}

fn mend_segment_header(bytes: &mut [u8]) -> (SegmentId, Salt) {
    for salted in [true, false] {
        let len = if salted { SEGMENT_HEADER_BYTES } else { Salt::NONE.first_record() as usize };
        let Some(header) = bytes.get_mut(..len) else { continue };
        let before = header.to_vec();
        put_crc(header, crc32fast::hash);
        match SegmentHeader::check(header) {
            Some(found) if found.directory.is_some() == salted => {
                if salted {
                    header.copy_from_slice(&SegmentHeader { directory: Some(DIRECTORY), ..found }.encode());
                }
                let salt = if salted { Salt::of(DIRECTORY, found.segment) } else { Salt::NONE };
                return (found.segment, salt);
            }
            _ => header.copy_from_slice(&before),
        }
    }
    (SegmentId(1), Salt::of(DIRECTORY, SegmentId(1)))
}

/// Gives the bytes to go on behind: of the record, or one where there is none.
fn mend_record(record: &mut [u8], salt: Salt, id: SegmentId, at: u64) -> usize {
    let header = &mut record[..RECORD_HEADER_BYTES];
    put_crc(header, |bytes| salt.crc(bytes));
    let mut found = [0; RECORD_HEADER_BYTES];
    found.copy_from_slice(header);
    let Some(header) = RecordHeader::check(&found, salt, id, at) else { return 1 };
    let bytes = header.parts.record_bytes();
    if bytes > record.len() as u64 {
        return 1;
    }
    for part in header.parts.iter() {
        let (at, len) = header.parts.span(part);
        put_crc(&mut record[at as usize..at as usize + len + CRC_BYTES], |bytes| header.stamp(salt).crc(part, bytes));
    }
    bytes as usize
}

/// Puts the checksum of what lies in front of the last bytes there.
fn put_crc(bytes: &mut [u8], crc: impl Fn(&[u8]) -> u32) {
    let (bytes, last) = bytes.split_at_mut(bytes.len() - CRC_BYTES);
    last.copy_from_slice(&crc(bytes).to_le_bytes());
}

/// One packed record, or a header, of the kind that the first byte says: what can be read at all is written back the same.
pub fn record(bytes: &[u8]) -> bool {
    let Some((&kind, bytes)) = bytes.split_first() else { return false };
    match kind {
        0 => segment_header(bytes),
        1 => record_header(bytes),
        2 => packed::<DocumentEntry>(bytes),
        3 => packed::<CollectionEntry>(bytes),
        4 => packed::<StoredSpec>(bytes),
        5 => packed::<Tombstone>(bytes),
        6 => packed::<GroupEntry>(bytes),
        7 => packed::<(Locator, DocumentEntry)>(bytes),
        8 => packed::<(SegmentId, SegmentState)>(bytes),
        9 => packed::<Totals>(bytes),
        10 => packed::<Damage>(bytes),
        11 => packed::<Doubt>(bytes),
        12 => meta(bytes),
        kind => content(kind, bytes),
    }
}

fn packed<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> bool {
    let value = unpack::<T>(bytes);
    value.inspect(|value| assert_eq!(pack(value), bytes)).is_some()
}

fn segment_header(bytes: &[u8]) -> bool {
    let header = SegmentHeader::check(bytes);
    let salted = header.filter(|header| header.directory.is_some());
    salted.inspect(|salted| assert_eq!(SegmentHeader::check(&salted.encode()), Some(*salted)));
    header.is_some()
}

fn record_header(bytes: &[u8]) -> bool {
    let Some(bytes) = bytes.first_chunk::<RECORD_HEADER_BYTES>() else { return false };
    let (id, mut bytes) = (SegmentId(1), *bytes);
    let salt = Salt::of(DIRECTORY, id);
    put_crc(&mut bytes, |bytes| salt.crc(bytes));
    let header = RecordHeader::check(&bytes, salt, id, 0);
    header.inspect(|found| assert_eq!(RecordHeader::check(&found.encode(salt), salt, id, 0), Some(*found))).is_some()
}

/// Meta of a block of as many tokens as the first byte says.
fn meta(bytes: &[u8]) -> bool {
    let Some((&tokens, bytes)) = bytes.split_first() else { return false };
    let meta = decode_meta(tokens as u32, bytes);
    meta.inspect(|meta| assert_eq!(encode_meta(meta), bytes)).is_some()
}

/// The meta of a small record, as a scan reads it.
fn content(kind: u8, bytes: &[u8]) -> bool {
    let kinds = [Kind::Collection, Kind::Document, Kind::Tombstone, Kind::Group];
    let kind = kinds[kind as usize % kinds.len()];
    let block = BlockId { document: DocumentId(1), index: 0 };
    let (commit, sequence, collection) = (false, 1, CollectionId(1));
    let header = RecordHeader { kind, commit, sequence, collection, block, tokens: 0, parts: Default::default() };
    let found = Content::decode(&header, bytes);
    if let Some(Content::Document(entry)) = &found {
        entry.record_bytes();
        entry.tokens();
        entry.accepts(0, entry.block_tokens, 1);
        entry.accepts(u32::MAX, 0, 1);
    }
    found.is_some()
}

/// A disk with a store on it, of which every input gets a copy.
pub struct Original(FaultDisk);

impl Original {
    pub fn new(fill: impl FnOnce(Store)) -> Self {
        let disk = FaultDisk::default();
        check(open(&disk)).map(fill);
        Original(disk)
    }

    pub fn copy(&self) -> Option<Store> {
        check(open(&self.0.restart(Files::Written, Table::Applied)))
    }
}
