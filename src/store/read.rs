//! Reading blocks: one positioned read per part, checked, without a lock across it.

use std::io;

use super::catalog::{self, key};
use super::document::BlockMeta;
use super::error::{Entity, StoreError};
use super::handles::{Handles, Segment};
use super::ledger::Doubt;
use super::place;
use super::record::{CRC_BYTES, Content, DocumentEntry, Locator, Part, Stamp, decode_meta};
use super::scan::Item;
use super::state::Store;
use crate::types::{BlockId, DocumentId};

impl Store {
    /// Token ids and text of a block, and the bytes that its record takes on disk. Index `blocks` is the tail.
    pub fn read_meta(&self, block: BlockId) -> Result<(BlockMeta, u64), StoreError> {
        self.with_block(block, |segment, locator| {
            let mut bytes = Vec::new();
            read_part(segment, locator, block, Part::Meta, &mut bytes)?;
            let meta = decode_meta(locator.tokens, &bytes)
                .ok_or_else(|| StoreError::damaged(block, "its token list is too short"))?;
            Ok((meta, locator.bytes()))
        })
    }

    /// The landmark keys as they were appended; empty for a tail.
    pub fn read_keys(&self, block: BlockId) -> Result<Vec<u8>, StoreError> {
        self.with_block(block, |segment, locator| {
            let mut keys = Vec::new();
            read_part(segment, locator, block, Part::Keys, &mut keys)?;
            Ok(keys)
        })
    }

    /// Replaces `into` by one piece (`layer * Hkv + kv_head`), read with a single positioned read and checked.
    pub fn read_piece(&self, block: BlockId, piece: usize, into: &mut Vec<u8>) -> Result<(), StoreError> {
        self.with_block(block, |segment, locator| read_part(segment, locator, block, piece_of(locator, piece)?, into))
    }

    /// As [`read_piece`](Self::read_piece), but only what needs no disk: false, and `into` in any state, if it would.
    pub fn read_piece_at_hand(&self, block: BlockId, piece: usize, into: &mut Vec<u8>) -> Result<bool, StoreError> {
        self.with_block(block, |segment, locator| {
            let part = piece_of(locator, piece)?;
            let (begin, len) = locator.parts.span(part);
            into.resize(len + CRC_BYTES, 0);
            let read = segment.file.read_at_hand(locator.offset + begin, into);
            if !read.map_err(StoreError::io("read from a segment"))? {
                return Ok(false);
            }
            check_part(stamp(segment, locator, block), part, into).map(|()| true)
        })
    }

    /// A hint that a piece will be read soon: those of many calls come from the disk side by side. Whatever is wrong with
    /// it is told by the read.
    pub fn expect_piece(&self, block: BlockId, piece: usize) {
        let _ = self.with_block(block, |segment, locator| {
            let (begin, len) = locator.parts.span(piece_of(locator, piece)?);
            segment.file.expect(locator.offset + begin, (len + CRC_BYTES) as u64);
            Ok(())
        });
    }

    /// The segment file that holds a piece, by name, and where its bytes begin: for comparisons with other ways to read.
    pub fn place_of_piece(&self, block: BlockId, piece: usize) -> Result<(String, u64), StoreError> {
        let locator = self.locate(block)?;
        let (begin, _) = locator.parts.span(Part::Piece(piece as u32));
        Ok((super::segment::file_name(locator.segment), locator.offset + begin))
    }

    /// Replaces `into` by all L * Hkv pieces, one behind the other, read with a single positioned read and checked.
    pub fn read_pieces(&self, block: BlockId, into: &mut Vec<u8>) -> Result<(), StoreError> {
        self.with_block(block, |segment, locator| {
            let (begin, piece_bytes) = locator.parts.span(Part::Piece(0));
            into.clear();
            into.resize((locator.bytes() - begin) as usize, 0);
            read_exact(segment, locator.offset + begin, block, into)?;
            let (stamp, stride) = (stamp(segment, locator, block), piece_bytes + CRC_BYTES);
            for piece in 0..locator.parts.pieces as usize {
                let part = Part::Piece(piece as u32);
                let from = piece * stride;
                stamp.checked(part, &into[from..from + stride]).ok_or_else(|| mismatch(block, part))?;
                // The checksums in between go.
                into.copy_within(from..from + piece_bytes, piece * piece_bytes);
            }
            into.truncate(locator.parts.pieces as usize * piece_bytes);
            Ok(())
        })
    }

    /// Runs `read` on the file and place of a block.
    pub(super) fn with_block<T>(
        &self,
        block: BlockId,
        read: impl FnMut(&Segment, &Locator) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        // Callers may ask for any index, and parts of states are no blocks.
        match place::part_at(block.index) {
            None => self.with_record(block, read),
            Some(_) => Err(StoreError::NotFound { entity: Entity::Block(block) }),
        }
    }

