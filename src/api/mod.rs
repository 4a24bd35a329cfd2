//! The product without a network: what a block memory does, in process ([`LocalMemory`](crate::LocalMemory)) and remote
//! (`RemoteMemory` of landmarkdb-grpc) alike. Both give identical answers, bit for bit.
//!
//! All calls block. Positions are never absolute: a query says how far it is from the start of its local window,
//! and the memory places retrieved blocks before that window, in slots or as far as they are (see [`AttendRequest`]).

mod error;
mod requests;

pub use error::{Entity, MemoryError, Result};
pub use requests::{
    AppendRequest, AttendRequest, Attended, BlockInfo, BlockText, CollectionInfo, Deleted, DocumentInfo, Fault,
    FetchRequest, Health, Hits, LookupRequest, Measured, NewBlock, SequenceState, StatePart, Stats, StoredBlock,
    Tensor, TuneIndex, TuneQuery, TuneReport, TuneRequest, TuneStep, VerifyReport, check_together,
};

use crate::shape::CollectionSpec;
use crate::types::{BlockRange, CollectionId, DocumentId, Engine};
use crate::until::Until;

/// A block memory. Shared between threads; writers to different documents do not wait for each other's encoding.
///
/// # Errors
/// Beside the errors listed at each method, every call that changes something fails with [`MemoryError::ReadOnly`] where the memory
/// was opened for reading, and every call may fail with [`MemoryError::Storage`] when the disk refuses,
/// [`MemoryError::DataLoss`] when what it reads is damaged, and, of a memory behind a network,
/// [`MemoryError::Unavailable`], [`MemoryError::DeadlineExceeded`] or [`MemoryError::Busy`].
pub trait BlockMemory: Send + Sync {
    /// Creates the collection, or opens the one of that name if its fingerprint agrees.
    ///
    /// # Errors
    /// [`MemoryError::Invalid`] as [`CollectionSpec::check`], [`MemoryError::FingerprintMismatch`] where the collection of
    /// that name belongs to another model.
    fn open_collection(&self, spec: &CollectionSpec) -> Result<CollectionInfo>;

    /// All collections of the data directory.
    ///
    /// # Errors
    /// Those of every call.
    fn collections(&self) -> Result<Vec<CollectionInfo>>;

    /// Changes the engine of a collection, durably. Each document's indexes are built anew at its next lookup; the old
    /// engine finishes the lookups under way.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the collection, [`MemoryError::Invalid`] for an engine that this machine does not have,
    /// [`MemoryError::Invalid`] or [`MemoryError::LimitExceeded`] for its setting.
    fn set_engine(&self, collection: CollectionId, engine: Engine) -> Result<CollectionInfo>;

    /// Measures the engines that may answer a collection's lookups on its longest document, and sets the fastest that finds
    /// enough: flat, sq4, sq8, cuda where there is a GPU, and the indexes that the request names. `progress` is called
    /// at each step. The measured engine answers the lookups of other callers meanwhile. An error sets the
    /// collection's earlier engine again.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the collection, or if no document of it has a full block, [`MemoryError::Missing`]
    /// without queries, [`MemoryError::LimitExceeded`] beyond [`limits`](crate::limits), those of
    /// [`lookup_until`](Self::lookup_until), and [`MemoryError::Invalid`] from a memory without engines to choose from.
    fn tune(&self, _request: &TuneRequest, _progress: &mut dyn FnMut(TuneStep), _until: &Until) -> Result<TuneReport> {
        Err(MemoryError::Invalid {
            field: "tune".into(),
            expected: "a memory that measures its engines".into(),
            found: "one that does not".into(),
        })
    }

    /// Creates an empty open document, or gives the one of that name.
    ///
    /// # Errors
    /// [`MemoryError::Invalid`] as [`check_name`](crate::check_name), [`MemoryError::NotFound`] for the collection.
    fn open_document(&self, collection: CollectionId, name: &str) -> Result<DocumentInfo>;

