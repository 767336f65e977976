//! What a backend can see and call, and what a domain can reach, in the real system. What hv-core alone refuses is tested in
//! hv-core/tests; here are the real services, and the ways round them.

mod common;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use bulkhead_tests::inspect::Process;
use bulkhead_tests::outside::ADDRESS;
use common::*;
use domain_kit::grants::Region;
use domain_kit::hypercall::CopyEntryExt;
use domain_kit::mem::SharedMem;
use hv_abi::{CopyEntry, DOMID_INVALID, PAGE_SIZE};
use nix::errno::Errno;

/// Text that is nowhere else.
fn text(what: &str) -> Vec<u8> {
    let random: [u8; 8] = std::fs::read("/proc/sys/kernel/random/uuid").unwrap()[..8].try_into().unwrap();
    format!("{what}-{}", String::from_utf8_lossy(&random)).into_bytes()
}

fn fill(region: &Region, text: &[u8]) {
    for page in 0..region.info.pages as usize {
        region.mem.copy_in(page * PAGE_SIZE + 100, text);
    }
}

#[test]
fn a_backend_sees_only_granted_pages() {
    let system = start();
    let file = probe_file("victim", Some(&image(&system, "victim.img", 8 << 20)));
    let args_secret = text("SECRET-IN-ITS-OWN-MEMORY");
    let args = format!("args = [\"--secret\", \"{}\"]\n[[disk]]", String::from_utf8_lossy(&args_secret));
    create(&system, &file.replace("[[disk]]", &args));
    create(&system, &probe_file("other", Some(&image(&system, "other.img", 8 << 20))));
    let (victim, other) = (Brain::of(&system, "victim"), Brain::of(&system, "other"));

    // Granted to the victim's blkback, and written through it: this must be found.
    let marker = text("GRANTED-TO-BLKBACK");
    let disk = victim.disk(&system);
    let mut block = vec![0; PAGE_SIZE];
    block[..marker.len()].copy_from_slice(&marker);
    disk.write(0, &block).unwrap();
    disk.sync().unwrap();
    let mut back = vec![0; PAGE_SIZE];
    disk.read(0, &mut back).unwrap();
    assert!(back == block, "what was written comes back");

    // Not granted to it: pages for other peers, another guest's pages, what another guest wrote to its own disk.
    let (for_netback, for_store, of_other, on_other) = (
        text("SECRET-FOR-NETBACK"),
        text("SECRET-FOR-XENSTORED"),
        text("SECRET-OF-ANOTHER-GUEST"),
        text("SECRET-ON-ANOTHER-DISK"),
    );
    let region = |brain: &Brain, peer: &str| {
        Region::create(&brain.domain.hv, service_domid(&system, peer), 3, 7).unwrap()
    };
    let netback_region = region(&victim, netback());
    let store_region = region(&victim, "xenstored");
    let other_region = region(&other, &blkback_of("other"));
    fill(&netback_region, &for_netback);
    fill(&store_region, &for_store);
    fill(&other_region, &of_other);
    let other_disk = other.disk(&system);
    block[..on_other.len()].copy_from_slice(&on_other);
    other_disk.write(0, &block).unwrap();

    let secrets: [&[u8]; 5] = [&args_secret, &for_netback, &for_store, &of_other, &on_other];
    let texts: Vec<&[u8]> = secrets.into_iter().chain([marker.as_slice()]).collect();
    let backend = service_process(&system, &blkback_of("victim"));
    let mut found = backend.search_memory(&texts).unwrap();
    assert!(found.unread.is_empty(), "memory that the host cannot read: {:?}", found.unread);
    let granted = &found.places[secrets.len()];
    assert!(
        granted.iter().any(|p| p.contains("memfd:region")),
        "the granted page is not mapped where it should be: {granted:?}\n{:?}",
        backend.maps()
    );
    backend.search_files(&texts, &mut found).unwrap();
    let hv = speak_as(backend);
    let before = found.places[secrets.len()].len();
    search_by_calls(&hv, &texts, &mut found);
    assert!(found.places[secrets.len()].len() > before, "its grant maps are searched as well");
    for (secret, places) in texts.iter().zip(&found.places).take(secrets.len()) {
        let secret = String::from_utf8_lossy(secret);
        assert!(places.is_empty(), "{secret} is within reach of {}: {places:?}", blkback_of("victim"));
    }

    // The search does find each where it may be.
    let victim_process = Process(guest(&system, "victim").unwrap()["host_pid"].as_i64().unwrap() as i32);
    let own = victim_process.search_memory(&[&args_secret]).unwrap();
    assert!(!own.places[0].is_empty(), "the guest's own memory holds its own secret");
    let theirs = service_process(&system, &blkback_of("other")).search_memory(&[&on_other]).unwrap();
    assert!(!theirs.places[0].is_empty(), "the other guest's backend has that guest's data");

    // What it does not have it cannot get.
    let victim_id = victim.domain.domid();
    for region in [&netback_region, &store_region] {
        let refused = hv.grant_map(victim_id, &[region.gref(0)], 0).unwrap_err();
        assert!(refused.is(Errno::EACCES), "{refused}");
    }
    let refused = hv.grant_map(other.domain.domid(), &[other_region.gref(0)], 0).unwrap_err();
    assert!(refused.is(Errno::EACCES), "{refused}");
    // One good and one bad: nothing.
    let maps = hv.grant_list().unwrap().len();
    let good = victim.domain.hv.region_create(service_domid(&system, &blkback_of("victim")), 1, 8).unwrap().0;
    let mixed = [good.first_gref, netback_region.gref(0)];
    assert!(hv.grant_map(victim_id, &mixed, 0).unwrap_err().is(Errno::EACCES));
    assert_eq!(hv.grant_list().unwrap().len(), maps, "all or nothing");
    let (buffer, buffer_fd) = SharedMem::create("buffer", PAGE_SIZE).unwrap();
    let id = hv.buffer_register(&buffer_fd, PAGE_SIZE as u64).unwrap();
    let entries = [
        CopyEntry::from_grant(victim_id, netback_region.gref(0), 0, 4096, id, 0),
        CopyEntry::to_grant(victim_id, netback_region.gref(0), 0, 4096, id, 0),
        CopyEntry::from_grant(other.domain.domid(), other_region.gref(1), 0, 4096, id, 0),
    ];
    let mut statuses = [0; 3];
    hv.grant_copy(&entries, &mut statuses).unwrap();
    assert!(statuses.iter().all(|s| *s < 0), "{statuses:?}");
    let mut bytes = vec![0; PAGE_SIZE];
    buffer.copy_out(0, &mut bytes);
    assert!(bytes.iter().all(|b| *b == 0), "a refused copy leaves the buffer alone");
    let mut kept = vec![0; for_netback.len()];
    netback_region.mem.copy_out(100, &mut kept);
    assert!(kept == for_netback, "a refused copy leaves the page alone");
}

