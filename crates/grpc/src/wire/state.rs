//! Messages with states: one part in each.

use bytes::Bytes;

use super::convert::{invalid, required};
use super::v1;
use landmarkdb::limits;
use landmarkdb::{DocumentId, MemoryError, Result, SequenceState, StatePart};

/// The messages that bring a state, in their order.
pub fn put_state_messages(document: DocumentId, state: SequenceState) -> Vec<v1::PutStateRequest> {
    let SequenceState { tokens, parts: all } = state;
    let parts = all.len() as u32;
    all.into_iter().map(|part| v1::PutStateRequest { document: document.0, tokens, parts, part }).collect()
}

/// A state on its way in, as far as it has come.
#[derive(Debug, Default)]
pub struct ArrivingState {
    /// What the first message says.
    first: Option<v1::PutStateRequest>,
    parts: Vec<Bytes>,
    bytes: u64,
}

impl ArrivingState {
    /// Takes the next message. Whether the state is whole with it.
    ///
    /// # Errors
    /// `Missing` for a message without bytes or a state without parts, `Invalid` where it says something else than the first,
    /// `LimitExceeded` beyond [`limits`].
    pub fn push(&mut self, mut message: v1::PutStateRequest) -> Result<bool> {
        let part = std::mem::take(&mut message.part);
        let first = self.first.get_or_insert_with(|| message.clone());
        if *first != message {
            let v1::PutStateRequest { document, tokens, parts, .. } = first;
            let expected = format!("document {document}, {tokens} tokens, {parts} parts");
            let v1::PutStateRequest { document, tokens, parts, .. } = message;
            return Err(invalid("part", expected, format!("document {document}, {tokens} tokens, {parts} parts")));
        }
        if part.is_empty() || message.parts == 0 {
            return Err(MemoryError::Missing { field: "state.parts".into() });
        }
        self.bytes += part.len() as u64;
        at_most("parts of a state", limits::STATE_PARTS_MAX as u64, message.parts.into())?;
        at_most("bytes of a part of a state", limits::STATE_PART_BYTES_MAX as u64, part.len() as u64)?;
        at_most("bytes of a state", limits::STATE_BYTES_MAX, self.bytes)?;
        self.parts.push(part);
        Ok(self.parts.len() == message.parts as usize)
    }

    /// The state, and the document that is to keep it.
    ///
    /// # Errors
    /// `Missing` if no message has come.
    pub fn into_state(self) -> Result<(DocumentId, SequenceState)> {
        let v1::PutStateRequest { document, tokens, .. } = required("state", self.first)?;
        Ok((DocumentId(document), SequenceState { tokens, parts: self.parts }))
    }
}

fn at_most(what: &str, limit: u64, found: u64) -> Result<()> {
    if found <= limit { Ok(()) } else { Err(MemoryError::LimitExceeded { what: what.into(), limit, found }) }
}

impl From<StatePart> for v1::StatePart {
    fn from(StatePart { version, tokens, parts, bytes }: StatePart) -> Self {
        v1::StatePart { version, tokens, parts, part: bytes }
    }
}

impl TryFrom<v1::StatePart> for StatePart {
    type Error = MemoryError;

    fn try_from(wire: v1::StatePart) -> Result<Self> {
        let v1::StatePart { version, tokens, parts, part } = wire;
        at_most("parts of a state", limits::STATE_PARTS_MAX as u64, parts.into())?;
        Ok(StatePart { version, tokens, parts, bytes: part })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(document: u64, tokens: u64, parts: u32, part: &[u8]) -> v1::PutStateRequest {
        v1::PutStateRequest { document, tokens, parts, part: Bytes::copy_from_slice(part) }
    }

    #[test]
    fn a_state_arrives_as_it_was_sent_and_nothing_else_does() {
        let state = SequenceState { tokens: 12, parts: vec![Bytes::from_static(b"one"), Bytes::from_static(b"2")] };
        let mut arriving = ArrivingState::default();
        let whole: Vec<bool> = put_state_messages(DocumentId(7), state.clone())
            .into_iter()
            .map(|next| arriving.push(next).unwrap())
            .collect();
        assert_eq!(whole, [false, true]);
        assert_eq!(arriving.into_state(), Ok((DocumentId(7), state)));
        assert!(matches!(ArrivingState::default().into_state(), Err(MemoryError::Missing { .. })));

        for other in [message(8, 12, 2, b"x"), message(7, 13, 2, b"x"), message(7, 12, 3, b"x")] {
            let mut arriving = ArrivingState::default();
            assert_eq!(arriving.push(message(7, 12, 2, b"x")), Ok(false));
            assert!(matches!(arriving.push(other), Err(MemoryError::Invalid { .. })));
        }
        let refused = |message| ArrivingState::default().push(message).unwrap_err();
        assert!(matches!(refused(message(7, 12, 2, b"")), MemoryError::Missing { .. }));
        assert!(matches!(refused(message(7, 12, 0, b"x")), MemoryError::Missing { .. }));
        assert!(matches!(refused(message(7, 12, 1025, b"x")), MemoryError::LimitExceeded { found: 1025, .. }));
        let large = vec![0; limits::STATE_PART_BYTES_MAX + 1];
        assert!(matches!(refused(message(7, 12, 1, &large)), MemoryError::LimitExceeded { .. }));
        let (mut arriving, largest) = (ArrivingState::default(), Bytes::from(large).slice(1..));
        let next = || v1::PutStateRequest { document: 7, tokens: 12, parts: 100, part: largest.clone() };
        for _ in 0..64 {
            assert_eq!(arriving.push(next()), Ok(false));
        }
        assert!(matches!(
            arriving.push(next()),
            Err(MemoryError::LimitExceeded { limit: limits::STATE_BYTES_MAX, .. })
        ));
    }
}
