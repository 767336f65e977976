//! A NIC for a guest that speaks virtio: vhost-user-net beside Xen's rings, into the same switch.
//!
//! The vif is found in xenstore as any other. Its frontend (qemu-bridge) says `protocol` = `vhost-user`; the toolstack says in the
//! backend's own directory, as `vhost-user`, which approved resource leads to the socket on which QEMU listens. This end dials in, also after
//! its own restart.
//!
//! One pair of queues. A packet from the guest is handed back to it (used) just before anybody else can see the packet, in the queue's
//! order: QEMU then knows how far a killed incarnation came, and none is sent twice. What waits for the guest's buffers is lost with
//! the process, as what is under way to it.
//!
//! The guest's interrupt is only ever fired by the vif's own thread: the descriptor's other end is QEMU's, who could make it block.
//! VIRTIO_NET_F_STATUS is not offered: with it QEMU takes the guest's carrier away for a second when this process is restarted.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use domain_kit::Domain;
use domain_kit::hypercall::Hypercall;
use domain_kit::mem::{SharedMem, sealed_memfd};
use domain_kit::ring::{RingMem, Span};
use domain_kit::vhost::line::Line;
use domain_kit::vhost::queue::{Chain, Queue, QueueError, Segment};
use domain_kit::vhost::session::{self, Call, clear_kick};
use domain_kit::vhost::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use hv_abi::fd_kind;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use crate::connection::{ConnectError, VifId, kept_memory, system};
use crate::hash::HashConfig;
use crate::kept;
use crate::offload::{self, MAX_HEADERS, VNET_HDR_LEN, VnetHdr};
use crate::queue::rx::RxFrame;
use crate::queue::{ARENA_BYTES, Fate, Frame, SCRATCH};
use crate::slots::{MAX_RX_PACKET, MIN_PACKET};
use crate::spool::HEADROOM;
use crate::stats::Stats;
use crate::switch::port::{Groups, Port, PortParts, RxHandle, lock};
use crate::switch::settings::Settings;
use crate::switch::{Lane, Origin, Switch};
use crate::tap::Offloads;
use crate::worker::{Control, Worker};

// VIRTIO_NET_F_* (virtio 1.2, 5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_MRG_RXBUF
    | F_INDIRECT_DESC
    | F_EVENT_IDX
    | F_VERSION_1;

/// virtio_net_hdr_v1: the TAP's header, then the number of buffers.
const HDR: usize = VNET_HDR_LEN + 2;
/// Queues: to the guest, from the guest.
const RX: u16 = 0;
const TX: u16 = 1;
/// Packets handed to the switch at once.
const BATCH: usize = 32;
/// What waits for a guest without buffers: as for Xen's rings.
const WAIT_PACKETS: usize = 512;
const WAIT_BYTES: usize = 2 << 20;
/// Most buffers of one packet.
const MAX_BUFFERS: u16 = 64;
/// Mark of the note: Connected was told to the frontend.
const SERVED: u64 = 1 << 32;

/// What is kept of a vif.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    instance: u64,
    resource: String,
    settings: Settings,
}

fn note_name(id: VifId) -> String {
    format!("vhost-{id}")
}

fn id_of(name: &str) -> Option<VifId> {
    let (frontend, handle) = name.strip_prefix("vhost-vif")?.split_once('.')?;
    Some(VifId { frontend: frontend.parse().ok()?, handle: handle.parse().ok()? })
}

/// Vifs that a predecessor served by vhost-user and told so.
///
/// # Errors
/// hv-core's.
pub fn known(hv: &Hypercall) -> Result<Vec<VifId>, domain_kit::HvError> {
    let entries = hv.fd_list()?;
    let served = entries.iter().filter(|entry| entry.tag & SERVED != 0);
    Ok(served.filter_map(|entry| id_of(entry.name.as_str()?)).collect())
}

/// Forgets what the fd store holds of a vif.
pub fn forget(hv: &Hypercall, id: VifId) {
    match hv.fd_delete(&note_name(id)) {
        Err(error) if !error.is(Errno::ENOENT) => tracing::warn!(%id, %error, "fd store entry stays"),
        _ => {}
    }
}

/// The queue to the guest.
struct RxState {
    queue: Queue,
    call: Arc<Call>,
    mergeable: bool,
    /// The guest takes blank checksums.
    csum: bool,
    chain: Chain,
    /// Packets, their headers first.
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// The driver is to be told.
    told: bool,
}

