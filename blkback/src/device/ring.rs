//! One ring of a device: made, then served by a thread ([`super::worker`]).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use domain_kit::evtchn::Port;
use domain_kit::grants::{CopyBuffer, MappedGrants};
use domain_kit::hypercall::Hypercall;
use domain_kit::journal::{JournaledRing, Slot};
use domain_kit::mem::SharedMem;
use domain_kit::ring::{Pages, RingMem};
use domain_kit::xenbus::{BackendHandle, DeviceKey};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connection::{Connection, USER_RECORDS, journal_name, store_limits};
use super::worker::{Task, Workers};
use super::{AttachError, Shared};
use crate::disk::attachment::{Disk, DiskQueue};
use crate::engine::gate::{Gate, Seat, Wake};
use crate::engine::{BUFFERS_BYTES, Engine};
use crate::limit::{Limiter, Limits};
use crate::pages::{GrantPages, Tags};
use crate::request::BlkifFormat;
use crate::stats::Stats;

/// What a ring's thread and the control thread share.
#[derive(Debug)]
pub struct RingControl {
    wake: Arc<EventFd>,
    stop: AtomicBool,
    paused: AtomicBool,
    in_flight: AtomicU32,
}

impl RingControl {
    /// Of a ring whose thread `wake` wakes.
    pub fn new(wake: Arc<EventFd>) -> Self {
        RingControl { wake, stop: false.into(), paused: false.into(), in_flight: AtomicU32::new(0) }
    }

    /// Tells its thread to end.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
        self.wake();
    }

    /// It serves again.
    pub fn restart(&self) {
        self.stop.store(false, Relaxed);
    }

    /// Whether it is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Whether it is to take nothing new.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Relaxed)
    }

    /// Says what is taken and not answered.
    pub fn set_in_flight(&self, requests: u32) {
        self.in_flight.store(requests, Relaxed);
    }

    /// Readable when something was said here.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// What was said is seen.
    pub fn clear_wake(&self) {
        let _empty_is_fine = self.wake.read();
    }

    fn wake(&self) {
        let _full_is_awake_too = self.wake.write(1);
    }

    /// While paused, nothing new is taken off the ring.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Relaxed);
        self.wake();
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }
}

/// What the rings of a device share.
#[derive(Clone)]
pub struct Common {
    /// Its limits.
    pub limiter: Arc<Limiter>,
    /// Each ring's eventfd: its thread looks again.
    wakes: Vec<Arc<EventFd>>,
    /// With more than one ring.
    gate: Option<Arc<Gate>>,
}

impl Common {
    /// For `rings` rings.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(rings: usize) -> Result<Common, AttachError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wakes = (0..rings).map(|_| EventFd::from_value_and_flags(0, flags).map(Arc::new));
        let wakes: Vec<_> =
            wakes.collect::<Result<_, _>>().map_err(|e| AttachError::Os("eventfd", e.into()))?;
        let wake = |event: &Arc<EventFd>| -> Wake {
            let event = event.clone();
            Box::new(move || {
                let _full_is_awake_too = event.write(1);
            })
        };
        let gate = (rings > 1).then(|| Gate::new(wakes.iter().map(wake).collect()));
        Ok(Common { limiter: Arc::default(), wakes, gate })
    }
}

/// The engine of a real ring.
pub type RingEngine = Engine<Pages, Arc<SharedMem>, GrantPages<Arc<SharedMem>>, Box<dyn DiskQueue + Send>>;

/// A ring that is served.
#[derive(Debug)]
pub struct Ring {
    stats: Arc<Stats>,
    control: Arc<RingControl>,
    /// Ends with its service.
    done: Mutex<Receiver<()>>,
    mapped: MappedGrants,
    port: u32,
    journal: Arc<SharedMem>,
    user: usize,
}

impl Ring {
    /// To pause it.
    pub fn control(&self) -> Arc<RingControl> {
        self.control.clone()
    }

    /// Its counters.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// Notes that the frontend knows of the connection.
    pub fn known(&self) {
        RingMem::store_u32(&*self.journal, self.user, 1);
    }

    /// Keeps the device's limits; of its first ring.
    pub fn keep_limits(&self, limits: &Limits) {
        store_limits(&self.journal, self.user, limits);
    }

    /// Tells its thread to end.
    pub fn stop(&self) {
        self.control.stop();
    }

    /// Waits until it is no longer served and lets ring and port go.
    pub fn close(self, hv: &Hypercall) {
        self.stop();
        // Nothing is ever sent: its end is the message.
        let _ended = self.done.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let results = [self.mapped.unmap(hv), hv.port_close(self.port)];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::warn!(port = self.port, %error, "closing");
        }
    }
}

/// A ring whose engine is made and does not run yet.
pub struct StartingRing {
    number: u32,
    wake: Arc<EventFd>,
    stats: Arc<Stats>,
    engine: RingEngine,
    mapped: MappedGrants,
    port: Port,
    journal: Arc<SharedMem>,
    user: usize,
    handle: BackendHandle,
    claiming: Arc<AtomicUsize>,
    workers: Arc<Workers>,
}

