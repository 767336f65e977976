//! A Linux guest in a machine that QEMU emulates, its disk and NIC served by our backends through vhost-user. Natively: no hardware
//! virtualization is needed. `cargo xtask guest-image` makes the guest's image; `cargo xtask test` runs every `qemu_…` here.

mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/machine.rs"]
mod machine;

use std::time::{Duration, Instant};

use bulkhead_tests::kills::Rng;
use bulkhead_tests::load_run::{Guest, Quiet, Run, run};
use bulkhead_tests::outcome::totals;
use bulkhead_tests::progress::Seen;
use bulkhead_tests::system::{Config, NETBACK, System, bridge_name};
use common::*;
use linux::*;
use machine::{emulators, file};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn under_kills(kills: usize, seed: u64) {
    let (kernel, initrd) = linux("debian13");
    let guest = Guest::Qemu { name: "debian13".into(), kernel, initrd, vcpus: 1 };
    let plan = Run { guest, kills, duration: Duration::ZERO, seed };
    let outcome = run(&plan, Config::of_this_build().unwrap(), &Quiet).unwrap_or_else(|e| panic!("{e:#}"));
    println!("{:#}", outcome.json());
    let problems = outcome.problems();
    assert!(problems.is_empty(), "{}\n{}", problems.join("\n"), outcome.evidence);
    assert_eq!(outcome.rows.iter().map(|(_, s)| s.count).sum::<usize>(), kills);
    // QEMU never hears of a backend's death, so it throws nothing away.
    assert_eq!(totals(&outcome.totals).lost, 0, "pings lost");
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

/// blkback killed while firmware, boot loader and driver start and stop its queues, which each of them does anew.
fn killed_while_the_disk_starts(resets: u32, seed: u64) {
    let mut rng = Rng::new(seed);
    let system = start();
    let (progress, _console) = boot(&system, &file(&system, "bh.work=disk", ""));
    let blkback = "blkback-linux-xvda".to_owned();
    for round in 0..resets {
        let boots = progress.lock().boots;
        bh(&system, &["reset", "linux"]);
        // The firmware is at the disk at once, the kernel's driver some seconds later.
        for _ in 0..4 {
            std::thread::sleep(rng.between(Duration::ZERO, Duration::from_millis(40)));
            let victims = system.kill(std::slice::from_ref(&blkback)).unwrap();
            system.wait_restarted(&victims, Duration::from_secs(10)).unwrap();
        }
        while progress.lock().boots == boots {
            let victims = system.kill(std::slice::from_ref(&blkback)).unwrap();
            system.wait_restarted(&victims, Duration::from_secs(10)).unwrap();
            if progress.wait(rng.between(Duration::ZERO, Duration::from_millis(900)), |s| s.boots > boots) {
                break;
            }
        }
        let up = progress.lock().lines.len();
        let what = format!("the disk after reset {round}");
        wait(&system, &progress, &what, |seen| seen.lines.len() > up + 1 && verified(seen) > 0);
        assert_eq!(progress.lock().last["disk"]["errors"], 0);
    }
}

#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_disk_starts_under_kills() {
    killed_while_the_disk_starts(2, 7);
}

/// Many times; `cargo xtask soak qemu`.
#[test]
#[ignore = "cargo xtask soak"]
fn soak_qemu_disk_starts() {
    killed_while_the_disk_starts(25, 8);
}

fn verified(seen: &Seen) -> u64 {
    totals(&seen.last).verified
}

/// Waits until `bh list` says so.
fn until_state(system: &System, wanted: &str) {
    until(system, wanted, || state(system) == wanted);
}

/// All that `bh` does to a QEMU guest, and a QEMU that is stopped, goes on, and is killed: always that one guest's affair.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_is_handled_and_its_end_is_its_own() {
    let system = start();
    let (progress, _console) = boot(&system, &file(&system, "bh.work=disk", ""));
    wait(&system, &progress, "load", |seen| verified(seen) > 0);
    assert!(bh(&system, &["list"]).contains("whole memory"), "the guest is marked");

    bh(&system, &["pause", "linux"]);
    assert_eq!(state(&system), "paused");
    let lines = progress.lock().lines.len();
    std::thread::sleep(Duration::from_secs(1));
    assert!(progress.lock().lines.len() <= lines + 1, "a paused guest says nothing");
    bh(&system, &["unpause", "linux"]);
    let before = verified(&progress.lock());
    wait(&system, &progress, "going on", |seen| verified(seen) > before);

    let found = emulators(&system);
    assert_eq!(found.len(), 1, "{found:?}");
    let emulator = Pid::from_raw(found[0]);
    kill(emulator, Signal::SIGSTOP).unwrap();
    until_state(&system, "silent");
    let refused = system.bh(&["pause", "linux"]).unwrap();
    assert!(!refused.status.success());
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("linux") && why.contains("does not answer") && why.lines().count() == 1, "{why}");
    kill(emulator, Signal::SIGCONT).unwrap();
    until(&system, "answering again", || state(&system) != "silent");
    // What was refused may have been carried out late.
    bh(&system, &["unpause", "linux"]);
    let before = verified(&progress.lock());
    wait(&system, &progress, "going on", |seen| verified(seen) > before);

    kill(emulator, Signal::SIGKILL).unwrap();
    until_state(&system, "gone");
    let services = system.services().unwrap();
    assert!(services.values().all(|s| s.state == "running"), "{services:?}");
    assert!(emulators(&system).is_empty(), "nothing of it is left");
}

