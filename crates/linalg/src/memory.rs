//! Memory for numbers that are read in order again and again.

use bytemuck::Zeroable;

/// Less has too few large pages to be worth a call.
const LARGE_BYTES_MIN: usize = 2 << 20;

/// Numbers that are all zero, in large pages where the system has some: whoever reads megabytes in order then looks fewer
/// addresses up.
pub fn zeroed<N: Zeroable>(count: usize) -> Vec<N> {
    let numbers = bytemuck::zeroed_vec(count);
    if size_of_val(numbers.as_slice()) >= LARGE_BYTES_MIN {
        ask_for_large_pages(&numbers);
    }
    numbers
}

#[cfg(target_os = "linux")]
fn ask_for_large_pages<N>(numbers: &[N]) {
    use rustix::mm::{Advice, madvise};

    let page = rustix::param::page_size();
    let range = numbers.as_ptr_range();
    let start = (range.start as usize).next_multiple_of(page);
    let end = range.end as usize / page * page;
    // SAFETY: the pages lie inside the numbers, and the advice changes nothing that is in them. If it is not taken, they are
    // small ones.
    let _ = unsafe { madvise(start as *mut _, end.saturating_sub(start), Advice::LinuxHugepage) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages<N>(_numbers: &[N]) {}
