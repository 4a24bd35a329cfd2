//! What is left when records were lost, and how does it become readable again? Repair rebuilds the catalog from the segments,
//! writes manifests anew for documents that are in doubt or have none, and takes damaged segments out of the log.
//!
//! In this order, so that a crash between any two steps loses nothing and the next run goes on: what only the catalog knows is
//! written to the log, the catalog is emptied and rebuilt, new manifests are written, what is live in damaged segments is
//! copied, their files are moved to DIR/torn, and the catalog is rebuilt once more. Nothing is destroyed on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::catalog::{self, Catalog, SledCatalog, key};
use super::compaction::current;
use super::document::KeptState;
use super::error::StoreError;
use super::handles::{Handles, Segment};
use super::place;
use super::read::read_small;
use super::record::{CollectionEntry, Content, DocumentEntry, Locator, Tombstone, unpack};
use super::recovery::{read_records, recover};
use super::repair_work::{Inventory, Work};
use super::salvage::{self, Leftover, LostCollection, LostState, MissingCollection, Salvage, Salvaged};
use super::scan::{Item, Scanned};
use super::segment::{SegmentId, Torn};
use super::state::{Sizes, Store};
use super::verify::{Fault, read_record};
use crate::types::{BlockId, CollectionId, DocumentId};

/// Records of one group at most: few enough for the record that ends it to name them all.
const GROUP_RECORDS: usize = 1024;

/// What the operator adds.
#[derive(Default)]
pub struct RepairOptions {
    /// Discards what was set aside before this repair.
    pub discard_torn: bool,
    /// Collections as they are known to have been; those that are there are passed over.
    pub collections: Vec<LostCollection>,
}

/// A damaged segment that was taken out of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    pub segment: SegmentId,
    /// Records that are still needed and were copied out of it.
    pub records: u64,
}

/// What was done, and what is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    pub discarded: Vec<Torn>,
    /// Records that only the catalog knew any more and that are in the log again.
    pub rewritten: u64,
    pub collections: Vec<CollectionId>,
    pub missing_collections: Vec<MissingCollection>,
    pub salvaged: Vec<Salvaged>,
    pub leftovers: Vec<Leftover>,
    pub lost_states: Vec<LostState>,
    pub moved: Vec<Moved>,
    /// What is kept in DIR/torn now.
    pub kept: Vec<Torn>,
    /// What verification finds afterwards.
    pub faults: Vec<Fault>,
    /// What the documents that are left are called: COLLECTION/NAME.
    pub names: BTreeMap<DocumentId, String>,
}

impl RepairReport {
    /// Whether anything of what was acknowledged is still not readable.
    pub fn is_something_lost(&self) -> bool {
        let is_left = self.missing_collections.is_empty() && self.leftovers.is_empty();
        !(is_left && self.lost_states.is_empty() && self.faults.is_empty())
    }
}

impl Store {
    /// Repairs a data directory that no process has open, and verifies what is there then.
    pub fn repair(dir: &Path, options: &RepairOptions) -> Result<RepairReport, StoreError> {
        let mut report = {
            let (segments, catalog, _lock) = Store::parts(dir, open_or_replace)?;
            repair(&Handles::new(segments), &*catalog, Sizes::default(), options)?
        };
        let store = Store::open(dir)?;
        report.faults = store.verify_rebuild(&mut |_, _| {}, &crate::until::Until::FOREVER)?.faults;
        report.kept = store.torn()?;
        for (id, entry) in store.collections()? {
            let manifests = store.manifests(id)?.into_iter();
            report.names.extend(manifests.map(|found| (found.id, format!("{}/{}", entry.spec.name, found.name))));
        }
        Ok(report)
    }
}

