//! Directories that released code wrote, kept in `tests/fixtures/`: does this build read them, go on in them and
//! rebuild them? What they hold follows from the formula of their README.

use std::path::PathBuf;

use half::{bf16, f16};
use tempfile::TempDir;

use std::fs;

use super::read_only::snapshot;
use super::*;

/// A document that a directory is to have.
#[derive(Clone, Copy)]
struct Expected {
    collection: CollectionId,
    name: &'static str,
    blocks: u32,
    tail_tokens: u32,
    sealed: bool,
    seed: u32,
}

const fn expected(collection: u32, name: &'static str, blocks: u32, tail_tokens: u32, seed: u32) -> Expected {
    Expected { collection: CollectionId(collection), name, blocks, tail_tokens, sealed: false, seed }
}

/// By collection and name, as they are listed.
const DOCUMENTS: [Expected; 8] = [
    expected(1, "again", 2, 0, 6),
    expected(1, "empty", 0, 0, 4),
    expected(1, "open", 5, 2, 1),
    expected(1, "regrown", 2, 3, 2),
    Expected { sealed: true, ..expected(1, "sealed", 2, 1, 3) },
    expected(2, "coded", 3, 2, 8),
    Expected { sealed: true, ..expected(2, "sealed", 1, 0, 9) },
    expected(3, "über alles, lang", 2, 0, 10),
];

/// What `format-3-hidden` has besides.
const MORE: [Expected; 3] =
    [expected(1, "fill", 3, 0, 13), expected(1, "renewed", 2, 0, 12), expected(1, "stays", 4, 0, 11)];

/// B
const BLOCK_TOKENS: u32 = 4;
/// D
const HEAD_DIM: usize = 8;
/// L * Hkv
const PIECES: u32 = 4;

/// L = 2, Hq = 4, Hkv = 2.
fn spec_of(name: &str, key_rule: KeyRule, payload_dtype: DType, key_dtype: DType) -> CollectionSpec {
    let shape = ModelShape {
        layers: 2,
        query_heads: 4,
        kv_heads: 2,
        head_dim: HEAD_DIM as u32,
        block_tokens: BLOCK_TOKENS,
        rope: Rope { frequencies: vec![1.0, 0.5, 0.25, 0.125] },
        unrotated_layers: Vec::new(),
        softmax_scale: 0.5,
    };
    CollectionSpec { shape, key_rule, payload_dtype, key_dtype, ..spec(name) }
}

/// One directory, and what it is to hold.
struct Fixture {
    dir: TempDir,
    /// Documents of `codes` begun in format 3 or later have channel quantizers.
    coded: bool,
    collections: Vec<(CollectionId, CollectionEntry)>,
    documents: Vec<Expected>,
    /// How many documents it ever had.
    created: u64,
}

