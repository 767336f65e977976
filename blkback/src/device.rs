//! One connected device: its ring, its journal, its thread.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use domain_kit::evtchn::Port;
use domain_kit::grants::{CopyBuffer, GrantError, MappedGrants};
use domain_kit::hypercall::{HvError, Hypercall};
use domain_kit::journal::{JournalError, JournaledRing, RingFormat, RingJournal, Shape, Slot};
use domain_kit::mem::{Page, SharedMem};
use domain_kit::ring::{RingLayout, RingMem};
use domain_kit::xenbus::{BackendHandle, DeviceKey};
use domain_kit::{Domain, fdstore};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use xen_abi::io::blkif::Abi;

use crate::disk::source::Source;
use crate::disk::uring::UringDisk;
use crate::engine::{Engine, FaultHook};
use crate::pages::{GrantPages, RECORDS_BYTES, persistent_tag, ring_tag};
use crate::request::{BlkifFormat, MAX_REQUEST_BYTES};
use crate::stats::Stats;

/// What a frontend told of its connection. Kept in the journal, so that the next incarnation needs no store to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Which device.
    pub key: DeviceKey,
    /// Grant of the ring's page.
    pub ring_ref: u32,
    /// The frontend's port.
    pub remote_port: u32,
    /// Layout of its entries.
    pub abi: Abi,
    /// Its grants may stay mapped.
    pub persistent: bool,
    /// Its writes are refused.
    pub read_only: bool,
    /// Which domain of that domid it is (low bits of hv-core's serial number): a domid can be used again.
    pub instance: u32,
}

impl Connection {
    fn identity(&self) -> [u32; 6] {
        let flags = u32::from(self.abi == Abi::X86_32)
            | u32::from(self.persistent) << 1
            | u32::from(self.read_only) << 2;
        [self.key.frontend.into(), self.key.id, self.ring_ref, self.remote_port, flags, self.instance]
    }

    fn from_identity(words: [u32; 6]) -> Option<Self> {
        let [frontend, id, ring_ref, remote_port, flags, instance] = words;
        Some(Connection {
            key: DeviceKey { frontend: frontend.try_into().ok()?, id },
            ring_ref,
            remote_port,
            abi: if flags & 1 != 0 { Abi::X86_32 } else { Abi::X86_64 },
            persistent: flags & 2 != 0,
            read_only: flags & 4 != 0,
            instance,
        })
    }

    fn layout(&self) -> RingLayout {
        let format = BlkifFormat(self.abi);
        RingLayout::new(1, format.req_size(), format.rsp_size())
    }

    fn shape(&self) -> Shape {
        JournaledRing::<Page, Page, BlkifFormat>::shape(&self.layout(), EXTRA_BYTES, USER_BYTES)
    }
}

/// Room for the segments of an indirect request: 256 of 8 bytes.
const EXTRA_BYTES: u32 = 2048;
/// The owner's area: a flag's line, then the records of persistent grants.
const USER_BYTES: u32 = 64 + RECORDS_BYTES;

