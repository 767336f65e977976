//! A vif's connection: what it holds of hv-core, made when a frontend connects and taken over after a restart.
//!
//! Everything needed to go on lies in the fd store, so the data path of a new incarnation runs before it has even
//! spoken to xenstored: under `vif<domid>.<id>` with these endings
//!
//! | entry | what |
//! |---|---|
//! | `-mem` | the packets of all queues |
//! | `-state` | what the frontend asked for, the vif's settings ([`Record`]), then the rings' journals |

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use domain_kit::grants::{GrantError, MappedGrants};
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::journal::IDENTITY_WORDS;
use domain_kit::mem::{Page, SharedMem, sealed_memfd};
use domain_kit::xenbus::DeviceKey;
use hv_abi::fd_kind;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::hash::HashConfig;
use crate::queue::ctrl::{self, CtrlQueue};
use crate::queue::rx::{self, RxQueue, RxTarget};
use crate::queue::tx::{self, TxQueue};
use crate::queue::{ARENA_BYTES, QueueError};
use crate::stats::Stats;
use crate::switch::port::{Groups, Port, PortParts, RxHandle, lock};
use crate::switch::settings::Settings;
use crate::switch::{Lane, Switch};
use crate::tap::Offloads;
use crate::worker::{CtrlWork, Ports, Rest, Work};
use domain_kit::kept;
use domain_kit::ring::Span;

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

/// Most queues of a vif: their packets are one buffer of hv-core's (64 MiB).
pub const MAX_QUEUES: usize = 16;

/// What a frontend asked for in one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueParams {
    /// Grant reference of the tx ring.
    pub tx_ring: u32,
    /// Grant reference of the rx ring.
    pub rx_ring: u32,
    /// Port of both rings, or of the tx ring.
    pub evtchn: u32,
    /// Port of the rx ring if it has one of its own.
    pub evtchn_rx: Option<u32>,
}

/// What a frontend asked for when it connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Params {
    /// 1 to [`MAX_QUEUES`].
    pub queues: Vec<QueueParams>,
    /// Grant reference and port of the control ring.
    pub ctrl: Option<(u32, u32)>,
    /// What it can take.
    pub offloads: Offloads,
    /// It wants its multicast filter applied.
    pub multicast_control: bool,
    /// Bytes that it wants free at the start of each page.
    pub headroom: usize,
}

/// What is kept of a vif beside the journals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Serial number of the frontend's domain.
    pub instance: u64,
    /// Its number in the switch.
    pub slot: u16,
    /// The frontend's wishes.
    pub params: Params,
    /// The toolstack's.
    pub settings: Settings,
    /// Hashes, as the control ring set them.
    pub hash: HashConfig,
    /// The multicast filter.
    pub groups: Groups,
}

/// The kept record, with what changes of it.
#[derive(Debug)]
pub struct Kept {
    mem: Span,
    record: Mutex<Record>,
}

