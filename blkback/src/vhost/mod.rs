//! A disk for a guest that speaks virtio: vhost-user-blk beside Xen's rings, on the same disk attachment.
//!
//! The device is found in xenstore as any other. Its frontend (qemu-bridge) says `protocol` = `vhost-user`; the toolstack says in the
//! backend's own directory, as `vhost-user`, which approved resource leads to the socket on which QEMU listens. This end dials in, and again
//! whenever QEMU hung up.
//!
//! ```text
//!   session thread: dial ──► messages ──► start, stop ──┐      one thread a queue: take, track, disk, answer
//!        ▲                                   hang-up    │◄──────────────────────────────┘
//!        └──────────────────────────────────────────────┘
//! ```
//! What outlives SIGKILL: the conversation ([`domain_kit::vhost::conversation`]), so QEMU does not notice; the requests under way, in memory
//! shared with QEMU ([`domain_kit::vhost::inflight`]); which devices are served, in a small note in the fd store, so that neither xenstore nor dom0 is needed to go on.

mod request;
mod ring;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use domain_kit::hypercall::Hypercall;
use domain_kit::mem::SharedMem;
use domain_kit::vhost::line::Line;
use domain_kit::vhost::session;
use domain_kit::vhost::wire::Place;
use domain_kit::vhost::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use domain_kit::xenbus::DeviceKey;
use domain_kit::{Domain, fdstore};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{AttachError, DeviceControl, RingControl, instance};
use crate::disk::attachment::Disk;
use crate::engine::NoSpace;
use crate::limit::{Limiter, Limits};
use crate::stats::Stats;
use ring::{Common, RingServer};

/// Most queues of a device.
const QUEUES: u16 = 8;
/// How long a queue may take to end.
const END: Duration = Duration::from_secs(5);

/// Bytes of a note in the fd store, and what stands where.
const NOTE_BYTES: usize = 4096;
const NOTE_INSTANCE: usize = 0;
const NOTE_READ_ONLY: usize = 4;
const NOTE_KNOWN: usize = 8;
const NOTE_LIMITS: usize = 16;
const NOTE_RESOURCE_LEN: usize = 64;
const NOTE_RESOURCE: usize = 72;

fn note_name(key: DeviceKey) -> String {
    format!("vhost-vbd-{key}")
}

fn talk_name(key: DeviceKey) -> String {
    format!("vbd-{key}")
}

fn key_of(name: &str) -> Option<DeviceKey> {
    let (frontend, id) = name.strip_prefix("vhost-vbd-")?.split_once('-')?;
    Some(DeviceKey { frontend: frontend.parse().ok()?, id: id.parse().ok()? })
}

/// How a device is served.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Which.
    pub key: DeviceKey,
    /// The frontend's creation, as [`instance`] tells.
    pub instance: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The approved resource.
    pub resource: String,
}

/// A device that is served.
#[derive(Debug)]
pub struct VhostDevice {
    /// How.
    pub wanted: Wanted,
    limiter: Arc<Limiter>,
    rings: Arc<Rings>,
    note: SharedMem,
    thread: Option<JoinHandle<()>>,
}

/// What the session's thread and others share.
#[derive(Debug)]
struct Rings {
    stats: Vec<Arc<Stats>>,
    controls: Vec<Arc<RingControl>>,
    line: Line,
}

/// Devices that a previous incarnation served and whose frontends are still there.
///
/// # Errors
/// The hypercalls'.
pub fn kept(hv: &Hypercall) -> Result<Vec<(Wanted, Limits)>, AttachError> {
    let mut found = Vec::new();
    for info in hv.fd_list()? {
        let Some(key) = info.name.as_str().and_then(key_of) else { continue };
        let (note, fresh) = fdstore::kept_memory(hv, &note_name(key), NOTE_BYTES)?;
        let there = note.load_u32(NOTE_INSTANCE, Relaxed);
        if fresh || instance(hv, key.frontend)? != Some(there) {
            forget(hv, key)?;
            continue;
        }
        if note.load_u32(NOTE_KNOWN, Relaxed) == 0 {
            continue;
        }
        let len = (note.load_u32(NOTE_RESOURCE_LEN, Relaxed) as usize).min(hv_abi::NAME_LEN);
        let mut resource = vec![0; len];
        note.copy_out(NOTE_RESOURCE, &mut resource);
        let long = |i: usize| note.load_u64(NOTE_LIMITS + 8 * i, Relaxed);
        let limits = Limits { iops: long(0), iops_burst: long(1), bytes: long(2), bytes_burst: long(3) };
        let wanted = Wanted {
            key,
            instance: there,
            read_only: note.load_u32(NOTE_READ_ONLY, Relaxed) != 0,
            resource: String::from_utf8_lossy(&resource).into_owned(),
        };
        found.push((wanted, limits));
    }
    Ok(found)
}

/// Drops what is kept of a device that is not served.
///
/// # Errors
/// The hypercall's.
pub fn forget(hv: &Hypercall, key: DeviceKey) -> Result<(), AttachError> {
    Place { hv, device: &talk_name(key), instance: 0 }.forget();
    match hv.fd_delete(&note_name(key)) {
        Err(e) if !e.is(Errno::ENOENT) => Err(e.into()),
        _ => Ok(()),
    }
}

