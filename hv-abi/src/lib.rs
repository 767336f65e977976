//! The hypercall-socket ABI between a domain's process and hv-core.
//!
//! A domain's process holds one end of a `SOCK_SEQPACKET` Unix socket as file descriptor
//! [`HYPERCALL_FD`]; hv-core holds the other. Every call is one message: a [`ReqHeader`], the call's fixed
//! body, then (for batched calls) an array of entries. Every answer is one message: a [`RepHeader`], the
//! answer's fixed body and array. File descriptors travel beside the bytes as `SCM_RIGHTS`. One call is
//! outstanding on a socket at any time; a domain that wants to call from several threads opens one
//! channel for each ([`Op::NewChannel`]).
//!
//! hv-core knows the caller by the socket it holds, never by what a message says. All integers are
//! little-endian; every structure has explicit padding that must be zero on sending and is ignored on
//! receiving. Statuses are 0 or a negative Linux errno; the meaning of each errno is stated at the call.
//!
//! Errors that every call can give: `EINVAL` (malformed or unknown call, length or count out of range),
//! `EPERM` (the caller's role does not have this call, or the thing named is not the caller's), `ESTALE`
//! (a handle of an earlier life), `ENOENT` (no such thing), `ENOSPC` (quota used up), `ESRCH` (no such domain).
#![no_std]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

/// Version of this ABI; [`HelloReq::abi`] must equal it.
pub const ABI_VERSION: u32 = 1;
/// The hypercall socket's descriptor number in every domain's process.
pub const HYPERCALL_FD: i32 = 3;
/// The descriptor number of the listening Unix socket for the domain's own gRPC services.
pub const CONTROL_LISTENER_FD: i32 = 4;
/// dom0 only: the descriptor number of its connected stream to hv-core's gRPC control API.
pub const HVCORE_CONTROL_FD: i32 = 5;
/// Largest message in either direction, bytes, headers included.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most file descriptors beside one message.
pub const MAX_FDS: usize = 4;
/// Bytes in a page; grants are of whole pages.
pub const PAGE_SIZE: usize = 4096;
/// Most grant references in one [`Op::GrantMap`].
pub const MAX_MAP_GREFS: usize = 1024;
/// Most entries in one [`Op::GrantCopy`].
pub const MAX_COPY_ENTRIES: usize = 512;
/// Most pages in one region.
pub const MAX_REGION_PAGES: u32 = 16384;
/// Names (fd store, resources) are at most this many bytes, padded with NULs.
pub const NAME_LEN: usize = 48;
/// "No such domain", as Xen's `DOMID_INVALID` (xen.h).
pub const DOMID_INVALID: u16 = 0x7FF4;
/// "The caller itself", as Xen's `DOMID_SELF` (xen.h).
pub const DOMID_SELF: u16 = 0x7FF0;
/// The virtual IRQ by which hv-core tells of domains made, changed or gone, as Xen's `VIRQ_DOM_EXC` (xen.h).
pub const VIRQ_DOM_EXC: u32 = 3;

/// What a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u16)]
pub enum Op {
    /// First call of every channel's domain process: [`HelloReq`] → [`HelloRep`]. Idempotent.
    Hello = 1,
    /// Another hypercall socket of the same identity: no body → no body, fds \[socket\]. At most 32 a domain (`ENOSPC`).
    NewChannel = 2,
    /// The caller ended its start-up or served a request: resets the restart backoff. No body, no answer body. Idempotent.
    Served = 3,

    /// Memory grantable to one peer domain: [`RegionCreateReq`] → [`RegionInfo`], fds \[memfd\]. The memfd is sealed
    /// against resizing, zeroed. Not idempotent. `ENOSPC` quota, `ESRCH` no such peer.
    RegionCreate = 10,
    /// [`RegionReq`] → nothing. The grant references are gone for new maps; existing maps of the peer stay until it
    /// unmaps them.
    RegionDelete = 11,
    /// [`ListReq`] or no body → [`ListRep`] then an array of [`RegionInfo`]: the caller's own regions, by number.
    RegionList = 12,
    /// [`RegionReq`] → [`RegionInfo`], fds \[memfd\]: an own region again, after a restart. Idempotent.
    RegionFetch = 13,

