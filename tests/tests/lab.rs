//! Linux guests through the whole system, in the lab. `cargo xtask test` runs them there.

mod common;
#[path = "common/linux.rs"]
mod linux;

use std::time::{Duration, Instant};

use bulkhead_tests::inspect::{Found, Process};
use bulkhead_tests::load_run::{Guest, Quiet, Run, run};
use bulkhead_tests::system::Config;
use common::*;
use linux::*;

/// Under load, with some kills of everything.
fn kills(image: &str, vcpus: u32, kills: usize) {
    let (kernel, initrd) = linux(image);
    let plan = Run {
        guest: Guest::Linux { name: image.into(), kernel, initrd, vcpus },
        kills,
        duration: Duration::ZERO,
        seed: 4,
    };
    let outcome = run(&plan, Config::of_this_build().unwrap(), &Quiet).unwrap_or_else(|e| panic!("{e:#}"));
    println!("{:#}", outcome.json());
    let problems = outcome.problems();
    assert!(problems.is_empty(), "{}\n{}", problems.join("\n"), outcome.evidence);
    assert!(outcome.hypervisor.to_lowercase().contains("xen"), "{}", outcome.hypervisor);
}

#[test]
#[ignore = "in the lab"]
fn lab_debian13_under_kills() {
    kills("debian13", 1, 10);
}

#[test]
#[ignore = "in the lab"]
fn lab_debian12_under_kills() {
    kills("debian12", 1, 5);
}

/// Two vCPUs; then reboot, and a clean power-off, each asked for by `bh`.
#[test]
#[ignore = "in the lab"]
fn lab_two_vcpus_reboot_and_poweroff() {
    let system = start();
    let disk = image(&system, "linux.img", 64 << 20);
    let words = format!("bh.work=disk {}", script("iperf3 --version"));
    let (progress, _console) =
        boot(&system, &domain_file("debian13/initrd-tools.img", 2, &words, Some(&disk)));
    wait(&system, &progress, "the disk's load", |seen| {
        seen.last["disk"]["verified_bytes"].as_u64().unwrap_or(0) > 0
    });
    let row = guest(&system, "linux").unwrap();
    assert_eq!((&row["state"], &row["vcpus"]), (&"running".into(), &2.into()), "{row}");
    // Its blkfront has a queue for each, and the image's programs run.
    let queues = format!("/local/domain/{}/device/vbd/51712/multi-queue-num-queues", row["domid"]);
    assert_eq!(system.bh_ok(&["store", "read", &queues]).unwrap().trim(), "2");
    let version = said(&system, &progress, 0, SOON);
    assert!(version[0].starts_with("iperf 3"), "{version:?}");
    let boot_id = first(&progress.lock(), "boot")["boot_id"].clone();

    system.bh_ok(&["reboot", "linux", "--wait", "--timeout", "60"]).unwrap_or_else(|e| panic!("{e:#}"));
    until(&system, "it is up again", || guest(&system, "linux").is_some_and(|g| g["boots"] == 2));
    let (again, _console) = system.console("linux");
    wait(&system, &again, "second boot", |seen| seen.lines.iter().any(|l| l.1["ev"] == "ready"));
    let second = again.lock().lines.iter().rfind(|l| l.1["ev"] == "boot").unwrap().1["boot_id"].clone();
    assert_ne!(boot_id, second, "another boot");

    system.bh_ok(&["shutdown", "linux", "--wait", "--timeout", "60"]).unwrap_or_else(|e| panic!("{e:#}"));
    until(&system, "it is gone", || ["gone", "shutdown"].contains(&state(&system).as_str()));
    let events = system.bh_ok(&["events"]).unwrap();
    assert!(events.contains("poweroff"), "{events}");
    assert!(!events.contains("crash"), "{events}");
    until(&system, "its blkback is gone too", || {
        system.services().is_ok_and(|s| !s.keys().any(|n| n.contains("linux")))
    });
}

/// A panic is told as a crash, with its reason, and stays to be looked at.
#[test]
#[ignore = "in the lab"]
fn lab_a_crash_is_told_as_one() {
    let system = start();
    // Without /init and root there is nothing to run: the kernel panics.
    let file = domain_file("debian13", 1, "rdinit=/no-such-init root=/dev/none", None);
    create(&system, &file.replace("panic=1", "panic=0"));
    let deadline = Instant::now() + Duration::from_secs(90);
    while state(&system) == "running" {
        assert!(Instant::now() < deadline, "still running\n{}", system.log_tail(25));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(state(&system), "crashed", "{:?}", guest(&system, "linux"));
    assert!(system.bh_ok(&["events"]).unwrap().contains("crash"));
    assert!(system.bh_ok(&["console", "linux", "--log"]).unwrap().contains("Kernel panic"));
    system.bh_ok(&["destroy", "linux"]).unwrap();
}

/// What a real guest has in its RAM and did not grant is out of its blkback's reach, granted pages (by udmabuf) are not.
#[test]
#[ignore = "in the lab"]
fn lab_a_backend_sees_only_granted_pages_of_linux() {
    let system = start();
    // In the kernel's memory and in that of the guest's init: its command line. Half of it here, so that no one else has it whole.
    let secret = format!("UNGRANTED-{:016x}", std::process::id().wrapping_mul(0x9e37_79b1));
    let disk = image(&system, "linux.img", 16 << 20);
    let words = format!("bh.work=disk secret={secret}");
    let (progress, _console) = boot(&system, &domain_file("debian13", 1, &words, Some(&disk)));
    wait(&system, &progress, "the disk's load", |seen| {
        seen.last["disk"]["verified_bytes"].as_u64().unwrap_or(0) > 1 << 20
    });
    let secret = secret.into_bytes();
    // Each block that the load writes begins with this.
    let block = b"BULKHEAD".as_slice();
    let backend = service_process(&system, &blkback_of("linux"));
    let hv = speak_as(backend);
    let mut by_calls = Found::default();
    search_by_calls(&hv, &[&secret, block], &mut by_calls);
    let in_maps = by_calls.places[1].iter().filter(|p| p.starts_with("grant map")).count();
    assert!(in_maps > 0, "no block of the guest's in the pages that it granted: {by_calls:?}");
    let mut found = backend.search_memory(&[&secret, block]).unwrap();
    assert!(!found.places[1].is_empty(), "no block of the guest's in the memory of its backend");
    // What the host cannot read there are the granted pages themselves, which were looked at above.
    let other: Vec<_> = found.unread.iter().filter(|m| !m.what.contains("dmabuf")).collect();
    assert!(other.is_empty(), "not looked at: {other:?}");
    backend.search_files(&[&secret, block], &mut found).unwrap();
    assert!(
        by_calls.places[0].is_empty() && found.places[0].is_empty(),
        "{:?} {:?}",
        by_calls.places[0],
        found.places[0]
    );
    // It is where it may be: with the guest's own runner.
    let runner = Process(guest(&system, "linux").unwrap()["host_pid"].as_i64().unwrap() as i32);
    assert!(!runner.search_memory(&[&secret]).unwrap().places[0].is_empty(), "the guest's RAM holds it");
    let granted: usize = hv.grant_list().unwrap().iter().map(|m| m.count as usize).sum();
    println!("{granted} of {} pages are within the backend's reach", 256 << 8);
}
