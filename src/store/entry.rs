//! What do small records say? Collections, manifests, deletions and ends of groups, as they are written and read back.
//!
//! Numbers have a fixed width, and fields lie one behind the other. A format that adds a field puts it behind all others: a
//! record that ends where the field would begin was written before there was one ([`Fields::next_or`]). So no older form of
//! a record has to be kept beside the newest.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::document::{KeptState, Manifest};
use super::place;
use super::segment::SegmentId;
use crate::limits;
use crate::shape::{CollectionSpec, ModelShape, Rope, Sha256Digest};
use crate::types::{CollectionId, DType, DocumentId, Engine, KeyRule};

/// The first number of a group. Below are the places that stand for the sequences of records of formats 1 to 3.
pub(super) const SEQUENCE_FIRST: u64 = 1 << 63;

/// More than all blocks of a document can take: sums over documents stay far below 2^64.
const STORED_BYTES_END: u64 = 1 << 56;

/// A collection as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "StoredCollection", into = "StoredCollection")]
pub struct CollectionEntry {
    pub spec: CollectionSpec,
    pub engine: Engine,
}

/// A collection as records and the catalog keep it. What a later format adds to a specification or its shape goes behind
/// `engine`, and into [`CollectionEntry::decode`].
#[derive(Serialize, Deserialize)]
pub(super) struct StoredCollection {
    pub(super) spec: StoredSpec,
    /// Format 1 had none.
    engine: Engine,
    /// Formats 1 to 4 had none.
    unrotated_layers: Vec<u32>,
}

/// A specification as format 1 kept it.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredSpec {
    name: String,
    layers: u32,
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_tokens: u32,
    rope: Rope,
    softmax_scale: f32,
    key_rule: KeyRule,
    payload_dtype: DType,
    key_dtype: DType,
    model_digest: Sha256Digest,
    tokenizer_digest: Sha256Digest,
    model_name: String,
}

impl From<StoredCollection> for CollectionEntry {
    fn from(StoredCollection { spec, engine, unrotated_layers }: StoredCollection) -> Self {
        let shape = ModelShape {
            layers: spec.layers,
            query_heads: spec.query_heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            block_tokens: spec.block_tokens,
            rope: spec.rope,
            unrotated_layers,
            softmax_scale: spec.softmax_scale,
        };
        let spec = CollectionSpec {
            name: spec.name,
            shape,
            key_rule: spec.key_rule,
            payload_dtype: spec.payload_dtype,
            key_dtype: spec.key_dtype,
            model_digest: spec.model_digest,
            tokenizer_digest: spec.tokenizer_digest,
            model_name: spec.model_name,
        };
        CollectionEntry { spec, engine }
    }
}

impl From<CollectionEntry> for StoredCollection {
    fn from(CollectionEntry { spec, engine }: CollectionEntry) -> Self {
        let ModelShape { layers, query_heads, kv_heads, head_dim, block_tokens, rope, unrotated_layers, softmax_scale } =
            spec.shape;
        let spec = StoredSpec {
            name: spec.name,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            block_tokens,
            rope,
            softmax_scale,
            key_rule: spec.key_rule,
            payload_dtype: spec.payload_dtype,
            key_dtype: spec.key_dtype,
            model_digest: spec.model_digest,
            tokenizer_digest: spec.tokenizer_digest,
            model_name: spec.model_name,
        };
        StoredCollection { spec, engine, unrotated_layers }
    }
}

impl CollectionEntry {
    pub(super) fn decode(meta: &[u8]) -> Option<Self> {
        let mut fields = Fields(meta);
        let (spec, engine) = (fields.next()?, fields.next_or(Engine::default())?);
        let unrotated_layers = fields.next_or(Vec::new())?;
        fields.end()?;
        let entry = CollectionEntry::from(StoredCollection { spec, engine, unrotated_layers });
        let spec = &entry.spec;
        (spec.shape.check().is_ok() && matches!(spec.key_dtype, DType::F16 | DType::Int8)).then_some(entry)
    }
}

/// A manifest as it is kept: what callers see, and what deletion needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "StoredDocument", into = "StoredDocument")]
pub(super) struct DocumentEntry {
    pub(super) manifest: Manifest,
    /// No older segment holds records of this document.
    pub(super) first_segment: SegmentId,
    /// B of its collection.
    pub(super) block_tokens: u32,
    /// The sequence of the record that is its tail; 0 if it has none, or in formats 1 to 3, which did not say.
    pub(super) tail_sequence: u64,
}

