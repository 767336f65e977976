//! What is plugged into a running QEMU guest besides disks and NICs: USB devices, memory, processors. Natively, under TCG, with Debian's kernel for
//! any machine.

mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/machine.rs"]
mod machine;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::system::{System, bridge_name};
use common::*;
use linux::*;
use machine::file_of;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(25);

/// It is refused with a line that says this.
fn refused_as(system: &System, args: &[&str], want: &str) {
    let why = refused(system, args);
    assert!(why.contains(want), "{args:?}: {why}");
}

fn usb(system: &System) -> Vec<Value> {
    system.bh_json(&["usb-list", "linux"]).unwrap()["devices"].as_array().cloned().unwrap()
}

fn until_word(test: &str) -> String {
    format!("until {test}; do sleep 0.1; done")
}

/// A storage device is read and written by the guest, while bridge and dom0 are killed; a tablet is seen; what cannot be had leaves nothing.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image debian13-full"]
fn qemu_guest_usb() {
    let system = start();
    let stick = image(&system, "stick.img", 1 << 20);
    let bytes = File::options().read(true).write(true).open(&stick).unwrap();
    bytes.write_all_at(b"bulkhead stick", 0).unwrap();
    let stick = stick.to_str().unwrap().to_owned();
    let tablet = "grep -q 'QEMU USB Tablet' /proc/bus/input/devices";
    let scripts = [
        format!(
            "{}; cat /sys/block/sda/size; head -c 14 /dev/sda; echo",
            until_word("[ -e /sys/block/sda ]")
        ),
        "echo -n from-the-guest | dd of=/dev/sda bs=512 seek=8 conv=sync,fsync 2>/dev/null; echo done"
            .to_owned(),
        until_word("[ ! -e /sys/block/sda ]"),
        until_word(tablet),
        format!("{}; cat /sys/block/sd?/ro", until_word("[ -e /sys/block/sd? ]")),
    ];
    let words: Vec<String> = scripts.iter().map(|text| script(text)).collect();
    let more = "usb = true\n[[usbdev]]\nid = \"keys\"\nkind = \"keyboard\"";
    let (progress, _console) = boot(&system, &file_of(&system, "debian13-full", &words.join(" "), more));
    assert_eq!(usb(&system)[0]["state"], "plugged", "what its file names is there from the beginning");

    refused_as(&system, &["usb-attach", "linux", "/nonexistent/stick"], "such file");
    refused_as(&system, &["usb-attach", "linux", "host:1d6b:0002"], "not passed through");
    refused_as(&system, &["usb-attach", "linux", "keyboard", "--id", "keys"], "already");
    let lock = File::open(&stick).unwrap();
    lock.lock().unwrap();
    refused_as(&system, &["usb-attach", "linux", &stick, "--id", "stick"], "in use");
    drop(lock);
    assert_eq!(usb(&system).len(), 1, "what failed left nothing");

    let began = Instant::now();
    bh(&system, &["usb-attach", "linux", &stick, "--id", "stick"]);
    assert_eq!(said(&system, &progress, 0, PATIENCE), ["2048", "bulkhead stick"]);
    println!("a USB disk was read {} ms after the wish", began.elapsed().as_millis());
    assert!(bytes.try_lock().is_err(), "QEMU holds the lock");
    refused_as(&system, &["usb-attach", "linux", &stick, "--id", "again"], "in use by guest linux");
    let killed = system.kill(&[bridge_name("linux")]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    assert!(bytes.try_lock().is_err(), "still, without the bridge of before");
    assert_eq!(said(&system, &progress, 1, PATIENCE), ["done"]);
    let mut found = [0; 14];
    bytes.read_exact_at(&mut found, 8 * 512).unwrap();
    assert_eq!(&found, b"from-the-guest");

    system.kill(&["dom0-supervisor".into(), bridge_name("linux")]).unwrap();
    bh(&system, &["usb-detach", "linux", "stick"]);
    said(&system, &progress, 2, PATIENCE);
    until(&system, "QEMU has let go of the file", || bytes.try_lock().is_ok());
    bytes.unlock().unwrap();
    bh(&system, &["usb-attach", "linux", "tablet"]);
    said(&system, &progress, 3, PATIENCE);
    bh(&system, &["usb-attach", "linux", &stick, "--id", "stick", "--ro"]);
    assert_eq!(said(&system, &progress, 4, PATIENCE), ["1"], "only to be read");
    let table = bh(&system, &["usb-list", "linux"]);
    assert!(["keys", "tablet", "stick"].iter().all(|id| table.contains(id)), "{table}");
    bh(&system, &["destroy", "linux"]);
}

/// Disks that QEMU itself serves, of formats that blkback does not know, written and read by the guest and taken from it, while bridge
/// and dom0 are killed; what is damaged leaves nothing.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_disks_of_qemus_own() {
    let system = start();
    let path = |name: &str| system.dir().join(name).to_str().unwrap().to_owned();
    let vdi = path("disk.vdi");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "vdi", &vdi, "8M"]).status().unwrap();
    assert!(made.success(), "qemu-img");
    let scripts = [
        format!(
            "{}; cat /sys/block/vdb/size; echo -n by-the-guest | dd of=/dev/vdb bs=512 seek=9 conv=sync,fsync 2>/dev/null",
            until_word("grep -q 16384 /sys/block/vdb/size 2>/dev/null")
        ),
        until_word("[ ! -e /sys/block/vdb ]"),
        format!(
            "{}; cat /sys/block/vdb/ro; dd if=/dev/vdb bs=512 skip=9 count=1 2>/dev/null | head -c 12; echo",
            until_word("[ -e /sys/block/vdb ]")
        ),
    ];
    let words: Vec<String> = scripts.iter().map(|text| script(text)).collect();
    let (progress, _console) = boot(&system, &machine::file(&system, &words.join(" "), ""));
    let disk = |path: &str, more: &str| format!("{path},{more},backendtype=qdisk");
    let disks = || system.bh_json(&["block-list", "linux"]).unwrap()["disks"].as_array().cloned().unwrap();

    std::fs::write(path("damaged"), [7; 8192]).unwrap();
    refused_as(
        &system,
        &["block-attach", "linux", &disk(&path("damaged"), "qcow2,vdb,rw")],
        "QEMU refuses blockdev-add",
    );
    refused_as(&system, &["block-attach", "linux", &disk("/nonexistent/disk", "raw,vdb,rw")], "such file");
    refused_as(
        &system,
        &["block-attach", "linux", &disk(&path("qemu.img"), "raw,vdb,rw")],
        "in use by guest linux",
    );
    assert_eq!(disks().len(), 1, "what failed left nothing");

    // Either it is there or it never was, whoever is killed meanwhile.
    let small = image(&system, "small.img", 1 << 20);
    let small = disk(small.to_str().unwrap(), "raw,vdb,rw");
    for (victim, after_ms) in
        [(bridge_name("linux"), 5), ("dom0-supervisor".into(), 5), (bridge_name("linux"), 25)]
    {
        let mut child = system.bh_command(&["block-attach", "linux", &small]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(after_ms));
        let killed = system.kill(&[victim]).unwrap();
        system.wait_restarted(&killed, SOON).unwrap();
        let attached = child.wait().unwrap().success();
        // What was answered holds; without an answer it is one of the two.
        let mut there = disks().len() == 2;
        until(&system, "the operation's end", || {
            let out = system.bh(&["block-detach", "linux", "vdb"]).unwrap();
            let why = String::from_utf8_lossy(&out.stderr).into_owned();
            there |= out.status.success();
            out.status.success() || why.contains("no disk")
        });
        assert!(there || !attached, "attached, and not there");
        assert_eq!(disks().len(), 1);
    }
    bh(&system, &["block-attach", "linux", &disk(&vdi, "vdi,vdb,rw")]);
    assert_eq!(disks()[1]["backend"], "qemu");
    assert_eq!(said(&system, &progress, 0, PATIENCE), ["16384"]);
    let killed = system.kill(&["dom0-supervisor".into(), bridge_name("linux")]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    bh(&system, &["block-detach", "linux", "vdb"]);
    said(&system, &progress, 1, PATIENCE);
    bh(&system, &["block-attach", "linux", &disk(&vdi, "vdi,vdb,ro")]);
    assert_eq!(said(&system, &progress, 2, PATIENCE), ["1", "by-the-guest"]);
    bh(&system, &["destroy", "linux"]);
}

