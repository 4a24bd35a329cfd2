//! The one map from what the store says to what callers of the memory see.

use crate::api::{Entity, MemoryError};
use crate::store::{self, StoreError};
use crate::types::DocumentId;

impl From<StoreError> for MemoryError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Locked { path } => MemoryError::Locked { path: path.display().to_string() },
            StoreError::NotFound { entity } => not_stored(entity),
            StoreError::Invalid { field, expected, found } => {
                MemoryError::Invalid { field: field.into(), expected, found }
            }
            StoreError::Conflict { document, index } => MemoryError::Conflict { document, index },
            error @ StoreError::NotADataDirectory { .. } => MemoryError::Invalid {
                field: "data directory".into(),
                expected: "an empty folder, one that does not exist, or one that landmarkdb made".into(),
                found: error.to_string(),
            },
            StoreError::Damaged { block, detail } => MemoryError::DataLoss { block, detail },
            error @ (StoreError::Poisoned
            | StoreError::Io { .. }
            | StoreError::Catalog { .. }
            | StoreError::Foreign { .. }
            | StoreError::UnsupportedFormat { .. }) => MemoryError::Storage { detail: error.to_string() },
            StoreError::ReadOnly => MemoryError::ReadOnly,
            StoreError::GivenUp => gone(),
            // The memory checks these before it asks the store.
            error @ (StoreError::AlreadyExists { .. } | StoreError::OutOfOrder { .. } | StoreError::Sealed) => {
                MemoryError::Internal { detail: error.to_string() }
            }
        }
    }
}

/// For `map_err` of a write to one document: the store does not repeat which.
pub(super) fn writing(document: DocumentId) -> impl FnOnce(StoreError) -> MemoryError {
    move |error| match error {
        StoreError::Sealed => MemoryError::Sealed { document },
        StoreError::OutOfOrder { expected, found } => MemoryError::OutOfOrder { document, expected, found },
        error => error.into(),
    }
}

fn gone() -> MemoryError {
    MemoryError::Unavailable { target: "the caller".into(), detail: "it hung up".into() }
}

fn not_stored(entity: store::Entity) -> MemoryError {
    let (entity, id) = match entity {
        store::Entity::Collection(id) => (Entity::Collection, id.to_string()),
        store::Entity::Document(id) => (Entity::Document, id.to_string()),
        store::Entity::Block(id) => (Entity::Block, id.to_string()),
    };
    MemoryError::NotFound { entity, id }
}

pub(super) fn not_found(entity: Entity, id: impl ToString) -> MemoryError {
    MemoryError::NotFound { entity, id: id.to_string() }
}

pub(super) fn invalid(field: impl Into<String>, expected: impl ToString, found: impl ToString) -> MemoryError {
    MemoryError::Invalid { field: field.into(), expected: expected.to_string(), found: found.to_string() }
}

/// Refuses `found` of something if more than `limit`.
pub(super) fn at_most(what: &str, limit: u64, found: u64) -> Result<(), MemoryError> {
    if found <= limit { Ok(()) } else { Err(MemoryError::LimitExceeded { what: what.into(), limit, found }) }
}

/// The words for row `t * Hq + h`.
pub(super) fn query_place(row: usize, query_heads: usize) -> String {
    format!("query token {}, query head {}", row / query_heads, row % query_heads)
}

/// What stored values are too large for, where an earlier version let them in.
pub(super) fn not_finite(number: f32, place: String) -> MemoryError {
    let expected = "queries that the stored keys and values give finite answers to";
    invalid("queries", expected, format!("{number} for {place}"))
}
