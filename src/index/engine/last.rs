//! An engine for tests, to be told from all others by what it chooses: the last eligible blocks, all with the same score.

use super::SearchEngine;
use crate::index::{Found, Query};

#[derive(Debug)]
pub(super) struct Last;

impl SearchEngine for Last {
    fn search(&self, query: &Query<'_>) -> Found {
        let (rows, eligible) = (query.rows(), query.eligible());
        let k = query.top_k.min(eligible);
        let last = (eligible - k) as u32..eligible as u32;
        Found { rows, k, positions: (0..rows).flat_map(|_| last.clone()).collect(), scores: vec![0.0; rows * k] }
    }
}
