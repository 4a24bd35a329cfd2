//! The format of a segment, as code. Little-endian, fixed width.
//!
//! ```text
//! segment = segment header, group*
//! group   = record*, group record
//! record  = record header, meta, crc, keys, crc, (piece, crc)*
//! ```
//!
//! Every record says what it is, so the catalog can be rebuilt from segments alone. Records are written in groups, and
//! a group counts only as a whole. Groups are numbered without gaps; the record that ends a group says its number and
//! names its manifests, tombstones and collections, so that a rebuild knows what damage took away. A record carries the
//! number of the group that it was first written in, its *sequence*: a copy keeps it, so a record means the same wherever
//! compaction puts it. Of two records of one thing the one with the higher sequence counts.
//!
//! Every checksum begins with the segment's salt, which follows from the directory's id and the segment's number and is
//! known to no client: bytes of a text are never taken for a record, nor records of another segment or directory. The
//! checksum of a part also covers the record's sequence, its block and which part it is, so that intact bytes in the
//! wrong place are caught. Pieces have equal sizes and their own checksums, so that one read at a computed offset gets
//! and proves one piece.
//!
//! Formats 1 to 3 had no salt, no sequences (a record's place stands for it) and a flag in place of the group record. Formats
//! 1 to 4 had no states.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::document::{BlockMeta, KeptState, Manifest};
pub(super) use super::entry::{
    CollectionEntry, DocumentEntry, GroupEntry, Named, SEQUENCE_FIRST, Tombstone, pack, unpack,
};
use super::place;
use super::segment::{DirectoryId, SegmentId};
use crate::types::{BlockId, CollectionId, DocumentId};

/// What this build writes. Raise it with every change of the format.
pub(super) const FORMAT: u32 = 5;
/// The oldest build that can read what this one writes.
const FORMAT_OLDEST_READER: u32 = 5;
/// The first with salted checksums, sequences and group records.
const FORMAT_SALTED: u32 = 4;

pub(super) const CRC_BYTES: usize = 4;

mod segment_header {
    pub(super) const MAGIC: std::ops::Range<usize> = 0..8;
    pub(super) const FORMAT: std::ops::Range<usize> = MAGIC.end..MAGIC.end + 4;
    pub(super) const OLDEST: std::ops::Range<usize> = FORMAT.end..FORMAT.end + 4;
    pub(super) const SEGMENT: std::ops::Range<usize> = OLDEST.end..OLDEST.end + 4;
    pub(super) const NEXT_COLLECTION: std::ops::Range<usize> = SEGMENT.end..SEGMENT.end + 4;
    pub(super) const NEXT_DOCUMENT: std::ops::Range<usize> = NEXT_COLLECTION.end..NEXT_COLLECTION.end + 8;
    /// Where headers of formats 1 to 3 end.
    pub(super) const UNSALTED_CRC: std::ops::Range<usize> = NEXT_DOCUMENT.end..NEXT_DOCUMENT.end + super::CRC_BYTES;
    pub(super) const DIRECTORY: std::ops::Range<usize> = NEXT_DOCUMENT.end..NEXT_DOCUMENT.end + 16;
    pub(super) const NEXT_SEQUENCE: std::ops::Range<usize> = DIRECTORY.end..DIRECTORY.end + 8;
    pub(super) const CRC: std::ops::Range<usize> = NEXT_SEQUENCE.end..NEXT_SEQUENCE.end + super::CRC_BYTES;
}

