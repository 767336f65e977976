//! Grants of process domains: regions, maps, copies.

use domain_kit::mem::SharedMem;
use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::Role;
use xen_abi::grant_table::*;

use crate::system::{Dom, System};

/// A registered buffer and its memory.
fn buffer(hv: &domain_kit::Hypercall, pages: usize) -> (u32, SharedMem) {
    let (mem, fd) = SharedMem::create("buffer", pages * PAGE_SIZE).unwrap();
    (hv.buffer_register(&fd, (pages * PAGE_SIZE) as u64).unwrap(), mem)
}

pub fn region_map_and_copy() {
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let (f, b) = (front.hv(), back.hv());
    let (info, memfd) = f.region_create(back.id, 4, 11).unwrap();
    let mem = SharedMem::map(&memfd, 4 * PAGE_SIZE).unwrap();
    mem.copy_in(2 * PAGE_SIZE, b"page two");
    let map = b.grant_map(front.id, &[info.first_gref + 2, info.first_gref], 77).unwrap();
    assert_eq!((map.pages.as_slice(), map.fd_pages), (&[2, 0][..], 4));
    let seen = SharedMem::map(&map.fd, 4 * PAGE_SIZE).unwrap();
    let mut text = [0; 8];
    seen.copy_out(2 * PAGE_SIZE, &mut text);
    assert_eq!(&text, b"page two");
    seen.copy_in(0, b"answered");
    mem.copy_out(0, &mut text);
    assert_eq!(&text, b"answered");
    let (id, own) = buffer(&b, 2);
    let entry = |flags, gref, offset, buffer_offset| CopyEntry {
        domid: front.id,
        flags,
        gref,
        offset,
        len: 8,
        buffer: id,
        buffer_offset,
    };
    own.copy_in(5000, b"from buf");
    let mut statuses = [1; 2];
    b.grant_copy(
        &[entry(0, info.first_gref + 2, 0, 100), entry(COPY_TO_GRANT, info.first_gref + 3, 4088, 5000)],
        &mut statuses,
    )
    .unwrap();
    assert_eq!(statuses, [GNTST_OKAY; 2]);
    own.copy_out(100, &mut text);
    assert_eq!(&text, b"page two");
    mem.copy_out(3 * PAGE_SIZE + 4088, &mut text);
    assert_eq!(&text, b"from buf");
    assert_eq!(system.get(&back).unwrap().mapped_pages, 2);
    // The memory cannot be resized under anyone.
    assert!(nix::unistd::ftruncate(&memfd, 0).is_err());
    f.region_delete(info.region).unwrap();
    assert!(b.grant_map(front.id, &[info.first_gref], 0).unwrap_err().is(Errno::EACCES));
    seen.copy_out(0, &mut text); // existing maps stay
    b.grant_unmap(map.handle).unwrap();
    assert_eq!(system.get(&back).unwrap().mapped_pages, 0);
}

pub fn anothers_grant() {
    let mut system = System::start();
    let (front, back, thief) = (system.guest("front"), system.backend("back"), system.backend("thief"));
    let (f, t) = (front.hv(), thief.hv());
    let (info, _memfd) = f.region_create(back.id, 1, 0).unwrap();
    let map = back.hv().grant_map(front.id, &[info.first_gref], 0).unwrap();
    for gref in [info.first_gref, info.first_gref + 1, 0, u32::MAX] {
        assert!(t.grant_map(front.id, &[gref], 0).unwrap_err().is(Errno::EACCES), "{gref}");
    }
    let (id, _mem) = buffer(&t, 1);
    let entry = CopyEntry {
        domid: front.id,
        flags: 0,
        gref: info.first_gref,
        offset: 0,
        len: 1,
        buffer: id,
        buffer_offset: 0,
    };
    let mut status = [0];
    t.grant_copy(&[entry], &mut status).unwrap();
    assert!(status[0] < 0);
    assert!(t.grant_unmap(map.handle).unwrap_err().is(Errno::ESTALE), "handles are the caller's own");
    assert!(t.grant_claim(map.handle).unwrap_err().is(Errno::ESTALE));
    assert!(t.region_fetch(info.region).unwrap_err().is(Errno::ENOENT));
    assert!(t.region_delete(info.region).unwrap_err().is(Errno::ENOENT));
    assert!(t.grant_map(99, &[1], 0).unwrap_err().is(Errno::ESRCH));
}

