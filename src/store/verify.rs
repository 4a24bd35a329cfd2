//! Verification: reads everything that is referred to and checks that it is what was written.

use std::collections::{BTreeMap, BTreeSet};

use super::catalog::{self, key};
use super::error::StoreError;
use super::handles::Segment;
use super::ledger::{Damage, Doubt, NAMES};
use super::piece::KeysLayout;
use super::place;
use super::read::{mismatch, read_exact, read_small};
use super::record::{
    CollectionEntry, Content, DocumentEntry, Kind, Locator, Part, RECORD_HEADER_BYTES, RecordHeader,
    SEGMENT_HEADER_BYTES, Tombstone,
};
use super::segment::SegmentId;
use super::state::Store;
use crate::limits;
use crate::types::{BlockId, DocumentId};
use crate::until::Until;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub document: Option<DocumentId>,
    pub block: Option<BlockId>,
    /// Human-readable.
    pub problem: String,
}

/// What was read, and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    pub documents: u64,
    /// Full blocks and tails.
    pub blocks: u64,
    pub bytes: u64,
    /// Bytes that were set aside: no fault.
    pub set_aside_bytes: u64,
    pub faults: Vec<Fault>,
}

impl Store {
    /// Reads every record of one document, or of all documents, in full: checksums, what the catalog says against
    /// what the segments say, and that no block is missing. Without a document it also checks collections, segment
    /// headers and the count of live bytes. `progress` is told the bytes read so far and in all.
    ///
    /// Damage is reported, not an error; an error means that reading itself failed.
    pub fn verify(
        &self,
        document: Option<DocumentId>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<VerifyReport, StoreError> {
        self.verify_until(document, progress, &Until::FOREVER)
    }

    /// The same, as long as the answer is wanted.
    pub fn verify_until(
        &self,
        document: Option<DocumentId>,
        progress: &mut dyn FnMut(u64, u64),
        until: &Until,
    ) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        let documents = match document {
            Some(document) => vec![self.entry(document)?],
            None => {
                self.verify_accounting(&mut report)?;
                self.verify_segments(&mut report)?;
                self.verify_collections(&mut report)?;
                self.verify_set_aside(&mut report)?;
                let scan = catalog::scan::<(Locator, DocumentEntry)>(&self.catalog, key::DOCUMENTS);
                scan.map(|pair| Ok(pair?.1.1)).collect::<Result<_, StoreError>>()?
            }
        };
        let total = documents.iter().map(|entry| entry.manifest.stored_bytes).sum();
        // Every step reports progress, and ends there once the receiver has gone.
        let step = &mut |report: &VerifyReport| {
            progress(report.bytes, total);
            if until.is_over() { Err(StoreError::GivenUp) } else { Ok(()) }
        };
        step(&report)?;
        for entry in documents {
            self.verify_document(&entry, &mut report, step)?;
        }
        Ok(report)
    }

    fn verify_document(
        &self,
        entry: &DocumentEntry,
        report: &mut VerifyReport,
        step: &mut dyn FnMut(&VerifyReport) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let manifest = &entry.manifest;
        match self.verify_manifest(manifest.id) {
            Ok(bytes) => report.bytes += bytes,
            Err(StoreError::NotFound { .. }) => return Ok(()),
            Err(StoreError::Damaged { detail, .. }) => report.fault(Some(manifest.id), None, detail),
            Err(error) => return Err(error),
        }
        report.documents += 1;
        let keys = self.collection(manifest.collection)?.map(|collection| KeysLayout::of(&collection.spec));
        let end = manifest.blocks + (manifest.tail_tokens > 0) as u32;
        for index in self.worth_reading(manifest.id, end, report)? {
            let block = BlockId { document: manifest.id, index };
            match self.with_block(block, |segment, locator| verify_block(segment, locator, block, entry, keys)) {
                Ok(bytes) => {
                    report.bytes += bytes;
                    report.blocks += 1;
                }
                // Deleted, or its tail replaced by a block, since we began.
                Err(StoreError::NotFound { .. }) => {}
                Err(StoreError::Damaged { detail, .. }) => report.fault(Some(manifest.id), Some(block), detail),
                Err(error) => return Err(error),
            }
            step(report)?;
        }
        let parts = manifest.state.map_or(0, |state| state.parts);
        for part in place::of_parts(manifest.id, parts) {
            match self.with_record(part, |segment, locator| verify_part(segment, locator, part, entry)) {
                Ok(bytes) => report.bytes += bytes,
                // Deleted, or the state replaced, since we began.
                Err(StoreError::NotFound { .. }) => {}
                Err(StoreError::Damaged { detail, .. }) => report.fault(Some(manifest.id), None, detail),
                Err(error) => return Err(error),
            }
            step(report)?;
        }
        Ok(())
    }