impl StartingRing {
    /// Maps ring `number` of a connection, binds its port and takes its journal up (`fresh`: makes it).
    ///
    /// # Errors
    /// [`AttachError`]; ring and port are given back.
    pub fn new(
        shared: &Shared,
        disk: &Arc<dyn Disk>,
        connection: &Connection,
        number: u32,
        memory: SharedMem,
        common: &Common,
        fresh: bool,
    ) -> Result<Self, AttachError> {
        let hv = &shared.domain.hv;
        let key = connection.key;
        let refs = &connection.rings[number as usize];
        let tag = Tags::new(key.id, number).ring;
        let known = hv
            .grant_list()?
            .into_iter()
            .find(|m| m.tag == tag && m.domid == key.frontend && m.count as usize == refs.grefs.len());
        let mapped = match known.filter(|_| !fresh) {
            Some(map) => MappedGrants::claim(hv, map.handle)?,
            None => MappedGrants::map(hv, key.frontend, &refs.grefs, tag)?,
        };
        let undo = |mapped: MappedGrants| {
            if let Err(error) = mapped.unmap(hv) {
                tracing::warn!(device = %key, %error, "the ring is not unmapped");
            }
        };
        let port = match hv.port_bind_interdomain(key.frontend, refs.remote_port) {
            Ok(port) => port,
            Err(e) => {
                undo(mapped);
                return Err(e.into());
            }
        };
        let stats = Arc::new(Stats::default());
        stats.drain_us.set(disk.fence().drain.as_micros() as u64);
        let journal = Arc::new(memory);
        match engine(shared, disk, connection, number, &mapped, &journal, &stats, fresh) {
            Ok((mut engine, user)) => {
                engine.set_limiter(common.limiter.clone());
                if let Some(gate) = &common.gate {
                    engine.set_seat(Seat::new(gate.clone(), number));
                }
                Ok(StartingRing {
                    number,
                    wake: common.wakes[number as usize].clone(),
                    stats,
                    engine,
                    mapped,
                    port,
                    journal,
                    user,
                    handle: shared.handle.clone(),
                    claiming: shared.claiming.clone(),
                    workers: shared.workers.clone(),
                })
            }
            Err(e) => {
                undo(mapped);
                let _closed_or_gone = hv.port_close(port.port);
                Err(e)
            }
        }
    }

    /// Lets everything go without ever having served.
    pub fn abandon(self, hv: &Hypercall, key: DeviceKey) {
        let StartingRing { engine, mapped, port, .. } = self;
        let (mut guest, disk) = engine.into_parts();
        guest.unmap_all();
        drop((guest, disk));
        for error in [mapped.unmap(hv), hv.port_close(port.port)].into_iter().filter_map(Result::err) {
            tracing::warn!(device = %key, %error, "abandoning");
        }
    }

    /// Has it served.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start(self, key: DeviceKey) -> Result<Ring, AttachError> {
        let StartingRing { number, wake, stats, engine, mapped, port, journal, user, .. } = self;
        let (handle, claiming) = (self.handle, self.claiming);
        let control = Arc::new(RingControl::new(wake));
        let port_number = port.port;
        // Counted down by its thread.
        claiming.fetch_add(1, Relaxed);
        let (sender, done) = channel();
        let task = Task {
            engine,
            port,
            control: control.clone(),
            claiming: claiming.clone(),
            key,
            handle,
            done: sender,
        };
        if let Err(error) = self.workers.serve(task, &journal_name(key, number)) {
            claiming.fetch_sub(1, Relaxed);
            return Err(error);
        }
        Ok(Ring { stats, control, done: Mutex::new(done), mapped, port: port_number, journal, user })
    }
}

#[expect(clippy::too_many_arguments, reason = "made in one place")]
fn engine(
    shared: &Shared,
    disk: &Arc<dyn Disk>,
    connection: &Connection,
    number: u32,
    mapped: &MappedGrants,
    journal: &Arc<SharedMem>,
    stats: &Arc<Stats>,
    fresh: bool,
) -> Result<(RingEngine, usize), AttachError> {
    let hv = &shared.domain.hv;
    let bases = (0..mapped.pages()).map(|i| mapped.offset(i)).collect();
    let pages = Pages::new(mapped.mem.clone(), bases);
    let (layout, shape, format) = (connection.layout(), connection.shape(), BlkifFormat(connection.abi));
    let (ring, unanswered) = if fresh {
        connection.store_grefs(number, journal);
        let identity = connection.identity(number);
        (JournaledRing::create(pages, layout, journal.clone(), shape, identity, format)?, Vec::<Slot>::new())
    } else {
        let own_fault = shared.domain.predecessor_crashed();
        JournaledRing::reattach(pages, layout, journal.clone(), shape, format, own_fault)?
    };
    if !unanswered.is_empty() {
        tracing::info!(device = %connection.key, ring = number, requests = unanswered.len(), "to be run again");
    }
    let user = ring.journal().user_offset();
    let buffers = Arc::new(CopyBuffer::new(hv, BUFFERS_BYTES)?);
    let queue = disk
        .clone()
        .queue(buffers.clone(), layout.size)
        .map_err(|e| AttachError::Os("the disk's queue", e))?;
    let guest = GrantPages::new(
        hv.new_channel()?,
        connection.key.frontend,
        Tags::new(connection.key.id, number).persistent,
        buffers,
        connection.persistent,
        journal.clone(),
        user + USER_RECORDS,
        stats.clone(),
    )?;
    let mut engine = Engine::new(ring, connection.abi, unanswered, guest, queue, stats.clone());
    engine.set_read_only(connection.read_only);
    engine.set_no_space(shared.no_space);
    if let Some(fault) = shared.fault {
        engine.set_fault_hook(fault());
    }
    Ok((engine, user))
}
