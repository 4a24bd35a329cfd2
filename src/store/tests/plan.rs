//! Random work for a store, and the plain model that says what the store holds after it.
//!
//! Operations name documents by slots, not by ids, so that a sequence still means something after parts of it are left
//! out: what is not there is answered with `NotFound`, and the model knows it.

use std::collections::BTreeSet;
use std::fmt;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::store::fault_disk::{Effect, Files, Table};

pub(super) const COLLECTIONS: u8 = 2;
/// Names of documents in each collection.
const NAMES: u8 = 4;
/// A document longer than this is deleted rather than appended to: every step reads all of them.
const BLOCKS_MAX: usize = 24;
/// Deleted documents that are asked for after every step: the latest.
const GONE_MAX: usize = 16;

/// A place for a document: a name in a collection, or what is to replace the document of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) collection: u8,
    pub(super) name: u8,
    pub(super) replaces: bool,
}

/// What an append offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offer {
    /// Blocks behind the last full one: they replace the tail, if there is one.
    Next,
    /// The same, and the tail's own tokens come first in what replaces it.
    Longer,
    /// The last full blocks again, as they are, and what follows them.
    Again,
    /// The last full block with other tokens: refused.
    Other,
    /// One block further: refused.
    Gap,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    CreateCollection(u8),
    SetEngine(u8, u8),
    Create(Slot),
    /// `full` blocks and a tail of `tail` tokens (0: none).
    Append {
        slot: Slot,
        offer: Offer,
        full: u8,
        tail: u8,
        seed: u32,
    },
    /// A state of so many parts.
    Put {
        slot: Slot,
        parts: u8,
        seed: u32,
    },
    Seal(Slot),
    /// The document of the name gives way to what is to replace it.
    Replace(Slot),
    Delete(Slot),
    Restart(Files, Table),
    /// Something is about to go wrong.
    Expect(Bad),
}

/// What a machine does to a store: it happens that many calls from now.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bad {
    /// The machine dies, and perhaps `again` while the store recovers.
    Death { after: u8, effect: Effect, files: Files, table: Table, again: Option<u8> },
    /// A sync fails, then the process is started again, on a machine whose page cache takes the bytes for written.
    Sync { after: u8, effect: Effect, table: Table },
}

/// How large things are: small enough that every limit is met all the time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) segment_bytes: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Document {
    /// Document 0, which no document has, until the store has been asked.
    pub(super) id: DocumentId,
    pub(super) slot: Slot,
    pub(super) name: String,
    pub(super) sealed: bool,
    /// The last may be a tail.
    pub(super) blocks: Vec<BlockRecord>,
    /// The tokens that it was taken after, and its parts.
    pub(super) state: Option<(u64, Vec<Bytes>)>,
}

/// What a store holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    /// By slot, with its engine.
    pub(super) collections: Vec<(CollectionId, u8, Engine)>,
    pub(super) documents: Vec<Document>,
    /// Deleted, the latest last.
    pub(super) gone: Vec<(DocumentId, u32)>,
    /// Every id ever seen.
    seen: BTreeSet<DocumentId>,
}

/// What the store answers to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    NotFound,
    AlreadyExists,
    OutOfOrder,
    Conflict,
    Sealed,
    Invalid,
    /// Never expected from a disk that is well.
    Fault,
}

impl Answer {
    pub(super) fn of<T>(result: &Result<T, StoreError>) -> Answer {
        match result {
            Ok(_) => Answer::Done,
            Err(StoreError::NotFound { .. }) => Answer::NotFound,
            Err(StoreError::AlreadyExists { .. }) => Answer::AlreadyExists,
            Err(StoreError::OutOfOrder { .. }) => Answer::OutOfOrder,
            Err(StoreError::Conflict { .. }) => Answer::Conflict,
            Err(StoreError::Sealed) => Answer::Sealed,
            Err(StoreError::Invalid { .. }) => Answer::Invalid,
            Err(_) => Answer::Fault,
        }
    }
}

impl Slot {
    fn with_replaces(self, replaces: bool) -> Slot {
        Slot { replaces, ..self }
    }
}

fn collection_name(slot: u8) -> String {
    format!("collection {slot}")
}

/// A block as [`block`], with more text if its seed says so: some are larger than a whole segment.
pub(super) fn made(index: u32, tokens: u32, seed: u32) -> BlockRecord {
    let mut block = block(index, tokens, seed);
    let repeat = if seed.is_multiple_of(11) { 150 } else { 1 };
    block.meta.text = block.meta.text.repeat(repeat);
    block
}