#[test]
fn a_backend_cannot_call_what_is_not_its_own() {
    let system = start();
    create(&system, &probe_file("victim", Some(&image(&system, "victim.img", 1 << 20))));
    let victim = Brain::of(&system, "victim");
    let disk = victim.disk(&system);
    let backend = service_process(&system, &blkback_of("victim"));
    let hv = speak_as(backend);
    let id = victim.domain.domid();

    let resources: Vec<_> =
        hv.resource_list().unwrap().iter().map(|r| r.name.as_str().unwrap_or("?").to_owned()).collect();
    assert_eq!(resources, ["disk"]);
    for name in ["kvm", "kernel", "socket", "toolstack", "/etc/passwd", "../disk"] {
        assert!(hv.resource_open(name).unwrap_err().is(Errno::ENOENT), "{name}");
    }
    let info = hv.dom_info(id).unwrap();
    assert_eq!((info.store_gref, info.store_port, info.console_port), (0, 0, 0), "others' rings are hidden");
    assert!(hv.dom_list().unwrap_err().is(Errno::EPERM));
    assert!(hv.ram_fetch().unwrap_err().is(Errno::EPERM));
    assert!(hv.port_bind_virq(hv_abi::VIRQ_DOM_EXC, 0).unwrap_err().is(Errno::EPERM));
    // The victim's ports for others, its regions and its handles by their numbers.
    let own_ports: BTreeSet<u32> = hv.port_list().unwrap().iter().map(|p| p.port).collect();
    for port in victim.domain.hv.port_list().unwrap() {
        let bound = hv.port_bind_interdomain(id, port.port);
        let mine = bound.as_ref().is_ok_and(|p| own_ports.contains(&p.port));
        assert!(mine || bound.is_err(), "port {port:?} of the victim was bound: {bound:?}");
    }
    let own_regions: BTreeSet<u32> = hv.region_list().unwrap().iter().map(|r| r.region).collect();
    for number in (0..50).filter(|n| !own_regions.contains(n)) {
        assert!(hv.region_fetch(number).is_err(), "region {number}");
        assert!(hv.region_delete(number).is_err(), "region {number}");
    }
    let handles: Vec<u64> = hv.grant_list().unwrap().iter().map(|m| m.handle).collect();
    for handle in (0..200).chain([u64::MAX, 1 << 32, (1 << 32) + 1]).filter(|h| !handles.contains(h)) {
        assert!(hv.grant_unmap(handle).is_err(), "handle {handle:#x}");
        assert!(hv.grant_claim(handle).is_err(), "handle {handle:#x}");
    }
    // A handle of an earlier life is stale, and said to be.
    let before = system.kill(&[blkback_of("victim")]).unwrap();
    until(&system, "the channel ends with the incarnation", || hv.grant_list().is_err());
    system.wait_restarted(&before, SOON).unwrap();
    disk.write(0, &[1; 4096]).unwrap();
    let hv = speak_as(service_process(&system, &blkback_of("victim")));
    for handle in handles {
        if hv.grant_list().unwrap().iter().all(|m| m.handle != handle) {
            let refused = hv.grant_claim(handle).unwrap_err();
            assert!(refused.is(Errno::ESTALE), "{refused}");
        }
    }
    // xenstore: what belongs to others cannot be read or written over its ring. (The store's own tests are in xenstored.)
    let xs = &victim.xs;
    use domain_kit::xs::XsOps;
    let other_home = format!("/local/domain/{}", service_domid(&system, netback()));
    for path in [format!("{other_home}/secret"), "/local/domain/0/x".into(), "/vm/x".into(), "/x".into()] {
        assert!(xs.write(&path, b"1").is_err(), "a guest wrote {path}");
    }
    assert_ne!(victim.domain.hello.xenstore_domid, DOMID_INVALID);
}

