//! Opening: what the log says beyond what the catalog knows is entered, and what a crash left half written is cut
//! off. The same code serves after a crash and when the catalog was deleted; only where it starts differs.
//!
//! Groups are made durable one at a time, so only the very last group of the last segment can be half written:
//! whatever is broken there was never acknowledged. Broken bytes anywhere else are damage: they are noted, logged,
//! reported by `verify`, and blocks they held are reported as damaged when read.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Writer;
use super::catalog::{self, Catalog, key};
use super::error::StoreError;
use super::ledger::{Damage, Entry, Group, Ledger, SegmentState};
use super::log::{Item, Scan, read_segment_header};
use super::record::{Content, FORMAT, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::segment::{Handles, SegmentFile, SegmentId};

/// Brings catalog and log together and finds where to write on.
pub(super) fn recover(handles: &Handles, catalog: &dyn Catalog, segment_bytes: u64) -> Result<Writer, StoreError> {
    let mut ledger = Ledger::load(catalog)?;
    finish_removals(handles, catalog, &mut ledger)?;

    let ids = handles.list().map_err(StoreError::io("list the segments"))?;
    report_missing(&ids, &ledger);
    refuse_unknown_old(&ids, &ledger)?;
    let mut news = Vec::new();
    let mut tail = None;
    for &id in &ids {
        let file = handles.get(id).map_err(StoreError::io("open a segment"))?;
        let last = Some(&id) == ids.last();
        let (end, found) = replay(&*file, id, last, &mut ledger)?;
        news.extend(found.map(|found| (id, end, found)));
        tail = last.then_some((id, file, end));
    }
    if !news.is_empty() {
        enter_all(catalog, &mut ledger, news)?;
        catalog.flush().map_err(StoreError::catalog("flush"))?;
    }

    let mut unmovable = BTreeSet::new();
    for pair in catalog::scan::<Damage>(catalog, key::DAMAGES) {
        unmovable.insert(pair?.1.segment);
    }
    // A last segment shorter than the catalog knows lost acknowledged bytes, and one of an older format says that older
    // builds can read it: leave both as they are.
    let goes_on = match &tail {
        Some((id, file, end)) => {
            ledger.segments.get(id).is_some_and(|state| state.bytes == *end)
                && read_segment_header(&**file)?.is_some_and(|header| header.format == FORMAT)
        }
        None => false,
    };
    match tail {
        Some((id, file, end)) if goes_on => {
            Ok(Writer { active: id, file, end, ledger, unmovable, segment_bytes, failed: false })
        }
        _ => {
            let (active, file) = begin_segment(handles, &mut ledger)?;
            let end = SEGMENT_HEADER_BYTES as u64;
            Ok(Writer { active, file, end, ledger, unmovable, segment_bytes, failed: false })
        }
    }
}

/// Creates the next segment, durable and with nothing but its header.
pub(super) fn begin_segment(
    handles: &Handles,
    ledger: &mut Ledger,
) -> Result<(SegmentId, Arc<dyn SegmentFile>), StoreError> {
    let id = SegmentId(ledger.segments.last_key_value().map_or(0, |(id, _)| id.0) + 1);
    let file = handles.create(id).map_err(StoreError::io("create a segment"))?;
    write_header(&*file, id, ledger)?;
    ledger.segments.insert(id, SegmentState::EMPTY);
    Ok((id, file))
}

fn write_header(file: &dyn SegmentFile, id: SegmentId, ledger: &Ledger) -> Result<(), StoreError> {
    let header = SegmentHeader::new(id, ledger.totals.next_collection, ledger.totals.next_document);
    file.write_at(0, &header.encode()).map_err(StoreError::io("write a segment header"))?;
    file.sync().map_err(StoreError::io("make a segment durable"))
}

/// A crash during compaction may leave segments that nothing refers to.
fn finish_removals(handles: &Handles, catalog: &dyn Catalog, ledger: &mut Ledger) -> Result<(), StoreError> {
    let retired: Vec<SegmentId> =
        ledger.segments.iter().filter(|(_, state)| state.retired).map(|(&id, _)| id).collect();
    for id in retired {
        match handles.remove(id) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StoreError::Io { step: "remove a segment", source: error });
            }
            _ => ledger.forget(catalog, id)?,
        }
    }
    Ok(())
}

fn report_missing(ids: &[SegmentId], ledger: &Ledger) {
    for id in ledger.segments.keys().filter(|id| !ids.contains(id)) {
        tracing::error!(segment = id.0, "a segment file is missing: its blocks are lost unless it is put back");
    }
}

/// A file that is older than what the catalog knows, and that it does not know, was put there by somebody. Entering
/// it now would let old records replace newer ones.
fn refuse_unknown_old(ids: &[SegmentId], ledger: &Ledger) -> Result<(), StoreError> {
    let Some(newest) = ledger.segments.keys().last() else { return Ok(()) };
    match ids.iter().find(|id| *id < newest && !ledger.segments.contains_key(id)) {
        None => Ok(()),
        Some(id) => Err(StoreError::Damaged {
            block: None,
            detail: format!(
                "segment {id} is not in the catalog though newer ones are: remove it, or delete the catalog folder to \
                 have it rebuilt from all segments"
            ),
        }),
    }
}

