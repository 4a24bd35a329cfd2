//! The engine `flat`: every key as it is stored.

use super::SearchEngine;
use crate::index::{Found, Query, fast};

#[derive(Debug)]
pub(super) struct Flat;

impl SearchEngine for Flat {
    fn search(&self, query: &Query<'_>) -> Found {
        fast::search(query)
    }
}
