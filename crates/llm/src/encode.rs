//! From a text to a document in a memory: prefill once, keep the blocks, read them back in any later session.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::error::{Difference, RememberError};
use super::llama::Logits;
use super::model_attention::ModelAttention;
use super::tokenizer::Encoded;
use super::{LoadedModel, Reading};
use landmarkdb::{
    BlockMemory, BlockRange, CollectionInfo, DocumentInfo, MemoryError, NewTokens, Retrieval, SequenceAttention, Window,
};

/// Blocks that are compared in one call when a document is resumed.
const COMPARED_BLOCKS: usize = 256;

/// How far an encoding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeProgress {
    /// Tokens that an interrupted encoding is resumed after.
    pub resumed_tokens: u64,
    /// Tokens that were read, those included.
    pub done_tokens: u64,
    /// Tokens that the next encoding would be resumed after.
    pub kept_tokens: u64,
    /// Tokens of the whole text, with the tokenizer's prefix and the landmarks.
    pub total_tokens: u64,
    /// Whether another document has the name until this text is whole: see [`encode_replacing`].
    pub replaces: bool,
}

/// What is encoded, and how.
#[derive(Clone, Debug)]
pub struct Encoding<'a> {
    /// Of the document.
    pub name: &'a str,
    /// The source text, not empty.
    pub text: &'a str,
    /// What a token sees without retrieval, and how many tokens go through the model at once.
    pub window: Window,
    /// What the model retrieves of the text before its window while it reads on. `None`: nothing, so that the cost per
    /// token does not grow with the text.
    pub retrieval: Option<Retrieval>,
    /// Whether the document is left open, so that it can grow with its text; otherwise it is sealed.
    pub stays_open: bool,
}

/// Encodes a text into a document, and seals it unless it is to stay open.
///
/// A document that holds the beginning of the same text, because the encoding was interrupted or the text has grown, is
/// continued where it ends, or after the last state that a model with sliding layers left; one that is sealed and has all of
/// the text is left as it is. Tokens that a document has stay what they are, also where its text, now that it goes on, would be
/// cut into others.
///
/// # Errors
/// [`RememberError::OtherText`] when the document holds another text, [`RememberError::Damaged`] when not all of what it
/// holds can be read, and errors of the model and the memory.
/// What was acknowledged before an error stays durable.
pub fn encode(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collection: &CollectionInfo,
    encoding: &Encoding,
    progress: &mut dyn FnMut(EncodeProgress),
) -> Result<DocumentInfo, RememberError> {
    let &Encoding { name, text, window, ref retrieval, stays_open } = encoding;
    if text.is_empty() {
        // Before the document is made: a name that holds nothing would be taken all the same.
        return Err(RememberError::EmptyText);
    }
    let encoded = model.tokenizer.encode(text)?;
    let document = memory.open_document(collection.id, name)?;
    let Sequence { ids, offsets } = match compare(model, memory.as_ref(), &document, text, &encoded)? {
        Comparison::Agrees(sequence) => sequence,
        Comparison::Differs(difference) => {
            return Err(RememberError::OtherText { name: name.into(), difference });
        }
    };
    if document.tokens > 0 {
        let damage = memory.verify(Some(document.id), &mut |_, _| {})?.faults.into_iter().next();
        if let Some(damage) = damage {
            return Err(RememberError::Damaged { name: name.into(), problem: damage.problem });
        }
    }
    let mut tell = |resumed_tokens, done_tokens, kept_tokens| {
        let total_tokens = ids.len() as u64;
        progress(EncodeProgress { resumed_tokens, done_tokens, kept_tokens, total_tokens, replaces: false });
    };
    if document.sealed {
        tell(document.tokens, document.tokens, document.tokens);
        let needs_state = model.config().sliding_layers().next().is_some();
        return match needs_state && document.state_tokens != Some(document.tokens) {
            true => Err(RememberError::LostState { name: name.into() }),
            false => Ok(document),
        };
    }
    let mut session = ModelAttention::write(model.config(), memory, collection, &document, window, retrieval.clone())?;
    let mut from = session.position();
    let resumed_tokens = from as u64;
    tell(resumed_tokens, resumed_tokens, resumed_tokens);
    while from < ids.len() {
        let to = (from + window.written_chunk_tokens()).min(ids.len());
        model.llama.forward(&ids[from..to], &mut session, Logits::None)?;
        let end = offsets.get(to).copied().unwrap_or(text.len());
        let text_from = offsets[from];
        let in_text: Vec<u32> = offsets[from..to].iter().map(|offset| (offset - text_from) as u32).collect();
        session.commit(NewTokens { ids: &ids[from..to], text: &text.as_bytes()[text_from..end], offsets: &in_text })?;
        from = to;
        tell(resumed_tokens, from as u64, session.kept() as u64);
    }
    session.flush()?;
    Ok(if stays_open { memory.document(document.id)? } else { memory.seal(document.id)? })
}

