//! The attention of one sequence of a model: that of a memory, and beside it the layers that no memory has.

use std::sync::Arc;

use bytes::Bytes;

use super::config::ModelConfig;
use super::error::RememberError;
use super::sliding::SlidingLayers;
use landmarkdb::limits::STATE_PART_BYTES_MAX;
use landmarkdb::{
    AttentionError, BlockAttention, BlockMemory, CollectionInfo, DocumentInfo, MemoryError, NewTokens, Reads,
    Retrieval, SequenceAttention, Window,
};

/// Tokens after which a document that grows gets a newer state: an interrupted encoding reads at most so many again. A state may take
/// as much as a thousand tokens do.
const STATE_EVERY_TOKENS: usize = 16_384;

/// The attention of all layers of one sequence. Of models without [`SlidingLayers`] it is a [`BlockAttention`] and no more.
pub struct ModelAttention {
    below: BlockAttention,
    sliding: Option<SlidingLayers>,
    /// Position of the last state that the document was given; none of a sequence that gives none.
    kept: Option<usize>,
}

impl ModelAttention {
    /// Of a sequence that begins. `below` is the attention of the layers that look back over the whole text:
    /// [`BlockAttention::full`] or [`BlockAttention::window_only`] of the model's shape.
    pub fn new(config: &ModelConfig, below: BlockAttention) -> Self {
        ModelAttention { below, sliding: SlidingLayers::new(config), kept: None }
    }

    /// Continues an open document and appends to it: see [`BlockAttention::write`]. Sliding layers go on at the state that the
    /// document keeps, and the tokens behind it have to come again.
    ///
    /// # Errors
    /// Those of the memory; [`RememberError::SlidingState`] for a state that is not this model's.
    pub fn write(
        config: &ModelConfig,
        memory: &Arc<dyn BlockMemory>,
        collection: &CollectionInfo,
        document: &DocumentInfo,
        window: Window,
        retrieval: Option<Retrieval>,
    ) -> Result<Self, RememberError> {
        let Some(mut sliding) = SlidingLayers::new(config) else {
            let below = BlockAttention::write(memory.clone(), collection, document, window, retrieval)?;
            return Ok(ModelAttention { below, sliding: None, kept: None });
        };
        let kept = restore(&mut sliding, memory.as_ref(), document)?.unwrap_or(0);
        let below = BlockAttention::write_at(memory.clone(), collection, document, kept, window, retrieval)?;
        Ok(ModelAttention { below, sliding: Some(sliding), kept: Some(kept as usize) })
    }

    /// Continues the text of the last of `documents` and retrieves from all of them: see [`BlockAttention::read`].
    ///
    /// # Errors
    /// Those of the memory; where the model needs a state of the last document's end and there is none
    /// [`RememberError::NoState`], of a sealed document [`RememberError::LostState`]; [`RememberError::SlidingState`] for a
    /// state that is not this model's.
    pub fn read(
        config: &ModelConfig,
        memory: &Arc<dyn BlockMemory>,
        collection: &CollectionInfo,
        documents: &[DocumentInfo],
        window: Window,
        retrieval: Retrieval,
    ) -> Result<Self, RememberError> {
        let (Some(mut sliding), Some(last)) = (SlidingLayers::new(config), documents.last()) else {
            let below = BlockAttention::read(memory.clone(), collection, documents, window, retrieval)?;
            return Ok(ModelAttention { below, sliding: None, kept: None });
        };
        let name = || last.name.clone();
        match restore(&mut sliding, memory.as_ref(), last)? {
            Some(tokens) if tokens == last.tokens => {}
            _ if last.sealed => return Err(RememberError::LostState { name: name() }),
            _ => return Err(RememberError::NoState { name: name() }),
        }
        let below = BlockAttention::read(memory.clone(), collection, documents, window, retrieval)?;
        Ok(ModelAttention { below, sliding: Some(sliding), kept: None })
    }

    /// As [`BlockAttention::commit`]; now and then the document gets a newer state.
    ///
    /// # Errors
    /// Those of [`BlockAttention::commit`].
    pub fn commit(&mut self, tokens: NewTokens) -> Result<(), AttentionError> {
        self.below.commit(tokens)?;
        match self.kept {
            Some(kept) if self.position() - kept >= STATE_EVERY_TOKENS => self.flush(),
            _ => Ok(()),
        }
    }

    /// As [`BlockAttention::flush`], with a state of the sliding layers: the document can be continued from here.
    ///
    /// # Errors
    /// Those of [`BlockAttention::flush`] and [`BlockMemory::put_state`].
    pub fn flush(&mut self) -> Result<(), AttentionError> {
        let (Some(sliding), Some(_)) = (&self.sliding, self.kept) else { return self.below.flush() };
        let state = Bytes::from(sliding.state());
        let parts = (0..state.len()).step_by(STATE_PART_BYTES_MAX);
        let parts = parts.map(|at| state.slice(at..state.len().min(at + STATE_PART_BYTES_MAX)));
        self.below.flush_with_state(parts.collect())?;
        self.kept = Some(self.below.position());
        Ok(())
    }

    /// Position that a later sequence could go on from by what is durable now.
    pub(super) fn kept(&self) -> usize {
        self.kept.unwrap_or(self.below.position())
    }

    /// Where attention went since the last call, as [`BlockAttention::take_reads`]: sliding layers have no part in it.
    pub fn take_reads(&mut self) -> Reads {
        self.below.take_reads()
    }
}

/// The state that a document keeps, into `sliding`. Returns after how many tokens it was taken; `None` without one.
fn restore(
    sliding: &mut SlidingLayers,
    memory: &dyn BlockMemory,
    document: &DocumentInfo,
) -> Result<Option<u64>, RememberError> {
    let Some(state) = memory.state(document.id)? else { return Ok(None) };
    sliding.restore(&state.parts.concat())?;
    if sliding.position() as u64 != state.tokens {
        let detail =
            format!("the state of {:?} is of {} tokens, not {}", document.name, sliding.position(), state.tokens);
        return Err(MemoryError::DataLoss { block: None, detail }.into());
    }
    Ok(Some(state.tokens))
}

impl SequenceAttention for ModelAttention {
    fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Result<Vec<f32>, AttentionError> {
        match &mut self.sliding {
            None => self.below.attend(layer, tokens, q, k, v),
            Some(sliding) => sliding.beside(&mut self.below).attend(layer, tokens, q, k, v),
        }
    }

    fn position(&self) -> usize {
        self.below.position()
    }
}
