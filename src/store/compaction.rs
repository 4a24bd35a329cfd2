//! Giving space back, in steps that each hold up a writer for milliseconds: the blocks of deleted documents leave the
//! catalog, then the live records of the emptiest segment are copied to the end of the log as ordinary groups and its file
//! is removed. A crash between any two steps leaves records twice at worst, and the later copy counts.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::catalog::{self, Catalog, key};
use super::error::StoreError;
use super::ledger::{Entry, SegmentState};
use super::loss;
use super::record::{CollectionEntry, Content, DocumentEntry, Locator, SEGMENT_HEADER_BYTES, Tombstone};
use super::recovery::begin_segment;
use super::scan::{Item, Scanned};
use super::segment::SegmentId;
use super::state::{Store, Victim, Writer};
use crate::limits;
use crate::lock::IgnorePoison;
use crate::types::{BlockId, DocumentId};

/// Records that are looked at, or copied, in one step: some milliseconds of catalog, and few enough for the record that ends
/// a group to name them all.
const STEP_RECORDS: usize = 2048;

/// How long the compactor waits after a failure, and looks for work unasked.
const PAUSE: Duration = Duration::from_secs(2);

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    More,
    Done,
}

/// What of a victim has to be copied next.
struct Live {
    records: Vec<(Scanned, Content)>,
    /// How far it was looked for.
    at: u64,
}

/// A thread that gives space back beside the writers. Ends when it is dropped, after the step that it is at.
pub struct Compactor {
    store: Weak<Store>,
    thread: Option<JoinHandle<()>>,
}

impl Compactor {
    /// From now on the store's writers leave compaction to a thread.
    pub fn start(store: &Arc<Store>) -> std::io::Result<Compactor> {
        store.compactor.runs.store(true, Ordering::Release);
        let weak = Arc::downgrade(store);
        let work = weak.clone();
        let thread = std::thread::Builder::new().name("compactor".into()).spawn(move || run(&work))?;
        Ok(Compactor { store: weak, thread: Some(thread) })
    }
}

impl Drop for Compactor {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.compactor.runs.store(false, Ordering::Release);
            store.wake_compactor();
        }
        if let Some(thread) = self.thread.take() {
            // Its panics are in the log; the store does without it.
            let _ = thread.join();
        }
    }
}

fn run(store: &Weak<Store>) {
    if let Some(store) = store.upgrade() {
        // What an earlier process left undone. A lock that a panic has poisoned says so at the first step.
        let _ = store.locked(|writer| {
            writer.may_have_much_dead = true;
            Ok(())
        });
    }
    while let Some(store) = store.upgrade() {
        if !store.compactor_runs() {
            return;
        }
        match store.compact_step() {
            // Writers that wait for the lock get it first.
            Ok(Step::More) => std::thread::yield_now(),
            Ok(Step::Done) => store.wait_for_work(),
            Err(error) => {
                tracing::warn!(%error, "compaction stopped; it is tried again");
                store.wait_for_work();
            }
        }
    }
}

impl Store {
    pub(super) fn compactor_runs(&self) -> bool {
        self.compactor.runs.load(Ordering::Acquire)
    }

    pub(super) fn wake_compactor(&self) {
        *self.compactor.asked.lock().ignore_poison() = true;
        self.compactor.wake.notify_all();
    }

    fn wait_for_work(&self) {
        let asked = self.compactor.asked.lock().ignore_poison();
        let waited = self.compactor.wake.wait_timeout_while(asked, PAUSE, |asked| !*asked);
        *waited.ignore_poison().0 = false;
    }

    /// Gives back all the space that there is to give, before it returns.
    pub fn compact(&self) -> Result<(), StoreError> {
        while self.compact_step()? == Step::More {}
        Ok(())
    }

    /// Closes the active segment if `bytes` more would overfill it.
    pub(super) fn make_room(&self, writer: &mut Writer, bytes: u64) -> Result<(), StoreError> {
        if writer.has_room(bytes) {
            return Ok(());
        }
        writer.may_have_much_dead = true;
        self.roll(writer)
    }

    /// Closes the active segment and begins the next.
    fn roll(&self, writer: &mut Writer) -> Result<(), StoreError> {
        // Bounds what has to be read again after a crash to one segment.
        self.catalog.flush().map_err(StoreError::catalog("flush"))?;
        writer.active = begin_segment(&self.handles, &mut writer.ledger)?;
        writer.end = SEGMENT_HEADER_BYTES as u64;
        Ok(())
    }

    /// One step of what is to be given back: each ends in milliseconds and lets writers in between. Where the disk is full,
    /// with the reserve, which is set aside again when all is done.
    pub(super) fn compact_step(&self) -> Result<Step, StoreError> {
        let folder = self.handles.folder();
        let step = match self.try_step() {
            Err(error) if error.is_full() => {
                folder.release_reserve().map_err(StoreError::io("release the reserve"))?;
                self.try_step()
            }
            step => step,
        };
        if step.as_ref().is_ok_and(|step| *step == Step::Done) {
            folder.keep_reserve();
        }
        step
    }

