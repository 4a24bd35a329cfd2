//! Writing groups of records to the end of a segment, and reading segments back without a catalog.

use super::BlockRecord;
use super::error::StoreError;
use super::ledger::{Entry, Group};
use super::record::{
    CRC_BYTES, CollectionEntry, Content, DocumentEntry, GroupEntry, Kind, Locator, Part, Parts, RECORD_HEADER_BYTES,
    RECORD_MAGIC, RecordHeader, Salt, Tombstone, encode_meta, pack,
};
use super::segment::{Segment, SegmentFile, SegmentId};
use crate::types::{BlockId, CollectionId, DocumentId};

/// Records are gathered to about this much per write call.
const WRITE_BYTES: usize = 8 << 20;

/// Writes one group. Nothing of it counts before [`GroupWriter::finish`].
pub(super) struct GroupWriter<'a> {
    segment: &'a Segment,
    number: u64,
    /// Where `buffer` goes.
    offset: u64,
    buffer: Vec<u8>,
    entries: Vec<Entry>,
}

impl<'a> GroupWriter<'a> {
    pub(super) fn new(segment: &'a Segment, number: u64, offset: u64) -> Self {
        GroupWriter { segment, number, offset, buffer: Vec::new(), entries: Vec::new() }
    }

    /// The sequence of what is first written in this group.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn collection(&mut self, id: CollectionId, entry: &CollectionEntry) -> Result<(), StoreError> {
        self.small(Content::Collection(id, entry.clone()), id, self.number)
    }

    pub(super) fn document(&mut self, entry: DocumentEntry) -> Result<(), StoreError> {
        let collection = entry.manifest.collection;
        self.small(Content::Document(entry), collection, self.number)
    }

    pub(super) fn tombstone(&mut self, collection: CollectionId, tombstone: Tombstone) -> Result<(), StoreError> {
        self.small(Content::Tombstone(tombstone), collection, self.number)
    }

    /// The caller has checked the block against its collection; `parts` are its sizes.
    pub(super) fn block(
        &mut self,
        collection: CollectionId,
        id: BlockId,
        block: &BlockRecord,
        parts: Parts,
    ) -> Result<(), StoreError> {
        let (kind, commit, sequence) = (Kind::Block, false, self.number);
        let tokens = block.meta.token_ids.len() as u32;
        let header = RecordHeader { kind, commit, sequence, collection, block: id, tokens, parts };
        self.begin(header, Content::Block(id))?;
        self.part(&header, Part::Meta, &encode_meta(&block.meta));
        self.part(&header, Part::Keys, &block.keys);
        for (number, piece) in block.pieces.chunks_exact(parts.piece_bytes as usize).enumerate() {
            self.part(&header, Part::Piece(number as u32), piece);
        }
        Ok(())
    }

    /// A record that lies elsewhere, with its own sequence; parts of it that are damaged stay damaged.
    pub(super) fn copy(&mut self, scanned: &Scanned, content: Content) -> Result<(), StoreError> {
        let header = RecordHeader { commit: false, ..scanned.header };
        if header.kind != Kind::Block {
            return self.small(content, header.collection, header.sequence);
        }
        self.begin(header, content)?;
        for part in header.parts.iter() {
            let (at, len) = header.parts.span(part);
            self.part(&header, part, &scanned.record[at as usize..at as usize + len]);
            if scanned.part(part).is_none() {
                // What is damaged stays so: repair keeps what can still be read of a block.
                self.spoil_part();
            }
        }
        Ok(())
    }

    /// Ends the group with a record that names what is in it, and makes all of it durable.
    pub(super) fn finish(mut self) -> Result<Group, StoreError> {
        let named = |entry: &Entry| entry.content.named(entry.locator.sequence);
        let named = self.entries.iter().filter_map(named).collect();
        let end = Content::Group(GroupEntry { number: self.number, named });
        self.small(end, CollectionId(0), self.number)?;
        self.write_out()?;
        self.segment.file.sync().map_err(StoreError::io("make a segment durable"))?;
        Ok(Group { segment: self.segment.id, entries: self.entries, end: self.offset })
    }

    fn small(&mut self, content: Content, collection: CollectionId, sequence: u64) -> Result<(), StoreError> {
        let (kind, document, meta) = match &content {
            Content::Collection(_, entry) => (Kind::Collection, DocumentId(0), pack(entry)),
            Content::Document(entry) => (Kind::Document, entry.manifest.id, pack(entry)),
            Content::Tombstone(tombstone) => (Kind::Tombstone, tombstone.document, pack(tombstone)),
            Content::Group(entry) => (Kind::Group, DocumentId(0), pack(entry)),
            Content::Block(_) => unreachable!("blocks are not small"),
        };
        let parts = Parts { meta_bytes: meta.len() as u32, ..Parts::default() };
        let (commit, block) = (kind == Kind::Group, BlockId { document, index: 0 });
        let header = RecordHeader { kind, commit, sequence, collection, block, tokens: 0, parts };
        self.begin(header, content)?;
        self.part(&header, Part::Meta, &meta);
        self.part(&header, Part::Keys, &[]);
        Ok(())
    }

    fn begin(&mut self, header: RecordHeader, content: Content) -> Result<(), StoreError> {
        if self.buffer.len() >= WRITE_BYTES {
            self.write_out()?;
        }
        let offset = self.offset + self.buffer.len() as u64;
        let RecordHeader { sequence, tokens, parts, .. } = header;
        self.entries
            .push(Entry { locator: Locator { segment: self.segment.id, offset, sequence, tokens, parts }, content });
        self.buffer.extend_from_slice(&header.encode(self.segment.salt));
        Ok(())
    }

    fn part(&mut self, header: &RecordHeader, part: Part, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.buffer.extend_from_slice(&header.stamp(self.segment.salt).crc(part, bytes).to_le_bytes());
    }

    /// Makes the checksum of the part that was written last disagree.
    fn spoil_part(&mut self) {
        if let Some(last) = self.buffer.last_mut() {
            *last = !*last;
        }
    }

    fn write_out(&mut self) -> Result<(), StoreError> {
        self.segment.file.write_at(self.offset, &self.buffer).map_err(StoreError::io("write to a segment"))?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
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
    /// Header included; empty for a block of a scan that passes over them.
    pub(super) record: Vec<u8>,
    /// Every part that was read agrees with its checksum.
    pub(super) whole: bool,
    salt: Salt,
}

