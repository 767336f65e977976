//! Resident memory of a process without the guest's RAM.

use anyhow::{Context, Result};

/// Name of the memfd that is guest RAM, as it stands in /proc/PID/smaps.
const GUEST_RAM: &str = "/memfd:guest-ram";

/// Resident KiB of process `pid`, guest RAM left out; pages of the program and of shared memory counted in full.
///
/// # Errors
/// The process is gone, or is not ours to look at.
pub fn resident_kib(pid: i32) -> Result<u64> {
    let smaps =
        std::fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(|| format!("process {pid}"))?;
    Ok(sum(&smaps))
}

fn sum(smaps: &str) -> u64 {
    let mut total = 0;
    let mut counts = true;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') {
            // The head of a mapping: addresses, rights, offset, device, inode, name.
            counts = !line.contains(GUEST_RAM);
        } else if counts && let Some(rest) = line.strip_prefix("Rss:") {
            total += rest.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "\
00400000-00500000 r-xp 00000000 fe:00 123 /usr/lib/bulkhead/hv-vcpu
Size:               1024 kB
Rss:                 700 kB
7f0000000000-7f0010000000 rw-s 00000000 00:01 9 /memfd:guest-ram (deleted)
Rss:              262144 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0
Rss:                   4 kB
";
        assert_eq!(sum(smaps), 704);
        assert!(resident_kib(std::process::id().cast_signed()).unwrap() > 100);
    }
}
