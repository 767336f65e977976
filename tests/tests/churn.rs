//! Guests come and go: nothing may be left of them.

mod common;

use std::collections::BTreeMap;
use std::fs;

use bulkhead_tests::inspect::Process;
use bulkhead_tests::system::System;
use common::*;
use domain_kit::xs::{XsClient, XsOps};

const ROUNDS: usize = 30;

fn nodes(xs: &XsClient, path: &str, into: &mut Vec<String>) {
    // What goes away meanwhile is not counted.
    for child in xs.directory(path).unwrap_or_default() {
        let child = format!("{}/{child}", path.trim_end_matches('/'));
        into.push(child.clone());
        nodes(xs, &child, into);
    }
}

fn entries(path: std::path::PathBuf) -> usize {
    fs::read_dir(path).map(|d| d.count()).unwrap_or(0)
}

fn lines(path: String) -> usize {
    fs::read_to_string(path).unwrap_or_default().lines().count()
}

/// Everything that could be left over, by name.
fn counts(system: &System, xs: &XsClient) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let core = Process(system.hv_core_pid().cast_signed());
    let mut all = Vec::new();
    nodes(xs, "/", &mut all);
    counts.insert("xenstore nodes".into(), all.len());
    counts.insert("services".into(), system.services().unwrap().len());
    counts.insert("mounts of the host".into(), lines("/proc/self/mountinfo".into()));
    counts.insert("mounts of hv-core".into(), lines(format!("/proc/{}/mountinfo", core.0)));
    counts.insert("control sockets".into(), entries(system.dir().join("run/ctl")));
    counts.insert("files of dom0's state".into(), entries(system.dir().join("state")));
    counts.insert("fds of hv-core".into(), core.fds().unwrap().len());
    counts.insert("threads of hv-core".into(), core.status("Threads").unwrap().parse().unwrap());
    for name in ["dom0-supervisor", "xenstored", "console", netback()] {
        let process = service_process(system, name);
        counts.insert(format!("fds of {name}"), process.fds().unwrap().len());
        counts.insert(format!("threads of {name}"), process.status("Threads").unwrap().parse().unwrap());
        counts.insert(format!("interfaces of {name}"), process.interfaces().unwrap().len());
    }
    // Processes of hv-core's, namespaces and uids: each domain has its own.
    let children =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let (mut processes, mut namespaces, mut uids) = (0, std::collections::BTreeSet::new(), 0);
    let session: Vec<i32> = descendants(core.0, children.collect());
    for pid in session {
        processes += 1;
        namespaces.extend(Process(pid).namespace("net").ok());
        uids += usize::from(Process(pid).status("Uid").is_some_and(|u| u.starts_with("11")));
    }
    counts.insert("processes".into(), processes);
    counts.insert("network namespaces".into(), namespaces.len());
    counts.insert("processes with a domain's uid".into(), uids);
    counts
}

/// A process and all below it.
fn descendants(root: i32, all: Vec<i32>) -> Vec<i32> {
    let parent = |pid: &i32| Process(*pid).status("PPid").and_then(|p| p.parse::<i32>().ok());
    let parents: BTreeMap<i32, i32> = all.iter().filter_map(|p| Some((*p, parent(p)?))).collect();
    let below = |mut pid: i32| {
        while let Some(&up) = parents.get(&pid) {
            if pid == root {
                return true;
            }
            pid = up;
        }
        pid == root
    };
    parents.keys().copied().filter(|p| below(*p)).collect()
}

fn resident_kib(process: Process) -> u64 {
    let text = process.status("VmRSS").unwrap_or_default();
    text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn memory(system: &System) -> BTreeMap<&'static str, u64> {
    let core = Process(system.hv_core_pid().cast_signed());
    let mut memory = BTreeMap::from([("hv-core", resident_kib(core))]);
    for name in ["dom0-supervisor", "xenstored", "console"] {
        memory.insert(name, resident_kib(service_process(system, name)));
    }
    memory
}

#[test]
fn thirty_guests_come_and_go() {
    let system = start();
    let xs = XsClient::connect_socket(system.dir().join("run/xenstored.sock"), SOON).unwrap();
    let disk = image(&system, "guest.img", 1 << 20);
    let file = format!(
        "{}[[vif]]\nbackend = \"{}\"\nmac = \"00:16:3e:00:00:07\"\n",
        loaded_guest_file("churn", &disk),
        netback()
    );
    let mut domids = Vec::new();
    let round = |domids: &mut Vec<u16>| {
        create(&system, &file);
        domids.push(domid(&system, "churn"));
        system.bh_ok(&["destroy", "churn"]).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)));
    };
    // The first rounds make what stays: buffers, caches, threads.
    for _ in 0..3 {
        round(&mut domids);
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    let (before, memory_before) = (counts(&system, &xs), memory(&system));
    for _ in 0..ROUNDS {
        round(&mut domids);
    }
    let more = |now: &BTreeMap<String, usize>| -> Vec<String> {
        // dom0 keeps threads for as many callers as there were at once; one for each guest would be a leak.
        let slack = |name: &str| if name == "threads of dom0-supervisor" { ROUNDS / 3 } else { 0 };
        let grown = now.iter().filter(|(name, n)| **n > before[*name] + slack(name));
        grown.map(|(name, n)| format!("{name}: {} before, {n} now", before[name])).collect()
    };
    // What ends late (releases, threads that notice) has a moment.
    let mut left = more(&counts(&system, &xs));
    for _ in 0..100 {
        if left.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        left = more(&counts(&system, &xs));
    }
    let mut all = Vec::new();
    nodes(&xs, "/", &mut all);
    assert!(left.is_empty(), "left over after {ROUNDS} guests:\n{}\n{}", left.join("\n"), all.join("\n"));
    assert!(guest(&system, "churn").is_none());
    for (name, kib) in memory(&system) {
        let grown = kib.saturating_sub(memory_before[name]);
        assert!(grown < 4096, "{name} grew by {grown} KiB, from {} KiB", memory_before[name]);
    }
    // A domid is not used again at once: what names an old one must not meet a new domain.
    let distinct: std::collections::BTreeSet<u16> = domids.iter().copied().collect();
    assert_eq!(distinct.len(), domids.len(), "{domids:?}");
}
