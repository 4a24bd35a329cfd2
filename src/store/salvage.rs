//! Which documents can be made of blocks that describe themselves? Of those in doubt and of those without a manifest: the full
//! blocks up to the first that is missing, and the newest tail if it follows them.

use std::collections::{BTreeMap, BTreeSet};

use super::catalog::{self, Catalog, key};
use super::document::{KeptState, Manifest};
use super::error::StoreError;
use super::ledger::{Doubt, NAMES};
use super::loss::ADVICE;
use super::piece::{KeysLayout, PieceLayout};
use super::record::{CollectionEntry, DocumentEntry, Locator, Part, Tombstone, decode_meta};
use super::repair_work::{Inventory, Piece, Work};
use super::scan::Item;
use crate::types::{BlockId, CollectionId, DocumentId};

/// A collection as the operator knows it.
#[derive(Clone, Debug)]
pub struct LostCollection {
    pub id: CollectionId,
    pub entry: CollectionEntry,
}

/// A collection of which blocks or documents are left, and no record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingCollection {
    pub id: CollectionId,
    pub documents: u64,
    pub blocks: u64,
    /// The most tokens that any of its blocks has; as a rule B.
    pub block_tokens: u32,
    /// L * Hkv
    pub pieces: u32,
    pub piece_bytes: u32,
    pub keys_bytes: u32,
}

/// A document with a new manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Salvaged {
    pub document: DocumentId,
    pub collection: CollectionId,
    pub name: String,
    pub blocks: u32,
    pub tail_tokens: u32,
    /// Why it was in doubt.
    pub reason: String,
    /// It may have been deleted: what would say so is lost.
    pub perhaps_deleted: bool,
}

/// A state that a document kept for its model and does without now; the document itself is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostState {
    pub document: DocumentId,
    pub reason: String,
}

/// What writing new manifests gave.
#[derive(Default)]
pub(super) struct Salvage {
    /// Documents that have one.
    pub(super) salvaged: Vec<Salvaged>,
    /// Blocks that make none.
    pub(super) leftovers: Vec<Leftover>,
    pub(super) lost_states: Vec<LostState>,
}

/// Blocks that are there and belong to no readable part of a document; none, and collection 0, if nothing is left of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    pub document: DocumentId,
    pub collection: CollectionId,
    pub blocks: u64,
    pub reason: String,
}

/// What is left of one document.
struct Remains<'a> {
    document: DocumentId,
    /// The newest manifest that was found, and its sequence, or 0.
    entry: Option<DocumentEntry>,
    sequence: u64,
    collection: CollectionId,
    block_tokens: u32,
    pieces: BTreeMap<u32, &'a [Piece]>,
}

/// Writes new manifests.
pub(super) fn salvage(work: &mut Work<'_>, inventory: &Inventory) -> Result<Salvage, StoreError> {
    let mut salvage = Salvage::default();
    let mut of_documents: BTreeMap<DocumentId, BTreeMap<u32, &[Piece]>> = BTreeMap::new();
    for (block, pieces) in &inventory.blocks {
        of_documents.entry(block.document).or_default().insert(block.index, pieces);
    }
    let mut wanted: BTreeSet<DocumentId> = of_documents.keys().copied().collect();
    for pair in catalog::scan::<Doubt>(work.catalog, key::DOUBTS) {
        wanted.insert(pair?.1.document);
    }
    wanted.remove(&NAMES);
    for document in wanted {
        let doubt = catalog::get::<Doubt>(work.catalog, &key::doubt(document))?;
        let entry = catalog::get::<(Locator, DocumentEntry)>(work.catalog, &key::document(document))?;
        let (sequence, entry) = entry.map_or((0, None), |(locator, entry)| (locator.sequence, Some(entry)));
        let is_deleted = catalog::get::<(Locator, Tombstone)>(work.catalog, &key::tombstone(document))?.is_some();
        if is_deleted || doubt.is_none() && entry.is_some() {
            continue;
        }
        let reason = doubt.map_or_else(|| "no manifest of it is left".into(), |doubt| doubt.reason);
        // The advice is followed now; earlier versions named the command.
        let reason = reason.split(ADVICE).next().and_then(|reason| reason.split(": run").next());
        let reason = reason.unwrap_or_default().to_string();
        let pieces = of_documents.remove(&document).unwrap_or_default();
        let found = (sequence, entry);
        let Some(remains) = Remains::new(work.catalog, document, found, pieces, &mut salvage.leftovers)? else {
            continue;
        };
        let newest_state = inventory.states.get(&document).copied().unwrap_or(0);
        remains.write(work, reason, newest_state, &mut salvage)?;
    }
    Ok(salvage)
}

