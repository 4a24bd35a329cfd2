//! A disk in memory behind both seams that fails, lies and forgets as disks do: at any call, in every way.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::io::Errno;

use super::catalog::{Batch, Catalog, Pair};
use super::segment::{DirectoryId, SegmentFile, SegmentId, Segments, Torn};

/// What is written to a disk as a whole or not at all. Real ones have 512 bytes or more; small ones tear more.
const SECTOR_BYTES: usize = 64;

/// A call on one of the seams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Call {
    List,
    Open,
    Create,
    Remove,
    Len,
    Read,
    Write,
    Sync,
    Truncate,
    SetAside,
    Get,
    Scan,
    Apply,
    Flush,
    /// Of the catalog; as a removal it needs no space.
    Discard,
}

/// What the call that fails has done by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// Half of the bytes, for a write or a sync; half of the changes, for a batch that fails in a process that lives on;
    /// nothing, for anything else.
    Half,
    Everything,
}

/// Why a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// ENOSPC
    Full,
    /// EIO. What a sync could not write counts as written from then on, as Linux has it: the next sync succeeds.
    Broken,
    /// EMFILE
    OpenFiles,
}

/// A fault of the system, which the machine survives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// The first call that it can strike, counted over all calls on this disk.
    pub(super) at: usize,
    pub(super) reason: Reason,
    /// Calls of this kind alone, if one is named.
    pub(super) only: Option<Call>,
    pub(super) effect: Effect,
    /// It strikes every later call too, until [`FaultDisk::heal`].
    pub(super) stays: bool,
}

/// What a restart finds in the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Files {
    /// The process died: all that was written, in the page cache still if it was not synced.
    Written,
    /// The power failed: what was synced.
    Synced,
    /// The power failed while pages were on their way out of order: the synced part, zeros, and the end.
    Torn,
    /// The power failed: of what was not synced, any sectors of any file (drawn with this seed).
    Cut(u64),
}

/// What a restart finds in the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Applied,
    Flushed,
    Deleted,
    /// What was flushed and some of what was applied since (drawn with this seed).
    Partly(u64),
}

/// A file: what a reader is given, and what is on the disk.
#[derive(Clone, Default)]
struct Content {
    written: Vec<u8>,
    synced: Vec<u8>,
    /// Sectors that the next sync writes.
    dirty: BTreeSet<usize>,
}

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;
type Contents = BTreeMap<SegmentId, Arc<Mutex<Content>>>;

#[derive(Default)]
struct State {
    files: Contents,
    /// Files whose removal failed after it was done: the power may bring them back.
    ghosts: Contents,
    torn: BTreeMap<(SegmentId, u64), Vec<u8>>,
    /// Whole segments that were set aside.
    moved: BTreeMap<SegmentId, Vec<u8>>,
    /// Files removed so far, over all restarts.
    removals: usize,
    /// Of the directory's id, every byte.
    directory: u8,
    pairs: Pairs,
    flushed: Pairs,
    /// Applied since the last flush.
    unflushed: Vec<Batch>,
    /// A batch failed: as sled does, the catalog gives that error to all later ones until it is opened anew.
    refuses_batches: bool,
    calls: usize,
    /// Calls that change something, so far.
    operations: usize,
    trace: Option<Vec<Call>>,
    fault: Option<Fault>,
    /// The calls that the fault struck.
    struck: Vec<Call>,
    death: Option<(usize, Effect)>,
    dead: bool,
    /// The call under way will be told to have failed.
    failing: bool,
}

/// The disk. Clones share it.
#[derive(Clone, Default)]
pub(super) struct FaultDisk(Arc<Mutex<State>>);

struct DiskFile {
    disk: FaultDisk,
    content: Arc<Mutex<Content>>,
}

impl Call {
    fn changes(self) -> bool {
        use Call::*;
        matches!(self, Create | Remove | Write | Sync | Truncate | SetAside | Apply | Flush | Discard)
    }
}

