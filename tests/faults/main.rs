//! Does the store keep its word when system calls fail, on real files and below sled? A child process works on a real
//! directory with a library under it that fails the n-th call; then the parent, without that library, looks for all
//! that the child acknowledged. `LANDMARKDB_FAULTS=all` tries every n; otherwise some are left out.
#![cfg(target_os = "linux")]

mod full;
mod script;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use landmarkdb::store::{Store, StoreError};
use script::{SCRIPT, Said};

/// The errors, with their numbers on Linux.
const ERRORS: [(&str, i32); 3] = [("ENOSPC", 28), ("EIO", 5), ("EMFILE", 24)];
/// Of the calls that can fail, this many of each error are tried by default.
const SAMPLE: usize = 12;
const CHILD: &str = "LANDMARKDB_FAULTS_CHILD";
const PART: &str = "LANDMARKDB_FAULTS_PART";
const WORKERS: usize = 2;
/// A child needs a tenth of a second.
const PATIENCE: Duration = Duration::from_secs(100);

/// One run of the child.
struct Run {
    /// Calls that failed: name and path within the directory.
    failed: Vec<(String, String)>,
    /// Calls that could have.
    count: usize,
    said: BTreeMap<usize, Said>,
    opened_at_once: bool,
    ended_well: bool,
    /// The first things that went wrong, human-readable.
    problems: String,
}

/// Compiles the shim; `None`, with a message, where there is no compiler.
fn shim(folder: &Path) -> Option<PathBuf> {
    let library = folder.join("shim.so");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/shim.c");
    let flags = ["-x", "c", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"];
    match Command::new(&compiler).args(flags).arg(&library).arg(source).arg("-ldl").output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(library)
        }
        Err(error) => {
            println!("skipped: no C compiler ({}: {error})", compiler.display());
            None
        }
    }
}

/// Runs the child on `data`, with call `at` failing (0: none).
fn run(shim: &Path, folder: &Path, data: &Path, errno: i32, at: usize, stays: bool) -> Run {
    let log = folder.join("log");
    let file = |name: &str| std::fs::File::create(folder.join(name)).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(CHILD, data)
        .env("LD_PRELOAD", shim)
        .env("FAULT_DIR", data)
        .env("FAULT_LOG", &log)
        .env("FAULT_ERRNO", errno.to_string())
        .env("FAULT_AT", at.to_string())
        .env("FAULT_STAYS", (stays as i32).to_string())
        .stdout(file("stdout"))
        .stderr(file("stderr"))
        .spawn()
        .unwrap();
    let succeeded = ends_in_time(&mut child);
    let said_on = |name: &str| String::from_utf8_lossy(&std::fs::read(folder.join(name)).unwrap()).into_owned();
    let (text, mut errors) = (said_on("stdout"), said_on("stderr"));
    if succeeded.is_none() {
        errors = format!("it hangs\n{errors}");
    }
    let mut failed: Vec<(String, String)> = Vec::new();
    let mut count = 0;
    for line in std::fs::read_to_string(&log).unwrap().lines() {
        match line.split_once(' ').unwrap() {
            ("count", number) => count = number.parse().unwrap(),
            (name, path) => failed.push((name.into(), path.strip_prefix(data.to_str().unwrap()).unwrap().into())),
        }
    }
    let mut said = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("step ")) {
        let mut words = line.split(' ');
        let number = words.next().unwrap().parse().unwrap();
        let word = match words.next().unwrap() {
            "Done" => Said::Done,
            "Repeated" => Said::Repeated,
            _ => Said::Refused,
        };
        said.insert(number, word);
    }
    let ended_well = succeeded == Some(true) && said.len() == SCRIPT.len();
    let wrong =
        text.lines().filter(|line| ["Repeated", "Refused", "open again"].iter().any(|word| line.contains(word)));
    let problems =
        wrong.chain(errors.lines().filter(|line| !line.is_empty())).take(3).collect::<Vec<_>>().join("\n    ");
    Run { failed, count, said, opened_at_once: !text.contains("open again"), ended_well, problems }
}

/// Whether the child succeeds; `None` if it had to be killed.
fn ends_in_time(child: &mut Child) -> Option<bool> {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status.success());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

/// The children of other threads may hold the lock for the moment between their fork and their exec.
fn open(data: &Path) -> Result<Store, StoreError> {
    let begun = Instant::now();
    loop {
        match Store::open(data) {
            Err(StoreError::Locked { .. }) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(2));
            }
            opened => return opened,
        }
    }
}

/// Looks for what was acknowledged, with the catalog that is there and with a new one.
fn check(data: &Path, run: &Run) -> Result<(), String> {
    for rebuild in [false, true] {
        if rebuild {
            std::fs::remove_dir_all(data.join("catalog")).map_err(|error| error.to_string())?;
        }
        let store = open(data).map_err(|error| format!("open, rebuild {rebuild}: {error}"))?;
        script::check(&store, &run.said).map_err(|problem| format!("rebuild {rebuild}: {problem}"))?;
    }
    Ok(())
}