/// As [`encode`]; a document of the name that holds another text, or that cannot be read whole, gives way to this one.
///
/// The text is encoded beside the earlier document, as its [replacement](landmarkdb::DocumentId::replacement_name), and takes its
/// name when it is whole, in one step. Until then the earlier one stays as it is under its name, and an encoding that was
/// interrupted is continued by the next call with the same text.
///
/// # Errors
/// As [`encode`]; whatever happens, the name has the earlier document, or this text as a whole.
pub fn encode_replacing(
    model: &LoadedModel,
    memory: &Arc<dyn BlockMemory>,
    collection: &CollectionInfo,
    encoding: &Encoding,
    progress: &mut dyn FnMut(EncodeProgress),
) -> Result<DocumentInfo, RememberError> {
    match encode(model, memory, collection, encoding, progress) {
        Err(error) if gives_way(&error) => {}
        encoded => return encoded,
    }
    let old = memory.open_document(collection.id, encoding.name)?;
    let name = old.id.replacement_name();
    let beside = Encoding { name: &name, ..encoding.clone() };
    let mut progress = |step| progress(EncodeProgress { replaces: true, ..step });
    let new = match encode(model, memory, collection, &beside, &mut progress) {
        // What is left of another text that was to replace the document.
        Err(error) if gives_way(&error) => {
            memory.delete(memory.open_document(collection.id, &name)?.id)?;
            encode(model, memory, collection, &beside, &mut progress)?
        }
        encoded => encoded?,
    };
    Ok(memory.replace(old.id, new.id)?)
}

/// Whether what stands in the way of an encoding is what the document holds.
fn gives_way(error: &RememberError) -> bool {
    use RememberError::{Damaged, LostState, OtherText};
    matches!(error, OtherText { .. } | Damaged { .. } | LostState { .. })
        || matches!(error.memory(), Some(MemoryError::DataLoss { block: Some(_), .. }))
}

/// What the model reads of a text, landmarks included, and where each token begins in it, in bytes.
#[derive(Default)]
struct Sequence {
    ids: Vec<u32>,
    offsets: Vec<usize>,
}

impl Sequence {
    /// Goes on with these tokens of a text of `text_bytes`.
    fn read(&mut self, model: &LoadedModel, ids: &[u32], offsets: &[usize], text_bytes: usize) {
        let Reading { ids, text_tokens } = model.config().reading(self.ids.len(), ids);
        self.ids.extend(ids);
        // A landmark begins where the token does that follows it.
        self.offsets.extend(text_tokens.iter().map(|&token| offsets.get(token).copied().unwrap_or(text_bytes)));
    }
}

/// What a document is to a text.
enum Comparison {
    /// It holds the text's beginning, or all of it: the tokens of the text, those first that the document has.
    Agrees(Sequence),
    Differs(Difference),
}

