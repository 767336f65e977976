//! Creation, restarts, ends.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use domain_kit::mem::SharedMem;
use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::event::Kind;
use proto::hvcore::*;

use crate::system::{Dom, System, hv_core_command, until};

pub fn first_steps() {
    let mut system = System::start();
    let dom = system.create(System::request("svc", &[Role::Backend, Role::Xenstore]));
    let hello = dom.hv().hello().unwrap();
    assert_eq!((hello.domid, hello.generation), (dom.id, 1));
    assert_eq!(hello.roles, ROLE_BACKEND | ROLE_XENSTORE);
    assert_eq!((hello.xenstore_domid, hello.console_domid), (dom.id, DOMID_INVALID));
    assert_eq!((hello.instance, hello.prev_exit.how), (dom.instance, EXIT_NONE));
    let version = system.call(|mut c| async move { c.version(VersionRequest {}).await }).unwrap();
    assert_eq!(version.memory_total_bytes, 4096 << 20);
    println!("NOTE this host lacks {:?}", version.missing);
    let started = Instant::now();
    system.kill(&dom);
    println!("NOTE back after {:?}", started.elapsed());
    let hello = dom.hv().hello().unwrap();
    assert_eq!((hello.generation, hello.prev_exit.how, hello.prev_exit.code), (2, EXIT_SIGNAL, 9));
    assert!(hello.prev_exit_ns > 0);
}

/// (kind, generation) of a domain's events.
fn story(system: &mut System, dom: &Dom) -> Vec<(Kind, u32)> {
    let of = |e: &Event| e.domid == u32::from(dom.id) && e.instance == dom.instance;
    system.events().iter().filter(|e| of(e)).map(|e| (e.kind(), e.generation)).collect()
}

pub fn restart_policy_backoff_and_burst() {
    let mut system = System::start();
    let mut request = System::request("dies", &[Role::Service]);
    request.args.push("exit".into());
    request.restart = Some(RestartPolicy {
        restart: true,
        backoff_ms: 20,
        backoff_max_ms: 50,
        burst: 4,
        burst_window_ms: 60_000,
    });
    let started = Instant::now();
    let dom = system.create(request);
    until("FAILED", || system.get(&dom).is_some_and(|d| d.state() == DomainState::Failed));
    assert!(started.elapsed() >= Duration::from_millis(20 + 40 + 50 + 50), "{:?}", started.elapsed());
    let told = system.get(&dom).unwrap();
    assert_eq!((told.generation, told.restarts, told.host_pid), (5, 4, 0));
    assert_eq!(told.last_exit, "exited with status 7");
    let story = story(&mut system, &dom);
    assert_eq!(story.last(), Some(&(Kind::Failed, 5)));
    assert_eq!(story.iter().filter(|(k, _)| *k == Kind::Restarted).count(), 4);
    // Without a policy: once.
    let mut request = System::request("dies-once", &[Role::Service]);
    request.args.push("exit".into());
    request.restart = None;
    let dom = system.create(request);
    until("FAILED", || system.get(&dom).is_some_and(|d| d.state() == DomainState::Failed));
    assert_eq!(system.get(&dom).unwrap().generation, 1);
}

pub fn own_faults_are_told() {
    let mut system = System::start();
    let dom = system.backend("b");
    for (order, generation, in_row) in [(b'p', 2, 1), (b'a', 3, 2)] {
        assert_eq!(dom.order(order, &[]), None);
        system.wait_generation(&dom, generation);
        let exit = dom.hv().hello().unwrap().prev_exit;
        assert_eq!((exit.own_fault, exit.own_faults_in_row), (1, in_row), "{exit:?}");
    }
    assert_eq!(dom.order(b'x', &[]), None);
    system.wait_generation(&dom, 4);
    let exit = dom.hv().hello().unwrap().prev_exit;
    assert_eq!((exit.how, exit.code, exit.own_fault, exit.own_faults_in_row), (EXIT_CODE, 3, 0, 0));
}

pub fn dom0_restarts_and_services_go_on() {
    let mut system = System::start();
    let dom = system.backend("b");
    let hv = dom.hv();
    for _ in 0..3 {
        let dom0 = system.call(|mut c| async move { c.get_domain(DomainRef::default()).await }).unwrap();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(dom0.host_pid as i32),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        // The old connection is dead; the listener was hv-core's all along.
        system.reconnect();
        let now = system.call(|mut c| async move { c.get_domain(DomainRef::default()).await }).unwrap();
        assert_eq!(now.generation, dom0.generation + 1);
        assert_eq!(hv.hello().unwrap().generation, 1);
        assert_eq!(system.get(&dom).unwrap().generation, 1);
    }
    let kill = |c: DomainRef| c;
    let refused = system.call(|mut c| async move { c.destroy_domain(kill(DomainRef::default())).await });
    assert_eq!(refused.unwrap_err().code(), tonic::Code::InvalidArgument);
}

