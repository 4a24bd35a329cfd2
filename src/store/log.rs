//! Writing groups of records to the end of a segment.

use super::document::BlockRecord;
use super::error::StoreError;
use super::handles::Segment;
use super::ledger::{Entry, Group};
use super::record::{
    CollectionEntry, Content, DocumentEntry, GroupEntry, Kind, Locator, Part, Parts, RecordHeader, Tombstone,
    encode_meta, pack,
};
use super::scan::Scanned;
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

    /// One part of the state of a document.
    pub(super) fn state_part(
        &mut self,
        collection: CollectionId,
        id: BlockId,
        bytes: &[u8],
        parts: Parts,
    ) -> Result<(), StoreError> {
        let (kind, commit, sequence) = (Kind::State, false, self.number);
        let header = RecordHeader { kind, commit, sequence, collection, block: id, tokens: 0, parts };
        self.begin(header, Content::Block(id))?;
        self.part(&header, Part::Meta, &[]);
        self.part(&header, Part::Keys, &[]);
        self.part(&header, Part::Piece(0), bytes);
        Ok(())
    }

    /// A record that lies elsewhere, with its own sequence; parts of it that are damaged stay damaged.
    pub(super) fn copy(&mut self, scanned: &Scanned, content: Content) -> Result<(), StoreError> {
        let header = RecordHeader { commit: false, ..scanned.header };
        if !header.kind.has_payload() {
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
