//! What records mean for the catalog. The one way in, for a group just written and for what is found again after a crash
//! or when the catalog is rebuilt.
//!
//! The newest of each thing counts, by its sequence, wherever it lies and in any order of records: a tombstone
//! ends its document for good (ids are never reused), a block counts if the newest manifest has it. Live bytes per segment
//! are kept in the same batch.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::catalog::{self, Batch, Catalog, key};
use super::document::Manifest;
use super::error::StoreError;
use super::place;
use super::record::{CollectionEntry, Content, DocumentEntry, Locator, SEQUENCE_FIRST, Tombstone, pack};
use super::segment::{DirectoryId, SegmentId};
use crate::types::{BlockId, CollectionId, DocumentId};

/// One record of a group.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) locator: Locator,
    pub(super) content: Content,
}

/// Records that count together.
pub(super) struct Group {
    pub(super) segment: SegmentId,
    pub(super) entries: Vec<Entry>,
    /// Where the group ends in its segment.
    pub(super) end: u64,
}

/// A stretch of a segment that held something and can no longer be read as it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Damage {
    pub(super) segment: SegmentId,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Where the record's header still says it.
    pub(super) document: Option<DocumentId>,
}

/// In place of a document: names that are not found, for the record that gave one to something may be lost.
pub(super) const NAMES: DocumentId = DocumentId(0);

/// Why a document is not read: a newer record of it than all that were found is lost, or may be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Doubt {
    pub(super) document: DocumentId,
    /// Human-readable.
    pub(super) reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SegmentState {
    /// The catalog says everything that the segment says up to here.
    pub(super) bytes: u64,
    /// Of records that the catalog refers to.
    pub(super) live_bytes: u64,
    /// Of the segment header and the ends of groups, which nothing refers to and no compaction gives back.
    pub(super) frame_bytes: u64,
    /// Nothing refers to it any more: the file is about to be removed.
    pub(super) retired: bool,
}

impl SegmentState {
    /// A segment with nothing but a header of so many bytes.
    pub(super) fn empty(header_bytes: u64) -> Self {
        SegmentState { bytes: header_bytes, live_bytes: 0, frame_bytes: header_bytes, retired: false }
    }

    /// What compaction would give back.
    pub(super) fn dead_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.live_bytes + self.frame_bytes)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Totals {
    pub(super) documents: u64,
    pub(super) blocks: u64,
    pub(super) tokens: u64,
    pub(super) next_collection: CollectionId,
    pub(super) next_document: DocumentId,
    /// The number of the next group.
    pub(super) next_sequence: u64,
    /// Whose catalog it is.
    pub(super) directory: DirectoryId,
}

impl Totals {
    fn raise_ids(&mut self, collection: CollectionId, document: DocumentId) {
        self.next_collection = self.next_collection.max(collection);
        self.next_document = self.next_document.max(document);
    }

    fn raise_sequence(&mut self, next: u64) {
        self.next_sequence = self.next_sequence.max(next);
    }
}

/// The part of the catalog that the writer keeps in memory.
pub(super) struct Ledger {
    pub(super) totals: Totals,
    pub(super) segments: BTreeMap<SegmentId, SegmentState>,
}

impl Ledger {
    /// What the catalog says; nothing if it is one of another directory, which is emptied.
    pub(super) fn load(catalog: &dyn Catalog, directory: DirectoryId) -> Result<Self, StoreError> {
        let nothing = Totals {
            documents: 0,
            blocks: 0,
            tokens: 0,
            next_collection: CollectionId(1),
            // Document 0 marks records of no document.
            next_document: DocumentId(1),
            next_sequence: SEQUENCE_FIRST,
            directory,
        };
        let totals: Totals = catalog::get(catalog, key::TOTALS)?.unwrap_or(nothing);
        if totals.directory != directory {
            tracing::warn!(%totals.directory, "the catalog is one of another data directory; rebuilding it");
            catalog::clear(catalog)?;
            return Ok(Ledger { totals: nothing, segments: BTreeMap::new() });
        }
        let mut segments = BTreeMap::new();
        for pair in catalog::scan::<(SegmentId, SegmentState)>(catalog, key::SEGMENTS) {
            let (_, (id, state)) = pair?;
            segments.insert(id, state);
        }
        Ok(Ledger { totals, segments })
    }