/// A packet's bytes, header first, wherever they lie.
enum Packet<'a> {
    Arena { mem: &'a SharedMem, at: usize, len: usize },
    Own(&'a [u8]),
}

impl Packet<'_> {
    fn len(&self) -> usize {
        match self {
            Packet::Arena { len, .. } => *len,
            Packet::Own(bytes) => bytes.len(),
        }
    }

    fn copy(&self, from: usize, to: &Segment, offset: usize, len: usize) {
        let (mem, at) = (&to.place.mem, to.place.offset + offset);
        match self {
            Packet::Arena { mem: source, at: base, .. } => mem.copy_from(at, source, base + from, len),
            Packet::Own(bytes) => mem.copy_in(at, &bytes[from..from + len]),
        }
    }
}

impl RxState {
    /// Puts a packet into the guest's buffers; false if there are none now.
    ///
    /// # Errors
    /// The driver broke the protocol.
    fn put(&mut self, header: &[u8; VNET_HDR_LEN], packet: &Packet<'_>) -> Result<bool, QueueError> {
        let mut header = *header;
        // Congestion marks were not offered, nor checksums that nobody may leave out.
        header[1] &= 0x7f;
        if !self.csum {
            header[0] = 0;
        }
        let (mut copied, mut buffers) = (0, 0);
        let mut first: Option<Segment> = None;
        let mut heads: Vec<u16> = Vec::new();
        while copied < packet.len() || buffers == 0 {
            let more = if buffers == 0 || (self.mergeable && buffers < MAX_BUFFERS) {
                self.queue.take()?
            } else {
                tracing::debug!("a packet is longer than the guest's buffer");
                heads.iter().for_each(|_| self.queue.put_back());
                return Ok(true);
            };
            let Some(head) = more else {
                heads.iter().for_each(|_| self.queue.put_back());
                return Ok(false);
            };
            heads.push(head);
            if let Err(error) = self.queue.chain(head, &mut self.chain) {
                tracing::debug!(%error, "the guest's buffer");
                self.chain = Chain::default();
            }
            let mut skip = if buffers == 0 { HDR } else { 0 };
            let mut written = skip;
            for segment in &self.chain.writable {
                let mut offset = 0;
                if skip > 0 {
                    if first.is_none() {
                        if segment.len < HDR {
                            break;
                        }
                        first = Some(segment.clone());
                    }
                    offset = skip;
                    skip = 0;
                }
                let n = (segment.len - offset).min(packet.len() - copied);
                packet.copy(copied, segment, offset, n);
                (copied, written) = (copied + n, written + n);
            }
            self.queue.stage(buffers, head, written as u32);
            buffers += 1;
        }
        if let Some(segment) = first {
            segment.place.mem.copy_in(segment.place.offset, &header);
            segment.place.mem.copy_in(segment.place.offset + VNET_HDR_LEN, &buffers.to_le_bytes());
        }
        self.queue.show(buffers);
        Ok(true)
    }

    /// Delivers what waits.
    fn flush(&mut self) -> Result<bool, QueueError> {
        let mut any = false;
        while let Some(packet) = self.waiting.pop_front() {
            let mut header = [0; VNET_HDR_LEN];
            header.copy_from_slice(&packet[..VNET_HDR_LEN]);
            if !self.put(&header, &Packet::Own(&packet[VNET_HDR_LEN..]))? {
                self.waiting.push_front(packet);
                break;
            }
            self.waiting_bytes -= packet.len();
            any = true;
        }
        if any && self.queue.must_notify() {
            self.told = true;
        }
        Ok(any)
    }
}

/// To the guest: everybody delivers here, under a lock.
pub struct VhostRx {
    state: Mutex<Option<RxState>>,
    /// Wakes the vif's own thread.
    wake: EventFd,
}

impl std::fmt::Debug for VhostRx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VhostRx")
    }
}

