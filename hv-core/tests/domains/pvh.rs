//! Grants of PVH domains, by a runner of the tests' that writes its guest's grant table itself. Mapping needs udmabuf: where
//! the host has none these tests say so, and run in the lab.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use domain_kit::mem::SharedMem;
use domain_kit::{Hypercall, hypercall::RawMapping};
use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::{Role, event::Kind};
use xen_abi::grant_table::*;

use crate::system::{Dom, System, until};

const RAM: usize = 8 << 20;

/// A PVH domain whose guest is the test.
struct Guest {
    dom: Dom,
    ram: SharedMem,
    table: SharedMem,
}

impl Guest {
    fn new(system: &mut System, name: &str) -> Guest {
        let mut request = System::request(name, &[Role::Pvh]);
        request.ram_bytes = RAM as u64;
        request.grant_frames = 1;
        let dom = system.create(request);
        let (info, ram, frames) = dom.hv().ram_fetch().unwrap();
        assert_eq!((info.ram_bytes, info.low_bytes, info.grant_frames), (RAM as u64, RAM as u64, 1));
        Guest {
            dom,
            ram: SharedMem::map(&ram, RAM).unwrap(),
            table: SharedMem::map(&frames, PAGE_SIZE).unwrap(),
        }
    }

    fn grant(&self, gref: u32, flags: u16, domid: u16, frame: u32) {
        let at = gref as usize * 8;
        self.table.store_u32(at + 4, frame, Ordering::Relaxed);
        self.table.store_u32(at, u32::from(domid) << 16 | u32::from(flags), Ordering::Release);
    }

    fn flags(&self, gref: u32) -> u16 {
        self.table.load_u32(gref as usize * 8, Ordering::Acquire) as u16
    }
}

fn has_udmabuf() -> bool {
    let there = std::path::Path::new("/dev/udmabuf").exists();
    if !there {
        println!("NOTE no udmabuf on this host: NOT RUN, run it in the lab");
    }
    there
}

fn buffer(hv: &Hypercall) -> (u32, SharedMem) {
    let (mem, fd) = SharedMem::create("buffer", PAGE_SIZE).unwrap();
    (hv.buffer_register(&fd, PAGE_SIZE as u64).unwrap(), mem)
}

fn piece(guest: &Guest, flags: u16, gref: u32, buffer: u32, len: u16) -> CopyEntry {
    CopyEntry { domid: guest.dom.id, flags, gref, offset: 0, len, buffer, buffer_offset: 0 }
}

fn copy_one(hv: &Hypercall, entry: CopyEntry) -> i16 {
    let mut status = [7];
    hv.grant_copy(&[entry], &mut status).unwrap();
    status[0]
}

pub fn xsa_18_references_before_any_setup() {
    let mut system = System::start();
    let guest = Guest::new(&mut system, "g");
    let back = system.backend("b");
    let b = back.hv();
    let (id, _mem) = buffer(&b);
    for gref in [0, 1, 8, 511] {
        assert_eq!(copy_one(&b, piece(&guest, 0, gref, id, 8)), GNTST_GENERAL_ERROR);
    }
    for gref in [512, 1 << 29, u32::MAX] {
        assert_eq!(copy_one(&b, piece(&guest, 0, gref, id, 8)), GNTST_BAD_GNTREF);
    }
    assert!(guest.dom.hv().region_create(back.id, 1, 0).unwrap_err().is(Errno::EPERM));
}

