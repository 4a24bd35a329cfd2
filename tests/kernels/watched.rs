//! A runner that counts what it is asked, and fails when it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use landmarkdb::cuda::{ArgumentError, Arguments, Kernel, Launch, Runner};

/// What all runners of a test were asked.
#[derive(Default)]
pub struct Seen {
    live_bytes: AtomicU64,
    written_bytes: AtomicU64,
    launches: [AtomicU64; Kernel::ALL.len()],
    pub fails: AtomicBool,
}

pub struct Watched<R> {
    pub runner: R,
    pub seen: Arc<Seen>,
}

pub struct Memory<M> {
    memory: M,
    bytes: u64,
    seen: Arc<Seen>,
}

impl Seen {
    /// Bytes of memory that nobody dropped yet.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes.load(SeqCst)
    }

    /// Bytes that were copied to memory.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes.load(SeqCst)
    }

    pub fn launches(&self, kernel: Kernel) -> u64 {
        self.launches[kernel as usize].load(SeqCst)
    }
}

impl<M> Drop for Memory<M> {
    fn drop(&mut self) {
        self.seen.live_bytes.fetch_sub(self.bytes, SeqCst);
    }
}

// SAFETY: the memory is that of a runner that keeps the promise.
unsafe impl<R: Runner> Runner for Watched<R> {
    type Memory = Memory<R::Memory>;
    type Error = R::Error;

    fn memory(&self, bytes: usize) -> Result<Self::Memory, R::Error> {
        if self.seen.fails.load(SeqCst) {
            return Err(
                ArgumentError::Index { field: "memory of a runner that was told to fail", count: 0, found: 0 }.into()
            );
        }
        let memory = self.runner.memory(bytes)?;
        self.seen.live_bytes.fetch_add(bytes as u64, SeqCst);
        Ok(Memory { memory, bytes: bytes as u64, seen: self.seen.clone() })
    }

    fn write(&self, memory: &mut Self::Memory, at: usize, bytes: &[u8]) -> Result<(), R::Error> {
        self.seen.written_bytes.fetch_add(bytes.len() as u64, SeqCst);
        self.runner.write(&mut memory.memory, at, bytes)
    }

    fn read(&self, memory: &Self::Memory, at: usize, bytes: &mut [u8]) -> Result<(), R::Error> {
        self.runner.read(&memory.memory, at, bytes)
    }

    fn wait(&self) -> Result<(), R::Error> {
        self.runner.wait()
    }

    fn address(&self, memory: &Self::Memory) -> u64 {
        self.runner.address(&memory.memory)
    }

    // SAFETY: what the caller promises is said at the trait.
    unsafe fn launch<A: Arguments>(&self, kernel: Kernel, launch: Launch, arguments: &A) -> Result<(), R::Error> {
        self.seen.launches[kernel as usize].fetch_add(1, SeqCst);
        // SAFETY: the caller's promise, passed on.
        unsafe { self.runner.launch(kernel, launch, arguments) }
    }
}