impl Kept {
    /// Changes the record.
    pub fn update(&self, change: impl FnOnce(&mut Record)) {
        let mut record = lock(&self.record);
        change(&mut record);
        if let Err(error) = kept::save(&self.mem, &*record) {
            tracing::error!(%error, "a vif's settings are not kept");
        }
    }
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

/// A connection without its work, which the workers have.
#[derive(Debug)]
pub struct Connection {
    rings: MappedGrants,
    ports: Vec<u32>,
    buffer: u32,
    state: OwnedFd,
    /// The switch's side of it.
    pub port: Arc<Port>,
    /// What is kept.
    pub kept: Arc<Kept>,
}

/// Mark of the `-state` entry: Connected was told to the frontend.
const SERVED: u64 = 1 << 32;

fn identity(id: VifId, instance: u64, rings: [u32; 4]) -> [u32; IDENTITY_WORDS] {
    let [a, b, c, d] = rings;
    [u32::from(id.frontend) | u32::from(id.handle) << 16, instance as u32, a, b, c, d]
}

/// Vifs that a predecessor had connected and told so.
///
/// # Errors
/// hv-core's.
pub fn known(hv: &Hypercall) -> Result<Vec<VifId>, HvError> {
    let entries = hv.fd_list()?;
    let served = entries.iter().filter(|entry| entry.tag & SERVED != 0);
    Ok(served.filter_map(|entry| VifId::of_entry(entry.name.as_str()?, "state")).collect())
}

/// Vifs of which the fd store holds anything.
///
/// # Errors
/// hv-core's.
pub fn kept(hv: &Hypercall) -> Result<Vec<VifId>, HvError> {
    let entries = hv.fd_list()?;
    Ok(entries.iter().filter_map(|entry| VifId::of_entry(entry.name.as_str()?, "mem")).collect())
}

/// Marks a connection as served: a next incarnation takes it over without asking the store.
///
/// # Errors
/// hv-core's.
pub fn keep(hv: &Hypercall, id: VifId, connection: &Connection) -> Result<(), HvError> {
    hv.fd_put(&id.entry("state"), fd_kind::MEMFD, SERVED, &connection.state)
}

/// Forgets all that the fd store holds of a vif.
pub fn forget(hv: &Hypercall, id: VifId) {
    // The journals first: without them nothing is taken over.
    for what in ["state", "mem"] {
        match hv.fd_delete(&id.entry(what)) {
            Ok(()) => {}
            Err(e) if e.is(Errno::ENOENT) => {}
            Err(error) => tracing::warn!(%id, what, %error, "fd store entry stays"),
        }
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

/// Maps kept memory, or makes it.
///
/// # Errors
/// [`ConnectError`]; [`QueueError::Record`] if what is kept is too short.
pub fn kept_memory(
    hv: &Hypercall,
    entry: &str,
    len: usize,
) -> Result<(OwnedFd, Arc<SharedMem>), ConnectError> {
    let fd = match hv.fd_get(entry) {
        Ok((_, fd)) => fd,
        Err(e) if e.is(Errno::ENOENT) => {
            let fd = sealed_memfd(entry, len).map_err(system("making memory"))?;
            hv.fd_put(entry, fd_kind::MEMFD, 0, &fd)?;
            fd
        }
        Err(e) => return Err(e.into()),
    };
    let mem = map(&fd, len)?;
    Ok((fd, mem))
}

fn map(fd: &OwnedFd, len: usize) -> Result<Arc<SharedMem>, ConnectError> {
    let size = nix::sys::stat::fstat(fd).map_err(|e| system("looking at kept memory")(e.into()))?.st_size;
    if usize::try_from(size).is_ok_and(|size| size >= len) {
        Ok(Arc::new(SharedMem::map(fd, len).map_err(system("mapping memory"))?))
    } else {
        Err(QueueError::Record("kept memory is too short").into())
    }
}

/// Where what is in the `-state` memory.
#[derive(Debug)]
struct Places {
    mem: Arc<SharedMem>,
}

impl Places {
    const CTRL: usize = kept::BYTES.next_multiple_of(64);

    fn ctrl_bytes() -> usize {
        ctrl::shape(&ctrl::layout()).bytes().next_multiple_of(64)
    }
    fn tx_bytes() -> usize {
        tx::shape(&tx::layout()).bytes().next_multiple_of(64)
    }
    fn rx_bytes() -> usize {
        rx::shape(&rx::layout()).bytes().next_multiple_of(64)
    }
    fn queue(index: usize) -> usize {
        Self::CTRL + Self::ctrl_bytes() + index * (Self::tx_bytes() + Self::rx_bytes())
    }
    fn bytes(queues: usize) -> usize {
        Self::queue(queues)
    }
    fn record(&self) -> Span {
        Span::new(self.mem.clone(), 0, kept::BYTES)
    }
    fn ctrl(&self) -> Span {
        Span::new(self.mem.clone(), Self::CTRL, Self::ctrl_bytes())
    }
    fn tx(&self, index: usize) -> Span {
        Span::new(self.mem.clone(), Self::queue(index), Self::tx_bytes())
    }
    fn rx(&self, index: usize) -> Span {
        Span::new(self.mem.clone(), Self::queue(index) + Self::tx_bytes(), Self::rx_bytes())
    }
}

fn bind(hv: &Hypercall, id: VifId, queue: &QueueParams) -> Result<Ports, HvError> {
    let tx = hv.port_bind_interdomain(id.frontend, queue.evtchn)?;
    Ok(match queue.evtchn_rx {
        None => Ports::Shared(tx),
        Some(rx) => Ports::Split { tx, rx: hv.port_bind_interdomain(id.frontend, rx)? },
    })
}

/// Grant references of all rings: tx and rx of each queue, then the control ring's.
fn ring_refs(params: &Params) -> Vec<u32> {
    let queues = params.queues.iter().flat_map(|q| [q.tx_ring, q.rx_ring]);
    queues.chain(params.ctrl.map(|(gref, _)| gref)).collect()
}

/// How a connection is made or taken over.
#[derive(Clone, Copy, Debug)]
enum How {
    Anew,
    Again { own_fault: bool },
}

/// What a connection is made of.
struct Parts {
    record: Record,
    places: Places,
    rings: MappedGrants,
    state: OwnedFd,
    /// The packets, and hv-core's number for them.
    arena: Arc<SharedMem>,
    buffer: u32,
}

fn assemble(
    hv: &Hypercall,
    id: VifId,
    parts: Parts,
    how: How,
    switch: &Arc<Switch>,
    failed: impl Fn(String) + Send + Sync + 'static,
) -> Result<(Connection, Vec<Work>), ConnectError> {
    let Parts { record, places, rings, state, arena, buffer } = parts;
    let Record { params, instance, .. } = &record;
    let stats: Arc<Stats> = Arc::default();
    let ring = |index: usize| Page { mem: rings.mem.clone(), base: rings.offset(index) };
    let target = RxTarget { domid: id.frontend, headroom: params.headroom };
    let (mut handles, mut txs, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
    for (i, q) in params.queues.iter().enumerate() {
        let span = Span::new(arena.clone(), i * ARENA_BYTES, ARENA_BYTES);
        let place = (buffer, (i * ARENA_BYTES) as u64);
        let own = identity(id, *instance, [q.tx_ring, q.rx_ring, q.evtchn, q.evtchn_rx.unwrap_or(0)]);
        let (tx_ring, rx_ring) = (ring(2 * i), ring(2 * i + 1));
        let (tx_journal, rx_journal) = (places.tx(i), places.rx(i));
        let (txq, rxq) = match how {
            How::Anew => (
                TxQueue::create(tx_ring, tx::layout(), tx_journal, own, stats.clone())?,
                RxQueue::create(
                    rx_ring,
                    rx::layout(),
                    rx_journal,
                    own,
                    (span.clone(), place),
                    target,
                    stats.clone(),
                )?,
            ),
            How::Again { own_fault } => (
                TxQueue::reattach(tx_ring, tx::layout(), tx_journal, own_fault, stats.clone())?,
                RxQueue::reattach(
                    rx_ring,
                    rx::layout(),
                    rx_journal,
                    own_fault,
                    (span.clone(), place),
                    target,
                    stats.clone(),
                )?,
            ),
        };
        let ports = Arc::new(bind(hv, id, q)?);
        numbers.extend(ports.numbers());
        handles.push(RxHandle::ring(rxq, ports.clone()));
        txs.push((txq, span, ports));
    }
    let mut ctrl = match params.ctrl {
        None => None,
        Some((gref, evtchn)) => {
            let page = ring(2 * params.queues.len());
            let queue = match how {
                How::Anew => {
                    CtrlQueue::create(page, places.ctrl(), identity(id, *instance, [gref, 0, evtchn, 0]))?
                }
                How::Again { own_fault } => CtrlQueue::reattach(page, places.ctrl(), own_fault)?,
            };
            let port = hv.port_bind_interdomain(id.frontend, evtchn)?;
            numbers.push(port.port);
            Some(CtrlWork { queue, port })
        }
    };
    let port = Arc::new(Port::new(
        PortParts {
            slot: record.slot,
            id,
            offloads: params.offloads,
            queues: handles,
            settings: record.settings.clone(),
            hash: record.hash.clone(),
            groups: record.groups.clone(),
            headroom: params.headroom,
            stats: stats.clone(),
        },
        failed,
    ));
    let kept = Arc::new(Kept { mem: places.record(), record: Mutex::new(record) });
    let mut works = Vec::new();
    for (index, (tx, arena, ports)) in txs.into_iter().enumerate() {
        works.push(Work {
            tx,
            lane: Lane::new(arena, buffer, hv.new_channel()?),
            ports,
            ctrl: ctrl.take(),
            index,
            port: port.clone(),
            switch: switch.clone(),
            kept: kept.clone(),
            kick: !matches!(how, How::Anew),
            rest: Rest::default(),
        });
    }
    Ok((Connection { rings, ports: numbers, buffer, state, port, kept }, works))
}

/// Connects to a frontend afresh.
///
/// # Errors
/// [`ConnectError`]; nothing is left behind that a further try could not deal with.
pub fn connect(
    hv: &Hypercall,
    id: VifId,
    params: Params,
    settings: Settings,
    switch: &Arc<Switch>,
    failed: impl Fn(String) + Send + Sync + 'static,
) -> Result<(Connection, Vec<Work>), ConnectError> {
    forget(hv, id);
    unmap_leftovers(hv, id)?;
    let instance = hv.dom_info(id.frontend)?.instance;
    let rings = MappedGrants::map(hv, id.frontend, &ring_refs(&params), id.tag())?;
    let arena_bytes = params.queues.len() * ARENA_BYTES;
    let (arena_fd, arena) = kept_memory(hv, &id.entry("mem"), arena_bytes)?;
    let buffer = hv.buffer_register(&arena_fd, arena_bytes as u64)?;
    let (state, mem) = kept_memory(hv, &id.entry("state"), Places::bytes(params.queues.len()))?;
    let groups = Groups { on: params.multicast_control, list: Vec::new() };
    let record =
        Record { instance, slot: switch.free_slot(), params, settings, hash: HashConfig::default(), groups };
    let parts = Parts { record, places: Places { mem }, rings, state, arena, buffer };
    let made = assemble(hv, id, parts, How::Anew, switch, failed)?;
    // Last: without it, nothing is taken over.
    made.0.kept.update(|_| {});
    Ok(made)
}

/// Takes a predecessor's connection over. `None` if it had not got so far that there was one.
///
/// # Errors
/// [`ConnectError`]; the vif is then to be given up until its frontend connects anew.
pub fn reattach(
    hv: &Hypercall,
    id: VifId,
    own_fault: bool,
    switch: &Arc<Switch>,
    failed: impl Fn(String) + Send + Sync + 'static,
) -> Result<Option<(Connection, Vec<Work>)>, ConnectError> {
    let get = |what: &str| match hv.fd_get(&id.entry(what)) {
        Ok((_, fd)) => Ok(Some(fd)),
        Err(e) if e.is(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e),
    };
    let (Some(arena_fd), Some(state)) = (get("mem")?, get("state")?) else { return Ok(None) };
    let first = map(&state, kept::BYTES)?;
    let Some(record) = kept::load::<Record>(&Span::new(first, 0, kept::BYTES)) else { return Ok(None) };
    if record.instance != hv.dom_info(id.frontend)?.instance
        || !(1..=MAX_QUEUES).contains(&record.params.queues.len())
    {
        return Ok(None);
    }
    let Some(handle) = hv.grant_list()?.into_iter().find(|m| m.tag == id.tag()).map(|m| m.handle) else {
        return Ok(None);
    };
    let rings = MappedGrants::claim(hv, handle)?;
    if rings.pages() != ring_refs(&record.params).len() {
        return Err(QueueError::Record("the rings are not those that were connected").into());
    }
    let queues = record.params.queues.len();
    let arena = map(&arena_fd, queues * ARENA_BYTES)?;
    let buffer = hv.buffer_register(&arena_fd, (queues * ARENA_BYTES) as u64)?;
    let places = Places { mem: map(&state, Places::bytes(queues))? };
    let parts = Parts { record, places, rings, state, arena, buffer };
    assemble(hv, id, parts, How::Again { own_fault }, switch, failed).map(Some)
}

impl Connection {
    /// Lets go of everything. The workers must have ended, and the switch have forgotten the port.
    pub fn close(self, hv: &Hypercall, id: VifId) {
        forget(hv, id);
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
        assert_eq!(VifId::of_entry(&id.entry("state"), "state"), Some(id));
        assert_eq!(VifId::of_entry(&id.entry("mem"), "state"), None);
        assert_eq!(VifId::of_entry("vif5-state", "state"), None);
        assert!(id.entry("state").len() <= hv_abi::NAME_LEN);
    }

    #[test]
    fn the_largest_vif_fits() {
        const { assert!(MAX_QUEUES * ARENA_BYTES <= 64 << 20) };
        let queue =
            QueueParams { tx_ring: u32::MAX, rx_ring: u32::MAX, evtchn: u32::MAX, evtchn_rx: Some(u32::MAX) };
        let rule = "action=drop dst6=2001:db8:1111:2222:3333:4444:5555:6666/128 proto=icmp dstports=10000-60000 icmptype=255";
        let firewall = crate::switch::rules::Firewall {
            rules: vec![rule.parse().unwrap(); crate::switch::rules::MAX_RULES],
            ..Default::default()
        };
        let record = Record {
            instance: u64::MAX,
            slot: u16::MAX,
            params: Params {
                queues: vec![queue; MAX_QUEUES],
                ctrl: Some((u32::MAX, u32::MAX)),
                offloads: Offloads::default(),
                multicast_control: true,
                headroom: 256,
            },
            settings: Settings { firewall, ..Settings::default() },
            hash: HashConfig { key: vec![255; 40], mapping: vec![15; 128], ..HashConfig::default() },
            groups: Groups { on: true, list: vec![[255; 6]; crate::switch::port::MAX_GROUPS] },
        };
        let mem = Arc::new(SharedMem::create("test", Places::bytes(MAX_QUEUES)).unwrap().0);
        let places = Places { mem };
        kept::save(&places.record(), &record).unwrap();
        assert_eq!(kept::load(&places.record()), Some(record));
    }
}
