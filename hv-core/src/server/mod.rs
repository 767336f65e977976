//! The hypercall server: one thread for each hypercall socket. A message is received once, checked, and answered; whatever a
//! domain sends, the worst it can get is an error.

mod domains;
mod grant;
mod ports;
mod store;

use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use hv_abi::*;
use nix::errno::Errno;
use proto::hvcore::event::Kind;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::domain::Incarnation;
use crate::lifecycle::Cmd;
use crate::sys::sock;
use crate::table::{Caller, Hv};

/// Stack of a hypercall thread, bytes.
const STACK: usize = 256 << 10;

/// An answer.
#[derive(Debug, Default)]
struct Reply {
    body: Vec<u8>,
    fds: Vec<Arc<OwnedFd>>,
}

type Answer = Result<Reply, Errno>;

impl Reply {
    fn of(body: &(impl IntoBytes + Immutable)) -> Reply {
        Reply { body: body.as_bytes().to_vec(), fds: Vec::new() }
    }

    fn with(mut self, fds: impl IntoIterator<Item = Arc<OwnedFd>>) -> Reply {
        self.fds.extend(fds);
        self
    }

    /// As many entries as one message can carry, and whether there are more.
    fn list<T: IntoBytes + Immutable>(mut entries: impl Iterator<Item = T>) -> Reply {
        let room = (MAX_MESSAGE - size_of::<RepHeader>() - size_of::<ListRep>()) / size_of::<T>();
        let listed: Vec<T> = entries.by_ref().take(room).collect();
        let more = entries.next().is_some().into();
        let mut reply = Reply::of(&ListRep { count: listed.len() as u32, more });
        reply.body.extend_from_slice(listed.as_bytes());
        reply
    }
}

/// Where a list by number goes on.
fn after(body: &[u8]) -> Result<Option<u64>, Errno> {
    if body.is_empty() { Ok(None) } else { exact::<ListReq>(body).map(|req| Some(req.after)) }
}

/// Where a list by name goes on.
fn after_name(body: &[u8]) -> Result<Bound<[u8; NAME_LEN]>, Errno> {
    if body.is_empty() { Ok(Bound::Unbounded) } else { name(body).map(|n| Bound::Excluded(n.0)) }
}

/// A call's fixed body and nothing else.
fn exact<T: FromBytes>(body: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(body).map_err(|_| Errno::EINVAL)
}

/// A call without a body.
fn empty(body: &[u8]) -> Result<(), Errno> {
    if body.is_empty() { Ok(()) } else { Err(Errno::EINVAL) }
}

/// A call's fixed body, then exactly `count` entries, 1 to `max`.
fn counted<H: FromBytes, T: FromBytes>(
    body: &[u8],
    count: impl Fn(&H) -> u32,
    max: usize,
) -> Result<(H, Vec<T>), Errno> {
    let (head, rest) = H::read_from_prefix(body).map_err(|_| Errno::EINVAL)?;
    let count = count(&head) as usize;
    if count == 0 || count > max || rest.len() != count * size_of::<T>() {
        return Err(Errno::EINVAL);
    }
    let entries = rest.chunks_exact(size_of::<T>()).map(exact).collect::<Result<_, _>>()?;
    Ok((head, entries))
}

/// A name in a call.
fn name(body: &[u8]) -> Result<Name, Errno> {
    let name = exact::<NameReq>(body)?.name;
    if name.as_str().is_none() { Err(Errno::EINVAL) } else { Ok(name) }
}

/// Serves one more channel of an incarnation on a thread of its own.
///
/// # Errors
/// `ESTALE` the incarnation is over, `ENOSPC` too many channels, `EAGAIN` no thread.
pub fn serve(hv: &Arc<Hv>, incarnation: &Arc<Incarnation>, socket: OwnedFd) -> Result<(), Errno> {
    let socket = Arc::new(socket);
    let id = incarnation.add(socket.clone())?;
    let caller = Caller { incarnation: incarnation.clone() };
    let hv_of_thread = hv.clone();
    let spawned = std::thread::Builder::new()
        .name(format!("d{}.{} call", incarnation.peer.domid, incarnation.generation))
        .stack_size(STACK)
        .spawn(move || {
            run(&hv_of_thread, &caller, &socket);
            drop(socket);
            finished(&hv_of_thread, &caller.incarnation, id);
        });
    match spawned {
        Ok(_) => Ok(()),
        Err(_) => {
            finished(hv, incarnation, id);
            Err(Errno::EAGAIN)
        }
    }
}

fn finished(hv: &Hv, incarnation: &Incarnation, id: u64) {
    if incarnation.remove(id) {
        let _ends_with_hv_core =
            hv.cmd.send(Cmd::Drained { peer: incarnation.peer, generation: incarnation.generation });
    }
}