/// The parts of a state: some are larger than a whole segment.
fn made_parts(count: u8, seed: u32) -> Vec<Bytes> {
    let len = |number: u32| 1 + (seed * 37 + number * 11) as usize % if seed.is_multiple_of(7) { 4000 } else { 200 };
    (0..count as u32).map(|number| part(number, len(number), seed)).collect()
}

impl Document {
    fn tokens(&self) -> u64 {
        self.token_ids().len() as u64
    }

    fn token_ids(&self) -> Vec<u32> {
        self.blocks.iter().flat_map(|block| block.meta.token_ids.iter().copied()).collect()
    }

    fn full(&self) -> u32 {
        self.blocks.iter().filter(|block| block.meta.token_ids.len() == 4).count() as u32
    }

    pub(super) fn tail_tokens(&self) -> u32 {
        self.blocks.last().map_or(0, |last| last.meta.token_ids.len() as u32 % 4)
    }

    /// The blocks of an append, and how the store answers it.
    fn offered(&self, offer: Offer, full: u8, tail: u8, seed: u32) -> (Vec<BlockRecord>, Answer) {
        let next = self.full();
        let (first, from) = match offer {
            Offer::Gap => (next + 1, next + 1),
            Offer::Other | Offer::Again => (next.saturating_sub(2), next),
            Offer::Next | Offer::Longer => (next, next),
        };
        let mut offered: Vec<BlockRecord> = self.blocks[..next as usize].iter().skip(first as usize).cloned().collect();
        let mut answer = Answer::Done;
        if offer == Offer::Other
            && let Some(last) = offered.last_mut()
        {
            last.meta.token_ids[0] ^= 1;
            answer = Answer::Conflict;
        }
        offered.extend((0..full as u32).map(|step| made(from + step, 4, seed)));
        if tail > 0 {
            offered.push(made(from + full as u32, tail as u32, seed));
        }
        if offer == Offer::Longer
            && let (Some(first), Some(old)) = (offered.first_mut(), self.blocks.get(next as usize))
        {
            let same = first.meta.token_ids.iter_mut().zip(&old.meta.token_ids);
            same.for_each(|(id, old)| *id = *old);
        }
        let has_news = full > 0 || tail > 0;
        if answer == Answer::Done && has_news {
            if self.sealed {
                answer = Answer::Sealed;
            } else if offer == Offer::Gap {
                answer = Answer::OutOfOrder;
            }
        }
        (offered, answer)
    }
}

impl Model {
    pub(super) fn document(&self, slot: Slot) -> Option<&Document> {
        self.documents.iter().find(|document| document.slot == slot)
    }

    pub(super) fn block(&self, id: BlockId) -> Option<&BlockRecord> {
        let document = self.documents.iter().find(|document| document.id == id.document)?;
        document.blocks.get(id.index as usize)
    }

    /// What the document at a place is called, or would be; `None` for what is to replace nothing.
    fn name(&self, slot: Slot) -> Option<String> {
        if let Some(document) = self.document(slot) {
            return Some(document.name.clone());
        }
        if slot.replaces {
            return self.document(slot.with_replaces(false)).map(|document| document.id.replacement_name());
        }
        Some(["a", "b", "ab", "long name of a document"][slot.name as usize].into())
    }

    fn document_mut(&mut self, slot: Slot) -> Option<&mut Document> {
        self.documents.iter_mut().find(|document| document.slot == slot)
    }

    pub(super) fn collection(&self, slot: u8) -> Option<CollectionId> {
        self.collections.iter().find(|(_, known, _)| *known == slot).map(|(id, ..)| *id)
    }

