//! Does a service keep the promises of `landmark.v1`?
//!
//! Every test speaks gRPC through the generated client and knows nothing else of the service, so it judges any. Ours is started
//! as a child process; README.md says how to name another one, what each test is for and what turned it red on purpose.

mod answers;
mod appends;
mod client;
mod concurrency;
mod damage;
mod data;
mod deadlines;
mod definition;
mod documents;
mod durability;
mod harness;
mod identity;
mod judge;
mod limits;
mod numbers;
mod process;
mod provenance;
mod readme;
mod restore;
#[path = "../service/mod.rs"]
mod service;
mod states;
mod streams;
mod suite;

use std::process::ExitCode;
use std::sync::Arc;

use harness::Case;
use libtest_mimic::Arguments;
use suite::Suite;

/// Every test, in reading order.
fn cases() -> Vec<Case> {
    [
        answers::cases(),
        provenance::cases(),
        appends::cases(),
        restore::cases(),
        states::cases(),
        documents::cases(),
        identity::cases(),
        numbers::cases(),
        limits::cases(),
        streams::cases(),
        deadlines::cases(),
        concurrency::cases(),
        durability::cases(),
        damage::cases(),
        readme::cases(),
    ]
    .concat()
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let suite = Arc::new(Suite::from_environment());
    let trials = cases().into_iter().map(|case| harness::trial(&suite, case, arguments.list)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Stops the shared service, which would outlive an exit.
    drop(suite);
    conclusion.exit_code()
}
