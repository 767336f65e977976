//! Calls about regions, grant maps and grant copies.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_abi::*;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use xen_abi::grant_table::{GNTST_BAD_COPY_ARG, GNTST_BAD_DOMAIN, GNTST_BAD_GNTREF, GNTST_GENERAL_ERROR};
use zerocopy::IntoBytes;

use super::{Answer, Reply, after, counted, exact};
use crate::fdstore::check_kind;
use crate::grants::copy::{Batch, End, Held, MAX_BUFFER_LEN, Piece, Place, check};
use crate::grants::pvh::Pvh;
use crate::grants::release::{HONOUR_DEADLINE, Pending};
use crate::grants::{Map, PvhPins, udmabuf};
use crate::ports::Peer;
use crate::sys::shm::Shm;
use crate::table::{Caller, Domain, Hv, Table};

/// Roles that may use other domains' pages.
const MAPS_GRANTS: u32 = ROLE_BACKEND | ROLE_XENSTORE | ROLE_CONSOLE;

/// The caller, if it may use other domains' pages.
fn backend<'t>(table: &'t mut Table, c: &Caller) -> Result<&'t mut Domain, Errno> {
    let d = Hv::own(table, c)?;
    if d.has(MAPS_GRANTS) { Ok(d) } else { Err(Errno::EPERM) }
}

pub(super) fn region_create(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: RegionCreateReq = exact(body)?;
    let mut table = hv.lock();
    let peer = table.named(req.peer)?.peer;
    let d = Hv::own(&mut table, c)?;
    if d.pvh.is_some() {
        // Its grant references are those of its guest's table.
        return Err(Errno::EPERM);
    }
    let region = d.regions.create(peer, req.pages, req.tag)?;
    Ok(Reply::of(&region.info).with([region.mem.fd.clone()]))
}

pub(super) fn region_delete(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: RegionReq = exact(body)?;
    // Dropped after the lock: the last user of a large region frees its pages.
    let _gone = Hv::own(&mut hv.lock(), c)?.regions.delete(req.region)?;
    Ok(Reply::default())
}

pub(super) fn region_list(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let after = after(body)?.unwrap_or(0);
    let mut table = hv.lock();
    // Grant references and numbers are given out in the same order, and never twice.
    let regions = Hv::own(&mut table, c)?.regions.iter().filter(|r| u64::from(r.info.region) > after);
    Ok(Reply::list(regions.map(|r| r.info)))
}

pub(super) fn region_fetch(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: RegionReq = exact(body)?;
    let mut table = hv.lock();
    let region = Hv::own(&mut table, c)?.regions.find(req.region).ok_or(Errno::ENOENT)?;
    Ok(Reply::of(&region.info).with([region.mem.fd.clone()]))
}

fn map_reply(handle: u64, map: &Map) -> Reply {
    let head = GrantMapRep { handle, count: map.pages.len() as u32, fd_pages: map.fd_pages };
    let mut reply = Reply::of(&head).with([map.fd.clone()]);
    reply.body.extend_from_slice(map.pages.as_bytes());
    reply
}

pub(super) fn map(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let (req, grefs) = counted::<GrantMapReq, u32>(body, |r| r.count, MAX_MAP_GREFS)?;
    let (granter, pvh) = {
        let mut table = hv.lock();
        backend(&mut table, c)?;
        let granter = table.named(req.domid)?;
        match &granter.pvh {
            Some(pvh) => (granter.peer, pvh.clone()),
            None => return map_region(&mut table, c, &req, &grefs),
        }
    };
    if !hv.bufs.available() {
        return Err(Errno::EOPNOTSUPP);
    }
    backend(&mut hv.lock(), c)?.maps.reserve(req.count)?;
    let made = map_pvh(hv, c, &pvh, &grefs);
    let mut table = hv.lock();
    // The quota belongs to the domid, whichever incarnation has it now.
    let entered = made.and_then(|(fd, pins)| {
        let still = table.named(req.domid).is_ok_and(|d| d.peer == granter);
        match Hv::own(&mut table, c) {
            Ok(d) if still => {
                let map = Map {
                    fd: Arc::new(fd),
                    pages: (0..req.count).collect(),
                    fd_pages: req.count,
                    granter,
                    tag: req.tag,
                    generation: d.generation,
                    pins: Some(pins),
                };
                let reply = map_reply(0, &map);
                Ok((d.maps.insert(map), reply))
            }
            // Never handed out, and closed here: nothing to prove.
            gone => {
                drop(fd);
                pins.clear();
                Err(gone.err().unwrap_or(Errno::ESRCH))
            }
        }
    });
    match entered {
        Ok((handle, mut reply)) => {
            reply.body[..size_of::<u64>()].copy_from_slice(handle.as_bytes());
            Ok(reply)
        }
        Err(errno) => {
            if let Some(d) = table.get_mut(c.peer()) {
                d.maps.unreserve(req.count);
            }
            Err(errno)
        }
    }
}

