//! Why a call on a block memory failed.

use crate::shape::{Fingerprint, InvalidShape};
use crate::types::{BlockId, DocumentId};
use crate::until::Until;

/// The kind of thing that a request named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Entity {
    /// Named by a [`CollectionId`](crate::CollectionId) or a name.
    Collection,
    /// Named by a [`DocumentId`], a name, or what it should have.
    Document,
    /// Named by a [`BlockId`].
    Block,
}

/// Why a call on a block memory failed. A failed call loses nothing that was acknowledged. Texts are human-readable;
/// programs look at the variant.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The request names something that does not exist.
    #[error("no {entity} {id}: list what exists")]
    NotFound {
        /// The kind of thing.
        entity: Entity,
        /// The id or name as a person would write it.
        id: String,
    },
    /// The request lacks a required field.
    #[error("a request without {field}")]
    Missing {
        /// Path of the field in the request, such as `blocks[0].k`.
        field: String,
    },
    /// The request has a value that the memory cannot take.
    #[error("{field}: expected {expected}, found {found}")]
    Invalid {
        /// Path of the field in the request, such as `scope[0].blocks`.
        field: String,
        /// The values that the field may have.
        expected: String,
        /// The value that it has.
        found: String,
    },
    /// The collection belongs to another model, key rule or dtype.
    #[error(
        "collection {collection:?} belongs to the model with fingerprint {stored:#}, this one has {offered:#}: use the model, \
         key rule and dtypes it was made with, or another collection"
    )]
    FingerprintMismatch {
        /// Name of the collection.
        collection: String,
        /// The fingerprint that the collection is bound to.
        stored: Fingerprint,
        /// The fingerprint of the caller's specification.
        offered: Fingerprint,
    },
    /// A durable block has other token ids than the append.
    #[error(
        "document {document} already holds other tokens at block {index}: append what it holds, or use another name"
    )]
    Conflict {
        /// The document of the append.
        document: DocumentId,
        /// The first block that differs.
        index: u32,
    },
    /// The document takes no more appends.
    #[error("document {document} is sealed: appends need a new document")]
    Sealed {
        /// The document of the append.
        document: DocumentId,
    },
    /// The append leaves a gap behind the document's last full block.
    #[error(
        "document {document} has {expected} full blocks, the append begins at {found}: send block {expected} first"
    )]
    OutOfOrder {
        /// The document of the append.
        document: DocumentId,
        /// Index of the block that may come next.
        expected: u32,
        /// Index of the block that came.
        found: u32,
    },
    /// The document's length is not [`AppendRequest::expected_tokens`](super::AppendRequest::expected_tokens).
    #[error(
        "document {document} has {found} tokens, the append expected {expected}: another writer was there; read the document again and \
         append behind what it holds, or use another name"
    )]
    UnexpectedLength {
        /// The document of the append.
        document: DocumentId,
        /// Tokens that the append expected the document to have.
        expected: u64,
        /// Tokens that it has.
        found: u64,
    },
    /// The request passes a bound of [`limits`](crate::limits), or needs more working memory than the whole budget.
    #[error("{what}: at most {limit} are allowed, found {found}")]
    LimitExceeded {
        /// What was counted, with its unit.
        what: String,
        /// The largest count allowed.
        limit: u64,
        /// The request's count.
        found: u64,
    },
    /// Other calls have the resources that this one needs. It was not begun.
    #[error("{what}: all in use now, try again in {retry_ms} ms")]
    Busy {
        /// The resource in use.
        what: String,
        /// When to try again, in milliseconds.
        retry_ms: u64,
    },
    /// Bytes on disk are not those that were written.
    #[error("stored data is damaged{}: {detail}; verify the directory", in_block(.block))]
    DataLoss {
        /// The damaged block; `None` where the damage belongs to no single one.
        block: Option<BlockId>,
        /// What does not match.
        detail: String,
    },
    /// The store stopped taking writes after a failed flush, or the disk refused.
    #[error("storage failed: {detail}")]
    Storage {
        /// The step that failed, and the reason that the system gave.
        detail: String,
    },
    /// The memory was opened so that nothing is written.
    #[error("the memory is open to be read only: open it for writing to change what it holds")]
    ReadOnly,
    /// Another process has the data directory open.
    #[error("the data directory {path} is in use by another process: connect to that process, or stop it")]
    Locked {
        /// Path of the data directory.
        path: String,
    },
    /// The other side of a connection is gone: the service, or the caller that waited for the answer.
    #[error("{target} cannot be reached: {detail}")]
    Unavailable {
        /// The address of the service, or `the caller`.
        target: String,
        /// What happened to the connection.
        detail: String,
    },
    /// The caller's deadline passed. A write may have become durable nevertheless.
    #[error("no answer within {ms} ms")]
    DeadlineExceeded {
        /// The time that the caller gave, in milliseconds.
        ms: u64,
    },
    /// A bug: the message says where.
    #[error("internal error: {detail}")]
    Internal {
        /// The assumption that did not hold.
        detail: String,
    },
}

/// The result of a call on a [`BlockMemory`](super::BlockMemory).
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
    /// Ends work whose answer is no longer wanted: call it between steps.
    ///
    /// # Errors
    /// [`MemoryError::DeadlineExceeded`] when time has run out, [`MemoryError::Unavailable`] when the caller has hung up.
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