mod record_header {
    pub(super) const MAGIC: std::ops::Range<usize> = 0..4;
    pub(super) const FORMAT: std::ops::Range<usize> = MAGIC.end..MAGIC.end + 2;
    pub(super) const KIND: usize = FORMAT.end;
    pub(super) const FLAGS: usize = KIND + 1;
    pub(super) const COLLECTION: std::ops::Range<usize> = FLAGS + 1..FLAGS + 5;
    pub(super) const DOCUMENT: std::ops::Range<usize> = COLLECTION.end..COLLECTION.end + 8;
    pub(super) const INDEX: std::ops::Range<usize> = DOCUMENT.end..DOCUMENT.end + 4;
    pub(super) const TOKENS: std::ops::Range<usize> = INDEX.end..INDEX.end + 4;
    pub(super) const META_BYTES: std::ops::Range<usize> = TOKENS.end..TOKENS.end + 4;
    pub(super) const KEYS_BYTES: std::ops::Range<usize> = META_BYTES.end..META_BYTES.end + 4;
    pub(super) const PIECE_BYTES: std::ops::Range<usize> = KEYS_BYTES.end..KEYS_BYTES.end + 4;
    pub(super) const PIECES: std::ops::Range<usize> = PIECE_BYTES.end..PIECE_BYTES.end + 4;
    pub(super) const SEQUENCE: std::ops::Range<usize> = PIECES.end..PIECES.end + 8;
    /// Zero; giving it a meaning raises the format.
    pub(super) const RESERVED: std::ops::Range<usize> = SEQUENCE.end..SEQUENCE.end + 8;
    pub(super) const CRC: std::ops::Range<usize> = RESERVED.end..RESERVED.end + super::CRC_BYTES;
}

pub(super) const SEGMENT_HEADER_BYTES: usize = segment_header::CRC.end;
const UNSALTED_SEGMENT_HEADER_BYTES: usize = segment_header::UNSALTED_CRC.end;
pub(super) const RECORD_HEADER_BYTES: usize = record_header::CRC.end;
const _: () = assert!(RECORD_HEADER_BYTES == 64);

const SEGMENT_MAGIC: [u8; 8] = *b"LMDBSEG\n";
pub(super) const RECORD_MAGIC: [u8; 4] = [0xB7, b'L', b'M', b'R'];
const FLAG_COMMIT: u8 = 1;

/// The head of a segment file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) format: u32,
    pub(super) oldest_reader: u32,
    pub(super) segment: SegmentId,
    /// Every id below was given out before this segment began: ids stay unique when all that bore them is gone.
    pub(super) next_collection: CollectionId,
    pub(super) next_document: DocumentId,
    /// The number of the segment's first group; 0 in formats 1 to 3.
    pub(super) next_sequence: u64,
    /// The data directory that it was written in; none in formats 1 to 3.
    pub(super) directory: Option<DirectoryId>,
}

impl SegmentHeader {
    pub(super) fn new(
        segment: SegmentId,
        directory: DirectoryId,
        next_collection: CollectionId,
        next_document: DocumentId,
        next_sequence: u64,
    ) -> Self {
        SegmentHeader {
            format: FORMAT,
            oldest_reader: FORMAT_OLDEST_READER,
            segment,
            next_collection,
            next_document,
            next_sequence,
            directory: Some(directory),
        }
    }

    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        use segment_header as at;
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[at::MAGIC].copy_from_slice(&SEGMENT_MAGIC);
        bytes[at::FORMAT].copy_from_slice(&self.format.to_le_bytes());
        bytes[at::OLDEST].copy_from_slice(&self.oldest_reader.to_le_bytes());
        bytes[at::SEGMENT].copy_from_slice(&self.segment.0.to_le_bytes());
        bytes[at::NEXT_COLLECTION].copy_from_slice(&self.next_collection.0.to_le_bytes());
        bytes[at::NEXT_DOCUMENT].copy_from_slice(&self.next_document.0.to_le_bytes());
        bytes[at::DIRECTORY].copy_from_slice(&self.directory.unwrap_or(DirectoryId([0; 16])).0);
        bytes[at::NEXT_SEQUENCE].copy_from_slice(&self.next_sequence.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..at::CRC.start]);
        bytes[at::CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the first bytes of a segment, [`SEGMENT_HEADER_BYTES`] or as many as there are; `None` if they are no intact
    /// header.
    pub(super) fn check(bytes: &[u8]) -> Option<Self> {
        use segment_header as at;
        if bytes.len() < UNSALTED_SEGMENT_HEADER_BYTES || bytes[at::MAGIC] != SEGMENT_MAGIC {
            return None;
        }
        let format = u32_at(bytes, at::FORMAT.start);
        let salted = format >= FORMAT_SALTED;
        let crc = if salted { at::CRC } else { at::UNSALTED_CRC };
        if bytes.len() < crc.end || crc32fast::hash(&bytes[..crc.start]) != u32_at(bytes, crc.start) {
            return None;
        }
        let directory = || bytes[at::DIRECTORY].try_into().ok().map(DirectoryId);
        let next_sequence = if salted { u64_at(bytes, at::NEXT_SEQUENCE.start) } else { 0 };
        // Every number has one behind it.
        (next_sequence < u64::MAX).then(|| SegmentHeader {
            format,
            oldest_reader: u32_at(bytes, at::OLDEST.start),
            segment: SegmentId(u32_at(bytes, at::SEGMENT.start)),
            next_collection: CollectionId(u32_at(bytes, at::NEXT_COLLECTION.start)),
            next_document: DocumentId(u64_at(bytes, at::NEXT_DOCUMENT.start)),
            next_sequence,
            directory: if salted { directory() } else { None },
        })
    }
}

