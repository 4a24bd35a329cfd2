//! What happens when a write fails? Writes are refused for as long as it is not known where the log ends, and no longer:
//! the next call finds out. Everything else is an ordinary error, after which the next call works.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::catalog::Catalog;
use super::catalog_memory::MemoryCatalog;
use super::compaction::Step;
use super::error::StoreError;
use super::ledger::{Ledger, SegmentState, Totals};
use super::log::GroupWriter;
use super::loss::{self, Loss};
use super::rebuild;
use super::record::SEGMENT_HEADER_BYTES;
use super::recovery::{damaged_segments, rewrite};
use super::segment::SegmentId;
use super::state::{Health, Store, Writer};
use crate::lock::IgnorePoison;
use crate::until::Until;

/// What a reader does in passing.
const QUICK: Duration = Duration::from_millis(10);

impl Store {
    /// Whether the store takes writes, as of the last one.
    pub fn health(&self) -> Health {
        self.health.lock().ignore_poison().clone()
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
        if self.reads_only {
            return Err(StoreError::ReadOnly);
        }
        let Ok(mut writer) = self.writer.lock() else { return Err(StoreError::Poisoned) };
        let result = self.find_end(&mut writer).and_then(|()| run(&mut writer));
        *self.stats.lock().ignore_poison() = writer.stats();
        self.note_health(&writer, result.as_ref().err());
        result
    }

    fn note_health(&self, writer: &Writer, error: Option<&StoreError>) {
        let mut health = self.health.lock().ignore_poison();
        let now = match error {
            // A small write, or a step with nothing to write, finds no disk full.
            None if matches!(*health, Health::ReadOnly { .. }) && !self.handles.folder().has_room() => return,
            None => Health::Serving,
            Some(error) if error.is_full() && writer.end_is_known => Health::ReadOnly { reason: error.to_string() },
            Some(error) if error.is_of_system() && (!writer.end_is_known || self.catalog.is_broken()) => {
                Health::Failed { reason: error.to_string() }
            }
            // A refusal says nothing about the disk.
            Some(_) => return,
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
                writer.end_is_known = false;
                // If this fails too, the next write tries again.
                let _ = self.find_end(writer);
                return Err(error);
            }
        };
        let entered = writer.ledger.enter(&self.catalog, &group);
        self.locators.forget(&group);
        match entered {
            Ok(()) => {
                writer.end = group.end;
                self.locators.bury(&group);
                Ok(())
            }
            Err(error) => {
                // Once what it holds of the group is gone, one that is rebuilt from the log has the group.
                let is_gone = self.catalog.is_torn() && self.catalog.discard().is_ok();
                if is_gone && self.replace_catalog(writer, group.end).is_ok() {
                    writer.end = group.end;
                    return Ok(());
                }
                // What the caller is told has failed may not count later.
                writer.end_is_known = false;
                let _ = self.find_end(writer);
                Err(error)
            }
        }
    }

    /// Finds out where the log ends, if that is not known, and puts a catalog that works in the place of one that does not.
    pub(super) fn find_end(&self, writer: &mut Writer) -> Result<(), StoreError> {
        // Neither waits for the other.
        let found = writer.cut_back();
        let replaced = if self.catalog.works() { Ok(()) } else { self.replace_catalog(writer, writer.end) };
        found.and(replaced)?;
        self.catalog.settle().map_err(StoreError::catalog("be removed"))
    }

    /// Puts a catalog in memory in the place of one that does not work any more. The log counts up to `end`.
    fn replace_catalog(&self, writer: &mut Writer, end: u64) -> Result<(), StoreError> {
        tracing::error!("the catalog does not work any more: it is rebuilt in memory");
        let begun = Instant::now();
        let replaced = self.try_replacing(writer, end);
        // Where it takes long, readers try it for a tenth of the time at most.
        let took = begun.elapsed();
        let waits = replaced.is_err() && took > QUICK;
        writer.readers_wait_until = waits.then(|| Instant::now() + 10 * took);
        replaced
    }

    fn try_replacing(&self, writer: &mut Writer, end: u64) -> Result<(), StoreError> {
        let memory = MemoryCatalog::in_place_of(self.catalog.current());
        // A retired segment whose file is still there is as good as any: what was copied out of it counts where it is now.
        let files = self.handles.list()?;
        let known = writer.ledger.segments.iter().filter(|(id, state)| !state.retired || files.contains(id));
        let ends: Vec<(SegmentId, u64)> =
            known.map(|(&id, state)| (id, if id == writer.active.id { end } else { state.bytes })).collect();
        let (ledger, unread) = rebuild::fill(&memory, &self.handles, &ends, &Until::FOREVER)?;
        writer.take_over(ledger, &memory, &unread)?;
        self.catalog.replace(Arc::new(memory));
        self.locators.forget_all();
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

impl Writer {
    /// Removes what a failed write left behind the end of the log. A flush that failed makes pages pass for written that
    /// are not, so the page that the end lies in is written again.
    pub(super) fn cut_back(&mut self) -> Result<(), StoreError> {
        const PAGE_BYTES: u64 = 4096;
        if self.end_is_known {
            return Ok(());
        }
        let file = &self.active.file;
        if file.len_bytes().map_err(StoreError::io("measure a segment"))? > self.end {
            file.truncate(self.end).map_err(StoreError::io("cut a segment"))?;
        }
        rewrite(&self.active, self.end / PAGE_BYTES * PAGE_BYTES, self.end)?;
        self.end_is_known = true;
        Ok(())
    }

    /// Goes on with a catalog that was rebuilt from the segments that can be read.
    fn take_over(
        &mut self,
        mut ledger: Ledger,
        catalog: &dyn Catalog,
        unread: &BTreeSet<SegmentId>,
    ) -> Result<(), StoreError> {
        // Ids are never reused, even where what had them is lost.
        let Totals { next_collection, next_document, next_sequence, .. } = self.ledger.totals;
        ledger.raise_ids(next_collection, next_document, next_sequence);
        if !unread.is_empty() {
            let doubts = loss::doubts(catalog, &[Loss::Any { before: u64::MAX }], &[])?;
            ledger.doubt(catalog, &doubts)?;
        }
        for id in unread {
            // As long as its file may come back, deletions of what is in it are kept.
            let state = self.ledger.segments.get(id).map(|&state| SegmentState { live_bytes: 0, ..state });
            ledger.segments.extend(state.map(|state| (*id, state)));
        }
        self.unmovable = damaged_segments(catalog)?;
        self.unmovable.extend(unread);
        self.ledger = ledger;
        self.victim = None;
        self.may_have_much_dead = true;
        Ok(())
    }

    /// Closes the active segment if `bytes` more would overfill it.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.end <= SEGMENT_HEADER_BYTES as u64 || self.end + bytes <= self.sizes.segment_bytes
    }
}
