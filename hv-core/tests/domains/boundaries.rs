//! What a domain cannot do.

use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::{Role, event::Kind};

use crate::agent::send_fds;
use crate::system::System;

pub fn sandbox_holds_nothing_else() {
    let mut system = System::start();
    let dom = system.backend("box");
    let text = dom.look();
    assert!(!text.contains("entry "), "an empty root: {text}");
    assert!(text.contains("pid 1\n") && text.contains("uid 0\n"), "{text}");
    assert!(
        text.contains("write-root true") && text.contains("host box\n") && text.contains("stdin 0"),
        "{text}"
    );
    // 0 to 4, and the connection by which we ask. (Where the agent keeps the listener and the hypercall socket.)
    let fds: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("fd ")).collect();
    assert_eq!(fds, ["0", "1", "2", "3", "4", "5"], "{text}");
    // The flags of an event channel, which both ends share.
    let flags = "set-nonblocking Ok(0)\nclear-nonblocking Err(EPERM)\ndirect Err(EINVAL)\nstill true\n\
                 fionbio Err(PermissionDenied)\n";
    assert!(text.contains(flags), "{text}");
    let pid = system.get(&dom).unwrap().host_pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(&format!("{name}:")));
        line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(line(set), "0000000000000000", "{set}");
    }
    assert_eq!((line("NoNewPrivs").as_str(), line("Seccomp").as_str()), ("1", "2"));
    let uid: u32 = line("Uid").split(' ').next().unwrap().parse().unwrap();
    assert!((1_100_000_000..1_200_000_000).contains(&uid));
    let other = system.backend("other");
    let pid = system.get(&other).unwrap().host_pid;
    assert!(
        std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap().contains(&format!("\t{}\t", uid + 1))
    );
}

pub fn seccomp_kills() {
    let mut system = System::start();
    let dom = system.backend("b");
    // getpid is fine; then calls outside of the filter.
    let mut generation = 1;
    let ask = |number: i64| {
        use std::io::Read;
        let mut stream = dom.connect();
        send_fds(&stream, &[b's', number as u8, (number >> 8) as u8], &[]);
        let mut byte = [0];
        stream.read_exact(&mut byte).ok().map(|()| byte[0])
    };
    assert_eq!(ask(nix::libc::SYS_getpid), Some(1));
    use nix::libc::*;
    for forbidden in
        [SYS_ptrace, SYS_fork, SYS_unshare, SYS_keyctl, SYS_chroot, SYS_init_module, SYS_setuid, SYS_bpf]
    {
        assert_eq!(ask(forbidden), None, "{forbidden}");
        generation += 1;
        system.wait_generation(&dom, generation);
        let exit = dom.hv().hello().unwrap().prev_exit;
        assert_eq!((exit.how, exit.code, exit.own_fault), (EXIT_SIGNAL, SIGSYS, 1), "{forbidden}");
    }
    let told = system.events();
    assert!(told.iter().any(|e| e.kind() == Kind::ProcessDied && e.detail.contains("filter forbids")));
}

/// A service has no way to the control API: no descriptor, no path, and fd 5 is dom0's alone.
pub fn control_api_is_dom0s_alone() {
    let mut system = System::start();
    let dom = system.backend("b");
    assert!(!dom.look().contains("entry "), "no path");
    let pid = system.get(&dom).unwrap().host_pid;
    let links: Vec<_> = (0..5)
        .map(|n| std::fs::read_link(format!("/proc/{pid}/fd/{n}")).unwrap().to_string_lossy().into_owned())
        .collect();
    assert_eq!(links[0], "/dev/null");
    assert!(links[3].starts_with("socket:") && links[4].starts_with("socket:"));
    // On its hypercall socket there is no call for it, and dom0's hypercalls are not for services.
    let hv = dom.hv();
    assert!(hv.dom_list().unwrap_err().is(Errno::EPERM));
    let files = std::fs::read_dir(system.path("ctl")).unwrap().count();
    assert_eq!(files, 2, "control sockets of the domains only");
}

pub fn wrong_roles() {
    let mut system = System::start();
    let (guest, back) = (system.guest("g"), system.backend("b"));
    let plain = system.create(System::request("plain", &[Role::Service]));
    let (info, _fd) = guest.hv().region_create(plain.id, 1, 0).unwrap();
    for hv in [guest.hv(), plain.hv()] {
        assert!(hv.grant_map(guest.id, &[info.first_gref], 0).unwrap_err().is(Errno::EPERM));
        let mut status = [0];
        assert!(hv.grant_copy(&[CopyEntry::default()], &mut status).unwrap_err().is(Errno::EPERM));
        assert!(hv.dom_list().unwrap_err().is(Errno::EPERM));
    }
    for hv in [guest.hv(), plain.hv(), back.hv()] {
        assert!(hv.port_bind_virq(VIRQ_DOM_EXC, 0).unwrap_err().is(Errno::EPERM));
        assert!(hv.port_bind_virq(0, 0).unwrap_err().is(Errno::EPERM));
        assert!(hv.port_bind_ipi(0).unwrap_err().is(Errno::EPERM));
        assert!(hv.ram_fetch().unwrap_err().is(Errno::EPERM));
    }
    // Channels are bounded.
    let hv = back.hv();
    let channels: Vec<_> = (0..31).map(|_| hv.new_channel().unwrap()).collect();
    assert!(hv.new_channel().unwrap_err().is(Errno::ENOSPC));
    assert_eq!(channels[30].hello().unwrap().domid, back.id);
    drop(channels);
    crate::system::until("channels are free again", || hv.new_channel().is_ok());
}
