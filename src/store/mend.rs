//! How does a damaged block become whole again? It is appended again: what a document has already is read whole, and what is
//! damaged of it is written anew, in a group with the document's manifest. The newer record counts from then on.
//!
//! Mending changes nothing that was acknowledged, so sealed documents take it too.

use super::append::{check_records, exactly};
use super::catalog::{self, key};
use super::document::BlockRecord;
use super::error::StoreError;
use super::log::GroupWriter;
use super::record::{DocumentEntry, Locator, Parts};
use super::state::Store;
use super::verify::read_record;
use crate::shape::CollectionSpec;
use crate::types::{BlockId, CollectionId};

/// A block that a document has.
#[derive(Debug)]
pub struct Held {
    /// `None` if they cannot be read.
    pub token_ids: Option<Vec<u32>>,
    /// Why it cannot be read, or not all of it.
    pub damage: Option<StoreError>,
}

/// What is written in place of damaged records.
#[derive(Default)]
pub(super) struct Mends<'a> {
    pub(super) blocks: Vec<(&'a BlockRecord, Parts)>,
    /// By how much the document's records grow and shrink.
    grown_bytes: u64,
    gone_bytes: u64,
}

impl Store {
    /// Reads a block whole, full or tail, and says what is wrong with it.
    pub fn held(&self, block: BlockId) -> Result<Held, StoreError> {
        let damage = match self.with_block(block, |segment, locator| read_record(segment, locator, block)) {
            Ok(_) => None,
            Err(error @ StoreError::Damaged { .. }) => Some(error),
            Err(error) => return Err(error),
        };
        // Ids that pass their checksum are the block's, whatever else of it is damaged.
        let token_ids = match self.read_meta(block) {
            Ok((meta, _)) => Some(meta.token_ids),
            Err(StoreError::Damaged { .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(Held { token_ids, damage })
    }

    /// Of blocks that begin with some the document has: those of them that are damaged, and the ones behind.
    pub(super) fn split_durable<'a>(
        &self,
        entry: &DocumentEntry,
        spec: &CollectionSpec,
        blocks: &'a [BlockRecord],
    ) -> Result<(Mends<'a>, &'a [BlockRecord]), StoreError> {
        let manifest = &entry.manifest;
        let durable = blocks.iter().take_while(|block| block.index < manifest.blocks).count();
        let (durable, mut new) = blocks.split_at(durable);
        let mut mends = Mends::default();
        for block in durable {
            self.mend(entry, spec, block, &mut mends)?;
        }
        // The tail of an open document is replaced by any other.
        if let [tail] = new
            && manifest.sealed
            && manifest.is_tail(tail.index, tail.meta.token_ids.len())
        {
            match self.mend(entry, spec, tail, &mut mends) {
                Err(StoreError::Conflict { .. }) => return Err(StoreError::Sealed),
                mended => mended?,
            }
            if mends.blocks.last().is_some_and(|(mended, _)| mended.index == tail.index) {
                new = &[];
            }
        }
        Ok((mends, new))
    }

    fn mend<'a>(
        &self,
        entry: &DocumentEntry,
        spec: &CollectionSpec,
        block: &'a BlockRecord,
        mends: &mut Mends<'a>,
    ) -> Result<(), StoreError> {
        let id = BlockId { document: entry.manifest.id, index: block.index };
        let held = self.held(id)?;
        if held.token_ids.is_some_and(|held| held != block.meta.token_ids) {
            return Err(StoreError::Conflict { document: id.document, index: id.index });
        }
        if held.damage.is_none() {
            return Ok(());
        }
        let tokens = if id.index < entry.manifest.blocks { entry.block_tokens } else { entry.manifest.tail_tokens };
        exactly("tokens of a block", tokens as usize, block.meta.token_ids.len())?;
        let parts = check_records(spec, id.index, std::slice::from_ref(block))?[0];
        // One of which no record is left was counted with the bytes that it had.
        let old = catalog::get::<Locator>(&self.catalog, &key::block(id))?;
        mends.grown_bytes += parts.record_bytes();
        mends.gone_bytes += old.map_or(parts.record_bytes(), |old| old.bytes());
        mends.blocks.push((block, parts));
        Ok(())
    }
}

impl Mends<'_> {
    pub(super) fn bytes(&self) -> u64 {
        self.grown_bytes
    }

    /// Writes them, and notes in the document's entry what changes in it.
    pub(super) fn write(
        &self,
        group: &mut GroupWriter<'_>,
        collection: CollectionId,
        entry: &mut DocumentEntry,
    ) -> Result<(), StoreError> {
        let document = entry.manifest.id;
        for (block, parts) in &self.blocks {
            group.block(collection, BlockId { document, index: block.index }, block, *parts)?;
            if entry.manifest.is_tail(block.index, block.meta.token_ids.len()) {
                entry.tail_sequence = group.number();
            }
        }
        let stored_bytes = &mut entry.manifest.stored_bytes;
        *stored_bytes = (*stored_bytes + self.grown_bytes).saturating_sub(self.gone_bytes);
        Ok(())
    }
}
