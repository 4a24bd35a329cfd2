//! What may a message hold, and what does it take once it is decoded? Counted in its bytes, before anything is allocated.
//!
//! An empty block is two bytes on the wire and two hundred in memory. So what repeats is counted first: too much of it is
//! refused, and the rest has a price that is taken from a budget.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};
use prost::encoding::{WireType, decode_key, decode_varint};

use landmarkdb::limits;
use landmarkdb::{MemoryError, Result};

/// A message on its way in, as it arrived.
pub type Chunks = VecDeque<Bytes>;

/// Bytes in memory of one number of a list: itself, and as much room to grow.
const NUMBER_BYTES: u64 = 8;

/// What the messages of a method may hold.
#[derive(Debug)]
pub struct Bounds {
    /// Bytes of one message.
    pub bytes_max: usize,
    /// Whether the next one of a call may be waited for as long as it takes.
    pub is_of_stream: bool,
    fields: &'static [Field],
}

/// A field that repeats, or has such fields inside. All others take no more than their bytes.
#[derive(Debug)]
enum Field {
    Numbers(u32),
    Message(u32, &'static [Field]),
    Messages { number: u32, what: &'static str, max: usize, bytes: u64, inside: &'static [Field] },
}

const TENSOR: &[Field] = &[Field::Numbers(2)];
const TEXT: &[Field] = &[Field::Numbers(3)];
const BLOCK: &[Field] =
    &[Field::Numbers(2), Field::Message(3, TEXT), Field::Message(4, TENSOR), Field::Message(5, TENSOR)];
const LOOKUP: &[Field] = &[
    Field::Numbers(4),
    Field::Messages { number: 5, what: "scope", max: limits::SCOPE_DOCUMENTS_MAX, bytes: 32, inside: &[] },
];
const ATTEND: &[Field] = &[Field::Message(1, LOOKUP)];

const APPEND_BOUNDS: Bounds = Bounds {
    bytes_max: limits::MESSAGE_BYTES_MAX,
    is_of_stream: true,
    fields: &[Field::Messages { number: 2, what: "blocks", max: limits::APPEND_BLOCKS_MAX, bytes: 512, inside: BLOCK }],
};
const LOOKUP_BOUNDS: Bounds =
    Bounds { bytes_max: limits::LOOKUP_MESSAGE_BYTES_MAX, is_of_stream: false, fields: LOOKUP };
const ATTEND_BOUNDS: Bounds =
    Bounds { bytes_max: limits::LOOKUP_MESSAGE_BYTES_MAX, is_of_stream: false, fields: ATTEND };
const ATTEND_ALL_BOUNDS: Bounds = Bounds {
    bytes_max: limits::LOOKUP_MESSAGE_BYTES_MAX,
    is_of_stream: false,
    fields: &[Field::Messages {
        number: 1,
        what: "requests",
        max: limits::ATTEND_REQUESTS_MAX,
        bytes: 512,
        inside: ATTEND,
    }],
};
const LOOKUP_STREAM_BOUNDS: Bounds =
    Bounds { bytes_max: limits::LOOKUP_MESSAGE_BYTES_MAX, is_of_stream: true, fields: &[Field::Message(2, LOOKUP)] };
const ATTEND_STREAM_BOUNDS: Bounds =
    Bounds { bytes_max: limits::LOOKUP_MESSAGE_BYTES_MAX, is_of_stream: true, fields: &[Field::Message(2, ATTEND)] };
const FETCH_BOUNDS: Bounds =
    Bounds { bytes_max: limits::FETCH_MESSAGE_BYTES_MAX, is_of_stream: false, fields: &[Field::Numbers(2)] };
/// Of a stream too, but one that is held in memory until it is whole: no message of it may be waited for longer than a byte.
const PUT_STATE_BOUNDS: Bounds =
    Bounds { bytes_max: limits::STATE_MESSAGE_BYTES_MAX, is_of_stream: false, fields: &[] };
const GET_STATE_PART_BOUNDS: Bounds =
    Bounds { bytes_max: limits::FETCH_MESSAGE_BYTES_MAX, is_of_stream: false, fields: &[] };
const TUNE_BOUNDS: Bounds = Bounds {
    bytes_max: limits::TUNE_MESSAGE_BYTES_MAX,
    is_of_stream: false,
    fields: &[
        Field::Messages { number: 2, what: "queries", max: limits::TUNE_QUERIES_MAX, bytes: 128, inside: &[] },
        Field::Messages { number: 6, what: "indexes", max: limits::TUNE_INDEXES_MAX, bytes: 128, inside: &[] },
    ],
};
const OTHER_BOUNDS: Bounds = Bounds { bytes_max: limits::ADMIN_MESSAGE_BYTES_MAX, is_of_stream: false, fields: &[] };

/// Of the requests of a method, by its path.
pub fn bounds(path: &str) -> &'static Bounds {
    match path.strip_prefix("/landmark.v1.") {
        Some("BlockMemory/Append") => &APPEND_BOUNDS,
        Some("BlockMemory/Lookup") => &LOOKUP_BOUNDS,
        Some("BlockMemory/Attend") => &ATTEND_BOUNDS,
        Some("BlockMemory/AttendAll") => &ATTEND_ALL_BOUNDS,
        Some("BlockMemory/LookupStream") => &LOOKUP_STREAM_BOUNDS,
        Some("BlockMemory/AttendStream") => &ATTEND_STREAM_BOUNDS,
        Some("BlockMemory/PutState") => &PUT_STATE_BOUNDS,
        Some("BlockMemory/GetStatePart") => &GET_STATE_PART_BOUNDS,
        Some("BlockMemory/Fetch") => &FETCH_BOUNDS,
        Some("Admin/Tune") => &TUNE_BOUNDS,
        _ => &OTHER_BOUNDS,
    }
}