/// Enters what all segments say that the catalog does not know. Compaction leaves blocks in front of the manifest that
/// covers them, or in an older segment, so blocks come after everything else; and how far each segment was read is
/// noted last, so that a crash before that only reads it again.
fn enter_all(
    catalog: &dyn Catalog,
    ledger: &mut Ledger,
    mut news: Vec<(SegmentId, u64, Found)>,
) -> Result<(), StoreError> {
    let is_block = |entry: &mut Entry| matches!(entry.content, Content::Block(_));
    let mut blocks = Vec::new();
    for (segment, _, found) in &mut news {
        let mark = ledger.segments.get(segment).map_or(0, |state| state.bytes);
        for mut group in found.groups.drain(..) {
            let entries = group.entries.extract_if(.., is_block).collect();
            blocks.push(Group { segment: *segment, entries, end: mark });
            group.end = mark;
            ledger.enter(catalog, &group)?;
        }
    }
    for group in &blocks {
        ledger.enter(catalog, group)?;
    }
    for (segment, end, found) in &news {
        for damage in &found.damages {
            let Damage { offset, bytes, .. } = damage;
            tracing::error!(segment = segment.0, offset, bytes, "damaged bytes in a segment");
        }
        ledger.settle(catalog, *segment, *end, &found.damages)?;
    }
    Ok(())
}

/// Reads what lies beyond the catalog's knowledge of one segment. Returns where the segment ends now, and what was
/// found if there was anything to read.
fn replay(
    file: &dyn SegmentFile,
    id: SegmentId,
    last: bool,
    ledger: &mut Ledger,
) -> Result<(u64, Option<Found>), StoreError> {
    let len = file.len_bytes().map_err(StoreError::io("measure a segment"))?;
    let known = ledger.segments.get(&id).copied();
    if let Some(state) = known
        && len <= state.bytes
        && !last
    {
        return Ok((len, None));
    }
    let header = read_segment_header(file)?;
    if let Some(header) = &header {
        ledger.raise_ids(header.next_collection, header.next_document);
    }
    let state = *ledger.segments.entry(id).or_insert(SegmentState::EMPTY);
    if known.is_some() && len <= state.bytes {
        return Ok((len, None));
    }

    let mut found = read_groups(file, id, state.bytes, len)?;
    let mut end = len;
    if last && header.is_none() && known.is_none() && found.groups.is_empty() {
        // The crash came while the segment was being created.
        file.truncate(0).map_err(StoreError::io("cut a segment"))?;
        write_header(file, id, ledger)?;
        end = SEGMENT_HEADER_BYTES as u64;
        found.damages.clear();
    } else {
        if header.is_none() && known.is_none() {
            found.damages.push(Damage { segment: id, offset: 0, bytes: SEGMENT_HEADER_BYTES as u64, document: None });
        }
        if last && let Some(cut) = found.torn_from(state.bytes, len) {
            tracing::info!(segment = id.0, offset = cut, bytes = len - cut, "cutting off an unfinished append");
            found.groups.retain(|group| group.end <= cut);
            found.damages.retain(|damage| damage.offset < cut);
            file.truncate(cut).map_err(StoreError::io("cut a segment"))?;
            end = cut;
        }
    }
    // What the crash left may be in the page cache only, and is about to count.
    file.sync().map_err(StoreError::io("make a segment durable"))?;
    Ok((end, Some(found)))
}

/// What was read from a stretch of a segment.
#[derive(Default)]
struct Found {
    groups: Vec<Group>,
    /// What can be told apart no more.
    damages: Vec<Damage>,
    /// Where anything at all is broken, blocks with an intact header included: these are entered all the same, so
    /// that reading them names them.
    broken: Vec<u64>,
}

impl Found {
    /// Where the half-written end of the last segment, read in bytes `from..len`, begins, if it has one: after the
    /// last group if anything follows it, before that group if it is broken itself.
    fn torn_from(&self, from: u64, len: u64) -> Option<u64> {
        let mut ends = self.groups.iter().rev().map(|group| group.end).chain([from]);
        let last_end = ends.next().unwrap_or(from);
        if last_end < len {
            return Some(last_end);
        }
        let begin = ends.next().unwrap_or(from);
        self.broken.iter().any(|&offset| offset >= begin).then_some(begin)
    }
}

fn read_groups(file: &dyn SegmentFile, segment: SegmentId, from: u64, to: u64) -> Result<Found, StoreError> {
    let mut found = Found::default();
    let mut entries = Vec::new();
    for item in Scan::new(file, from, to) {
        match item? {
            Item::Gap { from, to } => {
                found.broken.push(from);
                found.damages.push(Damage { segment, offset: from, bytes: to - from, document: None });
            }
            Item::Record(scanned) => {
                if !scanned.whole {
                    found.broken.push(scanned.offset);
                }
                match scanned.content() {
                    Some(content) => entries.push(Entry { locator: scanned.locator(segment), content }),
                    None => found.damages.push(Damage {
                        segment,
                        offset: scanned.offset,
                        bytes: scanned.record.len() as u64,
                        document: Some(scanned.header.block.document),
                    }),
                }
                if scanned.header.commit {
                    found.groups.push(Group { segment, entries: std::mem::take(&mut entries), end: scanned.end() });
                }
            }
        }
    }
    Ok(found)
}
