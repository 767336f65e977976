//! Calls about the fd store and approved resources.

use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use hv_abi::*;
use nix::errno::Errno;

use super::{Answer, Reply, after_name, exact, name};
use crate::fdstore::{Entry, check_kind};
use crate::resources;
use crate::table::{Caller, Hv};

pub(super) fn put(hv: &Hv, c: &Caller, body: &[u8], fd: OwnedFd) -> Answer {
    let req: FdPutReq = exact(body)?;
    if req.name.as_str().is_none() {
        return Err(Errno::EINVAL);
    }
    check_kind(&fd, req.kind)?;
    let entry = Entry { kind: req.kind, tag: req.tag, fd: Arc::new(fd) };
    // What is replaced or refused is closed after the lock is gone: closing what a domain gave may take its time.
    let result = Hv::own(&mut hv.lock(), c)
        .map_err(|e| (e, None))
        .and_then(|d| d.fds.put(&req.name, entry).map_err(|(e, entry)| (e, Some(entry))));
    match result {
        Ok(_replaced) => Ok(Reply::default()),
        Err((errno, _refused)) => Err(errno),
    }
}

pub(super) fn get(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let name = name(body)?;
    let mut table = hv.lock();
    let entry = Hv::own(&mut table, c)?.fds.get(&name).ok_or(Errno::ENOENT)?;
    Ok(Reply::of(&FdInfo { name, kind: entry.kind, pad: 0, tag: entry.tag }).with([entry.fd.clone()]))
}

pub(super) fn list(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let after = after_name(body)?;
    Ok(Reply::list(Hv::own(&mut hv.lock(), c)?.fds.list(after)))
}

pub(super) fn delete(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let name = name(body)?;
    let gone = Hv::own(&mut hv.lock(), c)?.fds.delete(&name);
    gone.map(|_closed_here| Reply::default()).ok_or(Errno::ENOENT)
}

pub(super) fn resource_open(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let name = name(body)?;
    let (resource, netns, opens) = {
        let mut table = hv.lock();
        let d = Hv::own(&mut table, c)?;
        let resource = d.resources.get(&name.0).cloned().ok_or(Errno::ENOENT)?;
        let (own, opens) = (d.kept.as_ref().map(|k| k.netns.clone()), d.opens.clone());
        let netns = match (resource.kind, resources::inside(&resource.path)) {
            (resource_kind::DEVICE, _) => Some(own.ok_or(Errno::ESTALE)?),
            // Nobody listens in a domain that is not there.
            (resource_kind::CONNECT, Some((uuid, _))) => {
                let of = table.domains.values().find(|d| d.spec.uuid == uuid);
                let kept = of.and_then(|d| d.kept.as_ref()).ok_or(Errno::ECONNREFUSED)?;
                Some(kept.netns.clone())
            }
            _ => None,
        };
        (resource, netns, opens)
    };
    let fd = match (resource.kind, resource.listener.or(resource.temporary)) {
        (resource_kind::LISTENER, Some(listener)) => listener,
        (resource_kind::FILE_TEMPORARY, Some(file)) => Arc::new(resources::reopen(&file)?),
        (kind, _) => {
            // The next incarnation begins when all calls of this one have ended: none may wait for the kernel.
            let opened = opens.open(kind, &resource.path, netns, || c.incarnation.ended());
            Arc::new(opened.map_err(|e| if c.incarnation.ended() { Errno::ESTALE } else { e })?)
        }
    };
    Ok(Reply::of(&ResourceInfo { name, kind: resource.kind, pad: 0 }).with([fd]))
}

pub(super) fn resource_accept(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: AcceptReq = exact(body)?;
    if req.name.as_str().is_none() {
        return Err(Errno::EINVAL);
    }
    let listener = {
        let mut table = hv.lock();
        let d = Hv::own(&mut table, c)?;
        let resource = d.resources.get(&req.resource.0).ok_or(Errno::ENOENT)?;
        let listener = resource.listener.clone().ok_or(Errno::EINVAL)?;
        if !d.fds.has_room(&req.name) {
            return Err(Errno::ENOSPC);
        }
        listener
    };
    let listener = UnixListener::from(listener.try_clone().map_err(errno)?);
    // Shared with the domain: one that takes it back in this moment holds up itself alone.
    listener.set_nonblocking(true).map_err(errno)?;
    let fd = Arc::new(OwnedFd::from(listener.accept().map_err(errno)?.0));
    let entry = Entry { kind: fd_kind::SOCKET, tag: req.tag, fd: fd.clone() };
    let result = Hv::own(&mut hv.lock(), c)
        .map_err(|e| (e, None))
        .and_then(|d| d.fds.put(&req.name, entry).map_err(|(e, entry)| (e, Some(entry))));
    match result {
        Ok(_replaced) => {
            let info = FdInfo { name: req.name, kind: fd_kind::SOCKET, pad: 0, tag: req.tag };
            Ok(Reply::of(&info).with([fd]))
        }
        Err((errno, _refused)) => Err(errno),
    }
}

fn errno(e: std::io::Error) -> Errno {
    Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))
}

pub(super) fn resource_list(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let after = after_name(body)?;
    let mut table = hv.lock();
    let d = Hv::own(&mut table, c)?;
    let info = |(name, r): (&[u8; NAME_LEN], &resources::Resource)| ResourceInfo {
        name: Name(*name),
        kind: r.kind,
        pad: 0,
    };
    Ok(Reply::list(d.resources.range((after, Bound::Unbounded)).map(info)))
}