/// A manifest as records and the catalog keep it.
#[derive(Serialize, Deserialize)]
struct StoredDocument {
    extent: StoredExtent,
    /// Formats 1 to 3 had none.
    tail_sequence: u64,
    /// Formats 1 to 4 had none.
    state: Option<KeptState>,
}

/// A manifest as format 1 kept it.
#[derive(Serialize, Deserialize)]
struct StoredExtent {
    id: DocumentId,
    collection: CollectionId,
    name: String,
    sealed: bool,
    blocks: u32,
    tail_tokens: u32,
    text_bytes: u64,
    stored_bytes: u64,
    first_segment: SegmentId,
    block_tokens: u32,
}

impl From<StoredDocument> for DocumentEntry {
    fn from(StoredDocument { extent, tail_sequence, state }: StoredDocument) -> Self {
        let StoredExtent { id, collection, name, sealed, blocks, tail_tokens, text_bytes, stored_bytes, .. } = extent;
        let StoredExtent { first_segment, block_tokens, .. } = extent;
        let manifest = Manifest { id, collection, name, sealed, blocks, tail_tokens, text_bytes, stored_bytes, state };
        DocumentEntry { manifest, first_segment, block_tokens, tail_sequence }
    }
}

impl From<DocumentEntry> for StoredDocument {
    fn from(DocumentEntry { manifest, first_segment, block_tokens, tail_sequence }: DocumentEntry) -> Self {
        let Manifest { id, collection, name, sealed, blocks, tail_tokens, text_bytes, stored_bytes, state } = manifest;
        let extent = StoredExtent {
            id,
            collection,
            name,
            sealed,
            blocks,
            tail_tokens,
            text_bytes,
            stored_bytes,
            first_segment,
            block_tokens,
        };
        StoredDocument { extent, tail_sequence, state }
    }
}

impl DocumentEntry {
    pub(super) fn decode(meta: &[u8]) -> Option<Self> {
        let mut fields = Fields(meta);
        let (extent, tail_sequence, state) = (fields.next()?, fields.next_or(0)?, fields.next_or(None)?);
        fields.end()?;
        Some(DocumentEntry::from(StoredDocument { extent, tail_sequence, state })).filter(Self::is_sound)
    }

    /// Whether its numbers are such as a document can have.
    fn is_sound(&self) -> bool {
        let Manifest { id, collection, blocks, tail_tokens, stored_bytes, state, .. } = self.manifest;
        (1..u64::MAX).contains(&id.0)
            && collection.0 < u32::MAX
            && (2..=limits::BLOCK_TOKENS_MAX).contains(&self.block_tokens)
            && blocks <= limits::DOCUMENT_BLOCKS_MAX
            && tail_tokens < self.block_tokens
            && stored_bytes < STORED_BYTES_END
            && state.is_none_or(|state| state.is_sound() && state.tokens <= self.tokens())
    }

    /// Whether a record of `tokens` tokens is what lies at a place of the document as it is now: a full block is never
    /// replaced, the tail is the one that the manifest names, and so is the state.
    pub(super) fn accepts(&self, index: u32, tokens: u32, sequence: u64) -> bool {
        let Manifest { blocks, tail_tokens, state, .. } = self.manifest;
        if let Some(part) = place::part_at(index) {
            return state.is_some_and(|state| part < state.parts && sequence == state.sequence);
        }
        if index < blocks {
            return tokens == self.block_tokens;
        }
        let is_tail = index == blocks && tail_tokens > 0 && tokens == tail_tokens;
        is_tail && (self.tail_sequence == 0 || sequence == self.tail_sequence)
    }

    pub(super) fn tokens(&self) -> u64 {
        self.manifest.blocks as u64 * self.block_tokens as u64 + self.manifest.tail_tokens as u64
    }
}

/// A deleted document. Its records lie, if anywhere, in segments `first_segment..=last_segment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tombstone {
    pub(super) document: DocumentId,
    pub(super) first_segment: SegmentId,
    pub(super) last_segment: SegmentId,
}

/// A record that a group names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Named {
    Collection(CollectionId, u64),
    Document(DocumentId, u64),
    Tombstone(DocumentId, u64),
}

/// The end of a group: its number, and which of its records are no blocks or parts of a state. What there is of those their
/// manifest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GroupEntry {
    pub(super) number: u64,
    pub(super) named: Vec<Named>,
}

impl Tombstone {
    pub(super) fn decode(meta: &[u8]) -> Option<Self> {
        unpack(meta).filter(|found: &Self| found.document.0 < u64::MAX && found.first_segment <= found.last_segment)
    }
}