pub fn copy_checks_the_table() {
    let mut system = System::start();
    let guest = Guest::new(&mut system, "g");
    let (back, other) = (system.backend("b"), system.backend("other"));
    let b = back.hv();
    let (id, own) = buffer(&b);
    guest.ram.copy_in(5 * PAGE_SIZE, b"in RAM..");
    guest.grant(8, GTF_PERMIT_ACCESS, back.id, 5);
    guest.grant(9, GTF_PERMIT_ACCESS | GTF_READONLY, back.id, 5);
    guest.grant(10, GTF_PERMIT_ACCESS, back.id, (RAM / PAGE_SIZE) as u32);
    guest.grant(11, GTF_TRANSITIVE, back.id, 5);
    assert_eq!(copy_one(&b, piece(&guest, 0, 8, id, 8)), GNTST_OKAY);
    let mut text = [0; 8];
    own.copy_out(0, &mut text);
    assert_eq!(&text, b"in RAM..");
    own.copy_in(0, b"answered");
    assert_eq!(copy_one(&b, piece(&guest, COPY_TO_GRANT, 9, id, 8)), GNTST_GENERAL_ERROR, "read-only");
    assert_eq!(copy_one(&b, piece(&guest, 0, 9, id, 0)), GNTST_OKAY);
    assert_eq!(copy_one(&b, piece(&guest, COPY_TO_GRANT, 8, id, 8)), GNTST_OKAY);
    guest.ram.copy_out(5 * PAGE_SIZE, &mut text);
    assert_eq!(&text, b"answered");
    assert_eq!(copy_one(&b, piece(&guest, 0, 10, id, 8)), GNTST_BAD_PAGE);
    assert_eq!(copy_one(&b, piece(&guest, 0, 11, id, 8)), GNTST_GENERAL_ERROR);
    let o = other.hv();
    let (id, _mem) = buffer(&o);
    assert_eq!(copy_one(&o, piece(&guest, 0, 8, id, 8)), GNTST_GENERAL_ERROR, "granted to another");
    assert_eq!(guest.flags(8), GTF_PERMIT_ACCESS, "no pin is left");
    assert_eq!(guest.flags(9), GTF_PERMIT_ACCESS | GTF_READONLY);
}

/// From a guest's page to another guest's: both tables decide, and no pin is left.
pub fn copies_from_table_to_table() {
    let mut system = System::start();
    let (one, two) = (Guest::new(&mut system, "one"), Guest::new(&mut system, "two"));
    let back = system.backend("b");
    let b = back.hv();
    one.ram.copy_in(5 * PAGE_SIZE, b"in RAM..");
    for guest in [&one, &two] {
        guest.grant(8, GTF_PERMIT_ACCESS, back.id, 5);
        guest.grant(9, GTF_PERMIT_ACCESS | GTF_READONLY, back.id, 5);
        guest.grant(10, GTF_PERMIT_ACCESS, back.id, (RAM / PAGE_SIZE) as u32);
        guest.grant(11, GTF_PERMIT_ACCESS, back.id + 1, 5);
    }
    let copy = |from, to, offset| copy_one(&b, piece(&one, 0, from, 0, 8).to_other(two.dom.id, to, offset));
    for (from, to, status) in [
        (8, 9, GNTST_GENERAL_ERROR),
        (8, 10, GNTST_BAD_PAGE),
        (10, 8, GNTST_BAD_PAGE),
        (8, 11, GNTST_GENERAL_ERROR),
        (11, 8, GNTST_GENERAL_ERROR),
        (8, 12, GNTST_GENERAL_ERROR),
        (8, 600, GNTST_BAD_GNTREF),
        (600, 8, GNTST_BAD_GNTREF),
    ] {
        assert_eq!(copy(from, to, 0), status, "{from} to {to}");
    }
    let mut text = [0; 8];
    two.ram.copy_out(5 * PAGE_SIZE, &mut text);
    assert_eq!(text, [0; 8]);
    assert_eq!(copy(9, 8, 4088), GNTST_OKAY, "what may be read is read");
    two.ram.copy_out(6 * PAGE_SIZE - 8, &mut text);
    assert_eq!(&text, b"in RAM..");
    // Both ends are one page.
    assert_eq!(copy_one(&b, piece(&one, 0, 8, 0, 8).to_other(one.dom.id, 8, 100)), GNTST_OKAY);
    one.ram.copy_out(5 * PAGE_SIZE + 100, &mut text);
    assert_eq!(&text, b"in RAM..");
    for guest in [&one, &two] {
        assert_eq!(guest.flags(8), GTF_PERMIT_ACCESS, "no pin is left");
        assert_eq!(guest.flags(9), GTF_PERMIT_ACCESS | GTF_READONLY);
        assert_eq!(guest.flags(10), GTF_PERMIT_ACCESS);
    }
}