    /// Ids below these were given out, says a segment header.
    pub(super) fn raise_ids(&mut self, collection: CollectionId, document: DocumentId, next_sequence: u64) {
        self.totals.raise_ids(collection, document);
        self.totals.raise_sequence(next_sequence);
    }

    /// Enters a durable group, in one batch. The group's segment is in the ledger.
    pub(super) fn enter(&mut self, catalog: &dyn Catalog, group: &Group) -> Result<(), StoreError> {
        let mut draft = Draft::new(catalog, self);
        draft.enter(&group.entries)?;
        if let Some(state) = draft.state(group.segment) {
            state.bytes = group.end;
            let frame = |entry: &Entry| matches!(entry.content, Content::Group(_)).then(|| entry.locator.bytes());
            state.frame_bytes += group.entries.iter().filter_map(frame).sum::<u64>();
        }
        let Draft { changes, segments, totals, .. } = draft;
        self.apply(catalog, changes.into_iter().collect(), segments, totals)
    }

    /// Enters records that were found again, without saying how far any segment was read. Entering them again changes
    /// nothing.
    pub(super) fn enter_found(&mut self, catalog: &dyn Catalog, entries: &[Entry]) -> Result<(), StoreError> {
        let mut draft = Draft::new(catalog, self);
        draft.enter(entries)?;
        let Draft { changes, segments, totals, .. } = draft;
        self.apply(catalog, changes.into_iter().collect(), segments, totals)
    }

    /// Notes that a segment was read up to `end`, that `frame_bytes` of what was read are its frame, and what could not be
    /// read in it.
    pub(super) fn settle(
        &mut self,
        catalog: &dyn Catalog,
        segment: SegmentId,
        end: u64,
        frame_bytes: u64,
        damages: &[Damage],
    ) -> Result<(), StoreError> {
        let note = |damage: &Damage| catalog::put(key::damage(segment, damage.offset), damage);
        let Some(&state) = self.segments.get(&segment) else { return Ok(()) };
        let frame_bytes = state.frame_bytes + frame_bytes;
        let segments = BTreeMap::from([(segment, SegmentState { bytes: end, frame_bytes, ..state })]);
        self.apply(catalog, damages.iter().map(note).collect(), segments, self.totals)
    }

    /// Notes that documents are in doubt.
    pub(super) fn doubt(&mut self, catalog: &dyn Catalog, doubts: &[Doubt]) -> Result<(), StoreError> {
        let note = |doubt: &Doubt| catalog::put(key::doubt(doubt.document), doubt);
        self.apply(catalog, doubts.iter().map(note).collect(), BTreeMap::new(), self.totals)
    }

    /// Notes that nothing refers to a segment any more; `dropped` are tombstones in it that nothing needs.
    pub(super) fn retire(
        &mut self,
        catalog: &dyn Catalog,
        segment: SegmentId,
        dropped: &[DocumentId],
    ) -> Result<(), StoreError> {
        let batch = dropped.iter().map(|&document| (key::tombstone(document), None)).collect();
        let Some(&state) = self.segments.get(&segment) else { return Ok(()) };
        let segments = BTreeMap::from([(segment, SegmentState { retired: true, live_bytes: 0, ..state })]);
        self.apply(catalog, batch, segments, self.totals)
    }

    /// Takes blocks of a deleted document out; `all`: none is left.
    pub(super) fn purge(
        &mut self,
        catalog: &dyn Catalog,
        document: DocumentId,
        blocks: &[(Vec<u8>, Locator)],
        all: bool,
    ) -> Result<(), StoreError> {
        let mut draft = Draft::new(catalog, self);
        for (key, locator) in blocks {
            draft.kill(locator);
            draft.changes.insert(key.clone(), None);
        }
        if all {
            draft.changes.insert(key::garbage(document), None);
        }
        let Draft { changes, segments, totals, .. } = draft;
        self.apply(catalog, changes.into_iter().collect(), segments, totals)
    }