pub fn orderly_end_leaves_nothing() {
    let mut system = System::start();
    let mut request = System::request("svc", &[Role::Service]);
    let socket = system.path("svc.sock");
    request.resources = vec![listener("l", &socket)];
    let dom = system.create(request);
    let pids: Vec<u32> = [system.get(&dom).unwrap().host_pid].into();
    assert!(std::path::Path::new(&socket).exists());
    assert!(system.stop().success());
    for pid in pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
    assert!(!std::path::Path::new(&socket).exists());
    assert!(!std::path::Path::new(&system.path("dom0.sock")).exists());
    assert_eq!(std::fs::read_dir(system.path("ctl")).unwrap().count(), 0);
}

pub fn second_hv_core_is_refused() {
    let system = System::start();
    let output = hv_core_command(system.dir.path()).output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("another hv-core runs in") && text.lines().count() == 1, "{text}");
    let mut missing = hv_core_command(&system.dir.path().join("x"));
    let output = missing.args(["--dom0", "/no/such"]).output().unwrap();
    assert!(!output.status.success());
}

pub fn creation_errors_name_the_field() {
    let mut system = System::start();
    let mut refused = |change: &dyn Fn(&mut CreateDomainRequest)| {
        let mut request = System::request("x", &[Role::Service]);
        change(&mut request);
        let status = system.call(|mut c| async move { c.create_domain(request).await }).unwrap_err();
        assert_eq!(
            system.call(|mut c| async move { c.list_domains(Empty {}).await }).unwrap().domains.len(),
            1
        );
        (status.code(), status.message().to_owned())
    };
    use tonic::Code::*;
    let (code, text) = refused(&|r| r.program = "/no/such".into());
    assert!(code == InvalidArgument && text.contains("/no/such"), "{text}");
    let (code, text) = refused(&|r| r.program = "/etc/passwd".into());
    assert!(code == InvalidArgument && text.contains("/etc/passwd: not everyone may execute"), "{text}");
    let (code, text) = refused(&|r| r.name = "dom0".into());
    assert!(code == AlreadyExists && text.contains("name"), "{text}");
    let (code, text) = refused(&|r| {
        (r.roles, r.ram_bytes) = (vec![Role::Pvh.into()], 64 << 30);
    });
    assert!(code == ResourceExhausted && text.starts_with("ram_bytes:"), "{text}");
    let (code, text) = refused(&|r| r.netdevs = vec!["nosuchif".into()]);
    assert!(code == InvalidArgument && text.contains("nosuchif"), "{text}");
    let (code, text) = refused(&|r| {
        r.binds =
            vec![Bind { source: "/no/such".into(), target: "/x".into(), read_only: true, executable: false }];
    });
    assert!(code == InvalidArgument && text.contains("/no/such"), "{text}");
    let (code, text) = refused(&|r| r.uuid = uuid_of_dom0());
    assert!(code == AlreadyExists && text.contains("uuid"), "{text}");
    let (code, text) = refused(&|r| r.resources = vec![listener("l", "/no/such/dir/socket")]);
    assert!(code == InvalidArgument && text.contains("/no/such/dir"), "{text}");
    // After all that a good one works, and has the first number: those of domains that never lived are not used up.
    assert_eq!(system.backend("x").id, 1);
    // One that lived is not the next one's.
    let gone = system.backend("y");
    system.destroy(&gone);
    assert_eq!((gone.id, system.backend("z").id), (2, 3));
}

fn uuid_of_dom0() -> String {
    "00000000-0000-0000-0000-000000000000".into()
}

fn listener(name: &str, path: &str) -> Resource {
    Resource { name: name.into(), kind: resource::Kind::Listener.into(), path: path.into(), mode: 0o600 }
}

fn ns_inodes(system: &mut System, dom: &Dom) -> Vec<std::path::PathBuf> {
    let pid = system.get(dom).unwrap().host_pid;
    let of = |ns| std::fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
    ["user", "net", "pid", "mnt", "ipc", "uts"].map(of).into()
}