    /// Does to the model what the operation does to the store. Returns how the store answers.
    pub(super) fn step(&mut self, op: Op) -> Answer {
        match op {
            Op::CreateCollection(slot) if self.collection(slot).is_some() => return Answer::AlreadyExists,
            Op::CreateCollection(slot) => {
                let id = CollectionId(self.collections.iter().map(|(id, ..)| id.0).max().unwrap_or(0) + 1);
                self.collections.push((id, slot, Engine::default()));
            }
            Op::SetEngine(slot, number) => {
                let found = self.collections.iter_mut().find(|(_, known, _)| *known == slot);
                let Some((.., engine)) = found else { return Answer::NotFound };
                *engine = engine_of(number);
            }
            Op::Create(slot) => {
                if self.collection(slot.collection).is_none() {
                    return Answer::NotFound;
                }
                if self.document(slot).is_some() {
                    return Answer::AlreadyExists;
                }
                let Some(name) = self.name(slot) else { return Answer::NotFound };
                let (id, blocks) = (DocumentId(0), Vec::new());
                self.documents.push(Document { id, slot, name, sealed: false, blocks, state: None });
            }
            Op::Append { slot, offer, full, tail, seed } => {
                let Some(document) = self.document_mut(slot) else { return Answer::NotFound };
                let (offered, answer) = document.offered(offer, full, tail, seed);
                if answer != Answer::Done {
                    return answer;
                }
                let next = document.full();
                let news: Vec<_> = offered.into_iter().filter(|block| block.index >= next).collect();
                if !news.is_empty() {
                    let before = document.token_ids();
                    document.blocks.truncate(next as usize);
                    document.blocks.extend(news);
                    let now = document.token_ids();
                    let agrees = |taken: usize| now.get(..taken) == before.get(..taken);
                    document.state = document.state.take().filter(|(taken, _)| agrees(*taken as usize));
                }
            }
            Op::Put { slot, parts, seed } => {
                let Some(document) = self.document_mut(slot) else { return Answer::NotFound };
                if document.sealed {
                    return Answer::Sealed;
                }
                document.state = Some((document.tokens(), made_parts(parts, seed)));
            }
            Op::Seal(slot) => {
                let Some(document) = self.document_mut(slot) else { return Answer::NotFound };
                document.sealed = true;
            }
            Op::Replace(slot) => {
                let (old, new) = (self.document(slot), self.document(slot.with_replaces(true)));
                let (Some(old), Some(new)) = (old, new) else { return Answer::NotFound };
                if new.name != old.id.replacement_name() {
                    return Answer::Invalid;
                }
                let name = old.name.clone();
                self.delete(slot);
                let Some(new) = self.document_mut(slot.with_replaces(true)) else { return Answer::NotFound };
                (new.slot, new.name) = (slot, name);
            }
            Op::Delete(slot) => return self.delete(slot),
            Op::Restart(..) | Op::Expect(_) => {}
        }
        Answer::Done
    }

    fn delete(&mut self, slot: Slot) -> Answer {
        let Some(at) = self.documents.iter().position(|document| document.slot == slot) else {
            return Answer::NotFound;
        };
        let document = self.documents.remove(at);
        self.gone.push((document.id, document.blocks.len() as u32));
        let old = self.gone.len().saturating_sub(GONE_MAX);
        self.gone.drain(..old);
        Answer::Done
    }

    /// Does it to the store. `Restart` is the caller's.
    pub(super) fn run(&self, store: &Store, op: Op) -> Result<(), StoreError> {
        let collection = |slot: u8| self.collection(slot).unwrap_or(CollectionId(99));
        const NONE: DocumentId = DocumentId(1 << 40);
        let document = |slot: Slot| self.document(slot).map_or(NONE, |document| document.id);
        match op {
            Op::CreateCollection(slot) => store.create_collection(&spec(&collection_name(slot))).map(drop),
            Op::SetEngine(slot, number) => store.set_engine(collection(slot), engine_of(number)),
            Op::Create(slot) => match self.name(slot) {
                Some(name) => store.create_document(collection(slot.collection), &name).map(drop),
                None => store.manifest(NONE).map(drop),
            },
            Op::Append { slot, offer, full, tail, seed } => {
                let offered = self.document(slot).map(|document| document.offered(offer, full, tail, seed).0);
                store.append(document(slot), &offered.unwrap_or_default()).map(drop)
            }
            Op::Put { slot, parts, seed } => {
                let tokens = self.document(slot).map_or(0, Document::tokens);
                store.put_state(document(slot), tokens, &made_parts(parts, seed)).map(drop)
            }
            Op::Seal(slot) => store.seal(document(slot)).map(drop),
            Op::Replace(slot) => store.replace(document(slot), document(slot.with_replaces(true))).map(drop),
            Op::Delete(slot) => store.delete(document(slot)).map(drop),
            Op::Restart(..) | Op::Expect(_) => Ok(()),
        }
    }

