//! Writing groups of records to the end of a segment, and reading segments back without a catalog.

use super::error::StoreError;
use super::ledger::{Entry, Group};
use super::record::{
    CollectionEntry, Content, DocumentEntry, Kind, Locator, Part, Parts, RECORD_HEADER_BYTES, RECORD_MAGIC,
    RecordHeader, SEGMENT_HEADER_BYTES, SegmentHeader, Tombstone, encode_meta, pack, part_crc,
};
use super::segment::{SegmentFile, SegmentId};
use super::{BlockRecord, record};
use crate::types::{BlockId, CollectionId, DocumentId};

/// Records are gathered to about this much per write call.
const WRITE_BYTES: usize = 8 << 20;

/// Writes one group. Nothing of it counts before [`GroupWriter::finish`].
pub(super) struct GroupWriter<'a> {
    file: &'a dyn SegmentFile,
    segment: SegmentId,
    /// Where `buffer` goes.
    offset: u64,
    buffer: Vec<u8>,
    /// The record begun last, always whole in `buffer`, and where it begins there.
    last: Option<(usize, RecordHeader)>,
    entries: Vec<Entry>,
}

impl<'a> GroupWriter<'a> {
    pub(super) fn new(file: &'a dyn SegmentFile, segment: SegmentId, offset: u64) -> Self {
        GroupWriter { file, segment, offset, buffer: Vec::new(), last: None, entries: Vec::new() }
    }

    pub(super) fn collection(&mut self, id: CollectionId, entry: &CollectionEntry) -> Result<(), StoreError> {
        let block = BlockId { document: DocumentId(0), index: 0 };
        self.small(Kind::Collection, id, block, &pack(entry), Content::Collection(id, entry.clone()))
    }

    pub(super) fn document(&mut self, entry: DocumentEntry) -> Result<(), StoreError> {
        let block = BlockId { document: entry.manifest.id, index: 0 };
        self.small(Kind::Document, entry.manifest.collection, block, &pack(&entry), Content::Document(entry))
    }

    pub(super) fn tombstone(&mut self, collection: CollectionId, tombstone: Tombstone) -> Result<(), StoreError> {
        let block = BlockId { document: tombstone.document, index: 0 };
        self.small(Kind::Tombstone, collection, block, &pack(&tombstone), Content::Tombstone(tombstone))
    }

    /// The caller has checked the block against its collection; `parts` are its sizes.
    pub(super) fn block(
        &mut self,
        collection: CollectionId,
        id: BlockId,
        block: &BlockRecord,
        parts: Parts,
    ) -> Result<(), StoreError> {
        let tokens = block.meta.token_ids.len() as u32;
        let header = RecordHeader { kind: Kind::Block, commit: false, collection, block: id, tokens, parts };
        self.begin(header, Content::Block(id))?;
        self.part(id, Part::Meta, &encode_meta(&block.meta));
        self.part(id, Part::Keys, &block.keys);
        for (number, piece) in block.pieces.chunks_exact(parts.piece_bytes as usize).enumerate() {
            self.part(id, Part::Piece(number as u32), piece);
        }
        Ok(())
    }

    /// A record that lies elsewhere, with all its bytes.
    pub(super) fn copy(&mut self, header: RecordHeader, content: Content, record: &[u8]) -> Result<(), StoreError> {
        self.begin(RecordHeader { commit: false, ..header }, content)?;
        self.buffer.extend_from_slice(&record[RECORD_HEADER_BYTES..]);
        Ok(())
    }

    /// Marks the last record as the group's commit and makes all of it durable.
    pub(super) fn finish(mut self) -> Result<Group, StoreError> {
        if let Some((at, header)) = self.last {
            let header = RecordHeader { commit: true, ..header };
            self.buffer[at..at + RECORD_HEADER_BYTES].copy_from_slice(&header.encode());
        }
        self.write_out()?;
        self.file.sync().map_err(StoreError::io("make a segment durable"))?;
        Ok(Group { segment: self.segment, end: self.offset, entries: self.entries })
    }

    fn small(
        &mut self,
        kind: Kind,
        collection: CollectionId,
        block: BlockId,
        meta: &[u8],
        content: Content,
    ) -> Result<(), StoreError> {
        let parts = Parts { meta_bytes: meta.len() as u32, ..Parts::default() };
        self.begin(RecordHeader { kind, commit: false, collection, block, tokens: 0, parts }, content)?;
        self.part(block, Part::Meta, meta);
        self.part(block, Part::Keys, &[]);
        Ok(())
    }

