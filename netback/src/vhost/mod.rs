//! A NIC for a guest that speaks virtio: vhost-user-net beside Xen's rings, into the same switch.
//!
//! The vif is found in xenstore as any other. Its frontend (qemu-bridge) says `protocol` = `vhost-user`; the toolstack says in the
//! backend's own directory, as `vhost-user`, which approved resource leads to the socket on which QEMU listens. This end dials in. The
//! conversation outlives this process ([`domain_kit::vhost::conversation`]), so QEMU does not notice that it was killed.
//!
//! One pair of queues. A packet from the guest is handed back to it (used) just before anybody else can see the packet, in the queue's
//! order: the next incarnation then knows how far a killed one came, and none is sent twice. What waits for the guest's buffers is lost with
//! the process, as what is under way to it.
//!
//! The guest's interrupt is only ever fired by the vif's own thread: the descriptor's other end is QEMU's, who could make it block.
//! VIRTIO_NET_F_STATUS is not offered: with it QEMU takes the guest's carrier away for a second when this process is restarted.

mod rx;
mod tx;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use domain_kit::Domain;
use domain_kit::hypercall::Hypercall;
use domain_kit::mem::{SharedMem, sealed_memfd};
use domain_kit::ring::Span;
use domain_kit::vhost::line::Line;
use domain_kit::vhost::session;
use domain_kit::vhost::wire::Place;
use domain_kit::vhost::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use hv_abi::fd_kind;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::connection::{ConnectError, VifId, kept_memory, system};
use crate::hash::HashConfig;
use crate::offload::VNET_HDR_LEN;
use crate::queue::ARENA_BYTES;
use crate::stats::Stats;
use crate::switch::port::{Groups, Port, PortParts, RxHandle, lock};
use crate::switch::settings::Settings;
use crate::switch::{Lane, Switch};
use crate::tap::Offloads;
use crate::worker::Worker;
use domain_kit::kept;

pub use rx::VhostRx;
use tx::TxWork;

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
/// How long the uplink waits for a vif's queues after a restart.
const SETTLE: Duration = Duration::from_secs(1);
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
    Place { hv, device: &id.to_string(), instance: 0 }.forget();
    match hv.fd_delete(&note_name(id)) {
        Err(error) if !error.is(Errno::ENOENT) => tracing::warn!(%id, %error, "fd store entry stays"),
        _ => {}
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
        let (theirs, crashed) = (shared.clone(), domain.predecessor_crashed());
        let thread = std::thread::Builder::new()
            .name(note_name(id))
            .spawn(move || talk(&hv, (instance, &resource), &theirs, lane, crashed))
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
        // A packet to it would be lost before.
        if !vif.shared.line.wait_settled(SETTLE) {
            tracing::warn!(%id, "not served again yet");
        }
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
fn talk(hv: &Hypercall, (instance, resource): (u64, &str), shared: &Arc<Shared>, lane: Lane, crashed: bool) {
    let id = shared.id;
    let lane = Arc::new(Mutex::new(lane));
    let place = Place { hv, device: &id.to_string(), instance };
    shared.line.keep(place, resource, crashed, |talk| {
        let mut device = Served { shared: shared.clone(), lane: lane.clone() };
        session::serve(talk, &mut device, crashed, || shared.line.settle())
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
                let mergeable = ring.features & F_MRG_RXBUF != 0;
                self.shared.rx.start(ring.queue, ring.call, mergeable, port.offloads.csum);
            }
            TX => {
                let mut work = TxWork::new(ring.queue, ring.kick, ring.call, self.shared.clone(), port);
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
                let next = self.shared.rx.stop();
                *lock(&self.shared.rx_kick) = None;
                if let Some(port) = lock(&self.shared.port).take() {
                    self.shared.switch.detach(port.slot);
                }
                Some(next)
            }
            _ => {
                let worker = lock(&self.shared.worker).take()?;
                worker.stop();
                Some(*lock(&self.shared.tx_next))
            }
        }
    }
}
