//! What a model really asks: queries of its layers, with the keys that they are asked of, kept in a file for benchmarks.
//!
//! Attention queries are far from the distribution of the keys, and both are far from random: speed and recall of an index
//! on random vectors say little about either.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use half::f16;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde::{Deserialize, Serialize};

use landmarkdb::lock::IgnorePoison;
use landmarkdb::{
    BlockRange, CollectionId, CollectionSpec, DType, DocumentId, Engine, KeyRule, ModelShape, Retrieval,
    SequenceAttention, Until, Window, *,
};
use landmarkdb_llm::{LoadedModel, Logits, ModelAttention, RememberError};

/// Blocks that are read at once.
const FETCHED_BLOCKS: usize = 64;

/// Keys and queries of some layers of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Capture {
    /// The model, its layers and the sizes of the tensors.
    pub about: About,
    /// By layer, `(N, Hkv, B, D)`: K of every block as it is stored, rotated by the offset inside the block.
    pub k: Vec<Vec<f16>>,
    /// By layer, `(Q, Hq, D)`, before RoPE: of consecutive tokens.
    pub queries: Vec<Vec<f32>>,
    /// `(Q)`: as in [`LookupRequest::distances`].
    pub distances: Vec<u32>,
}

/// What the values belong to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// What the model calls itself.
    pub model: String,
    /// Of the captured layers.
    pub shape: ModelShape,
    /// What stands for a block in the collection that was captured.
    pub key_rule: KeyRule,
    /// Which of the model's layers they are.
    pub layers: Vec<u32>,
    /// N
    pub blocks: u32,
}

/// A file that is no capture, or cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The file cannot be read or written.
    #[error("{path} cannot be read or written: {detail}")]
    File {
        /// Path of the file.
        path: String,
        /// The reason that the system or the safetensors library gave.
        detail: String,
    },
    /// The file can be read, and its metadata or tensors are not those of a capture.
    #[error("{path} is no capture: {detail}; make a new one")]
    Content {
        /// Path of the file.
        path: String,
        /// What does not match.
        detail: String,
    },
    /// The forward pass failed, or the memory that its layers ask.
    #[error(transparent)]
    Remember(#[from] RememberError),
    /// The blocks' keys could not be fetched.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

type Captured<T> = std::result::Result<T, CaptureError>;

/// What is captured, and of what.
pub struct Capturing<'a> {
    /// The model that reads `next`.
    pub model: &'a LoadedModel,
    /// The memory that holds `document`; it answers the layers' lookups.
    pub memory: Arc<dyn BlockMemory>,
    /// The collection of `document`, bound to `model`.
    pub collection: &'a CollectionInfo,
    /// Where the blocks lie.
    pub document: &'a DocumentInfo,
    /// What a query sees without retrieval.
    pub window: Window,
    /// Which blocks are retrieved, and by which layers.
    pub retrieval: Retrieval,
    /// Tokens that the model reads after the document, one by one.
    pub next: &'a [u32],
    /// Layers to keep; they retrieve.
    pub layers: &'a [u32],
}

/// Reads on after a document, token by token, and keeps what the layers ask.
pub fn capture(capturing: &Capturing<'_>, progress: &mut dyn FnMut(u64)) -> Captured<Capture> {
    let Capturing { model, collection, document, .. } = capturing;
    let recorder = Arc::new(Recorder { inner: capturing.memory.clone(), asked: Mutex::default() });
    let recording: Arc<dyn BlockMemory> = recorder.clone();
    let mut session = ModelAttention::read(
        model.config(),
        &recording,
        collection,
        std::slice::from_ref(document),
        capturing.window,
        capturing.retrieval.clone(),
    )?;
    for (done, &id) in model.config().reading(session.position(), capturing.next).ids.iter().enumerate() {
        model.llama.forward(&[id], &mut session, Logits::None).map_err(RememberError::from)?;
        progress(done as u64 + 1);
    }
    let asked = std::mem::take(&mut *recorder.asked.lock().ignore_poison());
    let of_layer = |&layer: &u32| asked.iter().filter(move |lookup| lookup.layer == layer);
    let queries = capturing.layers.iter().map(|layer| of_layer(layer).flat_map(|l| l.queries.clone()).collect());
    let distances = capturing.layers.first().map(|layer| of_layer(layer).flat_map(|l| l.distances.clone()).collect());

    let mut k = vec![Vec::new(); capturing.layers.len()];
    let all: Vec<u32> = (0..document.blocks).collect();
    for blocks in all.chunks(FETCHED_BLOCKS) {
        let request = FetchRequest { document: document.id, blocks: blocks.to_vec(), dtype: DType::F16 };
        for block in capturing.memory.fetch(&request)? {
            let layer_bytes = block.k.data.len() / collection.spec.shape.layers as usize;
            for (k, &layer) in k.iter_mut().zip(capturing.layers) {
                let bytes = &block.k.data[layer as usize * layer_bytes..][..layer_bytes];
                k.extend(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])));
            }
        }
    }
    let spec = &collection.spec;
    let unrotated = |&index: &u32| spec.shape.unrotated_layers.contains(&capturing.layers[index as usize]);
    let layers = capturing.layers.len() as u32;
    let unrotated_layers = (0..layers).filter(unrotated).collect();
    Ok(Capture {
        about: About {
            model: spec.model_name.clone(),
            shape: ModelShape { layers, unrotated_layers, ..spec.shape.clone() },
            key_rule: spec.key_rule,
            layers: capturing.layers.to_vec(),
            blocks: document.blocks,
        },
        k,
        queries: queries.collect(),
        distances: distances.unwrap_or_default(),
    })
}

