//! Bad input: each one line that says what and what to do, and everything else keeps running.

use std::sync::Arc;

use crate::config::HostFile;
use crate::manager::{Manager, OpError};
use crate::testing::World;

struct Bench {
    dir: tempfile::TempDir,
    world: World,
    manager: Arc<Manager>,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, len) in [("kernel", 4096), ("program", 4096), ("disk", 4096), ("short", 100)] {
            std::fs::write(at(name), vec![1; len]).unwrap();
        }
        let host = "bin_dir = \"/b\"\n[[netback]]\nname = \"lan\"\n";
        let world = World::default();
        let manager = world.boot(&HostFile::parse(host, "h").unwrap());
        manager.reconcile().unwrap();
        let this = Bench { dir, world, manager };
        this.create(&this.process("other", "vif = [{backend = \"lan\", mac = \"00:16:3e:00:00:01\"}]"))
            .unwrap();
        this
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn process(&self, name: &str, rest: &str) -> String {
        format!("name = \"{name}\"\ntype = \"process\"\nprogram = \"{}\"\n{rest}", self.path("program"))
    }

    fn pvh(&self, kernel: &str, rest: &str) -> String {
        format!("name = \"bad\"\nkernel = \"{}\"\nmemory = 64\n{rest}", self.path(kernel))
    }

    fn create(&self, text: &str) -> Result<String, OpError> {
        self.manager.create(text, "bad.toml")
    }

    /// It is refused with these words, and nothing is changed by it.
    fn refused(&self, text: &str, words: &[&str]) {
        let before = self.world.lock().domains.clone();
        let said = self.create(text).unwrap_err().to_string();
        for word in words {
            assert!(said.contains(word), "{said:?} does not say {word:?}");
        }
        assert!(!said.contains('\n') && said.len() < 400, "{said:?}");
        assert_eq!(self.world.lock().domains, before, "{said}");
        assert_eq!(self.manager.state().guests.len(), 1, "{said}");
        self.manager.reconcile().unwrap();
        let other = self.manager.guests(Some("other")).unwrap();
        assert_eq!(other[0].state, "running");
    }
}

#[test]
fn bad_files_are_one_line() {
    let b = Bench::new();
    b.refused(&b.pvh("nokernel", ""), &["guest bad: kernel ", "nokernel: no such file", "check the path"]);
    let disk = |name: &str| format!("disk = [{{vdev = \"xvda\", path = \"{}\"}}]", b.path(name));
    b.refused(&b.process("bad", &disk("nodisk")), &["disk xvda:", "nodisk is missing; create it"]);
    b.refused(&b.process("bad", &disk("short")), &["disk xvda:", "100 bytes, less than a sector"]);
    b.refused(&b.process("bad", "vcpu = 1"), &["bad.toml:4:1: unknown field `vcpu`"]);
    let mac = "vif = [{backend = \"lan\", mac = \"00:16:3E:00:00:01\"}]";
    b.refused(&b.process("bad", mac), &["mac 00:16:3e:00:00:01 is that of guest other"]);
    b.refused(&b.process("bad", "vif = [{backend = \"wan\"}]"), &["no [[netback]] wan in the host file"]);
    b.refused(&b.process("other", ""), &["guest other: it exists already"]);
}

#[test]
fn one_disk_one_writer() {
    let b = Bench::new();
    let disk = format!("disk = [{{vdev = \"xvda\", path = \"{}\"}}]", b.path("disk"));
    b.create(&b.process("first", &disk)).unwrap();
    std::os::unix::fs::symlink(b.path("disk"), b.path("alias")).unwrap();
    for name in ["disk", "alias"] {
        let disk = format!("disk = [{{vdev = \"xvda\", path = \"{}\"}}]", b.path(name));
        let said = b.create(&b.process("second", &disk)).unwrap_err().to_string();
        assert!(said.contains("is in use by guest first"), "{said}");
    }
    let ro = format!("disk = [{{vdev = \"xvda\", path = \"{}\", mode = \"ro\"}}]", b.path("kernel"));
    b.create(&b.process("reader1", &ro)).unwrap();
    b.create(&b.process("reader2", &ro)).unwrap();
}

#[test]
fn what_the_host_lacks_is_said() {
    let b = Bench::new();
    b.world.lock().missing = vec!["udmabuf: no /dev/udmabuf".into()];
    b.refused(&b.pvh("kernel", "vif = [{backend = \"lan\"}]"), &["no /dev/udmabuf", "CONFIG_UDMABUF"]);
    // The runner itself finds that there is no virtualization; what it says is what is shown.
    b.world.lock().fails = Some("bad".into());
    let said = b.create(&b.pvh("kernel", "")).unwrap_err().to_string();
    assert!(
        said.contains("guest bad: hv-vcpu ended: ") && said.contains("no hardware virtualization"),
        "{said}"
    );
    assert_eq!(b.manager.state().guests.len(), 1);
    assert!(b.manager.state().failures[0].what.contains("no hardware virtualization"));
}

#[test]
fn a_service_without_its_disk_keeps_nobody_from_running() {
    let dir = tempfile::tempdir().unwrap();
    let host = format!(
        "bin_dir = \"/b\"\n[[blkback]]\nname = \"d\"\ndisk = \"{}/no\"\n[[netback]]\nname = \"lan\"\n",
        dir.path().display()
    );
    let world = World::default();
    let manager = world.boot(&HostFile::parse(&host, "h").unwrap());
    for _ in 0..3 {
        manager.reconcile().unwrap();
    }
    let services = manager.services().unwrap();
    let disk = services.iter().find(|s| s.name == "d").unwrap();
    assert_eq!(disk.state, "missing");
    assert!(disk.note.contains("is missing; create it"), "{}", disk.note);
    assert_eq!(services.iter().filter(|s| s.state == "running").count(), 3);
    let (warnings, _) = manager.events.watch(0);
    assert_eq!(warnings.iter().filter(|e| e.kind == "warning").count(), 1, "told once");
}
