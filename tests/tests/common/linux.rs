//! A Linux guest of the lab: its domain file, its start, what it says.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_tests::progress::{Progress, Seen};
use bulkhead_tests::system::{Console, System};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::common::{create, guest, guests};

/// The kernel and RAM disk of the guest image of this name: `debian13`; `debian13/initrd-tools.img`: with that RAM disk.
pub fn linux(image: &str) -> (PathBuf, PathBuf) {
    let (dir, initrd) = image.split_once('/').unwrap_or((image, "initrd.img"));
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/guest").join(dir);
    let found = (dir.join("vmlinuz"), dir.join(initrd));
    assert!(
        found.0.exists() && found.1.exists(),
        "no {image} below {}: cargo xtask guest-image",
        dir.display()
    );
    found
}

/// The domain `linux`, with words for the kernel's command line.
pub fn domain_file(image: &str, vcpus: u32, words: &str, disk: Option<&Path>) -> String {
    let (kernel, initrd) = linux(image);
    let disk = disk.map(|p| format!("[[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n", p.display()));
    format!(
        "name = \"linux\"\ntype = \"pvh\"\nkernel = \"{}\"\nramdisk = \"{}\"\nmemory = 256\nvcpus = {vcpus}\n\
         cmdline = \"console=hvc0 quiet panic=1 {words}\"\non_crash = \"preserve\"\n{}",
        kernel.display(),
        initrd.display(),
        disk.unwrap_or_default()
    )
}

/// Creates it and waits until its kernel is up.
pub fn boot(system: &System, file: &str) -> (Progress, Console) {
    let start = Instant::now();
    create(system, file);
    let (progress, console) = system.console("linux");
    wait(system, &progress, "boot", |seen| seen.boots > 0);
    println!("up after {:.1} s", start.elapsed().as_secs_f64());
    (progress, console)
}

/// Waits for what the guest says; panics with what it said and the system's log.
pub fn wait(system: &System, progress: &Progress, what: &str, enough: impl FnMut(&Seen) -> bool) {
    if !progress.wait(Duration::from_secs(90), enough) {
        let seen = progress.lock();
        died(&seen);
        let text: Vec<&str> = seen.text.iter().map(String::as_str).collect();
        let last = seen.lines.last().map(|l| l.1.to_string());
        look_at_guests(system);
        panic!("{what}: not in 90 s\n{}\n{last:?}\n{}", text.join("\n"), system.log_tail(40));
    }
}

/// Has hv-vcpu log what its guests do, a few times, so that a hang tells more than that it hung.
pub fn look_at_guests(system: &System) {
    let pvh = guests(system).into_iter().filter(|g| g["type"] == "pvh");
    let pids: Vec<i32> = pvh.filter_map(|g| g["host_pid"].as_i64()).map(|pid| pid as i32).collect();
    for _ in 0..4 {
        for &pid in pids.iter().filter(|pid| **pid > 1) {
            // A guest that is gone needs no look.
            let _ = kill(Pid::from_raw(pid), Signal::SIGUSR2);
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// What `bh` says of its state.
pub fn state(system: &System) -> String {
    guest(system, "linux").map_or("gone".into(), |g| g["state"].as_str().unwrap_or_default().to_owned())
}

/// The first line of an event.
pub fn first(seen: &Seen, event: &str) -> Value {
    seen.lines.iter().find(|l| l.1["ev"] == event).map(|l| l.1.clone()).unwrap_or_default()
}

/// A script as a word for the kernel's command line: the guest's agent runs it.
pub fn script(text: &str) -> String {
    let mut word = String::from("bh.run=");
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'=' => {
                word.push(byte.into())
            }
            _ => word.push_str(&format!("%{byte:02x}")),
        }
    }
    word
}

/// Whether its kernel ended. An end that only the emulator can have brought about is told to the lab, which then runs the test once more.
fn died(seen: &Seen) -> bool {
    if let Some(line) = seen.text.iter().find(|line| interrupted_twice(line)) {
        let _no_lab =
            std::fs::write("/run/lab/emulator-fault", format!("an interrupt came twice: {}", line.trim()));
    }
    seen.text.iter().any(|line| line.contains("Kernel panic"))
}

/// Whether a line of a kernel's trace says that an interrupt came at the first instruction of an interrupt's handler. There interrupts are
/// disabled; QEMU's SVM delivers one twice that L1's KVM injected once (docs/lab.md).
fn interrupted_twice(line: &str) -> bool {
    line.contains("RIP: 0010:asm_sysvec_") && line.contains("+0x0/")
}

/// What the script number `number` said, once it ended; it must end well.
pub fn said(system: &System, progress: &Progress, number: u64, patience: Duration) -> Vec<String> {
    let of = |line: &Value, event: &str| line["ev"] == event && line["script"] == number;
    progress.wait(patience, |seen| died(seen) || seen.lines.iter().any(|l| of(&l.1, "run_end")));
    let ended = progress.lock().lines.iter().any(|l| of(&l.1, "run_end"));
    if !ended && !died(&progress.lock()) {
        look_at_guests(system);
    }
    let seen = progress.lock();
    let lines = || seen.lines.iter().map(|l| &l.1);
    let said: Vec<String> =
        lines().filter(|l| of(l, "run")).map(|l| l["line"].as_str().unwrap_or_default().to_owned()).collect();
    let end = lines().find(|l| of(l, "run_end"));
    assert!(
        ended && end.is_some_and(|end| end["status"] == 0),
        "script {number}: {end:?}\n{}\n{}\n{:?}\n{}",
        said.join("\n"),
        seen.text.iter().map(String::as_str).collect::<Vec<_>>().join("\n"),
        seen.lines.last(),
        system.log_tail(25)
    );
    said
}