    /// Forgets a segment whose file is gone.
    pub(super) fn forget(&mut self, catalog: &dyn Catalog, segment: SegmentId) -> Result<(), StoreError> {
        catalog.apply(vec![(key::segment(segment), None)]).map_err(StoreError::catalog("forget a segment"))?;
        self.segments.remove(&segment);
        Ok(())
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.values().map(|state| state.bytes).sum()
    }

    /// Of what is referred to, and of what frames it.
    pub(super) fn live_bytes(&self) -> u64 {
        self.segments.values().map(|state| state.live_bytes + state.frame_bytes).sum()
    }

    fn apply(
        &mut self,
        catalog: &dyn Catalog,
        mut batch: Batch,
        segments: BTreeMap<SegmentId, SegmentState>,
        totals: Totals,
    ) -> Result<(), StoreError> {
        batch.extend(segments.iter().map(|(&id, &state)| catalog::put(key::segment(id), &(id, state))));
        batch.push(catalog::put(key::TOTALS.to_vec(), &totals));
        catalog.apply(batch).map_err(StoreError::catalog("apply a batch"))?;
        self.segments.extend(segments);
        self.totals = totals;
        Ok(())
    }
}

/// A batch in the making, which reads its own changes.
struct Draft<'a> {
    catalog: &'a dyn Catalog,
    ledger: &'a Ledger,
    changes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Only those that change.
    segments: BTreeMap<SegmentId, SegmentState>,
    totals: Totals,
}

impl<'a> Draft<'a> {
    fn new(catalog: &'a dyn Catalog, ledger: &'a Ledger) -> Self {
        Draft { catalog, ledger, changes: BTreeMap::new(), segments: BTreeMap::new(), totals: ledger.totals }
    }

    fn enter(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        for Entry { locator, content } in entries {
            match content {
                Content::Collection(id, entry) => self.collection(*id, entry, locator)?,
                Content::Document(entry) => self.document(entry, locator)?,
                Content::Tombstone(tombstone) => self.tombstone(tombstone, locator)?,
                Content::Group(entry) => self.totals.raise_sequence(entry.number + 1),
                Content::Block(_) => {}
            }
        }
        for Entry { locator, content } in entries {
            if let Content::Block(id) = content {
                self.block(*id, locator)?;
            }
        }
        Ok(())
    }

    fn collection(&mut self, id: CollectionId, entry: &CollectionEntry, locator: &Locator) -> Result<(), StoreError> {
        if let Some((old, _)) = self.get::<(Locator, CollectionEntry)>(&key::collection(id))? {
            if old.age() >= locator.age() {
                return Ok(());
            }
            self.kill(&old);
        }
        self.totals.raise_ids(CollectionId(id.0.saturating_add(1)), DocumentId(0));
        self.put(key::collection_name(&entry.spec.name), &id);
        self.put(key::collection(id), &(locator, entry));
        self.revive(locator);
        Ok(())
    }

    fn document(&mut self, entry: &DocumentEntry, locator: &Locator) -> Result<(), StoreError> {
        let manifest = &entry.manifest;
        self.totals.raise_ids(CollectionId(0), DocumentId(manifest.id.0.saturating_add(1)));
        if self.get::<(Locator, Tombstone)>(&key::tombstone(manifest.id))?.is_some() {
            return Ok(());
        }
        if let Some((old, before)) = self.get::<(Locator, DocumentEntry)>(&key::document(manifest.id))? {
            if old.age() >= locator.age() {
                return Ok(());
            }
            self.kill(&old);
            self.count_out(&before);
            self.drop_outdated(&before, entry)?;
            if before.manifest.name != manifest.name {
                self.free_name(&before.manifest)?;
            }
        }
        self.totals.documents += 1;
        self.totals.blocks += manifest.blocks as u64;
        self.totals.tokens += entry.tokens();
        let name = key::document_name(manifest.collection, &manifest.name);
        // One that takes another's name is the later one, and so of all that ever had a name the latest has it. Two live under one
        // only until the other's tombstone is met, or where that was lost.
        if self.get::<DocumentId>(&name)?.is_none_or(|other| other <= manifest.id) {
            self.put(name, &manifest.id);
        }
        self.put(key::document(manifest.id), &(locator, entry));
        self.revive(locator);
        Ok(())
    }