impl Scanned {
    /// A block whose header is damaged or whose end is cut off, as the catalog knows it; `None` if no part of it can be read.
    pub(super) fn of_known(
        segment: &Segment,
        id: BlockId,
        collection: CollectionId,
        locator: &Locator,
    ) -> Result<Option<Self>, StoreError> {
        let there = segment.len_bytes()?.saturating_sub(locator.offset).min(locator.bytes());
        let mut record = vec![0; locator.bytes() as usize];
        if there > 0 {
            let read = segment.file.read_at(locator.offset, &mut record[..there as usize]);
            read.map_err(StoreError::io("read a record"))?;
        }
        let &Locator { offset, sequence, tokens, parts, .. } = locator;
        let header = RecordHeader { kind: Kind::Block, commit: false, sequence, collection, block: id, tokens, parts };
        let (whole, salt) = (header.damaged_part(segment.salt, &record).is_none(), segment.salt);
        let found = Scanned { header, offset, record, whole, salt };
        Ok(parts.iter().any(|part| found.part(part).is_some()).then_some(found))
    }

    /// The bytes of a part, if its checksum agrees.
    fn part(&self, part: Part) -> Option<&[u8]> {
        let (at, len) = self.header.parts.span(part);
        let stored = &self.record[at as usize..at as usize + len + CRC_BYTES];
        self.header.stamp(self.salt).checked(part, stored)
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + self.header.parts.record_bytes()
    }

    /// `None` if its meta is damaged.
    pub(super) fn content(&self) -> Option<Content> {
        if self.header.kind == Kind::Block {
            return Some(Content::Block(self.header.block));
        }
        if !self.whole {
            return None;
        }
        let (at, len) = self.header.parts.span(Part::Meta);
        Content::decode(&self.header, self.salt, &self.record[at as usize..at as usize + len])
    }