pub fn stale_handles() {
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let (info, _memfd) = front.hv().region_create(back.id, 2, 0).unwrap();
    let b = back.hv();
    let map = b.grant_map(front.id, &[info.first_gref], 0).unwrap();
    b.grant_unmap(map.handle).unwrap();
    assert!(b.grant_unmap(map.handle).unwrap_err().is(Errno::ESTALE));
    assert!(b.grant_claim(map.handle).unwrap_err().is(Errno::ESTALE));
    let map = b.grant_map(front.id, &[info.first_gref], 0).unwrap();
    system.kill(&back);
    // A dead incarnation's socket is closed for ever, even for whoever kept it.
    assert!(b.hello().unwrap_err().errno().is_none());
    let now = back.hv();
    let claimed = now.grant_claim(map.handle).unwrap();
    assert_eq!(claimed.pages, map.pages);
    now.grant_unmap(map.handle).unwrap();
    assert!(now.grant_unmap(map.handle).unwrap_err().is(Errno::ESTALE));
}

pub fn claims_and_drops() {
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let (info, _memfd) = front.hv().region_create(back.id, 4, 0).unwrap();
    let b = back.hv();
    let maps: Vec<_> = (0..3)
        .map(|i| b.grant_map(front.id, &[info.first_gref + i], 100 + u64::from(i)).unwrap().handle)
        .collect();
    system.kill(&back);
    let b = back.hv();
    let list = b.grant_list().unwrap();
    assert!(list.iter().all(|m| m.mine == 0) && list.len() == 3);
    assert_eq!(list.iter().map(|m| m.tag).collect::<Vec<_>>(), [100, 101, 102]);
    b.grant_claim(maps[1]).unwrap();
    b.grant_claim(maps[1]).expect("idempotent");
    b.grant_unmap(maps[2]).expect("a predecessor's may be dropped unclaimed");
    b.served().unwrap();
    let list = b.grant_list().unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].handle, list[0].mine), (maps[1], 1));
    assert!(b.grant_claim(maps[0]).unwrap_err().is(Errno::ESTALE));
    assert_eq!(system.get(&back).unwrap().mapped_pages, 1);
    // The quota is the domid's.
    let mut request = System::request("small", &[Role::Backend]);
    request.limits = Some(proto::hvcore::Limits { map_pages: 2, region_pages: 3, ..Default::default() });
    let small = system.create(request);
    let (info, _memfd) = front.hv().region_create(small.id, 4, 0).unwrap();
    let s = small.hv();
    let grefs: Vec<u32> = (0..3).map(|i| info.first_gref + i).collect();
    assert!(s.grant_map(front.id, &grefs, 0).unwrap_err().is(Errno::ENOSPC));
    let map = s.grant_map(front.id, &grefs[..2], 0).unwrap();
    assert!(s.grant_map(front.id, &grefs[2..], 0).unwrap_err().is(Errno::ENOSPC));
    s.grant_unmap(map.handle).unwrap();
    s.grant_map(front.id, &grefs[2..], 0).unwrap();
    assert!(s.region_create(front.id, 4, 0).unwrap_err().is(Errno::ENOSPC));
    assert!(s.region_create(front.id, MAX_REGION_PAGES + 1, 0).unwrap_err().is(Errno::EINVAL));
    // Copy buffers by number and by bytes.
    let mut request = System::request("copies", &[Role::Backend]);
    let bytes = 5 * PAGE_SIZE as u64;
    request.limits =
        Some(proto::hvcore::Limits { buffers: 3, buffer_bytes: bytes, channels: 3, ..Default::default() });
    let copies = system.create(request);
    let c = copies.hv();
    let (first, _) = buffer(&c, 1);
    let (big, memfd) = SharedMem::create("big", 5 * PAGE_SIZE).unwrap();
    assert!(c.buffer_register(&memfd, big.len() as u64).unwrap_err().is(Errno::ENOSPC), "six pages");
    buffer(&c, 2);
    buffer(&c, 2);
    assert!(c.buffer_register(&memfd, PAGE_SIZE as u64).unwrap_err().is(Errno::ENOSPC), "the fourth");
    c.buffer_unregister(first).unwrap();
    buffer(&c, 1);
    // As many channels as it may have, its own first.
    let more: Vec<_> = (0..2).map_while(|_| c.new_channel().ok()).collect();
    assert!(c.new_channel().unwrap_err().is(Errno::ENOSPC) && !more.is_empty());
}