impl Fixture {
    /// A copy of `tests/fixtures/NAME` to work in.
    fn copy(name: &str) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        for folder in fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().file_name()) {
            fs::create_dir(dir.path().join(&folder)).unwrap();
            for file in fs::read_dir(from.join(&folder)).unwrap().map(|entry| entry.unwrap()) {
                fs::copy(file.path(), dir.path().join(&folder).join(file.file_name())).unwrap();
            }
        }
        let engine = if name == "format-1" { Engine::Flat } else { Engine::Sq8 };
        let entry = |spec, engine| CollectionEntry { spec, engine };
        let collections = [
            entry(spec_of("halves", KeyRule::Landmark, DType::F16, DType::F16), Engine::Flat),
            entry(spec_of("codes", KeyRule::Tokens, DType::Int8, DType::Int8), engine),
            entry(spec_of("means", KeyRule::Mean, DType::BF16, DType::Int8), Engine::Flat),
        ];
        let mut documents = DOCUMENTS.to_vec();
        if name == "format-3-hidden" {
            documents.extend(MORE);
        }
        documents.sort_by_key(|document| (document.collection, document.name));
        Fixture {
            dir,
            coded: !["format-1", "format-2"].contains(&name),
            collections: (1..).map(CollectionId).zip(collections).collect(),
            created: if name == "format-3-hidden" { 16 } else { 11 },
            documents,
        }
    }

    fn open(&self) -> Store {
        Store::open(self.dir.path()).unwrap()
    }

    fn delete_catalog(&self) {
        fs::remove_dir_all(self.dir.path().join(CATALOG_FOLDER)).unwrap();
    }

    fn document(&mut self, collection: u32, name: &str) -> &mut Expected {
        let is_it = |document: &&mut Expected| (document.collection.0, document.name) == (collection, name);
        self.documents.iter_mut().find(is_it).unwrap()
    }

    /// The block of a document by the formula of the README.
    fn block(&self, document: &Expected, index: u32, tokens: u32) -> BlockRecord {
        let seed = document.seed;
        let spec = &self.collections[document.collection.0 as usize - 1].1.spec;
        let coded = self.coded && spec.key_rule == KeyRule::Tokens;
        let (mut keys, mut pieces) = (Vec::new(), Vec::new());
        for piece in 0..PIECES {
            let count = tokens as usize * HEAD_DIM;
            encode(spec.payload_dtype, HEAD_DIM, count, seed, index, 10 + 2 * piece, &mut pieces);
            encode(spec.payload_dtype, tokens as usize, count, seed, index, 11 + 2 * piece, &mut pieces);
        }
        if tokens == BLOCK_TOKENS {
            if coded && index == 0 {
                let factors = (0..PIECES * HEAD_DIM as u32).map(|i| (1 + (seed + i) % 4) as f32);
                keys.extend(factors.flat_map(f32::to_le_bytes));
            }
            let m = spec.shape.keys_per_block(spec.key_rule);
            let width = if coded { HEAD_DIM + 1 } else { HEAD_DIM };
            (0..PIECES).for_each(|piece| encode(spec.key_dtype, m, m * width, seed, index, 30 + piece, &mut keys));
        }
        let letter = |number: u32| b'a' + (number % 26) as u8;
        let meta = BlockMeta {
            token_ids: (0..tokens).map(|t| seed * 1000 + index * 10 + t).collect(),
            text_start: index as u64 * 12,
            text: (0..tokens).flat_map(|t| [letter(seed + 5 * index + t), letter(3 * index + t), b' ']).collect(),
            text_offsets: (0..tokens).map(|t| t * 3).collect(),
        };
        BlockRecord { index, meta, keys, pieces }
    }

    /// Everything that is to be there is there as it was written, and nothing else is.
    fn check(&self, store: &Store, context: &str) {
        assert_eq!(store.collections().unwrap(), self.collections, "{context}");
        let listed: Vec<Manifest> = self.collections.iter().flat_map(|(id, _)| store.manifests(*id).unwrap()).collect();
        let names = listed.iter().map(|manifest| (manifest.collection, manifest.name.as_str()));
        let wanted = self.documents.iter().map(|document| (document.collection, document.name));
        assert_eq!(names.collect::<Vec<_>>(), wanted.collect::<Vec<_>>(), "{context}");
        for (manifest, document) in listed.iter().zip(&self.documents) {
            let context = format!("{context}: {manifest:?}");
            assert_eq!(
                store.find_document(document.collection, document.name).unwrap(),
                Some(manifest.id),
                "{context}"
            );
            assert_eq!(store.manifest(manifest.id).unwrap(), *manifest, "{context}");
            let Expected { blocks, tail_tokens, sealed, .. } = *document;
            assert_eq!(
                (manifest.blocks, manifest.tail_tokens, manifest.sealed),
                (blocks, tail_tokens, sealed),
                "{context}"
            );
            assert_eq!(manifest.text_bytes, blocks as u64 * 12 + tail_tokens as u64 * 3, "{context}");
            for index in 0..blocks + (tail_tokens > 0) as u32 {
                let tokens = if index < blocks { BLOCK_TOKENS } else { tail_tokens };
                let read = read_whole(store, BlockId { document: manifest.id, index });
                assert_eq!(read, self.block(document, index, tokens), "{context}, block {index}");
            }
        }
        let totals = |of: fn(&Expected) -> u32| self.documents.iter().map(|document| of(document) as u64).sum::<u64>();
        let stats = store.stats();
        assert_eq!((stats.documents, stats.blocks), (totals(|_| 1), totals(|document| document.blocks)), "{context}");
        let tokens = totals(|document| document.blocks * BLOCK_TOKENS + document.tail_tokens);
        assert_eq!(stats.tokens, tokens, "{context}");
        assert_clean(store, context);
    }

    /// Documents grow and go, and one comes, as in a directory that was begun today.
    fn go_on(&mut self, store: &Store) {
        for (collection, name, index) in [(1, "open", 5), (2, "coded", 3)] {
            *self.document(collection, name) =
                Expected { blocks: index + 1, tail_tokens: 0, ..*self.document(collection, name) };
            let document = *self.document(collection, name);
            let id = store.find_document(document.collection, name).unwrap().unwrap();
            store.append(id, &[self.block(&document, index, BLOCK_TOKENS)]).unwrap();
        }
        let gone = store.find_document(CollectionId(1), "regrown").unwrap().unwrap();
        store.delete(gone).unwrap();
        self.documents.retain(|document| document.name != "regrown");

        let new = expected(3, "über allem", 1, 3, 20);
        let created = store.create_document(new.collection, new.name).unwrap();
        assert_eq!(created.id, DocumentId(self.created + 1), "ids of deleted documents are not used again");
        store.append(created.id, &[self.block(&new, 0, BLOCK_TOKENS), self.block(&new, 1, 3)]).unwrap();
        self.documents.push(new);
        self.documents.sort_by_key(|document| (document.collection, document.name));
    }

    /// Reads the directory as it is, then opens it, goes on in it, reopens it, and has its catalog rebuilt.
    fn lives_on(&mut self) {
        let before = snapshot(self.dir.path());
        self.check(&Store::open_read_only(self.dir.path()).unwrap(), "read only");
        assert_eq!(snapshot(self.dir.path()), before, "nothing is written");
        let store = self.open();
        self.check(&store, "as it was left");
        self.go_on(&store);
        self.check(&store, "continued");
        drop(store);
        let store = self.open();
        self.check(&store, "reopened");
        drop(store);
        self.delete_catalog();
        self.check(&self.open(), "rebuilt");
    }
}