    pub(super) fn locator(&self, segment: SegmentId) -> Locator {
        let RecordHeader { sequence, tokens, parts, .. } = self.header;
        Locator { segment, offset: self.offset, sequence, tokens, parts }
    }
}

/// Walks the records in bytes `at..end` of a segment; `at` is where a record begins.
pub(super) struct Scan<'a> {
    file: &'a dyn SegmentFile,
    segment: SegmentId,
    salt: Salt,
    at: u64,
    end: u64,
    passes_over_blocks: bool,
}

impl<'a> Scan<'a> {
    pub(super) fn new(file: &'a dyn SegmentFile, segment: SegmentId, salt: Salt, at: u64, end: u64) -> Self {
        Scan { file, segment, salt, at, end, passes_over_blocks: false }
    }

    /// Reads of blocks only the headers: what is wrong behind them is found by whoever reads the block.
    pub(super) fn passing_over_blocks(self, passes_over_blocks: bool) -> Self {
        Scan { passes_over_blocks, ..self }
    }

    /// Whether a record with this header lies where it begins, whatever is behind the header.
    pub(super) fn begins_with(mut self, locator: &Locator) -> Result<bool, StoreError> {
        self.end = self.end.min(self.file.len_bytes().map_err(StoreError::io("measure a segment"))?);
        let header = self.header_at(self.at)?;
        Ok(header.is_some_and(|found| {
            (found.sequence, found.tokens, found.parts) == (locator.sequence, locator.tokens, locator.parts)
        }))
    }

    /// Whether a record begins in the first `bytes`. It may end behind them, but not behind the file.
    pub(super) fn any_record(mut self, bytes: u64) -> Result<bool, StoreError> {
        self.end = self.end.min(self.file.len_bytes().map_err(StoreError::io("measure a segment"))?);
        let until = self.end.min(self.at.saturating_add(bytes));
        Ok(self.next_header(self.at, until)? < until)
    }

    fn header_at(&self, at: u64) -> Result<Option<RecordHeader>, StoreError> {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        if at + bytes.len() as u64 > self.end {
            return Ok(None);
        }
        self.file.read_at(at, &mut bytes).map_err(StoreError::io("read a record header"))?;
        let header = RecordHeader::check(&bytes, self.salt, self.segment, at);
        Ok(header.filter(|header| header.parts.record_bytes() <= self.end - at))
    }

    /// The first intact record header at or after `at` and before `until`, or that.
    fn next_header(&self, mut at: u64, until: u64) -> Result<u64, StoreError> {
        const WINDOW_BYTES: u64 = 1 << 16;
        let mut window = Vec::new();
        while at < until && at + RECORD_HEADER_BYTES as u64 <= self.end {
            window.resize(WINDOW_BYTES.min(self.end - at) as usize, 0);
            self.file.read_at(at, &mut window).map_err(StoreError::io("read a segment"))?;
            for (step, bytes) in window.windows(RECORD_MAGIC.len()).enumerate() {
                let here = at + step as u64;
                if bytes == RECORD_MAGIC && here < until && self.header_at(here)?.is_some() {
                    return Ok(here);
                }
            }
            at += (window.len() - (RECORD_MAGIC.len() - 1)) as u64;
        }
        Ok(until)
    }

    fn step(&mut self) -> Result<Item, StoreError> {
        let from = self.at;
        let Some(header) = self.header_at(from)? else {
            self.at = self.next_header(from + 1, self.end)?;
            return Ok(Item::Gap { from, to: self.at });
        };
        self.at = from + header.parts.record_bytes();
        let (mut record, salt) = (Vec::new(), self.salt);
        if header.kind == Kind::Block && self.passes_over_blocks {
            return Ok(Item::Record(Scanned { header, offset: from, record, whole: true, salt }));
        }
        // Bounded by the file's own length, see `header_at`.
        record.resize(header.parts.record_bytes() as usize, 0);
        self.file.read_at(from, &mut record).map_err(StoreError::io("read a record"))?;
        let whole = header.damaged_part(salt, &record).is_none();
        Ok(Item::Record(Scanned { header, offset: from, record, whole, salt }))
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