impl Capture {
    /// Writes a safetensors file: `k.0`, `queries.0` and so on, `distances`, and [`About`] in its metadata.
    pub fn save(&self, path: &Path) -> Captured<()> {
        let shape = &self.about.shape;
        let [blocks, heads, kv_heads, dim] =
            [self.about.blocks, shape.query_heads, shape.kv_heads, shape.head_dim].map(|n| n as usize);
        let block = [blocks, kv_heads, shape.block_tokens as usize, dim];
        let mut tensors: Vec<(String, Dtype, Vec<usize>, &[u8])> = Vec::new();
        for (layer, (k, queries)) in self.k.iter().zip(&self.queries).enumerate() {
            tensors.push((format!("k.{layer}"), Dtype::F16, block.to_vec(), bytemuck::cast_slice(k)));
            let shape = vec![self.distances.len(), heads, dim];
            tensors.push((format!("queries.{layer}"), Dtype::F32, shape, bytemuck::cast_slice(queries)));
        }
        let distances = bytemuck::cast_slice(&self.distances);
        tensors.push(("distances".into(), Dtype::U32, vec![self.distances.len()], distances));
        let failed = |detail: String| CaptureError::File { path: path.display().to_string(), detail };
        let views = tensors.into_iter().map(|(name, dtype, shape, bytes)| {
            TensorView::new(dtype, shape, bytes).map(|view| (name, view)).map_err(|error| failed(error.to_string()))
        });
        let views = views.collect::<Captured<Vec<_>>>()?;
        let about = serde_json::to_string(&self.about).map_err(|error| failed(error.to_string()))?;
        let metadata = HashMap::from([("landmarkdb".to_string(), about)]);
        serialize_to_file(views, Some(metadata), path).map_err(|error| failed(error.to_string()))
    }

    /// Reads what [`Capture::save`] wrote.
    ///
    /// # Errors
    /// A file that cannot be read, or whose tensors do not have the shapes that its metadata say.
    pub fn load(path: &Path) -> Captured<Self> {
        let shown = || path.display().to_string();
        let bytes =
            std::fs::read(path).map_err(|error| CaptureError::File { path: shown(), detail: error.to_string() })?;
        let content = |detail: String| CaptureError::Content { path: shown(), detail };
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| content(error.to_string()))?;
        let about = metadata.metadata().as_ref().and_then(|metadata| metadata.get("landmarkdb"));
        let about = about.ok_or_else(|| content("it has no metadata of ours".into()))?;
        let about: About = serde_json::from_str(about).map_err(|error| content(error.to_string()))?;
        about.shape.check().map_err(|error| content(error.to_string()))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| content(error.to_string()))?;
        let tensor = |name: &str, dtype: Dtype, shape: &[usize]| -> Captured<Vec<u8>> {
            let view = tensors.tensor(name).map_err(|error| content(error.to_string()))?;
            if view.dtype() != dtype || view.shape() != shape {
                let found = format!("{:?} {:?}", view.dtype(), view.shape());
                return Err(content(format!("{name}: expected {dtype:?} {shape:?}, found {found}")));
            }
            Ok(view.data().to_vec())
        };
        let count = tensors.tensor("distances").map_or(0, |view| view.shape().iter().product());
        let words = |bytes: Vec<u8>| bytes.as_chunks::<4>().0.to_vec();
        let distances = words(tensor("distances", Dtype::U32, &[count])?).into_iter().map(u32::from_le_bytes).collect();
        let shape = &about.shape;
        let [blocks, heads, kv_heads, dim] =
            [about.blocks, shape.query_heads, shape.kv_heads, shape.head_dim].map(|n| n as usize);
        let (mut k, mut queries) = (Vec::new(), Vec::new());
        for layer in 0..shape.layers {
            let block = [blocks, kv_heads, shape.block_tokens as usize, dim];
            let bytes = tensor(&format!("k.{layer}"), Dtype::F16, &block)?;
            k.push(bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b)).collect());
            let bytes = tensor(&format!("queries.{layer}"), Dtype::F32, &[count, heads, dim])?;
            queries.push(words(bytes).into_iter().map(f32::from_le_bytes).collect());
        }
        Ok(Capture { about, k, queries, distances })
    }
}