impl Fault {
    fn strikes(&self, call: Call) -> bool {
        self.reason.strikes(call) && self.only.is_none_or(|only| only == call)
    }
}

impl Reason {
    pub(super) fn strikes(self, call: Call) -> bool {
        use Call::*;
        match self {
            Reason::Full => matches!(call, Create | Write | Apply | Flush),
            Reason::Broken => true,
            // A removal opens the folder to sync it, a flush each file of the catalog.
            Reason::OpenFiles => matches!(call, List | Open | Create | Remove | Flush | Discard),
        }
    }

    fn error(self) -> io::Error {
        match self {
            Reason::Full => Errno::NOSPC.into(),
            Reason::Broken => Errno::IO.into(),
            Reason::OpenFiles => Errno::MFILE.into(),
        }
    }
}

impl Content {
    fn of(bytes: Vec<u8>) -> Arc<Mutex<Content>> {
        Arc::new(Mutex::new(Content { synced: bytes.clone(), written: bytes, dirty: BTreeSet::new() }))
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let (from, to) = (offset, offset + bytes.len());
        // What lies between the old end and `from` becomes zeros, on the disk too.
        let changed = from.min(self.written.len())..to;
        self.written.resize(self.written.len().max(to), 0);
        self.written[from..to].copy_from_slice(bytes);
        self.dirty.extend(changed.start / SECTOR_BYTES..changed.end.div_ceil(SECTOR_BYTES));
    }

    /// Takes the dirty sectors that `chosen` picks to the disk.
    fn persist(&mut self, len: usize, mut chosen: impl FnMut(usize) -> bool) {
        self.synced.resize(len, 0);
        for &sector in &self.dirty {
            let end = ((sector + 1) * SECTOR_BYTES).min(len).min(self.written.len());
            let span = sector * SECTOR_BYTES..end;
            if !span.is_empty() && chosen(sector) {
                self.synced[span.clone()].copy_from_slice(&self.written[span]);
            }
        }
    }

    fn sync(&mut self, effect: Effect) {
        let half = self.dirty.iter().nth(self.dirty.len() / 2).copied().unwrap_or(0);
        match effect {
            Effect::Nothing => {}
            Effect::Half => self.persist(self.written.len(), |sector| sector < half),
            Effect::Everything => self.persist(self.written.len(), |_| true),
        }
    }

    /// What is left of it when the machine comes up again.
    fn survive(mut self, files: Files, random: &mut ChaCha8Rng) -> Content {
        match files {
            Files::Written => return self,
            Files::Synced => {}
            Files::Torn if self.written.len() > self.synced.len() => {
                let middle = (self.synced.len() + self.written.len()) / 2;
                self.synced.resize(middle, 0);
                self.synced.extend_from_slice(&self.written[middle..]);
            }
            Files::Torn => {}
            Files::Cut(_) => {
                let (one, other) = (self.synced.len(), self.written.len());
                let between = random.random_range(one.min(other)..=one.max(other));
                let len = [one, other, between][random.random_range(0..3)];
                let (percent, dice) = (random.random_range(0..=100), random);
                self.persist(len, |_| dice.random_range(0..100) < percent);
            }
        }
        Content { written: self.synced.clone(), synced: self.synced, dirty: BTreeSet::new() }
    }
}

