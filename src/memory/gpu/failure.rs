//! Why did a GPU give no answer?

use std::fmt::Display;

use crate::store::StoreError;

pub(super) enum Failure {
    /// Not the GPU's fault: the CPU would fail too.
    Store(StoreError),
    Gpu(String),
}

impl Failure {
    /// For `map_err` of what a GPU did.
    pub(super) fn gpu(error: impl Display) -> Failure {
        Failure::Gpu(error.to_string())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure::Store(error)
    }
}