/// A memory that keeps what it was asked, and otherwise is the one behind it.
struct Recorder {
    inner: Arc<dyn BlockMemory>,
    asked: Mutex<Vec<LookupRequest>>,
}

impl Recorder {
    fn record(&self, request: &LookupRequest) {
        self.asked.lock().ignore_poison().push(request.clone());
    }
}

impl BlockMemory for Recorder {
    fn open_collection(&self, spec: &CollectionSpec) -> Result<CollectionInfo> {
        self.inner.open_collection(spec)
    }

    fn collections(&self) -> Result<Vec<CollectionInfo>> {
        self.inner.collections()
    }

    fn set_engine(&self, collection: CollectionId, engine: Engine) -> Result<CollectionInfo> {
        self.inner.set_engine(collection, engine)
    }

    fn tune(&self, request: &TuneRequest, progress: &mut dyn FnMut(TuneStep), until: &Until) -> Result<TuneReport> {
        self.inner.tune(request, progress, until)
    }

    fn open_document(&self, collection: CollectionId, name: &str) -> Result<DocumentInfo> {
        self.inner.open_document(collection, name)
    }

    fn documents(&self, collection: CollectionId) -> Result<Vec<DocumentInfo>> {
        self.inner.documents(collection)
    }

    fn document(&self, document: DocumentId) -> Result<DocumentInfo> {
        self.inner.document(document)
    }

    fn append(&self, request: AppendRequest) -> Result<DocumentInfo> {
        self.inner.append(request)
    }

    fn put_state(&self, document: DocumentId, state: SequenceState) -> Result<DocumentInfo> {
        self.inner.put_state(document, state)
    }

    fn state_part(&self, document: DocumentId, part: u32) -> Result<Option<StatePart>> {
        self.inner.state_part(document, part)
    }

    fn seal(&self, document: DocumentId) -> Result<DocumentInfo> {
        self.inner.seal(document)
    }

    fn lookup(&self, request: &LookupRequest) -> Result<Hits> {
        self.record(request);
        self.inner.lookup(request)
    }

    fn attend(&self, request: &AttendRequest) -> Result<Attended> {
        self.record(&request.lookup);
        self.inner.attend(request)
    }

    fn fetch(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>> {
        self.inner.fetch(request)
    }

    fn blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>> {
        self.inner.blocks(range)
    }

    fn replace(&self, document: DocumentId, by: DocumentId) -> Result<DocumentInfo> {
        self.inner.replace(document, by)
    }

    fn delete(&self, document: DocumentId) -> Result<Deleted> {
        self.inner.delete(document)
    }

    fn stats(&self) -> Result<Stats> {
        self.inner.stats()
    }

    fn verify(&self, document: Option<DocumentId>, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        self.inner.verify(document, progress)
    }

    fn verify_rebuild(&self, progress: &mut dyn FnMut(u64, u64), until: &Until) -> Result<VerifyReport> {
        self.inner.verify_rebuild(progress, until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::Rope;

    fn small() -> Capture {
        let shape = ModelShape {
            layers: 2,
            query_heads: 2,
            kv_heads: 1,
            head_dim: 4,
            block_tokens: 2,
            rope: Rope::from_base(100.0, 4),
            unrotated_layers: Vec::new(),
            softmax_scale: 0.5,
        };
        let values = |count: usize, first: f32| (0..count).map(|i| first + i as f32).collect::<Vec<f32>>();
        Capture {
            about: About { model: "m".into(), shape, key_rule: KeyRule::Tokens, layers: vec![3, 7], blocks: 3 },
            k: vec![values(24, 0.0).into_iter().map(f16::from_f32).collect(), vec![f16::ONE; 24]],
            queries: vec![values(40, 9.0), values(40, -3.0)],
            distances: vec![5, 6, 7, 8, 9],
        }
    }

    #[test]
    fn what_was_saved_is_loaded_and_other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        small().save(&path).unwrap();
        assert_eq!(Capture::load(&path).unwrap(), small());

        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(matches!(Capture::load(&path), Err(CaptureError::Content { .. })));
        assert!(matches!(Capture::load(&folder.path().join("none")), Err(CaptureError::File { .. })));

        let mut wrong = small();
        wrong.about.blocks = 4;
        assert!(wrong.save(&path).is_err(), "numbers that do not fit their shape");
    }
}