/// A catalog that cannot be decoded is replaced by an empty one. What the system refuses now it may allow later.
fn open_or_replace(path: &Path) -> Result<Arc<dyn Catalog>, StoreError> {
    let opened = match SledCatalog::open(path) {
        Err(error) if error.raw_os_error().is_none() => {
            tracing::warn!(%error, "the catalog cannot be opened: it is rebuilt");
            fs::remove_dir_all(path).and_then(|()| SledCatalog::open(path))
        }
        opened => opened,
    };
    opened.map(|catalog| Arc::new(catalog) as Arc<dyn Catalog>).map_err(StoreError::catalog("open"))
}

pub(super) fn repair(
    handles: &Handles,
    catalog: &dyn Catalog,
    sizes: Sizes,
    options: &RepairOptions,
) -> Result<RepairReport, StoreError> {
    let mut report = RepairReport::default();
    if options.discard_torn {
        let folder = handles.folder();
        report.discarded = folder.torn().map_err(StoreError::io("list what was set aside"))?;
        folder.discard_torn().map_err(StoreError::io("remove what was set aside"))?;
    }
    let rewritten = recover(handles, catalog, sizes).and_then(|writer| {
        let mut work = Work { handles, catalog, writer };
        work.close_damaged_end()?;
        Ok(work.rewrite_known()? + work.rewrite_known_blocks()?)
    });
    match rewritten {
        Ok(rewritten) => report.rewritten = rewritten,
        // It is no help, and about to be rebuilt.
        Err(error) if error.is_of_senseless_catalog() => tracing::warn!("{error}"),
        Err(error) => return Err(error),
    }
    empty(catalog)?;
    let mut work = Work { handles, catalog, writer: recover(handles, catalog, sizes)? };
    let inventory = work.inventory()?;
    report.collections = work.put_back(&options.collections, &inventory)?;
    let Salvage { salvaged, leftovers, lost_states } = salvage::salvage(&mut work, &inventory)?;
    (report.salvaged, report.leftovers, report.lost_states) = (salvaged, leftovers, lost_states);
    report.lost_states.extend(work.drop_lost_states()?);
    report.missing_collections = salvage::missing_collections(catalog, &inventory)?;
    report.moved = work.evacuate(&inventory.damaged)?;
    empty(catalog)?;
    for moved in &report.moved {
        handles.move_aside(moved.segment)?;
    }
    recover(handles, catalog, sizes)?;
    catalog.flush().map_err(StoreError::catalog("flush"))?;
    report.kept = handles.folder().torn().map_err(StoreError::io("list what was set aside"))?;
    Ok(report)
}

/// From here on the next opening rebuilds the catalog.
fn empty(catalog: &dyn Catalog) -> Result<(), StoreError> {
    catalog::clear(catalog)?;
    catalog.flush().map_err(StoreError::catalog("flush"))
}