/// The guest changes the entry and the page while they are copied: every result is one of the two states, and when all is still
/// nothing is pinned.
pub fn xsa_500_entry_changes_during_copies() {
    let mut system = System::start();
    let guest = Guest::new(&mut system, "g");
    let back = system.backend("b");
    let b = back.hv();
    let (id, own) = buffer(&b);
    guest.ram.copy_in(4 * PAGE_SIZE, &[4; 64]);
    guest.ram.copy_in(5 * PAGE_SIZE, &[5; 64]);
    guest.ram.copy_in(6 * PAGE_SIZE, &[6; 64]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0u32;
            while !done.load(Ordering::Relaxed) {
                // Page 6 is never granted while the entry says so: it is written only under "invalid".
                guest.grant(8, GTF_INVALID, back.id, 6);
                guest.grant(8, GTF_PERMIT_ACCESS | ((n as u16 & 1) * GTF_READONLY), back.id, 4 + (n & 1));
                n += 1;
            }
        });
        let (mut okay, mut refused) = (0, 0);
        let copies = if std::env::var_os("BH_LAB").is_some() { 2_000 } else { 20_000 };
        for _ in 0..copies {
            let mut first = [0];
            match copy_one(&b, piece(&guest, 0, 8, id, 64)) {
                GNTST_OKAY => {
                    okay += 1;
                    own.copy_out(0, &mut first);
                    assert!([4, 5, 6].contains(&first[0]));
                }
                status => {
                    assert!(status < 0);
                    refused += 1;
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        println!("NOTE {okay} copied, {refused} refused");
    });
    guest.grant(8, GTF_PERMIT_ACCESS, back.id, 4);
    assert_eq!(copy_one(&b, piece(&guest, COPY_TO_GRANT, 8, id, 8)), GNTST_OKAY);
    assert_eq!(guest.flags(8), GTF_PERMIT_ACCESS);
}

pub fn maps_need_udmabuf() {
    let mut system = System::start();
    let guest = Guest::new(&mut system, "g");
    let back = system.backend("b");
    let b = back.hv();
    for gref in 8..16u32 {
        guest.ram.copy_in(gref as usize * PAGE_SIZE, &gref.to_le_bytes());
        guest.grant(gref, GTF_PERMIT_ACCESS, back.id, gref);
    }
    if !std::path::Path::new("/dev/udmabuf").exists() {
        assert!(b.grant_map(guest.dom.id, &[8], 0).unwrap_err().is(Errno::EOPNOTSUPP));
        assert_eq!(system.get(&back).unwrap().mapped_pages, 0, "the quota is given back");
        has_udmabuf();
        return;
    }
    // Scattered and contiguous, in the order asked for.
    let grefs = [15u32, 8, 9, 10, 13];
    let map = b.grant_map(guest.dom.id, &grefs, 5).unwrap();
    assert_eq!((map.pages.as_slice(), map.fd_pages), (&[0, 1, 2, 3, 4][..], 5));
    let mem = SharedMem::map(&map.fd, 5 * PAGE_SIZE).unwrap();
    for (i, gref) in grefs.iter().enumerate() {
        let mut word = [0; 4];
        mem.copy_out(i * PAGE_SIZE, &mut word);
        assert_eq!(u32::from_le_bytes(word), *gref);
        assert_eq!(guest.flags(*gref), GTF_PERMIT_ACCESS | GTF_READING | GTF_WRITING);
    }
    mem.copy_in(0, b"hello guest");
    let mut text = [0; 11];
    guest.ram.copy_out(15 * PAGE_SIZE, &mut text);
    assert_eq!(&text, b"hello guest");
    // All or nothing; read-only grants are never mapped.
    guest.grant(20, GTF_PERMIT_ACCESS | GTF_READONLY, back.id, 20);
    for bad in [20, 21, 600] {
        assert!(b.grant_map(guest.dom.id, &[11, bad], 0).unwrap_err().is(Errno::EACCES));
        assert_eq!(guest.flags(11), GTF_PERMIT_ACCESS);
    }
    // A second pin of the same entry.
    let second = b.grant_map(guest.dom.id, &[8], 0).unwrap();
    unmap(&b, second);
    assert_eq!(guest.flags(8), GTF_PERMIT_ACCESS | GTF_READING | GTF_WRITING);
    drop(mem);
    let start = Instant::now();
    unmap(&b, map);
    println!("NOTE unmap took {:?}", start.elapsed());
    for gref in grefs {
        assert_eq!(guest.flags(gref), GTF_PERMIT_ACCESS);
    }
    assert_eq!(system.get(&back).unwrap().mapped_pages, 0);
    // An incarnation's maps are claimed by the next; unclaimed ones are unpinned.
    let kept = b.grant_map(guest.dom.id, &[8, 9], 1).unwrap();
    let dropped = b.grant_map(guest.dom.id, &[10], 2).unwrap();
    let (kept_handle, dropped_handle) = (kept.handle, dropped.handle);
    drop((kept, dropped));
    system.kill(&back);
    let b = back.hv();
    let kept = b.grant_claim(kept_handle).unwrap();
    let mem = SharedMem::map(&kept.fd, 2 * PAGE_SIZE).unwrap();
    let mut word = [0; 4];
    mem.copy_out(PAGE_SIZE, &mut word);
    assert_eq!(u32::from_le_bytes(word), 9);
    b.served().unwrap();
    assert!(b.grant_claim(dropped_handle).unwrap_err().is(Errno::ESTALE));
    until("the unclaimed pin's end", || guest.flags(10) == GTF_PERMIT_ACCESS);
    assert_eq!(guest.flags(8), GTF_PERMIT_ACCESS | GTF_READING | GTF_WRITING);
    drop(mem);
    unmap(&b, kept);
    assert_eq!(guest.flags(8), GTF_PERMIT_ACCESS);
}