impl GroupEntry {
    pub(super) fn decode(meta: &[u8]) -> Option<Self> {
        unpack(meta).filter(|found: &Self| (SEQUENCE_FIRST..u64::MAX).contains(&found.number))
    }
}

/// Names and rope frequencies are the longest things in small records and stay far below this.
const SMALL_RECORD_BYTES_MAX: usize = 1 << 16;

fn small_record() -> impl bincode::config::Config {
    // Fixed width, so that a manifest's size does not depend on the numbers in it (it counts its own bytes).
    bincode::config::standard().with_fixed_int_encoding().with_limit::<SMALL_RECORD_BYTES_MAX>()
}

/// Encodes a small record. Fields may only be added together with a new format.
pub(super) fn pack<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, small_record()).expect("plain structs within the limit always encode")
}

pub(super) fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let mut fields = Fields(bytes);
    let value = fields.next()?;
    fields.end().map(|()| value)
}

/// The fields of a small record that are not read yet.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<T: DeserializeOwned>(&mut self) -> Option<T> {
        let (value, used) = bincode::serde::decode_from_slice(self.0, small_record()).ok()?;
        self.0 = self.0.get(used..)?;
        Some(value)
    }

    /// `absent` if the record was written before it had this field.
    fn next_or<T: DeserializeOwned>(&mut self, absent: T) -> Option<T> {
        if self.0.is_empty() { Some(absent) } else { self.next() }
    }

    fn end(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::spec;

    #[test]
    fn collections_of_older_formats_have_what_there_was() {
        let entry = CollectionEntry { spec: spec("old"), engine: Engine::Flat };
        let stored = StoredCollection::from(entry.clone());
        assert_eq!(CollectionEntry::decode(&pack(&stored.spec)), Some(entry.clone()));
        assert_eq!(CollectionEntry::decode(&pack(&(stored.spec, stored.engine))), Some(entry));
    }

    #[test]
    fn a_collection_reads_back_and_a_cut_one_does_not() {
        let plain = CollectionEntry { spec: spec("now"), engine: Engine::Sq8 };
        let mut still = plain.clone();
        still.spec.shape.unrotated_layers = vec![0];
        for entry in [plain, still.clone()] {
            let bytes = pack(&entry);
            assert_eq!(CollectionEntry::decode(&bytes), Some(entry));
            assert_eq!(CollectionEntry::decode(&bytes[1..]), None);
            assert_eq!(CollectionEntry::decode(&bytes[..bytes.len() - 1]), None);
        }
        still.spec.shape.unrotated_layers = vec![9];
        assert_eq!(CollectionEntry::decode(&pack(&still)), None, "no collection has such a shape");
    }

    #[test]
    fn manifests_of_older_formats_lack_what_they_did_not_have() {
        let state = Some(KeptState { tokens: 9, parts: 2, bytes: 300, sequence: 1 << 63 });
        let manifest = Manifest {
            id: DocumentId(3),
            collection: CollectionId(1),
            name: "document".into(),
            sealed: true,
            blocks: 2,
            tail_tokens: 3,
            text_bytes: 9,
            stored_bytes: 512,
            state,
        };
        let entry = DocumentEntry { manifest, first_segment: SegmentId(7), block_tokens: 4, tail_sequence: 1 << 63 };
        let bytes = pack(&entry);
        assert_eq!(DocumentEntry::decode(&bytes), Some(entry.clone()));
        let state_bytes = pack(&state).len();
        let mut older = entry.clone();
        older.manifest.state = None;
        let of_format_4 = &bytes[..bytes.len() - state_bytes];
        assert_eq!(DocumentEntry::decode(of_format_4), Some(older.clone()));
        assert_eq!(pack(&older).len(), of_format_4.len() + 1, "that there is none is said too");
        older.tail_sequence = 0;
        assert_eq!(DocumentEntry::decode(&of_format_4[..of_format_4.len() - 8]), Some(older));
        for cut in [1, state_bytes - 1, state_bytes + 1, state_bytes + 9] {
            assert_eq!(DocumentEntry::decode(&bytes[..bytes.len() - cut]), None, "{cut} bytes are missing");
        }
        let mut ahead = entry;
        ahead.manifest.state = state.map(|state| KeptState { tokens: 12, ..state });
        assert_eq!(DocumentEntry::decode(&pack(&ahead)), None, "a state of tokens that the document has not");
    }
}