    /// All documents of a collection, by name.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the collection.
    fn documents(&self, collection: CollectionId) -> Result<Vec<DocumentInfo>>;

    /// A document as of its last acknowledged append.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document.
    fn document(&self, document: DocumentId) -> Result<DocumentInfo>;

    /// Appends blocks to a document. They are durable when it returns.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document, [`MemoryError::Missing`], [`MemoryError::Invalid`] or
    /// [`MemoryError::LimitExceeded`] for a field of the request, [`MemoryError::Conflict`], [`MemoryError::Sealed`],
    /// [`MemoryError::OutOfOrder`] or [`MemoryError::UnexpectedLength`] where the blocks do not continue the document.
    fn append(&self, request: AppendRequest) -> Result<DocumentInfo>;

    /// Keeps a state with a document, in place of the one that it keeps. It is durable when it returns: whole, or, after an error,
    /// the earlier one is there as a whole. It goes with the document, and when other tokens take the place of a tail that it was
    /// taken in.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document, [`MemoryError::Missing`] or [`MemoryError::LimitExceeded`] as
    /// [`SequenceState::check`], [`MemoryError::UnexpectedLength`] unless the document has exactly the tokens that the state was
    /// taken after, [`MemoryError::Sealed`], and [`MemoryError::Invalid`] from a memory that keeps none.
    fn put_state(&self, _document: DocumentId, _state: SequenceState) -> Result<DocumentInfo> {
        Err(MemoryError::Invalid {
            field: "state".into(),
            expected: "a memory that keeps states".into(),
            found: "one that does not".into(),
        })
    }

    /// One part of a document's state, counted from 0. `None`: the document keeps none, or one of fewer parts.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document, [`MemoryError::DataLoss`] names a part that is damaged.
    fn state_part(&self, document: DocumentId, _part: u32) -> Result<Option<StatePart>> {
        self.document(document).map(|_| None)
    }

    /// All parts of a document's state, which are of one state also while others take its place.
    ///
    /// # Errors
    /// Those of [`state_part`](Self::state_part).
    fn state(&self, document: DocumentId) -> Result<Option<SequenceState>> {
        let mut incomplete = None;
        loop {
            let Some(StatePart { version, tokens, parts: count, bytes }) = self.state_part(document, 0)? else {
                return Ok(None);
            };
            if incomplete == Some(version) {
                return Err(MemoryError::Internal { detail: format!("a state of {count} parts has fewer") });
            }
            let mut parts = vec![bytes];
            while parts.len() < count as usize {
                let next = self.state_part(document, parts.len() as u32)?;
                // Another may have come in its place: begun anew.
                let Some(part) = next.filter(|part| part.version == version) else { break };
                parts.push(part.bytes);
            }
            if parts.len() >= count as usize {
                return Ok(Some(SequenceState { tokens, parts }));
            }
            incomplete = Some(version);
        }
    }

    /// Ends appends to a document, durably. Its state stays. Sealing a sealed document changes nothing.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document.
    fn seal(&self, document: DocumentId) -> Result<DocumentInfo>;

    /// Chooses the `top_k` eligible blocks with the highest scores for each row of queries.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the collection or a document of the scope, [`MemoryError::Missing`] without query
    /// tokens, [`MemoryError::Invalid`] for a field outside its range, [`MemoryError::LimitExceeded`] beyond
    /// [`limits`](crate::limits) or the budget of working memory.
    fn lookup(&self, request: &LookupRequest) -> Result<Hits>;

    /// Chooses blocks as [`lookup`](Self::lookup) does and attends to them next to the data.
    ///
    /// # Errors
    /// Those of [`lookup`](Self::lookup).
    fn attend(&self, request: &AttendRequest) -> Result<Attended>;

    /// [`lookup`](Self::lookup) for a caller that waits no longer than `until`: work under way ends then.
    ///
    /// # Errors
    /// Those of [`lookup`](Self::lookup), [`MemoryError::Busy`] instead of a wait for working memory,
    /// [`MemoryError::DeadlineExceeded`] when time has run out, any error when the caller is gone.
    fn lookup_until(&self, request: &LookupRequest, until: &Until) -> Result<Hits> {
        until.check()?;
        self.lookup(request)
    }

