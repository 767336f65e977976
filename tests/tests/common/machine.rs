//! A QEMU guest of the tests: its domain file, QEMU's process.
#![allow(dead_code, reason = "each test program uses a part")]

use bulkhead_tests::system::System;

use super::common::image;
use super::linux::linux;

/// The guest, with words for its kernel's command line and more for its domain file.
pub fn file(system: &System, words: &str, more: &str) -> String {
    file_of(system, "debian13", words, more)
}

/// The same with another image.
pub fn file_of(system: &System, guest: &str, words: &str, more: &str) -> String {
    let (kernel, initrd) = linux(guest);
    let disk = image(system, "qemu.img", 64 << 20);
    format!(
        "name = \"linux\"\ntype = \"qemu\"\naccel = \"tcg\"\nwhole_memory = true\nkernel = \"{}\"\nramdisk = \"{}\"\n\
         memory = 256\ncmdline = \"console=ttyS0 quiet panic=1 mitigations=off bh.disk=vda {words}\"\n{more}\n\
         [[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n",
        kernel.display(),
        initrd.display(),
        disk.display(),
    )
}

/// Processes of QEMU that belong to this system: their command line names its guest, and their parent chain ends at its hv-core.
pub fn emulators(system: &System) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        if !read("cmdline").starts_with("qemu-linux\0") {
            continue;
        }
        let parent = |pid: i32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix("PPid:")).map(str::trim).map(str::to_owned);
            line.and_then(|p| p.parse::<i32>().ok()).unwrap_or(0)
        };
        let hv_core = system.hv_core_pid() as i32;
        let spawner = parent(pid);
        if spawner == hv_core || parent(spawner) == hv_core {
            found.push(pid);
        }
    }
    found
}

/// What listens in the network namespace of a process: Unix sockets' names, and lines of TCP.
pub fn listening(pid: i32) -> Vec<String> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    let mut found = Vec::new();
    for line in read("unix").lines().skip(1) {
        // Num, RefCount, Protocol, Flags (__SO_ACCEPTCON), Type, St, Inode, Path.
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.get(3) == Some(&"00010000") {
            found.push(words.get(7).copied().unwrap_or("?").to_owned());
        }
    }
    for name in ["tcp", "tcp6"] {
        let listens = |line: &&str| line.split_whitespace().nth(3) == Some("0A");
        found.extend(read(name).lines().filter(listens).map(str::to_owned));
    }
    found
}