    /// [`PortAllocReq`] → [`PortInfo`], fds \[rx, tx\]: a port that `remote_domid` may bind. Not idempotent.
    PortAllocUnbound = 20,
    /// [`PortBindReq`] → [`PortInfo`], fds \[rx, tx\]: binds the remote's unbound port. Idempotent: binding again what the
    /// caller already bound answers the same local port. `ENOENT` no such remote port, `EPERM` it is not for the caller,
    /// `EBUSY` bound by another.
    PortBindInterdomain = 21,
    /// [`PortVirqReq`] → [`PortInfo`], fds \[rx\]. Idempotent for the same (virq, vcpu).
    PortBindVirq = 22,
    /// [`PortVirqReq`] (virq ignored) → [`PortInfo`]: a port number for an IPI, delivered by the caller itself. PVH runners only.
    PortBindIpi = 23,
    /// [`PortReq`] → nothing. The remote's port becomes unbound. Idempotent in effect: a free port gives `ENOENT`.
    PortClose = 24,
    /// [`ListReq`] or no body → [`ListRep`] then an array of [`PortInfo`], by port.
    PortList = 25,
    /// [`PortReq`] → [`PortInfo`], fds \[rx, tx\] (VIRQ: \[rx\]; IPI: none): an own port again. Idempotent.
    PortFetch = 26,

    /// [`GrantMapReq`] then `count` × u32 grefs → [`GrantMapRep`] then `count` × u32 page offsets into the fd, fds \[mapping\].
    /// All of one batch must be the same granter's, read-write; all or nothing. `EACCES` a gref that is not granted to the
    /// caller or is read-only (`GrantMapRep` is not sent; the index of the culprit is logged), `ENOSPC` quota,
    /// `EOPNOTSUPP` no udmabuf on this host for a PVH granter.
    GrantMap = 30,
    /// [`MapReq`] → nothing. The caller must have unmapped and closed everything of it first; a caller that has not is
    /// restarted. `ESTALE` for a handle that is no more.
    GrantUnmap = 31,
    /// [`ListReq`] or no body → [`ListRep`] then an array of [`GrantMapInfo`], by handle: maps of this domid, its predecessors'
    /// included.
    GrantList = 32,
    /// [`MapReq`] → [`GrantMapRep`] + offsets, fds \[mapping\]: takes over a map of a predecessor. Idempotent.
    GrantClaim = 33,
    /// [`CountReq`] then `count` × [`CopyEntry`] → [`CountRep`] then `count` × i16 GNTST_* statuses (every one written). Entries
    /// are carried out in order. Idempotent if the guest holds still.
    GrantCopy = 34,
    /// [`BufferReq`], fds \[sealed memfd\] → [`BufferRep`]: a buffer of the caller's own for grant copies. Dies with the incarnation.
    BufferRegister = 35,
    /// [`BufferReq`] (`id` used) → nothing.
    BufferUnregister = 36,

    /// [`FdPutReq`], fds \[the fd\] → nothing. Replaces one of the same name. `EINVAL` type not on the list, `ENOSPC` quota.
    FdPut = 40,
    /// [`NameReq`] → [`FdInfo`], fds \[dup\]. Stays in the store. `ENOENT`.
    FdGet = 41,
    /// [`NameReq`] or no body → [`ListRep`] then an array of [`FdInfo`], by name.
    FdList = 42,
    /// [`NameReq`] → nothing. `ENOENT`.
    FdDelete = 43,

    /// [`NameReq`] → [`ResourceInfo`], fds \[a fresh open file description, or a dup for listeners\]. `ENOENT` no such resource
    /// approved, `EBUSY` too many opens of the caller's have not come back from the kernel, else the errno of open(2).
    ResourceOpen = 50,
    /// [`NameReq`] or no body → [`ListRep`] then an array of [`ResourceInfo`], by name.
    ResourceList = 51,
    /// [`AcceptReq`] → [`FdInfo`], fds \[dup\]: takes a connection from a listening socket and puts it into the fd store in one step, so
    /// that no end of the caller comes in between. `EAGAIN` nobody waits, `ENOENT` no such resource, `EINVAL` it is no listener,
    /// `ENOSPC` the store is full (nobody is taken then).
    ResourceAccept = 52,

