//! Lookups and attention on a GPU, for collections of the engine `cuda`. Keys and pieces lie in its memory as copies of
//! what the CPU has and the store keeps; what it cannot do, or fails at, the CPU does.
//!
//! In reading order: `failure`, `pages` (which pieces lie there), `attend` (the tables that the kernels read), `streams`.

mod attend;
mod failure;
mod pages;
mod streams;

pub use streams::GPU_CACHE_BYTES;
pub(super) use streams::Gpu;