fn unmap(hv: &Hypercall, map: RawMapping) {
    let handle = map.handle;
    drop(map);
    hv.grant_unmap(handle).unwrap();
}

/// A backend says that it unmapped and keeps the mapping (or the descriptor too): it is caught, killed, and only then do the
/// pins clear.
pub fn lying_backend_is_caught() {
    if !has_udmabuf() {
        return;
    }
    let mut system = System::start();
    let guest = Guest::new(&mut system, "g");
    let back = system.backend("liar");
    guest.grant(8, GTF_PERMIT_ACCESS, back.id, 8);
    for (round, order) in [(1, b'k'), (2, b'K')] {
        let b = back.hv();
        let map = b.grant_map(guest.dom.id, &[8], 0).unwrap();
        let handle = map.handle;
        assert_eq!(back.order(order, &[&map.fd]), Some(b'k'));
        drop(map);
        let start = Instant::now();
        assert!(b.grant_unmap(handle).is_err());
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(2) && took < Duration::from_secs(6), "{took:?}");
        system.wait_generation(&back, round + 1);
        system.wait_event("VIOLATION", |e| {
            e.kind() == Kind::Violation && e.domid == u32::from(back.id) && e.generation == round
        });
        until("the pin's end", || guest.flags(8) == GTF_PERMIT_ACCESS);
    }
    // An honest one is not bothered.
    let b = back.hv();
    let map = b.grant_map(guest.dom.id, &[8], 0).unwrap();
    unmap(&b, map);
    assert_eq!(system.get(&back).unwrap().generation, 3);
}

/// A guest is destroyed while a backend maps its pages. If the backend lets go, the domain is gone soon; if it does not, it is
/// restarted within seconds and the domain is gone then.
pub fn destroyed_guest_is_released() {
    if !has_udmabuf() {
        return;
    }
    let mut system = System::start();
    let back = system.backend("b");
    for honest in [true, false] {
        let guest = Guest::new(&mut system, "g");
        guest.grant(8, GTF_PERMIT_ACCESS, back.id, 8);
        let b = back.hv();
        let generation = b.hello().unwrap().generation;
        let map = b.grant_map(guest.dom.id, &[8], 0).unwrap();
        assert_eq!(back.order(b'k', &[&map.fd]), Some(b'k'));
        let handle = map.handle;
        drop(map);
        system.destroy(&guest.dom);
        let dying = system.get(&guest.dom).expect("held");
        assert_eq!(dying.state(), proto::hvcore::DomainState::Dying);
        assert!(b.grant_map(guest.dom.id, &[8], 0).unwrap_err().is(Errno::ESRCH));
        if honest {
            assert_eq!(back.order(b'd', &[]), Some(b'd'));
            b.grant_unmap(handle).unwrap();
        }
        let start = Instant::now();
        until("gone", || system.get(&guest.dom).is_none());
        println!("NOTE gone after {:?}", start.elapsed());
        let now = back.hv().hello().unwrap().generation;
        assert_eq!(now, if honest { generation } else { generation + 1 });
    }
}
