//! The one place where calls meet the memory: bounded, off the network threads, as long as the answer is wanted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Semaphore, oneshot, watch};
use tonic::{Request, Response, Status};

use super::call::{self, Call};
use super::phase::Phase;
use crate::wire::to_status;
use landmarkdb::budget::{Budget, Taken};
use landmarkdb::limits;
use landmarkdb::{BlockMemory, LookupRequest, MemoryError, Result, Until};

/// Verifications read everything, and measurements want to be alone: more of them at once would only fight for the machine.
const VERIFY_WORKERS: usize = 2;

/// Most light calls at once ([`ServeOptions::workers`](super::ServeOptions::workers)): threads that may wait for a disk or a lock
/// are cheap, but not without end.
pub const WORKERS_MAX: usize = 128;

/// Which line a call stands in, so that none waits for calls of another kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Line {
    /// What is answered in milliseconds.
    Light,
    /// Lookups and attends over much: half as many workers, so that the light ones always have some.
    Heavy,
    /// What waits for the one who writes.
    Writing,
    /// Verifying and tuning: what takes minutes or hours.
    Verifying,
}

/// The memory, and the right to use it. Clones share it.
#[derive(Clone)]
pub(super) struct Work {
    memory: Arc<dyn BlockMemory>,
    lines: Arc<Lines>,
    pub(super) messages: Arc<Budget>,
    /// Set when no caller waits any more.
    is_over: Arc<AtomicBool>,
    phase: watch::Receiver<Phase>,
}

/// Who may work now, and how many may in all.
struct Lines {
    light: Workers,
    heavy: Workers,
    writing: Workers,
    verifying: Workers,
}

struct Workers {
    free: Arc<Semaphore>,
    all: u32,
}

impl Workers {
    fn new(count: usize) -> Workers {
        Workers { free: Arc::new(Semaphore::new(count)), all: count as u32 }
    }
}

/// What a job brings along to its line.
pub(super) struct Ticket {
    pub(super) line: Line,
    pub(super) until: Until,
    /// Bytes of the message that it was asked in, held until it is done.
    pub(super) message: Option<Taken>,
}

impl Ticket {
    /// For a call of one request.
    pub(super) fn of<T>(line: Line, request: &Request<T>) -> Ticket {
        let call = Call::of(request);
        Ticket { line, until: call.until(request), message: call.take_message() }
    }

    /// The same, in the line for what the lookups weigh.
    pub(super) fn weighed<'a>(self, lookups: impl IntoIterator<Item = &'a LookupRequest>) -> Ticket {
        let weight = lookups.into_iter().fold(0u64, |sum, lookup| sum.saturating_add(lookup.weight()));
        let line = if weight <= limits::LIGHT_WEIGHT_MAX { Line::Light } else { Line::Heavy };
        Ticket { line, ..self }
    }
}

impl Work {
    pub(super) fn new(
        memory: Arc<dyn BlockMemory>,
        workers: usize,
        messages: Arc<Budget>,
        phase: watch::Receiver<Phase>,
    ) -> Self {
        let workers = workers.clamp(1, WORKERS_MAX);
        let lines = Arc::new(Lines {
            light: Workers::new(workers),
            heavy: Workers::new(workers.div_ceil(2)),
            writing: Workers::new(workers),
            verifying: Workers::new(VERIFY_WORKERS),
        });
        Work { memory, lines, messages, is_over: Arc::default(), phase }
    }

    /// Runs `job` on a thread that may block. A job whose time is over before its turn is not started; one that has
    /// started ends when it notices.
    pub(super) async fn run<R: Send + 'static>(
        &self,
        ticket: Ticket,
        job: impl FnOnce(&dyn BlockMemory, &Until) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let (sender, answer) = oneshot::channel();
        let until = ticket.until.clone();
        // The receiver may be gone; that is fine.
        self.hand_over(ticket, job, |answer| drop(sender.send(answer))).await;
        let gone = |_| Err(MemoryError::Internal { detail: "a worker gave no answer".into() });
        call::within(&until, answer).await?.unwrap_or_else(gone)
    }

    /// As [`run`](Self::run), but `answer` takes the outcome on the thread that worked, which saves the way back to this
    /// one; returns when it is the job's turn.
    pub(super) async fn hand_over<R: Send + 'static>(
        &self,
        ticket: Ticket,
        job: impl FnOnce(&dyn BlockMemory, &Until) -> Result<R> + Send + 'static,
        answer: impl FnOnce(Result<R>) + Send + 'static,
    ) {
        let Ticket { line, until, message } = ticket;
        let permit = match call::within(&until, self.line(line).acquire_owned()).await {
            Ok(permit) => permit,
            Err(error) => return answer(Err(error)),
        };
        let until = until.or_given_up(self.is_over.clone());
        let memory = self.memory.clone();
        tokio::task::spawn_blocking(move || {
            let _held = (permit, message);
            let work = || until.check().and_then(|()| job(&*memory, &until));
            // Nothing that a panic leaves half done is seen again: the memory's own locks say so themselves.
            let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
                Err(MemoryError::Internal { detail: "a worker panicked: its log says where".into() })
            });
            answer(outcome.inspect_err(log));
        });
    }

    /// `run` for calls of one request and one reply.
    pub(super) async fn reply<R, M>(
        &self,
        ticket: Ticket,
        job: impl FnOnce(&dyn BlockMemory, &Until) -> Result<R> + Send + 'static,
    ) -> std::result::Result<Response<M>, Status>
    where
        R: Into<M> + Send + 'static,
    {
        let answer = self.run(ticket, job).await;
        answer.map(|reply| Response::new(reply.into())).map_err(|error| to_status(&error))
    }

    /// Completes when the service is told to stop.
    pub(super) async fn stopped(&self) {
        // An error means that the service itself is gone.
        let _ = self.phase.clone().wait_for(|phase| *phase != Phase::Serving).await;
    }

    /// Completes when no job is running.
    pub(super) async fn finished(&self) {
        let Lines { light, heavy, writing, verifying } = &*self.lines;
        for workers in [light, heavy, writing, verifying] {
            // Semaphores are never closed, so acquiring cannot fail.
            let _ = workers.free.acquire_many(workers.all).await;
        }
    }

    /// Cancels all jobs.
    pub(super) fn give_up(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    fn line(&self, line: Line) -> Arc<Semaphore> {
        let workers = match line {
            Line::Light => &self.lines.light,
            Line::Heavy => &self.lines.heavy,
            Line::Writing => &self.lines.writing,
            Line::Verifying => &self.lines.verifying,
        };
        workers.free.clone()
    }
}

/// What a stream's caller is told when the service stops.
pub(super) fn stopping() -> MemoryError {
    MemoryError::Unavailable { target: "the service".into(), detail: "it is shutting down".into() }
}

/// Refusals are the caller's business; damage and failed storage are the operator's.
pub(super) fn log(error: &MemoryError) {
    if matches!(error, MemoryError::DataLoss { .. } | MemoryError::Storage { .. } | MemoryError::Internal { .. }) {
        tracing::error!(%error, "a call failed");
    }
}
