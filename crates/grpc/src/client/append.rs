//! Appends over a stream that is resumed where it broke.

use tonic::transport::Channel;

use super::retry::Patience;
use crate::wire::v1;
use crate::wire::v1::block_memory_client::BlockMemoryClient;
use landmarkdb::{AppendRequest, DocumentInfo, MemoryError, NewBlock, Result};

/// Sends `request` in batches and returns the document with all of it durable. After a broken stream goes on behind
/// the last batch that was acknowledged; a batch whose acknowledgement was lost is sent again, which changes nothing.
pub(super) async fn append(
    client: BlockMemoryClient<Channel>,
    patience: &Patience<'_>,
    request: AppendRequest,
) -> Result<DocumentInfo> {
    let batches = batches(request, patience.options.append_bytes);
    let mut durable_count = 0;
    patience
        .stream(async |progressed| {
            let rest = tokio_stream::iter(batches[durable_count..].to_vec());
            let mut replies = patience.step(client.clone().append(rest)).await?.into_inner();
            loop {
                let reply = patience.step(replies.message()).await?.ok_or_else(|| patience.cut_short())?;
                durable_count += 1;
                *progressed = true;
                if durable_count == batches.len() {
                    let document = reply.document.ok_or(MemoryError::Missing { field: "document".into() })?;
                    return Ok(document.into());
                }
            }
        })
        .await
}

/// Cuts a request where its payload passes `batch_bytes`; at least one batch, and at least one block in each if there
/// are any.
fn batches(request: AppendRequest, batch_bytes: usize) -> Vec<v1::AppendRequest> {
    let document = request.document.0;
    let mut batches =
        vec![v1::AppendRequest { document, blocks: Vec::new(), expected_tokens: request.expected_tokens }];
    let mut filled_bytes = 0usize;
    let mut before_tokens = 0;
    for block in request.blocks {
        let bytes = payload_bytes(&block);
        if filled_bytes > 0 && filled_bytes.saturating_add(bytes) > batch_bytes {
            // This one begins where the one before ended, with a full block, unless the document was longer from the start.
            let expected_tokens =
                request.expected_tokens.map(|expected| expected.max(block.index as u64 * before_tokens));
            batches.push(v1::AppendRequest { document, blocks: Vec::new(), expected_tokens });
            filled_bytes = 0;
        }
        filled_bytes += bytes;
        before_tokens = block.token_ids.len() as u64;
        if let Some(last) = batches.last_mut() {
            last.blocks.push(block.into());
        }
    }
    batches
}

fn payload_bytes(block: &NewBlock) -> usize {
    block.k.data.len() + block.v.data.len() + block.text.bytes.len() + 8 * block.token_ids.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::{BlockText, DocumentId, Tensor};

    fn block(index: u32, len: usize) -> NewBlock {
        let tensor = || Tensor::from_f32(vec![len as u32], &vec![0.0; len]);
        let text = BlockText { start: 0, bytes: Vec::new(), offsets: Vec::new() };
        NewBlock { index, token_ids: Vec::new(), text, k: tensor(), v: tensor() }
    }

    #[test]
    fn batches_keep_order_and_stay_within_bounds_where_blocks_do() {
        let sizes = |lens: &[usize], batch_bytes: usize| -> Vec<usize> {
            let blocks = lens.iter().zip(0..).map(|(&len, index)| block(index, len)).collect();
            let batches =
                batches(AppendRequest { document: DocumentId(3), blocks, expected_tokens: None }, batch_bytes);
            assert!(batches.iter().all(|batch| batch.document == 3));
            let indices = batches.iter().flat_map(|batch| &batch.blocks).map(|block| block.index);
            assert!(indices.eq(0..lens.len() as u32), "order");
            batches.iter().map(|batch| batch.blocks.len()).collect()
        };
        // A number is 8 bytes: once in K and once in V.
        assert_eq!(sizes(&[], 100), [0], "an empty append is still asked");
        assert_eq!(sizes(&[1, 1, 1], 24), [3]);
        assert_eq!(sizes(&[1, 1, 1], 23), [2, 1]);
        assert_eq!(sizes(&[9, 1, 9, 9], 16), [1, 1, 1, 1], "a block is never cut");
    }

    #[test]
    fn every_batch_expects_what_the_one_before_left() {
        let expected = |expected_tokens| -> Vec<Option<u64>> {
            let blocks = (7..10).map(|index| NewBlock { token_ids: vec![0; 5], ..block(index, 1) }).collect();
            let batches = batches(AppendRequest { document: DocumentId(3), blocks, expected_tokens }, 1);
            batches.iter().map(|batch| batch.expected_tokens).collect()
        };
        assert_eq!(expected(Some(37)), [Some(37), Some(40), Some(45)]);
        assert_eq!(expected(None), [None; 3]);
        // A resumed writer appends again what the document has: it stays as long as it is until that is behind.
        assert_eq!(expected(Some(42)), [Some(42), Some(42), Some(45)]);
    }
}
