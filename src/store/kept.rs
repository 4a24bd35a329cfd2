//! What does a document keep for its model? A state: bytes of the model's own, in parts, taken after one of the document's
//! tokens. It is replaced as a whole. All parts and the manifest that names them are one group, so that a crash leaves the
//! state that was there or the new one, and a part of another state is told by its sequence.

use bytes::Bytes;

use super::document::{KeptState, Manifest};
use super::error::{Entity, StoreError};
use super::place;
use super::read::read_part;
use super::record::{Part, Parts};
use super::state::Store;
use crate::limits;
use crate::types::DocumentId;

impl Store {
    /// Keeps a state that was taken after the last of the document's `tokens` tokens, in place of the one that it has. It is
    /// durable when this returns.
    pub fn put_state(&self, document: DocumentId, tokens: u64, parts: &[Bytes]) -> Result<Manifest, StoreError> {
        let records = check_parts(parts)?;
        let bytes = records.iter().map(Parts::record_bytes).sum();
        self.write(|writer| {
            let mut entry = self.entry(document)?;
            self.check_undoubted(document)?;
            if entry.manifest.sealed {
                return Err(StoreError::Sealed);
            }
            if tokens != entry.tokens() {
                return Err(invalid("tokens of the state", entry.tokens(), tokens));
            }
            writer.may_have_much_dead |= entry.manifest.state.is_some();
            self.make_room(writer, bytes)?;
            self.commit(writer, |group| {
                let places = place::of_parts(document, parts.len() as u32);
                for ((place, part), record) in places.zip(parts).zip(&records) {
                    group.state_part(entry.manifest.collection, place, part, *record)?;
                }
                let (parts, sequence) = (parts.len() as u32, group.number());
                entry.set_state(Some(KeptState { tokens, parts, bytes, sequence }));
                group.document(entry.clone())
            })?;
            Ok(entry.manifest)
        })
    }

    /// One part of a document's state, and the state that it is of. `None` if the document keeps none, or none of so many parts.
    pub fn read_state_part(&self, document: DocumentId, part: u32) -> Result<Option<(KeptState, Vec<u8>)>, StoreError> {
        let place = place::of_part(document, part);
        loop {
            let state = self.manifest(document)?.state.filter(|state| part < state.parts);
            let Some(state) = state else { return Ok(None) };
            let read = self.with_record(place, |segment, locator| {
                if locator.sequence != state.sequence {
                    return Ok(None);
                }
                let mut bytes = Vec::new();
                read_part(segment, locator, place, Part::Piece(0), &mut bytes)?;
                Ok(Some(bytes))
            });
            match read {
                Ok(Some(bytes)) => return Ok(Some((state, bytes))),
                // Another state may have come in its place since the manifest was read.
                Ok(None) | Err(StoreError::NotFound { entity: Entity::Block(_) }) => {
                    if self.manifest(document)?.state == Some(state) {
                        return Err(StoreError::damaged(place, "its record is that of another state"));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// The sizes of the records of a state.
fn check_parts(parts: &[Bytes]) -> Result<Vec<Parts>, StoreError> {
    if parts.is_empty() || parts.len() > limits::STATE_PARTS_MAX {
        return Err(invalid("parts of the state", format!("1 to {}", limits::STATE_PARTS_MAX), parts.len()));
    }
    let total: u64 = parts.iter().map(|part| part.len() as u64).sum();
    if total > limits::STATE_BYTES_MAX {
        return Err(invalid("bytes of the state", format!("at most {}", limits::STATE_BYTES_MAX), total));
    }
    parts.iter().map(|part| check_part(part.len())).collect()
}

fn check_part(bytes: usize) -> Result<Parts, StoreError> {
    if bytes == 0 || bytes > limits::STATE_PART_BYTES_MAX {
        return Err(invalid("bytes of a part of the state", format!("1 to {}", limits::STATE_PART_BYTES_MAX), bytes));
    }
    Ok(Parts { meta_bytes: 0, keys_bytes: 0, piece_bytes: bytes as u32, pieces: 1 })
}

fn invalid(field: &'static str, expected: impl ToString, found: impl ToString) -> StoreError {
    StoreError::Invalid { field, expected: expected.to_string(), found: found.to_string() }
}
