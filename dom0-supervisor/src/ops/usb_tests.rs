//! USB devices, memory and processors of a running QEMU guest, with dom0 killed at every call that it makes.

use std::sync::Arc;

use super::kill_tests::{Bench, bench, failed_in_one_line, kill_everywhere};
use crate::config::UsbEntry;
use crate::manager::{Manager, OpError};
use crate::state::State;
use crate::testing::{Inner, World};
use crate::xs_layout::{usb_said, usb_wanted};

fn file(bench: &Bench) -> String {
    bench.dir.path().join("program").display().to_string()
}

/// A QEMU guest of the name g, with a controller and room to grow.
fn with_guest(bench: &Bench) -> (World, Arc<Manager>) {
    let world = World::default();
    let manager = world.boot(&bench.host());
    manager.reconcile().unwrap();
    let text = format!(
        "name = \"g\"\ntype = \"qemu\"\nkernel = {:?}\nmemory = 64\nmaxmem = 128\nmaxvcpus = 4\nusb = true\n",
        file(bench)
    );
    manager.create(&text, "t").unwrap();
    (world, manager)
}

fn entry(bench: &Bench, id: &str) -> UsbEntry {
    UsbEntry::parse(&format!("id = {id:?}\nkind = \"disk\"\npath = {:?}", file(bench))).unwrap()
}

fn with_stick(bench: &Bench) -> (World, Arc<Manager>) {
    let (world, manager) = with_guest(bench);
    manager.attach_usb("g", entry(bench, "stick")).unwrap();
    (world, manager)
}

/// The device is in the record, the store and hv-core's approvals, or in none of them.
fn check(world: &Inner, state: &State, id: &str, there: bool) {
    let guest = &state.guests["g"];
    assert!(state.sagas.is_empty());
    let domain = guest.domain.unwrap();
    assert_eq!(guest.config.usbdev.iter().any(|e| e.id == id), there);
    for path in [usb_wanted(domain.domid, id), usb_said(domain.domid, id)] {
        assert_eq!(world.nodes.contains_key(&path), there, "{path}");
    }
    let approved = &world.requests[&domain.instance].resources;
    assert_eq!(approved.iter().any(|r| r.name == format!("usb-{id}")), there, "{approved:?}");
}

fn has(state: &State, id: &str) -> bool {
    state.guests["g"].config.usbdev.iter().any(|e| e.id == id)
}

#[test]
fn attach_is_finished_or_never_began() {
    let points = kill_everywhere(
        with_guest,
        |manager, bench| manager.attach_usb("g", entry(bench, "stick")),
        |world, state, killed| {
            let there = has(state, "stick");
            assert!(there || killed);
            check(&world.lock(), state, "stick", there);
        },
    );
    assert!(points > 6, "{points} kill points");
}

#[test]
fn attach_that_fails_leaves_nothing() {
    let points = kill_everywhere(
        with_guest,
        // A name that the bridge of this world cannot plug in.
        |manager, bench| failed_in_one_line(manager.attach_usb("g", entry(bench, "damaged"))),
        |world, state, _| check(&world.lock(), state, "damaged", false),
    );
    assert!(points > 8, "{points} kill points");
}

#[test]
fn detach_is_finished() {
    let points = kill_everywhere(
        with_stick,
        |manager, _| manager.detach_usb("g", "stick"),
        |world, state, killed| {
            let there = has(state, "stick");
            assert!(!there || killed);
            check(&world.lock(), state, "stick", there);
        },
    );
    assert!(points > 6, "{points} kill points");
}