impl FaultDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Calls that change something, so far.
    pub(super) fn operations(&self) -> usize {
        self.state().operations
    }

    /// Files removed so far, over all restarts.
    pub(super) fn removals(&self) -> usize {
        self.state().removals
    }

    /// Calls of any kind so far.
    pub(super) fn call_count(&self) -> usize {
        self.state().calls
    }

    /// Whether the fault that was asked for has struck, or the machine is off.
    pub(super) fn has_failed(&self) -> bool {
        let state = self.state();
        state.dead || !state.struck.is_empty()
    }

    /// Keeps every call from now on for [`FaultDisk::calls`].
    pub(super) fn trace(&self) {
        self.state().trace = Some(Vec::new());
    }

    /// All calls since [`FaultDisk::trace`], in order.
    pub(super) fn calls(&self) -> Vec<Call> {
        self.state().trace.clone().unwrap_or_default()
    }

    /// The machine dies at the operation of this number, counted from the first of this disk.
    pub(super) fn die_at(&self, operation: usize, effect: Effect) {
        self.state().death = Some((operation, effect));
    }

    /// From now on calls fail as the fault says.
    pub(super) fn fail(&self, fault: Fault) {
        let mut state = self.state();
        state.fault = Some(fault);
        state.struck.clear();
    }
    /// The system is well again. Returns the calls that failed.
    pub(super) fn heal(&self) -> Vec<Call> {
        let mut state = self.state();
        state.fault = None;
        std::mem::take(&mut state.struck)
    }

    /// The catalog is about to be opened anew, by the same process or another.
    pub(super) fn reopen(&self) {
        self.state().refuses_batches = false;
    }

    /// What is left when the machine comes up again.
    pub(super) fn restart(&self, files: Files, table: Table) -> FaultDisk {
        let state = self.state();
        let seed = |seed| ChaCha8Rng::seed_from_u64(seed);
        let mut random = seed(if let Files::Cut(seed) = files { seed } else { 0 });
        let mut left = Contents::new();
        for (&id, content) in &state.files {
            let content = content.lock().unwrap().clone().survive(files, &mut random);
            left.insert(id, Arc::new(Mutex::new(content)));
        }
        for (&id, content) in &state.ghosts {
            if matches!(files, Files::Cut(_)) && random.random() {
                let content = content.lock().unwrap().clone().survive(files, &mut random);
                left.entry(id).or_insert_with(|| Arc::new(Mutex::new(content)));
            }
        }
        let mut restarted = State {
            files: left,
            torn: state.torn.clone(),
            moved: state.moved.clone(),
            removals: state.removals,
            directory: state.directory,
            ..State::default()
        };
        match table {
            Table::Applied => restarted.pairs = state.pairs.clone(),
            Table::Flushed => restarted.pairs = state.flushed.clone(),
            Table::Deleted => {}
            Table::Partly(number) => {
                restarted.pairs = state.flushed.clone();
                let some = seed(number).random_range(0..=state.unflushed.len());
                state.unflushed[..some].iter().for_each(|batch| apply(&mut restarted.pairs, batch.clone()));
            }
        }
        if (files, table) == (Files::Written, Table::Applied) {
            // The power may still take what only the process has lost.
            restarted.flushed = state.flushed.clone();
            restarted.unflushed = state.unflushed.clone();
        } else {
            restarted.flushed = restarted.pairs.clone();
        }
        FaultDisk(Arc::new(Mutex::new(restarted)))
    }

    pub(super) fn of_directory(directory: u8) -> FaultDisk {
        FaultDisk(Arc::new(Mutex::new(State { directory, ..State::default() })))
    }

    /// What is left where the catalog falls back to what it was on another disk.
    pub(super) fn with_catalog_of(&self, older: &FaultDisk) -> FaultDisk {
        let disk = self.restart(Files::Synced, Table::Deleted);
        let pairs = older.state().pairs.clone();
        disk.state().flushed = pairs.clone();
        disk.state().pairs = pairs;
        disk
    }

    /// Flips one bit.
    pub(super) fn flip(&self, id: SegmentId, offset: u64) {
        let content = self.state().files[&id].clone();
        content.lock().unwrap().written[offset as usize] ^= 0x10;
    }

    pub(super) fn bytes_of(&self, id: SegmentId) -> Vec<u8> {
        self.state().files[&id].lock().unwrap().written.clone()
    }

    pub(super) fn cut(&self, id: SegmentId, len: usize) {
        self.state().files[&id].lock().unwrap().written.truncate(len);
    }

    /// Puts a file there, or takes it away, behind the store's back.
    pub(super) fn place(&self, id: SegmentId, bytes: Option<Vec<u8>>) {
        let mut state = self.state();
        match bytes {
            Some(bytes) => state.files.insert(id, Content::of(bytes)),
            None => state.files.remove(&id),
        };
    }

    pub(super) fn segments(&self) -> Vec<SegmentId> {
        self.state().files.keys().copied().collect()
    }

    /// Runs a call: wholly, or as far as what goes wrong lets it.
    fn call<T>(&self, call: Call, run: impl FnOnce(&mut State, Effect) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state();
        if state.dead {
            return Err(io::Error::other("the machine is off"));
        }
        let number = state.calls;
        state.calls += 1;
        if let Some(trace) = &mut state.trace {
            trace.push(call);
        }
        if call.changes() {
            let operation = state.operations;
            state.operations += 1;
            if let Some((at, effect)) = state.death
                && at == operation
            {
                (state.dead, state.failing) = (true, true);
                let _ = run(&mut state, effect);
                return Err(io::Error::other("the power failed"));
            }
        }
        if let Some(fault) = state.fault
            && number >= fault.at
            && fault.strikes(call)
            && (fault.stays || state.struck.is_empty())
        {
            state.struck.push(call);
            if call.changes() {
                state.failing = true;
                let _ = run(&mut state, fault.effect);
                state.failing = false;
            }
            return Err(fault.reason.error());
        }
        run(&mut state, Effect::Everything)
    }

    fn handle(&self, content: &Arc<Mutex<Content>>) -> Arc<dyn SegmentFile> {
        Arc::new(DiskFile { disk: self.clone(), content: content.clone() })
    }
}