pub fn kept_network_namespace() {
    let mut system = System::start();
    let dom = system.backend("b");
    let before = ns_inodes(&mut system, &dom);
    system.kill(&dom);
    let after = ns_inodes(&mut system, &dom);
    assert_eq!(before[..2], after[..2], "user and net stay");
    let own = ["user", "net", "pid", "mnt", "ipc", "uts"]
        .map(|ns| std::fs::read_link(format!("/proc/self/ns/{ns}")).unwrap());
    for (i, ns) in own.iter().enumerate() {
        assert_ne!(&after[i], ns, "the host's");
    }
    let other = system.backend("c");
    let other = ns_inodes(&mut system, &other);
    assert!(after.iter().all(|ns| !other.contains(ns)), "another domain's");
}

pub fn fd_store_quota_and_kinds() {
    let mut system = System::start();
    let mut request = System::request("b", &[Role::Backend]);
    request.limits = Some(Limits { fd_store: 3, ..Default::default() });
    let dom = system.create(request);
    let hv = dom.hv();
    let (mem, memfd) = SharedMem::create("kept", 4096).unwrap();
    mem.copy_in(0, b"journal");
    let (a, mut b) = UnixStream::pair().unwrap();
    let event = hv.port_alloc_unbound(0).unwrap();
    hv.fd_put("journal", fd_kind::MEMFD, 42, &memfd).unwrap();
    hv.fd_put("conn", fd_kind::SOCKET, 0, &a).unwrap();
    hv.fd_put("event", fd_kind::EVENTFD, 0, event.rx()).unwrap();
    drop((memfd, a));
    assert!(hv.fd_put("more", fd_kind::EVENTFD, 0, event.rx()).unwrap_err().is(Errno::ENOSPC));
    hv.fd_put("event", fd_kind::EVENTFD, 1, event.rx()).expect("replacing needs no room");
    let null = std::fs::File::open("/dev/null").unwrap();
    for kind in 0..6 {
        assert!(hv.fd_put("event", kind, 0, &null).unwrap_err().is(Errno::EINVAL));
    }
    assert!(hv.fd_put("event", fd_kind::MEMFD, 0, event.rx()).unwrap_err().is(Errno::EINVAL), "a lie");
    system.kill(&dom);
    let hv = dom.hv();
    let names: Vec<_> = hv.fd_list().unwrap().iter().map(|e| e.name.as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["conn", "event", "journal"]);
    let (info, memfd) = hv.fd_get("journal").unwrap();
    assert_eq!((info.tag, info.kind), (42, fd_kind::MEMFD));
    let mut text = [0; 7];
    SharedMem::map(&memfd, 4096).unwrap().copy_out(0, &mut text);
    assert_eq!(&text, b"journal");
    let mut conn = UnixStream::from(hv.fd_get("conn").unwrap().1);
    b.write_all(b"x").unwrap();
    conn.read_exact(&mut text[..1]).unwrap();
    hv.fd_delete("conn").unwrap();
    assert!(hv.fd_delete("conn").unwrap_err().is(Errno::ENOENT));
    assert!(hv.fd_get("conn").unwrap_err().is(Errno::ENOENT));
    drop(conn);
    assert_eq!(b.read(&mut text).unwrap(), 0, "the store kept no copy");
    assert_eq!(system.get(&dom).unwrap().fd_store_entries, 2);
    // More than one message carries: all of them, each once.
    let mut request = System::request("many", &[Role::Backend]);
    request.limits = Some(Limits { fd_store: 2500, ..Default::default() });
    let many = system.create(request).hv();
    let names: Vec<String> = (0..2500).map(|n| format!("entry {n:04}")).collect();
    let event = many.port_alloc_unbound(0).unwrap();
    for name in &names {
        many.fd_put(name, fd_kind::EVENTFD, 0, event.rx()).unwrap();
    }
    let listed = many.fd_list().unwrap();
    assert!(listed.iter().map(|e| e.name.as_str().unwrap()).eq(names.iter().map(String::as_str)));
}

