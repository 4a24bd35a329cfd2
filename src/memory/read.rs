//! How do blocks come out? Fetched with their K and V, or described without.

use half::{bf16, f16};
use rayon::prelude::*;

use super::error::invalid;
use super::local::LocalMemory;
use crate::api::{BlockInfo, BlockText, Entity, FetchRequest, MemoryError, Result, StoredBlock, Tensor};
use crate::lock::IgnorePoison;
use crate::shape::CollectionSpec;
use crate::store::BlockMeta;
use crate::store::piece::PieceLayout;
use crate::types::{BlockId, BlockRange, DType};

impl LocalMemory {
    pub(super) fn fetch_blocks(&self, request: &FetchRequest) -> Result<Vec<StoredBlock>> {
        request.check()?;
        if request.dtype == DType::Int8 {
            return Err(invalid("dtype", "f32, f16 or bf16", request.dtype));
        }
        let manifest = self.store.manifest(request.document)?;
        let collection = self.collection_of(manifest.collection)?;
        let end = manifest.blocks + (manifest.tail_tokens > 0) as u32;
        if let Some(&index) = request.blocks.iter().find(|&&index| index >= end) {
            let id = BlockId { document: request.document, index }.to_string();
            return Err(MemoryError::NotFound { entity: Entity::Block, id });
        }
        let read = |index: u32| {
            let block = BlockId { document: request.document, index };
            self.fetch_block(&collection.spec, block, request.dtype)
        };
        // Full blocks never change. A tail may be replaced, and its parts are read one after the other.
        let tail = match request.blocks.contains(&manifest.blocks) {
            true => {
                let writer = self.writers.of(request.document);
                let _unchanging = writer.lock().ignore_poison();
                Some(read(manifest.blocks)?)
            }
            false => None,
        };
        let read = |&index: &u32| match &tail {
            Some(tail) if index == manifest.blocks => Ok(tail.clone()),
            _ => read(index),
        };
        let blocks = request.blocks.par_iter().map(read).collect::<Result<Vec<_>>>()?;
        self.counters.fetched_blocks.add(blocks.len());
        Ok(blocks)
    }

    fn fetch_block(&self, spec: &CollectionSpec, id: BlockId, dtype: DType) -> Result<StoredBlock> {
        let (meta, _) = self.store.read_meta(id)?;
        let mut bytes = Vec::new();
        self.store.read_pieces(id, &mut bytes)?;
        let shape = &spec.shape;
        let (tokens, dim) = (meta.token_ids.len(), shape.head_dim as usize);
        let layout = PieceLayout { dtype: spec.payload_dtype, tokens, head_dim: dim };
        if bytes.len() != layout.bytes() * shape.pieces() {
            let detail = format!("{} payload bytes for {tokens} tokens", bytes.len());
            return Err(MemoryError::DataLoss { block: Some(id), detail });
        }
        let tensor_bytes = shape.pieces() * tokens * dim * dtype.size_bytes();
        let (mut k, mut v) = (Vec::with_capacity(tensor_bytes), Vec::with_capacity(tensor_bytes));
        let mut values = vec![0.0; tokens * dim];
        for piece in bytes.chunks_exact(layout.bytes()) {
            layout.decode_k(piece, &mut values);
            push_values(dtype, &values, &mut k);
            layout.decode_v(piece, &mut values);
            push_values(dtype, &values, &mut v);
        }
        let tensor = |data: Vec<u8>| Tensor {
            dtype,
            shape: vec![shape.layers, shape.kv_heads, tokens as u32, shape.head_dim],
            data: data.into(),
        };
        let (token_ids, text) = parts(meta);
        Ok(StoredBlock { id, token_ids, text, k: tensor(k), v: tensor(v) })
    }

    pub(super) fn describe_blocks(&self, range: &BlockRange) -> Result<Vec<BlockInfo>> {
        let manifest = self.store.manifest(range.document)?;
        let end = manifest.blocks + (manifest.tail_tokens > 0) as u32;
        (range.blocks.start..range.blocks.end.min(end))
            .into_par_iter()
            .map(|index| {
                let id = BlockId { document: range.document, index };
                let (meta, stored_bytes) = self.store.read_meta(id)?;
                let (token_ids, text) = parts(meta);
                Ok(BlockInfo { id, token_ids, text, stored_bytes })
            })
            .collect()
    }
}

fn parts(meta: BlockMeta) -> (Vec<u32>, BlockText) {
    (meta.token_ids, BlockText { start: meta.text_start, bytes: meta.text, offsets: meta.text_offsets })
}

/// Appends values in a float dtype, little-endian. Exact when they were stored in that dtype.
fn push_values(dtype: DType, values: &[f32], bytes: &mut Vec<u8>) {
    match dtype {
        DType::F16 => bytes.extend(values.iter().flat_map(|&number| f16::from_f32(number).to_le_bytes())),
        DType::BF16 => bytes.extend(values.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes())),
        _ => bytes.extend(values.iter().flat_map(|number| number.to_le_bytes())),
    }
}