/// A batch in which every second piece is wrong in its own way: each has its own status, all wrong ones are negative (XSA-316),
/// and what comes after a wrong one is done.
pub fn xsa_318_every_status_is_written() {
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let (info, memfd) = front.hv().region_create(back.id, 1, 0).unwrap();
    let granted = SharedMem::map(&memfd, PAGE_SIZE).unwrap();
    granted.copy_in(0, &[0xaa; 64]);
    let b = back.hv();
    let (id, own) = buffer(&b, 1);
    let good = |n: u64| CopyEntry {
        domid: front.id,
        flags: 0,
        gref: info.first_gref,
        offset: 0,
        len: 1,
        buffer: id,
        buffer_offset: n,
    };
    let bad = [
        CopyEntry { domid: 99, ..good(0) },
        CopyEntry { domid: DOMID_INVALID, ..good(0) },
        CopyEntry { gref: info.first_gref + 1, ..good(0) },
        CopyEntry { gref: u32::MAX, ..good(0) },
        CopyEntry { flags: 4, ..good(0) },
        CopyEntry { flags: COPY_TO_GRANT | COPY_TO_OTHER_GRANT, ..good(0) },
        CopyEntry { offset: 4095, len: 2, ..good(0) },
        CopyEntry { offset: u16::MAX, len: u16::MAX, ..good(0) },
        CopyEntry { buffer: id + 1, ..good(0) },
        CopyEntry { buffer_offset: 4096, ..good(0) },
        CopyEntry { buffer_offset: u64::MAX, ..good(0) },
    ];
    let want = [
        GNTST_BAD_DOMAIN,
        GNTST_BAD_DOMAIN,
        GNTST_BAD_GNTREF,
        GNTST_BAD_GNTREF,
        GNTST_GENERAL_ERROR,
        GNTST_GENERAL_ERROR,
        GNTST_BAD_COPY_ARG,
        GNTST_BAD_COPY_ARG,
        GNTST_GENERAL_ERROR,
        GNTST_BAD_COPY_ARG,
        GNTST_BAD_COPY_ARG,
    ];
    let batch: Vec<CopyEntry> = bad.iter().enumerate().flat_map(|(i, b)| [*b, good(i as u64)]).collect();
    let mut statuses = vec![7; batch.len()];
    b.grant_copy(&batch, &mut statuses).unwrap();
    for (i, pair) in statuses.chunks(2).enumerate() {
        assert_eq!(pair, [want[i], GNTST_OKAY], "piece {i}");
    }
    let mut bytes = [0; 12];
    own.copy_out(0, &mut bytes);
    assert_eq!(bytes, [0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0]);
    let mut zero = [7];
    b.grant_copy(&[CopyEntry { len: 0, ..good(4095) }], &mut zero).unwrap();
    assert_eq!(zero, [GNTST_OKAY], "nothing is copied, and that is fine");
}

