//! Citations of a made-up answer, from a memory that notes its calls.

use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::{Finish, Generated};
use landmarkdb::{
    AtHandReads, BlockReads, CollectionId, CollectionSpec, DType, DocumentId, Engine, KeyRule, LocalMemory, ModelShape,
    Rope, Sha256Digest, Until, *,
};

const BLOCK_TOKENS: usize = 4;
const HEAD_DIM: usize = 2;

/// Notes which ranges of blocks it is asked for.
struct Counting {
    inner: LocalMemory,
    asked: Mutex<Vec<BlockRange>>,
}

/// Methods that the inner memory answers.
macro_rules! pass_on {
    ($($name:ident($($argument:ident: $type:ty),*) -> $output:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> Result<$output> {
            self.inner.$name($($argument),*)
        })*
    };
}

impl BlockMemory for Counting {
    fn blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>> {
        self.asked.lock().unwrap().push(range.clone());
        self.inner.blocks(range)
    }

    pass_on! {
        open_collection(spec: &CollectionSpec) -> CollectionInfo;
        collections() -> Vec<CollectionInfo>;
        set_engine(collection: CollectionId, engine: Engine) -> CollectionInfo;
        open_document(collection: CollectionId, name: &str) -> DocumentInfo;
        documents(collection: CollectionId) -> Vec<DocumentInfo>;
        document(document: DocumentId) -> DocumentInfo;
        append(request: AppendRequest) -> DocumentInfo;
        seal(document: DocumentId) -> DocumentInfo;
        lookup(request: &LookupRequest) -> Hits;
        attend(request: &AttendRequest) -> Attended;
        fetch(request: &FetchRequest) -> Vec<StoredBlock>;
        replace(document: DocumentId, by: DocumentId) -> DocumentInfo;
        delete(document: DocumentId) -> Deleted;
        stats() -> Stats;
        verify(document: Option<DocumentId>, progress: &mut dyn FnMut(u64, u64)) -> VerifyReport;
        verify_rebuild(progress: &mut dyn FnMut(u64, u64), until: &Until) -> VerifyReport;
    }
}

impl Counting {
    /// A document whose tokens are the bytes of its text.
    fn write(&self, collection: &CollectionInfo, name: &str, text: &str) -> DocumentInfo {
        let document = self.open_document(collection.id, name).unwrap();
        let block = |(index, bytes): (usize, &[u8])| {
            let zeros = || {
                let shape = [1, 1, bytes.len() as u32, HEAD_DIM as u32];
                Tensor { dtype: DType::F32, shape: shape.into(), data: vec![0; bytes.len() * HEAD_DIM * 4].into() }
            };
            NewBlock {
                index: index as u32,
                token_ids: bytes.iter().map(|&byte| byte.into()).collect(),
                text: BlockText {
                    start: (index * BLOCK_TOKENS) as u64,
                    bytes: bytes.into(),
                    offsets: (0..bytes.len() as u32).collect(),
                },
                k: zeros(),
                v: zeros(),
            }
        };
        let blocks = text.as_bytes().chunks(BLOCK_TOKENS).enumerate().map(block).collect();
        self.append(AppendRequest { document: document.id, blocks, expected_tokens: None }).unwrap()
    }
}

fn spec() -> CollectionSpec {
    CollectionSpec {
        name: "books".into(),
        shape: ModelShape {
            layers: 1,
            query_heads: 1,
            kv_heads: 1,
            head_dim: HEAD_DIM as u32,
            block_tokens: BLOCK_TOKENS as u32,
            rope: Rope::from_base(100.0, HEAD_DIM),
            unrotated_layers: Vec::new(),
            softmax_scale: 1.0,
        },
        key_rule: KeyRule::Tokens,
        payload_dtype: DType::F32,
        key_dtype: DType::F16,
        model_digest: Sha256Digest([0; 32]),
        tokenizer_digest: Sha256Digest([0; 32]),
        model_name: "none".into(),
    }
}

fn answer(retrieved: Vec<BlockReads>, at_hand: Vec<AtHandReads>) -> Answer {
    Answer {
        generated: Generated {
            ids: Vec::new(),
            log_probs: Vec::new(),
            text_ids: 0..0,
            text: String::new(),
            finish: Finish::Stop,
        },
        reads: Reads { retrieved, at_hand, own_mass: 4.0 },
        prompt_tokens: 1,
        first_token: Duration::ZERO,
        total: Duration::ZERO,
    }
}

