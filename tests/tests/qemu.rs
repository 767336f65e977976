//! A Linux guest in a machine that QEMU emulates, its disk and NIC served by our backends through vhost-user. Natively: no hardware
//! virtualization is needed. `cargo xtask guest-image` makes the guest's image; `cargo xtask test` runs every `qemu_…` here.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_tests::load_run::{Guest, Quiet, Run, run};
use bulkhead_tests::progress::Seen;
use bulkhead_tests::system::{Config, System};
use common::*;

/// The guest's kernel and initial RAM disk.
fn image() -> (PathBuf, PathBuf) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/guest/debian13");
    let found = (dir.join("vmlinuz"), dir.join("initrd.img"));
    assert!(found.0.exists() && found.1.exists(), "{} is not made: cargo xtask guest-image", dir.display());
    found
}

fn under_kills(kills: usize, seed: u64) {
    let (kernel, initrd) = image();
    let guest = Guest::Qemu { name: "debian13".into(), kernel, initrd, vcpus: 1 };
    let plan = Run { guest, kills, duration: Duration::ZERO, seed };
    let outcome = run(&plan, Config::of_this_build().unwrap(), &Quiet).unwrap_or_else(|e| panic!("{e:#}"));
    println!("{:#}", outcome.json());
    let problems = outcome.problems();
    assert!(problems.is_empty(), "{}\n{}", problems.join("\n"), outcome.evidence);
    assert_eq!(outcome.rows.iter().map(|(_, s)| s.count).sum::<usize>(), kills);
}

#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_under_kills() {
    under_kills(60, 5);
}

/// The full count; `cargo xtask soak qemu`.
#[test]
#[ignore = "cargo xtask soak"]
fn soak_qemu() {
    under_kills(500, 6);
}

fn domain_file(system: &System, words: &str) -> String {
    let (kernel, initrd) = image();
    let disk = image_file(system);
    format!(
        "name = \"linux\"\ntype = \"qemu\"\naccel = \"tcg\"\nwhole_memory = true\nkernel = \"{}\"\nramdisk = \"{}\"\n\
         memory = 256\ncmdline = \"console=ttyS0 quiet panic=1 mitigations=off bh.disk=vda {words}\"\n\
         [[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n",
        kernel.display(),
        initrd.display(),
        disk.display(),
    )
}

fn image_file(system: &System) -> PathBuf {
    common::image(system, "qemu.img", 64 << 20)
}

fn state(system: &System) -> String {
    guest(system, "linux").map_or("gone".into(), |g| g["state"].as_str().unwrap_or_default().to_owned())
}

fn verified(seen: &Seen) -> u64 {
    seen.last["disk"]["verified"].as_u64().unwrap_or(0)
}

/// Pause and unpause; then QEMU itself is killed: the guest is gone, and nothing else.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_pauses_and_its_end_is_its_own() {
    let system = start();
    create(&system, &domain_file(&system, "bh.work=disk"));
    let (progress, _console) = system.console("linux");
    assert!(progress.wait(Duration::from_secs(60), |seen| verified(seen) > 0), "not under load");

    system.bh_ok(&["pause", "linux"]).unwrap();
    assert_eq!(state(&system), "paused");
    let lines = progress.lock().lines.len();
    std::thread::sleep(Duration::from_secs(2));
    assert!(progress.lock().lines.len() <= lines + 1, "a paused guest says nothing");
    system.bh_ok(&["unpause", "linux"]).unwrap();
    let before = verified(&progress.lock());
    assert!(progress.wait(Duration::from_secs(20), |seen| verified(seen) > before), "it goes on");

    let emulators = emulators(&system);
    assert_eq!(emulators.len(), 1, "{emulators:?}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(emulators[0]), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while state(&system) != "gone" {
        assert!(std::time::Instant::now() < end, "still {}", state(&system));
        std::thread::sleep(Duration::from_millis(50));
    }
    let services = system.services().unwrap();
    assert!(services.values().all(|s| s.state == "running"), "{services:?}");
    assert!(self::emulators(&system).is_empty(), "nothing of it is left");
}

/// Processes of QEMU that belong to this system: their command line names its guest, and their parent chain ends at its hv-core.
fn emulators(system: &System) -> Vec<i32> {
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