    /// Blocks that are in the catalog, and the first that are not: of a document that claims many, the rest are one fault.
    fn worth_reading(
        &self,
        document: DocumentId,
        end: u32,
        report: &mut VerifyReport,
    ) -> Result<impl Iterator<Item = u32> + use<>, StoreError> {
        let mut known = BTreeSet::new();
        for pair in catalog::scan::<Locator>(&self.catalog, &key::blocks(document)) {
            known.insert(key::index_of(&pair?.0)?);
        }
        let missing = (end as usize).saturating_sub(known.range(..end).count());
        let unread = missing.saturating_sub(limits::DIFFERENCES_MAX);
        if unread > 0 {
            let problem = format!("{unread} more of its blocks are in no segment");
            report.fault(Some(document), None, problem);
        }
        let mut left = limits::DIFFERENCES_MAX;
        Ok((0..end).filter(move |index| {
            let is_read = known.contains(index) || left > 0;
            left -= (is_read && !known.contains(index)) as usize;
            is_read
        }))
    }

    /// The manifest in the log is the one in the catalog.
    fn verify_manifest(&self, document: DocumentId) -> Result<u64, StoreError> {
        let look_up = || catalog::get::<(Locator, DocumentEntry)>(&self.catalog, &key::document(document));
        let Some((locator, entry)) = look_up()? else { return Ok(0) };
        match read_small(&self.handles, &locator)? {
            Some(Content::Document(found)) if found == entry => Ok(locator.bytes()),
            // A later manifest may have made room for compaction meanwhile.
            _ if look_up()?.is_none_or(|(now, _)| now != locator) => Ok(0),
            _ => Err(StoreError::Damaged { block: None, detail: "its manifest in the log is not readable".into() }),
        }
    }

    fn verify_collections(&self, report: &mut VerifyReport) -> Result<(), StoreError> {
        for pair in catalog::scan::<(Locator, CollectionEntry)>(&self.catalog, key::COLLECTIONS) {
            let (_, (locator, entry)) = pair?;
            match read_small(&self.handles, &locator)? {
                Some(Content::Collection(_, found)) if found == entry => {}
                _ => {
                    report.fault(None, None, format!("the record of collection {:?} is not readable", entry.spec.name))
                }
            }
        }
        Ok(())
    }

    fn verify_segments(&self, report: &mut VerifyReport) -> Result<(), StoreError> {
        for id in self.handles.list()? {
            match self.handles.get(id) {
                Ok(segment) if segment.header.is_some() => {}
                // Its creation failed.
                Ok(segment) if segment.len_bytes()? <= SEGMENT_HEADER_BYTES as u64 => {}
                Ok(_) => report.fault(None, None, format!("the header of segment {id} is damaged")),
                Err(error @ StoreError::Foreign { .. }) => report.fault(None, None, error.to_string()),
                // Removed since, or missing, which is reported elsewhere.
                Err(_) => {}
            }
        }
        for pair in catalog::scan::<Doubt>(&self.catalog, key::DOUBTS) {
            let Doubt { document, reason } = pair?.1;
            report.fault(Some(document).filter(|&document| document != NAMES), None, reason);
        }
        for pair in catalog::scan::<Damage>(&self.catalog, key::DAMAGES) {
            let damage = pair?.1;
            let document = damage.document.filter(|&document| document != DocumentId(0));
            let problem = format!(
                "{} bytes of segment {} at {} could not be read when the catalog was brought up to date",
                damage.bytes, damage.segment, damage.offset
            );
            report.fault(document, None, problem);
        }
        Ok(())
    }

