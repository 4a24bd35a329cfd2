//! Who writes to a document now? One at a time, and nothing is kept for documents that are not written to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use crate::lock::IgnorePoison;
use crate::types::DocumentId;

/// A lock for every document that is written to, or whose tail is read.
#[derive(Default)]
pub(super) struct Writers(Mutex<Locks>);

#[derive(Default)]
struct Locks {
    by_document: HashMap<DocumentId, Weak<Mutex<()>>>,
    /// Locks at which those that are not held any more are dropped.
    full: usize,
}

/// Locks below which none are looked for to drop.
const FULL_MIN: usize = 64;

impl Writers {
    /// Locked while a document is written: what is durable does not change between a check and the write.
    pub(super) fn of(&self, document: DocumentId) -> Arc<Mutex<()>> {
        let mut locks = self.0.lock().ignore_poison();
        if let Some(lock) = locks.by_document.get(&document).and_then(Weak::upgrade) {
            return lock;
        }
        if locks.by_document.len() >= locks.full {
            locks.by_document.retain(|_, lock| lock.strong_count() > 0);
            locks.full = (2 * locks.by_document.len()).max(FULL_MIN);
        }
        let lock = Arc::new(Mutex::new(()));
        locks.by_document.insert(document, Arc::downgrade(&lock));
        lock
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn writers_of_one_document_wait_for_each_other_and_idle_documents_take_no_memory() {
        let writers = Writers::default();
        for document in 0..10_000 {
            drop(writers.of(DocumentId(document)));
        }
        assert!(writers.0.lock().unwrap().by_document.len() <= FULL_MIN);

        let (busy, sum) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let lock = writers.of(DocumentId(7));
                        let _writing = lock.lock().unwrap();
                        assert!(!busy.swap(true, Ordering::SeqCst), "two at once");
                        sum.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        busy.store(false, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 400);
    }
}
