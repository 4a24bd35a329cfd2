//! The engines `sq8` and `sq4`: f16 keys are scanned as integers, and blocks that could be among the best are compared as f16.
//! How keys become integers, and how far scores may be off by it, is [`compress`](crate::index::compress)'s business.

use super::SearchEngine;
use crate::index::{Compression, Found, Query, fast};
use crate::types::DType;

#[derive(Debug)]
pub(super) struct Sq8;

#[derive(Debug)]
pub(super) struct Sq4;

impl SearchEngine for Sq8 {
    fn compression(&self, key_dtype: DType) -> Option<Compression> {
        (key_dtype == DType::F16).then_some(Compression::Int8)
    }

    fn search(&self, query: &Query<'_>) -> Found {
        fast::search(query)
    }
}

impl SearchEngine for Sq4 {
    fn compression(&self, key_dtype: DType) -> Option<Compression> {
        (key_dtype == DType::F16).then_some(Compression::Int4)
    }

    fn search(&self, query: &Query<'_>) -> Found {
        fast::search(query)
    }
}
