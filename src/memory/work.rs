//! What does a request need while it is worked on, and where is it worked on?

use std::sync::OnceLock;

use rayon::ThreadPool;

use super::LocalMemory;
use super::lookup::Plan;
use crate::api::{LookupRequest, MemoryError, Result};
use crate::budget::{Short, Taken};
use crate::limits;
use crate::types::Granularity;
use crate::until::Until;

/// Bytes that all lookups and attends together may work with, unless told otherwise: some prefill chunks of a large model over
/// a million tokens.
pub const WORK_BYTES: u64 = 512 << 20;

/// Bytes that the scores of some query tokens should take at once, if tokens choose for themselves. Between such parts work
/// can end, and other work gets its turn.
pub(super) const PART_BYTES: u64 = 64 << 20;

/// Or, of a small budget, this share.
pub(super) const PART_SHARE: u64 = 8;

/// Query tokens of a part are a multiple of this, where they are that many: the index packs so many rows together.
const PART_TOKENS: u64 = 16;

/// Bytes of one hit: block and score in the answer, and the same on the wire.
const HIT_BYTES: u64 = 40;

/// Bytes of one hit while it is searched and attended to: position, score, row and slot.
const USE_BYTES: u64 = 20;

/// Copies of a turned query: turned, in the order of KV heads, packed.
const TURNED_COPIES: u64 = 3;

/// Copies of the attention's output: one for each of at most four tasks per KV head, their sum, the answer, its message.
const OUT_COPIES: u64 = 7;

/// When a caller may try again that found no memory left: some requests later.
const RETRY_MS: u64 = 100;

/// Whether the chosen blocks are attended to.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Then {
    Answer,
    Attend,
}

/// Bytes that one request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Need {
    /// Until the answer is there.
    pub(super) working: u64,
    /// For the answer.
    pub(super) answer: u64,
}

impl Plan<'_> {
    pub(super) fn need(&self, then: Then) -> Need {
        let (request, shape, geometry) = (self.request, &self.collection.spec.shape, &self.geometry);
        let tokens = request.distances.len() as u64;
        let (heads, dim, numbers) = (shape.query_heads as u64, shape.head_dim as u64, request.queries.len() as u64);
        let rows = request.granularity.rows(tokens as usize, heads as usize, shape.kv_heads as usize) as u64;
        let hits = geometry.k as u64;
        let turn_bytes = 8 * shape.rope.frequencies.len() as u64 + 64;
        let mut need = Need {
            working: self.token_bytes() * self.tokens_at_once() as u64
                + rows * hits * USE_BYTES
                + geometry.turns_max(&request.distances) * turn_bytes,
            answer: rows * hits * HIT_BYTES,
        };
        if then == Then::Attend {
            need.working += tokens * heads * hits * USE_BYTES;
            need.answer += (numbers + numbers / dim) * 4 * OUT_COPIES;
        }
        need
    }

    /// Query tokens that are scored at once. All, if they choose together.
    pub(super) fn tokens_at_once(&self) -> usize {
        let tokens = self.request.distances.len();
        match self.request.granularity {
            Granularity::Head | Granularity::Shared => tokens,
            Granularity::TokenHead | Granularity::Token | Granularity::KvGroup => {
                let fit = self.part_bytes / self.token_bytes().max(1);
                let whole = if fit < PART_TOKENS { fit } else { fit / PART_TOKENS * PART_TOKENS };
                (whole as usize).clamp(1, tokens)
            }
        }
    }

    /// Bytes to score one query token with: a score for every eligible block, its queries turned for every slot.
    fn token_bytes(&self) -> u64 {
        let shape = &self.collection.spec.shape;
        let turned = (self.geometry.recent as u64 + 1) * shape.head_dim as u64 * TURNED_COPIES;
        shape.query_heads as u64 * 4 * (self.geometry.eligible as u64 + turned)
    }
}

impl LocalMemory {
    /// Takes what work needs, before it begins. Callers in the process wait for their turn; one that may go away is told to
    /// come back.
    pub(super) fn take(&self, bytes: u64, until: &Until) -> Result<Taken> {
        let taken = if until.is_forever() { self.work.take(bytes, until) } else { self.work.try_take(bytes) };
        let what =
            "bytes of working memory (scores of query tokens x query heads x eligible blocks, hits, turned queries)";
        taken.map_err(|short| match short {
            Short::Never { limit } => MemoryError::LimitExceeded { what: what.into(), limit, found: bytes },
            Short::Now => MemoryError::Busy { what: "working memory".into(), retry_ms: RETRY_MS },
        })
    }
}

/// Runs `job` where it stands in the way of nobody: heavy work has threads of its own, and the machine shares the cores.
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
