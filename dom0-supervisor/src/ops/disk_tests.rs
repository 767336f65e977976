//! Disks of a running guest, with dom0 killed at every call that it makes.

use std::sync::Arc;

use super::kill_tests::{Bench, bench, failed_in_one_line, kill_everywhere, settle, with_guest};
use crate::config::DiskEntry;
use crate::manager::{Manager, OpError};
use crate::state::State;
use crate::testing::{Inner, World};
use crate::xs_layout::device_paths;

fn disk(bench: &Bench) -> DiskEntry {
    let path = bench.dir.path().join("more.qcow2");
    std::fs::write(&path, vec![1; 4096]).unwrap();
    format!("{},qcow2,xvdc,rw", path.display()).parse().unwrap()
}

fn attach(manager: &Arc<Manager>, bench: &Bench) -> Result<(), OpError> {
    manager.attach_disk("g", disk(bench))
}

fn with_disk(bench: &Bench) -> (World, Arc<Manager>) {
    let (world, manager) = with_guest(bench);
    attach(&manager, bench).unwrap();
    (world, manager)
}

/// The disk is there, once, in all places, or in none.
fn check(world: &Inner, state: &State, there: bool) {
    let guest = &state.guests["g"];
    assert!(state.sagas.is_empty());
    assert_eq!(guest.config.disk.len(), if there { 3 } else { 2 });
    assert_eq!(guest.disk_backends.len(), guest.config.disk.len());
    let backends = world.domains.iter().filter(|d| d.name == "blkback-g-xvdc").count();
    assert_eq!(backends, usize::from(there), "its driver domain");
    let nodes: Vec<_> =
        world.nodes.keys().filter(|k| k.contains("/51744") || k.contains("blkback-g-xvdc")).collect();
    let homes = world.nodes.values().filter(|(value, _)| value == "blkback-g-xvdc").count();
    assert_eq!((!nodes.is_empty(), homes), (there, usize::from(there)), "{nodes:?}");
    let devices = device_paths(guest);
    assert_eq!(devices.len(), guest.config.disk.len() + 1);
    for device in devices {
        assert_eq!(world.nodes[&format!("{}/state", device.back)].0, "2", "{device:?}");
        assert_eq!(world.nodes[&format!("{}/online", device.back)].0, "1");
    }
}

#[test]
fn attach_is_finished_or_never_began() {
    let points = kill_everywhere(with_guest, attach, |world, state, killed| {
        let there = state.guests["g"].config.disk.len() == 3;
        assert!(there || killed);
        check(&world.lock(), state, there);
    });
    assert!(points > 12, "{points} kill points");
}

#[test]
fn attach_that_fails_leaves_nothing() {
    for refuse in [true, false] {
        let points = kill_everywhere(
            |bench| {
                let (world, manager) = with_guest(bench);
                if refuse {
                    world.lock().refuse = Some("blkback-g-xvdc".into());
                } else {
                    world.lock().deaf_backends = true;
                }
                (world, manager)
            },
            |manager, bench| failed_in_one_line(attach(manager, bench)),
            |world, state, _| check(&world.lock(), state, false),
        );
        assert!(points > 10, "{points} kill points");
    }
}

