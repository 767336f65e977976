//! Network devices of a running guest, with dom0 killed at every call that it makes.

use std::sync::Arc;

use proto::hvcore::DomainState;

use super::kill_tests::{Bench, bench, failed_in_one_line, kill_everywhere, settle, with_guest};
use crate::config::VifEntry;
use crate::manager::{Manager, OpError};
use crate::state::State;
use crate::testing::{Inner, World};
use crate::xs_layout::device_paths;

fn attach(manager: &Arc<Manager>, _: &Bench) -> Result<(), OpError> {
    let entry = VifEntry { ip: vec![[10, 0, 0, 9].into()], ..VifEntry::of("lan".parse().unwrap()) };
    assert_eq!(manager.attach_vif("g", entry)?, 1);
    Ok(())
}

fn with_vif(bench: &Bench) -> (World, Arc<Manager>) {
    let (world, manager) = with_guest(bench);
    attach(&manager, bench).unwrap();
    (world, manager)
}

/// The second vif is there, once, in all places and at this netback, or in none.
fn check(world: &Inner, state: &State, at: Option<&str>) {
    let guest = &state.guests["g"];
    assert!(state.sagas.is_empty());
    assert_eq!(guest.config.vif.len(), 1 + usize::from(at.is_some()));
    assert_eq!(guest.vif_backends.len(), guest.config.vif.len());
    let domid = guest.domain.unwrap().domid;
    let numbers = |dir: &str| -> Vec<u32> {
        let number = |k: &String| k.split_once(dir)?.1.strip_suffix("/state")?.parse().ok();
        world.nodes.keys().filter_map(number).collect()
    };
    let devids: Vec<u32> = (0..guest.config.vif.len()).map(|index| guest.vif_device(index)).collect();
    for dir in [format!("/local/domain/{domid}/device/vif/"), format!("/backend/vif/{domid}/")] {
        let mut found = numbers(&dir);
        found.sort_unstable();
        assert_eq!(found, devids, "{dir}");
    }
    let devices = device_paths(guest);
    assert_eq!(devices.len(), 3 + usize::from(at.is_some()));
    for device in &devices {
        assert_eq!(world.nodes[&format!("{}/state", device.back)].0, "2", "{device:?}");
        assert_eq!(world.nodes[&format!("{}/online", device.back)].0, "1");
        assert_eq!(world.nodes[&format!("{}/backend", device.front)].0, device.back);
    }
    if let Some(at) = at {
        let device = devices.iter().find(|d| d.kind == "vif" && d.name == "1").unwrap();
        assert_eq!(device.backend, at);
        let domain = world.domains.iter().find(|d| d.name == at).unwrap();
        assert_eq!(u32::from(device.backend_domid), domain.domid);
        assert_eq!(world.nodes[&format!("{}/ip", device.back)].0, "10.0.0.9");
    }
    // The first one never notices.
    assert_eq!(devices.iter().find(|d| d.kind == "vif" && d.id == 0).unwrap().backend, "lan");
}

/// Where the second vif is now.
fn place(state: &State) -> Option<&str> {
    state.guests["g"].config.vif.get(1).map(|vif| vif.backend.as_str())
}

#[test]
fn attach_is_finished_or_never_began() {
    let points = kill_everywhere(with_guest, attach, |world, state, killed| {
        let at = place(state);
        assert!(at.is_some() || killed);
        check(&world.lock(), state, at);
    });
    assert!(points > 8, "{points} kill points");
}

#[test]
fn attach_that_fails_leaves_nothing() {
    let points = kill_everywhere(
        |bench| {
            let (world, manager) = with_guest(bench);
            world.lock().deaf_backends = true;
            (world, manager)
        },
        |manager, bench| failed_in_one_line(attach(manager, bench)),
        |world, state, _| check(&world.lock(), state, None),
    );
    assert!(points > 8, "{points} kill points");
}

#[test]
fn detach_is_finished() {
    let points = kill_everywhere(
        with_vif,
        |manager, _| manager.detach_vif("g", 1, false),
        |world, state, killed| {
            let at = place(state);
            assert!(at.is_none() || killed);
            check(&world.lock(), state, at);
        },
    );
    assert!(points > 8, "{points} kill points");
}

#[test]
fn a_move_is_finished_or_never_began() {
    let points = kill_everywhere(
        with_vif,
        |manager, _| manager.move_vif("g", 1, "wan".parse().unwrap()),
        |world, state, killed| {
            let at = place(state).unwrap();
            assert!(at == "wan" || (killed && at == "lan"), "{at}");
            // A guest that has not looked at the removal must not take the new one for the old one.
            assert_eq!(state.guests["g"].vif_device(1), if at == "wan" { 2 } else { 1 });
            check(&world.lock(), state, Some(at));
        },
    );
    assert!(points > 12, "{points} kill points");
}

