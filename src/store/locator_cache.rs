//! Where blocks lie, as the catalog said when they were last read: finding and decoding it anew costs half a microsecond
//! of the three that a piece in the page cache takes.
//!
//! What is kept is what the catalog says now: a change makes it forgotten before the change returns, and what a reader
//! saw before a change is not kept after it.

use std::collections::{HashMap, HashSet};
use std::sync::RwLock;

use super::error::StoreError;
use super::ledger::Group;
use super::record::{Content, Locator};
use crate::lock::IgnorePoison;
use crate::types::{BlockId, DocumentId};

/// Blocks kept, in at most 25 MiB: 16 million tokens in blocks of 64. When they are reached, all are forgotten; those in
/// use are found again at half a microsecond each.
const LOCATORS_MAX: usize = 1 << 18;

#[derive(Default)]
pub(super) struct LocatorCache(RwLock<Known>);

#[derive(Default)]
struct Known {
    locators: HashMap<BlockId, Locator>,
    /// Deleted documents of which the catalog may still have blocks.
    gone: HashSet<DocumentId>,
    /// So far: tells whether what was read from the catalog may be outdated.
    changes: u64,
}

impl LocatorCache {
    /// Where a block lies; asks `catalog` for what is not known.
    pub(super) fn find(
        &self,
        block: BlockId,
        catalog: impl FnOnce() -> Result<Option<Locator>, StoreError>,
    ) -> Result<Option<Locator>, StoreError> {
        let changes = {
            let known = self.0.read().ignore_poison();
            if known.gone.contains(&block.document) {
                return Ok(None);
            }
            if let Some(&locator) = known.locators.get(&block) {
                return Ok(Some(locator));
            }
            known.changes
        };
        let found = catalog()?;
        if let Some(locator) = found {
            self.keep(block, locator, changes);
        }
        Ok(found)
    }

    fn keep(&self, block: BlockId, locator: Locator, changes: u64) {
        let mut known = self.0.write().ignore_poison();
        if known.changes == changes {
            if known.locators.len() == LOCATORS_MAX {
                known.locators.clear();
            }
            known.locators.insert(block, locator);
        }
    }

    /// Forgets what a group may have moved, replaced or deleted; called when the catalog has it, or may have it.
    pub(super) fn forget(&self, group: &Group) {
        let mut known = self.0.write().ignore_poison();
        known.changes += 1;
        for entry in &group.entries {
            match &entry.content {
                Content::Block(block) => drop(known.locators.remove(block)),
                Content::Tombstone(tombstone) => known.forget_document(tombstone.document),
                Content::Collection(..) | Content::Document(_) | Content::Group(_) => {}
            }
        }
    }

    pub(super) fn of_deleted(gone: HashSet<DocumentId>) -> Self {
        LocatorCache(RwLock::new(Known { gone, ..Known::default() }))
    }

    /// Documents that a group has deleted: the catalog has the group, and still their blocks.
    pub(super) fn bury(&self, group: &Group) {
        for entry in &group.entries {
            if let Content::Tombstone(tombstone) = &entry.content {
                let mut known = self.0.write().ignore_poison();
                known.forget_document(tombstone.document);
                known.gone.insert(tombstone.document);
            }
        }
    }

    /// The catalog has none of its blocks any more.
    pub(super) fn forget_purged(&self, document: DocumentId) {
        let mut known = self.0.write().ignore_poison();
        known.changes += 1;
        known.gone.remove(&document);
    }

    /// Of a catalog that another has replaced.
    pub(super) fn forget_all(&self) {
        let mut known = self.0.write().ignore_poison();
        known.changes += 1;
        known.locators.clear();
    }
}

impl Known {
    fn forget_document(&mut self, document: DocumentId) {
        self.locators.retain(|block, _| block.document != document);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ledger::Entry;
    use super::super::record::{Parts, Tombstone};
    use super::super::segment::SegmentId;
    use super::*;

    const BLOCK: BlockId = BlockId { document: DocumentId(3), index: 1 };

    fn at(offset: u64) -> Locator {
        Locator { segment: SegmentId(1), offset, sequence: 1, tokens: 4, parts: Parts::default() }
    }

    fn group(content: Content) -> Group {
        let segment = SegmentId(1);
        Group { segment, entries: vec![Entry { locator: at(0), content }], end: 0 }
    }

    fn known(cache: &LocatorCache, block: BlockId) -> Option<Locator> {
        cache.find(block, || Ok(None)).unwrap()
    }

    #[test]
    fn a_locator_is_known_until_a_change_touches_it() {
        let next = BlockId { index: 2, ..BLOCK };
        let elsewhere = BlockId { document: DocumentId(4), ..BLOCK };
        let segments = SegmentId(1);
        let gone = Tombstone { document: BLOCK.document, first_segment: segments, last_segment: segments };
        for (content, left) in [
            (Content::Block(BLOCK), [None, Some(at(2)), Some(at(3))]),
            (Content::Tombstone(gone), [None, None, Some(at(3))]),
        ] {
            let cache = LocatorCache::default();
            for (block, locator) in [(BLOCK, at(1)), (next, at(2)), (elsewhere, at(3))] {
                assert_eq!(cache.find(block, || Ok(Some(locator))).unwrap(), Some(locator));
                assert_eq!(known(&cache, block), Some(locator));
            }
            cache.forget(&group(content));
            assert_eq!([BLOCK, next, elsewhere].map(|block| known(&cache, block)), left);
        }
    }

    #[test]
    fn what_was_read_before_a_change_is_not_kept_after_it() {
        let cache = LocatorCache::default();
        let read_then_changed = || {
            cache.forget(&group(Content::Block(BLOCK)));
            Ok(Some(at(1)))
        };
        assert_eq!(cache.find(BLOCK, read_then_changed).unwrap(), Some(at(1)));
        assert_eq!(known(&cache, BLOCK), None);
    }

    #[test]
    fn no_more_is_kept_than_the_bound() {
        let cache = LocatorCache::default();
        for index in 0..LOCATORS_MAX as u32 + 1 {
            cache.find(BlockId { index, ..BLOCK }, || Ok(Some(at(index as u64)))).unwrap();
        }
        assert_eq!(cache.0.read().unwrap().locators.len(), 1);
    }
}