    /// What was the tail, or the state, is not what lies at its place any more, whether or not what replaced it is found.
    fn drop_outdated(&mut self, before: &DocumentEntry, now: &DocumentEntry) -> Result<(), StoreError> {
        let Manifest { id: document, blocks: index, state, .. } = before.manifest;
        self.drop_unless_accepted(BlockId { document, index }, now)?;
        let outdated = state.filter(|old| now.manifest.state.is_none_or(|state| state.sequence != old.sequence));
        for place in place::of_parts(document, outdated.map_or(0, |state| state.parts)) {
            self.drop_unless_accepted(place, now)?;
        }
        Ok(())
    }

    fn drop_unless_accepted(&mut self, place: BlockId, now: &DocumentEntry) -> Result<(), StoreError> {
        let key = key::block(place);
        if let Some(old) = self.get::<Locator>(&key)?
            && !now.accepts(place.index, old.tokens, old.sequence)
        {
            self.kill(&old);
            self.changes.insert(key, None);
        }
        Ok(())
    }

    fn block(&mut self, id: BlockId, locator: &Locator) -> Result<(), StoreError> {
        match self.get::<(Locator, DocumentEntry)>(&key::document(id.document))? {
            Some((_, entry)) if entry.accepts(id.index, locator.tokens, locator.sequence) => {}
            _ => return Ok(()),
        }
        if let Some(old) = self.get::<Locator>(&key::block(id))? {
            if old.age() >= locator.age() {
                return Ok(());
            }
            self.kill(&old);
        }
        self.put(key::block(id), locator);
        self.revive(locator);
        Ok(())
    }

    fn tombstone(&mut self, tombstone: &Tombstone, locator: &Locator) -> Result<(), StoreError> {
        let document = tombstone.document;
        if let Some((old, _)) = self.get::<(Locator, Tombstone)>(&key::tombstone(document))? {
            if old.age() >= locator.age() {
                return Ok(());
            }
            self.kill(&old);
        }
        if let Some((old, entry)) = self.get::<(Locator, DocumentEntry)>(&key::document(document))? {
            self.kill(&old);
            self.count_out(&entry);
            self.changes.insert(key::document(document), None);
            self.changes.insert(key::doubt(document), None);
            self.free_name(&entry.manifest)?;
            // A document may have many blocks: they go step by step.
            self.put(key::garbage(document), &document);
        }
        self.totals.raise_ids(CollectionId(0), DocumentId(document.0.saturating_add(1)));
        self.put(key::tombstone(document), &(locator, tombstone));
        self.revive(locator);
        Ok(())
    }

    /// Takes its name from a document, unless it is that of a newer one by now.
    fn free_name(&mut self, manifest: &Manifest) -> Result<(), StoreError> {
        let name = key::document_name(manifest.collection, &manifest.name);
        if self.get::<DocumentId>(&name)? == Some(manifest.id) {
            self.changes.insert(name, None);
        }
        Ok(())
    }

    fn count_out(&mut self, entry: &DocumentEntry) {
        self.totals.documents -= 1;
        self.totals.blocks -= entry.manifest.blocks as u64;
        self.totals.tokens -= entry.tokens();
    }

    fn get<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StoreError> {
        match self.changes.get(key) {
            Some(Some(value)) => Ok(super::record::unpack(value)),
            Some(None) => Ok(None),
            None => catalog::get(self.catalog, key),
        }
    }

    fn put<T: Serialize>(&mut self, key: Vec<u8>, value: &T) {
        self.changes.insert(key, Some(pack(value)));
    }

    /// `None` for a segment that is gone.
    fn state(&mut self, segment: SegmentId) -> Option<&mut SegmentState> {
        let known = *self.ledger.segments.get(&segment)?;
        Some(self.segments.entry(segment).or_insert(known))
    }

    fn revive(&mut self, locator: &Locator) {
        if let Some(state) = self.state(locator.segment) {
            state.live_bytes += locator.bytes();
        }
    }

    fn kill(&mut self, locator: &Locator) {
        if let Some(state) = self.state(locator.segment) {
            state.live_bytes = state.live_bytes.saturating_sub(locator.bytes());
        }
    }
}