/// The new netback does not take it up: it is at the old one again, whenever dom0 was killed.
#[test]
fn a_move_that_fails_goes_back() {
    let points = kill_everywhere(
        |bench| {
            let (world, manager) = with_vif(bench);
            world.lock().deaf_backends = true;
            (world, manager)
        },
        |manager, _| failed_in_one_line(manager.move_vif("g", 1, "wan".parse().unwrap())),
        |world, state, _| {
            let at = place(state).unwrap().to_owned();
            assert_eq!(at, "lan");
            let mut inner = world.lock();
            // The old one is as deaf in this world.
            for (path, node) in &mut inner.nodes {
                let number = state.guests["g"].vif_device(1);
                if path.contains("/backend/vif/") && path.ends_with(&format!("/{number}/state")) {
                    assert!(matches!(node.0.as_str(), "1" | "2" | "4"), "{path} {node:?}");
                    node.0 = "2".into();
                }
            }
            check(&inner, state, Some(&at));
        },
    );
    assert!(points > 12, "{points} kill points");
}

#[test]
fn a_pulled_cable_stays_pulled() {
    let link = |world: &World, manager: &Arc<Manager>| {
        let state = manager.state();
        let device =
            device_paths(&state.guests["g"]).into_iter().find(|d| d.kind == "vif" && d.name == "1").unwrap();
        let inner = world.lock();
        let node = |dir: &str| inner.nodes.get(&format!("{dir}/disconnect")).map(|n| n.0.clone());
        assert_eq!(node(&device.back), node(&device.front));
        (state.guests["g"].config.vif[1].link, node(&device.back))
    };
    let bench = bench();
    let (world, manager) = with_vif(&bench);
    assert_eq!(link(&world, &manager), (true, None));
    for _ in 0..2 {
        manager.link_vif("g", 1, false).unwrap();
        assert_eq!(link(&world, &manager), (false, Some("1".into())));
    }
    manager.move_vif("g", 1, "wan".parse().unwrap()).unwrap();
    assert_eq!(link(&world, &manager), (false, Some("1".into())));
    settle(&world, &manager);
    manager.link_vif("g", 1, true).unwrap();
    assert_eq!(link(&world, &manager), (true, Some("0".into())));
    let error = manager.link_vif("g", 7, true).unwrap_err();
    assert!(error.to_string().contains("no vif 7"), "{error}");
}

/// The numbers in the store: a moved or new device never has that of the last one that went, and no two have the same. For users a
/// vif keeps its number, and in the guest's next domain it has that in the store too.
#[test]
fn numbers_in_the_store() {
    let numbers = |manager: &Arc<Manager>| -> Vec<(u32, u32)> {
        let guest = &manager.state().guests["g"];
        (0..guest.config.vif.len()).map(|index| (guest.vif_id(index), guest.vif_device(index))).collect()
    };
    let bench = bench();
    let (world, manager) = with_vif(&bench);
    let to = |id, backend: &str| manager.move_vif("g", id, backend.parse().unwrap()).unwrap();
    assert_eq!(numbers(&manager), [(0, 0), (1, 1)]);
    to(1, "wan");
    assert_eq!(numbers(&manager), [(0, 0), (1, 2)]);
    to(0, "wan");
    assert_eq!(numbers(&manager), [(0, 1), (1, 2)]);
    to(0, "lan");
    assert_eq!(numbers(&manager), [(0, 0), (1, 2)]);
    // One more, whose number another one has.
    let entry = |devid| VifEntry { devid, ..VifEntry::of("lan".parse().unwrap()) };
    assert_eq!(manager.attach_vif("g", entry(Some(2))).unwrap(), 2);
    assert_eq!(numbers(&manager), [(0, 0), (1, 2), (2, 3)]);
    manager.detach_vif("g", 2, false).unwrap();
    assert_eq!(manager.attach_vif("g", entry(Some(3))).unwrap(), 3);
    assert_eq!(numbers(&manager), [(0, 0), (1, 2), (3, 1)]);
    manager.detach_vif("g", 3, false).unwrap();
    check(&world.lock(), &manager.state(), Some("wan"));
    // Another domain.
    world.set_state("g", DomainState::Shutdown, 1);
    settle(&world, &manager);
    assert_eq!(numbers(&manager), [(0, 0), (1, 1)]);
    check(&world.lock(), &manager.state(), Some("wan"));
}