impl VhostRx {
    fn new() -> std::io::Result<VhostRx> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(VhostRx { state: Mutex::new(None), wake: EventFd::from_value_and_flags(0, flags)? })
    }

    /// Delivers packets of an arena; says how many were not dropped. `commit(i)` is called just before the guest can see packet `i`.
    ///
    /// # Errors
    /// The driver broke the protocol: nothing is delivered any more.
    pub fn deliver(
        &self,
        arena: &Span,
        run: &[RxFrame],
        stats: &Stats,
        commit: &mut dyn FnMut(usize),
    ) -> Result<usize, QueueError> {
        let mut guard = lock(&self.state);
        let Some(state) = guard.as_mut() else { return Ok(0) };
        let result = (|| {
            let mut delivered = 0;
            for (i, RxFrame { frame, .. }) in run.iter().enumerate() {
                commit(i);
                let mut header = [0; VNET_HDR_LEN];
                arena.copy_out(frame.at - VNET_HDR_LEN, &mut header);
                let packet = Packet::Arena { mem: arena.mem(), at: arena.absolute(frame.at), len: frame.len };
                let there = state.waiting.is_empty() && state.put(&header, &packet)?;
                if !there {
                    let len = VNET_HDR_LEN + frame.len;
                    if state.waiting.len() >= WAIT_PACKETS || state.waiting_bytes + len > WAIT_BYTES {
                        stats.rx_dropped.add(1);
                        continue;
                    }
                    let mut bytes = vec![0; len];
                    bytes[..VNET_HDR_LEN].copy_from_slice(&header);
                    arena.copy_out(frame.at, &mut bytes[VNET_HDR_LEN..]);
                    state.waiting.push_back(bytes);
                    state.waiting_bytes += len;
                }
                stats.rx_packets.add(1);
                stats.rx_bytes.add(frame.len as u64);
                delivered += 1;
            }
            Ok(delivered)
        })();
        if state.queue.must_notify() {
            state.told = true;
        }
        if state.told || !state.waiting.is_empty() {
            let _full_is_awake_too = self.wake.write(1);
        }
        if result.is_err() {
            guard.take();
        }
        result
    }
}

/// What the session's thread, the vif's thread and the driver share.
struct Shared {
    id: VifId,
    switch: Arc<Switch>,
    settings: Mutex<Settings>,
    port: Mutex<Option<Arc<Port>>>,
    stats: Arc<Stats>,
    rx: Arc<VhostRx>,
    rx_kick: Mutex<Option<OwnedFd>>,
    /// Where the queue from the guest stood when its thread ended: all that was taken was given back.
    tx_next: Mutex<u16>,
    worker: Mutex<Option<Arc<Worker>>>,
    draining: AtomicBool,
    line: Line,
}

/// A vif that is served by vhost-user.
pub struct VhostVif {
    shared: Arc<Shared>,
    record: Record,
    note: (OwnedFd, Span),
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for VhostVif {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostVif").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl VhostVif {
    /// Serves a vif from now on, whenever its frontend is there.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn serve(
        domain: &Arc<Domain>,
        id: VifId,
        resource: String,
        settings: Settings,
        switch: &Arc<Switch>,
        draining: bool,
    ) -> Result<VhostVif, ConnectError> {
        let instance = domain.hv.dom_info(id.frontend)?.instance;
        let (fd, mem) = kept_memory(&domain.hv, &note_name(id), kept::BYTES)?;
        let note = (fd, Span::new(mem, 0, kept::BYTES));
        let record = Record { instance, resource: resource.clone(), settings: settings.clone() };
        let shared = Arc::new(Shared {
            id,
            switch: switch.clone(),
            settings: Mutex::new(settings),
            port: Mutex::default(),
            stats: Arc::default(),
            rx: Arc::new(VhostRx::new().map_err(system("making an eventfd"))?),
            rx_kick: Mutex::default(),
            tx_next: Mutex::default(),
            worker: Mutex::default(),
            draining: draining.into(),
            line: Line::default(),
        });
        let (hv, lane_hv) = (domain.hv.new_channel()?, domain.hv.new_channel()?);
        let arena_fd = sealed_memfd("vhost-packets", ARENA_BYTES).map_err(system("making memory"))?;
        let buffer = lane_hv.buffer_register(&arena_fd, ARENA_BYTES as u64)?;
        let arena = Arc::new(SharedMem::map(&arena_fd, ARENA_BYTES).map_err(system("mapping memory"))?);
        let mut lane = Lane::new(Span::new(arena, 0, ARENA_BYTES), buffer, lane_hv);
        lane.in_order = true;
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name(note_name(id))
            .spawn(move || talk(&hv, &resource, &theirs, lane))
            .map_err(system("starting a thread"))?;
        Ok(VhostVif { shared, record, note, thread: Some(thread) })
    }

