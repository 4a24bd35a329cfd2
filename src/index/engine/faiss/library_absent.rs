//! In place of `library.rs` in a build without the feature: there are no indexes.

use std::path::Path;

/// No index exists.
pub(super) enum Nearest {}

/// That FAISS takes a description of an index: never.
///
/// # Errors
/// What to do about it.
pub(super) fn check(_factory: &str, _dim: usize) -> Result<(), String> {
    Err("this build has no FAISS: build landmarkdb with --features faiss".into())
}

impl Nearest {
    pub(super) fn build(factory: &str, dim: usize, _keys: &[f32]) -> Result<Nearest, String> {
        check(factory, dim).map(|()| unreachable!("the check fails"))
    }

    pub(super) fn read(_path: &Path) -> Result<Nearest, String> {
        check("", 0).map(|()| unreachable!("the check fails"))
    }

    pub(super) fn write(&self, _path: &Path) -> Result<(), String> {
        match *self {}
    }

    pub(super) fn set_effort(&mut self, _effort: u32) {
        match *self {}
    }

    pub(super) fn search(&self, _queries: &[f32], _dim: usize, _count: usize) -> Result<Vec<i64>, String> {
        match *self {}
    }
}
