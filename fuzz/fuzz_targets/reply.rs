#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| landmarkdb_fuzz::bounded(bytes, landmarkdb_fuzz::targets::reply));
