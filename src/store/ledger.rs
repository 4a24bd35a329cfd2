//! What a group of records means for the catalog. The one way in, for a group just written and for one found again
//! after a crash or when the catalog is rebuilt.
//!
//! A block counts once a manifest that covers it is known; a later record of the same thing replaces the earlier; a
//! tombstone ends its document (ids are never reused, so nothing of it comes later). Live bytes per segment are kept in
//! the same batch.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::catalog::{self, Batch, Catalog, key};
use super::error::StoreError;
use super::record::{CollectionEntry, Content, DocumentEntry, Locator, SEGMENT_HEADER_BYTES, Tombstone, pack};
use super::segment::SegmentId;
use crate::types::{BlockId, CollectionId, DocumentId};

/// One record of a group.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SegmentState {
    /// The catalog says everything that the segment says up to here.
    pub(super) bytes: u64,
    /// Of records that the catalog refers to, and the segment header.
    pub(super) live_bytes: u64,
    /// Nothing refers to it any more: the file is about to be removed.
    pub(super) retired: bool,
}

impl SegmentState {
    /// A segment with nothing but its header.
    pub(super) const EMPTY: SegmentState =
        SegmentState { bytes: SEGMENT_HEADER_BYTES as u64, live_bytes: SEGMENT_HEADER_BYTES as u64, retired: false };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Totals {
    pub(super) documents: u64,
    pub(super) blocks: u64,
    pub(super) tokens: u64,
    pub(super) next_collection: CollectionId,
    pub(super) next_document: DocumentId,
}

impl Totals {
    fn raise_ids(&mut self, collection: CollectionId, document: DocumentId) {
        self.next_collection = self.next_collection.max(collection);
        self.next_document = self.next_document.max(document);
    }
}

/// The part of the catalog that the writer keeps in memory.
pub(super) struct Ledger {
    pub(super) totals: Totals,
    pub(super) segments: BTreeMap<SegmentId, SegmentState>,
}

impl Ledger {
    pub(super) fn load(catalog: &dyn Catalog) -> Result<Self, StoreError> {
        let nothing = Totals {
            documents: 0,
            blocks: 0,
            tokens: 0,
            next_collection: CollectionId(1),
            // Document 0 marks records of no document.
            next_document: DocumentId(1),
        };
        let totals = catalog::get(catalog, key::TOTALS)?.unwrap_or(nothing);
        let mut segments = BTreeMap::new();
        for pair in catalog::scan::<(SegmentId, SegmentState)>(catalog, key::SEGMENTS) {
            let (_, (id, state)) = pair?;
            segments.insert(id, state);
        }
        Ok(Ledger { totals, segments })
    }

    /// Ids below these were given out, says a segment header.
    pub(super) fn raise_ids(&mut self, collection: CollectionId, document: DocumentId) {
        self.totals.raise_ids(collection, document);
    }

    /// Enters a durable group, in one batch. The group's segment is in the ledger.
    pub(super) fn enter(&mut self, catalog: &dyn Catalog, group: &Group) -> Result<(), StoreError> {
        let mut draft = Draft::new(catalog, self);
        for Entry { locator, content } in &group.entries {
            match content {
                Content::Collection(id, entry) => draft.collection(*id, entry, locator)?,
                Content::Document(entry) => draft.document(entry, locator)?,
                Content::Tombstone(tombstone) => draft.tombstone(tombstone, locator)?,
                Content::Block(_) => {}
            }
        }
        for Entry { locator, content } in &group.entries {
            if let Content::Block(id) = content {
                draft.block(*id, locator)?;
            }
        }
        if let Some(state) = draft.state(group.segment) {
            state.bytes = group.end;
        }
        let Draft { changes, segments, totals, .. } = draft;
        self.apply(catalog, changes.into_iter().collect(), segments, totals)
    }

    /// Notes that a segment was read up to `end`, and what could not be read in it.
    pub(super) fn settle(
        &mut self,
        catalog: &dyn Catalog,
        segment: SegmentId,
        end: u64,
        damages: &[Damage],
    ) -> Result<(), StoreError> {
        let note = |damage: &Damage| catalog::put(key::damage(segment, damage.offset), damage);
        let state = self.segments.get(&segment).copied().unwrap_or(SegmentState::EMPTY);
        let segments = BTreeMap::from([(segment, SegmentState { bytes: end, ..state })]);
        self.apply(catalog, damages.iter().map(note).collect(), segments, self.totals)
    }

    /// Notes that nothing refers to a segment any more; `dropped` are tombstones in it that nothing needs.
    pub(super) fn retire(
        &mut self,
        catalog: &dyn Catalog,
        segment: SegmentId,
        dropped: &[DocumentId],
    ) -> Result<(), StoreError> {
        let batch = dropped.iter().map(|&document| (key::tombstone(document), None)).collect();
        let state = self.segments.get(&segment).copied().unwrap_or(SegmentState::EMPTY);
        let segments = BTreeMap::from([(segment, SegmentState { retired: true, ..state })]);
        self.apply(catalog, batch, segments, self.totals)
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

    pub(super) fn live_bytes(&self) -> u64 {
        self.segments.values().map(|state| state.live_bytes).sum()
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

    fn collection(&mut self, id: CollectionId, entry: &CollectionEntry, locator: &Locator) -> Result<(), StoreError> {
        if let Some((old, _)) = self.get::<(Locator, CollectionEntry)>(&key::collection(id))? {
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
        if let Some((old, before)) = self.get::<(Locator, DocumentEntry)>(&key::document(manifest.id))? {
            self.kill(&old);
            self.count_out(&before);
        }
        self.put(key::document_name(manifest.collection, &manifest.name), &manifest.id);
        self.totals.documents += 1;
        self.totals.blocks += manifest.blocks as u64;
        self.totals.tokens += entry.tokens();
        self.totals.raise_ids(CollectionId(0), DocumentId(manifest.id.0.saturating_add(1)));
        self.put(key::document(manifest.id), &(locator, entry));
        self.revive(locator);
        Ok(())
    }

    fn block(&mut self, id: BlockId, locator: &Locator) -> Result<(), StoreError> {
        match self.get::<(Locator, DocumentEntry)>(&key::document(id.document))? {
            Some((_, entry)) if entry.manifest.covers(id.index) => {}
            _ => return Ok(()),
        }
        if let Some(old) = self.get::<Locator>(&key::block(id))? {
            self.kill(&old);
        }
        self.put(key::block(id), locator);
        self.revive(locator);
        Ok(())
    }

    fn tombstone(&mut self, tombstone: &Tombstone, locator: &Locator) -> Result<(), StoreError> {
        let document = tombstone.document;
        if let Some((old, _)) = self.get::<(Locator, Tombstone)>(&key::tombstone(document))? {
            self.kill(&old);
        }
        if let Some((old, entry)) = self.get::<(Locator, DocumentEntry)>(&key::document(document))? {
            self.kill(&old);
            self.count_out(&entry);
            self.changes.insert(key::document(document), None);
            // Compaction may leave the tombstone behind a new document of the same name.
            let name = key::document_name(entry.manifest.collection, &entry.manifest.name);
            if self.get::<DocumentId>(&name)? == Some(document) {
                self.changes.insert(name, None);
            }
            for pair in catalog::scan::<Locator>(self.catalog, &key::blocks(document)) {
                let (key, old) = pair?;
                self.kill(&old);
                self.changes.insert(key, None);
            }
        }
        self.totals.raise_ids(CollectionId(0), DocumentId(document.0.saturating_add(1)));
        self.put(key::tombstone(document), &(locator, tombstone));
        self.revive(locator);
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
