//! What becomes of a lock whose holder panicked?

use std::sync::{LockResult, PoisonError};

/// The policy for every lock but one: a panic fails the call it happens in, and later calls go on with the value.
///
/// Locks here guard caches, counters and queues that stay consistent wherever their holder can panic. Refusing every later call
/// would turn one failed request into an outage. The exception is the writer of `store`, whose memory of the log may then
/// disagree with the disk: it refuses writes until the directory is opened again (`StoreError::Poisoned`).
pub trait IgnorePoison<T> {
    /// The guard, whether or not an earlier holder panicked.
    fn ignore_poison(self) -> T;
}

impl<T> IgnorePoison<T> for LockResult<T> {
    fn ignore_poison(self) -> T {
        self.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_lock_outlives_the_panic_of_its_holder() {
        let count = Mutex::new(1);
        let holder: std::thread::Result<()> = std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _held = count.lock().ignore_poison();
                panic!("while it holds the lock");
            });
            holder.join()
        });
        assert!(holder.is_err() && count.is_poisoned());
        assert_eq!(*count.lock().ignore_poison(), 1);
    }
}
