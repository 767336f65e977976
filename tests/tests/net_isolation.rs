//! The program that tries, in netback's place: made by dom0 as netback is, with netback's rights. It has CAP_NET_ADMIN over its own
//! network namespace, in which there is its uplink and nothing else.

mod common;

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use bulkhead_tests::outside::{ADDRESS, SECOND_UPLINK, UPLINK};
use bulkhead_tests::probe::Probe;
use bulkhead_tests::system::Config;
use common::*;
use domain_kit::Hypercall;
use nix::errno::Errno;

#[test]
fn a_netback_reaches_nothing_but_its_nic() {
    let mut config = Config::of_this_build().unwrap();
    let _bin = probe_as(&mut config, "netback");
    config.two_uplinks = true;
    config.net_mode = "nat";
    config.host_file_more = format!(
        "gateway = \"10.78.0.1/24\"\ngateway6 = \"fd00:0:0:78::1/64\"\n\
         [[netback]]\nname = \"second\"\nuplink = \"{SECOND_UPLINK}\"\n"
    );
    let system = start_with(config);
    let disk = image(&system, "victim.img", 1 << 20);
    create(&system, &probe_file("victim", Some(&disk)));
    let victim = Brain::of(&system, "victim");
    // What the host and the outside have: sockets, names, a setting of the network.
    let name = format!("bulkhead-test-{}", std::process::id());
    let abstract_name = name.clone();
    let (port, _kept) = system
        .outside
        .run(move || {
            let listener = TcpListener::bind(("0.0.0.0", 0)).unwrap();
            let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
            (listener.local_addr().unwrap().port(), (listener, UnixListener::bind_addr(&address).unwrap()))
        })
        .unwrap();
    let host = TcpListener::bind("127.0.0.1:0").unwrap();
    let host_port = host.local_addr().unwrap().port();
    let ttl = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_default_ttl").unwrap();
    let ttl_of_the_host = ttl();
    let run = system.dir().join("run");

    for (service, uplink, foreign) in [(netback(), UPLINK, SECOND_UPLINK), ("second", SECOND_UPLINK, UPLINK)]
    {
        let probe = Probe::new(&run, service_domid(&system, service));
        let ask = |order: &str| answer_of(&system, &probe, order);
        // NICs: its own, and no other's.
        let interfaces = ask("interfaces");
        let mut names: Vec<&str> = interfaces.split(' ').collect();
        names.sort_unstable();
        let mut wanted = ["lo", uplink];
        wanted.sort_unstable();
        assert_eq!(names, wanted, "{service}");
        assert!(!names.contains(&foreign));
        // Not even of that one it can read packets past its rules: that is another capability.
        assert_eq!(ask("raw-socket"), "EPERM", "{service}");
        // Sockets of the host and of the outside.
        for address in
            [format!("127.0.0.1:{host_port}"), format!("127.0.0.1:{port}"), format!("{ADDRESS}:{port}")]
        {
            for how in ["connect", "uring-connect"] {
                let answer = ask(&format!("{how} {address}"));
                let refused =
                    ["ENETUNREACH", "EHOSTUNREACH", "ECONNREFUSED", "EPERM", "EACCES", "ENOSYS", "EINVAL"];
                assert!(refused.contains(&answer.as_str()), "{service}: {how} {address}: {answer}");
            }
        }
        let answer = ask(&format!("abstract {name}"));
        assert!(["ECONNREFUSED", "EPERM"].contains(&answer.as_str()), "{service}: {answer}");
        for socket in ["dom0.sock", "xenstored.sock", "ctl/0.sock", "ctl/1.sock"] {
            let path = run.join(socket);
            assert_eq!(ask(&format!("unix {}", path.display())), "ENOENT", "{service}: {socket}");
        }
        // Disks and files.
        let disk = disk.to_str().unwrap();
        for path in [
            "/dev/kvm",
            "/dev/mem",
            "/dev/sda",
            "/sys/class/net",
            "/etc/shadow",
            "/proc/1/root",
            "/proc/self/mem",
            "/proc/sys/kernel/core_pattern",
            disk,
        ] {
            for how in ["open", "uring-open", "create"] {
                let answer = ask(&format!("{how} {path}"));
                let refused = ["ENOENT", "EACCES", "EPERM", "EROFS", "ENOSYS"].contains(&answer.as_str());
                assert!(refused, "{service}: {how} {path}: {answer}");
            }
        }
        // What it may write of the kernel's settings is its own namespace's.
        if service == netback() {
            assert_eq!(ask("write /proc/sys/net/ipv4/ip_default_ttl 77"), "ok");
        }
        assert_eq!(ttl(), ttl_of_the_host);
        // Other namespaces and devices, by number.
        for (call, args) in [
            (nix::libc::SYS_setns, "3 0"),
            (nix::libc::SYS_unshare, "1073741824"),
            (nix::libc::SYS_mknodat, "0 0 0"),
        ] {
            let answer = probe.order(&format!("syscall {call} {args}")).unwrap_or_default();
            assert_ne!(answer, "ok", "{service}: {call}");
        }
        assert_eq!(ask("pid"), "1");

        // What hv-core gives it: no resources, nobody's memory.
        let hv = Hypercall::new(probe.hypercall().unwrap());
        assert!(hv.resource_list().unwrap().is_empty(), "{service}");
        for resource in ["disk", "kvm", "kernel", "socket", disk] {
            assert!(hv.resource_open(resource).unwrap_err().is(Errno::ENOENT), "{service}: {resource}");
        }
        assert!(hv.dom_list().unwrap_err().is(Errno::EPERM));
        assert!(hv.ram_fetch().unwrap_err().is(Errno::EPERM));
        let peer = service_domid(&system, &blkback_of("victim"));
        let (region, _fd) = victim.domain.hv.region_create(peer, 1, 9).unwrap();
        let refused = hv.grant_map(victim.domain.domid(), &[region.first_gref], 0).unwrap_err();
        assert!(refused.is(Errno::EACCES), "{service}: {refused}");
    }
}
