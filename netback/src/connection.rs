//! A vif's connection: what it holds of hv-core, made when a frontend connects and taken over after a restart.
//!
//! Everything needed to go on lies in the fd store, so the data path of a new incarnation runs before it has even
//! spoken to xenstored: under `vif<domid>.<id>` with these endings
//!
//! | entry | what |
//! |---|---|
//! | `-tap` | the TAP's descriptor |
//! | `-arena` | packets between the TAP and the frontend |
//! | `-tx`, `-rx` | the rings' journals; both carry the connection's identity, `-rx`'s mark the frontend's offloads |

use std::os::fd::OwnedFd;
use std::sync::Arc;

use domain_kit::grants::{GrantError, MappedGrants};
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::journal::{IDENTITY_WORDS, RingJournal, Shape};
use domain_kit::mem::{Page, SharedMem, sealed_memfd};
use domain_kit::xenbus::DeviceKey;
use hv_abi::fd_kind;
use nix::errno::Errno;

use crate::queue::rx::{self, RxQueue};
use crate::queue::tx::{self, TxQueue};
use crate::queue::{ARENA_BYTES, QueueError};
use crate::stats::Stats;
use crate::tap::{Offloads, Tap};
use crate::worker::{Ports, VifWorld, Work};

/// Names a vif: the frontend's domid and the device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VifId {
    /// Whose.
    pub frontend: u16,
    /// Which, from 0.
    pub handle: u16,
}

impl std::fmt::Display for VifId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vif{}.{}", self.frontend, self.handle)
    }
}

impl VifId {
    fn entry(&self, what: &str) -> String {
        format!("{self}-{what}")
    }

    /// Mark of its grant map.
    fn tag(&self) -> u64 {
        u64::from_le_bytes(*b"vif\0\0\0\0\0") | u64::from(self.frontend) << 32 | u64::from(self.handle) << 48
    }

    /// From the name of a fd-store entry with this ending.
    fn of_entry(name: &str, what: &str) -> Option<VifId> {
        let rest = name.strip_prefix("vif")?.strip_suffix(what)?.strip_suffix('-')?;
        let (frontend, handle) = rest.split_once('.')?;
        Some(VifId { frontend: frontend.parse().ok()?, handle: handle.parse().ok()? })
    }
}

impl TryFrom<DeviceKey> for VifId {
    type Error = std::num::TryFromIntError;

    fn try_from(key: DeviceKey) -> Result<Self, Self::Error> {
        Ok(VifId { frontend: key.frontend, handle: key.id.try_into()? })
    }
}

impl From<VifId> for DeviceKey {
    fn from(id: VifId) -> Self {
        DeviceKey { frontend: id.frontend, id: id.handle.into() }
    }
}

/// What a frontend asked for when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Grant reference of the tx ring.
    pub tx_ring: u32,
    /// Grant reference of the rx ring.
    pub rx_ring: u32,
    /// Port of both rings, or of the tx ring.
    pub evtchn: u32,
    /// Port of the rx ring if it has one of its own.
    pub evtchn_rx: Option<u32>,
    /// What it can take.
    pub offloads: Offloads,
}

/// Why a vif could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// hv-core refused something.
    #[error(transparent)]
    Hypercall(#[from] HvError),
    /// Rings or memory could not be mapped.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// The rings' state is not to be trusted.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The TAP, or memory.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// How it failed.
        source: std::io::Error,
    },
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> ConnectError {
    move |source| ConnectError::System { what, source }
}

/// A connection without its work, which the worker has.
#[derive(Debug)]
pub struct Connection {
    rings: MappedGrants,
    ports: Vec<u32>,
    buffer: u32,
    offloads: Offloads,
    rx_journal: OwnedFd,
}

/// Mark of the `-rx` entry, beside the offloads: Connected was told to the frontend.
const SERVED: u64 = 1 << 32;

const OFFLOAD_BITS: [fn(&mut Offloads) -> &mut bool; 5] =
    [|o| &mut o.csum, |o| &mut o.csum_ipv6, |o| &mut o.gso_tcpv4, |o| &mut o.gso_tcpv6, |o| &mut o.sg];

