//! A catalog built anew from what lies in the segments, which takes nothing but reading: to take the place of one that does
//! not work any more, or to be compared with the one in use while writers go on.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::catalog::{Catalog, Pair};
use super::catalog_memory::MemoryCatalog;
use super::error::StoreError;
use super::handles::Handles;
use super::ledger::{Damage, Ledger, NAMES, SegmentState, Totals};
use super::place;
use super::record::{CollectionEntry, DocumentEntry, Locator, Salt, Tombstone, unpack};
use super::recovery::{Found, enter_all, following, read_records};
use super::segment::SegmentId;
use super::state::Store;
use super::verify::{Fault, VerifyReport};
use crate::limits;
use crate::types::{BlockId, DocumentId};
use crate::until::Until;

/// How often a comparison is begun again because compaction removed a segment that it was about to read.
const ATTEMPTS: usize = 8;

/// What the catalog says at one point in the log.
struct Snapshot {
    view: View,
    /// How far it says what the segments say.
    ends: Vec<(SegmentId, u64)>,
}

/// What a catalog says, without what may differ between two that mean the same.
struct View {
    things: BTreeMap<Vec<u8>, Vec<u8>>,
    segments: BTreeMap<SegmentId, SegmentState>,
    totals: Totals,
}

impl Store {
    /// As [`verify_until`](Self::verify_until) of all documents; and each thing that the catalog says and the segments do
    /// not, or the other way around, is a fault.
    pub fn verify_rebuild(
        &self,
        progress: &mut dyn FnMut(u64, u64),
        until: &Until,
    ) -> Result<VerifyReport, StoreError> {
        let mut report = self.verify_until(None, progress, until)?;
        for _ in 0..ATTEMPTS {
            let snapshot = self.snapshot()?;
            if let Some((rebuilt, unread)) = self.rebuild(&snapshot, until)? {
                report.faults.extend(differences(&snapshot.view, &rebuilt, &unread));
                return Ok(report);
            }
        }
        let source = io::Error::other("compaction removes segments faster than they are read: try again");
        Err(StoreError::Io { step: "compare the catalog with a rebuilt one", source })
    }

    /// Holds off writers for one pass over the catalog, not over payloads.
    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let Ok(writer) = self.writer.lock() else { return Err(StoreError::Poisoned) };
        let pairs = self.catalog.scan(b"").collect::<io::Result<Vec<Pair>>>().map_err(StoreError::catalog("scan"))?;
        let segments = writer.ledger.segments.iter().filter(|(_, state)| !state.retired);
        let segments: BTreeMap<SegmentId, SegmentState> = segments.map(|(&id, &state)| (id, state)).collect();
        let ends = segments.iter().map(|(&id, state)| (id, state.bytes)).collect();
        Ok(Snapshot { view: View::new(pairs, segments, writer.ledger.totals), ends })
    }

    /// What the segments say up to where the snapshot says it too, and the segments that cannot be read. `None` if one of
    /// them was removed meanwhile.
    fn rebuild(&self, snapshot: &Snapshot, until: &Until) -> Result<Option<(View, BTreeSet<SegmentId>)>, StoreError> {
        let catalog = MemoryCatalog::default();
        let (ledger, unread) = fill(&catalog, &self.handles, &snapshot.ends, until)?;
        for &id in &unread {
            if !self.is_listed(id)? {
                return Ok(None);
            }
        }
        let pairs = catalog.scan(b"").collect::<io::Result<Vec<Pair>>>().map_err(StoreError::catalog("scan"))?;
        Ok(Some((View::new(pairs, ledger.segments, ledger.totals), unread)))
    }

    fn is_listed(&self, id: SegmentId) -> Result<bool, StoreError> {
        let Ok(writer) = self.writer.lock() else { return Err(StoreError::Poisoned) };
        Ok(writer.ledger.segments.get(&id).is_some_and(|state| !state.retired))
    }
}

/// Enters in an empty catalog what the segments say up to these ends. Gives also the segments that cannot be read, because
/// they are missing or another directory's.
pub(super) fn fill(
    catalog: &MemoryCatalog,
    handles: &Handles,
    ends: &[(SegmentId, u64)],
    until: &Until,
) -> Result<(Ledger, BTreeSet<SegmentId>), StoreError> {
    let mut ledger = Ledger::load(catalog, handles.folder().directory())?;
    let mut news: Vec<(SegmentId, u64, Found)> = Vec::new();
    let mut unread = BTreeSet::new();
    for (at, &(id, end)) in ends.iter().enumerate() {
        if until.is_over() {
            return Err(StoreError::GivenUp);
        }
        let segment = match handles.get(id) {
            Err(error) if error.is_missing() || matches!(error, StoreError::Foreign { .. }) => {
                unread.insert(id);
                continue;
            }
            segment => segment?,
        };
        let first = segment.salt.first_record();
        if let Some(header) = &segment.header {
            ledger.raise_ids(header.next_collection, header.next_document, header.next_sequence);
        }
        ledger.segments.insert(id, SegmentState::empty(first));
        let end = end.min(segment.len_bytes()?);
        let mut found = read_records(&segment, first, end, false)?;
        if segment.header.is_none() {
            found.damages.push(Damage { segment: id, offset: 0, bytes: first, document: None });
        }
        let before = segment.header.and_then(|header| header.next_sequence.checked_sub(1));
        let next = ends.get(at + 1).and_then(|&(next, _)| following(handles, id, next));
        found.find_losses(segment.salt != Salt::NONE, before, next);
        news.push((id, end, found));
    }
    enter_all(catalog, &mut ledger, &news)?;
    Ok((ledger, unread))
}

