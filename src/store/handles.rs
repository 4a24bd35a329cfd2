//! Segments that are open, and how their records are checked.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, RwLock};

use super::error::StoreError;
use super::record::{FORMAT, SEGMENT_HEADER_BYTES, Salt, SegmentHeader};
use super::scan::Scan;
use super::segment::{DirectoryId, SegmentFile, SegmentId, Segments};
use crate::lock::IgnorePoison;

/// Open handles kept for readers: well under the usual 1024 file descriptors of a process.
const OPEN_MAX: usize = 256;

/// One segment, open, and how its records are checked.
pub(super) struct Segment {
    pub(super) id: SegmentId,
    pub(super) file: Arc<dyn SegmentFile>,
    pub(super) salt: Salt,
    /// `None` if it is damaged.
    pub(super) header: Option<SegmentHeader>,
}

impl Segment {
    /// Reads the header.
    ///
    /// `Foreign` for a segment of another directory or under another's number, `UnsupportedFormat` for one of a newer build.
    fn read(id: SegmentId, file: Arc<dyn SegmentFile>, directory: DirectoryId) -> Result<Self, StoreError> {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        let len = file.len_bytes().map_err(StoreError::io("measure a segment"))?.min(bytes.len() as u64) as usize;
        file.read_at(0, &mut bytes[..len]).map_err(StoreError::io("read a segment header"))?;
        let header = SegmentHeader::check(&bytes[..len]);
        let own = Salt::of(directory, id);
        let Some(found) = header else {
            let salted = Scan::new(&*file, id, own, 0, u64::MAX).any_record(HEADERLESS_SEARCH_BYTES)?;
            let salt = if salted { own } else { Salt::NONE };
            return Ok(Segment { id, file, salt, header: None });
        };
        if found.oldest_reader > FORMAT {
            let (oldest, ours) = (found.oldest_reader, FORMAT);
            return Err(StoreError::UnsupportedFormat { segment: id.0, oldest, ours });
        }
        if found.segment != id || found.directory.is_some_and(|found| found != directory) {
            return Err(StoreError::Foreign { segment: id.0 });
        }
        let salt = if found.directory.is_some() { own } else { Salt::NONE };
        Ok(Segment { id, file, salt, header })
    }

    /// Its records in bytes `at..end`.
    pub(super) fn scan(&self, at: u64, end: u64) -> Scan<'_> {
        Scan::new(&*self.file, self.id, self.salt, at, end)
    }

    pub(super) fn len_bytes(&self) -> Result<u64, StoreError> {
        self.file.len_bytes().map_err(StoreError::io("measure a segment"))
    }
}

/// How far a segment without a header is searched for a record that says which format it has.
const HEADERLESS_SEARCH_BYTES: u64 = 4 << 20;

/// Shared handles, opened on first use.
pub(super) struct Handles {
    segments: Box<dyn Segments>,
    open: RwLock<Open>,
}

#[derive(Default)]
struct Open {
    segments: BTreeMap<SegmentId, Arc<Segment>>,
    /// Segments removed so far.
    removals: u64,
}

impl Handles {
    pub(super) fn new(segments: Box<dyn Segments>) -> Self {
        Handles { segments, open: RwLock::default() }
    }

    /// The folder below, for what is no segment.
    pub(super) fn folder(&self) -> &dyn Segments {
        &*self.segments
    }

    pub(super) fn list(&self) -> Result<Vec<SegmentId>, StoreError> {
        let mut ids = self.segments.list().map_err(StoreError::io("list the segments"))?;
        ids.sort();
        Ok(ids)
    }

    /// An existing segment; see [`StoreError::is_missing`] for one that is not there.
    pub(super) fn get(&self, id: SegmentId) -> Result<Arc<Segment>, StoreError> {
        let removals = {
            let open = self.open.read().ignore_poison();
            if let Some(segment) = open.segments.get(&id) {
                return Ok(segment.clone());
            }
            open.removals
        };
        let file = self.segments.open(id).map_err(StoreError::io("open a segment"))?;
        let segment = Arc::new(Segment::read(id, file, self.segments.directory())?);
        let mut open = self.open.write().ignore_poison();
        // Of a segment removed meanwhile no handle is kept: its bytes would stay on the disk as long.
        if open.removals == removals {
            open.keep(&segment);
        }
        Ok(segment)
    }

    /// A new segment, durable, with nothing but its header.
    pub(super) fn create(&self, header: SegmentHeader) -> Result<Arc<Segment>, StoreError> {
        let id = header.segment;
        let file = self.segments.create(id).map_err(StoreError::io("create a segment"));
        let written = file.and_then(|file| write_header(&*file, header).map(|()| file));
        let file = written.inspect_err(|_| {
            // Best effort: recovery and verification pass over a file without a header, too.
            let _ = self.segments.remove(id);
        })?;
        let salt = Salt::of(self.segments.directory(), id);
        let segment = Arc::new(Segment { id, file, salt, header: Some(header) });
        self.open.write().ignore_poison().keep(&segment);
        Ok(segment)
    }

    /// Takes a segment out of the log and keeps its file.
    pub(super) fn move_aside(&self, id: SegmentId) -> Result<(), StoreError> {
        let mut open = self.open.write().ignore_poison();
        open.segments.remove(&id);
        open.removals += 1;
        self.segments.move_aside(id).map_err(StoreError::io("move a damaged segment aside"))
    }

    pub(super) fn remove(&self, id: SegmentId) -> Result<(), StoreError> {
        let mut open = self.open.write().ignore_poison();
        open.segments.remove(&id);
        open.removals += 1;
        match self.segments.remove(id) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::Io { step: "remove a segment", source: error })
            }
            _ => Ok(()),
        }
    }
}

/// Writes the header of a segment that holds nothing yet, durably.
pub(super) fn write_header(file: &dyn SegmentFile, header: SegmentHeader) -> Result<(), StoreError> {
    file.write_at(0, &header.encode()).map_err(StoreError::io("write a segment header"))?;
    file.sync().map_err(StoreError::io("make a segment durable"))
}

impl Open {
    fn keep(&mut self, segment: &Arc<Segment>) {
        if self.segments.len() >= OPEN_MAX {
            // The oldest data is the least likely to be read next; a reader that holds the handle keeps it.
            self.segments.pop_first();
        }
        self.segments.insert(segment.id, segment.clone());
    }
}
