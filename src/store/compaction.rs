//! Giving space back: the live records of the emptiest segment are copied to the end of the log as ordinary groups,
//! then its file is removed. A crash between any two steps leaves records twice at worst, and the later copy counts.

use super::catalog::{self, Catalog, key};
use super::error::StoreError;
use super::ledger::{Entry, SegmentState};
use super::log::{Item, Scanned};
use super::loss;
use super::record::{CollectionEntry, Content, DocumentEntry, Locator, SEGMENT_HEADER_BYTES, Tombstone};
use super::recovery::begin_segment;
use super::segment::{Segment, SegmentId};
use super::{Store, Writer};
use crate::limits;
use crate::types::{BlockId, DocumentId};

/// Records that are copied in one group at most, so that the record which ends the group can name them all.
const GROUP_RECORDS: usize = 2048;

/// What one segment holds that is still needed.
struct Remains {
    /// The records to copy.
    live: Vec<Locator>,
    /// Tombstones of documents that have no record left anywhere else.
    dropped: Vec<DocumentId>,
}

impl Store {
    /// Closes the active segment if `bytes` more would overfill it, and gives space back at this occasion.
    pub(super) fn make_room(&self, writer: &mut Writer, bytes: u64) -> Result<(), StoreError> {
        if writer.end > SEGMENT_HEADER_BYTES as u64 && writer.end + bytes > writer.sizes.segment_bytes {
            self.roll(writer)?;
            self.compact(writer)?;
        }
        Ok(())
    }

    /// Closes the active segment and begins the next.
    fn roll(&self, writer: &mut Writer) -> Result<(), StoreError> {
        // Bounds what has to be read again after a crash to one segment.
        self.catalog.flush().map_err(StoreError::catalog("flush"))?;
        writer.active = begin_segment(&self.handles, &mut writer.ledger)?;
        writer.end = SEGMENT_HEADER_BYTES as u64;
        Ok(())
    }

    /// Empties segments until stored bytes are within `limits::SPACE_PERCENT_MAX` of the live ones. Each round turns
    /// the dead bytes of one segment into nothing, so it ends.
    pub(super) fn compact(&self, writer: &mut Writer) -> Result<(), StoreError> {
        while writer.has_much_dead() {
            let Some(victim) = writer.emptiest() else { return Ok(()) };
            if victim == writer.active.id {
                self.roll(writer)?;
            }
            match self.remains(writer, victim)? {
                Some(remains) => {
                    self.move_live(writer, victim, &remains.live)?;
                    self.remove(writer, victim, &remains.dropped)?;
                }
                None => {
                    tracing::warn!(segment = victim.0, "a damaged segment is kept as it is: run verify");
                    writer.unmovable.insert(victim);
                }
            }
        }
        Ok(())
    }

    /// `None` if not every live byte of the segment can be read back, or if it holds something of which the catalog cannot
    /// tell that it is not needed: such a segment is left for repair.
    fn remains(&self, writer: &Writer, victim: SegmentId) -> Result<Option<Remains>, StoreError> {
        let Some(state) = writer.ledger.segments.get(&victim) else { return Ok(None) };
        let segment = match self.handles.get(victim) {
            Err(StoreError::Foreign { .. }) => return Ok(None),
            Err(error) if error.is_missing() => return Ok(None),
            segment => segment?,
        };
        let end = state.bytes.min(segment.len_bytes()?);
        let mut remains = Remains { live: Vec::new(), dropped: Vec::new() };
        let mut found_bytes = 0;
        for item in segment.scan(segment.salt.first_record(), end) {
            let Item::Record(scanned) = item? else { return Ok(None) };
            let locator = scanned.locator(victim);
            let Some(content) = scanned.content() else { continue };
            if current(&*self.catalog, &content)? != Some(locator) {
                if !loss::is_superseded(&*self.catalog, &Entry { locator, content })? {
                    return Ok(None);
                }
                continue;
            }
            if !scanned.whole {
                return Ok(None);
            }
            found_bytes += locator.bytes();
            match content {
                Content::Tombstone(tombstone) if !needed(writer, victim, &tombstone) => {
                    remains.dropped.push(tombstone.document);
                }
                _ => remains.live.push(locator),
            }
        }
        Ok((found_bytes == state.live_bytes).then_some(remains))
    }

