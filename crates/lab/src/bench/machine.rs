//! What the figures were measured on.

use std::fs;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use linalg::{Matrix, Packed, Write};

/// Instruction sets that matter to figures here, as Linux names them.
const INSTRUCTIONS: [&str; 8] = ["avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd"];

/// A machine, and what was built for it. What is not known is empty.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// As the system names it.
    pub processor: String,
    /// Of rayon's pool.
    pub threads: usize,
    /// Those that matter to figures here, as Linux names them.
    pub instructions: Vec<&'static str>,
    /// All of it, used or not.
    pub memory_bytes: u64,
    /// Distribution, system and kernel.
    pub system: String,
    /// The version.
    pub landmarkdb: &'static str,
    /// What compiled it.
    pub rustc: &'static str,
    /// The interpreter of the peers.
    pub python: String,
}

impl Machine {
    /// This one. `python` is the interpreter that peers run in, asked for its version.
    pub fn this(python: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (processor, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let flags = value(&processor, "flags", ':').or(value(&processor, "Features", ':')).unwrap_or_default();
        let has = |name: &&str| flags.split_whitespace().any(|flag| flag == *name);
        let kib = value(&memory, "MemTotal", ':').and_then(|size| size.split_whitespace().next()?.parse::<u64>().ok());
        let distribution = read("/etc/os-release");
        let distribution = value(&distribution, "PRETTY_NAME", '=').unwrap_or_default().trim_matches('"');
        let kernel = read("/proc/sys/kernel/osrelease");
        let version = Command::new(python).arg("--version").output();
        Machine {
            processor: value(&processor, "model name", ':').unwrap_or_default().into(),
            threads: rayon::current_num_threads(),
            instructions: INSTRUCTIONS.into_iter().filter(has).collect(),
            memory_bytes: kib.unwrap_or(0) * 1024,
            system: format!("{distribution}, {} {}", std::env::consts::OS, kernel.trim()),
            landmarkdb: env!("CARGO_PKG_VERSION"),
            rustc: env!("LANDMARKDB_RUSTC"),
            python: version.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().into()),
        }
    }
}

/// The value of the first line that begins with `name`, up to blanks and a separator.
fn value<'a>(text: &'a str, name: &str, separator: char) -> Option<&'a str> {
    let values = text.lines().filter_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(separator));
    values.map(str::trim).next()
}

/// Operations per second of the matrix kernel on all threads, on matrices that stay in their caches: what prefill could reach.
pub fn peak_flops() -> f64 {
    const ROWS: usize = 1536;
    const DEPTH: usize = 256;
    const PASSES: usize = 50;
    let columns = 256 * rayon::current_num_threads();
    let b = vec![1.0; DEPTH * columns];
    let (b, a, mut out) = (Packed::new(Matrix::new(&b, DEPTH, columns)), vec![1.0; ROWS * DEPTH], Vec::new());
    out.resize(ROWS * columns, 0.0);
    let pass = |_| {
        let begin = Instant::now();
        b.multiply(&a, &mut out, Write::Replace);
        begin.elapsed().as_secs_f64()
    };
    let fastest = (0..PASSES).map(pass).fold(f64::INFINITY, f64::min);
    (2 * ROWS * DEPTH * columns) as f64 / fastest
}

/// The present date in UTC: `2025-01-31`.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    date(seconds / 86_400)
}

/// The date of a day after 1970-01-01, in the Gregorian calendar.
fn date(days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut year, mut day) = (1970, days);
    while day >= 365 + leap(year) as u64 {
        day -= 365 + leap(year) as u64;
        year += 1;
    }
    let mut month = 0;
    let lengths = [31, 28 + leap(year) as u64, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        let cases = [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (20_088, "2024-12-31"),
            (20_454, "2026-01-01"),
        ];
        cases.iter().for_each(|&(days, expected)| assert_eq!(date(days), expected));
    }

    #[test]
    fn values_are_found_by_their_names() {
        let text = "processor\t: 0\nmodel name\t: A CPU: fast\nmodel name\t: another\nMemTotal:  12 kB\n";
        assert_eq!(value(text, "model name", ':'), Some("A CPU: fast"));
        assert_eq!(value(text, "MemTotal", ':'), Some("12 kB"));
        assert_eq!(value(text, "absent", ':'), None);
    }
}