    /// [`RingReq`] → nothing: where the caller's xenstore ring is (gref granted to, port allocated for the xenstore domain).
    SetStoreRing = 60,
    /// [`RingReq`] → nothing: the same for its console ring and the console domain.
    SetConsoleRing = 61,
    /// [`DomReq`] → [`DomInfo`]. Roles xenstore, console, dom0: any domain, rings included; others: rings are hidden.
    DomInfo = 62,
    /// [`ListReq`] or no body → [`ListRep`] then an array of [`DomInfo`], by domid. Roles xenstore, console, dom0.
    DomList = 63,
    /// [`ShutdownReq`] → nothing: the caller's domain shuts down (SCHEDOP_shutdown, sched.h reasons). hv-core will not restart
    /// the process; dom0 decides what follows.
    Shutdown = 64,
    /// PVH runners: no body → [`RamInfo`], fds \[RAM memfd, grant-frame memfd\]. Idempotent.
    RamFetch = 65,
}

/// Head of every request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReqHeader {
    /// An [`Op`].
    pub op: u16,
    /// Zero.
    pub pad: u16,
    /// Chosen by the caller; comes back in the answer.
    pub seq: u32,
}

/// Head of every answer. With a negative status nothing follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RepHeader {
    /// The request's `seq`.
    pub seq: u32,
    /// 0, or a negative Linux errno.
    pub status: i32,
}

/// How a domain's previous process ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExitInfo {
    /// One of the `EXIT_*` constants.
    pub how: u32,
    /// Exit code ([`EXIT_CODE`]) or signal number ([`EXIT_SIGNAL`]).
    pub code: i32,
    /// 1 if it was the process's own fault: a panic's exit code, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS, SIGTRAP.
    pub own_fault: u32,
    /// How many incarnations in a row ended by their own fault.
    pub own_faults_in_row: u32,
}

/// There was no previous process.
pub const EXIT_NONE: u32 = 0;
/// It exited; `code` is its exit status.
pub const EXIT_CODE: u32 = 1;
/// It was ended by a signal; `code` is the signal.
pub const EXIT_SIGNAL: u32 = 2;
/// The exit status by which a domain's process says "panic" (domain-kit installs a hook that uses it).
pub const PANIC_EXIT_STATUS: i32 = 101;

/// Request of [`Op::Hello`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HelloReq {
    /// [`ABI_VERSION`] of the caller.
    pub abi: u32,
    /// Zero.
    pub pad: u32,
}

/// Role bit: the domain that serves xenstore.
pub const ROLE_XENSTORE: u32 = 1;
/// Role bit: the domain that serves consoles.
pub const ROLE_CONSOLE: u32 = 2;
/// Role bit: a driver domain; may map and copy grants.
pub const ROLE_BACKEND: u32 = 4;
/// Role bit: the process runs one PVH guest; has RAM and a grant table.
pub const ROLE_PVH: u32 = 8;
/// Role bit: a guest that is a plain process using the `frontends` crate.
pub const ROLE_PROCESS_GUEST: u32 = 16;
/// Role bit: dom0.
pub const ROLE_DOM0: u32 = 32;

/// Answer of [`Op::Hello`]: who the caller is.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HelloRep {
    /// The caller's domid.
    pub domid: u16,
    /// Domid of the xenstore domain, or [`DOMID_INVALID`].
    pub xenstore_domid: u16,
    /// Domid of the console domain, or [`DOMID_INVALID`].
    pub console_domid: u16,
    /// Zero.
    pub pad: u16,
    /// Which life of this domain's process this is, from 1.
    pub generation: u32,
    /// `ROLE_*` bits.
    pub roles: u32,
    /// Serial number of the domain's creation; a domid used again has another.
    pub instance: u64,
    /// The domain's UUID.
    pub uuid: [u8; 16],
    /// How the predecessor died.
    pub prev_exit: ExitInfo,
    /// CLOCK_MONOTONIC nanoseconds at which the predecessor's death was seen; 0 for the first.
    pub prev_exit_ns: u64,
}

/// A number of entries that follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CountReq {
    /// Entries that follow.
    pub count: u32,
    /// Zero.
    pub pad: u32,
}
/// A number of entries that follow in an answer.
pub type CountRep = CountReq;

/// Request of the calls that list things by number. A list that is longer than one message comes in several: no body asks for
/// its beginning, this for what follows. What comes and goes between two calls is in the list or not; the rest is there once.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ListReq {
    /// The last number (port, region, handle, domid) that the caller has.
    pub after: u64,
}