/// What every checksum of a segment begins with; none in formats 1 to 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Salt(Option<[u8; 8]>);

impl Salt {
    /// Of segments of formats 1 to 3.
    pub(super) const NONE: Salt = Salt(None);

    pub(super) fn of(directory: DirectoryId, segment: SegmentId) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"landmarkdb segment salt\0");
        hash.update(directory.0);
        hash.update(segment.0.to_le_bytes());
        let digest: [u8; 32] = hash.finalize().into();
        let mut salt = [0; 8];
        salt.copy_from_slice(&digest[..8]);
        Salt(Some(salt))
    }

    /// Where the first record of a segment begins.
    pub(super) fn first_record(self) -> u64 {
        let bytes = if self == Salt::NONE { UNSALTED_SEGMENT_HEADER_BYTES } else { SEGMENT_HEADER_BYTES };
        bytes as u64
    }

    fn hasher(self) -> crc32fast::Hasher {
        let mut hasher = crc32fast::Hasher::new();
        if let Some(salt) = &self.0 {
            hasher.update(salt);
        }
        hasher
    }

    pub(super) fn crc(self, bytes: &[u8]) -> u32 {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finalize()
    }
}

/// The sequence of a record of formats 1 to 3: later places are newer, and all are older than any group's number.
pub(super) fn sequence_of_place(segment: SegmentId, offset: u64) -> u64 {
    ((segment.0 as u64) << 40 | offset) & (SEQUENCE_FIRST - 1)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Collection = 1,
    Document = 2,
    Block = 3,
    Tombstone = 4,
    /// Ends a group.
    Group = 5,
    /// A part of what a document keeps for its model.
    State = 6,
}

impl Kind {
    /// Of what lies at a place of a document: a block, or a part of its state behind all blocks.
    pub(super) fn of_place(index: u32) -> Kind {
        if place::part_at(index).is_none() { Kind::Block } else { Kind::State }
    }

    /// Whether a record has a payload, which lies behind its header and is read only when it is asked for.
    pub(super) fn has_payload(self) -> bool {
        matches!(self, Kind::Block | Kind::State)
    }
}

/// Sizes of a record's parts. A block has all of them, a part of a state is one piece, everything else has only `meta`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parts {
    pub(super) meta_bytes: u32,
    pub(super) keys_bytes: u32,
    pub(super) piece_bytes: u32,
    pub(super) pieces: u32,
}

/// One part of a record; its number is mixed into its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Meta,
    Keys,
    Piece(u32),
}

