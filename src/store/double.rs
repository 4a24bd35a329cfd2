//! A disk in memory behind both seams, which can fail at any chosen operation and forget what was not synced.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::catalog::{Batch, Catalog, Pair};
use super::segment::{SegmentFile, SegmentId, Segments};

/// What the operation that fails has done by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// Half of the bytes, for a write; nothing, for anything else.
    Half,
    Everything,
}

/// What a restart finds in the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Files {
    /// The process died: all that was written.
    Written,
    /// The power failed: what was synced.
    Synced,
    /// The power failed while pages were on their way out of order: the synced part, zeros, and the end.
    Torn,
}

/// What a restart finds in the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Applied,
    Flushed,
    Deleted,
}

#[derive(Clone, Default)]
struct Content {
    written: Vec<u8>,
    synced: Vec<u8>,
}

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Default)]
struct State {
    files: BTreeMap<SegmentId, Arc<Mutex<Content>>>,
    pairs: Pairs,
    flushed: Pairs,
    operations: usize,
    fault: Option<(usize, Effect)>,
    /// After its fault the machine does nothing more, unless it only stumbles.
    dead: bool,
    stumbles: bool,
}

/// The disk. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Disk(Arc<Mutex<State>>);

struct DiskFile {
    disk: Disk,
    content: Arc<Mutex<Content>>,
}

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Changing operations so far.
    pub(super) fn operations(&self) -> usize {
        self.state().operations
    }

    /// The machine dies at the operation of this number, counted from the first of this disk.
    pub(super) fn die_at(&self, operation: usize, effect: Effect) {
        self.state().fault = Some((operation, effect));
    }

    /// The next operation fails, later ones work again.
    pub(super) fn stumble(&self) {
        let mut state = self.state();
        state.fault = Some((state.operations, Effect::Nothing));
        state.stumbles = true;
    }

    /// What is left when the machine comes up again.
    pub(super) fn restart(&self, files: Files, table: Table) -> Disk {
        let state = self.state();
        let survive = |content: &Arc<Mutex<Content>>| {
            let Content { written, synced } = content.lock().unwrap().clone();
            let bytes = match files {
                Files::Written => written,
                Files::Synced => synced,
                Files::Torn if written.len() > synced.len() => {
                    let mut torn = synced.clone();
                    torn.resize((synced.len() + written.len()) / 2, 0);
                    torn.extend_from_slice(&written[torn.len()..]);
                    torn
                }
                Files::Torn => synced,
            };
            // What survived the death of a process may still be lost with the power.
            let synced = if files == Files::Written { content.lock().unwrap().synced.clone() } else { bytes.clone() };
            Arc::new(Mutex::new(Content { written: bytes, synced }))
        };
        let pairs = match table {
            Table::Applied => state.pairs.clone(),
            Table::Flushed => state.flushed.clone(),
            Table::Deleted => Pairs::new(),
        };
        let files = state.files.iter().map(|(&id, content)| (id, survive(content))).collect();
        Disk(Arc::new(Mutex::new(State { files, flushed: pairs.clone(), pairs, ..State::default() })))
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
            Some(bytes) => {
                let content = Content { written: bytes.clone(), synced: bytes };
                state.files.insert(id, Arc::new(Mutex::new(content)));
            }
            None => {
                state.files.remove(&id);
            }
        }
    }

    pub(super) fn segments(&self) -> Vec<SegmentId> {
        self.state().files.keys().copied().collect()
    }

    /// Runs a changing operation: wholly, or as far as the fault lets it.
    fn operate(&self, operation: impl FnOnce(&mut State, Effect)) -> io::Result<()> {
        let mut state = self.state();
        if state.dead {
            return Err(io::Error::other("the machine is off"));
        }
        let number = state.operations;
        state.operations += 1;
        match state.fault {
            Some((at, effect)) if at == number => {
                state.dead = !state.stumbles;
                operation(&mut state, effect);
                Err(io::Error::other("injected fault"))
            }
            _ => {
                operation(&mut state, Effect::Everything);
                Ok(())
            }
        }
    }

    fn handle(&self, content: &Arc<Mutex<Content>>) -> Arc<dyn SegmentFile> {
        Arc::new(DiskFile { disk: self.clone(), content: content.clone() })
    }
}

impl Segments for Disk {
    fn list(&self) -> io::Result<Vec<SegmentId>> {
        Ok(self.segments())
    }

    fn open(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let content = self.state().files.get(&id).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(self.handle(&content))
    }

    fn create(&self, id: SegmentId) -> io::Result<Arc<dyn SegmentFile>> {
        let content = Arc::<Mutex<Content>>::default();
        self.operate(|state, effect| {
            if effect == Effect::Everything {
                assert!(state.files.insert(id, content.clone()).is_none(), "segment {id} exists");
            }
        })?;
        Ok(self.handle(&content))
    }

    fn remove(&self, id: SegmentId) -> io::Result<()> {
        self.operate(|state, effect| {
            if effect == Effect::Everything {
                state.files.remove(&id);
            }
        })
    }
}

impl SegmentFile for DiskFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.content.lock().unwrap().written.len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let content = self.content.lock().unwrap();
        let from = offset as usize;
        let bytes = content.written.get(from..from + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.operate(|_, effect| {
            let len = match effect {
                Effect::Nothing => return,
                Effect::Half => bytes.len() / 2,
                Effect::Everything => bytes.len(),
            };
            let (from, to) = (offset as usize, offset as usize + len);
            let written = &mut self.content.lock().unwrap().written;
            written.resize(written.len().max(to), 0);
            written[from..to].copy_from_slice(&bytes[..len]);
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.operate(|_, effect| {
            if effect == Effect::Everything {
                let mut content = self.content.lock().unwrap();
                content.synced = content.written.clone();
            }
        })
    }

    fn truncate(&self, len_bytes: u64) -> io::Result<()> {
        self.disk.operate(|_, effect| {
            if effect == Effect::Everything {
                self.content.lock().unwrap().written.truncate(len_bytes as usize);
            }
        })
    }
}

impl Catalog for Disk {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.state().pairs.get(key).cloned())
    }

    fn scan<'a>(&'a self, prefix: &[u8]) -> Box<dyn Iterator<Item = io::Result<Pair>> + 'a> {
        let state = self.state();
        let from = state.pairs.range(prefix.to_vec()..);
        let found: Vec<_> =
            from.take_while(|(key, _)| key.starts_with(prefix)).map(|(k, v)| Ok((k.clone(), v.clone()))).collect();
        Box::new(found.into_iter())
    }

    fn apply(&self, batch: Batch) -> io::Result<()> {
        self.operate(|state, effect| {
            if effect == Effect::Everything {
                for (key, value) in batch {
                    match value {
                        Some(value) => state.pairs.insert(key, value),
                        None => state.pairs.remove(&key),
                    };
                }
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.operate(|state, effect| {
            if effect == Effect::Everything {
                state.flushed = state.pairs.clone();
            }
        })
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.state().pairs.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum())
    }
}