/// `bh shutdown` presses the power button; a guest that powers off is gone, and `bh info` has told of it as of any guest.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image debian13-full"]
fn qemu_guest_powers_off_when_asked() {
    let system = start();
    let press = "for e in /sys/class/input/event*; do grep -q Power $e/device/name && n=${e##*/}; done; \
                 echo $n; head -c 24 /dev/input/$n > /dev/null; /sbin/poweroff";
    let (progress, _console) = boot(&system, &file_of(&system, "debian13-full", &script(press), ""));
    wait(&system, &progress, "the button", |seen| seen.lines.iter().any(|l| l.1["ev"] == "run"));
    let info = system.bh_json(&["info"]).unwrap();
    assert_eq!(info["guests"], 1, "{info}");
    bh(&system, &["shutdown", "linux", "--wait", "--timeout", "20"]);
    until(&system, "it is gone", || guest(&system, "linux").is_none());
    assert!(machine::emulators(&system).is_empty());
}

/// Memory comes and goes as the guest's system sees it, over a kill of the bridge; what its file does not allow is refused.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image debian13-full"]
fn qemu_guest_memory_grows_and_shrinks() {
    let system = start();
    // The first block at 4 GiB, where the machine has what was not there at its start.
    let block = "/sys/devices/system/memory/memory32";
    let total = "set -- $(grep MemTotal /proc/meminfo); echo $2";
    let scripts = [
        total.to_owned(),
        // A block is there a moment before its pages count.
        format!("{}; sleep 1; {total}", until_word(&format!("[ -e {block} ]"))),
        format!("{}; {total}", until_word(&format!("[ ! -e {block} ]"))),
    ];
    let mut words: Vec<String> = scripts.iter().map(|text| script(text)).collect();
    words.push("memhp_default_state=online_movable".into());
    let file = file_of(&system, "debian13-full", &words.join(" "), "maxmem = 512");
    let (progress, _console) = boot(&system, &file);
    let kib = |script| -> u64 { said(&system, &progress, script, PATIENCE).last().unwrap().parse().unwrap() };
    let first = kib(0);
    assert!(first < 262_144, "{first} KiB at first");
    for args in [["mem-set", "linux", "1g"], ["mem-set", "linux", "128"]] {
        refused_as(&system, &args, "in its domain file");
    }
    bh(&system, &["mem-set", "linux", "384"]);
    assert_eq!(kib(1), first + (128 << 10));
    assert!(bh(&system, &["list"]).contains("384 MiB"));
    let killed = system.kill(&[bridge_name("linux")]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    bh(&system, &["mem-set", "linux", "256m"]);
    assert_eq!(kib(2), first);
    bh(&system, &["destroy", "linux"]);
}

/// Processors come and go. (Debian 12's kernel: newer ones take no processor later where they do not know the hypervisor, as under TCG.)
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image debian12"]
fn qemu_guest_processors_come_and_go() {
    let system = start();
    let cpu = "/sys/devices/system/cpu/cpu1";
    let scripts = [
        format!(
            "{}; echo 1 > {cpu}/online; cat /sys/devices/system/cpu/online",
            until_word(&format!("[ -e {cpu} ]"))
        ),
        until_word(&format!("[ ! -e {cpu} ]")),
    ];
    let words: Vec<String> = scripts.iter().map(|text| script(text)).collect();
    let (progress, _console) = boot(&system, &file_of(&system, "debian12", &words.join(" "), "maxvcpus = 2"));
    refused_as(&system, &["vcpu-set", "linux", "3"], "in its domain file");
    bh(&system, &["vcpu-set", "linux", "2"]);
    assert_eq!(said(&system, &progress, 0, PATIENCE), ["0-1"]);
    let killed = system.kill(&[bridge_name("linux")]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    bh(&system, &["vcpu-set", "linux", "1"]);
    said(&system, &progress, 1, PATIENCE);
    bh(&system, &["destroy", "linux"]);
}