#[test]
fn blocks_that_were_read_are_cited_in_order_with_one_call_for_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Counting { inner: LocalMemory::open(folder.path()).unwrap(), asked: Mutex::default() };
    let collection = memory.open_collection(&spec()).unwrap();
    // Of 5 blocks and a tail each; in the second one a block boundary cuts a character.
    let emma = memory.write(&collection, "emma", "emm0emm1emm2emm3emm4e5");
    let anne = memory.write(&collection, "anne", "ann0ann1ann2anné4567p5");
    let (first, last) = (emma.id, anne.id);
    let head = |layer, choices| HeadReads { layer, kv_head: 0, choices };
    let read = |document, index, mass| BlockReads {
        block: BlockId { document, index },
        mass,
        heads: vec![head(0, 9), head(index, 1)],
    };
    let at_hand = |document, index, place| AtHandReads { block: BlockId { document, index }, place, mass: 1.0 };
    let answer = answer(
        vec![read(last, 1, 3.0), read(first, 4, 2.0), read(first, 2, 1.5), read(first, 3, 1.0), read(last, 3, 0.5)],
        vec![
            at_hand(first, 0, Place::Sink),
            at_hand(first, 5, Place::Tail),
            at_hand(last, 4, Place::Window),
            at_hand(last, 5, Place::Window),
        ],
    );

    let cited = citations(&answer, &memory, &[emma, anne]).unwrap();
    let rows: Vec<_> = cited
        .iter()
        .map(|cited| (&cited.document[..], cited.block.index, cited.from, cited.text_start_bytes, &cited.text[..]))
        .collect();
    let expected = [
        ("anne", 1, ReadFrom::Retrieved, 4, "ann1"),
        ("emma", 4, ReadFrom::Retrieved, 16, "emm4"),
        ("emma", 2, ReadFrom::Retrieved, 8, "emm2"),
        ("emma", 3, ReadFrom::Retrieved, 12, "emm3"),
        ("anne", 3, ReadFrom::Retrieved, 12, "ann\u{fffd}"),
        ("emma", 0, ReadFrom::Sink, 0, "emm0"),
        ("emma", 5, ReadFrom::Tail, 20, "e5"),
        ("anne", 4, ReadFrom::Window, 16, "\u{fffd}456"),
        ("anne", 5, ReadFrom::Window, 20, "7p5"),
    ];
    assert_eq!(rows, expected);

    let shares: Vec<f64> = cited.iter().map(|cited| cited.share).collect();
    assert_eq!(shares, [3.0, 2.0, 1.5, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0].map(|mass| mass / 16.0));
    let heads: Vec<usize> = cited.iter().map(|cited| cited.heads.len()).collect();
    assert_eq!(heads, [2, 2, 2, 2, 2, 0, 0, 0, 0]);
    assert_eq!(cited[1].heads, [head(0, 9), head(4, 1)]);

    let range = |document, blocks| BlockRange { document, blocks };
    let runs = [range(first, 0..1), range(first, 2..6), range(last, 1..2), range(last, 3..6)];
    assert_eq!(*memory.asked.lock().unwrap(), runs, "9 blocks by 4 calls");
}

#[test]
fn an_answer_that_read_nothing_cites_nothing_and_asks_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Counting { inner: LocalMemory::open(folder.path()).unwrap(), asked: Mutex::default() };
    assert_eq!(citations(&answer(Vec::new(), Vec::new()), &memory, &[]).unwrap(), []);
    assert_eq!(*memory.asked.lock().unwrap(), []);
}

#[test]
fn a_document_that_is_gone_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Counting { inner: LocalMemory::open(folder.path()).unwrap(), asked: Mutex::default() };
    let block = BlockId { document: DocumentId(7), index: 0 };
    let answer = answer(Vec::new(), vec![AtHandReads { block, place: Place::Window, mass: 1.0 }]);
    assert!(matches!(citations(&answer, &memory, &[]), Err(MemoryError::NotFound { .. })));
}
