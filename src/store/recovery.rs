//! Opening: what the log says beyond what the catalog knows is entered, and what a crash left half written is set aside and
//! cut off. The same code serves after a crash and when the catalog was deleted; only where it starts differs.
//!
//! Groups are made durable one at a time, so only the very last group of the last segment can be half written.
//! Broken bytes anywhere else are damage: they are noted, logged, reported by `verify`, blocks they held are reported as
//! damaged when read, and documents of which they may have held a newer record are in doubt (see `loss`).

use std::collections::BTreeSet;
use std::sync::Arc;

use super::catalog::{self, Catalog, key};
use super::error::{StoreError, used_up};
use super::handles::{Handles, Segment};
use super::ledger::{Damage, Entry, Ledger, SegmentState};
use super::loss::{self, Loss};
use super::record::{Content, FORMAT, Kind, SEGMENT_HEADER_BYTES, Salt, SegmentHeader};
use super::scan::Item;
use super::segment::SegmentId;
use super::state::{Sizes, Writer};

/// Records that are entered in one batch.
const BATCH_RECORDS: usize = 4096;

/// Bytes that are read and written again at once.
const REWRITE_BYTES: u64 = 4 << 20;

/// Brings catalog and log together and finds where to write on.
pub(super) fn recover(handles: &Handles, catalog: &dyn Catalog, sizes: Sizes) -> Result<Writer, StoreError> {
    let mut ledger = Ledger::load(catalog, handles.folder().directory())?;
    let mut ids = handles.list()?;
    if has_fallen_back(handles, &ids, &ledger) {
        tracing::error!("the catalog is older than what was flushed: it is damaged, and is rebuilt");
        catalog::clear(catalog)?;
        ledger = Ledger::load(catalog, handles.folder().directory())?;
    }
    finish_removals(handles, catalog, &mut ledger)?;
    // The number of the last group that the catalog knows.
    let entered = ledger.totals.next_sequence - 1;

    ids = handles.list()?;
    report_missing(&ids, &ledger);
    refuse_unknown_old(handles, &mut ids, &ledger)?;
    let knows_nothing = ledger.segments.is_empty();
    let mut news = Vec::new();
    let mut tail = None;
    for (at, &id) in ids.iter().enumerate() {
        let segment = match handles.get(id) {
            Err(error @ StoreError::Foreign { .. }) => {
                tracing::error!(%error, "a segment is not read");
                // The one in whose place it lies may have held anything.
                let losses = vec![Loss::Any { before: u64::MAX }];
                news.extend(knows_nothing.then_some((id, 0, Found { losses, ..Found::default() })));
                continue;
            }
            segment => segment?,
        };
        let next = match ids.get(at + 1) {
            None => Next::Last,
            Some(&next) => Next::Segment(following(handles, id, next)),
        };
        if remove_unborn(handles, &segment, next, &ledger)? {
            tail = None;
            continue;
        }
        let (end, found) = replay(handles, &segment, next, entered, &mut ledger)?;
        news.extend(found.map(|found| (id, end, found)));
        tail = (next == Next::Last).then_some((segment, end));
    }
    if !news.is_empty() {
        enter_all(catalog, &mut ledger, &news)?;
        catalog.flush().map_err(StoreError::catalog("flush"))?;
    }

    // A last segment shorter than the catalog knows lost acknowledged bytes, and one of an older format says that older
    // builds can read it: leave both as they are. Of one with damage the last group would pass for a torn end when the
    // catalog is rebuilt, now that what followed it is cut off: with a segment behind it, it does not.
    let goes_on = |(segment, end): &(Arc<Segment>, u64)| {
        let whole = ledger.segments.get(&segment.id).is_some_and(|state| state.bytes == *end);
        let is_broken = news.iter().any(|(id, _, found)| *id == segment.id && !found.broken.is_empty());
        whole && !is_broken && segment.header.is_some_and(|header| header.format == FORMAT)
    };
    let (active, end) = match tail.filter(goes_on) {
        Some(tail) => tail,
        None => (begin_segment(handles, &mut ledger)?, SEGMENT_HEADER_BYTES as u64),
    };
    let unmovable = damaged_segments(catalog)?;
    Ok(Writer {
        active,
        end,
        ledger,
        unmovable,
        sizes,
        victim: None,
        may_have_much_dead: false,
        end_is_known: true,
        readers_wait_until: None,
    })
}