impl Work<'_> {
    /// What the catalog holds under a prefix, without values that cannot be decoded.
    fn known<T: DeserializeOwned>(
        &self,
        prefix: &[u8],
    ) -> impl Iterator<Item = Result<(Vec<u8>, T), StoreError>> + use<T> {
        self.catalog.scan(prefix).filter_map(|pair| match pair {
            Ok((key, value)) => {
                let value = unpack(&value);
                if value.is_none() {
                    tracing::warn!(?key, "the catalog holds an entry that cannot be decoded");
                }
                value.map(|value| Ok((key, value)))
            }
            Err(source) => Some(Err(StoreError::Catalog { step: "scan", source })),
        })
    }

    /// Writes what the catalog knows and the log has lost to the log again: collections, manifests, deletions.
    fn rewrite_known(&mut self) -> Result<u64, StoreError> {
        let mut lost = Vec::new();
        for pair in self.known::<(Locator, CollectionEntry)>(key::COLLECTIONS) {
            let (key, (locator, entry)) = pair?;
            lost.push((locator, Content::Collection(key::collection_of(&key)?, entry)));
        }
        for pair in self.known::<(Locator, DocumentEntry)>(key::DOCUMENTS) {
            let (_, (locator, entry)) = pair?;
            let doubt = key::doubt(entry.manifest.id);
            if self.catalog.get(&doubt).map_err(StoreError::catalog("read"))?.is_none() {
                lost.push((locator, Content::Document(entry)));
            }
        }
        for pair in self.known::<(Locator, Tombstone)>(key::TOMBSTONES) {
            let (_, (locator, tombstone)) = pair?;
            lost.push((locator, Content::Tombstone(tombstone)));
        }
        let mut rewritten = Vec::new();
        for (locator, content) in lost {
            if read_small(self.handles, &locator)?.as_ref() != Some(&content) {
                rewritten.push((locator.bytes(), content));
            }
        }
        for part in rewritten.chunks(GROUP_RECORDS) {
            let bytes = part.iter().map(|(bytes, _)| bytes).sum();
            self.commit(bytes, |group| {
                part.iter().try_for_each(|(_, content)| match content {
                    Content::Collection(id, entry) => group.collection(*id, entry),
                    Content::Document(entry) => group.document(entry.clone()),
                    // Whose collection it was is not kept, and not asked.
                    Content::Tombstone(tombstone) => group.tombstone(CollectionId(0), *tombstone),
                    Content::Block(_) | Content::Group(_) => Ok(()),
                })
            })?;
        }
        Ok(rewritten.len() as u64)
    }

    /// The same for blocks, and parts of states, whose headers are damaged, or whose ends are cut off, as far as they can be read: without the catalog
    /// they would be unknown.
    fn rewrite_known_blocks(&mut self) -> Result<u64, StoreError> {
        let (mut lost, mut bytes, mut rewritten, mut all_whole) = (Vec::new(), 0, 0, true);
        for pair in self.known::<Locator>(key::BLOCKS) {
            let (key, locator) = pair?;
            let id = key::block_of(&key)?;
            let segment = match self.handles.get(locator.segment) {
                Err(StoreError::Foreign { .. }) => continue,
                Err(error) if error.is_missing() => continue,
                segment => segment?,
            };
            if segment.scan(locator.offset, locator.offset + locator.bytes()).begins_with(&locator)? {
                continue;
            }
            let document = catalog::get::<(Locator, DocumentEntry)>(self.catalog, &key::document(id.document))?;
            let Some((_, document)) = document else { continue };
            let found = Scanned::of_known(&*segment.file, segment.salt, id, document.manifest.collection, &locator)?;
            let Some(found) = found else { continue };
            bytes += locator.bytes();
            rewritten += 1;
            all_whole &= found.whole;
            lost.push((found, Content::Block(id)));
            if bytes >= self.writer.sizes.group_bytes || lost.len() == GROUP_RECORDS {
                self.copy(std::mem::take(&mut lost), std::mem::take(&mut bytes))?;
            }
        }
        self.copy(lost, bytes)?;
        if !all_whole {
            // Of the last segment a group with damage would be taken for a torn end.
            self.roll()?;
        }
        Ok(rewritten)
    }

    /// What the catalog knows was durable: a segment behind it keeps a damaged last group from passing for a torn end.
    fn close_damaged_end(&mut self) -> Result<(), StoreError> {
        let active = self.writer.active.clone();
        if !read_records(&active, active.salt.first_record(), self.writer.end, true)?.is_whole() {
            self.roll()?;
        }
        Ok(())
    }

    fn put_back(
        &mut self,
        collections: &[LostCollection],
        inventory: &Inventory,
    ) -> Result<Vec<CollectionId>, StoreError> {
        let mut put_back = Vec::new();
        for LostCollection { id, entry } in collections {
            if catalog::get::<(Locator, CollectionEntry)>(self.catalog, &key::collection(*id))?.is_some() {
                continue;
            }
            salvage::check_collection(self.catalog, *id, entry, inventory)?;
            self.commit(0, |group| group.collection(*id, entry))?;
            put_back.push(*id);
        }
        Ok(put_back)
    }

    /// Writes manifests without a state for documents of whose state not every part can be read.
    fn drop_lost_states(&mut self) -> Result<Vec<LostState>, StoreError> {
        let mut entries = Vec::new();
        for pair in catalog::scan::<(Locator, DocumentEntry)>(self.catalog, key::DOCUMENTS) {
            let (_, (_, entry)) = pair?;
            entries.extend(entry.manifest.state.map(|state| (state, entry)));
        }
        let mut lost = Vec::new();
        for (state, mut entry) in entries {
            let document = entry.manifest.id;
            let Some(reason) = self.lost_part(document, state)? else { continue };
            entry.set_state(None);
            self.commit(entry.record_bytes(), |group| group.document(entry))?;
            lost.push(LostState { document, reason });
        }
        Ok(lost)
    }

    /// What is wrong with the first part of a state that cannot be read.
    fn lost_part(&self, document: DocumentId, state: KeptState) -> Result<Option<String>, StoreError> {
        for place in place::of_parts(document, state.parts) {
            let locator = catalog::get::<Locator>(self.catalog, &key::block(place))?;
            let locator = locator.filter(|locator| locator.sequence == state.sequence);
            let missing = || StoreError::damaged(place, "no intact record of it was found in any segment");
            let read = locator.ok_or_else(missing).and_then(|locator| {
                let segment = self.handles.get(locator.segment)?;
                read_record(&segment, &locator, place)
            });
            match read {
                Ok(_) => {}
                Err(StoreError::Damaged { detail, .. }) => return Ok(Some(detail)),
                Err(error @ StoreError::Foreign { .. }) => return Ok(Some(error.to_string())),
                Err(error) if error.is_missing() => return Ok(Some(error.to_string())),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Copies what is live out of damaged segments. A block that is damaged itself stays so, and what of it can be read too.
    fn evacuate(&mut self, damaged: &BTreeSet<SegmentId>) -> Result<Vec<Moved>, StoreError> {
        let mut moved = Vec::new();
        for &id in damaged {
            if self.writer.active.id == id {
                self.roll()?;
            }
            let records = match self.handles.get(id) {
                Err(StoreError::Foreign { .. }) => 0,
                segment => self.copy_live(&*segment?)?,
            };
            moved.push(Moved { segment: id, records });
        }
        if moved.iter().any(|moved| moved.records > 0) {
            // Of the last segment a group with damage would be taken for a torn end.
            self.roll()?;
        }
        Ok(moved)
    }

    fn copy_live(&mut self, segment: &Segment) -> Result<u64, StoreError> {
        let (mut live, mut bytes, mut records) = (Vec::new(), 0, 0);
        for item in segment.scan(segment.salt.first_record(), segment.len_bytes()?) {
            let Item::Record(scanned) = item? else { continue };
            let Some(content) = scanned.content() else { continue };
            if current(self.catalog, &content)? != Some(scanned.locator(segment.id)) {
                continue;
            }
            bytes += scanned.header.parts.record_bytes();
            records += 1;
            live.push((scanned, self.with_tail_named(content)?));
            if bytes >= self.writer.sizes.group_bytes || live.len() == GROUP_RECORDS {
                self.copy(std::mem::take(&mut live), std::mem::take(&mut bytes))?;
            }
        }
        self.copy(live, bytes)?;
        Ok(records)
    }

    fn copy(&mut self, live: Vec<(Scanned, Content)>, bytes: u64) -> Result<(), StoreError> {
        if live.is_empty() {
            return Ok(());
        }
        self.commit(bytes, |group| live.into_iter().try_for_each(|(scanned, content)| group.copy(&scanned, content)))
    }

    /// Manifests of formats 1 to 3 did not name their tails.
    fn with_tail_named(&self, content: Content) -> Result<Content, StoreError> {
        let Content::Document(mut entry) = content else { return Ok(content) };
        if entry.tail_sequence == 0 && entry.manifest.tail_tokens > 0 {
            let tail = BlockId { document: entry.manifest.id, index: entry.manifest.blocks };
            let found = catalog::get::<Locator>(self.catalog, &key::block(tail))?;
            entry.tail_sequence = found.map_or(0, |locator| locator.sequence);
        }
        Ok(Content::Document(entry))
    }
}