/// Whether this call leaves the end of the log unknown when it fails.
fn ends_the_log((name, path): &(String, String)) -> bool {
    path.starts_with("/segments/") && ["write", "pwrite", "fsync", "fdatasync", "ftruncate"].contains(&name.as_str())
}

fn outcome(run: &Run) -> &'static str {
    match run.said.values().max() {
        _ if !run.ended_well => "died",
        _ if !run.opened_at_once => "opened later",
        Some(Said::Refused) => "reopened",
        Some(Said::Repeated) => "went on",
        _ => "unnoticed",
    }
}

/// One fault on a directory of its own. Returns its outcome, or what was lost or wrong.
fn strike(shim: &Path, errno: i32, at: usize, stays: bool) -> Result<(String, &'static str), String> {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let run = run(shim, folder.path(), &data, errno, at, stays);
    let Some(first) = run.failed.first() else { return Ok(("none".into(), outcome(&run))) };
    check(&data, &run).map_err(|problem| format!("{first:?} failed: {problem}\n{}", run.problems))?;
    let outcome = outcome(&run);
    if !run.ended_well {
        return Err(format!("{first:?} failed, and the process died: {}", run.problems));
    }
    if outcome == "reopened" && !run.failed.iter().any(ends_the_log) {
        return Err(format!("{first:?} failed, which leaves the log known, and writes were refused: {}", run.problems));
    }
    let place = first.1.split('/').nth(1).unwrap_or("");
    Ok((format!("{} {place}", first.0), outcome))
}

/// The numbers of calls to fail: all, or some spread over all.
fn numbers(count: usize) -> Vec<usize> {
    if std::env::var("LANDMARKDB_FAULTS").is_ok_and(|which| which == "all") {
        return (1..=count).collect();
    }
    let mut some: Vec<usize> = (0..SAMPLE).map(|sample| 1 + sample * count / SAMPLE).collect();
    some.dedup();
    some
}

/// Fails call after call: nothing is lost, and the process that met the fault goes on, unless it cannot know where its log
/// ends.
#[test]
fn system_calls_that_fail_lose_nothing_and_pass() {
    let folder = tempfile::tempdir().unwrap();
    let Some(shim) = shim(folder.path()) else { return };
    let mut faults = Vec::new();
    for (name, errno) in ERRORS {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let healthy = run(&shim, folder.path(), &data, errno, 0, false);
        check(&data, &healthy).unwrap();
        assert!(healthy.ended_well && healthy.said.values().all(|said| *said == Said::Done), "{}", healthy.problems);
        assert!(healthy.count > 20, "{} calls can fail with {name}", healthy.count);
        faults.extend(
            numbers(healthy.count).into_iter().flat_map(|at| [(name, errno, at, false), (name, errno, at, true)]),
        );
    }
    let (next, found) = (AtomicUsize::new(0), Mutex::new((BTreeMap::new(), Vec::<String>::new())));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(&(name, errno, at, stays)) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = strike(&shim, errno, at, stays);
                    let how_long = if stays { "for long" } else { "once" };
                    let (table, wrong) = &mut *found.lock().unwrap();
                    match outcome {
                        Ok((call, outcome)) => *table.entry((call, name, how_long, outcome)).or_insert(0) += 1,
                        Err(problem) => wrong.push(format!("{name} {how_long} at call {at}: {problem}")),
                    }
                }
            });
        }
    });
    let (table, wrong) = found.into_inner().unwrap();
    for ((call, name, how_long, outcome), count) in &table {
        println!("{call:<28} {name:<7} {how_long:<9} {outcome:<13} {count}");
    }
    let list = wrong.join("\n");
    assert!(wrong.is_empty(), "{} of {} faults:\n{list}", wrong.len(), faults.len());
}

#[test]
fn a_full_disk_is_read_and_deleted_from() {
    let folder = tempfile::tempdir().unwrap();
    let Some(shim) = shim(folder.path()) else { return };
    for parts in [&["fill and free"][..], &["fill", "open full and free"]] {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        for part in parts {
            // A process that opens a full disk finds no space at all.
            let space = if part.starts_with("fill") { full::SPACE } else { 1 };
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--ignored", "--nocapture"])
                .env(CHILD, &data)
                .env(PART, part)
                .env("LD_PRELOAD", &shim)
                .env("FAULT_DIR", &data)
                .env("FAULT_LOG", folder.path().join("log"))
                .env("FAULT_SPACE", space.to_string())
                .output()
                .unwrap();
            let said =
                [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("");
            assert!(said.contains("part done"), "{part}: {said}");
        }
        for rebuild in [false, true] {
            if rebuild {
                std::fs::remove_dir_all(data.join("catalog")).unwrap();
            }
            full::check(&open(&data).unwrap());
        }
    }
}

/// Not a test: what the child process runs.
#[test]
#[ignore = "started by the others as a process of its own"]
fn child() {
    let Some(data) = std::env::var_os(CHILD) else { return };
    if let Ok(part) = std::env::var(PART) {
        return full::work(Path::new(&data), &part);
    }
    let log = std::env::var_os("FAULT_LOG").unwrap();
    let mut healed = log.clone();
    healed.push(".healed");
    script::work(Path::new(&data), Path::new(&healed));
}