    /// Every segment has its file, and its live bytes are what the catalog's locators add up to. Holds off writers
    /// for one pass over the catalog, not over payloads.
    fn verify_accounting(&self, report: &mut VerifyReport) -> Result<(), StoreError> {
        let Ok(mut writer) = self.writer.lock() else { return Err(StoreError::Poisoned) };
        // What a failed change left to be found out; if it cannot be, the counts are as they were.
        let _ = self.find_end(&mut writer);
        let catalog = &self.catalog;
        let mut live: BTreeMap<SegmentId, u64> = BTreeMap::new();
        let mut add = |locator: Locator| *live.entry(locator.segment).or_default() += locator.bytes();
        for pair in catalog::scan::<(Locator, CollectionEntry)>(catalog, key::COLLECTIONS) {
            add(pair?.1.0);
        }
        for pair in catalog::scan::<(Locator, DocumentEntry)>(catalog, key::DOCUMENTS) {
            add(pair?.1.0);
        }
        for pair in catalog::scan::<(Locator, Tombstone)>(catalog, key::TOMBSTONES) {
            add(pair?.1.0);
        }
        for pair in catalog::scan::<Locator>(catalog, key::BLOCKS) {
            add(pair?.1);
        }
        for (id, state) in &writer.ledger.segments {
            let found = live.remove(id).unwrap_or(0);
            if found != state.live_bytes {
                let problem = format!(
                    "segment {id}: the catalog counts {} live bytes, its records have {found}",
                    state.live_bytes
                );
                report.fault(None, None, problem);
            }
        }
        let files = self.handles.list()?;
        let in_use = writer.ledger.segments.iter().filter(|(_, state)| !state.retired);
        for id in in_use.clone().map(|(id, _)| id).filter(|id| !files.contains(id)) {
            report.fault(None, None, format!("the file of segment {id} is missing"));
        }
        for (&id, state) in in_use.filter(|(id, _)| files.contains(id)) {
            let Ok(segment) = self.handles.get(id) else { continue };
            let found = segment.len_bytes()?;
            if found < state.bytes {
                report.fault(
                    None,
                    None,
                    format!("segment {id}: the catalog counts {} bytes, the file has {found}", state.bytes),
                );
            }
        }
        for id in live.keys() {
            report.fault(None, None, format!("the catalog refers to segment {id}, which it does not list"));
        }
        Ok(())
    }
}

impl VerifyReport {
    pub(super) fn fault(&mut self, document: Option<DocumentId>, block: Option<BlockId>, problem: String) {
        self.faults.push(Fault { document, block, problem });
    }
}

/// Checks one block's record in full. Returns its bytes.
fn verify_block(
    segment: &Segment,
    locator: &Locator,
    block: BlockId,
    entry: &DocumentEntry,
    keys: Option<KeysLayout>,
) -> Result<u64, StoreError> {
    let damaged = |detail: String| StoreError::Damaged { block: Some(block), detail };
    let (header, record) = read_record(segment, locator, block)?;
    if header.collection != entry.manifest.collection {
        return Err(another(locator, block));
    }
    if block.index >= entry.manifest.blocks {
        return Ok(locator.bytes());
    }
    if header.tokens != entry.block_tokens {
        return Err(damaged(format!("it has {} tokens, expected {}", header.tokens, entry.block_tokens)));
    }
    if let Some(keys) = keys {
        let (at, len) = header.parts.span(Part::Keys);
        let found = &record[at as usize..at as usize + len];
        keys.check(block.index == 0, found).map_err(|error| damaged(error.to_string()))?;
    }
    Ok(locator.bytes())
}

/// Checks the record of one part of a state in full. Returns its bytes.
fn verify_part(segment: &Segment, locator: &Locator, part: BlockId, entry: &DocumentEntry) -> Result<u64, StoreError> {
    let (header, _) = read_record(segment, locator, part)?;
    if header.collection != entry.manifest.collection {
        return Err(another(locator, part));
    }
    Ok(locator.bytes())
}

/// Reads one block's record, or that of a part of a state, in full: its header and all bytes, each of which agrees with its
/// checksum.
pub(super) fn read_record(
    segment: &Segment,
    locator: &Locator,
    block: BlockId,
) -> Result<(RecordHeader, Vec<u8>), StoreError> {
    let mut record = vec![0; locator.bytes() as usize];
    read_exact(segment, locator.offset, block, &mut record)?;
    let mut header = [0; RECORD_HEADER_BYTES];
    header.copy_from_slice(&record[..RECORD_HEADER_BYTES]);
    let Some(header) = RecordHeader::check(&header, segment.salt, segment.id, locator.offset) else {
        return Err(StoreError::damaged(block, "its record header is damaged"));
    };
    let is_it = (header.kind, header.block) == (Kind::of_place(block.index), block)
        && (header.sequence, header.tokens, header.parts) == (locator.sequence, locator.tokens, locator.parts);
    if !is_it {
        return Err(another(locator, block));
    }
    match header.damaged_part(segment.salt, &record) {
        Some(part) => Err(mismatch(block, part)),
        None => Ok((header, record)),
    }
}

fn another(locator: &Locator, block: BlockId) -> StoreError {
    let detail = format!("another record lies at byte {} of segment {}", locator.offset, locator.segment);
    StoreError::damaged(block, &detail)
}