fn apply(pairs: &mut Pairs, batch: Batch) {
    for (key, value) in batch {
        match value {
            Some(value) => pairs.insert(key, value),
            None => pairs.remove(&key),
        };
    }
}

impl Segments for FaultDisk {
    fn directory(&self) -> DirectoryId {
        DirectoryId([self.state().directory; 16])
    }

    fn set_aside(&self, id: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.call(Call::SetAside, |state, effect| {
            if effect == Effect::Everything {
                state.torn.insert((id, offset), bytes.to_vec());
            }
            Ok(())
        })
    }

    fn torn(&self) -> io::Result<Vec<Torn>> {
        let torn = |(&(segment, offset), bytes): (&(SegmentId, u64), &Vec<u8>)| Torn {
            segment,
            offset,
            bytes: bytes.len() as u64,
            whole: false,
        };
        let moved = |(&segment, bytes): (&SegmentId, &Vec<u8>)| Torn {
            segment,
            offset: 0,
            bytes: bytes.len() as u64,
            whole: true,
        };
        let state = self.state();
        Ok(state.torn.iter().map(torn).chain(state.moved.iter().map(moved)).collect())
    }

    fn discard_torn(&self) -> io::Result<()> {
        let mut state = self.state();
        state.torn.clear();
        state.moved.clear();
        Ok(())
    }

    fn read_torn(&self, torn: &Torn) -> io::Result<Vec<u8>> {
        let state = self.state();
        let bytes =
            if torn.whole { state.moved.get(&torn.segment) } else { state.torn.get(&(torn.segment, torn.offset)) };
        bytes.cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn move_aside(&self, id: SegmentId) -> io::Result<()> {
        self.call(Call::SetAside, |state, effect| {
            if effect == Effect::Everything {
                let content = state.files.remove(&id).ok_or(io::ErrorKind::NotFound)?;
                let bytes = content.lock().unwrap().written.clone();
                state.moved.insert(id, bytes);
            }
            Ok(())
        })
    }

    fn list(&self) -> io::Result<Vec<SegmentId>> {
        self.call(Call::List, |state, _| Ok(state.files.keys().copied().collect()))
    }

    fn open(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let content = self
            .call(Call::Open, |state, _| state.files.get(&id).cloned().ok_or_else(|| io::ErrorKind::NotFound.into()))?;
        Ok(self.handle(&content))
    }

    fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let content = self.call(Call::Create, |state, effect| {
            if state.files.contains_key(&id) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let content = Content::of(Vec::new());
            if effect == Effect::Everything {
                state.files.insert(id, content.clone());
            }
            Ok(content)
        })?;
        Ok(self.handle(&content))
    }