pub(super) fn damaged_segments(catalog: &dyn Catalog) -> Result<BTreeSet<SegmentId>, StoreError> {
    catalog::scan::<Damage>(catalog, key::DAMAGES).map(|pair| Ok(pair?.1.segment)).collect()
}

/// A catalog is flushed before a segment is begun, so it knows all groups below the first of any segment. sled, which takes a
/// damaged page for the torn end of its own log, may come up with an older one: documents that were deleted since, with
/// all their records, would be there again.
fn has_fallen_back(handles: &Handles, ids: &[SegmentId], ledger: &Ledger) -> bool {
    let first = |id: &SegmentId| handles.get(*id).ok()?.header.map(|header| header.next_sequence);
    // One that knows nothing was deleted, or is new.
    !ledger.segments.is_empty()
        && ids.iter().filter_map(first).max().is_some_and(|first| ledger.totals.next_sequence < first)
}

/// Creates the next segment, durable and with nothing but its header.
pub(super) fn begin_segment(handles: &Handles, ledger: &mut Ledger) -> Result<Arc<Segment>, StoreError> {
    let known = ledger.segments.last_key_value().map_or(0, |(id, _)| id.0);
    let newest = handles.list()?.last().map_or(0, |id| id.0).max(known);
    let id = SegmentId(newest.checked_add(1).ok_or_else(|| used_up("number of a segment"))?);
    let totals = &ledger.totals;
    let (directory, next) = (handles.folder().directory(), totals.next_sequence);
    let segment =
        handles.create(SegmentHeader::new(id, directory, totals.next_collection, totals.next_document, next))?;
    ledger.segments.insert(id, SegmentState::empty(SEGMENT_HEADER_BYTES as u64));
    Ok(segment)
}

/// A crash during compaction may leave segments that nothing refers to.
fn finish_removals(handles: &Handles, catalog: &dyn Catalog, ledger: &mut Ledger) -> Result<(), StoreError> {
    let retired: Vec<SegmentId> =
        ledger.segments.iter().filter(|(_, state)| state.retired).map(|(&id, _)| id).collect();
    if !retired.is_empty() {
        // The process may have died before this was durable: a catalog that fell back would look for the files.
        catalog.flush().map_err(StoreError::catalog("flush"))?;
    }
    for id in retired {
        handles.remove(id)?;
        ledger.forget(catalog, id)?;
    }
    Ok(())
}

fn report_missing(ids: &[SegmentId], ledger: &Ledger) {
    for id in ledger.segments.keys().filter(|id| !ids.contains(id)) {
        tracing::error!(segment = id.0, "a segment file is missing: its blocks are lost unless it is put back");
    }
}

/// A file that is older than what the catalog knows, and that it does not know, was put there from outside. Entering
/// it now would let old records replace newer ones. One that never came to hold anything is removed instead.
fn refuse_unknown_old(handles: &Handles, ids: &mut Vec<SegmentId>, ledger: &Ledger) -> Result<(), StoreError> {
    let Some(&newest) = ledger.segments.keys().last() else { return Ok(()) };
    let unknown: Vec<SegmentId> =
        ids.iter().copied().filter(|id| *id < newest && !ledger.segments.contains_key(id)).collect();
    for id in unknown {
        let segment = handles.get(id)?;
        if segment.len_bytes()? > SEGMENT_HEADER_BYTES as u64 {
            return Err(StoreError::Damaged {
                block: None,
                detail: format!(
                    "segment {id} is not in the catalog though newer ones are: remove it, or repair the directory to \
                     rebuild the catalog from all segments"
                ),
            });
        }
        handles.remove(id)?;
        ids.retain(|other| *other != id);
    }
    Ok(())
}

/// Removes a segment whose creation failed, or was cut short by a crash if it is the last.
fn remove_unborn(handles: &Handles, segment: &Segment, next: Next, ledger: &Ledger) -> Result<bool, StoreError> {
    let len = segment.len_bytes()?;
    if next != Next::Last && len > SEGMENT_HEADER_BYTES as u64 {
        return Ok(false);
    }
    if segment.header.is_some() || ledger.segments.contains_key(&segment.id) || segment.scan(0, len).any_record(len)? {
        return Ok(false);
    }
    set_aside(handles, segment, 0, len)?;
    handles.remove(segment.id)?;
    Ok(true)
}

/// What comes behind a segment.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    Last,
    /// With the number of its first group, if it directly follows.
    Segment(Option<u64>),
}