/// Whether a document holds the beginning of a text, by its tokens or, where these were cut before the text went on, by their
/// text; of a sealed one, all of it.
fn compare(
    model: &LoadedModel,
    memory: &dyn BlockMemory,
    document: &DocumentInfo,
    text: &str,
    encoded: &Encoded,
) -> Result<Comparison, RememberError> {
    let prefix = model.tokenizer.prefix();
    let mut whole = Sequence::default();
    let (ids, offsets) = ([prefix, &encoded.ids].concat(), [&vec![0; prefix.len()][..], &encoded.offsets].concat());
    whole.read(model, &ids, &offsets, text.len());

    let (mut held, mut same_tokens) = (Sequence::default(), true);
    let end = document.blocks + (document.tail_tokens > 0) as u32;
    for start in (0..end).step_by(COMPARED_BLOCKS) {
        let page = start..end.min(start + COMPARED_BLOCKS as u32);
        for block in memory.blocks(&BlockRange { document: document.id, blocks: page })? {
            let from = block.text.start as usize;
            let expected = whole.ids.get(held.ids.len()..).unwrap_or_default();
            same_tokens &= expected.starts_with(&block.token_ids);
            let there = text.as_bytes().get(from..from.saturating_add(block.text.bytes.len()));
            let same_text = !block.text.bytes.is_empty() && there == Some(&block.text.bytes[..]);
            if !same_tokens && !same_text {
                return Ok(Comparison::Differs(Difference::Block(block.id.index)));
            }
            held.ids.extend(&block.token_ids);
            held.offsets.extend(block.text.offsets.iter().map(|&offset| from + offset as usize));
        }
    }
    let held_bytes = document.text_bytes as usize;
    let goes_on = if same_tokens { held.ids.len() < whole.ids.len() } else { held_bytes < text.len() };
    if document.sealed && goes_on {
        return Ok(Comparison::Differs(Difference::Longer));
    }
    if same_tokens {
        return Ok(Comparison::Agrees(whole));
    }
    // As the text is cut as a whole, if a token begins there.
    let at = encoded.offsets.partition_point(|&offset| offset < held_bytes);
    let rest = text.get(held_bytes..);
    if encoded.offsets.get(at) == Some(&held_bytes) || rest == Some("") {
        held.read(model, &encoded.ids[at..], &encoded.offsets[at..], text.len());
    } else if let Some(rest) = rest {
        let rest = model.tokenizer.encode(rest)?;
        let offsets: Vec<usize> = rest.offsets.iter().map(|offset| held_bytes + offset).collect();
        held.read(model, &rest.ids, &offsets, text.len());
    } else {
        // It ends inside of a character, and not as this one is cut.
        return Ok(Comparison::Differs(Difference::Block(end.saturating_sub(1))));
    }
    Ok(Comparison::Agrees(held))
}

/// Copies a sealed document into another collection of the same model, as `name`: other dtypes without encoding again.
///
/// # Errors
/// Those of the memory.
pub fn copy_document(
    memory: &dyn BlockMemory,
    from: &DocumentInfo,
    to: &CollectionInfo,
    name: &str,
) -> Result<DocumentInfo, MemoryError> {
    let copy = memory.open_document(to.id, name)?;
    if copy.sealed {
        return Ok(copy);
    }
    let end = from.blocks + (from.tail_tokens > 0) as u32;
    for index in copy.blocks..end {
        let request =
            landmarkdb::FetchRequest { document: from.id, blocks: vec![index], dtype: landmarkdb::DType::F32 };
        let blocks = memory.fetch(&request)?.into_iter().map(|block| landmarkdb::NewBlock {
            index,
            token_ids: block.token_ids,
            text: block.text,
            k: block.k,
            v: block.v,
        });
        memory.append(landmarkdb::AppendRequest {
            document: copy.id,
            blocks: blocks.collect(),
            expected_tokens: None,
        })?;
    }
    if let Some(state) = memory.state(from.id)?.filter(|state| state.tokens == from.tokens) {
        memory.put_state(copy.id, state)?;
    }
    memory.seal(copy.id)
}

/// Checks that a collection was made with `model`.
///
/// # Errors
/// [`MemoryError::FingerprintMismatch`] with both fingerprints.
pub fn check_model(model: &LoadedModel, collection: &CollectionInfo) -> Result<(), RememberError> {
    let mut offered = collection.spec.clone();
    offered.shape = model.shape(offered.shape.block_tokens).map_err(MemoryError::from)?;
    offered.model_digest = model.model_digest;
    offered.tokenizer_digest = model.tokenizer_digest();
    if offered.fingerprint() != collection.fingerprint {
        return Err(MemoryError::FingerprintMismatch {
            collection: collection.spec.name.clone(),
            stored: collection.fingerprint,
            offered: offered.fingerprint(),
        }
        .into());
    }
    Ok(())
}