    fn remove(&self, id: SegmentId) -> io::Result<()> {
        self.call(Call::Remove, |state, effect| {
            if effect == Effect::Everything {
                let content = state.files.remove(&id).ok_or(io::ErrorKind::NotFound)?;
                state.removals += 1;
                if state.failing {
                    state.ghosts.insert(id, content);
                }
            }
            Ok(())
        })
    }
}

impl SegmentFile for DiskFile {
    fn len_bytes(&self) -> io::Result<u64> {
        self.disk.call(Call::Len, |_, _| Ok(self.content.lock().unwrap().written.len() as u64))
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.disk.call(Call::Read, |_, _| {
            let content = self.content.lock().unwrap();
            let from = offset as usize;
            let bytes = content.written.get(from..from + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            into.copy_from_slice(bytes);
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.call(Call::Write, |_, effect| {
            let len = match effect {
                Effect::Nothing => 0,
                Effect::Half => bytes.len() / 2,
                Effect::Everything => bytes.len(),
            };
            if len > 0 {
                self.content.lock().unwrap().write(offset as usize, &bytes[..len]);
            }
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.call(Call::Sync, |state, effect| {
            let mut content = self.content.lock().unwrap();
            content.sync(effect);
            // A dead machine keeps nothing in mind; a living one takes a failed write for done.
            if !state.dead {
                content.dirty.clear();
            }
            Ok(())
        })
    }

    fn truncate(&self, len_bytes: u64) -> io::Result<()> {
        self.disk.call(Call::Truncate, |_, effect| {
            if effect == Effect::Everything {
                let mut content = self.content.lock().unwrap();
                content.written.truncate(len_bytes as usize);
                let end = content.written.len().div_ceil(SECTOR_BYTES);
                content.dirty.retain(|&sector| sector < end);
            }
            Ok(())
        })
    }
}

impl Catalog for FaultDisk {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.call(Call::Get, |state, _| Ok(state.pairs.get(key).cloned()))
    }

    fn scan(&self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>>> {
        let found = self.call(Call::Scan, |state, _| {
            let from = state.pairs.range(prefix.to_vec()..);
            let under = from.take_while(|(key, _)| key.starts_with(prefix));
            Ok(under.map(|(key, value)| (key.clone(), value.clone())).collect::<Vec<_>>())
        });
        match found {
            Ok(found) => Box::new(found.into_iter().map(Ok)),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    fn apply(&self, batch: Batch) -> io::Result<()> {
        self.call(Call::Apply, |state, effect| {
            if state.refuses_batches {
                return Err(io::Error::other("an earlier batch failed"));
            }
            let whole = batch.len();
            let count = match effect {
                Effect::Everything => whole,
                Effect::Half if !state.dead => whole / 2,
                Effect::Half | Effect::Nothing => 0,
            };
            state.refuses_batches = state.failing;
            let done = batch[..count].to_vec();
            apply(&mut state.pairs, done.clone());
            state.unflushed.push(done);
            Ok(())
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Call::Flush, |state, effect| {
            if effect == Effect::Everything {
                state.flushed = state.pairs.clone();
                state.unflushed.clear();
            }
            Ok(())
        })
    }

    fn discard(&self) -> io::Result<()> {
        self.call(Call::Discard, |state, effect| {
            if effect == Effect::Everything {
                state.pairs.clear();
                state.flushed.clear();
                state.unflushed.clear();
            }
            Ok(())
        })
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.state().pairs.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum())
    }
}
