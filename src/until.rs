//! Until when is an answer of use to somebody?

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Until when somebody waits for an answer. Work that takes long looks at it between its steps, and ends when it is over.
#[derive(Clone, Debug, Default)]
pub struct Until {
    end: Option<Instant>,
    timeout_ms: u64,
    /// Each set once its owner has lost interest.
    given_up: Vec<Arc<AtomicBool>>,
}

impl Until {
    /// For callers that wait as long as it takes.
    pub const FOREVER: Until = Until { end: None, timeout_ms: 0, given_up: Vec::new() };

    /// A time too long for a clock is forever.
    pub fn after(timeout: Duration) -> Until {
        let end = Instant::now().checked_add(timeout);
        Until { end, timeout_ms: timeout.as_millis().min(u64::MAX as u128) as u64, given_up: Vec::new() }
    }

    /// Ends when `flag` is set, too.
    pub fn or_given_up(mut self, flag: Arc<AtomicBool>) -> Until {
        self.given_up.push(flag);
        self
    }

    /// Whether nothing ends it.
    pub fn is_forever(&self) -> bool {
        self.end.is_none() && self.given_up.is_empty()
    }

    /// When time runs out, if it does.
    pub fn end(&self) -> Option<Instant> {
        self.end
    }

    /// The time that the caller gave; 0 if it gave none.
    pub fn timeout_ms(&self) -> u64 {
        self.timeout_ms
    }

    pub fn is_late(&self) -> bool {
        self.end.is_some_and(|end| Instant::now() >= end)
    }

    pub fn is_given_up(&self) -> bool {
        self.given_up.iter().any(|flag| flag.load(Ordering::Relaxed))
    }

    /// Whether nobody waits any more. Stays so once it is.
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
