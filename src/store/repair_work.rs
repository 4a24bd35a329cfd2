//! What repair works on: the log and the catalog without a store over them, and all blocks that lie in the segments.

use std::collections::{BTreeMap, BTreeSet};

use super::catalog::Catalog;
use super::error::StoreError;
use super::handles::Handles;
use super::ledger::Entry;
use super::log::GroupWriter;
use super::place;
use super::record::{Content, Locator, SEGMENT_HEADER_BYTES, Salt};
use super::recovery::{begin_segment, following, read_records};
use super::scan::Item;
use super::segment::SegmentId;
use super::state::Writer;
use crate::types::{BlockId, CollectionId, DocumentId};

/// The log and the catalog while they are repaired.
pub(super) struct Work<'a> {
    pub(super) handles: &'a Handles,
    pub(super) catalog: &'a dyn Catalog,
    pub(super) writer: Writer,
}

/// All blocks that lie in the segments, by place, what is left of states, and which segments are damaged.
#[derive(Default)]
pub(super) struct Inventory {
    pub(super) blocks: BTreeMap<BlockId, Vec<Piece>>,
    /// The newest sequence of parts of a document's states.
    pub(super) states: BTreeMap<DocumentId, u64>,
    pub(super) damaged: BTreeSet<SegmentId>,
}

/// Where a block lies.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) locator: Locator,
    pub(super) collection: CollectionId,
}

impl Work<'_> {
    /// Writes one group of about so many bytes, makes it durable, and enters it in the catalog.
    pub(super) fn commit(
        &mut self,
        bytes: u64,
        fill: impl FnOnce(&mut GroupWriter<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let writer = &self.writer;
        if writer.end > SEGMENT_HEADER_BYTES as u64 && writer.end + bytes > writer.sizes.segment_bytes {
            self.roll()?;
        }
        let active = self.writer.active.clone();
        let mut group = GroupWriter::new(&active, self.writer.ledger.totals.next_sequence, self.writer.end);
        fill(&mut group)?;
        let group = group.finish()?;
        self.writer.end = group.end;
        self.writer.ledger.enter(self.catalog, &group)
    }

    pub(super) fn roll(&mut self) -> Result<(), StoreError> {
        // One that knows less than the new segment's header says passes for one that has fallen back, and what only it
        // knows would be lost if repair were stopped here.
        self.catalog.flush().map_err(StoreError::catalog("flush"))?;
        self.writer.active = begin_segment(self.handles, &mut self.writer.ledger)?;
        self.writer.end = SEGMENT_HEADER_BYTES as u64;
        Ok(())
    }

    /// Reads all segments whole.
    pub(super) fn inventory(&self) -> Result<Inventory, StoreError> {
        let mut inventory = Inventory::default();
        let ids = self.handles.list()?;
        for (at, &id) in ids.iter().enumerate() {
            let segment = match self.handles.get(id) {
                Err(StoreError::Foreign { .. }) => {
                    inventory.damaged.insert(id);
                    continue;
                }
                segment => segment?,
            };
            if segment.header.is_none() {
                inventory.damaged.insert(id);
            }
            // A segment cut at the border of a record has no broken byte, and its last groups are gone all the same.
            let next = ids.get(at + 1).and_then(|&next| following(self.handles, id, next));
            let mut found = read_records(&segment, segment.salt.first_record(), segment.len_bytes()?, false)?;
            let before = segment.header.and_then(|header| header.next_sequence.checked_sub(1));
            found.find_losses(segment.salt != Salt::NONE, before, next);
            if found.has_losses() {
                inventory.damaged.insert(id);
            }
            for item in segment.scan(segment.salt.first_record(), segment.len_bytes()?) {
                let Item::Record(scanned) = item? else {
                    inventory.damaged.insert(id);
                    continue;
                };
                match scanned.content() {
                    Some(Content::Block(part)) if place::part_at(part.index).is_some() => {
                        let newest = inventory.states.entry(part.document).or_default();
                        *newest = scanned.header.sequence.max(*newest);
                    }
                    Some(Content::Block(block)) => {
                        let (locator, collection) = (scanned.locator(id), scanned.header.collection);
                        inventory.blocks.entry(block).or_default().push(Piece { locator, collection });
                    }
                    Some(_) => {}
                    None => drop(inventory.damaged.insert(id)),
                }
            }
        }
        Ok(inventory)
    }

    /// Enters blocks that a new manifest covers.
    pub(super) fn enter_blocks(&mut self, blocks: &[(BlockId, Locator)]) -> Result<(), StoreError> {
        let entry = |&(id, locator): &(BlockId, Locator)| Entry { locator, content: Content::Block(id) };
        let entries: Vec<Entry> = blocks.iter().map(entry).collect();
        self.writer.ledger.enter_found(self.catalog, &entries)
    }
}