/// A disk that QEMU itself serves: the same way, without a controller.
#[test]
fn a_disk_of_qemus_is_attached_and_detached_or_not() {
    let disk = |bench: &Bench| {
        UsbEntry::qdisk(&format!("{},qcow2,vdb,rw,backendtype=qdisk", file(bench))).unwrap().unwrap()
    };
    let without_controller = |bench: &Bench| {
        let world = World::default();
        let manager = world.boot(&bench.host());
        manager.reconcile().unwrap();
        let text = format!("name = \"g\"\ntype = \"qemu\"\nkernel = {:?}\nmemory = 64\n", file(bench));
        manager.create(&text, "t").unwrap();
        (world, manager)
    };
    let with_disk = |bench: &Bench| {
        let (world, manager) = without_controller(bench);
        manager.attach_usb("g", disk(bench)).unwrap();
        (world, manager)
    };
    kill_everywhere(
        without_controller,
        |manager, bench| manager.attach_usb("g", disk(bench)),
        |world, state, killed| {
            let there = has(state, "vdb");
            assert!(there || killed);
            check(&world.lock(), state, "vdb", there);
        },
    );
    kill_everywhere(
        with_disk,
        |manager, _| manager.detach_disk("g", "vdb", false),
        |world, state, killed| {
            let there = has(state, "vdb");
            assert!(!there || killed);
            check(&world.lock(), state, "vdb", there);
        },
    );
    let bench = bench();
    let (_world, manager) = with_disk(&bench);
    let shown = manager.disks("g").unwrap();
    assert_eq!((shown[0].backend.as_str(), shown[0].note.as_str()), ("qemu", "plugged"));
    assert!(manager.detach_disk("g", "vdb", true).unwrap_err().to_string().contains("--force"));
    let other = bench.dir.path().join("other.img");
    std::fs::write(&other, [0; 4096]).unwrap();
    let twice = format!("{},raw,vdb,rw,backendtype=qdisk", other.display());
    let twice = manager.attach_usb("g", UsbEntry::qdisk(&twice).unwrap().unwrap()).unwrap_err();
    assert!(twice.to_string().contains("already"), "{twice}");
}

#[test]
fn what_cannot_be_is_refused() {
    let bench = bench();
    let (world, manager) = with_stick(&bench);
    let refused = |result: Result<(), OpError>, want: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(want) && !text.contains('\n'), "{text}");
    };
    refused(manager.attach_usb("g", entry(&bench, "stick")), "already");
    refused(manager.attach_usb("g", entry(&bench, "other")), "in use by guest g");
    let same = format!("vdev=xvdb,target={}", file(&bench));
    refused(manager.attach_disk("g", same.parse().unwrap()), "in use by guest g as a USB device");
    // One rule for all: a service's file, an image that somebody's image is on top of.
    let of = |path: &std::path::Path, more: &str| {
        let text = format!("id = \"x\"\nkind = \"disk\"\npath = {path:?}\n{more}");
        manager.attach_usb("g", UsbEntry::parse(&text).unwrap())
    };
    let shared = bench.dir.path().join("shared.img");
    refused(of(&shared, ""), "is that of [[blkback]] shared");
    let [image, base] = ["image", "base"].map(|name| bench.dir.path().join(name));
    [&image, &base].into_iter().for_each(|path| std::fs::write(path, [0; 4096]).unwrap());
    let backing = format!(
        "{{vdev = \"xvdc\", path = {image:?}, format = \"qcow2\", backing = [{{path = {base:?}, format = \"raw\"}}]}}"
    );
    manager.attach_disk("g", crate::config::DiskEntry::parse(&backing).unwrap()).unwrap();
    refused(of(&base, ""), "in use by guest g");
    of(&base, "mode = \"ro\"").unwrap();
    manager.detach_usb("g", "x").unwrap();
    refused(manager.attach_usb("nobody", entry(&bench, "x")), "no guest");
    refused(manager.detach_usb("g", "other"), "no USB device");
    for index in 1..crate::config::MOST_USB {
        let tablet = UsbEntry::parse(&format!("id = \"t{index}\"\nkind = \"tablet\"")).unwrap();
        manager.attach_usb("g", tablet).unwrap();
    }
    refused(manager.attach_usb("g", UsbEntry::parse("id = \"t\"\nkind = \"tablet\"").unwrap()), "the most");
    assert_eq!(manager.usb("g").unwrap()[0].1, "plugged");
    drop(world);
}

#[test]
fn a_guest_grows_within_its_file_and_keeps_it_over_a_restart_of_dom0() {
    let bench = bench();
    let (world, manager) = with_guest(&bench);
    for (mib, vcpus) in [(63, 1), (129, 1), (64, 0), (64, 5)] {
        let refused = manager.set_memory("g", mib).and_then(|()| manager.set_vcpus("g", vcpus));
        assert!(matches!(refused, Err(OpError::Invalid(text)) if text.contains("domain file")));
    }
    manager.set_memory("g", 96).unwrap();
    manager.set_vcpus("g", 3).unwrap();
    let home = |state: &State| format!("/local/domain/{}", state.guests["g"].domain.unwrap().domid);
    let manager = world.boot(&bench.host());
    let at = home(&manager.state());
    let node = |path: &str| world.lock().nodes[&format!("{at}/{path}")].0.clone();
    assert_eq!(node("memory/target"), "98304");
    assert_eq!((node("cpu/2/availability"), node("cpu/3/availability")), ("online".into(), "offline".into()));
    assert_eq!((manager.state().guests["g"].memory_mib(), manager.state().guests["g"].vcpus_now()), (96, 3));
}
