//! The real model for tests: too large to come along, and not every machine has a network.

use std::io::{self, Write};
use std::path::PathBuf;

use super::pull::pull;
use super::resolve::resolve;

/// If it is set, the model is fetched, and a test that has none fails.
const VARIABLE: &str = "LANDMARKDB_TEST_MODEL";

/// The file of `smollm2`. `None` where it was never fetched, for a test to return from at once; standard error then says so.
///
/// # Panics
/// If `LANDMARKDB_TEST_MODEL` is set and it cannot be fetched.
pub fn smollm2() -> Option<PathBuf> {
    if std::env::var_os(VARIABLE).is_some() {
        return Some(pull("smollm2", &mut |_| false, &mut |_| {}).expect("LANDMARKDB_TEST_MODEL asks for the model"));
    }
    let found = resolve("smollm2").ok();
    if found.is_none() {
        let test = std::thread::current().name().unwrap_or("a test").to_string();
        // Past the harness, which shows nothing of what a test prints that passes.
        let _ = writeln!(
            io::stderr(),
            "{test}: skipped, it needs a model: `cargo run --release -- model pull smollm2` fetches it"
        );
    }
    found
}
