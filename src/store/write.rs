//! What happens when a write fails? Writes are refused for as long as it is not known where the log ends, and no longer:
//! the next call finds out. Everything else is an ordinary error, after which the next call works.

use std::sync::{Arc, PoisonError};

use super::catalog_memory::MemoryCatalog;
use super::compaction::Step;
use super::error::StoreError;
use super::ledger::{Group, Ledger, SegmentState};
use super::log::GroupWriter;
use super::record::SEGMENT_HEADER_BYTES;
use super::recovery::{self, rewrite};
use super::{Store, Writer};

/// Whether a store takes writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    #[default]
    Serving,
    /// Reads and deletes only, for as long as the disk is full.
    ReadOnly { reason: String },
    /// A write failed and could not be undone. Reads go on, and every write begins by trying again.
    Failed { reason: String },
}

/// How the log ends.
pub(super) enum End {
    Known,
    /// A write or a flush failed: bytes behind the end may or may not be on the disk.
    Unknown,
    /// A durable group is behind it of which the catalog may or may not have heard.
    NotEntered(Group),
}

impl Store {
    /// Whether the store takes writes, as of the last one.
    pub fn health(&self) -> Health {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs a change under the writer's lock, and what it leaves to be tidied up.
    pub(super) fn write<T>(&self, change: impl FnOnce(&mut Writer) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let result = self.locked(|writer| change(writer));
        if result.is_ok() {
            self.tidy();
        }
        result
    }

    /// As [`write`](Self::write) of what gives space back: with the reserve, where the disk is full.
    pub(super) fn write_to_free<T>(
        &self,
        change: impl Fn(&mut Writer) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match self.write(&change) {
            Err(error) if error.is_full() => {
                self.handles.folder().release_reserve().map_err(StoreError::io("release the reserve"))?;
                self.write(&change)
            }
            result => result,
        }
    }

    pub(super) fn locked<T>(&self, run: impl FnOnce(&mut Writer) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let Ok(mut writer) = self.writer.lock() else { return Err(StoreError::Poisoned) };
        let result = self.find_end(&mut writer).and_then(|()| run(&mut writer));
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = writer.stats();
        self.note_health(&writer, result.as_ref().err());
        result
    }

    fn note_health(&self, writer: &Writer, error: Option<&StoreError>) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let now = match (error, &writer.log_end) {
            (Some(error), End::Unknown | End::NotEntered(_)) => Health::Failed { reason: error.to_string() },
            (Some(error), End::Known) if error.is_full() => Health::ReadOnly { reason: error.to_string() },
            // A refusal says nothing about the disk.
            (Some(_), End::Known) => return,
            (None, _) => Health::Serving,
        };
        if *health != now {
            match &now {
                Health::Serving => tracing::info!("the store takes writes again"),
                Health::ReadOnly { reason } | Health::Failed { reason } => tracing::error!("{reason}"),
            }
            *health = now;
        }
    }

    /// Writes one group, makes it durable, and enters it in the catalog.
    pub(super) fn commit(
        &self,
        writer: &mut Writer,
        fill: impl FnOnce(&mut GroupWriter<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let active = writer.active.clone();
        let mut group = GroupWriter::new(&active, writer.ledger.totals.next_sequence, writer.end);
        let written = fill(&mut group).and_then(|()| group.finish());
        let group = match written {
            Ok(group) => group,
            Err(error) => {
                writer.log_end = End::Unknown;
                // If this fails too, the next write tries again.
                let _ = self.find_end(writer);
                return Err(error);
            }
        };
        let entered = writer.ledger.enter(&self.catalog, &group);
        self.places.forget(&group);
        match entered {
            Ok(()) => {
                writer.end = group.end;
                self.places.bury(&group);
                Ok(())
            }
            Err(error) => {
                let number = writer.ledger.totals.next_sequence;
                // A catalog that is rebuilt from the log has the group.
                if self.catalog.is_torn()
                    && self.replace_catalog(writer).is_ok()
                    && writer.ledger.totals.next_sequence > number
                {
                    return Ok(());
                }
                writer.log_end = End::NotEntered(group);
                // Done, if the catalog has it after all.
                match self.find_end(writer) {
                    Ok(()) if writer.ledger.totals.next_sequence > number => Ok(()),
                    _ => Err(error),
                }
            }
        }
    }

    /// Finds out where the log ends, if that is not known.
    pub(super) fn find_end(&self, writer: &mut Writer) -> Result<(), StoreError> {
        match std::mem::replace(&mut writer.log_end, End::Unknown) {
            End::Known => {}
            End::Unknown => cut_back(writer)?,
            End::NotEntered(group) => {
                match Ledger::load(&self.catalog, self.handles.folder().directory()) {
                    Ok(known) if known.totals.next_sequence > writer.ledger.totals.next_sequence => {
                        writer.adopt(known);
                        writer.end = group.end;
                        self.places.bury(&group);
                    }
                    // The catalog does not have it, so nobody has seen it.
                    Ok(_) => cut_back(writer)?,
                    // It is replaced by one that has it.
                    Err(_) if self.replace_catalog(writer).is_ok() => {}
                    Err(error) => {
                        writer.log_end = End::NotEntered(group);
                        return Err(error);
                    }
                }
            }
        }
        writer.log_end = End::Known;
        if self.catalog.is_broken() && !self.catalog.works() {
            self.replace_catalog(writer)?;
        }
        if writer.ledger.is_stale {
            writer.adopt(Ledger::load(&self.catalog, self.handles.folder().directory())?);
        }
        Ok(())
    }

    /// Puts a catalog in memory in the place of one that does not work any more, and removes that one: the next opening
    /// rebuilds it.
    fn replace_catalog(&self, writer: &mut Writer) -> Result<(), StoreError> {
        tracing::error!("the catalog does not work any more: it is rebuilt in memory");
        let memory = Arc::new(MemoryCatalog::in_place_of(self.catalog.current()));
        let fresh = recovery::recover(&self.handles, &*memory, writer.sizes)?;
        *writer = fresh;
        self.catalog.replace(memory);
        self.places.forget_all();
        Ok(())
    }

    /// Does what writes left to be done, or has the compactor do it.
    fn tidy(&self) {
        if self.compactor_runs() {
            return self.wake_compactor();
        }
        loop {
            match self.compact_step() {
                Ok(Step::More) => {}
                Ok(Step::Done) => return,
                // What was asked for is done. The next write tries again.
                Err(error) => return tracing::warn!(%error, "compaction stopped"),
            }
        }
    }
}

/// Takes whatever a failed write left behind the end off the disk. A flush that failed makes pages pass for written that
/// are not, so the page that the end lies in is written again.
fn cut_back(writer: &Writer) -> Result<(), StoreError> {
    const PAGE_BYTES: u64 = 4096;
    let file = &writer.active.file;
    if file.len_bytes().map_err(StoreError::io("measure a segment"))? > writer.end {
        file.truncate(writer.end).map_err(StoreError::io("cut a segment"))?;
    }
    rewrite(&writer.active, writer.end / PAGE_BYTES * PAGE_BYTES, writer.end)
}

impl Writer {
    /// Takes over what the catalog says.
    fn adopt(&mut self, mut known: Ledger) {
        // Of a segment in which nothing was entered yet the catalog has not heard.
        known.segments.entry(self.active.id).or_insert(SegmentState::empty(SEGMENT_HEADER_BYTES as u64));
        self.ledger = known;
        self.victim = None;
    }

    /// Closes the active segment if `bytes` more would overfill it.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.end <= SEGMENT_HEADER_BYTES as u64 || self.end + bytes <= self.sizes.segment_bytes
    }
}