/// A disk and a NIC, plugged into the running guest and taken out again, twice; the bridge is killed in between. The guest tells what it
/// sees. A plug that fails leaves nothing.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_hot_plug() {
    let system = start();
    let disk = image(&system, "plug.img", 24 << 20);
    let until_word = |test: &str| format!("until {test}; do sleep 0.1; done");
    let scripts = [
        format!("{}; cat /sys/block/vdb/size", until_word("[ -e /sys/block/vdb ]")),
        until_word("[ ! -e /sys/block/vdb ]"),
        format!("{}; cat /sys/class/net/eth0/address", until_word("[ -e /sys/class/net/eth0 ]")),
        until_word("[ ! -e /sys/class/net/eth0 ]"),
    ];
    let words: Vec<String> = scripts.iter().chain(&scripts[..2]).map(|text| script(text)).collect();
    let (progress, _console) = boot(&system, &file(&system, &words.join(" "), ""));
    let patience = Duration::from_secs(20);
    let target = format!("target={}", disk.display());
    let mac = "00:16:3e:77:00:09";

    let missing = system.bh(&["block-attach", "linux", "vdev=xvdb", "target=/nonexistent/image"]).unwrap();
    assert!(!missing.status.success());
    assert!(!bh(&system, &["block-list", "linux"]).contains("xvdb"), "what failed left nothing");

    let began = Instant::now();
    bh(&system, &["block-attach", "linux", "vdev=xvdb", &target]);
    assert_eq!(said(&system, &progress, 0, patience), ["49152"], "24 MiB in sectors");
    println!("a disk was seen {} ms after the wish", began.elapsed().as_millis());
    bh(&system, &["block-detach", "linux", "xvdb"]);
    said(&system, &progress, 1, patience);
    assert!(!system.services().unwrap().contains_key("blkback-linux-xvdb"));

    bh(&system, &["network-attach", "linux", "1", "--backend", NETBACK, "--mac", mac]);
    assert_eq!(said(&system, &progress, 2, patience), [mac]);
    system.kill(&[bridge_name("linux")]).unwrap();
    bh(&system, &["network-detach", "linux", "1"]);
    said(&system, &progress, 3, patience);

    bh(&system, &["block-attach", "linux", "vdev=xvdb", &target]);
    said(&system, &progress, 4, patience);
    bh(&system, &["block-detach", "linux", "xvdb"]);
    said(&system, &progress, 5, patience);
    bh(&system, &["destroy", "linux"]);
    until(&system, "gone", || guest(&system, "linux").is_none());
}

/// Something else in QEMU's place, which says what no monitor says: always the end of that one guest, at once and in one line.
#[test]
#[ignore = "needs no image; a QEMU guest all the same"]
fn qemu_guest_whose_monitor_says_garbage() {
    let mut config = Config::of_this_build().unwrap();
    config.host_file_more = format!("[qemu]\nprogram = {:?}\n", program("false-qemu"));
    let system = start_with(config);
    let file = |name: &str| {
        format!(
            "name = {name:?}\ntype = \"qemu\"\naccel = \"tcg\"\nkernel = {:?}\nmemory = 64\n",
            program("bh")
        )
    };
    let of = |name: &str| guest(&system, name).and_then(|g| g["state"].as_str().map(str::to_owned));
    for name in ["noise", "flood", "short", "liar"] {
        let began = Instant::now();
        let why = format!("{:#}", system.create(&file(name)).unwrap_err());
        println!("{name}: {} ms: {why}", began.elapsed().as_millis());
        assert!(why.contains(&format!("guest {name}")) && began.elapsed() < Duration::from_secs(10), "{why}");
        assert_eq!(of(name), None, "it was undone");
    }
    // One that runs, and another beside it that is well at first.
    create(&system, &file("well"));
    create(&system, &file("rotten"));
    assert_eq!(of("rotten").as_deref(), Some("running"));
    until(&system, "its end", || of("rotten").is_none());
    assert_eq!(of("well").as_deref(), Some("running"));
    let services = system.services().unwrap();
    assert!(services.values().all(|s| s.state == "running"), "{services:?}");
}