/// From one guest's page to another's: both must be granted to the caller, and every range lies inside its page.
pub fn copies_from_grant_to_grant() {
    let mut system = System::start();
    let (one, two) = (system.guest("one"), system.guest("two"));
    let (back, thief) = (system.backend("back"), system.backend("thief"));
    let region = |dom: &Dom, peer: u16, fill: u8| {
        let (info, memfd) = dom.hv().region_create(peer, 3, 0).unwrap();
        let mem = SharedMem::map(&memfd, 3 * PAGE_SIZE).unwrap();
        mem.copy_in(0, &vec![fill; mem.len()]);
        (info.first_gref, mem)
    };
    let (from, from_mem) = region(&one, back.id, 0x11);
    let (to, to_mem) = region(&two, back.id, 0x22);
    let (foreign, foreign_mem) = region(&two, thief.id, 0x33);
    let piece = |gref, offset, len| CopyEntry { domid: one.id, gref, offset, len, ..CopyEntry::default() };
    let whole = piece(from + 1, 0, 4096).to_other(two.id, to + 1, 0);
    let bad = [
        (CopyEntry { domid: 99, ..whole }, GNTST_BAD_DOMAIN),
        (whole.to_other(99, to, 0), GNTST_BAD_DOMAIN),
        (whole.to_other(DOMID_INVALID, to, 0), GNTST_BAD_DOMAIN),
        (piece(from + 3, 0, 8).to_other(two.id, to, 0), GNTST_BAD_GNTREF),
        (whole.to_other(two.id, to + 9, 0), GNTST_BAD_GNTREF),
        (whole.to_other(two.id, foreign, 0), GNTST_BAD_GNTREF),
        (whole.to_other(one.id, to + 4, 0), GNTST_BAD_GNTREF),
        (whole.to_other(two.id, to, 1), GNTST_BAD_COPY_ARG),
        (piece(from, 1, 4096).to_other(two.id, to, 0), GNTST_BAD_COPY_ARG),
        (piece(from, u16::MAX, 1).to_other(two.id, to, 0), GNTST_BAD_COPY_ARG),
        (piece(from, 0, 1).to_other(two.id, to, u16::MAX), GNTST_BAD_COPY_ARG),
        (CopyEntry { buffer_offset: 1 << 32, ..whole }, GNTST_BAD_COPY_ARG),
    ];
    let b = back.hv();
    let batch: Vec<CopyEntry> = bad.iter().map(|(entry, _)| *entry).collect();
    let mut statuses = vec![7; batch.len()];
    b.grant_copy(&batch, &mut statuses).unwrap();
    assert_eq!(statuses, bad.map(|(_, status)| status));
    let untouched = |mem: &SharedMem, fill: u8| {
        let mut bytes = vec![0; mem.len()];
        mem.copy_out(0, &mut bytes);
        bytes.iter().all(|&byte| byte == fill)
    };
    assert!(untouched(&to_mem, 0x22) && untouched(&from_mem, 0x11) && untouched(&foreign_mem, 0x33));
    // To whom neither is granted.
    let mut status = [7];
    thief.hv().grant_copy(&[whole], &mut status).unwrap();
    assert_eq!(status, [GNTST_BAD_GNTREF]);
    // The whole page, some bytes at its end, and from a guest to itself.
    from_mem.copy_in(10, b"ten bytes.");
    let mut statuses = [7; 3];
    let entries = [
        whole,
        piece(from, 10, 10).to_other(two.id, to + 2, 4086),
        piece(from, 10, 10).to_other(one.id, from + 2, 0),
    ];
    b.grant_copy(&entries, &mut statuses).unwrap();
    assert_eq!(statuses, [GNTST_OKAY; 3]);
    let mut all = vec![0; to_mem.len()];
    to_mem.copy_out(0, &mut all);
    let mut want = [vec![0x22; 4096], vec![0x11; 4096], vec![0x22; 4096]].concat();
    want[3 * 4096 - 10..].copy_from_slice(b"ten bytes.");
    assert!(all == want, "just the bytes that were asked for");
    let mut own = [0; 10];
    from_mem.copy_out(2 * PAGE_SIZE, &mut own);
    assert_eq!(&own, b"ten bytes.");
    // The granters go in the middle of copies: each piece is done or refused, and the caller lives.
    let done = std::sync::atomic::AtomicBool::new(false);
    let batch = vec![whole; 512];
    let refused = std::thread::scope(|scope| {
        let copier = scope.spawn(|| {
            let mut refused = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) || refused == 0 {
                let mut statuses = vec![7; batch.len()];
                b.grant_copy(&batch, &mut statuses).unwrap();
                let known = [GNTST_OKAY, GNTST_BAD_DOMAIN, GNTST_BAD_GNTREF];
                assert!(statuses.iter().all(|status| known.contains(status)), "{statuses:?}");
                refused += statuses.iter().filter(|&&status| status != GNTST_OKAY).count();
            }
            refused
        });
        system.destroy(&two);
        system.destroy(&one);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        copier.join().unwrap()
    });
    assert!(refused > 0);
    b.hello().expect("the caller lives");
}

