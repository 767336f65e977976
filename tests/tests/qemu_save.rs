//! A QEMU guest saved into a file and going on from it, and reset in place. As `qemu.rs`: natively, with the guest's image.

mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/machine.rs"]
mod machine;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::outcome::totals;
use bulkhead_tests::outside::{ADDRESS, PREFIX};
use bulkhead_tests::progress::{Progress, Seen};
use bulkhead_tests::system::{NETBACK, System, bridge_name};
use common::*;
use linux::*;

fn file(system: &System, words: &str) -> String {
    let words = format!("bh.work=disk bh.ip=10.77.0.2/{PREFIX} bh.gw={ADDRESS} {words}");
    machine::file(system, &words, &format!("[[vif]]\nbackend = \"{NETBACK}\""))
}

fn verified(seen: &Seen) -> u64 {
    totals(&seen.last).verified
}

/// Waits until the guest has verified more of its disk than now.
fn goes_on(system: &System, progress: &Progress) {
    let before = verified(&progress.lock());
    wait(system, progress, "going on", |seen| verified(seen) > before);
}

/// A file system with little room, unmounted when dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Small {
        let dir = tempfile::tempdir().unwrap();
        let out =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "none"]).arg(dir.path()).output();
        assert!(out.unwrap().status.success(), "mount");
        Small(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // The directory stays if it does not go.
        let _stays = Command::new("umount").arg(self.0.path()).status();
    }
}

/// Saved whole and removed, it goes on with its disk and NIC, and its kernel has heard of it; a save that fails leaves the guest
/// running and no file, whoever is killed meanwhile.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_is_saved_and_goes_on() {
    let small = Small::new();
    let system = start();
    let fork = format!(
        "until dmesg | grep -q 'virtual machine fork'; do sleep 0.2; done; ping -c 3 -W 5 {ADDRESS} | grep received"
    );
    let (progress, _console) = boot(&system, &file(&system, &script(&fork)));
    wait(&system, &progress, "load", |seen| verified(seen) > 0);
    let at = |name: &str| -> (PathBuf, String) {
        let path = system.dir().join(name);
        let text = path.to_str().unwrap().to_owned();
        (path, text)
    };

    let full = small.path().join("full").to_str().unwrap().to_owned();
    let why = refused(&system, &["save", "linux", &full]);
    assert!(why.contains("linux") && why.lines().count() == 1, "{why}");
    assert_eq!(std::fs::read_dir(small.path()).unwrap().count(), 0, "nothing is left of it");
    goes_on(&system, &progress);

    // The one who writes, and the one who is asked.
    for (n, victim) in [bridge_name("linux"), "dom0-supervisor".into()].into_iter().enumerate() {
        let (path, text) = at(&format!("killed{n}"));
        let mut child = system.bh_command(&["save", "-c", "linux", &text]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(150));
        let victims = system.kill(&[victim]).unwrap();
        system.wait_restarted(&victims, SOON).unwrap();
        let saved = child.wait().unwrap().success();
        assert_eq!(path.exists(), saved, "there when it was said to be, and not otherwise");
        goes_on(&system, &progress);
        println!("killed while it was saved: {}", if saved { "saved" } else { "not saved" });
        let _room = std::fs::remove_file(&path);
    }

    let (path, text) = at("saved");
    println!("{}", bh(&system, &["save", "linux", &text]));
    assert!(guest(&system, "linux").is_none(), "it is gone");
    assert!(refused(&system, &["save", "linux", &text]).contains("is there already"));
    let began = Instant::now();
    bh(&system, &["restore", &text]);
    println!("goes on {} ms after the wish", began.elapsed().as_millis());
    goes_on(&system, &progress);
    let heard = said(&system, &progress, 0, Duration::from_secs(20));
    assert!(heard[0].starts_with("3 packets transmitted, 3"), "{heard:?}");
    assert_eq!(progress.lock().boots, 1);
    assert!(refused(&system, &["restore", &text]).contains("exists already"), "there is one");

    // Memory and disk of one moment: the guest that goes on from them finds what it wrote before, and nothing that was written later.
    let (_, second) = at("second");
    let (_, overlay) = at("overlay.qcow2");
    bh(&system, &["save", "-c", "--snapshot", &format!("xvda={overlay}"), "linux", &second]);
    goes_on(&system, &progress);
    assert!(bh(&system, &["block-list", "linux"]).contains("overlay.qcow2"));
    bh(&system, &["destroy", "linux"]);
    let lines = progress.lock().lines.len();
    bh(&system, &["restore", &second]);
    wait(&system, &progress, "going on", |seen| {
        seen.lines.len() > lines + 1 && verified(seen) > totals(&seen.lines[lines].1).verified
    });
    assert_eq!(progress.lock().last["disk"]["errors"], 0);

    // What is damaged is refused, and leaves no guest.
    bh(&system, &["destroy", "linux"]);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(refused(&system, &["restore", &text]).contains("cut short"));
    let mut other = bytes;
    let last = other.len() - 1;
    other[last] ^= 1;
    std::fs::write(&path, &other).unwrap();
    refused(&system, &["restore", &text]);
    until(&system, "gone", || guest(&system, "linux").is_none());
}

/// Reset in place, its bridge or NIC's backend killed in the same moment: it boots again in the same domain, and its disk is served.
/// (Not its disk's backend: a kill while the firmware starts the disk is open, see qemu-bridge's README.)
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_is_reset_in_place() {
    let system = start();
    let (progress, _console) = boot(&system, &file(&system, ""));
    let domid = guest(&system, "linux").unwrap()["domid"].clone();
    for (boots, victim) in [(1, bridge_name("linux")), (2, NETBACK.into())] {
        wait(&system, &progress, "load", |seen| seen.boots == boots && verified(seen) > 0);
        bh(&system, &["reset", "linux"]);
        let victims = system.kill(&[victim]).unwrap();
        system.wait_restarted(&victims, SOON).unwrap();
        wait(&system, &progress, "another boot", |seen| seen.boots > boots);
    }
    let lines = progress.lock().lines.len();
    wait(&system, &progress, "load", |seen| {
        seen.lines.len() > lines && verified(seen) > 0 && seen.last["disk"]["errors"] == 0
    });
    assert_eq!(guest(&system, "linux").unwrap()["domid"], domid, "the same domain");
}
