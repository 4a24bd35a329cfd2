//! Why a call on the store failed.

use std::io;
use std::path::PathBuf;

use super::place;
use crate::shape::InvalidShape;
use crate::types::{BlockId, CollectionId, DocumentId};

/// What was looked for and is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entity {
    Collection(CollectionId),
    Document(DocumentId),
    Block(BlockId),
}

/// Why a call on the store failed. A failed call loses nothing that an earlier one acknowledged.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the data directory {} is in use by another process", path.display())]
    Locked { path: PathBuf },
    #[error(
        "{} is no data directory{}: name an empty folder, one that does not exist, or one that landmarkdb made",
        path.display(), holding(found)
    )]
    NotADataDirectory { path: PathBuf, found: String },
    #[error("no {entity}")]
    NotFound { entity: Entity },
    #[error("{name:?} already exists")]
    AlreadyExists { name: String },
    #[error("{field}: expected {expected}, found {found}")]
    Invalid { field: &'static str, expected: String, found: String },
    /// An append that leaves a gap, or whose blocks are not consecutive.
    #[error("expected block {expected} next, found block {found}")]
    OutOfOrder { expected: u32, found: u32 },
    #[error("the document is sealed")]
    Sealed,
    /// A durable block was offered again with other token ids.
    #[error("document {document} already holds other tokens at block {index}")]
    Conflict { document: DocumentId, index: u32 },
    /// Bytes on disk are not what was written. Names the block where one is known.
    #[error("stored data is damaged{}: {detail}", in_block(block))]
    Damaged { block: Option<BlockId>, detail: String },
    /// A segment file that was written in another data directory, or under another number.
    #[error("segment {segment} was written elsewhere: its file is not this data directory's; put the right one back")]
    Foreign { segment: u32 },
    #[error("segment {segment} needs format {oldest} or newer, this build reads up to {ours}: use a newer build")]
    UnsupportedFormat { segment: u32, oldest: u32, ours: u32 },
    /// The caller waits no longer.
    #[error("cancelled: the answer is no longer wanted")]
    GivenUp,
    /// Opened so that nothing is written.
    #[error("the data directory is open to be read only")]
    ReadOnly,
    /// A writer panicked, so what it left in memory is not known: reopening finds out from the disk.
    #[error("writes are refused since one of them panicked: restart the process that has the store open")]
    Poisoned,
    #[error("could not {step}: {source}")]
    Io { step: &'static str, source: io::Error },
    #[error("the catalog could not {step}: {source}; {}", advice(source))]
    Catalog { step: &'static str, source: io::Error },
}

impl StoreError {
    /// Of a disk without room.
    pub(super) fn is_full(&self) -> bool {
        let full =
            |source: &io::Error| matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        matches!(self, StoreError::Io { source, .. } | StoreError::Catalog { source, .. } if full(source))
    }

    /// Of a catalog that contradicts the segments or itself, and not of the system under it: that may allow later what it
    /// refuses now.
    pub(super) fn is_of_senseless_catalog(&self) -> bool {
        match self {
            StoreError::Damaged { .. } => true,
            StoreError::Catalog { source, .. } => {
                source.raw_os_error().is_none() && source.kind() != io::ErrorKind::TimedOut
            }
            _ => false,
        }
    }

    /// Of what lies at a place of a document: a block, or a part of its state.
    pub(super) fn damaged(found: BlockId, detail: &str) -> StoreError {
        match place::part_at(found.index) {
            None => StoreError::Damaged { block: Some(found), detail: detail.into() },
            Some(part) => {
                let detail = format!("part {part} of the state of document {}: {detail}", found.document);
                StoreError::Damaged { block: None, detail }
            }
        }
    }

    /// Of a call of the system.
    pub(super) fn is_of_system(&self) -> bool {
        matches!(self, StoreError::Io { .. } | StoreError::Catalog { .. })
    }

    /// Of a segment file that is not there.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, StoreError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// For `map_err`: an I/O error with what was being done.
    pub(super) fn io(step: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        move |source| StoreError::Io { step, source }
    }

    /// For `map_err`: a catalog error with what was being done.
    pub(super) fn catalog(step: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        move |source| StoreError::Catalog { step, source }
    }
}

/// Of ids and numbers that are never reused, when all are.
pub(super) fn used_up(field: &'static str) -> StoreError {
    StoreError::Invalid { field, expected: "one that was never given out".into(), found: "all of them were".into() }
}

impl From<InvalidShape> for StoreError {
    fn from(error: InvalidShape) -> Self {
        StoreError::Invalid { field: error.field, expected: error.expected, found: error.found }
    }
}

impl std::fmt::Display for Entity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Entity::Collection(id) => write!(f, "collection {id}"),
            Entity::Document(id) => write!(f, "document {id}"),
            Entity::Block(id) => write!(f, "block {id}"),
        }
    }
}

fn in_block(block: &Option<BlockId>) -> String {
    block.map(|block| format!(" in block {block}")).unwrap_or_default()
}

/// Of a process, or a system, that has as many open files as it may have.
pub(super) fn is_out_of_files(error: &io::Error) -> bool {
    let errnos = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE];
    error.raw_os_error().is_some_and(|code| errnos.iter().any(|errno| errno.raw_os_error() == code))
}

/// What to do about a catalog that fails.
fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        _ if is_out_of_files(source) => "raise the limit of open files (`ulimit -n`, for all processes `fs.file-max`)",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room on the disk",
        _ => "repair the directory if this goes on: that rebuilds the catalog",
    }
}

fn holding(found: &str) -> String {
    if found.is_empty() { String::new() } else { format!(" (it holds {found:?})") }
}
