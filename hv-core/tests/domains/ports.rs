//! Event channels between processes.

use std::time::{Duration, Instant};

use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::Role;

use crate::system::System;

const SHORT: Option<Duration> = Some(Duration::from_secs(5));

pub fn round_trip_between_domains() {
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let (f, b) = (front.hv(), back.hv());
    let mine = f.port_alloc_unbound(back.id).unwrap();
    mine.notify(); // latched for whoever binds
    let theirs = b.port_bind_interdomain(front.id, mine.port).unwrap();
    assert!(theirs.wait(SHORT).unwrap());
    theirs.clear();
    let again = b.port_bind_interdomain(front.id, mine.port).unwrap();
    assert_eq!(again.port, theirs.port, "idempotent");
    theirs.notify();
    assert!(mine.wait(SHORT).unwrap());
    mine.clear();
    // What is sent while the other is dead is there when it is back.
    system.kill(&back);
    mine.notify();
    let b = back.hv();
    let ports = b.port_list().unwrap();
    assert_eq!(ports.len(), 1);
    assert_eq!((ports[0].remote_domid, ports[0].remote_port, ports[0].state), (front.id, mine.port, 2));
    let (_, theirs) = b.port_fetch(ports[0].port).unwrap();
    assert!(theirs.wait(SHORT).unwrap());
    // Own ends of one domain.
    let own = b.port_alloc_unbound(DOMID_SELF).unwrap();
    let other_end = b.port_bind_interdomain(DOMID_SELF, own.port).unwrap();
    other_end.notify();
    assert!(own.wait(SHORT).unwrap());
}

/// The remote closes, dies with its domain, and the pair is bound again; the waiting side looks exactly once each time.
pub fn xsa_355_close_and_rebind() {
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let (f, b) = (front.hv(), back.hv());
    let mine = f.port_alloc_unbound(back.id).unwrap();
    let state = |n: u32| f.port_list().unwrap().iter().find(|p| p.port == n).map(|p| p.state);
    for _ in 0..3 {
        let theirs = b.port_bind_interdomain(front.id, mine.port).unwrap();
        assert_eq!(state(mine.port), Some(port_state::INTERDOMAIN));
        assert!(!mine.wait(Some(Duration::ZERO)).unwrap());
        b.port_close(theirs.port).unwrap();
        assert!(b.port_close(theirs.port).unwrap_err().is(Errno::ENOENT));
        assert!(mine.wait(SHORT).unwrap(), "a close makes the other side look");
        mine.clear();
        assert_eq!(state(mine.port), Some(port_state::UNBOUND));
    }
    b.port_bind_interdomain(front.id, mine.port).unwrap();
    system.destroy(&back);
    assert!(mine.wait(SHORT).unwrap());
    assert_eq!(state(mine.port), Some(port_state::UNBOUND));
    // A new domain of the same number inherits nothing.
    let mut request = System::request("back", &[Role::Backend]);
    request.domid = back.id.into();
    crate::system::until("the number is free", || system.get(&back).is_none());
    let reborn = system.create(request);
    assert_eq!(reborn.id, back.id);
    assert!(reborn.hv().port_bind_interdomain(front.id, mine.port).unwrap_err().is(Errno::EPERM));
}

pub fn anothers_port() {
    let mut system = System::start();
    let (front, back, thief) = (system.guest("front"), system.backend("back"), system.backend("thief"));
    let (f, b, t) = (front.hv(), back.hv(), thief.hv());
    let mine = f.port_alloc_unbound(back.id).unwrap();
    assert!(t.port_bind_interdomain(front.id, mine.port).unwrap_err().is(Errno::EPERM));
    b.port_bind_interdomain(front.id, mine.port).unwrap();
    assert!(t.port_bind_interdomain(front.id, mine.port).unwrap_err().is(Errno::EBUSY));
    assert!(t.port_close(mine.port).unwrap_err().is(Errno::ENOENT), "numbers are the caller's own");
    assert!(t.port_fetch(mine.port).unwrap_err().is(Errno::ENOENT));
    assert!(t.port_list().unwrap().is_empty());
    for domid in [77, DOMID_INVALID, u16::MAX] {
        assert!(t.port_bind_interdomain(domid, 1).unwrap_err().is(Errno::ESRCH));
        assert!(t.port_alloc_unbound(domid).unwrap_err().is(Errno::ESRCH));
    }
}

