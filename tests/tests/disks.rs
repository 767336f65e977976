//! Disks that are not plain files, in the whole system: qcow2 with a backing file under kills, a snapshot and growth meanwhile,
//! hot plugging; by `bh`, as an administrator does it, and judged by qemu-img.

mod common;

use std::process::Command;

use common::*;
use frontends::blkfront::load::Rng;
use frontends::blkfront::{self, BlkDisk, BlkFront};

/// xvdb's number.
const XVDB: u32 = 51728;
const SIZE: usize = 8 << 20;

/// qemu-img, whose answer may only speak of leaks.
fn img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let leaks_only = args[0] == "check" && out.status.code() == Some(3);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() || leaks_only, "{args:?}: {text}");
}

#[test]
fn an_image_is_killed_snapshotted_and_grown_under_its_guest() {
    let system = start();
    let at = |name: &str| system.dir().join(name).to_str().unwrap().to_owned();
    let (base, top, new, raw) = (at("base"), at("top.qcow2"), at("new.qcow2"), at("flat"));
    let mut flat: Vec<u8> = (0..SIZE / 8).flat_map(|n| (n as u64).to_le_bytes()).collect();
    std::fs::write(&base, &flat).unwrap();
    img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    let mut file = probe_file("img", None);
    file.push_str(&format!(
        "[[disk]]\nvdev = \"xvda\"\npath = \"{top}\"\nformat = \"qcow2\"\nbacking = [{{path = \"{base}\"}}]\n"
    ));
    create(&system, &file);
    let brain = Brain::of(&system, "img");
    let disk = brain.disk(&system);
    assert_eq!(disk.bytes(), SIZE as u64);
    let mut rng = Rng::new(1);
    let blkback = blkback_of("img");
    let mut last = 0;
    for round in 0..160 {
        let offset = rng.below(SIZE as u64 / 512 - 16) as usize * 512;
        let data = vec![round as u8 ^ 0x5a; (1 + rng.below(16) as usize) * 512];
        disk.write(offset as u64, &data).unwrap();
        flat[offset..offset + data.len()].copy_from_slice(&data);
        let look = rng.below(SIZE as u64 / 4096) as usize * 4096;
        let mut found = vec![0; 4096];
        disk.read(look as u64, &mut found).unwrap();
        assert!(found == flat[look..look + 4096], "round {round}, at {look}");
        if round % 10 == 9 {
            let mut pid = 0;
            until(&system, "blkback has a process", || {
                pid = system.services().ok().and_then(|s| s.get(&blkback).map(|s| s.pid)).unwrap_or(0);
                pid > 1 && pid != last
            });
            last = pid;
            let pid = nix::unistd::Pid::from_raw(pid);
            let _gone_already = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        if round == 80 {
            let before = flat.clone();
            bh(&system, &["block-snapshot", "img", "xvda", &new]);
            std::fs::write(&raw, before).unwrap();
        }
    }
    let mut all = vec![0; SIZE];
    disk.read(0, &mut all).unwrap();
    assert!(all == flat);
    bh(&system, &["block-resize", "img", "xvda", "16M"]);
    assert!(bh(&system, &["block-list", "img"]).contains("16777216"));
    disk.sync().unwrap();
    drop(disk);
    bh(&system, &["destroy", "img"]);
    for image in [&top, &new] {
        img(&["check", "-q", "-f", "qcow2", image]);
    }
    // What it was at the snapshot, and what it became.
    img(&["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
    flat.resize(16 << 20, 0);
    std::fs::write(&raw, flat).unwrap();
    img(&["compare", "-f", "qcow2", "-F", "raw", &new, &raw]);
}

#[test]
fn disks_are_plugged_into_a_running_guest_and_out_of_it() {
    let system = start();
    let at = |name: &str| system.dir().join(name).to_str().unwrap().to_owned();
    create(&system, &probe_file("plug", None));
    let brain = Brain::of(&system, "plug");
    let (domid, image) = (brain.domain.domid(), at("b.qcow2"));
    img(&["create", "-q", "-f", "qcow2", &image, "4M"]);
    let wrong = system.bh(&["block-attach", "plug", &format!("{},qcow2,xvdb,rw", at("none"))]).unwrap();
    assert!(!wrong.status.success());
    for round in 0..2u8 {
        bh(&system, &["block-attach", "plug", "format=qcow2", "vdev=xvdb", &format!("target={image}")]);
        let front = BlkFront::connect(&brain.domain.hv, &brain.xs, domid, XVDB, SOON)
            .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)));
        let disk = BlkDisk::new(front).unwrap();
        let mut found = vec![9; 4096];
        disk.read(8192, &mut found).unwrap();
        assert_eq!(found, vec![round; 4096], "what the last round left");
        disk.write(8192, &[round + 1; 4096]).unwrap();
        disk.sync().unwrap();
        drop(disk);
        blkfront::disconnect(&brain.xs, domid, XVDB, SOON).unwrap();
        bh(&system, &["block-detach", "plug", "xvdb"]);
        assert!(!bh(&system, &["block-list", "plug"]).contains("xvdb"));
        assert!(!system.services().unwrap().contains_key("blkback-plug-xvdb"));
    }
    // An overlay is gone with its guest; here, with its disk.
    let table =
        format!("{{vdev = \"xvdb\", path = \"{image}\", format = \"qcow2\", overlay = \"{}\"}}", at(""));
    bh(&system, &["block-attach", "plug", &table]);
    let front = BlkFront::connect(&brain.domain.hv, &brain.xs, domid, XVDB, SOON)
        .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)));
    let disk = BlkDisk::new(front).unwrap();
    let mut found = vec![9; 4096];
    disk.read(8192, &mut found).unwrap();
    assert_eq!(found, vec![2; 4096]);
    disk.write(8192, &[7; 4096]).unwrap();
    disk.sync().unwrap();
    drop(disk);
    bh(&system, &["block-detach", "plug", "xvdb", "--force"]);
    img(&["check", "-q", "-f", "qcow2", &image]);
    let out =
        Command::new("qemu-io").args(["-f", "qcow2", "-c", "read -P 2 8k 4k", &image]).output().unwrap();
    assert!(!String::from_utf8_lossy(&out.stdout).contains("failed"), "the disk itself is as it was");
}