pub(super) fn following(handles: &Handles, id: SegmentId, next: SegmentId) -> Option<u64> {
    let header = handles.get(next).ok().filter(|_| next.0 == id.0 + 1)?.header?;
    Some(header.next_sequence).filter(|&sequence| sequence > 0)
}

/// Reads what lies beyond the catalog's knowledge of one segment. Returns where the segment ends now, and what was
/// found if there was anything to read.
fn replay(
    handles: &Handles,
    segment: &Segment,
    next: Next,
    entered: u64,
    ledger: &mut Ledger,
) -> Result<(u64, Option<Found>), StoreError> {
    let len = segment.len_bytes()?;
    let known = ledger.segments.get(&segment.id).copied();
    // The number of the group before what is read now.
    let before = match known {
        Some(_) => Some(entered),
        None => segment.header.map(|header| header.next_sequence).and_then(|first| first.checked_sub(1)),
    };
    if let Some(header) = &segment.header {
        ledger.raise_ids(header.next_collection, header.next_document, header.next_sequence);
    }
    let first = segment.salt.first_record();
    let state = *ledger.segments.entry(segment.id).or_insert(SegmentState::empty(first));
    if known.is_some() && len <= state.bytes {
        return Ok((len, None));
    }

    let mut found = read_records(segment, state.bytes, len, next == Next::Last)?;
    if segment.header.is_none() && known.is_none() {
        found.damages.push(Damage { segment: segment.id, offset: 0, bytes: first, document: None });
    }
    let mut end = len;
    if next == Next::Last {
        if let Some(cut) = found.torn_from(before, state.bytes, len) {
            set_aside(handles, segment, cut, len)?;
            found.forget_from(cut);
            segment.file.truncate(cut).map_err(StoreError::io("cut a segment"))?;
            end = cut;
        }
        // What the crash left may be in the page cache only, and is about to count. After a flush that failed such pages
        // pass for written: write them again.
        rewrite(segment, if known.is_some() { state.bytes } else { 0 }, end)?;
    }
    let is_salted = segment.salt != Salt::NONE;
    let following = if let Next::Segment(following) = next { following } else { None };
    found.find_losses(is_salted, before, following);
    Ok((end, Some(found)))
}

/// Keeps bytes `from..to` of a segment elsewhere, for they are about to be cut off.
fn set_aside(handles: &Handles, segment: &Segment, from: u64, to: u64) -> Result<(), StoreError> {
    if from == to {
        return Ok(());
    }
    let mut bytes = vec![0; (to - from) as usize];
    segment.file.read_at(from, &mut bytes).map_err(StoreError::io("read a segment"))?;
    let kept = handles.folder().set_aside(segment.id, from, &bytes);
    kept.map_err(StoreError::io("set aside what a torn end cuts off"))
}

pub(super) fn rewrite(segment: &Segment, from: u64, to: u64) -> Result<(), StoreError> {
    let mut at = from;
    let mut bytes = Vec::new();
    while at < to {
        bytes.resize(REWRITE_BYTES.min(to - at) as usize, 0);
        segment.file.read_at(at, &mut bytes).map_err(StoreError::io("read a segment"))?;
        segment.file.write_at(at, &bytes).map_err(StoreError::io("write to a segment"))?;
        at += bytes.len() as u64;
    }
    segment.file.sync().map_err(StoreError::io("make a segment durable"))
}

/// Enters what all segments say that the catalog does not know. Manifests, tombstones and collections come first, blocks
/// after all of them; how far each segment was read is noted last, so that a crash before that only reads it again.
pub(super) fn enter_all(
    catalog: &dyn Catalog,
    ledger: &mut Ledger,
    news: &[(SegmentId, u64, Found)],
) -> Result<(), StoreError> {
    for blocks in [false, true] {
        let now = |entry: &&Entry| matches!(entry.content, Content::Block(_)) == blocks;
        for (_, _, found) in news {
            let entries: Vec<Entry> = found.entries.iter().filter(now).cloned().collect();
            for batch in entries.chunks(BATCH_RECORDS) {
                ledger.enter_found(catalog, batch)?;
            }
        }
    }
    let damaged = news.iter().filter(|(_, _, found)| !found.damages.is_empty());
    let uncovered: Vec<&Entry> = damaged.flat_map(|(_, _, found)| &found.entries).collect();
    let losses: Vec<Loss> = news.iter().flat_map(|(_, _, found)| found.losses.iter().copied()).collect();
    let doubts = loss::doubts(catalog, &losses, &uncovered)?;
    for doubt in &doubts {
        tracing::error!(document = doubt.document.0, "{}", doubt.reason);
    }
    ledger.doubt(catalog, &doubts)?;
    for (segment, end, found) in news {
        for Damage { offset, bytes, .. } in &found.damages {
            tracing::error!(segment = segment.0, offset, bytes, "damaged bytes in a segment");
        }
        ledger.settle(catalog, *segment, *end, found.frame_bytes(), &found.damages)?;
    }
    Ok(())
}