impl Bounds {
    /// Bytes that decoding a message takes on top of its own.
    ///
    /// # Errors
    /// `LimitExceeded` where something repeats more often than it may; `Invalid` for fields of a kind that proto3 does not
    /// have. What cannot be read at all is counted up to there: decoding ends there too.
    pub fn price(&self, message: &Chunks) -> Result<u64> {
        let mut cursor = Cursor { chunks: message, chunk: 0, at: 0, left: message.iter().map(Bytes::len).sum() };
        cursor.skip_empty();
        let mut price = 0;
        count(&mut cursor, 0, self.fields, &mut price)?;
        Ok(price)
    }
}

/// Counts the fields of a message up to where `end` bytes are left. `None` where it cannot be read on.
fn count(cursor: &mut Cursor<'_>, end: usize, fields: &[Field], price: &mut u64) -> Result<Option<()>> {
    let mut found = [0usize; 4];
    while cursor.left > end {
        let Ok((number, wire_type)) = decode_key(cursor) else { return Ok(None) };
        let length = match wire_type {
            WireType::Varint => decode_varint(cursor).ok().map(|_| 0),
            WireType::SixtyFourBit => Some(8),
            WireType::ThirtyTwoBit => Some(4),
            WireType::LengthDelimited => decode_varint(cursor).ok().and_then(|length| usize::try_from(length).ok()),
            WireType::StartGroup | WireType::EndGroup => {
                return Err(MemoryError::Invalid {
                    field: format!("field {number}"),
                    expected: "a field of proto3".into(),
                    found: "a group".into(),
                });
            }
        };
        // A number may have been read beyond the message that it is in.
        let Some(left) = cursor.left.checked_sub(end) else { return Ok(None) };
        let Some(length) = length.filter(|&length| length <= left) else { return Ok(None) };
        let after = cursor.left - length;
        let is_message = wire_type == WireType::LengthDelimited;
        for (i, field) in fields.iter().enumerate() {
            let read = match field {
                Field::Numbers(own) if *own == number => {
                    *price += NUMBER_BYTES * length.max(1) as u64;
                    Some(())
                }
                Field::Message(own, inside) if *own == number && is_message => count(cursor, after, inside, price)?,
                Field::Messages { number: own, bytes, inside, .. } if *own == number && is_message => {
                    found[i] += 1;
                    *price += bytes;
                    count(cursor, after, inside, price)?
                }
                _ => Some(()),
            };
            if read.is_none() {
                return Ok(None);
            }
        }
        cursor.advance(cursor.left - after);
    }
    for (field, found) in fields.iter().zip(found) {
        if let Field::Messages { what, max, .. } = field
            && found > *max
        {
            let (limit, found) = (*max as u64, found as u64);
            return Err(MemoryError::LimitExceeded { what: (*what).into(), limit, found });
        }
    }
    Ok(Some(()))
}

/// Where a message is read.
struct Cursor<'a> {
    chunks: &'a Chunks,
    chunk: usize,
    /// In the chunk.
    at: usize,
    left: usize,
}

impl Cursor<'_> {
    fn skip_empty(&mut self) {
        while self.chunks.get(self.chunk).is_some_and(|chunk| self.at >= chunk.len()) {
            self.at -= self.chunks[self.chunk].len();
            self.chunk += 1;
        }
    }
}