pub fn resources_are_fresh_descriptions() {
    use nix::fcntl::{Flock, FlockArg};
    let mut system = System::start();
    let disk = system.path("disk");
    std::fs::write(&disk, vec![7; 8192]).unwrap();
    let resource = |name: &str, kind: resource::Kind, path: &str| Resource {
        name: name.into(),
        kind: kind.into(),
        path: path.into(),
        mode: 0,
    };
    let mut request = System::request("blk", &[Role::Backend]);
    request.resources = vec![
        resource("disk", resource::Kind::FileRw, &disk),
        resource("disk-ro", resource::Kind::FileRo, &disk),
        resource("null", resource::Kind::Device, "/dev/null"),
        resource("not-a-device", resource::Kind::Device, &disk),
    ];
    let dom = system.create(request);
    let hv = dom.hv();
    let (kind, first) = hv.resource_open("disk").unwrap();
    assert_eq!(kind, resource_kind::FILE_RW);
    let held = Flock::lock(first, FlockArg::LockExclusiveNonblock).unwrap();
    let second = hv.resource_open("disk").unwrap().1;
    let busy = Flock::lock(second, FlockArg::LockExclusiveNonblock).unwrap_err();
    assert_eq!(busy.1, Errno::EWOULDBLOCK, "another open file description: the fence");
    drop(held);
    // hv-core keeps none: the lock is free once ours is closed.
    Flock::lock(busy.0, FlockArg::LockExclusiveNonblock).unwrap();
    let read_only = hv.resource_open("disk-ro").unwrap().1;
    assert_eq!(nix::unistd::write(&read_only, b"x").unwrap_err(), Errno::EBADF);
    assert!(hv.resource_open("other").unwrap_err().is(Errno::ENOENT));
    assert!(hv.resource_open("not-a-device").unwrap_err().is(Errno::EINVAL));
    assert_eq!(hv.resource_open("null").unwrap().0, resource_kind::DEVICE);
    assert_eq!(hv.resource_list().unwrap().len(), 4);
    // Withdrawn and approved while it runs.
    let reference = DomainRef { domid: dom.id.into(), instance: dom.instance };
    let change = SetResourcesRequest {
        domain: Some(reference),
        add: vec![
            resource("new", resource::Kind::FileRo, &disk),
            resource("gone", resource::Kind::FileRw, "/no/such"),
        ],
        remove: vec!["disk".into()],
    };
    system.call(|mut c| async move { c.set_resources(change).await }).unwrap();
    assert!(hv.resource_open("disk").unwrap_err().is(Errno::ENOENT));
    hv.resource_open("new").unwrap();
    assert!(hv.resource_open("gone").unwrap_err().is(Errno::ENOENT));
}

pub fn listeners_queue_while_dead() {
    let mut system = System::start();
    let path = system.path("store.sock");
    let mut request = System::request("xs", &[Role::Xenstore]);
    request.resources = vec![listener("socket", &path)];
    request.restart =
        Some(RestartPolicy { restart: true, backoff_ms: 200, backoff_max_ms: 200, ..Default::default() });
    let dom = system.create(request);
    let reference = DomainRef { domid: dom.id.into(), instance: 0 };
    let kill = KillRequest { domain: Some(reference), signal: 9 };
    system.call(|mut c| async move { c.kill_process(kill).await }).unwrap();
    until("death", || system.get(&dom).is_some_and(|d| d.state() == DomainState::Restarting));
    let mut client = UnixStream::connect(&path).expect("the backlog takes clients of a dead service");
    client.write_all(b"hello").unwrap();
    system.wait_generation(&dom, 2);
    let (_, socket) = dom.hv().resource_open("socket").unwrap();
    let (mut server, _) = std::os::unix::net::UnixListener::from(socket).accept().unwrap();
    let mut text = [0; 5];
    server.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    // Approving the same again keeps the queue; withdrawing removes the socket.
    let _waiting = UnixStream::connect(&path).unwrap();
    let same = SetResourcesRequest {
        domain: Some(DomainRef { domid: dom.id.into(), instance: 0 }),
        add: vec![listener("socket", &path)],
        remove: vec![],
    };
    system.call(|mut c| async move { c.set_resources(same).await }).unwrap();
    let (_, socket) = dom.hv().resource_open("socket").unwrap();
    std::os::unix::net::UnixListener::from(socket).accept().unwrap();
    let gone = SetResourcesRequest {
        domain: Some(DomainRef { domid: dom.id.into(), instance: 0 }),
        add: vec![],
        remove: vec!["socket".into()],
    };
    system.call(|mut c| async move { c.set_resources(gone).await }).unwrap();
    assert!(!std::path::Path::new(&path).exists());
}

