//! Collections and their documents: created, found by name, listed, sealed, replaced, deleted.

use super::catalog::{self, key};
use super::document::Manifest;
use super::error::{Entity, StoreError, used_up};
use super::ledger::NAMES;
use super::record::{CollectionEntry, DocumentEntry, Locator, Tombstone};
use super::state::{Store, Writer};
use crate::shape::{CollectionSpec, check_name};
use crate::types::{CollectionId, DocumentId, Engine};

/// What a deletion gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Full blocks that the document had.
    pub blocks: u32,
    /// Bytes of its records, which compaction gives back.
    pub bytes: u64,
}

impl Store {
    /// Creates a collection. Names are unique among collections.
    pub fn create_collection(&self, spec: &CollectionSpec) -> Result<CollectionId, StoreError> {
        spec.check()?;
        self.write(|writer| {
            if self.find_collection(&spec.name)?.is_some() {
                return Err(StoreError::AlreadyExists { name: spec.name.clone() });
            }
            let id = writer.ledger.totals.next_collection;
            if id.0 == u32::MAX {
                return Err(used_up("id of a collection"));
            }
            self.make_room(writer, 0)?;
            let entry = CollectionEntry { spec: spec.clone(), engine: Engine::default() };
            self.commit(writer, |group| group.collection(id, &entry))?;
            Ok(id)
        })
    }

    /// `Damaged` if none is found and names may be lost.
    pub fn find_collection(&self, name: &str) -> Result<Option<CollectionId>, StoreError> {
        self.undoubted_name(self.catalog_get(&key::collection_name(name))?)
    }

    /// Changes what answers lookups in a collection.
    pub fn set_engine(&self, id: CollectionId, engine: Engine) -> Result<(), StoreError> {
        self.write(|writer| {
            let mut entry = self.collection(id)?.ok_or(StoreError::NotFound { entity: Entity::Collection(id) })?;
            if entry.engine != engine {
                entry.engine = engine;
                self.make_room(writer, 0)?;
                self.commit(writer, |group| group.collection(id, &entry))?;
            }
            Ok(())
        })
    }

    /// All collections, by id.
    pub fn collections(&self) -> Result<Vec<(CollectionId, CollectionEntry)>, StoreError> {
        let mut collections = Vec::new();
        for pair in catalog::scan::<(Locator, CollectionEntry)>(self.readable(), key::COLLECTIONS) {
            let (key, (_, entry)) = pair?;
            collections.push((key::collection_of(&key)?, entry));
        }
        Ok(collections)
    }

    pub fn collection(&self, id: CollectionId) -> Result<Option<CollectionEntry>, StoreError> {
        let found = self.catalog_get::<(Locator, CollectionEntry)>(&key::collection(id))?;
        Ok(found.map(|(_, entry)| entry))
    }

    /// Creates an empty open document. Names are unique within a collection.
    pub fn create_document(&self, collection: CollectionId, name: &str) -> Result<Manifest, StoreError> {
        check_name("name", name)?;
        self.write(|writer| {
            let of = self.collection(collection)?;
            let of = of.ok_or(StoreError::NotFound { entity: Entity::Collection(collection) })?;
            if self.find_document(collection, name)?.is_some() {
                return Err(StoreError::AlreadyExists { name: name.into() });
            }
            if writer.ledger.totals.next_document.0 == u64::MAX {
                return Err(used_up("id of a document"));
            }
            self.make_room(writer, 0)?;
            let entry = writer.new_document(collection, name, of.spec.shape.block_tokens);
            self.commit(writer, |group| group.document(entry.clone()))?;
            Ok(entry.manifest)
        })
    }

    /// `Damaged` if none is found and names may be lost.
    pub fn find_document(&self, collection: CollectionId, name: &str) -> Result<Option<DocumentId>, StoreError> {
        self.undoubted_name(self.catalog_get(&key::document_name(collection, name))?)
    }

    fn undoubted_name<T>(&self, found: Option<T>) -> Result<Option<T>, StoreError> {
        if found.is_none() {
            self.check_undoubted(NAMES)?;
        }
        Ok(found)
    }

    /// `Damaged` if a newer one is lost.
    pub fn manifest(&self, document: DocumentId) -> Result<Manifest, StoreError> {
        self.check_undoubted(document)?;
        Ok(self.entry(document)?.manifest)
    }