    fn move_live(&self, writer: &mut Writer, victim: SegmentId, locators: &[Locator]) -> Result<(), StoreError> {
        let segment = self.handles.get(victim)?;
        let mut rest = locators;
        while !rest.is_empty() {
            let mut bytes = 0;
            let full = rest.iter().enumerate().position(|(count, locator)| {
                bytes += locator.bytes();
                bytes >= writer.sizes.group_bytes || count + 1 == GROUP_RECORDS
            });
            let (now, later) = rest.split_at(full.map_or(rest.len(), |position| position + 1));
            if writer.end > SEGMENT_HEADER_BYTES as u64 && writer.end + bytes > writer.sizes.segment_bytes {
                self.roll(writer)?;
            }
            self.commit(writer, |group| {
                for locator in now {
                    let (scanned, content) = reread(&segment, locator)?;
                    group.copy(&scanned, self.with_tail_named(content)?)?;
                }
                Ok(())
            })?;
            rest = later;
        }
        Ok(())
    }

    /// Manifests of formats 1 to 3 did not name their tails.
    fn with_tail_named(&self, content: Content) -> Result<Content, StoreError> {
        let Content::Document(mut entry) = content else { return Ok(content) };
        if entry.tail_sequence == 0 && entry.manifest.tail_tokens > 0 {
            let tail = BlockId { document: entry.manifest.id, index: entry.manifest.blocks };
            let found = catalog::get::<Locator>(&*self.catalog, &key::block(tail))?;
            entry.tail_sequence = found.map_or(0, |locator| locator.sequence);
        }
        Ok(Content::Document(entry))
    }

    fn remove(&self, writer: &mut Writer, victim: SegmentId, dropped: &[DocumentId]) -> Result<(), StoreError> {
        writer.ledger.retire(&*self.catalog, victim, dropped)?;
        // A catalog that fell back to before this would look for the removed file.
        self.catalog.flush().map_err(StoreError::catalog("flush"))?;
        self.handles.remove(victim)?;
        writer.ledger.forget(&*self.catalog, victim)
    }
}

impl Writer {
    /// Whether dead bytes exceed their share. Those in damaged segments do not count, for nothing can be done about them.
    fn has_much_dead(&self) -> bool {
        let movable = self.ledger.segments.iter().filter(|(id, _)| !self.unmovable.contains(id));
        let (mut bytes, mut dead) = (0, 0);
        for (_, state) in movable {
            bytes += state.bytes;
            dead += state.dead_bytes();
        }
        bytes * 100 > (bytes - dead) * limits::SPACE_PERCENT_MAX
    }

    /// The segment with the smallest live share among those with anything dead.
    fn emptiest(&self) -> Option<SegmentId> {
        let movable = |(id, state): &(&SegmentId, &SegmentState)| !state.retired && !self.unmovable.contains(id);
        let candidates = self.ledger.segments.iter().filter(|(_, state)| state.dead_bytes() > 0).filter(movable);
        let share = |state: &SegmentState| state.dead_bytes() as f64 / state.bytes as f64;
        candidates.max_by(|(_, a), (_, b)| share(a).total_cmp(&share(b))).map(|(&id, _)| id)
    }
}

/// A record that was found whole a moment ago.
fn reread(segment: &Segment, locator: &Locator) -> Result<(Scanned, Content), StoreError> {
    if let Some(item) = segment.scan(locator.offset, locator.offset + locator.bytes()).next()
        && let Item::Record(scanned) = item?
        && scanned.whole
        && let Some(content) = scanned.content()
    {
        return Ok((scanned, content));
    }
    // As after a failed write: the group under way is not to be continued.
    let source = std::io::Error::other(format!("{locator:?} changed while it was copied"));
    Err(StoreError::Io { step: "copy a record", source })
}

/// Where the catalog says that this thing lies.
pub(super) fn current(catalog: &dyn Catalog, content: &Content) -> Result<Option<Locator>, StoreError> {
    Ok(match content {
        Content::Collection(id, _) => {
            catalog::get::<(Locator, CollectionEntry)>(catalog, &key::collection(*id))?.map(|(locator, _)| locator)
        }
        Content::Document(entry) => {
            catalog::get::<(Locator, DocumentEntry)>(catalog, &key::document(entry.manifest.id))?
                .map(|(locator, _)| locator)
        }
        Content::Tombstone(tombstone) => {
            catalog::get::<(Locator, Tombstone)>(catalog, &key::tombstone(tombstone.document))?
                .map(|(locator, _)| locator)
        }
        Content::Block(id) => catalog::get(catalog, &key::block(*id))?,
        Content::Group(_) => None,
    })
}

/// A tombstone is needed while any other segment may hold records of its document: rebuilding the catalog would
/// bring the document back.
fn needed(writer: &Writer, victim: SegmentId, tombstone: &Tombstone) -> bool {
    let range = tombstone.first_segment..=tombstone.last_segment;
    writer.ledger.segments.range(range).any(|(&id, _)| id != victim)
}