/// Scales, which only int8 has, and values.
fn encode(dtype: DType, scales: usize, count: usize, seed: u32, index: u32, salt: u32, out: &mut Vec<u8>) {
    if dtype == DType::Int8 {
        let scale = |i: u32| (1 + (seed + index + salt + i) % 4) as f32 / 64.0;
        out.extend((0..scales as u32).map(scale).flat_map(f32::to_le_bytes));
    }
    for i in 0..count as u32 {
        let number = ((seed * 31 + index * 17 + salt * 7 + i * 5) % 61) as i8 - 30;
        let float = number as f32 / 16.0;
        match dtype {
            DType::F32 => out.extend(float.to_le_bytes()),
            DType::F16 => out.extend(f16::from_f32(float).to_le_bytes()),
            DType::BF16 => out.extend(bf16::from_f32(float).to_le_bytes()),
            DType::Int8 => out.push(number.cast_unsigned()),
        }
    }
}

fn read_whole(store: &Store, id: BlockId) -> BlockRecord {
    let (meta, _) = store.read_meta(id).unwrap();
    let (mut pieces, mut one) = (Vec::new(), Vec::new());
    store.read_pieces(id, &mut pieces).unwrap();
    for (number, piece) in pieces.chunks_exact(pieces.len() / PIECES as usize).enumerate() {
        store.read_piece(id, number, &mut one).unwrap();
        assert_eq!(one, piece, "piece {number} of {id} read alone and with the others");
    }
    BlockRecord { index: id.index, meta, keys: store.read_keys(id).unwrap(), pieces }
}

#[test]
fn directories_of_format_1_live_on() {
    Fixture::copy("format-1").lives_on();
}

#[test]
fn directories_of_format_2_live_on() {
    Fixture::copy("format-2").lives_on();
}

#[test]
fn directories_of_format_3_live_on() {
    Fixture::copy("format-3").lives_on();
}

#[test]
fn directories_of_format_4_live_on() {
    Fixture::copy("format-4").lives_on();
}

/// A rebuild read the log in one pass and took blocks in front of their manifest for uncovered, where compaction had put
/// them, and a tombstone behind a new document of the same name took that name away. Four blocks and a document
/// vanished from this directory when its catalog was deleted; their bytes are still in its segments.
#[test]
fn what_a_rebuild_had_hidden_is_found_again() {
    Fixture::copy("format-3-hidden").lives_on();
    let mut without_catalog = Fixture::copy("format-3-hidden");
    without_catalog.delete_catalog();
    without_catalog.lives_on();
}
