//! What is a segment, and what is a record? Inputs to begin with, as the store writes them.

use std::fs;
use std::path::Path;

use super::*;
use crate::store::entry::StoredCollection;
use crate::store::record::{Named, Parts};
use crate::store::{KeptState, Manifest};
use crate::types::Engine;

/// Segments of all formats, small ones and one with everything in it.
pub fn segments() -> Vec<Vec<u8>> {
    let mut segments = Vec::new();
    for segment_bytes in [1500, 1 << 20] {
        let disk = FaultDisk::default();
        let sizes = Sizes { segment_bytes, group_bytes: 1000 };
        live(&Store::open_sized(Box::new(disk.clone()), Arc::new(disk.clone()), sizes).unwrap());
        segments.extend(disk.segments().into_iter().map(|id| disk.bytes_of(id)));
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for format in ["format-1", "format-2", "format-3", "format-4"] {
        for file in fs::read_dir(fixtures.join(format).join("segments")).unwrap() {
            segments.push(fs::read(file.unwrap().path()).unwrap());
        }
    }
    segments
}

/// Two collections, documents that grow, end, are replaced and deleted.
fn live(store: &Store) {
    for name in ["one", "two"] {
        let collection = store.create_collection(&spec(name)).unwrap();
        let document = |name: &str| store.create_document(collection, name).unwrap().id;
        let (open, sealed, gone) = (document("open"), document("sealed"), document("gone"));
        for id in [open, gone] {
            store.append(id, &[block(0), tail(1, 3)]).unwrap();
            store.put_state(id, 7, &[vec![1; 90].into(), vec![2; 5].into()]).unwrap();
            store.append(id, &[block(1), block(2), tail(3, 1)]).unwrap();
            store.put_state(id, 13, &[vec![3; 40].into()]).unwrap();
        }
        store.append(sealed, &[block(0)]).unwrap();
        store.seal(sealed).unwrap();
        store.delete(gone).unwrap();
        store.set_engine(collection, Engine::Sq8).unwrap();
        store.append(document("gone"), &[block(0), tail(1, 2)]).unwrap();
    }
    store.compact().unwrap();
}

fn tail(index: u32, tokens: u32) -> BlockRecord {
    let mut tail = block(index);
    tail.pieces.truncate(tail.pieces.len() / BLOCK_TOKENS as usize * tokens as usize);
    tail.meta.token_ids.truncate(tokens as usize);
    tail.meta.text_offsets.truncate(tokens as usize);
    BlockRecord { keys: Vec::new(), ..tail }
}

/// A record of each kind, behind the byte that says which.
pub fn records() -> Vec<Vec<u8>> {
    let segment = SegmentId(7);
    let parts = Parts { meta_bytes: 40, keys_bytes: 16, piece_bytes: 64, pieces: 2 };
    let locator = Locator { segment, offset: 60, sequence: 1 << 63, tokens: 4, parts };
    let entry = CollectionEntry { spec: spec("name"), engine: Engine::Sq8 };
    let (id, collection) = (DocumentId(3), CollectionId(1));
    let name = "document".to_string();
    let manifest = Manifest {
        id,
        collection,
        name,
        sealed: true,
        blocks: 2,
        tail_tokens: 3,
        text_bytes: 9,
        stored_bytes: 512,
        state: None,
    };
    let document = DocumentEntry { manifest, first_segment: segment, block_tokens: 4, tail_sequence: 1 << 63 };
    let mut stated = document.clone();
    stated.manifest.state = Some(KeptState { tokens: 9, parts: 2, bytes: 300, sequence: 1 << 63 });
    let tombstone = Tombstone { document: id, first_segment: segment, last_segment: SegmentId(9) };
    let named = vec![Named::Collection(collection, 1), Named::Document(id, 2), Named::Tombstone(id, 3)];
    let group = GroupEntry { number: 1 << 63, named };
    let state = SegmentState { bytes: 900, live_bytes: 700, frame_bytes: 100, retired: false };
    let totals = Totals {
        documents: 1,
        blocks: 2,
        tokens: 11,
        next_collection: CollectionId(2),
        next_document: DocumentId(4),
        next_sequence: 1 << 63,
        directory: DIRECTORY,
    };
    let damage = Damage { segment, offset: 60, bytes: 10, document: Some(id) };
    let doubt = Doubt { document: id, reason: "lost".into() };
    let header = SegmentHeader::new(segment, DIRECTORY, CollectionId(2), DocumentId(4), 1 << 63).encode();
    let block_id = BlockId { document: id, index: 1 };
    let (kind, commit, sequence, tokens) = (Kind::Block, false, 1 << 63, 4);
    let record = RecordHeader { kind, commit, sequence, collection, block: block_id, tokens, parts };
    let one_piece = Parts { meta_bytes: 0, keys_bytes: 0, piece_bytes: 9, pieces: 1 };
    let part = RecordHeader { kind: Kind::State, block: place::of_part(id, 1), tokens: 0, parts: one_piece, ..record };
    let old = StoredCollection::from(CollectionEntry { spec: spec("old"), engine: Engine::Flat }).spec;
    let bodies = [
        (0, header.to_vec()),
        (1, record.encode(Salt::of(DIRECTORY, segment)).to_vec()),
        (2, pack(&document)),
        (3, pack(&entry)),
        (4, pack(&old)),
        (5, pack(&tombstone)),
        (6, pack(&group)),
        (7, pack(&(locator, &document))),
        (8, pack(&(segment, state))),
        (9, pack(&totals)),
        (10, pack(&damage)),
        (11, pack(&doubt)),
        (12, [vec![BLOCK_TOKENS as u8], encode_meta(&block(1).meta)].concat()),
        // As a scan reads them, with sequences and without.
        (0x80 | 16, pack(&entry)),
        (0x80 | 17, pack(&document)),
        (0x80 | 18, pack(&tombstone)),
        (0x80 | 19, pack(&group)),
        (16, pack(&old)),
        (17, pack(&document)[..pack(&document).len() - 9].to_vec()),
        (17, pack(&document)),
        (1, part.encode(Salt::of(DIRECTORY, segment)).to_vec()),
        (2, pack(&stated)),
        (7, pack(&(locator, &stated))),
        (0x80 | 17, pack(&stated)),
        // As format 4 wrote it.
        (0x80 | 17, pack(&document)[..pack(&document).len() - 1].to_vec()),
    ];
    bodies.into_iter().map(|(kind, body)| [vec![kind], body].concat()).collect()
}
