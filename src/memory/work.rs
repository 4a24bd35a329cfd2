//! Where is a request worked on, and with whose bytes?

use std::sync::{Arc, OnceLock};

use rayon::ThreadPool;

use crate::api::{LookupRequest, MemoryError, Result};
use crate::budget::{Budget, Short, Taken};
use crate::limits;
use crate::until::Until;

/// Bytes that all lookups and attends together may work with, unless told otherwise: some prefill chunks of a large model over
/// a million tokens.
pub const WORK_BYTES: u64 = 512 << 20;

/// When a caller may try again that found no memory left: some requests later.
const RETRY_MS: u64 = 100;

/// Takes what work needs, before it begins. Callers in the process wait for their turn; one that may go away is told to
/// come back.
pub(super) fn take(budget: &Arc<Budget>, bytes: u64, until: &Until) -> Result<Taken> {
    let taken = if until.is_forever() { budget.take(bytes, until) } else { budget.try_take(bytes) };
    let what =
        "bytes of working memory (scores of query tokens x query heads x eligible blocks, hits, rotated queries)";
    taken.map_err(|short| match short {
        Short::Never { limit } => MemoryError::LimitExceeded { what: what.into(), limit, found: bytes },
        Short::Now => MemoryError::Busy { what: "working memory".into(), retry_ms: RETRY_MS },
    })
}

/// Runs `job` where it delays no light call: heavy work has threads of its own, and the machine shares the cores.
/// Queued behind heavy work in one pool, a decode step would wait for all of it.
pub(super) fn run<R: Send>(requests: &[&LookupRequest], job: impl FnOnce() -> R + Send) -> R {
    static HEAVY: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let weight = requests.iter().fold(0u64, |sum, request| sum.saturating_add(request.weight()));
    if weight <= limits::LIGHT_WEIGHT_MAX {
        return job();
    }
    // Without threads of its own it runs where all does.
    let named = || rayon::ThreadPoolBuilder::new().thread_name(|i| format!("heavy-{i}")).build().ok();
    match HEAVY.get_or_init(named) {
        Some(pool) => pool.install(job),
        None => job(),
    }
}
