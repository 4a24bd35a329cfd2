//! The format of a segment, as code. Little-endian, fixed width.
//!
//! ```text
//! segment = segment header, record*
//! record  = record header, meta, crc, keys, crc, (piece, crc)*
//! ```
//!
//! Every record says what it is, so the catalog can be rebuilt from segments alone. Records are written in groups;
//! the last of a group carries the commit flag, and a group counts only as a whole. The checksum of each part also
//! covers which block and which part it is, so that intact bytes in the wrong place are caught. Pieces have equal
//! sizes and their own checksums, so that one read at a computed offset gets and proves one piece.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::segment::SegmentId;
use super::{BlockMeta, Manifest};
use crate::shape::CollectionSpec;
use crate::types::{BlockId, CollectionId, DocumentId, Engine};

/// What this build writes. Raise it with every change of the format.
pub(super) const FORMAT: u32 = 3;
/// The oldest build that can read what this one writes.
const FORMAT_OLDEST_READER: u32 = 3;

pub(super) const CRC_BYTES: usize = 4;

mod segment_header {
    pub(super) const MAGIC: std::ops::Range<usize> = 0..8;
    pub(super) const FORMAT: std::ops::Range<usize> = MAGIC.end..MAGIC.end + 4;
    pub(super) const OLDEST: std::ops::Range<usize> = FORMAT.end..FORMAT.end + 4;
    pub(super) const SEGMENT: std::ops::Range<usize> = OLDEST.end..OLDEST.end + 4;
    pub(super) const NEXT_COLLECTION: std::ops::Range<usize> = SEGMENT.end..SEGMENT.end + 4;
    pub(super) const NEXT_DOCUMENT: std::ops::Range<usize> = NEXT_COLLECTION.end..NEXT_COLLECTION.end + 8;
    pub(super) const CRC: std::ops::Range<usize> = NEXT_DOCUMENT.end..NEXT_DOCUMENT.end + super::CRC_BYTES;
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
    /// Zero for now; whoever gives it a meaning raises the format.
    pub(super) const RESERVED: std::ops::Range<usize> = PIECES.end..PIECES.end + 16;
    pub(super) const CRC: std::ops::Range<usize> = RESERVED.end..RESERVED.end + super::CRC_BYTES;
}

pub(super) const SEGMENT_HEADER_BYTES: usize = segment_header::CRC.end;
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
}

impl SegmentHeader {
    pub(super) fn new(segment: SegmentId, next_collection: CollectionId, next_document: DocumentId) -> Self {
        SegmentHeader { format: FORMAT, oldest_reader: FORMAT_OLDEST_READER, segment, next_collection, next_document }
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
        let crc = crc32fast::hash(&bytes[..at::CRC.start]);
        bytes[at::CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` if these bytes are no intact header.
    pub(super) fn check(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Option<Self> {
        use segment_header as at;
        let intact = bytes[at::MAGIC] == SEGMENT_MAGIC
            && crc32fast::hash(&bytes[..at::CRC.start]) == u32_at(bytes, at::CRC.start);
        intact.then(|| SegmentHeader {
            format: u32_at(bytes, at::FORMAT.start),
            oldest_reader: u32_at(bytes, at::OLDEST.start),
            segment: SegmentId(u32_at(bytes, at::SEGMENT.start)),
            next_collection: CollectionId(u32_at(bytes, at::NEXT_COLLECTION.start)),
            next_document: DocumentId(u64_at(bytes, at::NEXT_DOCUMENT.start)),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Collection = 1,
    Document = 2,
    Block = 3,
    Tombstone = 4,
}

/// Sizes of a record's parts. Everything but a block has only `meta`.
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
    pub(super) collection: CollectionId,
    /// Document 0, which no document has, for a collection.
    pub(super) block: BlockId,
    pub(super) tokens: u32,
    pub(super) parts: Parts,
}

impl RecordHeader {
    pub(super) fn encode(&self) -> [u8; RECORD_HEADER_BYTES] {
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
        let crc = crc32fast::hash(&bytes[..at::CRC.start]);
        bytes[at::CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` if these bytes are no intact header.
    pub(super) fn check(bytes: &[u8; RECORD_HEADER_BYTES]) -> Option<Self> {
        use record_header as at;
        let intact = bytes[at::MAGIC] == RECORD_MAGIC
            && crc32fast::hash(&bytes[..at::CRC.start]) == u32_at(bytes, at::CRC.start);
        let kind = match bytes[at::KIND] {
            1 => Kind::Collection,
            2 => Kind::Document,
            3 => Kind::Block,
            4 => Kind::Tombstone,
            _ => return None,
        };
        intact.then(|| RecordHeader {
            kind,
            commit: bytes[at::FLAGS] & FLAG_COMMIT != 0,
            collection: CollectionId(u32_at(bytes, at::COLLECTION.start)),
            block: BlockId {
                document: DocumentId(u64_at(bytes, at::DOCUMENT.start)),
                index: u32_at(bytes, at::INDEX.start),
            },
            tokens: u32_at(bytes, at::TOKENS.start),
            parts: Parts {
                meta_bytes: u32_at(bytes, at::META_BYTES.start),
                keys_bytes: u32_at(bytes, at::KEYS_BYTES.start),
                piece_bytes: u32_at(bytes, at::PIECE_BYTES.start),
                pieces: u32_at(bytes, at::PIECES.start),
            },
        })
    }

    /// The first damaged part of a record that lies in `record`, header included.
    pub(super) fn damaged_part(&self, record: &[u8]) -> Option<Part> {
        self.parts.iter().find(|&part| {
            let (at, len) = self.parts.span(part);
            checked_part(self.block, part, &record[at as usize..at as usize + len + CRC_BYTES]).is_none()
        })
    }
}

/// Where a record lies, and enough of its header to read any part of it with one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Locator {
    pub(super) segment: SegmentId,
    pub(super) offset: u64,
    pub(super) tokens: u32,
    pub(super) parts: Parts,
}

impl Locator {
    pub(super) fn bytes(&self) -> u64 {
        self.parts.record_bytes()
    }
}

/// A collection as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionEntry {
    pub spec: CollectionSpec,
    pub engine: Engine,
}