    fn try_step(&self) -> Result<Step, StoreError> {
        self.locked(|writer| {
            self.remove_retired(writer)?;
            if self.purge_step(writer)? {
                return Ok(Step::More);
            }
            if writer.victim.is_none() && !(writer.may_have_much_dead && self.choose_victim(writer)?) {
                writer.may_have_much_dead = false;
                return Ok(Step::Done);
            }
            self.move_step(writer)?;
            Ok(Step::More)
        })
    }

    /// Takes some blocks of a deleted document out of the catalog. False if there are none.
    fn purge_step(&self, writer: &mut Writer) -> Result<bool, StoreError> {
        let Some(pair) = catalog::scan::<DocumentId>(&self.catalog, key::GARBAGE).next() else { return Ok(false) };
        let document = pair?.1;
        let blocks = catalog::scan::<Locator>(&self.catalog, &key::blocks(document)).take(STEP_RECORDS);
        let blocks = blocks.collect::<Result<Vec<_>, _>>()?;
        let all = blocks.len() < STEP_RECORDS;
        writer.ledger.purge(&self.catalog, document, &blocks, all)?;
        if all {
            self.locators.forget_purged(document);
        }
        Ok(true)
    }

    /// The emptiest segment, if dead bytes exceed their share. False if there is nothing to gain.
    fn choose_victim(&self, writer: &mut Writer) -> Result<bool, StoreError> {
        if !writer.has_much_dead() {
            return Ok(false);
        }
        let Some(id) = writer.emptiest() else { return Ok(false) };
        if id == writer.active.id {
            self.roll(writer)?;
        }
        match self.handles.get(id) {
            Ok(segment) => {
                let at = segment.salt.first_record();
                writer.victim = Some(Victim { segment, at, dropped: Vec::new(), dropped_bytes: 0 });
            }
            Err(error) if error.is_missing() || matches!(error, StoreError::Foreign { .. }) => writer.leave_alone(id),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Copies the next live records of the victim, and removes it when all are copied.
    fn move_step(&self, writer: &mut Writer) -> Result<(), StoreError> {
        let Some(mut victim) = writer.victim.take() else { return Ok(()) };
        let id = victim.segment.id;
        let Some(state) = writer.ledger.segments.get(&id).copied() else { return Ok(()) };
        let end = state.bytes.min(victim.segment.len_bytes()?);
        let before = (victim.dropped.clone(), victim.dropped_bytes);
        let live = match self.next_live(writer, &mut victim, end) {
            Ok(live) => live,
            Err(error) => {
                (victim.dropped, victim.dropped_bytes) = before;
                writer.victim = Some(victim);
                return Err(error);
            }
        };
        let Some(Live { records, at }) = live else {
            writer.leave_alone(id);
            return Ok(());
        };
        // After an error it is gone on with from here: begun anew, the dead records before would pass for progress on a full
        // disk, for ever.
        if let Err(error) = self.copy(writer, records) {
            (victim.dropped, victim.dropped_bytes) = before;
            writer.victim = Some(victim);
            return Err(error);
        }
        victim.at = at;
        if at < end {
            writer.victim = Some(victim);
            return Ok(());
        }
        let left = writer.ledger.segments.get(&id).map_or(0, |state| state.live_bytes);
        if left != victim.dropped_bytes {
            // Something that the catalog refers to was not found.
            writer.leave_alone(id);
            return Ok(());
        }
        // The last group may be taken for a torn write one day, and then the copies in it would be the only ones: so they
        // are not left in the last group.
        if let Err(error) = self.make_room(writer, 0).and_then(|()| self.commit(writer, |_| Ok(()))) {
            writer.victim = Some(victim);
            return Err(error);
        }
        writer.ledger.retire(&self.catalog, id, &victim.dropped)?;
        self.remove_retired(writer)
    }

    /// Writes records that lie elsewhere to the end of the log, as one group.
    fn copy(&self, writer: &mut Writer, records: Vec<(Scanned, Content)>) -> Result<(), StoreError> {
        if records.is_empty() {
            return Ok(());
        }
        self.make_room(writer, records.iter().map(|(scanned, _)| scanned.record.len() as u64).sum())?;
        self.commit(writer, |group| {
            records.into_iter().try_for_each(|(scanned, content)| group.copy(&scanned, content))
        })
    }

    /// The next records of the victim that have to be copied. `None` if it holds something
    /// that cannot be read, or of which the catalog cannot tell that it is not needed: it is left for repair.
    fn next_live(&self, writer: &Writer, victim: &mut Victim, end: u64) -> Result<Option<Live>, StoreError> {
        let (mut records, mut at) = (Vec::new(), victim.at);
        let segment = victim.segment.clone();
        for item in segment.scan(victim.at, end).take(STEP_RECORDS) {
            if at - victim.at >= writer.sizes.group_bytes {
                break;
            }
            let Item::Record(scanned) = item? else { return Ok(None) };
            at = scanned.end();
            let locator = scanned.locator(segment.id);
            let Some(content) = scanned.content() else { return Ok(None) };
            if current(&self.catalog, &content)? != Some(locator) {
                if !loss::is_superseded(&self.catalog, &Entry { locator, content })? {
                    return Ok(None);
                }
                continue;
            }
            if !scanned.whole {
                return Ok(None);
            }
            match content {
                Content::Tombstone(tombstone) if !needed(writer, segment.id, &tombstone) => {
                    victim.dropped.push(tombstone.document);
                    victim.dropped_bytes += locator.bytes();
                }
                content => records.push((scanned, self.with_tail_named(content)?)),
            }
        }
        Ok(Some(Live { records, at }))
    }

    /// Manifests of formats 1 to 3 did not name their tails.
    fn with_tail_named(&self, content: Content) -> Result<Content, StoreError> {
        let Content::Document(mut entry) = content else { return Ok(content) };
        if entry.tail_sequence == 0 && entry.manifest.tail_tokens > 0 {
            let tail = BlockId { document: entry.manifest.id, index: entry.manifest.blocks };
            let found = catalog::get::<Locator>(&self.catalog, &key::block(tail))?;
            entry.tail_sequence = found.map_or(0, |locator| locator.sequence);
        }
        Ok(Content::Document(entry))
    }

    /// Removes the files of segments to which nothing refers.
    fn remove_retired(&self, writer: &mut Writer) -> Result<(), StoreError> {
        let retired = |(&id, state): (&SegmentId, &SegmentState)| state.retired.then_some(id);
        let retired: Vec<SegmentId> = writer.ledger.segments.iter().filter_map(retired).collect();
        if retired.is_empty() {
            return Ok(());
        }
        // A catalog that fell back to before this would look for the removed file.
        self.catalog.flush().map_err(StoreError::catalog("flush"))?;
        for id in retired {
            self.handles.remove(id)?;
            writer.ledger.forget(&self.catalog, id)?;
        }
        Ok(())
    }
}

impl Writer {
    fn leave_alone(&mut self, id: SegmentId) {
        tracing::warn!(segment = id.0, "a damaged segment is kept as it is: verify the directory");
        self.unmovable.insert(id);
    }

    /// Whether dead bytes exceed their share. Those in damaged segments do not count, for nothing can be done about them.
    fn has_much_dead(&self) -> bool {
        let movable = self.ledger.segments.iter().filter(|(id, _)| !self.unmovable.contains(id));
        let (mut bytes, mut dead) = (0, 0);
        for (_, state) in movable {
            bytes += state.bytes;
            dead += state.dead_bytes();
        }
        bytes * 100 > (bytes - dead) * limits::SPACE_PERCENT_MAX
    }

    /// The segment with the smallest live share among those with anything dead.
    fn emptiest(&self) -> Option<SegmentId> {
        let movable = |(id, state): &(&SegmentId, &SegmentState)| !state.retired && !self.unmovable.contains(id);
        let candidates = self.ledger.segments.iter().filter(|(_, state)| state.dead_bytes() > 0).filter(movable);
        let share = |state: &SegmentState| state.dead_bytes() as f64 / state.bytes as f64;
        candidates.max_by(|(_, a), (_, b)| share(a).total_cmp(&share(b))).map(|(&id, _)| id)
    }
}

/// Where the catalog says that this thing lies.
pub(super) fn current(catalog: &dyn Catalog, content: &Content) -> Result<Option<Locator>, StoreError> {
    Ok(match content {
        Content::Collection(id, _) => {
            catalog::get::<(Locator, CollectionEntry)>(catalog, &key::collection(*id))?.map(|(locator, _)| locator)
        }
        Content::Document(entry) => {
            catalog::get::<(Locator, DocumentEntry)>(catalog, &key::document(entry.manifest.id))?
                .map(|(locator, _)| locator)
        }
        Content::Tombstone(tombstone) => {
            catalog::get::<(Locator, Tombstone)>(catalog, &key::tombstone(tombstone.document))?
                .map(|(locator, _)| locator)
        }
        Content::Block(id) => catalog::get(catalog, &key::block(*id))?,
        Content::Group(_) => None,
    })
}

/// A tombstone is needed while any other segment may hold records of its document: rebuilding the catalog would
/// bring the document back.
fn needed(writer: &Writer, victim: SegmentId, tombstone: &Tombstone) -> bool {
    let range = tombstone.first_segment..=tombstone.last_segment;
    writer.ledger.segments.range(range).any(|(&id, _)| id != victim)
}