/// Answer of the calls that list things; the entries follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ListRep {
    /// Entries that follow.
    pub count: u32,
    /// 1: there are more after the last one.
    pub more: u32,
}

/// Request of [`Op::RegionCreate`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionCreateReq {
    /// The one domain that the region's pages are granted to.
    pub peer: u16,
    /// Zero.
    pub pad: u16,
    /// Pages, 1 to [`MAX_REGION_PAGES`].
    pub pages: u32,
    /// The caller's own mark, given back by [`Op::RegionList`].
    pub tag: u64,
}

/// A region.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionInfo {
    /// Its number; never used again in the domain's life.
    pub region: u32,
    /// Grant reference of its first page; page i has `first_gref + i`.
    pub first_gref: u32,
    /// Pages.
    pub pages: u32,
    /// The peer.
    pub peer: u16,
    /// Zero.
    pub pad: u16,
    /// The creator's mark.
    pub tag: u64,
}

/// Names an own region.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionReq {
    /// [`RegionInfo::region`].
    pub region: u32,
    /// Zero.
    pub pad: u32,
}

/// Request of [`Op::PortAllocUnbound`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortAllocReq {
    /// The domain that may bind it.
    pub remote_domid: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub pad2: u32,
}

/// Request of [`Op::PortBindInterdomain`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortBindReq {
    /// Whose port.
    pub remote_domid: u16,
    /// Zero.
    pub pad: u16,
    /// The remote's port.
    pub remote_port: u32,
}

/// Request of [`Op::PortBindVirq`] and [`Op::PortBindIpi`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortVirqReq {
    /// VIRQ number (xen.h).
    pub virq: u32,
    /// The vCPU it is for.
    pub vcpu: u32,
}

/// Names an own port.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortReq {
    /// Port number, from 1.
    pub port: u32,
    /// Zero.
    pub pad: u32,
}

/// Port states, as Xen's EVTCHNSTAT_* (event_channel.h).
pub mod port_state {
    /// Not in use.
    pub const CLOSED: u16 = 0;
    /// Waiting for the remote to bind.
    pub const UNBOUND: u16 = 1;
    /// Connected.
    pub const INTERDOMAIN: u16 = 2;
    /// A virtual IRQ.
    pub const VIRQ: u16 = 4;
    /// An inter-processor interrupt of the domain's own.
    pub const IPI: u16 = 5;
}

/// A port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortInfo {
    /// Port number in the owner's space, from 1.
    pub port: u32,
    /// Interdomain: the remote's port, else 0.
    pub remote_port: u32,
    /// Unbound and interdomain: the remote domain.
    pub remote_domid: u16,
    /// A [`port_state`].
    pub state: u16,
    /// VIRQ number, else 0.
    pub virq: u32,
    /// vCPU it is for, else 0.
    pub vcpu: u32,
    /// Zero.
    pub pad: u32,
}

/// Request of [`Op::GrantMap`]; `count` × u32 grefs follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GrantMapReq {
    /// The granter.
    pub domid: u16,
    /// Zero.
    pub pad: u16,
    /// 1 to [`MAX_MAP_GREFS`].
    pub count: u32,
    /// The caller's own mark, given back by [`Op::GrantList`].
    pub tag: u64,
}

/// Answer of [`Op::GrantMap`]; `count` × u32 follow: for each gref the page number inside the fd.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GrantMapRep {
    /// For [`Op::GrantUnmap`] and [`Op::GrantClaim`]; carries a generation.
    pub handle: u64,
    /// Entries that follow.
    pub count: u32,
    /// Length of the fd in pages: map that much, or single pages.
    pub fd_pages: u32,
}

/// Names a grant map of the caller's.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MapReq {
    /// [`GrantMapRep::handle`].
    pub handle: u64,
}

/// A grant map that the domid holds.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GrantMapInfo {
    /// Its handle.
    pub handle: u64,
    /// The mapper's mark.
    pub tag: u64,
    /// The granter.
    pub domid: u16,
    /// 1 if this incarnation made or claimed it, 0 if it is a predecessor's.
    pub mine: u16,
    /// How many grefs.
    pub count: u32,
}

