//! dom0 is killed at every call that it makes (before and after the call took effect), in every operation, with and without
//! a failure that makes it undo; the next one must finish or undo, and leave nothing behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::hvcore::DomainState;

use crate::config::HostFile;
use crate::manager::{Manager, OpError};
use crate::state::State;
use crate::testing::{Inner, World};

pub(super) struct Bench {
    pub(super) dir: tempfile::TempDir,
    host: HostFile,
    domain_file: String,
}

impl Bench {
    pub(super) fn host(&self) -> HostFile {
        self.host.clone()
    }
}

pub(super) fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    let shared = dir.path().join("shared.img");
    let program = dir.path().join("program");
    for path in [&disk, &shared, &program] {
        std::fs::write(path, vec![1; 4096]).unwrap();
    }
    let host = format!(
        "bin_dir = \"/b\"\n[[blkback]]\nname = \"shared\"\ndisk = {shared:?}\n[[netback]]\nname = \"lan\"\n\
         [[netback]]\nname = \"wan\"\n"
    );
    let domain_file = format!(
        "name = \"g\"\ntype = \"process\"\nprogram = {program:?}\non_crash = \"restart\"\n\
         disk = [{{vdev = \"xvda\", backend = \"shared\"}}, {{vdev = \"xvdb\", path = {disk:?}}}]\n\
         vif = [{{backend = \"lan\"}}]\n"
    );
    Bench { dir, host: HostFile::parse(&host, "h").unwrap(), domain_file }
}

/// A host whose services run.
fn running(bench: &Bench) -> (World, Arc<Manager>) {
    let world = World::default();
    let manager = world.boot(&bench.host);
    manager.reconcile().unwrap();
    assert_eq!(world.lock().domains.len(), 5);
    (world, manager)
}

/// dom0 lives and reconciles until nothing is under way.
pub(super) fn settle(world: &World, manager: &Arc<Manager>) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let _ = manager.reconcile();
        if manager.state().sagas.is_empty() && manager.inner().active.is_empty() {
            // One more pass, so that what follows from the last state is begun too.
            let _ = manager.reconcile();
            if manager.state().sagas.is_empty() {
                return;
            }
        }
        assert!(!world.lock().dead, "killed while settling");
        assert!(Instant::now() < deadline, "does not settle: {:?}", manager.state().sagas);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn check_there(world: &Inner, state: &State) {
    let named = |name: &str| world.domains.iter().filter(|d| d.name == name).count();
    assert_eq!((named("g"), named("blkback-g-xvdb")), (1, 1), "exactly one domain each");
    assert_eq!(world.domains.len(), 7);
    let guest = &state.guests["g"];
    let domain = world.domains.iter().find(|d| d.name == "g").unwrap();
    let recorded = guest.domain.unwrap();
    assert_eq!((u32::from(recorded.domid), recorded.instance), (domain.domid, domain.instance));
    for device in crate::xs_layout::device_paths(guest) {
        assert_eq!(world.nodes[&format!("{}/state", device.back)].0, "2", "{device:?}");
        assert_eq!(world.nodes[&format!("{}/state", device.front)].0, "1");
    }
    assert_eq!(crate::xs_layout::device_paths(guest).len(), 3);
    // Of former domains of the guest nothing is left.
    let homes: Vec<_> =
        world.nodes.keys().filter(|k| k.ends_with("/name") && k.starts_with("/local")).collect();
    assert_eq!(homes.len(), 8, "dom0, five services, the guest and its backend: {homes:?}");
}