impl<'a> Remains<'a> {
    /// `None` if nothing can be made of them, which is noted if there are any.
    fn new(
        catalog: &dyn Catalog,
        document: DocumentId,
        (sequence, entry): (u64, Option<DocumentEntry>),
        pieces: BTreeMap<u32, &'a [Piece]>,
        leftovers: &mut Vec<Leftover>,
    ) -> Result<Option<Self>, StoreError> {
        let first = pieces.values().next().and_then(|pieces| pieces.first());
        let collection = entry.as_ref().map(|entry| entry.manifest.collection);
        let Some(collection) = collection.or(first.map(|piece| piece.collection)) else {
            let reason = "its manifest is lost, and no block of it is left: it had none, or append it again".into();
            leftovers.push(Leftover { document, collection: CollectionId(0), blocks: 0, reason });
            return Ok(None);
        };
        let spec = catalog::get::<(Locator, CollectionEntry)>(catalog, &key::collection(collection))?;
        let known = entry.as_ref().map(|entry| entry.block_tokens);
        let block_tokens = known.or(spec.map(|(_, collection)| collection.spec.shape.block_tokens));
        let Some(block_tokens) = block_tokens else {
            let reason = format!("its collection {collection} is missing: give its specification, and repair again");
            leftovers.push(Leftover { document, collection, blocks: pieces.len() as u64, reason });
            return Ok(None);
        };
        Ok(Some(Remains { document, entry, sequence, collection, block_tokens, pieces }))
    }

    /// Its newest record at a place that is full, or one that is not.
    fn newest(&self, index: u32, full: bool) -> Option<Locator> {
        let pieces = self.pieces.get(&index)?.iter().map(|piece| piece.locator);
        pieces.filter(|locator| (locator.tokens == self.block_tokens) == full).max_by_key(Locator::age)
    }

    /// The full blocks without a hole, behind those that the manifest has; and the tail that follows: its tokens and sequence.
    fn extent(&self) -> (u32, u32, u64) {
        let known = self.entry.as_ref().map_or(0, |entry| entry.manifest.blocks);
        let mut blocks = known;
        while self.newest(blocks, true).is_some() {
            blocks += 1;
        }
        let of_manifest = self.entry.as_ref().filter(|_| blocks == known);
        let kept = of_manifest.map_or((0, 0), |entry| (entry.manifest.tail_tokens, entry.tail_sequence));
        // A tail in front of full blocks is outdated, and so is one that is older than the manifest's.
        let is_behind_hole = self.pieces.keys().any(|&index| index > blocks);
        let found = self.newest(blocks, false).filter(|tail| !is_behind_hole && tail.sequence >= kept.1);
        let (tail_tokens, tail_sequence) = found.map_or(kept, |tail| (tail.tokens, tail.sequence));
        (blocks, tail_tokens, tail_sequence)
    }

    /// Its state, if the tokens that it was taken after are there still.
    fn state(&self, blocks: u32, tail_sequence: u64) -> Option<KeptState> {
        let entry = self.entry.as_ref()?;
        let in_blocks = entry.manifest.blocks as u64 * self.block_tokens as u64;
        let is_same_tail = (entry.manifest.blocks, entry.tail_sequence) == (blocks, tail_sequence);
        entry.manifest.state.filter(|state| state.tokens <= in_blocks || is_same_tail)
    }