    /// The same for what lies at any place of a document. Compaction may move the block and remove the file between the
    /// two look-ups; then the catalog already knows the new place.
    pub(super) fn with_record<T>(
        &self,
        block: BlockId,
        mut read: impl FnMut(&Segment, &Locator) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut locator = self.locate(block)?;
        loop {
            match self.handles.get(locator.segment) {
                Ok(segment) => return read(&segment, &locator),
                Err(error) if error.is_missing() => {
                    let again = self.locate(block)?;
                    if again.segment == locator.segment {
                        return Err(StoreError::damaged(block, &format!("segment {} is missing", locator.segment)));
                    }
                    locator = again;
                }
                Err(error @ StoreError::Foreign { .. }) => return Err(StoreError::damaged(block, &error.to_string())),
                Err(error) => return Err(error),
            }
        }
    }

    /// Where a block lies. `Damaged` if its document has it and the catalog has lost it.
    fn locate(&self, block: BlockId) -> Result<Locator, StoreError> {
        let look_up = || {
            let catalog = || {
                self.check_undoubted(block.document)?;
                catalog::get(self.readable(), &key::block(block))
            };
            // States are read too seldom to keep where they lie.
            if place::part_at(block.index).is_some() { catalog() } else { self.locators.find(block, catalog) }
        };
        if let Some(locator) = look_up()? {
            return Ok(locator);
        }
        let not_found = StoreError::NotFound { entity: Entity::Block(block) };
        if !self.covers(block)? {
            return Err(not_found);
        }
        // It may have been appended, or deleted, since the first look.
        match look_up()? {
            Some(locator) => Ok(locator),
            None if self.covers(block)? => {
                Err(StoreError::damaged(block, "no intact record of it was found in any segment"))
            }
            None => Err(not_found),
        }
    }

    fn covers(&self, block: BlockId) -> Result<bool, StoreError> {
        let entry = catalog::get::<(Locator, DocumentEntry)>(self.readable(), &key::document(block.document))?;
        Ok(entry.is_some_and(|(_, entry)| entry.manifest.covers(block.index)))
    }

    /// `Damaged` if what is known of a document may be outdated.
    pub(super) fn check_undoubted(&self, document: DocumentId) -> Result<(), StoreError> {
        match catalog::get::<Doubt>(self.readable(), &key::doubt(document))? {
            None => Ok(()),
            Some(doubt) => Err(StoreError::Damaged { block: None, detail: doubt.reason }),
        }
    }
}

fn stamp(segment: &Segment, locator: &Locator, block: BlockId) -> Stamp {
    Stamp { salt: segment.salt, sequence: locator.sequence, block }
}

pub(super) fn read_part(
    segment: &Segment,
    locator: &Locator,
    block: BlockId,
    part: Part,
    into: &mut Vec<u8>,
) -> Result<(), StoreError> {
    let (begin, len) = locator.parts.span(part);
    into.resize(len + CRC_BYTES, 0);
    read_exact(segment, locator.offset + begin, block, into)?;
    check_part(stamp(segment, locator, block), part, into)
}

/// Takes the checksum off, which has to agree.
fn check_part(stamp: Stamp, part: Part, bytes: &mut Vec<u8>) -> Result<(), StoreError> {
    let len = stamp.checked(part, bytes).ok_or_else(|| mismatch(stamp.block, part))?.len();
    bytes.truncate(len);
    Ok(())
}

fn piece_of(locator: &Locator, piece: usize) -> Result<Part, StoreError> {
    let pieces = locator.parts.pieces;
    let number = u32::try_from(piece).ok().filter(|&piece| piece < pieces);
    number.map(Part::Piece).ok_or_else(|| StoreError::Invalid {
        field: "piece",
        expected: format!("less than {pieces}"),
        found: piece.to_string(),
    })
}

/// Reads bytes that belong to a block: a file that ends early is damage to it.
pub(super) fn read_exact(segment: &Segment, offset: u64, block: BlockId, into: &mut [u8]) -> Result<(), StoreError> {
    segment.file.read_at(offset, into).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => StoreError::damaged(block, "its segment file ends before it"),
        _ => StoreError::Io { step: "read from a segment", source },
    })
}

pub(super) fn mismatch(block: BlockId, part: Part) -> StoreError {
    let part = match part {
        Part::Meta => "its tokens and text".to_string(),
        Part::Keys => "its landmark keys".to_string(),
        Part::Piece(_) if place::part_at(block.index).is_some() => "its bytes".to_string(),
        Part::Piece(piece) => format!("its piece {piece}"),
    };
    StoreError::damaged(block, &format!("checksum mismatch in {part}"))
}

/// What a record other than a block says; `None` if it is damaged or its segment is not there.
pub(super) fn read_small(handles: &Handles, locator: &Locator) -> Result<Option<Content>, StoreError> {
    let segment = match handles.get(locator.segment) {
        Err(StoreError::Foreign { .. }) => return Ok(None),
        Err(error) if error.is_missing() => return Ok(None),
        segment => segment?,
    };
    let end = locator.offset + locator.bytes();
    if segment.len_bytes()? < end {
        return Ok(None);
    }
    match segment.scan(locator.offset, end).next().transpose()? {
        Some(Item::Record(scanned)) if scanned.locator(segment.id) == *locator => Ok(scanned.content()),
        _ => Ok(None),
    }
}
