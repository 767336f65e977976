//! Calls about event channels.

use hv_abi::*;
use nix::errno::Errno;

use super::{Answer, Reply, after, exact};
use crate::ports::{Port, bind_local, bind_remote, bindable};
use crate::table::{Caller, Hv};

/// VIRQ numbers are below this (xen.h, NR_VIRQS).
const NR_VIRQS: u32 = 24;
/// Most vCPUs that a port can be for.
const MAX_VCPUS: u32 = 4096;

fn told((number, port): (u32, &Port)) -> Reply {
    Reply::of(&port.info(number)).with(port.fds())
}

fn resolve_self(domid: u16, c: &Caller) -> u16 {
    if domid == DOMID_SELF { c.peer().domid } else { domid }
}

pub(super) fn alloc_unbound(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: PortAllocReq = exact(body)?;
    let mut table = hv.lock();
    let remote = table.named(resolve_self(req.remote_domid, c))?.peer;
    Hv::own(&mut table, c)?.ports.alloc_unbound(remote).map(told)
}

pub(super) fn bind_interdomain(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: PortBindReq = exact(body)?;
    let mut table = hv.lock();
    Hv::own(&mut table, c)?;
    let remote = table.named(resolve_self(req.remote_domid, c))?;
    let remote_peer = remote.peer;
    let number = match bindable(&remote.ports, req.remote_port, c.peer())? {
        Err(already) => already,
        Ok(port) => {
            let own = &mut Hv::own(&mut table, c)?.ports;
            let number = bind_local(own, remote_peer, req.remote_port, port)?;
            if let Some(remote) = table.get_mut(remote_peer) {
                bind_remote(&mut remote.ports, req.remote_port, c.peer(), number);
            }
            number
        }
    };
    let own = Hv::own(&mut table, c)?;
    own.ports.get(number).map(|p| told((number, p))).ok_or(Errno::EBUSY)
}

pub(super) fn bind_virq(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: PortVirqReq = exact(body)?;
    if req.virq >= NR_VIRQS || req.vcpu >= MAX_VCPUS {
        return Err(Errno::EINVAL);
    }
    let mut table = hv.lock();
    let d = Hv::own(&mut table, c)?;
    // Domain events are told to those who may list domains; a runner's guest has the others, which it raises itself.
    let allowed = if req.virq == VIRQ_DOM_EXC { ROLE_XENSTORE | ROLE_CONSOLE | ROLE_DOM0 } else { ROLE_PVH };
    if !d.has(allowed) {
        return Err(Errno::EPERM);
    }
    d.ports.bind_virq(req.virq, req.vcpu).map(told)
}

pub(super) fn bind_ipi(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: PortVirqReq = exact(body)?;
    if req.vcpu >= MAX_VCPUS {
        return Err(Errno::EINVAL);
    }
    let mut table = hv.lock();
    let d = Hv::own(&mut table, c)?;
    if !d.has(ROLE_PVH) {
        return Err(Errno::EPERM);
    }
    d.ports.bind_ipi(req.vcpu).map(told)
}

pub(super) fn close(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: PortReq = exact(body)?;
    let mut table = hv.lock();
    let closed = Hv::own(&mut table, c)?.ports.close(req.port)?;
    table.finish_close(c.peer(), req.port, closed);
    Ok(Reply::default())
}

pub(super) fn list(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let after = after(body)?.unwrap_or(0);
    let mut table = hv.lock();
    let ports = Hv::own(&mut table, c)?.ports.iter().filter(|(n, _)| u64::from(*n) > after);
    Ok(Reply::list(ports.map(|(n, p)| p.info(n))))
}

pub(super) fn fetch(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: PortReq = exact(body)?;
    let mut table = hv.lock();
    let d = Hv::own(&mut table, c)?;
    d.ports.get(req.port).map(|p| told((req.port, p))).ok_or(Errno::ENOENT)
}
