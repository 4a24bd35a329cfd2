//! States over a stream of parts, which is sent anew where it broke.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tonic::transport::Channel;

use super::retry::Patience;
use crate::wire::v1::block_memory_client::BlockMemoryClient;
use crate::wire::{put_state_messages, v1};
use landmarkdb::{DocumentId, DocumentInfo, MemoryError, Result, SequenceState};

/// Sends a state. Each part, and the answer behind the last, has to get on its way within the deadline.
pub(super) async fn put_state(
    client: BlockMemoryClient<Channel>,
    patience: &Patience<'_>,
    document: DocumentId,
    state: SequenceState,
) -> Result<DocumentInfo> {
    let messages = put_state_messages(document, state);
    patience
        .stream(async |_progressed| {
            let sent = Arc::new(AtomicUsize::new(0));
            let count = sent.clone();
            let parts = messages.clone().into_iter().inspect(move |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            let reply = send(client.clone(), patience, tokio_stream::iter(parts), &sent).await?;
            Ok(reply.document.ok_or(MemoryError::Missing { field: "document".into() })?.into())
        })
        .await
}

async fn send(
    mut client: BlockMemoryClient<Channel>,
    patience: &Patience<'_>,
    parts: impl tokio_stream::Stream<Item = v1::PutStateRequest> + Send + 'static,
    sent: &AtomicUsize,
) -> Result<v1::PutStateReply> {
    let mut call = pin!(client.put_state(parts));
    loop {
        let before = sent.load(Ordering::Relaxed);
        match patience.step(call.as_mut()).await {
            Err(MemoryError::DeadlineExceeded { .. }) if sent.load(Ordering::Relaxed) > before => {}
            answer => return Ok(answer?.into_inner()),
        }
    }
}
