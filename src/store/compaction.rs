//! Giving space back: the live records of the emptiest segment are copied to the end of the log as ordinary groups,
//! then its file is removed. A crash between any two steps leaves records twice at worst, and the later copy counts.

use super::catalog::{self, Catalog, key};
use super::error::StoreError;
use super::log::{Item, Scan, Scanned};
use super::record::{CollectionEntry, Content, DocumentEntry, Locator, SEGMENT_HEADER_BYTES, Tombstone};
use super::recovery::begin_segment;
use super::segment::{SegmentFile, SegmentId};
use super::{Store, Writer};
use crate::limits;
use crate::types::DocumentId;

/// Live records are copied in groups of about this much: what compaction holds in memory.
const GROUP_BYTES: u64 = 8 << 20;

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
        if writer.end > SEGMENT_HEADER_BYTES as u64 && writer.end + bytes > writer.segment_bytes {
            self.roll(writer)?;
            self.compact(writer)?;
        }
        Ok(())
    }

    /// Closes the active segment and begins the next.
    fn roll(&self, writer: &mut Writer) -> Result<(), StoreError> {
        // Bounds what has to be read again after a crash to one segment.
        self.catalog.flush().map_err(StoreError::catalog("flush"))?;
        let (active, file) = begin_segment(&self.handles, &mut writer.ledger)?;
        writer.active = active;
        writer.file = file;
        writer.end = SEGMENT_HEADER_BYTES as u64;
        Ok(())
    }

    /// Empties segments until stored bytes are within `limits::SPACE_PERCENT_MAX` of the live ones. Each round turns
    /// the dead bytes of one segment into nothing, so it ends.
    pub(super) fn compact(&self, writer: &mut Writer) -> Result<(), StoreError> {
        while writer.ledger.bytes() * 100 > writer.ledger.live_bytes() * limits::SPACE_PERCENT_MAX {
            let Some(victim) = writer.emptiest() else { return Ok(()) };
            if victim == writer.active {
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

    /// `None` if not every live byte of the segment can be read back: such a segment is left for repair.
    fn remains(&self, writer: &Writer, victim: SegmentId) -> Result<Option<Remains>, StoreError> {
        let Some(state) = writer.ledger.segments.get(&victim) else { return Ok(None) };
        let file = match self.handles.get(victim) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::Io { step: "open a segment", source: error }),
        };
        let end = state.bytes.min(file.len_bytes().map_err(StoreError::io("measure a segment"))?);
        let mut remains = Remains { live: Vec::new(), dropped: Vec::new() };
        let mut found_bytes = SEGMENT_HEADER_BYTES as u64;
        for item in Scan::new(&*file, SEGMENT_HEADER_BYTES as u64, end) {
            let Item::Record(scanned) = item? else { continue };
            let locator = scanned.locator(victim);
            let Some(content) = scanned.content().filter(|_| scanned.whole) else { continue };
            if current(&*self.catalog, &content)? != Some(locator) {
                continue;
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
        let file = self.handles.get(victim).map_err(StoreError::io("open a segment"))?;
        let mut rest = locators;
        while !rest.is_empty() {
            let mut bytes = 0;
            let full = rest.iter().position(|locator| {
                bytes += locator.bytes();
                bytes >= GROUP_BYTES
            });
            let (now, later) = rest.split_at(full.map_or(rest.len(), |position| position + 1));
            if writer.end > SEGMENT_HEADER_BYTES as u64 && writer.end + bytes > writer.segment_bytes {
                self.roll(writer)?;
            }
            self.commit(writer, |group| {
                for locator in now {
                    let (scanned, content) = reread(&*file, locator)?;
                    group.copy(scanned.header, content, &scanned.record)?;
                }
                Ok(())
            })?;
            rest = later;
        }
        Ok(())
    }

    fn remove(&self, writer: &mut Writer, victim: SegmentId, dropped: &[DocumentId]) -> Result<(), StoreError> {
        writer.ledger.retire(&*self.catalog, victim, dropped)?;
        // A catalog that fell back to before this would look for the removed file.
        self.catalog.flush().map_err(StoreError::catalog("flush"))?;
        self.handles.remove(victim).map_err(StoreError::io("remove a segment"))?;
        writer.ledger.forget(&*self.catalog, victim)
    }
}

impl Writer {
    /// The segment with the smallest live share among those with anything dead.
    fn emptiest(&self) -> Option<SegmentId> {
        let candidates = self
            .ledger
            .segments
            .iter()
            .filter(|(id, state)| state.live_bytes < state.bytes && !state.retired && !self.unmovable.contains(id));
        let share = |live: u64, bytes: u64| live as f64 / bytes as f64;
        candidates
            .min_by(|(_, a), (_, b)| share(a.live_bytes, a.bytes).total_cmp(&share(b.live_bytes, b.bytes)))
            .map(|(&id, _)| id)
    }
}

/// A record that was found whole a moment ago.
fn reread(file: &dyn SegmentFile, locator: &Locator) -> Result<(Scanned, Content), StoreError> {
    if let Some(item) = Scan::new(file, locator.offset, locator.offset + locator.bytes()).next()
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
fn current(catalog: &dyn Catalog, content: &Content) -> Result<Option<Locator>, StoreError> {
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
    })
}

/// A tombstone is needed while any other segment may hold records of its document: rebuilding the catalog would
/// bring the document back.
fn needed(writer: &Writer, victim: SegmentId, tombstone: &Tombstone) -> bool {
    let range = tombstone.first_segment..=tombstone.last_segment;
    writer.ledger.segments.range(range).any(|(&id, _)| id != victim)
}