impl CollectionEntry {
    /// Format 1 had no engine.
    fn decode(meta: &[u8]) -> Option<Self> {
        unpack(meta).or_else(|| Some(CollectionEntry { spec: unpack(meta)?, engine: Engine::default() }))
    }
}

/// A manifest as it is kept: what callers see, and what deletion needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DocumentEntry {
    pub(super) manifest: Manifest,
    /// No older segment holds records of this document.
    pub(super) first_segment: SegmentId,
    /// B of its collection.
    pub(super) block_tokens: u32,
}

impl DocumentEntry {
    pub(super) fn tokens(&self) -> u64 {
        self.manifest.blocks as u64 * self.block_tokens as u64 + self.manifest.tail_tokens as u64
    }

    /// Bytes of its record: the same for all numbers in it.
    pub(super) fn record_bytes(&self) -> u64 {
        Parts { meta_bytes: pack(self).len() as u32, ..Parts::default() }.record_bytes()
    }
}

/// A deleted document. Its records lie, if anywhere, in segments `first_segment..=last_segment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tombstone {
    pub(super) document: DocumentId,
    pub(super) first_segment: SegmentId,
    pub(super) last_segment: SegmentId,
}

/// What a record says, payload aside.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Collection(CollectionId, CollectionEntry),
    Document(DocumentEntry),
    Block(BlockId),
    Tombstone(Tombstone),
}

impl Content {
    /// Reads what an intact header and its checked meta say; `None` if they make no sense.
    pub(super) fn decode(header: &RecordHeader, meta: &[u8]) -> Option<Self> {
        Some(match header.kind {
            Kind::Collection => Content::Collection(header.collection, CollectionEntry::decode(meta)?),
            Kind::Document => Content::Document(unpack(meta)?),
            Kind::Block => Content::Block(header.block),
            Kind::Tombstone => Content::Tombstone(unpack(meta)?),
        })
    }
}

/// Checksum of one part: `(document, index, part)` first, then the bytes.
pub(super) fn part_crc(block: BlockId, part: Part, bytes: &[u8]) -> u32 {
    let number = match part {
        Part::Meta => 0,
        Part::Keys => 1,
        Part::Piece(piece) => 2 + piece as u64,
    };
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&block.document.0.to_le_bytes());
    hasher.update(&block.index.to_le_bytes());
    hasher.update(&number.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

/// The part's bytes without the checksum behind them; `None` if it does not agree.
pub(super) fn checked_part(block: BlockId, part: Part, bytes: &[u8]) -> Option<&[u8]> {
    let (bytes, crc) = bytes.split_at_checked(bytes.len().checked_sub(CRC_BYTES)?)?;
    (part_crc(block, part, bytes) == u32_at(crc, 0)).then_some(bytes)
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

/// Names and rope frequencies are the longest things in small records and stay far below this.
const SMALL_RECORD_BYTES_MAX: usize = 1 << 16;

fn small_record() -> impl bincode::config::Config {
    // Fixed width, so that a manifest's size does not depend on the numbers in it (it counts its own bytes).
    bincode::config::standard().with_fixed_int_encoding().with_limit::<SMALL_RECORD_BYTES_MAX>()
}

/// Encodes a small record. Fields may only be added together with a new format.
pub(super) fn pack<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, small_record()).expect("plain structs within the limit always encode")
}

pub(super) fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, small_record()).ok()?;
    (used == bytes.len()).then_some(value)
}

/// The caller has checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The caller has checked the length.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) as u64 | (u32_at(bytes, at + 4) as u64) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::spec;

    #[test]
    fn collections_of_format_1_have_the_engine_that_there_was() {
        let spec = spec("old");
        let entry = CollectionEntry::decode(&pack(&spec)).unwrap();
        assert_eq!(entry, CollectionEntry { spec: spec.clone(), engine: Engine::Flat });
        let now = CollectionEntry { spec, engine: Engine::Sq8 };
        assert_eq!(CollectionEntry::decode(&pack(&now)), Some(now.clone()));
        assert_eq!(CollectionEntry::decode(&pack(&now)[1..]), None);
    }
}