impl VhostDevice {
    /// Serves a device from now on, whenever its frontend is there.
    ///
    /// # Errors
    /// No memory, descriptors or thread.
    pub fn serve(
        domain: &Arc<Domain>,
        disk: &Arc<dyn Disk>,
        no_space: NoSpace,
        wanted: Wanted,
        limits: Limits,
    ) -> Result<VhostDevice, AttachError> {
        let hv = &domain.hv;
        let (note, _) = fdstore::kept_memory(hv, &note_name(wanted.key), NOTE_BYTES)?;
        note.store_u32(NOTE_INSTANCE, wanted.instance, Relaxed);
        note.store_u32(NOTE_READ_ONLY, wanted.read_only.into(), Relaxed);
        note.store_u32(NOTE_RESOURCE_LEN, wanted.resource.len() as u32, Relaxed);
        note.copy_in(NOTE_RESOURCE, wanted.resource.as_bytes());
        let limiter: Arc<Limiter> = Arc::default();
        limiter.set(limits);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let controls = (0..QUEUES).map(|_| {
            let wake =
                EventFd::from_value_and_flags(0, flags).map_err(|e| AttachError::Os("eventfd", e.into()))?;
            Ok(Arc::new(RingControl::new(Arc::new(wake))))
        });
        let controls = controls.collect::<Result<Vec<_>, AttachError>>()?;
        let stats: Vec<_> = (0..QUEUES).map(|_| Arc::new(Stats::default())).collect();
        stats.iter().for_each(|s| s.drain_us.set(disk.fence().drain.as_micros() as u64));
        let rings = Arc::new(Rings { stats, controls, line: Line::default() });
        let common =
            Common { disk: disk.clone(), limiter: limiter.clone(), read_only: wanted.read_only, no_space };
        let hv = hv.new_channel()?;
        let crashed = domain.predecessor_crashed();
        let thread = {
            let (rings, wanted) = (rings.clone(), wanted.clone());
            std::thread::Builder::new()
                .name(note_name(wanted.key))
                .stack_size(256 << 10)
                .spawn(move || talk(&hv, &wanted, &rings, &common, crashed))
                .map_err(|e| AttachError::Os("thread", e))?
        };
        Ok(VhostDevice { wanted, limiter, rings, note, thread: Some(thread) })
    }

    /// To pause it.
    pub fn control(&self) -> DeviceControl {
        DeviceControl::new(self.rings.controls.clone())
    }

    /// Counters of each ring.
    pub fn stats(&self) -> Vec<Arc<Stats>> {
        self.rings.stats.clone()
    }

    /// Requests and bytes per second that it may do now.
    pub fn set_limits(&self, limits: Limits) -> bool {
        let Limits { iops, iops_burst, bytes, bytes_burst } = limits;
        for (i, value) in [iops, iops_burst, bytes, bytes_burst].into_iter().enumerate() {
            self.note.store_u64(NOTE_LIMITS + 8 * i, value, Relaxed);
        }
        self.limiter.set(limits)
    }

    /// The frontend knows that it is connected: the next incarnation may serve it before it has seen the store.
    pub fn known(&self) {
        self.note.store_u32(NOTE_KNOWN, 1, Relaxed);
    }

    /// Stops serving and keeps nothing.
    pub fn close(mut self, hv: &Hypercall) {
        self.rings.line.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(device = %self.wanted.key, "the session's thread panicked");
        }
        if let Err(error) = forget(hv, self.wanted.key) {
            tracing::warn!(device = %self.wanted.key, %error, "closing");
        }
    }
}

/// The session's thread.
fn talk(hv: &Hypercall, wanted: &Wanted, rings: &Rings, common: &Common, crashed: bool) {
    let key = wanted.key;
    let mut own_fault = crashed;
    let place = Place { hv, device: &talk_name(key), instance: wanted.instance.into() };
    rings.line.keep(place, &wanted.resource, crashed, |talk| {
        let mut device = Served { key, rings, common, threads: Vec::new() };
        session::serve(talk, &mut device, std::mem::take(&mut own_fault), || rings.line.settle())
    });
    tracing::info!(device = %key, "no longer served");
}

/// The device as one conversation sees it.
struct Served<'a> {
    key: DeviceKey,
    rings: &'a Rings,
    common: &'a Common,
    threads: Vec<(u16, Arc<RingControl>, JoinHandle<u16>)>,
}

impl session::Device for Served<'_> {
    fn features(&self) -> u64 {
        let geometry = self.common.disk.geometry();
        let read_only = self.common.read_only || geometry.read_only;
        request::features(&geometry, read_only, QUEUES) | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn config(&self) -> Option<Vec<u8>> {
        Some(request::config(&self.common.disk.geometry(), QUEUES))
    }

    fn inflight(&self) -> bool {
        true
    }

    fn start(&mut self, ring: session::Ring) -> Result<(), String> {
        let index = ring.index;
        let (doorbell, queue, inflight) = ring::split(ring);
        let stats = self.rings.stats[usize::from(index)].clone();
        let server = RingServer::new(self.common.clone(), queue, inflight, stats)
            .map_err(|e| format!("queue {index}: {e}"))?;
        let control = self.rings.controls[usize::from(index)].clone();
        control.restart();
        let theirs = control.clone();
        let thread = std::thread::Builder::new()
            .name(format!("{}.{index}", note_name(self.key)))
            .stack_size(256 << 10)
            .spawn(move || server.run(&doorbell, &theirs))
            .map_err(|e| format!("queue {index}: {e}"))?;
        tracing::debug!(device = %self.key, queue = index, "served");
        self.threads.push((index, control, thread));
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Option<u16> {
        let at = self.threads.iter().position(|(i, ..)| *i == index)?;
        let (_, control, thread) = self.threads.swap_remove(at);
        control.stop();
        let deadline = Instant::now() + END;
        while !thread.is_finished() {
            if Instant::now() > deadline {
                tracing::error!(device = %self.key, queue = index, "its thread does not end; left alone");
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        thread.join().ok()
    }
}
