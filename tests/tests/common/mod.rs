//! What the whole-system tests share.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_tests::fds;
use bulkhead_tests::inspect::{Found, Process, search_bytes, search_file};
use bulkhead_tests::probe::Probe;
use bulkhead_tests::system::{Config, NETBACK, System};
use domain_kit::mem::SharedMem;
use domain_kit::xenbus::connect_store;
use domain_kit::xs::XsClient;
use domain_kit::{Domain, Hypercall};
use frontends::blkfront::{BlkDisk, BlkFront};
use hv_abi::{HYPERCALL_FD, PAGE_SIZE, fd_kind};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long anything may take here.
pub const SOON: Duration = Duration::from_secs(30);
/// xvda's number.
pub const XVDA: u32 = 51712;

/// A running system.
pub fn start() -> System {
    start_with(Config::of_this_build().unwrap())
}

/// A running system of this making.
pub fn start_with(config: Config) -> System {
    System::start(config).unwrap_or_else(|e| panic!("{e:#}"))
}

/// Waits until `done`, or panics with the system's log.
pub fn until(system: &System, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(
            Instant::now() < deadline,
            "{what}: not within {} s\n{}\n{}",
            SOON.as_secs(),
            system.bh_ok(&["services"]).unwrap_or_else(|e| e.to_string()),
            system.log_tail(25)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An image file of so many bytes.
pub fn image(system: &System, name: &str, bytes: u64) -> PathBuf {
    let path = system.dir().join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// The program of this name in the build's folder.
pub fn program(name: &str) -> PathBuf {
    Config::of_this_build().unwrap().bin_dir.join(name)
}

/// The probe stands in for a service's program: dom0 makes it as it makes that service, with that service's rights. The folder of the
/// programs is kept by what is returned.
pub fn probe_as(config: &mut Config, service: &str) -> tempfile::TempDir {
    let bin = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&config.bin_dir).unwrap().flatten().filter(|e| e.path().is_file()) {
        if entry.file_name() != service {
            std::os::unix::fs::symlink(entry.path(), bin.path().join(entry.file_name())).unwrap();
        }
    }
    std::os::unix::fs::symlink(config.bin_dir.join("probe"), bin.path().join(service)).unwrap();
    config.bin_dir = bin.path().into();
    bin
}

/// Domain file of a guest that is the probe.
pub fn probe_file(name: &str, disk: Option<&Path>) -> String {
    let mut text = format!(
        "name = \"{name}\"\ntype = \"process\"\nprogram = \"{}\"\non_crash = \"preserve\"\n",
        program("probe").display()
    );
    if let Some(disk) = disk {
        text.push_str(&format!("[[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n", disk.display()));
    }
    text
}

/// Domain file of a guest that loads its disk; the text says how it goes on its console.
pub fn loaded_guest_file(name: &str, disk: &Path) -> String {
    format!(
        "name = \"{name}\"\ntype = \"process\"\nprogram = \"{}\"\nargs = [\"--work\", \"disk\"]\n\
         [[disk]]\nvdev = \"xvda\"\npath = \"{}\"\n",
        program("process-guest").display(),
        disk.display()
    )
}

/// What `bh` says, or panics with the system's log.
pub fn bh(system: &System, args: &[&str]) -> String {
    system.bh_ok(args).unwrap_or_else(|e| panic!("{args:?}: {e:#}\n{}", system.log_tail(25)))
}

/// What `bh` says when it refuses: one line.
pub fn refused(system: &System, args: &[&str]) -> String {
    let out = system.bh(args).unwrap();
    assert!(!out.status.success(), "{args:?}");
    let text = String::from_utf8_lossy(&out.stderr).trim_end().to_owned();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// Creates, or panics with the system's log.
pub fn create(system: &System, file: &str) {
    system.create(file).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)));
}

/// What `bh list --json` says of all guests.
pub fn guests(system: &System) -> Vec<Value> {
    let json = system.bh_json(&["list"]).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)));
    json["guests"].as_array().or(json.as_array()).cloned().unwrap_or_default()
}

/// What `bh list --json` says of a guest.
pub fn guest(system: &System, name: &str) -> Option<Value> {
    guests(system).into_iter().find(|g| g["name"] == name)
}

/// A guest's domid.
pub fn domid(system: &System, name: &str) -> u16 {
    let row = guest(system, name).unwrap_or_else(|| panic!("no guest {name}"));
    row["domid"].as_u64().unwrap() as u16
}

/// Domid of a service.
pub fn service_domid(system: &System, name: &str) -> u16 {
    let json = system.bh_json(&["services", "--brief"]).unwrap();
    let list = json["services"].as_array().or(json.as_array()).cloned().unwrap_or_default();
    let row = list.iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("no service {name}: {json}"));
    row["domid"].as_u64().unwrap() as u16
}