    /// Learns the id of a document that was just created, which has to be a new one.
    pub(super) fn adopt(&mut self, store: &Store) -> Result<(), String> {
        let names: Vec<_> = self.collections.iter().map(|&(id, slot, _)| (id, slot)).collect();
        for document in self.documents.iter_mut().filter(|document| document.id == DocumentId(0)) {
            let of = names.iter().find(|(_, slot)| *slot == document.slot.collection).map(|(id, _)| *id);
            let of = of.ok_or("a document without a collection")?;
            let found = store.find_document(of, &document.name).map_err(|error| error.to_string())?;
            document.id = found.ok_or_else(|| format!("{:?} was created and is not found", document.slot))?;
            if !self.seen.insert(document.id) {
                return Err(format!("id {} was given out before", document.id));
            }
        }
        Ok(())
    }

    /// Compares all that the store's reading calls give with the model.
    pub(super) fn compare(&self, store: &Store) -> Result<(), String> {
        let mut collections = Vec::new();
        for (id, entry) in store.collections().map_err(|error| error.to_string())? {
            collections.push((id, entry.spec.name, entry.engine));
        }
        let expected: Vec<_> =
            self.collections.iter().map(|(id, slot, engine)| (*id, collection_name(*slot), engine.clone())).collect();
        same("collections", &collections, &expected)?;
        for &(id, slot, _) in &self.collections {
            self.compare_collection(store, id, slot)?;
        }
        for document in &self.documents {
            document.compare(store)?;
        }
        for &(id, blocks) in &self.gone {
            same(&format!("deleted document {id}"), &Answer::of(&store.manifest(id)), &Answer::NotFound)?;
            for index in [0, blocks.saturating_sub(1)] {
                let read = store.read_meta(BlockId { document: id, index });
                same(&format!("block {index} of deleted document {id}"), &Answer::of(&read), &Answer::NotFound)?;
            }
        }
        let stats = store.stats();
        let full: u32 = self.documents.iter().map(Document::full).sum();
        let tails: u32 = self.documents.iter().map(Document::tail_tokens).sum();
        let expected = (self.documents.len() as u64, full as u64, (full * 4 + tails) as u64);
        same("documents, blocks and tokens of the stats", &(stats.documents, stats.blocks, stats.tokens), &expected)
    }

    fn compare_collection(&self, store: &Store, id: CollectionId, slot: u8) -> Result<(), String> {
        let here = |replaces| move |name| Slot { collection: slot, name, replaces };
        for place in (0..NAMES).map(here(false)).chain((0..NAMES).map(here(true))) {
            let Some(name) = self.name(place) else { continue };
            let found = store.find_document(id, &name).map_err(|error| error.to_string())?;
            let expected = self.document(place).map(|document| document.id);
            same(&format!("document {name:?} by name"), &found, &expected)?;
        }
        let listed = store.manifests(id).map_err(|error| error.to_string())?;
        let names: Vec<_> = listed.iter().map(|manifest| (manifest.name.clone(), manifest.id)).collect();
        let of = self.documents.iter().filter(|document| document.slot.collection == slot);
        let mut expected: Vec<_> = of.map(|document| (document.name.clone(), document.id)).collect();
        expected.sort();
        same(&format!("documents of collection {id}"), &names, &expected)
    }
}

impl Document {
    fn compare(&self, store: &Store) -> Result<(), String> {
        let id = self.id;
        let manifest = store.manifest(id).map_err(|error| format!("document {id}: {error}"))?;
        let found = (manifest.blocks, manifest.tail_tokens, manifest.sealed, manifest.text_bytes, manifest.id);
        let text_bytes = self.blocks.last().map_or(0, |last| last.meta.text_start + last.meta.text.len() as u64);
        same(
            &format!("blocks, tail, seal and text of document {id}"),
            &found,
            &(self.full(), self.tail_tokens(), self.sealed, text_bytes, id),
        )?;
        for expected in &self.blocks {
            let block = BlockId { document: id, index: expected.index };
            let found = read(store, block).map_err(|error| format!("block {block}: {error}"))?;
            if found != *expected {
                return Err(format!("block {block} holds {:?}, expected {:?}", found.meta, expected.meta));
            }
        }
        let found = state(store, id).map_err(|error| format!("the state of document {id}: {error}"))?;
        if found != self.state {
            let lens = |state: &Option<(u64, Vec<Bytes>)>| {
                state.as_ref().map(|(tokens, parts)| (*tokens, parts.iter().map(Bytes::len).collect::<Vec<_>>()))
            };
            let (found, expected) = (lens(&found), lens(&self.state));
            return Err(format!("the state of document {id} is another: found {found:?}, expected {expected:?}"));
        }
        let behind = BlockId { document: id, index: self.blocks.len() as u32 };
        same(&format!("block {behind}, behind the end"), &Answer::of(&store.read_meta(behind)), &Answer::NotFound)
    }
}