fn pack(mut offloads: Offloads) -> u64 {
    OFFLOAD_BITS.iter().enumerate().map(|(i, bit)| u64::from(*bit(&mut offloads)) << i).sum()
}

fn unpack(tag: u64) -> Offloads {
    let mut offloads = Offloads::default();
    for (i, bit) in OFFLOAD_BITS.iter().enumerate() {
        *bit(&mut offloads) = tag >> i & 1 != 0;
    }
    offloads
}

fn identity(id: VifId, instance: u64, params: &Params) -> [u32; IDENTITY_WORDS] {
    [
        u32::from(id.frontend) | u32::from(id.handle) << 16,
        instance as u32,
        params.tx_ring,
        params.rx_ring,
        params.evtchn,
        // 0 is no port.
        params.evtchn_rx.unwrap_or(0),
    ]
}

/// The TAP of a vif: a predecessor's, or a new one.
///
/// # Errors
/// No /dev/net/tun in the sandbox, no permission, the fd store is full.
pub fn tap(hv: &Hypercall, id: VifId) -> Result<Arc<Tap>, ConnectError> {
    let entry = id.entry("tap");
    match hv.fd_get(&entry) {
        Ok((_, fd)) => return Tap::from_fd(fd).map(Arc::new).map_err(system("taking over the TAP")),
        Err(e) if e.is(Errno::ENOENT) => {}
        Err(e) => return Err(e.into()),
    }
    let tap = Tap::create(&id.to_string())
        .map_err(system("making a TAP with /dev/net/tun (bound into the sandbox? CAP_NET_ADMIN?)"))?;
    hv.fd_put(&entry, fd_kind::TAP, 0, &tap)?;
    Ok(Arc::new(tap))
}

/// Vifs that a predecessor had connected and told so.
///
/// # Errors
/// hv-core's.
pub fn known(hv: &Hypercall) -> Result<Vec<VifId>, HvError> {
    let entries = hv.fd_list()?;
    let served = entries.iter().filter(|entry| entry.tag & SERVED != 0);
    Ok(served.filter_map(|entry| VifId::of_entry(entry.name.as_str()?, "rx")).collect())
}

/// Vifs for which the fd store holds a TAP: those that were offered.
///
/// # Errors
/// hv-core's.
pub fn with_tap(hv: &Hypercall) -> Result<Vec<VifId>, HvError> {
    let entries = hv.fd_list()?;
    Ok(entries.iter().filter_map(|entry| VifId::of_entry(entry.name.as_str()?, "tap")).collect())
}

/// Marks a connection as served: a next incarnation takes it over without asking the store.
///
/// # Errors
/// hv-core's.
pub fn keep(hv: &Hypercall, id: VifId, connection: &Connection) -> Result<(), HvError> {
    hv.fd_put(&id.entry("rx"), fd_kind::MEMFD, pack(connection.offloads) | SERVED, &connection.rx_journal)
}

/// Forgets all that the fd store holds of a vif.
pub fn forget(hv: &Hypercall, id: VifId) {
    forget_rings(hv, id);
    forget_entry(hv, id, "tap");
}

/// The same but for its TAP.
fn forget_rings(hv: &Hypercall, id: VifId) {
    // Journals first: without them nothing is taken over.
    for what in ["rx", "tx", "arena"] {
        forget_entry(hv, id, what);
    }
}

fn forget_entry(hv: &Hypercall, id: VifId, what: &str) {
    match hv.fd_delete(&id.entry(what)) {
        Ok(()) => {}
        Err(e) if e.is(Errno::ENOENT) => {}
        Err(error) => tracing::warn!(%id, what, %error, "fd store entry stays"),
    }
}

/// Gives back grant maps of a vif that no connection uses: a predecessor's that did not finish.
fn unmap_leftovers(hv: &Hypercall, id: VifId) -> Result<(), ConnectError> {
    for map in hv.grant_list()?.into_iter().filter(|m| m.tag == id.tag()) {
        // What is not claimed is not mapped here.
        hv.grant_unmap(map.handle)?;
    }
    Ok(())
}