    /// Serves again what a predecessor served. `None` if its frontend is gone.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn resume(
        domain: &Arc<Domain>,
        id: VifId,
        switch: &Arc<Switch>,
        draining: bool,
    ) -> Result<Option<VhostVif>, ConnectError> {
        let (_, mem) = kept_memory(&domain.hv, &note_name(id), kept::BYTES)?;
        let Some(record) = kept::load::<Record>(&Span::new(mem, 0, kept::BYTES)) else { return Ok(None) };
        match domain.hv.dom_info(id.frontend) {
            Ok(info) if info.instance == record.instance => {}
            Ok(_) => return Ok(None),
            Err(e) if e.is(Errno::ESRCH) || e.is(Errno::ENOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let vif = Self::serve(domain, id, record.resource, record.settings, switch, draining)?;
        vif.keep(&domain.hv)?;
        Ok(Some(vif))
    }

    /// From here on a next incarnation takes it over without asking the store.
    ///
    /// # Errors
    /// hv-core's.
    pub fn keep(&self, hv: &Hypercall) -> Result<(), domain_kit::HvError> {
        self.save();
        hv.fd_put(&note_name(self.shared.id), fd_kind::MEMFD, SERVED, &self.note.0)
    }

    fn save(&self) {
        if let Err(error) = kept::save(&self.note.1, &self.record) {
            tracing::error!(%error, "a vif's settings are not kept");
        }
    }

    /// Counters.
    pub fn stats(&self) -> Arc<Stats> {
        self.shared.stats.clone()
    }

    /// To have it rest, from any thread.
    pub fn drain(&self) -> Drain {
        Drain(self.shared.clone())
    }

    /// New settings of the toolstack's, if they are others.
    pub fn set(&mut self, settings: Settings) {
        if self.record.settings == settings {
            return;
        }
        tracing::info!(id = %self.shared.id, "new settings");
        self.record.settings = settings.clone();
        self.save();
        let mut now = lock(&self.shared.settings);
        *now = settings.clone();
        if let Some(port) = &*lock(&self.shared.port) {
            self.shared.switch.settings_changed(port.slot, settings);
        }
    }

    /// Stops serving and keeps nothing.
    pub fn close(mut self, hv: &Hypercall) {
        self.shared.line.end();
        if let Some(thread) = self.thread.take() {
            // A panic in it has ended the process already.
            let _ended = thread.join();
        }
        forget(hv, self.shared.id);
    }
}

/// Has a vif rest.
pub struct Drain(Arc<Shared>);

impl std::fmt::Debug for Drain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Drain")
    }
}

impl Drain {
    /// While resting, nothing is taken from the guest.
    pub fn rest(&self, rest: bool) {
        self.0.draining.store(rest, Relaxed);
        if let Some(worker) = self.worker() {
            worker.drain(rest);
        }
    }

    /// The thread that serves what the guest sends, while there is one.
    pub fn worker(&self) -> Option<Arc<Worker>> {
        lock(&self.0.worker).clone()
    }
}

/// The session's thread.
fn talk(hv: &Hypercall, resource: &str, shared: &Arc<Shared>, lane: Lane) {
    let id = shared.id;
    let lane = Arc::new(Mutex::new(lane));
    shared.line.keep(hv, resource, id, |stream| {
        let mut device = Served { shared: shared.clone(), lane: lane.clone() };
        session::serve(stream, &mut device, false)
    });
    let lane = lock(&lane);
    if let Err(error) = lane.hv.buffer_unregister(lane.buffer) {
        tracing::warn!(%id, %error, "the packets' buffer");
    }
}

/// The vif as one conversation sees it.
struct Served {
    shared: Arc<Shared>,
    lane: Arc<Mutex<Lane>>,
}

impl Served {
    /// The switch's side, made when it is known what the guest can take.
    fn port(&self, features: u64) -> Arc<Port> {
        let shared = &self.shared;
        let mut port = lock(&shared.port);
        if let Some(port) = &*port {
            return port.clone();
        }
        let has = |bit: u64| features & bit != 0;
        let csum = has(F_GUEST_CSUM);
        let offloads = Offloads {
            csum,
            csum_ipv6: csum,
            gso_tcpv4: csum && has(F_GUEST_TSO4),
            gso_tcpv6: csum && has(F_GUEST_TSO6),
            sg: true,
        };
        let parts = PortParts {
            slot: shared.switch.free_slot(),
            id: shared.id,
            offloads,
            queues: vec![RxHandle::vhost(shared.rx.clone())],
            settings: lock(&shared.settings).clone(),
            hash: HashConfig::default(),
            groups: Groups::default(),
            headroom: 0,
            stats: shared.stats.clone(),
        };
        let id = shared.id;
        let made = Arc::new(Port::new(
            parts,
            move |why| tracing::error!(%id, why, "nothing is delivered to the vif"),
        ));
        *port = Some(made.clone());
        drop(port);
        shared.switch.attach(made.clone());
        made
    }
}