    fn begin(&mut self, header: RecordHeader, content: Content) -> Result<(), StoreError> {
        if self.buffer.len() >= WRITE_BYTES {
            self.write_out()?;
        }
        let offset = self.offset + self.buffer.len() as u64;
        let locator = Locator { segment: self.segment, offset, tokens: header.tokens, parts: header.parts };
        self.entries.push(Entry { locator, content });
        self.last = Some((self.buffer.len(), header));
        self.buffer.extend_from_slice(&header.encode());
        Ok(())
    }

    fn part(&mut self, block: BlockId, part: Part, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.buffer.extend_from_slice(&part_crc(block, part, bytes).to_le_bytes());
    }

    fn write_out(&mut self) -> Result<(), StoreError> {
        self.file.write_at(self.offset, &self.buffer).map_err(StoreError::io("write to a segment"))?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// The header of a segment: `None` if the file is too short for one or holds something else.
pub(super) fn read_segment_header(file: &dyn SegmentFile) -> Result<Option<SegmentHeader>, StoreError> {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    if file.len_bytes().map_err(StoreError::io("measure a segment"))? < bytes.len() as u64 {
        return Ok(None);
    }
    file.read_at(0, &mut bytes).map_err(StoreError::io("read a segment header"))?;
    let Some(header) = SegmentHeader::check(&bytes) else { return Ok(None) };
    if header.oldest_reader > record::FORMAT {
        return Err(StoreError::UnsupportedFormat {
            segment: header.segment.0,
            oldest: header.oldest_reader,
            ours: record::FORMAT,
        });
    }
    Ok(Some(header))
}

/// What lies at a place in a segment.
pub(super) enum Item {
    Record(Scanned),
    /// Bytes that are no record, up to the next intact record header.
    Gap {
        from: u64,
        to: u64,
    },
}

/// A record with an intact header.
pub(super) struct Scanned {
    pub(super) header: RecordHeader,
    pub(super) offset: u64,
    /// Header included.
    pub(super) record: Vec<u8>,
    /// Every part agrees with its checksum.
    pub(super) whole: bool,
}

impl Scanned {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.record.len() as u64
    }

    /// `None` if its meta is damaged.
    pub(super) fn content(&self) -> Option<Content> {
        if self.header.kind != Kind::Block && !self.whole {
            return None;
        }
        let (at, len) = self.header.parts.span(Part::Meta);
        Content::decode(&self.header, &self.record[at as usize..at as usize + len])
    }

    pub(super) fn locator(&self, segment: SegmentId) -> Locator {
        Locator { segment, offset: self.offset, tokens: self.header.tokens, parts: self.header.parts }
    }
}

/// Walks the records in bytes `at..end` of a segment; `at` is where a record begins.
pub(super) struct Scan<'a> {
    file: &'a dyn SegmentFile,
    at: u64,
    end: u64,
}

impl<'a> Scan<'a> {
    pub(super) fn new(file: &'a dyn SegmentFile, at: u64, end: u64) -> Self {
        Scan { file, at, end }
    }

    fn header_at(&self, at: u64) -> Result<Option<RecordHeader>, StoreError> {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        if at + bytes.len() as u64 > self.end {
            return Ok(None);
        }
        self.file.read_at(at, &mut bytes).map_err(StoreError::io("read a record header"))?;
        Ok(RecordHeader::check(&bytes).filter(|header| header.parts.record_bytes() <= self.end - at))
    }

    /// The first intact record header at or after `at`, or the end.
    fn next_header(&self, mut at: u64) -> Result<u64, StoreError> {
        const WINDOW_BYTES: u64 = 1 << 16;
        let mut window = Vec::new();
        while at + RECORD_HEADER_BYTES as u64 <= self.end {
            window.resize(WINDOW_BYTES.min(self.end - at) as usize, 0);
            self.file.read_at(at, &mut window).map_err(StoreError::io("read a segment"))?;
            for (step, bytes) in window.windows(RECORD_MAGIC.len()).enumerate() {
                if bytes == RECORD_MAGIC && self.header_at(at + step as u64)?.is_some() {
                    return Ok(at + step as u64);
                }
            }
            at += (window.len() - (RECORD_MAGIC.len() - 1)) as u64;
        }
        Ok(self.end)
    }

    fn step(&mut self) -> Result<Item, StoreError> {
        let from = self.at;
        let Some(header) = self.header_at(from)? else {
            self.at = self.next_header(from + 1)?;
            return Ok(Item::Gap { from, to: self.at });
        };
        // Bounded by the file's own length, see `header_at`.
        let mut record = vec![0; header.parts.record_bytes() as usize];
        self.file.read_at(from, &mut record).map_err(StoreError::io("read a record"))?;
        self.at = from + record.len() as u64;
        let whole = header.damaged_part(&record).is_none();
        Ok(Item::Record(Scanned { header, offset: from, record, whole }))
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Item, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let item = self.step();
        if item.is_err() {
            self.at = self.end;
        }
        Some(item)
    }
}