fn same<T: PartialEq + fmt::Debug>(what: &str, found: &T, expected: &T) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: found {found:?}, expected {expected:?}"))
}

fn engine_of(number: u8) -> Engine {
    [Engine::Flat, Engine::Sq8, Engine::Sq4][number as usize % 3].clone()
}

/// Draws operations: more of what fills and empties segments than of anything else.
pub(super) struct Generator {
    random: ChaCha8Rng,
    /// Versions of blocks so far: each has bytes of its own.
    seed: u32,
}

impl Generator {
    pub(super) fn new(seed: u64) -> Generator {
        Generator { random: ChaCha8Rng::seed_from_u64(seed), seed: 0 }
    }

    pub(super) fn number(&mut self, below: u64) -> u64 {
        self.random.random_range(0..below)
    }

    fn slot(&mut self) -> Slot {
        let (collection, name) = (self.number(COLLECTIONS as u64) as u8, self.number(NAMES as u64) as u8);
        Slot { collection, name, replaces: self.number(8) == 0 }
    }

    pub(super) fn sizes(&mut self) -> Sizes {
        Sizes { segment_bytes: [500, 1000, 2000, 6000][self.number(4) as usize] }
    }

    /// The next operation for a store that holds what `model` says.
    pub(super) fn next(&mut self, model: &Model) -> Op {
        let missing = (0..COLLECTIONS).find(|&slot| model.collection(slot).is_none());
        if let Some(slot) = missing.filter(|_| self.number(3) == 0) {
            return Op::CreateCollection(slot);
        }
        let slot = self.slot();
        match self.number(100) {
            0 => Op::CreateCollection(slot.collection),
            1..4 => Op::SetEngine(slot.collection, self.number(3) as u8),
            4..7 => Op::Seal(slot),
            7..14 => Op::Delete(slot),
            14..20 => Op::Create(slot),
            20..24 => self.restart(),
            24..34 if model.document(slot).is_some() => self.put(slot),
            34..44 if model.document(slot.with_replaces(true)).is_some() => Op::Replace(slot.with_replaces(false)),
            _ => match model.document(slot) {
                None => Op::Create(slot),
                Some(document) if document.sealed || document.blocks.len() > BLOCKS_MAX => Op::Delete(slot),
                Some(_) => self.append(slot),
            },
        }
    }

    fn append(&mut self, slot: Slot) -> Op {
        self.seed += 1;
        let offer = match self.number(20) {
            0 => Offer::Gap,
            1 => Offer::Other,
            2..4 => Offer::Again,
            4..8 => Offer::Longer,
            _ => Offer::Next,
        };
        let full = [0, 0, 1, 1, 2, 5][self.number(6) as usize];
        Op::Append { slot, offer, full, tail: self.number(4) as u8, seed: self.seed }
    }

    fn put(&mut self, slot: Slot) -> Op {
        self.seed += 1;
        Op::Put { slot, parts: 1 + self.number(4) as u8, seed: self.seed }
    }

    fn files(&mut self) -> Files {
        let cut = Files::Cut(self.number(1 << 32));
        [Files::Written, Files::Synced, Files::Torn, cut, cut, cut][self.number(6) as usize]
    }

    fn table(&mut self) -> Table {
        let partly = Table::Partly(self.number(1 << 32));
        [Table::Applied, Table::Flushed, Table::Deleted, partly][self.number(4) as usize]
    }

    fn restart(&mut self) -> Op {
        Op::Restart(self.files(), self.table())
    }

    /// Something that goes wrong soon.
    pub(super) fn bad(&mut self) -> Op {
        let effect = [Effect::Nothing, Effect::Half, Effect::Everything][self.number(3) as usize];
        let table = self.table();
        if self.number(5) == 0 {
            return Op::Expect(Bad::Sync { after: self.number(20) as u8, effect, table });
        }
        let again = (self.number(4) == 0).then(|| self.number(12) as u8);
        Op::Expect(Bad::Death { after: self.number(30) as u8, effect, files: self.files(), table, again })
    }
}