/// What was read from a stretch of a segment.
#[derive(Default)]
pub(super) struct Found {
    entries: Vec<Entry>,
    /// Where its groups end.
    ends: Vec<u64>,
    /// What can be told apart no more.
    pub(super) damages: Vec<Damage>,
    /// Where anything at all is broken, blocks with an intact header included: these are entered all the same, so
    /// that reading them names them.
    broken: Vec<u64>,
    losses: Vec<Loss>,
}

impl Found {
    /// Where the half-written end of the last segment, read in bytes `from..len`, begins, if it has one: after the
    /// last group if anything follows it, before that group if it is broken itself.
    fn torn_from(&self, number_before: Option<u64>, from: u64, len: u64) -> Option<u64> {
        let mut ends = self.ends.iter().rev().copied().chain([from]);
        let last_end = ends.next().unwrap_or(from);
        if last_end < len {
            return Some(last_end);
        }
        let begin = match self.last_numbers(number_before) {
            // The end of the group before is lost, which was durable when the last one was begun: damage, not a torn write.
            Some((before, last)) if last > before + 1 => {
                self.entries.iter().find(|entry| entry.locator.sequence == last)?.locator.offset
            }
            _ => ends.next().unwrap_or(from),
        };
        self.broken.iter().any(|&offset| offset >= begin).then_some(begin)
    }

    /// The numbers of the last two groups whose ends are there; the first may be that of the group before the stretch.
    fn last_numbers(&self, number_before: Option<u64>) -> Option<(u64, u64)> {
        let number = |entry: &Entry| if let Content::Group(end) = &entry.content { Some(end.number) } else { None };
        let mut numbers = self.entries.iter().rev().filter_map(number);
        let last = numbers.next()?;
        Some((numbers.next().or(number_before)?, last))
    }

    /// Works out what is lost of the groups between number `before` and `following`, where these are known.
    pub(super) fn find_losses(&mut self, is_salted: bool, before: Option<u64>, following: Option<u64>) {
        self.losses = loss::of_segment(&self.entries, &self.damages, is_salted, before, following);
    }

    pub(super) fn is_whole(&self) -> bool {
        self.broken.is_empty()
    }

    pub(super) fn has_losses(&self) -> bool {
        !self.losses.is_empty()
    }

    fn forget_from(&mut self, cut: u64) {
        self.entries.retain(|entry| entry.locator.offset < cut);
        self.damages.retain(|damage| damage.offset < cut);
        self.broken.retain(|&offset| offset < cut);
    }

    fn frame_bytes(&self) -> u64 {
        let frame = |entry: &&Entry| matches!(entry.content, Content::Group(_));
        self.entries.iter().filter(frame).map(|entry| entry.locator.bytes()).sum()
    }
}

/// `last`: in the last segment blocks are read whole, for its end may be half written.
pub(super) fn read_records(segment: &Segment, from: u64, to: u64, last: bool) -> Result<Found, StoreError> {
    let mut found = Found::default();
    for item in segment.scan(from, to).passing_over_blocks(!last) {
        match item? {
            Item::Gap { from, to } => {
                found.broken.push(from);
                found.damages.push(Damage { segment: segment.id, offset: from, bytes: to - from, document: None });
            }
            Item::Record(scanned) => {
                if !scanned.whole {
                    found.broken.push(scanned.offset);
                }
                match scanned.content() {
                    Some(content) => found.entries.push(Entry { locator: scanned.locator(segment.id), content }),
                    None => found.damages.push(Damage {
                        segment: segment.id,
                        offset: scanned.offset,
                        bytes: scanned.record.len() as u64,
                        document: Some(scanned.header.block.document).filter(|_| scanned.header.kind != Kind::Group),
                    }),
                }
                if scanned.header.commit {
                    found.ends.push(scanned.end());
                }
            }
        }
    }
    Ok(found)
}
