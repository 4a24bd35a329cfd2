//! What is at hand of the documents before the last: tails that cannot be looked up.

use crate::api::{BlockMemory, DocumentInfo, FetchRequest};
use crate::attention::AttentionError;
use crate::attention::at_hand::has_tail_at_hand;
use crate::attention::cut::cut_block;
use crate::attention::window::Lead;
use crate::limits::TAIL_TOKENS_MAX;
use crate::shape::ModelShape;
use crate::types::{DType, KeyRule};

/// Reads the tails of `earlier` documents that cannot be looked up. Each ends at `position`, where the window ends, just before what
/// comes next: nobody wrote these texts one after the other, and which of them is near should not depend on the order they are named
/// in (as in parallel context windows, Ratner et al. 2022). Returns the tokens of the longest too.
pub(crate) fn read_tails(
    memory: &dyn BlockMemory,
    shape: &ModelShape,
    rule: KeyRule,
    earlier: &[&DocumentInfo],
    position: usize,
) -> Result<(Lead, usize), AttentionError> {
    let tails: Vec<_> = earlier.iter().filter(|document| has_tail_at_hand(document, rule)).collect();
    let tokens: usize = tails.iter().map(|document| document.tail_tokens as usize).sum();
    if tokens > TAIL_TOKENS_MAX {
        let found = match rule.covers_tails() {
            true => {
                format!("{tokens} tokens; ask about fewer documents at once, or seal them: then they are retrieved")
            }
            false => format!("{tokens} tokens; ask about fewer documents at once"),
        };
        return Err(AttentionError::Invalid {
            field: "documents",
            expected: format!(
                "ends of documents (tokens after the last full block) of {TAIL_TOKENS_MAX} tokens in all"
            ),
            found,
        });
    }
    let (mut lead, mut longest) = (Lead::default(), 0);
    for document in tails {
        let request = FetchRequest { document: document.id, blocks: vec![document.blocks], dtype: DType::F32 };
        for block in memory.fetch(&request)? {
            // One that grows may be longer by now.
            let block = cut_block(block, document.tail_tokens as usize);
            let count = block.token_ids.len();
            if count != document.tail_tokens as usize {
                return Err(AttentionError::Invalid {
                    field: "documents",
                    expected: format!("{:?} as it was, with a tail of {} tokens", document.name, document.tail_tokens),
                    found: format!("{count} tokens: it was written to meanwhile"),
                });
            }
            let rotation = shape.rope.rotation(position as i64 - count as i64);
            lead.push(shape, &block.k.to_f32()?, &block.v.to_f32()?, &rotation);
            longest = longest.max(count);
        }
    }
    Ok((lead, longest))
}