/// Moves one end of a veth pair in, and sees that it is gone here, there across incarnations, and gone with the domain.
pub fn netdevs_move_in() {
    let mut system = System::start();
    let name = format!("bh{}", std::process::id() % 1_000_000);
    let peer = format!("{name}p");
    let made = std::process::Command::new("ip")
        .args(["link", "add", &name, "type", "veth", "peer", "name", &peer])
        .output();
    if !made.is_ok_and(|o| o.status.success()) {
        println!("NOTE no veth on this host: NOT RUN");
        return;
    }
    let here = |name: &str| nix::net::if_::if_nametoindex(name).is_ok();
    assert!(here(&name) && here(&peer));
    let mut request = System::request("net", &[Role::Backend]);
    request.netdevs = vec![name.clone()];
    request.capabilities = vec!["CAP_NET_ADMIN".into()];
    request.seccomp = "net".into();
    let dom = system.create(request);
    assert!(!here(&name) && here(&peer));
    system.kill(&dom);
    let pid = system.get(&dom).unwrap().host_pid;
    let inside = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert!(inside.contains(&name) && inside.contains("lo:"), "{inside}");
    system.destroy(&dom);
    until("the interface comes back", || here(&name) && here(&peer));
    // Nor is it lost when a creation is refused after it was moved.
    let mut refused = System::request("net2", &[Role::Backend]);
    refused.netdevs = vec![name.clone()];
    refused.resources = vec![listener("l", "/no/such/dir/socket")];
    system.call(|mut c| async move { c.create_domain(refused).await }).unwrap_err();
    assert!(here(&name) && here(&peer));
    assert!(std::process::Command::new("ip").args(["link", "del", &name]).status().unwrap().success());
}

pub fn shutdown_and_start_again() {
    let mut system = System::start();
    let guest = system.guest("g");
    let hv = guest.hv();
    assert!(hv.shutdown(99).unwrap_err().is(Errno::EINVAL));
    hv.shutdown(1).unwrap();
    let told = system.get(&guest).unwrap();
    assert_eq!((told.state(), told.shutdown_reason), (DomainState::Shutdown, 1));
    let reference = DomainRef { domid: guest.id.into(), instance: 0 };
    let early = system.call(|mut c| async move { c.start_process(reference).await }).unwrap_err();
    assert_eq!(early.code(), tonic::Code::FailedPrecondition, "it still runs");
    assert_eq!(guest.order(b'x', &[]), None);
    until("the process's end", || system.get(&guest).is_some_and(|d| d.host_pid == 0));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(system.get(&guest).unwrap().state(), DomainState::Shutdown, "not restarted");
    let now = system.call(|mut c| async move { c.start_process(reference).await }).unwrap();
    assert_eq!((now.state(), now.generation, now.shutdown_reason), (DomainState::Running, 2, 0));
}

pub fn events_in_order() {
    let mut system = System::start();
    let dom = system.backend("b");
    dom.hv().served().unwrap();
    dom.hv().served().unwrap();
    system.kill(&dom);
    system.destroy(&dom);
    use Kind::*;
    let want = [
        (Created, 0),
        (Started, 1),
        (Served, 1),
        (ProcessDied, 1),
        (Restarted, 2),
        (ProcessDied, 2),
        (Destroyed, 2),
    ];
    until("DESTROYED", || story(&mut system, &dom).last().is_some_and(|(k, _)| *k == Destroyed));
    assert_eq!(story(&mut system, &dom), want);
    let seqs: Vec<u64> = system.events().iter().map(|e| e.seq).collect();
    assert!(seqs.is_sorted() && seqs[0] == 1);
    assert!(system.get(&dom).is_none());
}

/// A domain with as much of everything as it may have is destroyed: quickly, and another's calls are served meanwhile.
pub fn xsa_380_teardown_is_bounded() {
    let mut system = System::start();
    let (big, small) = (system.backend("big"), system.backend("small"));
    let (hv, other) = (big.hv(), small.hv());
    for _ in 0..2000 {
        hv.port_alloc_unbound(small.id).unwrap();
    }
    for _ in 0..256 {
        hv.region_create(small.id, 256, 0).unwrap();
    }
    let (memfd, _keep) = {
        let (mem, fd) = SharedMem::create("x", 4096).unwrap();
        (fd, mem)
    };
    for n in 0..512 {
        hv.fd_put(&format!("n{n}"), fd_kind::MEMFD, 0, &memfd).unwrap();
    }
    for region in hv.region_list().unwrap() {
        other.grant_map(big.id, &[region.first_gref], 0).unwrap();
    }
    for port in hv.port_list().unwrap().iter().take(1000) {
        other.port_bind_interdomain(big.id, port.port).unwrap();
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    let worst = std::thread::scope(|scope| {
        let (done, other) = (&done, &other);
        let measured = scope.spawn(move || {
            let mut worst = Duration::ZERO;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let start = Instant::now();
                other.hello().unwrap();
                worst = worst.max(start.elapsed());
            }
            worst
        });
        let start = Instant::now();
        system.destroy(&big);
        let took = start.elapsed();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        println!("NOTE destroyed in {took:?}");
        assert!(took < Duration::from_secs(3), "{took:?}");
        measured.join().unwrap()
    });
    println!("NOTE worst call meanwhile {worst:?}");
    assert!(worst < Duration::from_millis(500), "{worst:?}");
    assert!(other.port_list().unwrap().iter().all(|p| p.state == port_state::UNBOUND));
    assert_eq!(other.grant_list().unwrap().len(), 256, "memory of a region lives as long as it is mapped");
    for map in other.grant_list().unwrap() {
        other.grant_unmap(map.handle).unwrap();
    }
    until("gone", || system.get(&big).is_none());
}