/// One piece of a grant copy.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CopyEntry {
    /// The granter.
    pub domid: u16,
    /// [`COPY_TO_GRANT`], [`COPY_TO_OTHER_GRANT`] or 0 (from the grant into the buffer).
    pub flags: u16,
    /// The granted page.
    pub gref: u32,
    /// First byte inside the page.
    pub offset: u16,
    /// Bytes; offset + len at most 4096; 0 is allowed and copies nothing.
    pub len: u16,
    /// [`BufferRep::id`] of the caller's buffer; or the other granted page.
    pub buffer: u32,
    /// First byte inside the buffer; or inside the other page, with its granter: see [`CopyEntry::to_other`].
    pub buffer_offset: u64,
}

impl CopyEntry {
    /// The same bytes of a granted page, but into another granted page: from its byte `offset` on.
    #[must_use]
    pub fn to_other(self, domid: u16, gref: u32, offset: u16) -> CopyEntry {
        let place = u64::from(domid) << 16 | u64::from(offset);
        CopyEntry { flags: COPY_TO_OTHER_GRANT, buffer: gref, buffer_offset: place, ..self }
    }

    /// Granter, page and first byte of [`CopyEntry::to_other`]; `None` if there is more in the word.
    pub fn other(&self) -> Option<(u16, u32, u16)> {
        let place = u32::try_from(self.buffer_offset).ok()?;
        Some(((place >> 16) as u16, self.buffer, place as u16))
    }
}
/// [`CopyEntry::flags`]: copy from the caller's buffer into the granted page (which must not be read-only).
pub const COPY_TO_GRANT: u16 = 1;
/// [`CopyEntry::flags`]: copy from the granted page into another page that is granted to the caller (and not read-only), of the
/// same or another domain.
pub const COPY_TO_OTHER_GRANT: u16 = 2;

/// Request of [`Op::BufferRegister`] and [`Op::BufferUnregister`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BufferReq {
    /// Unregister: which. Register: zero.
    pub id: u32,
    /// Zero.
    pub pad: u32,
    /// Register: bytes, at most 64 MiB; the memfd must be that long and sealed with F_SEAL_SHRINK.
    pub len: u64,
}

/// Answer of [`Op::BufferRegister`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BufferRep {
    /// For [`CopyEntry::buffer`].
    pub id: u32,
    /// Zero.
    pub pad: u32,
}

/// A name: at most [`NAME_LEN`] bytes of printable ASCII, padded with NULs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Name(pub [u8; NAME_LEN]);

impl Name {
    /// Makes a name. `None` if it is empty, too long, or not printable ASCII.
    pub fn new(name: &str) -> Option<Self> {
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() > NAME_LEN || !bytes.iter().all(|b| (0x20..0x7f).contains(b)) {
            return None;
        }
        let mut out = [0; NAME_LEN];
        out[..bytes.len()].copy_from_slice(bytes);
        Some(Name(out))
    }

    /// The name as text; `None` if what came in is not a valid name.
    pub fn as_str(&self) -> Option<&str> {
        let len = self.0.iter().position(|&b| b == 0).unwrap_or(NAME_LEN);
        if self.0[len..].iter().any(|&b| b != 0) {
            return None;
        }
        let text = core::str::from_utf8(&self.0[..len]).ok()?;
        Name::new(text).map(|_| text)
    }
}

/// Names something of the caller's.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NameReq {
    /// Which.
    pub name: Name,
}

/// Kinds of file descriptors that the fd store takes. Checked by hv-core against what the fd really is.
pub mod fd_kind {
    /// A memfd.
    pub const MEMFD: u32 = 1;
    /// An eventfd.
    pub const EVENTFD: u32 = 2;
    /// A connected or listening socket.
    pub const SOCKET: u32 = 3;
    /// A TAP device's /dev/net/tun descriptor.
    pub const TAP: u32 = 4;
}

/// Request of [`Op::FdPut`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FdPutReq {
    /// Under which name.
    pub name: Name,
    /// An [`fd_kind`].
    pub kind: u32,
    /// Zero.
    pub pad: u32,
    /// The owner's mark.
    pub tag: u64,
}

/// Request of [`Op::ResourceAccept`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AcceptReq {
    /// The listening socket.
    pub resource: Name,
    /// Under which name the connection is stored; what was there is replaced.
    pub name: Name,
    /// The owner's mark.
    pub tag: u64,
}

/// An entry of the fd store.
pub type FdInfo = FdPutReq;

