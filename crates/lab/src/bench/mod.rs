//! How fast is it here?

mod percentile;
mod readable;

pub use percentile::percentile;
pub use readable::{count, plural, size};
