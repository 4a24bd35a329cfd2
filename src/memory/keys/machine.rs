//! How much memory has the machine? What the system says, or the group of processes that this one is in, if that is less.

use std::fs;

/// The share of the machine's memory that landmark keys may take, unless told otherwise. As much again is left for the pages of
/// blocks that lookups read, which the system keeps; the rest is for work under way, for a model in the same process, and for others.
const KEYS_SHARE: u64 = 4;

/// Where the system does not say.
const UNKNOWN_BYTES: u64 = 4 << 30;

/// Bytes of landmark keys that are held in memory, unless told otherwise.
pub fn keys_bytes() -> u64 {
    memory_bytes() / KEYS_SHARE
}

fn memory_bytes() -> u64 {
    let text = |path| fs::read_to_string(path).unwrap_or_default();
    let of_machine = meminfo_total(&text("/proc/meminfo")).unwrap_or(UNKNOWN_BYTES);
    let groups = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    // A group without a limit says `max`, or a number larger than any machine.
    let of_group = groups.iter().filter_map(|path| text(path).trim().parse::<u64>().ok()).min();
    of_group.map_or(of_machine, |bytes| bytes.min(of_machine))
}

/// Bytes that the machine has, of the text of `meminfo`.
fn meminfo_total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_system_writes_it() {
        let text = "MemTotal:       16384256 kB\nMemFree:         1000000 kB\n";
        assert_eq!(meminfo_total(text), Some(16_384_256 * 1024));
        assert_eq!(meminfo_total("MemFree: 1 kB\n"), None);
        assert_eq!(meminfo_total("MemTotal: much kB\n"), None);
        assert!(keys_bytes() > 0);
    }
}