/// Kinds of approved resources.
pub mod resource_kind {
    /// A file or block device, opened read-only.
    pub const FILE_RO: u32 = 1;
    /// A file or block device, opened read-write.
    pub const FILE_RW: u32 = 2;
    /// A listening Unix stream socket kept by hv-core.
    pub const LISTENER: u32 = 3;
    /// A character device, opened read-write.
    pub const DEVICE: u32 = 4;
    /// A stream socket that hv-core connects, anew at each opening.
    pub const CONNECT: u32 = 5;
    /// A file without a name that goes with the domain, opened read-write.
    pub const FILE_TEMPORARY: u32 = 6;
}

/// An approved resource.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ResourceInfo {
    /// Its name in the domain's specification.
    pub name: Name,
    /// A [`resource_kind`].
    pub kind: u32,
    /// Zero.
    pub pad: u32,
}

/// Request of [`Op::SetStoreRing`] and [`Op::SetConsoleRing`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RingReq {
    /// The ring page's grant reference.
    pub gref: u32,
    /// The port, of the caller's.
    pub port: u32,
}

/// Names a domain.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DomReq {
    /// Which; [`DOMID_SELF`] is allowed.
    pub domid: u16,
    /// Zero.
    pub pad: [u16; 3],
}

/// States of a domain.
pub mod dom_state {
    /// Made, its process not started yet.
    pub const CREATED: u16 = 0;
    /// Its process runs.
    pub const RUNNING: u16 = 1;
    /// Its process died and comes back by the restart policy.
    pub const RESTARTING: u16 = 2;
    /// Its process died and will not come back: the burst limit is used up.
    pub const FAILED: u16 = 3;
    /// It has shut itself down (see the reason) and waits for dom0.
    pub const SHUTDOWN: u16 = 4;
    /// It is being taken down; resources that others still hold keep it here.
    pub const DYING: u16 = 5;
}

/// A domain as others may see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DomInfo {
    /// Serial number of its creation.
    pub instance: u64,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Its domid.
    pub domid: u16,
    /// A [`dom_state`].
    pub state: u16,
    /// Which life of its process.
    pub generation: u32,
    /// `ROLE_*` bits.
    pub roles: u32,
    /// Shutdown reason (sched.h) when state is SHUTDOWN, else 0.
    pub shutdown_reason: u32,
    /// xenstore ring page's gref; valid if `store_port` is not 0.
    pub store_gref: u32,
    /// xenstore port of the domain's, or 0.
    pub store_port: u32,
    /// Console ring page's gref; valid if `console_port` is not 0.
    pub console_gref: u32,
    /// Console port of the domain's, or 0.
    pub console_port: u32,
}

/// Request of [`Op::Shutdown`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ShutdownReq {
    /// SHUTDOWN_poweroff 0, reboot 1, suspend 2, crash 3, watchdog 4, soft_reset 5 (sched.h).
    pub reason: u32,
    /// Zero.
    pub pad: u32,
}

/// Answer of [`Op::RamFetch`]. Guest RAM is one memfd laid out as `low_bytes` at guest-physical 0, the rest at 4 GiB.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RamInfo {
    /// All of it, bytes.
    pub ram_bytes: u64,
    /// Bytes at guest-physical address 0 (memfd offset 0), at most 3 GiB; what remains starts at 4 GiB.
    pub low_bytes: u64,
    /// Pages of the grant-frame memfd (version 1 entries: 512 a page).
    pub grant_frames: u32,
    /// Zero.
    pub pad: u32,
}

/// Most RAM below 4 GiB: above it is the hole for devices.
pub const LOW_RAM_MAX: u64 = 3 << 30;
/// Where RAM beyond [`LOW_RAM_MAX`] starts.
pub const HIGH_RAM_START: u64 = 4 << 30;

impl Op {
    /// The call with this number.
    pub fn from_u16(op: u16) -> Option<Op> {
        Op::try_read_from_bytes(op.as_bytes()).ok()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(Name::new("disk0").unwrap().as_str(), Some("disk0"));
        assert!(Name::new("").is_none());
        assert!(Name::new("a\nb").is_none());
        let mut bad = Name::new("x").unwrap();
        bad.0[5] = b'y';
        assert_eq!(bad.as_str(), None, "bytes after the end of a name");
    }

    #[test]
    fn unknown_calls_are_refused() {
        assert_eq!(Op::from_u16(1), Some(Op::Hello));
        assert_eq!(Op::from_u16(0), None);
        assert_eq!(Op::from_u16(0xffff), None);
    }
}