/// All services and a guest, looked at from the host.
#[test]
fn every_process_is_confined() {
    let system = start();
    create(&system, &probe_file("guest", Some(&image(&system, "guest.img", 1 << 20))));
    let host = Process(std::process::id().cast_signed());
    let hv_core = Process(system.hv_core_pid().cast_signed());
    let mut processes: Vec<(String, Process)> =
        system.services().unwrap().into_values().map(|s| (s.name, Process(s.pid))).collect();
    processes.push((
        "guest".into(),
        Process(guest(&system, "guest").unwrap()["host_pid"].as_i64().unwrap() as i32),
    ));
    assert!(processes.len() >= 6, "{processes:?}");
    let mut seen: BTreeSet<(String, String)> = BTreeSet::new();
    let net_admin = format!("{:016x}", 1u64 << 12);
    for (name, process) in &processes {
        let status = |key: &str| process.status(key).unwrap_or_default();
        let net = name == netback();
        assert_eq!(status("Seccomp"), "2", "{name}: a filter");
        assert_eq!(status("NoNewPrivs"), "1", "{name}");
        let caps = if net { net_admin.as_str() } else { "0000000000000000" };
        for set in ["CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh"] {
            let value = status(set);
            let fine = value == caps || value == "0000000000000000";
            assert!(fine, "{name}: {set} is {value}");
        }
        let pids = status("NSpid");
        assert!(pids.ends_with("\t1"), "{name}: alone in its pid namespace: {pids}");
        for kind in ["user", "pid", "mnt", "ipc", "uts", "net"] {
            let namespace = process.namespace(kind).unwrap();
            assert_ne!(namespace, host.namespace(kind).unwrap(), "{name} {kind}");
            assert_ne!(namespace, hv_core.namespace(kind).unwrap(), "{name} {kind}");
            assert!(seen.insert((kind.into(), namespace)), "{name} shares its {kind} namespace");
        }
        let uid = status("Uid").split_whitespace().next().unwrap_or_default().to_owned();
        assert!(uid.parse::<u32>().is_ok_and(|u| u >= 1_100_000_000), "{name}: uid {uid}");
        assert!(seen.insert(("uid".into(), uid)), "{name} shares its uid");
        // Interfaces: none but loopback; netback has its uplink, bridge and TAPs.
        let interfaces = process.interfaces().unwrap();
        assert_eq!(interfaces.len() > 1, net, "{name}: {interfaces:?}");
        // The root holds nothing but what was bound in.
        let root = process.root().unwrap();
        let allowed: &[&str] = match name.as_str() {
            "dom0-supervisor" | "dom0" => &["etc", "var", "tmp", "run"],
            n if n == netback() => &["dev"],
            _ => &[],
        };
        assert!(root.iter().all(|entry| allowed.contains(&entry.as_str())), "{name}: {root:?}");
        // No descriptor of a directory, of /proc or of the host's files.
        for (fd, what) in process.fds().unwrap() {
            let disk = name.starts_with("blkback") && what.ends_with(".img");
            let dom0 = name.starts_with("dom0") && what.contains("/bulkhead");
            let fine = ["socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/null"]
                .iter()
                .any(|p| what.starts_with(p))
                || (net && what.starts_with("/dev/net/tun"))
                || disk
                || dom0;
            assert!(fine, "{name}: fd {fd} is {what}");
        }
    }
}

