//! What is plugged into a running QEMU guest besides disks and NICs: USB devices, memory, processors. Natively, under TCG, with Debian's kernel for
//! any machine.

mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/machine.rs"]
mod machine;

use std::fs::File;
use std::os::unix::fs::FileExt;
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

/// Memory and processors come and go as the guest's system sees them; what it does not follow is taken back.
/// By hand: it was not yet seen to pass (see qemu-bridge/README.md, "Not there yet").
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image debian13-full; not yet seen to pass"]
fn a_guest_grows_and_shrinks() {
    let system = start();
    // The first block at 4 GiB, where the machine has what was not there at its start.
    let block = "/sys/devices/system/memory/memory32";
    let cpu = "/sys/devices/system/cpu/cpu1";
    let scripts = [
        "set -- $(grep MemTotal /proc/meminfo); echo $2".to_owned(),
        until_word(&format!("[ -e {block} ]")),
        format!(
            "{}; echo 1 > {cpu}/online; cat /sys/devices/system/cpu/online",
            until_word(&format!("[ -e {cpu} ]"))
        ),
        until_word(&format!("[ ! -e {cpu} ]")),
        until_word(&format!("[ ! -e {block} ]")),
    ];
    let mut words: Vec<String> = scripts.iter().map(|text| script(text)).collect();
    words.push("memhp_default_state=online_movable".into());
    let more = "maxmem = 512\nmaxvcpus = 2";
    let (progress, _console) = boot(&system, &file_of(&system, "debian13-full", &words.join(" "), more));
    let kib: u64 = said(&system, &progress, 0, PATIENCE)[0].parse().unwrap();
    assert!(kib < 262_144, "{kib} KiB at first");
    for args in [["mem-set", "linux", "1g"], ["mem-set", "linux", "128"], ["vcpu-set", "linux", "3"]] {
        refused_as(&system, &args, "in its domain file");
    }
    bh(&system, &["mem-set", "linux", "384"]);
    said(&system, &progress, 1, PATIENCE);
    assert!(bh(&system, &["list"]).contains("384 MiB"));
    let killed = system.kill(&[bridge_name("linux")]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
    bh(&system, &["vcpu-set", "linux", "2"]);
    assert_eq!(said(&system, &progress, 2, PATIENCE), ["0-1"]);
    bh(&system, &["vcpu-set", "linux", "1"]);
    said(&system, &progress, 3, PATIENCE);
    bh(&system, &["mem-set", "linux", "256m"]);
    said(&system, &progress, 4, PATIENCE);
    bh(&system, &["destroy", "linux"]);
}