/// All of one region, which is the fd that both sides have.
fn map_region(table: &mut Table, c: &Caller, req: &GrantMapReq, grefs: &[u32]) -> Answer {
    let granter = table.named(req.domid)?;
    let mut found: Option<(u32, Map)> = None;
    for (i, &gref) in grefs.iter().enumerate() {
        let Some((region, page)) = granter.regions.resolve(gref, c.peer()) else {
            tracing::debug!(domid = c.peer().domid, granter = req.domid, gref, i, "map: not granted");
            return Err(Errno::EACCES);
        };
        let (number, map) = found.get_or_insert_with(|| {
            let map = Map {
                fd: region.mem.fd.clone(),
                pages: Vec::with_capacity(grefs.len()),
                fd_pages: region.mem.pages,
                granter: granter.peer,
                tag: req.tag,
                generation: c.incarnation.generation,
                pins: None,
            };
            (region.info.region, map)
        });
        if *number != region.info.region {
            return Err(Errno::EINVAL);
        }
        map.pages.push(page);
    }
    let (_, map) = found.ok_or(Errno::EINVAL)?;
    let d = backend(table, c)?;
    d.maps.reserve(req.count)?;
    let mut reply = map_reply(0, &map);
    let handle = d.maps.insert(map);
    reply.body[..size_of::<u64>()].copy_from_slice(handle.as_bytes());
    Ok(reply)
}

/// Pins all or none, and makes a dma-buf of exactly these pages.
fn map_pvh(hv: &Hv, c: &Caller, pvh: &Arc<Pvh>, grefs: &[u32]) -> Result<(OwnedFd, PvhPins), Errno> {
    let mut pins = PvhPins { pvh: pvh.clone(), grefs: Vec::with_capacity(grefs.len()), ino: 0 };
    let mut pages = Vec::with_capacity(grefs.len());
    for (i, &gref) in grefs.iter().enumerate() {
        match pvh.pin(gref, c.peer().domid, true) {
            Ok(page) => {
                pins.grefs.push(gref);
                pages.push(page);
            }
            Err(status) => {
                tracing::debug!(domid = c.peer().domid, gref, i, status, "map: refused by the grant table");
                pins.clear();
                return Err(Errno::EACCES);
            }
        }
    }
    let made = hv.bufs.create(&pvh.ram, &pages).map_err(|e| {
        tracing::warn!(domid = c.peer().domid, "udmabuf: {e}");
        Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))
    });
    match made.and_then(|fd| Ok((udmabuf::inode(&fd)?, fd))) {
        Ok((ino, fd)) => {
            pins.ino = ino;
            Ok((fd, pins))
        }
        Err(errno) => {
            pins.clear();
            Err(errno)
        }
    }
}

