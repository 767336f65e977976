//! The typed client of the hypercall socket. One call is outstanding at a time on a channel; threads that call often open
//! a channel of their own with [`Hypercall::new_channel`].

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard};

use hv_abi::*;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::evtchn::Port;

/// Why a hypercall failed.
#[derive(Debug, thiserror::Error)]
pub enum HvError {
    /// hv-core refused it; [`Op`] says what the errno means.
    #[error("hypercall {op:?}: {errno}")]
    Refused {
        /// Which call.
        op: Op,
        /// Why.
        errno: Errno,
    },
    /// The socket failed or is closed: hv-core is gone or this incarnation is over.
    #[error("hypercall {op:?}: connection to hv-core: {source}")]
    Connection {
        /// Which call.
        op: Op,
        /// What the socket said.
        source: io::Error,
    },
    /// hv-core's answer does not fit the call. A bug, or another version.
    #[error("hypercall {op:?}: answer is malformed ({what})")]
    Malformed {
        /// Which call.
        op: Op,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The call's arguments cannot be sent.
    #[error("hypercall {op:?}: {what}")]
    Argument {
        /// Which call.
        op: Op,
        /// What is wrong with them.
        what: &'static str,
    },
}

impl HvError {
    /// The errno, if hv-core refused the call.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            HvError::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// True if hv-core refused with this errno.
    pub fn is(&self, errno: Errno) -> bool {
        self.errno() == Some(errno)
    }
}

/// Result of a hypercall.
pub type HvResult<T> = Result<T, HvError>;

struct Channel {
    seq: u32,
    buffer: Vec<u8>,
}

/// A channel to hv-core.
pub struct Hypercall {
    socket: OwnedFd,
    channel: Mutex<Channel>,
}

impl std::fmt::Debug for Hypercall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hypercall").field("fd", &self.socket.as_raw_fd()).finish()
    }
}

struct Answer<'a> {
    op: Op,
    channel: MutexGuard<'a, Channel>,
    len: usize,
    fds: Vec<OwnedFd>,
}

const REP: usize = size_of::<RepHeader>();

impl Answer<'_> {
    fn body(&self) -> &[u8] {
        &self.channel.buffer[REP..self.len]
    }

    fn head<T: FromBytes>(&self) -> HvResult<T> {
        T::read_from_prefix(self.body())
            .map(|(head, _)| head)
            .map_err(|_| HvError::Malformed { op: self.op, what: "too short" })
    }

    fn entries<H: FromBytes, T: FromBytes>(&self, count: u32) -> HvResult<Vec<T>> {
        let mut rest = &self.body()[size_of::<H>().min(self.len - REP)..];
        let mut out = Vec::with_capacity((count as usize).min(MAX_MESSAGE / size_of::<T>().max(1)));
        for _ in 0..count {
            let (entry, tail) = T::read_from_prefix(rest)
                .map_err(|_| HvError::Malformed { op: self.op, what: "too few entries" })?;
            out.push(entry);
            rest = tail;
        }
        Ok(out)
    }

    fn fd(&mut self) -> HvResult<OwnedFd> {
        if self.fds.is_empty() {
            return Err(HvError::Malformed { op: self.op, what: "a file descriptor is missing" });
        }
        Ok(self.fds.remove(0))
    }
}

impl Hypercall {
    /// Speaks over a socket that hv-core handed out.
    pub fn new(socket: OwnedFd) -> Self {
        Hypercall { socket, channel: Mutex::new(Channel { seq: 0, buffer: vec![0; MAX_MESSAGE] }) }
    }