fn kept(hv: &Hypercall, entry: &str, tag: u64, len: usize) -> Result<OwnedFd, ConnectError> {
    let fd = sealed_memfd(entry, len).map_err(system("making memory"))?;
    hv.fd_put(entry, fd_kind::MEMFD, tag, &fd)?;
    Ok(fd)
}

fn map(fd: &OwnedFd, len: usize) -> Result<SharedMem, ConnectError> {
    let size = nix::sys::stat::fstat(fd).map_err(|e| system("looking at kept memory")(e.into()))?.st_size;
    if usize::try_from(size).is_ok_and(|size| size >= len) {
        SharedMem::map(fd, len).map_err(system("mapping memory"))
    } else {
        Err(QueueError::Record("kept memory is too short").into())
    }
}

fn shapes() -> (Shape, Shape) {
    (tx::shape(&tx::layout()), rx::shape(&rx::layout()))
}

fn bind(hv: &Hypercall, id: VifId, params: &Params) -> Result<Ports, HvError> {
    let tx = hv.port_bind_interdomain(id.frontend, params.evtchn)?;
    Ok(match params.evtchn_rx {
        None => Ports::Shared(tx),
        Some(rx) => Ports::Split { tx, rx: hv.port_bind_interdomain(id.frontend, rx)? },
    })
}

/// Connects to a frontend afresh.
///
/// # Errors
/// [`ConnectError`]; nothing is left behind that a further try could not deal with.
pub fn connect(
    hv: &Hypercall,
    id: VifId,
    params: &Params,
    tap: Arc<Tap>,
    stats: Arc<Stats>,
) -> Result<(Connection, Work), ConnectError> {
    forget_rings(hv, id);
    unmap_leftovers(hv, id)?;
    tap.set_offloads(params.offloads).map_err(system("setting the TAP's offloads"))?;
    let instance = hv.dom_info(id.frontend)?.instance;
    let rings = MappedGrants::map(hv, id.frontend, &[params.tx_ring, params.rx_ring], id.tag())?;
    let arena_fd = kept(hv, &id.entry("arena"), 0, ARENA_BYTES)?;
    let (tx_shape, rx_shape) = shapes();
    let tx_journal = map(&kept(hv, &id.entry("tx"), 0, tx_shape.bytes())?, tx_shape.bytes())?;
    let rx_fd = kept(hv, &id.entry("rx"), pack(params.offloads), rx_shape.bytes())?;
    let rx_journal = map(&rx_fd, rx_shape.bytes())?;
    let identity = identity(id, instance, params);
    let (tx_ring, rx_ring) = ring_pages(&rings);
    let tx = TxQueue::create(tx_ring, tx::layout(), tx_journal, identity, stats.clone())?;
    let rx = RxQueue::create(rx_ring, rx::layout(), rx_journal, identity, params.offloads, stats.clone())?;
    let ports = bind(hv, id, params)?;
    let world = world(hv, id, &arena_fd, tap)?;
    let connection = Connection {
        rings,
        ports: ports.numbers(),
        buffer: world.buffer,
        offloads: params.offloads,
        rx_journal: rx_fd,
    };
    Ok((connection, Work { tx, rx, world, ports, stats, kick: false }))
}