/// Name of a device's journal in the fd store.
pub fn journal_name(key: DeviceKey) -> String {
    format!("vbd-{key}")
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A hypercall failed, or mapping what it gave.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// The ring failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// io_uring or a thread.
    #[error("{0}: {1}")]
    Os(&'static str, io::Error),
    /// Re-attach without a journal.
    #[error("nothing was kept of this connection")]
    NothingKept,
}

impl From<HvError> for AttachError {
    fn from(e: HvError) -> Self {
        AttachError::Grant(e.into())
    }
}

/// What a device's thread and the control thread share.
#[derive(Debug)]
struct Control {
    wake: EventFd,
    stop: AtomicBool,
    paused: AtomicBool,
    in_flight: AtomicU32,
}

/// Pauses a device from any thread.
#[derive(Clone, Debug)]
pub struct DeviceControl(Arc<Control>);

impl DeviceControl {
    /// While paused, nothing new is taken off the ring.
    pub fn set_paused(&self, paused: bool) {
        self.0.paused.store(paused, Relaxed);
        let _full_is_awake_too = self.0.wake.write(1);
    }

    /// Waits until nothing is in flight; false at the deadline.
    pub fn drained(&self, deadline: Instant) -> bool {
        while self.0.in_flight.load(Relaxed) > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

/// A device that is served.
#[derive(Debug)]
pub struct Device {
    /// Its connection.
    pub connection: Connection,
    /// Its counters.
    pub stats: Arc<Stats>,
    control: Arc<Control>,
    thread: JoinHandle<()>,
    ring: MappedGrants,
    port: u32,
    journal: Arc<SharedMem>,
    connected_at: usize,
}

/// What all devices of the process need.
pub struct Shared {
    /// This domain.
    pub domain: Arc<Domain>,
    /// To tell of failures.
    pub handle: BackendHandle,
    /// Makes the test hook of each device, see `--fault`.
    pub fault: Option<fn() -> FaultHook>,
    /// Devices whose predecessor's maps are not all claimed yet: until then hv-core must not be told of service, which drops
    /// the unclaimed.
    pub claiming: Arc<AtomicUsize>,
}

/// Which domain has the domid now, as [`Connection::instance`] tells; `None` if none has, or it goes.
///
/// # Errors
/// The hypercall's.
pub fn instance(hv: &Hypercall, domid: u16) -> Result<Option<u32>, HvError> {
    match hv.dom_info(domid) {
        Ok(info) if info.state == hv_abi::dom_state::DYING => Ok(None),
        Ok(info) => Ok(Some(info.instance as u32)),
        Err(e) if e.is(Errno::ESRCH) || e.is(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Connections of which a previous incarnation kept a journal, and which the frontend knows to be connected. What was kept of
/// domains that are gone is dropped.
///
/// # Errors
/// The hypercalls'.
pub fn kept(hv: &Hypercall) -> Result<Vec<Connection>, AttachError> {
    let mut found = Vec::new();
    for info in hv.fd_list()? {
        let Some(name) = info.name.as_str().filter(|n| n.starts_with("vbd-")) else { continue };
        match find(hv, name) {
            Ok(Some((connection, _)))
                if instance(hv, connection.key.frontend)? != Some(connection.instance) =>
            {
                tracing::info!(device = %connection.key, "its domain is gone");
                forget(hv, connection.key)?;
            }
            Ok(Some((connection, memory))) => {
                let at = connection.shape().bytes() - USER_BYTES as usize;
                if memory.load_u32(at, std::sync::atomic::Ordering::Acquire) != 0 {
                    found.push(connection);
                }
            }
            Ok(None) => {}
            Err(error) => tracing::error!(name, %error, "a kept journal cannot be read"),
        }
    }
    Ok(found)
}

/// The connection and memory of the journal kept under `name`.
fn find(hv: &Hypercall, name: &str) -> Result<Option<(Connection, SharedMem)>, AttachError> {
    let (_, fd) = match hv.fd_get(name) {
        Ok(found) => found,
        Err(e) if e.is(Errno::ENOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let len = nix::sys::stat::fstat(&fd).map_err(|e| AttachError::Os("fstat", e.into()))?.st_size as usize;
    let memory = SharedMem::map(&fd, len).map_err(|e| AttachError::Os("mapping the journal", e))?;
    for abi in [Abi::X86_64, Abi::X86_32] {
        // Only the header is read with this shape.
        let probe = Connection {
            key: DeviceKey { frontend: 0, id: 0 },
            ring_ref: 0,
            remote_port: 0,
            abi,
            persistent: false,
            read_only: false,
            instance: 0,
        };
        if let Ok(journal) = RingJournal::open(&memory, probe.shape())
            && let Some(connection) = Connection::from_identity(journal.identity())
            && connection.abi == abi
            && journal_name(connection.key) == name
        {
            return Ok(Some((connection, memory)));
        }
    }
    Err(JournalError::Header("not a journal of this service's").into())
}

/// Drops everything that is kept of a device that is not served.
///
/// # Errors
/// The hypercalls'.
pub fn forget(hv: &Hypercall, key: DeviceKey) -> Result<(), AttachError> {
    if let Ok(Some((connection, _))) = find(hv, &journal_name(key)) {
        close_port_to(hv, connection.key.frontend, connection.remote_port)?;
    }
    for map in hv.grant_list()? {
        let ours = map.tag == ring_tag(key.id) || map.tag == persistent_tag(key.id);
        if ours && map.domid == key.frontend && map.mine == 0 {
            hv.grant_unmap(map.handle)?;
        }
    }
    match hv.fd_delete(&journal_name(key)) {
        Err(e) if !e.is(Errno::ENOENT) => Err(e.into()),
        _ => Ok(()),
    }
}

fn close_port_to(hv: &Hypercall, domid: u16, remote_port: u32) -> Result<(), HvError> {
    for port in hv.port_list()? {
        if port.remote_domid == domid
            && port.remote_port == remote_port
            && port.state == hv_abi::port_state::INTERDOMAIN
        {
            hv.port_close(port.port)?;
        }
    }
    Ok(())
}

impl Device {
    /// Serves a connection that a frontend has just offered. The engine starts at `start` of the result.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is left behind.
    pub fn connect(
        shared: &Shared,
        source: &Arc<Source>,
        connection: Connection,
    ) -> Result<Starting, AttachError> {
        let hv = &shared.domain.hv;
        forget(hv, connection.key)?;
        let made = (|| {
            let name = journal_name(connection.key);
            let (memory, _) = fdstore::kept_memory(hv, &name, connection.shape().bytes())?;
            Starting::new(shared, source, connection, memory, true)
        })();
        if made.is_err() {
            forget(hv, connection.key)?;
        }
        made
    }

    /// Serves again what a previous incarnation served.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn reattach(shared: &Shared, source: &Arc<Source>, key: DeviceKey) -> Result<Device, AttachError> {
        let kept = find(&shared.domain.hv, &journal_name(key))?;
        let (connection, memory) = kept.ok_or(AttachError::NothingKept)?;
        Starting::new(shared, source, connection, memory, false)?.start()
    }

    /// To pause it.
    pub fn control(&self) -> DeviceControl {
        DeviceControl(self.control.clone())
    }

    /// The frontend knows that it is connected: the next incarnation may serve it before it has seen the store.
    pub fn known(&self) {
        self.journal.store_u32(self.connected_at, 1);
    }

    /// Stops serving and lets everything go.
    pub fn close(self, hv: &Hypercall) {
        self.control.stop.store(true, Relaxed);
        let _full_is_awake_too = self.control.wake.write(1);
        if self.thread.join().is_err() {
            tracing::error!(device = %self.connection.key, "its thread panicked");
        }
        let key = self.connection.key;
        let results = [self.ring.unmap(hv), hv.port_close(self.port), hv.fd_delete(&journal_name(key))];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::warn!(device = %key, %error, "closing");
        }
    }
}

type RingEngine = Engine<Page, Arc<SharedMem>, GrantPages<Arc<SharedMem>>, UringDisk>;

/// A device whose engine is made and does not run yet.
pub struct Starting {
    connection: Connection,
    stats: Arc<Stats>,
    engine: RingEngine,
    ring: MappedGrants,
    port: Port,
    journal: Arc<SharedMem>,
    connected_at: usize,
    hv: Hypercall,
    handle: BackendHandle,
    claiming: Arc<AtomicUsize>,
}

impl Starting {
    fn new(
        shared: &Shared,
        source: &Arc<Source>,
        connection: Connection,
        memory: SharedMem,
        fresh: bool,
    ) -> Result<Self, AttachError> {
        let hv = &shared.domain.hv;
        let Connection { key, ring_ref, remote_port, abi, persistent, read_only, .. } = connection;
        let stats = Arc::new(Stats::default());
        stats.drain_us.store(source.drain.as_micros() as u64, Relaxed);
        let tag = ring_tag(key.id);
        let known =
            hv.grant_list()?.into_iter().find(|m| m.tag == tag && m.domid == key.frontend && m.count == 1);
        let ring = match known.filter(|_| !fresh) {
            Some(map) => MappedGrants::claim(hv, map.handle)?,
            None => MappedGrants::map(hv, key.frontend, &[ring_ref], tag)?,
        };
        let undo = |ring: MappedGrants| {
            if let Err(error) = ring.unmap(hv) {
                tracing::warn!(device = %key, %error, "the ring is not unmapped");
            }
        };
        let port = match hv.port_bind_interdomain(key.frontend, remote_port) {
            Ok(port) => port,
            Err(e) => {
                undo(ring);
                return Err(e.into());
            }
        };
        let journal = Arc::new(memory);
        let made = (|| -> Result<(RingEngine, usize, Hypercall), AttachError> {
            let page = Page { mem: ring.mem.clone(), base: ring.offset(0) };
            let (layout, shape, format) = (connection.layout(), connection.shape(), BlkifFormat(abi));
            let (rings, unanswered) = if fresh {
                let identity = connection.identity();
                (
                    JournaledRing::create(page, layout, journal.clone(), shape, identity, format)?,
                    Vec::<Slot>::new(),
                )
            } else {
                let own_fault = shared.domain.predecessor_crashed();
                JournaledRing::reattach(page, layout, journal.clone(), shape, format, own_fault)?
            };
            let user = rings.journal().user_offset();
            if !unanswered.is_empty() {
                tracing::info!(device = %key, requests = unanswered.len(), "to be run again");
            }
            let slots = layout.size;
            let buffers = Arc::new(CopyBuffer::new(hv, slots as usize * MAX_REQUEST_BYTES)?);
            let mut disk = UringDisk::new(source.clone(), buffers.clone(), slots)
                .map_err(|e| AttachError::Os("io_uring", e))?;
            disk.set_read_only(read_only);
            let guest = GrantPages::new(
                hv.new_channel()?,
                key.frontend,
                key.id,
                buffers,
                persistent,
                journal.clone(),
                user + 64,
                stats.clone(),
            )?;
            let mut engine = Engine::new(rings, abi, unanswered, guest, disk, stats.clone());
            if let Some(fault) = shared.fault {
                engine.set_fault_hook(fault());
            }
            Ok((engine, user, hv.new_channel()?))
        })();
        match made {
            Ok((engine, connected_at, channel)) => Ok(Starting {
                connection,
                stats,
                engine,
                ring,
                port,
                journal,
                connected_at,
                hv: channel,
                handle: shared.handle.clone(),
                claiming: shared.claiming.clone(),
            }),
            Err(e) => {
                undo(ring);
                let _closed_or_gone = hv.port_close(port.port);
                Err(e)
            }
        }
    }

    /// Lets everything go without ever having served.
    pub fn abandon(self, hv: &Hypercall) {
        let Starting { connection, engine, ring, port, .. } = self;
        let (mut guest, disk) = engine.into_parts();
        guest.unmap_all();
        drop((guest, disk));
        let results = [ring.unmap(hv), hv.port_close(port.port), hv.fd_delete(&journal_name(connection.key))];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::warn!(device = %connection.key, %error, "abandoning");
        }
    }

    /// Starts its thread.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start(self) -> Result<Device, AttachError> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| AttachError::Os("eventfd", e.into()))?;
        let control = Arc::new(Control {
            wake,
            stop: false.into(),
            paused: false.into(),
            in_flight: AtomicU32::new(0),
        });
        let Starting { connection, stats, engine, ring, port, journal, connected_at, hv, handle, claiming } =
            self;
        let number = port.port;
        let theirs = control.clone();
        let key = connection.key;
        // Counted down by its thread.
        claiming.fetch_add(1, Relaxed);
        let thread = std::thread::Builder::new()
            .name(journal_name(key))
            .spawn(move || {
                if let Err(error) = serve(engine, &port, &theirs, &hv, &claiming, key) {
                    handle.failed(key, error.to_string());
                }
            })
            .map_err(|e| AttachError::Os("thread", e))?;
        Ok(Device { connection, stats, control, thread, ring, port: number, journal, connected_at })
    }
}

/// A device's thread.
fn serve(
    mut engine: RingEngine,
    port: &Port,
    control: &Control,
    hv: &Hypercall,
    claiming: &AtomicUsize,
    key: DeviceKey,
) -> Result<(), JournalError> {
    let mut served = false;
    let mut claimed = false;
    // At re-attach and at the start: poll the ring whatever latched, then notify once.
    let mut notify_once = true;
    let result = loop {
        if control.stop.load(Relaxed) {
            break Ok(());
        }
        engine.set_paused(control.paused.load(Relaxed));
        let polled = match engine.poll() {
            Ok(polled) => polled,
            Err(e) => break Err(e),
        };
        if polled.notify || std::mem::take(&mut notify_once) {
            port.notify();
        }
        control.in_flight.store(engine.in_flight(), Relaxed);
        if !claimed {
            // One in each round, so that requests do not wait for all.
            claimed = !engine.guest().claim_one();
            if claimed {
                claiming.fetch_sub(1, Relaxed);
            }
        }
        if !served && engine.answered() > 0 && claiming.load(Relaxed) == 0 {
            served = true;
            if let Err(error) = hv.served() {
                tracing::warn!(%error, "telling hv-core of service");
            }
        }
        if polled.more || !claimed {
            continue;
        }
        let disk: &UringDisk = engine.disk();
        let mut fds = [
            PollFd::new(port.rx(), PollFlags::POLLIN),
            PollFd::new(disk.as_fd(), PollFlags::POLLIN),
            PollFd::new(control.wake.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            // Only out of memory is left; the next incarnation replays.
            Err(e) => panic!("poll: {e}"),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let (kicked, woken) = (ready(&fds[0]), ready(&fds[2]));
        if kicked {
            port.clear();
        }
        if woken {
            let _taken = control.wake.read();
        }
    };
    control.in_flight.store(0, Relaxed);
    if !claimed {
        claiming.fetch_sub(1, Relaxed);
    }
    // What the kernel still does must end before buffers and lock may go.
    let (mut guest, mut disk) = engine.into_parts();
    disk.finish();
    guest.unmap_all();
    tracing::info!(device = %key, "no longer served");
    result
}
