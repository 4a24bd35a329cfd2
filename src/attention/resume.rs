//! How does a model go on whose state is older than its document? From the tokens that the state was taken after, and what it
//! appends again is skipped.

use std::sync::Arc;

use bytes::Bytes;

use crate::api::{BlockMemory, CollectionInfo, DocumentInfo};
use crate::attention::cut::ending_at;
use crate::attention::session::BlockAttention;
use crate::attention::settings::{Retrieval, Window};
use crate::attention::{AttentionError, SequenceAttention};

impl BlockAttention {
    /// As [`write`](Self::write), from behind the first `tokens` tokens of the document: window and sink are those of that
    /// place. The tokens behind it have to come again, and are skipped where the memory has them.
    ///
    /// For models that keep a state with the document, whose [`SequenceState::tokens`](crate::SequenceState::tokens) these
    /// are; 0 where there is none.
    ///
    /// # Errors
    /// Those of [`write`](Self::write), [`AttentionError::Invalid`] for more tokens than the document has.
    pub fn write_at(
        memory: Arc<dyn BlockMemory>,
        collection: &CollectionInfo,
        document: &DocumentInfo,
        tokens: u64,
        window: Window,
        retrieval: Option<Retrieval>,
    ) -> Result<Self, AttentionError> {
        let cut = ending_at(memory.as_ref(), document, tokens, collection.spec.shape.block_tokens)?;
        let mut session = Self::write(memory, collection, &cut, window, retrieval)?;
        if let Some(writer) = &mut session.writer {
            writer.expect(document);
        }
        Ok(session)
    }

    /// As [`read`](Self::read), as if the last document ended behind its first `tokens` tokens: the window ends there, and what
    /// lies behind is not read.
    ///
    /// # Errors
    /// Those of [`read`](Self::read), [`AttentionError::Invalid`] for more tokens than the last document has.
    pub fn read_at(
        memory: Arc<dyn BlockMemory>,
        collection: &CollectionInfo,
        documents: &[DocumentInfo],
        tokens: u64,
        window: Window,
        retrieval: Retrieval,
    ) -> Result<Self, AttentionError> {
        let mut documents = documents.to_vec();
        if let Some(last) = documents.last_mut() {
            *last = ending_at(memory.as_ref(), last, tokens, collection.spec.shape.block_tokens)?;
        }
        Self::read(memory, collection, &documents, window, retrieval)
    }

    /// Makes committed tokens durable as [`flush`](Self::flush) does, and then `parts` as the document's state of this position
    /// (see [`BlockMemory::put_state`]). As long as the document has tokens of an earlier writer behind this position, the state
    /// that it keeps stays. Sequences that do not write ignore the call.
    ///
    /// # Errors
    /// [`AttentionError::Memory`] from the append or the state, [`AttentionError::Invalid`] where the last group of tokens was
    /// not committed.
    pub fn flush_with_state(&mut self, parts: Vec<Bytes>) -> Result<(), AttentionError> {
        self.flush()?;
        let (position, block_tokens) = (self.position(), self.shape().block_tokens as usize);
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if writer.tokens(block_tokens) != position {
            return Err(AttentionError::Invalid {
                field: "commit",
                expected: format!("a commit of all {position} tokens"),
                found: writer.tokens(block_tokens).to_string(),
            });
        }
        Ok(writer.put_state(position as u64, parts)?)
    }
}