impl Parts {
    /// Where a part begins in its record, and its length without checksum, in bytes.
    pub(super) fn span(&self, part: Part) -> (u64, usize) {
        let meta_at = RECORD_HEADER_BYTES as u64;
        let keys_at = meta_at + self.meta_bytes as u64 + CRC_BYTES as u64;
        let pieces_at = keys_at + self.keys_bytes as u64 + CRC_BYTES as u64;
        match part {
            Part::Meta => (meta_at, self.meta_bytes as usize),
            Part::Keys => (keys_at, self.keys_bytes as usize),
            Part::Piece(piece) => {
                let stride = self.piece_bytes as u64 + CRC_BYTES as u64;
                (pieces_at + piece as u64 * stride, self.piece_bytes as usize)
            }
        }
    }

    pub(super) fn record_bytes(&self) -> u64 {
        self.span(Part::Piece(self.pieces)).0
    }

    /// Whether its sizes add up to a number of bytes at all: what came from a disk may say anything.
    fn add_up(&self) -> bool {
        let stride = self.piece_bytes as u64 + CRC_BYTES as u64;
        // The other parts are below 2^34 together.
        (self.pieces as u64).checked_mul(stride).is_some_and(|bytes| bytes < 1 << 62)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Part> {
        [Part::Meta, Part::Keys].into_iter().chain((0..self.pieces).map(Part::Piece))
    }
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordHeader {
    pub(super) kind: Kind,
    /// Last of its group.
    pub(super) commit: bool,
    pub(super) sequence: u64,
    pub(super) collection: CollectionId,
    /// A place in a document (see [`place`]). Document 0, which no document has, for a collection.
    pub(super) block: BlockId,
    pub(super) tokens: u32,
    pub(super) parts: Parts,
}

impl RecordHeader {
    pub(super) fn encode(&self, salt: Salt) -> [u8; RECORD_HEADER_BYTES] {
        use record_header as at;
        let mut bytes = [0; RECORD_HEADER_BYTES];
        bytes[at::MAGIC].copy_from_slice(&RECORD_MAGIC);
        bytes[at::FORMAT].copy_from_slice(&(FORMAT as u16).to_le_bytes());
        bytes[at::KIND] = self.kind as u8;
        bytes[at::FLAGS] = if self.commit { FLAG_COMMIT } else { 0 };
        bytes[at::COLLECTION].copy_from_slice(&self.collection.0.to_le_bytes());
        bytes[at::DOCUMENT].copy_from_slice(&self.block.document.0.to_le_bytes());
        bytes[at::INDEX].copy_from_slice(&self.block.index.to_le_bytes());
        bytes[at::TOKENS].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[at::META_BYTES].copy_from_slice(&self.parts.meta_bytes.to_le_bytes());
        bytes[at::KEYS_BYTES].copy_from_slice(&self.parts.keys_bytes.to_le_bytes());
        bytes[at::PIECE_BYTES].copy_from_slice(&self.parts.piece_bytes.to_le_bytes());
        bytes[at::PIECES].copy_from_slice(&self.parts.pieces.to_le_bytes());
        bytes[at::SEQUENCE].copy_from_slice(&self.sequence.to_le_bytes());
        let crc = salt.crc(&bytes[..at::CRC.start]);
        bytes[at::CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// What lies at `offset` of a segment; `None` if these bytes are no intact header of a record there.
    pub(super) fn check(
        bytes: &[u8; RECORD_HEADER_BYTES],
        salt: Salt,
        segment: SegmentId,
        offset: u64,
    ) -> Option<Self> {
        use record_header as at;
        if bytes[at::MAGIC] != RECORD_MAGIC || salt.crc(&bytes[..at::CRC.start]) != u32_at(bytes, at::CRC.start) {
            return None;
        }
        let kind = match bytes[at::KIND] {
            1 => Kind::Collection,
            2 => Kind::Document,
            3 => Kind::Block,
            4 => Kind::Tombstone,
            5 => Kind::Group,
            6 => Kind::State,
            _ => return None,
        };
        let parts = Parts {
            meta_bytes: u32_at(bytes, at::META_BYTES.start),
            keys_bytes: u32_at(bytes, at::KEYS_BYTES.start),
            piece_bytes: u32_at(bytes, at::PIECE_BYTES.start),
            pieces: u32_at(bytes, at::PIECES.start),
        };
        let unsalted = salt == Salt::NONE;
        let collection = CollectionId(u32_at(bytes, at::COLLECTION.start));
        let document = DocumentId(u64_at(bytes, at::DOCUMENT.start));
        let index = u32_at(bytes, at::INDEX.start);
        let is_in_place = !kind.has_payload() || kind == Kind::of_place(index);
        let is_one_of_ours = collection.0 < u32::MAX && document.0 < u64::MAX && is_in_place;
        (parts.add_up() && is_one_of_ours).then(|| RecordHeader {
            kind,
            commit: bytes[at::FLAGS] & FLAG_COMMIT != 0,
            sequence: if unsalted { sequence_of_place(segment, offset) } else { u64_at(bytes, at::SEQUENCE.start) },
            collection,
            block: BlockId { document, index },
            tokens: u32_at(bytes, at::TOKENS.start),
            parts,
        })
    }

    pub(super) fn stamp(&self, salt: Salt) -> Stamp {
        Stamp { salt, sequence: self.sequence, block: self.block }
    }

    /// The first damaged part of a record that lies in `record`, header included.
    pub(super) fn damaged_part(&self, salt: Salt, record: &[u8]) -> Option<Part> {
        let stamp = self.stamp(salt);
        self.parts.iter().find(|&part| {
            let (at, len) = self.parts.span(part);
            stamp.checked(part, &record[at as usize..at as usize + len + CRC_BYTES]).is_none()
        })
    }
}

/// What the checksums of a record's parts cover besides their bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) salt: Salt,
    pub(super) sequence: u64,
    pub(super) block: BlockId,
}

impl Stamp {
    /// Checksum of one part: salt and sequence, `(document, index, part)`, then the bytes.
    pub(super) fn crc(&self, part: Part, bytes: &[u8]) -> u32 {
        let number = match part {
            Part::Meta => 0,
            Part::Keys => 1,
            Part::Piece(piece) => 2 + piece as u64,
        };
        let mut hasher = self.salt.hasher();
        if self.salt != Salt::NONE {
            hasher.update(&self.sequence.to_le_bytes());
        }
        hasher.update(&self.block.document.0.to_le_bytes());
        hasher.update(&self.block.index.to_le_bytes());
        hasher.update(&number.to_le_bytes());
        hasher.update(bytes);
        hasher.finalize()
    }

    /// The part's bytes without the checksum behind them; `None` if it does not agree.
    pub(super) fn checked<'a>(&self, part: Part, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let (bytes, crc) = bytes.split_at_checked(bytes.len().checked_sub(CRC_BYTES)?)?;
        (self.crc(part, bytes) == u32_at(crc, 0)).then_some(bytes)
    }
}

/// Where a record lies, and enough of its header to read any part of it with one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Locator {
    pub(super) segment: SegmentId,
    pub(super) offset: u64,
    pub(super) sequence: u64,
    pub(super) tokens: u32,
    pub(super) parts: Parts,
}

impl Locator {
    pub(super) fn bytes(&self) -> u64 {
        self.parts.record_bytes()
    }

