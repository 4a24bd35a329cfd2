//! Memory that lookups use again: fresh pages cost more than scoring what is written to them.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use crate::lock::IgnorePoison;

/// Values that a buffer may hold and still be kept: 32 MiB.
pub(super) const KEPT_LEN_MAX: usize = 8 << 20;

/// Values of all buffers that are kept: 128 MiB, some for every thread that searches.
const KEPT_IN_ALL_MAX: usize = 4 * KEPT_LEN_MAX;

/// Buffers that are free.
static FREE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Some values, given back when dropped.
pub(super) struct Scratch {
    buffer: Vec<f32>,
    len: usize,
}

impl Scratch {
    /// `len` values, unspecified.
    pub(super) fn take(len: usize) -> Scratch {
        if len == 0 {
            return Scratch { buffer: Vec::new(), len };
        }
        let mut free = FREE.lock().ignore_poison();
        let fits = |buffer: &Vec<f32>| buffer.len() >= len;
        let smallest =
            free.iter().enumerate().filter(|(_, buffer)| fits(buffer)).min_by_key(|(_, buffer)| buffer.len());
        let buffer = smallest.map(|(i, _)| i).map(|i| free.swap_remove(i));
        drop(free);
        Scratch { buffer: buffer.unwrap_or_else(|| vec![0.0; len]), len }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut free = FREE.lock().ignore_poison();
        let kept: usize = free.iter().map(Vec::len).sum();
        if !buffer.is_empty() && buffer.len() <= KEPT_LEN_MAX && kept + buffer.len() <= KEPT_IN_ALL_MAX {
            free.push(buffer);
        }
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_as_long_as_asked_and_large_ones_are_not_kept() {
        let address = {
            let mut scratch = Scratch::take(1_234_567);
            assert_eq!(scratch.len(), 1_234_567);
            scratch[0] = 1.0;
            scratch.as_ptr()
        };
        let free = |address| FREE.lock().unwrap().iter().any(|buffer| buffer.as_ptr() == address);
        assert!(free(address));
        let too_large = Scratch::take(KEPT_LEN_MAX + 1).as_ptr();
        assert!(!free(too_large));
    }
}
