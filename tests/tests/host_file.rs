//! The host file changes under a running system; services that can't be made; guests that dom0 does not know.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;

use bulkhead_tests::system::{Config, System};
use common::*;
use serde_json::Value;

/// Writes the host file anew and has dom0 read it.
fn reload(system: &System, change: impl Fn(&str) -> String) -> String {
    let path = system.dir().join("etc/host.toml");
    let text = change(&fs::read_to_string(&path).unwrap());
    fs::write(&path, text).unwrap();
    system.bh_ok(&["reload"]).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)))
}

/// What `bh services --json` says of a service.
fn service(system: &System, name: &str) -> Option<Value> {
    let json = system.bh_json(&["services", "--brief"]).unwrap();
    json["services"].as_array().unwrap().iter().find(|s| s["name"] == name).cloned()
}

fn note(system: &System, name: &str) -> String {
    service(system, name).map(|s| s["note"].as_str().unwrap().to_owned()).unwrap_or_default()
}

fn blkback(name: &str, disk: &std::path::Path) -> String {
    format!("\n[[blkback]]\nname = \"{name}\"\ndisk = \"{}\"\n", disk.display())
}

fn guest_with(name: &str, backend: &str) -> String {
    format!("{}[[disk]]\nvdev = \"xvda\"\nbackend = \"{backend}\"\n", probe_file(name, None))
}

#[test]
fn the_host_file_is_followed() {
    let system = start();
    let (one, two) = (image(&system, "one.img", 1 << 20), image(&system, "two.img", 2 << 20));
    let disk = image(&system, "good.img", 4 << 20);
    create(&system, &loaded_guest_file("good", &disk));

    // Wrong: refused in one line, nothing changes.
    let path = system.dir().join("etc/host.toml");
    let right = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{right}\n[[blkbak]]\n")).unwrap();
    let out = system.bh(&["reload"]).unwrap();
    let error = String::from_utf8_lossy(&out.stderr).trim_end().to_owned();
    assert!(
        out.status.code() == Some(2) && error.contains("blkbak") && error.lines().count() == 1,
        "{error}"
    );
    fs::write(&path, right).unwrap();

    // Added: made.
    reload(&system, |text| text.to_owned() + &blkback("disk1", &one));
    until(&system, "disk1 runs", || service(&system, "disk1").is_some_and(|s| s["state"] == "running"));
    create(&system, &guest_with("user", "disk1"));
    let brain = Brain::of(&system, "user");
    let front = brain.disk(&system);
    front.write(0, &[7; 4096]).unwrap();
    let before = service(&system, "disk1").unwrap();

    // Another policy and another socket of the store: processes are restarted where they are, and nobody loses anything.
    let socket = system.dir().join("run/other.sock");
    reload(&system, |text| {
        text.replace("burst = 0", "burst = 0\nburst_window_ms = 1234").replace("xenstored.sock", "other.sock")
    });
    until(&system, "disk1 is restarted", || {
        service(&system, "disk1")
            .is_some_and(|s| s["state"] == "running" && s["generation"] != before["generation"])
    });
    let after = service(&system, "disk1").unwrap();
    assert_eq!((&after["domid"], &after["instance"]), (&before["domid"], &before["instance"]));
    let mut back = [0; 4096];
    front.read(0, &mut back).unwrap();
    assert_eq!(back, [7; 4096]);
    until(&system, "the store's new socket", || UnixStream::connect(&socket).is_ok());
    assert!(!system.dir().join("run/xenstored.sock").exists());

    // Another disk while a guest has the first: it stays, and says so.
    let (one_text, two_text) = (one.display().to_string(), two.display().to_string());
    let shown = reload(&system, |text| text.replace(&one_text, &two_text));
    assert!(shown.contains("in use by guest user"), "{shown}");
    assert!(system.bh_ok(&["info"]).unwrap().contains("in use by guest user"));
    front.write(4096, &[8; 4096]).unwrap();
    assert_eq!(fs::read(&one).unwrap()[4096..8192], [8; 4096]);
    // Removed: the same.
    let shown = reload(&system, |text| text.replace(&blkback("disk1", &two), ""));
    assert!(shown.contains("not in the host file any more, but in use by guest user"), "{shown}");
    // dom0 killed meanwhile changes nothing.
    system.bh_ok(&["restart", "dom0"]).unwrap();
    until(&system, "told again", || note(&system, "disk1").contains("in use by guest user"));
    drop(front);
    system.bh_ok(&["destroy", "user"]).unwrap();
    until(&system, "disk1 goes with its last user", || service(&system, "disk1").is_none());
    still_works(&system, "good");
}

