//! Calls about domains: who the caller is, who else is there, rings, shutdown, RAM.

use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::event::Kind;

use super::{Answer, Reply, after, empty, exact};
use crate::table::{Caller, Domain, Hv};

/// Roles that may look at all domains.
const SEES_ALL: u32 = ROLE_XENSTORE | ROLE_CONSOLE | ROLE_DOM0;
/// Highest SHUTDOWN_* of sched.h (soft_reset).
const SHUTDOWN_MAX: u32 = 5;

pub(super) fn hello(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    if exact::<HelloReq>(body)?.abi != ABI_VERSION {
        return Err(Errno::EINVAL);
    }
    let mut table = hv.lock();
    let (xenstore_domid, console_domid) = (table.with_role(ROLE_XENSTORE), table.with_role(ROLE_CONSOLE));
    let d = Hv::own(&mut table, c)?;
    Ok(Reply::of(&HelloRep {
        domid: d.peer.domid,
        xenstore_domid,
        console_domid,
        pad: 0,
        generation: d.generation,
        roles: d.spec.roles,
        instance: d.peer.instance,
        uuid: *d.spec.uuid.as_bytes(),
        prev_exit: d.prev_exit,
        prev_exit_ns: d.prev_exit_ns,
    }))
}

pub(super) fn set_ring(
    hv: &Hv,
    c: &Caller,
    body: &[u8],
    ring: impl Fn(&mut Domain) -> &mut Option<(u32, u32)>,
) -> Answer {
    let req: RingReq = exact(body)?;
    let mut table = hv.lock();
    let d = Hv::own(&mut table, c)?;
    if d.ports.get(req.port).is_none() {
        return Err(Errno::ENOENT);
    }
    *ring(d) = Some((req.gref, req.port));
    table.kick_dom_exc();
    Ok(Reply::default())
}

pub(super) fn info(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: DomReq = exact(body)?;
    let mut table = hv.lock();
    let d = Hv::own(&mut table, c)?;
    if req.domid == DOMID_SELF || req.domid == d.peer.domid {
        return Ok(Reply::of(&d.info(true)));
    }
    let rings = d.has(SEES_ALL);
    let other = table.domains.get(&req.domid).ok_or(Errno::ESRCH)?;
    Ok(Reply::of(&other.info(rings)))
}

pub(super) fn list(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let after = after(body)?;
    let mut table = hv.lock();
    if !Hv::own(&mut table, c)?.has(SEES_ALL) {
        return Err(Errno::EPERM);
    }
    let rest = table.domains.values().filter(|d| after.is_none_or(|a| u64::from(d.peer.domid) > a));
    Ok(Reply::list(rest.map(|d| d.info(true))))
}

pub(super) fn shutdown(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    let req: ShutdownReq = exact(body)?;
    if req.reason > SHUTDOWN_MAX {
        return Err(Errno::EINVAL);
    }
    let (id, name) = {
        let mut table = hv.lock();
        let d = Hv::own(&mut table, c)?;
        d.state = dom_state::SHUTDOWN;
        d.shutdown_reason = req.reason;
        let told = (d.event_id(), d.spec.name.clone());
        table.kick_dom_exc();
        told
    };
    hv.events.push(Kind::Shutdown, id, &name, &format!("reason {}", req.reason));
    Ok(Reply::default())
}

pub(super) fn ram_fetch(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    empty(body)?;
    let mut table = hv.lock();
    let pvh = Hv::own(&mut table, c)?.pvh.clone().ok_or(Errno::EPERM)?;
    Ok(Reply::of(&pvh.info).with([pvh.ram.clone(), pvh.frames.clone()]))
}