/// Takes a predecessor's connection over. `None` if it had not got so far that there was one.
///
/// # Errors
/// [`ConnectError`]; the vif is then to be given up until its frontend connects anew.
pub fn reattach(
    hv: &Hypercall,
    id: VifId,
    own_fault: bool,
    stats: Arc<Stats>,
) -> Result<Option<(Connection, Work)>, ConnectError> {
    let (tx_shape, rx_shape) = shapes();
    let get = |what: &str| match hv.fd_get(&id.entry(what)) {
        Ok((info, fd)) => Ok(Some((info.tag, fd))),
        Err(e) if e.is(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e),
    };
    let (Some((_, tap)), Some((_, arena)), Some((_, tx)), Some((tag, rx))) =
        (get("tap")?, get("arena")?, get("tx")?, get("rx")?)
    else {
        return Ok(None);
    };
    let (tx_journal, rx_journal) = (map(&tx, tx_shape.bytes())?, map(&rx, rx_shape.bytes())?);
    let identities = [RingJournal::open(&tx_journal, tx_shape), RingJournal::open(&rx_journal, rx_shape)]
        .map(|journal| journal.map(|j| j.identity()));
    let [Ok(identity), Ok(same)] = identities else { return Ok(None) };
    let Some(handle) = hv.grant_list()?.into_iter().find(|m| m.tag == id.tag()).map(|m| m.handle) else {
        return Ok(None);
    };
    if identity != same || identity[1] != hv.dom_info(id.frontend)?.instance as u32 {
        return Ok(None);
    }
    let offloads = unpack(tag);
    let params = Params {
        tx_ring: identity[2],
        rx_ring: identity[3],
        evtchn: identity[4],
        evtchn_rx: (identity[5] != 0).then_some(identity[5]),
        offloads,
    };
    let tap = Arc::new(Tap::from_fd(tap).map_err(system("taking over the TAP"))?);
    let rings = MappedGrants::claim(hv, handle)?;
    let arena_mem = map(&arena, ARENA_BYTES)?;
    let (tx_ring, rx_ring) = ring_pages(&rings);
    let tx_queue = TxQueue::reattach(tx_ring, tx::layout(), tx_journal, own_fault, stats.clone())?;
    let rx_queue =
        RxQueue::reattach(rx_ring, rx::layout(), rx_journal, own_fault, offloads, &arena_mem, stats.clone())?;
    let ports = bind(hv, id, &params)?;
    let world = world(hv, id, &arena, tap)?;
    let connection =
        Connection { rings, ports: ports.numbers(), buffer: world.buffer, offloads, rx_journal: rx };
    Ok(Some((connection, Work { tx: tx_queue, rx: rx_queue, world, ports, stats, kick: true })))
}

fn ring_pages(rings: &MappedGrants) -> (Page, Page) {
    let page = |i| Page { mem: rings.mem.clone(), base: rings.offset(i) };
    (page(0), page(1))
}

fn world(hv: &Hypercall, id: VifId, arena: &OwnedFd, tap: Arc<Tap>) -> Result<VifWorld, ConnectError> {
    let buffer = hv.buffer_register(arena, ARENA_BYTES as u64)?;
    let arena = map(arena, ARENA_BYTES)?;
    Ok(VifWorld { tap, arena, buffer, frontend: id.frontend, hv: hv.new_channel()? })
}

impl Connection {
    /// Lets go of everything but the TAP. The worker must have ended.
    pub fn close(self, hv: &Hypercall, id: VifId) {
        forget_rings(hv, id);
        let gone = |what: &str, result: Result<(), HvError>| {
            if let Err(error) = result
                && !error.is(Errno::ENOENT)
            {
                tracing::warn!(%id, what, %error, "left behind");
            }
        };
        for port in self.ports {
            gone("port", hv.port_close(port));
        }
        gone("buffer", hv.buffer_unregister(self.buffer));
        gone("rings", self.rings.unmap(hv));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_name_their_vif() {
        let id = VifId { frontend: 32751, handle: 12 };
        assert_eq!(VifId::of_entry(&id.entry("rx"), "rx"), Some(id));
        assert_eq!(VifId::of_entry(&id.entry("tap"), "rx"), None);
        assert_eq!(VifId::of_entry("vif5-rx", "rx"), None);
        assert!(id.entry("arena").len() <= hv_abi::NAME_LEN);
        assert!(id.to_string().len() < nix::libc::IFNAMSIZ);
        let offloads = Offloads { csum: true, gso_tcpv6: true, ..Offloads::default() };
        assert_eq!(unpack(pack(offloads)), offloads);
    }
}
