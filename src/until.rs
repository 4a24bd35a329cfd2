//! When is an answer no longer wanted?

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a caller waits for an answer: a deadline, and flags that say that the caller has left. Long work checks it
/// between steps and ends once it is over.
#[derive(Clone, Debug, Default)]
pub struct Until {
    end: Option<Instant>,
    timeout_ms: u64,
    /// Each set once its owner has lost interest.
    given_up: Vec<Arc<AtomicBool>>,
}

impl Until {
    /// No deadline and no flag, for callers that wait as long as it takes.
    pub const FOREVER: Until = Until { end: None, timeout_ms: 0, given_up: Vec::new() };

    /// A deadline `timeout` from now. One beyond the range of the clock never passes.
    pub fn after(timeout: Duration) -> Until {
        let end = Instant::now().checked_add(timeout);
        Until { end, timeout_ms: timeout.as_millis().min(u64::MAX as u128) as u64, given_up: Vec::new() }
    }

    /// Ends also once `flag` is set. A flag must stay set.
    pub fn or_given_up(mut self, flag: Arc<AtomicBool>) -> Until {
        self.given_up.push(flag);
        self
    }

    /// Whether it has neither deadline nor flag.
    pub fn is_forever(&self) -> bool {
        self.end.is_none() && self.given_up.is_empty()
    }

    /// The deadline, where there is one.
    pub fn end(&self) -> Option<Instant> {
        self.end
    }

    /// The timeout that the caller gave, in milliseconds; 0 for none.
    pub fn timeout_ms(&self) -> u64 {
        self.timeout_ms
    }

    /// Whether the deadline has passed.
    pub fn is_late(&self) -> bool {
        self.end.is_some_and(|end| Instant::now() >= end)
    }

    /// Whether a flag is set: the caller has left.
    pub fn is_given_up(&self) -> bool {
        self.given_up.iter().any(|flag| flag.load(Ordering::Relaxed))
    }

    /// Whether the deadline has passed or the caller has left. Once true, it stays true.
    pub fn is_over(&self) -> bool {
        self.is_given_up() || self.is_late()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_with_its_time_or_with_any_of_its_callers() {
        assert!(!Until::FOREVER.is_over());
        assert!(!Until::after(Duration::MAX).is_over(), "too long for a clock");
        assert!(Until::after(Duration::ZERO).is_late());
        let flags = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let [a, b] = flags.clone();
        let until = Until::after(Duration::from_secs(3600)).or_given_up(a).or_given_up(b);
        assert!(!until.is_over());
        flags[1].store(true, Ordering::Relaxed);
        assert!(until.is_over() && until.is_given_up() && !until.is_late());
        assert_eq!(until.timeout_ms(), 3_600_000);
    }
}
