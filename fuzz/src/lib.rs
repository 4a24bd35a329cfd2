//! What do bytes from outside cost in memory? An allocator that counts, so that a length which is only claimed is found out
//! by what allocates for it.

pub mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What any input may take, and what each of its bytes may take besides: a list of numbers of one byte has 32 bytes for each.
const INPUT_BYTES_MAX: usize = 64 << 20;
const BYTES_PER_BYTE_MAX: usize = 1 << 10;

/// Bytes in use, over all threads.
static LIVE: AtomicUsize = AtomicUsize::new(0);
/// Above this many the program ends.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `target` on an input; ends the program where it allocates more than the input is good for.
pub fn bounded(bytes: &[u8], target: fn(&[u8]) -> bool) {
    // libFuzzer's own ends the program at every panic: at those too that the program catches. Others end it all the same.
    static HOOK: Once = Once::new();
    HOOK.call_once(|| std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))));
    let allowed = INPUT_BYTES_MAX + BYTES_PER_BYTE_MAX * bytes.len();
    LIMIT.store(LIVE.load(Ordering::Relaxed).saturating_add(allowed), Ordering::Relaxed);
    target(bytes);
    LIMIT.store(usize::MAX, Ordering::Relaxed);
}

fn take(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
    if live > LIMIT.load(Ordering::Relaxed) {
        // Saying so allocates.
        LIMIT.store(usize::MAX, Ordering::Relaxed);
        eprintln!("{bytes} bytes more are asked for than the input is good for: {live} are in use");
        std::process::abort();
    }
}

fn give_back(bytes: usize) {
    LIVE.fetch_sub(bytes, Ordering::Relaxed);
}

// SAFETY: every call is the system's, with the same arguments and the same result.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: what the system asks of callers, ours have promised.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: see above.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: what the system asks of callers, ours have promised.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: see above.
        unsafe { System.alloc_zeroed(layout) }
    }

    // SAFETY: what the system asks of callers, ours have promised.
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        take(bytes);
        give_back(layout.size());
        // SAFETY: see above.
        unsafe { System.realloc(pointer, layout, bytes) }
    }

    // SAFETY: what the system asks of callers, ours have promised.
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: see above.
        unsafe { System.dealloc(pointer, layout) }
    }
}