pub fn virq_dom_exc_tells_of_every_change() {
    let mut system = System::start();
    let store = system.create(System::request("xs", &[Role::Xenstore]));
    let s = store.hv();
    let virq = s.port_bind_virq(VIRQ_DOM_EXC, 0).unwrap();
    assert_eq!(s.port_bind_virq(VIRQ_DOM_EXC, 0).unwrap().port, virq.port);
    virq.clear();
    let told = |what: &str| {
        assert!(virq.wait(SHORT).unwrap(), "{what}");
        virq.clear();
    };
    let guest = system.guest("g");
    told("created");
    let g = guest.hv();
    assert!(g.port_bind_virq(VIRQ_DOM_EXC, 0).unwrap_err().is(Errno::EPERM));
    assert!(g.dom_list().unwrap_err().is(Errno::EPERM));
    assert!(g.set_store_ring(1, 5).unwrap_err().is(Errno::ENOENT), "a port that it does not have");
    let port = g.port_alloc_unbound(store.id).unwrap().port;
    g.set_store_ring(1, port).unwrap();
    told("ring set");
    let info = s.dom_list().unwrap().into_iter().find(|d| d.domid == guest.id).unwrap();
    assert_eq!((info.store_gref, info.store_port, info.console_port), (1, port, 0));
    let other = system.guest("other").hv();
    told("created");
    let hidden = other.dom_info(guest.id).unwrap();
    assert_eq!((hidden.store_port, hidden.domid), (0, guest.id));
    assert_eq!(g.dom_info(DOMID_SELF).unwrap().store_port, port);
    system.kill(&guest);
    assert!(!virq.wait(Some(Duration::from_millis(50))).unwrap(), "not at a mere restart");
    guest.hv().shutdown(0).unwrap();
    told("shutdown");
    assert_eq!(s.dom_info(guest.id).unwrap().state, dom_state::SHUTDOWN);
    system.destroy(&guest);
    told("destroyed");
    crate::system::until("gone", || s.dom_info(guest.id).is_err_and(|e| e.is(Errno::ESRCH)));
}

/// Every number is used up; then each call that needs one fails and everything that was there still works.
pub fn xsa_496_error_paths_leave_other_state_alone() {
    let mut system = System::start();
    let mut request = System::request("xs", &[Role::Xenstore]);
    request.limits = Some(proto::hvcore::Limits { ports: 3, ..Default::default() });
    let store = system.create(request);
    let peer = system.backend("b");
    let (s, p) = (store.hv(), peer.hv());
    let virq = s.port_bind_virq(VIRQ_DOM_EXC, 0).unwrap();
    let a = s.port_alloc_unbound(peer.id).unwrap();
    let b = s.port_alloc_unbound(peer.id).unwrap();
    let theirs = p.port_alloc_unbound(store.id).unwrap();
    let before = (s.port_list().unwrap(), p.port_list().unwrap());
    for _ in 0..3 {
        assert!(s.port_alloc_unbound(peer.id).unwrap_err().is(Errno::ENOSPC));
        assert!(s.port_bind_interdomain(peer.id, theirs.port).unwrap_err().is(Errno::ENOSPC));
        assert!(s.port_bind_virq(VIRQ_DOM_EXC, 1).unwrap_err().is(Errno::ENOSPC));
        assert_eq!(s.port_bind_virq(VIRQ_DOM_EXC, 0).unwrap().port, virq.port);
    }
    assert_eq!((s.port_list().unwrap(), p.port_list().unwrap()), before);
    let bound = p.port_bind_interdomain(store.id, a.port).unwrap();
    bound.notify();
    assert!(a.wait(SHORT).unwrap());
    s.port_close(b.port).unwrap();
    assert_eq!(s.port_bind_interdomain(peer.id, theirs.port).unwrap().port, b.port);
}

/// The most ports there can be: made, listed, and closed by the domain's end, in bounded time.
pub fn xsa_344_many_ports() {
    let mut system = System::start();
    let dom = system.backend("b");
    let hv = dom.hv();
    let start = Instant::now();
    for n in 1..=4095 {
        assert_eq!(hv.port_alloc_unbound(0).unwrap().port, n);
    }
    assert!(hv.port_alloc_unbound(0).unwrap_err().is(Errno::ENOSPC));
    // More than one message carries: all of them, each once.
    let listed: Vec<u32> = hv.port_list().unwrap().iter().map(|p| p.port).collect();
    assert_eq!(listed, (1..=4095).collect::<Vec<u32>>());
    println!("NOTE 4095 ports in {:?}", start.elapsed());
    let start = Instant::now();
    system.destroy(&dom);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}