/// From the inside, with a guest that tries.
#[test]
fn a_domain_reaches_nothing_of_the_host() {
    let system = start();
    create(&system, &probe_file("inside", None));
    create(&system, &probe_file("neighbour", None));
    let inside = Brain::of(&system, "inside").probe;
    let neighbour = guest(&system, "neighbour").unwrap();
    let ask = |order: &str| inside.order(order).unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)));

    assert_eq!(ask("list /"), "", "an empty root");
    assert_eq!(ask("pid"), "1");
    assert!(!ask("fds").split(' ').any(|fd| fd == "6"), "{}", ask("fds"));
    let run = system.dir().join("run");
    let in_run = |name: &str| run.join(name).display().to_string();
    let sockets = ["dom0.sock", "xenstored.sock", "ctl/0.sock", "ctl/1.sock"].map(in_run);
    assert!(std::path::Path::new(&sockets[0]).exists() && std::path::Path::new(&sockets[1]).exists());
    for path in &sockets {
        assert_eq!(ask(&format!("unix {path}")), "ENOENT", "{path}");
    }
    let image = image(&system, "host-file", 4096);
    for path in ["/etc/passwd", "/proc/self/status", "/proc/1/mem", "/dev/kvm", "/dev/mem", "/sys/kernel"]
        .into_iter()
        .chain([image.to_str().unwrap(), "/..", "/../../etc/passwd"])
    {
        let opened = ask(&format!("open {path}"));
        // The parent of the root is the root.
        assert!(opened == "ENOENT" || opened == "EACCES" || path == "/..", "{path}: {opened}");
        let by_ring = ask(&format!("uring-open {path}"));
        assert!(
            ["ENOENT", "EACCES", "EPERM", "ENOSYS"].contains(&by_ring.as_str()) || path == "/..",
            "{path}: {by_ring}"
        );
    }
    let created = ask("create /x");
    assert!(["EROFS", "EACCES"].contains(&created.as_str()), "{created}");

    // The outside's network, loopback of the host's side, and abstract sockets there.
    let name = format!("bulkhead-test-{}", std::process::id());
    let abstract_name = name.clone();
    let (port, _kept) = system
        .outside
        .run(move || {
            let listener = TcpListener::bind((ADDRESS, 0)).unwrap();
            let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
            let unix = UnixListener::bind_addr(&address).unwrap();
            (listener.local_addr().unwrap().port(), (listener, unix))
        })
        .unwrap();
    for address in [ADDRESS, "127.0.0.1"] {
        let answer = ask(&format!("uring-connect {address}:{port}"));
        assert_ne!(answer, "ok", "{address}");
        assert!(
            ["ENETUNREACH", "ECONNREFUSED", "EPERM", "EACCES", "ENOSYS", "EINVAL"].contains(&answer.as_str()),
            "{address}: {answer}"
        );
    }
    let answer = ask(&format!("abstract {name}"));
    assert!(["ECONNREFUSED", "EPERM"].contains(&answer.as_str()), "{answer}");

    // Signals reach nobody else: other pids are not there.
    let tgkill = nix::libc::SYS_tgkill;
    assert_eq!(ask(&format!("syscall {tgkill} 1 1 0")), "ok");
    for pid in [neighbour["host_pid"].as_i64().unwrap(), i64::from(system.hv_core_pid()), 2] {
        assert_eq!(ask(&format!("syscall {tgkill} {pid} {pid} 9")), "ESRCH", "pid {pid}");
    }
    // Tracing ends the tracer, and only it.
    let attach = format!("syscall {} 16 {}", nix::libc::SYS_ptrace, neighbour["host_pid"]);
    assert_eq!(ask(&attach), "", "its process ended over it");
    until(&system, "the guest that traced is down", || {
        guest(&system, "inside").is_none_or(|g| g["state"] != "running")
    });
    let after = guest(&system, "neighbour").unwrap();
    assert_eq!((&after["host_pid"], &after["state"]), (&neighbour["host_pid"], &neighbour["state"]));
    let events = system.bh_ok(&["events"]).unwrap();
    assert!(events.contains("filter forbids"), "{events}");
}
