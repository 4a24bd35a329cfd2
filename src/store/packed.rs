//! Small records as bytes, in segments and in the catalog.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Names and rope frequencies are the longest things in small records and stay far below this.
const SMALL_RECORD_BYTES_MAX: usize = 1 << 16;

fn small_record() -> impl bincode::config::Config {
    // Fixed width, so that a manifest's size does not depend on the numbers in it (it counts its own bytes).
    bincode::config::standard().with_fixed_int_encoding().with_limit::<SMALL_RECORD_BYTES_MAX>()
}

/// Encodes a small record. Fields may only be added together with a new format.
pub(super) fn pack<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, small_record()).expect("plain structs within the limit always encode")
}

pub(super) fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, small_record()).ok()?;
    (used == bytes.len()).then_some(value)
}