impl session::Device for Served {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Option<Vec<u8>> {
        // QEMU's virtio-net has its own.
        None
    }

    fn inflight(&self) -> bool {
        false
    }

    fn start(&mut self, ring: session::Ring) -> Result<(), String> {
        let port = self.port(ring.features);
        match ring.index {
            RX => {
                *lock(&self.shared.rx_kick) = Some(ring.kick);
                *lock(&self.shared.rx.state) = Some(RxState {
                    queue: ring.queue,
                    call: ring.call,
                    mergeable: ring.features & F_MRG_RXBUF != 0,
                    csum: port.offloads.csum,
                    chain: Chain::default(),
                    waiting: VecDeque::new(),
                    waiting_bytes: 0,
                    told: true,
                });
                let _full_is_awake_too = self.shared.rx.wake.write(1);
            }
            TX => {
                let mut work = TxWork {
                    queue: ring.queue,
                    kick: ring.kick,
                    call: ring.call,
                    shared: self.shared.clone(),
                    port,
                    chain: Chain::default(),
                };
                let lane = self.lane.clone();
                let draining = self.shared.draining.load(Relaxed);
                let name = format!("{}-q0", self.shared.id);
                let worker =
                    Worker::start(&name, draining, move |control| work.run(control, &mut lock(&lane)));
                *lock(&self.shared.worker) = Some(Arc::new(worker.map_err(|e| e.to_string())?));
            }
            _ => {}
        }
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Option<u16> {
        match index {
            RX => {
                // Nobody delivers to it when this returns.
                let state = lock(&self.shared.rx.state).take();
                *lock(&self.shared.rx_kick) = None;
                if let Some(port) = lock(&self.shared.port).take() {
                    self.shared.switch.detach(port.slot);
                }
                Some(state.map_or(0, |state| state.queue.next_avail()))
            }
            _ => {
                let worker = lock(&self.shared.worker).take()?;
                worker.stop();
                Some(*lock(&self.shared.tx_next))
            }
        }
    }
}

/// The thread that serves what the guest sends, and fires its interrupts.
struct TxWork {
    queue: Queue,
    kick: OwnedFd,
    call: Arc<Call>,
    shared: Arc<Shared>,
    port: Arc<Port>,
    chain: Chain,
}

impl TxWork {
    fn run(&mut self, control: &Control, lane: &mut Lane) {
        // What a predecessor did may not have been told.
        self.call.fire();
        let rx_kick = lock(&self.shared.rx_kick).as_ref().and_then(|kick| kick.try_clone().ok());
        let mut broken = false;
        while !control.stopping() {
            if control.resting() {
                control.sleep(&[], None);
                continue;
            }
            let (budget, wait) = self.budget();
            let mut worked = false;
            if budget > 0 && !broken {
                match self.round(lane, budget) {
                    Ok(any) => worked |= any,
                    Err(error) => {
                        tracing::error!(id = %self.shared.id, %error, "the queue is not served any more");
                        broken = true;
                    }
                }
            }
            worked |= self.to_guest();
            if worked || (budget > 0 && !broken && self.queue.ask_for_kicks()) {
                continue;
            }
            let mut fds = vec![self.kick.as_fd(), self.shared.rx.wake.as_fd()];
            fds.extend(rx_kick.iter().map(AsFd::as_fd));
            control.sleep(&fds, wait);
            clear_kick(&self.kick);
            let _nothing_there_is_fine = self.shared.rx.wake.read();
            rx_kick.iter().for_each(clear_kick);
        }
        *lock(&self.shared.tx_next) = self.queue.next_avail();
    }

    fn budget(&self) -> (usize, Option<Duration>) {
        match lock(&self.port.bucket).as_mut() {
            None => (usize::MAX, None),
            Some(bucket) => match bucket.budget(Instant::now()) {
                0 => (0, Some(bucket.wait())),
                budget => (budget, None),
            },
        }
    }

    /// Delivers what waited for buffers, and fires the guest's interrupt.
    fn to_guest(&self) -> bool {
        let mut guard = lock(&self.shared.rx.state);
        let Some(state) = guard.as_mut() else { return false };
        let mut worked = false;
        if !state.waiting.is_empty() {
            match state.flush() {
                Ok(any) => worked = any || (!state.waiting.is_empty() && state.queue.ask_for_kicks()),
                Err(error) => {
                    tracing::error!(id = %self.shared.id, %error, "nothing is delivered any more");
                    guard.take();
                    return false;
                }
            }
        }
        let call = std::mem::take(&mut state.told).then(|| state.call.clone());
        drop(guard);
        if let Some(call) = call {
            call.fire();
            self.shared.stats.notifies.add(1);
        }
        worked
    }

