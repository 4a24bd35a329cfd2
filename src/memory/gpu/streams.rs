//! Which GPU answers, and does it? Each call works on a stream of its own; where none can, the CPU answers.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use super::attend;
use super::failure::Failure;
use super::pages::Pages;
use crate::api::MemoryError;
use crate::cuda::{Device, PartialAttention, Runner};
use crate::index::{self, Found, Query};
use crate::lock::IgnorePoison;
use crate::memory::plan::AttendPlan;
use crate::store::Store;
use crate::types::DocumentId;

/// Bytes of blocks' K and V that are kept in a GPU's memory, unless told otherwise: a share of the smallest GPUs.
pub const GPU_CACHE_BYTES: u64 = 2 << 30;

/// The GPU of this machine, opened when it is first asked for.
pub(in crate::memory) struct Gpu {
    cache_bytes: u64,
    opened: OnceLock<Opened>,
    /// Whether the warning that the CPU answers was logged.
    warned: AtomicBool,
}

/// Or why there is none.
type Opened = Result<Box<dyn Answers>, String>;

/// What a GPU does. [`Streams`] hides which kind of runner it works with.
trait Answers: Send + Sync {
    fn search(&self, query: &Query<'_>) -> Result<Found, Failure>;

    fn attend(&self, store: &Store, plan: &AttendPlan<'_>, found: &Found) -> Result<PartialAttention, Failure>;

    fn forget(&self, documents: &HashSet<DocumentId>);
}

/// A GPU's streams, one for each call at a time, and what lies in its memory.
struct Streams<R: Runner> {
    open: Box<dyn Fn() -> Result<R, R::Error> + Send + Sync>,
    idle: Mutex<Vec<R>>,
    pages: Pages<R::Memory>,
}

impl Gpu {
    /// Keeps at most so many bytes of pages.
    pub(in crate::memory) fn of_machine(cache_bytes: u64) -> Gpu {
        Gpu { cache_bytes, opened: OnceLock::new(), warned: AtomicBool::new(false) }
    }

    /// In place of the machine's. `open` gives a runner for each call at a time.
    pub(in crate::memory) fn over<R: Runner + Send + 'static>(
        open: impl Fn() -> Result<R, R::Error> + Send + Sync + 'static,
        cache_bytes: u64,
    ) -> Gpu {
        Gpu { opened: OnceLock::from(Ok(streams(open, cache_bytes))), ..Gpu::of_machine(cache_bytes) }
    }

    /// Whether it can be used; if not, why.
    pub(in crate::memory) fn check(&self) -> Result<(), &str> {
        self.opened().map(drop)
    }

    /// Chooses blocks, if it can.
    pub(in crate::memory) fn search(&self, query: &Query<'_>) -> Result<Option<Found>, MemoryError> {
        if !index::cuda::is_supported(query) {
            return Ok(None);
        }
        self.ask(|gpu| gpu.search(query))
    }

    /// Attends to the blocks that were found, if it can.
    pub(in crate::memory) fn attend(
        &self,
        store: &Store,
        plan: &AttendPlan<'_>,
        found: &Found,
    ) -> Result<Option<PartialAttention>, MemoryError> {
        if !attend::page_layout(plan).is_supported() {
            return Ok(None);
        }
        self.ask(|gpu| gpu.attend(store, plan, found))
    }

    /// Gives back what the pages of some documents take.
    pub(in crate::memory) fn forget(&self, documents: &HashSet<DocumentId>) {
        if let Some(Ok(gpu)) = self.opened.get() {
            gpu.forget(documents);
        }
    }

    fn opened(&self) -> Result<&dyn Answers, &str> {
        let opened = self.opened.get_or_init(|| {
            let device = Device::open(0).map_err(|error| error.to_string())?;
            Ok(streams(move || device.session(), self.cache_bytes))
        });
        opened.as_deref().map_err(String::as_str)
    }

    /// The answer; nothing where the CPU has to give it.
    fn ask<T>(&self, ask: impl FnOnce(&dyn Answers) -> Result<T, Failure>) -> Result<Option<T>, MemoryError> {
        let why = match self.opened().map(ask) {
            Ok(Ok(answer)) => return Ok(Some(answer)),
            Ok(Err(Failure::Store(error))) => return Err(error.into()),
            Ok(Err(Failure::Gpu(why))) => why,
            Err(why) => why.into(),
        };
        // Once is enough to act on; after it every call might say so.
        if self.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(%why, "the GPU does not answer");
        } else {
            tracing::warn!(%why, "the GPU does not answer: collections of the engine cuda are answered by the CPU");
        }
        Ok(None)
    }
}

fn streams<R: Runner + Send + 'static>(
    open: impl Fn() -> Result<R, R::Error> + Send + Sync + 'static,
    cache_bytes: u64,
) -> Box<dyn Answers> {
    Box::new(Streams { open: Box::new(open), idle: Mutex::default(), pages: Pages::new(cache_bytes) })
}

impl<R: Runner> Streams<R> {
    /// Works on a stream of its own. One that failed is not used again.
    fn on_one<T>(&self, work: impl FnOnce(&R) -> Result<T, Failure>) -> Result<T, Failure> {
        let idle = || self.idle.lock().ignore_poison();
        let last_used = idle().pop();
        let runner = match last_used {
            Some(runner) => runner,
            None => (self.open)().map_err(Failure::gpu)?,
        };
        let done = work(&runner)?;
        idle().push(runner);
        Ok(done)
    }
}

impl<R: Runner + Send> Answers for Streams<R> {
    fn search(&self, query: &Query<'_>) -> Result<Found, Failure> {
        self.on_one(|runner| index::cuda::search(runner, query).map_err(Failure::gpu))
    }

    fn attend(&self, store: &Store, plan: &AttendPlan<'_>, found: &Found) -> Result<PartialAttention, Failure> {
        self.on_one(|runner| attend::attend(runner, &self.pages, store, plan, found))
    }

    fn forget(&self, documents: &HashSet<DocumentId>) {
        self.pages.forget(documents);
    }
}
