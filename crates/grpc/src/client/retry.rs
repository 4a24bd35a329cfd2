//! What is tried again, how often, how long apart.

use std::time::Duration;

use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::connect::ClientOptions;
use crate::wire::from_status;
use landmarkdb::{MemoryError, Result};

/// Longest pause between two attempts: a service restarts in seconds.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Whether doing a call twice is doing it once.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Repeat {
    Yes,
    No,
}

/// How calls are made: to whom, and how patiently.
#[derive(Clone, Copy)]
pub(super) struct Patience<'a> {
    pub(super) target: &'a str,
    pub(super) options: &'a ClientOptions,
}

impl Patience<'_> {
    /// A call of one request and one reply, within the deadline as a whole.
    pub(super) async fn call<M: Clone, R>(
        &self,
        repeat: Repeat,
        message: M,
        send: impl AsyncFn(Request<M>) -> std::result::Result<Response<R>, Status>,
    ) -> Result<R> {
        let attempt = async |left: Duration| {
            let mut request = Request::new(message.clone());
            // The service drops what it cannot answer in time.
            request.set_timeout(left);
            let reply = send(request).await.map_err(|status| self.error(&status))?;
            Ok(reply.into_inner())
        };
        self.within(repeat, attempt).await
    }

    /// Attempts, each told how much of the deadline is left.
    pub(super) async fn within<R>(&self, repeat: Repeat, attempt: impl AsyncFn(Duration) -> Result<R>) -> Result<R> {
        let end = Instant::now().checked_add(self.options.deadline);
        let left = || end.map_or(self.options.deadline, |end| end.saturating_duration_since(Instant::now()));
        let mut backoff = Backoff::new(self.options);
        loop {
            let error = match tokio::time::timeout(left(), attempt(left())).await {
                Ok(Ok(reply)) => return Ok(reply),
                // The service counts what was left of the deadline when the call was sent; the caller set all of it.
                Err(_) | Ok(Err(MemoryError::DeadlineExceeded { .. })) => return Err(self.late()),
                Ok(Err(error)) => error,
            };
            match backoff.next(&error) {
                Some(pause) if repeat == Repeat::Yes && pause < left() => tokio::time::sleep(pause).await,
                _ => return Err(error),
            }
        }
    }

    /// A call of many messages. `attempt` bounds each of its steps with [`step`](Self::step), and says whether it got
    /// anywhere: then the count of attempts begins anew.
    pub(super) async fn stream<R>(&self, mut attempt: impl AsyncFnMut(&mut bool) -> Result<R>) -> Result<R> {
        let mut backoff = Backoff::new(self.options);
        loop {
            let mut progressed = false;
            let error = match attempt(&mut progressed).await {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            if progressed {
                backoff = Backoff::new(self.options);
            }
            match backoff.next(&error) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(error),
            }
        }
    }

    /// One message of a stream, within the deadline.
    pub(super) async fn step<T>(&self, future: impl Future<Output = std::result::Result<T, Status>>) -> Result<T> {
        let answer = tokio::time::timeout(self.options.deadline, future).await.map_err(|_| self.late())?;
        answer.map_err(|status| self.error(&status))
    }

    /// A stream that ended before it said everything: its server went away in good order.
    pub(super) fn cut_short(&self) -> MemoryError {
        MemoryError::Unavailable { target: self.target.into(), detail: "the stream ended early".into() }
    }

    fn deadline_ms(&self) -> u64 {
        self.options.deadline.as_millis().min(u64::MAX as u128) as u64
    }

    fn late(&self) -> MemoryError {
        MemoryError::DeadlineExceeded { ms: self.deadline_ms() }
    }

    pub(super) fn error(&self, status: &Status) -> MemoryError {
        from_status(status, self.target, self.deadline_ms())
    }
}

/// Pauses that double, each shortened at random so that many clients of one service do not come back together.
struct Backoff {
    next: Duration,
    attempts_left: u32,
}

impl Backoff {
    fn new(options: &ClientOptions) -> Self {
        Backoff { next: options.backoff, attempts_left: options.attempts.saturating_sub(1) }
    }

    /// How long to wait after `error`, at least as long as it asks for; none if it would come again or was seen too often.
    fn next(&mut self, error: &MemoryError) -> Option<Duration> {
        let least = match error {
            MemoryError::Unavailable { .. } => Duration::ZERO,
            MemoryError::Busy { retry_ms, .. } => Duration::from_millis(*retry_ms).min(BACKOFF_MAX),
            _ => return None,
        };
        self.attempts_left = self.attempts_left.checked_sub(1)?;
        let pause = self.next.min(BACKOFF_MAX);
        self.next = pause.saturating_mul(2);
        Some(least + pause.mul_f64(rand::random_range(0.5..=1.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_within_bounds_and_end() {
        let options = ClientOptions { attempts: 12, backoff: Duration::from_millis(100), ..ClientOptions::default() };
        let gone = MemoryError::Unavailable { target: String::new(), detail: String::new() };
        let mut backoff = Backoff::new(&options);
        let mut full = Duration::from_millis(100);
        for _ in 1..12 {
            let pause = backoff.next(&gone).unwrap();
            assert!(pause >= full.mul_f64(0.499) && pause <= full, "{pause:?} of {full:?}");
            full = (full * 2).min(BACKOFF_MAX);
        }
        assert_eq!(backoff.next(&gone), None);
        let busy = MemoryError::Busy { what: String::new(), retry_ms: 700 };
        assert!(
            Backoff::new(&options).next(&busy).unwrap() >= Duration::from_millis(750),
            "no sooner than it was told"
        );
        let refused = MemoryError::Missing { field: String::new() };
        assert_eq!(Backoff::new(&options).next(&refused), None, "a refusal comes again");
    }
}
