//! Every bound of the product, each with its reason. Sizes that arrive from outside are checked against these
//! before memory is allocated for them.

/// Longest name of a collection or document: fits a catalog key and a table column.
pub const NAME_BYTES_MAX: usize = 255;

/// Layers of a model: the deepest open models have 126; a piece index stays well inside u32.
pub const LAYERS_MAX: u32 = 1024;

/// Heads of one layer, query or KV.
pub const HEADS_MAX: u32 = 1024;

/// Head dim: 64 to 256 in the field. Bounds the stack buffers of the kernels.
pub const HEAD_DIM_MAX: u32 = 1024;

/// Tokens of one block: the paper uses 50, the field 16 to 128.
pub const BLOCK_TOKENS_MAX: u32 = 1024;

/// Blocks of one document: 2^24 blocks of 64 are a billion tokens.
pub const DOCUMENT_BLOCKS_MAX: u32 = 1 << 24;

/// Stored bytes of one block over all layers and heads: a 126-layer model with 64-token blocks stays under it.
pub const BLOCK_BYTES_MAX: u64 = 1 << 30;

/// Source text of one block: tokens rarely span more than a few dozen bytes, but nothing forbids a long one.
pub const BLOCK_TEXT_BYTES_MAX: usize = 1 << 20;

/// Blocks of one append request: one durable flush is spread over at most this many.
pub const APPEND_BLOCKS_MAX: usize = 1024;

/// One part of what a document keeps for its model: K or V of one layer over a window of 1,024 tokens with 16 KV heads of 256 in
/// f32. One message on the wire, and what compaction copies at least in one go.
pub const STATE_PART_BYTES_MAX: usize = 16 << 20;

/// Parts of such a state: as many as a model may have layers.
pub const STATE_PARTS_MAX: usize = 1024;

/// All parts of such a state together, which a service holds in memory until they are durable: models of 27 billion parameters
/// have 872 MB in f32.
pub const STATE_BYTES_MAX: u64 = 1 << 30;

/// Largest magnitude of a value of K, V or a query. A model's are below a hundred thousand. Products of two such values, summed
/// over a head and squared where bounds of scores are taken, stay inside single precision: what is finite gives finite answers.
pub const NUMBER_MAX: f32 = 1e12;

/// Query tokens of one lookup or attend: a prefill chunk.
pub const QUERY_TOKENS_MAX: u32 = 4096;

/// Documents attached to one lookup.
pub const SCOPE_DOCUMENTS_MAX: usize = 1024;

/// Blocks retrieved per row.
pub const TOP_K_MAX: u32 = 1024;

/// Requests of one message that attends to many: a decode step of 126 layers and 8 sequences.
pub const ATTEND_REQUESTS_MAX: usize = 1024;

/// Scores of one lookup (query rows x eligible blocks): a prefill chunk of 512 tokens and 64 heads over two million tokens in
/// blocks of 64. Bounds its work; its memory has a budget that can be set.
pub const LOOKUP_SCORES_MAX: u64 = 1 << 30;

/// Weight (`LookupRequest::weight`) up to which work is light: a decode step of a large model over a million tokens. What is
/// heavier takes tenths of a second, and has threads of its own.
pub const LIGHT_WEIGHT_MAX: u64 = 1 << 26;

/// Keys of one layer and KV head of a document above which FAISS indexes them: fewer are scanned in some 20 us.
pub const INDEXED_KEYS_MIN: usize = 8192;

/// Description of a FAISS index: the longest sensible ones have a few dozen characters.
pub const FAISS_FACTORY_BYTES_MAX: usize = 128;

/// Effort of a search in a FAISS index: more clusters or candidates than this are a scan.
pub const FAISS_EFFORT_MAX: u32 = 65_536;

/// Queries that engines are measured with: more than the lookups that are timed unless set, and few enough for one message.
pub const TUNE_QUERIES_MAX: usize = 512;

/// Indexes of FAISS that are measured in one call, each with up to 14 efforts.
pub const TUNE_INDEXES_MAX: usize = 16;

/// Lookups that are timed with each engine: minutes over a million tokens.
pub const TUNE_LOOKUPS_MAX: u32 = 1 << 14;

/// Blocks of one fetch request.
pub const FETCH_BLOCKS_MAX: usize = 4096;

/// One message on the wire: an append of one block of the largest size, or a fetch reply of one, with its text, token
/// ids and headers.
pub const MESSAGE_BYTES_MAX: usize = BLOCK_BYTES_MAX as usize + BLOCK_TEXT_BYTES_MAX + (1 << 20);

/// One lookup or attend on the wire, or many in one message: queries of 512 tokens of 128 heads of 256 values.
pub const LOOKUP_MESSAGE_BYTES_MAX: usize = (64 << 20) + (1 << 20);

/// One request for blocks on the wire: 4,096 block positions of at most 6 bytes.
pub const FETCH_MESSAGE_BYTES_MAX: usize = 64 << 10;

/// One part of a state on the wire, with the numbers beside it.
pub const STATE_MESSAGE_BYTES_MAX: usize = STATE_PART_BYTES_MAX + 1024;

/// Any other request: a name and a shape.
pub const ADMIN_MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Bytes of a message that asks for engines to be measured: the most queries of 64 heads of 128 take 16 MiB.
pub const TUNE_MESSAGE_BYTES_MAX: usize = (16 << 20) + (1 << 20);

/// A segment file is closed once it holds this much (facts: 64 MB was measured to cost nothing).
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// Room kept on the disk, so that documents can be deleted when it is full: a tombstone and a group of a compaction, many
/// times over.
pub const RESERVE_BYTES_MAX: u64 = 64 << 20;

/// Live records that compaction copies in one go: what it holds in memory, and what a writer waits for at most.
pub const COMPACTION_BYTES: u64 = 8 << 20;

/// Compaction runs until stored bytes are at most this many hundredths of the live ones.
pub const SPACE_PERCENT_MAX: u64 = 110;

/// Settings, and tensors, that the header of a GGUF file may claim: models of 126 layers have some 1,200 tensors.
pub const GGUF_ENTRIES_MAX: u64 = 65_536;

/// Values in all lists of a GGUF header: a vocabulary of 262,144 tokens with scores, types and merges has 1.5 million; each
/// takes 32 bytes in memory.
pub const GGUF_VALUES_MAX: u64 = 1 << 24;

/// Ids of a tokenizer's vocabulary: the largest open ones have some 262,144. Their texts are kept by id.
pub const TOKEN_IDS_MAX: u32 = 1 << 20;

/// The header of a safetensors file: the format allows 100 MB.
pub const SAFETENSORS_HEADER_BYTES_MAX: u64 = 100_000_000;

/// Tokens of all tails that cannot be looked up and are read at once besides the last document's: K and V of each are held in memory,
/// 46 KB a token for SmolLM2, and every query attends to all.
pub const TAIL_TOKENS_MAX: usize = 16_384;

/// Differences between the catalog and a rebuilt one that are named one by one: more do not help.
pub const DIFFERENCES_MAX: usize = 1000;
