//! Who reads keys in passing? Requests that want more than the cache has room for, in the order they came, as many at
//! once as a share of the budget holds; one that needs more than the share alone.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::api::{MemoryError, Result};
use crate::lock::IgnorePoison;
use crate::until::Until;

/// How often a call that waits for keys checks that its caller is still there.
pub(super) const LOOK: Duration = Duration::from_millis(20);

/// How long a request of a caller that may go away waits for its turn before it is told to come back: it holds one of the
/// service's workers meanwhile.
const WAIT: Duration = Duration::from_secs(5);

/// When it may come back.
const RETRY_MS: u64 = 1000;

/// The room for keys that are read in passing.
pub(in crate::memory) struct Passing {
    bytes_max: u64,
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    bytes: u64,
    /// Who waits, the first to go in first.
    queue: VecDeque<u64>,
    last_number: u64,
}

/// Room for keys, given back when dropped.
pub(in crate::memory) struct Pass {
    passing: Arc<Passing>,
    bytes: u64,
}

impl Passing {
    pub(super) fn new(bytes_max: u64) -> Arc<Passing> {
        Arc::new(Passing { bytes_max, state: Mutex::default(), left: Condvar::new() })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Room for so many bytes, when it is this caller's turn. The caller must hold no other room: it might wait for itself.
    pub(in crate::memory) fn take(self: &Arc<Self>, bytes: u64, until: &Until) -> Result<Pass> {
        let begin = Instant::now();
        let mut state = self.state();
        state.last_number += 1;
        let number = state.last_number;
        state.queue.push_back(number);
        loop {
            let fits = state.bytes == 0 || state.bytes.saturating_add(bytes) <= self.bytes_max;
            if fits && state.queue.front() == Some(&number) {
                state.queue.pop_front();
                state.bytes += bytes;
                // The next may fit too.
                self.left.notify_all();
                return Ok(Pass { passing: self.clone(), bytes });
            }
            let is_late = !until.is_forever() && begin.elapsed() >= WAIT;
            let busy = || MemoryError::Busy { what: "memory for landmark keys".into(), retry_ms: RETRY_MS };
            if let Err(error) = until.check().and(if is_late { Err(busy()) } else { Ok(()) }) {
                state.queue.retain(|&waiting| waiting != number);
                self.left.notify_all();
                return Err(error);
            }
            state = self.left.wait_timeout(state, LOOK).ignore_poison().0;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().ignore_poison()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.passing.state().bytes -= self.bytes;
        self.passing.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn what_passes_stays_within_its_room_and_what_is_larger_passes_alone() {
        let passing = Passing::new(10);
        let (inside, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for bytes in [4, 5, 25, 10, 1, 30, 3, 7] {
                let (passing, inside, most) = (&passing, &inside, &most);
                scope.spawn(move || {
                    for _ in 0..20 {
                        let _pass = passing.take(bytes, &Until::FOREVER).unwrap();
                        let sum = inside.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        assert!(sum <= 10 || sum == bytes, "{sum}");
                        most.fetch_max(sum, Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!((passing.bytes(), most.into_inner()), (0, 30));
    }

    #[test]
    fn who_gives_up_stands_in_nobodys_way() {
        let passing = Passing::new(10);
        let pass = passing.take(8, &Until::FOREVER).unwrap();
        let late = passing.take(3, &Until::after(Duration::from_millis(30)));
        assert!(matches!(late, Err(MemoryError::DeadlineExceeded { ms: 30 })));
        assert!(passing.take(2, &Until::FOREVER).is_ok(), "the queue is empty again");
        drop(pass);
        assert_eq!(passing.bytes(), 0);
    }
}
