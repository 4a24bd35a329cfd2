//! Reading segments back without a catalog.

use super::error::StoreError;
use super::record::{CRC_BYTES, Content, Kind, Locator, Part, RECORD_HEADER_BYTES, RECORD_MAGIC, RecordHeader, Salt};
use super::segment::{SegmentFile, SegmentId};
use crate::types::{BlockId, CollectionId};

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
    /// Header included; empty for a block or a part of a state of a scan that passes over them.
    pub(super) record: Vec<u8>,
    /// Every part that was read agrees with its checksum.
    pub(super) whole: bool,
    salt: Salt,
}

impl Scanned {
    /// A block, or a part of a state, whose header is damaged or whose end is cut off, as the catalog knows it; `None` if no part of it can be read.
    pub(super) fn of_known(
        file: &dyn SegmentFile,
        salt: Salt,
        id: BlockId,
        collection: CollectionId,
        locator: &Locator,
    ) -> Result<Option<Self>, StoreError> {
        let len = file.len_bytes().map_err(StoreError::io("measure a segment"))?;
        let there = len.saturating_sub(locator.offset).min(locator.bytes());
        let mut record = vec![0; locator.bytes() as usize];
        if there > 0 {
            let read = file.read_at(locator.offset, &mut record[..there as usize]);
            read.map_err(StoreError::io("read a record"))?;
        }
        let &Locator { offset, sequence, tokens, parts, .. } = locator;
        let (kind, commit) = (Kind::of_place(id.index), false);
        let header = RecordHeader { kind, commit, sequence, collection, block: id, tokens, parts };
        let whole = header.damaged_part(salt, &record).is_none();
        let found = Scanned { header, offset, record, whole, salt };
        Ok(parts.iter().any(|part| found.part(part).is_some()).then_some(found))
    }

    /// The bytes of a part, if its checksum agrees.
    pub(super) fn part(&self, part: Part) -> Option<&[u8]> {
        let (at, len) = self.header.parts.span(part);
        let stored = &self.record[at as usize..at as usize + len + CRC_BYTES];
        self.header.stamp(self.salt).checked(part, stored)
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + self.header.parts.record_bytes()
    }

    /// `None` if its meta is damaged.
    pub(super) fn content(&self) -> Option<Content> {
        if self.header.kind.has_payload() {
            return Some(Content::Block(self.header.block));
        }
        if !self.whole {
            return None;
        }
        let (at, len) = self.header.parts.span(Part::Meta);
        Content::decode(&self.header, &self.record[at as usize..at as usize + len])
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

    /// Reads of blocks, and of parts of states, only the headers: damage behind them is found when the block is read.
    pub(super) fn passing_over_blocks(self, passes_over_blocks: bool) -> Self {
        Scan { passes_over_blocks, ..self }
    }

    /// Whether a record with this header lies where it begins, without a look behind the header.
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
        if header.kind.has_payload() && self.passes_over_blocks {
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