impl Buf for Cursor<'_> {
    fn remaining(&self) -> usize {
        self.left
    }

    fn chunk(&self) -> &[u8] {
        self.chunks.get(self.chunk).map_or(&[], |chunk| &chunk[self.at..])
    }

    fn advance(&mut self, count: usize) {
        self.at += count;
        self.left -= count;
        self.skip_empty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::v1;
    use prost::Message;

    fn chunks(message: &[u8], length: usize) -> Chunks {
        message.chunks(length).map(Bytes::copy_from_slice).collect()
    }

    fn limit(what: &str, limit: u64, found: u64) -> Result<u64> {
        Err(MemoryError::LimitExceeded { what: what.into(), limit, found })
    }

    /// 100 MB of empty blocks became 10 GB before anybody counted them (finding 5).
    #[test]
    fn what_repeats_is_counted_in_bytes_however_they_are_cut() {
        let append = bounds("/landmark.v1.BlockMemory/Append");
        let blocks = |count| v1::AppendRequest {
            document: 1,
            blocks: vec![v1::NewBlock::default(); count],
            expected_tokens: None,
        };
        for length in [1, 3, 1 << 20] {
            let price = |count| append.price(&chunks(&blocks(count).encode_to_vec(), length));
            assert_eq!(price(1024), Ok(1024 * 512));
            assert_eq!(price(1025), limit("blocks", 1024, 1025));
            assert_eq!(price(100_000), limit("blocks", 1024, 100_000));
        }
        let scope = |count| v1::LookupRequest { scope: vec![v1::BlockRange::default(); count], ..Default::default() };
        let attend = |count| v1::AttendRequest { lookup: Some(scope(count)), normalisation: 1, ..Default::default() };
        let many = |count| v1::AttendAllRequest { requests: vec![attend(count), attend(7)] };
        let streamed = |count| v1::AttendStreamRequest { id: 1, request: Some(attend(count)), timeout_ms: 1 };
        for (method, right, wrong, price) in [
            ("Lookup", scope(1024).encode_to_vec(), scope(1025).encode_to_vec(), 1024 * 32),
            ("Attend", attend(1024).encode_to_vec(), attend(1025).encode_to_vec(), 1024 * 32),
            ("AttendAll", many(1024).encode_to_vec(), many(1025).encode_to_vec(), 1031 * 32 + 2 * 512),
            ("AttendStream", streamed(1024).encode_to_vec(), streamed(1025).encode_to_vec(), 1024 * 32),
        ] {
            let bounds = bounds(&format!("/landmark.v1.BlockMemory/{method}"));
            assert_eq!(bounds.price(&chunks(&right, 5)), Ok(price), "{method}");
            assert_eq!(bounds.price(&chunks(&wrong, 5)), limit("scope", 1024, 1025), "{method}");
        }
    }

    #[test]
    fn numbers_have_a_price_packed_or_not_and_bytes_have_none() {
        let lookup = bounds("/landmark.v1.BlockMemory/Lookup");
        let packed = v1::LookupRequest { distances: vec![1; 100], queries: vec![0; 9999].into(), ..Default::default() };
        assert_eq!(lookup.price(&chunks(&packed.encode_to_vec(), 64)), Ok(800));
        let one_by_one = [4 << 3, 1].repeat(100);
        assert_eq!(lookup.price(&chunks(&one_by_one, 3)), Ok(800));
    }

    #[test]
    fn what_cannot_be_read_is_counted_up_to_there_and_groups_are_refused() {
        let append = bounds("/landmark.v1.BlockMemory/Append");
        let block = [2 << 3 | 2, 0];
        for rest in [&[0xff][..], &[2 << 3 | 2, 9], &[2 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]] {
            let message = [block.as_slice(), &block, rest].concat();
            let price = append.price(&chunks(&message, 2)).unwrap();
            assert!((2 * 512..=3 * 512).contains(&price), "{price} for {rest:?}");
        }
        assert!(matches!(append.price(&chunks(&[1 << 3 | 3], 1)), Err(MemoryError::Invalid { .. })));
        // A block of one byte, in which a number begins that ends behind it: counting went on at a place that wrapped around.
        for inside in [0x80, 1 << 3] {
            let message = [2 << 3 | 2, 1, inside, 1, 1];
            assert_eq!(append.price(&chunks(&message, 2)), Ok(512), "{inside}");
        }
        assert_eq!(append.price(&Chunks::new()), Ok(0));
    }
}