impl View {
    fn new(pairs: Vec<Pair>, mut segments: BTreeMap<SegmentId, SegmentState>, totals: Totals) -> Self {
        let deleted: BTreeSet<u64> =
            pairs.iter().filter(|(key, _)| key[0] == b'T').filter_map(|(key, _)| number(key, 1)).collect();
        let mut things = BTreeMap::new();
        for (key, value) in pairs {
            match key[0] {
                // Blocks of deleted documents leave the catalog when their turn comes.
                b'B' if number(&key, 1).is_some_and(|document| deleted.contains(&document)) => {
                    if let Some(locator) = locator(&key, &value)
                        && let Some(state) = segments.get_mut(&locator.segment)
                    {
                        state.live_bytes = state.live_bytes.saturating_sub(locator.bytes());
                    }
                }
                // What gave a name and would be lost is a difference by itself.
                b'U' if number(&key, 1) == Some(NAMES.0) => {}
                b'C' | b'c' | b'D' | b'd' | b'B' | b'T' | b'U' => drop(things.insert(key, value)),
                _ => {}
            }
        }
        View { things, segments, totals }
    }
}

/// What the two do not say alike; of `unread` segments `verify` tells otherwise.
fn differences(catalog: &View, rebuilt: &View, unread: &BTreeSet<SegmentId>) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut more = 0u64;
    let mut fault = |key: Option<&[u8]>, problem: String| {
        if faults.len() >= limits::DIFFERENCES_MAX {
            more += 1;
            return;
        }
        let (document, block) = key.map_or((None, None), whose);
        faults.push(Fault { document, block, problem });
    };
    let keys: BTreeSet<&Vec<u8>> = catalog.things.keys().chain(rebuilt.things.keys()).collect();
    for key in keys {
        let what = name(key);
        match (catalog.things.get(key), rebuilt.things.get(key)) {
            (Some(known), None) => {
                let is_unread = locator(key, known).is_some_and(|locator| unread.contains(&locator.segment));
                // Names follow from documents, and documents in doubt are faults already.
                if !is_unread && key[0] != b'U' {
                    fault(Some(key), format!("only the catalog knows {what}: a rebuild would lose it"));
                }
            }
            (None, Some(_)) => fault(Some(key), format!("the catalog does not know {what}: the segments hold it")),
            (Some(known), Some(found)) if known != found && key[0] != b'U' => {
                fault(Some(key), format!("the catalog says of {what} something else than the segments"));
            }
            _ => {}
        }
    }
    for (id, state) in &catalog.segments {
        let found = rebuilt.segments.get(id);
        if let Some(found) = found.filter(|found| *found != state) {
            let problem =
                format!("segment {id}: {} by the catalog, {} by the segments", in_words(state), in_words(found));
            fault(None, problem);
        }
    }
    if unread.is_empty() && catalog.totals != rebuilt.totals {
        let in_words = |totals: &Totals| {
            let Totals { documents, blocks, tokens, next_collection, next_document, next_sequence, .. } = totals;
            format!(
                "{documents} documents with {blocks} blocks and {tokens} tokens, next ids {next_collection}, {next_document} and {next_sequence}"
            )
        };
        let problem =
            format!("{} by the catalog, {} by the segments", in_words(&catalog.totals), in_words(&rebuilt.totals));
        fault(None, problem);
    }
    if more > 0 {
        let problem = format!("{more} more differences between the catalog and the segments: repair the directory");
        faults.push(Fault { document: None, block: None, problem });
    }
    faults
}

fn in_words(state: &SegmentState) -> String {
    format!("{} of {} bytes in use, {} of its frame", state.live_bytes, state.bytes, state.frame_bytes)
}

fn locator(key: &[u8], value: &[u8]) -> Option<Locator> {
    match key[0] {
        b'B' => unpack(value),
        b'C' => unpack::<(Locator, CollectionEntry)>(value).map(|pair| pair.0),
        b'D' => unpack::<(Locator, DocumentEntry)>(value).map(|pair| pair.0),
        b'T' => unpack::<(Locator, Tombstone)>(value).map(|pair| pair.0),
        _ => None,
    }
}

fn whose(key: &[u8]) -> (Option<DocumentId>, Option<BlockId>) {
    let document = || number(key, 1).map(DocumentId);
    match key[0] {
        b'D' | b'T' | b'U' => (document(), None),
        b'B' if place::part_at(index(key)).is_some() => (document(), None),
        b'B' => (document(), document().map(|document| BlockId { document, index: index(key) })),
        _ => (None, None),
    }
}

fn name(key: &[u8]) -> String {
    let text = |from: usize| String::from_utf8_lossy(key.get(from..).unwrap_or_default()).into_owned();
    let document = number(key, 1).unwrap_or_default();
    match key[0] {
        b'C' => format!("collection {}", index_at(key, 1)),
        b'c' => format!("the name {:?} of a collection", text(1)),
        b'D' => format!("the manifest of document {document}"),
        b'd' => format!("the name {:?} of a document", text(5)),
        b'B' => match place::part_at(index(key)) {
            Some(part) => format!("part {part} of the state of document {document}"),
            None => format!("block {document}:{}", index(key)),
        },
        b'T' => format!("the deletion of document {document}"),
        _ => format!("that document {document} is in doubt"),
    }
}

fn number(key: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(at..at + 8)?.try_into().ok()?))
}

fn index(key: &[u8]) -> u32 {
    index_at(key, 9)
}

fn index_at(key: &[u8], at: usize) -> u32 {
    key.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
}
