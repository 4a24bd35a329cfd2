//! `MemoryError` as the typed `Error` message, both ways, variant for variant.

use super::convert::{digest, required};
use super::v1;
use super::v1::error::{self as wire, Kind};
use landmarkdb::{BlockId, DocumentId, Entity, Fingerprint, MemoryError, Result};

/// Longest text of one field. Error details travel in HTTP/2 trailers, which peers bound at 16 KiB.
const TEXT_BYTES_MAX: usize = 1024;

/// Cuts `text` between characters.
pub(super) fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

impl From<&MemoryError> for v1::Error {
    fn from(error: &MemoryError) -> Self {
        let text = |text: &String| cut(text.clone());
        let kind = match error {
            MemoryError::NotFound { entity, id } => {
                Kind::NotFound(wire::NotFound { entity: wire::Entity::from(*entity).into(), id: text(id) })
            }
            MemoryError::Missing { field } => Kind::Missing(wire::Missing { field: text(field) }),
            MemoryError::Invalid { field, expected, found } => {
                Kind::Invalid(wire::Invalid { field: text(field), expected: text(expected), found: text(found) })
            }
            MemoryError::FingerprintMismatch { collection, stored, offered } => {
                Kind::FingerprintMismatch(wire::FingerprintMismatch {
                    collection: text(collection),
                    stored: stored.0.to_vec().into(),
                    offered: offered.0.to_vec().into(),
                })
            }
            MemoryError::Conflict { document, index } => {
                Kind::Conflict(wire::Conflict { document: document.0, index: *index })
            }
            MemoryError::Sealed { document } => Kind::Sealed(wire::Sealed { document: document.0 }),
            MemoryError::OutOfOrder { document, expected, found } => {
                Kind::OutOfOrder(wire::OutOfOrder { document: document.0, expected: *expected, found: *found })
            }
            MemoryError::UnexpectedLength { document, expected, found } => {
                let (document, expected, found) = (document.0, *expected, *found);
                Kind::UnexpectedLength(wire::UnexpectedLength { document, expected, found })
            }
            MemoryError::LimitExceeded { what, limit, found } => {
                Kind::LimitExceeded(wire::LimitExceeded { what: text(what), limit: *limit, found: *found })
            }
            MemoryError::Busy { what, retry_ms } => Kind::Busy(wire::Busy { what: text(what), retry_ms: *retry_ms }),
            MemoryError::DataLoss { block, detail } => {
                Kind::DataLoss(wire::DataLoss { block: block.map(v1::BlockId::from), detail: text(detail) })
            }
            MemoryError::Storage { detail } => Kind::Storage(wire::Storage { detail: text(detail) }),
            MemoryError::ReadOnly => Kind::ReadOnly(wire::ReadOnly {}),
            MemoryError::Locked { path } => Kind::Locked(wire::Locked { path: text(path) }),
            MemoryError::Unavailable { target, detail } => {
                Kind::Unavailable(wire::Unavailable { target: text(target), detail: text(detail) })
            }
            MemoryError::DeadlineExceeded { ms } => Kind::DeadlineExceeded(wire::DeadlineExceeded { ms: *ms }),
            MemoryError::Internal { detail } => Kind::Internal(wire::Internal { detail: text(detail) }),
            // A kind without a message: the client reads its text.
            other => Kind::Internal(wire::Internal { detail: cut(other.to_string()) }),
        };
        v1::Error { kind: Some(kind) }
    }
}

impl TryFrom<v1::Error> for MemoryError {
    type Error = MemoryError;

    fn try_from(error: v1::Error) -> Result<MemoryError> {
        Ok(match required("kind", error.kind)? {
            Kind::NotFound(e) => MemoryError::NotFound { entity: e.entity().try_into()?, id: e.id },
            Kind::Missing(e) => MemoryError::Missing { field: e.field },
            Kind::Invalid(e) => MemoryError::Invalid { field: e.field, expected: e.expected, found: e.found },
            Kind::FingerprintMismatch(e) => MemoryError::FingerprintMismatch {
                collection: e.collection,
                stored: Fingerprint(digest("stored", &e.stored)?),
                offered: Fingerprint(digest("offered", &e.offered)?),
            },
            Kind::Conflict(e) => MemoryError::Conflict { document: DocumentId(e.document), index: e.index },
            Kind::Sealed(e) => MemoryError::Sealed { document: DocumentId(e.document) },
            Kind::OutOfOrder(e) => {
                MemoryError::OutOfOrder { document: DocumentId(e.document), expected: e.expected, found: e.found }
            }
            Kind::UnexpectedLength(e) => {
                MemoryError::UnexpectedLength { document: DocumentId(e.document), expected: e.expected, found: e.found }
            }
            Kind::LimitExceeded(e) => MemoryError::LimitExceeded { what: e.what, limit: e.limit, found: e.found },
            Kind::Busy(e) => MemoryError::Busy { what: e.what, retry_ms: e.retry_ms },
            Kind::DataLoss(e) => MemoryError::DataLoss { block: e.block.map(BlockId::from), detail: e.detail },
            Kind::Storage(e) => MemoryError::Storage { detail: e.detail },
            Kind::ReadOnly(wire::ReadOnly {}) => MemoryError::ReadOnly,
            Kind::Locked(e) => MemoryError::Locked { path: e.path },
            Kind::Unavailable(e) => MemoryError::Unavailable { target: e.target, detail: e.detail },
            Kind::DeadlineExceeded(e) => MemoryError::DeadlineExceeded { ms: e.ms },
            Kind::Internal(e) => MemoryError::Internal { detail: e.detail },
        })
    }
}

impl From<Entity> for wire::Entity {
    fn from(entity: Entity) -> Self {
        match entity {
            Entity::Collection => wire::Entity::Collection,
            Entity::Document => wire::Entity::Document,
            Entity::Block => wire::Entity::Block,
            // The client cannot read it, and reports the code and text of the status.
            _ => wire::Entity::Unspecified,
        }
    }
}

impl TryFrom<wire::Entity> for Entity {
    type Error = MemoryError;

    fn try_from(entity: wire::Entity) -> Result<Self> {
        match entity {
            wire::Entity::Collection => Ok(Entity::Collection),
            wire::Entity::Document => Ok(Entity::Document),
            wire::Entity::Block => Ok(Entity::Block),
            wire::Entity::Unspecified => Err(MemoryError::Missing { field: "entity".into() }),
        }
    }
}
