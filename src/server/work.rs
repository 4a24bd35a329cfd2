//! The one place where calls meet the memory: bounded, off the network threads, within their deadline.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Response, Status};

use crate::api::{BlockMemory, MemoryError, Result};
use crate::wire::to_status;

/// Verify and delete read or rewrite whole documents: more of them at once would only fight for the disk.
const MAINTENANCE_WORKERS: usize = 2;

/// Which line a call stands in, so that a verification of hours holds up no lookup.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Line {
    Serving,
    Maintenance,
}

/// The memory, and the right to use it. Clones share it.
#[derive(Clone)]
pub(super) struct Work {
    memory: Arc<dyn BlockMemory>,
    serving: Arc<Semaphore>,
    maintenance: Arc<Semaphore>,
    workers: u32,
    stopped: watch::Receiver<bool>,
}

/// Until when an answer is of use to the caller.
#[derive(Clone, Copy)]
pub(super) struct Deadline {
    end: Option<Instant>,
    ms: u64,
}

impl Deadline {
    /// For streams of large messages, whose callers stop reading when they lose patience.
    pub(super) const NONE: Deadline = Deadline { end: None, ms: 0 };

    /// From the `grpc-timeout` header; absent, or in no form that gRPC knows, means none.
    pub(super) fn of(metadata: &MetadataMap) -> Self {
        let header = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
        header.and_then(parse_timeout).map_or(Deadline::NONE, Deadline::after)
    }

    /// From the `timeout_ms` field of a stream's request; 0 means none.
    pub(super) fn of_ms(timeout_ms: u64) -> Self {
        if timeout_ms == 0 { Deadline::NONE } else { Deadline::after(Duration::from_millis(timeout_ms)) }
    }

    /// A time too long for a clock is none.
    fn after(timeout: Duration) -> Self {
        Deadline { end: Instant::now().checked_add(timeout), ms: timeout.as_millis() as u64 }
    }

    fn check(self) -> Result<()> {
        match self.end {
            Some(end) if Instant::now() >= end => Err(MemoryError::DeadlineExceeded { ms: self.ms }),
            _ => Ok(()),
        }
    }

    /// What `future` gives, unless time runs out first.
    async fn bound<T>(self, future: impl Future<Output = T>) -> Result<T> {
        match self.end {
            None => Ok(future.await),
            Some(end) => {
                let late = |_| MemoryError::DeadlineExceeded { ms: self.ms };
                tokio::time::timeout_at(end, future).await.map_err(late)
            }
        }
    }
}

impl Work {
    pub(super) fn new(memory: Arc<dyn BlockMemory>, workers: usize, stopped: watch::Receiver<bool>) -> Self {
        let workers = workers.clamp(1, 1 << 16);
        Work {
            memory,
            serving: Arc::new(Semaphore::new(workers)),
            maintenance: Arc::new(Semaphore::new(MAINTENANCE_WORKERS)),
            workers: workers as u32,
            stopped,
        }
    }

    /// Runs `job` on a thread that may block. A job whose deadline passes before its turn is not started; one that has
    /// started is finished even if nobody waits for it any more.
    pub(super) async fn run<R: Send + 'static>(
        &self,
        line: Line,
        deadline: Deadline,
        job: impl FnOnce(&dyn BlockMemory) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let (sender, answer) = oneshot::channel();
        // Who does not wait any more has no use for the answer.
        self.hand_over(line, deadline, job, |answer| drop(sender.send(answer))).await;
        let gone = |_| Err(MemoryError::Internal { detail: "a worker gave no answer".into() });
        deadline.bound(answer).await?.unwrap_or_else(gone)
    }

    /// As [`run`](Self::run), but `answer` takes the outcome on the thread that worked, which saves the way back to this
    /// one; returns when the job has its turn.
    pub(super) async fn hand_over<R: Send + 'static>(
        &self,
        line: Line,
        deadline: Deadline,
        job: impl FnOnce(&dyn BlockMemory) -> Result<R> + Send + 'static,
        answer: impl FnOnce(Result<R>) + Send + 'static,
    ) {
        let semaphore = match line {
            Line::Serving => &self.serving,
            Line::Maintenance => &self.maintenance,
        };
        let permit = match deadline.bound(semaphore.clone().acquire_owned()).await {
            Ok(permit) => permit,
            Err(error) => return answer(Err(error)),
        };
        let memory = self.memory.clone();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let work = || deadline.check().and_then(|()| job(&*memory));
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
        line: Line,
        deadline: Deadline,
        job: impl FnOnce(&dyn BlockMemory) -> Result<R> + Send + 'static,
    ) -> std::result::Result<Response<M>, Status>
    where
        R: Into<M> + Send + 'static,
    {
        let answer = self.run(line, deadline, job).await;
        answer.map(|reply| Response::new(reply.into())).map_err(|error| to_status(&error))
    }

    /// Completes when the service is told to stop.
    pub(super) async fn stopped(&self) {
        // An error means that the service itself is gone.
        let _ = self.stopped.clone().wait_for(|stopped| *stopped).await;
    }

    /// Completes when no job is running.
    pub(super) async fn finished(&self) {
        // Semaphores are never closed, so acquiring cannot fail.
        let _ = self.serving.acquire_many(self.workers).await;
        let _ = self.maintenance.acquire_many(MAINTENANCE_WORKERS as u32).await;
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

/// `grpc-timeout`: up to 8 digits and a unit.
fn parse_timeout(header: &str) -> Option<Duration> {
    let (digits, unit) = header.split_at_checked(header.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        for (header, expected_ns) in [
            ("1H", Some(3_600_000_000_000)),
            ("2M", Some(120_000_000_000)),
            ("3S", Some(3_000_000_000)),
            ("4m", Some(4_000_000)),
            ("5u", Some(5_000)),
            ("99999999n", Some(99_999_999)),
            ("100000000n", None),
            ("", None),
            ("S", None),
            ("-1S", None),
            ("+1S", None),
            ("1s", None),
            ("1ä", None),
        ] {
            assert_eq!(parse_timeout(header).map(|timeout| timeout.as_nanos()), expected_ns, "{header:?}");
        }
    }
}
