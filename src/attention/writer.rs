//! The way of a sequence's blocks into the memory.

use std::sync::Arc;

use bytes::Bytes;

use crate::api::{AppendRequest, BlockMemory, BlockText, DocumentInfo, MemoryError, NewBlock, SequenceState, Tensor};
use crate::attention::window::LocalWindow;
use crate::shape::ModelShape;
use crate::types::DocumentId;

/// Ids and source text of one group of tokens, whose K and V the attention has.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a> {
    /// `(T)`
    pub ids: &'a [u32],
    /// The source text that the tokens cover; empty where there is none.
    pub text: &'a [u8],
    /// `(T)`: where each token begins in `text`, in bytes, not decreasing.
    pub offsets: &'a [u32],
}

/// Appends blocks to one document as they fill.
pub(crate) struct Writer {
    memory: Arc<dyn BlockMemory>,
    document: DocumentId,
    /// Full blocks that are durable.
    blocks: usize,
    /// Tokens that are durable, a tail's included: another number means another writer.
    durable_tokens: u64,
    /// Tokens after those: ids, and where each begins in `text`.
    ids: Vec<u32>,
    offsets: Vec<usize>,
    text: Vec<u8>,
    /// Where `text` begins in the document's text.
    text_start: u64,
}

impl Writer {
    /// Goes on where the document ends. `tail` is its stored tail, if it has one.
    pub(crate) fn resume(
        memory: Arc<dyn BlockMemory>,
        document: &DocumentInfo,
        tail: Option<(&[u32], &BlockText)>,
    ) -> Self {
        let (ids, offsets, text) = match tail {
            Some((ids, text)) => (ids.to_vec(), text.offsets.iter().map(|&o| o as usize).collect(), text.bytes.clone()),
            None => Default::default(),
        };
        let text_start = document.text_bytes - text.len() as u64;
        let (blocks, durable_tokens) = (document.blocks as usize, document.tokens);
        Writer { memory, document: document.id, blocks, durable_tokens, ids, offsets, text, text_start }
    }

    /// The document is as long as this, which may be longer than what the writer has seen of it.
    pub(crate) fn expect(&mut self, document: &DocumentInfo) {
        self.durable_tokens = document.tokens;
    }

    /// Full blocks that are durable.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Tokens that were committed, durable or waiting for their block to fill.
    pub(crate) fn tokens(&self, block_tokens: usize) -> usize {
        self.blocks * block_tokens + self.ids.len()
    }

    /// Takes the next tokens, whose K and V are in the window, and appends every block they fill, in one request.
    pub(crate) fn commit(
        &mut self,
        tokens: NewTokens,
        window: &LocalWindow,
        shape: &ModelShape,
    ) -> Result<(), MemoryError> {
        if tokens.offsets.len() != tokens.ids.len() {
            return Err(MemoryError::Invalid {
                field: "offsets".into(),
                expected: format!("one per token: {}", tokens.ids.len()),
                found: tokens.offsets.len().to_string(),
            });
        }
        let from = self.text.len();
        self.ids.extend(tokens.ids);
        self.offsets.extend(tokens.offsets.iter().map(|&offset| from + offset as usize));
        self.text.extend(tokens.text);

        let block_tokens = shape.block_tokens as usize;
        let full = self.ids.len() / block_tokens;
        self.append(full, block_tokens, window, shape)
    }

    /// Makes the tokens after the last full block durable as the document's tail.
    pub(crate) fn flush(&mut self, window: &LocalWindow, shape: &ModelShape) -> Result<(), MemoryError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        let tail = self.block(0, self.ids.len(), window, shape);
        self.send(vec![tail])
    }

    /// Keeps a state of the document's first `tokens` tokens, if it has no more than those.
    pub(crate) fn put_state(&mut self, tokens: u64, parts: Vec<Bytes>) -> Result<(), MemoryError> {
        if self.durable_tokens == tokens {
            self.memory.put_state(self.document, SequenceState { tokens, parts })?;
        }
        Ok(())
    }

    /// Makes blocks durable, unless another writer has changed the document.
    fn send(&mut self, blocks: Vec<NewBlock>) -> Result<(), MemoryError> {
        let expected_tokens = Some(self.durable_tokens);
        let document = self.memory.append(AppendRequest { document: self.document, blocks, expected_tokens })?;
        self.durable_tokens = document.tokens;
        Ok(())
    }

    fn append(
        &mut self,
        full: usize,
        block_tokens: usize,
        window: &LocalWindow,
        shape: &ModelShape,
    ) -> Result<(), MemoryError> {
        if full == 0 {
            return Ok(());
        }
        let blocks = (0..full).map(|block| self.block(block, block_tokens, window, shape)).collect();
        self.send(blocks)?;
        let tokens = full * block_tokens;
        let text = self.offsets.get(tokens).copied().unwrap_or(self.text.len());
        self.blocks += full;
        self.ids.drain(..tokens);
        self.offsets.drain(..tokens);
        self.offsets.iter_mut().for_each(|offset| *offset -= text);
        self.text.drain(..text);
        self.text_start += text as u64;
        Ok(())
    }

    /// The block that begins `block` blocks after the durable ones and has `tokens` tokens.
    fn block(&self, block: usize, tokens: usize, window: &LocalWindow, shape: &ModelShape) -> NewBlock {
        let block_tokens = shape.block_tokens as usize;
        let index = self.blocks + block;
        let position = index * block_tokens;
        let back = shape.rope.rotation(-(position as i64));
        let (k, v) = window.block(position, tokens, &back);
        let dims = vec![shape.layers, shape.kv_heads, tokens as u32, shape.head_dim];

        let first = block * block_tokens;
        let offsets = &self.offsets[first..first + tokens];
        let start = offsets[0];
        let end = self.offsets.get(first + tokens).copied().unwrap_or(self.text.len());
        NewBlock {
            index: index as u32,
            token_ids: self.ids[first..first + tokens].to_vec(),
            text: BlockText {
                start: self.text_start + start as u64,
                bytes: self.text[start..end].to_vec(),
                offsets: offsets.iter().map(|&offset| (offset - start) as u32).collect(),
            },
            k: Tensor::from_f32(dims.clone(), &k),
            v: Tensor::from_f32(dims, &v),
        }
    }
}
