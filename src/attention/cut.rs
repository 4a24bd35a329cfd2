//! What is a document up to one of its tokens? A model whose state is older than an open document goes on from there.

use crate::api::{BlockInfo, BlockMemory, BlockText, DocumentInfo, StoredBlock, Tensor};
use crate::attention::AttentionError;
use crate::types::BlockRange;

/// A document as it would be with its first `tokens` tokens alone. `block_tokens` is B.
pub(crate) fn ending_at(
    memory: &dyn BlockMemory,
    document: &DocumentInfo,
    tokens: u64,
    block_tokens: u32,
) -> Result<DocumentInfo, AttentionError> {
    if tokens == document.tokens {
        return Ok(document.clone());
    }
    if tokens > document.tokens {
        return Err(AttentionError::Invalid {
            field: "tokens",
            expected: format!("at most the {} of document {}", document.tokens, document.id),
            found: tokens.to_string(),
        });
    }
    // Below 2^24 blocks, as the document has.
    let blocks = (tokens / block_tokens as u64) as u32;
    let tail_tokens = (tokens % block_tokens as u64) as u32;
    let range = BlockRange { document: document.id, blocks: blocks..blocks + 1 };
    let cut = memory.blocks(&range)?.into_iter().next();
    let text_end = |BlockInfo { text, .. }: BlockInfo| match text.offsets.get(tail_tokens as usize) {
        Some(&offset) => text.start + offset as u64,
        None => text.start + text.bytes.len() as u64,
    };
    let text_bytes = cut.map_or(document.text_bytes, text_end);
    Ok(DocumentInfo { blocks, tail_tokens, tokens, text_bytes, ..document.clone() })
}

/// The first `tokens` tokens of a block of all layers and KV heads.
pub(crate) fn cut_block(block: StoredBlock, tokens: usize) -> StoredBlock {
    if tokens >= block.token_ids.len() {
        return block;
    }
    let StoredBlock { id, mut token_ids, text, k, v } = block;
    let BlockText { start, mut bytes, mut offsets } = text;
    bytes.truncate(offsets.get(tokens).map_or(bytes.len(), |&offset| offset as usize));
    offsets.truncate(tokens);
    token_ids.truncate(tokens);
    let text = BlockText { start, bytes, offsets };
    StoredBlock { id, token_ids, text, k: cut_tensor(k, tokens), v: cut_tensor(v, tokens) }
}

/// `(L, Hkv, tokens, D)` of more tokens.
fn cut_tensor(tensor: Tensor, tokens: usize) -> Tensor {
    let Tensor { dtype, mut shape, data } = tensor;
    let [.., held, dim] = shape[..] else { return Tensor { dtype, shape, data } };
    let row = dim as usize * dtype.size_bytes();
    let pieces = data.chunks_exact((held as usize * row).max(1));
    let data = pieces.flat_map(|piece| &piece[..tokens * row]).copied().collect();
    let axis = shape.len() - 2;
    shape[axis] = tokens as u32;
    Tensor { dtype, shape, data }
}