    /// Of two records of one thing the greater counts: the newer, and of copies the later.
    pub(super) fn age(&self) -> (u64, SegmentId, u64) {
        (self.sequence, self.segment, self.offset)
    }
}

impl DocumentEntry {
    /// Bytes of its record: the same for all numbers in it.
    pub(super) fn record_bytes(&self) -> u64 {
        small_record_bytes(&pack(self))
    }

    /// Gives the document this state, or none, in place of the one that it has.
    pub(super) fn set_state(&mut self, state: Option<KeptState>) {
        self.change(|manifest| manifest.state = state);
    }

    /// Gives the document this name in place of the one that it has.
    pub(super) fn set_name(&mut self, name: String) {
        self.change(|manifest| manifest.name = name);
    }

    /// Counts what the change adds to the records of the manifest and the state, or takes from them.
    fn change(&mut self, change: impl FnOnce(&mut Manifest)) {
        let bytes = |entry: &Self| entry.record_bytes() + entry.manifest.state.map_or(0, |state| state.bytes);
        let others = self.manifest.stored_bytes.saturating_sub(bytes(self));
        change(&mut self.manifest);
        self.manifest.stored_bytes = others + bytes(self);
    }
}

impl GroupEntry {
    pub(super) fn record_bytes(&self) -> u64 {
        small_record_bytes(&pack(self))
    }
}

fn small_record_bytes(meta: &[u8]) -> u64 {
    Parts { meta_bytes: meta.len() as u32, ..Parts::default() }.record_bytes()
}

/// What a record says, payload aside.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Collection(CollectionId, CollectionEntry),
    Document(DocumentEntry),
    /// Or, at another place, a part of a state.
    Block(BlockId),
    Tombstone(Tombstone),
    Group(GroupEntry),
}