/// Canaries round every range that a copy may touch.
pub fn xsa_382_nothing_outside_the_buffer() {
    let mut system = System::start();
    let (front, back) = (system.guest("front"), system.backend("back"));
    let (info, memfd) = front.hv().region_create(back.id, 3, 0).unwrap();
    let granted = SharedMem::map(&memfd, 3 * PAGE_SIZE).unwrap();
    let b = back.hv();
    // A buffer registered shorter than its memfd: what is beyond is not to be touched.
    let (own, fd) = SharedMem::create("buffer", 2 * PAGE_SIZE).unwrap();
    let id = b.buffer_register(&fd, 5000).unwrap();
    for mem in [&granted, &own] {
        mem.copy_in(0, &vec![0x55; mem.len()]);
    }
    let mut state = 12345u64;
    let mut next = |max: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % max
    };
    for _ in 0..2000 {
        let (offset, len, at) = (next(4200) as u16, next(4200) as u16, next(5200));
        let entry = CopyEntry {
            domid: front.id,
            flags: COPY_TO_GRANT * next(2) as u16,
            gref: info.first_gref + 1,
            offset,
            len,
            buffer: id,
            buffer_offset: at,
        };
        let mut status = [9];
        b.grant_copy(&[entry], &mut status).unwrap();
        let fits = u64::from(offset) + u64::from(len) <= 4096 && at + u64::from(len) <= 5000;
        assert_eq!(status[0] == GNTST_OKAY, fits, "{entry:?}");
    }
    // Other pages of the region and the buffer's rest still hold the canary.
    let intact = |mem: &SharedMem, from: usize, to: usize| {
        let mut bytes = vec![0; to - from];
        mem.copy_out(from, &mut bytes);
        bytes.iter().all(|b| *b == 0x55)
    };
    assert!(intact(&granted, 0, PAGE_SIZE) && intact(&granted, 2 * PAGE_SIZE, 3 * PAGE_SIZE));
    assert!(intact(&own, 5000, 2 * PAGE_SIZE));
}

pub fn copy_buffers_die_with_the_incarnation() {
    let mut system = System::start();
    let back = system.backend("back");
    let b = back.hv();
    let (id, _mem) = buffer(&b, 1);
    // What is no sealed memfd, or too short, is refused.
    let unsealed = nix::sys::memfd::memfd_create(c"x", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&unsealed, 4096).unwrap();
    assert!(b.buffer_register(&unsealed, 4096).unwrap_err().is(Errno::EINVAL), "could shrink");
    let file = tempfile::tempfile().unwrap();
    assert!(b.buffer_register(&file, 4096).unwrap_err().is(Errno::EINVAL));
    let (_short, fd) = SharedMem::create("short", 4096).unwrap();
    assert!(b.buffer_register(&fd, 4097).unwrap_err().is(Errno::EINVAL));
    assert!(b.buffer_register(&fd, 0).unwrap_err().is(Errno::EINVAL));
    assert!(b.buffer_register(&fd, (64 << 20) + 1).unwrap_err().is(Errno::EINVAL));
    system.kill(&back);
    let b = back.hv();
    assert!(b.buffer_unregister(id).unwrap_err().is(Errno::ENOENT));
    let mut all = Vec::new();
    let full = loop {
        match b.buffer_register(&fd, 4096) {
            Ok(id) => all.push(id),
            Err(e) => break e,
        }
    };
    assert!(full.is(Errno::ENOSPC) && all.len() == 64);
    b.buffer_unregister(all[0]).unwrap();
    b.buffer_register(&fd, 4096).unwrap();
}