fn run(hv: &Arc<Hv>, caller: &Caller, socket: &OwnedFd) {
    let mut buffer = vec![0; MAX_MESSAGE];
    while let Ok(Some(message)) = sock::recv(socket, &mut buffer, MAX_FDS) {
        let bytes = &buffer[..message.len];
        let Ok((header, body)) = ReqHeader::read_from_prefix(bytes) else {
            // Too short to have a number that an answer could carry.
            if answer(socket, 0, Err(Errno::EINVAL)).is_err() {
                return;
            }
            continue;
        };
        let result = if message.truncated || header.pad != 0 {
            Err(Errno::EINVAL)
        } else {
            match Op::from_u16(header.op) {
                Some(op) => call(hv, caller, op, body, message.fds),
                None => Err(Errno::EINVAL),
            }
        };
        if answer(socket, header.seq, result).is_err() {
            return;
        }
    }
}

fn answer(socket: &OwnedFd, seq: u32, result: Answer) -> nix::Result<()> {
    let (status, reply) = match result {
        Ok(reply) => (0, reply),
        Err(errno) => (-(errno as i32), Reply::default()),
    };
    let header = RepHeader { seq, status };
    let fds: Vec<BorrowedFd<'_>> = reply.fds.iter().map(|fd| fd.as_fd()).collect();
    sock::send(socket, &[header.as_bytes(), &reply.body], &fds)
}

/// The descriptors a call must bring: one, or none.
fn one_fd(mut fds: Vec<OwnedFd>) -> Result<OwnedFd, Errno> {
    match (fds.pop(), fds.is_empty()) {
        (Some(fd), true) => Ok(fd),
        _ => Err(Errno::EINVAL),
    }
}

fn call(hv: &Arc<Hv>, c: &Caller, op: Op, body: &[u8], fds: Vec<OwnedFd>) -> Answer {
    let brings_fd = matches!(op, Op::FdPut | Op::BufferRegister);
    if !brings_fd && !fds.is_empty() {
        return Err(Errno::EINVAL);
    }
    match op {
        Op::Hello => domains::hello(hv, c, body),
        Op::NewChannel => new_channel(hv, c, body),
        Op::Served => served(hv, c, body),
        Op::RegionCreate => grant::region_create(hv, c, body),
        Op::RegionDelete => grant::region_delete(hv, c, body),
        Op::RegionList => grant::region_list(hv, c, body),
        Op::RegionFetch => grant::region_fetch(hv, c, body),
        Op::PortAllocUnbound => ports::alloc_unbound(hv, c, body),
        Op::PortBindInterdomain => ports::bind_interdomain(hv, c, body),
        Op::PortBindVirq => ports::bind_virq(hv, c, body),
        Op::PortBindIpi => ports::bind_ipi(hv, c, body),
        Op::PortClose => ports::close(hv, c, body),
        Op::PortList => ports::list(hv, c, body),
        Op::PortFetch => ports::fetch(hv, c, body),
        Op::GrantMap => grant::map(hv, c, body),
        Op::GrantUnmap => grant::unmap(hv, c, body),
        Op::GrantList => grant::list(hv, c, body),
        Op::GrantClaim => grant::claim(hv, c, body),
        Op::GrantCopy => grant::copy(hv, c, body),
        Op::BufferRegister => grant::buffer_register(hv, c, body, one_fd(fds)?),
        Op::BufferUnregister => grant::buffer_unregister(hv, c, body),
        Op::FdPut => store::put(hv, c, body, one_fd(fds)?),
        Op::FdGet => store::get(hv, c, body),
        Op::FdList => store::list(hv, c, body),
        Op::FdDelete => store::delete(hv, c, body),
        Op::ResourceOpen => store::resource_open(hv, c, body),
        Op::ResourceList => store::resource_list(hv, c, body),
        Op::ResourceAccept => store::resource_accept(hv, c, body),
        Op::SetStoreRing => domains::set_ring(hv, c, body, |d| &mut d.store_ring),
        Op::SetConsoleRing => domains::set_ring(hv, c, body, |d| &mut d.console_ring),
        Op::DomInfo => domains::info(hv, c, body),
        Op::DomList => domains::list(hv, c, body),
        Op::Shutdown => domains::shutdown(hv, c, body),
        Op::RamFetch => domains::ram_fetch(hv, c, body),
    }
}

fn new_channel(hv: &Arc<Hv>, c: &Caller, body: &[u8]) -> Answer {
    empty(body)?;
    let (ours, theirs) = sock::pair()?;
    serve(hv, &c.incarnation, ours)?;
    Ok(Reply::default().with([Arc::new(theirs)]))
}

fn served(hv: &Hv, c: &Caller, body: &[u8]) -> Answer {
    empty(body)?;
    let (first, maps, id, name) = {
        let mut table = hv.lock();
        let d = Hv::own(&mut table, c)?;
        d.backoff.served();
        let first = !std::mem::replace(&mut d.served, true);
        d.claim_deadline = None;
        let generation = d.generation;
        (first, d.maps.take_if(|m| m.generation != generation), d.event_id(), d.spec.name.clone())
    };
    hv.release_maps(c.peer(), maps);
    if first {
        hv.events.push(Kind::Served, id, &name, "");
    }
    Ok(Reply::default())
}
