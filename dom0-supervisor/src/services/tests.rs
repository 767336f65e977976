//! The host file changes under running services; guests without a record.

use std::sync::Arc;

use proto::hvcore::DomainState;

use crate::config::HostFile;
use crate::manager::{Manager, OpError};
use crate::state::State;
use crate::testing::World;

struct Bench {
    dir: tempfile::TempDir,
    world: World,
    manager: Arc<Manager>,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        for name in ["one", "two", "program", "own"] {
            std::fs::write(dir.path().join(name), vec![1; 4096]).unwrap();
        }
        let world = World::default();
        let manager = world.boot(&host(&dir, "one", ""));
        let this = Bench { dir, world, manager };
        this.passes();
        assert_eq!(this.names(), ["xenstored", "console", "disk", "lan"]);
        this
    }

    /// What is ended in one pass is made anew in the next.
    fn passes(&self) {
        self.manager.reconcile().unwrap();
        self.manager.reconcile().unwrap();
    }

    fn reload(&self, host: HostFile) {
        self.manager.set_host(host);
        self.passes();
    }

    fn names(&self) -> Vec<String> {
        self.world.lock().domains.iter().map(|d| d.name.clone()).collect()
    }

    fn guest(&self, name: &str, rest: &str) -> Result<String, OpError> {
        let program = self.dir.path().join("program").display().to_string();
        let text = format!("name = \"{name}\"\ntype = \"process\"\nprogram = \"{program}\"\n{rest}");
        self.manager.create(&text, "g.toml")
    }

    /// Domid and generation.
    fn life(&self, name: &str) -> (u32, u32) {
        let domain = self.world.domain(name).unwrap_or_else(|| panic!("no domain {name}"));
        (domain.domid, domain.generation)
    }

    fn note(&self, name: &str) -> String {
        let services = self.manager.services().unwrap();
        services.into_iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no service {name}")).note
    }

    fn disk_of(&self, name: &str) -> String {
        let world = self.world.lock();
        let domain = world.domains.iter().find(|d| d.name == name).unwrap();
        world.requests[&domain.instance].resources[0].path.clone()
    }
}

fn host(dir: &tempfile::TempDir, disk: &str, more: &str) -> HostFile {
    let disk = dir.path().join(disk).display().to_string();
    let text = format!(
        "bin_dir = \"/b\"\n{more}\n[[blkback]]\nname = \"disk\"\ndisk = \"{disk}\"\n[[netback]]\nname = \"lan\"\n"
    );
    HostFile::parse(&text, "h").unwrap()
}

fn only_lan() -> HostFile {
    HostFile::parse("bin_dir = \"/b\"\n[[netback]]\nname = \"lan\"\n", "h").unwrap()
}

const USES_DISK: &str = "disk = [{vdev = \"xvda\", backend = \"disk\"}]";

#[test]
fn an_unused_service_that_is_removed_is_drained_and_destroyed() {
    let b = Bench::new();
    b.reload(only_lan());
    assert_eq!(b.names(), ["xenstored", "console", "lan"]);
    assert_eq!(b.world.lock().drained, ["disk"]);
    assert!(!b.manager.state().services.contains_key("disk"));
    assert!(!b.manager.services().unwrap().iter().any(|s| s.name == "disk"));
    assert!(!b.world.lock().nodes.keys().any(|k| k.contains("/local/domain/3/")), "its nodes are gone");
    // And back again.
    b.reload(host(&b.dir, "one", ""));
    assert!(b.names().contains(&"disk".to_owned()));
}

#[test]
fn one_in_use_stays_with_a_warning_until_its_guest_is_gone() {
    let b = Bench::new();
    b.guest("g", USES_DISK).unwrap();
    let before = b.life("disk");
    b.reload(only_lan());
    assert_eq!(b.life("disk"), before);
    assert!(b.note("disk").contains("in use by guest g"), "{}", b.note("disk"));
    assert!(b.world.lock().drained.is_empty());
    let problems = b.manager.info().unwrap().problems;
    assert!(problems.iter().any(|p| p.contains("disk") && p.contains("guest g")), "{problems:?}");
    // The next dom0 knows too.
    let next = b.world.boot(&only_lan());
    next.reconcile().unwrap();
    assert_eq!(b.life("disk"), before);
    next.destroy("g").unwrap();
    next.reconcile().unwrap();
    assert!(!b.names().contains(&"disk".to_owned()));
}

#[test]
fn another_policy_restarts_in_place_and_another_disk_only_if_unused() {
    let b = Bench::new();
    b.guest("g", USES_DISK).unwrap();
    let (domid, generation) = b.life("disk");
    let policy = "[restart]\nbackoff_ms = 7";
    b.reload(host(&b.dir, "one", policy));
    assert_eq!(b.life("disk"), (domid, generation + 1), "the domain stays, its process is another");
    {
        let world = b.world.lock();
        let domain = world.domains.iter().find(|d| d.name == "disk").unwrap();
        assert_eq!(world.requests[&domain.instance].restart.unwrap().backoff_ms, 7);
    }
    b.passes();
    assert_eq!(b.life("disk"), (domid, generation + 1), "once");

    b.reload(host(&b.dir, "two", policy));
    assert_eq!(b.life("disk"), (domid, generation + 1));
    assert!(b.disk_of("disk").ends_with("one"), "a guest's disk is not exchanged under it");
    assert!(b.note("disk").contains("has changed, but it is in use by guest g"), "{}", b.note("disk"));
    b.manager.destroy("g").unwrap();
    b.manager.set_host(host(&b.dir, "two", policy));
    b.passes();
    assert!(b.disk_of("disk").ends_with("two"));
    assert_eq!(b.note("disk"), "");
}