    /// All documents of a collection, by name.
    pub fn manifests(&self, collection: CollectionId) -> Result<Vec<Manifest>, StoreError> {
        let mut manifests = Vec::new();
        for pair in catalog::scan::<DocumentId>(self.readable(), &key::document_name(collection, "")) {
            match self.entry(pair?.1) {
                Ok(entry) => manifests.push(entry.manifest),
                // Deleted since the scan began.
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(manifests)
    }

    /// How many documents a collection has; reads none of them.
    pub fn document_count(&self, collection: CollectionId) -> Result<u64, StoreError> {
        let names = catalog::scan::<DocumentId>(self.readable(), &key::document_name(collection, ""));
        names.map(|name| name.map(|_| 1)).sum()
    }

    /// Takes no more appends from now on. Sealing a sealed document changes nothing.
    pub fn seal(&self, document: DocumentId) -> Result<Manifest, StoreError> {
        self.write(|writer| {
            let mut entry = self.entry(document)?;
            self.check_undoubted(document)?;
            if !entry.manifest.sealed {
                entry.manifest.sealed = true;
                self.make_room(writer, 0)?;
                self.commit(writer, |group| group.document(entry.clone()))?;
            }
            Ok(entry.manifest)
        })
    }

    /// Deletes a document and gives its name to another, which was created under its [replacement's](DocumentId::replacement_name).
    /// Both are one group: after a crash the name is that of the one, whole, or of the other.
    pub fn replace(&self, document: DocumentId, by: DocumentId) -> Result<Manifest, StoreError> {
        self.write_to_free(|writer| {
            let (old, mut new) = (self.entry(document)?, self.entry(by)?);
            self.check_undoubted(by)?;
            check_replacement(&old.manifest, &new.manifest)?;
            new.set_name(old.manifest.name.clone());
            self.make_room(writer, 0)?;
            let tombstone = writer.tombstone(&old);
            self.commit(writer, |group| {
                group.document(new.clone())?;
                group.tombstone(old.manifest.collection, tombstone)
            })?;
            writer.may_have_much_dead = true;
            Ok(new.manifest)
        })
    }

    /// Deletes a document, durably. Its space comes back afterwards (see [`Compactor`](super::Compactor) and `limits::SPACE_PERCENT_MAX`).
    /// Blocks being read meanwhile are read to their end.
    pub fn delete(&self, document: DocumentId) -> Result<Freed, StoreError> {
        self.write_to_free(|writer| {
            let entry = self.entry(document)?;
            self.make_room(writer, 0)?;
            let tombstone = writer.tombstone(&entry);
            self.commit(writer, |group| group.tombstone(entry.manifest.collection, tombstone))?;
            writer.may_have_much_dead = true;
            Ok(Freed { blocks: entry.manifest.blocks, bytes: entry.manifest.stored_bytes })
        })
    }
}

/// A name goes to a later document only, so that a rebuild finds out who has it in any order of records; and what is lost of one
/// under a replacement's name may have been the record that gave it another (see `loss`).
fn check_replacement(old: &Manifest, new: &Manifest) -> Result<(), StoreError> {
    let name = old.id.replacement_name();
    if new.collection == old.collection && new.id > old.id && new.name == name {
        return Ok(());
    }
    let expected =
        format!("a document of collection {} that was created after document {} as {name:?}", old.collection, old.id);
    let found = format!("document {} of collection {}, {:?}", new.id, new.collection, new.name);
    Err(StoreError::Invalid { field: "by", expected, found })
}

impl Writer {
    /// That says from now on that a document is deleted.
    fn tombstone(&self, entry: &DocumentEntry) -> Tombstone {
        let DocumentEntry { first_segment, .. } = *entry;
        Tombstone { document: entry.manifest.id, first_segment, last_segment: self.active.id }
    }

    fn new_document(&self, collection: CollectionId, name: &str, block_tokens: u32) -> DocumentEntry {
        let manifest = Manifest {
            id: self.ledger.totals.next_document,
            collection,
            name: name.into(),
            sealed: false,
            blocks: 0,
            tail_tokens: 0,
            text_bytes: 0,
            stored_bytes: 0,
            state: None,
        };
        let mut entry = DocumentEntry { manifest, first_segment: self.active.id, block_tokens, tail_sequence: 0 };
        entry.manifest.stored_bytes = entry.record_bytes();
        entry
    }
}