fn check_nothing_left(world: &Inner, state: &State) {
    assert!(state.guests.is_empty() && state.sagas.is_empty(), "{state:?}");
    let names: Vec<_> = world.domains.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["xenstored", "console", "shared", "lan", "wan"]);
    let left: Vec<_> = world
        .nodes
        .keys()
        .filter(|k| {
            k.starts_with("/vm/")
                || k.starts_with("/libxl/")
                || k.contains("/backend/v") && k.matches('/').count() > 5
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let homes = world.nodes.keys().filter(|k| k.ends_with("/name") && k.starts_with("/local")).count();
    assert_eq!(homes, 6);
}

/// The operation's own failure is what is wanted, told in one line.
pub(super) fn failed_in_one_line(result: Result<(), OpError>) -> Result<(), OpError> {
    match result {
        Err(OpError::Failed(text)) => {
            assert!(text.starts_with("guest g: ") && !text.contains('\n'), "{text}");
            Ok(())
        }
        other => other,
    }
}

/// Runs `operation` on a world made by `prepare`, killed at call 0, 1, 2, … until one run needs no kill; `check` judges the
/// settled end. Returns how many kill points there were.
pub(super) fn kill_everywhere(
    prepare: impl Fn(&Bench) -> (World, Arc<Manager>),
    operation: impl Fn(&Arc<Manager>, &Bench) -> Result<(), OpError>,
    check: impl Fn(&World, &State, bool),
) -> u64 {
    let bench = bench();
    let mut points = 0;
    for before in [true, false] {
        for fuse in 0.. {
            let (world, manager) = prepare(&bench);
            {
                let mut inner = world.lock();
                inner.fuse = Some(fuse);
                inner.before = before;
            }
            let result = operation(&manager, &bench);
            let killed = world.lock().dead;
            if killed {
                points += 1;
                assert!(result.is_err());
                drop(manager);
            }
            world.lock().fuse = None;
            let manager = world.boot(&bench.host);
            settle(&world, &manager);
            check(&world, &manager.state(), killed);
            if !killed {
                break;
            }
        }
    }
    points
}

fn create(manager: &Arc<Manager>, bench: &Bench) -> Result<(), OpError> {
    manager.create(&bench.domain_file, "g.toml").map(drop)
}

pub(super) fn with_guest(bench: &Bench) -> (World, Arc<Manager>) {
    let (world, manager) = running(bench);
    create(&manager, bench).unwrap();
    check_there(&world.lock(), &manager.state());
    (world, manager)
}

#[test]
fn create_is_finished_or_never_began() {
    let points = kill_everywhere(running, create, |world, state, killed| {
        // Killed before the first record: the request was lost with its caller.
        if killed && state.guests.is_empty() {
            check_nothing_left(&world.lock(), state);
        } else {
            check_there(&world.lock(), state);
        }
    });
    assert!(points > 30, "{points} kill points");
}

#[test]
fn create_that_fails_leaves_nothing() {
    for (refuse, fails, deaf) in [(Some("g"), None, false), (None, Some("g"), false), (None, None, true)] {
        let points = kill_everywhere(
            |bench| {
                let (world, manager) = running(bench);
                let mut inner = world.lock();
                inner.refuse = refuse.map(Into::into);
                inner.fails = fails.map(Into::into);
                inner.deaf_backends = deaf;
                drop(inner);
                (world, manager)
            },
            |manager, bench| {
                // The timing-dependent waits make the number of calls vary; the fuse covers the calls before them and some within.
                failed_in_one_line(create(manager, bench))
            },
            |world, state, _| check_nothing_left(&world.lock(), state),
        );
        assert!(points > 30, "{points} kill points");
    }
}

#[test]
fn destroy_is_finished() {
    let points = kill_everywhere(
        with_guest,
        |manager, _| manager.destroy("g"),
        |world, state, killed| {
            if killed && !state.guests.is_empty() {
                check_there(&world.lock(), state);
            } else {
                check_nothing_left(&world.lock(), state);
            }
        },
    );
    assert!(points > 20, "{points} kill points");
}

#[test]
fn reboot_is_finished() {
    let points = kill_everywhere(
        |bench| {
            let (world, manager) = with_guest(bench);
            world.set_state("g", DomainState::Shutdown, 1);
            (world, manager)
        },
        |manager, _| {
            manager.reconcile()?;
            let deadline = Instant::now() + Duration::from_secs(20);
            while !manager.state().sagas.is_empty() || !manager.inner().active.is_empty() {
                if manager.inner().active.is_empty() && !manager.state().sagas.is_empty() {
                    // Its thread ended, the operation did not: killed.
                    return Err(OpError::Killed);
                }
                assert!(Instant::now() < deadline);
                std::thread::sleep(Duration::from_millis(1));
            }
            if manager.state().guests["g"].boots < 2 { Err(OpError::Killed) } else { Ok(()) }
        },
        |world, state, _| {
            check_there(&world.lock(), state);
            assert_eq!(state.guests["g"].boots, 2);
        },
    );
    assert!(points > 50, "{points} kill points");
}

#[test]
fn a_destroy_turns_a_create_round() {
    let bench = bench();
    let (world, manager) = running(&bench);
    world.lock().deaf_backends = true;
    let creating = {
        let manager = Arc::clone(&manager);
        let file = bench.domain_file.clone();
        std::thread::spawn(move || manager.create(&file, "g"))
    };
    while world.domain("g").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let destroyed = manager.destroy("g");
    let created = creating.join().unwrap();
    assert!(matches!(created, Err(OpError::Failed(_))), "{created:?}");
    assert!(destroyed.is_ok(), "{destroyed:?}");
    check_nothing_left(&world.lock(), &manager.state());
}

#[test]
fn ends_of_guests_are_followed() {
    let bench = bench();
    let (world, manager) = with_guest(&bench);
    // on_crash = "restart", until it crashes too often.
    for boots in 2..=5 {
        world.set_state("g", DomainState::Failed, 0);
        settle(&world, &manager);
        assert_eq!(manager.state().guests["g"].boots, boots);
        check_there(&world.lock(), &manager.state());
    }
    world.set_state("g", DomainState::Shutdown, 3);
    settle(&world, &manager);
    let state = manager.state();
    assert!(state.guests["g"].preserved.as_ref().unwrap().contains("5 times"), "{state:?}");
    manager.destroy("g").unwrap();
    check_nothing_left(&world.lock(), &manager.state());

    create(&manager, &bench).unwrap();
    world.set_state("g", DomainState::Shutdown, 0);
    settle(&world, &manager);
    check_nothing_left(&world.lock(), &manager.state());
}

#[test]
fn a_store_that_lost_a_guest_is_written_again() {
    let bench = bench();
    let (world, manager) = with_guest(&bench);
    let domid = world.domain("g").unwrap().domid;
    let lost = format!("/local/domain/{domid}");
    world.lock().nodes.retain(|k, _| !k.starts_with(&lost));
    settle(&world, &manager);
    check_there(&world.lock(), &manager.state());
}

#[test]
fn a_domain_that_vanished_is_forgotten() {
    let bench = bench();
    let (world, manager) = with_guest(&bench);
    world.lock().domains.retain(|d| d.name != "g");
    settle(&world, &manager);
    check_nothing_left(&world.lock(), &manager.state());
}
