//! Parse, run, exit code.

use std::process::ExitCode;

/// Threads that candle takes for sums and products of its own.
const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";

fn main() -> ExitCode {
    if std::env::var_os(CANDLE_THREADS).is_none() {
        // What is large runs on rayon's threads. Candle's own wait by spinning: beside rayon's they cost a training
        // step a third of its time on a machine with other work.
        // SAFETY: no other thread has been started that could read the environment now.
        unsafe { std::env::set_var(CANDLE_THREADS, "1") };
    }
    landmarkdb::cli::main(std::env::args_os())
}