#[test]
fn a_dom0_without_its_record_takes_what_runs_for_what_was_wanted() {
    let b = Bench::new();
    b.world.lock().disk = State::default();
    let before = (b.life("disk"), b.life("lan"));
    let next = b.world.boot(&host(&b.dir, "one", ""));
    next.reconcile().unwrap();
    next.reconcile().unwrap();
    assert_eq!((b.life("disk"), b.life("lan")), before);
    assert_eq!(next.state().services.len(), 4);
}

#[test]
fn a_refused_service_waits_ever_longer_and_is_made_when_someone_asks() {
    let b = Bench::new();
    b.reload(only_lan());
    let world = &b.world;
    std::fs::remove_file(b.dir.path().join("one")).unwrap();
    b.manager.set_host(host(&b.dir, "one", ""));
    let calls = world.lock().calls;
    for _ in 0..20 {
        b.manager.reconcile().unwrap();
    }
    assert!(world.lock().calls - calls < 20 * 12, "only looked at");
    let note = b.note("disk");
    assert!(note.contains("is missing; create it") && note.contains("at once by bh restart disk"), "{note}");
    let said = b.guest("g", USES_DISK).unwrap_err().to_string();
    assert!(said.contains("service disk does not run") && said.contains("is missing; create it"), "{said}");
    // Set right: a guest that needs it does not wait for the next try.
    std::fs::write(b.dir.path().join("one"), vec![1; 4096]).unwrap();
    b.guest("g", USES_DISK).unwrap();
    assert_eq!(b.note("disk"), "");
    assert!(matches!(b.manager.make_service_now("none"), Err(OpError::NotFound(_))));
}

#[test]
fn a_guest_without_a_record_can_be_destroyed_and_keeps_its_services_until_then() {
    let b = Bench::new();
    let own = b.dir.path().join("own").display().to_string();
    let disks =
        format!("disk = [{{vdev = \"xvda\", backend = \"disk\"}}, {{vdev = \"xvdb\", path = \"{own}\"}}]");
    b.guest("g", &disks).unwrap();
    let before = b.names();
    assert!(before.contains(&"blkback-g-xvdb".to_owned()));
    b.world.lock().disk = State::default();
    let next = b.world.boot(&only_lan());
    next.reconcile().unwrap();
    next.reconcile().unwrap();
    assert_eq!(b.names(), before, "nothing of the guest is touched, its disk's service included");
    let listed = next.guests(Some("g")).unwrap();
    assert_eq!((listed.len(), listed[0].state.as_str()), (1, "unmanaged"));
    let other = next.services().unwrap().into_iter().find(|s| s.name == "disk").unwrap();
    assert!(other.note.contains("in use by guest g"), "{}", other.note);

    next.destroy("g").unwrap();
    next.reconcile().unwrap();
    assert_eq!(b.names(), ["xenstored", "console", "lan"]);
    let left: Vec<String> = b.world.lock().nodes.keys().filter(|k| k.contains("/v")).cloned().collect();
    assert!(left.iter().all(|k| !k.starts_with("/vm/") && k.matches('/').count() < 6), "{left:?}");
    assert!(matches!(next.destroy("g"), Err(OpError::NotFound(_))));
}

#[test]
fn a_killed_destroy_of_an_unmanaged_guest_leaves_nothing() {
    for calls in 0..14 {
        let b = Bench::new();
        let own = b.dir.path().join("own").display().to_string();
        b.guest("g", &format!("disk = [{{vdev = \"xvdb\", path = \"{own}\"}}]")).unwrap();
        b.world.lock().disk = State::default();
        let dom0 = b.world.boot(&host(&b.dir, "one", ""));
        dom0.reconcile().unwrap();
        b.world.lock().fuse = Some(calls);
        let killed = dom0.destroy("g") == Err(OpError::Killed) || b.world.lock().dead;
        let next = b.world.boot(&host(&b.dir, "one", ""));
        b.world.lock().fuse = None;
        match next.destroy("g") {
            Ok(()) | Err(OpError::NotFound(_)) => {}
            Err(e) => panic!("{calls}: {e}"),
        }
        next.reconcile().unwrap();
        assert_eq!(b.names(), ["xenstored", "console", "disk", "lan"], "killed {killed} at call {calls}");
    }
}

#[test]
fn a_failed_service_with_another_policy_is_started() {
    let b = Bench::new();
    b.world.set_state("lan", DomainState::Failed, 0);
    b.reload(host(&b.dir, "one", "[limits]\nmemory = 64"));
    assert_eq!(b.world.domain("lan").unwrap().state(), DomainState::Running);
}