/// Destroyed while paused, running, waiting for its restart, failed, and shut down; its numbers are free again each time.
pub fn destroyed_in_every_state() {
    let mut system = System::start();
    for (i, state) in [
        DomainState::Created,
        DomainState::Running,
        DomainState::Restarting,
        DomainState::Failed,
        DomainState::Shutdown,
    ]
    .into_iter()
    .enumerate()
    {
        let mut request = System::request("x", &[Role::ProcessGuest]);
        request.domid = 7;
        request.paused = state == DomainState::Created;
        if matches!(state, DomainState::Restarting | DomainState::Failed) {
            request.args.push("exit".into());
            let restart = state == DomainState::Restarting;
            request.restart = Some(RestartPolicy {
                restart,
                backoff_ms: 60_000,
                backoff_max_ms: 60_000,
                ..Default::default()
            });
        }
        let dom = system.create(request);
        if state == DomainState::Shutdown {
            dom.hv().shutdown(0).unwrap();
        }
        until("the state", || system.get(&dom).is_some_and(|d| d.state() == state));
        system.destroy(&dom);
        until("gone", || system.get(&dom).is_none());
        assert!(!std::path::Path::new(&system.path("ctl/7.sock")).exists(), "round {i}");
    }
    let gone = DomainRef { domid: 7, instance: 0 };
    let status = system.call(|mut c| async move { c.destroy_domain(gone).await }).unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
}

/// Kills of a service that has everything: maps, ports, channels, buffers, a store. Descriptors and threads of hv-core and its
/// spawner are as many as before; what belongs to the domid is all there.
pub fn hundreds_of_kills_leak_nothing() {
    let kills = std::env::var("BH_KILLS").ok().and_then(|s| s.parse().ok()).unwrap_or(200u32);
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let f = front.hv();
    let (info, _memfd) = f.region_create(back.id, 8, 0).unwrap();
    let port = f.port_alloc_unbound(back.id).unwrap();
    let b = back.hv();
    let map = b.grant_map(front.id, &[info.first_gref], 0).unwrap().handle;
    b.port_bind_interdomain(front.id, port.port).unwrap();
    let (_mem, memfd) = SharedMem::create("kept", 4096).unwrap();
    b.fd_put("kept", fd_kind::MEMFD, 0, &memfd).unwrap();
    let pid = system.hv_core.id();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    let settled = |system: &mut System| {
        system.kill(&back);
        let hv = back.hv();
        hv.served().unwrap();
        (count("fd"), count("task"))
    };
    b.grant_claim(map).unwrap();
    settled(&mut system);
    let before = (count("fd"), count("task"));
    let mut worst = Duration::ZERO;
    for _ in 0..kills {
        let hv = back.hv();
        let _channel = hv.new_channel().unwrap();
        hv.buffer_register(&memfd, 4096).unwrap();
        hv.grant_map(front.id, &[info.first_gref + 1], 0).unwrap();
        let start = Instant::now();
        system.kill(&back);
        worst = worst.max(start.elapsed());
        let hv = back.hv();
        assert_eq!(hv.port_list().unwrap().len(), 1);
        assert_eq!(hv.fd_list().unwrap().len(), 1);
        hv.served().unwrap();
        assert!(hv.grant_list().unwrap().is_empty());
    }
    until("as many descriptors and threads as before", || {
        let now = (count("fd"), count("task"));
        now.0 <= before.0 && now.1 <= before.1
    });
    println!("NOTE {kills} kills, the longest until the next incarnation ran {worst:?}");
    assert_eq!(system.get(&back).unwrap().restarts, kills + 1);
}