#[test]
fn a_refused_service_burns_nothing_and_is_made_at_once_when_asked() {
    let system = start();
    let missing = system.dir().join("missing.img");
    reload(&system, |text| text.to_owned() + &blkback("disk1", &missing));
    until(&system, "the reason is shown", || note(&system, "disk1").contains("missing.img"));
    let text = system.bh_ok(&["services"]).unwrap();
    assert!(text.contains("at once by bh restart disk1"), "{text}");
    assert!(system.bh_ok(&["info"]).unwrap().contains("missing.img"));
    // Seconds of it: few tries, and the domids are where they were.
    let created = |system: &System| {
        system
            .bh_ok(&["events"])
            .unwrap()
            .lines()
            .filter(|l| l.contains("created") && l.contains("disk1"))
            .count()
    };
    let before = created(&system);
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert!(created(&system) - before <= 3, "tried ever more rarely");
    let out = system.bh(&["restart", "disk1"]).unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("missing.img"));
    let next = service_domid(&system, netback()) + 1;

    // A guest that asks for it is told the reason of now, not of then.
    let path = system.dir().join("user.toml");
    fs::write(&path, guest_with("user", "disk1")).unwrap();
    let refused = system.bh(&["create", path.to_str().unwrap()]).unwrap();
    let error = String::from_utf8_lossy(&refused.stderr).trim_end().to_owned();
    assert!(
        error.contains("disk1") && error.contains("missing.img") && error.lines().count() == 1,
        "{error}"
    );
    image(&system, "missing.img", 1 << 20);
    create(&system, &guest_with("user", "disk1"));
    assert_eq!(service_domid(&system, "disk1"), next, "refused creations used no number up");
    assert_eq!(note(&system, "disk1"), "");
}

/// The socket's directory is missing when the host starts: nothing else can be done, but it is said and tried again.
#[test]
fn a_missing_directory_of_the_stores_socket() {
    let mut config = Config::of_this_build().unwrap();
    config.keep = false;
    let system = start_with(config);
    reload(&system, |text| text.replace("run/xenstored.sock", "absent/xenstored.sock"));
    until(&system, "it is said", || note(&system, "xenstored").contains("absent"));
    // The store goes on with what it has.
    let disk = image(&system, "good.img", 4 << 20);
    create(&system, &loaded_guest_file("good", &disk));
    fs::create_dir(system.dir().join("absent")).unwrap();
    system.bh_ok(&["reload"]).unwrap();
    let socket = system.dir().join("absent/xenstored.sock");
    until(&system, "the socket", || UnixStream::connect(&socket).is_ok());
    until(&system, "nothing is wrong any more", || note(&system, "xenstored").is_empty());
    still_works(&system, "good");
}

/// The state directory is lost under running guests: they are shown, keep running, and can be destroyed.
#[test]
fn guests_without_a_record() {
    let system = start();
    let disk = image(&system, "lost.img", 4 << 20);
    create(&system, &loaded_guest_file("lost", &disk));
    fs::remove_file(system.dir().join("state/state.json")).unwrap();
    kill_dom0(&system);
    until(&system, "it is unmanaged", || guest(&system, "lost").is_some_and(|g| g["state"] == "unmanaged"));
    still_works_by_log(&system, "lost");
    assert!(
        system.services().unwrap().contains_key(&blkback_of("lost")),
        "its disk's service is not taken away"
    );
    assert!(system.bh_ok(&["list", "lost"]).unwrap().contains("bh destroy"));
    system.bh_ok(&["destroy", "lost"]).unwrap();
    assert!(guest(&system, "lost").is_none());
    until(&system, "nothing of it is left", || !system.services().unwrap().contains_key(&blkback_of("lost")));
    // The load begins on an empty disk.
    create(&system, &loaded_guest_file("lost", &image(&system, "lost.img", 4 << 20)));
    still_works(&system, "lost");
}

fn kill_dom0(system: &System) {
    let killed = system.kill(&["dom0-supervisor".into()]).unwrap();
    system.wait_restarted(&killed, SOON).unwrap();
}

/// Its disk is written: its console is not to be had without a record.
fn still_works_by_log(system: &System, name: &str) {
    let disk = system.dir().join(format!("{name}.img"));
    let before = fs::read(&disk).unwrap();
    until(system, "its disk is written", || fs::read(&disk).unwrap() != before);
}

/// Counters come from the services themselves, and one that hangs costs a second, not the list.
#[test]
fn json_has_every_services_counters() {
    let system = start();
    let disk = image(&system, "good.img", 4 << 20);
    create(&system, &loaded_guest_file("good", &disk));
    let counters = |name: &str| -> Vec<String> {
        let json = system.bh_json(&["services"]).unwrap();
        let service =
            json["services"].as_array().unwrap().iter().find(|s| s["name"] == name).cloned().unwrap();
        let counters = service["counters"].as_array().unwrap().clone();
        counters.iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect()
    };
    for name in ["xenstored", "console", &blkback_of("good")] {
        until(&system, &format!("counters of {name}"), || !counters(name).is_empty());
    }
    let process = nix::unistd::Pid::from_raw(service_process(&system, netback()).0);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let asked = std::time::Instant::now();
    assert!(counters(netback()).is_empty());
    assert!(asked.elapsed() < std::time::Duration::from_secs(5), "{:?}", asked.elapsed());
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGCONT).unwrap();
}