    /// [`attend`](Self::attend) for a caller that waits no longer than `until`.
    ///
    /// # Errors
    /// Those of [`lookup_until`](Self::lookup_until).
    fn attend_until(&self, request: &AttendRequest, until: &Until) -> Result<Attended> {
        until.check()?;
        self.attend(request)
    }

    /// Answers many requests with known queries, of several layers or sequences, sooner than one call each: one outcome per
    /// request, in their order, equal to that of [`attend`](Self::attend). A refused request fails alone; more than
    /// [`limits::ATTEND_REQUESTS_MAX`](crate::limits::ATTEND_REQUESTS_MAX) are refused together.
    fn attend_all(&self, requests: &[AttendRequest]) -> Vec<Result<Attended>> {
        requests.iter().map(|request| self.attend(request)).collect()
    }

    /// [`attend_all`](Self::attend_all) for a caller that waits no longer than `until`.
    ///
    /// # Errors
    /// Refuses all requests before any begins: [`MemoryError::LimitExceeded`] for too many of them or more working memory
    /// than the budget, [`MemoryError::Busy`] while others have it, those of [`Until::check`].
    fn attend_all_until(&self, requests: &[AttendRequest], until: &Until) -> Result<Vec<Result<Attended>>> {
        until.check()?;
        Ok(self.attend_all(requests))
    }

    /// Reads blocks with K and V, in the order of the request.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document or a block, [`MemoryError::Invalid`] for dtype int8,
    /// [`MemoryError::LimitExceeded`] as [`FetchRequest::check`].
    fn fetch(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>>;

    /// Blocks of a range without payload; the tail counts as index `blocks`. A range past the end is cut.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document.
    fn blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>>;

    /// Deletes a document and gives its name to another one, which was made to replace it: opened later, in the same collection,
    /// as [`replacement_name`](DocumentId::replacement_name), and filled meanwhile. One step, durable when it returns: whatever
    /// happens, the name has the earlier document, as it was, or the other one, as it is. The earlier one's space comes back as
    /// after [`delete`](Self::delete).
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for either document, [`MemoryError::Invalid`] for one that was not made for this.
    fn replace(&self, document: DocumentId, by: DocumentId) -> Result<DocumentInfo>;

    /// Deletes a document, durably when it returns. Compaction gives its space back, until segments take at most
    /// [`limits::SPACE_PERCENT_MAX`](crate::limits::SPACE_PERCENT_MAX) hundredths of the live bytes.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document.
    fn delete(&self, document: DocumentId) -> Result<Deleted>;

    /// Totals of the data directory, and counts since the memory was opened.
    ///
    /// # Errors
    /// Those of every call.
    fn stats(&self) -> Result<Stats>;

    /// Which calls the memory can serve now. Called often, so it has to be cheap.
    fn health(&self) -> Health {
        Health::Serving
    }

    /// Reads and checks every record of a document, or of all. Damage is a fault of the report, no error. `progress` is
    /// called with the bytes read so far and in all.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`] for the document.
    fn verify(&self, document: Option<DocumentId>, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport>;

    /// [`verify`](Self::verify) for a caller that waits no longer than `until`.
    ///
    /// # Errors
    /// Those of [`verify`](Self::verify) and of [`Until::check`].
    fn verify_until(
        &self,
        document: Option<DocumentId>,
        progress: &mut dyn FnMut(u64, u64),
        until: &Until,
    ) -> Result<VerifyReport> {
        until.check()?;
        self.verify(document, progress)
    }

    /// Verifies all documents and compares the catalog with one rebuilt in memory from the segments. Each difference is a
    /// fault. It changes nothing stored, and writers go on.
    ///
    /// # Errors
    /// Those of [`Until::check`].
    fn verify_rebuild(&self, progress: &mut dyn FnMut(u64, u64), until: &Until) -> Result<VerifyReport>;
}
