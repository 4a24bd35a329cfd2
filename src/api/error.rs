//! Why a call on a block memory failed.

use crate::shape::{Fingerprint, InvalidShape};
use crate::types::{BlockId, DocumentId};
use crate::until::Until;

/// What kind of thing a name or id was looked for among.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entity {
    Collection,
    Document,
    Block,
}

/// Why a call on a block memory failed. Nothing acknowledged is ever lost by a failed call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MemoryError {
    #[error("no {entity} {id}: list what exists")]
    NotFound { entity: Entity, id: String },
    #[error("a request without {field}")]
    Missing { field: String },
    #[error("{field}: expected {expected}, found {found}")]
    Invalid { field: String, expected: String, found: String },
    #[error(
        "collection {collection:?} belongs to the model with fingerprint {stored:#}, this one has {offered:#}: use the model, \
         key rule and dtypes it was made with, or another collection"
    )]
    FingerprintMismatch { collection: String, stored: Fingerprint, offered: Fingerprint },
    #[error(
        "document {document} already holds other tokens at block {index}: append what it holds, or use another name"
    )]
    Conflict { document: DocumentId, index: u32 },
    #[error("document {document} is sealed: appends need a new document")]
    Sealed { document: DocumentId },
    #[error(
        "document {document} has {expected} full blocks, the append begins at {found}: send block {expected} first"
    )]
    OutOfOrder { document: DocumentId, expected: u32, found: u32 },
    #[error(
        "document {document} has {found} tokens, the append expected {expected}: another writer was there; read the document again and \
         append behind what it holds, or use another name"
    )]
    UnexpectedLength { document: DocumentId, expected: u64, found: u64 },
    #[error("{what}: at most {limit} are allowed, found {found}")]
    LimitExceeded { what: String, limit: u64, found: u64 },
    /// Others have what the call needs; it was not begun.
    #[error("{what}: all in use now, try again in {retry_ms} ms")]
    Busy { what: String, retry_ms: u64 },
    #[error("stored data is damaged{}: {detail}; verify the directory", in_block(.block))]
    DataLoss { block: Option<BlockId>, detail: String },
    /// The store stopped taking writes after a failed flush, or the disk refused.
    #[error("storage failed: {detail}")]
    Storage { detail: String },
    #[error("the data directory {path} is in use by another process: connect to that process, or stop it")]
    Locked { path: String },
    #[error("{target} cannot be reached: {detail}")]
    Unavailable { target: String, detail: String },
    #[error("no answer within {ms} ms")]
    DeadlineExceeded { ms: u64 },
    /// A bug: the message says where.
    #[error("internal error: {detail}")]
    Internal { detail: String },
}

pub type Result<T> = std::result::Result<T, MemoryError>;

fn in_block(block: &Option<BlockId>) -> String {
    block.map(|block| format!(" in block {block}")).unwrap_or_default()
}

impl std::fmt::Display for Entity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Entity::Collection => "collection",
            Entity::Document => "document",
            Entity::Block => "block",
        })
    }
}

impl Until {
    /// # Errors
    /// `DeadlineExceeded` when time has run out, `Unavailable` when the caller has hung up.
    pub fn check(&self) -> Result<()> {
        if self.is_given_up() {
            return Err(MemoryError::Unavailable { target: "the caller".into(), detail: "it hung up".into() });
        }
        if self.is_late() { Err(MemoryError::DeadlineExceeded { ms: self.timeout_ms() }) } else { Ok(()) }
    }
}

impl From<InvalidShape> for MemoryError {
    fn from(error: InvalidShape) -> Self {
        MemoryError::Invalid { field: error.field.into(), expected: error.expected, found: error.found }
    }
}
