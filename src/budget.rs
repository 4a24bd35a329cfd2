//! How many bytes may be in use at once, and who has them?

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::lock::IgnorePoison;
use crate::until::Until;

/// A share of a budget up to which a taker counts as small, and is let into the part that large ones leave alone.
const SMALL_SHARE: u64 = 64;

/// The share that large takers leave to small ones.
const KEPT_SHARE: u64 = 4;

/// How often a waiting call checks that its caller is still there.
const LOOK: Duration = Duration::from_millis(20);

/// Bytes that are taken before they are used, and given back. A quarter is kept for takers of little, so that a few large
/// ones never shut out the many.
#[derive(Debug)]
pub struct Budget {
    total: u64,
    taken: Mutex<u64>,
    given_back: Condvar,
}

/// Bytes of a budget, given back when dropped.
#[derive(Debug)]
pub struct Taken {
    budget: Arc<Budget>,
    bytes: u64,
}

/// Why there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Short {
    /// More than a single call may ever take, even when nothing else is in use.
    Never { limit: u64 },
    /// Others have them now.
    Now,
}

impl Budget {
    pub fn new(total: u64) -> Arc<Budget> {
        Arc::new(Budget { total, taken: Mutex::new(0), given_back: Condvar::new() })
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// The most that one taker may have.
    pub fn limit(&self) -> u64 {
        self.total - self.total / KEPT_SHARE
    }

    /// Bytes in use now.
    pub fn taken(&self) -> u64 {
        *self.taken.lock().ignore_poison()
    }

    /// So many bytes, if there are.
    pub fn try_take(self: &Arc<Self>, bytes: u64) -> Result<Taken, Short> {
        let mut none = Taken { budget: self.clone(), bytes: 0 };
        none.grow(bytes)?;
        Ok(none)
    }

    /// So many bytes that are in use already, whether there are any left or not: others wait for them.
    pub fn owe(self: &Arc<Self>, bytes: u64) -> Taken {
        let mut taken = self.taken.lock().ignore_poison();
        *taken = taken.saturating_add(bytes);
        Taken { budget: self.clone(), bytes }
    }

    /// So many bytes, once there are; not later than `until`.
    pub fn take(self: &Arc<Self>, bytes: u64, until: &Until) -> Result<Taken, Short> {
        loop {
            match self.try_take(bytes) {
                Err(Short::Now) if !until.is_over() => {
                    let taken = self.taken.lock().ignore_poison();
                    // Woken or not, the next turn looks again.
                    drop(self.given_back.wait_timeout(taken, LOOK));
                }
                outcome => return outcome,
            }
        }
    }

    fn allowed(&self, bytes: u64) -> u64 {
        if bytes <= self.total / SMALL_SHARE { self.total } else { self.limit() }
    }
}

impl Taken {
    /// Parts with the last so many of its bytes.
    pub fn split(&mut self, bytes: u64) -> Taken {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Taken { budget: self.budget.clone(), bytes }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// So many more, if there are; as much as before if not.
    pub fn grow(&mut self, more: u64) -> Result<(), Short> {
        let bytes = self.bytes.saturating_add(more);
        let allowed = self.budget.allowed(bytes);
        if bytes > allowed {
            return Err(Short::Never { limit: allowed });
        }
        let mut taken = self.budget.taken.lock().ignore_poison();
        match taken.checked_add(more) {
            Some(sum) if sum <= allowed => *taken = sum,
            _ => return Err(Short::Now),
        }
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        *self.budget.taken.lock().ignore_poison() -= self.bytes;
        self.budget.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_takers_leave_a_quarter_to_small_ones() {
        let budget = Budget::new(6400);
        assert_eq!(budget.try_take(4801).unwrap_err(), Short::Never { limit: 4800 });
        let large = budget.try_take(4800).unwrap();
        assert_eq!(budget.try_take(101).unwrap_err(), Short::Now);
        let small: Vec<Taken> = (0..16).map(|_| budget.try_take(100).unwrap()).collect();
        assert_eq!((budget.taken(), budget.try_take(1).unwrap_err()), (6400, Short::Now));
        drop((large, small));
        assert_eq!(budget.taken(), 0);
    }

    #[test]
    fn what_grows_is_small_until_it_is_not() {
        let budget = Budget::new(6400);
        let _large = budget.try_take(4750).unwrap();
        let mut growing = budget.try_take(60).unwrap();
        growing.grow(40).unwrap();
        assert_eq!(growing.grow(1), Err(Short::Now));
        assert_eq!(growing.grow(u64::MAX), Err(Short::Never { limit: 4800 }));
        assert_eq!((growing.bytes(), budget.taken()), (100, 4850), "a refusal takes nothing");
    }

    #[test]
    fn what_is_split_is_given_back_by_itself_and_debts_keep_others_out() {
        let budget = Budget::new(64);
        let mut whole = budget.try_take(40).unwrap();
        let part = whole.split(15);
        drop(whole);
        assert_eq!((part.bytes(), budget.taken()), (15, 15));
        let owed = budget.owe(100);
        assert_eq!((budget.taken(), budget.try_take(1).unwrap_err()), (115, Short::Now));
        drop((part, owed));
        assert_eq!(budget.taken(), 0);
    }

    #[test]
    fn who_waits_gets_what_is_given_back_and_goes_when_it_is_over() {
        let budget = Budget::new(64);
        let taken = budget.try_take(48).unwrap();
        assert_eq!(budget.take(48, &Until::after(Duration::from_millis(1))).unwrap_err(), Short::Now);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| budget.take(48, &Until::FOREVER).map(|taken| taken.bytes()));
            drop(taken);
            assert_eq!(waiting.join().unwrap(), Ok(48));
        });
    }
}
