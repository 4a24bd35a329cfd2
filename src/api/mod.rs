//! The product without a network: what a block memory does, in process (`memory::LocalMemory`) and remote
//! (`client::RemoteMemory`) alike. Both give identical answers, bit for bit.
//!
//! All calls block. Positions are never absolute: a query says how far it is from the start of its local window,
//! and the memory places retrieved blocks in slots just before that window (see [`AttendRequest`]).

mod error;
mod requests;

pub use error::{Entity, MemoryError, Result};
pub use requests::{
    AppendRequest, AttendRequest, Attended, BlockInfo, BlockText, CollectionInfo, Deleted, DocumentInfo, Fault,
    FetchRequest, Health, Hits, LookupRequest, Measured, NewBlock, Stats, StoredBlock, Tensor, TuneIndex, TuneQuery,
    TuneReport, TuneRequest, TuneStep, VerifyReport, check_together,
};

use crate::shape::CollectionSpec;
use crate::types::{BlockRange, CollectionId, DocumentId, Engine};
use crate::until::Until;

/// A block memory. Shared between threads; writers to different documents do not wait for each other's encoding.
pub trait BlockMemory: Send + Sync {
    /// Creates the collection, or opens the one of that name if its fingerprint agrees.
    fn open_collection(&self, spec: &CollectionSpec) -> Result<CollectionInfo>;

    fn collections(&self) -> Result<Vec<CollectionInfo>>;

    /// Changes what answers lookups in a collection, durably. Indexes are built anew at the next lookup of each document;
    /// lookups under way are answered by the engine that they began with. An engine that this machine does not have is
    /// refused ([`MemoryError::Invalid`]).
    fn set_engine(&self, collection: CollectionId, engine: Engine) -> Result<CollectionInfo>;

    /// Measures the engines that may answer a collection's lookups on its longest document, and sets the fastest that finds
    /// enough: flat, sq4, sq8, cuda where there is a GPU, and the indexes that the request names. `progress` is told each
    /// step. Lookups of others are answered meanwhile by the engine that is measured; after an error the collection has the
    /// engine again that it had.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the collection, or if no document of it has a full block, [`MemoryError::Missing`]
    /// without queries, [`MemoryError::LimitExceeded`] for more than `limits` allows, whatever a lookup is refused with, and
    /// [`MemoryError::Invalid`] from a memory that has no engines to choose from.
    fn tune(&self, _request: &TuneRequest, _progress: &mut dyn FnMut(TuneStep), _until: &Until) -> Result<TuneReport> {
        Err(MemoryError::Invalid {
            field: "tune".into(),
            expected: "a memory that measures its engines".into(),
            found: "one that does not".into(),
        })
    }

    /// Creates an empty open document, or gives the one of that name.
    fn open_document(&self, collection: CollectionId, name: &str) -> Result<DocumentInfo>;

    /// All documents of a collection, by name.
    fn documents(&self, collection: CollectionId) -> Result<Vec<DocumentInfo>>;

    fn document(&self, document: DocumentId) -> Result<DocumentInfo>;

    /// Durable when it returns.
    fn append(&self, request: AppendRequest) -> Result<DocumentInfo>;

    /// Takes no more appends from now on. Sealing a sealed document changes nothing.
    fn seal(&self, document: DocumentId) -> Result<DocumentInfo>;

    fn lookup(&self, request: &LookupRequest) -> Result<Hits>;

    fn attend(&self, request: &AttendRequest) -> Result<Attended>;

    /// As [`lookup`](Self::lookup), for a caller that waits no longer than `until`: work that has begun ends then, with
    /// [`MemoryError::DeadlineExceeded`] or, if the caller is gone, any other error.
    fn lookup_until(&self, request: &LookupRequest, until: &Until) -> Result<Hits> {
        until.check()?;
        self.lookup(request)
    }

    /// As [`attend`](Self::attend), for a caller that waits no longer than `until`.
    fn attend_until(&self, request: &AttendRequest, until: &Until) -> Result<Attended> {
        until.check()?;
        self.attend(request)
    }

    /// Answers requests whose queries are all known, of many layers or sequences, sooner than one call after the other
    /// would: one outcome per request, in their order, and each what [`attend`](Self::attend) gives. A refused request
    /// fails alone; more than `limits::ATTEND_REQUESTS_MAX` are refused together.
    fn attend_all(&self, requests: &[AttendRequest]) -> Vec<Result<Attended>> {
        requests.iter().map(|request| self.attend(request)).collect()
    }

    /// As [`attend_all`](Self::attend_all), for a caller that waits no longer than `until`. Requests that need more
    /// memory together than there is are refused as a whole, before any of them is begun.
    fn attend_all_until(&self, requests: &[AttendRequest], until: &Until) -> Result<Vec<Result<Attended>>> {
        until.check()?;
        Ok(self.attend_all(requests))
    }

    fn fetch(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>>;

    /// Blocks of a range without payload; the tail counts as index `blocks`. A range past the end is cut.
    fn blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>>;

    /// Deletes, durably when it returns; space comes back until it is within `limits::SPACE_PERCENT_MAX`.
    fn delete(&self, document: DocumentId) -> Result<Deleted>;

    fn stats(&self) -> Result<Stats>;

    /// What the memory can do now; asked often, so it has to be cheap.
    fn health(&self) -> Health {
        Health::Serving
    }

    /// Reads everything that a document (or all) refers to and checks it. `progress` is told the bytes read so far
    /// and in all.
    fn verify(&self, document: Option<DocumentId>, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport>;

    /// As [`verify`](Self::verify), for a caller that waits no longer than `until`.
    fn verify_until(
        &self,
        document: Option<DocumentId>,
        progress: &mut dyn FnMut(u64, u64),
        until: &Until,
    ) -> Result<VerifyReport> {
        until.check()?;
        self.verify(document, progress)
    }

    /// Verifies all documents, and compares the catalog with one that is rebuilt in memory from the segments: what one of the
    /// two does not say is a fault. Nothing stored is changed, and writers go on.
    fn verify_rebuild(&self, progress: &mut dyn FnMut(u64, u64), until: &Until) -> Result<VerifyReport>;
}