impl Content {
    /// Reads what an intact header and its checked meta say; `None` if they make no sense.
    pub(super) fn decode(header: &RecordHeader, meta: &[u8]) -> Option<Self> {
        Some(match header.kind {
            Kind::Collection => Content::Collection(header.collection, CollectionEntry::decode(meta)?),
            Kind::Document => Content::Document(DocumentEntry::decode(meta)?),
            Kind::Block | Kind::State => Content::Block(header.block),
            Kind::Tombstone => Content::Tombstone(Tombstone::decode(meta)?),
            Kind::Group => Content::Group(GroupEntry::decode(meta)?),
        })
    }

    /// As a group names it; `None` for what it does not name.
    pub(super) fn named(&self, sequence: u64) -> Option<Named> {
        match self {
            Content::Collection(id, _) => Some(Named::Collection(*id, sequence)),
            Content::Document(entry) => Some(Named::Document(entry.manifest.id, sequence)),
            Content::Tombstone(tombstone) => Some(Named::Tombstone(tombstone.document, sequence)),
            Content::Block(_) | Content::Group(_) => None,
        }
    }
}

/// Meta of a block with T tokens: token ids `(T)` u32, text start u64, text offsets `(T)` u32, text.
pub(super) fn encode_meta(meta: &BlockMeta) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(meta_bytes(meta));
    bytes.extend(meta.token_ids.iter().flat_map(|id| id.to_le_bytes()));
    bytes.extend(meta.text_start.to_le_bytes());
    bytes.extend(meta.text_offsets.iter().flat_map(|offset| offset.to_le_bytes()));
    bytes.extend(&meta.text);
    bytes
}

pub(super) fn meta_bytes(meta: &BlockMeta) -> usize {
    4 * meta.token_ids.len() + 8 + 4 * meta.text_offsets.len() + meta.text.len()
}

/// `None` if the bytes are too short for that many tokens.
pub(super) fn decode_meta(tokens: u32, bytes: &[u8]) -> Option<BlockMeta> {
    let numbers = |bytes: &[u8]| bytes.chunks_exact(4).map(|b| u32_at(b, 0)).collect::<Vec<u32>>();
    let list_bytes = 4 * tokens as usize;
    let (token_ids, rest) = bytes.split_at_checked(list_bytes)?;
    let (text_start, rest) = rest.split_at_checked(8)?;
    let (text_offsets, text) = rest.split_at_checked(list_bytes)?;
    Some(BlockMeta {
        token_ids: numbers(token_ids),
        text_start: u64_at(text_start, 0),
        text: text.to_vec(),
        text_offsets: numbers(text_offsets),
    })
}

/// The caller has checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The caller has checked the length.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) as u64 | (u32_at(bytes, at + 4) as u64) << 32
}