#[test]
fn detach_is_finished() {
    let points = kill_everywhere(
        with_disk,
        |manager, _| manager.detach_disk("g", "xvdc", false),
        |world, state, killed| {
            let there = state.guests["g"].config.disk.len() == 3;
            assert!(!there || killed);
            check(&world.lock(), state, there);
        },
    );
    assert!(points > 10, "{points} kill points");
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_disk() {
    let bench = bench();
    let (world, manager) = with_disk(&bench);
    world.lock().deaf_backends = true;
    let error = manager.detach_disk("g", "xvdc", false).unwrap_err();
    assert!(error.to_string().contains("does not let go"), "{error}");
    {
        let mut inner = world.lock();
        for (path, node) in &mut inner.nodes {
            // Connected again, as the toolstack said; here all wait for frontends.
            if path.ends_with("/51744/state") && node.0 == "4" {
                node.0 = "2".into();
            }
        }
        check(&inner, &manager.state(), true);
    }
    manager.detach_disk("g", "xvdc", true).unwrap();
    world.lock().deaf_backends = false;
    settle(&world, &manager);
    check(&world.lock(), &manager.state(), false);
}

#[test]
fn a_snapshot_is_made_or_undone() {
    for image in ["/s/new.qcow2", "/s/damaged.qcow2"] {
        let fails = image.contains("damaged");
        let points = kill_everywhere(
            with_disk,
            |manager, _| match manager.snapshot_disk("g", "xvdc", image.into()) {
                Err(OpError::Failed(text)) if fails => {
                    assert!(text.contains("no qcow2 image") && !text.contains('\n'), "{text}");
                    Ok(())
                }
                other => other,
            },
            |world, state, killed| {
                let inner = world.lock();
                check(&inner, state, true);
                let entry = &state.guests["g"].config.disk[2];
                let made = entry.path.as_deref() == Some(image.as_ref());
                assert!(made != fails || killed && !made, "{entry:?}");
                let domain = inner.domains.iter().find(|d| d.name == "blkback-g-xvdc").unwrap();
                let request = &inner.requests[&domain.instance];
                assert_eq!(
                    request.args.iter().any(|arg| arg.contains(image)),
                    made,
                    "record and backend agree"
                );
                // Whatever the process that runs now was told, it may open.
                for file in entry.files() {
                    let name = domain_kit::resource_of("disk", &file.name);
                    assert!(request.resources.iter().any(|r| r.name == name), "{name}");
                }
            },
        );
        assert!(points > 8, "{points} kill points");
    }
}

/// A guest whose xvdc is an image over a backing file of this name.
fn with_overlay(bench: &Bench, below: &str) -> (World, Arc<Manager>) {
    let (world, manager) = with_guest(bench);
    let at = |name: &str| bench.dir.path().join(name).display().to_string();
    for name in ["over.qcow2", below] {
        std::fs::write(at(name), vec![1; 4096]).unwrap();
    }
    let table = format!(
        "{{vdev = \"xvdc\", path = {:?}, format = \"qcow2\", backing = [{{path = {:?}}}]}}",
        at("over.qcow2"),
        at(below)
    );
    manager.attach_disk("g", DiskEntry::parse(&table).unwrap()).unwrap();
    (world, manager)
}

#[test]
fn a_commit_is_made_or_undone() {
    for below in ["base", "full"] {
        let fails = below == "full";
        let points = kill_everywhere(
            |bench| with_overlay(bench, below),
            |manager, _| match manager.commit_disk("g", "xvdc") {
                Err(OpError::Failed(text)) if fails => {
                    assert!(text.contains("no space left") && !text.contains('\n'), "{text}");
                    Ok(())
                }
                other => other,
            },
            |world, state, killed| {
                let inner = world.lock();
                check(&inner, state, true);
                let entry = &state.guests["g"].config.disk[2];
                let made = entry.backing.is_empty();
                assert!(made != fails || killed && !made, "{entry:?}");
                let domain = inner.domains.iter().find(|d| d.name == "blkback-g-xvdc").unwrap();
                let args = &inner.requests[&domain.instance].args;
                assert!(!args.iter().any(|arg| arg == "--commit"), "{args:?}");
                assert_eq!(
                    args.iter().any(|arg| arg.contains("over.qcow2")),
                    !made,
                    "record and backend agree"
                );
                // What says that only a whole commit may be served comes with nothing else.
                assert_eq!(args.iter().any(|arg| arg == "--committed"), made);
            },
        );
        assert!(points > 12, "{points} kill points");
    }
}

#[test]
fn media_are_changed() {
    let points = kill_everywhere(
        |bench| {
            let (world, manager) = with_guest(bench);
            std::fs::write(bench.dir.path().join("a.iso"), vec![1; 4096]).unwrap();
            std::fs::write(bench.dir.path().join("b.iso"), vec![1; 8192]).unwrap();
            let path = bench.dir.path().join("a.iso");
            let disk = format!("{},raw,xvdc,cdrom", path.display()).parse().unwrap();
            manager.attach_disk("g", disk).unwrap();
            (world, manager)
        },
        |manager, bench| manager.change_medium("g", "xvdc", Some(bench.dir.path().join("b.iso"))),
        |world, state, killed| {
            let inner = world.lock();
            check(&inner, state, true);
            let entry = &state.guests["g"].config.disk[2];
            // Killed between the two, the drive is empty.
            let name = entry.path.as_ref().map(|path| path.file_name().unwrap().to_str().unwrap());
            assert!(name == Some("b.iso") || killed, "{entry:?}");
            let domain = inner.domains.iter().find(|d| d.name == "blkback-g-xvdc").unwrap();
            let request = &inner.requests[&domain.instance];
            assert_eq!(request.args.iter().any(|arg| arg == "--empty"), name.is_none());
            assert!(request.args.iter().any(|arg| arg == "r"), "a cdrom is only read: {:?}", request.args);
        },
    );
    assert!(points > 8, "{points} kill points");
}

#[test]
fn limits_go_to_the_nodes_and_stay() {
    let bench = bench();
    let (world, manager) = with_disk(&bench);
    let limits =
        crate::config::DiskLimits { iops: Some(100), bandwidth: Some(1 << 20), ..Default::default() };
    manager.limit_disk("g", "xvdc", limits).unwrap();
    let device = device_paths(&manager.state().guests["g"]).into_iter().find(|d| d.name == "xvdc").unwrap();
    let node = |name: &str| world.lock().nodes[&format!("{}/{name}", device.back)].0.clone();
    assert_eq!((node("limit-iops"), node("limit-bytes")), ("100".into(), "1048576".into()));
    assert_eq!(manager.state().guests["g"].config.disk[2].iops, Some(100));
    let none = crate::config::DiskLimits { iops_burst: Some(5), ..Default::default() };
    let text = manager.limit_disk("g", "xvdc", none).unwrap_err().to_string();
    assert!(text.contains("nothing without iops") && !text.contains('\n'), "{text}");
    manager.limit_disk("g", "xvdc", Default::default()).unwrap();
    assert_eq!(node("limit-iops"), "0");
}

#[test]
fn what_cannot_be_is_refused_at_once() {
    let bench = bench();
    let (world, manager) = with_disk(&bench);
    let refused = |result: Result<(), OpError>, what: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(what) && !text.contains('\n'), "{text}");
    };
    refused(attach(&manager, &bench), "already");
    refused(manager.attach_disk("h", disk(&bench)), "no guest");
    let path = bench.dir.path().join("more.qcow2");
    let again = format!("{},qcow2,xvdd,rw", path.display()).parse().unwrap();
    refused(manager.attach_disk("g", again), "in use by guest g");
    refused(manager.attach_disk("g", "vdev=xvdd,backend=shared".parse().unwrap()), "in use by guest g");
    refused(manager.attach_disk("g", "vdev=xvdd,backend=none".parse().unwrap()), "no [[blkback]] none");
    refused(manager.attach_disk("g", "/nonexistent,raw,xvdd,rw".parse().unwrap()), "missing");
    refused(manager.detach_disk("g", "xvdz", false), "no disk");
    refused(manager.snapshot_disk("g", "xvda", "/s".into()), "only a disk of a file");
    refused(manager.commit_disk("g", "xvda"), "only an image file");
    refused(manager.commit_disk("g", "xvdc"), "no backing file");
    refused(manager.change_medium("g", "xvdc", None), "devtype");
    refused(manager.change_medium("g", "xvdc", Some("/nonexistent".into())), "missing");
    check(&world.lock(), &manager.state(), true);
    assert_eq!(manager.resize_disk("g", "xvdc", 1 << 20).unwrap(), 1 << 20);
    assert_eq!(manager.disks("g").unwrap()[2].bytes, 4096);
    // A guest goes with what was attached, and an operation on a disk does not hold that up.
    manager.destroy("g").unwrap();
    assert!(manager.state().guests.is_empty());
    assert!(world.domain("blkback-g-xvdc").is_none());
}