/// The process of a service.
pub fn service_process(system: &System, name: &str) -> Process {
    let services = system.services().unwrap();
    let pid = services.get(name).unwrap_or_else(|| panic!("no service {name}: {services:?}")).pid;
    assert!(pid > 1, "{name} has no process");
    Process(pid)
}

/// The probe's answer. A forbidden call ends its process; hv-core starts the next, which is asked again.
pub fn answer_of(system: &System, probe: &Probe, order: &str) -> String {
    let mut answer = None;
    until(system, "the probe answers", || {
        answer = probe.order(order).ok().filter(|a| !a.is_empty());
        answer.is_some()
    });
    answer.unwrap_or_default()
}

/// Name of a guest's own blkback.
pub fn blkback_of(guest: &str) -> String {
    format!("blkback-{guest}-xvda")
}

/// Speaks as a domain whose program is the probe.
pub struct Brain {
    pub domain: Domain,
    pub probe: Probe,
    pub xs: XsClient,
}

impl Brain {
    pub fn of(system: &System, name: &str) -> Brain {
        let probe = Probe::new(&system.dir().join("run"), domid(system, name));
        let hv = Hypercall::new(probe.hypercall().unwrap_or_else(|e| panic!("{e:#}")));
        let hello = hv.hello().unwrap();
        let domain = Domain { name: name.into(), hello, hv, started: Instant::now() };
        let xs = connect_store(&domain, SOON).unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)));
        Brain { domain, probe, xs }
    }

    /// Its xvda, connected.
    pub fn disk(&self, system: &System) -> Arc<BlkDisk> {
        let front = BlkFront::connect(&self.domain.hv, &self.xs, self.domain.domid(), XVDA, SOON)
            .unwrap_or_else(|e| panic!("{e}\n{}", system.log_tail(25)));
        Arc::new(BlkDisk::new(front).unwrap())
    }
}

/// The bytes that a guest of [`loaded_guest_file`] has verified, from its console so far; and whether anything went wrong.
pub fn verified(system: &System, name: &str) -> (u64, u64) {
    let text = system.bh_ok(&["console", name, "--log"]).unwrap_or_default();
    let mut last = text.lines().filter_map(|l| {
        let json: Value = serde_json::from_str(l[l.rfind("BH: ")? + 4..].trim()).ok()?;
        let disk = &json["disk"];
        let bad = disk["errors"].as_u64()? + disk["corrupt"].as_u64()?;
        Some((disk["verified_bytes"].as_u64()?, bad))
    });
    last.next_back().unwrap_or((0, 0))
}

/// Panics unless the guest's load goes on, without errors.
pub fn still_works(system: &System, name: &str) {
    let before = verified(system, name).0;
    until(system, &format!("the load of {name} goes on"), || verified(system, name).0 > before);
    let (_, bad) = verified(system, name);
    assert_eq!(bad, 0, "errors or wrong blocks of {name}\n{}", system.log_tail(25));
}

/// The service's own hypercalls: a channel of its identity. It is stopped meanwhile, so that no answer goes astray.
pub fn speak_as(process: Process) -> Hypercall {
    kill(Pid::from_raw(process.0), Signal::SIGSTOP).unwrap();
    let channel = Hypercall::new(fds::of_process(process.0, HYPERCALL_FD).unwrap()).new_channel();
    kill(Pid::from_raw(process.0), Signal::SIGCONT).unwrap();
    channel.unwrap()
}

/// Searches all that the identity can have again by calls: its regions, its grant maps, its fd store.
pub fn search_by_calls(hv: &Hypercall, texts: &[&[u8]], found: &mut Found) {
    let mut memory = |at: String, fd, pages: usize| {
        let mapped = SharedMem::map(fd, pages * PAGE_SIZE).unwrap();
        let mut bytes = vec![0; mapped.len()];
        mapped.copy_out(0, &mut bytes);
        search_bytes(&at, &bytes, texts, found);
    };
    for info in hv.region_list().unwrap() {
        let (info, fd) = hv.region_fetch(info.region).unwrap();
        memory(format!("own region {}", info.region), fd, info.pages as usize);
    }
    for map in hv.grant_list().unwrap() {
        let raw = hv.grant_claim(map.handle).unwrap();
        memory(format!("grant map of domain {}", map.domid), raw.fd, raw.fd_pages as usize);
    }
    for info in hv.fd_list().unwrap() {
        let name = info.name.as_str().unwrap_or("?").to_owned();
        let (info, fd) = hv.fd_get(&name).unwrap();
        if info.kind == fd_kind::MEMFD {
            search_file(&format!("fd store {name}"), &File::from(fd), texts, found).unwrap();
        }
    }
}

/// The name of netback, for symmetry.
pub fn netback() -> &'static str {
    NETBACK
}