    fn call(&self, op: Op, body: &[&[u8]], fds: &[BorrowedFd<'_>]) -> HvResult<Answer<'_>> {
        let mut channel = self.channel.lock().unwrap_or_else(|e| e.into_inner());
        channel.seq = channel.seq.wrapping_add(1);
        let seq = channel.seq;
        let header = ReqHeader { op: op as u16, pad: 0, seq };
        let total = size_of::<ReqHeader>() + body.iter().map(|b| b.len()).sum::<usize>();
        if total > MAX_MESSAGE {
            return Err(HvError::Argument { op, what: "too many entries for one message" });
        }
        let connection = |e: Errno| HvError::Connection { op, source: e.into() };
        let mut slices = [IoSlice::new(&[]), IoSlice::new(&[]), IoSlice::new(&[])];
        slices[0] = IoSlice::new(header.as_bytes());
        for (slot, part) in slices[1..].iter_mut().zip(body) {
            *slot = IoSlice::new(part);
        }
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(self.socket.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(connection(e)),
            }
        }
        let mut received = Vec::new();
        let len = loop {
            let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
            let channel = &mut *channel;
            let mut into = [IoSliceMut::new(&mut channel.buffer)];
            let msg = match recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut into,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(msg) => msg,
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(connection(e)),
            };
            for control in msg.cmsgs().map_err(connection)? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    received.extend(fds.into_iter().map(crate::os::own_received));
                }
            }
            break msg.bytes;
        };
        if len == 0 {
            return Err(connection(Errno::ECONNRESET));
        }
        let (head, _) = RepHeader::read_from_prefix(&channel.buffer[..len])
            .map_err(|_| HvError::Malformed { op, what: "no header" })?;
        if head.seq != seq {
            return Err(HvError::Malformed { op, what: "answers another call" });
        }
        if head.status < 0 {
            return Err(HvError::Refused { op, errno: Errno::from_raw(-head.status) });
        }
        Ok(Answer { op, channel, len, fds: received })
    }

    fn simple<Req: IntoBytes + Immutable>(&self, op: Op, req: &Req) -> HvResult<Answer<'_>> {
        self.call(op, &[req.as_bytes()], &[])
    }

    /// A whole list, however many messages it takes; `next` makes of an entry the request for what follows it.
    fn list<T: FromBytes, Req: IntoBytes + Immutable>(
        &self,
        op: Op,
        next: impl Fn(&T) -> Req,
    ) -> HvResult<Vec<T>> {
        let mut all = Vec::new();
        loop {
            let from = all.last().map(&next);
            let body: &[&[u8]] = match &from {
                Some(req) => &[req.as_bytes()],
                None => &[],
            };
            let answer = self.call(op, body, &[])?;
            let head: ListRep = answer.head()?;
            all.extend(answer.entries::<ListRep, T>(head.count)?);
            if head.more == 0 {
                return Ok(all);
            }
            if head.count == 0 {
                return Err(HvError::Malformed { op, what: "more is said to follow nothing" });
            }
        }
    }

    fn name_req(op: Op, name: &str) -> HvResult<NameReq> {
        let name =
            Name::new(name).ok_or(HvError::Argument { op, what: "name is empty, too long or not ASCII" })?;
        Ok(NameReq { name })
    }

    /// [`Op::Hello`].
    pub fn hello(&self) -> HvResult<HelloRep> {
        self.simple(Op::Hello, &HelloReq { abi: ABI_VERSION, pad: 0 })?.head()
    }

    /// [`Op::NewChannel`]: for another thread.
    pub fn new_channel(&self) -> HvResult<Hypercall> {
        Ok(Hypercall::new(self.call(Op::NewChannel, &[], &[])?.fd()?))
    }

    /// [`Op::Served`].
    pub fn served(&self) -> HvResult<()> {
        self.call(Op::Served, &[], &[]).map(drop)
    }

    /// [`Op::RegionCreate`].
    pub fn region_create(&self, peer: u16, pages: u32, tag: u64) -> HvResult<(RegionInfo, OwnedFd)> {
        let mut answer = self.simple(Op::RegionCreate, &RegionCreateReq { peer, pad: 0, pages, tag })?;
        Ok((answer.head()?, answer.fd()?))
    }

    /// [`Op::RegionDelete`].
    pub fn region_delete(&self, region: u32) -> HvResult<()> {
        self.simple(Op::RegionDelete, &RegionReq { region, pad: 0 }).map(drop)
    }

    /// [`Op::RegionList`].
    pub fn region_list(&self) -> HvResult<Vec<RegionInfo>> {
        self.list(Op::RegionList, |r: &RegionInfo| ListReq { after: r.region.into() })
    }

    /// [`Op::RegionFetch`].
    pub fn region_fetch(&self, region: u32) -> HvResult<(RegionInfo, OwnedFd)> {
        let mut answer = self.simple(Op::RegionFetch, &RegionReq { region, pad: 0 })?;
        Ok((answer.head()?, answer.fd()?))
    }

    fn port(mut answer: Answer<'_>) -> HvResult<(PortInfo, Port)> {
        let info: PortInfo = answer.head()?;
        let rx = answer.fd()?;
        let tx = answer.fd().ok();
        Ok((info, Port::new(info.port, rx, tx)))
    }

    /// [`Op::PortAllocUnbound`].
    pub fn port_alloc_unbound(&self, remote_domid: u16) -> HvResult<Port> {
        Self::port(self.simple(Op::PortAllocUnbound, &PortAllocReq { remote_domid, pad: 0, pad2: 0 })?)
            .map(|p| p.1)
    }

    /// [`Op::PortBindInterdomain`].
    pub fn port_bind_interdomain(&self, remote_domid: u16, remote_port: u32) -> HvResult<Port> {
        Self::port(self.simple(Op::PortBindInterdomain, &PortBindReq { remote_domid, pad: 0, remote_port })?)
            .map(|p| p.1)
    }

    /// [`Op::PortBindVirq`].
    pub fn port_bind_virq(&self, virq: u32, vcpu: u32) -> HvResult<Port> {
        Self::port(self.simple(Op::PortBindVirq, &PortVirqReq { virq, vcpu })?).map(|p| p.1)
    }

    /// [`Op::PortBindIpi`]: only a number.
    pub fn port_bind_ipi(&self, vcpu: u32) -> HvResult<u32> {
        Ok(self.simple(Op::PortBindIpi, &PortVirqReq { virq: 0, vcpu })?.head::<PortInfo>()?.port)
    }

    /// [`Op::PortClose`].
    pub fn port_close(&self, port: u32) -> HvResult<()> {
        self.simple(Op::PortClose, &PortReq { port, pad: 0 }).map(drop)
    }

    /// [`Op::PortList`].
    pub fn port_list(&self) -> HvResult<Vec<PortInfo>> {
        self.list(Op::PortList, |r: &PortInfo| ListReq { after: r.port.into() })
    }

    /// [`Op::PortFetch`].
    pub fn port_fetch(&self, port: u32) -> HvResult<(PortInfo, Port)> {
        Self::port(self.simple(Op::PortFetch, &PortReq { port, pad: 0 })?)
    }

    fn mapping(mut answer: Answer<'_>) -> HvResult<RawMapping> {
        let head: GrantMapRep = answer.head()?;
        if head.count as usize > MAX_MAP_GREFS {
            return Err(HvError::Malformed { op: answer.op, what: "too many pages" });
        }
        let pages: Vec<u32> = answer.entries::<GrantMapRep, u32>(head.count)?;
        if pages.iter().any(|&page| page >= head.fd_pages) {
            return Err(HvError::Malformed { op: answer.op, what: "a page beyond the mapping" });
        }
        let fd = answer.fd()?;
        Ok(RawMapping { handle: head.handle, fd_pages: head.fd_pages, pages, fd })
    }

    /// [`Op::GrantMap`].
    pub fn grant_map(&self, domid: u16, grefs: &[u32], tag: u64) -> HvResult<RawMapping> {
        if grefs.is_empty() || grefs.len() > MAX_MAP_GREFS {
            return Err(HvError::Argument { op: Op::GrantMap, what: "needs 1 to 1024 grant references" });
        }
        let head = GrantMapReq { domid, pad: 0, count: grefs.len() as u32, tag };
        Self::mapping(self.call(Op::GrantMap, &[head.as_bytes(), grefs.as_bytes()], &[])?)
    }

    /// [`Op::GrantUnmap`]. Unmap the memory and close its descriptor first.
    pub fn grant_unmap(&self, handle: u64) -> HvResult<()> {
        self.simple(Op::GrantUnmap, &MapReq { handle }).map(drop)
    }

    /// [`Op::GrantList`].
    pub fn grant_list(&self) -> HvResult<Vec<GrantMapInfo>> {
        self.list(Op::GrantList, |r: &GrantMapInfo| ListReq { after: r.handle })
    }

    /// [`Op::GrantClaim`].
    pub fn grant_claim(&self, handle: u64) -> HvResult<RawMapping> {
        Self::mapping(self.simple(Op::GrantClaim, &MapReq { handle })?)
    }

    /// [`Op::GrantCopy`]: one status (GNTST_*, 0 = done) for each entry is written to `statuses`, which must be as long.
    pub fn grant_copy(&self, entries: &[CopyEntry], statuses: &mut [i16]) -> HvResult<()> {
        if entries.len() > MAX_COPY_ENTRIES || entries.len() != statuses.len() {
            return Err(HvError::Argument {
                op: Op::GrantCopy,
                what: "at most 512 entries, a status for each",
            });
        }
        if entries.is_empty() {
            return Ok(());
        }
        let head = CountReq { count: entries.len() as u32, pad: 0 };
        let answer = self.call(Op::GrantCopy, &[head.as_bytes(), entries.as_bytes()], &[])?;
        let body = answer.body();
        let want = size_of::<CountRep>() + size_of_val(statuses);
        if body.len() < want {
            return Err(HvError::Malformed { op: Op::GrantCopy, what: "too few statuses" });
        }
        statuses.as_mut_bytes().copy_from_slice(&body[size_of::<CountRep>()..want]);
        Ok(())
    }

    /// [`Op::BufferRegister`].
    pub fn buffer_register(&self, memfd: impl AsFd, len: u64) -> HvResult<u32> {
        let req = BufferReq { id: 0, pad: 0, len };
        Ok(self.call(Op::BufferRegister, &[req.as_bytes()], &[memfd.as_fd()])?.head::<BufferRep>()?.id)
    }

    /// [`Op::BufferUnregister`].
    pub fn buffer_unregister(&self, id: u32) -> HvResult<()> {
        self.simple(Op::BufferUnregister, &BufferReq { id, pad: 0, len: 0 }).map(drop)
    }

    /// [`Op::FdPut`].
    pub fn fd_put(&self, name: &str, kind: u32, tag: u64, fd: impl AsFd) -> HvResult<()> {
        let name = Self::name_req(Op::FdPut, name)?.name;
        let req = FdPutReq { name, kind, pad: 0, tag };
        self.call(Op::FdPut, &[req.as_bytes()], &[fd.as_fd()]).map(drop)
    }

    /// [`Op::FdGet`].
    pub fn fd_get(&self, name: &str) -> HvResult<(FdInfo, OwnedFd)> {
        let mut answer = self.simple(Op::FdGet, &Self::name_req(Op::FdGet, name)?)?;
        Ok((answer.head()?, answer.fd()?))
    }

    /// [`Op::FdList`].
    pub fn fd_list(&self) -> HvResult<Vec<FdInfo>> {
        self.list(Op::FdList, |r: &FdInfo| NameReq { name: r.name })
    }

    /// [`Op::FdDelete`].
    pub fn fd_delete(&self, name: &str) -> HvResult<()> {
        self.simple(Op::FdDelete, &Self::name_req(Op::FdDelete, name)?).map(drop)
    }

    /// [`Op::ResourceOpen`]: gives its [`resource_kind`] and the descriptor.
    pub fn resource_open(&self, name: &str) -> HvResult<(u32, OwnedFd)> {
        let mut answer = self.simple(Op::ResourceOpen, &Self::name_req(Op::ResourceOpen, name)?)?;
        Ok((answer.head::<ResourceInfo>()?.kind, answer.fd()?))
    }

    /// [`Op::ResourceAccept`]: the connection, which is in the fd store under `name` now.
    pub fn resource_accept(&self, resource: &str, name: &str, tag: u64) -> HvResult<OwnedFd> {
        let resource = Self::name_req(Op::ResourceAccept, resource)?.name;
        let name = Self::name_req(Op::ResourceAccept, name)?.name;
        self.simple(Op::ResourceAccept, &AcceptReq { resource, name, tag })?.fd()
    }

    /// [`Op::ResourceList`].
    pub fn resource_list(&self) -> HvResult<Vec<ResourceInfo>> {
        self.list(Op::ResourceList, |r: &ResourceInfo| NameReq { name: r.name })
    }

    /// [`Op::SetStoreRing`].
    pub fn set_store_ring(&self, gref: u32, port: u32) -> HvResult<()> {
        self.simple(Op::SetStoreRing, &RingReq { gref, port }).map(drop)
    }

    /// [`Op::SetConsoleRing`].
    pub fn set_console_ring(&self, gref: u32, port: u32) -> HvResult<()> {
        self.simple(Op::SetConsoleRing, &RingReq { gref, port }).map(drop)
    }

    /// [`Op::DomInfo`].
    pub fn dom_info(&self, domid: u16) -> HvResult<DomInfo> {
        self.simple(Op::DomInfo, &DomReq { domid, pad: [0; 3] })?.head()
    }

    /// [`Op::DomList`].
    pub fn dom_list(&self) -> HvResult<Vec<DomInfo>> {
        self.list(Op::DomList, |r: &DomInfo| ListReq { after: r.domid.into() })
    }

    /// [`Op::Shutdown`].
    pub fn shutdown(&self, reason: u32) -> HvResult<()> {
        self.simple(Op::Shutdown, &ShutdownReq { reason, pad: 0 }).map(drop)
    }

    /// [`Op::RamFetch`]: RAM memfd, then the grant frames' memfd.
    pub fn ram_fetch(&self) -> HvResult<(RamInfo, OwnedFd, OwnedFd)> {
        let mut answer = self.call(Op::RamFetch, &[], &[])?;
        Ok((answer.head()?, answer.fd()?, answer.fd()?))
    }
}

/// A grant map as hv-core hands it out; [`crate::grants::MappedGrants`] is the mapped form.
#[derive(Debug)]
pub struct RawMapping {
    /// For claim and unmap.
    pub handle: u64,
    /// Length of the fd in pages.
    pub fd_pages: u32,
    /// For each gref its page number inside the fd.
    pub pages: Vec<u32>,
    /// What to map.
    pub fd: OwnedFd,
}

impl CopyEntryExt for CopyEntry {}
/// Makers of grant-copy entries.
pub trait CopyEntryExt {
    /// From a granted page into the caller's buffer.
    fn from_grant(
        domid: u16,
        gref: u32,
        offset: u16,
        len: u16,
        buffer: u32,
        buffer_offset: u64,
    ) -> CopyEntry {
        CopyEntry { domid, flags: 0, gref, offset, len, buffer, buffer_offset }
    }
    /// From the caller's buffer into a granted page.
    fn to_grant(domid: u16, gref: u32, offset: u16, len: u16, buffer: u32, buffer_offset: u64) -> CopyEntry {
        CopyEntry { domid, flags: COPY_TO_GRANT, gref, offset, len, buffer, buffer_offset }
    }
}