    /// Takes packets and hands them on; true if there were any.
    fn round(&mut self, lane: &mut Lane, budget: usize) -> Result<bool, QueueError> {
        self.queue.no_kicks();
        let mut heads: Vec<u16> = Vec::with_capacity(BATCH);
        // For each frame, how many heads are over when it is.
        let mut ends: Vec<usize> = Vec::with_capacity(BATCH);
        let mut frames: Vec<Frame> = Vec::with_capacity(BATCH);
        let (mut at, mut bytes) = (0, 0);
        while heads.len() < BATCH && bytes < budget && at + HEADROOM + MAX_RX_PACKET <= SCRATCH {
            let Some(head) = self.queue.take()? else { break };
            heads.push(head);
            let frame = match self.queue.chain(head, &mut self.chain) {
                Ok(()) => fetch(&self.chain, &lane.arena, at + HEADROOM),
                Err(error) => {
                    tracing::debug!(%error, "a packet is refused");
                    None
                }
            };
            match frame {
                Some(frame) => {
                    bytes += frame.len;
                    at = (frame.at + frame.len).next_multiple_of(64);
                    frames.push(frame);
                    ends.push(heads.len());
                }
                None => self.shared.stats.tx_errors.add(1),
            }
        }
        if heads.is_empty() {
            return Ok(false);
        }
        let mut fates = vec![Fate::default(); frames.len()];
        let mut given = 0;
        let (queue, port, switch) = (&mut self.queue, &self.port, &self.shared.switch);
        let mut give_to = |end: usize, queue: &mut Queue| {
            while given < end {
                queue.give(heads[given], 0);
                given += 1;
            }
        };
        switch.forward(Origin::Vif(port), lane, &frames, &mut fates, &mut |i| give_to(ends[i], queue));
        give_to(heads.len(), queue);
        for (frame, fate) in frames.iter().zip(&fates) {
            let stats = &self.shared.stats;
            match fate {
                Fate::Sent => {
                    stats.tx_packets.add(1);
                    stats.tx_bytes.add(frame.len as u64);
                }
                Fate::Dropped => stats.tx_dropped.add(1),
                Fate::Refused => stats.tx_errors.add(1),
            }
        }
        if let Some(bucket) = lock(&self.port.bucket).as_mut() {
            bucket.take(bytes);
        }
        if self.queue.must_notify() {
            self.call.fire();
            self.shared.stats.notifies.add(1);
        }
        Ok(true)
    }
}

/// Copies a packet out of the guest's memory and judges its header. `None`: it makes no sense.
fn fetch(chain: &Chain, arena: &Span, at: usize) -> Option<Frame> {
    let all: usize = chain.readable.iter().map(|s| s.len).sum();
    let len = all.checked_sub(HDR).filter(|len| (MIN_PACKET..=MAX_RX_PACKET).contains(len))?;
    let mut header = [0; HDR];
    let mut done = 0;
    for segment in &chain.readable {
        let Segment { place, len } = segment;
        // The header's part of this segment, then the packet's.
        let of_header = HDR.saturating_sub(done).min(*len);
        place.mem.copy_out(place.offset, &mut header[done.min(HDR)..done.min(HDR) + of_header]);
        let rest = len - of_header;
        if rest > 0 {
            let to = arena.absolute(at + done + of_header - HDR);
            arena.mem().copy_from(to, &place.mem, place.offset + of_header, rest);
        }
        done += len;
    }
    let mut tap = [0; VNET_HDR_LEN];
    tap.copy_from_slice(&header[..VNET_HDR_LEN]);
    let meta = offload::from_tap(VnetHdr::from_bytes(&tap));
    let mut headers = [0; MAX_HEADERS];
    let headers = &mut headers[..len.min(MAX_HEADERS)];
    arena.copy_out(at, headers);
    // What the guest says of its packet is judged by the packet's own headers.
    let out = offload::to_tap(meta, headers, len).ok()?;
    arena.copy_in(at - VNET_HDR_LEN, &out.hdr.to_bytes());
    if let Some((offset, value)) = out.patch {
        arena.copy_in(at + offset, &value);
    }
    crate::fault::look(len);
    Some(Frame { at, len, meta: offload::from_tap(out.hdr) })
}
