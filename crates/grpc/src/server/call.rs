//! Who waits for an answer, and what do they hold? What every call brings along from its connection to its work.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tonic::Request;

use super::peer::{Peer, Resting};
use landmarkdb::budget::{Budget, Short, Taken};
use landmarkdb::lock::IgnorePoison;
use landmarkdb::{MemoryError, Result, Until};

/// When to come again for a caller that found all memory for messages in use: some messages later.
const RETRY_MS: u64 = 100;

/// How often a caller that waits for memory looks again.
const LOOK: Duration = Duration::from_millis(10);

/// One call. Clones are the same call.
#[derive(Clone, Debug, Default)]
pub(super) struct Call {
    /// Set when its reply is no longer read.
    gone: Arc<AtomicBool>,
    /// Bytes of the messages that have arrived and were not asked for yet, in their order.
    messages: Arc<Mutex<VecDeque<Taken>>>,
    /// Whose it is, where that matters.
    peer: Option<Arc<Peer>>,
}

impl From<Arc<Peer>> for Call {
    fn from(peer: Arc<Peer>) -> Self {
        Call { peer: Some(peer), ..Call::default() }
    }
}

/// Ends with a call's reply, however that ends.
pub(super) struct Open(Arc<AtomicBool>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Call {
    /// The call that a request belongs to.
    pub(super) fn of<T>(request: &Request<T>) -> Call {
        request.extensions().get::<Call>().cloned().unwrap_or_default()
    }

    /// Held as long as the reply is read.
    pub(super) fn open(&self) -> Open {
        Open(self.gone.clone())
    }

    /// Ends when the caller hangs up, or at the deadline in the `grpc-timeout` header; absent, or in no form that gRPC
    /// knows, it means none.
    pub(super) fn until<T>(&self, request: &Request<T>) -> Until {
        let header = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok());
        header.and_then(parse_timeout).map_or(Until::FOREVER, Until::after).or_given_up(self.gone.clone())
    }

    /// The same for a request of a stream, from its `timeout_ms`; 0 means none.
    pub(super) fn until_ms(&self, timeout_ms: u64) -> Until {
        let until = if timeout_ms == 0 { Until::FOREVER } else { Until::after(Duration::from_millis(timeout_ms)) };
        until.or_given_up(self.gone.clone())
    }

    /// Its stream waits for the next request, and owes no answer, as long as this is held.
    pub(super) fn rest(&self) -> Option<Resting> {
        self.peer.as_ref().map(Peer::rest)
    }

    /// Bytes of a message have come.
    pub(super) fn moved(&self) {
        if let Some(peer) = &self.peer {
            peer.moved();
        }
    }

    /// Bytes of a message that is whole now.
    pub(super) fn hold(&self, message: Taken) {
        self.messages().push_back(message);
    }

    /// Bytes of the message that was read last; to be held as long as it is.
    pub(super) fn take_message(&self) -> Option<Taken> {
        self.messages().pop_front()
    }

    fn messages(&self) -> std::sync::MutexGuard<'_, VecDeque<Taken>> {
        self.messages.lock().ignore_poison()
    }
}

/// The refusal of a call for whose messages there is no memory.
pub(super) fn no_memory(short: Short, found: u64) -> MemoryError {
    match short {
        Short::Never { limit } => MemoryError::LimitExceeded { what: "bytes of messages".into(), limit, found },
        Short::Now => MemoryError::Busy { what: "memory for messages".into(), retry_ms: RETRY_MS },
    }
}

/// Waits for so many bytes, as long as the caller does. A call that holds none yet blocks no other.
pub(super) async fn take(budget: &Arc<Budget>, bytes: u64, until: &Until) -> Result<Taken> {
    loop {
        match budget.try_take(bytes.min(budget.limit())) {
            Ok(taken) => return Ok(taken),
            Err(_) => until.check()?,
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What `future` gives, unless time runs out first.
pub(super) async fn within<T>(until: &Until, future: impl Future<Output = T>) -> Result<T> {
    match until.end() {
        None => Ok(future.await),
        Some(end) => {
            let late = |_| MemoryError::DeadlineExceeded { ms: until.timeout_ms() };
            tokio::time::timeout_at(end.into(), future).await.map_err(late)
        }
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

    #[test]
    fn a_call_is_over_when_its_reply_is() {
        let call = Call::default();
        let (open, until) = (call.open(), call.until_ms(0));
        assert!(!until.is_over());
        drop(open);
        assert!(until.is_over() && call.until(&Request::new(())).is_over());
    }
}