pub(super) fn unmap(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: MapReq = exact(body)?;
    let map = backend(&mut hv.lock(), c)?.maps.remove(req.handle)?;
    let Some(pins) = map.pins else { return Ok(Reply::default()) };
    let (holder, generation) = (c.peer(), c.incarnation.generation);
    drop(map.fd);
    let deadline = Instant::now() + HONOUR_DEADLINE;
    let mut wait = Duration::from_micros(50);
    loop {
        if hv.bufs.gone(pins.ino, hv.incarnation_pid(holder, generation)) {
            pins.clear();
            return Ok(Reply::default());
        }
        let over = c.incarnation.ended();
        if over || Instant::now() > deadline {
            let pages = pins.grefs.len();
            hv.releaser.release(Pending { pins, holder, generation });
            if !over {
                let what = format!("still holds {pages} pages that it said it had unmapped");
                hv.violation(holder, &what, true);
            }
            return Err(Errno::EBUSY);
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(Duration::from_millis(10));
    }
}

pub(super) fn list(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let after = after(body)?.unwrap_or(0);
    let mut table = hv.lock();
    let d = Hv::own(&mut table, c)?;
    Ok(Reply::list(d.maps.list(d.generation, after)))
}

pub(super) fn claim(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: MapReq = exact(body)?;
    let mut table = hv.lock();
    backend(&mut table, c)?;
    let granter = Hv::own(&mut table, c)?.maps.granter(req.handle)?;
    if granter.is_none_or(|g| table.named(g.domid).is_ok_and(|d| d.peer == g)) {
        let map = Hv::own(&mut table, c)?.maps.claim(req.handle, c.incarnation.generation)?;
        return Ok(map_reply(req.handle, map));
    }
    // The granter is going: its pages are on their way back.
    Err(Errno::ESTALE)
}

/// A page that a domain granted to the caller, from a byte of it on.
fn granted(batch: &mut Batch, granter: &Domain, caller: Peer, gref: u32, offset: u16) -> Result<End, i16> {
    Ok(match &granter.pvh {
        Some(pvh) => batch.end(Held::Pvh(pvh.clone()), Place::Granted(gref, offset)),
        None => {
            let (region, page) = granter.regions.resolve(gref, caller).ok_or(GNTST_BAD_GNTREF)?;
            let at = u64::from(page) * PAGE_SIZE as u64 + u64::from(offset);
            batch.end(Held::Region(region.mem.clone()), Place::Byte(at))
        }
    })
}

/// Finds everything that a batch names, under one lock.
fn resolve(hv: &Hv, c: &Caller, entries: &[CopyEntry]) -> Result<Batch, Errno> {
    let mut table = hv.lock();
    backend(&mut table, c)?;
    let table = &*table;
    let caller: Peer = c.peer();
    let own = table.get(caller).ok_or(Errno::ESTALE)?;
    let named = |domid| table.named(domid).map_err(|_| GNTST_BAD_DOMAIN);
    let mut batch = Batch::new(entries.len());
    let piece = |batch: &mut Batch, e: &CopyEntry| {
        check(e)?;
        let (from, to);
        if e.flags == COPY_TO_OTHER_GRANT {
            let (domid, gref, offset) = e.other().ok_or(GNTST_BAD_COPY_ARG)?;
            from = granted(batch, named(e.domid)?, caller, e.gref, e.offset)?;
            to = granted(batch, named(domid)?, caller, gref, offset)?;
        } else {
            let buffer = own.buffers.get(e.buffer).ok_or(GNTST_GENERAL_ERROR)?;
            let page = granted(batch, named(e.domid)?, caller, e.gref, e.offset)?;
            let buffer = batch.end(Held::Buffer(buffer.clone()), Place::Byte(e.buffer_offset));
            (from, to) = if e.flags == COPY_TO_GRANT { (buffer, page) } else { (page, buffer) };
        }
        Ok(Piece { from, to, len: e.len })
    };
    for entry in entries {
        let piece = piece(&mut batch, entry);
        batch.push(piece);
    }
    Ok(batch)
}

pub(super) fn copy(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let (_, entries) = counted::<CountReq, CopyEntry>(body, |r| r.count, MAX_COPY_ENTRIES)?;
    let statuses = resolve(hv, c, &entries)?.run(c.peer().domid);
    Ok(Reply::list(statuses.into_iter()))
}

pub(super) fn buffer_register(hv: &Hv, c: &Caller, body: &[u8], fd: OwnedFd) -> Answer {
    let req: BufferReq = exact(body)?;
    if req.len == 0 || req.len > MAX_BUFFER_LEN {
        return Err(Errno::EINVAL);
    }
    backend(&mut hv.lock(), c)?;
    check_buffer(&fd, req.len)?;
    let map = Arc::new(Shm::map(&fd, req.len as usize)?);
    let added = {
        let mut table = hv.lock();
        let own = backend(&mut table, c)?;
        own.buffers.add(map, own.spec.limits.buffers, own.spec.limits.buffer_bytes)
    };
    let id = added.map_err(|_unmapped_here| Errno::ENOSPC)?;
    Ok(Reply::of(&BufferRep { id, pad: 0 }))
}

/// A memfd of ordinary pages (huge ones can be missing when touched) that is long enough and cannot get shorter: no access to
/// it can ever fault.
fn check_buffer(fd: &OwnedFd, len: u64) -> Result<(), Errno> {
    check_kind(fd, fd_kind::MEMFD)?;
    let seals = SealFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GET_SEALS)?);
    let is_tmpfs = nix::sys::statfs::fstatfs(fd)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
    let long_enough = nix::sys::stat::fstat(fd)?.st_size as u64 >= len;
    if seals.contains(SealFlag::F_SEAL_SHRINK) && is_tmpfs && long_enough {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

pub(super) fn buffer_unregister(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: BufferReq = exact(body)?;
    let gone = backend(&mut hv.lock(), c)?.buffers.remove(req.id);
    gone.map(|_unmapped_here| Reply::default()).ok_or(Errno::ENOENT)
}