    fn write(
        self,
        work: &mut Work<'_>,
        reason: String,
        newest_state: u64,
        Salvage { salvaged, leftovers, lost_states }: &mut Salvage,
    ) -> Result<(), StoreError> {
        let (blocks, tail_tokens, tail_sequence) = self.extent();
        let Remains { document, collection, block_tokens, .. } = self;
        let end = blocks + (tail_tokens > 0) as u32;
        let behind = self.pieces.keys().filter(|&&index| index >= end).count() as u64;
        if behind > 0 {
            let reason =
                format!("they lie behind block {blocks}, which is missing: append the document from there again");
            leftovers.push(Leftover { document, collection, blocks: behind, reason });
        }
        if self.entry.is_none() && end == 0 {
            return Ok(());
        }
        let state = self.state(blocks, tail_sequence);
        let had_one = self.entry.as_ref().is_some_and(|entry| entry.manifest.state.is_some());
        if had_one && state.is_none() || newest_state > self.sequence {
            let reason = "the manifest that named it is lost, or the tokens that it was taken after".into();
            lost_states.push(LostState { document, reason });
        }
        let covered: Vec<(BlockId, Locator)> = (0..end)
            .filter_map(|index| Some((BlockId { document, index }, self.newest(index, index < blocks)?)))
            .collect();
        let name = self.name(work.catalog)?;
        let manifest = Manifest {
            id: document,
            collection,
            name: name.clone(),
            sealed: self.entry.as_ref().is_some_and(|entry| entry.manifest.sealed),
            blocks,
            tail_tokens,
            text_bytes: self.text_bytes(work, covered.last())?,
            stored_bytes: 0,
            state,
        };
        let first = covered.iter().map(|(_, locator)| locator.segment).min().unwrap_or(work.writer.active.id);
        let known = self.entry.as_ref().map_or(first, |entry| entry.first_segment);
        let mut entry = DocumentEntry { manifest, first_segment: first.min(known), block_tokens, tail_sequence };
        let bytes: u64 = covered.iter().map(|(_, locator)| locator.bytes()).sum();
        entry.manifest.stored_bytes = bytes + entry.record_bytes() + state.map_or(0, |state| state.bytes);
        work.commit(entry.record_bytes(), |group| group.document(entry))?;
        work.enter_blocks(&covered)?;
        let perhaps_deleted = reason.contains("deletion");
        salvaged.push(Salvaged { document, collection, name, blocks, tail_tokens, reason, perhaps_deleted });
        Ok(())
    }

    /// The name that it had, or `recovered-ID` where none is known or another document has it by now.
    fn name(&self, catalog: &dyn Catalog) -> Result<String, StoreError> {
        let is_free = |name: &str| -> Result<bool, StoreError> {
            let holder = catalog::get::<DocumentId>(catalog, &key::document_name(self.collection, name))?;
            Ok(holder.is_none_or(|holder| holder == self.document))
        };
        if let Some(entry) = &self.entry
            && is_free(&entry.manifest.name)?
        {
            return Ok(entry.manifest.name.clone());
        }
        let mut name = format!("recovered-{}", self.document);
        while !is_free(&name)? {
            name.push('\'');
        }
        Ok(name)
    }

    /// Where the text of the last block ends, if it can be read.
    fn text_bytes(&self, work: &Work<'_>, last: Option<&(BlockId, Locator)>) -> Result<u64, StoreError> {
        let known = self.entry.as_ref().map_or(0, |entry| entry.manifest.text_bytes);
        let Some((_, locator)) = last else { return Ok(known) };
        let segment = work.handles.get(locator.segment)?;
        let mut records = segment.scan(locator.offset, locator.offset + locator.bytes());
        let Some(Item::Record(scanned)) = records.next().transpose()? else { return Ok(known) };
        let (at, len) = locator.parts.span(Part::Meta);
        let meta = scanned.record.get(at as usize..at as usize + len).filter(|_| scanned.whole);
        let meta = meta.and_then(|meta| decode_meta(locator.tokens, meta));
        Ok(meta.map_or(known, |meta| meta.text_start.saturating_add(meta.text.len() as u64)))
    }
}

