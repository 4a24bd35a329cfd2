//! The kernels of `kernels/`, without a GPU: they compile for the GPUs of today, and compiled for the host (see
//! `shim.hpp`) they give the answers of the definitions. With the feature `cuda` and a GPU, the same on the GPU.
//!
//! On Linux only: elsewhere there is neither what the shim makes threads of, nor NVRTC as a package.

#![cfg(target_os = "linux")]

mod attend;
mod choose;
#[path = "../common/mod.rs"]
mod common;
mod host;
mod memory;
mod nvrtc;
mod watched;

use std::io::Write;

use host::host;

/// Says that a test did nothing, and why. Not with `println!`, which is hidden where a test passes.
fn skip(test: &str, reason: impl std::fmt::Display) {
    std::io::stderr().write_all(format!("skipped {test}: {reason}\n").as_bytes()).unwrap();
}

#[test]
fn choices_at_every_edge_of_blocks_and_k() {
    choose::edges(&host());
}

#[test]
fn choices_of_every_shape() {
    choose::shapes(&host());
}

#[test]
fn choices_across_tiles_and_slices() {
    choose::sizes(&host());
}

#[test]
fn equal_keys_tie_to_the_first_blocks() {
    choose::ties(&host());
}

#[test]
fn choices_beyond_their_memory_are_refused() {
    choose::refusals(&host());
}

#[test]
fn attention_of_every_shape() {
    attend::shapes(&host());
}

#[test]
fn attention_of_many_rows() {
    attend::many_rows(&host());
}

#[test]
fn attention_beyond_its_memory_is_refused() {
    attend::refusals(&host());
}

#[test]
fn a_memory_answers_as_on_the_cpu() {
    memory::agreement(host);
}

#[test]
fn a_memory_over_a_small_cache_answers_the_same_within_its_bounds() {
    memory::evictions(host);
}

#[test]
fn appends_copy_only_what_is_new_and_deletes_give_back() {
    memory::appends_and_deletes(host);
}

#[test]
fn lookups_and_appends_run_at_the_same_time() {
    memory::at_the_same_time(host);
}

#[test]
fn what_the_kernels_cannot_do_the_cpu_does() {
    memory::unsupported(host);
}

#[test]
fn the_cpu_answers_for_a_gpu_that_fails() {
    memory::failures(host);
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_gives_the_same_answers() {
    use landmarkdb::cuda::{CudaError, Device};

    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::NoCompiler)) => {
            return skip("a_gpu_gives_the_same_answers", error);
        }
        Err(error) => panic!("{error}"),
    };
    println!("on {}", device.name().unwrap());
    // Two streams at the same time, as two sessions have.
    let work = || {
        let session = device.session().unwrap();
        choose::edges(&session);
        choose::shapes(&session);
        choose::sizes(&session);
        choose::ties(&session);
        choose::refusals(&session);
        attend::shapes(&session);
        attend::many_rows(&session);
        attend::refusals(&session);
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let open = move || device.session().unwrap();
    memory::agreement(open.clone());
    memory::evictions(open.clone());
    memory::appends_and_deletes(open.clone());
    memory::at_the_same_time(open.clone());
    memory::unsupported(open.clone());
    memory::failures(open);
}