/// Collections that blocks or documents name and that are not there, and what their blocks say of them.
pub(super) fn missing_collections(
    catalog: &dyn Catalog,
    inventory: &Inventory,
) -> Result<Vec<MissingCollection>, StoreError> {
    let mut missing: BTreeMap<CollectionId, (MissingCollection, BTreeSet<DocumentId>)> = BTreeMap::new();
    let nothing = |id| MissingCollection {
        id,
        documents: 0,
        blocks: 0,
        block_tokens: 0,
        pieces: 0,
        piece_bytes: 0,
        keys_bytes: 0,
    };
    let is_there = |key: Vec<u8>| catalog.get(&key).map(|found| found.is_some()).map_err(StoreError::catalog("read"));
    for pair in catalog::scan::<(Locator, DocumentEntry)>(catalog, key::DOCUMENTS) {
        let manifest = pair?.1.1.manifest;
        let id = manifest.collection;
        if !is_there(key::collection(id))? {
            missing.entry(id).or_insert_with(|| (nothing(id), BTreeSet::new())).1.insert(manifest.id);
        }
    }
    for (block, pieces) in &inventory.blocks {
        for Piece { locator, collection } in pieces.iter().copied() {
            if is_there(key::collection(collection))? || is_there(key::tombstone(block.document))? {
                continue;
            }
            let new = || (nothing(collection), BTreeSet::new());
            let (said, documents) = missing.entry(collection).or_insert_with(new);
            documents.insert(block.document);
            said.blocks += 1;
            if locator.tokens > said.block_tokens {
                let parts = locator.parts;
                (said.block_tokens, said.pieces) = (locator.tokens, parts.pieces);
                (said.piece_bytes, said.keys_bytes) = (parts.piece_bytes, parts.keys_bytes);
            }
        }
    }
    let counted = |(said, documents): (MissingCollection, BTreeSet<DocumentId>)| MissingCollection {
        documents: documents.len() as u64,
        ..said
    };
    Ok(missing.into_values().map(counted).collect())
}

/// Checks that blocks of this id may have been written for a collection as the operator describes it.
pub(super) fn check_collection(
    catalog: &dyn Catalog,
    id: CollectionId,
    entry: &CollectionEntry,
    inventory: &Inventory,
) -> Result<(), StoreError> {
    let (spec, shape) = (&entry.spec, &entry.spec.shape);
    spec.check()?;
    let invalid = |field, expected: String, found: String| StoreError::Invalid { field, expected, found };
    if let Some(other) = catalog::get::<CollectionId>(catalog, &key::collection_name(&spec.name))? {
        let expected = format!("a name that no other collection has (collection {other} has it)");
        return Err(invalid("name of the collection", expected, spec.name.clone()));
    }
    let mut is_named = false;
    for pair in catalog::scan::<(Locator, DocumentEntry)>(catalog, key::DOCUMENTS) {
        let document = pair?.1.1;
        if document.manifest.collection == id {
            is_named = true;
            check(id, "tokens of a block", &[shape.block_tokens], document.block_tokens)?;
        }
    }
    let keys = KeysLayout::of(spec);
    for (block, pieces) in &inventory.blocks {
        for piece in pieces.iter().filter(|piece| piece.collection == id) {
            is_named = true;
            let (tokens, parts) = (piece.locator.tokens, piece.locator.parts);
            if tokens > shape.block_tokens {
                check(id, "tokens of a block", &[shape.block_tokens], tokens)?;
            }
            let layout =
                PieceLayout { dtype: spec.payload_dtype, tokens: tokens as usize, head_dim: shape.head_dim as usize };
            check(id, "pieces of a block", &[shape.pieces() as u32], parts.pieces)?;
            check(id, "bytes of a piece", &[layout.bytes() as u32], parts.piece_bytes)?;
            let sizes = if tokens == shape.block_tokens { keys.sizes(block.index == 0) } else { vec![0] };
            check(id, "bytes of keys of a block", &sizes, parts.keys_bytes)?;
        }
    }
    if !is_named {
        let expected = "one of which blocks or documents are left".into();
        return Err(invalid("id of the collection", expected, id.to_string()));
    }
    Ok(())
}

fn check(id: CollectionId, field: &'static str, expected: &[u32], found: u32) -> Result<(), StoreError> {
    if expected.contains(&found) {
        return Ok(());
    }
    let expected: Vec<String> = expected.iter().map(u32::to_string).collect();
    let expected = format!("{} by the specification that was given for collection {id}", expected.join(" or "));
    Err(StoreError::Invalid { field, expected, found: format!("{found} in what is stored") })
}
